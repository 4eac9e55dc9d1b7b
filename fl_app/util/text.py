"""Words that come from others, made fit for a terminal, a log and a report."""

from __future__ import annotations

MOST = 500  # characters that are kept


def reason(error: Exception) -> str:
    """Return an error's words, made `printable`, or its type where it has none."""
    return printable(str(error)) or type(error).__name__


def printable(text: str) -> str:
    """Return text from a client without what could steer a terminal, and not too much of it.

    Control characters and everything else that Unicode does not call printable
    become their escapes, as in a Python string; more than `MOST` characters are cut.
    """
    kept = "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[: MOST + 1]
    )
    return kept if len(kept) <= MOST else kept[: MOST - 3] + "..."
