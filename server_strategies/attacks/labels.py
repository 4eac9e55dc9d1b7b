"""Inferring a client's labels from its update, by the classifier's last linear layer.

With softmax p and one-hot label y, cross-entropy's gradient in that layer's bias is the
batch's mean of p - y. So the update of a class's bias shows how often the class
occurred. An optimiser such as Adam hides the size of a gradient but not its course over
the steps. There the label counts are found by simulating candidates: `simulate`.

See docs/labels.md.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import permutations

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from fl_app.models import classifier, clients_model
from fl_app.models.extensions import local_loss
from fl_app.models.norms import batch_norms
from fl_app.protocol import Knowledge, LocalTraining, Observation
from fl_app.protocol.optimizer import create_optimizer
from server_strategies.attacks.matching.adam.fingerprints import single_step_rows

METHODS = ("auto", "idlg", "llg", "dlf", "simulate")

_RANDOM_IMAGES = 64
_MAX_FEATURES = 256  # of the last hidden layer: more cost time and add little

# Of `simulate`, chosen on CIFAR-10 clients that no reported figure uses.
_SAMPLES = 32  # batches of random images behind each likelihood
_RESTARTS, _SWEEPS, _CHANGES = 3, 6, 60
_HOT = 3.0  # the first sweep's temperature, falling to zero
_FEATURE_WIDTH, _BIAS_WIDTH = 0.15, 0.05  # of a likelihood's kernel, in the displacement's rms
_FEATURE_WEIGHT = 0.2  # the features' errors are not independent
# Relative error of the simulated softmax: at w0, and for its relative change since.
_P_ERROR, _P_DRIFT = 0.02, 0.5
# Of columns that one step changed: share of false signs, and how many of a step's count.
_FALSE_SIGN, _MOST_COLUMNS = 1e-4, 20
_FEATURE_FLOOR, _BIAS_FLOOR = -4.0, -12.0  # log likelihood of a coordinate that does not fit at all
_ORDERED = 20  # distinct batches up to which labels are assigned to them: the search is cubic
# Of counts over more batches than that: rounds, and totals of a class that are tried in each.
_ROUNDS, _TOTALS = 5, 33
_CLOSER = 3.0  # factor by which the range of them shrinks from round to round
_BEYOND = 100.0  # log likelihood that a count loses for each image outside its range


@dataclass(frozen=True)
class LabelEstimate:
    """The labels inferred from a client's update.

    Attributes
    ----------
    counts : Tensor of int64, shape (num_classes,)
        Images of each class; they sum to N.
    labels : tuple of int
        N labels: by local step where the method infers it, ascending in each step,
        else ascending over all.
    method : str
        The method used, never ``auto``.
    reason : str
        Why this method, for the log.
    """

    counts: Tensor
    labels: tuple[int, ...]
    method: str
    reason: str


def infer_labels(
    method: str, observation: Observation, knowledge: Knowledge, device: str = "cpu"
) -> LabelEstimate:
    """Infer how many images of each class a client trained on.

    Parameters
    ----------
    method : {"auto", "idlg", "llg", "dlf", "simulate"}
        `idlg`: N distinct labels are the N classes whose gradient is negative
        (Zhao et al., 2020). `llg`: repeated subtraction of one image's impact
        (Wainakh et al., 2022). `dlf`: counts corrected for the model's output
        over K steps (Dimitrov et al., 2022). `simulate`: the client's optimiser
        on the last layer, simulated with candidate labels until its displacement
        fits. `auto` chooses by the client's training.
    observation : Observation
    knowledge : Knowledge
        Its labels are not read.
    device : str
        The torch device to work on.

    Raises
    ------
    ValueError
        If `method` is unknown or does not fit the client, the model has no
        linear classifier, the update is zero or not finite, or it is a sum.
    """
    if method not in METHODS:
        raise ValueError(f"labels method is {method!r}; allowed: {', '.join(METHODS)}")
    if observation.num_examples < 1:
        raise ValueError(f"num_examples is {observation.num_examples}; allowed: 1 or more")
    if knowledge.defense.secagg:
        raise ValueError("labels are inferred from one client's update, not from a sum of several")
    reason = "asked for"
    why = _unknown_training(knowledge.client, observation.num_examples)
    if why:
        raise ValueError(why)
    if method == "auto":
        method, reason = choose_method(knowledge.client, observation.num_examples)
    elif method != "simulate" and knowledge.client.label_smoothing:
        raise ValueError(
            f"labels method is {method!r}; allowed with label_smoothing "
            f"{knowledge.client.label_smoothing}: simulate"
        )
    head = _Head(observation, knowledge, torch.device(device))
    if method == "simulate":
        if len(_distinct(knowledge.client, observation.num_examples)) <= _ORDERED:
            return _by_step(_Search(head, observation, knowledge).run(), f"{method}: {reason}")
        counts = _Totals(head, observation, knowledge).totals()
        words = f"{method}: {reason}; over all local steps alone"
        return LabelEstimate(counts.cpu(), spread_labels(_labels(counts)), method, words)
    counts = {"idlg": _idlg, "llg": _llg, "dlf": _dlf}[method](head)
    return LabelEstimate(counts.cpu(), tuple(_labels(counts)), method, f"{method}: {reason}")


def order_labels(
    observation: Observation, knowledge: Knowledge, device: str = "cpu"
) -> LabelEstimate:
    """Infer which of a client's labels belong to which local step, by the method `simulate`.

    Parameters
    ----------
    observation : Observation
    knowledge : Knowledge
        Its labels are right but for their order.
    device : str
        The torch device to work on.

    Raises
    ------
    ValueError
        As `infer_labels`, or if the knowledge has no labels, or there are too many steps.
    """
    if knowledge.labels is None:
        raise ValueError("the client's labels have no order without labels")
    why = _unknown_training(knowledge.client, observation.num_examples)
    if why:
        raise ValueError(why)
    head = _Head(observation, knowledge, torch.device(device))
    steps = len(_distinct(knowledge.client, observation.num_examples))
    if steps > _ORDERED:
        raise ValueError(f"labels are assigned to at most {_ORDERED} local steps, not to {steps}")
    given = torch.tensor(knowledge.labels).bincount(minlength=knowledge.num_classes)
    found = _Search(head, observation, knowledge, given).run()
    return _by_step(found, "simulate: their counts are given")


def spread_labels(labels: Sequence[int]) -> tuple[int, ...]:
    """Return labels so that every part of the sequence has its share of each class."""
    counts, seen = Counter(labels), Counter[int]()
    places = []
    for label in labels:
        places.append(((seen[label] + 0.5) / counts[label], label))
        seen[label] += 1
    return tuple(label for _, label in sorted(places))


def _distinct(training: LocalTraining, num_examples: int) -> list[tuple[int, ...]]:
    """Return a client's batches without repeats: a later pass may see the first's again."""
    return list(dict.fromkeys(training.batches(num_examples)))


def _by_step(found: Tensor, reason: str) -> LabelEstimate:
    labels = tuple(c for counts in found for c in _labels(counts))
    return LabelEstimate(found.sum(0).cpu(), labels, "simulate", reason)


def _unknown_training(training: LocalTraining, num_examples: int) -> str:
    """Return why no label follows from a client's update, whatever its classifier; "": one may."""
    beyond = training.beyond(
        "optimizer", "optimizer_options", "label_smoothing", "schedule", "drop_last", "trainable",
        "groups",
    )  # fmt: skip
    if beyond:
        return f"labels are inferred from the gradient of cross-entropy in each step, and {beyond}"
    used = {image for batch in training.batches(num_examples) for image in batch}
    if len(used) < num_examples:
        return (
            f"num_examples is {num_examples}; allowed: at most the {len(used)} that the client's "
            "local steps train on"
        )
    return ""


def choose_method(training: LocalTraining, num_examples: int) -> tuple[str, str]:
    """Return the method that `auto` takes for a client with N examples, and why."""
    batches = training.batches(num_examples)
    if training.label_smoothing:
        return "simulate", "auto, smoothed labels give other classes a negative gradient"
    if num_examples == 1:
        return "idlg", "auto, one image has the only negative gradient"
    if training.adaptive:
        return "simulate", f"auto, {training.optimizer} hides the size of a gradient"
    if training.optimizer != "sgd":
        return "simulate", f"auto, {training.optimizer} has a rate and a decay of its own"
    if training.momentum and len(batches) > 1:
        return "simulate", "auto, momentum weighs early steps more"
    if (training.schedule or training.optimizer_options) and len(batches) > 1:
        return "simulate", "auto, the learning rate weighs some steps more"
    if len({len(batch) for batch in batches}) > 1:
        return "simulate", "auto, an image weighs more in a smaller batch"
    return "dlf", "auto, sgd sums its gradients"


def _labels(counts: Tensor) -> list[int]:
    return torch.arange(len(counts)).repeat_interleave(counts.cpu()).tolist()


class _Head:
    """The classifier's last layer before and after, and random images to run through it."""

    def __init__(
        self, observation: Observation, knowledge: Knowledge, device: torch.device
    ) -> None:
        self.training, self.num_examples = knowledge.client, observation.num_examples
        self.model = clients_model(knowledge, observation.w0).to(device)
        batch_norm = any(layer.training for _, layer in batch_norms(self.model))
        # With BatchNorm in training mode an image's features depend on the others of its batch.
        self.together = self.training.batch_size if batch_norm else _RANDOM_IMAGES
        self.name = classifier(self.model)
        if not self.name:
            raise ValueError(
                f"{knowledge.model_name} has no linear layer: its labels can't be inferred"
            )
        self.layer = self.model.get_submodule(self.name)
        parts = [n for n, _ in self.model.named_parameters() if n.startswith(f"{self.name}.")]
        rates = {self.training.rates(part) for part in parts if self.training.trains(part)}
        if len(rates) != 1 or not all(map(self.training.trains, parts)):
            raise ValueError(f"{self.name} is not trained as a whole at one rate and decay")
        lr, decay = rates.pop()
        # Only this layer is simulated below.
        self.training = replace(self.training, lr=lr, weight_decay=decay, groups=(), trainable=())
        if self.layer.out_features != knowledge.num_classes:
            raise ValueError(
                f"{self.name}, the last linear layer of {knowledge.model_name}, has "
                f"{self.layer.out_features} outputs for {knowledge.num_classes} classes"
            )
        names = [name for name, _ in self.model.named_parameters()]
        self.w0 = {name: observation.w0[name].to(device).float() for name in names}
        self.w1 = {name: observation.w1[name].to(device).float() for name in names}
        self.before, self.after = self._augmented(self.w0), self._augmented(self.w1)
        update = self.before - self.after
        if not update.isfinite().all():
            raise ValueError(f"the update of {self.name} is not finite")
        if not update.any():
            raise ValueError(f"the update of {self.name} is zero: no label follows from it")
        self.generator = torch.Generator().manual_seed(0)
        self.images = random_images(_RANDOM_IMAGES, knowledge, self.generator).to(device)

    def _augmented(self, weights: Mapping[str, Tensor]) -> Tensor:
        """Return the layer's weights, shape (C, d), a bias as a last column: (C, d + 1)."""
        weight = weights[f"{self.name}.weight"]
        if self.layer.bias is None:
            return weight
        return torch.cat([weight, weights[f"{self.name}.bias"][:, None]], 1)

    @torch.no_grad()
    def inputs(self, weights: Mapping[str, Tensor], images: Tensor) -> Tensor:
        """Return the layer's inputs, shape (n, d), with a column of ones where it has a bias."""
        kept: list[Tensor] = []
        handle = self.layer.register_forward_pre_hook(lambda _, args: kept.append(args[0]))
        for batch in images.split(self.together):
            functional_call(self.model, dict(weights), (batch,))
        handle.remove()
        features = torch.cat(kept)
        ones = features.new_ones(len(images), 0 if self.layer.bias is None else 1)
        return torch.cat([features, ones], 1)

    def between(self, share: float) -> dict[str, Tensor]:
        """Return the weights interpolated between w0 (share 0) and w1 (share 1)."""
        return {name: torch.lerp(w, self.w1[name], share) for name, w in self.w0.items()}

    def average_gradient(self) -> Tensor:
        """Return the mean gradient over the local steps, shape (C,): the bias's, or row sums.

        Exact for SGD without momentum. With momentum each step counts by its weight in
        the update. With Adam only the sign is meaningful, and only for one step.
        """
        training = self.training
        steps = len(training.batches(self.num_examples))
        plain = replace(training, weight_decay=0.0)
        zero = self.before.new_zeros(1)
        gradient = (self.after - self.before) / displacement([zero + 1] * steps, zero, plain)
        if training.optimizer == "sgd":
            gradient = gradient - training.weight_decay * (self.before + self.after) / 2
        return gradient.sum(1) if self.layer.bias is None else gradient[:, -1]


def random_images(count: int, knowledge: Knowledge, generator: torch.Generator) -> Tensor:
    """Return noise with the spectrum of photographs, amplitude 1/f, normalised.

    Parameters
    ----------
    count : int
    knowledge : Knowledge
        Its image shape, mean and std.
    generator : torch.Generator
        On the CPU.

    Returns
    -------
    Tensor, shape (count, C, H, W)
        Clipped to the range of pixels in [0, 1]. Channels have a correlation of 0.8,
        as in photographs.
    """
    channels, height, width = knowledge.image_shape
    noise = torch.randn((count, channels + 1, height, width), generator=generator)
    frequency = torch.cartesian_prod(torch.fft.fftfreq(height), torch.fft.fftfreq(width)).norm(
        dim=1
    )
    frequency = frequency.view(height, width).clamp_min(1 / max(height, width))
    shared = torch.fft.ifft2(torch.fft.fft2(noise) / frequency).real
    x = math.sqrt(0.8) * shared[:, :1] + math.sqrt(0.2) * shared[:, 1:]
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (knowledge.mean, knowledge.std))
    return torch.clamp(x / x.std(), -mean / std, (1 - mean) / std)


def displacement(gradients: Sequence[Tensor], start: Tensor, training: LocalTraining) -> Tensor:
    """Return the displacement of weights by the client's optimiser under given gradients.

    Parameters
    ----------
    gradients : sequence of Tensor, shape (...)
        One a local step.
    start : Tensor, shape broadcastable to (...)
        The weights before, which weight decay depends on.
    training : LocalTraining

    Returns
    -------
    Tensor, shape (...)
        The weights after minus those before.
    """
    before = start.expand_as(gradients[0])
    weights = nn.Parameter(before.clone())
    optimizer = create_optimizer({"classifier": weights}, training)
    for gradient in gradients:
        weights.grad = gradient
        optimizer.step()
    return weights.detach() - before


def _round(raw: Tensor, total: int) -> Tensor:
    """Return whole counts that sum to `total`, by largest remainder; negative ones become 0."""
    share = raw.double().clamp_min(0)
    share = share * (total / share.sum())
    counts = share.floor()
    missing = total - int(counts.sum())
    counts[(share - counts).argsort(descending=True, stable=True)[:missing]] += 1
    return counts.long()


def _idlg(head: _Head) -> Tensor:
    """Return one for every class whose gradient is negative (Zhao et al., 2020)."""
    counts = (head.average_gradient() < 0).long()
    if int(counts.sum()) != head.num_examples:
        raise ValueError(
            f"idlg found {int(counts.sum())} classes with a negative gradient for "
            f"{head.num_examples} images: it needs distinct labels; use llg, dlf or simulate"
        )
    return counts


def _llg(head: _Head) -> Tensor:
    """Return counts by subtracting one image's impact at a time (Wainakh et al., 2022).

    The impact is ``(1 + 1 / C) / N`` of the sum of the negative gradients.
    Every class with a negative gradient occurs; each further label is the class
    that is most negative then.
    """
    gradient = head.average_gradient()
    negative = gradient < 0
    impact = gradient[negative].sum() * (1 + 1 / len(gradient)) / head.num_examples
    counts = torch.zeros_like(gradient, dtype=torch.long)
    present = negative.nonzero().flatten()
    for c in present[gradient[present].argsort()][: head.num_examples]:
        counts[c] += 1
    gradient = gradient - impact * counts
    for _ in range(head.num_examples - int(counts.sum())):
        c = gradient.argmin()
        counts[c] += 1
        gradient[c] -= impact
    return counts


def _dlf(head: _Head) -> Tensor:
    """Return counts corrected for the model's output (Dimitrov et al., 2022).

    ``N p - N g / O`` with g the mean gradient over the steps, p the mean softmax
    and O the sum of the last hidden activations, both on random images and
    interpolated from w0 to w1 over the steps. A bias's gradient has O = 1.
    """
    steps = len(head.training.batches(head.num_examples))
    share = (steps - 1) / (2 * steps)  # the mean of k / K over the steps
    p, activation = torch.zeros(()), torch.zeros(())
    for weights, weight, part in (
        (head.w0, head.before, 1 - share),
        (head.w1, head.after, share),
    ):
        inputs = head.inputs(weights, head.images)
        p = p + part * (inputs @ weight.T).softmax(1).mean(0)
        activation = activation + part * inputs.sum(1).mean()
    if head.layer.bias is not None:
        activation = torch.ones(())
    return _round(head.num_examples * (p - head.average_gradient() / activation), head.num_examples)


class _Search:
    """Labels by local step whose simulated displacement of the last layer is the observed one.

    The gradient of class c in a step is ``mean_i p_ic h_i - sum_{y_i = c} h_i / B`` for
    last hidden activations h, with a one appended for the bias. Given p it depends on the
    class's own counts alone. So a class's displacement can be simulated for any sequence
    of its counts over the steps, on batches of random images in place of the private
    ones. They give every coordinate a distribution, and the sequence a likelihood of the
    observed displacement. Where Adam shows the signs of single steps, they count as well,
    see `_shown`. Sequences of all classes, whose counts sum to B in each step,
    are searched by annealing: one change gives one image of one step another label, or,
    where the counts over all steps are given, lets two images swap their labels. Either
    is a move of one class's counts over the batches and its reverse of another class's.
    Between sweeps p is simulated again with the labels found.

    Parameters
    ----------
    head : _Head
    observation : Observation
    knowledge : Knowledge
    given : Tensor of int64, shape (C,), optional
        The counts of each class over all steps, where they are known.
    """

    def __init__(
        self,
        head: _Head,
        observation: Observation,
        knowledge: Knowledge,
        given: Tensor | None = None,
    ) -> None:
        training, count = knowledge.client, observation.num_examples
        batches = training.batches(count)
        distinct = _distinct(training, count)
        self.head, self.training, self.generator = head, head.training, head.generator
        self.whole = training
        self.smoothing = training.label_smoothing
        self.sizes = [len(batch) for batch in distinct]
        self.batch_of = [distinct.index(batch) for batch in batches]
        one = torch.eye(len(distinct), dtype=torch.long)
        if given is None:
            self.labels, self.classes = None, torch.arange(len(head.before))
            self.moves = torch.cat([-one, one])
        else:
            self.labels, self.classes = torch.tensor(_labels(given)), given.nonzero().flatten()
            places = range(len(distinct))
            self.moves = torch.stack([one[b] - one[a] for a, b in permutations(places, 2)])
        self.reverse = (self.moves[:, None] == -self.moves).all(2).int().argmax(1)
        self.bias = head.layer.bias is not None
        self.features = self._features()
        self.seen = head.after - head.before
        self.columns = self._columns()
        self.shown = self._shown()
        self.sums = [
            self._cumulative(features[:, self.columns], self.sizes[batch])
            for features, batch in zip(self.features, self.batch_of, strict=True)
        ]
        shape = (len(batches), _SAMPLES, 1)
        self.noise = torch.randn(shape, generator=self.generator).to(head.before)
        self.likelihoods: dict[tuple[int, tuple[int, ...]], float] = {}

    def run(self) -> Tensor:
        """Return the likeliest counts found, by distinct batch and class: (batches, C), int64."""
        return max((self._anneal() for _ in range(_RESTARTS)), key=lambda found: found[0])[1]

    def _anneal(self) -> tuple[float, Tensor]:
        """Return the log likelihood of the counts found from random labels, and the counts."""
        counts = self._random_counts()
        for sweep in range(_SWEEPS):
            self._simulate(counts)
            self.likelihoods = {}
            gains = torch.stack([self._gains(counts, c) for c in self.classes.tolist()])
            temperature = _HOT * (1 - sweep / (_SWEEPS - 1))
            for _ in range(_CHANGES):
                # Class a makes a move, class b its reverse: (a, b, move).
                changes = gains[:, None] + gains[:, self.reverse]
                changes[range(len(gains)), range(len(gains))] = 0.0  # no change
                if temperature:
                    chances = (changes.flatten() / temperature).softmax(0)
                    change = int(torch.multinomial(chances, 1, generator=self.generator))
                else:
                    change = int(changes.argmax())
                index = torch.unravel_index(torch.tensor(change), changes.shape)
                a, b, chosen = (int(i) for i in index)
                if a == b:
                    if temperature:
                        continue
                    break
                move = self.moves[chosen]
                for place, moved in ((a, move), (b, -move)):
                    c = int(self.classes[place])
                    counts[:, c] += moved
                    gains[place] = self._gains(counts, c)
        total = sum(self.likelihoods[c, (*counts[:, c].tolist(),)] for c in self.classes.tolist())
        return total, counts

    def _simulate(self, counts: Tensor) -> None:
        """Simulate the softmax at each step under counts (batches, C), and how sure it is.

        Raises
        ------
        ValueError
            If the training diverges.
        """
        self.p = self._softmax(counts)
        drift = (self.p / self.p[0]).log().square().mean(1).sqrt()
        self.spread = _P_ERROR + _P_DRIFT * drift
        if not self.spread.isfinite().all():
            raise ValueError(f"the simulated training of {self.head.name} diverges")

    def _random_counts(self) -> Tensor:
        """Return counts by batch and class at random, shape (batches, C)."""
        if self.labels is None:
            return torch.stack([self._random_labels(size) for size in self.sizes])
        order = torch.randperm(len(self.labels), generator=self.generator)
        parts, classes = self.labels[order].split(self.sizes), len(self.seen)
        return torch.stack([part.bincount(minlength=classes) for part in parts])

    def _random_labels(self, size: int) -> Tensor:
        labels = torch.randint(len(self.head.before), (size,), generator=self.generator)
        return labels.bincount(minlength=len(self.head.before))

    def _features(self) -> list[Tensor]:
        """Return the layer's inputs on random images at each step, each shape (n, d).

        Between w0 and w1 their direction is about the client's, but they are too short,
        since Adam's first step multiplies the activations. So each step takes its size
        from a client simulated on random images and labels.
        """
        steps = len(self.batch_of)
        features = []
        for step, size in enumerate(self._sizes_of_features()):
            inputs = self.head.inputs(self.head.between(step / steps), self.head.images)
            hidden = inputs[:, : inputs.shape[1] - self.bias]
            hidden *= size / hidden.abs().mean().clamp_min(1e-12)
            features.append(inputs)
        return features

    def _sizes_of_features(self) -> list[float]:
        """Return the mean activation before each step of a client with random data."""
        model = self.head.model
        names = [name for name, _ in model.named_parameters()]
        model.load_state_dict({n: self.head.w0[n] for n in names}, strict=False)
        optimizer = create_optimizer(dict(model.named_parameters()), self.whole)
        means = []
        for batch in self.batch_of:
            size = self.sizes[batch]
            picks = torch.randint(len(self.head.images), (size,), generator=self.generator)
            images = self.head.images[picks.to(self.head.images.device)]
            inputs = self.head.inputs(dict(model.named_parameters()), images)
            means.append(float(inputs[:, : inputs.shape[1] - self.bias].abs().mean()))
            labels = torch.tensor(_labels(self._random_labels(size)), device=images.device)
            optimizer.zero_grad()
            local_loss(model, model(images), labels, self.whole).backward()
            optimizer.step()
        return means

    def _columns(self) -> Tensor:
        """Return the inputs to compare: some of those whose weights changed, and the bias."""
        hidden = self.seen.shape[1] - self.bias
        changed = (self.seen[:, :hidden] != 0).any(0).nonzero().flatten().cpu()
        part = changed[torch.randperm(len(changed), generator=self.generator)[:_MAX_FEATURES]]
        bias = torch.arange(hidden, self.seen.shape[1])
        return torch.cat([part, bias]).to(self.seen.device)

    def _shown(self) -> tuple[Tensor, Tensor, float]:
        """Return by batch what the columns that Adam changed in one step alone show of classes.

        The gradient of class c at input j is ``mean_i (p_ic - [y_i = c]) h_ij`` with
        activations h >= 0: it is negative only where an image of the class activates the
        input. Inputs that only one batch activates have updates of that step's length,
        see `single_step_rows`, whose signs are the gradient's. Of activations below 0, as
        those of a LayerNorm, nothing follows, nor where labels are smoothed.

        Returns
        -------
        columns : Tensor, shape (batches,)
            Such inputs; of many `_MOST_COLUMNS` count, since they are not independent.
        negative : Tensor, shape (batches, C)
            How many of them have a negative gradient, by class.
        share : float
            Estimated share of an image's chance to make such an input's gradient negative.
        """
        hidden = self.head.before.shape[1] - self.bias
        before, after = (w[:, :hidden].T for w in (self.head.before, self.head.after))
        updates, _, of_step = single_step_rows(
            before.contiguous(), after.contiguous(), self.training, len(self.batch_of)
        )
        negative_features = any(bool((f[:, :hidden] < 0).any()) for f in self.features)
        if negative_features or self.smoothing:
            of_step = torch.full_like(of_step, -1)
        columns = torch.zeros(len(self.sizes))
        negative = torch.zeros(len(self.sizes), len(self.head.before))
        for step, batch in enumerate(self.batch_of):
            rows = updates[of_step == step]
            columns[batch] += len(rows)
            negative[batch] += (rows < 0).sum(0).cpu()
        images = float((columns * torch.tensor(self.sizes)).sum())
        share = float(negative.sum()) / images if images else 0.5
        less = (_MOST_COLUMNS / columns.clamp(min=1)).clamp(max=1)
        return columns * less, negative * less[:, None], min(max(share, 0.1), 0.9)

    def _signs(self, c: int, table: Tensor) -> Tensor:
        """Return the log likelihood of a class's signs by sequence of its counts, see `_shown`.

        Each of n images of the class makes a gradient negative by the same chance s:
        ``1 - (1 - s)^n`` together.
        """
        columns, negative, share = self.shown
        chance = (1 - (1 - share) ** table).clamp(_FALSE_SIGN, 1 - _FALSE_SIGN)
        positive = columns - negative[:, c]
        return (negative[:, c] * chance.log() + positive * (1 - chance).log()).sum(1)

    def _cumulative(self, features: Tensor, size: int) -> Tensor:
        """Return sums over the first 0..B images of random batches, over B: (B + 1, M, d)."""
        picks = torch.randint(len(features), (size, _SAMPLES), generator=self.generator)
        sums = features[picks.to(features.device)].cumsum(0) / size
        return torch.cat([torch.zeros_like(sums[:1]), sums])

    @torch.no_grad()
    def _softmax(self, counts: Tensor) -> Tensor:
        """Return the mean softmax before each step, shape (K, C), under these counts."""
        layer = nn.Parameter(self.head.before.clone())
        optimizer = create_optimizer({self.head.name: layer}, self.training)
        means = []
        for inputs, batch in zip(self.features, self.batch_of, strict=True):
            p = (inputs @ layer.T).softmax(1)
            shares = counts[batch].to(layer) / self.sizes[batch]
            shares = (1 - self.smoothing) * shares + self.smoothing / len(shares)
            layer.grad = p.T @ inputs / len(inputs) - shares[:, None] * inputs.mean(0)
            optimizer.step()
            means.append(p.mean(0))
        return torch.stack(means)

    def _gains(self, counts: Tensor, c: int) -> Tensor:
        """Return the change of a class's log likelihood by each move, shape (moves,).

        It is -inf where a count would be below 0 or above B.
        """
        moved = counts[:, c] + self.moves
        allowed = ((moved >= 0) & (moved <= torch.tensor(self.sizes))).all(1)
        every = [tuple(row) for row in (counts[:, c].tolist(), *moved[allowed].tolist())]
        self._extend(c, [one for one in every if (c, one) not in self.likelihoods])
        values = torch.tensor([self.likelihoods[c, one] for one in every])
        gains = torch.full((len(self.moves),), -math.inf)
        gains[allowed] = values[1:] - values[0]
        return gains

    def _extend(self, c: int, sequences: list[tuple[int, ...]]) -> None:
        """Compute the log likelihoods of a class's sequences of counts.

        By coordinate a kernel density over the sampled displacements, and for the
        sequence the multinomial's ``-log n!``.
        """
        if not sequences:
            return
        table = torch.tensor(sequences)
        total = self._fit(c, table[:, None]) - torch.lgamma(table + 1.0).sum(1)
        total += self._signs(c, table)
        for sequence, value in zip(sequences, total.tolist(), strict=True):
            self.likelihoods[c, sequence] = value

    def _fit(self, c: int, table: Tensor) -> Tensor:
        """Return the log likelihood of a class's displacement by its counts, shape (sequences,).

        Parameters
        ----------
        c : int
        table : Tensor of int64, shape (sequences, samples, batches)
            One sample stands for all.
        """
        gradients = []
        for step, batch in enumerate(self.batch_of):
            sums = self.sums[step]
            p = self.p[step, c] * torch.exp(self.spread[step] * self.noise[step])
            p = p - self.smoothing / len(self.head.before)
            sample = torch.arange(sums.shape[1], device=sums.device)
            own = sums[table[..., batch].to(sums.device), sample]
            gradients.append(p * sums[-1] - (1 - self.smoothing) * own)
        start = self.head.before[c, self.columns]
        simulated = displacement(gradients, start, self.training)  # (sequences, samples, d)
        error = (simulated - self.seen[c, self.columns]).square()
        hidden = error.shape[-1] - self.bias
        rms = self.seen[:, self.columns].square().mean(0).sqrt()
        total = _FEATURE_WEIGHT * _density(
            error[..., :hidden],
            _FEATURE_WIDTH * rms[:hidden].square().mean().sqrt(),
            _FEATURE_FLOOR,
        ).sum(1)
        if self.bias:
            total += _density(error[..., hidden:], _BIAS_WIDTH * rms[hidden:], _BIAS_FLOOR).sum(1)
        return total.cpu()


class _Totals(_Search):
    """A client's label counts over all its local steps, without their order.

    The order's search grows with the cube of the steps. Here a class's count over all steps
    gets its likelihood as there, over samples that spread its images at random over the
    steps, and the likeliest counts that sum to N are found exactly, class by class. p is
    that of evenly spread counts, and simulated again with those found.
    """

    def totals(self) -> Tensor:
        """Return the likeliest counts found by class, shape (C,), int64."""
        places = torch.tensor(self.sizes).cumsum(0)
        every, classes = int(places[-1]), len(self.seen)
        counts = torch.full((classes,), every / classes)
        of_place = torch.repeat_interleave(torch.arange(len(self.sizes)), torch.tensor(self.sizes))
        for turn in range(_ROUNDS):
            self._simulate(counts / every * torch.tensor(self.sizes)[:, None])
            likely = []
            for c, count in enumerate(counts.tolist()):
                near = count + torch.linspace(-1, 1, _TOTALS) * every / _CLOSER**turn
                tried = near.round().clamp(0, every).long().unique()
                found = self._fit(c, self._spread(tried, of_place))
                likely.append(_interpolated(found, tried, every))
            counts = _likeliest(np.stack(likely), every).float()
        return counts.long()

    def _spread(self, totals: Tensor, of_place: Tensor) -> Tensor:
        """Return counts by batch of so many images at random places: (T, samples, batches)."""
        table = torch.zeros(len(totals), _SAMPLES, len(self.sizes), dtype=torch.long)
        for sample in range(_SAMPLES):
            order = of_place[torch.randperm(len(of_place), generator=self.generator)]
            for row, total in enumerate(totals.tolist()):
                table[row, sample] = order[:total].bincount(minlength=len(self.sizes))
        return table


def _interpolated(likely: Tensor, tried: Tensor, every: int) -> np.ndarray:
    """Return log likelihoods at all counts, shape (every + 1,), by those at the tried ones."""
    counts = np.arange(every + 1)
    beyond = np.abs(counts - counts.clip(int(tried[0]), int(tried[-1])))
    between = np.interp(counts, tried.numpy(), likely.double().numpy())
    return np.asarray(between - _BEYOND * beyond)


def _likeliest(likely: np.ndarray, every: int) -> Tensor:
    """Return the counts, one a class, that sum to `every` and whose log likelihoods sum highest.

    Class by class, the best of each sum so far is kept (dynamic programming).
    """
    best = np.full(every + 1, -np.inf)
    best[0] = 0.0
    choices = []
    for row in likely:
        # By sum s and the class's own count n: best[s - n] + row[n].
        padded = np.concatenate([np.full(every, -np.inf), best])
        before = np.lib.stride_tricks.sliding_window_view(padded, every + 1)[:, ::-1]
        sums = before + row
        choices.append(sums.argmax(1))
        best = sums.max(1)
    left, counts = every, []
    for choice in reversed(choices):
        counts.append(int(choice[left]))
        left -= counts[-1]
    return torch.tensor(counts[::-1])


def _density(error: Tensor, width: Tensor, floor: float) -> Tensor:
    """Return the log of a Gaussian kernel's mean over samples, shape (sequences, d)."""
    density = torch.logsumexp(-error / (2 * width.square()), 1) - math.log(error.shape[1])
    return torch.logaddexp(density, density.new_tensor(floor))
