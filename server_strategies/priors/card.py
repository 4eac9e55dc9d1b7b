"""A prior's folder for the Hugging Face hub: its weights, and its card in the hub's format."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import yaml

from fl_app.config import HUB
from fl_app.util.files import whole_file, write_text
from server_strategies.priors.places import HUB_FILE, find_weights

LICENSE = "license"
"""Names the card's line that says by which licence the weights may be used."""
DATASET = "training images on the hub"
"""Names the card's line that says which data set of the hub they were trained on."""
TAGS = ("flow-matching", "image-prior", "denoising", "federated-learning", "privacy")

_FACT = re.compile(r"^- ([^:\n]+): (.+)$", re.MULTILINE)
_MEASURED_ON = re.compile(r"of (\S+ of \S+ (\w+) test images)")
_ROW = re.compile(r"^\| ([\d.]+) \|[^|]+\|[^|]+\| ([\d.]+) ", re.MULTILINE)


def card_facts(card: str) -> dict[str, str]:
    """Return the facts of a model card, by their names: its lines ``- NAME: FACT``."""
    return {name: fact for name, fact in _FACT.findall(card)}


def hub_card(card: str, name: str, license_: str = "", dataset: str = "") -> str:
    """Return a model card in the hub's format: with front matter, and how it is used.

    Parameters
    ----------
    card : str
        As ``flowleak prior train`` and ``flowleak prior evaluate`` write it.
    name : str
        The prior's.
    license_ : str
        Of the weights, as the hub names it; empty: the card's.
    dataset : str
        The name of the training images on the hub; empty: the card's, or none.

    Raises
    ------
    ValueError
        If neither names a licence.
    """
    facts = card_facts(card)
    license_, dataset = license_ or facts.get(LICENSE, ""), dataset or facts.get(DATASET, "")
    if not license_:
        raise ValueError(
            f"the card of {name} names no licence of the weights; needed: --license, such as "
            "apache-2.0 or other"
        )
    front: dict[str, Any] = {
        LICENSE: license_,
        "library_name": "flowleak",
        "pipeline_tag": "unconditional-image-generation",
        "tags": [*TAGS, *([facts["network"]] if "network" in facts else [])],
        **({"datasets": [dataset]} if dataset else {}),
        **_metrics(card, name),
    }
    use = f"""## Use

The weights of a velocity network of [flowleak](https://github.com/flowleak/flowleak), an image
prior for its attacks:

```bash
flwr run . local-simulation --stream -c 'prior="{HUB}OWNER/{name}"'
flowleak bench prior --prior {HUB}OWNER/{name}
```
"""
    head = yaml.safe_dump(front, sort_keys=False, allow_unicode=True)
    return f"---\n{head}---\n\n{card.rstrip()}\n\n{use}"


def write_hub_folder(
    weights: str, name: str, folder: Path, license_: str = "", dataset: str = ""
) -> None:
    """Write a folder that is ready for upload: ``README.md`` and ``model.safetensors``.

    Parameters
    ----------
    weights : str
        See `find_weights`, with a card beside it.
    name : str
        The prior's.
    folder : Path
    license_, dataset : str
        See `hub_card`.

    Raises
    ------
    ValueError
        If there are no such weights, or there is no card or no licence.
    """
    file = find_weights(weights)
    card = file.with_suffix(".md")
    if not card.is_file():
        raise ValueError(f"{weights} has no card beside it: {card} is no file")
    text = hub_card(card.read_text(encoding="utf-8"), name, license_, dataset)
    with whole_file(folder / HUB_FILE) as temporary:  # the same bytes, so the same digest
        shutil.copyfile(file, temporary)
    write_text(folder / "README.md", text)


def _metrics(card: str, name: str) -> dict[str, Any]:
    """Return the denoising table as the hub's evaluation results; empty: it was not measured."""
    table = card.partition("\n## Denoising\n")[2].partition("\n## ")[0]
    measured_on, rows = _MEASURED_ON.search(table), _ROW.findall(table)
    if not measured_on or not rows:
        return {}
    metrics = [
        {"type": "psnr", "name": f"PSNR in dB, noise {sigma}", "value": float(mean)}
        for sigma, mean in rows
    ]
    result = {
        "task": {"type": "image-to-image", "name": "Denoising"},
        "dataset": {"type": measured_on[2], "name": measured_on[1]},
        "metrics": metrics,
    }
    return {"model-index": [{"name": name, "results": [result]}]}
