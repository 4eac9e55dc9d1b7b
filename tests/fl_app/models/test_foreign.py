"""Models of a user's own."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from helpers.foreign import Dropping, Mapped, Small, Wrapped, client

from fl_app.models import clients_model, known_model, model_features
from fl_app.models.extensions import given_noise, random_layers


def test_it_takes_any_memory_format_and_returns_logits() -> None:
    x = torch.randn(3, 3, 16, 16)
    for kind in (Small, Wrapped):
        model = known_model(client(kind).knowledge, seed=1)
        expected = model(x)
        assert expected.shape == (3, 10)
        assert torch.allclose(model(x.to(memory_format=torch.channels_last)), expected, atol=1e-6)


def test_dropout_layers_take_given_masks() -> None:
    model = known_model(client(partial(Small, 0.5)).knowledge, seed=1)
    (layer,) = random_layers(model)
    x = torch.randn(2, 3, 16, 16)
    assert layer.size == 32
    with given_noise(model, [torch.ones(2, 32)]):
        hidden = 2 * torch.relu(model.fc1(model.pool(torch.relu(model.conv(x))).flatten(1)))  # type: ignore[operator]
        assert torch.allclose(model(x), model.fc2(hidden), atol=1e-6)  # type: ignore[operator]
    assert not torch.equal(model(x), model(x))


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (Dropping, "draws random numbers in training"),
        (
            Mapped,
            r"returned shape \(2, 8, 16, 16\) for 2 images; needed: logits of shape \(2, 10\)",
        ),
        (dict, "can't be made: TypeError: it returned dict, not an nn.Module"),
        (partial(Small, p=2.0), "can't be made: ValueError"),
    ],
)
def test_what_cannot_be_simulated_is_refused(model: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        known_model(client(model).knowledge)


def test_weights_that_are_not_sent_are_the_models_own() -> None:
    module = Small()
    sent = {"fc2.weight": torch.ones(10, 32), "fc2.bias": torch.zeros(10)}
    model = clients_model(client(module).knowledge, sent)
    assert torch.equal(model.state_dict()["conv.weight"], module.conv.weight)
    assert torch.equal(model.get_parameter("fc2.weight"), sent["fc2.weight"])
    assert not torch.equal(module.fc2.weight, sent["fc2.weight"])  # the user's is untouched
    assert [name for name, _ in model.named_parameters()] == list(sent)  # the others are frozen


def test_features_are_what_the_classifier_takes() -> None:
    known = client(Small).knowledge
    model = known_model(known, seed=1).eval()
    features = model_features(known, model)(torch.randn(4, 3, 16, 16))
    assert features.shape == (4, 32)
