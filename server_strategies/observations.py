"""The store of observations, so that an attack can be run again on the same update."""

from __future__ import annotations

import json
import re
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from fl_app.protocol import Observation
from fl_app.util.files import whole_file

_ID = re.compile(r"round-[0-9]{4,}-node-[0-9]+")
_FACTS = ("num_examples", "round", "node", "client", "nodes", "clients", "examples")


class ObservationStore:
    """Observations as files: safetensors, with JSON in its header.

    Parameters
    ----------
    folder : Path
        A run's folder; the files lie in ``observations/`` there.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "observations"

    def save(self, observation: Observation) -> None:
        """Write an observation, whole or not at all.

        Raises
        ------
        OSError
            If it could not be written.
        """
        tensors = {
            f"{side}.{name}": tensor.contiguous().clone()  # safetensors refuses shared memory
            for side, weights in (("w0", observation.w0), ("w1", observation.w1))
            for name, tensor in weights.items()
        }
        facts = {name: getattr(observation, name) for name in _FACTS}
        facts["order"] = list(observation.w0)  # a safetensors file sorts them
        with whole_file(self._path(observation.id)) as temporary:
            save_file(tensors, temporary, metadata={"observation": json.dumps(facts)})

    def load(self, id_: str) -> Observation:
        """Read an observation back.

        Raises
        ------
        ValueError
            If `id_` is not an `Observation.id`.
        FileNotFoundError
            If the store does not hold it; the message names those it holds.
        """
        path = self._path(id_)
        if not path.exists():
            known = ", ".join(self.ids()) or "none"
            raise FileNotFoundError(f"no observation {id_} in {self._folder}; it holds: {known}")
        weights: dict[str, dict[str, Tensor]] = {"w0": {}, "w1": {}}
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - safe_open is no mapping
                side, _, name = key.partition(".")
                weights[side][name] = file.get_tensor(key)
            facts = json.loads(file.metadata()["observation"])
        # Older files hold no sums and no order.
        facts |= {name: tuple(facts.get(name, ())) for name in ("nodes", "clients", "examples")}
        order = facts.pop("order", list(weights["w0"]))
        w0, w1 = ({name: weights[side][name] for name in order} for side in ("w0", "w1"))
        return Observation(w0=w0, w1=w1, **facts)

    def ids(self) -> list[str]:
        """Return the ids of all stored observations, by round."""
        files = self._folder.glob("*.safetensors")
        return sorted(file.stem for file in files if _ID.fullmatch(file.stem))

    def _path(self, id_: str) -> Path:
        # The pattern also keeps ids from the command line inside the folder.
        if not _ID.fullmatch(id_):
            raise ValueError(f"observation id is {id_!r}; allowed: round-NNNN-node-ID")
        return self._folder / f"{id_}.safetensors"
