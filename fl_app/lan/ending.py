"""When the certificates of a deployment end."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509

from fl_app.lan.keys import Kit, list_kits, read_kit

_NEAR = timedelta(days=14)
_RENEW = (
    "flowleak lan renew, where ca.key is, makes new ones and says what to copy here (docs/lan.md)"
)


@dataclass(frozen=True)
class Ending:
    """The certificate of a machine, or of the authority, that ends first.

    Attributes
    ----------
    folder : Path
        The kit that holds it.
    role : str
        authority, server, client or worker.
    address : str
        Empty where the machine has none.
    file : str
        Its name in the kit.
    valid_until : datetime
        In UTC.
    """

    folder: Path
    role: str
    address: str
    file: str
    valid_until: datetime

    @property
    def days_left(self) -> int:
        """Whole days until then, below 0 when it has passed."""
        return (self.valid_until - datetime.now(UTC)).days

    @property
    def is_near(self) -> bool:
        """Whether it is time to renew it."""
        return self.valid_until - datetime.now(UTC) < _NEAR


def ending(kit: Kit) -> Ending:
    """Return which of a kit's certificates ends first."""
    return _first(kit.folder, kit.role, kit.address, ["ca.crt", *["tls.crt"] * bool(kit.address)])


def endings(folder: Path) -> list[Ending]:
    """Return those of a kit, or of the authority and all kits in a folder.

    Raises
    ------
    ValueError
        If it is neither.
    """
    if (folder / "lan.json").exists():
        return [ending(read_kit(folder))]
    kits = list_kits(folder)
    if not kits:
        raise ValueError(f"{folder} is no kit of flowleak lan init, and holds none")
    authority = [folder] if (folder / "ca.crt").exists() else []
    return [*(_first(each, "authority", "", ["ca.crt"]) for each in authority), *map(ending, kits)]


def warning(kit: Kit) -> str:
    """Return what to say where a kit's end is near, or nothing.

    Raises
    ------
    ValueError
        If it has passed: no other machine would take it.
    """
    found = ending(kit)
    when = f"{found.valid_until:%Y-%m-%d %H:%M} UTC"
    if found.valid_until <= datetime.now(UTC):
        raise ValueError(f"{kit.folder / found.file} ended on {when}: {_RENEW}")
    if not found.is_near:
        return ""
    days = "1 day" if found.days_left == 1 else f"{found.days_left} days"
    return f"{kit.folder / found.file} ends on {when}, in {days}: {_RENEW}"


def _first(folder: Path, role: str, address: str, files: list[str]) -> Ending:
    ends = {name: _end(folder / name) for name in files}
    first = min(ends, key=lambda name: ends[name])
    return Ending(folder, role, address, first, ends[first])


def _end(path: Path) -> datetime:
    try:
        return x509.load_pem_x509_certificate(path.read_bytes()).not_valid_after_utc
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is no certificate: {error}") from error
