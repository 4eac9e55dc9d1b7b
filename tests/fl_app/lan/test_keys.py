"""The kits of a deployment's machines: who can read them, and whom their certificates name."""

from __future__ import annotations

import ipaddress
from datetime import UTC, datetime
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError

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
