"""Another tool's images of the updates that a benchmark attacks, scored beside ours.

A benchmark writes each client's update to a folder of its own: ``before.pt`` and ``after.pt``
(state dicts), and ``client.json`` (what an attacker is told). Another tool leaves
``TOOL@SECONDS.npz`` there, such as ``breaching@30.npz``, with ``images`` (N, C, H, W) in [0, 1].
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch

from fl_app.benchmarks.case import Case
from fl_app.config import UNBOUNDED, AttackConfig
from fl_app.protocol import Knowledge, Observation, Reconstruction
from fl_app.util.files import write_text

_NAME = re.compile(r"([A-Za-z_][\w-]*)@(\d+(?:\.\d+)?)")


def update_folder(root: Path, case: Case, seed: int) -> Path:
    """Return where a client's update lies, and what other tools made of it."""
    return root / f"{re.sub(r'[^A-Za-z0-9.=]+', '-', case.client)}-{seed}"


def is_written(folder: Path) -> bool:
    """Return whether a client's update lies there, whole."""
    return (folder / "client.json").exists()


def write_update(folder: Path, observation: Observation, knowledge: Knowledge) -> None:
    """Write an update, with the counts of its labels as SME takes them.

    Parameters
    ----------
    folder : Path
    observation : Observation
    knowledge : Knowledge
        With the client's labels.
    """
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(dict(observation.w0), folder / "before.pt")
    torch.save(dict(observation.w1), folder / "after.pt")
    told = {
        "model": knowledge.model_name,
        "examples": observation.num_examples,
        "labels": sorted(knowledge.labels or ()),
        "mean": list(knowledge.mean),
        "std": list(knowledge.std),
        "training": asdict(knowledge.client),
    }
    write_text(folder / "client.json", json.dumps(told, indent=2, default=str))


def cases_beside(root: Path, cases: Sequence[Case]) -> Iterator[Case]:
    """Yield a case for each client, tool and budget that some folder has images of."""
    seen = set()
    for case in cases:
        prefix = update_folder(root, case, 0).name.removesuffix("0")
        for file in sorted(root.glob(f"{prefix}*/*.npz")):
            named = _NAME.fullmatch(file.stem)
            other = not file.parent.name.removeprefix(prefix).isdecimal()  # another state's client
            if not named or other or (case.client, file.stem) in seen:
                continue
            seen.add((case.client, file.stem))
            attack = AttackConfig(named[1], UNBOUNDED, float(named[2]))
            yield replace(case, attack=attack, threshold=None, gain=None, within=None, first=False)


def images_beside(folder: Path, case: Case, count: int) -> Reconstruction | None:
    """Return what a tool found, as far as the file says; None: there is no such file.

    Raises
    ------
    ValueError
        If its images are not those of so many examples.
    """
    file = folder / f"{case.attack.name}@{case.attack.seconds:g}.npz"
    if not file.exists():
        return None
    with np.load(file, allow_pickle=False) as held:
        images = torch.from_numpy(held["images"].astype(np.float32))
    if images.ndim != 4 or len(images) != count:
        raise ValueError(
            f"{file} has images of shape {tuple(images.shape)}; needed: {count} of them"
        )
    return Reconstruction(
        attack=case.attack.name,
        matching="another tool's",
        images=images.clamp(0, 1),
        labels=(0,) * count,
        losses=(float("nan"),),
        iterations=0,
        seconds=case.attack.seconds,
        peak_memory=0,
        flops=0,
        stop_reason="seconds",
        labels_level=case.labels,
    )
