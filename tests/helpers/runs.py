"""A run as a simulation leaves it before its first attack."""

from __future__ import annotations

from pathlib import Path

from fl_app.audit.truth import Truth, write_truth
from fl_app.benchmarks.case import Case
from fl_app.benchmarks.clients import draw_client
from fl_app.config import Config
from fl_app.data import dataset_info, load_split
from fl_app.protocol import Observation
from fl_app.runs.folder import create_run
from server_strategies.observations import ObservationStore


def recorded_run(config: Config) -> tuple[Path, Observation, Truth]:
    """Make a run's folder with one client's Observation and Truth in it."""
    images, info = load_split(config.dataset, "test"), dataset_info(config.dataset)
    case = Case(config.client, config.attack)
    observation, _, truth = draw_client(case, images, info, seed=0)
    folder = create_run(config)
    ObservationStore(folder).save(observation)
    write_truth(folder, truth)
    return folder, observation, truth
