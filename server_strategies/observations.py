"""The store of observations, so that an attack can be run again on the same update."""

from __future__ import annotations

import hashlib
import json
import operator
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypedDict

from safetensors.torch import save
from torch import Tensor

from fl_app.protocol import Observation
from fl_app.util.reading import BrokenFileError, parse_json
from fl_app.util.tensors import read_tensors, write_tensors

MOST_IMAGES = 10_000
"""Images of one update that an attack takes; it would allocate any number."""

_ID = re.compile(r"round-[0-9]{4,9}-node-[0-9]{1,20}")
_SENT = re.compile(r"sent-[0-9a-f]{64}")
_FACTS = ("num_examples", "round", "node", "client", "nodes", "clients", "examples")


class _Needed(TypedDict):
    num_examples: int
    round: int
    node: int
    client: int


class _Facts(_Needed, total=False):
    """What a file says beside its tensors. Older ones hold no sums and no order, and hold w0."""

    nodes: Sequence[int]
    clients: Sequence[int]
    examples: Sequence[int]
    order: Sequence[str]
    sent: str


class ObservationStore:
    """Observations as files: safetensors, with JSON in its header.

    The weights that clients were sent lie in a file of their own, which is named by its content:
    all clients of a round share it.

    Parameters
    ----------
    folder : Path
        A run's folder; the files lie in ``observations/`` there.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "observations"
        self._last: tuple[list[Tensor], str] = [], ""  # sent weights, and the name of their file

    def save(self, observation: Observation) -> None:
        """Write an observation, whole or not at all.

        Raises
        ------
        OSError
            If it could not be written.
        """
        facts = {name: getattr(observation, name) for name in _FACTS}
        facts["order"] = list(observation.w0)  # a safetensors file sorts them
        facts["sent"] = self._save_sent(observation.w0)
        tensors = {f"w1.{name}": _own(tensor) for name, tensor in observation.w1.items()}
        path = self._path(observation.id)
        write_tensors(path, tensors, {"observation": json.dumps(facts)})

    def load(self, id_: str) -> Observation:
        """Read an observation back.

        Raises
        ------
        ValueError
            If `id_` is not an `Observation.id`.
        FileNotFoundError
            If the store does not hold it; the message names those it holds.
        BrokenFileError
            If the file can't be read, or is no observation.
        """
        path = self._path(id_)
        if not os.path.lexists(path):
            known = ", ".join(self.ids()) or "none"
            raise FileNotFoundError(f"no observation {id_} in {self._folder}; it holds: {known}")
        tensors, metadata = read_tensors(path)
        try:
            facts = parse_json(metadata.get("observation", ""), _Facts)
            if "sent" in facts:
                sent = read_tensors(self._sent_path(facts["sent"]))[0]
                tensors |= {f"w0.{name}": tensor for name, tensor in sent.items()}
            return _observation(tensors, facts, id_)
        except BrokenFileError:
            raise
        except (ValueError, RuntimeError) as error:  # torch lacks functions for some types
            raise BrokenFileError(f"{path} is no observation: {error}") from error

    def ids(self) -> list[str]:
        """Return the ids of all stored observations, by round."""
        files = self._folder.glob("*.safetensors")
        return sorted(file.stem for file in files if _ID.fullmatch(file.stem))

    def _save_sent(self, w0: Mapping[str, Tensor]) -> str:
        """Write the weights that a client was sent, unless they are there; return their name."""
        tensors, name = self._last
        same = len(tensors) == len(w0) and all(map(operator.is_, tensors, w0.values()))
        if not (same and self._sent_path(name).is_file()):
            owned = {key: _own(tensor) for key, tensor in w0.items()}
            name = f"sent-{hashlib.sha256(save(owned)).hexdigest()}"
            if not self._sent_path(name).is_file():
                write_tensors(self._sent_path(name), owned)
            self._last = list(w0.values()), name
        return name

    def _path(self, id_: str) -> Path:
        check_id(id_)
        return self._folder / f"{id_}.safetensors"

    def _sent_path(self, name: str) -> Path:
        if not _SENT.fullmatch(name):
            raise ValueError(f"the name of its sent weights is {name!r}; allowed: sent-DIGEST")
        return self._folder / f"{name}.safetensors"


def _own(tensor: Tensor) -> Tensor:
    return tensor.contiguous().clone()  # safetensors refuses shared memory


def check_id(id_: str) -> None:
    """Raise ValueError for what is no `Observation.id`, and could name a file elsewhere."""
    if not _ID.fullmatch(id_):
        raise ValueError(f"observation id is {id_!r}; allowed: round-NNNN-node-ID")


def _observation(tensors: Mapping[str, Tensor], facts: _Facts, id_: str) -> Observation:
    """Return an observation of a file's content; raise ValueError if it can't be one."""
    weights: dict[str, dict[str, Tensor]] = {"w0": {}, "w1": {}}
    for key, tensor in tensors.items():
        side, _, name = key.partition(".")
        if side not in weights:
            raise ValueError(f"it holds {key!r}; allowed: w0.NAME and w1.NAME")
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ValueError(f"its {key} holds NaN or infinity")
        weights[side][name] = tensor
    order = facts.get("order", list(weights["w0"]))
    shapes = [{name: tensor.shape for name, tensor in side.items()} for side in weights.values()]
    if shapes[0] != shapes[1] or not order or set(order) != shapes[0].keys():
        raise ValueError("its w0 and w1 are not of one model")
    w0, w1 = ({name: weights[side][name] for name in order} for side in ("w0", "w1"))
    nodes, clients = tuple(facts.get("nodes", ())), tuple(facts.get("clients", ()))
    examples = tuple(facts.get("examples", ()))
    if not len(nodes) == len(clients) == len(examples):
        raise ValueError("its nodes, clients and examples are not equally many")
    found = Observation(
        w0, w1, facts["num_examples"], facts["round"], facts["node"], facts["client"],
        nodes, clients, examples,
    )  # fmt: skip
    if found.id != id_:
        raise ValueError(f"it is {found.id}, and its name another")
    if not 1 <= found.num_examples <= MOST_IMAGES:
        raise ValueError(f"it has {found.num_examples} images; allowed: 1 to {MOST_IMAGES}")
    return found
