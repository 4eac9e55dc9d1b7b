"""The bundle that Flower sends to every client: code and settings alone."""

from __future__ import annotations

import re
import tomllib
import zipfile
from io import BytesIO
from itertools import chain
from pathlib import Path

from flwr.cli.build import build_fab_from_files
from flwr.cli.utils import collect_files
from helpers.flower_home import PROJECT

PACKAGES = ("flowleak", "fl_app", "client_app", "server_strategies")
# What a user may have in a checkout, by whatever name.
PRIVATE = (
    "results.json", "notes.md", "secret.toml", "docs/results/mine.json", "tests/helpers/mine.py",
    "my-runs/audit/config.yaml", "my-runs/audit/leakage.jsonl", "my-runs/audit/training.json",
    "fl_app/runs/audit/config.yaml", "fl_app/audit/leakage.jsonl", "conf/audit/config.yaml",
    "conf/runs/audit/config.yaml", "lan/keys.json", "lan/clients/one/settings.yaml",
)  # fmt: skip


def test_uv_has_nothing_to_fetch_when_a_run_starts() -> None:
    """Flower runs `uv sync` before a run, which resolves every extra: offline it would fail."""
    settings = tomllib.loads((PROJECT / "pyproject.toml").read_text())
    project, overrides = settings["project"], settings["tool"]["uv"]["override-dependencies"]
    needed = [*project["dependencies"], *chain(*project["optional-dependencies"].values())]
    names = {re.match(r"[\w-]+", requirement)[0] for requirement in needed}  # type: ignore[index]
    never = {override.removesuffix(" ; sys_platform == 'never'") for override in overrides}
    assert names - {"flowleak"} <= never


def test_the_bundle_holds_code_and_settings_and_nothing_private() -> None:
    checkout: dict[str, bytes | Path] = dict(collect_files(PROJECT))
    large = bytes(range(256)) * 2**16  # 16 MB, beyond what Flower sends
    bundle = build_fab_from_files(checkout | dict.fromkeys(PRIVATE, large))[0]
    assert len(bundle) < 1.5e6
    with zipfile.ZipFile(BytesIO(bundle)) as file:
        sent = set(file.namelist())
    code = {
        path.relative_to(PROJECT).as_posix()
        for folder, suffix in [*((name, "py") for name in PACKAGES), ("conf", "yaml")]
        for path in (PROJECT / folder).rglob(f"*.{suffix}")
        if PROJECT / "fl_app" / "benchmarks" not in path.parents
    }
    assert sent == code | {"pyproject.toml", "LICENSE", ".info/CONTENT"}
