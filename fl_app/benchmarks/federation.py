"""A federation that is trained in this process, round by round, as Flower's clients train."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from client_app.defenses import defended_weights, noise_generator
from client_app.training import NO_DEFENSE, choose_batches, local_seed, train
from fl_app.data import ImageSet
from fl_app.models import create_model
from fl_app.protocol import DatasetInfo, Defense, LocalTraining
from server_strategies.updates import weighted_mean

Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class Federation:
    """A federation whose clients share the training images.

    Attributes
    ----------
    training : LocalTraining
        Of every client.
    defense : Defense
        What every client does to its update.
    clients : int
        They share the training images equally.
    rounds : int
        Of federated averaging.
    sampled : int
        Clients that train in a round, drawn anew; 0: all.
    images : int
        Training images of all clients together; all there are, if those are fewer.
    model, norm, head : str
        See `create_model`.
    """

    training: LocalTraining
    defense: Defense = NO_DEFENSE
    clients: int = 10
    rounds: int = 5
    images: int = 20_000
    model: str = "convnet"
    norm: str = ""
    head: str = ""
    sampled: int = 0

    @property
    def name(self) -> str:
        """Everything that decides the result but data and seed."""
        t = self.training
        local = f"K={t.local_steps}" if t.local_steps else f"{t.local_epochs} epochs"
        client = f"{t.optimizer} {t.lr:g} {local} B={t.batch_size}"
        clients = f"{self.clients} clients" + f", {self.sampled} a round" * bool(self.sampled)
        size = f"{clients}, {self.rounds} rounds, {self.images} images"
        model = f"{self.model} {self.norm} norm" if self.norm else self.model
        model += f" head {self.head}" if self.head else ""
        return f"{model}, {client}, {size}, {self.defense}"

    def create(self, info: DatasetInfo, seed: int) -> torch.nn.Module:
        """Return the model that it starts from."""
        return create_model(
            self.model,
            info.num_classes,
            info.image_shape,
            seed,
            self.norm,
            head=self.head,
            precode=self.defense.precode,
            dropout=self.defense.dropout,
        )


def global_models(
    federation: Federation,
    train_set: ImageSet,
    info: DatasetInfo,
    seed: int,
    done: int = 0,
    weights: Weights | None = None,
) -> Iterator[Weights]:
    """Yield the global model's weights after each round of FedAvg.

    A loop in this process over what a Flower client does: `choose_batches`, `train`,
    `defended_weights`, seeded alike; then the mean of the clients' weights. Two federations
    that differ in their defence alone train on the same batches.

    Parameters
    ----------
    federation : Federation
    train_set : ImageSet
        The first `Federation.images` of a seeded shuffle are the clients'.
    info : DatasetInfo
    seed : int
        >= 0; decides the model, the clients' images, their batches and their noise.
    done : int
        Rounds that are done already.
    weights : mapping of str to Tensor, optional
        After those; by default those of the model at its start.
    """
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randperm(len(train_set), generator=generator)[: federation.images]
    shares = [picks[client :: federation.clients] for client in range(federation.clients)]
    model = federation.create(info, seed)
    weights = _copy(model.state_dict()) if weights is None else weights
    for round_ in range(done + 1, federation.rounds + 1):
        sent = []
        for client in _sampled(federation, seed, round_):
            share = shares[client]
            model.load_state_dict(dict(weights))
            own = ImageSet(train_set.images[share], train_set.labels[share])
            place = (seed, client, round_)
            sent.append(_train_client(federation, model, weights, own, info, place))
        weights = weighted_mean([w1 for w1, _ in sent], [count for _, count in sent])
        yield weights


def _sampled(federation: Federation, seed: int, round_: int) -> list[int]:
    """Return the clients that train in a round."""
    if not federation.sampled:
        return list(range(federation.clients))
    # As if of a client of its own, one after the last.
    generator = torch.Generator().manual_seed(local_seed(seed, federation.clients, round_))
    order = torch.randperm(federation.clients, generator=generator)
    return sorted(order[: federation.sampled].tolist())


def _train_client(
    federation: Federation,
    model: torch.nn.Module,
    weights: Weights,
    own: ImageSet,
    info: DatasetInfo,
    place: tuple[int, int, int],
) -> tuple[dict[str, Tensor], int]:
    """Return what a client sends, of seed, client and round `place`: weights and num-examples."""
    seed = local_seed(*place)
    batches = choose_batches(len(own), federation.training, torch.Generator().manual_seed(seed))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        train(
            model, own.images.float() / 255, own.labels, batches, federation.training,
            info.mean, info.std, federation.defense,
        )  # fmt: skip
    noise = noise_generator(*place)
    sent = defended_weights(weights, _copy(model.state_dict()), federation.defense, noise)
    return sent, len(torch.cat(batches).unique())


def _copy(weights: Weights) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in weights.items()}
