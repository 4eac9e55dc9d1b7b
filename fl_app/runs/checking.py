"""Whether a client's description is right, on images that are made up.

Attacks need to know how a client trains. A wrong word in the description looks like an update that
gives nothing away. So the user's own function trains on images that are made up, every step of its
optimiser is compared with the description, and where they differ single changes of the description
are tried until one fits.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_post_hook

from client_app.training import train
from fl_app.models import classifier, clients_model, known_model
from fl_app.models.extensions import random_layers
from fl_app.models.foreign import own_model
from fl_app.protocol import Client, LocalTraining, Observation
from fl_app.runs.weights import state_names
from server_strategies.attacks.forecast import forecast
from server_strategies.attacks.matching import matching_objective
from server_strategies.attacks.matching.simulation import simulate

_SAME = 1e-3  # difference of two updates, as a share of their length, up to which they are one
_AT_TRUTH = 0.05  # matching loss at the true images up to which an update is explained
_DEPENDS = 0.05  # share of an update that has to change with the images
_ITERATIONS = 200  # of the default attack

MODEL = ("net", "model", "module", "network")
LOADER = ("trainloader", "train_loader", "loader", "dataloader", "train_dataloader")
IMAGES, LABELS = ("images", "x", "inputs"), ("labels", "y", "targets")
EPOCHS = ("epochs", "num_epochs", "local_epochs", "n_epochs")
RATE = ("lr", "learning_rate", "learningrate")
_VARIABLE = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
_PIXELS = ("img", "image", "images", "pixel_values", "x")  # names of a batch's images


@dataclass(frozen=True)
class Finding:
    """One thing that was checked.

    Attributes
    ----------
    ok : bool
    words : str
    """

    ok: bool
    words: str


@dataclass(frozen=True)
class Sample:
    """What is trained on: images that are made up.

    Attributes
    ----------
    images : Tensor, shape (N, C, H, W)
        In [0, 1]: smooth fields with noise.
    labels : Tensor of int64, shape (N,)
    w0 : mapping of str to Tensor
        The model's state before.
    """

    images: Tensor
    labels: Tensor
    w0: Mapping[str, Tensor]


def sample(client: Client, w0: Mapping[str, Tensor] | None = None, examples: int = 0) -> Sample:
    """Return images that are made up, and the weights to start from.

    Parameters
    ----------
    client : Client
    w0 : mapping of str to Tensor, optional
        The model's state; by default freshly drawn.
    examples : int
        N; 0: two batches and one image.
    """
    model = known_model(client.knowledge, seed=0)
    state = {name: value.detach().clone() for name, value in model.state_dict().items()}
    state |= {name: value.to(state[name]) for name, value in (w0 or {}).items() if name in state}
    size = client.training.batch_size
    count = examples or (2 * size + 1 if size > 1 else 5)
    return Sample(*_images(client, count, seed=0), state)


def _images(client: Client, count: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    channels, *sides = client.image_shape
    coarse = torch.rand(count, channels, 4, 4, generator=generator)
    smooth = F.interpolate(coarse, sides, mode="bilinear")
    images = (smooth + 0.05 * torch.randn(smooth.shape, generator=generator)).clamp(0, 1)
    return images, torch.randint(0, client.num_classes, (count,), generator=generator)


def check_description(client: Client, given: Sample) -> Iterator[Finding]:
    """Yield what a description means, and whether the client that it describes can be attacked.

    Parameters
    ----------
    client : Client
    given : Sample

    Raises
    ------
    ValueError
        If the model or the training can't be simulated; the message says why.
    """
    known, training = client.knowledge, client.training
    model = known_model(known)
    parameters = sum(weight.numel() for weight in model.parameters())
    last = classifier(model)
    yield Finding(True, f"model {known.model_name}: {parameters:,} parameters, classifier "
                        f"{last or 'none (labels are fitted with the images)'}")  # fmt: skip
    batches = training.batches(len(given.labels))
    yield Finding(True, f"{len(given.labels)} images make {len(batches)} local steps")
    layers = random_layers(model)
    if not layers:
        yield _simulated(client, given)
    w1 = trained(client, training, given)
    truth = known.granting("by-step", tuple(given.labels.tolist()))
    seen = _observation(model, given, w1)
    objective = matching_objective("auto", seen, truth)
    x = _normalised(client, given.images)
    at_truth = float(objective(x, 1.0).detach())
    if layers:
        yield Finding(True, f"{len(layers)} dropout layers: their masks are fitted with the images")
    else:
        yield Finding(at_truth < _AT_TRUTH, f"the matching loss at the true images is "
                      f"{at_truth:.2g} ({objective.reason})")  # fmt: skip
    yield Finding(True, forecast(seen, truth).words(_ITERATIONS))
    yield _depends(client, given, w1)


def _simulated(client: Client, given: Sample) -> Finding:
    """Compare the client's training with the simulation that attacks differentiate."""
    known, training = client.knowledge, client.training
    model = known_model(known).double()
    state = {name: value.double() if value.is_floating_point() else value
             for name, value in given.w0.items()}  # fmt: skip
    model.load_state_dict(state)
    batches = [torch.tensor(batch) for batch in training.batches(len(given.labels))]
    images = given.images.double()
    w0 = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    simulating = clients_model(known, state).double()
    train(model, images, given.labels, batches, training, known.mean, known.std)
    x = _normalised(client, images)
    w1 = simulate(simulating, w0, [(x[batch], given.labels[batch]) for batch in batches], training)
    off = _apart(w0, w1, dict(model.named_parameters()))
    return Finding(off < _SAME, f"the differentiable simulation is off by {off:.1g} of the update")


def trained(
    client: Client, training: LocalTraining, given: Sample, *, plain: bool = False,
    mean: Sequence[float] | None = None, std: Sequence[float] | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """Return the state after a training of the given images in their order.

    Parameters
    ----------
    client : Client
    training : LocalTraining
        In the place of the client's own.
    given : Sample
    plain : bool
        Whether dropout layers are off.
    mean, std : sequence of float, optional
        In the place of the client's.
    """
    model = _own_model(client, given)
    if plain:
        for layer in model.modules():
            if isinstance(layer, nn.modules.dropout._DropoutNd):
                layer.p = 0.0
    batches = [torch.tensor(batch) for batch in training.batches(len(given.labels))]
    torch.manual_seed(0)
    train(model, given.images, given.labels, batches, training, mean or client.mean,
          std or client.std)  # fmt: skip
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def _own_model(client: Client, given: Sample, logits: bool = True) -> nn.Module:
    """Return the user's model, see `own_model`, with the sample's weights."""
    known = client.knowledge
    model = known_model(known) if isinstance(known.model, str) else own_model(known, logits)
    model.load_state_dict(dict(given.w0))
    return model


def _observation(model: nn.Module, given: Sample, w1: Mapping[str, Tensor]) -> Observation:
    names = state_names(model)
    before, after = ({name: side[name] for name in names} for side in (given.w0, w1))
    return Observation(before, after, len(given.labels), 1, 0, 0)


def _normalised(client: Client, images: Tensor) -> Tensor:
    mean, std = (torch.tensor(v).to(images).view(-1, 1, 1) for v in (client.mean, client.std))
    return (images - mean) / std


def _depends(client: Client, given: Sample, w1: Mapping[str, Tensor]) -> Finding:
    """Say how much of the update changes with the images."""
    others = replace(given, images=_images(client, len(given.labels), seed=1)[0])
    off = _apart(given.w0, w1, trained(client, client.training, others))
    words = f"other images change the update by {off:.0%} of its length"
    hardly = ": it hardly depends on them, and reconstructions show the prior alone"
    return Finding(off > _DEPENDS, words + hardly * (off <= _DEPENDS))


def _apart(w0: Mapping[str, Tensor], a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """Return the distance of two updates, as a share of the second's length."""
    names = [name for name in a if name in b and w0[name].is_floating_point()]

    def distance(x: Mapping[str, Tensor], y: Mapping[str, Tensor]) -> float:
        apart = ((x[name] - y[name]).detach().double().square().sum() for name in names)
        return float(sum(apart, start=torch.zeros((), dtype=torch.float64))) ** 0.5

    off, size = distance(a, b), distance(b, w0)
    return off / max(size, 1e-30)


# --- the user's own training ------------------------------------------------------------


@dataclass(frozen=True)
class OwnTraining:
    """What a user's function did.

    Attributes
    ----------
    w1 : dict of str to Tensor
        The state after.
    steps : list of dict of str to Tensor
        The parameters after each step of its optimiser.
    optimizer : Optimizer or None
        The one that stepped.
    """

    w1: dict[str, Tensor]
    steps: list[dict[str, Tensor]]
    optimizer: torch.optim.Optimizer | None


class _Batch(tuple[Tensor, Tensor]):
    """A batch that can be unpacked, or read by name as those of Hugging Face's datasets."""

    __slots__ = ()

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(key if not isinstance(key, str) else int(key not in _PIXELS))


class _Loader:
    """Batches in the order of the images, as a DataLoader without shuffling."""

    def __init__(self, images: Tensor, labels: Tensor, batch_size: int, drop_last: bool) -> None:
        self.dataset = torch.utils.data.TensorDataset(images, labels)
        self.batch_size, self.drop_last = batch_size, drop_last

    def __len__(self) -> int:
        whole, left = divmod(len(self.dataset), self.batch_size)
        return whole + bool(left and not self.drop_last)

    def __iter__(self) -> Iterator[_Batch]:
        images, labels = self.dataset.tensors
        for start in range(0, len(self) * self.batch_size, self.batch_size):
            part = slice(start, start + self.batch_size)
            yield _Batch((images[part].clone(), labels[part].clone()))


def run_own(function: Callable[..., Any], client: Client, given: Sample) -> OwnTraining:
    """Let a user's function train the user's model on the sample.

    Its arguments are filled in by their names: the model (``net``, ``model``), a loader of
    normalised batches (``trainloader``, ...), or ``images`` in [0, 1] and ``labels``, ``epochs``,
    ``lr``, ``device``, and ``client`` for the description itself.

    Raises
    ------
    ValueError
        If it needs an argument of another name, or raises.
    """
    model, training = _own_model(client, given, logits=False), client.training
    loader = _Loader(_normalised(client, given.images), given.labels, training.batch_size,
                     training.drop_last)  # fmt: skip
    values = {
        **dict.fromkeys(MODEL, model), **dict.fromkeys(LOADER, loader),
        **dict.fromkeys(IMAGES, given.images.clone()), **dict.fromkeys(LABELS, given.labels),
        **dict.fromkeys(EPOCHS, training.local_epochs), **dict.fromkeys(RATE, training.lr),
        "device": torch.device("cpu"), "batch_size": training.batch_size, "client": client,
    }  # fmt: skip
    name = getattr(function, "__qualname__", str(function))
    arguments = {}
    for each in inspect.signature(function).parameters.values():
        if each.name in values:
            arguments[each.name] = values[each.name]
        elif each.default is each.empty and each.kind not in (
            each.VAR_KEYWORD,
            each.VAR_POSITIONAL,
        ):
            raise ValueError(
                f"{name} needs {each.name!r}, which can't be filled in; allowed: "
                f"{', '.join(values)}. Write a function of these that calls it, in the file that "
                "describes the client"
            )
    torch.manual_seed(0)
    with _recorded(model) as (steps, optimizers):
        try:
            function(**arguments)
        except Exception as error:  # a user's code may raise anything
            raise ValueError(f"{name} raised {type(error).__name__}: {error}") from error
    state = {key: value.detach().clone() for key, value in model.state_dict().items()}
    if not steps:
        raise ValueError(f"{name} made no step of an optimiser of torch.optim on the model")
    return OwnTraining(state, steps, optimizers[-1])


@contextmanager
def _recorded(
    model: nn.Module,
) -> Iterator[tuple[list[dict[str, Tensor]], list[torch.optim.Optimizer]]]:
    """Keep a model's parameters after each step of any optimiser."""
    steps: list[dict[str, Tensor]] = []
    optimizers: list[torch.optim.Optimizer] = []

    def keep(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        steps.append({name: w.detach().clone() for name, w in model.named_parameters()})
        optimizers.append(optimizer)

    hook = register_optimizer_step_post_hook(keep)
    try:
        yield steps, optimizers
    finally:
        hook.remove()


def check_own(client: Client, own: OwnTraining, given: Sample) -> Iterator[Finding]:
    """Yield whether the user's training is the described one, and if not, which change of it is.

    Parameters
    ----------
    client : Client
    own : OwnTraining
        See `run_own`.
    given : Sample
    """
    training = client.training
    described = _steps(client, training, given)
    expected, made = len(described), len(own.steps)
    first = next((k for k, (a, b) in enumerate(zip(own.steps, described, strict=False), start=1)
                  if _apart(given.w0, b, a) > _SAME), None)  # fmt: skip
    off = _apart(given.w0, trained(client, training, given), own.w1)
    if made == expected and first is None and off < _SAME:
        yield Finding(True, f"your training is the described one: {made} steps, off by {off:.1g}")
        return
    where = f"from step {first} on" if first else "after its last common step"
    count = "" if made == expected else f"; it makes {made} steps, the description {expected}"
    yield Finding(False, f"your training differs from the description {where}, by "
                         f"{off:.0%} of the update{count}")  # fmt: skip
    tried = sorted(changes(client, own), key=lambda change: change.last)
    fits: list[Change] = []
    for change in tried:
        if not (change.last and fits) and _fits(change, client, own, given):
            fits.append(change)
    for change in fits:
        yield Finding(False, f"with {change.words} the description fits")
    if not fits:
        yield Finding(False, "no single change of the description fits: more than one setting "
                             f"differs, or one that is not tried ({_facts(own)})")  # fmt: skip


def _steps(client: Client, training: LocalTraining, given: Sample) -> list[dict[str, Tensor]]:
    """Return the parameters after each step of a described training."""
    model = _own_model(client, given)
    batches = [torch.tensor(batch) for batch in training.batches(len(given.labels))]
    torch.manual_seed(0)
    with _recorded(model) as (steps, _):
        train(model, given.images, given.labels, batches, training, client.mean, client.std)
    return steps


@dataclass(frozen=True)
class Change:
    """A single change of a description.

    Attributes
    ----------
    words : str
        As the user would write it.
    training : LocalTraining
    plain : bool
        Whether dropout is off.
    last : bool
        Whether it is tried only where nothing else fits, since it says what, not why.
    mean, std : tuple of float or None
        None: the description's.
    """

    words: str
    training: LocalTraining
    plain: bool = False
    last: bool = False
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None


def _fits(change: Change, client: Client, own: OwnTraining, given: Sample) -> bool:
    try:
        w1 = trained(client, change.training, given, plain=change.plain, mean=change.mean,
                     std=change.std)  # fmt: skip
    except ValueError:
        return False
    return _apart(given.w0, w1, own.w1) < _SAME


_NORMALISATIONS = {
    "none: images stay in [0, 1]": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    "mean=0.5, std=0.5": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "ImageNet's mean and std": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "CIFAR-10's mean and std": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "mean=0.5, std=0.25": ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25)),
}


def changes(client: Client, own: OwnTraining) -> Iterator[Change]:
    """Yield the single changes of a description that are tried; first what the optimiser shows."""
    t = client.training
    seen: set[LocalTraining] = {t}

    def new(words: str, **settings: Any) -> Iterator[Change]:
        try:
            training = replace(t, **settings)
        except ValueError:
            return
        if training not in seen:
            seen.add(training)
            yield Change(words, training)

    group = own.optimizer.param_groups[0] if own.optimizer else {}
    kind = type(own.optimizer).__name__.lower()
    if kind != t.optimizer:
        yield from new(f"optimizer={kind!r}", optimizer=kind, momentum=0.0, nesterov=False)
    for name in ("lr", "momentum", "weight_decay", "nesterov"):
        if name in group and group[name] != getattr(t, name):
            yield from new(f"{name}={group[name]!r}", **{name: group[name]})
    if "betas" in group or "eps" in group:
        options = {k: group[k] for k in ("betas", "eps", "amsgrad") if k in group}
        yield from new(f"optimizer_options={options}", optimizer_options=options)
    yield from new('loss summed over the batch (reduction="sum")', loss=_summed)
    for smoothing in (0.0, 0.1, 0.2):
        yield from new(f"label_smoothing={smoothing}", label_smoothing=smoothing)
    for loss in ("cross_entropy", "mse", "bce"):
        yield from new(f"loss={loss!r}", loss=loss, label_smoothing=0.0, class_weights=())
    for mode in ("train", "eval"):
        yield from new(f"batch_norm={mode!r}", batch_norm=mode)
    yield from new(f"send_buffers={not t.send_buffers}", send_buffers=not t.send_buffers)
    yield from new(f"drop_last={not t.drop_last}", drop_last=not t.drop_last)
    for norm in (0.0, 0.1, 0.5, 1.0, 2.0, 5.0, 10.0):
        yield from new(f"max_grad_norm={norm}", max_grad_norm=norm)
    if not t.local_steps:
        for epochs in range(1, 6):
            yield from new(f"epochs={epochs}", local_epochs=epochs)
    for change in new(f"steps={len(own.steps)}", local_steps=len(own.steps)):
        yield replace(change, last=True)
    for size in (1, 2, 4, 8, 16, 32, 64):
        yield from new(f"batch_size={size}", batch_size=size)
    for accumulate in (1, 2, 4, 8):
        yield from new(f"accumulate={accumulate}", accumulate=accumulate)
    for mu in (0.0, 0.01, 0.1, 1.0):
        yield from new(f"proximal={mu}", proximal=mu)
    channels = client.image_shape[0]
    for words, (mean, std) in _NORMALISATIONS.items():
        if (mean[:channels], std[:channels]) != (client.mean, client.std):
            yield Change(f"normalisation {words}", t, mean=mean[:channels], std=std[:channels])
    yield Change("dropout off (the model trains in evaluation mode)", t, plain=True)


def _summed(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels, reduction="sum")


def _facts(own: OwnTraining) -> str:
    """Return what the user's optimiser shows, in words."""
    if own.optimizer is None:
        return "no optimiser was seen"
    group = own.optimizer.param_groups[0]
    told = {k: v for k, v in group.items() if isinstance(v, int | float | tuple) and v}
    return f"{type(own.optimizer).__name__}, {told}, {len(own.steps)} steps"
