"""The kits of a deployment's machines: who can read them, and whom their certificates name."""

from __future__ import annotations

import ipaddress
import json
import ssl
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError
from helpers.command import flowleak
from typer.testing import CliRunner

from fl_app.commands.main import app
from fl_app.lan import ending, keys
from fl_app.lan.keys import make_kits, read_kit
from fl_app.lan.superlink import RunKey

SERVER, WORKER = "192.168.1.10", "192.168.1.30"


def kits(folder: Path, clients: int = 1, server: str = SERVER) -> list[str]:
    made = make_kits(folder, server, clients, [WORKER], 9400, 9401)
    return [kit.folder.name for kit in made]


def certificates(*paths: Path) -> list[x509.Certificate]:
    return [x509.load_pem_x509_certificate(path.read_bytes()) for path in paths]


def test_each_machine_gets_its_own_and_no_more(tmp_path: Path) -> None:
    folder = tmp_path / "lan"
    assert kits(folder) == ["server", "client-0", f"worker-{WORKER}"]
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert kits(folder, clients=2) == ["client-1"]
    assert all(path.read_bytes() == data for path, data in before.items())
    for path in [folder, *folder.rglob("*")]:
        assert path.stat().st_mode & 0o077 == 0, path
    for client in ("client-0", "client-1"):
        names = {path.name for path in (folder / client).iterdir()}
        assert names == {"ca.crt", "node.key", "superexec.key", "lan.json"}
        private = load_ssh_private_key((folder / client / "node.key").read_bytes(), None)
        public = load_ssh_public_key((folder / "server/nodes" / f"{client}.pub").read_bytes())
        assert private.public_key() == public
    keys = [path.read_bytes() for path in folder.rglob("*.key")]
    assert len(set(keys)) == len(keys)
    with pytest.raises(ValueError, match=r"holds no run\.key: it is not this role's kit"):
        read_kit(folder / "client-0").file("run.key")
    with pytest.raises(ValueError, match=f"was made for {SERVER}"):
        kits(folder, server="192.168.1.11")


def test_certificates_name_their_machine_and_nobody_else(tmp_path: Path) -> None:
    kits(tmp_path)
    (authority,) = certificates(tmp_path / "ca.crt")
    policy = PolicyBuilder().store(Store([authority])).time(datetime.now(UTC))
    for address in (SERVER, WORKER):
        name = "server" if address == SERVER else f"worker-{address}"
        (machine,) = certificates(tmp_path / name / "tls.crt")
        names = machine.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        machine.verify_directly_issued_by(authority)
        found = names.get_values_for_type(x509.IPAddress)
        assert found == [ipaddress.ip_address(address), ipaddress.ip_address("127.0.0.1")]
        constraints = machine.extensions.get_extension_for_class(x509.BasicConstraints).value
        assert not constraints.ca
        stranger = policy.build_server_verifier(x509.IPAddress(ipaddress.ip_address("10.0.0.1")))
        with pytest.raises(VerificationError):
            stranger.verify(machine, [])


@pytest.mark.parametrize("address", ["server:9400", "fe80::1", "", "a b", "../x"])
def test_an_address_that_is_none_is_refused(tmp_path: Path, address: str) -> None:
    with pytest.raises(ValueError, match="allowed: an IPv4 address"):
        kits(tmp_path / "lan", server=address)
    assert not (tmp_path / "lan").exists()


def test_a_kit_that_others_can_read_is_refused(tmp_path: Path) -> None:
    kits(tmp_path)
    (tmp_path / "client-0").chmod(0o750)
    with pytest.raises(ValueError, match="others can read it"):
        read_kit(tmp_path / "client-0")


def test_the_run_key_opens_and_nothing_else_does() -> None:
    plugin = RunKey(b"key")
    header = "flwr-oidc-access-token"
    assert plugin.validate_tokens_in_metadata([(header, "key")])[0]
    for metadata in ([], [(header, "")], [(header, "ke")], [("other", "key")]):
        assert plugin.validate_tokens_in_metadata(metadata) == (False, None)
    with pytest.raises(ValueError, match="empty"):
        RunKey(b"")


def test_a_repository_around_it_takes_no_key(tmp_path: Path) -> None:
    kits(tmp_path / "lan")
    assert (tmp_path / "lan" / ".gitignore").read_text() == "*\n"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "code.py").touch()
    kits(tmp_path / "mine")  # what lies there already is not to be ignored
    assert not (tmp_path / "mine" / ".gitignore").exists()


def status(folder: Path) -> tuple[int, list[dict[str, object]]]:
    done = CliRunner().invoke(app, ["lan", "status", str(folder), "--json"])
    return done.exit_code, json.loads(done.output)


def trusts(authority: Path, machine: Path, key: Path, address: str) -> bool:
    """Say whether one that knows an authority takes a machine for its address now, over TLS."""
    there = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    there.load_cert_chain(machine, key)
    hello, answer = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = ssl.create_default_context(cafile=authority).wrap_bio(
        answer, hello, server_hostname=address
    )
    server = there.wrap_bio(hello, answer, server_side=True)
    for side in (client, server):
        with suppress(ssl.SSLWantReadError):
            side.do_handshake()
    try:
        client.do_handshake()
    except ssl.SSLCertVerificationError:
        return False
    return True


def test_the_end_of_certificates_is_shown_and_renewed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "lan"
    monkeypatch.setattr(keys, "_VALID", timedelta(days=10, hours=1))
    monkeypatch.setattr(keys, "_AUTHORITY_VALID", timedelta(days=300, hours=1))
    kits(folder, clients=2)
    worker = f"worker-{WORKER}"
    code, found = status(folder)
    assert code == 1
    assert [(each["kit"], each["role"], each["address"], each["ends_first"]) for each in found] == [
        ("lan", "authority", None, "ca.crt"),
        ("client-0", "client", None, "ca.crt"),
        ("client-1", "client", None, "ca.crt"),
        ("server", "server", SERVER, "tls.crt"),
        (worker, "worker", WORKER, "tls.crt"),
    ]
    assert [each["days_left"] for each in found] == [300, 300, 300, 10, 10]
    assert status(folder / "client-0") == (0, found[1:2])
    shown = flowleak("lan", "status", str(folder / "server"))
    assert "tls.crt" in shown and "flowleak lan renew" in shown
    assert "in 10 days: flowleak lan renew" in ending.warning(read_kit(folder / "server"))
    assert ending.warning(read_kit(folder / "client-0")) == ""

    monkeypatch.setattr(keys, "_VALID", timedelta(days=365))
    monkeypatch.setattr(keys, "_AUTHORITY_VALID", timedelta(days=3650))
    (folder / "client-1").rename(tmp_path / "client-1")  # to its machine
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    told = flowleak("lan", "renew", str(folder))
    changed = {path for path, data in before.items() if path.read_bytes() != data}
    machines = {
        folder / name / file for name in ("server", worker) for file in ("ca.crt", "tls.crt")
    }
    assert changed == {folder / "ca.crt", folder / "client-0" / "ca.crt", *machines}
    assert f"client-1: copy {folder / 'ca.crt'} into its kit" in told
    assert f"{folder / worker / 'ca.crt'} and {folder / worker / 'tls.crt'}" in told
    assert status(folder)[0] == 0
    old = tmp_path / "old.crt"
    old.write_bytes(before[folder / "server" / "tls.crt"])
    # Machines get their files one after the other.
    for authority in (folder / "ca.crt", tmp_path / "client-1" / "ca.crt"):
        for certificate in (old, folder / "server" / "tls.crt"):
            assert trusts(authority, certificate, folder / "server" / "tls.key", SERVER)
            assert not trusts(authority, certificate, folder / "server" / "tls.key", WORKER)
    assert "client-0: nothing to copy" in flowleak("lan", "renew", str(folder))
    with pytest.raises(ValueError, match=r"holds no ca\.key; run it where"):
        flowleak("lan", "renew", str(folder / "server"))


def test_what_has_ended_is_not_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "_VALID", timedelta(seconds=-1))
    kits(tmp_path)
    assert status(tmp_path / "server")[1][0]["days_left"] == -1
    for role in ("server", "worker"):
        kit = str(tmp_path / ("server" if role == "server" else f"worker-{WORKER}"))
        with pytest.raises(ValueError, match=r"tls\.crt ended on .* flowleak lan renew"):
            flowleak("lan", role, kit)
    with pytest.raises(ValueError, match="is no kit of flowleak lan init, and holds none"):
        flowleak("lan", "status", str(tmp_path / "client-0" / "nodes"))
