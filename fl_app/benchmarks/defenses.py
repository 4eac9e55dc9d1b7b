"""The benchmark `flowleak bench defenses`."""

from __future__ import annotations

from rich.console import Console

from client_app.training import NO_DEFENSE
from fl_app.benchmarks.attack_results import AttackResults
from fl_app.benchmarks.case import Case
from fl_app.benchmarks.common import PAIR, timed
from fl_app.benchmarks.family import IN_SHORT
from fl_app.benchmarks.rows import file_beside
from fl_app.benchmarks.suite import AttackSuite, Setting
from fl_app.protocol import Defense
from fl_app.util.markdown import markdown_table

# The paper's defences (section 4). Its sigma is lost; it is taken in units of the update, which
# shrinks as the federation that tells the cost is trained.
_PAPERS_DEFENSES = (
    Defense(noise="gaussian", sigma=1.0, relative=True),
    Defense(clip=0.05),
    Defense(sparsify=0.05),
    Defense(precode=256),
)
# Of noise that costs the federation with Adam less than two points, the most.
_FREE_NOISE = Defense(noise="gaussian", sigma=10.0, relative=True)
# With these, one curve each: that of gaussian noise is the paper's table 1.
_CURVES = (
    *(Defense(noise="gaussian", sigma=s, relative=True) for s in (3.0, 30.0, 100.0)),
    *(Defense(sparsify=share) for share in (0.9, 0.99)),
    *(Defense(clip=bound) for bound in (0.002, 0.0005)),
    *(Defense(dp_clip=1.0, dp_noise=noise) for noise in (0.1, 1.0)),
    *(Defense(quantize=kind) for kind in ("bf16", "int8")),
    Defense(noise="laplace", sigma=3.0, relative=True),
    Defense(clip=0.1, clip_by="norm", local_dp=100.0),
    Defense(soteria=0.1),
)
_IN_TABLE_4 = ("flow_matching", "sme", "dlf", "ggl", "gradinversion")
_SECONDS = 30  # of one thread, for each attack


def _cases() -> tuple[Case, ...]:
    """Return each defence attacked by who knows it and by who does not.

    Table 4 of the paper, on a client with SGD with the constants of `family`; then, on one with
    Adam, its defences against flow_matching and SME, and curves over each defence's parameter,
    with flow_matching.
    """
    sgd, adam = PAIR
    adams = timed(_SECONDS, "flow_matching"), timed(_SECONDS, "sme", tv=0.03)
    sgds = tuple(timed(_SECONDS, name, **IN_SHORT.get(name, {})) for name in _IN_TABLE_4)
    table_4 = [
        Case(client, attack, defense=defense, defense_known=known, federations=2)
        for client, attacks, more in ((sgd, sgds, ()), (adam, adams, (_FREE_NOISE,)))
        for defense in (NO_DEFENSE, *_PAPERS_DEFENSES, *more)
        for attack in attacks
        for known in ((True,) if defense == NO_DEFENSE else (True, False))
    ]
    curves = [
        Case(adam, adams[0], defense=defense, defense_known=known)
        for defense in _CURVES
        for known in (True, False)
    ]
    return *table_4, *curves


class _Defenses(AttackSuite):
    def notes(self, results: AttackResults, setting: Setting, console: Console) -> list[str]:
        """Return a table of costs and gains, and draw it where results are kept."""
        # Slow to import, and only these lines need it.
        from fl_app.benchmarks.accuracy import measure_accuracies
        from fl_app.benchmarks.defense_plot import save_defense_plot
        from fl_app.benchmarks.defense_table import compare_with_sme, defense_cells

        accuracies = measure_accuracies(results.chosen(setting.only), setting, console)
        if setting.path:
            save_defense_plot(file_beside(setting.path, ".png"), results, accuracies)
        table = markdown_table(defense_cells(results, accuracies))
        return [*table, "", *compare_with_sme(results)]


SUITE = _Defenses(_cases())
"""Every defence, attacked by who knows it and by who does not, and what it costs in accuracy.

The accuracy is that of a federation of the very clients that are attacked. 45 attacks a trial on
clients with SGD, 22 and 28 on clients with Adam: with 8 trials 3, 1.5 and 2 hours of one thread,
and 5 minutes for each federation, more for those with DP-SGD. `--cases` runs a part, for example
`--cases noise=gaussian`.
"""
