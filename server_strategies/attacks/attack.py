"""What an attack is: a frozen dataclass of its constants that names its parts."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, ClassVar, get_type_hints

import torch
from torch import nn

from fl_app.protocol import Budget, Knowledge, Observation, Reconstruction
from server_strategies.attacks.evolve import evolve
from server_strategies.attacks.gauss_newton import decodes, gauss_newton
from server_strategies.attacks.infer import infer
from server_strategies.attacks.matching import matching_objective
from server_strategies.attacks.matching.base import MatchingObjective
from server_strategies.attacks.matching.batch_norm import BatchStatistics, statistics_of
from server_strategies.attacks.matching.restarts import Restarts
from server_strategies.attacks.optimise import Parts, Report, optimise
from server_strategies.attacks.options import Option
from server_strategies.priors.flow import load_flow

_BEFORE = 0.6  # share of the seconds that may go before the search
_LEFT = 0.1  # share of the seconds that the search has in any case


@dataclass(frozen=True)
class Task:
    """What an attack is given for one update.

    Attributes
    ----------
    seen : Observation
        What the server saw of the client.
    known : Knowledge
        With what it lacked inferred, see `infer`.
    prior : nn.Module or None
        A velocity network on the budget's device, where the attack needs one.
    budget : Budget
        What it may spend.
    """

    seen: Observation
    known: Knowledge
    prior: nn.Module | None
    budget: Budget

    def matching(self, kind: str, **options: Any) -> MatchingObjective:
        """Return the update's matching objective; parameters as `matching_objective`."""
        seconds = _BEFORE * self.budget.seconds
        return matching_objective(
            kind, self.seen, self.known, self.budget.device, seconds=seconds, **options
        )

    def restarts(self, count: int, kind: str, **options: Any) -> MatchingObjective:
        """Return the objective of so many restarts, see `Restarts`.

        Images of known features are decoded from the mean colour: there is no start to vary.
        """
        first = self.matching(kind, **options)
        if decodes(first):
            return first
        others = (self.matching(kind, **options) for _ in range(count - 1))
        return Restarts([first, *others])

    def statistics(self, weight: float) -> list[BatchStatistics]:
        """Return the matching of BatchNorm's statistics, where the update holds them."""
        return statistics_of(weight, self.seen, self.known, self.budget.device)

    @property
    def network(self) -> nn.Module:
        """The prior's network.

        Raises
        ------
        ValueError
            If the attack was given none.
        """
        if self.prior is None:
            raise ValueError("the attack needs a prior, and was given none")
        return self.prior

    def generator(self) -> torch.Generator:
        """Return a generator of random numbers, seeded by the budget."""
        return torch.Generator(self.budget.device).manual_seed(self.budget.seed)


@dataclass(frozen=True)
class Attack(ABC):
    """An attack: its fields are its constants, see `option`; `parts` names what it consists of.

    A subclass is a frozen dataclass; calling it attacks one update::

        found = SME(tv=0.03)(seen, known, budget=Budget(iterations=300))

    Attributes
    ----------
    name : str
        As in the configuration and in the log.
    needs_prior : bool
        Whether it needs a flow prior.
    labels : str
        How labels that are not known are inferred, see `infer`.
    """

    name: ClassVar[str]
    needs_prior: ClassVar[bool] = False
    labels: ClassVar[str] = "auto"

    def __post_init__(self) -> None:
        for each in self.options():
            each.check(getattr(self, each.name))

    @classmethod
    def options(cls) -> tuple[Option, ...]:
        """Return the attack's constants, in the order of its fields.

        Raises
        ------
        ValueError
            If a field is not made by `option`, or a setting can't have its type.
        """
        hints = get_type_hints(cls)
        return tuple(Option.of(each, hints[each.name]) for each in fields(cls))

    @abstractmethod
    def parts(self, task: Task) -> Parts:
        """Return what the attack consists of: matching objective, priors and schedule."""
        ...

    def weights(self, chosen: str) -> str:
        """Return the prior's weights that the attack takes: by default those that were chosen.

        Parameters
        ----------
        chosen : str
            See `load_flow`.
        """
        return chosen

    def assume(self, known: Knowledge) -> Knowledge:
        """Return the knowledge that the attack makes use of: by default all of it."""
        return known

    def __call__(
        self,
        seen: Observation,
        known: Knowledge,
        prior: nn.Module | None = None,
        budget: Budget | None = None,
        report: Report | None = None,
    ) -> Reconstruction:
        """Reconstruct a client's images from its update.

        Parameters
        ----------
        seen : Observation
        known : Knowledge
            What it lacks is inferred from the update, see `infer`.
        prior : nn.Module, optional
            A velocity network from `load_flow`, on the budget's device. By default
            the shipped one, ``compact``, where the attack needs one.
        budget : Budget, optional
        report : Report, optional
            Called about once a second with the iteration and the matching loss.

        Raises
        ------
        ValueError
            If the matching or the prior does not fit the update.
        AttackError
            If the optimisation diverges.
        """
        began = time.monotonic()
        budget = budget or Budget()
        if prior is None and self.needs_prior:
            prior = load_flow(self.weights("compact"), budget.device)
        known = infer(seen, self.assume(known), budget.device, self.labels)
        parts = self.parts(Task(seen, known, prior, budget))
        if budget.seconds:
            # What went before the search, such as finding exact features, counts as well.
            left = budget.seconds - (time.monotonic() - began)
            budget = replace(budget, seconds=max(left, _LEFT * budget.seconds))
        found = _search(parts)(parts, seen, budget, report)
        return replace(
            found,
            attack=self.name,
            options=asdict(self) | dict(parts.chosen),
            seconds=time.monotonic() - began,
        )


def _search(parts: Parts) -> Callable[..., Reconstruction]:
    """Return the search that suits what an attack consists of."""
    if parts.search:
        return parts.search
    if parts.population:
        return evolve
    if decodes(parts.matching) and not parts.decode:
        return gauss_newton
    return optimise
