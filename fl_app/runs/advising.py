"""What to do about what leaks: each measure applied to a run's own clients, and attacked again.

The auditor holds the private images, so that the clients' rounds can be trained again, with a
defence, in larger batches or longer. The attack knows what was changed. A federation trained with
the change and without says what it costs in accuracy.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from client_app.defended_steps import check_defense
from client_app.defenses import defended_weights, noise_generator
from client_app.training import NO_DEFENSE, choose_batches, in_training_order, local_seed, train
from fl_app.audit.auditor import Auditor
from fl_app.audit.exposure import identified_of
from fl_app.audit.truth import Truth, write_truth
from fl_app.benchmarks.accuracy import federated_accuracy
from fl_app.benchmarks.federation import Federation
from fl_app.config import UNBOUNDED, AttackConfig
from fl_app.data import load_split
from fl_app.models import known_model
from fl_app.protocol import DatasetInfo, Defense, LocalTraining, Observation
from fl_app.runs.advice import AS_IT_IS, FOLDER, Advice, read_advice, write_advice
from server_strategies.attacks.run import run_attack
from server_strategies.honest_but_curious import sum_of
from server_strategies.observations import ObservationStore


@dataclass(frozen=True)
class Change:
    """Something that the clients could do otherwise.

    Attributes
    ----------
    words : str
        Names it.
    defense : Defense or None
        In the place of the run's; None: as it is.
    one_batch : bool
        All images of a client in one local step.
    passes : int
        Times as many passes over the same images.
    """

    words: str
    defense: Defense | None = None
    one_batch: bool = False
    passes: int = 1

    @property
    def key(self) -> str:
        """Name of its folder."""
        return "-".join("".join(c if c.isalnum() else " " for c in self.words).split())

    def training(self, own: LocalTraining, count: int) -> LocalTraining:
        """Return the clients' training with the change, of so many images."""
        if self.one_batch:
            return replace(own, local_steps=1, local_epochs=1, batch_size=count)
        if own.local_steps:
            return replace(own, local_steps=self.passes * own.local_steps)
        return replace(own, local_epochs=self.passes * own.local_epochs)


CHANGES = (
    Change(AS_IT_IS),
    Change("secure aggregation", Defense(secagg=True)),
    Change("updates in bfloat16", Defense(quantize="bf16")),
    Change("updates in int8", Defense(quantize="int8")),
    Change("noise as large as the update", Defense(noise="gaussian", sigma=1.0, relative=True)),
    Change("noise 10 times the update", Defense(noise="gaussian", sigma=10.0, relative=True)),
    Change("90% of the update left out", Defense(sparsify=0.9)),
    Change("99% of the update left out", Defense(sparsify=0.99)),
    Change("DP-SGD, clip 1, noise 0.1", Defense(dp_clip=1.0, dp_noise=0.1)),
    Change("DP-SGD, clip 1, noise 1", Defense(dp_clip=1.0, dp_noise=1.0)),
    Change("all images of a round in one batch", one_batch=True),
    Change("4 times the passes", passes=4),
)
"""What is tried; `AS_IT_IS` is what the others are held against."""


def advise(
    auditor: Auditor,
    clients: int,
    seconds: float,
    rounds: int,
    tell: Callable[[str], None],
    changes: Sequence[Change] = CHANGES,
) -> list[Advice]:
    """Try changes on a run's clients; what is in its advise.json already is not tried again.

    Parameters
    ----------
    auditor : Auditor
        Of a run with Truth.
    clients : int
        Updates of the first attacked round that are taken, 1 or more.
    seconds : float
        That each attack may take, above 0; as many for every change.
    rounds : int
        Of the federations whose accuracy is measured; 0: it is not.
    tell : callable
        Takes a line when a change begins.
    changes : sequence of Change

    Raises
    ------
    ValueError
        If no update has its private images here.
    """
    store, folder = ObservationStore(auditor.run_dir), auditor.run_dir
    seen = [store.load(id_) for id_ in store.ids()]
    held = [each for each in seen if not each.nodes and auditor.truth(each) is not None]
    if not held:
        raise ValueError(
            f"{folder.name} holds no single client's update with its private images: advice needs "
            "both; they are written where audit.truth is on, and secagg off"
        )
    first = min(each.round for each in held)
    taken = [each for each in held if each.round == first][:clients]
    attack = replace(auditor.config.attack, iterations=UNBOUNDED, seconds=seconds)
    setting = {"clients": len(taken), "rounds": rounds, "attack": asdict(attack)}
    done = read_advice(folder, setting)
    reached: dict[str, float] = {}
    for change in changes:
        if change.words in (row.change for row in done):
            continue
        tell(f"advise: {change.words}, on {len(taken)} updates of round {first}")
        done.append(_try(change, auditor, taken, attack, rounds, reached))
        write_advice(folder, setting, done)
    return done


def _try(
    change: Change,
    auditor: Auditor,
    taken: Sequence[Observation],
    attack: AttackConfig,
    rounds: int,
    reached: dict[str, float],
) -> Advice:
    """Return what a change does; what does not fit the clients is told.

    `reached` keeps accuracies by federation: some changes train the same one.
    """
    began = time.monotonic()
    config = auditor.config
    defense = config.defense if change.defense is None else change.defense
    training = change.training(config.client, max(each.num_examples for each in taken))
    own = Auditor(
        auditor.run_dir / FOLDER / change.key,
        replace(
            config, defense=defense, client=training, audit=replace(config.audit, defense="given")
        ),
        replace(auditor.knowledge, defense=defense.plain(), training=training),
        no_data=auditor.no_data,
        no_candidates=auditor.no_candidates,
    )
    try:
        check_defense(defense, training, known_model(own.knowledge))
        if defense.secagg and len(taken) < 2:
            raise ValueError("a sum needs two clients or more")
        own.run_dir.mkdir(parents=True, exist_ok=True)
        updates = [_again(each, auditor, own) for each in taken]
        for each in [sum_of(updates)] if defense.secagg else updates:
            known = own.grant(each)
            own.record(each, run_attack(each, known, attack, config.prior, config.seed))
    except (ValueError, RuntimeError) as error:
        return Advice(change.words, str(defense), problem=str(error))
    row = _row(change, defense, own.lines()[-(1 if defense.secagg else len(taken)) :])
    accuracy = _accuracy(auditor, defense, training, rounds, reached)
    return replace(row, accuracy=accuracy, seconds=round(time.monotonic() - began, 1))


def _of_one(defense: Defense) -> Defense:
    """Return what one client does of a defence: secure aggregation changes no single update."""
    return NO_DEFENSE if defense.secagg else defense


def _again(seen: Observation, auditor: Auditor, own: Auditor) -> Observation:
    """Train a client's round again as `own` says; leave its Truth, and return what it sends."""
    truth = auditor.truth(seen)
    assert truth is not None
    training, known = own.config.client, own.knowledge
    alone = _of_one(own.config.defense)
    seed = local_seed(own.config.seed, max(seen.client, 0), seen.round)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if training == auditor.config.client:
            batches, images, labels = truth.batches, truth.images, truth.labels
        else:
            drawn = choose_batches(len(truth.labels), training, torch.Generator().manual_seed(seed))
            order, batches = in_training_order(drawn)
            images, labels = truth.images[order], tuple(truth.labels[i] for i in order.tolist())
        model = known_model(known)
        model.load_state_dict(dict(seen.w0), strict=False)
        sent = {name: value.clone() for name, value in model.state_dict().items()}
        steps = [torch.tensor(batch) for batch in batches]
        train(
            model, images, torch.tensor(labels), steps, training, known.mean, known.std,
            alone,
        )  # fmt: skip
    noise = noise_generator(own.config.seed, max(seen.client, 0), seen.round)
    after = {name: value.detach() for name, value in model.state_dict().items()}
    returned = defended_weights(sent, after, alone, noise)
    names = list(seen.w0)
    write_truth(own.run_dir, Truth(images, labels, batches, seen.round, seen.node))
    return replace(
        seen,
        w0={name: sent[name] for name in names},
        w1={name: returned[name] for name in names},
        num_examples=len(labels),
    )


def _row(change: Change, defense: Defense, lines: Sequence[Mapping[str, Any]]) -> Advice:
    failed = [line["error"] for line in lines if line["status"] != "ok"]
    if failed:
        return Advice(change.words, str(defense), problem=failed[0])
    found = identified_of(lines)
    recognised = [bool(one) for line in lines for one in line["recognisable"] or ()]
    scores = [line["metrics"]["psnr"] for line in lines]
    values = [value for score in scores for value in score["values"]]
    images = [len(score["values"]) for score in scores]
    baseline = sum(s["baseline"] * n for s, n in zip(scores, images, strict=True)) / sum(images)
    leaked, of = (found["count"], found["of"]) if found else (sum(recognised), len(recognised))
    return Advice(
        change.words, str(defense), leaked, of, "identified" if found else "recognisable",
        round(sum(values) / len(values), 2), round(baseline, 2),
    )  # fmt: skip


def _accuracy(
    auditor: Auditor,
    defense: Defense,
    training: LocalTraining,
    rounds: int,
    reached: dict[str, float],
) -> float | None:
    """Return the accuracy of a federation of the run's clients with a change, after some rounds."""
    if not rounds or auditor.no_data:
        return None
    config, known = auditor.config, auditor.knowledge
    train_set, test_set = load_split(config.dataset, "train"), load_split(config.dataset, "test")
    federation = Federation(
        training,
        _of_one(defense),
        clients=config.num_clients,
        rounds=rounds,
        images=len(train_set),
        model=config.model.name,
        norm=config.model.norm,
    )
    if federation.name not in reached:
        info = DatasetInfo(known.num_classes, known.image_shape, known.mean, known.std)
        accuracy = federated_accuracy(federation, train_set, test_set, info, config.seed)
        reached[federation.name] = round(accuracy, 4)
    return reached[federation.name]
