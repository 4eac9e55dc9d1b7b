"""The attack pool with real Ray actors and a runner that fails on request."""

from __future__ import annotations

import io
import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from helpers.attacks import pretended
from rich.console import Console

from fl_app.config import AttackConfig, ConfigError, PoolConfig, PriorConfig
from fl_app.protocol import Knowledge, LocalTraining, Observation, Reconstruction
from server_strategies import attack_pool
from server_strategies.attack_pool import AttackPool, Job, pending, read_queue


def obedient(observation: Observation, _: Knowledge, attack: AttackConfig, *rest: Any) -> Any:
    """Do what `options` say: raise or die, each time or only the first."""
    *_, report = rest
    report(1, 0.5)
    marker = Path(attack.options["folder"]) / observation.id
    first = not marker.exists()
    with marker.open("a") as tries:
        tries.write(f"{os.getpid()}\n")
    order = attack.options["order"]
    if order == "raise" or (order == "raise once" and first):
        raise RuntimeError("asked to raise\nand more")
    if order == "refuse":
        raise ConfigError("lr is -1; allowed: above 0")
    if order == "die" or (order == "die once" and first):
        os._exit(1)
    return pretended(observation, attack)


def job(folder: Path, order: str, round_: int) -> Job:
    images = {"x": torch.full((1, 3, 2, 2), round_ / 10)}
    attack = AttackConfig(
        name="fake", iterations=3, options={"order": order, "folder": str(folder)}
    )
    knowledge = Knowledge("convnet", 10, (3, 2, 2), (0.5,) * 3, (0.5,) * 3, LocalTraining())
    return Job(
        Observation(images, images, 1, round_, 5, 0), knowledge, attack, PriorConfig(), seed=3
    )


@pytest.fixture(scope="module", autouse=True)
def _no_ray_left() -> Iterator[None]:
    yield
    assert not ray.is_initialized(), "the pool must end the Ray that it started"


def test_every_job_gets_one_outcome_whatever_happens_to_its_worker(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    orders = ("succeed", "raise", "raise once", "die", "die once", "full disk", "refuse")
    results: dict[int, float] = {}
    errors: dict[int, str] = {}

    def on_result(done: Job, found: Reconstruction, device: str) -> None:
        assert device
        if done.attack.options["order"] == "full disk":
            raise OSError("no space left")
        results[done.observation.round] = float(found.images.mean())

    def on_error(failed: Job, message: str) -> None:
        assert len(pending(tmp_path)) > 0  # the entry goes only when this has returned
        errors[failed.observation.round] = message

    tries = tmp_path / "tries"
    tries.mkdir()
    shown = io.StringIO()
    with AttackPool(tmp_path, PoolConfig(workers=1), on_result, on_error, obedient) as pool:
        for round_, order in enumerate(orders, start=1):
            pool.submit(job(tries, order, round_))
        assert len(pending(tmp_path)) > 0
        pool.drain(Console(file=shown, force_terminal=True))

    assert results == pytest.approx({1: 0.1, 3: 0.3, 5: 0.5})
    assert errors[2] == "RuntimeError: asked to raise"
    assert errors[4].startswith("ActorDiedError")
    assert 6 not in errors and "no space left" in caplog.text  # it has its numbers, or a second try
    assert errors[7] == "ConfigError: lr is -1; allowed: above 0"
    (left,) = pending(tmp_path)
    assert left.observation == "round-0006-node-5"
    processes = {file.name[:10]: file.read_text().split() for file in tries.iterdir()}
    assert len(processes["round-0002"]) == 2 and len(set(processes["round-0002"])) == 1
    assert len(set(processes["round-0005"])) == 2  # the second try was on a fresh worker
    assert len(processes["round-0007"]) == 1  # it would be refused again
    assert "100%" in shown.getvalue()


def test_an_attack_whose_outcome_is_being_recorded_counts_as_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    shown, starts, init = io.StringIO(), [], ray.init

    def slow_at_first(**options: Any) -> None:
        starts.append(options)
        if len(starts) == 1:
            raise Exception("The current node timed out during startup.")
        init(**options)

    monkeypatch.setattr(ray, "init", slow_at_first)

    def slow(*_: object) -> None:
        deadline = time.monotonic() + 30
        while "being scored" not in shown.getvalue() and time.monotonic() < deadline:
            time.sleep(0.1)

    with AttackPool(tmp_path, PoolConfig(workers=1), slow, slow, obedient) as pool:
        pool.submit(job(tmp_path, "succeed", 1))
        pool.drain(Console(file=shown, force_terminal=True, width=120))
    frames = shown.getvalue().split("attacks")
    assert any("being scored" in frame and "100%" in frame for frame in frames)
    assert len(starts) == 2 and "is started again" in caplog.text


def test_a_ctrl_c_that_a_callback_swallows_still_ends_it(tmp_path: Path) -> None:
    def swallow() -> int:
        with suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        return 1

    before = signal.getsignal(signal.SIGINT)
    pool = AttackPool(tmp_path, PoolConfig(), lambda *_: None, lambda *_: None, obedient)
    with pool, pytest.raises(KeyboardInterrupt):
        pool.drain(Console(file=io.StringIO()), swallow)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_cluster_that_is_gone_is_told_and_the_queue_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setattr(attack_pool, "_TOO_LONG", 1.0)
    with AttackPool(tmp_path, PoolConfig(), lambda *_: None, lambda *_: None, obedient) as pool:
        for round_ in (1, 2, 3):
            pool.submit(job(tmp_path, "succeed", round_))
        with pytest.raises(ConnectionError, match=f"no Ray cluster answers at {address}"):
            pool.drain(Console(file=io.StringIO()))
    assert f"no Ray cluster answers at {address} yet" in caplog.text
    assert len(pending(tmp_path)) == 3


def test_jobs_without_outcome_can_be_taken_up_again(tmp_path: Path) -> None:
    with AttackPool(
        tmp_path, PoolConfig(workers=1), lambda *_: None, lambda *_: None, obedient
    ) as pool:
        submitted = [job(tmp_path, "die", round_) for round_ in (1, 2)]
        for each in submitted:
            pool.submit(each)
        # Left without drain, as a killed run leaves it.
    left = pending(tmp_path)
    assert [entry.observation for entry in left] == [each.observation.id for each in submitted]
    assert left[0].attack == submitted[0].attack and left[0].seed == 3

    (tmp_path / "queue" / "broken.json").write_text("{}")
    entries, bad = read_queue(tmp_path)
    assert entries == left == pending(tmp_path)
    assert "queue/broken.json can't be read: observation is missing" in bad["broken"]
