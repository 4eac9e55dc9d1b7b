"""Every reader of a run, on files damaged by a seeded generator: each costs itself alone."""

from __future__ import annotations

import json
import random
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.attacks import pretended
from helpers.command import flowleak
from helpers.damage import WHOLE, Damage, altered_json, altered_tensors, flipped

from fl_app.audit import auditor as auditing
from fl_app.audit.auditor import Auditor
from fl_app.audit.leakage_log import read_lines
from fl_app.audit.truth import Truth, write_truth
from fl_app.config import AttackConfig, Config, ConfigError, load_config, to_yaml
from fl_app.data import dataset_info
from fl_app.lan import commands as lan
from fl_app.protocol import Observation
from fl_app.runs import attacking, comparison
from fl_app.runs.folder import create_run
from fl_app.util.reading import BrokenFileError
from server_strategies.attack_pool import Job, QueueEntry, enqueue, pending, queue_path
from server_strategies.observations import ObservationStore

NODES = (7, 8)
SLOWEST = 20  # seconds that a trial may take, before it is a hang
FILES = {
    "config.yaml": "config.yaml",
    "log": "leakage.jsonl",
    "training": "training.json",
    "observation": "observations/round-0001-node-7.safetensors",
    "truth": "truth/round-0001-node-7.safetensors",
    "reconstruction": "reconstructions/round-0001-client-7-sme.safetensors",
    "queue entry": "queue/of-node-7.json",
}
ALWAYS = ("empty", "truncated", "a pipe")
# What each file is read by.
COMMANDS = {
    "config.yaml": ("runs", "show", "rounds", "report", "attack"),
    "log": ("runs", "show", "rounds", "report", "export", "attack", "score"),
    "training": ("rounds", "show", "report"),
    "observation": ("comparison", "score"),
    "truth": ("report", "comparison", "score"),
    "reconstruction": ("report", "comparison", "score"),
    "queue entry": ("attack",),
}


class InlinePool:
    """Does as the AttackPool, in this process, with attacks that pretend."""

    unfinished = 0

    def __init__(self, auditor: Auditor) -> None:
        self._auditor = auditor

    def __enter__(self) -> InlinePool:
        return self

    def __exit__(self, *exception: object) -> None: ...

    def take(self, job: Job) -> None:
        try:
            found = pretended(job.observation, job.attack)
        except Exception as error:
            self._auditor.record_failure(job.observation, job.attack.name, str(error), job.id)
        else:
            self._auditor.record(job.observation, found, job.id)
        queue_path(self._auditor.run_dir, job.id).unlink()

    def drain(self, console: object, feed: Any) -> None:
        while feed():
            pass


@dataclass(frozen=True)
class Runs:
    """Two runs of the same content, and a folder with the truth that one of them lacks."""

    folder: Path

    @property
    def run(self) -> Path:
        return self.folder / "runs" / "x"

    def call(self, command: str) -> str:
        if command == "report":
            return self._called(["report", "x"]) + self._called(["report", "unscored"])
        words = {
            "attack": ["attack", "x"],
            "comparison": ["attack", "x", "--attack", "dlg,idlg", "--budget", "iterations=1"],
            "score": ["score", "unscored", "--truth", str(self.run)],
            "runs": ["runs"],
        }.get(command, [command, "x"])
        return self._called(words)

    def _called(self, words: list[str]) -> str:
        return flowleak(*words, "--runs-dir", str(self.folder / "runs"))


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with runs as `Runs` has them, all small."""
    folder = tmp_path_factory.mktemp("template")
    base = f"client.batch_size=1 client.local_steps=1 runs_dir={folder}/runs"
    base += f" audit.lpips_weights={folder}"  # there are none
    for name, settings in (("x", ""), ("unscored", "audit.truth=false audit.labels=unknown")):
        config = load_config({"client": "sgd", "overrides": f"{base} name={name} {settings}"})
        run = create_run(config)
        auditor = Auditor(run, config, config.knowledge(dataset_info(config.dataset)))
        auditor.__dict__["_prior"] = (None, {"prior_residual": "off"})
        for node in NODES:
            images = torch.rand(1, 3, 32, 32)
            seen = Observation({"x": images}, {"x": images}, 1, round=1, node=node, client=node)
            ObservationStore(run).save(seen)
            if name == "x":
                write_truth(run, Truth(images, (0,), ((0,),), 1, node))
            found = replace(pretended(seen, AttackConfig("sme")), labels_source="given")
            auditor.record(seen, found, f"{name}-{node}")
            entry = QueueEntry(seen.id, AttackConfig("dlg"), config.prior, 0, f"of-node-{node}")
            enqueue(run, entry)
        # YAML that JSON is: the generator alters it as such.
        plain = to_yaml(config, {"started": "2026-01-01"})
        import yaml

        (run / "config.yaml").write_text(json.dumps(yaml.safe_load(plain)))
        rounds = [{"round": 1, "train": {}, "evaluate": {"accuracy": 0.5}}]
        (run / "training.json").write_text(json.dumps(rounds))
    return folder


@cache
def attack_config(name: str) -> Config:
    return load_config({"attack": name})


def quick_config(run_config: dict[str, str]) -> Config:
    return attack_config(run_config["attack"])


@pytest.fixture(autouse=True)
def without_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_prior(*_: object, **__: object) -> None:
        raise ValueError("off")

    monkeypatch.setattr(attacking, "open_pool", InlinePool)
    monkeypatch.setattr(auditing, "load_flow", no_prior)
    monkeypatch.setattr(auditing, "baseline_images", lambda *_: ({}, {}))
    monkeypatch.setattr(comparison, "load_config", quick_config)


@contextmanager
def no_hang() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise AssertionError(f"it took more than {SLOWEST} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SLOWEST)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def outcomes(runs: Runs, file: str) -> tuple[str, list[str]]:
    """Call every command that reads a file; return what they say, and those that refuse."""
    said, refused = "", []
    for command in COMMANDS[file]:
        try:
            with no_hang():
                said += runs.call(command)
        except (ConfigError, BrokenFileError, IsADirectoryError, OSError) as error:
            refused.append(command)
            said += str(error)
    return said, refused


def check(runs: Runs, file: str, damage: Damage, rng: random.Random, names: bool) -> None:
    """Damage a file; check that it costs itself, and that it is named where `names`."""
    # A reconstruction is scored where there was no truth.
    run = runs.folder / "runs" / "unscored" if file == "reconstruction" else runs.run
    path = run / FILES[file]
    damage(path, rng)
    said, refused = outcomes(runs, file)
    assert "\x1b" not in said
    if names:
        assert path.name in said, said
    # A run's configuration is needed to attack it; all else is read without it.
    assert set(refused) <= ({"attack"} if file == "config.yaml" else set()), said
    if file in ("config.yaml", "log"):
        listed = {run["run"]: run for run in json.loads(_without_warnings(runs))}
        assert listed["unscored"]["lines"] >= 2 and listed["unscored"]["problems"] == []
        assert "x" in listed or not path.exists()
    good = read_lines(runs.run / "leakage.jsonl")[0]
    done = {line["job"] for line in good if line["node"] == "8" and line["status"] == "ok"}
    if {"attack", "comparison"} & {*COMMANDS[file]} - {*refused}:
        # Where the log can't be written, the job stays queued.
        assert "of-node-8" in done or [entry.id for entry in pending(runs.run)].count("of-node-8")
    if "score" in COMMANDS[file]:
        lines = read_lines(runs.folder / "runs" / "unscored" / "leakage.jsonl")[0]
        scored = [line["node"] for line in lines if line["metrics"]]
        assert "8" in scored, said


def _without_warnings(runs: Runs) -> str:
    said = flowleak("runs", "--json", "--runs-dir", str(runs.folder / "runs"))
    return said[said.index("[\n") :]


@pytest.mark.parametrize("file", FILES)
def test_a_file_that_is_lost_costs_itself_and_is_named(
    tmp_path: Path, template: Path, file: str
) -> None:
    drawn = random.Random(file).sample(sorted({*WHOLE} - {*ALWAYS}), 1)
    for number, words in enumerate([*ALWAYS, *drawn]):
        damage = WHOLE[words]
        if file == "log" and words == "empty":
            continue  # as before the first attack
        folder = tmp_path / str(number)
        shutil.copytree(template, folder)
        for config in folder.glob("runs/*/config.yaml"):
            config.write_text(config.read_text().replace(str(template), str(folder)))
        try:
            check(Runs(folder), file, damage, random.Random(number), names=True)
        except BaseException as error:
            raise AssertionError(f"{file} {words}: {error}") from error


@pytest.mark.parametrize("file", FILES)
def test_a_file_with_a_wrong_value_costs_itself(tmp_path: Path, template: Path, file: str) -> None:
    alter = altered_tensors if FILES[file].endswith(".safetensors") else altered_json
    for seed in range(3):
        folder = tmp_path / str(seed)
        shutil.copytree(template, folder)
        damage = flipped if seed % 3 == 0 else alter
        try:
            check(Runs(folder), file, damage, random.Random(seed), names=False)
        except BaseException as error:
            damaged = Runs(folder).run / FILES[file]
            raise AssertionError(f"{damaged}, seed {seed}: {error}") from error


def test_runs_that_can_not_be_resumed_are_named(
    tmp_path: Path, template: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(template, tmp_path / "t")
    runs = Runs(tmp_path / "t")
    (runs.run / "config.yaml").write_text("{")
    (runs.run.parent / "unscored" / "queue" / "of-node-7.json").write_text("{}")
    assert [run.name for run in lan._unfinished(runs.run.parent)] == ["unscored"]
    said = capsys.readouterr().out
    assert "x/config.yaml is no YAML" in said and "of-node-7.json can't be read" in said
