"""What the documents and examples show, run as it stands there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from test_explain import CLIENTS, client

from fl_app.config import AttackConfig, PriorConfig
from server_strategies import attacks
from server_strategies.attacks import ATTACKS, Attack, run_attack

ROOT = Path(__file__).parents[1]


def run_python(*arguments: str, folder: Path) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder, env=environment, capture_output=True, text=True, check=True, timeout=600,
    ).stdout  # fmt: skip


def test_the_attack_of_the_document_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "docs" / "adding-an-attack.md").read_text()
    source, entry, settings = re.findall(r"```(?:python|yaml)\n(.*?)```", text, re.DOTALL)
    names: dict[str, Any] = {"Attack": Attack}
    exec(compile(source, "smooth.py", "exec"), names)
    ((name, attack),) = eval(f"{{{entry}}}", names).items()
    config = AttackConfig(**OmegaConf.create(settings))
    assert config.name == name and name not in ATTACKS
    monkeypatch.setitem(ATTACKS, name, attack)

    observation, knowledge, _ = client(CLIENTS["sgd"])
    short = AttackConfig(name, iterations=20, options={"weight": 0.2})
    found = run_attack(observation, knowledge, short, PriorConfig(), seed=0)
    assert found.images.shape == (6, 3, 8, 8) and found.losses[-1] < 0.9 * found.losses[0]
    assert found.attack == name and found.options == {"lr": 0.3, "weight": 0.2}
    assert len([line for line in source.splitlines() if line.strip()]) <= 20


def test_the_example_runs_and_is_short(tmp_path: Path) -> None:
    example = ROOT / "examples" / "attack_one_update.py"
    lines = example.read_text().splitlines()[1:]
    assert len([line for line in lines if line.strip() and not line.startswith("#")]) < 15
    run_python(str(example), folder=tmp_path)
    assert (tmp_path / "leak.png").exists()


def test_an_attacks_name_is_its_function_whatever_was_imported_before(tmp_path: Path) -> None:
    for name, attack in ATTACKS.items():
        assert getattr(attacks, name) is attack.run
    imports = [f"from server_strategies.attacks import {name}" for name in ATTACKS]
    modules = [f"import {a.run.__module__}" for a in ATTACKS.values()]
    checks = [f"assert callable({name})" for name in ATTACKS]
    run_python("-c", "\n".join([*modules, *imports, *modules, *imports, *checks]), folder=tmp_path)
