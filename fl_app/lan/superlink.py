"""Flower's SuperLink, with a key for its Control API.

The Control API submits runs, reads their logs and registers nodes. Flower's own
open distribution leaves it open to everyone who reaches the port; it has the
place for a plugin that closes it, but no option that names one.
"""

from __future__ import annotations

import hmac
import importlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flwr.common.constant import ACCESS_TOKEN_KEY
from flwr.superlink.auth_plugin import NoOpControlAuthnPlugin

KEY_FILE = "FLOWLEAK_RUN_KEY"  # environment variable: path of the key's file


class RunKey(NoOpControlAuthnPlugin):
    """Lets a request pass whose bearer token is the key.

    Parameters
    ----------
    key : bytes

    Raises
    ------
    ValueError
        If the key is empty.
    """

    def __init__(self, key: bytes) -> None:
        if not key:
            raise ValueError("the run key is empty")
        self._key = key

    def validate_tokens_in_metadata(
        self, metadata: Sequence[tuple[str, str | bytes]]
    ) -> tuple[bool, Any]:
        """Return whether the request has the key, and whose it is then."""
        sent = dict(metadata).get(ACCESS_TOKEN_KEY, b"")
        sent = sent.encode() if isinstance(sent, str) else sent
        if not hmac.compare_digest(sent, self._key):
            return False, None
        return super().validate_tokens_in_metadata(metadata)


def main() -> None:
    """Run `flower-superlink` with its own arguments, behind the key."""
    plugin = RunKey(Path(os.environ[KEY_FILE]).read_bytes())
    # The package's attribute of this name is the function, not the module.
    command = importlib.import_module("flwr.superlink.cli.flower_superlink")
    if not hasattr(command, "load_control_authn_plugin"):
        raise RuntimeError("this version of Flower loads its plugins elsewhere; use flwr 1.41")
    command.load_control_authn_plugin = lambda: plugin  # type: ignore[attr-defined]
    command.flower_superlink()


if __name__ == "__main__":
    main()
