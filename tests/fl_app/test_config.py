"""The configuration: defaults, groups, overrides, and what is refused."""

from __future__ import annotations

import functools
import json
import operator
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.command import flowleak

from fl_app.config import Config, ConfigError, from_yaml, load_config, to_yaml
from fl_app.protocol import DatasetInfo, ParameterGroup


def test_groups_and_overrides_win_over_defaults() -> None:
    assert load_config().client.optimizer == "adam"
    config = load_config({"client": "sgd", "overrides": "client.lr=0.1 watch.clients=0.5"})
    assert (config.client.optimizer, config.client.lr, config.watch.clients) == ("sgd", 0.1, 0.5)
    assert load_config({"overrides": "attack.options.lr=0.4"}).attack.options == {"lr": 0.4}
    assert load_config({"attack": ""}) == load_config()


def test_what_the_server_does_not_know_is_not_in_its_knowledge() -> None:
    info = DatasetInfo(10, (3, 32, 32), (0.5,) * 3, (0.2,) * 3)
    assert load_config().knowledge(info).client.optimizer == "adam"
    assert load_config({"overrides": "audit.training=unknown"}).knowledge(info).training is None


def test_a_runs_configuration_reads_back(tmp_path: Path) -> None:
    config = load_config({"attack": "sme", "overrides": "watch.rounds=[1,3] rounds=3 name=x"})
    (tmp_path / "config.yaml").write_text(to_yaml(config, {"versions": {"torch": "2"}}))
    assert from_yaml(tmp_path / "config.yaml") == config


def test_any_training_reads_back(tmp_path: Path) -> None:
    overrides = (
        "client.optimizer=rmsprop client.optimizer_options.eps=1e-6 client.loss=cross_entropy "
        "client.optimizer_options.centered=true client.schedule=[1,0.5] client.drop_last=true "
        "client.trainable=[fc1.*] 'client.groups=[{pattern: \"*.bias\", weight_decay: 0}]'"
    )
    config = load_config({"overrides": overrides})
    assert config.client.optimizer_options == (("centered", True), ("eps", 1e-6))
    assert config.client.groups == (ParameterGroup("*.bias", weight_decay=0.0),)
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert from_yaml(tmp_path / "config.yaml") == config
    with pytest.raises(ConfigError, match=r"client.loss is 'focal'; allowed: cross_entropy"):
        load_config({"overrides": "client.loss=focal"})


@pytest.mark.parametrize("setting", ["name", "dataset.source", "attack.options.x", "client.lr"])
@pytest.mark.parametrize("value", ["${oc.env:FLOWLEAK_SECRET}", "a${runs_dir}", "${oc.decode:1}"])
def test_nothing_in_a_configuration_is_resolved(
    setting: str, value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run's folder may come from anybody: it reads no environment and no other key."""
    monkeypatch.setenv("FLOWLEAK_SECRET", "hunter2")
    refusal = re.escape(f"is '{value}'; allowed: text without")
    for override in (f"{setting}='{value}'", f"attack.options.y='[1,{{b: \"{value}\"}}]'"):
        with pytest.raises(ConfigError, match=refusal) as error:
            load_config({"overrides": override})
        assert "hunter2" not in str(error.value)
    run = tmp_path / "audit"
    run.mkdir()
    config: Any = yaml.safe_load(to_yaml(Config(), {"started": value}))
    *sections, key = setting.split(".")
    functools.reduce(operator.getitem, sections, config)[key] = value
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(ConfigError, match=rf"^{re.escape(setting)} \(from .*{refusal}"):
        from_yaml(run / "config.yaml")
    shown = json.loads(flowleak("runs", "--runs-dir", str(tmp_path), "--json"))
    assert shown[0]["started"] == value


@pytest.mark.parametrize(
    ("run_config", "message"),
    [
        ({"attack": "magic"}, "attack is 'magic'; allowed: dlf, dlf_paper, dlg, dropout_inversion"),
        ({"nonsense": "1"}, "unknown run-config key 'nonsense'; allowed: dataset"),
        ({"attack": 3}, "attack is 3; allowed: a string"),
        ({"overrides": "rounds"}, "allowed: key=value"),
        (
            {"overrides": "client.speed=1"},
            "client.speed .*unknown key; allowed: accumulate, batch_norm",
        ),
        ({"overrides": "client.lr=fast"}, "client.lr .*'fast'"),
        ({"overrides": "client.lr=0"}, "client.lr is 0.0; allowed: more than 0"),
        ({"overrides": "client.batch_size=1.5"}, "client.batch_size"),
        (
            {"overrides": "client.max_grad_norm=-1"},
            r"client.max_grad_norm is -1.0; allowed: 0 \(no clipping\) or more",
        ),
        ({"overrides": "client.momentum=0.9"}, "allowed with adam: 0"),
        ({"overrides": "rounds=0"}, "rounds is 0; allowed: 1 or more"),
        ({"overrides": "watch.clients=some"}, "clients is 'some'; allowed: all, a share"),
        ({"overrides": "watch.every=-1"}, "watch.every is -1; allowed: 0 or more"),
        ({"overrides": "watch.clients=1"}, r"clients is 1; .* 1.0, or a list of ids; \[1\] is one"),
        ({"overrides": "watch.clients=[]"}, r"clients is \[\]; allowed: all"),
        ({"overrides": "watch.rounds=[1,3]"}, r"watch.rounds holds 3; allowed with rounds=2: 1"),
        ({"overrides": "watch.rounds=[] watch.every=3"}, "watch.every is 3, and no such round"),
        ({"overrides": "checkpoints=0"}, "checkpoints is 0; allowed: 1 or more"),
        ({"overrides": "dataset.dirichlet_alpha=nan"}, "dirichlet_alpha is nan; allowed: more"),
        ({"overrides": "dataset.name=svhn"}, "name is 'svhn'; allowed: photos, cifar10, cifar100"),
        ({"overrides": "name=../x"}, "name is '../x'; allowed: a folder's name"),
        ({"overrides": "audit.training=some"}, "training is 'some'; allowed: given, unknown"),
        ({"overrides": "client.max_grad_norm=-1"}, "max_grad_norm is -1.0; allowed: 0"),
        ({"overrides": "audit.labels=given"}, "labels is 'given'; allowed: by-step, counts, unkn"),
        ({"overrides": "audit.truth=false"}, "labels is 'counts'; allowed without truth: unknown"),
        ({"dataset": "imagefolder"}, "dataset.source is empty"),
        ({"overrides": "strategy.fraction_evaluate=2"}, "allowed: 0 to 1"),
        (
            {"overrides": "attack=sme"},
            "attack=sme, but attack is a group; allowed: -c 'attack=\"sme\"' beside overrides, or "
            "attack.NAME=VALUE; its names: name, iterations",
        ),
        ({"overrides": "watch=all"}, "watch=all, but watch is a group; allowed: watch.NAME=VALUE"),
        ({"overrides": "watch.rounds={"}, "watch.rounds={, which is no YAML"),
        ({"overrides": "watch.rounds=[1,*a]"}, r"watch.rounds=\[1,\*a\], which"),
        ({"overrides": f"watch.rounds={'[' * 30}"}, "watch.rounds=.*nested too deeply"),
        ({"overrides": "watch.rounds[0]=3"}, r"sets watch.rounds\[0\]; allowed: a whole list, as"),
        ({"overrides": "watch.rounds.0=3"}, r"watch.rounds.0 \(from overrides\): watch.rounds has"),
        ({"overrides": "rounds.x=3"}, "rounds has no such part"),
        ({"overrides": "=3"}, "unknown key; allowed"),
        ({"overrides": "name='x"}, "overrides can't be read: No closing quotation"),
        ({"overrides": "client.lr=inf"}, "client.lr is inf; allowed: a finite number"),
        ({"overrides": "client.lr=1e999"}, "client.lr is inf; allowed: a finite number"),
        ({"overrides": "attack.seconds=.inf"}, "attack.seconds is inf; allowed: a finite number"),
        ({"overrides": "attack.options.lr=.nan"}, "attack.options.lr is nan; allowed: a finite"),
        ({"overrides": "seed=-1"}, "seed is -1; allowed: 0 to 4294967295"),
        ({"overrides": f"seed={2**64}"}, f"seed is {2**64}; allowed: 0 to 4294967295"),
    ],
)
def test_nonsense_is_refused_with_what_is_allowed(run_config: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(run_config)


def test_words_stay_as_they_are_typed() -> None:
    typed = r"name=010 start_from=12:3 runs_dir=C:\x dataset.source='/a b' model.norm=null"
    config = load_config({"overrides": typed})
    assert (config.name, config.start_from, config.runs_dir) == ("010", "12:3", r"C:\x")
    assert (config.dataset.source, config.model.norm) == ("/a b", "null")
    config = load_config(
        {"overrides": "rounds=010 client.lr=1e-2 'watch={every: 2}' watch.rounds=[]"}
    )
    assert (config.rounds, config.client.lr) == (10, 0.01)
    assert (config.watch.every, config.watch.rounds) == (2, [])
    config = load_config({"overrides": "audit.truth=false audit.labels=unknown start_from="})
    assert config.audit.truth is False


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: "", "config.yaml is no run's configuration: it lacks name, seed"),
        (lambda text: text[: text.index("attack:")], "it lacks attack, prior"),
        (lambda text: "- 1\n- 2\n", "config.yaml holds no settings"),
        (lambda text: "3", "config.yaml is no YAML"),
        (lambda text: text + "{", "config.yaml is no YAML"),
        (lambda text: text + "x: " + "[" * 10**5, "config.yaml is no YAML|nested too deeply"),
        (lambda text: text + "a: &a [1]\nb: *a\n", r"config.yaml holds an alias, \*a"),
        (lambda text: text.replace("seed: 0", "seed: zero"), "seed .*config.yaml.*'zero'"),
        (
            lambda text: text.replace("  lr:", "  pace:"),
            "client.pace .*unknown key; allowed: accumulate, batch",
        ),
        (lambda text: text.replace("every: 0", "every: [1]"), "watch.every"),
        (lambda text: text.replace("watch:\n", "watch: 3\nx:\n"), "a value where a section should"),
        (lambda text: "\x00", "config.yaml is no YAML"),
        (lambda text: "x: " + "y" * 2**21, "more than 1,048,576 bytes"),
    ],
)
def test_a_damaged_configuration_is_refused_by_name(
    tmp_path: Path, damage: Callable[[str], str], message: str
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(damage(to_yaml(load_config())))
    with pytest.raises(ConfigError, match=message):
        from_yaml(path)


def test_what_is_no_file_is_refused_and_never_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    with pytest.raises(ConfigError, match=r"config.yaml can't be read: No such file"):
        from_yaml(path)
    os.mkfifo(path)
    with pytest.raises(ConfigError, match="it is a pipe or a device"):
        from_yaml(path)
    path.unlink()
    path.mkdir()
    with pytest.raises(ConfigError, match="it is a folder"):
        from_yaml(path)
