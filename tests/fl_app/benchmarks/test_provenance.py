"""What made a table: hashes of what is run, rows that say it, and tables that are of older code."""

from __future__ import annotations

import json
import lzma
import re
from pathlib import Path

import pytest
from helpers.command import flowleak

from fl_app.benchmarks import provenance
from fl_app.benchmarks.case import Case
from fl_app.benchmarks.provenance import DECIDING, Provenance, code_hash, hash_of, version
from fl_app.benchmarks.rows import file_beside, keep_results, kept_results
from fl_app.benchmarks.status import kept_tables
from fl_app.benchmarks.suite import AttackSuite
from fl_app.config import AttackConfig, ConfigError
from fl_app.protocol import LocalTraining
from fl_app.registry import BENCHMARKS
from fl_app.util.origin import ROOT
from server_strategies.priors.places import weights_digest

SOURCE = '''"""A module."""

LIMIT = 3
"""About it."""


def double(x: int) -> int:
    """Return twice x."""
    return 2 * x  # a comment
'''


def test_the_hash_of_code_is_of_what_is_run() -> None:
    plain = "LIMIT = 3\ndef double(\n    x: int,\n) -> int:\n    return (2 * x)\n"
    assert hash_of([("a.py", SOURCE)]) == hash_of([("a.py", plain)])
    others = (plain.replace("3", "4"), plain.replace("2", "None"), plain.replace("int", "float"))
    assert len({hash_of([("a.py", source)]) for source in (plain, *others)}) == 4
    assert hash_of([("a.py", plain)]) != hash_of([("b.py", plain)])
    assert all((ROOT / place).exists() for place in DECIDING)
    assert re.fullmatch("[0-9a-f]{12}", code_hash())


def test_results_are_kept_alike_compressed_or_not(tmp_path: Path) -> None:
    rows = [{"seed": 0, "psnr": [21.123456789, 1e-12], "code": "abc", "steps": (1, None)}]
    facts = {"dataset": "photos", "commit": "c", "version": "1"}
    kept = []
    for name in ("x.json", "x.json.xz"):
        path = tmp_path / name
        keep_results(path, {"facts": facts, "rows": rows})
        kept.append(kept_results(path, facts)["rows"])
        assert file_beside(path, ".md") == tmp_path / "x.md"
    made = {"commit": "c", "version": "1", "code": "abc"}
    assert kept[0] == kept[1] == [{**made, "seed": 0, "psnr": [21.1235, 1e-12], "steps": [1, None]}]


def test_a_benchmark_says_what_made_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client = LocalTraining("sgd", lr=0.01, batch_size=1, local_steps=1)
    cases = tuple(Case(client, AttackConfig(name, 1)) for name in ("flow_matching", "sme"))
    monkeypatch.setitem(BENCHMARKS, "quick", AttackSuite(cases, split="tuning"))
    out = tmp_path / "quick.json.xz"
    command = ["bench", "quick", "--dataset", "photos", "--trials", "1", "--out", str(out)]
    flowleak(*command)
    content = json.loads(lzma.decompress(out.read_bytes()))
    assert content["facts"]["split"] == "tuning"
    flow, sme = content["rows"]
    prior = (weights_digest("compact") or "")[:12]
    assert (flow["prior"], sme["prior"]) == (prior, "")
    assert {row["code"] for row in content["rows"]} == {code_hash()}
    assert {row["version"] for row in content["rows"]} == {version()}

    (table,) = kept_tables(tmp_path)
    words = f"{prior} (1 of 2 rows), none (1 of 2 rows)"
    assert table.provenance == Provenance(version(), code_hash(), words, "1")
    assert (
        table.command == "flowleak bench quick --dataset photos --split tuning --trials 1 --seed 0"
    )
    assert "of this code" in flowleak("bench", "status", str(tmp_path))
    lasting = flowleak("bench", "status", str(tmp_path), "--markdown")
    assert f"| [quick](quick.md) | 1 | {version()} | {code_hash()} |" in lasting
    monkeypatch.setattr(provenance, "code_hash", lambda: "0" * 12)
    assert "of older code" in flowleak("bench", "status", str(tmp_path))
    assert flowleak("bench", "status", str(tmp_path), "--markdown") == lasting


def test_how_old_the_code_of_a_table_is() -> None:
    now = code_hash()
    ages = {
        now: "of this code",
        f"{now} (1 of 3 rows), {'0' * 12} (2 of 3 rows)": "in part of this code",
        "0" * 12: "of older code",
        f"{'0' * 12} (1 of 3 rows), unknown (2 of 3 rows)": "of older code",
        "unknown": "code unknown",
    }
    for code, age in ages.items():
        made = Provenance("1", code, "none", "3")
        assert made.age == age
        assert Provenance.read(f"# x\n\n`flowleak bench x`\n\n{made.line}\n\n| a |\n") == made


def test_results_go_to_files_whose_names_say_what_they_are(tmp_path: Path) -> None:
    for name in ("quick", "quick.md", "quick.json.gz"):
        with pytest.raises(ConfigError, match=r"allowed: NAME.json or NAME.json.xz"):
            flowleak("bench", "quick", "--out", str(tmp_path / name))
    with pytest.raises(FileNotFoundError, match="holds no table"):
        flowleak("bench", "status", str(tmp_path))
