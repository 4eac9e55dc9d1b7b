"""Another package's attack and model: found, validated and run as ours."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import ClassVar

import pytest
from helpers.blocks import blocks
from helpers.flower_home import PROJECT, flower_home

from fl_app.config import AttackConfig, ConfigError, load_config
from fl_app.models.family import Family
from fl_app.registry import ATTACKS, MODELS, Entry, Registry
from server_strategies.attacks.attack import Attack
from server_strategies.attacks.options import option
from server_strategies.attacks.run import create_attack
from server_strategies.attacks.sme import SME

DOCUMENT = PROJECT / "docs" / "adding-an-attack.md"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the package of the document, and return the folder that it is installed in."""
    source, site = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    for language, name in (("toml", "pyproject.toml"), ("python", "smooth_attack.py")):
        (source / name).write_text(blocks(DOCUMENT, language)[0], encoding="utf-8")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--target", str(site), str(source)], check=True, timeout=300)
    return site


def test_it_runs_by_flwr_run(site: Path, tmp_path: Path) -> None:
    path = os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    settings = f"attack.iterations=3 rounds=1 runs_dir={tmp_path} name=plugged watch.clients=[0]"
    with flower_home(tmp_path / "flwr", PYTHONPATH=path) as home:
        status, log = home.audit(f'attack="smooth" model="tiny" overrides="{settings}"')
        assert status == "finished:completed", log
        refused, words = home.audit('attack="smooth" overrides="attack.options.wight=1"')
    (line,) = map(json.loads, (tmp_path / "plugged" / "leakage.jsonl").read_text().splitlines())
    assert (line["status"], line["attack"], line["iterations"]) == ("ok", "smooth", 3)
    assert line["protocol"]["model"] == "tiny"
    assert refused == "finished:failed"
    assert "attack.options.wight is unknown; allowed for smooth" in words


class _Point:
    """An entry point of an installed package."""

    def __init__(self, name: str, value: str, package: str = "other-package") -> None:
        self.name, self.value = name, value
        self.dist = type("Distribution", (), {"name": package})


@pytest.fixture
def offer(monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """Return a function that lets packages offer something by entry points."""

    def offer(*points: _Point) -> Registry:
        monkeypatch.setattr(metadata, "entry_points", lambda group: points)
        kind = "fl_app.models.family:Family"
        return Registry("model", {"convnet": "fl_app.models.convnet:CONVNET"}, kind)

    return offer


def test_what_others_offer_is_imported_late_and_checked(offer) -> None:  # type: ignore[no-untyped-def]
    models = offer(_Point("broken", "no_such_module:X"), _Point("wrong", "json:dumps"))
    assert list(models) == ["convnet", "broken", "wrong"]
    assert models.entries["wrong"] == Entry("wrong", "json:dumps", "other-package")
    with pytest.raises(ValueError, match=r"'broken' of the package other-package can't be loaded"):
        models["broken"]
    with pytest.raises(ValueError, match=r"'wrong' of the package other-package is .*Family"):
        models["wrong"]
    with pytest.raises(KeyError, match=r"model is 'none'; allowed: broken, convnet, wrong"):
        models["none"]


def test_a_name_that_two_packages_offer_is_refused(offer) -> None:  # type: ignore[no-untyped-def]
    models = offer(_Point("convnet", "theirs:X"), _Point("other", "fl_app.models.mlp:MLP_FAMILY"))
    with pytest.raises(ValueError, match="'convnet' is offered by two packages: flowleak and"):
        models["convnet"]
    assert isinstance(models["other"], Family)  # the others can be used


@dataclass(frozen=True)
class Plain(SME):
    name: ClassVar[str] = "plain"
    weight: float = 0.1


@dataclass(frozen=True)
class Listed(SME):
    name: ClassVar[str] = "listed"
    weights: list[float] = option(None, "several")  # noqa: RUF009


@pytest.mark.parametrize(
    ("name", "attack", "words"),
    [
        ("plain", Plain, "weight is no option of an attack; allowed: weight: TYPE = option"),
        ("listed", Listed, "weights is no option of an attack"),
        ("mine", SME, "attack.name is 'mine'; its class SME has to say the same"),
    ],
)
def test_an_attack_that_cannot_be_configured_is_refused(
    name: str, attack: type[Attack], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ATTACKS, name, attack)
    with pytest.raises(ConfigError, match=words):
        create_attack(AttackConfig(name))


def test_an_attack_is_a_class_and_a_model_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="allowed: a subclass of Attack"):
        monkeypatch.setitem(ATTACKS, "instance", SME())
    with pytest.raises(ValueError, match="allowed: an instance of Family"):
        monkeypatch.setitem(MODELS, "class", Family)


def test_configuration_files_of_a_plug_in_come_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "with_files"
    (package / "conf" / "attack").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported to read a file')")
    (package / "conf" / "attack" / "deep.yaml").write_text("name: deep\niterations: 77\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(ATTACKS.entries, "deep", Entry("deep", "with_files:Deep", "with-files"))
    monkeypatch.setitem(ATTACKS.entries, "bare", Entry("bare", "bare_module:Bare", "bare"))
    assert load_config({"attack": "deep"}).attack.iterations == 77
    assert load_config({"attack": "bare"}).attack.name == "bare"
    with pytest.raises(ConfigError, match="attack is 'deepest'; allowed: bare, deep, dlf"):
        load_config({"attack": "deepest"})


def test_a_defence_of_another_package_acts_on_the_update(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from client_app.defenses import defend
    from fl_app.protocol import Defense
    from fl_app.registry import DEFENSES

    monkeypatch.setitem(DEFENSES, "halve", lambda update, _: {k: v / 2 for k, v in update.items()})
    assert load_config({"defense": "halve"}).defense == Defense(custom="halve")
    sent = defend({"w": torch.ones(2)}, Defense(custom="halve"), torch.Generator())
    assert torch.equal(sent["w"], torch.full((2,), 0.5))
