"""Reading clients' replies as updates of the model, and refusing any others."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from flwr.app import Array, Message
from torch import Tensor

_HEADER = 4096  # bytes that an array's serialisation may add to its numbers


def sent_weights(message: Message) -> dict[str, Tensor]:
    """Return a message's weights, sharing no memory with it.

    Raises
    ------
    ValueError
        If it holds not exactly one ArrayRecord.
    """
    return {name: array_tensor(array) for name, array in _arrays(message).items()}


def returned_weights(reply: Message, w0: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a reply's weights, sharing no memory with it, in the order of `w0`.

    Nothing is decoded before names and sizes are those of the model: a client
    can't make the server allocate more than the model needs. Arrays are NumPy's
    format without pickles; a pickle is refused.

    Raises
    ------
    ValueError, TypeError
        If the reply is no update of `w0`; the message says why.
    """
    arrays = _arrays(reply)
    for problem, names in (
        ("misses", w0.keys() - arrays.keys()),
        ("adds", arrays.keys() - w0.keys()),
    ):
        if names:
            raise ValueError(f"the update {problem} arrays: {', '.join(sorted(names))}")
    w1 = {}
    for name, sent in w0.items():
        data = arrays[name].data
        if len(data) > 8 * sent.numel() + _HEADER:
            raise ValueError(
                f"the update's {name} has {len(data):,} bytes; "
                f"{tuple(sent.shape)} takes no more than {8 * sent.numel() + _HEADER:,}"
            )
        w1[name] = array_tensor(arrays[name])
        if w1[name].shape != sent.shape:
            raise ValueError(
                f"the update's {name} has shape {tuple(w1[name].shape)}; "
                f"expected {tuple(sent.shape)}"
            )
        if w1[name].is_floating_point() != sent.is_floating_point() or w1[name].is_complex():
            raise ValueError(f"the update's {name} is {w1[name].dtype}; expected {sent.dtype}")
        # A sum takes a tenth of the time, and only what is not finite or is huge fails it.
        if not w1[name].sum().isfinite() and not w1[name].isfinite().all():
            raise ValueError(f"the update's {name} holds NaN or infinity")
    return w1


def array_tensor(array: Array) -> Tensor:
    """Return an Array's numbers in memory of their own."""
    return torch.from_numpy(array.numpy())  # decoded into memory of its own


def num_examples(reply: Message, most: float, key: str = "num-examples") -> int:
    """Return how many images the client says it trained on.

    The claim weighs its update in the average, so one beyond what the protocol allows
    would set the model alone.

    Parameters
    ----------
    reply : Message
    most : float
        Images that the protocol allows.
    key : str
        Where it says that.

    Raises
    ------
    ValueError
        If that is no whole number from 1 to `most`, or said not exactly once.
    """
    counts = [r[key] for r in reply.content.metric_records.values() if key in r]
    if len(counts) != 1:
        raise ValueError(f"the reply has no {key}" if not counts else f"two {key}")
    count = counts[0]
    if isinstance(count, list) or not math.isfinite(count) or count < 1 or count != int(count):
        raise ValueError(f"{key} is {count}; allowed: a whole number of 1 or more")
    if count > most:
        raise ValueError(f"{key} is {count}; the protocol allows {most} at most")
    return int(count)


def _arrays(message: Message) -> Mapping[str, Array]:
    records = list(message.content.array_records.values())
    if len(records) != 1:
        raise ValueError(f"the message holds {len(records)} ArrayRecords; expected one")
    return records[0]


def weighted_mean(
    weights: Sequence[Mapping[str, Tensor]], counts: Sequence[int]
) -> dict[str, Tensor]:
    """Return FedAvg's aggregate, ``sum_c n_c w_c / sum_c n_c`` (McMahan et al., 2017).

    Taken in float64. Whole numbers, such as BatchNorm's count of batches, are rounded.

    Parameters
    ----------
    weights : sequence of mapping of str to Tensor
        w_c by name, one a client, at least one.
    counts : sequence of int
        n_c.

    Returns
    -------
    dict of str to Tensor
        Of the first client's names and types.
    """
    total = sum(counts)
    mean = {}
    for name, like in weights[0].items():
        parts = [w[name].double() * (n / total) for w, n in zip(weights, counts, strict=True)]
        value = torch.stack(parts).sum(0)
        mean[name] = (value if like.is_floating_point() else value.round()).to(like.dtype)
    return mean
