"""`flowleak lan`: the same app on several machines, one command a role.

Each command starts Flower's and Ray's own with the keys of its machine's kit;
docs/lan.md has them beside each other.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import ssl
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fl_app.commands.arguments import RunsDir, whole_numbers
from fl_app.commands.group import group
from fl_app.commands.output import print_json, screen, table_of
from fl_app.config import ConfigError, at_least, from_yaml
from fl_app.util.files import runs_folder
from fl_app.util.processes import Child, run_together
from fl_app.util.ray_guard import SLOT, own_folder

if TYPE_CHECKING:
    from fl_app.lan.ending import Ending
    from fl_app.lan.keys import Kit

lan_app = group("A federation on several machines: one command a role.")

_SCRIPTS = Path(sys.executable).parent
_RAY_WITH_TOKENS = (2, 52)
_START = 60.0  # seconds that the SuperLink may take to listen
_ANSWER = 5.0  # seconds that a server may take to answer

_QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",  # each machine has its own
    "PATH": f"{_SCRIPTS}{os.pathsep}{os.environ.get('PATH', '')}",
}

# What flower-supernode prints when it ends, and what that means.
_REFUSALS = {
    "[code: 2004]": (
        "{server} does not take this client's key, {key}. Either it isn't registered: its .pub "
        "belongs into nodes/ of the server's kit, where flowleak lan init puts it, and flowleak "
        "lan server registers it when it starts again; a kit of another init is never taken. Or a "
        "client with this key is running elsewhere, or died in the last minute: end it, or wait."
    ),
    "401 Unauthorized": (
        "{server} does not take what this client signs with {key}: is the clock right here and "
        "there?"
    ),
}

KitFolder = Annotated[
    Path, typer.Argument(help="This machine's kit, a folder from flowleak lan init.")
]


@lan_app.command()
def init(
    server: Annotated[
        str, typer.Argument(help="The server's IPv4 address, as the others reach it.")
    ],
    clients: Annotated[int, typer.Option(help="Kits for clients: client-0, client-1, ...")] = 2,
    worker: Annotated[
        list[str] | None, typer.Option(help="Address of a machine that takes attacks; repeatable.")
    ] = None,
    folder: Annotated[Path, typer.Option(help="Where the kits are made.")] = Path("lan"),
    port: Annotated[int, typer.Option(help="TCP port of the SuperLink.")] = 9400,
    ray_port: Annotated[int, typer.Option(help="TCP port of the Ray head.")] = 9401,
    connection: Annotated[str, typer.Option(help="Flower's name for it in flwr run.")] = "lan",
) -> None:
    """Make certificates, keys and the connection entry; run it again to add machines."""
    from fl_app.lan.keys import make_kits

    console = screen()
    for kit in make_kits(folder, server, clients, worker or [], port, ray_port):
        console.print(f"{kit.folder}", highlight=False, soft_wrap=True)
    _connect(_kit(folder / "server"), connection)
    console.print(
        f"Copy each kit to its machine, and to no other. {folder / 'ca.key'} stays here. "
        f"Runs are started with: flwr run . {connection} --stream",
        highlight=False,
        soft_wrap=True,
    )


@lan_app.command()
def status(
    folder: Annotated[Path, typer.Argument(help="A kit, or the folder of all kits.")] = Path("lan"),
    json_: Annotated[
        bool,
        typer.Option(
            "--json",
            help="Print a JSON list instead. Keys: kit, path, role, address (null: it has none), "
            "ends_first (a file), valid_until, days_left.",
        ),
    ] = False,
) -> None:
    """Say when certificates end; exit with 1 where one does within 14 days, or has ended."""
    from fl_app.lan.ending import endings

    found = endings(folder)
    if json_:
        print_json([_ending(each) for each in found])
    else:
        head = ["kit", "role", "address", "ends first", "valid until", "days left"]
        cells = [[str(value or "-") for value in _ending(each).values()] for each in found]
        screen().print(table_of([head, *([row[0], *row[2:]] for row in cells)]))
    if any(each.is_near for each in found):
        if not json_:
            _tell("To renew: flowleak lan renew, where ca.key is (docs/lan.md)")
        raise typer.Exit(1)


def _ending(of: Ending) -> dict[str, str | int | None]:
    return {
        "kit": of.folder.absolute().name,
        "path": str(of.folder.absolute()),
        "role": of.role,
        "address": of.address or None,
        "ends_first": of.file,
        "valid_until": of.valid_until.isoformat(),
        "days_left": of.days_left,
    }


@lan_app.command()
def renew(
    folder: Annotated[Path, typer.Argument(help="The folder of all kits, with ca.key.")] = Path(
        "lan"
    ),
) -> None:
    """Make the certificates again, with the same keys, and say what to copy again, and where."""
    from fl_app.lan.keys import renew_kits

    for name, files in renew_kits(folder).items():
        kit = folder / name
        if not files:
            _tell(f"{name}: nothing to copy")
        elif kit.exists():
            _tell(f"{name}: copy {' and '.join(str(kit / file) for file in files)} into its kit")
        else:  # it was moved to its machine
            _tell(f"{name}: copy {folder / 'ca.crt'} into its kit")
    _tell(
        "Then start flowleak lan server, worker and client again where files are new: they read "
        "them when they start. Old and new certificates work together."
    )


@lan_app.command()
def server(
    kit: KitFolder = Path("lan/server"),
    attacks: Annotated[
        int, typer.Option(help="Attacks at a time that this machine takes itself, 0 or more.")
    ] = 0,
    resume: Annotated[
        bool, typer.Option(help="First finish the attacks that killed runs left.")
    ] = False,
    runs_dir: RunsDir = Path("runs"),
    connection: Annotated[str, typer.Option(help="Flower's name for it in flwr run.")] = "lan",
) -> None:
    """Run the SuperLink and the Ray head; clients and workers may come, go and come back."""
    this = _valid_kit(kit)
    at_least("attacks", attacks, 0)
    _connect(this, connection)
    ray_ = ray_environment(this)
    children = [
        superlink(this),
        superexec(this, f"{this.server}:{this.port}", {**ray_, "RAY_ADDRESS": _ray_address(this)}),
        ray_head(this, attacks),
    ]
    unfinished = _unfinished(runs_folder(str(runs_dir))) if resume else []
    if unfinished:
        attack = [sys.executable, "-m", "flowleak", "attack"]
        commands = [
            shlex.join([*attack, run.name, "--runs-dir", str(run.parent)]) for run in unfinished
        ]
        _tell(f"Finishing the attacks of {', '.join(run.name for run in unfinished)}")
        children.append(
            Child(
                "resume",
                # One that fails does not keep the others from theirs.
                ["sh", "-c", "".join(f"{each} || f=1; " for each in commands) + "exit ${f:-0}"],
                {**ray_, "RAY_ADDRESS": _ray_address(this)},
                when_it_ends="retry",
            )
        )
    raise typer.Exit(run_together(children, _tell, lambda: _register(this, connection)))


@lan_app.command()
def client(
    kit: KitFolder,
    partition: Annotated[
        int, typer.Option(help="Which part of the data is this client's, counted from 0.")
    ],
    data: Annotated[
        Path | None, typer.Option(help="The data set's folder here; default: as the run says.")
    ] = None,
    partitions: Annotated[
        int, typer.Option(help="Parts the data is cut into; 0: one for each client of the run.")
    ] = 0,
    truth_dir: Annotated[
        Path | None,
        typer.Option(help="Keep each round's batch here, for an auditor whom you trust."),
    ] = None,
) -> None:
    """Run a SuperNode that trains on this machine's data."""
    this = _valid_kit(kit)
    at_least("partition", partition, 0)
    at_least("partitions", partitions, 0)
    config: dict[str, str | int] = {"partition-id": partition}
    if partitions:
        config["num-partitions"] = partitions
    for name, path in (("data-path", data), ("truth-dir", truth_dir)):
        if path is not None:
            if name == "data-path" and not path.exists():
                raise FileNotFoundError(f"{path} does not exist")
            config[name] = str(path.expanduser().absolute())
    _greet(this, this.port)
    address = f"127.0.0.1:{_free_port()}"
    children = [supernode(this, config, address), superexec(this, address, {}, tls=False)]
    raise typer.Exit(run_together(children, _tell))


@lan_app.command()
def worker(
    kit: KitFolder,
    attacks: Annotated[
        int,
        typer.Option(help="Attacks at a time, 1 or more; a worker for each GPU, see docs/lan.md."),
    ] = 1,
) -> None:
    """Join the server's Ray cluster and take attacks, on a GPU if there is one."""
    this = _valid_kit(kit)
    at_least("attacks", attacks, 1)
    _greet(this, this.ray_port)
    raise typer.Exit(run_together([ray_worker(this, attacks)], _tell))


@lan_app.command()
def cost(
    rounds: Annotated[
        int, typer.Option(help="Rounds with, and as many without the audit, 1 or more.")
    ] = 20,
    clients: Annotated[int, typer.Option(help="Clients, all in every round, 1 or more.")] = 4,
    local_steps: Annotated[
        int, typer.Option(help="Steps of each client, with one image, 1 or more.")
    ] = 50,
    folder: Annotated[Path, typer.Option(help="On the disk that runs are written to.")] = Path("."),
    check: Annotated[
        bool, typer.Option("--check", help="Exit with 1 where a figure misses its threshold.")
    ] = False,
) -> None:
    """Measure what the audit costs the training, with every client watched."""
    for name, value in (("rounds", rounds), ("clients", clients), ("local_steps", local_steps)):
        at_least(name, value, 1)
    from fl_app.benchmarks.audit_cost import audit_cost

    console = screen()
    measured = audit_cost(rounds, clients, local_steps, folder)
    console.print(measured.table())
    for words in measured.shortfalls():
        console.print(f"Misses its threshold: {words}", style="yellow")
    if check and measured.shortfalls():
        raise typer.Exit(1)


@lan_app.command()
def throughput(
    workers: Annotated[str, typer.Option(help="Numbers of workers, such as 1,2,4.")] = "1,2",
    attacks: Annotated[int, typer.Option(help="Attacks of each worker, 1 or more.")] = 5,
    seconds: Annotated[float, typer.Option(help="Of an attack, 1 or more.")] = 5.0,
    folder: Annotated[Path, typer.Option(help="On the disk that runs are written to.")] = Path("."),
) -> None:
    """Measure how many attacks a minute workers take from the queue, in the cluster or here."""
    at_least("attacks", attacks, 1)
    at_least("seconds", seconds, 1)
    counts = whole_numbers("workers", workers)
    from fl_app.benchmarks import throughput as measuring

    measured = measuring.throughput(counts, attacks, seconds, folder)
    screen().print(measuring.table(measured))


def superlink(kit: Kit) -> Child:
    """Return the SuperLink: TLS, registered nodes only, the run key, and a state that stays."""
    from fl_app.lan.superlink import KEY_FILE

    command = [sys.executable, "-m", "fl_app.lan.superlink"]
    command += ["--ssl-ca-certfile", str(kit.file("ca.crt"))]
    command += ["--ssl-certfile", str(kit.file("tls.crt"))]
    command += ["--ssl-keyfile", str(kit.file("tls.key"))]
    command += ["--host", kit.server, "--port", str(kit.port), "--enable-supernode-auth"]
    command += ["--database", str(kit.file("lan.json").with_name("superlink.db"))]
    command += ["--isolation", "process"]
    command += ["--superexec-auth-secret-file", str(kit.file("superexec.key"))]
    command += ["--disable-runtime-dependency-installation"]
    return Child("SuperLink", command, _QUIET | {KEY_FILE: str(kit.file("run.key"))})


def supernode(kit: Kit, config: dict[str, str | int], address: str) -> Child:
    """Return a SuperNode, whose own API listens at a loopback address."""
    host, _, port = address.rpartition(":")
    command = [str(_SCRIPTS / "flower-supernode"), "--superlink", f"{kit.server}:{kit.port}"]
    command += ["--root-certificates", str(kit.file("ca.crt"))]
    command += ["--auth-supernode-private-key", str(kit.file("node.key"))]
    command += ["--node-config", " ".join(f"{k}={json.dumps(v)}" for k, v in config.items())]
    command += ["--host", host, "--port", port, "--isolation", "process"]
    command += ["--superexec-auth-secret-file", str(kit.file("superexec.key"))]

    def explain(line: str) -> None:
        for words, why in _REFUSALS.items():
            if words in line:
                _tell(why.format(server=f"{kit.server}:{kit.port}", key=kit.file("node.key")))

    return Child("SuperNode", command, _QUIET, on_line=explain)


def superexec(
    kit: Kit, address: str, environment: dict[str, str | None], tls: bool = True
) -> Child:
    """Return the process that starts the app's own, for who has its secret."""
    command = [str(_SCRIPTS / "flower-superexec"), "--runtime-api-address", address]
    command += ["--root-certificates", str(kit.file("ca.crt"))] if tls else ["--insecure"]
    command += ["--superexec-auth-secret-file", str(kit.file("superexec.key"))]
    return Child("SuperExec", command, _QUIET | environment, when_it_ends="restart")


def ray_head(kit: Kit, attacks: int) -> Child:
    """Return Ray's head, which takes `attacks` attacks itself."""
    command = [str(_SCRIPTS / "ray"), "start", "--head", "--node-ip-address", kit.server]
    command += ["--port", str(kit.ray_port), "--include-dashboard", "false"]
    return _ray(kit, "Ray head", command, attacks)


def ray_worker(kit: Kit, attacks: int) -> Child:
    """Return a machine of the Ray cluster, which joins again whenever it lost its head."""
    command = [str(_SCRIPTS / "ray"), "start", "--address", _ray_address(kit)]
    command += ["--node-ip-address", kit.address]
    return _ray(kit, "Ray worker", command, attacks)


def _ray(kit: Kit, name: str, command: list[str], attacks: int) -> Child:
    command += ["--num-cpus", "0", "--resources", json.dumps({SLOT: attacks})]
    command += ["--disable-usage-stats", "--block"]
    environment = ray_environment(kit) | _slots(attacks)
    # A worker would use the head's folder, which nobody removes on its machine.
    command += ["--temp-dir", str(Path(_ray_folder()) / "ray")]
    # `ray start` may outlast a SIGTERM; its own processes end with it, however it ends.
    return Child(name, command, environment, when_it_ends="restart", end=signal.SIGKILL)


def ray_environment(kit: Kit) -> dict[str, str | None]:
    """Return the settings by which Ray's processes trust each other and nobody else.

    Raises
    ------
    ValueError
        If this Ray has no tokens: it would ignore them, and let everyone in.
    """
    version = metadata.version("ray")
    if tuple(int(part) for part in version.split(".")[:2]) < _RAY_WITH_TOKENS:
        raise ValueError(f"ray is {version}, which has no tokens; allowed on a LAN: 2.52 or more")
    return _QUIET | {
        # What keeps the Ray of one process to itself, see `guard_ray`, would keep machines apart.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1",
        "RAY_AUTH_TOKEN": None,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(kit.file("ray.token")),
        "RAY_USE_TLS": "1",  # mutual: who connects needs a certificate too
        "RAY_TLS_CA_CERT": str(kit.file("ca.crt")),
        "RAY_TLS_SERVER_CERT": str(kit.file("tls.crt")),
        "RAY_TLS_SERVER_KEY": str(kit.file("tls.key")),
        # Ray's own folder is the machine's, where every other Ray would take this for its cluster.
        "RAY_TMPDIR": _ray_folder(),
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # a worker that asks for no GPU may use it
        # A head that is started again knows nobody: who waits for it should join it again.
        "RAY_gcs_rpc_server_reconnect_timeout_s": "15",
    }


def _ray_folder() -> str:
    return os.environ.get("RAY_TMPDIR") or str(own_folder())


def _slots(attacks: int) -> dict[str, str]:
    """Return the share of this machine's cores that one of so many attacks may use."""
    return {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // max(1, attacks)))}


def _ray_address(kit: Kit) -> str:
    return f"{kit.server}:{kit.ray_port}"


def _kit(folder: Path) -> Kit:
    from fl_app.lan.keys import read_kit

    return read_kit(folder)


def _valid_kit(folder: Path) -> Kit:
    """Return a kit whose certificates have not ended, and say when that is near."""
    from fl_app.lan.ending import warning

    kit = _kit(folder)
    words = warning(kit)
    if words:
        _tell(words)
    return kit


def _greet(kit: Kit, port: int) -> None:
    """Say so where the server does not answer, for all else waits for it without a word.

    Raises
    ------
    ValueError
        If who answers has no valid certificate of this deployment.
    """
    at = f"{kit.server}:{port}"
    context = ssl.create_default_context(cafile=str(kit.file("ca.crt")))
    try:
        with socket.create_connection((kit.server, port), timeout=_ANSWER) as plain:
            context.wrap_socket(plain, server_hostname=kit.server).close()
    except ssl.SSLCertVerificationError as error:
        raise ValueError(
            f"{at} has no valid certificate of this kit's deployment: {error.verify_message}. "
            "Is the kit of the same flowleak lan init as the server's, and its clock right? "
            "flowleak lan status tells on each machine when certificates end"
        ) from error
    except OSError as error:
        _tell(f"Waiting for flowleak lan server: nobody answers at {at} yet ({error})")


def _connect(kit: Kit, name: str) -> None:
    """Write Flower's connection entry and the run key where `flwr` looks for them."""
    from flwr.cli.auth_plugin import OidcCliPlugin
    from flwr.cli.flower_config import init_flwr_config, write_superlink_connection
    from flwr.cli.typing import SuperLinkConnection
    from flwr.supercore.auth.typing import AccountAuthCredentials

    address = f"{kit.server}:{kit.port}"
    init_flwr_config()
    write_superlink_connection(
        SuperLinkConnection(
            name=name, address=address, root_certificates=str(kit.file("ca.crt")), insecure=False
        )
    )
    key = kit.file("run.key").read_text()
    OidcCliPlugin(address).store_tokens(AccountAuthCredentials(access_token=key, refresh_token=key))


def _register(kit: Kit, connection: str) -> None:
    """Wait until the SuperLink listens, and register the nodes that it does not know yet."""
    import httpx
    from flwr.cli.flower_config import read_superlink_connection
    from flwr.cli.utils import init_http_client_from_connection
    from flwr.proto.control_pb2 import RegisterNodeRequest

    deadline = time.monotonic() + _START
    while True:
        try:
            socket.create_connection((kit.server, kit.port), timeout=1).close()
            break
        except OSError as error:
            if time.monotonic() > deadline:
                raise TimeoutError(f"no SuperLink at {kit.server}:{kit.port}: {error}") from error
            time.sleep(0.2)
    nodes = sorted(kit.file("nodes").glob("*.pub"))
    control = init_http_client_from_connection(read_superlink_connection(connection))
    try:
        for node in nodes:
            request = RegisterNodeRequest(public_key=_public_key(node), name=node.stem)
            try:
                control.RegisterNode(request)
            except httpx.HTTPStatusError as error:
                if error.response.status_code != httpx.codes.PRECONDITION_FAILED:
                    raise
                # It is in the SuperLink's database: registered, or unregistered by hand for good.
    finally:
        control.close()
    keys = f"the {len(nodes)} clients with a key in {kit.file('nodes')}"
    _tell(f"Ready: {keys} may join {kit.server}:{kit.port}, but for those you unregistered")


def _public_key(path: Path) -> bytes:
    from cryptography.hazmat.primitives.serialization import (
        Encoding,
        PublicFormat,
        load_ssh_public_key,
    )

    key = load_ssh_public_key(path.read_bytes())
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def _unfinished(runs_dir: Path) -> list[Path]:
    from fl_app.runs.folder import list_runs
    from server_strategies.attack_pool import read_queue

    found = []
    for run in list_runs(runs_dir):
        entries, bad = read_queue(run)
        for why in bad.values():
            _tell(f"Left in the queue: {why}")
        try:
            if entries:
                from_yaml(run / "config.yaml")
                found.append(run)
        except ConfigError as error:
            _tell(f"Not resumed: {error}")
    return found


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def _tell(line: str) -> None:
    screen().print(line, highlight=False, soft_wrap=True, markup=False)
