"""The paper's tables and figures as benchmarks, in the paper's layout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache

from rich.console import Console
from rich.table import Table

from fl_app.audit.exposure import bounds_of
from fl_app.benchmarks.attack_results import AttackResults
from fl_app.benchmarks.case import Case
from fl_app.benchmarks.paper.elements import ELEMENTS, Element, tuning
from fl_app.benchmarks.paper.published import COLUMNS, TABLE_1, Figures
from fl_app.benchmarks.rows import file_beside
from fl_app.benchmarks.suite import AttackSuite, Setting
from fl_app.config import ConfigError
from fl_app.runs.facts import prior_saw
from fl_app.util.intervals import spread, spread_words
from server_strategies.attacks.run import create_attack
from server_strategies.priors.flow import load_flow

_SAW = "its prior saw the train split"
_METRICS = ("psnr", "ssim", "lpips_vgg", "lpips_alex", "fmse", "mse", "tv")
_DIGITS = (2, 3, 3, 3, 3, 4, 3, 3, 3)  # of `COLUMNS`


@dataclass
class PaperResults(AttackResults):
    """Rows in the paper's layout: its own line, then ours with everything that it leaves open."""

    element: Element = field(kw_only=True)
    setting: Setting = field(kw_only=True)

    def cells(self) -> list[list[str]]:
        """Return the lines of the table, its head first."""
        columns = self.element.columns
        head = ["", "iterations", "client", "accuracy", "trials", *COLUMNS[:columns]]
        lines = [[*head, "mean colour dB", "identified"]]
        before = None
        for case in self.cases:
            if not self.of(case):
                continue
            paper = self.element.published(str(self.facts["dataset"]), case)
            if paper and paper[0] != before:
                lines.append(_paper_line(*paper, columns))
            before = paper and paper[0]
            lines.append(self._our_line(case, columns))
        return lines

    def main_cells(self) -> list[list[str]]:
        """Return all columns, which are the paper's."""
        return self.cells()

    def table(self) -> Table:
        """Return the table for a screen."""
        return self.whole_table(self.element.title)

    def _our_line(self, case: Case, columns: int) -> list[str]:
        rows, line = self.of(case), self.summary(case)
        cells = []
        for metric, digits in zip(_METRICS[:columns], _DIGITS, strict=False):
            found = line.get(metric)
            cells.append(spread_words(found, digits) if found else "-")
        for values, digits in (
            ([row["peak_memory"] / 1e9 for row in rows], _DIGITS[7]),
            ([row["gflop_per_iteration"] * row["iterations"] / 1e3 for row in rows], _DIGITS[8]),
        )[: max(0, columns - len(_METRICS))]:
            cells.append(spread_words(spread(values, bounds_of("mse")), digits))
        seconds = f"{case.attack.seconds:g} s, " if case.attack.seconds else ""
        iterations = sum(row["iterations"] for row in rows) / len(rows)
        found = line["identified"]
        return [
            self.attack_words(case), f"{seconds}{iterations:.0f}",
            f"{case.client}, {case.labels}",
            f"{line['accuracy']:.0%}" if line["accuracy"] else "untrained", str(len(rows)),
            *cells, f"{line['psnr']['baseline']:.1f}",
            "{count} of {of}".format(**found) if found else "-",
        ]  # fmt: skip

    def attack_words(self, case: Case) -> str:
        """Return an attack's name and options, and whether its prior knows images like these."""
        options = (f"{key}={value}" for key, value in case.attack.options.items())
        words = " ".join([case.attack.name, *options])
        attack = create_attack(case.attack)
        if attack.needs_prior:
            weights = attack.weights(self.setting.prior.weights)
            if prior_saw(_network(weights), replace(self.setting.data, split="train")):
                words += f" ({_SAW})"
        return words


_network = cache(load_flow)


def _paper_line(name: str, figures: Figures, columns: int) -> list[str]:
    padded = (*figures, *[None] * columns)[:columns]
    shown = ["-" if value is None else f"{value:g}" for value in padded]
    return [f"**the paper: {name}**", "", "", "", "", *shown, "", ""]


@dataclass(frozen=True)
class PaperSuite(AttackSuite):
    """A table or a figure of the paper.

    Attributes
    ----------
    element : str
        In `ELEMENTS`; empty: what the weights of eq. 18 are chosen by.
    """

    element: str = field(default="", kw_only=True)

    @property
    def _made_of(self) -> Element:
        if not self.element:
            return Element("Weights of eq. 18", lambda budget: tuning(), left_open=())
        return ELEMENTS[self.element]

    def results(self, name: str, setting: Setting) -> PaperResults:
        """See `Suite`."""
        facts, made_of = setting.facts, self._made_of
        kept = (name, self.cases, facts, setting.path)
        return PaperResults(*kept, element=made_of, setting=setting)

    @property
    def pictures(self) -> bool:
        """See `AttackSuite`."""
        return self.element == "figure 5"

    def notes(self, results: AttackResults, setting: Setting, console: Console) -> list[str]:
        """Say what the paper leaves open, and draw the figure where results are kept."""
        # Slow to import, and only figures need it.
        from fl_app.benchmarks.paper import figures
        from fl_app.benchmarks.state_plot import save_state_plot

        lines = self._made_of.lines
        draw: dict[str, Callable[..., None]] = {
            "figure 3": figures.batch_sizes,
            "figure 4": save_state_plot,
            "figure 5": figures.pictures,
        }
        if setting.path and self.element in draw:
            draw[self.element](file_beside(setting.path, ".png"), results)
        if self.element == "table 1" and any(case.federations for case in self.cases):
            lines += _accuracies(self.cases, setting, console)
        return lines


def _accuracies(cases: tuple[Case, ...], setting: Setting, console: Console) -> list[str]:
    """Return Table 1's accuracies, the paper's beside those of the clients' own federations."""
    from fl_app.benchmarks.accuracy import measure_accuracies  # slow to import

    reached = measure_accuracies(cases, setting, console)
    lines = []
    for case, (_, accuracy, _) in zip(cases, TABLE_1, strict=True):
        ours = list(reached.of(case).values())
        words = spread_words(spread([100 * value for value in ours]), 1) if ours else "not measured"
        lines.append(f"Accuracy with {case.defense}: {words}%; the paper: {accuracy:g}%.")
    return lines


def paper_suite(element: str, budget: str) -> PaperSuite:
    """Return the benchmark of a table or a figure.

    Parameters
    ----------
    element : str
        In `ELEMENTS`, such as ``table 2``; empty: the choice of the weights of eq. 18.
    budget : str
        In `BUDGETS`.

    Raises
    ------
    ConfigError
        If there is no such element.
    """
    if not element:
        return PaperSuite(tuning(), split="tuning")
    if element not in ELEMENTS:
        raise ConfigError(f"{element!r} is unknown; allowed: {', '.join(ELEMENTS)}, figure 2")
    cases = ELEMENTS[element].cases(budget)
    if budget == "smoke":  # a federation takes minutes
        cases = tuple(replace(case, federations=0) for case in cases)
    return PaperSuite(cases, element=element)
