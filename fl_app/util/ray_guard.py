"""Ray for one process tree alone: on the loopback, with a token, in a folder of its own.

Ray as it comes listens on every interface and takes tasks from whoever connects, and it
finds the last cluster of the machine in a shared folder. It reads its settings when it is
imported, so `guard_ray` is to be called before.
"""

from __future__ import annotations

import atexit
import fcntl
import os
import secrets
import shutil
import sys
import tempfile
from functools import cache
from pathlib import Path
from threading import Lock
from types import ModuleType
from typing import Any

from fl_app.util.extras import extras

SLOT = "attack"  # the Ray resource by which a machine of a cluster says how many attacks it takes

_PREFIX = "flowleak-ray-"
_LOCK = "owner"
_LONGEST = 40  # characters of a folder: the sockets in it have to fit in 107

# Nobody else is meant to connect. On Linux, too, this setting of Ray's keeps it on the loopback.
_LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
# A worker that asks for no GPU may use one.
_GPU = {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}

_guarding = Lock()


class UnguardedRayError(ValueError):
    """A Ray that anyone on the network could use; the message says what to set."""


def guard_ray() -> None:
    """Set up a Ray that this process starts, or that is started for it, for its own use alone.

    Its children inherit that. A process that ``RAY_ADDRESS`` sends to a cluster is left as
    it is, see `fl_app.lan`, as is what is set already.
    """
    with _guarding:
        _guard()


def _guard() -> None:
    if "RAY_ADDRESS" in os.environ or _is_ours(os.environ.get("RAY_TMPDIR", "")):
        return
    if "ray" in sys.modules:  # too late; `check_guarded` refuses it
        return
    if not {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys():
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ.update(_LOOPBACK)
    os.environ.update(_GPU)
    if "RAY_TMPDIR" not in os.environ:
        os.environ["RAY_TMPDIR"] = str(own_folder())


def guarded_ray() -> ModuleType:
    """Set Ray up, see `guard_ray`, then import and return it: the one door to Ray."""
    guard_ray()
    with extras():
        import ray
        import ray.exceptions
    return ray


def check_guarded() -> None:
    """Refuse to go on with a Ray that others could reach.

    Raises
    ------
    UnguardedRayError
        If Ray was imported before `guard_ray` could set it up.
    """
    wanted = {"RAY_AUTH_MODE": "token", **_LOOPBACK}
    ray: Any = guarded_ray()
    token = ray._raylet.get_authentication_mode() == ray._raylet.AuthenticationMode.TOKEN
    if token and not ray._private.ray_constants.ENABLE_RAY_CLUSTER:
        return
    settings = " ".join(f"{name}={value}" for name, value in wanted.items())
    raise UnguardedRayError(
        "Ray would take tasks from the whole network: it was imported before flowleak could "
        f"close it. Set {settings} RAY_AUTH_TOKEN=<a random word> where this process starts"
    )


@cache
def own_folder() -> Path:
    """Return a folder for Ray's files, which goes with this process.

    Those that killed processes left are removed first.
    """
    parent = Path(tempfile.gettempdir())
    if len(str(parent)) + len(_PREFIX) + 8 > _LONGEST:
        parent = Path("/tmp")
    for left in parent.glob(f"{_PREFIX}*"):
        _remove_if_left(left)
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
    handle = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(handle, fcntl.LOCK_EX)  # held for the life of this process, by nobody else
    atexit.register(_remove_own, folder, os.getpid())
    return folder


def _is_ours(folder: str) -> bool:
    return Path(folder).name.startswith(_PREFIX) and Path(folder, _LOCK).exists()


def _remove_own(folder: Path, owner: int) -> None:
    if os.getpid() == owner:  # and no fork of it
        shutil.rmtree(folder, ignore_errors=True)


def _remove_if_left(folder: Path) -> None:
    """Remove a folder whose owner is gone, and nobody else's."""
    try:
        handle = os.open(folder / _LOCK, os.O_RDWR)
    except OSError:
        return  # another user's, or it is being made or removed
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
    except BlockingIOError:
        pass
    finally:
        os.close(handle)
