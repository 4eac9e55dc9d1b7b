"""The user's command `flwr`, in a Flower home and on ports of its own."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
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

    def flwr(self, *arguments: str) -> str:
        """Run `flwr` in the project's folder; return its output."""
        done = subprocess.run(
            [str(SCRIPTS / "flwr"), *arguments],
            cwd=PROJECT, env=self.environment, capture_output=True, text=True, timeout=600,
            check=True,
        )  # fmt: skip
        return done.stdout

    def audit(self, config: str) -> tuple[str, str]:
        """Run the audit to its end with a run config; return its status and its log."""
        started = self.flwr("run", ".", "local-simulation", "--format", "json", "-c", config)
        run_id = json.loads(started[started.index("{") :])["run-id"]
        deadline = time.monotonic() + 500
        while time.monotonic() < deadline:
            listed = self.flwr("list", "local-simulation", "--run-id", run_id, "--format", "json")
            status = json.loads(listed[listed.index("{") :])["runs"][0]["status"]
            if status.startswith("finished"):
                return status, self.flwr("log", run_id, "local-simulation", "--show")
            time.sleep(2)
        raise TimeoutError(f"run {run_id} did not finish")

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
def flower_home(folder: Path, **variables: str) -> Iterator[FlowerHome]:
    """Yield a Flower home in a folder, with variables of its own; its SuperLink ends with it."""
    http, control = _free_ports(2)
    environment = {
        **os.environ,
        "FLWR_HOME": str(folder),
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": http,
        "FLWR_LOCAL_CONTROL_API_PORT": control,
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "PATH": f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}",
        **variables,
    }
    home = FlowerHome(environment, http)
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
