"""The report of a run: what it says, that it is safe to open, and what it leaves out to pass on."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
from helpers.audit import line_of
from helpers.command import flowleak
from helpers.reports import Pretence
from PIL import Image

from fl_app.audit import thumbnails
from fl_app.audit.leakage_log import append_line
from fl_app.report import writing
from fl_app.report.collect import collect
from fl_app.report.evidence import EVIDENCE, evidence_digest
from fl_app.report.render import render
from fl_app.report.verdict import beyond_chance
from fl_app.report.writing import try_report, write_report
from fl_app.runs.deleting import delete_run

EVIL = "<img src=x onerror=alert(1)>"


class Page(HTMLParser):
    """The tags of a page, and its text without style and script."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self._open = ""
        self.inside: dict[str, str] = {}
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._open = tag
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_data(self, data: str) -> None:
        if self._open in ("style", "script"):
            self.inside[self._open] = self.inside.get(self._open, "") + data
        else:
            self.text += data

    def handle_endtag(self, tag: str) -> None:
        self._open = ""

    def of(self, tag: str) -> Iterator[dict[str, str]]:
        return (found for name, found in self.tags if name == tag)


def page_of(run: Path, redact: bool = False) -> Page:
    return Page(render(collect(run, redact)))


def test_the_verdict_counts_what_the_log_says(tmp_path: Path) -> None:
    run = Pretence(clients=2, attacks=("sme", "flow_matching")).write(tmp_path)
    report = collect(run)
    log = [json.loads(line) for line in (run / "leakage.jsonl").read_text().splitlines()]
    first = [line for line in log if line["attack"] == "sme"]  # whose noise is the least
    count = sum(sum(line["identification"]["identified"]) for line in first)
    assert report.verdict.level == "leaks" and count
    assert report.verdict.sentence == (
        f"The server could identify {count} of the 10 images that 2 of 4 clients trained on in "
        "round 1."
    )
    assert any("sme, of the 2 that were run" in words for words in report.verdict.beside)
    best = sorted((v for line in first for v in line["metrics"]["psnr"]["values"]), reverse=True)
    assert [pair.psnr for pair in report.worst] == best[:3]
    assert [update.attempts[0].attack for update in report.updates] == ["sme", "sme"]
    assert report.heat_map and report.heat_map.clients == ("0", "1")
    assert [row[0] for row in report.comparison[1:]] == [
        "sme", "flow_matching", "mean colour", "best single colour"
    ]  # fmt: skip
    assert {each.topic: each.mark for each in report.assumptions}["Labels"] == "generous"
    assert any("dlg" in words for words in report.untested)
    assert all(each.effect == "not measured on this run" for each in report.measures)
    assert "PSNR" in page_of(run).text


def test_what_was_hardly_searched_is_said(tmp_path: Path) -> None:
    run = Pretence(clients=1).write(tmp_path)
    few = {"stop_reason": "seconds", "iterations": 9, "seconds": 300.0, "num_examples": 1600}
    append_line(run / "leakage.jsonl", line_of(**few))
    append_line(run / "leakage.jsonl", line_of(**few | {"iterations": 900}, node="8"))
    exact = {"determined": (0.9,), "node": "9"}  # exact features need few
    append_line(run / "leakage.jsonl", line_of(**few | exact))
    (said,) = [words for words in collect(run).untested if "iterations" in words]
    assert said.startswith("1,600 images of 1 update, ")
    assert "the 300 seconds of sme held 9 iterations" in flowleak("show", str(run))


def test_pictures_are_those_of_the_private_image_and_of_what_is_assigned_to_it(
    tmp_path: Path,
) -> None:
    run = Pretence(clients=1, side=128).write(tmp_path)
    for pair in collect(run).updates[0].attempts[0].pairs:
        private, found = (
            Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))
            for uri in (pair.private, pair.found)
        )
        assert private.size == found.size == (64, 64)
        pairs = zip(private.tobytes(), found.tobytes(), strict=True)
        assert sum(abs(a - b) for a, b in pairs) / len(private.tobytes()) < 15


def test_the_page_asks_for_nothing_and_runs_nothing_but_its_own(tmp_path: Path) -> None:
    page = page_of(Pretence(rounds=2).write(tmp_path))
    policy = next(
        each["content"]
        for each in page.of("meta")
        if each.get("http-equiv") == "Content-Security-Policy"
    )
    digests = {
        tag: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        for tag, text in page.inside.items()
    }
    assert policy == (
        f"default-src 'none'; img-src data:; style-src 'sha256-{digests['style']}'; "
        f"script-src 'sha256-{digests['script']}'; base-uri 'none'; form-action 'none'"
    )
    for tag, attributes in page.tags:
        assert not any(name.startswith("on") or name == "style" for name in attributes), tag
        assert attributes.get("src", "data:").startswith("data:"), tag
        target = attributes.get("href", "#")
        assert re.match(r"#|data:|reconstructions/[^/]+\.png$", target), (tag, target)
    # A fragment leads to something on the page.
    ids = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    fragments = {a["href"][1:] for a in page.of("a") if a["href"].startswith("#")}
    assert fragments and fragments <= ids
    assert "url(" not in page.inside["style"] and "http" not in page.inside["script"]


def test_what_others_say_is_text(tmp_path: Path) -> None:
    run = Pretence(clients=1).write(tmp_path)
    scored = json.loads((run / "leakage.jsonl").read_text())
    scored |= {"attack": EVIL, "matching": EVIL, "options": {EVIL: EVIL}, "labels": EVIL,
               "diagnosis": [EVIL], "reasons": {EVIL: EVIL}, "defense": EVIL, "node": "5",
               "protocol": {EVIL: EVIL}, "stop_reason": EVIL}  # fmt: skip
    with (run / "leakage.jsonl").open("a") as log:
        log.write(json.dumps(scored) + "\n")
    append_line(run / "leakage.jsonl", line_of(status="failed", error=f"'\"{EVIL}", attack=EVIL))
    renamed = run.with_name("<img src=x onerror=alert(1)> $(x) ")
    run.rename(renamed)
    page = page_of(renamed)
    sources = [each["src"] for each in page.of("img")]
    assert sources and all(source.startswith("data:image/png;base64,") for source in sources)
    assert page.text.count(EVIL) > 8


def test_a_run_whose_attacks_all_failed(tmp_path: Path) -> None:
    run = Pretence(clients=0).write(tmp_path)
    for node, status in ((7, "failed"), (8, "failed"), (9, "skipped")):
        reasons = {"metrics": "out of memory", "picture": "none", "seed": "none"}
        fields = {"status": status, "error": "out of memory", "client": None, "reasons": reasons}
        append_line(run / "leakage.jsonl", line_of(node=str(node), **fields))
    report = collect(run)
    assert report.verdict.level == "unknown" and not report.worst and not report.private
    assert report.verdict.sentence == (
        "What the server could see is not known: no attack succeeded. 2 attacks failed, "
        "1 update not attacked."
    )
    assert [row[-2:] for row in report.failures[1:]] == [
        ["failed", "out of memory"], ["failed", "out of memory"], ["skipped", "out of memory"]
    ]  # fmt: skip
    assert "out of memory" in page_of(run).text
    (attempt,) = report.updates[0].attempts
    assert attempt.reasons == (("picture, seed", "none"),)  # the error says why for the others
    assert report.heat_map and report.heat_map.shows == "the outcome"


def test_a_run_without_attacks_or_readable_files(tmp_path: Path) -> None:
    run = Pretence(clients=0).write(tmp_path)
    (run / "leakage.jsonl").write_text("{\n")
    (run / "config.yaml").write_text("{")
    (run / "training.json").unlink()
    (run / "comparison.json").write_text("[]")
    report = collect(run)
    assert "no attack yet" in report.verdict.sentence
    for name in ("config.yaml", "leakage.jsonl", "comparison.json"):
        assert any(name in words for words in report.problems)
    assert "no attack yet" in page_of(run).text


def test_a_described_run_says_nothing_of_a_simulation(tmp_path: Path) -> None:
    """Its config.yaml holds the settings of a simulation, which no client was trained by."""
    run = Pretence().write(tmp_path)
    facts = "described:\n  model: app:Net\n  training: {optimizer: sgd, lr: 0.05, batch_size: 2}\n"
    (run / "config.yaml").write_text((run / "config.yaml").read_text() + facts)
    report = collect(run)
    assert ("Local training", "sgd, lr 0.05, batches of 2, - epochs a round") in report.setting
    names = {row[0].partition(".")[0] for row in [*report.config, *report.changed]}
    assert "attack" in names and not names & {"client", "dataset", "num_clients", "rounds"}
    listed = json.loads(flowleak("runs", "--json", "--runs-dir", str(tmp_path)))[0]
    assert (listed["dataset"], listed["optimizer"], listed["lr"]) == (None, "sgd", 0.05)


def test_a_run_without_truth_says_so(tmp_path: Path) -> None:
    run = Pretence(truth=False).write(tmp_path)
    report = collect(run)
    assert report.verdict.level == "unknown" and report.private
    assert "no ground truth" in report.verdict.sentence
    assert not report.worst and report.comparison == []
    pairs = report.updates[0].attempts[0].pairs
    assert all(pair.found and not pair.private and pair.psnr is None for pair in pairs)
    assert pairs[1].labels == "1 (inferred)"
    text = page_of(run).text
    assert "total variation" in text and "0.600" in text  # beside that of noise
    assert "PSNR dB" not in text and "worst first" not in text


def test_redacted_there_is_no_picture_class_or_path(tmp_path: Path) -> None:
    run = Pretence(clients=2).write(tmp_path)
    why = f"{tmp_path}/secret.bin and /home/someone/x are missing, 5/5 done"
    append_line(run / "leakage.jsonl", line_of(status="failed", error=why))
    html = render(collect(run, redact=True))
    page = Page(html)
    assert not list(page.of("img")) and "base64" not in html and "reconstructions/" not in html
    assert str(tmp_path) not in html and "someone" not in html and "5/5 done" in page.text
    classes = {pair.labels for update in collect(run, redact=True).updates
               for each in update.attempts for pair in each.pairs}  # fmt: skip
    assert classes == {"right"}
    assert "This page shows private images" in page_of(run).text
    assert "This page shows private images" not in page.text and "Redacted" in page.text


def test_a_large_run_is_a_small_page(tmp_path: Path) -> None:
    run = Pretence(clients=50, rounds=20, images=4, side=32).write(tmp_path)
    report = collect(run)
    html = render(report)
    assert len(html.encode()) < 20e6
    page = Page(html)
    assert len(page.tags) < 40_000  # a browser opens it at once
    linked = [a["href"] for a in page.of("a")]
    assert len([link for link in linked if link.startswith("reconstructions/")]) == 1000
    assert "50 of 52 clients" in page.text and "rounds 1 to 20" in page.text
    assert report.heat_map and len(report.heat_map.cells) == 1000
    # What has no room is not what leaks most.
    worst = max(pair.psnr or 0 for pair in report.images)
    assert worst == max(pair.psnr or 0 for each in report.updates[:1] for a in each.attempts
                        for pair in a.pairs)  # fmt: skip
    assert len(report.images) + report.more == 4000


def test_pictures_beyond_the_limit_are_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Pretence(clients=6).write(tmp_path)
    monkeypatch.setattr(thumbnails, "MOST_BYTES", 100_000)
    attempts = [update.attempts[0] for update in collect(run).updates]
    drawn = [any(pair.found for pair in each.pairs) for each in attempts]
    assert drawn == sorted(drawn, reverse=True) and {*drawn} == {True, False}
    assert all(each.picture for each in attempts)


def test_the_hash_is_what_the_documented_command_prints(tmp_path: Path) -> None:
    run = Pretence().write(tmp_path)
    found = f"find {' '.join(EVIDENCE)} -type f 2>/dev/null"
    command = f"{found} | LC_ALL=C sort | xargs sha256sum | sha256sum"
    done = subprocess.run(command, shell=True, cwd=run, capture_output=True, text=True)
    before = evidence_digest(run)
    assert done.stdout.split()[0] == before
    assert command.replace(" ".join(EVIDENCE), "EVIDENCE") in (evidence_digest.__doc__ or "")
    write_report(collect(run), run)
    assert evidence_digest(run) == before  # the report is not of itself
    (run / "training.json").write_text("[]")
    assert evidence_digest(run) != before


def test_the_command_writes_a_private_file_without_torch(tmp_path: Path) -> None:
    run = Pretence().write(tmp_path)
    code = "import sys; sys.modules['torch'] = None; from flowleak.__main__ import main; main()"
    words = [sys.executable, "-c", code, "report", "audit", "--runs-dir", str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True)
    assert (done.returncode, done.stderr, done.stdout.strip()) == (0, "", str(run / "report.html"))
    assert (run / "report.html").stat().st_mode & 0o777 == 0o600
    said = flowleak("report", "audit", "--redact", "--runs-dir", str(tmp_path))
    assert said.strip() == str(run / "report-redacted.html")
    out = tmp_path / "passed-on.html"
    flowleak("report", "audit", "--redact", "--out", str(out), "--runs-dir", str(tmp_path))
    assert out.exists()
    delete_run(run, private_only=True)
    assert not (run / "report.html").exists() and (run / "report-redacted.html").exists()
    assert not collect(run).private  # the scores are left
    assert delete_run(run) == []


def test_a_report_that_fails_breaks_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = Pretence(clients=1).write(tmp_path)

    def broken(*_: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(writing, "collect", broken)
    with caplog.at_level("WARNING", logger="flwr"):
        assert try_report(run) is None
    assert "RuntimeError: a bug" in caplog.text and not (run / "report.html").exists()


def test_chance_is_told_from_leakage() -> None:
    # Of 500 guesses at 1 in 100, ten and more are right once in 40 times; 13 and more once in 500.
    assert not beyond_chance(10, 500, 0.01) and beyond_chance(13, 500, 0.01)
    assert beyond_chance(2, 10, 0.01) and not beyond_chance(0, 10, 0.01)
    assert beyond_chance(1, 10, 0.0) and not beyond_chance(10, 10, 1.0)
