"""The optimiser's trajectory: the client's own K local steps, simulated differentiably."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from fl_app.protocol import Knowledge, LocalTraining, Observation
from server_strategies.attacks.explain.distance import CosineDistance

BETA1, BETA2, EPS = 0.9, 0.999, 1e-8  # torch.optim's defaults, which Flower's clients use


class AdamStep(torch.autograd.Function):
    """One step of Adam on one tensor, with its gradient written out.

    With ``m' = b1 m + (1 - b1) g``, ``v' = b2 v + (1 - b2) g^2`` and
    ``D = sqrt(v' / c2 + s^2) + eps``: ``w' = w - (lr / c1) m' / D``, where c1 and
    c2 are the bias corrections. s = 0 is Adam itself, which is nearly the sign
    of g: its slope is useless, so an attack smooths it with s > 0.

    Elementwise work on every weight is most of what a simulated step costs, and
    it is bound by memory. So all of a step is done on one piece of the tensor
    after the other, each small enough to stay in the cache.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, w: Tensor, g: Tensor, m: Tensor, v: Tensor, s: Tensor, lr: float, step: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return w', m', v'."""
        c1, c2 = 1 - BETA1**step, 1 - BETA2**step
        new_w, new_m, new_v, root = (torch.empty_like(w) for _ in range(4))
        floor = s.square()
        for w_, g_, m_, v_, new_w_, new_m_, new_v_, root_ in _pieces(
            w, g, m, v, new_w, new_m, new_v, root
        ):
            torch.lerp(m_, g_, 1 - BETA1, out=new_m_)
            torch.mul(v_, BETA2, out=new_v_).addcmul_(g_, g_, value=1 - BETA2)
            torch.div(new_v_, c2, out=root_).add_(floor).sqrt_()
            torch.addcdiv(w_, new_m_, root_ + EPS, value=-lr / c1, out=new_w_)
        ctx.save_for_backward(g, new_m, root)
        ctx.rate, ctx.c2 = lr / c1, c2
        return new_w, new_m, new_v

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, dw: Tensor, dm: Tensor, dv: Tensor
    ) -> tuple[Tensor | None, ...]:
        """Return the gradients of w, g, m and v."""
        g, m, root = ctx.saved_tensors
        dg, old_dm, old_dv = (torch.empty_like(g) for _ in range(3))
        for g_, m_, root_, dw_, dm_, dv_, dg_, old_dm_, old_dv_ in _pieces(
            g, m, root, dw, dm, dv, dg, old_dm, old_dv
        ):
            scale = root_ + EPS
            pull = (dw_ * -ctx.rate).div_(scale)
            # dD/dv' = 1 / (2 c2 root); where root is 0, m is 0 too and nothing pulls.
            slope = (pull * m_).div_(scale).div_(root_.clamp_min(1e-30))
            torch.add(dv_, slope, alpha=-0.5 / ctx.c2, out=old_dv_)
            torch.add(dm_, pull, out=old_dm_).mul_(1 - BETA1)
            torch.addcmul(old_dm_, g_, old_dv_, value=2 * (1 - BETA2), out=dg_)
            old_dm_.mul_(BETA1 / (1 - BETA1))
            old_dv_.mul_(BETA2)
        return dw, dg, old_dm, old_dv, None, None, None


def _pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield the same stretch of every tensor, flat, short enough for the cache on a CPU."""
    size = 1 << 15 if tensors[0].device.type == "cpu" else tensors[0].numel()
    return zip(*(tensor.reshape(-1).split(size) for tensor in tensors), strict=True)


def simulate(
    model: nn.Module,
    w0: dict[str, Tensor],
    batches: Sequence[tuple[Tensor, Tensor]],
    training: LocalTraining,
    smoothing: float = 0.0,
) -> dict[str, Tensor]:
    """Train locally as the client does, differentiably in the batches.

    Parameters
    ----------
    model : nn.Module
        Gives the architecture; its own weights are not read.
    w0 : dict of str to Tensor
        Start, by parameter name.
    batches : sequence of (Tensor (B, C, H, W), Tensor (B,))
        Normalised images and labels of each local step, in order.
    training : LocalTraining
    smoothing : float
        r in ``s = r mean|g|``, by tensor and step, which is added (as a root of
        squares) to Adam's denominator. 0: exactly the client's arithmetic.

    Returns
    -------
    dict of str to Tensor
        The weights after the last step.
    """
    names, weights = list(w0), [w.detach().requires_grad_() for w in w0.values()]
    first = [torch.zeros_like(w) for w in weights]
    second = [torch.zeros_like(w) for w in weights]
    lr, decay = training.lr, training.weight_decay
    for step, (x, y) in enumerate(batches, start=1):
        logits = functional_call(model, dict(zip(names, weights, strict=True)), (x,))
        loss = F.cross_entropy(logits, y)
        gradient = list(torch.autograd.grad(loss, weights, create_graph=True))
        if decay and training.optimizer == "adamw":
            weights = [w * (1 - lr * decay) for w in weights]
        elif decay:
            gradient = [g + decay * w for g, w in zip(gradient, weights, strict=True)]
        for i, g in enumerate(gradient):
            if training.optimizer == "sgd":
                # torch's first momentum buffer is the gradient itself, as from zeros.
                first[i] = training.momentum * first[i] + g
                descent = g + training.momentum * first[i] if training.nesterov else first[i]
                weights[i] = weights[i] - lr * descent
            else:
                scale = smoothing * torch.linalg.vector_norm(g.detach(), 1) / g.numel()
                weights[i], first[i], second[i] = AdamStep.apply(
                    weights[i], g, first[i], second[i], scale, lr, step
                )
    return dict(zip(names, weights, strict=True))


class Trajectory:
    """The cosine distance between the simulated and the observed displacement.

    ``1 - cos(w_K(x) - w0, w1 - w0)`` over all parameters as one vector. A
    published idea for SGD (Dimitrov et al., 2022), here with the client's own
    optimiser and a smoothed Adam.

    Parameters
    ----------
    model : nn.Module
        On the device to work on; its weights are not read.
    observation : Observation
    knowledge : Knowledge
        With labels, in training order.
    reason : str
        Why this explanation was chosen.
    smoothing : float
        See `simulate`.
    """

    name = "trajectory"

    def __init__(
        self,
        model: nn.Module,
        observation: Observation,
        knowledge: Knowledge,
        reason: str,
        smoothing: float = 0.1,
    ) -> None:
        self.reason = reason
        reference = next(model.parameters())
        self.model, self.training, self.smoothing = model, knowledge.training, smoothing
        self.w0 = {n: observation.w0[n].to(reference) for n, _ in model.named_parameters()}
        displacement = [observation.w1[name].to(w) - w for name, w in self.w0.items()]
        self.distance = CosineDistance(displacement)
        self.labels = torch.tensor(knowledge.labels, device=reference.device)
        self.batches = [
            torch.tensor(batch, device=reference.device)
            for batch in self.training.batches(observation.num_examples)
        ]
        self.unknowns: list[Tensor] = []

    def __call__(self, x: Tensor) -> Tensor:
        """Return the cosine distance, shape (), of normalised images (N, C, H, W)."""
        batches = [(x[batch], self.labels[batch]) for batch in self.batches]
        weights = simulate(self.model, self.w0, batches, self.training, self.smoothing)
        return self.distance([weights[name] - w for name, w in self.w0.items()])
