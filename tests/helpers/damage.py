"""Damage to a run's files, drawn by a seed: what disks, hands and other versions do to them."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

Damage = Callable[[Path, random.Random], None]

_WRONG: tuple[Any, ...] = (
    None, [], {}, "x", "", -1, 0, 2**70, 1.5, 1e308, True, [[]], {"a": {"b": []}}, "\x1b[2J",
    "../../x", ["x"] * 3, {"mean": "x"},
)  # fmt: skip


def gone(path: Path) -> None:
    """Remove what is there, a file or a folder."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _bytes(change: Callable[[bytes, random.Random], bytes]) -> Damage:
    return lambda path, rng: path.write_bytes(change(path.read_bytes(), rng)) and None


def _instead(make: Callable[[Path], object]) -> Damage:
    def damage(path: Path, rng: random.Random) -> None:
        gone(path)
        make(path)

    return damage


WHOLE: dict[str, Damage] = {
    "empty": _bytes(lambda data, rng: b""),
    "truncated": _bytes(lambda data, rng: data[: rng.randrange(1, 4 * len(data) // 5)]),
    "zeroed": _bytes(lambda data, rng: bytes(len(data))),
    "of random bytes": _bytes(lambda data, rng: rng.randbytes(len(data))),
    "with a header of 2^40": _bytes(lambda data, rng: (2**40).to_bytes(8, "little") + data[8:]),
    "nested": _bytes(lambda data, rng: b"[" * 10**5),
    "an open brace": _bytes(lambda data, rng: b"{"),
    "a list": _bytes(lambda data, rng: b"[1, 2]"),
    "a number": _bytes(lambda data, rng: b"1e999"),
    "a pipe": _instead(os.mkfifo),
    "a folder": _instead(Path.mkdir),
    "a link to nothing": _instead(lambda path: path.symlink_to("nothing")),
    "a link to itself": _instead(lambda path: path.symlink_to(path.name)),
}
"""Damage to a whole file, after which nothing of it can be used."""


def flipped(path: Path, rng: random.Random) -> None:
    """Flip some bits of a file."""
    data = bytearray(path.read_bytes())
    for _ in range(rng.randint(1, 8)):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(bytes(data))


def altered(value: Any, rng: random.Random) -> Any:
    """Return JSON with one value, at any depth, made another, or a key lost or renamed."""
    if not isinstance(value, dict | list) or not value or rng.random() < 0.1:
        return rng.choice(_WRONG)
    key = rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
    changed = value.copy()
    if isinstance(value, dict) and rng.random() < 0.2:
        lost = changed.pop(key)
        if rng.random() < 0.5:
            changed[f"{key}_of_another_version"] = lost
    else:
        changed[key] = altered(value[key], rng)
    return changed


def altered_json(path: Path, rng: random.Random) -> None:
    """Alter one of the lines of a file of JSON; YAML is read as such, too."""
    text = path.read_text()
    lines = text.splitlines() if path.suffix == ".jsonl" else [text]
    place = rng.randrange(len(lines))
    lines[place] = json.dumps(altered(json.loads(lines[place]), rng))
    path.write_text("\n".join(lines) + "\n")


def altered_tensors(path: Path, rng: random.Random) -> None:
    """Alter a tensor of a safetensors file, or the JSON in its header."""
    with safe_open(path, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        facts = file.metadata()
    name = rng.choice(list(tensors))
    tensor = tensors[name]
    changes: list[Callable[[], Any]] = [
        lambda: tensors.pop(name),
        lambda: tensors.update({name: tensor[:0]}),
        lambda: tensors.update({name: torch.cat([tensor, tensor])}),
        lambda: tensors.update({name: tensor.double() * torch.nan}),
        lambda: tensors.update({name: tensor.long() + 99}),
        lambda: tensors.update({name: tensor.flatten()[0]}),
        lambda: tensors.update({name: tensor.to(torch.float8_e4m3fn)}),
        lambda: tensors.update({name + ".x": tensor.clone()}),
    ]
    for key in facts or {}:
        changes += 3 * [
            lambda key=key: facts.update({key: json.dumps(altered(json.loads(facts[key]), rng))})
        ]
        changes.append(lambda key=key: facts.pop(key))
    rng.choice(changes)()
    save_file(tensors or {"none": torch.zeros(1)}, path, metadata=facts)
