"""A run's clients, and its federation, trained again with something changed.

What is changed stands in an `Auditor` of its own: its configuration, and what the server knows.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from client_app.defenses import defended_weights, noise_generator
from client_app.training import NO_DEFENSE, choose_batches, in_training_order, local_seed, train
from fl_app.audit.auditor import Auditor
from fl_app.audit.truth import Truth, write_truth
from fl_app.benchmarks.accuracy import federated_accuracy
from fl_app.benchmarks.federation import Federation, global_models
from fl_app.config import DatasetConfig
from fl_app.data import ImageSet, load_split
from fl_app.models import known_model
from fl_app.protocol import DatasetInfo, Defense, Observation


def changed_update(seen: Observation, auditor: Auditor, own: Auditor) -> Observation:
    """Return what a client would have sent with a change; its truth is left with `own`.

    Parameters
    ----------
    seen : Observation
        What it sent; the change begins from its `w0`.
    auditor : Auditor
        Of the run, with the client's truth. Where its training is unchanged, so are the batches.
    own : Auditor
        With the change.
    """
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


@dataclass
class Federations:
    """The run's clients as a federation, trained with a change and without, beside the attacks.

    Attributes
    ----------
    rounds : int
        After which accuracy is measured; 0: it is not.
    pool : Executor
        Of processes: training seeds torch's one generator.
    """

    rounds: int
    pool: Executor
    _begun: dict[str, Future[float]] = field(default_factory=dict)  # some changes train the same

    def accuracy(self, own: Auditor) -> Future[float] | None:
        """Begin to measure accuracy on the test images, in [0, 1]; None: it is not measured."""
        if not self.rounds or own.no_data:
            return None
        dataset, seed = own.config.dataset, own.config.seed
        federation = _federation(own, self.rounds, load_split(dataset, "train"))
        if federation.name not in self._begun:
            call = self.pool.submit(_measure, federation, dataset, _info(own), seed)
            self._begun[federation.name] = call
        return self._begun[federation.name]


def _measure(federation: Federation, dataset: DatasetConfig, info: DatasetInfo, seed: int) -> float:
    train_set, test_set = load_split(dataset, "train"), load_split(dataset, "test")
    return round(federated_accuracy(federation, train_set, test_set, info, seed), 4)


def model_before(round_: int, own: Auditor) -> Mapping[str, Tensor]:
    """Return the global model that a round starts from, trained again for as many rounds.

    Raises
    ------
    ValueError
        If it can't be: the data is not there, or the run began with trained weights.
    """
    config = own.config
    if config.start_from:
        raise ValueError(f"the run starts from {config.start_from}, weights of another model")
    weights: Mapping[str, Tensor] = known_model(own.knowledge, config.seed).state_dict()
    if round_ > 1:
        if own.no_data:
            raise ValueError(own.no_data)
        images = load_split(config.dataset, "train")
        federation = _federation(own, round_ - 1, images)
        *_, weights = global_models(federation, images, _info(own), config.seed)
    return weights


def _federation(own: Auditor, rounds: int, images: ImageSet) -> Federation:
    config = own.config
    return Federation(
        config.client,
        _of_one(config.defense),
        clients=config.num_clients,
        rounds=rounds,
        images=len(images),
        model=config.model.name,
        norm=config.model.norm,
        head=config.model.head,
    )


def _info(own: Auditor) -> DatasetInfo:
    known = own.knowledge
    return DatasetInfo(known.num_classes, known.image_shape, known.mean, known.std)


def _of_one(defense: Defense) -> Defense:
    """Return what one client does of a defence: secure aggregation changes no single update."""
    return NO_DEFENSE if defense.secagg else defense
