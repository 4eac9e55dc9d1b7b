"""The clients' optimisers, with the derivatives of their steps.

Their arithmetic is elementwise and bound by memory, so its derivative is written out and
done in place, where it is one of the usual optimisers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from math import sqrt
from typing import Any, Protocol

import torch
from torch import Tensor

from fl_app.protocol import LocalTraining
from fl_app.protocol.optimizer import create_optimizer

BETA1, BETA2, EPS = 0.9, 0.999, 1e-8  # torch.optim's defaults, which Flower's clients use
_TINY = 1e-15  # a gradient whose square is no zero in float32


class Optimizer(Protocol):
    """A client's optimiser: all steps forwards, then the adjoints of all steps in reverse."""

    def step(self, w: Sequence[Tensor], g: Sequence[Tensor]) -> list[Tensor]:
        """Return the weights after one step from `w` along the gradient `g`."""
        ...

    def step_back(self, dw: list[Tensor]) -> list[Tensor]:
        """Propagate the adjoints through the last step that is not yet propagated.

        Turns `dw`, the loss's gradient in the weights after the step, in place into
        its direct part in the weights before, and returns the gradient in g.
        """
        ...


class Sgd:
    """SGD with momentum: ``m' = mu m + g``, ``w' = w - lr m'`` (Nesterov: ``g + mu m'``).

    From the second step on m' has ``(1 - dampening) g``, as in `torch.optim`, whose own SGD
    has no derivative of the first.
    """

    def __init__(self, training: LocalTraining) -> None:
        self.training, self.nesterov = training, training.nesterov
        self.momentum, self.decay = training.momentum, training.weight_decay
        options: dict[str, Any] = dict(training.optimizer_options)
        self.dampening: float = options.get("dampening", 0.0)
        self.maximize: bool = options.get("maximize", False)
        self.count = 0  # steps made, and not propagated
        self.m: list[Tensor] = []
        self.dm: list[Tensor] = []

    def step(self, w: Sequence[Tensor], g: Sequence[Tensor]) -> list[Tensor]:
        """See `Optimizer`."""
        lr = self.training.lr * self.training.factor(self.count)
        kept = 1 - self.dampening if self.count else 1.0
        self.count += 1
        if self.maximize:
            g = [-g_ for g_ in g]
        if self.decay:
            g = [g_ + self.decay * w_ for g_, w_ in zip(g, w, strict=True)]
        if not self.momentum:
            return [torch.add(w_, g_, alpha=-lr) for w_, g_ in zip(w, g, strict=True)]
        # torch's first momentum buffer is the gradient itself, as from zeros.
        before = self.m or [torch.zeros_like(g_) for g_ in g]
        new = g if kept == 1 else [kept * g_ for g_ in g]
        self.m = [torch.add(g_, m, alpha=self.momentum) for g_, m in zip(new, before, strict=True)]
        descent = self.m
        if self.nesterov:
            descent = [
                torch.add(g_, m, alpha=self.momentum) for g_, m in zip(g, self.m, strict=True)
            ]
        return [torch.add(w_, d, alpha=-lr) for w_, d in zip(w, descent, strict=True)]

    def step_back(self, dw: list[Tensor]) -> list[Tensor]:
        """See `Optimizer`."""
        self.count -= 1
        lr = self.training.lr * self.training.factor(self.count)
        if not self.momentum:
            dg = [-lr * d for d in dw]
        else:
            self.dm = self.dm or [torch.zeros_like(d) for d in dw]
            look = self.momentum if self.nesterov else 1.0
            for dm, d in zip(self.dm, dw, strict=True):
                dm.add_(d, alpha=-lr * look)
            kept = 1 - self.dampening if self.count else 1.0
            dg = [kept * dm for dm in self.dm]
            if self.nesterov:
                for dg_, d in zip(dg, dw, strict=True):
                    dg_.add_(d, alpha=-lr)
            for dm in self.dm:
                dm.mul_(self.momentum)
        if self.decay:
            for d, dg_ in zip(dw, dg, strict=True):
                d.add_(dg_, alpha=self.decay)
        return [-dg_ for dg_ in dg] if self.maximize else dg


class Adam:
    """Adam and AdamW, smoothed.

    ``m' = b1 m + (1 - b1) g``, ``v' = b2 v + (1 - b2) g^2``,
    ``w' = w - (lr / c1) m' / (sqrt(v' / c2 + s^2) + eps)`` with the bias corrections
    c1 and c2. s = 0 is Adam itself. Its step is nearly the sign of g, whose derivative
    is of no use, so an attack takes ``s = r mean|g|`` by tensor and step.
    """

    def __init__(self, training: LocalTraining, smoothing: float) -> None:
        self.training, self.smoothing = training, smoothing
        options: dict[str, Any] = dict(training.optimizer_options)
        self.beta1, self.beta2 = options.get("betas", (BETA1, BETA2))
        self.eps: float = options.get("eps", EPS)
        self.decoupled = training.optimizer == "adamw"
        self.decay = training.weight_decay
        # By step: the gradient, the first moment and the smoothed root.
        self.tape: list[tuple[list[Tensor], list[Tensor], list[Tensor]]] = []
        self.m: list[Tensor] = []
        self.v: list[Tensor] = []
        self.dm: list[Tensor] = []
        self.dv: list[Tensor] = []

    def step(self, w: Sequence[Tensor], g: Sequence[Tensor]) -> list[Tensor]:
        """See `Optimizer`."""
        count = len(self.tape) + 1
        lr = self._lr(count)
        if self.decay and self.decoupled:
            w = [w_ * (1 - lr * self.decay) for w_ in w]
        elif self.decay:
            g = [g_ + self.decay * w_ for g_, w_ in zip(g, w, strict=True)]
        if not self.tape:
            self.m, self.v = ([torch.zeros_like(w_) for w_ in w] for _ in range(2))
        c1, c2 = 1 - self.beta1**count, 1 - self.beta2**count
        new_w, new_m, roots = ([torch.empty_like(w_) for w_ in w] for _ in range(3))
        for all_of_one in zip(w, g, self.m, self.v, new_w, new_m, roots, strict=True):
            scale = self.smoothing * torch.linalg.vector_norm(all_of_one[1], 1)
            # The constant keeps the root's derivative finite where g is zero.
            floor = (scale / all_of_one[1].numel()).square() + 1e-30
            for w_, g_, m_, v_, new_w_, new_m_, root_ in _pieces(*all_of_one):
                torch.lerp(m_, g_, 1 - self.beta1, out=new_m_)
                v_.mul_(self.beta2).addcmul_(g_, g_, value=1 - self.beta2)
                torch.add(floor, v_, alpha=1 / c2, out=root_).sqrt_()
                torch.addcdiv(w_, new_m_, root_ + self.eps, value=-lr / c1, out=new_w_)
        self.m = new_m
        self.tape.append((list(g), new_m, roots))
        return new_w

    def step_back(self, dw: list[Tensor]) -> list[Tensor]:
        """See `Optimizer`."""
        if not self.dm:
            self.dm, self.dv = ([torch.zeros_like(d) for d in dw] for _ in range(2))
        count = len(self.tape)
        lr = self._lr(count)
        rate, c2 = lr / (1 - self.beta1**count), 1 - self.beta2**count
        g, m, roots = self.tape.pop()
        dg = [torch.empty_like(d) for d in dw]
        for all_of_one in zip(dw, g, m, roots, self.dm, self.dv, dg, strict=True):
            for dw_, g_, m_, root_, dm_, dv_, dg_ in _pieces(*all_of_one):
                scale = root_ + self.eps
                adjoint = dw_ / scale
                dm_.add_(adjoint, alpha=-rate)
                # d root / d v' = 1 / (2 c2 root)
                adjoint.mul_(m_).div_(scale)
                dv_.addcdiv_(adjoint, root_, value=0.5 * rate / c2)
                torch.mul(dm_, 1 - self.beta1, out=dg_)
                dg_.addcmul_(g_, dv_, value=2 * (1 - self.beta2))
                dm_.mul_(self.beta1)
                dv_.mul_(self.beta2)
        if self.decay and self.decoupled:
            for d in dw:
                d.mul_(1 - lr * self.decay)
        elif self.decay:
            for d, dg_ in zip(dw, dg, strict=True):
                d.add_(dg_, alpha=self.decay)
        return dg

    def _lr(self, count: int) -> float:
        return self.training.lr * self.training.factor(count - 1)


_State = list[dict[str, Tensor]]  # of torch's optimiser, by weight


class TorchStep:
    """A step of any optimiser of `torch.optim`, differentiated by autograd.

    Forwards it is the client's own arithmetic. Backwards each step is made again with
    ``differentiable=True``, so that only what enters a step is kept, no graph of them all:
    the weights, the gradient, and the optimiser's state.

    Steps that are nearly signs of g are smoothed as `Adam`'s: eps, which torch adds to a
    root of squares, is raised by ``r c mean|g|`` by tensor and step, with c the root where
    all |g| are 1.
    """

    def __init__(self, training: LocalTraining, names: Sequence[str], smoothing: float) -> None:
        self.training, self.names, self.smoothing = training, names, smoothing
        # By step: the weights, the gradient, the state before, and what is added to eps.
        self.tape: list[tuple[list[Tensor], list[Tensor], _State, list[float]]] = []
        self.state: _State = [{} for _ in names]
        self.dstate: list[dict[str, Tensor | None]] = [{} for _ in names]

    def step(self, w: Sequence[Tensor], g: Sequence[Tensor]) -> list[Tensor]:
        """See `Optimizer`."""
        scale = self.smoothing * self._root(len(self.tape) + 1)
        raised = [0.0] * len(g)
        if scale:  # one transfer for all weights
            raised = (scale * torch.stack([g_.abs().mean() for g_ in g])).tolist()
        self.tape.append((list(w), list(g), self.state, raised))
        stepped, self.state = self._stepped(list(w), list(g), self.state, raised)
        return stepped

    def step_back(self, dw: list[Tensor]) -> list[Tensor]:
        """See `Optimizer`."""
        w, g, state, raised = self.tape[-1]
        w = [w_.detach().requires_grad_() for w_ in w]
        # Roots have no derivative at 0.
        g = [torch.where(g_.abs() < _TINY, _TINY, g_).requires_grad_() for g_ in g]
        state = [
            {k: v.detach().requires_grad_(k != "step") for k, v in each.items()} for each in state
        ]
        with torch.enable_grad():
            stepped, after = self._stepped(w, g, state, raised, differentiable=True)
        self.tape.pop()
        pairs: list[tuple[Tensor, Any]] = list(zip(stepped, dw, strict=True))
        for each, adjoints in zip(after, self.dstate, strict=True):
            pairs += [(v, adjoints[k]) for k, v in each.items() if adjoints.get(k) is not None]
        outputs, adjoint = zip(*((o, d) for o, d in pairs if o.requires_grad), strict=True)
        moving = [[k for k, v in each.items() if v.requires_grad] for each in state]
        inputs = [*w, *g]
        inputs += [each[k] for each, keys in zip(state, moving, strict=True) for k in keys]
        products = iter(torch.autograd.grad(outputs, inputs, adjoint, allow_unused=True))
        for d in dw:
            product = next(products)
            d.copy_(torch.zeros_like(d) if product is None else product)
        dg = [torch.zeros_like(d) if p is None else p for d, p in zip(dw, products, strict=False)]
        self.dstate = [{k: next(products) for k in keys} for keys in moving]
        return dg

    def _stepped(
        self,
        w: list[Tensor],
        g: list[Tensor],
        state: _State,
        raised: list[float],
        differentiable: bool = False,
    ) -> tuple[list[Tensor], _State]:
        """Return the weights and the state after the last step on the tape."""
        weights = {name: w_.clone() for name, w_ in zip(self.names, w, strict=True)}
        optimizer = create_optimizer(
            weights, self.training, step=len(self.tape) - 1, differentiable=differentiable
        )
        for weight, g_, each in zip(weights.values(), g, state, strict=True):
            weight.grad = g_
            optimizer.state[weight].update({k: v.clone() for k, v in each.items()})
        if any(raised):
            of = {id(w_): r for w_, r in zip(weights.values(), raised, strict=True)}
            optimizer.param_groups = [
                {**group, "params": [w_], "eps": group["eps"] + of[id(w_)]}
                for group in optimizer.param_groups
                for w_ in group["params"]
            ]
        optimizer.step()
        after = [
            {k: v for k, v in optimizer.state[weight].items() if isinstance(v, Tensor)}
            for weight in weights.values()
        ]
        return list(weights.values()), after

    def _root(self, count: int) -> float:
        """Return the root that step `count`, from 1, divides by for |g| = 1; 0: by none with eps.

        Adadelta's eps is inside its roots, and large.
        """
        kind, options = self.training.optimizer, dict(self.training.optimizer_options)
        if kind == "rmsprop":
            alpha = options.get("alpha", 0.99)
            assert isinstance(alpha, float)
            return sqrt(1 - alpha**count)
        if kind == "adagrad":
            return sqrt(count)
        return float(kind not in ("asgd", "adadelta"))


class _ByGroup:
    """An optimiser for each learning rate and weight decay, see `LocalTraining.groups`."""

    def __init__(
        self,
        training: LocalTraining,
        names: Sequence[str],
        of: Callable[[LocalTraining], Optimizer],
    ) -> None:
        places: dict[tuple[float, float], list[int]] = {}
        for place, name in enumerate(names):
            places.setdefault(training.rates(name), []).append(place)
        self.parts = [
            (part, of(replace(training, lr=lr, weight_decay=decay, groups=())))
            for (lr, decay), part in places.items()
        ]

    def step(self, w: Sequence[Tensor], g: Sequence[Tensor]) -> list[Tensor]:
        """See `Optimizer`."""
        stepped = list(w)
        for places, optimizer in self.parts:
            part = optimizer.step([w[i] for i in places], [g[i] for i in places])
            for place, w_ in zip(places, part, strict=True):
                stepped[place] = w_
        return stepped

    def step_back(self, dw: list[Tensor]) -> list[Tensor]:
        """See `Optimizer`."""
        dg = list(dw)
        for places, optimizer in self.parts:
            part = optimizer.step_back([dw[i] for i in places])
            for place, g_ in zip(places, part, strict=True):
                dg[place] = g_
        return dg


def optimizer_of(training: LocalTraining, names: Sequence[str], smoothing: float) -> Optimizer:
    """Return the simulation of a client's optimiser: by hand where there is one, else torch's.

    Parameters
    ----------
    training : LocalTraining
    names : sequence of str
        Of the weights that it steps.
    smoothing : float
        See `Adam`.
    """
    if training.optimizer == "sgd":
        return _ByGroup(training, names, Sgd)
    options = {name for name, _ in training.optimizer_options}
    if training.optimizer in ("adam", "adamw") and options <= {"betas", "eps"}:
        return _ByGroup(training, names, lambda each: Adam(each, smoothing))
    return TorchStep(training, names, smoothing)


def _pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield the same slice of every flattened tensor, short enough for the cache on a CPU."""
    size = 1 << 15 if tensors[0].device.type == "cpu" else tensors[0].numel()
    return zip(*(tensor.view(-1).split(size) for tensor in tensors), strict=True)
