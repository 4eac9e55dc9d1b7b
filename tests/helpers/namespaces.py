"""Two hosts on one machine: network namespaces with a cable between them."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Host:
    """A network namespace, and its address on the cable."""

    name: str
    address: str

    @property
    def enter(self) -> list[str]:
        """What a command is to be preceded by to run there."""
        return ["ip", "netns", "exec", self.name]

    def listening(self) -> set[int]:
        """Return the TCP ports on which anything listens there, at whatever address."""
        shown = subprocess.run(
            [*self.enter, "ss", "-ltnH"], capture_output=True, text=True, check=True
        ).stdout
        return {int(line.split()[3].rpartition(":")[2]) for line in shown.splitlines()}


def unavailable() -> str:
    """Return why there can be no namespaces here, or nothing."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if not shutil.which("ip") or not shutil.which("ss"):
        return "network namespaces need iproute2"
    made = subprocess.run(["ip", "netns", "add", "flowleak-probe"], capture_output=True)
    subprocess.run(["ip", "netns", "delete", "flowleak-probe"], capture_output=True)
    return "" if made.returncode == 0 else f"no network namespace: {made.stderr!r}"


@contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Yield two hosts that reach each other and nobody else; they end with the context."""
    own = os.getpid()
    hosts = tuple(Host(f"fl-{own}-{i}", f"10.231.{own % 250}.{i + 1}") for i in range(2))
    first, second = hosts

    def ip(*arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True)

    for host in hosts:
        ip("netns", "add", host.name)
    try:
        ends = [f"fl{own}a"[:15], f"fl{own}b"[:15]]
        ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
        for host, end in zip(hosts, ends, strict=True):
            ip("link", "set", end, "netns", host.name)
            ip("-n", host.name, "address", "add", f"{host.address}/24", "dev", end)
            ip("-n", host.name, "link", "set", end, "up")
            ip("-n", host.name, "link", "set", "lo", "up")
        yield first, second
    finally:
        for host in hosts:
            subprocess.run(["ip", "netns", "delete", host.name], check=True)
