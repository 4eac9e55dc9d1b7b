"""What each table and figure of the paper is made of, by budget."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache

from client_app.training import NO_DEFENSE
from fl_app.benchmarks.case import Case
from fl_app.benchmarks.common import ADAM, SGD
from fl_app.benchmarks.paper.published import TABLE_1, TABLE_2, TABLE_3, TABLE_4, Figures
from fl_app.config import UNBOUNDED, AttackConfig, load_config
from fl_app.protocol import Defense, LocalTraining
from server_strategies.attacks.flow_matching_paper import FlowMatchingPaper

BUDGETS = ("smoke", "cpu", "gpu")
"""Minutes; a night on two cores; 15 minutes of one large GPU."""

BASELINES = ("gradinversion", "ggl", "dlf", "sme")
OURS = ("flow_matching_paper", "flow_matching")
"""The paper's attack to the letter, and what became of it."""

_PAPERS_ADAM = replace(ADAM, lr=0.1)
_PRESETS = {
    # DLF and SME: their authors' own iterations, which the paper multiplies by 25 and 30.
    "cpu": ("gradinversion_paper", "ggl", "dlf", "sme"),
    "gpu": ("gradinversion_paper", "ggl", "dlf_paper", "sme_paper", "flow_matching_paper"),
}
"""Files of conf/attack, by budget."""

_EQUAL_SECONDS = {"cpu": 120.0, "gpu": 60.0}  # of both of `OURS`
_STATES = {
    "smoke": ("init",),
    "cpu": ("init", "epoch-3"),
    "gpu": ("init", "epoch-3", "epoch-10", "converged"),
}
_DEFENSES = {
    "noise": Defense(noise="gaussian", sigma=1.0, relative=True),
    "clip": Defense(clip=0.05),
    "sparsify": Defense(sparsify=0.05),
    "precode": Defense(precode=256),
}
_NOISES = (0.0, 0.3, 1.0, 10.0, 100.0)  # standard deviations, of those of the update
_BATCHES = {"smoke": (1, 2), "cpu": (1, 4, 8), "gpu": (1, 4, 8, 16, 32)}

_OPEN = (
    "The paper gives no batch size: B=1. Its labels are taken as known: counts, without their "
    "order. Where it gives no iterations, see the line.",
    "It trains clients with Adam at 0.1, at which this ConvNet does not train: Adam 1e-3 and SGD "
    "0.01 stand beside it.",
)
_OPEN_NOISE = "The paper's standard deviations are lost: here in units of the update's own."
_OPEN_CLIP = "What is clipped at 0.05 is not said: each coordinate of the update."
_OPEN_GGL = (
    "GGL estimates the bound of clipping and the share of zeros from the update, as its authors "
    "do. The other attacks know the defence."
)
_OPEN_STATE = "The training's state is not given: untrained, and after whole epochs."


def _open_attack() -> str:
    """Return what the paper leaves open of its own attack, and what was taken."""
    attack, budget = FlowMatchingPaper(), load_config({"attack": "flow_matching_paper"}).attack
    return (
        f"Of its own attack the weights of eq. 18 are lost ({attack.flow:g} for the flow, by "
        f"`--tune`, and SME's {attack.tv:g} for total variation), t(k) is not given (linear, "
        f"{attack.t_start:g} to {attack.t_end:g}), nor are the first alpha ({attack.alpha:g}), the "
        f"learning rate ({attack.lr:g}) and the recovery threshold (a loss of "
        f"{budget.recovery_threshold:g}, where {budget.iterations:,} iterations do not end first)."
    )


@dataclass(frozen=True)
class Element:
    """A table or a figure.

    Attributes
    ----------
    title : str
    cases : callable
        From a budget to cases, in the order of the lines.
    published : callable
        From a data set and a case to the paper's line, by its name; None: it has none.
    left_open : tuple of str
        What the paper leaves open, and what was taken.
    columns : int
        Of `COLUMNS`, the first ones.
    """

    title: str
    cases: Callable[[str], tuple[Case, ...]]
    published: Callable[[str, Case], tuple[str, Figures] | None] = lambda data, case: None
    left_open: tuple[str, ...] = _OPEN
    columns: int = 9

    @property
    def lines(self) -> list[str]:
        """What the paper leaves open, with what it does of its own attack; none without cases."""
        return [*self.left_open, _open_attack()] if self.left_open else []


@cache
def _presets(budget: str) -> tuple[AttackConfig, ...]:
    """Return the attacks of Table 2 by their iterations."""
    if budget == "smoke":
        return tuple(AttackConfig(name, 2) for name in (*BASELINES, *OURS))
    found = [load_config({"attack": name}).attack for name in _PRESETS[budget]]
    if found[-1].name in OURS:  # what became of it, at as many iterations
        found.append(AttackConfig(OURS[1], found[-1].iterations))
    return tuple(found)


def attacks(budget: str, baselines: bool = True) -> Iterator[AttackConfig]:
    """Yield the attacks of Table 2, and ours at equal seconds."""
    for attack in _presets(budget):
        if baselines or attack.name in OURS:
            yield attack
    for name in OURS if budget in _EQUAL_SECONDS else ():
        yield AttackConfig(name, UNBOUNDED, _EQUAL_SECONDS[budget])


def _clients(budget: str) -> tuple[LocalTraining, ...]:
    each = (SGD,) if budget == "smoke" else (_PAPERS_ADAM, ADAM, SGD)
    return tuple(replace(client, batch_size=1) for client in each)


def _states(budget: str, client: LocalTraining) -> tuple[str, ...]:
    return ("init",) if client.lr == _PAPERS_ADAM.lr else _STATES[budget]


def _table_1(budget: str) -> tuple[Case, ...]:
    return tuple(
        Case(client, attack, defense=_noise(sigma))
        for client in _clients(budget)[-1:]
        for sigma in _NOISES
        for attack in attacks(budget, baselines=False)
        if attack.name == "flow_matching"
    )


def _noise(sigma: float) -> Defense:
    return Defense(noise="gaussian", sigma=sigma, relative=True) if sigma else NO_DEFENSE


def _table_2(budget: str) -> tuple[Case, ...]:
    return tuple(
        Case(client, attack, state=state)
        for attack in attacks(budget)
        for client in _clients(budget)
        for state in _states(budget, client)
    )


def _table_3(budget: str) -> tuple[Case, ...]:
    # The paper's ResNet-8 is most likely that of SME's code.
    names = ("convnet", "resnet8") if budget == "smoke" else tuple(TABLE_3)
    models = ["resnet8_wide" if name == "resnet8" else name for name in names]
    state = "epoch-2" if budget == "gpu" else "init"
    return tuple(
        Case(replace(client, batch_norm="eval"), attack, model=model, state=state)
        for model in models
        for client in _clients(budget)[-1:]
        for attack in attacks(budget, baselines=False)
    )


def _table_4(budget: str) -> tuple[Case, ...]:
    return tuple(
        Case(client, _aware(attack), defense=defense)
        for defense in _DEFENSES.values()
        for attack in attacks(budget)
        for client in _clients(budget)[-1:]
    )


def _aware(attack: AttackConfig) -> AttackConfig:
    """Return an attack as its authors set it against defences."""
    options = {"defense": "estimated"} if attack.name == "ggl" else attack.options
    return replace(attack, options=options)


def _figure_3(budget: str) -> tuple[Case, ...]:
    return tuple(
        Case(replace(client, batch_size=size), attack)
        for client in _clients(budget)[-1:]
        for size in _BATCHES[budget]
        for attack in attacks(budget)
    )


def _figure_4(budget: str) -> tuple[Case, ...]:
    return tuple(
        Case(client, attack, state=state)
        for client in _clients(budget)[-1:]
        for state in _STATES[budget]
        for attack in attacks(budget)
    )


def _figure_5(budget: str) -> tuple[Case, ...]:
    return tuple(
        Case(client, attack) for client in _clients(budget)[-1:] for attack in attacks(budget)
    )


def _by_attack(figures: dict[str, Figures], case: Case) -> tuple[str, Figures]:
    name = "flow_matching" if case.attack.name in OURS else case.attack.name
    return name, figures[name]


def _of_table_1(data: str, case: Case) -> tuple[str, Figures]:
    place = next(n for n, sigma in enumerate(_NOISES) if case.defense == _noise(sigma))
    return f"noise {place}", (None, TABLE_1[place][2])


def _of_table_2(data: str, case: Case) -> tuple[str, Figures] | None:
    return _by_attack(TABLE_2[data], case) if data in TABLE_2 else None


def _of_table_3(data: str, case: Case) -> tuple[str, Figures]:
    name = str(case.model).removesuffix("_wide")
    return name, TABLE_3[name]


def _of_table_4(data: str, case: Case) -> tuple[str, Figures]:
    kind = next(name for name, defense in _DEFENSES.items() if defense == case.defense)
    name, figures = _by_attack(TABLE_4[kind], case)
    return f"{kind}, {name}", figures


ELEMENTS = {
    "table 1": Element(
        "Gaussian noise against reconstruction", _table_1, _of_table_1, (*_OPEN, _OPEN_NOISE), 2
    ),
    "table 2": Element(
        "Attacks on CIFAR-10 and Tiny-ImageNet", _table_2, _of_table_2, (*_OPEN, _OPEN_STATE)
    ),
    "table 3": Element(
        "Models",
        _table_3,
        _of_table_3,
        (*_OPEN, "BatchNorm's mode is not given: evaluation. ResNet-8 is taken for SME's."),
        7,
    ),
    "table 4": Element(
        "Defences", _table_4, _of_table_4, (*_OPEN, _OPEN_NOISE, _OPEN_CLIP, _OPEN_GGL), 7
    ),
    "figure 3": Element("MSE over the batch size", _figure_3),
    "figure 4": Element("SSIM and accuracy over training", _figure_4),
    "figure 5": Element("Pictures", _figure_5),
}
"""By kind and number. Figure 2 shows the flow itself, see `velocity_figure`."""


def tuning() -> tuple[Case, ...]:
    """Return clients by which the weights of eq. 18 are chosen, trained and untrained."""
    sgd = replace(SGD, batch_size=1)
    weights = [{"flow": flow} for flow in (0.0, 1e-3, 1e-2, 1e-1)]
    weights += [{"tv": tv} for tv in (0.0, 1e-3, 1e-1)]
    return tuple(
        Case(sgd, AttackConfig("flow_matching_paper", 150, options=dict(chosen)), state=state)
        for state in ("init", "epoch-3")
        for chosen in weights
    )
