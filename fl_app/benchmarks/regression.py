"""The benchmark `flowleak bench regression`."""

from __future__ import annotations

from dataclasses import replace

from fl_app.benchmarks.case import Case
from fl_app.benchmarks.common import ADAM, SGD
from fl_app.benchmarks.suite import AttackSuite
from fl_app.config import AttackConfig
from fl_app.protocol import LocalTraining

_ATTACK = AttackConfig("feature_regression", 1)
_ABOVE = {"resnet8": 3.5, "resnet18": 3.5, "vgg11": 5.0}


def _cases() -> tuple[Case, ...]:
    """Return one step of one image on every model with BatchNorm, then what says less."""

    def case(model: str, training: LocalTraining, above: float | None = None) -> Case:
        return Case(training, _ATTACK, model=model, above_mean_colour=above)

    sgd, adam = (replace(each, local_steps=1, batch_size=1) for each in (SGD, ADAM))
    cases = [
        case(model, training, above) for model, above in _ABOVE.items() for training in (sgd, adam)
    ]
    cases += [
        case("resnet8", replace(sgd, batch_norm="eval"), 3.5),
        case("resnet8", replace(adam, batch_norm="eval")),
    ]
    cases += [
        case("resnet8", replace(sgd, local_steps=5)),
        case("resnet8", replace(adam, local_steps=5)),
        case("resnet8", replace(sgd, batch_size=4)),
    ]
    return tuple(cases)


SUITE = AttackSuite(_cases())
"""What deep models give away in forward passes: regression onto images, without a search.

Untrained models. A trial takes one thread half a minute on ResNet-8, one on VGG-11 and two on
ResNet-18.
"""
