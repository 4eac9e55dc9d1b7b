"""Where the paths of a configuration and of a command lead."""

from __future__ import annotations

from pathlib import Path

import pytest

from fl_app.commands.arguments import dataset_config
from fl_app.config import Config, from_yaml
from fl_app.data.base import DataError, find_folder
from fl_app.runs.folder import create_run
from fl_app.util import files
from fl_app.util.files import user_path
from server_strategies.priors.flow import find_weights


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a project's folder that is installed editable; the working folder is beside it."""
    for folder in ("project/images", "elsewhere/images"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "elsewhere" / "own images").mkdir()
    (tmp_path / "project" / "own.safetensors").touch()
    monkeypatch.setattr(files, "_origin", lambda: (tmp_path / "project", True))
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path / "project"


def test_relative_settings_are_from_the_project_wherever_a_process_works(project: Path) -> None:
    assert find_folder("images") == find_folder("./images") == project / "images"
    assert find_weights("own.safetensors") == project / "own.safetensors"
    run = create_run(Config(runs_dir="runs"))
    assert run.parent == project / "runs"
    assert from_yaml(run / "config.yaml").runs_dir == str(project / "runs")
    with pytest.raises(DataError, match="project/own images is not a folder"):
        find_folder("own images")


def test_other_paths(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert user_path("/runs") == Path("/runs")
    assert user_path("~/runs") == Path.home() / "runs"
    for origin in (None, (project, False)):  # not installed, or as a copy
        monkeypatch.setattr(files, "_origin", lambda origin=origin: origin)
        assert user_path("runs") == project.parent / "elsewhere" / "runs"


def test_a_typed_folder_is_from_the_working_folder(project: Path) -> None:
    for name in ("images", "own images"):
        assert dataset_config(f"./{name}").source == str(project.parent / "elsewhere" / name)
