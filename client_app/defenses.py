"""Defences of an update before a client sends it: plain functions, and a Flower mod.

The update is ``delta = w1 - w0``, by name, of the weights that were trained;
BatchNorm's running statistics are not part of it and are passed on unmodified. `defend`
composes the steps in one order: clip, sparsify, noise, a plug-in's own, quantise. Defences
within local training are in `client_app.defended_steps`.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, Context, Message
from flwr.app.message_type import MessageType
from flwr.clientapp.mod import LocalDpMod
from flwr.clientapp.typing import ClientAppCallable, Mod
from torch import Tensor

from client_app.training import local_seed
from fl_app.protocol import Defense, trained_names
from fl_app.registry import DEFENSES

Update = Mapping[str, Tensor]

_BYTES = {"none": 4, "bf16": 2, "int8": 1}  # a number as sent
_SCALE = 4  # bytes of an int8 tensor's scale
_INDEX = 4  # bytes that name a coordinate


def clip(update: Update, bound: float, by: str) -> dict[str, Tensor]:
    """Bound an update.

    ``value``: ``min(max(delta_i, -bound), bound)``, each coordinate by itself, as
    "weight clipping" with a bound of 0.05 is read here in Deep Leakage with
    Generative Flow Matching Denoiser, section 4. ``norm``: ``delta min(1, bound /
    ||delta||_2)``, one norm over all tensors (McMahan et al., 2018,
    arXiv:1710.06963, FlatClip).

    Parameters
    ----------
    update : mapping of str to Tensor
        delta by name, in the weights' units.
    bound : float
        > 0, in the weights' units.
    by : {"value", "norm"}
    """
    if by == "value":
        return {name: delta.clamp(-bound, bound) for name, delta in update.items()}
    length = math.sqrt(_square(update))
    return {name: delta * min(1.0, bound / max(length, 1e-30)) for name, delta in update.items()}


def sparsify(update: Update, share: float) -> dict[str, Tensor]:
    """Set a share of an update's coordinates to zero, those of least magnitude.

    ``delta_i = 0`` for the ``floor(share n)`` smallest ``|delta_i|`` among the n
    coordinates that are not zero, over all tensors together: magnitude pruning
    (Zhu et al., 2019, arXiv:1906.08935, section 5.2). Coordinates that training did not
    change are not counted: they are a fifth of a ConvNet's, so that a small share of all
    coordinates would set no others to zero.

    Parameters
    ----------
    update : mapping of str to Tensor
        delta by name.
    share : float
        In [0, 1). Of equal magnitudes the first are set to zero.
    """
    sizes = torch.cat([delta.flatten().abs() for delta in update.values()])
    changed = sizes.nonzero().flatten()
    smallest = changed[sizes[changed].argsort(stable=True)[: math.floor(share * len(changed))]]
    kept = torch.ones_like(sizes).index_fill_(0, smallest, 0.0)
    masks = kept.split([delta.numel() for delta in update.values()])
    return {
        name: delta * mask.view_as(delta)
        for (name, delta), mask in zip(update.items(), masks, strict=True)
    }


def add_noise(
    update: Update, kind: str, sigma: float, relative: bool, generator: torch.Generator
) -> dict[str, Tensor]:
    """Add independent noise of mean 0 and standard deviation s to every coordinate.

    ``gaussian``: N(0, s^2) (Zhu et al., 2019, section 5.1). ``laplace``: Laplace(0, b)
    with ``b = s / sqrt(2)``, as in the same section. ``s = sigma``, or
    relative: ``s = sigma sqrt(mean_i delta_i^2)`` over all coordinates.

    Parameters
    ----------
    update : mapping of str to Tensor
        delta by name.
    kind : {"gaussian", "laplace"}
    sigma : float
        > 0; in the weights' units, or relative in units of delta's root mean square.
    relative : bool
    generator : torch.Generator
        On the CPU; every tensor's noise is drawn after that of the one before.
    """
    if relative:
        sigma *= math.sqrt(_square(update) / sum(delta.numel() for delta in update.values()))
    return {
        name: delta + sigma * _noise(kind, delta.shape, generator).to(delta)
        for name, delta in update.items()
    }


def _noise(kind: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Draw noise of mean 0 and variance 1."""
    if kind == "gaussian":
        return torch.randn(shape, generator=generator)
    # The difference of two exponentials of rate 1 is Laplace(0, 1), of variance 2.
    first, second = (torch.empty(shape).exponential_(generator=generator) for _ in range(2))
    return (first - second) / math.sqrt(2)


def quantize(update: Update, kind: str) -> dict[str, Tensor]:
    """Round an update to a shorter number format, and return it in its own again.

    ``bf16``: the nearest number of bfloat16 (8 bits of exponent, 7 of mantissa; Kalamkar
    et al., 2019, arXiv:1905.12322). ``int8``: ``s round(delta_i / s)`` with one
    scale a tensor, ``s = max_i |delta_i| / 127``, symmetric (Jacob et al., 2018,
    arXiv:1712.05877, with zero-point 0).

    Parameters
    ----------
    update : mapping of str to Tensor
        delta by name.
    kind : {"bf16", "int8"}
    """
    if kind == "bf16":
        return {name: delta.bfloat16().to(delta) for name, delta in update.items()}
    rounded = {}
    for name, delta in update.items():
        scale = delta.abs().max() / 127
        rounded[name] = torch.where(scale > 0, (delta / scale).round() * scale, 0.0)
    return rounded


def defend(update: Update, defense: Defense, generator: torch.Generator) -> dict[str, Tensor]:
    """Apply a defence's steps on the update, in their order.

    Parameters
    ----------
    update : mapping of str to Tensor
        delta = w1 - w0 of the trained weights, by name.
    defense : Defense
        `local_dp` by its formula, see `Defense.plain`.
    generator : torch.Generator
        On the CPU; decides the noise.

    Returns
    -------
    dict of str to Tensor
        What is sent: in the same order, shapes, types and device.
    """
    defense = defense.plain()
    sent = dict(update)
    if defense.clip:
        sent = clip(sent, defense.clip, defense.clip_by)
    if defense.sparsify:
        sent = sparsify(sent, defense.sparsify)
    if defense.noise != "none":
        sent = add_noise(sent, defense.noise, defense.sigma, defense.relative, generator)
    if defense.custom:
        sent = DEFENSES[defense.custom](sent, generator)
    if defense.quantize != "none":
        sent = quantize(sent, defense.quantize)
    return sent


def defended_weights(
    w0: Mapping[str, Tensor],
    w1: Mapping[str, Tensor],
    defense: Defense,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """Return the weights that a client sends: ``w0 + defend(w1 - w0)`` of the trained ones.

    Without a step on the update they are `w1` to the bit, which ``w0 + (w1 - w0)``
    is not.

    Parameters
    ----------
    w0, w1 : mapping of str to Tensor
        As received and as trained, by name.
    defense, generator
        See `defend`.

    Raises
    ------
    ValueError
        If `w1` has other names than `w0`.
    """
    if w1.keys() != w0.keys():
        raise ValueError(f"the weights are {', '.join(w1)}; allowed, as received: {', '.join(w0)}")
    update = {name: w1[name] - w0[name] for name in trained_names(w1)}
    sent = defend(update, defense, generator)
    return {
        name: value if sent.get(name) is update.get(name) else w0[name] + sent[name]
        for name, value in w1.items()
    }


def update_bytes(update: Update, number_format: str) -> tuple[int, str]:
    """Return how many bytes an update takes in the best plain encoding, and which one that is.

    Plain: numbers as they are, no entropy coding. ``dense`` sends all of them,
    ``bitmap`` those that are not zero and a bit a coordinate, ``indices`` those and
    four bytes each for their place. int8 adds four bytes a tensor for its scale.

    Parameters
    ----------
    update : mapping of str to Tensor
        As it is sent, see `defend`.
    number_format : {"none", "bf16", "int8"}
        `Defense.quantize`; none: float32.
    """
    width, count = _BYTES[number_format], sum(delta.numel() for delta in update.values())
    nonzero = sum(int(delta.count_nonzero()) for delta in update.values())
    scales = _SCALE * len(update) * (number_format == "int8")
    sizes = {
        "dense": count * width,
        "bitmap": nonzero * width + math.ceil(count / 8),
        "indices": nonzero * (width + _INDEX),
    }
    best = min(sizes, key=lambda name: sizes[name])
    words = {"none": "float32"}.get(number_format, number_format)
    return sizes[best] + scales, f"{words} {best}"


def distortion(update: Update, sent: Update) -> float:
    """Return ``||sent - delta|| / ||delta||``: 0 where a defence changed nothing."""
    difference = {name: sent[name] - delta for name, delta in update.items()}
    return math.sqrt(_square(difference) / max(_square(update), 1e-60))


def _square(update: Update) -> float:
    return sum(float(delta.double().square().sum()) for delta in update.values())


def noise_generator(seed: int, partition: int, round_: int) -> torch.Generator:
    """Return the generator of a client's noise in a round; its batches' order has another."""
    own = local_seed(local_seed(seed, partition, round_), 1, 0)
    return torch.Generator().manual_seed(own)


def defended(defense: Defense, seed: int | None = None) -> Mod:
    """Return a Flower mod that defends every update of a client.

    For any ClientApp whose train messages and replies hold one ArrayRecord::

        app = ClientApp(mods=[defended(Defense(noise="gaussian", sigma=0.01))])

    `Defense.local_dp` is Flower's own LocalDpMod. A mod can't defend the steps within
    local training (`soteria`, DP-SGD): see `defended_steps`.

    Parameters
    ----------
    defense : Defense
    seed : int, optional
        The noise then depends on nothing but it, the client (``partition-id`` of
        its node config, else its node id) and the round; whoever knows it can remove the
        noise. By default every update gets a new seed from the system.

    Raises
    ------
    ValueError
        From the mod, if the reply's arrays are not those of the message.
    """

    def mod(msg: Message, ctxt: Context, call_next: ClientAppCallable) -> Message:
        if msg.metadata.message_type.split(".")[0] != MessageType.TRAIN:
            return call_next(msg, ctxt)
        partition = ctxt.node_config.get("partition-id")
        client = partition if type(partition) is int else ctxt.node_id
        run_seed = secrets.randbits(64) if seed is None else seed
        generator = noise_generator(run_seed, client, _round(msg))
        if defense.local_dp:
            return _flowers_local_dp(defense, generator)(msg, ctxt, call_next)
        w0 = _arrays(msg)[1].to_torch_state_dict()  # before the app may change the message
        reply = call_next(msg, ctxt)
        if not reply.has_error():
            key, record = _arrays(reply)
            sent = defended_weights(w0, record.to_torch_state_dict(), defense, generator)
            reply.content[key] = ArrayRecord({k: Array(v.numpy()) for k, v in sent.items()})
        return reply

    return mod


def _flowers_local_dp(defense: Defense, generator: torch.Generator) -> Mod:
    """Return Flower's LocalDpMod with its noise, NumPy's global one, decided by `generator`."""
    inner = LocalDpMod(defense.clip, 2 * defense.clip, defense.local_dp, defense.delta)

    def mod(msg: Message, ctxt: Context, call_next: ClientAppCallable) -> Message:
        with _numpy_seeded(int(torch.randint(2**32, (), generator=generator))):
            return inner(msg, ctxt, call_next)

    return mod


@contextmanager
def _numpy_seeded(seed: int) -> Iterator[None]:
    state = np.random.get_state()
    np.random.seed(seed)
    try:
        yield
    finally:
        np.random.set_state(state)


def _arrays(message: Message) -> tuple[str, ArrayRecord]:
    records = list(message.content.array_records.items())
    if len(records) != 1:
        raise ValueError(f"the message holds {len(records)} ArrayRecords; a defence needs one")
    return records[0]


def _round(message: Message) -> int:
    """Return the round that Flower's strategies write into a train message; 0: they did not."""
    rounds = [r.get("server-round") for r in message.content.config_records.values()]
    return next((int(value) for value in rounds if type(value) is int), 0)
