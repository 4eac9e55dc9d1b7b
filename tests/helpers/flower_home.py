"""The user's command `flwr`, in a Flower home and on ports of its own."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
SCRIPTS = Path(sys.executable).parent


@dataclass(frozen=True)
class FlowerHome:
    """A Flower home whose SuperLink, once a run has started it, listens on a port of its own."""

    environment: Mapping[str, str]
    port: str
    enter: tuple[str, ...] = ()
    app: Path = PROJECT

    def flwr(self, *arguments: str) -> str:
        """Run `flwr` in the app's folder; return its output."""
        done = subprocess.run(
            [*self.enter, str(SCRIPTS / "flwr"), *arguments],
            cwd=self.app, env=self.environment, capture_output=True, text=True, timeout=600,
            check=True,
        )  # fmt: skip
        return done.stdout

    def start(self, config: str) -> str:
        """Start the audit with a run config; return the run's id."""
        # Flower gives its SuperLink 15 seconds to start, and ends it where a busy machine takes
        # longer.
        for _ in range(3):
            started = self.flwr("run", ".", "local-simulation", "--format", "json", "-c", config)
            answer = json.loads(started[started.index("{") :])
            if "run-id" in answer or "Failed to start local SuperLink" not in started:
                break
        assert "run-id" in answer, started
        return str(answer["run-id"])

    def status(self, run_id: str) -> str:
        """Return a run's status, as Flower words it."""
        listed = self.flwr("list", "local-simulation", "--run-id", run_id, "--format", "json")
        return str(json.loads(listed[listed.index("{") :])["runs"][0]["status"])

    def audit(self, config: str) -> tuple[str, str]:
        """Run the audit to its end with a run config; return its status and its log."""
        run_id = self.start(config)
        log = self.flwr("log", run_id, "local-simulation")  # as it comes, to the run's end
        return self.ended(run_id), log

    def follow(self, run_id: str) -> subprocess.Popen[bytes]:
        """Return a process that ends with a run: asking for its status takes one each time."""
        command = [*self.enter, str(SCRIPTS / "flwr"), "log", run_id, "local-simulation"]
        return subprocess.Popen(
            command, cwd=self.app, env=self.environment, stdout=subprocess.DEVNULL
        )

    def ended(self, run_id: str) -> str:
        """Return the status of a run that has ended."""
        deadline = time.monotonic() + 30
        while not (status := self.status(run_id)).startswith("finished"):
            assert time.monotonic() < deadline, f"run {run_id} is {status}"
        return status

    def superlinks(self) -> list[int]:
        """Return the process that serves this home's port; the port makes it ours."""
        listing = subprocess.run(
            ["ps", "-ww", "-eo", "pid=,args="], capture_output=True, text=True
        ).stdout
        lines = (line.split() for line in listing.splitlines())
        return [
            int(words[0])
            for words in lines
            if any(word.endswith("flower-superlink") for word in words) and self.port in words
        ]


@contextmanager
def flower_home(
    folder: Path, enter: Sequence[str] = (), app: Path = PROJECT, **variables: str
) -> Iterator[FlowerHome]:
    """Yield a Flower home in a folder; its SuperLink ends with it.

    Parameters
    ----------
    folder : Path
    enter : sequence of str
        What precedes every command, see `Host.enter`.
    app : Path
        Folder of the Flower app that it runs.
    variables : str
        Of the environment, beside its own.
    """
    http, control = _free_ports(2)
    environment = {
        # A Ray that this process has set up for itself is not theirs.
        **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
        "FLWR_HOME": str(folder),
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": http,
        "FLWR_LOCAL_CONTROL_API_PORT": control,
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "PATH": f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}",
        **variables,
    }
    home = FlowerHome(environment, http, tuple(enter), app)
    yield home
    assert home.superlinks(), "the first run leaves a SuperLink behind; it must be found"
    for pid in home.superlinks():
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + 20
    while home.superlinks() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not home.superlinks()


def _free_ports(count: int) -> list[str]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [str(each.getsockname()[1]) for each in sockets]
    for each in sockets:
        each.close()
    return ports
