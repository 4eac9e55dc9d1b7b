"""Code in a Markdown page: its blocks, its inline code, and the commands in a shell's block."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt  # rich brings it

_KEYWORDS = ("do", "then", "else")  # a command may follow on the same line
_NO_COMMANDS = ("for", "done")


@dataclass(frozen=True)
class Code:
    """A piece of code in a page.

    Attributes
    ----------
    line : int
        Of the page, from 1, where the code begins.
    language : str
        A fence's first word; "bash" for an indented block: here these are commands. "inline".
    text : str
    """

    line: int
    language: str
    text: str


def code(page: Path) -> Iterator[Code]:
    """Yield a page's blocks and inline code, in order."""
    for token in MarkdownIt("commonmark").enable("table").parse(page.read_text(encoding="utf-8")):
        line = token.map[0] + 1 if token.map else 0
        if token.type == "fence":
            yield Code(line + 1, token.info.split()[0] if token.info else "", token.content)
        elif token.type == "code_block":
            yield Code(line, "bash", token.content)
        for child in token.children or ():
            if child.type == "code_inline":
                yield Code(line, "inline", child.content)


def blocks(page: Path, language: str) -> list[str]:
    """Return the texts of a page's blocks in a language."""
    return [each.text for each in code(page) if each.language == language]


def commands(script: str) -> Iterator[tuple[int, list[str]]]:
    """Yield the words of each simple command of a script, and its line, from 0."""
    begun = ""
    for number, line in enumerate(script.splitlines()):
        begun += line.removesuffix("\\")
        if line.endswith("\\"):
            continue
        words = shlex.shlex(begun, posix=True, punctuation_chars="|&;")
        words.whitespace_split = True
        begun, command = "", []
        for word in [*words, ";"]:
            if word.strip("|&;"):
                command += [word] if command or word not in _KEYWORDS else []
                continue
            if command and command[0] not in _NO_COMMANDS:
                yield number, command
            command = []
