"""Updates and the attacks on them: from lines of the log to what a page shows. Free of torch."""

from __future__ import annotations

import json
import re
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

from fl_app.audit.exposure import (
    count_words,
    identified_of,
    mean_single_colour,
    recognised_of,
    verdict,
)
from fl_app.audit.images import ImageRow, image_rows
from fl_app.audit.thumbnails import Thumbnails, thumbnails
from fl_app.report.model import Attempt, Cells, HeatMap, Pair, Update
from fl_app.report.source import Source, number, plural

# A browser takes a hundred elements for an attempt, and has to open a large run's page at once.
_DETAILED = 64  # attempts, those of the worst updates
_MOST = 64  # images of an attempt
_IMAGES = 500  # in the table of all
_HEAT = (15.0, 20.0, 25.0, 30.0)  # dB from which on a cell is warmer, where nothing is identified
_COMPARED_JOB = re.compile(r".+-[0-9a-f]{12}")  # see `AttackComparison`


@dataclass
class Settings:
    """Tables that many attempts refer to, each kept once."""

    tables: list[tuple[str, Cells]] = field(default_factory=list)
    _places: dict[str, int] = field(default_factory=dict)

    def place(self, heading: str, values: Mapping[str, Any]) -> int:
        """Return the place of some settings among the tables."""
        key = json.dumps([heading, values], sort_keys=True)
        if key not in self._places:
            self._places[key] = len(self.tables)
            rows = [[name, setting_words(value)] for name, value in sorted(values.items())]
            self.tables.append((heading, [["setting", "value"], *rows]))
        return self._places[key]


def setting_words(value: Any) -> str:
    """Return a setting's value as people write it."""
    return value if isinstance(value, str) else json.dumps(value)


@dataclass(frozen=True)
class Drawn:
    """All updates of a run.

    Attributes
    ----------
    updates : tuple of Update
        The worst, worst first, with their attempts.
    others : tuple of Update
        The rest, without.
    images : tuple of Pair
        The worst of all updates, worst first, without pictures.
    more : int
        Images that are left out of `images`.
    settings, protocols : tuple of (str, table)
    problems : tuple of str
    """

    updates: tuple[Update, ...]
    others: tuple[Update, ...]
    images: tuple[Pair, ...]
    more: int
    settings: tuple[tuple[str, Cells], ...]
    protocols: tuple[tuple[str, Cells], ...]
    problems: tuple[str, ...]


def draw_updates(source: Source, attack: str, pictures: bool) -> Drawn:
    """Return what the page shows of each update.

    Parameters
    ----------
    source : Source
    attack : str
        That of the verdict; its outcomes come first.
    pictures : bool
        Whether there are pictures, links to them, and classes of private images.
    """
    rows = {id(line): _worst_first(image_rows(line)) for line in source.lines}
    names, groups = _clients(source), _grouped(source, attack, rows)
    attempts = list(accumulate(map(len, groups)))
    detailed = groups[: max(1, sum(count <= _DETAILED for count in attempts))]
    shown = _shown(source.folder, [line for lines in detailed for line in lines], rows, pictures)
    settings, protocols = Settings(), Settings()
    updates = []
    for lines in detailed:
        client = names[_key(lines[0])]
        made = []
        for line in lines:
            pairs = _pairs(line, rows[id(line)][:_MOST], client, shown[id(line)][0], pictures)
            more = len(rows[id(line)]) - len(pairs)
            made.append(_attempt(source, line, pairs, more, pictures, settings, protocols))
        updates.append(_update(lines, client, tuple(made), attack, pictures))
    others = [
        _update(lines, names[_key(lines[0])], (), attack, pictures)
        for lines in groups[len(detailed) :]
    ]
    every = sorted(
        ((line, row) for line in source.lines for row in rows[id(line)]),
        key=lambda each: _badness(each[1]),
        reverse=True,
    )
    images = [
        pair
        for line, row in every[:_IMAGES]
        for pair in _pairs(line, [row], names[_key(line)], Thumbnails({}, {}), pictures)
    ]
    problems = dict.fromkeys(words for _, said in shown.values() for words in said)
    return Drawn(
        tuple(updates), tuple(others), tuple(images), len(every) - len(images),
        tuple(settings.tables), tuple(protocols.tables), tuple(problems),
    )  # fmt: skip


def _key(line: Mapping[str, Any]) -> tuple[int, str]:
    return line["round"], line["node"]


def _grouped(
    source: Source, attack: str, rows: Mapping[int, Sequence[ImageRow]]
) -> list[list[Mapping[str, Any]]]:
    """Return the lines of each update, those of an attack first; the worst update comes first."""
    found: dict[tuple[int, str], list[Mapping[str, Any]]] = {}
    for line in sorted(source.lines, key=lambda line: line["attack"] != attack):
        found.setdefault(_key(line), []).append(line)

    def severity(lines: Sequence[Mapping[str, Any]]) -> tuple[Any, ...]:
        worst = _badness(next(iter(rows[id(lines[0])]), ImageRow(0)))
        return _cell(lines[0])[1], worst, -lines[0]["round"]

    return sorted(found.values(), key=severity, reverse=True)


def _shown(
    folder: Path,
    lines: Sequence[Mapping[str, Any]],
    rows: Mapping[int, Sequence[ImageRow]],
    pictures: bool,
) -> dict[int, tuple[Thumbnails, list[str]]]:
    """Return the pictures by line, and what could not be read; the first lines have them first."""
    nothing: tuple[Thumbnails, list[str]] = (Thumbnails({}, {}), [])
    found = {id(line): nothing for line in lines}
    drawn = [line for line in lines if line["picture"] and pictures]
    # Of each update the first attack is the verdict's.
    first = {_key(line): id(line) for line in reversed(drawn)}
    drawn.sort(key=lambda line: first[_key(line)] != id(line))
    wanted = [(line, [row.image for row in rows[id(line)][:_MOST]]) for line in drawn]
    made = thumbnails(folder, wanted)
    return found | {id(line): each for line, each in zip(drawn, made, strict=True)}


def _worst_first(rows: Iterable[ImageRow]) -> list[ImageRow]:
    return sorted(rows, key=_badness, reverse=True)


def _badness(row: ImageRow) -> tuple[bool, float]:
    return bool(row.identified), -1.0 if row.psnr is None else row.psnr


def _clients(source: Source) -> dict[tuple[int, str], str]:
    """Return the client's name of each update; two of a round that claim one name differ."""
    names = {(line["round"], line["node"]): source.client(line) for line in source.lines}
    taken = Counter((round_, name) for (round_, _), name in names.items())
    return {
        (round_, node): f"{name} (node {node})" if taken[round_, name] > 1 else name
        for (round_, node), name in names.items()
    }


def _anchor(line: Mapping[str, Any]) -> str:
    return f"round-{line['round']}-node-{line['node']}"


def _pairs(
    line: Mapping[str, Any],
    rows: Sequence[ImageRow],
    client: str,
    thumbs: Thumbnails,
    pictures: bool,
) -> tuple[Pair, ...]:
    return tuple(
        Pair(
            anchor=_anchor(line),
            round=line["round"],
            image=row.image,
            client=client,
            attack=line["attack"],
            labels=_labels(row, redacted=not pictures),
            psnr=row.psnr,
            ssim=row.ssim,
            lpips=row.lpips_vgg if row.lpips_alex is None else row.lpips_alex,
            single_colour=row.single_colour,
            identified=row.identified,
            rank="" if row.rank is None else f"{row.rank} of {1 + (row.candidates or 0)}",
            private=thumbs.private.get(row.image, ""),
            found=thumbs.found.get(row.image, ""),
        )
        for row in rows
    )


def _labels(row: ImageRow, redacted: bool) -> str:
    """Return an image's class, and that of its reconstruction where it is another."""
    true, found = row.true_label, row.found_label
    if true is None:
        return "" if found is None or redacted else f"{found} (inferred)"
    right = "" if found is None else ("right" if true == found else "wrong")
    if redacted:  # a private image's class is private, too
        return right
    return f"{true}" if right != "wrong" else f"{true}, taken for {found}"


def _update(
    lines: Sequence[Mapping[str, Any]],
    client: str,
    attempts: tuple[Attempt, ...],
    attack: str,
    pictures: bool,
) -> Update:
    first = lines[0]
    cell, heat = ("not run", -1) if first["attack"] != attack else _cell(first)
    return Update(
        anchor=_anchor(first),
        round=first["round"],
        client=client,
        node=first["node"],
        images=next((line["num_examples"] for line in lines if line["num_examples"]), None),
        summary=_summary(first),
        cell=cell,
        heat=heat,
        picture=first["picture"] or "" if pictures else "",
        attempts=attempts,
    )


def _cell(line: Mapping[str, Any]) -> tuple[str, int]:
    """Return the words and the heat of an outcome, from 0 to 5; -1: there is none."""
    if line["status"] != "ok":
        return line["status"], -1
    psnr = line["metrics"].get("psnr")
    if not psnr or psnr["mean"] is None:
        return "no truth" if not line["truth"] else "unscored", -1
    if found := identified_of([line]):
        share = found["count"] / found["of"]
        return f"{found['count']}/{found['of']}", 0 if not share else min(5, 1 + int(5 * share))
    words = number(psnr["mean"], 0, " dB")
    if psnr["baseline"] is not None and psnr["mean"] <= psnr["baseline"]:
        return words, 0
    return words, 1 + sum(psnr["mean"] >= threshold for threshold in _HEAT)


def _summary(line: Mapping[str, Any]) -> str:
    if line["status"] != "ok":
        return line["status"]
    psnr = line["metrics"].get("psnr")
    if not psnr:
        return "reconstructed; not compared, for there is no truth"
    words = f"PSNR {number(psnr['mean'], 1, ' dB')}"
    if found := identified_of([line]):
        words = f"{count_words(found)} identified, {words}"
    return words


def _attempt(
    source: Source,
    line: Mapping[str, Any],
    pairs: tuple[Pair, ...],
    more: int,
    pictures: bool,
    settings: Settings,
    protocols: Settings,
) -> Attempt:
    psnr = line["metrics"].get("psnr") or {}
    return Attempt(
        attack=line["attack"],
        status=line["status"],
        error=line["error"] or "",
        facts=tuple(_facts(line)) if line["status"] == "ok" else (),
        pairs=pairs,
        more=more,
        losses=tuple(line["losses"]),
        psnr_by_step=tuple(line["psnr_by_step"]),
        mean_colour=psnr.get("baseline"),
        diagnosis=tuple(line["diagnosis"]),
        reasons=_reasons(line),
        settings=settings.place(line["attack"], line["options"]) if line["options"] else -1,
        protocol=protocols.place("", line["protocol"]) if line["protocol"] else -1,
        command=_command(source, line),
        picture=line["picture"] or "" if pictures else "",
    )


def _reasons(line: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """Return what a line lacks and why, each reason once; an error says it for all that it took."""
    lacking: dict[str, list[str]] = {}
    for name, why in line["reasons"].items():
        if why != line["error"]:
            lacking.setdefault(why, []).append(name)
    return tuple((", ".join(names), why) for why, names in lacking.items())


def _facts(line: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return an outcome's scores and costs, by name."""
    facts = [("labels given", line["labels"])]
    scores = line["metrics"]
    psnr = scores.get("psnr")
    if psnr and None not in (psnr["mean"], psnr["baseline"]):
        single = mean_single_colour([line])
        note = verdict(psnr["mean"], psnr["baseline"], single)
        facts += [
            ("PSNR, mean", number(psnr["mean"], 1, " dB") + (f" ({note})" if note else "")),
            ("median; worst tenth", f"{number(psnr.get('median'), 1, ' dB')}; "
             f"{number(psnr.get('worst_tenth'), 1, ' dB')}"),
            ("mean colour; best single colour",
             f"{number(psnr['baseline'], 1, ' dB')}; {number(single, 1, ' dB')}"),
        ]  # fmt: skip
    for name, words in (("ssim", "SSIM"), ("lpips_vgg", "LPIPS VGG"), ("lpips_alex", "LPIPS Alex")):
        if score := scores.get(name):
            facts.append((words, f"{number(score['mean'], 3)} (mean colour "
                                 f"{number(score['baseline'], 3)})"))  # fmt: skip
    if found := identified_of([line]):
        facts.append(("identified", f"{count_words(found)}, chance {found['chance']:.1%}"))
    if seen := recognised_of([line]):
        facts.append(("recognisable", f"{count_words(seen)}, chance {seen['chance']:.0%}"))
    if line["label_accuracy"] is not None:
        share = f"{line['label_accuracy']:.0%}, chance {line['label_chance']:.0%}"
        facts.append(("labels inferred right", share))
    for name, words in (("tv", "total variation"), ("prior_residual", "prior residual")):
        if score := line["reference_free"].get(name):
            facts.append((words, f"{number(score['mean'], 3)} (noise "
                                 f"{number(score['baseline'], 3)})"))  # fmt: skip
    losses = [loss for loss in line["losses"] if loss is not None]
    if losses:
        facts.append(("matching loss", f"{losses[0]:.3g} at first, {losses[-1]:.3g} at last"))
    where = f" on {line['device']}" if line["device"] else ""
    facts += [
        ("matching", line["matching"]),
        ("labels from", line["labels_source"] or "-"),
        ("ended by", line["stop_reason"]),
        ("cost", f"{line['seconds']:.1f} s{where}, {plural(line['iterations'], 'iteration')}, "
                 f"{line['peak_memory'] / 1e6:,.0f} MB, {line['flops'] / 1e9:,.0f} GFLOP"),
    ]  # fmt: skip
    if line["update_bytes"] is not None:
        facts.append(("update", f"{line['update_bytes'] / 1e6:.2f} MB, {line['update_encoding']}"))
    return [(name, words) for name, words in facts if words]


def _command(source: Source, line: Mapping[str, Any]) -> str:
    """Return the command that makes such a line again; "" where the log does not hold enough."""
    if line["status"] == "skipped":
        return ""
    command = source.compared.get("command")
    if isinstance(command, str) and _COMPARED_JOB.fullmatch(line["job"] or ""):
        return command
    run, attack = shlex.quote(source.folder.name), shlex.quote(line["attack"])
    words = f"flowleak attack {run} --attack {attack}"
    config = source.config
    if config and config.attack.name == line["attack"]:
        words += f" --set iterations={config.attack.iterations}"
        if config.attack.seconds:
            words += f" --set seconds={config.attack.seconds:g}"
        options = sorted(config.attack.options.items())
        words += "".join(f" --set {shlex.quote(_option(*each))}" for each in options)
    return words


def _option(name: str, value: Any) -> str:
    return f"options.{name}={value if isinstance(value, str) else json.dumps(value)}"


def heat_map(updates: Sequence[Update]) -> HeatMap | None:
    """Return the map of rounds by clients; None where there is one update or none."""
    if len(updates) < 2:
        return None
    cells = {(update.round, update.client): update for update in updates}
    names = sorted({update.client for update in updates}, key=_natural)
    rounds = sorted({update.round for update in updates})
    if any("/" in update.cell for update in updates):
        shows = "images identified, of those that could be"
    else:
        shows = "mean PSNR" if any(update.heat >= 0 for update in updates) else "the outcome"
    return HeatMap(tuple(names), tuple(rounds), cells, shows)


def _natural(name: str) -> tuple[int, int, str]:
    """Return a key by which client 10 comes after client 9."""
    return (0, int(name), "") if name.isdecimal() and len(name) < 20 else (1, 0, name)
