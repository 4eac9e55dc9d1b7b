"""`flowleak list`: what can be chosen by name, and what an attack's options are."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from fl_app.commands.output import print_json, screen, table_of
from fl_app.config import GROUPS, ConfigError, config_files, load_config
from fl_app.registry import ATTACKS, OURS, PRIORS, REGISTRIES, Entry, Registry
from fl_app.util.extras import MissingExtraError

# Up to a line that ends with a full stop, or to the paragraph's end.
_SOURCE = re.compile(r"^Source: (.+?)(?:\.$|\n\s*\n|\Z)", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Choice:
    """Something that can be chosen by its name.

    Attributes
    ----------
    name : str
        Of a file in conf/, of a plug-in's entry, or both.
    description : str
        One line.
    source : str
        The paper or the data set that it is from; "" where there is none.
    package : str
        The distribution that offers it.
    """

    name: str
    description: str
    source: str
    package: str


def list_choices(
    kind: Annotated[
        str,
        typer.Argument(
            metavar="KIND",
            help=f"What to list: {', '.join(REGISTRIES)}.",
            autocompletion=lambda: list(REGISTRIES),
        ),
    ],
    name: Annotated[
        str,
        typer.Argument(help="Of an attack: list its options instead; all: those of every attack."),
    ] = "",
    json_: Annotated[
        bool,
        typer.Option(
            "--json",
            help="Print a JSON list instead. Keys: name, description, source, package; of priors "
            "also file; of options: attack, option, default, allowed, help.",
        ),
    ] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown instead.")] = False,
) -> None:
    """List what can be chosen by name, ours and what other packages offer."""
    if kind not in REGISTRIES:
        raise ConfigError(f"kind is {kind!r}; allowed: {', '.join(REGISTRIES)}")
    if name and kind != "attacks":
        raise ConfigError(f"name is {name!r}; {kind} have no options to list, allowed: attacks")
    found = options_of(name) if name else [asdict(choice) for choice in choices(kind)]
    if kind == "priors":
        found = [{**each, "file": _file_of(each["name"])} for each in found]
    if json_:
        print_json(found)
        return
    _print(found, markdown)


def choices(kind: str) -> list[Choice]:
    """Return what can be chosen of a kind, in the order of names.

    Parameters
    ----------
    kind : str
        A key of `REGISTRIES`.
    """
    registry = REGISTRIES[kind]
    files = config_files(registry.noun) if registry.noun in GROUPS else {}
    names = sorted({*registry, *files})
    entries = (
        registry.entries.get(name) or _variant(name, files[name], registry) for name in names
    )
    return [_choice(entry, files.get(entry.name)) for entry in entries]


def _variant(name: str, file: Path, registry: Registry) -> Entry:
    """Return the entry that a configuration of no name in the registry stands for."""
    others = (entry for entry in registry.entries.values() if entry.package != OURS)
    packages = (entry.package for entry in others if entry.folder() == file.parents[2])
    return Entry(name, "", next(packages, OURS))


def options_of(name: str) -> list[dict[str, Any]]:
    """Return the options of an attack, or of every attack by the name "all".

    Of a configuration that sets an option, the default is its value.
    """
    if name != "all":
        return _options(name)
    found = []
    for each in ATTACKS:
        try:
            found += _options(each)
        except MissingExtraError:
            raise
        except ValueError as error:  # a plug-in's, which is not to hide the others'
            typer.secho(f"{each} is left out: {error}", fg="yellow", err=True)
    return found


def _options(name: str) -> list[dict[str, Any]]:
    config = load_config({"attack": name}).attack
    if config.name not in ATTACKS:
        raise ConfigError(f"attack.name: {ATTACKS.unknown(config.name)}")
    return [
        {
            "attack": name,
            "option": option.name,
            "default": config.options.get(option.name, option.default),
            "allowed": option.allowed,
            "help": option.help,
        }
        for option in ATTACKS[config.name].options()
    ]


def _choice(entry: Entry, file: Path | None) -> Choice:
    """Describe an entry by its configuration's first comment, or its docstring."""
    try:
        text = entry.problem or (_first_comment(file) if file else entry.docstring())
    except (OSError, SyntaxError, ValueError) as error:  # of another package
        text = f"Can't be read: {error}"
    source = _SOURCE.search(text)
    return Choice(
        entry.name,
        text.partition("\n")[0].removesuffix("."),
        " ".join(source[1].split()) if source else "",
        entry.package,
    )


def _file_of(prior: str) -> str:
    """Return where a prior's weights are, or why they are not there; empty: its package knows."""
    from server_strategies.priors.places import find_weights

    entry = PRIORS.entries.get(prior)
    if entry and entry.package != OURS:
        return ""
    try:
        return str(find_weights(prior))
    except (ValueError, OSError) as error:
        return str(error)


def _first_comment(file: Path) -> str:
    """Return the comment at a file's top."""
    lines = []
    for line in file.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").strip())
    return "\n".join(lines)


def _print(objects: Sequence[dict[str, Any]], markdown: bool) -> None:
    from fl_app.util.markdown import markdown_table

    cells = [list(objects[0]) if objects else ["name"]]
    cells += [[_plain(value) for value in entry.values()] for entry in objects]
    if markdown:
        typer.echo("\n".join(markdown_table(cells)))
    else:
        screen().print(table_of(cells))


def _plain(value: Any) -> str:
    """Return a value as it is typed in the configuration."""
    return value if isinstance(value, str) else json.dumps(value)
