"""How much a reconstruction reveals: every metric after one linear assignment."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from scipy.optimize import linear_sum_assignment
from skimage.metrics import structural_similarity
from torch import Tensor

from fl_app.audit.exposure import MAX_PSNR, RECOGNISABLE, summary_of
from fl_app.audit.identification import Identification, Identify, nothing_to_tell_from
from fl_app.audit.truth import Truth
from fl_app.models import known_model, model_features
from fl_app.protocol import Knowledge, Observation, Reconstruction

_SSIM_WINDOW = 11  # pixels a side: sigma 1.5, cut at 3.5 sigma

# Takes reconstructed and true images, both (N, C, H, W) in [0, 1]; returns N values.
Measure = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class MetricScore:
    """One metric of one reconstruction.

    Attributes
    ----------
    values : tuple of float
        One for each private image, in training order.
    mean : float
        It has no interval: a client's images are all there are of them.
    median, worst_tenth : float or None
        See `summary_of`.
    baseline : float
        The metric's mean if every reconstruction were the data set's mean colour: the
        mean-colour baseline, known without an attack.
    """

    values: tuple[float, ...]
    mean: float
    median: float | None
    worst_tenth: float | None
    baseline: float

    @classmethod
    def of(cls, metric: str, values: Sequence[float], baseline: float) -> MetricScore:
        """Return the score of a metric's values; there is at least one."""
        mean = math.fsum(values) / len(values)
        return cls(tuple(values), mean, **summary_of(metric, values), baseline=baseline)


@dataclass(frozen=True)
class Leakage:
    """One scored reconstruction.

    Attributes
    ----------
    assignment : tuple of int
        For each private image the index of the reconstruction assigned to it;
        one assignment serves all metrics.
    metrics : mapping of str to MetricScore or None
        psnr (dB), ssim, lpips_vgg, lpips_alex, mse, fmse and tv; None where a
        metric is missing.
    psnr_by_step : tuple of (float or None)
        For each local step the mean PSNR of the images first used in it; None
        where a step uses no new image.
    determined : tuple of (float or None)
        For each private image, as `Reconstruction.determined`; empty where that is.
    single_colour : tuple of float
        For each private image the PSNR in dB of its own mean colour, the best that an
        image of one colour can have: what is below shows no structure.
    recognisable : tuple of bool or None
        For each private image whether its SSIM is above `RECOGNISABLE`; None where there
        is no SSIM.
    recognisable_chance : float or None
        Share of the images that the mean-colour baseline is recognisable as.
    identification : Identification or None
        Which private images are identified; None where there is nothing to tell them from.
    label_accuracy, label_chance : float or None
        Share of the private images whose label the attack inferred, and the best
        expected without the update; None where the labels were given.
    reasons : mapping of str to str
        Why a field is None, by the field's or metric's name.
    """

    assignment: tuple[int, ...]
    metrics: Mapping[str, MetricScore | None]
    psnr_by_step: tuple[float | None, ...]
    single_colour: tuple[float, ...]
    determined: tuple[float | None, ...]
    recognisable: tuple[bool, ...] | None = None
    recognisable_chance: float | None = None
    identification: Identification | None = None
    label_accuracy: float | None = None
    label_chance: float | None = None
    reasons: Mapping[str, str] = field(default_factory=dict)


def assign(reconstructed: Tensor, true: Tensor) -> Tensor:
    """Match reconstructions to private images, one to one, with the least total MSE.

    Parameters
    ----------
    reconstructed, true : Tensor, shape (N, C, H, W)

    Returns
    -------
    Tensor of int64, shape (N,)
        ``reconstructed[result]`` is in the order of `true`.

    Raises
    ------
    ValueError
        If the shapes differ.
    """
    if reconstructed.shape != true.shape:
        raise ValueError(
            f"the reconstruction has shape {tuple(reconstructed.shape)}, "
            f"the private images {tuple(true.shape)}; they must be equal"
        )
    cost = torch.cdist(true.flatten(1).double(), reconstructed.flatten(1).double()) ** 2
    return torch.from_numpy(linear_sum_assignment(cost.cpu().numpy())[1])


def mse(images: Tensor, others: Tensor) -> Tensor:
    """Return the mean squared error of each pair of images, shape (N,)."""
    return (images.double() - others.double()).square().flatten(1).mean(1)


def psnr(images: Tensor, others: Tensor) -> Tensor:
    """Return ``10 log10(1 / MSE)`` in dB for each pair of images in [0, 1], at most 100."""
    return (-10 * mse(images, others).log10()).clamp(max=MAX_PSNR)


def ssim(images: Tensor, others: Tensor) -> Tensor:
    """Return the structural similarity of each pair of images in [0, 1].

    Gaussian window of sigma 1.5 over 11 x 11 pixels, population covariance
    (Wang et al., 2004), mean over channels.

    Raises
    ------
    ValueError
        If a side of the images is below 11 pixels.
    """
    if min(images.shape[-2:]) < _SSIM_WINDOW:
        raise ValueError(
            f"images are {tuple(images.shape[-2:])}; SSIM needs sides of {_SSIM_WINDOW} or more"
        )
    values = [
        structural_similarity(
            a, b, channel_axis=0, data_range=1.0,
            gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
        )
        for a, b in zip(images.double().numpy(), others.double().numpy(), strict=True)
    ]  # fmt: skip
    return torch.tensor(values, dtype=torch.float64)


def total_variation(images: Tensor, others: Tensor) -> Tensor:
    """Return ``mean |dx| + mean |dy|`` of `images` in [0, 1]; `others` does not enter."""
    dx = images.diff(dim=-1).abs().flatten(1).mean(1)
    dy = images.diff(dim=-2).abs().flatten(1).mean(1)
    return dx + dy


def feature_mse(features: Callable[[Tensor], Tensor]) -> Measure:
    """Return the measure FMSE: the MSE between the target model's features of two images.

    Parameters
    ----------
    features : callable
        Maps images (N, C, H, W) in [0, 1] to features (N, ...).
    """

    @torch.no_grad()
    def fmse(images: Tensor, others: Tensor) -> Tensor:
        return mse(features(images), features(others))

    return fmse


def target_features(observation: Observation, knowledge: Knowledge) -> Callable[[Tensor], Tensor]:
    """Return the features, on images in [0, 1], of the model that the client was sent.

    Raises
    ------
    RuntimeError
        If w0 does not fit the model.
    """
    model = known_model(knowledge)
    model.load_state_dict(dict(observation.w0), strict=isinstance(knowledge.model, str))
    model.eval()
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (knowledge.mean, knowledge.std))
    before_classifier = model_features(knowledge, model)
    return lambda images: before_classifier((images - mean) / std)


MEASURES: dict[str, Measure] = {"psnr": psnr, "ssim": ssim, "mse": mse, "tv": total_variation}


def score(
    reconstruction: Reconstruction,
    truth: Truth,
    mean: Sequence[float],
    measures: Mapping[str, Measure] = MEASURES,
    reasons: Mapping[str, str] | None = None,
    num_classes: int | None = None,
    identify: Identify = nothing_to_tell_from,
) -> Leakage:
    """Score a reconstruction against what the client really trained on.

    Parameters
    ----------
    reconstruction : Reconstruction
        Its images in any order.
    truth : Truth
    mean : sequence of float
        The data set's mean colour in [0, 1], one a channel.
    measures : mapping of str to Measure
        Metrics by name. One that raises ValueError gives None and its message.
    reasons : mapping of str to str, optional
        Missing metrics, and why; they appear as None.
    num_classes : int, optional
        For the accuracy of inferred labels; not read where they were given.
    identify : Identify
        Tells which private images are identified. Its ValueError or OSError is the reason
        why none is identified.

    Raises
    ------
    ValueError
        As `assign` and `check_images`.
    """
    true = truth.images.detach().cpu().float()
    images = reconstruction.images.detach().cpu().float()
    check_images(images, reconstruction.labels)
    order = assign(images, true)
    images = images[order].clamp(0, 1)
    mean_colour = torch.tensor(mean).view(-1, 1, 1).expand_as(true)

    metrics, why = _metrics(images, true, mean_colour, measures)
    metrics |= dict.fromkeys(reasons or {})
    why |= reasons or {}
    own_colour = true.mean((2, 3), keepdim=True).expand_as(true)
    recognisable = recognisable_chance = identification = None
    try:
        recognisable = _recognisable(images, true)
        recognisable_chance = sum(_recognisable(mean_colour, true)) / len(true)
    except ValueError as error:
        why |= dict.fromkeys(("recognisable", "recognisable_chance"), str(error))
    try:
        identification = identify(images, true, truth.labels)
    except (ValueError, OSError) as error:  # of the data set, too
        why["identification"] = str(error)

    by_step = _by_step(psnr(images, true).tolist(), truth.batches)
    if None in by_step:
        why["psnr_by_step"] = "null where a step trains on no new image"
    accuracy = chance = None
    if reconstruction.labels_level != "unknown":
        why |= dict.fromkeys(
            ("label_accuracy", "label_chance"), f"labels were given: {reconstruction.labels_level}"
        )
    elif num_classes is None:
        why |= dict.fromkeys(("label_accuracy", "label_chance"), "number of classes not said")
    else:
        counts = torch.tensor(reconstruction.labels).bincount(minlength=num_classes)
        accuracy = label_accuracy(counts, truth.labels)
        chance = label_chance(truth.labels, num_classes)
    return Leakage(
        assignment=tuple(order.tolist()),
        metrics=metrics,
        psnr_by_step=by_step,
        single_colour=tuple(psnr(own_colour, true).tolist()),
        determined=tuple(reconstruction.determined[i] for i in order.tolist())
        if reconstruction.determined
        else (),
        recognisable=recognisable,
        recognisable_chance=recognisable_chance,
        identification=identification,
        label_accuracy=accuracy,
        label_chance=chance,
        reasons=why,
    )


def _metrics(
    images: Tensor, true: Tensor, mean_colour: Tensor, measures: Mapping[str, Measure]
) -> tuple[dict[str, MetricScore | None], dict[str, str]]:
    """Return the scores, None for a metric that can't be had, and why it can't."""
    metrics: dict[str, MetricScore | None] = {}
    why: dict[str, str] = {}
    for name, measure in measures.items():
        try:
            values = measure(images, true).tolist()
            baseline = float(measure(mean_colour, true).mean())
        except ValueError as error:
            metrics[name], why[name] = None, str(error)
            continue
        metrics[name] = MetricScore.of(name, values, baseline)
    return metrics, why


def _recognisable(images: Tensor, true: Tensor) -> tuple[bool, ...]:
    return tuple((ssim(images, true) > RECOGNISABLE).tolist())


def label_accuracy(counts: Tensor, true_labels: Sequence[int]) -> float:
    """Return the share of images whose label was inferred, ``sum_c min(n_c, true_c) / N``.

    Parameters
    ----------
    counts : Tensor of int, shape (C,)
        Estimated images of each class, N in all.
    true_labels : sequence of int
        N labels in [0, C), in any order.

    Raises
    ------
    ValueError
        If the counts are not of N images, or a label is no class.
    """
    if not true_labels or int(counts.sum()) != len(true_labels):
        raise ValueError(f"{int(counts.sum())} labels inferred for {len(true_labels)} images")
    return float(torch.minimum(counts, _counts(true_labels, len(counts))).sum()) / len(true_labels)


def label_chance(true_labels: Sequence[int], num_classes: int) -> float:
    """Return the expected `label_accuracy` of the best guess without the update.

    With classes equally likely the best counts are equal: ``q = floor(N / C)``
    of each, and one more of ``r = N mod C`` classes drawn at random. Class c is
    then expected to have ``(1 - r/C) min(q, true_c) + r/C min(q + 1, true_c)``
    images guessed right.

    Parameters
    ----------
    true_labels : sequence of int
        N labels in [0, num_classes).
    num_classes : int
        C.

    Raises
    ------
    ValueError
        If there is no label, or one is no class.
    """
    if not true_labels:
        raise ValueError("no labels: chance needs at least one")
    true = _counts(true_labels, num_classes)
    each, rest = divmod(len(true_labels), num_classes)
    expected = torch.lerp(
        true.clamp(max=each).double(), true.clamp(max=each + 1).double(), rest / num_classes
    )
    return float(expected.sum()) / len(true_labels)


def _counts(labels: Sequence[int], num_classes: int) -> Tensor:
    if not 0 <= min(labels) <= max(labels) < num_classes:
        raise ValueError(
            f"labels from {min(labels)} to {max(labels)}; allowed: 0 to {num_classes - 1}"
        )
    return torch.tensor(labels).bincount(minlength=num_classes)


def check_images(images: Tensor, labels: Sequence[int]) -> None:
    """Refuse a reconstruction that is not N labelled images in [0, 1].

    Raises
    ------
    ValueError
        If it holds no image, a value that is not finite or out of range, or
        another number of labels than of images.
    """
    if not images.numel():
        raise ValueError(f"the reconstruction holds no image: its shape is {tuple(images.shape)}")
    if len(labels) != len(images):
        raise ValueError(f"the reconstruction has {len(labels)} labels for {len(images)} images")
    if not images.isfinite().all():
        raise ValueError("the reconstruction holds values that are not finite")
    low, high = float(images.min()), float(images.max())
    if low < -1e-4 or high > 1 + 1e-4:  # beyond rounding
        raise ValueError(f"the reconstruction's pixels span {low:.4g} to {high:.4g}; allowed: 0..1")


def _by_step(values: Sequence[float], batches: Sequence[Sequence[int]]) -> tuple[float | None, ...]:
    seen: set[int] = set()
    means: list[float | None] = []
    for batch in batches:
        new = set(batch) - seen
        seen |= new
        means.append(sum(values[i] for i in new) / len(new) if new else None)
    return tuple(means)
