"""A user's function of the log's lines, and TensorBoard, which is one."""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.audit import images, reconstruction_of
from helpers.reports import Pretence

from fl_app.audit.auditor import Auditor
from fl_app.audit.on_line import load_on_line, told_lines
from fl_app.audit.truth import Truth, write_truth
from fl_app.config import ConfigError, load_config
from fl_app.data import dataset_info
from fl_app.protocol import Observation
from fl_app.runs.deleting import delete_run
from fl_app.runs.facts import open_auditor
from fl_app.runs.folder import create_run

HOOKS = """
lines = []
def keep(line):
    lines.append(dict(line))
    line.clear()
def fail(line):
    lines.append(dict(line))
    raise SystemExit("no network")
answer = 42
"""


@pytest.fixture
def hooks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module of the user's, where the command is typed; nothing is left of it."""
    (tmp_path / "my_hooks.py").write_text(HOOKS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    load_on_line("my_hooks:keep")
    yield sys.modules["my_hooks"]
    del sys.modules["my_hooks"]


def audited(runs_dir: Path, target: str) -> Path:
    """Audit an update of three images, and skip two."""
    config = load_config({"overrides": f"runs_dir={runs_dir}/runs audit.lpips_weights={runs_dir}"})
    run, private = create_run(config), images(3)
    write_truth(run, Truth(private, (4, 0, 2), ((0,), (1,), (2,)), 1, 7))
    with told_lines(target) as on_line:
        knowledge = config.knowledge(dataset_info(config.dataset))
        auditor = Auditor(run, config, knowledge, on_line=on_line)
        seen = Observation({"x": torch.rand(2)}, {"x": torch.rand(2)}, 3, round=1, node=7, client=0)
        auditor.record(seen, reconstruction_of(private, (4, 0, 2)))
        for node in (8, 9):
            auditor.record_skipped(1, node, "no reply")
    return run


def logged(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "leakage.jsonl").read_text().splitlines()]


def test_a_function_gets_each_line_as_it_stands_in_the_log(tmp_path: Path, hooks: Any) -> None:
    run = audited(tmp_path, "my_hooks:keep")
    assert hooks.lines == [line | {"folder": str(run)} for line in logged(run)]
    assert (run / hooks.lines[0]["picture"]).is_file() and len(hooks.lines) == 3


def test_what_it_raises_is_said_once_and_changes_nothing(
    tmp_path: Path, hooks: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("WARNING", logger="flwr"):
        run = audited(tmp_path, "my_hooks:fail")
    assert len(logged(run)) == len(hooks.lines) == 3
    said = [record.message for record in caplog.records if "on_line" in record.message]
    assert len(said) == 1 and "my_hooks:fail raised SystemExit: no network" in said[0]


def test_one_that_never_returns_holds_up_nothing(
    tmp_path: Path, hooks: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("fl_app.audit.on_line._PATIENCE", 0.01)
    hooks.keep = lambda line: threading.Event().wait()
    with caplog.at_level("WARNING", logger="flwr"):
        run = audited(tmp_path, "my_hooks:keep")
    assert len(logged(run)) == 3 and "still busy" in caplog.text


@pytest.mark.parametrize(
    ("target", "why"),
    [
        ("my_hooks:missing", "can't be imported: AttributeError"),
        ("no_such_module:f", "no_such_module is not installed"),
        ("my_hooks:answer", "is 42; allowed: a function"),
    ],
)
def test_what_can_not_be_called_is_refused(target: str, why: str, hooks: Any) -> None:
    with pytest.raises(ConfigError, match=why), told_lines(target):
        pass
    with pytest.raises(ConfigError, match=r"audit.on_line is 'print'; allowed: module:function"):
        load_config({"overrides": "audit.on_line=print"})


def test_what_a_runs_folder_names_is_not_imported(tmp_path: Path, hooks: Any) -> None:
    (tmp_path / "evil.py").write_text("raise SystemExit('imported')")
    run = Pretence(clients=1, overrides="audit.on_line=evil:f").write(tmp_path / "runs")
    assert open_auditor(run, print).config.audit.on_line == "evil:f"
    assert "evil" not in sys.modules


def test_tensorboard_shows_scores_baselines_and_pictures_by_round(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="flowleak[tensorboard] is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from flowleak.tensorboard import write

    run = Pretence(clients=1, rounds=2).write(tmp_path)
    lines = logged(run)
    for line in lines:
        write(line | {"folder": str(run)})
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    read = {tag: [(each.step, each.value) for each in events.Scalars(tag)]
            for tag in events.Tags()["scalars"]}  # fmt: skip

    def by_round(values: list[float]) -> list[Any]:
        return [(round_, pytest.approx(value)) for round_, value in enumerate(values, start=1)]

    psnr = [line["metrics"]["psnr"] for line in lines]
    found = [sum(line["identification"]["identified"]) / 5 for line in lines]
    assert read == {
        "psnr/flow_matching/client 0": by_round([each["mean"] for each in psnr]),
        "psnr/mean colour/client 0": by_round([12, 12]),
        "psnr/single colour/client 0": by_round([14, 14]),
        "identified/flow_matching/client 0": by_round(found),
        "identified/chance/client 0": by_round([1 / 200, 1 / 200]),
        "matching_loss/flow_matching/client 0": by_round([0.5 * 0.96**99] * 2),
    }
    pictures = events.Images("pictures/flow_matching/client 0")
    assert [each.step for each in pictures] == [1, 2] and pictures[0].width > 100
    # They show private images.
    assert (run / "tensorboard").stat().st_mode & 0o077 == 0
    delete_run(run, private_only=True)
    assert not (run / "tensorboard").exists()
