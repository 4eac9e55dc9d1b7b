"""The exact features of a client's images: the terms of a layer's update, in their order."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from fl_app.protocol import Knowledge, Observation
from server_strategies.attacks.matching.defended import hidden_size, norm_clipped
from server_strategies.attacks.matching.low_rank.adam_steps import step_factors
from server_strategies.attacks.matching.low_rank.head import Weights
from server_strategies.attacks.matching.low_rank.layers import Layer, bounded_layers
from server_strategies.attacks.matching.low_rank.replay import (
    Replay,
    replay,
    replay_steps,
    update_scale,
)
from server_strategies.attacks.matching.low_rank.sparse import separate_sparse
from server_strategies.attacks.matching.low_rank.spectrum import (
    Matrix,
    Spectrum,
    known_part,
    spectrum,
)
from server_strategies.attacks.matching.low_rank.vertices import separate_bounded

_PRECISE = 0.02  # relative noise of features up to which an image is decoded from them
_LEAST = 0.5  # share of the client's images that have to be found
_DRAWS = 6  # tries to separate the terms, at most
_DRAWN = 120  # terms of all tries; two are made in any case
_PATIENCE = 240.0  # seconds for separating the terms, without a limit
_ZERO = 6.0  # deviations of the noise within which a slope is zero
_CLOSED = 0.3  # share of live units that every image leaves closed, or further draws are tried
_SHOWN = 0.05  # share of an image's square features that has to be known
_LABELLED = 0.9  # misfit up to which a label is found, of features that are known in part
_ORDERED = 0.1  # misfit of a term's slopes up to which its local step is taken as found


@dataclass(frozen=True)
class ExactFeatures:
    """What an update gives away of a client's images in one linear layer.

    Attributes
    ----------
    layer : Layer
    features : Tensor, shape (T, in)
        By place in the training, what the image gave the layer at its own step's weights;
        0 where it was not found. T is K B, or fewer where the last batch of a pass is
        smaller.
    spread : Tensor, shape (T, in)
        Standard deviation of the noise in them; infinite where they are not known.
    found : Tensor of bool, shape (T,)
        Which places were found.
    replay : Replay
        Its labels, its order and what goes back from the head.
    scale : float
        Factor by which a defence shortened the update.
    reason : str
    """

    layer: Layer
    features: Tensor
    spread: Tensor
    found: Tensor
    replay: Replay
    scale: float
    reason: str

    @property
    def ordered(self) -> int:
        """The number of places whose term has the slopes that the replay gives it."""
        return int((self.replay.misfit < _ORDERED).sum())


def exact_features(
    model: nn.Module, observation: Observation, knowledge: Knowledge, seconds: float = 0.0
) -> ExactFeatures | str:
    """Return the features that an update gives away; where it gives none, why.

    Parameters
    ----------
    model : nn.Module
        As `clients_model` returns it.
    observation : Observation
    knowledge : Knowledge
        With the client's training.
    seconds : float
        After which nothing more is looked for; 0: some minutes.
    """
    beyond = knowledge.client.beyond("drop_last")
    if beyond:
        return f"exact features follow from plain training alone, and {beyond}"
    batches = knowledge.client.batches(observation.num_examples)
    left_out = observation.num_examples - len({image for batch in batches for image in batch})
    if left_out:
        return f"{left_out} of the client's images are in no local step"
    until = time.monotonic() + (seconds or _PATIENCE)
    of = _of_terms if knowledge.client.optimizer == "sgd" else _of_steps
    return of(model, observation, knowledge, until)


def _of_terms(
    model: nn.Module, observation: Observation, knowledge: Knowledge, until: float
) -> ExactFeatures | str:
    """Return `exact_features` of SGD, whose update is a sum of one term for each image."""
    training = knowledge.client
    batches = training.batches(observation.num_examples)
    terms = sum(len(batch) for batch in batches)
    w0, w1 = _weights(model, observation)
    left, worth = known_part(training, len(batches))
    why = "no linear layer with one input an image, pixels or the output of a ReLU"
    for layer in bounded_layers(model, w0, knowledge):
        weight, bias = (
            left * w0[f"{layer.name}.{part}"].double() - w1[f"{layer.name}.{part}"].double()
            for part in ("weight", "bias")
        )
        seen = spectrum(weight, bias, terms)
        if seen is None:
            why = f"the update of {layer.name} is not of rank {terms}"
            continue
        places = _separated(layer, seen, until)
        if len(places) < _LEAST * terms:
            why = f"{layer.name} shows {len(places)} of {terms} images"
            continue
        found = _in_order(layer, seen, places, w0, worth, observation, knowledge)
        if found.ordered >= _LEAST * terms:
            return found
        why = f"{layer.name} shows images, but the local step of {found.ordered} of {terms} alone"
    return why


def _of_steps(
    model: nn.Module, observation: Observation, knowledge: Knowledge, until: float
) -> ExactFeatures | str:
    """Return `exact_features` of Adam, see `step_factors`."""
    training = knowledge.client
    batches = training.batches(observation.num_examples)
    hidden = hidden_size(list(observation.update.values()), knowledge.defense)
    if hidden:
        return hidden
    sizes = [len(batch) for batch in batches]
    places = sum(sizes)
    if len(sizes) == 1 and places > 1:
        return "one step's whole gradient follows from its epsilon"
    w0, w1 = _weights(model, observation)
    why = "no linear layer with one input an image, the output of a ReLU"
    for layer in bounded_layers(model, w0, knowledge):
        if layer.high is not None:
            continue
        before, after = ((w[f"{layer.name}.weight"], w[f"{layer.name}.bias"]) for w in (w0, w1))
        factors = step_factors(before, after, training, sizes, until)
        if factors is None:
            why = f"the steps of {layer.name} don't show"
            why += " in time" * (time.monotonic() > until)
            continue
        order, lengths = replay_steps(layer.head, w0, factors, training, sizes)
        known = factors.features.square() * factors.spread.isfinite()
        found = (order.misfit < _LABELLED) & (known.sum(1) > _SHOWN).cpu()
        if int(found.sum()) < _LEAST * places:
            why = f"{layer.name} shows images, but the label of {int(found.sum())} alone"
            continue
        length = lengths[:, None]
        features, spread = (part.to(length) * length for part in (factors.features, factors.spread))
        share = known.sum() / places
        reason = (
            f"the steps of {training.optimizer} in {layer.name}'s update: {share:.0%} of the "
            f"features of {int(found.sum())} of {places} images"
        )
        return ExactFeatures(layer, features, spread, found, order, 1.0, reason)
    return why


def _weights(model: nn.Module, observation: Observation) -> tuple[Weights, Weights]:
    """Return the parameters before and after the training, on the model's device."""
    like = next(model.parameters())
    names = [name for name, _ in model.named_parameters()]
    before, after = (
        {name: weights[name].to(like).detach() for name in names}
        for weights in (observation.w0, observation.w1)
    )
    return before, after


def _separated(layer: Layer, seen: Spectrum, until: float) -> Matrix:
    """Return the places of the terms, by those draws that leave their slopes most zeros.

    Each slope is zero where the image leaves the unit behind the layer closed. A place that
    is none of a term's blends the slopes of all, which then have no zeros.
    """
    best, most = np.zeros((0, seen.rank)), -1
    for seed in range(min(_DRAWS, max(2, _DRAWN // seen.rank))):
        if seed and time.monotonic() > until:
            break
        places = separate_bounded(seen, layer.low, layer.high, seed, until)
        if len(places) < seen.rank:  # a layer may be followed by a ReLU, too
            other = separate_sparse(seen, seed)
            places = other if len(other) > len(places) else places
        if not len(places):
            continue
        slopes, noise = term_slopes(seen, places)
        live = np.abs(seen.left).max(1) > 0
        zeros = (np.abs(slopes[live]) < _ZERO * noise).sum(0)
        if zeros.sum() > most:
            best, most = places, int(zeros.sum())
        if len(places) == seen.rank and zeros.min() > _CLOSED * live.sum():
            break
    return best


def term_slopes(seen: Spectrum, places: Matrix) -> tuple[Matrix, Matrix]:
    """Return the slopes d_n of terms at their places r_n (m, r), and the noise in them.

    The update is D [A, 1], and V' is R^-1 [A, 1] for the places R of all terms. Features that
    are nearly parallel have a large inverse, and noise with it.

    Returns
    -------
    slopes : array, shape (out, m)
    noise : array, shape (m,)
        Standard deviation in an entry of d_n.
    """
    inverse = np.linalg.pinv(places)
    slopes: Matrix = (seen.left * seen.sizes) @ inverse
    noise: Matrix = seen.entry_noise * np.linalg.norm(inverse, axis=0)
    return slopes, noise


def _in_order(
    layer: Layer,
    seen: Spectrum,
    places: Matrix,
    w0: dict[str, Tensor],
    worth: list[float],
    observation: Observation,
    knowledge: Knowledge,
) -> ExactFeatures:
    like = w0[f"{layer.name}.weight"]
    batches = knowledge.client.batches(observation.num_examples)
    sizes = [len(batch) for batch in batches]
    features = places @ seen.right.T
    lengths = np.linalg.norm(features, axis=1)
    precision = np.linalg.norm(seen.entry_noise / seen.sizes * places, axis=1)
    precision = precision * len(seen.right) ** 0.5 / lengths
    slopes, noise = term_slopes(seen, places)
    a, d, n = (torch.from_numpy(value).to(like) for value in (features, slopes.T, noise))
    scale = 1.0
    size = torch.cat([part.flatten() for part in observation.update.values()]).abs()
    if norm_clipped(size, knowledge.defense):
        scale = update_scale(layer.head, w0, a, d, sizes[0], worth[0])
    order = replay(layer.head, w0, a, d / scale, n / scale, sizes, worth, knowledge.client)
    taken = torch.tensor(order.order)
    there = taken >= 0
    by_place = torch.zeros(len(taken), a.shape[1], dtype=a.dtype, device=a.device)
    by_place[there] = a[taken[there]]
    off = torch.full((len(taken),), torch.inf)
    off[there] = torch.from_numpy(precision).float()[taken[there]]
    reason = (
        f"{layer.name}'s update is of rank {seen.rank}, {seen.gap:.0f} times above its rounding: "
        f"the exact features of {len(places)} of {len(taken)} images"
    )
    found = off < _PRECISE
    return ExactFeatures(layer, by_place, torch.zeros_like(by_place), found, order, scale, reason)
