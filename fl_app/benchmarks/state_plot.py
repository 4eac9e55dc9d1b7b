"""The plot of `flowleak bench states`: leakage and accuracy over training."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from fl_app.benchmarks.attack_results import AttackResults
from fl_app.benchmarks.case import Case
from fl_app.util.files import whole_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_METRICS = (("psnr", "PSNR, dB"), ("ssim", "SSIM"))


def save_state_plot(path: Path, results: AttackResults) -> None:
    """Draw each attack's leakage over the states of training, beside the model's accuracy.

    A row of panels a metric, PSNR and SSIM, a column a client. Means over trials with
    their 95% intervals; dotted: the mean colour; grey: the accuracy, on the right axis.

    Parameters
    ----------
    path : Path
        A PNG, written whole or not at all.
    results : AttackResults
        Of cases that differ in client, state and attack.
    """
    # Slow to import, and only a plot needs it.
    from matplotlib.figure import Figure

    cases = [case for case in results.cases if results.of(case)]
    clients = list(dict.fromkeys(case.training for case in cases))
    figure = Figure(figsize=(6 * len(clients), 8), layout="constrained")
    panels = figure.subplots(len(_METRICS), max(len(clients), 1), squeeze=False)
    for column, client in enumerate(clients):
        of_client = [(c, results.summary(c)) for c in cases if c.training == client]
        for row, (metric, words) in enumerate(_METRICS):
            _draw(panels[row][column], of_client, metric)
            panels[row][column].set_ylabel(words)
        first = of_client[0][0]
        panels[0][column].set_title(f"{_client(first)}, labels {first.labels}")
    if clients:
        handles, labels = panels[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=7)
    with whole_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def _client(case: Case) -> str:
    """Return a case's client without its state."""
    return case.client.replace(f" at {case.state}", "")


def _draw(panel: Axes, summaries: list[tuple[Case, dict[str, Any]]], metric: str) -> None:
    states = list(dict.fromkeys(case.state for case, _ in summaries))
    accuracy = {case.state: line["accuracy"] for case, line in summaries}
    baseline = {case.state: line[metric]["baseline"] for case, line in summaries}
    budgets = {case.attack_words for case, _ in summaries}
    for words in dict.fromkeys(case.attack_words for case, _ in summaries):
        name = words.partition(" ")[0]
        alone = sum(each.partition(" ")[0] == name for each in budgets) == 1
        scores = {c.state: line[metric] for c, line in summaries if c.attack_words == words}
        means = [scores[state]["mean"] for state in scores]
        ends = [(scores[s]["low"], scores[s]["high"]) for s in scores]
        known = all(None not in end for end in ends)
        spread = [
            [mean - low for mean, (low, _) in zip(means, ends, strict=True)],
            [high - mean for mean, (_, high) in zip(means, ends, strict=True)],
        ] if known else None  # fmt: skip
        places = [states.index(state) for state in scores]
        panel.errorbar(places, means, spread, marker="o", capsize=3, label=name if alone else words)
    panel.plot(range(len(states)), [baseline[s] for s in states], "k:", label="mean colour")
    panel.set_xticks(range(len(states)), states)
    other = panel.twinx()
    trained = [place for place, state in enumerate(states) if accuracy[state]]
    reached = [100 * accuracy[states[place]] for place in trained]
    other.plot(trained, reached, color="grey", alpha=0.6)
    panel.plot([], [], color="grey", alpha=0.6, label="accuracy (right)")
    other.set_ylabel("accuracy of the global model, %")
    other.set_ylim(0, 100)
