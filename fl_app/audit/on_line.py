"""A user's own function that gets each line of the log as it is written: W&B, MLflow, TensorBoard.

Its name stands in what the user typed, `flwr run` or a command. That a run's config.yaml names it,
too, is for people to read: nothing there is ever imported.
"""

from __future__ import annotations

import logging
import queue
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from fl_app.config import ConfigError
from fl_app.util.extras import extras
from fl_app.util.files import user_path
from fl_app.util.importing import imported
from fl_app.util.text import printable

OnLine = Callable[[dict[str, Any]], object]
"""Takes a line of the log, see `LogLine`, with ``folder``: the run's, whole."""

_PATIENCE = 60.0  # seconds that a function is waited for when all lines are written
_log = logging.getLogger("flwr")  # Flower streams it to the user


def load_on_line(target: str) -> OnLine:
    """Import the function that a user named.

    Its module is installed, or lies where the command was typed.

    Parameters
    ----------
    target : str
        ``module:function``.

    Raises
    ------
    ConfigError
        If it can't be imported, or called.
    """
    folder = str(user_path(""))
    if folder not in sys.path:
        sys.path.append(folder)  # last: a file there takes no installed module's place
    try:
        with extras():
            found = imported(target)
    except Exception as error:  # a user's module may raise anything
        words = f"{type(error).__name__}: {printable(str(error))}"
        raise ConfigError(f"on_line is {target!r}, which can't be imported: {words}") from error
    if not callable(found):
        raise ConfigError(f"on_line is {target!r}, which is {found!r:.40}; allowed: a function")
    return found  # type: ignore[no-any-return]


@contextmanager
def told_lines(target: str) -> Iterator[OnLine]:
    """Return a context in which lines are handed to a user's function, in a thread of its own.

    Nothing waits for the function but the context's end, for a minute. What it raises is said
    once, and it gets the next line all the same.

    Parameters
    ----------
    target : str
        See `load_on_line`; "": there is no such function.

    Yields
    ------
    OnLine
        Takes a line, and returns at once.

    Raises
    ------
    ConfigError
        As `load_on_line`.
    """
    if not target:
        yield lambda line: None
        return
    function = load_on_line(target)
    lines: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()

    def run() -> None:
        said = False
        while (line := lines.get()) is not None:
            try:
                function(line)
            except BaseException as error:  # SystemExit, too: it would end the thread
                if not said:
                    what = f"{type(error).__name__}: {printable(str(error))}"
                    _log.warning("on_line: %s raised %s; the log is whole. Said once", target, what)
                said = True

    thread = threading.Thread(target=run, name="on_line", daemon=True)
    thread.start()
    try:
        yield lines.put
    finally:
        lines.put(None)
        thread.join(_PATIENCE)
        if thread.is_alive():
            _log.warning("on_line: %s is still busy; it is waited for no longer", target)
