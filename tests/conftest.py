"""What all tests share: the cores, among pytest-xdist's processes, and a wide screen."""

import os

_WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
# Read when the libraries are loaded, by this process and by those that tests start. Threads that
# outnumber the cores wait for each other in a loop.
os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // _WORKERS)))

from helpers.federation import identity as identity  # noqa: E402  a fixture of every test

os.environ["COLUMNS"] = "200"  # rich wraps what it prints, and takes 80 where it does not know
