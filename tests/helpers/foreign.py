"""Models as users write them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowleak import Client


class Small(nn.Module):
    """A tutorial's network, with ``view``, max-pooling and dropout."""

    def __init__(self, p: float = 0.0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.pool = nn.MaxPool2d(2)
        self.fc1 = nn.Linear(8 * 8 * 8, 32)
        self.dropout = nn.Dropout(p)
        self.fc2 = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(F.relu(self.conv(x))).view(-1, 8 * 8 * 8)
        return self.fc2(self.dropout(F.relu(self.fc1(x))))


@dataclass
class Output:
    logits: Tensor


class Wrapped(Small):
    """Returns an object, as models of Hugging Face do."""

    def forward(self, x: Tensor) -> Any:
        return Output(super().forward(x))


class Dropping(Small):
    """Dropout as a function, which nobody can see from outside."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.dropout(x, 0.5, self.training))


class Mapped(Small):
    """No classifier: it returns a map of features."""

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


def client(model: Any = Small, **changes: Any) -> Client:
    settings: dict[str, Any] = {
        "num_classes": 10, "image_shape": (3, 16, 16), "mean": 0.5, "std": 0.5,
        "optimizer": "sgd", "lr": 0.01, "batch_size": 1, "steps": 2,
    }  # fmt: skip
    return Client(model=model, **settings | changes)


def trained(images: Tensor, labels: Tensor, model: nn.Module, lr: float = 0.01) -> nn.Module:
    """Train a model by the user's own loop, one image a step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    for i in range(len(images)):
        optimizer.zero_grad()
        output = model((images[i : i + 1] - 0.5) / 0.5)
        F.cross_entropy(getattr(output, "logits", output), labels[i : i + 1]).backward()
        optimizer.step()
    return model


def own_loop(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    """Train as `trained` does, as a function that `flowleak check --trains` takes."""
    trained(images, labels, model)
