"""The commands that look at runs and attack them again, and those of priors."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from unittest.mock import ANY

import pytest
from helpers.command import flowleak
from helpers.runs import recorded_run

from fl_app.audit.auditor import Auditor
from fl_app.audit.leakage_log import LogLine, append_line, read_lines
from fl_app.config import load_config
from fl_app.data import dataset_info
from fl_app.runs.folder import create_run
from server_strategies.attack_pool import pending


def test_what_was_recorded_and_never_attacked_is_attacked_by_the_runs_own_attack(
    tmp_path: Path,
) -> None:
    settings = f"client.batch_size=1 client.local_steps=1 runs_dir={tmp_path} name=x"
    config = load_config({"client": "sgd", "attack": "sme", "overrides": settings})
    run, _, _ = recorded_run(config)
    flowleak("attack", "x", "--set", "iterations=2", "--runs-dir", str(tmp_path))
    lines = read_lines(run / "leakage.jsonl")[0]
    assert [(line["attack"], line["iterations"]) for line in lines] == [("sme", 2)]
    assert "Nothing to do" in flowleak("attack", "x", "--runs-dir", str(tmp_path))
    with pytest.raises(ValueError, match="name another, --attack sme"):
        flowleak("attack", "x", "--set", "iterations=3", "--runs-dir", str(tmp_path))


def test_a_run_is_listed_shown_and_attacked_again(tmp_path: Path) -> None:
    settings = "client.batch_size=2 client.local_steps=2 client.lr=0.01"
    config = load_config({"client": "sgd", "overrides": f"{settings} runs_dir={tmp_path} name=x"})
    run, _, _ = recorded_run(config)
    runs_dir = ["--runs-dir", str(tmp_path)]

    shown = flowleak("attack", "x", "--attack", "sme", "--set", "iterations=2", *runs_dir)
    assert "sme" in shown
    assert "Nothing to do" in flowleak("attack", "x", *runs_dir)
    lines = read_lines(run / "leakage.jsonl")[0]
    assert [(line["status"], line["iterations"]) for line in lines] == [("ok", 2)]
    assert pending(run) == []
    assert str(run / lines[0]["picture"]) in flowleak("show", "x", *runs_dir)
    assert "photos" in flowleak("runs", *runs_dir)
    psnr = lines[0]["metrics"]["psnr"]
    assert json.loads(flowleak("runs", "--json", *runs_dir)) == [
        {
            "run": "x", "path": str(run), "started": ANY, "dataset": "photos",
            "optimizer": "sgd", "lr": 0.01, "attack": "flow_matching", "lines": 1,
            "best_psnr": psnr["mean"], "mean_colour_psnr": psnr["baseline"],
            "problems": [],
        }
    ]  # fmt: skip
    assert json.loads(flowleak("show", "x", "--json", *runs_dir)) == lines
    assert len(Auditor(run, config, config.knowledge(dataset_info(config.dataset))).lines()) == 1

    comparison = ["attack", "x", "--attack", "idlg,ggl", "--budget", "iterations=1", *runs_dir]
    shown = flowleak(*comparison)
    assert str(run / "comparison.md") in shown and "random training image" in shown
    lines = read_lines(run / "leakage.jsonl")[0]
    assert sorted(line["attack"] for line in lines) == ["ggl", "idlg", "sme"]
    flowleak(*comparison)  # each has its line
    assert read_lines(run / "leakage.jsonl")[0] == lines
    with pytest.raises(ValueError, match="--set and --follow are allowed with one attack"):
        flowleak(*comparison, "--set", "options.lr=0.5")

    with pytest.raises(ValueError, match=r"options.speed .* allowed for sme"):
        flowleak("attack", "x", "--attack", "sme", "--set", "options.speed=2", *runs_dir)
    with pytest.raises(FileNotFoundError, match="no run 'y'"):
        flowleak("show", "y", *runs_dir)

    flowleak("rounds", "x", *runs_dir)
    assert all(path.stat().st_mode & 0o077 == 0 for path in [run, *run.rglob("*")])
    flowleak("delete", "x", "--yes", *runs_dir)
    assert not run.exists()  # nothing was in it that no run makes


def test_a_table_in_a_pipe_is_as_wide_as_what_it_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    name = "a-run-whose-name-is-longer-than-the-screen-is-wide"
    folder = create_run(load_config({"overrides": f"runs_dir={tmp_path} name={name}"}))
    why = f"{'long ' * 30}reason"
    line = LogLine(1, "7", 0, "sme", "skipped", "counts", reasons={"metrics": why})
    append_line(folder / "leakage.jsonl", replace(line, status="ok"))
    assert name in flowleak("runs", "--runs-dir", str(tmp_path))
    assert why in flowleak("show", name, "--runs-dir", str(tmp_path))
