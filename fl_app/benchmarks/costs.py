"""What an iteration costs: the notes below `flowleak bench matching` and `prior`."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from client_app.training import normalise
from fl_app.benchmarks.case import Case
from fl_app.benchmarks.clients import draw_client
from fl_app.config import AttackConfig, PriorConfig
from fl_app.data import ImageSet
from fl_app.models import known_model
from fl_app.protocol import DatasetInfo, Knowledge, LocalTraining, Observation
from server_strategies.attacks.flow_matching import FlowMatching
from server_strategies.attacks.matching import matching_objective
from server_strategies.priors.flow import FlowPrior, load_flow

_TURNS = 5
_PROGRESS = (0.1, 0.3, 0.5, 0.7, 0.9)  # of the attack, in the iterations of a turn


def surrogate_speedup(info: DatasetInfo, images: ImageSet, batch_size: int) -> float:
    """Return how many iterations our surrogate makes in the time of one of a plain loop.

    Both give the gradients of the same loss in the images and in alpha, for a
    client with SGD and K = 5. They take turns, so that a busy machine slows both.

    Parameters
    ----------
    info : DatasetInfo
    images : ImageSet
        To draw the client's images from.
    batch_size : int
        B.
    """
    training = LocalTraining("sgd", lr=0.01, batch_size=batch_size)
    observation, knowledge, truth = draw_client(Case(training, AttackConfig()), images, info, 0)
    x = normalise(truth.images, knowledge.mean, knowledge.std).flip(0).requires_grad_()
    surrogate = matching_objective("surrogate", observation, knowledge)
    alpha = surrogate.unknowns[0].value
    plain = PlainSurrogate(observation, knowledge)

    def ours(progress: float) -> None:
        torch.autograd.grad(surrogate(x, progress), [x, alpha])

    def theirs(progress: float) -> None:
        plain.gradients(x, 0.5)

    return _time_ratio(theirs, ours)


def prior_cost(
    info: DatasetInfo, images: ImageSet, training: LocalTraining, prior: PriorConfig
) -> float:
    """Return the time of the flow prior's step as a share of the matching step's.

    Both with the defaults of flow_matching, on the CPU, and each with its
    gradient in the images, averaged over an attack's progress: single-step
    gradient rows are matched in a fraction of the time of the trajectory that follows. They take
    turns, as in `surrogate_speedup`.

    Parameters
    ----------
    info, images
        See `surrogate_speedup`.
    training : LocalTraining
    prior : PriorConfig
    """
    observation, knowledge, truth = draw_client(Case(training, AttackConfig()), images, info, 0)
    pixels = truth.images.flip(0)
    x = normalise(pixels, knowledge.mean, knowledge.std).requires_grad_()
    pixels.requires_grad_()
    chosen = FlowMatching(matching="trajectory", t_start=0.8, every=1)
    objective = matching_objective(chosen.matching, observation, knowledge)
    unknowns = [unknown.value for unknown in objective.unknowns]
    generator = torch.Generator().manual_seed(0)
    names = ("mode", "t_start", "t_end", "every", "draws")
    flow = FlowPrior(
        load_flow(prior.weights),
        chosen.flow,
        generator=generator,
        **{name: getattr(chosen, name) for name in names},
    )

    def matching(progress: float) -> None:
        torch.autograd.grad(objective(x, progress), [x, *unknowns], allow_unused=True)

    def prior_step(progress: float) -> None:
        torch.autograd.grad(flow(pixels, progress), pixels)

    return _time_ratio(prior_step, matching)


def _time_ratio(step: Callable[[float], None], other: Callable[[float], None]) -> float:
    """Return a step's time in units of another's, the median of turns that alternate."""
    _seconds(step), _seconds(other)
    turns = [(_seconds(step), _seconds(other)) for _ in range(_TURNS)]
    times, others = (statistics.median(column) for column in zip(*turns, strict=True))
    return times / others


def _seconds(step: Callable[[float], None]) -> float:
    began = time.perf_counter()
    for progress in _PROGRESS:
        step(progress)
    return time.perf_counter() - began


class PlainSurrogate:
    """SME's matching loss in a loop over the parameters, as its recipe is published.

    A model whose weights are set to ``(1 - a) w0 + a w1``, its gradient with a
    graph, dot product and norm summed parameter by parameter; the gradient in a
    by the chain rule through that in the weights (Zhu et al., 2023).
    """

    def __init__(self, observation: Observation, knowledge: Knowledge) -> None:
        self.model = known_model(knowledge)
        names = [name for name, _ in self.model.named_parameters()]
        self.w0 = [observation.w0[name] for name in names]
        self.w1 = [observation.w1[name] for name in names]
        self.labels = torch.tensor(knowledge.labels)
        length = sum((a - b).square().sum() for a, b in zip(self.w0, self.w1, strict=True)) ** 0.5
        self.target = [(a - b) / length for a, b in zip(self.w0, self.w1, strict=True)]

    def gradients(self, x: Tensor, alpha: float) -> tuple[Tensor, float]:
        """Return the loss's gradients in the images and in alpha."""
        parameters = list(self.model.parameters())
        for parameter, before, after in zip(parameters, self.w0, self.w1, strict=True):
            parameter.data = (1 - alpha) * before + alpha * after
        loss = F.cross_entropy(self.model(x), self.labels)
        gradient = torch.autograd.grad(loss, parameters, create_graph=True)
        square = sum((part**2).sum() for part in gradient)
        agreement = torch.zeros(())
        for part, target in zip(gradient, self.target, strict=True):
            agreement = agreement + (part / square**0.5 * target).sum()
        on_x, *on_weights = torch.autograd.grad(1 - agreement, [x, *parameters])
        on_alpha = 0.0
        for part, before, after in zip(on_weights, self.w0, self.w1, strict=True):
            on_alpha += (part * (after - before)).sum().item()
        return on_x, on_alpha
