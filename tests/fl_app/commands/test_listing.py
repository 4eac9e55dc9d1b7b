"""`flowleak list`: what can be chosen, read from comments and docstrings without an import."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from helpers.command import flowleak

from fl_app.commands.listing import Choice, choices, options_of
from fl_app.config import GROUPS, ConfigError, load_config
from fl_app.registry import ATTACKS, REGISTRIES, Entry, Registry
from fl_app.util.files import project_file
from server_strategies.attacks.run import create_attack

PLUG_IN = '''
class A:
    """Does a.

    Source: Someone, A Paper
    in two lines

    More.
    """
'''


def test_everything_that_can_be_chosen_is_listed_and_described() -> None:
    for kind, registry in REGISTRIES.items():
        found = choices(kind)
        names = [choice.name for choice in found]
        assert names == sorted(set(names)) and set(registry) <= set(names)
        assert all(5 < len(choice.description) <= 100 for choice in found), kind
        if registry.noun in GROUPS:
            files = project_file(f"conf/{registry.noun}").glob("*.yaml")
            assert {file.stem for file in files} <= set(names)
    attacks = {choice.name: choice for choice in choices("attacks")}
    assert attacks["dlf"].source.endswith("Data Leakage in Federated Averaging, TMLR 2022")
    assert all(choice.source for choice in attacks.values())
    assert {choice.package for choice in attacks.values()} == {"flowleak"}


def test_what_another_package_offers_is_described_by_its_file_or_its_docstring(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package, info = tmp_path / "plug", tmp_path / "plug-1.dist-info"
    files = {
        package / "__init__.py": f"raise ImportError\n{PLUG_IN}",
        package / "conf" / "attack" / "b.yaml": "# Does b.\n# Source: B.\n# More.\nname: b\n",
        package / "conf" / "attack" / "b_long.yaml": "# b, for longer.\nname: b\n",
        tmp_path / "broken.py": "class C(:\n",
        info / "METADATA": "Metadata-Version: 2.1\nName: plug\nVersion: 1\n",
        info / "entry_points.txt": "[flowleak.attacks]\na = plug:A\nb = plug:A\nc = broken:C\n",
    }
    for file, text in files.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    registry = Registry("attack", {"sme": "server_strategies.attacks.sme:SME"})
    monkeypatch.setitem(REGISTRIES, "attacks", registry)
    found = {choice.name: choice for choice in choices("attacks")}
    assert "plug" not in sys.modules
    assert found["a"] == Choice("a", "Does a", "Someone, A Paper in two lines", "plug")
    assert found["b"] == Choice("b", "Does b", "B", "plug")
    assert found["b_long"].package == "plug"
    assert found["c"].description.startswith("Can't be read: ")


def test_the_options_of_an_attack(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert json.loads(flowleak("list", "attacks", "sme", "--json"))[1] == {
        "attack": "sme",
        "option": "alpha",
        "default": 0.5,
        "allowed": "a number from 0 to 1",
        "help": "where the surrogate starts, w0 (0) to w1 (1)",
    }
    assert "| sme | alpha | 0.5 |" in flowleak("list", "attacks", "all", "--markdown")
    broken = Entry("broken", "no_such_module:X", "other-package")
    monkeypatch.setitem(ATTACKS.entries, "broken", broken)
    assert {each["attack"] for each in options_of("all")} == {*ATTACKS} - {"broken"}
    assert "broken is left out: 'broken' of the package other-package" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="models have no options"):
        flowleak("list", "models", "mlp")
    with pytest.raises(ConfigError, match="allowed: attacks, models, priors"):
        flowleak("list", "nonsense")


def test_every_configuration_can_be_used() -> None:
    for group in (*GROUPS, "experiment"):
        for file in project_file(f"conf/{group}").glob("*.yaml"):
            source = "dataset.source=x" if file.stem == "imagefolder" else ""
            create_attack(load_config({group: file.stem, "overrides": source}).attack)
