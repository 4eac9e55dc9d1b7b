"""Fresh clients for every trial, trained as Flower's clients train."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from client_app.defenses import defended_weights, noise_generator
from client_app.training import choose_batches, in_training_order, train
from fl_app.audit.truth import Truth
from fl_app.benchmarks.case import Case
from fl_app.benchmarks.states import State, epochs_of
from fl_app.data import ImageSet
from fl_app.models import known_model
from fl_app.protocol import DatasetInfo, Defense, Knowledge, Observation


@dataclass(frozen=True)
class Clients:
    """What clients are drawn from.

    Attributes
    ----------
    images : ImageSet
        Their own.
    info : DatasetInfo
    states : mapping
        Trained models by model, norm, head and name of the state.
    """

    images: ImageSet
    info: DatasetInfo
    states: Mapping[tuple[str, str, str, str], State] = field(default_factory=dict)

    def draw(self, case: Case, seed: int) -> tuple[Observation, Knowledge, Truth]:
        """See `draw_client`."""
        return draw_client(case, self.images, self.info, seed, self.state_of(case))

    def state_of(self, case: Case) -> State | None:
        """Return the trained model that a case starts from; None: it is initialised."""
        return self.states.get((case.model, case.norm, case.head, case.state))


def draw_client(
    case: Case,
    images: ImageSet,
    info: DatasetInfo,
    seed: int,
    state: State | None = None,
) -> tuple[Observation, Knowledge, Truth]:
    """Train one client from a freshly drawn model, or a trained one, on freshly drawn images.

    Parameters
    ----------
    case : Case
    images : ImageSet
        To draw N images from, without replacement.
    info : DatasetInfo
    seed : int
        Decides the images and the model; the same for every case, so that cases
        with as many images are compared on the same ones.
    state : State, optional
        The trained model that the client is sent; None: a freshly initialised one.

    Raises
    ------
    ValueError
        If there are fewer than N images, or a trained model is asked for and not given.
    """
    if case.state != "init" and state is None:
        raise ValueError(f"the case starts from {case.state}, which is not given")
    generator = torch.Generator().manual_seed(seed)
    agreed = Knowledge(
        case.model,
        info.num_classes,
        info.image_shape,
        info.mean,
        info.std,
        case.training,
        norm=case.norm,
        head=case.head,
        precode=case.defense.precode,
        dropout=case.defense.dropout,
    )
    model = known_model(agreed, seed)
    if state:
        model.load_state_dict(state.weights)
    sent = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.random.fork_rng():  # a defence may draw noise of its own in every step
        torch.manual_seed(seed)
        private, labels, batches = _train_on_drawn(
            model, agreed, case.count, images, generator, case.defense
        )
    known, round_ = tuple(labels.tolist()), epochs_of(case.state) + 1
    noise = noise_generator(seed, 0, round_)
    weights = defended_weights(sent, model.state_dict(), case.defense, noise)
    observation = Observation(sent, weights, case.count, round_, node=seed, client=seed)
    knowledge = replace(agreed, defense=case.defense.plain()).granting("by-step", known)
    return observation, knowledge, Truth(private, known, batches, round_, node=seed)


def _train_on_drawn(
    model: nn.Module,
    agreed: Knowledge,
    count: int,
    images: ImageSet,
    generator: torch.Generator,
    defense: Defense,
) -> tuple[Tensor, Tensor, tuple[tuple[int, ...], ...]]:
    """Train a model as a client with drawn images; return these, their labels and the batches."""
    if count > len(images):
        raise ValueError(f"a client needs {count} images, the split holds {len(images)}")
    picks = torch.randperm(len(images), generator=generator)[:count]
    private, labels = images.images[picks].float() / 255, images.labels[picks]
    _, batches = in_training_order(choose_batches(count, agreed.client, generator))
    steps = [torch.tensor(batch) for batch in batches]
    train(model, private, labels, steps, agreed.client, agreed.mean, agreed.std, defense)
    return private, labels, batches
