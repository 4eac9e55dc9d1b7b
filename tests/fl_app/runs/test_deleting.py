"""Runs' end: what goes, what stays, and that nothing else is touched."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers.command import flowleak

from fl_app.audit.leakage_log import LogLine, append_line, read_lines
from fl_app.audit.truth import Truth, write_truth
from fl_app.config import load_config
from fl_app.runs.deleting import delete_run, parts, private_images
from fl_app.runs.folder import create_run
from fl_app.runs.lock import RunIsHeldError, only_one


def finished_run(runs_dir: Path) -> Path:
    """Return a run that two clients of three images each took part in, and one attack."""
    run = create_run(load_config({"overrides": f"runs_dir={runs_dir} name=x"}))
    for node in (7, 8):
        write_truth(run, Truth(torch.rand(3, 3, 4, 4), (0, 1, 2), ((0, 1, 2),), 1, node))
    (run / "reconstructions" / "a.png").write_bytes(b"x" * 5000)
    (run / "observations" / ".cut-short.safetensors").write_bytes(b"x")
    (run / "models").mkdir()
    (run / "models" / "round-0001.safetensors").write_bytes(b"x")
    for name in ("comparison.md", "comparison.png", "rounds.md", ".abcdefgh.json"):
        (run / name).write_text("x")
    (run / "training.json").write_text("[]")
    score = {"mean": 20.0, "low": None, "high": None, "baseline": 12.0}
    for node in (7, 8):
        line = LogLine(1, str(node), node - 7, "sme", "ok", "counts", metrics={"psnr": score})
        append_line(run / "leakage.jsonl", line)
    shown = LogLine(1, "7", 0, "dlg", "ok", "counts", picture="reconstructions/a.png",
                    true_labels=(3, 5), found_labels=(3, 4))  # fmt: skip
    append_line(run / "leakage.jsonl", shown)
    alone = LogLine(1, "8", 1, "dlg", "ok", "unknown", found_labels=(3, 3),
                    reference_free={"matching_loss": 0.5, "label_counts": {"3": 2}})  # fmt: skip
    append_line(run / "leakage.jsonl", alone)
    (run / "images.csv").write_text("true_label\n3\n")
    with (run / "leakage.jsonl").open("ab") as log:
        log.write(b'{"torn')
    return run


def test_a_run_is_deleted_when_its_owner_says_so(tmp_path: Path) -> None:
    run, runs_dir = finished_run(tmp_path / "runs"), ["--runs-dir", str(tmp_path / "runs")]
    (other,) = json.loads(flowleak("runs", "--disk", "--json", *runs_dir))
    assert 5000 < other["disk_bytes"] < 200_000
    assert "kB" in flowleak("runs", "--disk", *runs_dir)
    asked = flowleak("delete", "x", *runs_dir)  # nobody answers
    assert "left 6 private images" in asked and "reconstructions" in asked and run.exists()
    flowleak("delete", "x", "--yes", *runs_dir)
    assert list((tmp_path / "runs").iterdir()) == []


def test_only_what_a_run_made_is_deleted(tmp_path: Path) -> None:
    run, outside = finished_run(tmp_path / "runs"), tmp_path / "mine"
    outside.mkdir()
    (outside / "data.png").write_text("mine")
    (run / "queue").symlink_to(outside)
    (run / "truth" / "linked").symlink_to(outside)
    (run / "notes.txt").write_text("mine")
    assert parts(run)[-1].path.name == "config.yaml"  # the last, so that it can be repeated
    assert delete_run(run, private_only=True) == [run / "notes.txt"]
    assert delete_run(run) == [run / "notes.txt"]
    assert (outside / "data.png").read_text() == "mine"
    assert list(run.iterdir()) == [run / "notes.txt"]

    second = finished_run(tmp_path / "runs2")
    (tmp_path / "runs" / "link").symlink_to(second)
    (outside / "config.yaml").write_text("name: a project of my own\n")
    for folder, why in ((tmp_path / "runs" / "link", "is a link"), (outside, "is no run's")):
        with pytest.raises(ValueError, match=why):
            delete_run(folder)
        with pytest.raises(ValueError, match=why):
            flowleak("delete", folder.name, "--yes", "--runs-dir", str(folder.parent))
    with pytest.raises(FileNotFoundError, match=r"no run .*mine"):
        flowleak("delete", "../mine", "--yes", "--runs-dir", str(tmp_path / "runs"))
    assert (second / "config.yaml").exists() and (outside / "data.png").exists()


def test_without_what_is_private_the_scores_stay(tmp_path: Path) -> None:
    run, runs_dir = finished_run(tmp_path), ["--runs-dir", str(tmp_path)]
    before, table = read_lines(run / "leakage.jsonl")[0], flowleak("rounds", "x", *runs_dir)
    flowleak("delete", "x", "--private-only", "--yes", *runs_dir)
    there = {path.name for path in run.iterdir()}
    assert there == {
        "config.yaml", "leakage.jsonl", "training.json", "models", "comparison.md", "rounds.md",
        "rounds.png", ".attacking",
    }  # fmt: skip
    lines, bad = read_lines(run / "leakage.jsonl")
    assert len(bad) == 1 and lines[:2] == before[:2]
    for name in ("picture", "true_labels"):
        assert lines[2][name] is None and "delete" in lines[2]["reasons"][name]
    # The classes that were found are those of the private images, too.
    assert [line["found_labels"] for line in lines[2:]] == [[], []]
    assert lines[3]["reference_free"] == {"matching_loss": 0.5}
    assert "20.0" in flowleak("show", "x", *runs_dir)
    assert flowleak("rounds", "x", *runs_dir) == table
    assert "Nothing to do" in flowleak("delete", "x", "--private-only", *runs_dir)


def test_a_run_that_is_being_attacked_is_not_deleted(tmp_path: Path) -> None:
    run = finished_run(tmp_path)
    with only_one(run):
        for options in ([], ["--private-only"]):
            with pytest.raises(RunIsHeldError, match=r"process \d+ is attacking"):
                flowleak("delete", "x", "--yes", *options, "--runs-dir", str(tmp_path))
    assert private_images(run) == 6
    (run / "truth" / "round-0001-node-7.safetensors").write_bytes(b"\xff" * 20)
    assert private_images(run) is None  # and it can be deleted all the same
    assert delete_run(run) == [] and not run.exists()
