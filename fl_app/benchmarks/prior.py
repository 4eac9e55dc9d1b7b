"""The benchmark `flowleak bench prior`."""

from __future__ import annotations

from rich.console import Console

from fl_app.benchmarks.attack_results import AttackResults
from fl_app.benchmarks.case import Case
from fl_app.benchmarks.common import PAIR, flow
from fl_app.benchmarks.suite import AttackSuite, Setting


def _cases() -> tuple[Case, ...]:
    """Return the defaults with the flow and without: the best of either (`constants`)."""
    cases = []
    for client, gain in zip(PAIR, (1.5, 2.5), strict=True):
        cases += [Case(client, flow(500, flow=0)), Case(client, flow(500), gain=gain)]
    return tuple(cases)


class _Prior(AttackSuite):
    def notes(self, results: AttackResults, setting: Setting, console: Console) -> list[str]:
        """Say what a step of the prior costs; it is measured where trials are."""
        if not setting.trials:
            return results.notes
        # Slow to import, and only these lines need it.
        from fl_app.benchmarks.costs import prior_cost

        lines = []
        for client in dict.fromkeys(case.training for case in self.cases):
            share = prior_cost(setting.info, setting.images, client, setting.prior)
            lines.append(
                f"A step of the flow prior takes {share:.2f} of the time of a matching step "
                f"({client.optimizer}, B={client.batch_size}; at most 0.5 was asked for)."
            )
        return lines


SUITE = _Prior(_cases())
"""What the flow prior gains over the best total variation.

With 16 trials, 1.5 hours of one thread.
"""
