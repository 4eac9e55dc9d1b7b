"""The benchmark `flowleak bench regression`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fl_app.benchmarks.case import Case
from fl_app.benchmarks.common import ADAM, SGD, flow
from fl_app.benchmarks.suite import AttackSuite
from fl_app.config import AttackConfig
from fl_app.protocol import LocalTraining

_REGRESSION = AttackConfig("feature_regression", 1)
_DECODING = flow(150)  # of exact features
_ABOVE = {"resnet8": 3.5, "resnet18": 3.5, "vgg11": 5.0}
_STATE = "epoch-1"


def _cases() -> tuple[Case, ...]:
    """Return models with BatchNorm by mode, head and state, and by how many images they mix."""

    def case(
        training: LocalTraining,
        model: str = "resnet8",
        attack: AttackConfig = _REGRESSION,
        above: float | None = None,
        **more: Any,
    ) -> Case:
        return Case(training, attack, model=model, above_mean_colour=above, **more)

    def flat(training: LocalTraining, state: str = "init") -> Case:
        # In training mode a constant image, where decoding starts, has no features at all.
        attack = _DECODING if training.batch_norm == "eval" else _REGRESSION
        return case(training, attack=attack, head="flatten", state=state)

    sgd, adam = (replace(each, local_steps=1, batch_size=1) for each in (SGD, ADAM))
    frozen, adam_frozen = (replace(each, batch_norm="eval") for each in (sgd, adam))
    wide = "resnet8_wide"
    cases = [
        case(training, model, above=above)
        for model, above in _ABOVE.items()
        for training in (sgd, adam)
    ]
    cases += [
        case(frozen, above=3.5),
        case(adam_frozen),
        *(case(each, state=_STATE, above=3.5) for each in (sgd, frozen)),
        case(frozen, "resnet18", state=_STATE, above=4.0),
        case(replace(sgd, local_steps=5)),
        case(replace(adam, local_steps=5)),
        case(replace(sgd, batch_size=4)),
        case(frozen, wide, _DECODING, threshold=20.0),
        case(replace(frozen, local_steps=5), wide, _DECODING, threshold=17.5),
        case(frozen, wide),
        case(adam_frozen, wide),
        *(flat(each, state) for state in ("init", _STATE) for each in (sgd, frozen)),
        flat(replace(frozen, local_steps=5)),
    ]
    return tuple(cases)


SUITE = AttackSuite(_cases())
"""What deep models give away: regression onto images, and exact features of heads that pool less.

Under one thread a trial takes half a minute on ResNet-8, one on VGG-11 and two on ResNet-18, and
two with five local steps of SME's ResNet-8. A first run trains ResNet-8 for one epoch in two
minutes, and ResNet-18 in forty.
"""
