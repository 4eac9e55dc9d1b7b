"""Where the paths of a configuration and of a command lead."""

from __future__ import annotations

from pathlib import Path

import pytest

from fl_app.commands.arguments import dataset_config
from fl_app.config import Config, DatasetConfig, PriorConfig, from_yaml
from fl_app.data.base import DataError, find_folder
from fl_app.runs.folder import anchored, create_run
from fl_app.util.files import runs_folder, user_path
from server_strategies.priors.places import find_weights


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder where a command is typed: that of no checkout."""
    (tmp_path / "images").mkdir()
    (tmp_path / "own.safetensors").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FLOWLEAK_RUNS", raising=False)
    return tmp_path


def test_relative_paths_are_from_where_the_command_was_typed(here: Path) -> None:
    assert find_folder("images") == find_folder("./images") == here / "images"
    assert find_weights("own.safetensors") == here / "own.safetensors"
    assert dataset_config("./images").source == str(here / "images")
    assert (user_path("/runs"), user_path("~/runs")) == (Path("/runs"), Path.home() / "runs")
    run = create_run(Config(runs_dir="runs"))
    assert run.parent == here / "runs"
    assert from_yaml(run / "config.yaml").runs_dir == str(here / "runs")
    with pytest.raises(DataError, match="own images is not a folder"):
        find_folder("own images")


def test_a_run_keeps_whole_paths(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is done later is done from elsewhere."""
    dataset = DatasetConfig("imagefolder", source="images")
    config = anchored(Config(dataset=dataset, prior=PriorConfig("own.safetensors")))
    monkeypatch.chdir("/")
    assert find_folder(config.dataset.source) == here / "images"
    assert find_weights(config.prior.weights) == here / "own.safetensors"
    names = Config(dataset=DatasetConfig("cifar10", source="uoft-cs/cifar10"))
    assert anchored(names) == names  # of the hub, and of a shipped prior


def test_a_variable_names_a_folder_for_all_runs(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLOWLEAK_RUNS", "all")
    assert create_run(Config()).parent == runs_folder() == here / "all"
    assert runs_folder("mine") == here / "mine"
    assert runs_folder("/mine") == Path("/mine")
