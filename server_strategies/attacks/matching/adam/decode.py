"""The trajectory, with the images of every step that left a fingerprint decoded first.

A row of a linear layer's gradient is a sum over the batch, ``sum_n d_n a_n``, of the
layer's inputs a_n, the features of image n. So a fingerprint holds features, and an
image's features hold the image: no local step is too late for that. The images that
fingerprints do not show follow from the trajectory, in which the others stand still.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
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
    single_touch_moves,
)
from server_strategies.attacks.matching.defended import consistent
from server_strategies.attacks.matching.distance import CosineDistance, Distance
from server_strategies.attacks.matching.trajectory import Trajectory

_RIDGE = 1e-3  # of the least squares on features of length 1
_SOFT = 0.005  # residual at which a row gives up being of one image alone
_NEEDED = 0.1  # of a row's square, which an image has to explain to be shown by it
_RESIDUAL = 0.1  # below which a row counts as explained
_BELIEVED = 0.15  # misfit of its own label up to which an image counts as shown
_MOVED = 1e-4  # cost of a label that moves, in the misfit's units
_MISCOUNTED = 0.05  # of a label that was not counted, as a share of the image's part
_OPEN = 1e-6  # output of a unit that is just open
_RENEW = 8  # calls after which the weights that features are taken at are simulated anew


class Decoded(Trajectory):
    """Images decoded from fingerprints first, then the trajectory's for the others.

    Until `restart` the loss is the fingerprints' alone: for every row g of a local
    step's gradient the residual of its best combination of the batch's features,
    ``min_d |g - sum_n d_n a_n|^2 / |g|^2``, each coordinate by its weight, and, softly,
    that of the best single image, since most such rows are of one image. The weights
    are renewed as the misfit falls (`Fingerprint.weighed`). Labels and activations do not
    enter, so no unit has to be active by luck. The features are those at the
    weights of that step, simulated from the images decoded so far.

    Then the images that fingerprints show stand nearly still, for the others
    `Trajectory` is added.

    Parameters
    ----------
    model, observation, knowledge, reason
        See `MatchingObjective`.
    distance : type of Distance
        The trajectory's.

    Raises
    ------
    ValueError
        If there are no fingerprints, or the labels are not known.
    """

    name = "fingerprints"
    restart = 0.6  # the first part is cheap, and what it misses the second has to find

    def __init__(
        self,
        model: nn.Module,
        observation: Observation,
        knowledge: Knowledge,
        reason: str,
        distance: type[Distance] = CosineDistance,
    ) -> None:
        # The images that stand still make a small smoothing descend well.
        super().__init__(model, observation, knowledge, reason, 0.02, 0.01, distance)
        if knowledge.labels is None:
            raise ValueError("matching is 'fingerprints', which needs labels; these are not known")
        self.prints: dict[int, list[Fingerprint]] = {}
        legible = legible_fingerprints(model, observation, knowledge)
        for found in sorted(legible, key=lambda seen: seen.step):
            self.prints.setdefault(found.step, []).append(found)
        if not self.prints:
            raise ValueError("matching is 'fingerprints', but the update holds none")
        self.names = {seen.name for found in self.prints.values() for seen in found}
        self.ordered = knowledge.labels_source == "given"  # otherwise counted over all steps
        self.counted = self.labels.clone()
        self.calls = 0
        self.held: dict[int, dict[str, Tensor]] = {}
        self.believed: Tensor
        self.shown: Tensor | None = None
        self.all_shown = False

    def __call__(self, x: Tensor, progress: float) -> Tensor:
        """Return the loss, shape (), of normalised images (N, C, H, W)."""
        if self.calls % _RENEW == 0:
            self._simulate(x.detach())
        self.calls += 1
        if progress < self.restart:
            return self._residual(x)
        if self.shown is None:
            self.shown = self.believed
            # Once: to read it in every call would wait for the device.
            self.all_shown = bool(self.shown.all())
        if self.all_shown:
            return self._residual(x)
        still = self.shown.view(-1, 1, 1, 1)
        residual = self._residual(torch.where(still, x, x.detach()))
        return residual + super().__call__(torch.where(still, x.detach(), x), progress)

    def reassignments(self) -> list[tuple[int, int]]:
        """See `MatchingObjective`; none: fingerprints tell the step."""
        return []

    def pace(self) -> Tensor | None:
        """See `MatchingObjective`."""
        return None if self.shown is None else torch.where(self.shown, 0.05, 1.0)

    def _residual(self, x: Tensor) -> Tensor:
        """Return the mean residual of the fingerprints in the images' features."""
        residuals = []
        for step, index in self._steps():
            inputs = look(self.model, self.held[step], x[index], self.names)[0]
            for seen in self.prints[step]:
                alone, _, together = combine(inputs[seen.name], seen)
                best = alone.min(1).values
                residuals.append((together + _SOFT * best / (best + _SOFT)).mean())
        return torch.stack(residuals).mean()

    def _steps(self) -> Iterator[tuple[int, Tensor]]:
        """Yield the local steps with fingerprints, and which images each trains on."""
        return ((step, self.indices[step]) for step in self.prints)

    def _simulate(self, x: Tensor) -> None:
        """Hold the weights before each local step, as training on `x` makes them.

        On the way labels are dealt out: among the images of a step, whose order in
        it is never known, or among all that fingerprints can tell, where labels
        were only counted. Then those images are believed that some row needs, with a
        part that is about the one which their label gives them: one that imitates a
        blend of others has another.
        """
        weights = {name: nn.Parameter(w.clone()) for name, w in self.w0.items()}
        optimizer = create_optimizer(weights.values(), self.training)
        told: list[tuple[Tensor, Tensor]] = []
        for step, index in enumerate(self.indices[: max(self.prints) + 1]):
            if step in self.prints:
                self.held[step] = {name: w.detach().clone() for name, w in weights.items()}
                inputs, outputs, logits = self._look(step, x[index])
                self._weigh(step, inputs)
                told.append(self._misfit(step, inputs, outputs, logits))
                if self.ordered:
                    self._deal(index, *told[-1])
            optimizer.zero_grad()
            with given_noise(self.model, self._noise(step, x[index])):
                logits = functional_call(self.model, {**weights}, (x[index],))
                local_loss(self.model, logits, self.labels[index]).backward()
            if self.training.max_grad_norm:
                nn.utils.clip_grad_norm_(weights.values(), self.training.max_grad_norm)
            optimizer.step()
        pictured = torch.cat([index for _, index in self._steps()])
        misfit, part = (torch.cat(parts) for parts in zip(*told, strict=True))
        if not self.ordered:
            self._deal(pictured, misfit, part)
        own = misfit.gather(1, self.labels[pictured, None])[:, 0]
        self.believed = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        self.believed[pictured] = own < _BELIEVED * part

    def _look(self, step: int, x: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
        """Return what `look` does of a step's images (B, C, H, W), its rows' units opened."""
        weights = {name: w.detach().requires_grad_() for name, w in self.held[step].items()}
        units = {seen.name: seen.rows for seen in self.prints[step]}
        with given_noise(self.model, self._noise(step, x)):
            inputs, outputs, logits = look(self.model, weights, x, self.names, units)
        return {name: given.detach() for name, given in inputs.items()}, outputs, logits

    def _weigh(self, step: int, inputs: Mapping[str, Tensor]) -> None:
        """Weigh a step's fingerprints by how well its images' features explain them."""
        self.prints[step] = [
            seen.weighed(combine(inputs[seen.name], seen)[2]) for seen in self.prints[step]
        ]

    def _noise(self, step: int, x: Tensor) -> list[Tensor]:
        return [noise.detach() for noise in self.noise_of(self.taken[step], x)]

    def _deal(self, index: Tensor, misfit: Tensor, part: Tensor) -> None:
        """Deal the labels of some images out among them: the linear assignment that fits best.

        What was only counted may be wrong: an image may have a label of its own for it.
        """
        labels = self.counted[index]
        # Those that nothing is told of keep theirs.
        costs = misfit[:, labels] + _MOVED * (labels != self.labels[index, None])
        if not self.ordered:
            least, own = misfit.min(1)
            alone = torch.where(part > 0, least + _MISCOUNTED * part, torch.inf)
            apart = torch.full_like(costs, torch.inf)
            costs = torch.cat([costs, apart.diagonal_scatter(alone)], 1)
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

        An image's part in a row that needs it is the slope of its loss in that
        unit's output, which its label decides. 0 for images that no row needs,
        and of classes that are not to be dealt out.
        And the images' parts, in the misfit's units, shape (B,): what a class has
        that explains nothing of them.
        """
        misfit, part = torch.zeros_like(logits), logits.new_zeros(len(logits))
        told = []
        for seen in self.prints[step]:
            features = inputs[seen.name]
            chosen = needed(features, seen)
            _, parts, _ = combine(features, seen, chosen)
            # In units of the slope: undo the lengths that `combine` works with.
            length = (seen.gradient * seen.weight).norm(dim=1, keepdim=True)
            slopes = parts * length / _lengths(features, seen)
            size = slopes.square().sum() + 1e-30
            part += (slopes * chosen).square().sum(0) / size
            told.append((chosen, slopes, size))
        every = torch.arange(logits.shape[1], device=logits.device)
        for label in self.labels.unique() if self.ordered else every:
            loss = F.cross_entropy(logits, label.expand(len(logits)))
            for seen, (chosen, slopes, size) in zip(self.prints[step], told, strict=True):
                (slope,) = torch.autograd.grad(loss, outputs[seen.name], retain_graph=True)
                off = (slopes - slope[:, seen.rows].T) * chosen
                misfit[:, label] += off.square().sum(0) / size
        return misfit.detach(), part


def look(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    x: Tensor,
    names: Iterable[str],
    opened: Mapping[str, Tensor] | None = None,
) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    """Run a model, and look into its layers.

    Parameters
    ----------
    model : nn.Module
        Its own weights are not read.
    weights : mapping of str to Tensor
    x : Tensor, shape (N, C, H, W)
        Normalised images.
    names : iterable of str
        Weights of the layers to look into.
    opened : mapping of str to Tensor, optional
        By weight, units that left a row, so that their ReLU was open: outputs which
        approximate images and weights have below zero are raised to just above.

    Returns
    -------
    inputs, outputs : dict of str to Tensor
        By weight, in the order that the layers ran in.
    logits : Tensor, shape (N, num_classes)
    """
    inputs, outputs = {}, {}

    def hook(name: str, _: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if opened and name in opened:
            units = torch.zeros_like(output, dtype=torch.bool)
            units[:, opened[name]] = True
            output = torch.where(units, output.clamp_min(_OPEN), output)
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


def combine(
    features: Tensor, seen: Fingerprint, chosen: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Explain the rows of a fingerprint by the features of a batch, by least squares.

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
        Each image's part in the best combination of all.
    together : Tensor, shape (R,)
        The residual of that.
    """
    dots, gram = _products(features, seen)
    if chosen is not None:
        dots, gram = dots * chosen, gram * chosen[..., None] * chosen[..., None, :]
    parts = torch.linalg.solve(gram + _ridge(gram), dots)
    explained = (parts * (2 * dots - (gram @ parts[..., None])[..., 0])).sum(1)
    return 1 - dots.square(), parts, (1 - explained).clamp(min=0)


def needed(features: Tensor, seen: Fingerprint) -> Tensor:
    """Return which images it takes to explain each row of a fingerprint, shape (R, B) of bool.

    By orthogonal matching pursuit (Pati et al., 1993) of the rows that all images
    explain together: the image that explains most of a row comes first, its part
    leaves rows and features, and so on. A copy of an image, or a blend of some, is
    not needed beside them, however large a part least squares give it.

    Parameters
    ----------
    features, seen
        See `combine`.
    """
    explained = (combine(features, seen)[2] < _RESIDUAL)[:, None]
    dots, gram = _products(features, seen)
    dots, gram = dots * explained, gram + _ridge(gram)
    chosen = torch.zeros(len(features), dtype=torch.bool, device=features.device)
    for _ in range(len(features)):
        # What is left of an image that was chosen is rounding.
        left = gram.diagonal(dim1=1, dim2=2).clamp_min(1e-6)
        gains, image = (dots.square() / left).amax(0).max(0)
        chosen[image] |= gains > _NEEDED
        along = gram[:, image] / left[:, image, None]
        dots = dots - dots[:, image, None] * along
        gram = gram - gram[:, :, image, None] * along[:, None]
    return (combine(features, seen, chosen)[1].square() > _NEEDED) & explained


def _products(features: Tensor, seen: Fingerprint) -> tuple[Tensor, Tensor]:
    """Return features times each row, shape (R, B), and times each other, (R, B, B).

    Of features (B, D) and rows that are weighted and scaled to length 1. By products of
    matrices: features that are scaled for each row would be R B D numbers.
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


def legible_fingerprints(
    model: nn.Module, observation: Observation, knowledge: Knowledge
) -> list[Fingerprint]:
    """Return an update's fingerprints that `Decoded` can read.

    Those in linear layers with one input an image, of the first pass over the data:
    the weights of later steps are less well known, of a client that reshuffles their
    images, too. Of their rows those coordinates are known that a known defence leaves
    so, see `Consistent.sizes_told`.

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
    images = next(iter(weights.values())).new_zeros(1, *knowledge.image_shape)
    with torch.no_grad():
        inputs, _, _ = look(model, weights, images, linear)
    names = [n for n, given in inputs.items() if given.dim() == 2 and n in observation.trained]
    w0, w1 = ({name: w[name] for name in names} for w in (observation.w0, observation.w1))
    num_steps = len(training.batches(count))
    found = find_fingerprints(w0, w1, training, num_steps)
    update = observation.update
    known = consistent(list(update.values()), knowledge.defense)
    if known:
        moves = training.lr * single_touch_moves(num_steps, training.lr * training.weight_decay)
        told = {
            step: dict(zip(update, known.sizes_told(moves[step].item()), strict=True))
            for step in {seen.step for seen in found}
        }
        left = [_known_only(seen, told[seen.step][seen.name][seen.rows]) for seen in found]
        # With less than half left, rows mislead more than they tell.
        kept = (
            now.known.sum() > seen.known.sum() / 2 for now, seen in zip(left, found, strict=True)
        )
        found = list(compress(left, kept))
    first_pass = training.steps_a_pass(count)
    # Rows without a gradient that is known, as a defence may leave them, tell nothing.
    return [s for s in found if s.step < first_pass and (s.gradient * s.weight).any()]


def _known_only(seen: Fingerprint, told: Tensor) -> Fingerprint:
    """Return a fingerprint of which only those coordinates are known that `told` (R, D) marks."""
    spread = torch.where(told, seen.spread, torch.inf)
    return replace(seen, spread=spread, weight=seen.weight * told)
