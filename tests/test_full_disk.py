"""A disk that is really full: a small one in memory."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers.attacks import pretended
from rich.console import Console

from fl_app.audit import auditor as auditing
from fl_app.audit.auditor import Auditor
from fl_app.audit.truth import Truth, write_truth
from fl_app.config import AttackConfig, AuditConfig, Config
from fl_app.protocol import Knowledge, LocalTraining, Observation
from fl_app.runs import attacking
from fl_app.runs.attacking import finish_attacks
from fl_app.runs.folder import create_run
from fl_app.runs.states import ModelStore
from server_strategies.attack_pool import AttackPool, Job, enqueue, pending
from server_strategies.observations import ObservationStore

SIDE = 64
KNOWLEDGE = Knowledge("convnet", 10, (3, SIDE, SIDE), (0.5,) * 3, (0.2,) * 3, LocalTraining())
UNSCORED = AuditConfig(truth=False, labels="unknown")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """Yield the folder of a disk of 1 MB."""
    if os.geteuid() != 0:
        pytest.skip("a disk of one's own needs root")
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no disk can be mounted here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture(autouse=True)
def no_prior(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object, **__: object) -> None:
        raise ValueError("off")

    monkeypatch.setattr(auditing, "load_flow", missing)


def fill(folder: Path, left: int) -> Path:
    """Fill a disk but for some bytes; return the file that does."""
    path = folder / "filler"
    space = os.statvfs(folder)
    path.write_bytes(bytes(max(0, space.f_bavail * space.f_frsize - left)))
    return path


def observation(node: int = 7) -> Observation:
    weights = {"x": torch.rand(1, 3, SIDE, SIDE)}
    return Observation(weights, weights, 1, round=1, node=node, client=node)


def auditor_on(disk: Path) -> Auditor:
    config = Config(runs_dir=str(disk / "runs"), audit=UNSCORED)
    return Auditor(create_run(config), config, KNOWLEDGE)


def test_what_does_not_fit_is_an_error_of_the_system_and_leaves_nothing(disk: Path) -> None:
    run = auditor_on(disk).run_dir
    fill(disk, left=8192)
    seen = observation()
    with pytest.raises(OSError, match=r"can't be written: .*No space left"):
        ObservationStore(run).save(seen)
    with pytest.raises(OSError, match="No space left"):
        write_truth(run, Truth(seen.w0["x"], (0,), ((0,),), 1, 7))
    ModelStore(run, 1).save(1, seen.w0)  # logged; the training goes on
    assert ObservationStore(run).ids() == [] and ModelStore(run, 1).rounds() == []
    assert not any((run / "observations").iterdir())


def test_a_finished_attack_keeps_its_numbers_or_stays_queued(
    disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    auditor = auditor_on(disk)
    seen = observation()
    ObservationStore(auditor.run_dir).save(seen)
    attack = AttackConfig("sme")
    job = Job(seen, KNOWLEDGE, attack, auditor.config.prior, 0)
    enqueue(auditor.run_dir, job)
    pools: list[AttackPool] = []

    def pool(of: Auditor) -> AttackPool:
        pools.append(attacking_pool(of))
        return pools[-1]

    attacking_pool = attacking.open_pool
    monkeypatch.setattr(attacking, "open_pool", pool)
    monkeypatch.setattr(AttackPool, "_run", lambda *_: (pretended(seen, attack), "cpu"))

    filler = fill(disk, left=0)
    assert finish_attacks(auditor, Console(quiet=True)) == 1
    assert auditor.lines() == [] and [entry.id for entry in pending(auditor.run_dir)] == [job.id]

    filler.unlink()
    fill(disk, left=8192)  # a line fits, a picture does not
    assert finish_attacks(auditor, Console(quiet=True)) == 1
    (line,) = auditor.lines()
    assert line["status"] == "ok" and line["iterations"] == 1 and line["picture"] is None
    assert "No space left" in line["reasons"]["picture"]
    assert pending(auditor.run_dir) == []
    assert not any((auditor.run_dir / "reconstructions").iterdir())
