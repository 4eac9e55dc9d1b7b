"""A privacy audit of federated learning on Flower.

The public API: everything that is not re-exported here may change without notice.

- `flowleak.Client`: what a server knows of its clients, described by you
- `flowleak.attack_update`: one update attacked in this process, as in a notebook
- `flowleak.watch`: your own strategy records what its server sees
- `flowleak.attacks`: the attacks, and what a new one is made of
- `flowleak.matching`: how an update follows from data
- `flowleak.priors`: image priors
- `flowleak.strategies`: the honest-but-curious server
- `flowleak.defenses`: what clients do so that less is seen
- `flowleak.audit`: scores and pictures, for whoever holds the ground truth
- `flowleak.tensorboard`: the log in TensorBoard
- `flowleak.models`, `flowleak.data`, `flowleak.benchmarks`
"""

from importlib import metadata as _metadata
from typing import Any as _Any

from fl_app.config import ConfigError as ConfigError
from fl_app.protocol import Budget as Budget
from fl_app.protocol import Client as Client
from fl_app.protocol import DatasetInfo as DatasetInfo
from fl_app.protocol import Defense as Defense
from fl_app.protocol import Knowledge as Knowledge
from fl_app.protocol import LocalTraining as LocalTraining
from fl_app.protocol import Observation as Observation
from fl_app.protocol import ParameterGroup as ParameterGroup
from fl_app.protocol import Reconstruction as Reconstruction


def __getattr__(name: str) -> _Any:
    """Return what needs Flower or torch when it is asked for."""
    if name == "watch":
        from flowleak.strategies import watch

        return watch
    if name == "attack_update":
        from flowleak.audit import attack_update

        return attack_update
    raise AttributeError(f"module 'flowleak' has no attribute {name!r}")


__version__ = _metadata.version("flowleak")
