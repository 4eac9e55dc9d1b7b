"""The benchmark `flowleak bench matching`."""

from __future__ import annotations

from dataclasses import replace

from rich.console import Console

from fl_app.benchmarks.attack_results import AttackResults
from fl_app.benchmarks.case import Case
from fl_app.benchmarks.common import ADAM, PAIR, SGD, flow
from fl_app.benchmarks.suite import AttackSuite, Setting


def _cases() -> tuple[Case, ...]:
    """Return the clients with thresholds, then every objective at 1, 5 and 20 local steps."""
    batch = PAIR[1]
    long = replace(batch, local_steps=20)
    cases = [
        Case(replace(batch, local_steps=1), flow(150), threshold=28.0),
        Case(replace(ADAM, batch_size=1), flow(200), threshold=24.0),
        Case(batch, flow(300)),
        Case(batch, flow(200), labels="unknown"),
        Case(replace(ADAM, batch_size=8), flow(500), threshold=22.0),
        Case(replace(long, reshuffle=False), flow(300), threshold=24.0, num_examples=20),
        Case(long, flow(300), threshold=21.0, num_examples=20),
        Case(replace(PAIR[0], momentum=0.9), flow(300), threshold=23.0),
    ]
    for client, at_once in ((SGD, "gradient"), (ADAM, "inversion")):
        for steps in (1, 5, 20):
            kinds = ["surrogate", "trajectory"]
            if steps == 1:
                kinds += [at_once, "sign"]
            elif client is ADAM:
                kinds += ["fingerprints"]
            one_image = replace(client, local_steps=steps, batch_size=1, reshuffle=False)
            cases += [
                Case(one_image, flow(60, matching=kind), num_examples=min(steps, 5))
                for kind in kinds
            ]
    return tuple(cases)


class _Matching(AttackSuite):
    def notes(self, results: AttackResults, setting: Setting, console: Console) -> list[str]:
        """Say how fast the surrogate is; it is measured where trials are."""
        if not setting.trials:
            return results.notes
        # Slow to import, and only these lines need it.
        from fl_app.benchmarks.costs import surrogate_speedup

        factors = {size: surrogate_speedup(setting.info, setting.images, size) for size in (1, 4)}
        return [
            f"Our surrogate makes {factor:.2f} iterations in the time of one of a plain loop over "
            f"the parameters (B={size}; 2 were asked for)."
            for size, factor in factors.items()
        ]


SUITE = _Matching(_cases())
"""Every matching objective, at 1, 5 and 20 local steps, on Adam and on SGD.

With 5 trials, about 1.5 hours of one thread.
"""
