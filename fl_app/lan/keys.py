"""What the machines of a deployment know each other by: certificates, keys and tokens.

A folder for each machine, a kit, holds what that machine needs and nothing else::

    lan/ca.key                  stays where it was made; makes further kits, renews certificates
    lan/server/                 ca.crt, tls.crt, tls.key, run.key, superexec.key, ray.token,
                                nodes/*.pub
    lan/client-0/               ca.crt, node.key, superexec.key
    lan/worker-192.168.1.30/    ca.crt, tls.crt, tls.key, ray.token
"""

from __future__ import annotations

import ipaddress
import json
import os
import secrets
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ec import (
    SECP384R1,
    EllipticCurvePrivateKey,
    generate_private_key,
)
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import NameOID

from fl_app.config import at_least
from fl_app.util.files import whole_file

_VALID = timedelta(days=365)
_AUTHORITY_VALID = timedelta(days=3650)  # longer, so that clients need no new certificate each year
_CLOCKS = timedelta(hours=1)  # by which machines' clocks may differ


@dataclass(frozen=True)
class Kit:
    """One machine's folder.

    Attributes
    ----------
    folder : Path
        Readable by its owner only.
    address : str
        The machine's own address; empty for a client, which no one connects to.
    server : str
        The server's address.
    port, ray_port : int
        Where its SuperLink and its Ray head listen.
    """

    folder: Path
    address: str
    server: str
    port: int
    ray_port: int

    @property
    def role(self) -> str:
        """What the machine is, as its files tell: server, client or worker."""
        if (self.folder / "node.key").exists():
            return "client"
        return "server" if (self.folder / "run.key").exists() else "worker"

    def file(self, name: str) -> Path:
        """Return the absolute path of one of its files.

        Raises
        ------
        ValueError
            If the kit is another role's.
        """
        path = (self.folder / name).absolute()
        if not path.exists():
            raise ValueError(f"{self.folder} holds no {name}: it is not this role's kit")
        return path


def read_kit(folder: Path) -> Kit:
    """Read a machine's kit.

    Raises
    ------
    ValueError
        If the folder is no kit, or others than its owner can read it.
    """
    try:
        facts = json.loads((folder / "lan.json").read_text(encoding="utf-8"))
        kit = Kit(folder, **facts)
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{folder} is no kit of flowleak lan init: {error}") from error
    if folder.stat().st_mode & 0o077:
        raise ValueError(f"{folder} holds keys and others can read it; chmod -R go= {folder}")
    return kit


def make_kits(
    folder: Path, server: str, clients: int, workers: list[str], port: int, ray_port: int
) -> list[Kit]:
    """Make the kits that `folder` does not hold yet; those that it holds are left alone.

    Parameters
    ----------
    folder : Path
        Made with mode 0700.
    server : str
        The server's IPv4 address as the others reach it.
    clients : int
        ``client-0`` to ``client-(N-1)``.
    workers : list of str
        Addresses of the machines that take attacks.
    port, ray_port : int
        Where the server is to listen.

    Returns
    -------
    list of Kit
        The new ones.

    Raises
    ------
    ValueError
        If an address or port can't be one, or the folder belongs to another server.
    """
    for name, value in (("port", port), ("ray_port", ray_port)):
        if not 1 <= value <= 65535:
            raise ValueError(f"{name} is {value}; allowed: 1 to 65535")
    at_least("clients", clients, 0)
    for address in (server, *workers):
        _check_address(address)
    _private(folder)
    if not any(folder.iterdir()):  # made for this: no key of it gets into a repository around it
        _write(folder / ".gitignore", b"*\n")
    if (folder / "server").exists():
        known = read_kit(folder / "server")
        if (known.server, known.port, known.ray_port) != (server, port, ray_port):
            raise ValueError(
                f"{folder} was made for {known.server}, ports {known.port} and {known.ray_port}; "
                "choose another folder"
            )
    authority = _Authority(folder)
    made = []
    for name, address in (
        ("server", server),
        *((f"client-{i}", "") for i in range(clients)),
        *((f"worker-{worker}", worker) for worker in workers),
    ):
        kit = Kit(folder / name, address, server, port, ray_port)
        if not kit.folder.exists():
            _make(kit, authority, folder / "server")
            made.append(kit)
    return made


def list_kits(folder: Path) -> list[Kit]:
    """Return the kits that lie in a folder, by name."""
    return [read_kit(facts.parent) for facts in sorted(folder.glob("[!.]*/lan.json"))]


def renew_kits(folder: Path) -> dict[str, list[str]]:
    """Make the certificates of all kits again; every key and token stays.

    The authority's own is made again when it would end before those that it signs.
    As it has the same key, machines with its old and its new certificate trust each
    other: they may get their new files in any order.

    Parameters
    ----------
    folder : Path
        Where the kits were made, with ``ca.key``.

    Returns
    -------
    dict of str to list of str
        By kit: the files that are new. Clients whose kits lie elsewhere alone are among
        them; a worker's has to be here.

    Raises
    ------
    ValueError
        If the folder holds no ``ca.key``.
    """
    if not (folder / "ca.key").exists():
        raise ValueError(f"{folder} holds no ca.key; run it where flowleak lan init was run")
    before = (folder / "ca.crt").read_bytes()
    authority = _Authority(folder)
    authority.renew()
    ca = authority.certificate.public_bytes(Encoding.PEM)
    changed: dict[str, list[str]] = {}
    for kit in list_kits(folder):
        changed[kit.folder.name] = []
        if kit.file("ca.crt").read_bytes() != ca:
            _write(kit.folder / "ca.crt", ca)
            changed[kit.folder.name].append("ca.crt")
        if kit.address:
            key = _private_key(kit.file("tls.key"))
            _write(kit.folder / "tls.crt", authority.issue(kit.address, key))
            changed[kit.folder.name].append("tls.crt")
    elsewhere = {node.stem for node in (folder / "server" / "nodes").glob("*.pub")} - set(changed)
    return changed | dict.fromkeys(sorted(elsewhere), ["ca.crt"] if ca != before else [])


def _make(kit: Kit, authority: _Authority, server: Path) -> None:
    unfinished = kit.folder.with_name(f".{kit.folder.name}")
    _private(unfinished)
    role = kit.folder.name.partition("-")[0]
    _write(unfinished / "ca.crt", authority.certificate.public_bytes(Encoding.PEM))
    if kit.address:
        key = generate_private_key(SECP384R1())
        _write(unfinished / "tls.key", _private_bytes(key))
        _write(unfinished / "tls.crt", authority.issue(kit.address, key))
    if role == "server":
        _private(unfinished / "nodes")
        _write(unfinished / "run.key", secrets.token_urlsafe(32).encode())
        _write(unfinished / "ray.token", secrets.token_hex(32).encode())
    if role == "client":
        node = generate_private_key(SECP384R1())
        private = node.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
        _write(unfinished / "node.key", private)
        public = node.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
        _write(server / "nodes" / f"{kit.folder.name}.pub", public)
    if role == "worker":
        _write(unfinished / "ray.token", (server / "ray.token").read_bytes())
    else:
        _write(unfinished / "superexec.key", secrets.token_bytes(32))
    facts = asdict(kit)
    del facts["folder"]
    _write(unfinished / "lan.json", json.dumps(facts, indent=2).encode())
    unfinished.rename(kit.folder)


class _Authority:
    """The deployment's own certificate authority, made once."""

    def __init__(self, folder: Path) -> None:
        key, self._path = folder / "ca.key", folder / "ca.crt"
        if not key.exists():
            made = generate_private_key(SECP384R1())
            _write(self._path, _own_certificate(made))
            _write(key, _private_bytes(made))
        self._key = _private_key(key)
        self.certificate = x509.load_pem_x509_certificate(self._path.read_bytes())

    def renew(self) -> None:
        """Make its certificate again if it ends before one would that it signs now."""
        if self.certificate.not_valid_after_utc < datetime.now(UTC) + _VALID:
            _write(self._path, _own_certificate(self._key))
            self.certificate = x509.load_pem_x509_certificate(self._path.read_bytes())

    def issue(self, address: str, key: EllipticCurvePrivateKey) -> bytes:
        """Return a certificate (PEM) of a key for a machine's address and its loopback."""
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, address[:64])])
        ips = dict.fromkeys((address, "127.0.0.1"))
        names: list[x509.GeneralName] = [x509.IPAddress(ipaddress.ip_address(ip)) for ip in ips]
        names.append(x509.DNSName("localhost"))
        builder = _builder(key, subject, self.certificate.subject, _VALID)
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        builder = builder.add_extension(x509.BasicConstraints(False, None), critical=True)
        builder = builder.add_extension(_usage(signs=False), critical=True)
        return builder.sign(self._key, hashes.SHA384()).public_bytes(Encoding.PEM)


def _own_certificate(key: EllipticCurvePrivateKey) -> bytes:
    """Return an authority's certificate (PEM), signed by itself."""
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "flowleak lan")])
    constraints = x509.BasicConstraints(ca=True, path_length=0)
    builder = _builder(key, name, name, _AUTHORITY_VALID)
    builder = builder.add_extension(constraints, critical=True)
    builder = builder.add_extension(_usage(signs=True), critical=True)
    return builder.sign(key, hashes.SHA384()).public_bytes(Encoding.PEM)


def _builder(
    key: EllipticCurvePrivateKey, subject: x509.Name, issuer: x509.Name, valid: timedelta
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CLOCKS)
        .not_valid_after(now + valid)
    )


def _usage(signs: bool) -> x509.KeyUsage:
    """Return what a key may do: the authority's signs certificates, the others' speak TLS."""
    return x509.KeyUsage(
        digital_signature=not signs, key_cert_sign=signs, crl_sign=signs,
        content_commitment=False, key_encipherment=False, data_encipherment=False,
        key_agreement=False, encipher_only=False, decipher_only=False,
    )  # fmt: skip


def _check_address(address: str) -> None:
    try:
        ipaddress.IPv4Address(address)
    except ValueError:  # Ray knows its machines by their addresses, not by names
        raise ValueError(f"address is {address!r}; allowed: an IPv4 address") from None


def _private_key(path: Path) -> EllipticCurvePrivateKey:
    key = load_pem_private_key(path.read_bytes(), password=None)
    if not isinstance(key, EllipticCurvePrivateKey):
        raise ValueError(f"{path} holds another kind of key than flowleak lan init makes")
    return key


def _private_bytes(key: EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _private(folder: Path) -> None:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    os.chmod(folder, 0o700)


def _write(path: Path, data: bytes) -> None:
    with whole_file(path) as temporary:  # readable by its owner only, from the start
        temporary.write_bytes(data)
