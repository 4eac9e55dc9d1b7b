"""The benchmark `flowleak bench honest`."""

from __future__ import annotations

from dataclasses import replace

from fl_app.benchmarks.case import Case
from fl_app.benchmarks.common import ADAM, SGD, flow
from fl_app.benchmarks.suite import AttackSuite
from fl_app.protocol import LABEL_LEVELS

_ITERATIONS = 500
_WITHIN = {"by-step": None, "counts": 1.0, "unknown": 2.0}
_LEAST = {  # PSNR in dB, and the share of images identified
    ("sgd", 4, "counts"): (33.0, 0.9),
    ("adam", 4, "counts"): (29.0, None),
    ("adam", 4, "unknown"): (27.0, None),
}


def _cases() -> tuple[Case, ...]:
    cases = []
    for client in (SGD, ADAM):
        for size in (1, 4):
            for level in LABEL_LEVELS:
                least, share = _LEAST.get((client.optimizer, size, level), (None, None))
                cases.append(
                    Case(
                        replace(client, batch_size=size),
                        flow(_ITERATIONS),
                        least,
                        labels=level,
                        within=_WITHIN[level],
                        identified=share,
                    )
                )
    return tuple(cases)


SUITE = AttackSuite(_cases())
"""What the attack loses where it knows less of the labels, on the same updates.

With 8 trials, about 2.5 hours of one thread.
"""
