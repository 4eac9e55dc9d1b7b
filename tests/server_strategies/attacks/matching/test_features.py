"""The classifier's inputs, against a made-up classifier and torch's own SGD."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fl_app.protocol import Defense, Knowledge, LocalTraining, Observation
from server_strategies.attacks.matching.features import StepFeatures, step_features

D = 12


class Net(nn.Module):
    """The features are the input itself."""

    def __init__(self, width: int = D) -> None:
        super().__init__()
        self.classifier = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(x.flatten(1))


def found(
    training: LocalTraining, labels: tuple[int, ...], x: Tensor | None = None
) -> tuple[StepFeatures, Tensor]:
    torch.manual_seed(0)
    model = Net(D if x is None else x.shape[1])
    x = torch.randn(len(labels), D).relu() + 0.1 if x is None else x
    w0 = {name: w.clone() for name, w in model.state_dict().items()}
    optimizer = torch.optim.SGD(
        model.parameters(), training.lr, training.momentum, nesterov=training.nesterov
    )
    for batch in training.batches(len(labels)):
        optimizer.zero_grad()
        F.cross_entropy(model(x[list(batch)]), torch.tensor(labels)[list(batch)]).backward()
        optimizer.step()
    seen = Observation(w0, model.state_dict(), len(labels), round=1, node=1, client=1)
    known = Knowledge("none", 10, (1, 1, D), (0.0,), (1.0,), training)
    return step_features(model, seen, known.granting("by-step", labels)), x


@pytest.mark.parametrize(
    ("steps", "size", "momentum", "nesterov"),
    [(1, 1, 0, False), (1, 4, 0, False), (5, 1, 0, False), (5, 1, 0.9, False), (3, 2, 0.9, True)],
)
def test_features_of_every_step_are_exact(
    steps: int, size: int, momentum: float, nesterov: bool
) -> None:
    training = LocalTraining(
        "sgd", lr=0.05, momentum=momentum, nesterov=nesterov, batch_size=size, local_steps=steps
    )
    features, x = found(training, tuple(range(2, 2 + steps * size)))
    error = (features.values - x).norm(dim=1) / x.norm(dim=1)
    assert error.max() < 1e-3
    assert features.error.max() < 1e-2
    assert (error < 10 * features.error + 1e-6).all()


def test_what_the_least_squares_have_not_settled_is_said_to_be_unknown() -> None:
    # Inputs as alike as those of a deep model: two of one label are hardly told apart.
    torch.manual_seed(3)
    x = (torch.randn(1, 64).relu() + 0.5 * torch.randn(5, 64)).relu()
    training = LocalTraining("sgd", lr=0.01, batch_size=1, local_steps=5)
    features, _ = found(training, (3, 3, 5, 6, 7), x)
    error = (features.values - x).norm(dim=1) / x.norm(dim=1)
    assert (error < 5 * features.error).all()
    assert error[:2].min() > 0.5 > 0.1 > error[2:].max()


def test_images_of_one_label_in_one_step_are_told_in_their_sum() -> None:
    training = LocalTraining("sgd", lr=0.05, batch_size=4, local_steps=1)
    features, x = found(training, (3, 3, 5, 6))
    error = (features.values - x).norm(dim=1) / x.norm(dim=1)
    assert error[2:].max() < 0.05
    assert features.error[2:].max() < 0.05
    assert features.error[:2].min() > 0.2
    pair = features.values[:2].mean(0) - x[:2].mean(0)
    assert pair.norm() / x[:2].mean(0).norm() < 0.2


def test_what_does_not_follow_is_refused() -> None:
    model, training = Net(), LocalTraining("sgd", local_steps=1)
    w = model.state_dict()
    seen = Observation(w, w, 1, round=1, node=1, client=1)
    known = Knowledge("none", 10, (1, 1, D), (0.0,), (1.0,), training).granting("by-step", (1,))
    for other, why in (
        (replace(known, training=replace(training, optimizer="adam")), "optimizer is adam"),
        (replace(known, training=replace(training, weight_decay=0.1)), "weight_decay is 0.1"),
        (replace(known, training=replace(training, local_steps=2)), "trained on once"),
        (replace(known, defense=Defense(clip=1.0)), "defence"),
        (known.granting("unknown"), "labels are not known"),
    ):
        with pytest.raises(ValueError, match=why):
            step_features(model, seen, other)
    with pytest.raises(ValueError, match="linear layer"):
        step_features(nn.Flatten(), seen, known)
