"""Trained states: named, trained once, kept, and carried on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fl_app.benchmarks import states
from fl_app.benchmarks.case import Case
from fl_app.benchmarks.clients import draw_client
from fl_app.benchmarks.states import epochs_of, states_folder, trained_state
from fl_app.benchmarks.suite import Setting
from fl_app.config import AttackConfig, ConfigError, load_config
from fl_app.data import dataset_info
from fl_app.models import create_model
from fl_app.protocol import LocalTraining


def test_states_have_names() -> None:
    assert [epochs_of(name) for name in ("init", "epoch-3", "converged")] == [0, 3, 30]
    for wrong in ("epoch-0", "epoch", "3", "Converged"):
        with pytest.raises(ConfigError, match="allowed: init, epoch-N, converged"):
            epochs_of(wrong)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """States of two clients with 40 images, in a cache of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(
        states, "FEDERATION", replace(states.FEDERATION, clients=2, images=40, model="mlp")
    )


@pytest.mark.usefixtures("small")
def test_a_state_is_trained_once_and_carried_on(monkeypatch: pytest.MonkeyPatch) -> None:
    data = load_config().dataset
    told: list[str] = []
    first = trained_state(data, "mlp", "", "", "epoch-1", told.append)
    again = trained_state(data, "mlp", "", "", "epoch-1", told.append)
    assert 0 <= first.accuracy == again.accuracy <= 1
    assert told[1:] == [f"mlp, epoch-1: accuracy {first.accuracy:.1%}"]
    second = trained_state(data, "mlp", "", "", "epoch-2", told.append)
    assert [line[: line.index("epoch-2")] for line in told[2:]] == ["mlp is trained to ", "mlp, "]
    assert len(list(states_folder().iterdir())) == 2
    # What was carried on is what one training in a piece makes.
    monkeypatch.setenv("XDG_CACHE_HOME", str(states_folder() / "other"))
    whole = trained_state(data, "mlp", "", "", "epoch-2")
    for name, weight in whole.weights.items():
        assert torch.equal(weight, second.weights[name])
        assert not torch.equal(weight, first.weights[name])


@pytest.mark.usefixtures("small")
def test_a_client_starts_from_its_cases_state() -> None:
    setting = Setting(load_config().dataset)
    training = LocalTraining("sgd", lr=0.01, batch_size=1, local_steps=2)
    case = Case(training, AttackConfig("sme", 1), model="mlp", state="epoch-1")
    assert "at epoch-1" in case.client
    told: list[str] = []
    clients = setting.clients([case], told.append)
    assert len(told) == 2  # a training that takes long is no silent one
    state = clients.state_of(case)
    assert state is not None
    observation, _, truth = clients.draw(case, 0)
    assert observation.round == truth.round == 2
    assert all(torch.equal(w, state.weights[name]) for name, w in observation.w0.items())
    with pytest.raises(ValueError, match="epoch-1, which is not given"):
        draw_client(case, setting.images, setting.info, 0)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("model", ["resnet8", "vgg11", "mlp_mixer", "lenet5"])
def test_states_of_other_models(model: str) -> None:
    data = load_config().dataset
    state = trained_state(data, model, "", "", "epoch-1")
    network = create_model(model, dataset_info(data).num_classes, (3, 32, 32), 1)
    network.load_state_dict(state.weights)
    assert all(torch.isfinite(w).all() for w in state.weights.values())
    steps = [w for name, w in state.weights.items() if name.endswith("num_batches_tracked")]
    assert all(w == 2 for w in steps)  # 20 images in batches of 16
    assert bool(steps) == (model in ("resnet8", "vgg11"))


def test_images_to_tune_on_are_none_to_report_on() -> None:
    data = load_config().dataset
    tuning, report = (Setting(data, split=split).images for split in ("tuning", "test"))
    assert len(tuning) > 0
    count = dataset_info(data).num_classes
    counts = tuning.labels.bincount(minlength=count) - report.labels.bincount(minlength=count)
    assert counts.abs().max() <= 1
    apart = torch.cdist(tuning.images.flatten(1).float(), report.images.flatten(1).float())
    assert apart.min() > 0
