"""A configured attack, made and run."""

from __future__ import annotations

import time
from dataclasses import replace

import torch

from fl_app.config import AttackConfig, ConfigError, PriorConfig
from fl_app.protocol import Budget, Knowledge, Observation, Reconstruction
from fl_app.registry import ATTACKS
from server_strategies.attacks.accounting import Report
from server_strategies.attacks.attack import Attack
from server_strategies.priors.flow import load_flow


def create_attack(config: AttackConfig) -> Attack:
    """Return a configured attack, so that one that can't run is refused before anything starts.

    Raises
    ------
    ConfigError
        If the attack or one of its options is unknown, an option has a wrong value, or a
        plug-in's attack can't be used.
    """
    if config.name not in ATTACKS:
        raise ConfigError(f"attack.name: {ATTACKS.unknown(config.name)}")
    try:
        kind: type[Attack] = ATTACKS[config.name]
        known = [option.name for option in kind.options()]
    except ValueError as error:
        raise ConfigError(f"attack.name is {config.name!r}: {error}") from error
    if getattr(kind, "name", None) != config.name:  # the log would hold another name
        raise ConfigError(
            f"attack.name is {config.name!r}; its class {kind.__name__} has to say the same: "
            f"name: ClassVar[str] = {config.name!r}"
        )
    for key in config.options:
        if key not in known:
            raise ConfigError(
                f"attack.options.{key} is unknown; allowed for {config.name}: {', '.join(known)}"
            )
    try:
        return kind(**config.options)
    except ValueError as error:
        raise ConfigError(f"attack.options.{error}") from error


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
    chosen, began = create_attack(attack), time.monotonic()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    network = None
    if chosen.needs_prior:
        network = load_flow(chosen.weights(prior.weights), device, fetch=False)
    budget = Budget(attack.iterations, attack.seconds, seed, device, attack.recovery_threshold)
    found = chosen(observation, knowledge, network, budget, report)
    return replace(found, seconds=time.monotonic() - began)
