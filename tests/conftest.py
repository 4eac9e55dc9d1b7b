"""What all tests share: the cores, among pytest-xdist's processes, Ctrl-C, and a wide screen."""

import os
import signal

import pytest

# Threads that outnumber the cores wait for each other in a loop. Set before the libraries are
# loaded, by this process and by those that tests start; not by the one that starts pytest-xdist's,
# from which these would have it.
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    _share = (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, _share)))

from helpers.federation import identity as identity

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell starts what runs in its background so, and what tests start would not hear Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ["COLUMNS"] = "200"  # rich wraps what it prints, and takes 80 where it does not know


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put short files last, so that pytest-xdist's processes end at the same time."""
    items.sort(key=lambda item: "server_strategies/attacks" in item.nodeid)
