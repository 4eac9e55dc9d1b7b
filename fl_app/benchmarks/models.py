"""The benchmark `flowleak bench models`."""

from __future__ import annotations

from dataclasses import replace

from fl_app.benchmarks.case import Case
from fl_app.benchmarks.common import ADAM, SGD, flow
from fl_app.benchmarks.suite import AttackSuite


def _cases() -> tuple[Case, ...]:
    """Return every architecture but the MLP, whose first layer gives an image away.

    Clients with SGD are matched without smoothing ReLU, too, and those with BatchNorm
    attacked in both its modes.
    """
    cases = []
    for model in ("convnet", "mlp_mixer", "resnet8", "resnet18", "vgg11", "vit_tiny"):
        above = 8.0 if model in ("convnet", "mlp_mixer") else 3.0
        sgd, adam = (
            Case(replace(client, batch_size=1), flow(500), model=model, state="epoch-3")
            for client in (SGD, ADAM)
        )
        attacked = [replace(sgd, above_mean_colour=above)]
        if model in ("resnet8", "resnet18", "vgg11"):
            frozen = replace(sgd.training, batch_norm="eval")
            attacked.append(replace(attacked[0], training=frozen))
        for case in attacked:
            cases.append(case)
            if model not in ("mlp_mixer", "vit_tiny"):  # they have no ReLU
                cases.append(replace(case, attack=flow(500, relu_smoothing=0)))
        cases.append(adam)
    return tuple(cases)


SUITE = AttackSuite(_cases())
"""Every architecture, after three epochs of training.

A trial takes one thread 40 seconds on the ConvNet, 1 to 3 minutes on ResNet-8 and the Mixer, 10
to 50 on the larger ones.
"""
