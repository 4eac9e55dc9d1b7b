"""`flowleak check`: the right cause of each wrong description, and no complaint of right ones."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.command import flowleak
from helpers.foreign import Small, client
from torch import Tensor, nn
from torch.nn import functional as F

from fl_app.runs.checking import Finding, check_description, check_own, run_own, sample
from flowleak import Client

DESCRIPTION: dict[str, Any] = {
    "optimizer": "sgd", "lr": 0.05, "momentum": 0.9, "batch_size": 4, "steps": 0, "epochs": 1,
}  # fmt: skip


class Normed(Small):
    """With BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.norm(x))


def own(
    model: nn.Module, images: Tensor, labels: Tensor, *, make: Callable[..., Any] | None = None,
    epochs_made: int = 1, size: int = 4, drop: bool = False, mean: float = 0.5, std: float = 0.5,
    norm: float = 0.0, evaluating: bool = False, still: bool = False, **loss: Any,
) -> None:  # fmt: skip
    """Train as users do: a loop of one's own, that normalises and batches by itself."""
    make = make or partial(torch.optim.SGD, lr=0.05, momentum=0.9)
    optimizer = make(model.parameters())
    model.train(not evaluating)
    for layer in model.modules():
        if still and isinstance(layer, nn.BatchNorm2d):
            layer.eval()
    for _ in range(epochs_made):
        for start in range(0, len(images), size):
            x, y = images[start : start + size], labels[start : start + size]
            if drop and len(x) < size:
                continue
            optimizer.zero_grad()
            F.cross_entropy(model((x - mean) / std), y, **loss).backward()
            if norm:
                nn.utils.clip_grad_norm_(model.parameters(), norm)
            optimizer.step()


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=0.05)


def sgd(parameters: Any, **settings: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, **{"lr": 0.05, "momentum": 0.9} | settings)


def _findings(described: Client, function: Callable[..., None], count: int = 10) -> list[Finding]:
    given = sample(described, examples=count)
    return list(check_own(described, run_own(function, described, given), given))


DROPPING = partial(Small, 0.4)

WRONG: list[tuple[Any, Callable[..., None], str]] = [
    (Small, partial(own, make=partial(sgd, momentum=0.0)), "momentum=0.0"),
    (Small, partial(own, make=partial(sgd, weight_decay=0.01)), "weight_decay=0.01"),
    (Small, partial(own, make=partial(sgd, lr=0.02)), "lr=0.02"),
    (Small, partial(own, make=adam), "optimizer='adam'"),
    (Small, partial(own, reduction="sum"), "summed over the batch"),
    (Small, partial(own, label_smoothing=0.1), "label_smoothing=0.1"),
    (Small, partial(own, mean=0.0, std=1.0), "images stay in [0, 1]"),
    (Small, partial(own, drop=True), "drop_last=True"),
    (Small, partial(own, epochs_made=2), "epochs=2"),
    (Small, partial(own, norm=0.5), "max_grad_norm=0.5"),
    (Normed, partial(own, still=True), "batch_norm='eval'"),
    (DROPPING, partial(own, evaluating=True), "dropout off"),
]


@pytest.mark.parametrize(("model", "function", "words"), WRONG, ids=[each[2] for each in WRONG])
def test_the_change_that_fits_is_named(
    model: Any, function: Callable[..., None], words: str
) -> None:
    findings = _findings(client(model, **DESCRIPTION), function)
    assert not findings[0].ok and "differs from the description" in findings[0].words
    fits = [each.words for each in findings[1:]]
    assert len(fits) == 1 or words.startswith(("images stay", "batch_norm")), fits
    assert any(words in each for each in fits), fits


RIGHT: list[tuple[Any, dict[str, Any], Callable[..., None]]] = [
    (Small, {}, own),
    (Small, {"momentum": 0.0}, partial(own, make=partial(sgd, momentum=0.0))),
    (Small, {"optimizer": "adam", "momentum": 0.0}, partial(own, make=adam)),
    (Small, {"weight_decay": 0.01}, partial(own, make=partial(sgd, weight_decay=0.01))),
    (Small, {"label_smoothing": 0.1}, partial(own, label_smoothing=0.1)),
    (Small, {"drop_last": True}, partial(own, drop=True)),
    (Small, {"epochs": 2, "reshuffle": False}, partial(own, epochs_made=2)),
    (Small, {"max_grad_norm": 0.5}, partial(own, norm=0.5)),
    (Normed, {}, own),
    (DROPPING, {}, own),
]


@pytest.mark.parametrize(("model", "settings", "function"), RIGHT)
def test_a_right_description_is_left_alone(
    model: Any, settings: dict[str, Any], function: Callable[..., None]
) -> None:
    described = client(model, **DESCRIPTION | settings)
    findings = [*check_description(described, sample(described)), *_findings(described, function)]
    assert all(each.ok for each in findings), findings


def test_a_tutorials_function_is_called_by_its_arguments_names() -> None:
    def train(net: nn.Module, trainloader: Any, epochs: int, lr: float, device: Any) -> None:
        optimizer = torch.optim.SGD(net.to(device).parameters(), lr=lr, momentum=0.9)
        net.train()
        for _ in range(epochs):
            for batch in trainloader:
                optimizer.zero_grad()
                F.cross_entropy(net(batch["img"]), batch["label"].to(device)).backward()
                optimizer.step()

    assert _findings(client(**DESCRIPTION), train)[0].ok
    with pytest.raises(ValueError, match="needs 'secret', which can't be filled in"):
        _findings(client(**DESCRIPTION), lambda net, secret: None)


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "audit.py").write_text(
        "import flowleak\nfrom helpers.foreign import Small\n"
        "client = flowleak.Client(model=Small, num_classes=10, image_shape=(3, 16, 16), mean=0.5,"
        "\n    std=0.5, optimizer='sgd', lr=0.01, batch_size=1, steps=2)\n"
    )
    shown = flowleak("check", "audit.py", "--trains", "helpers.foreign:own_loop")
    assert "your training is the described one: 5 steps" not in shown
    assert "with steps=5 the description fits" in shown
