"""Nobody else gets in: what listens while an audit runs, seen from another host."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.flower_home import PROJECT, flower_home
from helpers.namespaces import Host, two_hosts, unavailable

pytestmark = pytest.mark.skipif(bool(unavailable()), reason=unavailable())

KNOCK = """
import json, socket, sys
address, ports = sys.argv[1], json.loads(sys.argv[2])
opened = []
for port in ports:
    try:
        socket.create_connection((address, port), timeout=2).close()
        opened.append(port)
    except OSError:
        pass
print(json.dumps(opened))
"""
# A task on a running Ray, by whoever knows its port; a refusal ends it with an error.
TASK = """
import ray, sys
ray.init(address=sys.argv[1], log_to_driver=False)
print(ray.get(ray.remote(lambda: "stolen").remote(), timeout=15))
"""
SERVE = "import socket, time; s = socket.create_server(('0.0.0.0', 45001)); time.sleep(600)"


@pytest.fixture(scope="module")
def hosts() -> Iterator[tuple[Host, Host]]:
    """Yield the auditor's host and a stranger's."""
    with two_hosts() as hosts:
        yield hosts


def _opened(auditor: Host, stranger: Host) -> list[int]:
    """Return the ports of the auditor's host that let a stranger in."""
    ports = json.dumps(sorted(auditor.listening()))
    command = [*stranger.enter, sys.executable, "-c", KNOCK, auditor.address, ports]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    return list(json.loads(shown.stdout))


def _ray(auditor: Host) -> tuple[int, Path]:
    """Return the port of the Ray that runs there and its folder; 0 where there is none."""
    shown = subprocess.run(
        [*auditor.enter, "ss", "-ltnpH"], capture_output=True, text=True, check=True
    ).stdout
    for line in shown.splitlines():
        found = re.search(r":(\d+)\s.*gcs_server.*pid=(\d+)", line)
        if found:
            settings = Path(f"/proc/{found[2]}/environ").read_text().split("\0")
            folder = next(word for word in settings if word.startswith("RAY_TMPDIR="))
            return int(found[1]), Path(folder.partition("=")[2])
    return 0, Path()


def _steal(auditor: Host, port: int) -> subprocess.CompletedProcess[str]:
    """Try to run a task on the auditor's own machine, without the token."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    return subprocess.run(
        [*auditor.enter, sys.executable, "-c", TASK, f"127.0.0.1:{port}"],
        env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def test_a_door_that_is_open_is_found(hosts: tuple[Host, Host]) -> None:
    auditor, stranger = hosts
    with subprocess.Popen([*auditor.enter, sys.executable, "-c", SERVE]) as server:
        while 45001 not in auditor.listening():
            time.sleep(0.1)
        assert _opened(auditor, stranger) == [45001]
        server.kill()


def test_no_stranger_gets_into_a_simulation(hosts: tuple[Host, Host], tmp_path: Path) -> None:
    auditor, stranger = hosts
    # The audit starts offline, too: nothing here leads to a network, and uv has nothing to fetch.
    routes = [*auditor.enter, "ip", "route", "show", "default"]
    assert not subprocess.run(routes, capture_output=True, check=True).stdout
    settings = f"runs_dir={tmp_path} name=closed rounds=1 watch.clients=[0] attack.seconds=15"
    settings += " attack.iterations=1000000"
    with flower_home(tmp_path / "flwr", auditor.enter) as home:
        run_id = home.start(f'attack="sme" overrides="{settings}"')
        opened: set[int] = set()
        refused = None
        with home.follow(run_id) as run:
            while run.poll() is None:
                opened |= set(_opened(auditor, stranger))
                port, folder = _ray(auditor)
                if port and refused is None:
                    refused, kept = _steal(auditor, port), folder
        status, log = home.ended(run_id), home.flwr("log", run_id, "local-simulation")
    assert status == "finished:completed", log
    assert not opened
    assert refused is not None and refused.returncode != 0
    assert "stolen" not in refused.stdout and "oken" in refused.stderr
    assert not kept.exists()


def test_no_stranger_gets_into_a_later_attack(hosts: tuple[Host, Host], tmp_path: Path) -> None:
    auditor, stranger = hosts
    script = (
        "import sys; from pathlib import Path; import fl_app.runs.attacking, time;"
        "from fl_app.config import PoolConfig;"
        "from server_strategies.attack_pool import AttackPool;"
        "pool = AttackPool(Path(sys.argv[1]), PoolConfig(workers=1), print, print);"
        "pool._start_ray(); print('up', flush=True); sys.stdin.read(); pool.close()"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    command = [*auditor.enter, sys.executable, "-c", script, str(tmp_path)]
    with subprocess.Popen(
        command, env=environment | {"PYTHONPATH": str(PROJECT)}, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as pool:  # fmt: skip
        assert pool.stdout and pool.stdin
        assert pool.stdout.readline() == "up\n"
        assert _opened(auditor, stranger) == []
        port, folder = _ray(auditor)
        assert folder.exists()
        refused = _steal(auditor, port)
        assert refused.returncode != 0 and "stolen" not in refused.stdout
        pool.stdin.close()
        assert pool.wait(60) == 0
    assert not folder.exists()
