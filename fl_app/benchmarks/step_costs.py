"""What a search along the trajectory costs: the notes below `flowleak bench speed`."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from client_app.training import normalise
from fl_app.benchmarks.case import Case
from fl_app.benchmarks.clients import draw_client
from fl_app.config import AttackConfig
from fl_app.data import ImageSet
from fl_app.models import known_model
from fl_app.protocol import Budget, DatasetInfo, Knowledge, LocalTraining, Observation
from server_strategies.attacks.attack import Task
from server_strategies.attacks.flow_matching import FlowMatching
from server_strategies.attacks.matching import matching_objective
from server_strategies.attacks.optimise import EXCHANGES, prior_slope
from server_strategies.priors.flow import load_flow

_TURNS = 7
_SIDE = 1024  # of the matrices whose product is the measure of the core
_PROGRESS = 0.5


@dataclass(frozen=True)
class StepCosts:
    """CPU seconds, each the median of turns that alternate.

    Attributes
    ----------
    client : str
    plain : float
        One gradient of a plain simulation: one autograd graph over all local steps.
    matching : float
        Ours of the same loss.
    iteration : float
        A whole one of `flow_matching` by its defaults.
    denoiser : float
        The image priors' part of it.
    exchange : float
        The part that looks for a better order of the images.
    flops : float
        Floating-point operations of the plain simulation.
    peak : float
        Operations a second of a product of matrices.
    """

    client: str
    plain: float
    matching: float
    iteration: float
    denoiser: float
    exchange: float
    flops: float
    peak: float

    def line(self) -> str:
        """Return the costs in a sentence."""
        share = self.flops / self.matching / self.peak
        return (
            f"{self.client}: the gradient of the matching loss takes "
            f"{self.matching / self.plain:.2f} of a plain simulation's {1000 * self.plain:.0f} ms, "
            f"{share:.0%} of the core's {self.peak / 1e9:.0f} GFLOP/s. With ReLU smoothing, "
            f"priors ({self.denoiser / self.plain:.2f}) and exchanges "
            f"({self.exchange / self.plain:.2f}) an iteration takes "
            f"{self.iteration / self.plain:.2f}."
        )


def step_costs(info: DatasetInfo, images: ImageSet, training: LocalTraining) -> StepCosts:
    """Measure a client's search, in this process's CPU seconds.

    Parameters
    ----------
    info : DatasetInfo
    images : ImageSet
        To draw the client's images from.
    training : LocalTraining
    """
    case = Case(training, AttackConfig(), labels="by-step")
    observation, knowledge, truth = draw_client(case, images, info, 0)
    x = normalise(truth.images, knowledge.mean, knowledge.std).flip(0).requires_grad_()
    pixels = truth.images.flip(0)
    plain = PlainSimulation(observation, knowledge)
    exact = matching_objective("trajectory", observation, knowledge, distance="squared")
    task = Task(observation, knowledge, load_flow("compact"), Budget())
    parts = FlowMatching(matching="trajectory").parts(task)
    used, every = parts.matching, int(parts.chosen["every"])

    def core() -> None:
        torch.mm(square, square)

    def exchange() -> None:
        with torch.no_grad():
            used(x, _PROGRESS)

    square = torch.randn(_SIDE, _SIDE)
    work: dict[str, Callable[[], object]] = {
        "plain": lambda: torch.autograd.grad(plain(x), x),
        "matching": lambda: torch.autograd.grad(exact(x, _PROGRESS), x),
        "used": lambda: torch.autograd.grad(used(x, _PROGRESS), x),
        # It runs in one of so many iterations.
        "denoiser": lambda: [prior_slope(parts.priors, pixels, _PROGRESS) for _ in range(every)],
        "exchange": exchange,
        "core": core,
    }
    with FlopCounterMode(display=False) as counter:
        work["plain"]()
    for each in work.values():
        each()
    turns = [{name: _cpu_seconds(each) for name, each in work.items()} for _ in range(_TURNS)]
    spent = {name: statistics.median(turn[name] for turn in turns) for name in work}
    priors = spent["denoiser"] / every
    looks = spent["exchange"] / EXCHANGES if used.reassignments() else 0.0
    return StepCosts(
        client=case.client,
        plain=spent["plain"],
        matching=spent["matching"],
        iteration=spent["used"] + priors + looks,
        denoiser=priors,
        exchange=looks,
        flops=float(counter.get_total_flops()),
        peak=2.0 * _SIDE**3 / spent["core"],
    )


def _cpu_seconds(work: Callable[[], object]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


class PlainSimulation:
    """The squared distance of K local steps of SGD, by one autograd graph over all of them.

    As published attacks simulate a client: each step's gradient with a graph, and the weights
    after it as new tensors (such as Dimitrov et al., 2022).
    """

    def __init__(self, observation: Observation, knowledge: Knowledge) -> None:
        self.model, self.lr = known_model(knowledge), knowledge.client.lr
        self.w0 = {name: observation.w0[name] for name, _ in self.model.named_parameters()}
        self.seen = {name: observation.w1[name] - w for name, w in self.w0.items()}
        self.labels = torch.tensor(knowledge.labels)
        batches = knowledge.client.batches(observation.num_examples)
        self.batches = [list(batch) for batch in batches]

    def __call__(self, x: Tensor) -> Tensor:
        """Return the distance, shape (), of normalised images (N, C, H, W)."""
        w = {name: before.clone().requires_grad_() for name, before in self.w0.items()}
        for batch in self.batches:
            loss = F.cross_entropy(functional_call(self.model, w, (x[batch],)), self.labels[batch])
            gradient = torch.autograd.grad(loss, list(w.values()), create_graph=True)
            w = {name: w[name] - self.lr * g for name, g in zip(w, gradient, strict=True)}
        apart = [(w[name] - before - self.seen[name]) ** 2 for name, before in self.w0.items()]
        size = torch.stack([(seen**2).sum() for seen in self.seen.values()]).sum()
        return torch.stack([part.sum() for part in apart]).sum() / size
