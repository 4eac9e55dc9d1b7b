"""A run's folder is whole: what is done later needs no data set, and says where it changed."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from fl_app import data
from fl_app.audit.baselines import MEAN_COLOUR, TRAINING
from fl_app.audit.truth import Truth, write_truth
from fl_app.config import Config, ConfigError, DatasetConfig, load_config
from fl_app.data import dataset_info
from fl_app.protocol import Observation
from fl_app.runs.facts import open_auditor, prior_saw, run_facts
from fl_app.runs.folder import create_run
from server_strategies.priors.flow import load_flow


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Return a folder of images of two classes."""
    draw = np.random.default_rng(0)
    for name in ("train/cat", "train/dog", "test/cat"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(3):
            pixels = draw.integers(0, 256, (12, 12, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{number}.png")
    return tmp_path / "images"


def _run(images: Path) -> tuple[Path, Config]:
    overrides = f"runs_dir={images.parent}/runs dataset.source={images}"
    config = load_config({"dataset": "imagefolder", "overrides": overrides})
    knowledge = config.knowledge(dataset_info(config.dataset))
    return create_run(config, run_facts(config, knowledge, simulated=True)), config


def _as_a_new_process() -> None:
    for cached in (data.dataset_info, data.fingerprint, data._encoded_split):
        cached.cache_clear()


def _gone(images: Path) -> None:
    shutil.rmtree(images)


def _another_class(images: Path) -> None:
    shutil.copytree(images / "train" / "dog", images / "train" / "eel")


def _another_label(images: Path) -> None:
    (images / "train" / "dog" / "0.png").rename(images / "train" / "cat" / "new.png")


def _another_image(images: Path) -> None:
    pixels = np.asarray(Image.open(images / "train" / "dog" / "1.png"))
    # Neither mean nor standard deviation change.
    Image.fromarray(pixels[::-1].copy()).save(images / "train" / "dog" / "1.png")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda images: None, ""),
        (_gone, "is not here"),
        (_another_class, "num_classes was 2 and is 3"),
        (_another_label, "its images or labels have changed"),
        (_another_image, "its images or labels have changed"),
    ],
)
def test_what_was_recorded_is_used_whatever_became_of_the_data(
    change: object, words: str, images: Path
) -> None:
    folder, config = _run(images)
    known = config.knowledge(dataset_info(config.dataset))
    change(images)  # type: ignore[operator]
    _as_a_new_process()
    told: list[str] = []
    auditor = open_auditor(folder, told.append)
    assert auditor.knowledge == known
    assert len(told) == bool(words) and all(words in line for line in told)
    seen = Observation({}, {}, num_examples=1, round=1, node=1, client=0)
    write_truth(folder, Truth(torch.full((1, 3, 12, 12), 0.5), (0,), ((0,),), 1, 1))
    auditor._score = lambda *_: None  # type: ignore[method-assign, assignment, return-value]
    scores, reasons = auditor.baselines(seen)
    assert MEAN_COLOUR in scores
    assert (TRAINING in scores) == (not words) and words in reasons.get(TRAINING, "")


@pytest.mark.parametrize(
    "facts", [{}, "many", [1], {"num_classes": "ten"}, {"image_shape": [3, -1, 1]}, {"mean": [0.5]}]
)
def test_facts_that_cannot_be_used_are_named_with_their_file(facts: object, images: Path) -> None:
    folder, _ = _run(images)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["data"] = {**config["data"], **facts} if facts and isinstance(facts, dict) else facts
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(ConfigError, match=r"data \(from .*config.yaml\)"):
        open_auditor(folder, print)


def test_a_run_records_what_it_ran_on(images: Path) -> None:
    folder, config = _run(images)
    recorded = yaml.safe_load((folder / "config.yaml").read_text())
    assert recorded["data"]["image_shape"] == [3, 12, 12]
    assert len(recorded["data"]["fingerprint"]) == len(recorded["prior_sha256"]) == 64
    assert {"python", "flwr", "torch", "datasets"} <= recorded["versions"].keys()
    deployed = run_facts(config, config.knowledge(dataset_info(config.dataset)), simulated=False)
    assert deployed["data"]["fingerprint"] is None  # of other machines' images


def test_a_prior_that_saw_the_clients_images_is_told() -> None:
    def saw(name: str, split: str) -> bool:
        return prior_saw(load_flow("compact"), DatasetConfig(name, "x", split))

    assert saw("tiny_imagenet", "train")
    assert not saw("tiny_imagenet", "test")
    assert not saw("cifar10", "train")  # named as what was left out
    assert load_config({"dataset": "tiny_imagenet"}).dataset.split == "test"
    assert not prior_saw(torch.nn.Identity(), DatasetConfig())
