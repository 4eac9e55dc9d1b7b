"""One trial of an attack: a fresh client, attacked and scored, in a worker process."""

from __future__ import annotations

from dataclasses import asdict, replace
from functools import cache

from client_app.defenses import distortion, update_bytes
from client_app.training import NO_DEFENSE, normalise
from fl_app.audit.identification import Identifier, choose_likeness
from fl_app.audit.metrics import MEASURES, Measure, feature_mse, score, target_features
from fl_app.audit.perceptual import load_lpips
from fl_app.audit.truth import Truth
from fl_app.benchmarks.case import Case
from fl_app.benchmarks.clients import Clients
from fl_app.benchmarks.provenance import short_hash
from fl_app.benchmarks.rows import Row
from fl_app.config import PriorConfig
from fl_app.protocol import Knowledge, Observation, Reconstruction
from server_strategies.attacks.attack import Attack
from server_strategies.attacks.matching import matching_objective
from server_strategies.attacks.run import create_attack, run_attack
from server_strategies.priors.places import weights_digest

_perceptual = cache(load_lpips)


def attack_trial(
    case: Case,
    seed: int,
    clients: Clients,
    prior: PriorConfig,
    lpips_weights: str,
    pictures: bool = False,
    found: Reconstruction | None = None,
) -> Row:
    """Return the row of one trial.

    Its ``peak_memory`` (the column MB) is the attack's alone, see `Reconstruction`.

    Parameters
    ----------
    case : Case
    seed : int
        See `draw_client`.
    clients : Clients
    prior : PriorConfig
    lpips_weights : str
        See `load_lpips`.
    pictures : bool
        Whether the row holds the private images and, in their order, those that were found:
        ``private`` and ``found``, in bytes from 0 to 255, (N, C, H, W) as nested lists.
    found : Reconstruction, optional
        What another tool made of the update, to be scored alone.
    """
    observation, knowledge, truth = clients.draw(case, seed)
    seen = knowledge.granting(case.labels)
    seen = seen if case.defense_known else replace(seen, defense=NO_DEFENSE)
    made, at_truth = "", None
    if found is None:
        found = run_attack(observation, seen, case.attack, prior, seed)
        attack = create_attack(case.attack)
        weights = attack.weights(prior.weights)
        made = short_hash(weights_digest(weights)) if attack.needs_prior else ""
        at_truth = _loss_at_truth(attack, observation, knowledge, truth)
    perceptual, reasons = _perceptual(lpips_weights)
    features = target_features(observation, knowledge)
    measures: dict[str, Measure] = {**MEASURES, **perceptual, "fmse": feature_mse(features)}
    identify = Identifier(
        lambda label, count: clients.images.of_class(label, count, seed),
        choose_likeness(perceptual.get("lpips_alex"), features, knowledge.image_shape),
    )
    leakage = score(
        found, truth, knowledge.mean, measures, reasons, knowledge.num_classes, identify
    )
    state = clients.state_of(case)
    size, encoding = update_bytes(observation.update, case.defense.quantize)
    shown = {}
    if pictures:
        beside = found.images[list(leakage.assignment)]
        for name, images in (("private", truth.images), ("found", beside)):
            shown[name] = (255 * images).round().byte().tolist()
    return {
        **shown,
        "case": case.name,
        "seed": seed,
        "prior": made,
        "accuracy": state.accuracy if state else None,
        "distortion": _distortion(clients, case, seed, observation),
        "update_bytes": size,
        "update_encoding": encoding,
        "matching": found.matching,
        "options": dict(found.options),
        "metrics": {k: v and asdict(v) for k, v in leakage.metrics.items()},
        "psnr_by_step": leakage.psnr_by_step,
        "single_colour": leakage.single_colour,
        "determined": leakage.determined,
        "recognisable": leakage.recognisable,
        "recognisable_chance": leakage.recognisable_chance,
        "identification": leakage.identification and asdict(leakage.identification),
        "reasons": dict(leakage.reasons),
        "loss": found.losses[-1],
        "loss_at_truth": at_truth,
        "diagnosis": found.diagnosis,
        "iterations": found.iterations,
        "seconds": found.seconds,
        "iterations_per_second": found.iterations / found.seconds,
        "peak_memory": found.peak_memory,
        "gflop_per_iteration": found.flops / max(1, found.iterations) / 1e9,
    }


def _loss_at_truth(
    attack: Attack, observation: Observation, knowledge: Knowledge, truth: Truth
) -> float | None:
    """Return the matching loss of the private images; None: the attack matches no update."""
    options = {option.name: getattr(attack, option.name) for option in attack.options()}
    if "matching" not in options:
        return None
    distance = options.get("distance", "cosine")
    objective = matching_objective(options["matching"], observation, knowledge, distance=distance)
    private = normalise(truth.images, knowledge.mean, knowledge.std)
    return objective(private, 1.0).item()


def _distortion(clients: Clients, case: Case, seed: int, observation: Observation) -> float:
    """Return how far the case's defence moved the update, see `distortion`."""
    # Of the same model: what is in it is no step on the update.
    bare = replace(NO_DEFENSE, precode=case.defense.precode, dropout=case.defense.dropout)
    if case.defense == bare:
        return 0.0
    undefended = clients.draw(replace(case, defense=bare), seed)[0]
    return distortion(undefended.update, observation.update)
