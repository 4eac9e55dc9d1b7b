"""The benchmark `flowleak bench distances`."""

from __future__ import annotations

from dataclasses import replace

from fl_app.benchmarks.case import Case
from fl_app.benchmarks.common import PAIR, SGD, flow
from fl_app.benchmarks.suite import AttackSuite


def _cases() -> tuple[Case, ...]:
    """Return each client twice; the default distance comes first."""
    one = Case(replace(SGD, batch_size=1), flow(100))
    clients = (
        one,
        replace(one, state="epoch-3"),
        replace(one, training=PAIR[0]),
        replace(one, training=replace(one.training, momentum=0.9)),
        replace(one, training=replace(PAIR[0], local_steps=1)),
    )
    cosine = flow(100, distance="cosine")
    cases = [each for case in clients for each in (case, replace(case, attack=cosine))]
    mixer = replace(one, state="epoch-3", model="mlp_mixer")
    two_steps = replace(one.training, local_steps=2)
    for case, iterations in ((replace(mixer, training=two_steps), 300), (mixer, 500)):
        cases += [
            replace(case, attack=flow(iterations)),
            replace(case, attack=flow(iterations, distance="even")),
        ]
    return tuple(cases)


SUITE = AttackSuite(_cases(), split="tuning")
"""SGD's updates compared with their length or without: what `distance=auto` rests on.

With 2 trials, 12 minutes of one thread for the ConvNet, 25 for the MLP-Mixer.
"""
