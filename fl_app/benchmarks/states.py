"""States of training: the global model of a federation after some epochs, trained once."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from client_app.training import evaluate
from fl_app.benchmarks.federation import Federation, global_models
from fl_app.config import ConfigError, DatasetConfig
from fl_app.data import dataset_info, fingerprint, load_split
from fl_app.protocol import LocalTraining
from fl_app.util.tensors import read_tensors, write_tensors

CONVERGED = 30
"""Epochs after which a federation of `FEDERATION` gains no more test accuracy."""

FEDERATION = Federation(
    LocalTraining("adam", lr=1e-3, batch_size=16, local_steps=0, local_epochs=1), rounds=CONVERGED
)
"""Who trains a state: ten clients that share the training images, one epoch each a round."""

_NAME = re.compile(r"init|converged|epoch-([1-9][0-9]*)")


@dataclass(frozen=True)
class State:
    """A trained model.

    Attributes
    ----------
    weights : dict of str to Tensor
    accuracy : float
        On the data set's test split, in [0, 1].
    """

    weights: dict[str, Tensor]
    accuracy: float


def epochs_of(name: str) -> int:
    """Return the epochs of a state by its name: ``init``, ``epoch-N`` or ``converged``.

    Raises
    ------
    ConfigError
        If it is another.
    """
    match = _NAME.fullmatch(name)
    if not match:
        raise ConfigError(f"state is {name!r}; allowed: init, epoch-N, converged")
    return CONVERGED if name == "converged" else int(match[1] or 0)


def states_folder() -> Path:
    """Return where states are kept: ``flowleak/states`` in the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flowleak" / "states"


def trained_state(
    data: DatasetConfig,
    model: str,
    norm: str,
    head: str,
    name: str,
    tell: Callable[[str], None] = lambda line: None,
) -> State:
    """Return a state, trained now as far as the cache does not hold it.

    The files are those of the federation and the data: another one has others. One is
    written after each epoch, so that what was killed goes on.

    Parameters
    ----------
    data : DatasetConfig
        Whose train split the clients share; the test split gives the accuracy.
    model, norm, head : str
        See `create_model`.
    name : str
        ``epoch-N`` or ``converged``.
    tell : callable, optional
        Takes a line before the training, and one after each epoch with its accuracy.

    Raises
    ------
    ConfigError
        If there is no such state to be trained.
    """
    wanted = epochs_of(name)
    if not wanted:
        raise ConfigError("state is 'init', which is not trained")
    federation = replace(FEDERATION, model=model, norm=norm, head=head, rounds=wanted)
    kind = replace(federation, rounds=0).name
    print_ = fingerprint(replace(data, split="train"))
    facts = json.dumps({"federation": kind, "data": print_}, sort_keys=True)
    digest = hashlib.sha256(facts.encode()).hexdigest()[:12]

    def file(epoch: int) -> Path:
        return states_folder() / f"{data.name}-{model}-{digest}-epoch-{epoch:03d}.safetensors"

    done = max((epoch for epoch in range(wanted + 1) if file(epoch).is_file()), default=0)
    if done == wanted:
        weights, facts_of = read_tensors(file(wanted))
        return State(weights, float(facts_of["accuracy"]))
    info, train_set = dataset_info(data), load_split(data, "train")
    test_set = load_split(data, "test")
    before = read_tensors(file(done))[0] if done else None
    states_folder().mkdir(parents=True, exist_ok=True)
    network, title = federation.create(info, 0), " ".join(filter(None, (model, norm, head)))
    tell(f"{title} is trained to {name}, epoch {done + 1} to {wanted}; each is kept")
    rounds = global_models(federation, train_set, info, 0, done, before)
    for epoch, weights_now in enumerate(rounds, done + 1):
        network.load_state_dict(dict(weights_now))
        accuracy = round(evaluate(network, test_set, info.mean, info.std)[1], 4)
        write_tensors(file(epoch), weights_now, {"facts": facts, "accuracy": f"{accuracy:.4f}"})
        tell(f"{title}, epoch-{epoch}: accuracy {accuracy:.1%}")
    return State(dict(weights_now), accuracy)
