"""A deployment of real processes that are killed one after the other, on a network of its own.

Ray listens on every interface of its machine, so all of it runs in a namespace
where there is none but the loopback; what is left over ends with the namespace.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from fl_app.config import AttackConfig, PriorConfig
from fl_app.lan.keys import make_kits
from fl_app.protocol import Knowledge
from fl_app.runs.attacking import score_later
from server_strategies.attack_pool import Job, enqueue, pending
from server_strategies.observations import ObservationStore

PROJECT = Path(__file__).resolve().parents[3]
HOST, PORT, RAY_PORT = "10.9.0.1", 9400, 9401
INSIDE = "FLOWLEAK_TEST_INSIDE"
PATIENCE = 240.0

inside = pytest.mark.skipif(INSIDE not in os.environ, reason="runs in a namespace of its own")


@pytest.mark.skipif(INSIDE in os.environ, reason="starts the others")
def test_in_a_namespace_of_its_own() -> None:
    unshare = ["unshare", "-Urnpf", "--mount-proc", "--kill-child"]
    if (
        not shutil.which("unshare")
        or subprocess.run([*unshare, "true"], capture_output=True).returncode
    ):
        pytest.skip("this system makes no namespaces for its users")
    network = f"ip link set lo up && ip addr add {HOST}/32 dev lo && exec"
    tests = [sys.executable, "-m", "pytest", "-x", "-n0", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(
        [*unshare, "sh", "-c", f'{network} "$@"', "sh", *tests],
        env=os.environ | {INSIDE: "1"}, cwd=PROJECT, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)


class Deployment:
    """Processes of `flowleak lan`, with a folder and a Flower home of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.runs = folder / "runs"
        # A Ray that this process has set up for itself is not theirs.
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        self.environment = inherited | {
            "PYTHONPATH": str(PROJECT),
            "FLWR_HOME": str(folder / "flwr"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        }
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "flowleak", "lan", *arguments]

    def start(self, name: str, *arguments: str) -> None:
        with (self.folder / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                self.command(*arguments), cwd=PROJECT, env=self.environment,
                stdout=log, stderr=subprocess.STDOUT,
            )  # fmt: skip

    def start_server(self, *options: str) -> None:
        log = self.folder / "server.log"
        ready = log.read_text().count("Ready") if log.exists() else 0
        kit = str(self.folder / "lan" / "server")
        self.start("server", "server", kit, "--runs-dir", str(self.runs), *options)
        server = self.processes["server"]
        wait_until(
            lambda: server.poll() is not None or log.read_text().count("Ready") > ready,
            "the server is ready",
        )
        assert server.poll() is None, self.logs()

    def flwr(self, *arguments: str, home: str = "flwr") -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["flwr", *arguments], cwd=PROJECT, capture_output=True, text=True, timeout=60,
            env=self.environment | {"FLWR_HOME": str(self.folder / home)},
        )  # fmt: skip

    def run(self, overrides: str) -> None:
        config = f'attack="sme" overrides="runs_dir={self.runs} num_clients=2 {overrides}"'
        started = self.flwr("run", ".", "lan", "-c", config)
        assert started.returncode == 0, started.stdout + started.stderr

    def logs(self) -> str:
        return "\n".join(
            f"--- {log.name}\n{log.read_text()[-3000:]}" for log in self.folder.glob("*.log")
        )


def wait_until(true: Callable[[], Any], what: str, patience: float = PATIENCE) -> None:
    deadline = time.monotonic() + patience
    while not true():
        assert time.monotonic() < deadline, f"waited {patience:.0f} s until {what}"
        time.sleep(0.2)


def find(*words: str) -> list[int]:
    """Return the processes of this namespace whose command line has all the words."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if entry.name.isdigit() and all(word in line for word in words):
            found.append(int(entry.name))
    return found


def ray_folder(pid: int) -> Path:
    """Return where a process keeps Ray's files."""
    settings = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
    (folder,) = (each.partition("=")[2] for each in settings if each.startswith("RAY_TMPDIR="))
    return Path(folder)


def kill(*words: str) -> None:
    found = find(*words)
    assert found, f"no process {words}"
    for pid in found:
        os.kill(pid, signal.SIGKILL)


def lines(run: Path) -> list[dict[str, Any]]:
    log = run / "leakage.jsonl"
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


@pytest.fixture(scope="module")
def lan(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    lan = Deployment(tmp_path_factory.mktemp("lan"))
    made = subprocess.run(
        lan.command("init", HOST, "--worker", HOST, "--folder", str(lan.folder / "lan")),
        env=lan.environment, capture_output=True, text=True,
    )  # fmt: skip
    assert made.returncode == 0, made.stdout + made.stderr
    lan.start_server()
    yield lan
    for process in lan.processes.values():
        process.terminate()
    for process in lan.processes.values():
        process.wait(30)


@inside
def test_nobody_enters_without_a_key(lan: Deployment) -> None:
    kits = lan.folder / "lan"
    ca = kits / "client-0" / "ca.crt"
    home = lan.folder / "stranger"
    home.mkdir()
    shutil.copy(lan.folder / "flwr" / "config.toml", home)
    for arguments in (("run", ".", "lan"), ("list", "lan"), ("supernode", "list", "lan")):
        refused = lan.flwr(*arguments, home="stranger")
        assert refused.returncode and "uthenticat" in refused.stdout + refused.stderr
    # The ServerApp's side of the SuperLink: whoever acquires a task reads its updates.
    url = f"https://{HOST}:{PORT}/v1/runtime/acquire-task"
    body = {"content": b"", "headers": {"Content-Type": "application/protobuf"}}
    answer = httpx.post(url, verify=ssl.create_default_context(cafile=ca), **body)
    assert answer.status_code in (401, 403), answer.text
    with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
        httpx.post(url, **body)
    # A client whose key the server never saw.
    make_kits(lan.folder / "others", HOST, 1, [HOST], PORT, RAY_PORT)
    shutil.copy(ca, lan.folder / "others" / "client-0" / "ca.crt")
    stranger = subprocess.run(
        lan.command("client", str(lan.folder / "others" / "client-0"), "--partition", "0"),
        env=lan.environment, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert stranger.returncode == 1 and "SuperNode ended" in stranger.stdout
    assert "does not take this client's key" in stranger.stdout
    # And one that looks for its own server and finds ours.
    lost = subprocess.run(
        lan.command("worker", str(lan.folder / "others" / f"worker-{HOST}")),
        env=lan.environment, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert lost.returncode == 2 and "no valid certificate of this kit" in lost.stderr
    # Ray takes nobody without a certificate of ours; its token comes after that.
    context = ssl.create_default_context(cafile=ca)
    plain = socket.create_connection((HOST, RAY_PORT))
    with context.wrap_socket(plain, server_hostname=HOST) as secure:
        assert secure.recv(1) == b""


@inside
def test_training_and_attacks_outlive_what_is_killed(lan: Deployment) -> None:
    run = lan.runs / "audit"
    for i in (0, 1):
        kit = str(lan.folder / "lan" / f"client-{i}")
        lan.start(
            f"client-{i}", "client", kit, "--partition", str(i),
            "--truth-dir", str(lan.folder / f"truth-{i}"),
        )  # fmt: skip
    for i in (0, 1):
        lan.start(f"worker-{i}", "worker", str(lan.folder / "lan" / f"worker-{HOST}"))
    began = time.monotonic()
    lan.run(
        "rounds=2 strategy.fraction_evaluate=0 watch.clients=all watch.rounds=[] "
        "attack.iterations=9999 attack.seconds=3 client.batch_size=1 client.local_steps=1"
    )
    wait_until(lambda: run.exists() and len(ObservationStore(run).ids()) == 2, "round 1 was seen")

    # A client's machine dies in round 2; the server hears of it by a missing heartbeat.
    kill("client-1/node.key")
    # A worker dies in the middle of an attack: the attack goes to another. (Its process is called
    # after the method that it began last, which is seldom the attack.)
    wait_until(lambda: find("ray::_Worker"), "an attack runs")
    killed = find("ray::_Worker")[0]
    os.kill(killed, signal.SIGKILL)
    # The Ray head dies, and with it the process that drives the attacks.
    wait_until(lambda: set(find("ray::_Worker")) - {killed}, "the attack goes on")
    kill("gcs_server")
    wait_until(lambda: (run / "training.json").exists(), "the training is done")
    print(f"trained after {time.monotonic() - began:.0f} s")
    rounds = json.loads((run / "training.json").read_text())
    assert [each["round"] for each in rounds if each["train"]] == [1, 2]
    wait_until(lambda: not pending(run), "all attacks are done")
    print(f"attacked after {time.monotonic() - began:.0f} s")
    done = lines(run)
    assert Counter((line["round"], line["status"]) for line in done) == {
        (1, "ok"): 2, (2, "ok"): 1, (2, "skipped"): 1,
    }, lan.logs()  # fmt: skip
    assert not any(line["metrics"] or line["truth"] for line in done)
    assert {line["labels"] for line in done} == {"unknown"}
    scores = [line["reference_free"] for line in done if line["status"] == "ok"]
    assert all(each["tv"]["mean"] < each["tv"]["baseline"] for each in scores)

    # The client that lives kept its Truth; its machine's owner hands it to the auditor.
    (kept,) = (lan.folder / "truth-0").iterdir()
    assert not (run / "truth").exists()
    assert [line["metrics"]["psnr"]["mean"] > 0 for line in score_later(run, kept)[0]] == [True] * 2
    assert score_later(run, kept) == ([], [])


@inside
def test_a_killed_server_goes_on_where_it_was(lan: Deployment) -> None:
    """No finished attack is repeated, none is lost."""
    run = lan.runs / "audit"
    finished, seen = lines(run), ObservationStore(run).ids()
    killed = ray_folder(find("gcs_server")[0])
    kill("flowleak", "lan", "server")  # and the kernel ends what it had started
    wait_until(lambda: not find("fl_app.lan.superlink") and not find("gcs_server"), "all ended")
    attack = AttackConfig("sme", iterations=2)
    observation = ObservationStore(run).load(seen[0])
    knowledge = Knowledge("convnet", 5, (3, 32, 32), (0.5,) * 3, (0.5,) * 3, None)
    jobs = [Job(observation, knowledge, attack, PriorConfig(), seed) for seed in range(3)]
    # As if it had been killed between a job's line and the end of its queue entry.
    again = next(line["job"] for line in finished if line["job"])
    jobs.append(Job(observation, knowledge, attack, PriorConfig(), 0, again))
    for job in jobs:
        enqueue(run, job)
    assert killed.exists()
    lan.start_server("--resume")
    assert not killed.exists()
    wait_until(lambda: not pending(run), "the queue is empty")
    jobs_done = Counter(line["job"] for line in lines(run)[len(finished) :])
    assert jobs_done == {job.id: 1 for job in jobs[:3]}


@inside
@pytest.mark.skipif("FLOWLEAK_SLOW" not in os.environ, reason="two minutes; set FLOWLEAK_SLOW=1")
def test_a_client_cut_off_for_thirty_seconds_is_waited_for(lan: Deployment) -> None:
    """The client has a network of its own, and one wire to the server."""
    if "client-0" in lan.processes:
        lan.processes["client-0"].terminate()
        lan.processes["client-0"].wait(30)
    run, kit = lan.runs / "cut", str(lan.folder / "lan" / "client-1")
    command = lan.command("client", kit, "--partition", "0")
    client = subprocess.Popen(
        ["unshare", "-n", "sh", "-c", 'read _; exec "$@"', "sh", *command],
        env=lan.environment, cwd=PROJECT, stdin=subprocess.PIPE,
    )  # fmt: skip
    lan.processes["cut"] = client
    here = os.readlink("/proc/self/ns/net")
    wait_until(lambda: os.readlink(f"/proc/{client.pid}/ns/net") != here, "it has its network")
    there = f"nsenter -t {client.pid} -n ip"
    for step in (
        f"ip link add wire type veth peer name wire netns {client.pid}",
        "ip addr add 10.9.1.1/24 dev wire",
        "ip link set wire up",
        f"{there} addr add 10.9.1.2/24 dev wire",
        f"{there} link set lo up",
        f"{there} link set wire up",
        f"{there} route add {HOST} via 10.9.1.1",
    ):
        subprocess.run(step.split(), check=True)
    assert client.stdin
    client.stdin.write(b"go\n")
    client.stdin.close()
    lan.run(
        "name=cut num_clients=1 rounds=3 strategy.fraction_evaluate=0 watch.clients=all "
        "watch.rounds=[] attack.iterations=1"
    )
    wait_until(lambda: run.exists() and ObservationStore(run).ids(), "round 1 was seen")
    subprocess.run(["ip", "link", "set", "wire", "down"], check=True)
    time.sleep(30)
    subprocess.run(["ip", "link", "set", "wire", "up"], check=True)
    wait_until(lambda: (run / "training.json").exists(), "the training is done")
    rounds = json.loads((run / "training.json").read_text())
    assert [each["round"] for each in rounds if each["train"]] == [1, 2, 3]
    assert len(ObservationStore(run).ids()) == 3


# A Ray of this machine alone, as a simulation or `flowleak attack` starts one.
LOCAL = """
import pathlib, fl_app.runs.attacking
from fl_app.config import PoolConfig
from server_strategies.attack_pool import AttackPool, ray
pool = AttackPool(pathlib.Path("."), PoolConfig(workers=1), print, print)
pool._start_ray()
print(len(ray.nodes()), "machine")
pool.close()
"""


@inside
def test_an_end_leaves_nothing_that_another_ray_could_take_for_its_own(lan: Deployment) -> None:
    folder = ray_folder(find("gcs_server")[0])
    workers = {name: each for name, each in lan.processes.items() if name.startswith("worker")}
    folders = {folder, *map(ray_folder, find("ray", "start", "--address"))}
    for process in (lan.processes["server"], *workers.values()):
        process.terminate()
        assert process.wait(60) == 0
    assert len(folders) == 3
    for each in folders:
        assert not each.exists(), list(each.rglob("*"))[:5]
    done = subprocess.run(
        [sys.executable, "-c", LOCAL],
        cwd=PROJECT, env=lan.environment, capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert done.stdout == "1 machine\n", done.stderr
