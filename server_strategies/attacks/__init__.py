"""The attacks: one short file each, and one way to run them.

An attack is a plain function of tensors, usable from a notebook. Here each has the
name that it has in `ATTACKS`: the function, bound after the module of that name was::

    from server_strategies.attacks import flow_matching
    from server_strategies.priors.flow import load_flow

    found = flow_matching(observation, knowledge, load_flow("compact"), Budget(iterations=200))
    found.images  # (N, C, H, W) in [0, 1]
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from fl_app.config import AttackConfig, ConfigError, PriorConfig
from fl_app.protocol import Budget, Knowledge, Observation, Reconstruction
from server_strategies.attacks.dlf import dlf
from server_strategies.attacks.dlg import dlg
from server_strategies.attacks.dropout_inversion import dropout_inversion
from server_strategies.attacks.flow_matching import flow_matching
from server_strategies.attacks.ggl import ggl
from server_strategies.attacks.gradinversion import gradinversion
from server_strategies.attacks.idlg import idlg
from server_strategies.attacks.inverting_gradients import inverting_gradients
from server_strategies.attacks.optimise import Report
from server_strategies.attacks.sme import sme
from server_strategies.priors.flow import load_flow


@dataclass(frozen=True)
class Attack:
    """An attack and the learned prior that it needs.

    Attributes
    ----------
    run : callable
        ``(observation, knowledge, prior, budget, report, **options)``.
    load_prior : callable or None
        ``(weights, device)`` to the prior; None: it needs none.
    """

    run: Callable[..., Reconstruction]
    load_prior: Callable[[str, str], nn.Module] | None = None

    @property
    def options(self) -> dict[str, Any]:
        """The attack's constants by name, with their defaults."""
        parameters = inspect.signature(self.run).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


ATTACKS = {
    "dlf": Attack(dlf),
    "dropout_inversion": Attack(dropout_inversion),
    "dlg": Attack(dlg),
    "flow_matching": Attack(flow_matching, load_flow),
    "ggl": Attack(ggl, load_flow),
    "gradinversion": Attack(gradinversion),
    "idlg": Attack(idlg),
    "inverting_gradients": Attack(inverting_gradients),
    "sme": Attack(sme),
}


def check_attack(attack: AttackConfig) -> None:
    """Refuse an attack that can't run, before anything starts.

    Raises
    ------
    ConfigError
        If the attack or one of its options is unknown, or an option is neither
        a number nor a word where the attack takes one.
    """
    if attack.name not in ATTACKS:
        raise ConfigError(f"attack.name is {attack.name!r}; allowed: {', '.join(sorted(ATTACKS))}")
    known = ATTACKS[attack.name].options
    for key, value in attack.options.items():
        if key not in known:
            raise ConfigError(
                f"attack.options.{key} is unknown; allowed for {attack.name}: {', '.join(known)}"
            )
        wanted = str if isinstance(known[key], str) else (int, float)
        if isinstance(value, bool) or not isinstance(value, wanted):
            words = "a word" if wanted is str else "a number"
            raise ConfigError(f"attack.options.{key} is {value!r}; allowed: {words}")


def run_attack(
    observation: Observation,
    knowledge: Knowledge,
    attack: AttackConfig,
    prior: PriorConfig,
    seed: int,
    report: Report | None = None,
) -> Reconstruction:
    """Run a configured attack on an observation, on a GPU if there is one.

    Raises
    ------
    ConfigError, ValueError
        If the configuration does not fit the attack, the prior or the update.
    AttackError
        If the optimisation diverges.
    """
    check_attack(attack)
    entry, began = ATTACKS[attack.name], time.monotonic()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    network = entry.load_prior(prior.weights, device) if entry.load_prior else None
    budget = Budget(attack.iterations, attack.seconds, seed, device)
    found = entry.run(observation, knowledge, network, budget, report, **attack.options)
    return replace(found, seconds=time.monotonic() - began)
