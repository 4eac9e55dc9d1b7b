"""The words of the wire: what both sides, and an attack, may speak of.

Observation, Knowledge and Reconstruction are three of the project's five
nouns; Truth and Leakage belong to the auditor (`fl_app.audit`). Free of torch.
"""

from fl_app.protocol.client import Client
from fl_app.protocol.defense import Defense
from fl_app.protocol.knowledge import LABEL_LEVELS, DatasetInfo, Knowledge
from fl_app.protocol.observation import Observation, observation_id, round_and_node, trained_names
from fl_app.protocol.reconstruction import Budget, Reconstruction
from fl_app.protocol.training import LocalTraining, ParameterGroup

__all__ = [
    "LABEL_LEVELS",
    "Budget",
    "Client",
    "DatasetInfo",
    "Defense",
    "Knowledge",
    "LocalTraining",
    "Observation",
    "ParameterGroup",
    "Reconstruction",
    "observation_id",
    "round_and_node",
    "trained_names",
]
