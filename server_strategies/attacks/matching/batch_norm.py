"""An additional matching term: the statistics of a client's batches, from BatchNorm's buffers."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fl_app.models import clients_model
from fl_app.models.norms import batch_norms
from fl_app.protocol import Knowledge, Observation
from server_strategies.attacks.matching.distance import LayeredDistance


class BatchStatistics:
    """``weight sum_l |s_l - S_l| / sum_l |S_l|`` over BatchNorm's means and variances l.

    The term of GradInversion (Yin et al., 2021, eq. 9), relative to the observed
    statistics, and with the batches' own statistics S instead of the running ones, see
    `inferred_statistics`. A candidate's s are taken at weights on the straight line from
    w0 to w1, step by step, and averaged over the steps as S are: exact for one step,
    and nearly so for several of SGD.

    Parameters
    ----------
    weight : float
    observation : Observation
        Of a client that trained with its batches' statistics and returned its own
        running ones, see `statistics_of`.
    knowledge : Knowledge
        With the client's training.
    device : str
        The torch device to work on.
    """

    def __init__(
        self, weight: float, observation: Observation, knowledge: Knowledge, device: str = "cpu"
    ) -> None:
        self.weight, self.count = weight, observation.num_examples
        self.model = clients_model(knowledge, observation.w0).to(device)
        like = next(self.model.parameters())
        names = [name for name, _ in self.model.named_parameters()]
        self.w0, self.w1 = (
            {n: w[n].to(like) for n in names} for w in (observation.w0, observation.w1)
        )
        self.batches = knowledge.client.batches(self.count)
        self.mean, self.std = (
            torch.tensor(v).to(like).view(-1, 1, 1) for v in (knowledge.mean, knowledge.std)
        )
        seen = inferred_statistics(self.model, observation, len(self.batches))
        self.distance = LayeredDistance([s.to(like) for s in seen])

    def __call__(self, images: Tensor, progress: float) -> Tensor:
        """Return the penalty, shape (), of images in [0, 1], (candidates * N, C, H, W)."""
        group = ((images - self.mean) / self.std).unflatten(0, (-1, self.count))
        return self.weight * torch.stack([self.distance(self.averaged(x)) for x in group]).mean()

    def averaged(self, x: Tensor) -> list[Tensor]:
        """Return the statistics of normalised images (N, C, H, W), averaged over local steps."""
        steps = len(self.batches)
        each = []
        for step, batch in enumerate(self.batches):
            weights = {n: torch.lerp(w, self.w1[n], step / steps) for n, w in self.w0.items()}
            each.append(batch_statistics(self.model, weights, x[list(batch)]))
        shares = [step_shares(layer, steps) for _, layer in batch_norms(self.model)]
        return [
            sum(
                (c * s for c, s in zip(shares[place // 2], of_steps, strict=True)),
                start=x.new_zeros(1),
            )
            for place, of_steps in enumerate(zip(*each, strict=True))
        ]


def statistics_of(
    weight: float, observation: Observation, knowledge: Knowledge, device: str = "cpu"
) -> list[BatchStatistics]:
    """Return the term if the client's update holds its batches' statistics, else none.

    It does not without BatchNorm, in BatchNorm's evaluation mode, and where the client
    does not return its statistics. At weight 0 there is no term either.
    """
    training = knowledge.client
    means = [name for name in observation.w0 if name.endswith("running_mean")]
    returned = training.batch_norm == "train" and training.send_buffers
    changed = any(not torch.equal(observation.w0[n], observation.w1[n]) for n in means)
    if not weight or not returned or not changed:
        return []
    return [BatchStatistics(weight, observation, knowledge, device)]


def step_shares(layer: nn.modules.batchnorm._BatchNorm, steps: int) -> list[float]:
    """Return the weight of each local step in a layer's inferred statistics; they sum to 1.

    ``m (1 - m)^(K - 1 - k) / (1 - (1 - m)^K)`` for step k of K, with the layer's momentum m.
    """
    assert layer.momentum is not None  # None, a mean over all batches, occurs in no model here
    kept = 1 - layer.momentum
    return [layer.momentum * kept ** (steps - 1 - k) / (1 - kept**steps) for k in range(steps)]


def inferred_statistics(model: nn.Module, observation: Observation, steps: int) -> list[Tensor]:
    """Return the means and variances of the client's batches, by layer: mean, variance, ...

    A step updates a running statistic r with the batch's s: ``r' = (1 - m) r + m s``. So
    ``(r_K - (1 - m)^K r_0) / (1 - (1 - m)^K)`` is the batch's for one step, and for K a
    mean over the steps, see `step_shares`.

    Parameters
    ----------
    model : nn.Module
        Gives the layers and their momentum.
    observation : Observation
    steps : int
        K.

    Returns
    -------
    list of Tensor, shape (channels,)
    """
    found = []
    for name, layer in batch_norms(model):
        assert layer.momentum is not None
        kept = (1 - layer.momentum) ** steps
        for kind in ("running_mean", "running_var"):
            before, after = (w[f"{name}.{kind}"] for w in (observation.w0, observation.w1))
            found.append((after - kept * before) / (1 - kept))
    return found


def batch_statistics(model: nn.Module, weights: Mapping[str, Tensor], x: Tensor) -> list[Tensor]:
    """Return the means and unbiased variances that BatchNorm's layers see of one batch.

    Parameters
    ----------
    model : nn.Module
        In the client's mode, see `clients_model`; its parameters are not read.
    weights : mapping of str to Tensor
    x : Tensor, shape (B, C, H, W)
        Normalised images.

    Returns
    -------
    list of Tensor, shape (channels,)
        By layer: mean, variance, ...
    """
    seen: list[Tensor] = []

    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        values = args[0].transpose(0, 1).flatten(1)
        seen.extend((values.mean(1), values.var(1)))

    handles = [layer.register_forward_pre_hook(hook) for _, layer in batch_norms(model)]
    functional_call(model, dict(weights), (x,))
    for handle in handles:
        handle.remove()
    return seen
