"""What a run's folder says of its data, its prior and its code: what is done later needs no more.

The data set that a run was on may have changed since, or lie on another machine.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from fl_app.audit.auditor import Auditor
from fl_app.audit.on_line import OnLine
from fl_app.config import Config, ConfigError, DatasetConfig, from_settings, read_settings
from fl_app.data import dataset_info, fingerprint, on_hub
from fl_app.protocol import Client, DatasetInfo, Knowledge
from fl_app.runs.described import NO_DATA, client_of, described_config
from fl_app.runs.folder import DESCRIBED
from fl_app.util.plain import plain_settings
from fl_app.util.text import printable
from server_strategies.priors.places import weights_digest

_DATA = "data"  # the entry of config.yaml


def run_facts(config: Config, knowledge: Knowledge, simulated: bool) -> dict[str, Any]:
    """Return what a run's config.yaml says beside its settings.

    Parameters
    ----------
    config : Config
    knowledge : Knowledge
        Holds the facts of the data that the run is on.
    simulated : bool
        Whether the clients' images are this machine's. Those of other machines have no
        fingerprint here.

    Raises
    ------
    DataError
        If the data is not there or is broken.
    """
    data = {field.name: getattr(knowledge, field.name) for field in fields(DatasetInfo)}
    return {
        _DATA: {**data, "fingerprint": fingerprint(config.dataset) if simulated else None},
        "prior_sha256": weights_digest(config.prior.weights),
    }


def prior_saw(network: nn.Module, dataset: DatasetConfig) -> bool:
    """Say whether a prior was trained on the split that clients hold, as far as its card tells.

    Parameters
    ----------
    network : nn.Module
        See `load_flow`; a plug-in's may say nothing.
    dataset : DatasetConfig
    """
    facts: Mapping[str, str] = getattr(network, "facts", {})
    # "... images, disjoint from ..." names what was left out.
    trained_on = _letters(facts.get("data", "").partition("disjoint")[0])
    return dataset.split == "train" and _letters(dataset.name) in trained_on


def _letters(words: str) -> str:
    return re.sub(r"[\W_]", "", words.lower())


def open_auditor(
    run_dir: Path,
    tell: Callable[[str], None],
    truth_dir: Path | None = None,
    client: Path | None = None,
    on_line: OnLine | None = None,
) -> Auditor:
    """Return the auditor of a run that has ended, by what its folder says of the data.

    Parameters
    ----------
    run_dir : Path
    tell : callable
        Takes a line where the data set that is there now is not the run's.
    truth_dir : Path, optional
        See `Auditor`.
    client : Path, optional
        The file that describes the clients of a user's own federation, see `client_of`.
    on_line : OnLine, optional
        See `Auditor`. The function that config.yaml names is not looked at.

    Raises
    ------
    ConfigError
        If the run's configuration can't be used, or describes clients that `client` does not.
    DataError
        If it says nothing of the data, as in older versions, and the data is not there.
    """
    path = run_dir / "config.yaml"
    settings = read_settings(path)
    config, facts = from_settings(settings, path), settings.get(_DATA)
    described = settings.get(DESCRIBED)
    if isinstance(described, Mapping):
        own = client_of(described, client)
        if described.get("training") != plain_settings(own.training):
            tell(f"the clients' training is described otherwise than when {run_dir.name} began")
        return described_auditor(run_dir, config, own, truth_dir, on_line)
    if facts is None:
        knowledge = config.knowledge(dataset_info(config.dataset))
        return Auditor(run_dir, config, knowledge, truth_dir, on_line=on_line)
    info = _recorded(facts, path)
    difference = _difference(config.dataset, info, facts.get("fingerprint"))
    if difference:
        difference = printable(difference)
        tell(f"{difference}. What the run recorded of it is used, and no baseline is drawn from it")
    # Like the fingerprint, candidates are not worth fetching a data set for.
    elsewhere = on_hub(config.dataset) and facts.get("fingerprint") is None
    why = "the data set is on the hub, and was not on this machine" if elsewhere else ""
    known = config.knowledge(info)
    return Auditor(run_dir, config, known, truth_dir, difference, why, on_line)


def described_auditor(
    run_dir: Path,
    config: Config,
    client: Client,
    truth_dir: Path | None = None,
    on_line: OnLine | None = None,
) -> Auditor:
    """Return the auditor of a run of described clients; its data set is the user's own."""
    config = described_config(config, client)
    return Auditor(run_dir, config, client.knowledge, truth_dir, NO_DATA, on_line=on_line)


def _recorded(facts: Any, path: Path) -> DatasetInfo:
    """Read the facts of the data, or raise ConfigError."""
    try:
        info = DatasetInfo(
            num_classes=int(facts["num_classes"]),
            image_shape=tuple(int(side) for side in facts["image_shape"]),  # type: ignore[arg-type]
            mean=tuple(float(value) for value in facts["mean"]),
            std=tuple(float(value) for value in facts["std"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{_DATA} (from {path}) can't be read: {error!r}") from error
    channels = info.image_shape[0] if len(info.image_shape) == 3 else 0
    positive = min(info.num_classes, *info.image_shape, *info.std) > 0
    if not positive or not channels == len(info.mean) == len(info.std):
        raise ConfigError(f"{_DATA} (from {path}) is {info}; allowed: a shape (C, H, W), C means")
    return info


def _difference(dataset: DatasetConfig, info: DatasetInfo, known: str | None) -> str:
    """Return how the data set that is there differs from the run's, in words; "": it does not.

    One on the hub is not fetched to find out, and one without a fingerprint never was here.
    """
    if known is None or on_hub(dataset):
        return ""
    where = f"the data set {dataset.name} {dataset.source}".rstrip()
    try:
        now, print_ = dataset_info(dataset), fingerprint(dataset)
    except (ValueError, OSError) as error:
        return f"{where} is not here ({error})"
    pairs = [(field.name, getattr(info, field.name), getattr(now, field.name))
             for field in fields(DatasetInfo)]  # fmt: skip
    changed = [f"{name} was {old} and is {new}" for name, old, new in pairs if _differ(old, new)]
    if not changed and print_ != known:
        changed = ["its images or labels have changed"]
    return f"{where} is not what the run was on: {'; '.join(changed)}" if changed else ""


def _differ(old: int | tuple[float, ...], new: int | tuple[float, ...]) -> bool:
    """Compare facts; the last digits of a mean depend on the machine."""
    return np.shape(old) != np.shape(new) or not np.allclose(old, new, rtol=0, atol=1e-6)
