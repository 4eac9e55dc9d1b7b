"""Real clients of plain torch, for the tests of attacks."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from client_app.training import normalise, train
from fl_app.models import create_model
from fl_app.protocol import Knowledge, LocalTraining, Observation

MEAN, STD = (0.5, 0.45, 0.4), (0.25, 0.24, 0.26)


SHAPE = (3, 8, 8)


CLIENTS = {
    "sgd": LocalTraining("sgd", lr=0.05, batch_size=2, local_steps=3),
    "momentum": LocalTraining(
        "sgd", lr=0.05, momentum=0.9, weight_decay=0.01, batch_size=2, local_steps=3
    ),
    "nesterov": LocalTraining(
        "sgd", lr=0.05, momentum=0.9, nesterov=True, batch_size=2, local_steps=3
    ),
    "adam": LocalTraining("adam", lr=1e-3, weight_decay=0.01, batch_size=2, local_steps=3),
    "adamw": LocalTraining("adamw", lr=1e-3, weight_decay=0.1, batch_size=2, local_steps=3),
    "clipped": LocalTraining(
        "sgd",
        lr=0.05,
        momentum=0.9,
        weight_decay=0.01,
        max_grad_norm=0.5,
        batch_size=2,
        local_steps=3,
    ),
    "epochs": LocalTraining("adam", lr=1e-3, batch_size=4, local_steps=0, local_epochs=2),
}


def client(
    training: LocalTraining,
    dtype: torch.dtype = torch.float32,
    *,
    architecture: str = "convnet",
    count: int = 6,
    smooth: bool = False,
) -> tuple[Observation, Knowledge, Tensor]:
    """Train a real client on random images; return what the server sees, and the images."""
    generator = torch.Generator().manual_seed(3)
    images = torch.rand((count, *SHAPE), generator=generator, dtype=dtype)
    if smooth:
        images = F.interpolate(F.avg_pool2d(images, 2), SHAPE[1:], mode="bilinear")
    labels = torch.randint(10, (count,), generator=generator)
    model = create_model(architecture, 10, SHAPE, seed=1).to(dtype)
    w0 = {name: value.clone() for name, value in model.state_dict().items()}
    batches = [torch.tensor(batch) for batch in training.batches(count)]
    train(model, images, labels, batches, training, MEAN, STD)
    observation = Observation(w0, model.state_dict(), count, round=1, node=1, client=1)
    knowledge = Knowledge(architecture, 10, SHAPE, MEAN, STD, training)
    knowledge = knowledge.granting("by-step", tuple(labels.tolist()))
    return observation, knowledge, normalise(images, MEAN, STD)
