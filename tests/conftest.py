"""What all tests share: the cores, among pytest-xdist's processes, and a wide screen."""

import os

import torch
from helpers.federation import identity as identity  # a fixture of every test

torch.set_num_threads(
    max(1, torch.get_num_threads() // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1)))
)
os.environ["COLUMNS"] = "200"  # rich wraps what it prints, and takes 80 where it does not know
