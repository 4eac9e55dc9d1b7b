"""Weights from files: a model before and after a client's training, as users have saved them."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord
from torch import Tensor, nn

from fl_app.models import known_model
from fl_app.models.norms import batch_norms
from fl_app.protocol import Knowledge, Observation
from fl_app.util.reading import BrokenFileError, check_regular
from fl_app.util.tensors import read_tensors

SUFFIXES = (".pt", ".pth", ".safetensors", ".npz")
_WRAPPED = ("state_dict", "model_state_dict", "model", "net", "weights")


def read_weights(path: Path) -> dict[str, Tensor]:
    """Return the weights in a file; nothing in it is run.

    ``.pt`` and ``.pth`` are read by `torch.load` with ``weights_only``: a state dict, or a
    checkpoint that holds one as ``state_dict``, ``model_state_dict``, ``model``, ``net`` or
    ``weights``. ``.npz`` holds arrays by their names, or ``arr_0``, ``arr_1``, ... in the
    model's order, as Flower's NumPy examples save them.

    Raises
    ------
    BrokenFileError
        If it is missing, can't be read, holds code, or no weights.
    """
    check_regular(path)
    if path.suffix == ".safetensors":
        return read_tensors(path)[0]
    if path.suffix == ".npz":
        return _of_numpy(path)
    if path.suffix not in SUFFIXES:
        raise BrokenFileError(f"{path} can't be read; allowed: {', '.join(SUFFIXES)}")
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise BrokenFileError(
            f"{path} holds more than weights, which could run code when it is read: save "
            f"model.state_dict() alone ({str(error).splitlines()[0]})"
        ) from error
    except Exception as error:  # of a broken file torch.load raises nearly anything
        why = str(error) or type(error).__name__
        raise BrokenFileError(f"{path} can't be read: {why}") from error
    while isinstance(found, Mapping) and not _weights(found):
        inner = next((found[key] for key in _WRAPPED if isinstance(found.get(key), Mapping)), None)
        if inner is None:
            break
        found = inner
    if not isinstance(found, Mapping) or not _weights(found):
        raise BrokenFileError(f"{path} holds no state dict: names and tensors")
    return {str(name): value.detach() for name, value in found.items()}


def _weights(found: Mapping[Any, Any]) -> bool:
    return bool(found) and all(isinstance(value, Tensor) for value in found.values())


def _of_numpy(path: Path) -> dict[str, Tensor]:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: torch.from_numpy(np.asarray(arrays[name])) for name in arrays.files}
    except (OSError, ValueError, TypeError, zipfile.BadZipFile) as error:
        raise BrokenFileError(f"{path} can't be read: {error}") from error


def replies(before: Path, after: Path) -> list[tuple[Path, Path]]:
    """Return the pairs of files that two paths name, in the order of their names.

    Parameters
    ----------
    before : Path
        A file, or a folder of them with the names of those in `after`.
    after : Path
        A file, or a folder: each file in it is one client's.

    Raises
    ------
    BrokenFileError
        If a folder holds no weights, or one of the files has no other.
    """
    if not after.is_dir():
        if before.is_dir():
            raise BrokenFileError(f"{before} is a folder; allowed with the file {after}: a file")
        return [(before, after)]
    found = sorted(path for path in after.iterdir() if path.suffix in SUFFIXES)
    if not found:
        raise BrokenFileError(f"{after} holds no weights; allowed: {', '.join(SUFFIXES)}")
    pairs = [(before / path.name if before.is_dir() else before, path) for path in found]
    for sent, path in pairs:
        if not sent.is_file():
            raise BrokenFileError(f"{path} has no weights before: {sent} is no file")
    return pairs


def weights_of(given: Mapping[str, Tensor] | ArrayRecord | Path | str) -> Mapping[str, Tensor]:
    """Return weights that are given as a state dict, as Flower's arrays, or by a file."""
    if isinstance(given, Path | str):
        return read_weights(Path(given))
    if isinstance(given, ArrayRecord):
        return dict(given.to_torch_state_dict())
    return given


def observed(
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
    num_examples: int,
    knowledge: Knowledge,
    round_: int = 1,
    node: int = 0,
) -> Observation:
    """Return what a server saw of a client, from the weights before and after its training.

    Parameters
    ----------
    before, after : mapping of str to Tensor
        As `read_weights` gives them.
    num_examples : int
        Images that the client trained on, N.
    knowledge : Knowledge
        Of the client.
    round_, node : int
        For the id.

    Raises
    ------
    ValueError
        If they are not weights of the client's model, or are not finite.
    """
    model = known_model(knowledge)
    names = state_names(model)
    w0, w1 = (
        _named(weights, names, knowledge.model_name, side)
        for weights, side in ((before, "before"), (after, "after"))
    )
    if w0.keys() != w1.keys():
        odd = ", ".join(sorted(w0.keys() ^ w1.keys())[:5])
        raise ValueError(f"the weights before and after are not of one model: {odd}")
    # A client may answer in another precision, say bfloat16: its update is of the model's own.
    own = model.state_dict()
    w0, w1 = ({n: value.to(own[n].dtype) for n, value in weights.items()} for weights in (w0, w1))
    for side, weights in (("before", w0), ("after", w1)):
        for name, value in weights.items():
            if value.shape != own[name].shape:
                raise ValueError(
                    f"{name} {side} has shape {tuple(value.shape)}; the model's has "
                    f"{tuple(own[name].shape)}"
                )
            if value.is_floating_point() and not value.isfinite().all():
                raise ValueError(f"{name} {side} holds NaN or infinity")
    if all(torch.equal(w0[name].double(), w1[name].double()) for name in w0):
        raise ValueError("the weights before and after are the same: there is no update")
    return Observation(w0, w1, num_examples, round_, node, node)


def state_names(model: nn.Module) -> list[str]:
    """Return the names that an update consists of: parameters, and BatchNorm's statistics."""
    statistics = {
        f"{name}.{buffer}" for name, layer in batch_norms(model) for buffer in layer._buffers
    }
    parameters = {name for name, _ in model.named_parameters()}
    return [name for name in model.state_dict() if name in parameters | statistics]


def _named(
    weights: Mapping[str, Tensor], names: Sequence[str], model: str, side: str
) -> dict[str, Tensor]:
    """Return those weights that an update consists of, in the model's order."""
    given = dict(weights)
    # NumPy's names, and those of Flower's arrays of a list.
    if all(name in (f"arr_{i}", str(i)) for i, name in enumerate(given)):
        if len(given) != len(names):
            raise ValueError(
                f"the weights {side} are {len(given)} arrays without names; {model} has "
                f"{len(names)}"
            )
        given = dict(zip(names, given.values(), strict=True))
    # Wrapped models add a prefix to every name.
    for prefix in ("module.", "_orig_mod.", "model."):
        if given and all(name.startswith(prefix) for name in given) and not set(given) & set(names):
            given = {name.removeprefix(prefix): value for name, value in given.items()}
    kept = {name: given[name] for name in names if name in given}
    if not kept:
        raise ValueError(
            f"the weights {side} are none of {model}'s: {', '.join(list(given)[:4])}, ...; the "
            f"model has {', '.join(names[:4])}, ..."
        )
    return kept
