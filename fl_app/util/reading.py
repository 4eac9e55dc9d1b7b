"""Reading a run's files, any of which may be damaged: it never blocks, and bounds what it reads."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

from fl_app.util.schema import problem
from fl_app.util.text import printable

MOST_BYTES = 2**24  # of a file of text, or of a line; ours have a hundredth of it


class BrokenFileError(ValueError):
    """A file that can't be used; the message names it, and says why."""


def check_regular(path: Path) -> None:
    """Refuse what is no file of a disk: opening a pipe would wait for ever.

    Raises
    ------
    BrokenFileError
        If the file is missing, or is a folder, a pipe, a device or a socket.
    """
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise BrokenFileError(f"{path} can't be read: {_words(error)}") from error
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a pipe or a device"
        raise BrokenFileError(f"{path} can't be read: it is {kind}, no file")


def read_bytes(path: Path, most: int = MOST_BYTES) -> bytes:
    """Return a file's content.

    Raises
    ------
    BrokenFileError
        If it is missing, no file of a disk, can't be read, or has more than `most` bytes.
    """
    check_regular(path)
    try:
        # What is put in its place meanwhile must not block either.
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            data = file.read(most + 1)
    except OSError as error:
        raise BrokenFileError(f"{path} can't be read: {_words(error)}") from error
    if len(data) > most:
        raise BrokenFileError(f"{path} can't be read: it has more than {most:,} bytes")
    return data


def read_text(path: Path, most: int = MOST_BYTES) -> str:
    """Return a file's content as UTF-8.

    Raises
    ------
    BrokenFileError
        As `read_bytes`, and if it is no UTF-8.
    """
    try:
        return read_bytes(path, most).decode()
    except UnicodeDecodeError as error:
        raise BrokenFileError(f"{path} can't be read: it is no text ({error})") from error


def read_json(path: Path, kind: Any) -> Any:
    """Return what a JSON file holds, checked.

    Parameters
    ----------
    path : Path
    kind : type
        What it should hold, see `problem`.

    Raises
    ------
    BrokenFileError
        As `read_text`, and if it is no JSON, or holds anything else.
    """
    try:
        return parse_json(read_bytes(path), kind)
    except BrokenFileError:
        raise
    except ValueError as error:
        raise BrokenFileError(f"{path} can't be read: {error}") from error


def parse_json(text: str | bytes, kind: Any) -> Any:
    """Return the value that JSON stands for, checked.

    Raises
    ------
    ValueError
        If it is no strict JSON, is nested too deeply, or is no `kind`, see `problem`.
    """
    try:
        value = json.loads(text, parse_constant=_refuse)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    except ValueError as error:  # of JSON, UTF-8, or a number of thousands of digits
        raise ValueError(f"it is no JSON: {printable(str(error))}") from error
    if words := problem(value, kind):
        raise ValueError(words)
    return value


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def _words(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
