"""The trajectory, with the images of single-step gradient rows decoded first.

A row of a linear layer's gradient is a sum over the batch, ``sum_n d_n a_n``, of the
layer's inputs a_n, the features of image n. So a fingerprint (a single-step gradient
row, see `fingerprints`) holds features, and features determine the image. This works
for every local step, however late. Images that no fingerprint holds follow from the
trajectory, with the decoded images held fixed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import compress

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from fl_app.models.extensions import given_noise, local_loss
from fl_app.protocol import Knowledge, Observation
from fl_app.protocol.optimizer import create_optimizer
from server_strategies.attacks.matching.adam.fingerprints import (
    Fingerprint,
    find_fingerprints,
    single_step_updates,
)
from server_strategies.attacks.matching.base import Setting
from server_strategies.attacks.matching.defended import consistent
from server_strategies.attacks.matching.relabel import LastLayer, last_layer, recorded
from server_strategies.attacks.matching.trajectory import Trajectory

_RIDGE = 1e-3  # of the least squares on features of length 1
_SOFT = 0.005  # residual above which a row no longer counts as one of a single image
_SUPPORTED = 0.1  # share of a row's square that an image has to fit to be supported by the row
_FITTED = 0.1  # residual below which a row counts as fitted
_ACCEPTED = 0.15  # misfit of its own label up to which an image counts as decoded
_REASSIGNED = 1e-4  # cost of giving an image another label, in the misfit's units
_NOT_INFERRED = 0.05  # cost of a label outside the inferred ones, as a share of the image's part
_ACTIVE = 1e-6  # output of a unit that is just active
_RENEW = 8  # calls after which the weights that features are taken at are simulated again


class Decoded(Trajectory):
    """Images decoded from fingerprints first, then the trajectory for the others.

    Until `restart` the loss comes from the fingerprints alone. For every row g of a
    local step's gradient it is the residual of the best combination of the batch's
    features, ``min_d |g - sum_n d_n a_n|^2 / |g|^2``, with coordinates weighted. The
    residual of the best single image is added, softly, since most such rows are of
    one image. Weights are renewed as the residual falls (`Fingerprint.weighted`).
    Neither labels nor activations enter, so no unit has to be active by chance. The
    features are those at the weights of that step, simulated with the images decoded
    so far.

    After `restart` the decoded images move little, and `Trajectory` is added for the
    others.

    Parameters
    ----------
    setting : Setting
        See `MatchingObjective`; the distance is the trajectory's.
    usable : sequence of Fingerprint, optional
        Those of the update, where they have been looked for; it takes a second.

    Raises
    ------
    ValueError
        If there are no fingerprints, or the labels are not known.
    """

    name = "fingerprints"
    models = ("drop_last",)
    restart = 0.6  # decoding is cheap per iteration; images that it misses need the rest

    def __init__(self, setting: Setting, usable: Sequence[Fingerprint] = ()) -> None:
        # With the decoded images fixed a small smoothing descends well.
        super().__init__(setting, smoothing=0.02, last_smoothing=0.01)
        knowledge = setting.knowledge
        if knowledge.labels is None:
            raise ValueError("matching is 'fingerprints', which needs labels; these are not known")
        self.prints: dict[int, list[Fingerprint]] = {}
        usable = usable or usable_fingerprints(setting.model, setting.observation, knowledge)
        for found in sorted(usable, key=lambda part: part.step):
            self.prints.setdefault(found.step, []).append(found)
        if not self.prints:
            raise ValueError("matching is 'fingerprints', but the update holds none")
        self.names = {part.name for found in self.prints.values() for part in found}
        self.known_labels = self.labels.clone()
        self.calls = 0
        self.counted = knowledge.labels_level == "counts"
        self.last: LastLayer | None = None
        if not self.by_step:
            self.last = last_layer(self.model, self.w0, self.w1, self.indices, self.training)
        self.weights_at: dict[int, dict[str, Tensor]] = {}
        self.accepted: Tensor
        self.decoded: Tensor | None = None
        self.all_decoded = False

    def __call__(self, x: Tensor, progress: float) -> Tensor:
        """Return the loss, shape (), of normalised images (N, C, H, W)."""
        if self.calls % _RENEW == 0:
            self._simulate(x.detach())
        self.calls += 1
        if progress < self.restart:
            return self._residual(x)
        if self.decoded is None:
            self.decoded = self.accepted
            # Read once: in every call it would wait for the device.
            self.all_decoded = bool(self.decoded.all())
        if self.all_decoded:
            return self._residual(x)
        decoded = self.decoded.view(-1, 1, 1, 1)
        residual = self._residual(torch.where(decoded, x, x.detach()))
        others = self.displacement(torch.where(decoded, x.detach(), x), progress)
        return residual + self.distance(others)

    def reassignments(self) -> list[tuple[int, int]]:
        """See `MatchingObjective`; none: fingerprints determine the step."""
        return []

    def pace(self) -> Tensor | None:
        """See `MatchingObjective`."""
        return None if self.decoded is None else torch.where(self.decoded, 0.05, 1.0)

    def _residual(self, x: Tensor) -> Tensor:
        """Return the mean residual of the fingerprints in the images' features."""
        residuals = []
        for step, index in self._steps():
            inputs = traced(self.model, self.weights_at[step], x[index], self.names)[0]
            for part in self.prints[step]:
                alone, _, together = fit_rows(inputs[part.name], part)
                best = alone.min(1).values
                residuals.append((together + _SOFT * best / (best + _SOFT)).mean())
        return torch.stack(residuals).mean()

    def _steps(self) -> Iterator[tuple[int, Tensor]]:
        """Yield the local steps with fingerprints, and which images each trains on."""
        return ((step, self.indices[step]) for step in self.prints)

    def _simulate(self, x: Tensor) -> None:
        """Keep the weights before each local step, as training on `x` makes them.

        On the way labels are assigned to images: among those of one step, whose order
        is never known, or among all images of fingerprints, where labels were inferred
        over all steps. Then an image is accepted if some row supports it and its part
        in the rows is about the one that its label implies. An image that imitates a
        blend of others has another part. Where the labels' order is not known, those of
        the other images are then assigned by the last layer's displacement, see `LastLayer`.
        """
        weights = {name: nn.Parameter(w.clone()) for name, w in self.w0.items()}
        optimizer = create_optimizer(weights, self.training)
        fits: list[tuple[Tensor, Tensor]] = []
        last_inputs: list[Tensor] = []
        # Labels are assigned again by all steps; features need those up to the last rows alone.
        steps = len(self.indices) if self.last else max(self.prints) + 1
        for step, index in enumerate(self.indices[:steps]):
            if step in self.prints:
                self.weights_at[step] = {name: w.detach().clone() for name, w in weights.items()}
                inputs, outputs, logits = self._traced(step, x[index])
                self._weight_rows(step, inputs)
                fits.append(self._misfit(step, inputs, outputs, logits))
                if self.by_step:
                    self._assign_labels(index, *fits[-1])
            optimizer.zero_grad()
            noise = given_noise(self.model, self._noise(step, x[index]))
            with noise, recorded(self.last, last_inputs):
                logits = functional_call(self.model, {**weights}, (x[index],))
                local_loss(self.model, logits, self.labels[index], self.training).backward()
            if self.training.max_grad_norm:
                nn.utils.clip_grad_norm_(weights.values(), self.training.max_grad_norm)
            optimizer.step()
        images = torch.cat([index for _, index in self._steps()])
        misfit, size = (torch.cat(parts) for parts in zip(*fits, strict=True))
        if not self.by_step:
            self._assign_labels(images, misfit, size)
        own = misfit.gather(1, self.labels[images, None])[:, 0]
        self.accepted = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        self.accepted[images] = own < _ACCEPTED * size
        if self.last:
            self.labels = self.last.relabelled(
                last_inputs, self.labels, ~self.accepted, self.counted
            )
            self.known_labels = self.labels

    def _traced(self, step: int, x: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
        """Return `traced` of a step's images (B, C, H, W), with its rows' units active."""
        weights = {name: w.detach().requires_grad_() for name, w in self.weights_at[step].items()}
        units = {part.name: part.rows for part in self.prints[step]}
        with given_noise(self.model, self._noise(step, x)):
            inputs, outputs, logits = traced(self.model, weights, x, self.names, units)
        return {name: value.detach() for name, value in inputs.items()}, outputs, logits

    def _weight_rows(self, step: int, inputs: Mapping[str, Tensor]) -> None:
        """Weight a step's fingerprints by how well its images' features fit them."""
        self.prints[step] = [
            part.weighted(fit_rows(inputs[part.name], part)[2]) for part in self.prints[step]
        ]

    def _noise(self, step: int, x: Tensor) -> list[Tensor]:
        return [noise.detach() for noise in self.noise_of(self.taken[step], x)]

    def _assign_labels(self, index: Tensor, misfit: Tensor, size: Tensor) -> None:
        """Assign the labels of some images among them, by the linear assignment that fits best.

        Inferred labels may be wrong: an image may then take a label outside of them.
        """
        labels = self.known_labels[index]
        # Images without support keep their labels.
        costs = misfit[:, labels] + _REASSIGNED * (labels != self.labels[index, None])
        if not (self.by_step or self.counted):
            least, own = misfit.min(1)
            free = torch.where(size > 0, least + _NOT_INFERRED * size, torch.inf)
            others = torch.full_like(costs, torch.inf)
            costs = torch.cat([costs, others.diagonal_scatter(free)], 1)
            labels = torch.cat([labels, own])
        _, best = linear_sum_assignment(costs.cpu().numpy())
        self.labels[index] = labels[torch.from_numpy(best).to(labels.device)]

    def _misfit(
        self,
        step: int,
        inputs: Mapping[str, Tensor],
        outputs: Mapping[str, Tensor],
        logits: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Return how badly each class fits a step's images, shape (B, num_classes).

        An image's part in a row that supports it is the derivative of its loss in that
        unit's output, which its label determines. The misfit is 0 for images without
        support, and for classes that are not to be assigned.

        Also return the size of each image's part, shape (B,), in the misfit's units: the
        misfit of a class whose derivative is 0.
        """
        misfit, total = torch.zeros_like(logits), logits.new_zeros(len(logits))
        rows = []
        for part in self.prints[step]:
            features = inputs[part.name]
            chosen = supported(features, part)
            _, parts, _ = fit_rows(features, part, chosen)
            # In units of the derivative: undo the lengths that `fit_rows` works with.
            length = (part.gradient * part.weight).norm(dim=1, keepdim=True)
            slopes = parts * length / _lengths(features, part)
            size = slopes.square().sum() + 1e-30
            total += (slopes * chosen).square().sum(0) / size
            rows.append((chosen, slopes, size))
        every = torch.arange(logits.shape[1], device=logits.device)
        for label in self.labels.unique() if self.by_step else every:
            loss = F.cross_entropy(logits, label.expand(len(logits)))
            for part, (chosen, slopes, size) in zip(self.prints[step], rows, strict=True):
                (slope,) = torch.autograd.grad(loss, outputs[part.name], retain_graph=True)
                off = (slopes - slope[:, part.rows].T) * chosen
                misfit[:, label] += off.square().sum(0) / size
        return misfit.detach(), total


def traced(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    x: Tensor,
    names: Iterable[str],
    active: Mapping[str, Tensor] | None = None,
) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    """Run a model and return what goes into its layers, and what comes out.

    Parameters
    ----------
    model : nn.Module
        Its own weights are not read.
    weights : mapping of str to Tensor
    x : Tensor, shape (N, C, H, W)
        Normalised images.
    names : iterable of str
        Weights of the layers to trace.
    active : mapping of str to Tensor, optional
        By weight, the units that left a row, so that their ReLU was active. Where
        approximate images and weights give them outputs below zero, these are raised
        to just above.

    Returns
    -------
    inputs, outputs : dict of str to Tensor
        By weight, in the order in which the layers ran.
    logits : Tensor, shape (N, num_classes)
    """
    inputs, outputs = {}, {}

    def hook(name: str, _: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if active and name in active:
            units = torch.zeros_like(output, dtype=torch.bool)
            units[:, active[name]] = True
            output = torch.where(units, output.clamp_min(_ACTIVE), output)
        inputs[name], outputs[name] = args[0], output
        return output

    handles = [
        model.get_submodule(name.removesuffix(".weight")).register_forward_hook(partial(hook, name))
        for name in names
    ]
    logits = functional_call(model, dict(weights), (x,))
    for handle in handles:
        handle.remove()
    return inputs, outputs, logits


def fit_rows(
    features: Tensor, seen: Fingerprint, chosen: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Fit the rows of a fingerprint by the features of a batch, by least squares.

    Coordinates count by their weights, with rows and features scaled to length 1.

    Parameters
    ----------
    features : Tensor, shape (B, D)
        The layer's inputs.
    seen : Fingerprint
        Of R rows.
    chosen : Tensor of bool, shape (B,) or (R, B), optional
        Which images may be part of a row; by default all.

    Returns
    -------
    alone : Tensor, shape (R, B)
        The residual, in [0, 1], of a row in each image's features alone.
    parts : Tensor, shape (R, B)
        Each image's coefficient in the best combination of all.
    together : Tensor, shape (R,)
        The residual of that combination.
    """
    dots, gram = _products(features, seen)
    if chosen is not None:
        dots, gram = dots * chosen, gram * chosen[..., None] * chosen[..., None, :]
    parts = torch.linalg.solve(gram + _ridge(gram), dots)
    fitted = (parts * (2 * dots - (gram @ parts[..., None])[..., 0])).sum(1)
    return 1 - dots.square(), parts, (1 - fitted).clamp(min=0)


def supported(features: Tensor, seen: Fingerprint) -> Tensor:
    """Return which images each row of a fingerprint supports, shape (R, B) of bool.

    Those that it takes to fit the row, by orthogonal matching pursuit (Pati et al.,
    1993) of the rows that all images fit together. The image that fits most of a row
    comes first, its part is removed from rows and features, and so on. A copy of an
    image, or a blend of several, is not supported beside them, however large its
    coefficient in the least squares.

    Parameters
    ----------
    features, seen
        See `fit_rows`.
    """
    fitted = (fit_rows(features, seen)[2] < _FITTED)[:, None]
    dots, gram = _products(features, seen)
    dots, gram = dots * fitted, gram + _ridge(gram)
    chosen = torch.zeros(len(features), dtype=torch.bool, device=features.device)
    for _ in range(len(features)):
        # What remains of an image that was chosen is rounding.
        left = gram.diagonal(dim1=1, dim2=2).clamp_min(1e-6)
        gains, image = (dots.square() / left).amax(0).max(0)
        chosen[image] |= gains > _SUPPORTED
        along = gram[:, image] / left[:, image, None]
        dots = dots - dots[:, image, None] * along
        gram = gram - gram[:, :, image, None] * along[:, None]
    return (fit_rows(features, seen, chosen)[1].square() > _SUPPORTED) & fitted


def _products(features: Tensor, seen: Fingerprint) -> tuple[Tensor, Tensor]:
    """Return features times each row, shape (R, B), and times each other, (R, B, B).

    Of features (B, D) and rows that are weighted and scaled to length 1. By matrix
    products: features scaled for each row would take R B D numbers.
    """
    lengths = _lengths(features, seen)
    rows = F.normalize(seen.gradient * seen.weight, dim=1) * seen.weight
    pairs = (features[:, None] * features).flatten(0, 1)
    gram = (seen.weight.square() @ pairs.T).unflatten(1, (len(features), -1))
    return rows @ features.T / lengths, gram / (lengths[:, :, None] * lengths[:, None])


def _lengths(features: Tensor, seen: Fingerprint) -> Tensor:
    """Return the length of each image's features with each row's weights, shape (R, B), above 0."""
    return (seen.weight.square() @ features.square().T).clamp(min=1e-24).sqrt()


def _ridge(gram: Tensor) -> Tensor:
    return _RIDGE * torch.eye(gram.shape[-1], device=gram.device)


def usable_fingerprints(
    model: nn.Module, observation: Observation, knowledge: Knowledge
) -> list[Fingerprint]:
    """Return an update's fingerprints that `Decoded` can use.

    Those in linear layers with one input an image, of the first pass over the data:
    the weights of later steps are less well known, and their images too where the
    client reshuffles. A coordinate is known only where a known defence leaves its
    size, see `Consistent.sizes_known`.

    Parameters
    ----------
    model : nn.Module
        Of the update's architecture.
    observation : Observation
    knowledge : Knowledge
        With the client's training.
    """
    training, count = knowledge.client, observation.num_examples
    layers = (name for name, layer in model.named_modules() if isinstance(layer, nn.Linear))
    linear = [f"{layer}.weight" for layer in layers]
    weights = dict(model.named_parameters())
    images = next(iter(weights.values())).new_zeros(2, *knowledge.image_shape)
    with torch.no_grad():
        inputs, _, _ = traced(model, weights, images, linear)
    names = [n for n, value in inputs.items() if value.dim() == 2 and n in observation.trained]
    w0, w1 = ({name: w[name] for name in names} for w in (observation.w0, observation.w1))
    num_steps = len(training.batches(count))
    found = find_fingerprints(w0, w1, training, num_steps)
    update = observation.update
    known = consistent(list(update.values()), knowledge.defense)
    if known:
        decay = training.lr * training.weight_decay
        lengths = training.lr * single_step_updates(num_steps, decay)
        sized = {
            step: dict(zip(update, known.sizes_known(lengths[step].item()), strict=True))
            for step in {part.step for part in found}
        }
        left = [_known_only(part, sized[part.step][part.name][part.rows]) for part in found]
        # With less than half left, rows mislead more than they help.
        kept = (
            now.known.sum() > part.known.sum() / 2 for now, part in zip(left, found, strict=True)
        )
        found = list(compress(left, kept))
    first_pass = training.steps_a_pass(count)
    # A defence may leave rows without any known gradient; they are of no use.
    return [p for p in found if p.step < first_pass and (p.gradient * p.weight).any()]


def _known_only(seen: Fingerprint, sized: Tensor) -> Fingerprint:
    """Return a fingerprint of which only the coordinates marked in `sized` (R, D) are known."""
    spread = torch.where(sized, seen.spread, torch.inf)
    return replace(seen, spread=spread, weight=seen.weight * sized)
