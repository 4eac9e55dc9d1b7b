"""The user's command, in a Flower home and on ports of its own."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

PROJECT = Path(__file__).resolve().parents[1]
Flwr = Callable[..., str]


def _free_ports(count: int) -> list[str]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [str(each.getsockname()[1]) for each in sockets]
    for each in sockets:
        each.close()
    return ports


def _superlinks(port: str) -> list[int]:
    """Return the process that serves this port; the port makes it ours."""
    listing = subprocess.run(
        ["ps", "-ww", "-eo", "pid=,args="], capture_output=True, text=True
    ).stdout
    lines = (line.split() for line in listing.splitlines())
    return [
        int(words[0])
        for words in lines
        if any(word.endswith("flower-superlink") for word in words) and port in words
    ]


@pytest.fixture(scope="module")
def flwr(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Flwr]:
    """Yield a function that runs `flwr` with the arguments and returns its output."""
    http, control = _free_ports(2)
    scripts = Path(sys.executable).parent
    environment = os.environ | {
        "FLWR_HOME": str(tmp_path_factory.mktemp("flwr")),
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": http,
        "FLWR_LOCAL_CONTROL_API_PORT": control,
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}",
    }

    def run(*arguments: str) -> str:
        done = subprocess.run(
            [str(scripts / "flwr"), *arguments],
            cwd=PROJECT, env=environment, capture_output=True, text=True, timeout=600, check=True,
        )  # fmt: skip
        return done.stdout

    yield run
    assert _superlinks(http), "the first run leaves a SuperLink behind; it must be found"
    for pid in _superlinks(http):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + 20
    while _superlinks(http) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not _superlinks(http)


def _run(flwr: Flwr, overrides: str) -> tuple[str, str]:
    """Run the audit to its end; return its status and its log."""
    config = f'attack="sme" overrides="{overrides}"'
    started = flwr("run", ".", "local-simulation", "--format", "json", "-c", config)
    run_id = json.loads(started[started.index("{") :])["run-id"]
    deadline = time.monotonic() + 500
    while time.monotonic() < deadline:
        listed = flwr("list", "local-simulation", "--run-id", run_id, "--format", "json")
        status = json.loads(listed[listed.index("{") :])["runs"][0]["status"]
        if status.startswith("finished"):
            return status, flwr("log", run_id, "local-simulation", "--show")
        time.sleep(2)
    raise TimeoutError(f"run {run_id} did not finish")


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_audit_leaves_a_whole_run_and_a_clean_project(flwr: Flwr, tmp_path: Path) -> None:
    pyproject = (PROJECT / "pyproject.toml").read_bytes()
    status, log = _run(
        flwr, f"attack.iterations=3 rounds=2 runs_dir={tmp_path} name=tiny watch.clients=[0,3]"
    )
    assert status == "finished:completed", log
    run = tmp_path / "tiny"
    lines = _lines(run / "leakage.jsonl")
    assert sorted(line["client"] for line in lines) == [0, 3]
    assert {(line["status"], line["round"], line["iterations"]) for line in lines} == {("ok", 1, 3)}
    assert all((run / line["picture"]).is_file() for line in lines)
    assert len(list((run / "truth").glob("round-0001-*"))) == 4
    assert len(list((run / "truth").iterdir())) == 4  # none of round 2, which is not watched
    assert len(list((run / "observations").iterdir())) == 2
    assert list((run / "queue").iterdir()) == []
    assert json.loads((run / "training.json").read_text())[0]["round"] == 1
    models = sorted(file.name for file in (run / "models").iterdir())
    assert models == ["round-0001.safetensors", "round-0002.safetensors"]
    assert str(run / "leakage.jsonl") in log
    assert (PROJECT / "pyproject.toml").read_bytes() == pyproject


def test_bad_value_is_refused_before_anything_starts(flwr: Flwr, tmp_path: Path) -> None:
    status, log = _run(flwr, f"client.lr=-1 runs_dir={tmp_path}/runs")
    assert status == "finished:failed"
    assert "client.lr is -1" in log
    assert not (tmp_path / "runs").exists()


def test_missing_data_is_refused_before_anything_starts(flwr: Flwr, tmp_path: Path) -> None:
    missing = tmp_path / "no_such_folder"
    status, log = _run(
        flwr,
        f"dataset.name=cifar10 dataset.source={missing} rounds=1 runs_dir={tmp_path} name=none",
    )
    assert status == "finished:failed"
    assert f"{missing} is not a folder" in log
    assert not (tmp_path / "none").exists()
