"""Training states: the global model after each round, kept in a run's folder, to start from."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor

from fl_app.config import ConfigError
from fl_app.runs.folder import find_run
from fl_app.util.files import user_path
from fl_app.util.reading import BrokenFileError
from fl_app.util.tensors import read_tensors, write_tensors
from fl_app.util.text import reason

_log = logging.getLogger("flwr")  # Flower streams it to the user

_FILE = re.compile(r"round-([0-9]{4,})")
_SHOWN = 3  # names of arrays in an error


class ModelStore:
    """A run's global models: ``models/round-NNNN.safetensors``, one a round, thinned.

    Parameters
    ----------
    run_dir : Path
        A run's folder.
    most : int
        Files to keep at most, 1 or more: those of the rounds divisible by the
        least power of two that leaves no more, and the last round's.
    """

    def __init__(self, run_dir: Path, most: int) -> None:
        self._folder, self._most = run_dir / "models", most

    def save(self, round_: int, weights: Mapping[str, Tensor]) -> None:
        """Write a round's model, whole or not at all, and thin out those before it.

        What the disk refuses is logged and goes no further: the training goes on.
        """
        try:
            contiguous = {name: weight.contiguous() for name, weight in weights.items()}
            write_tensors(self._path(round_), contiguous)
            for old in set(self.rounds()) - kept(self.rounds(), self._most):
                self._path(old).unlink()
        except OSError as error:
            _log.warning("round %d: its model is not kept: %s", round_, reason(error))

    def rounds(self) -> list[int]:
        """Return the rounds whose models are there, ascending."""
        names = (_FILE.fullmatch(file.stem) for file in self._folder.glob("*.safetensors"))
        return sorted(int(name[1]) for name in names if name)

    def path(self, round_: int) -> Path:
        """Return the file of a round's model.

        Raises
        ------
        ConfigError
            If it is not there; the message names those that are.
        """
        if round_ not in self.rounds():
            there = ", ".join(map(str, self.rounds())) or "none"
            raise ConfigError(
                f"no model of round {round_} in {self._folder}; there are rounds: {there}"
            )
        return self._path(round_)

    def _path(self, round_: int) -> Path:
        return self._folder / f"round-{round_:04d}.safetensors"


def kept(rounds: Iterable[int], most: int) -> set[int]:
    """Return which rounds' models stay, see `ModelStore`.

    Parameters
    ----------
    rounds : iterable of int
        From 1, one or more.
    most : int
        1 or more.
    """
    there, stride = set(rounds), 1
    last = max(there)
    # Counted as if every round were there, so that the choice does not depend on the past.
    while math.ceil(last / stride) > most:
        stride *= 2
    return {round_ for round_ in there if round_ % stride == 0} | {last}


def find_state(start_from: str, runs_dir: Path) -> Path:
    """Return the file that a setting ``start_from`` means.

    Parameters
    ----------
    start_from : str
        ``RUN:ROUND``, a run in `runs_dir` and one of its rounds, or the path of a
        ``.safetensors`` file, see `user_path`.
    runs_dir : Path

    Raises
    ------
    ConfigError
        If there is none.
    """
    if start_from.endswith(".safetensors"):
        path = user_path(start_from)
        if not path.is_file():
            raise ConfigError(f"start_from is {start_from!r}, but {path} is no file")
        return path
    run, _, round_ = start_from.rpartition(":")
    if not run or not round_.isdecimal():
        raise ConfigError(
            f"start_from is {start_from!r}; allowed: RUN:ROUND, as audit:2, "
            "or the path of a .safetensors file"
        )
    try:
        return ModelStore(find_run(runs_dir, run), 1).path(int(round_))
    except (ConfigError, FileNotFoundError) as error:
        raise ConfigError(f"start_from is {start_from!r}: {error}") from error


def load_state(path: Path, like: Mapping[str, Tensor], model: str) -> dict[str, Tensor]:
    """Read a model's weights, of the types that the model has.

    Parameters
    ----------
    path : Path
        A ``.safetensors`` file.
    like : mapping of str to Tensor
        The model's own weights.
    model : str
        What the model is, for the error.

    Raises
    ------
    ConfigError
        If the file is broken or is of another model; the message says in what.
    """
    try:
        found, _ = read_tensors(path)
    except BrokenFileError as error:
        raise ConfigError(f"start_from: {error}") from error
    problem = _problem(found, like)
    if problem:
        raise ConfigError(f"start_from: {path} is no state of {model}: {problem}")
    return {name: found[name].to(weight.dtype) for name, weight in like.items()}


def _problem(found: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> str:
    """Return why `found` can't be the weights of a model like `like`, or nothing."""
    for words, names in (
        ("it lacks", like.keys() - found.keys()),
        ("it adds", found.keys() - like.keys()),
    ):
        if names:
            more = f" and {len(names) - _SHOWN} more" * (len(names) > _SHOWN)
            return f"{words} {', '.join(sorted(names)[:_SHOWN])}{more}"
    for name, weight in like.items():
        if found[name].shape != weight.shape:
            shapes = f"{tuple(found[name].shape)}; needed: {tuple(weight.shape)}"
            return f"{name} has shape {shapes}"
        if found[name].is_floating_point() != weight.is_floating_point():
            return f"{name} is {found[name].dtype}; needed: {weight.dtype}"
        if not found[name].isfinite().all():
            return f"{name} holds NaN or infinity"
    return ""
