"""Runs of a user's own federation: what its clients are stands in a file of the user's, audit.py.

That file is code, so it is run only where the user names it, or where it lies in the working
folder as audit.py. A run's folder names it for people to read; nothing there is ever imported.
"""

from __future__ import annotations

import contextlib
import runpy
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from fl_app.config import Config, ConfigError, ModelConfig
from fl_app.protocol import Client, LocalTraining
from fl_app.runs.folder import DESCRIBED, create_run
from fl_app.util.extras import MissingExtraError
from fl_app.util.plain import plain_settings
from fl_app.util.vision import import_torchvision

DEFAULT = "audit.py"
"""The file that describes clients where no other is named."""

REPLIES = "replies"
"""Of the entry `DESCRIBED`: the file of each client's weights, where the run is made from files."""

NO_DATA = "the clients' data set is the user's own"


def load_client(path: Path) -> Client:
    """Run a user's file, and return the `Client` that it describes.

    Its folder and the working folder come first on the path of imports, as for a script.

    Parameters
    ----------
    path : Path
        Has a variable ``client``, or one `Client` of another name.

    Raises
    ------
    ConfigError
        If there is no such file, it raises, or describes no client.
    """
    if not path.is_file():
        raise ConfigError(f"client is {path}: no such file; it describes the clients, see Client")
    for folder in (str(Path.cwd()), str(path.absolute().parent)):
        if folder not in sys.path:
            sys.path.insert(0, folder)
    # What a user's file imports often imports it, too, and does not know a CPU-only torch.
    with contextlib.suppress(MissingExtraError, RuntimeError):
        import_torchvision()
    try:
        names = runpy.run_path(str(path), run_name=f"<{path.name}>")
    except Exception as error:  # a user's code may raise anything
        raise ConfigError(f"{path} can't be run: {type(error).__name__}: {error}") from error
    found = names.get("client")
    if isinstance(found, Client):
        return found
    clients = {name: value for name, value in names.items() if isinstance(value, Client)}
    if len(clients) != 1:
        words = ", ".join(clients) or "none"
        raise ConfigError(f"{path} describes no client; needed: client = flowleak.Client(...), "
                          f"there: {words}")  # fmt: skip
    return next(iter(clients.values()))


def client_of(described: Mapping[str, Any], given: Path | None) -> Client:
    """Return the client of a run whose config.yaml says that a file describes it.

    Parameters
    ----------
    described : mapping
        The entry `DESCRIBED`.
    given : Path, optional
        The file that the user named; by default `DEFAULT` in the working folder.

    Raises
    ------
    ConfigError
        If neither is there, or describes another model than the run's.
    """
    if given is None and not Path(DEFAULT).is_file():
        raise ConfigError(
            f"this run's clients are described by {described.get('file') or 'a program'}: name the "
            f"file by --client, or work where {DEFAULT} lies"
        )
    client = load_client(given or Path(DEFAULT))
    name = client.knowledge.model_name
    if name != described.get("model"):
        raise ConfigError(
            f"{given or DEFAULT} describes clients that train {name}; this run's train "
            f"{described.get('model')}"
        )
    return client


def described_config(config: Config, client: Client) -> Config:
    """Return a configuration with what a client's description says."""
    return replace(
        config,
        model=ModelConfig(client.knowledge.model_name),
        client=client.training,
        defense=client.defense,
    )


def create_described_run(
    config: Config, client: Client, file: str, replies: Mapping[int, str] | None = None
) -> Path:
    """Make the folder of a run of described clients; see `create_run`.

    Parameters
    ----------
    config : Config
        Of the run: its name and folder, attack, prior and audit.
    client : Client
    file : str
        Where it is described; "": in a program.
    replies : mapping of int to str, optional
        For a run from files: the name of each client's, by its node.
    """
    known = client.knowledge
    entry = {
        "file": file,
        "model": known.model_name,
        "training": plain_settings(client.training),
    }
    facts = {
        DESCRIBED: entry | ({REPLIES: dict(replies)} if replies else {}),
        "data": {
            "num_classes": known.num_classes,
            "image_shape": list(known.image_shape),
            "mean": list(known.mean),
            "std": list(known.std),
            "fingerprint": None,
        },
    }
    # A training may hold what only code can say, such as a loss: the file is read again.
    described = replace(described_config(config, client), client=LocalTraining())
    return create_run(described, facts)
