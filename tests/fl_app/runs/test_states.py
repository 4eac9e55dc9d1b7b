"""Training states: checkpoints of a run, starting from one, and a run by round."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord, Message
from flwr.serverapp.strategy import FedAvg
from helpers.command import flowleak
from helpers.federation import LocalGrid, average, real_client, toy_client, watch
from helpers.federation import start as start_toy
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from fl_app import server_app
from fl_app.audit.auditor import Auditor
from fl_app.audit.leakage_log import LogLine, append_line
from fl_app.config import ConfigError, WatchConfig, load_config
from fl_app.protocol import Observation
from fl_app.runs.folder import create_run
from fl_app.runs.states import ModelStore, find_state, kept, load_state
from server_strategies import honest_but_curious
from server_strategies.checkpointing import Checkpointing

NODES = 2


def federation(overrides: str) -> LocalGrid:
    """Return real clients in this process, on the embedded photos."""
    return LocalGrid([real_client(partition, overrides) for partition in range(NODES)])


def run(tmp_path: Path, settings: str) -> tuple[Path, list[Observation], ArrayRecord]:
    """Run a whole training as the ServerApp does; return what the server recorded."""
    overrides = f"runs_dir={tmp_path} num_clients={NODES} client.local_steps=2 {settings}"
    config, knowledge, model = server_app._prepare({"overrides": overrides}, simulated=True)
    folder = create_run(config)
    seen: list[Observation] = []
    auditor = Auditor(folder, config, knowledge)
    assert server_app._train(federation(overrides), auditor, model, seen.append)
    return folder, seen, model


def test_clients_that_all_fail_leave_their_reasons(tmp_path: Path) -> None:
    overrides = f"runs_dir={tmp_path} num_clients={NODES} rounds=1"
    config, knowledge, model = server_app._prepare({"overrides": overrides}, simulated=True)
    auditor = Auditor(create_run(config), config, knowledge)
    grid = LocalGrid([toy_client(0.0, node, raises="no disk") for node in range(NODES)])
    assert not server_app._train(grid, auditor, model, lambda _: None)
    failed = [(line["status"], "no disk" in line["error"]) for line in auditor.lines()]
    assert failed == [("skipped", True)] * NODES


def test_a_run_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    settings = "watch.rounds=[1] watch.every=2 watch.clients=[0]"
    folder, seen, _ = run(tmp_path, f"name=first rounds=4 checkpoints=2 {settings}")
    assert [observation.round for observation in seen] == [1, 2, 4]
    assert ModelStore(folder, 2).rounds() == [2, 4]
    after_four = load_file(folder / "models" / "round-0004.safetensors")

    overrides = f"name=second rounds=1 start_from=first:4 {settings}"
    again, (observation,), model = run(tmp_path, overrides)
    for name, weight in after_four.items():
        assert torch.equal(model.to_torch_state_dict()[name], weight)
        assert torch.equal(observation.w0[name], weight)  # what the clients were sent
    path = again / "models" / "round-0001.safetensors"
    assert not torch.equal(load_file(path)["conv1.weight"], after_four["conv1.weight"])
    third = run(tmp_path, f"name=third rounds=1 start_from={path}")[2].to_torch_state_dict()
    assert torch.equal(third["fc1.bias"], load_file(path)["fc1.bias"])


@pytest.mark.parametrize(
    ("most", "last", "expected"),
    [
        (20, 3, {1, 2, 3}),
        (4, 4, {1, 2, 3, 4}),
        (4, 5, {2, 4, 5}),
        (4, 8, {2, 4, 6, 8}),
        (4, 9, {4, 8, 9}),
        (1, 6, {6}),
        (3, 1000, {512, 1000}),
    ],
)
def test_checkpoints_are_thinned_evenly(most: int, last: int, expected: set[int]) -> None:
    there: set[int] = set()
    for round_ in range(1, last + 1):  # as a run writes them
        there = kept({*there, round_}, most)
        assert round_ in there and len(there) <= most
    assert there == expected


def test_a_full_disk_costs_the_checkpoint_and_not_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = ModelStore(tmp_path, 5)
    start_toy(Checkpointing(FedAvg(), store.save), [toy_client(0.1, i) for i in range(NODES)])
    assert store.rounds() == [1, 2]

    def full(*_: object, **__: object) -> None:
        raise SafetensorError("I/O error: No space left on device")  # as safetensors does

    monkeypatch.setattr("fl_app.util.tensors.save_file", full)
    clients = [toy_client(0.1, i) for i in range(NODES)]
    assert start_toy(Checkpointing(FedAvg(), store.save), clients, rounds=3) is not None
    assert f"round 3: its model is not kept: {tmp_path}/models/round-0003" in caplog.text
    assert "can't be written: I/O error: No space left on device" in caplog.text
    assert sorted(file.name for file in (tmp_path / "models").iterdir()) == [
        "round-0001.safetensors",
        "round-0002.safetensors",
    ]


def test_a_round_without_a_trained_model_leaves_no_checkpoint(tmp_path: Path) -> None:
    store = ModelStore(tmp_path, 5)
    start_toy(Checkpointing(average(), store.save), [toy_client(0.1, 0, raises="no")], rounds=1)
    assert store.rounds() == []


def test_a_round_that_is_not_watched_is_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Message] = []
    for name in ("sent_weights", "returned_weights"):
        original = getattr(honest_but_curious, name)

        def spy(message: Message, *others: Any, original: Any = original) -> Any:
            read.append(message)
            return original(message, *others)

        monkeypatch.setattr(honest_but_curious, name, spy)
    seen: list[Observation] = []
    clients = [toy_client(0.1, i) for i in range(NODES)]
    start_toy(watch(FedAvg(), seen, [], rounds=[3]), clients, rounds=4)
    assert {observation.round for observation in seen} == {3}
    assert len(read) == 1 + NODES  # what was sent to all, and each reply


def watched(last: int, **options: Any) -> list[int]:
    return [round_ for round_ in range(1, last + 1) if WatchConfig(**options).watches(round_)]


def test_which_rounds_are_watched() -> None:
    assert watched(3) == [1, 2, 3]
    assert watched(12, rounds=[1, 5], every=4) == [1, 4, 5, 8, 12]
    assert watched(9, every=3) == [3, 6, 9]


MODEL = {"a.weight": torch.zeros(2, 3), "a.bias": torch.zeros(2)}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"a.weight": torch.zeros(2, 3)}, "no state of toy for 2 classes: it lacks a.bias"),
        ({**MODEL, "b": torch.zeros(1)}, "it adds b"),
        (
            {**MODEL, "a.weight": torch.zeros(200, 3)},
            r"a.weight has shape \(200, 3\); needed: \(2, 3\)",
        ),
        ({**MODEL, "a.bias": torch.tensor([0.0, torch.nan])}, "a.bias holds NaN"),
        ({**MODEL, "a.bias": torch.zeros(2, dtype=torch.int64)}, "a.bias is torch.int64"),
        (None, "can't be read"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(
    tmp_path: Path, content: dict[str, torch.Tensor] | None, words: str
) -> None:
    path = tmp_path / "state.safetensors"
    if content is None:
        path.write_bytes(b"not weights")
    else:
        save_file(content, path)
    with pytest.raises(ConfigError, match=words):
        load_state(path, MODEL, "toy for 2 classes")


def test_a_run_says_why_it_cannot_start_from_there(tmp_path: Path) -> None:
    config = load_config({"overrides": f"runs_dir={tmp_path} name=first"})
    ModelStore(create_run(config), 9).save(2, MODEL)
    for start_from, words in (
        ("first", "allowed: RUN:ROUND, as audit:2, or the path"),
        ("first:1", "no model of round 1 in .*there are rounds: 2"),
        ("other:2", "no run 'other'.*there: first"),
        ("x.safetensors", "is no file"),
    ):
        with pytest.raises(ConfigError, match=f"start_from is '{start_from}'.*{words}"):
            find_state(start_from, tmp_path)
    with pytest.raises(ConfigError, match="convnet for 6 classes of 3x32x32 images: it lacks"):
        server_app._prepare(
            {"overrides": f"runs_dir={tmp_path} start_from=first:2"}, simulated=True
        )


def test_a_run_by_round(tmp_path: Path) -> None:
    folder = create_run(load_config({"overrides": f"runs_dir={tmp_path} name=x rounds=3"}))
    evaluated = [{"round": r, "train": {}, "evaluate": {"accuracy": r / 10}} for r in (1, 2, 3)]
    (folder / "training.json").write_text(json.dumps(evaluated))

    def log(round_: int, node: int, ssim: float, status: str = "ok") -> None:
        scores = {"psnr": (20 * ssim, 12.0), "ssim": (ssim, 0.1)}
        metrics = {
            name: {"mean": mean, "low": None, "high": None, "baseline": grey}
            for name, (mean, grey) in scores.items()
            if status == "ok"
        }
        line = LogLine(round_, str(node), node, "sme", status, "counts", metrics=metrics)
        append_line(folder / "leakage.jsonl", line)

    log(1, 7, 0.9)
    log(1, 7, 0.6)  # attacked again: the last line counts
    log(1, 8, 0.8)
    log(3, 7, 0.4)
    log(3, 8, 0.0, status="failed")
    shown = flowleak("rounds", "x", "--runs-dir", str(tmp_path))
    table = [line for line in (folder / "rounds.md").read_text().splitlines() if line[:1] == "|"]
    # Two updates have no interval, and lines of before no values by image.
    assert table[2:] == [
        "| 1 | 10.0 | sme | counts | 2/2 | - | 14.0 (12.0, 16.0) | - | - | 12.0 | - "
        "| 0.700 (0.600, 0.800) | - | - | 0.100 |  |",
        "| 2 | 20.0 | - | - | - | - | - | - | - | - | - | - | - | - | - |  |",
        "| 3 | 30.0 | sme | counts | 1/2 | - | 8.0 | - | - | 12.0 | - | 0.400 | - | - | 0.100 "
        "| no better than the mean colour |",
    ]
    assert str(folder / "rounds.png") in shown and "0.700" in shown
    with Image.open(folder / "rounds.png") as image:
        assert image.size[0] > 400
