"""`flowleak attack` and `score`: a run's recorded updates, attacked again, scored later."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fl_app.commands.arguments import RunName, RunsDir
from fl_app.commands.output import screen, tell, warn

if TYPE_CHECKING:
    from fl_app.config import AttackConfig


def attack(
    run: RunName,
    attack: Annotated[
        str,
        typer.Option(
            help="A name (`flowleak list attacks`), several with commas between, or all; "
            "default: finish what the run left unfinished."
        ),
    ] = "",
    budget: Annotated[
        str,
        typer.Option(
            help="What each attack of a comparison may spend: authors (default), iterations=N "
            "or seconds=S."
        ),
    ] = "",
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="Setting of the attack, as iterations=500 or options.lr=0.4; repeatable. "
            "`flowleak list attacks NAME` prints the options.",
        ),
    ] = None,
    follow: Annotated[
        bool, typer.Option(help="Take jobs that join the queue, until standard input ends.")
    ] = False,
    runs_dir: RunsDir = Path("runs"),
) -> None:
    """Attack a run's recorded Observations again; the lines join its log.

    Several attacks, or one with a budget, make a comparison: what has its line already
    is not run again, and comparison.md, .json and .png in the run's folder compare them.
    """
    from fl_app.audit.table import leakage_table
    from fl_app.config import ConfigError
    from fl_app.runs.attacking import finish_attacks, watch_input
    from fl_app.runs.comparison import AttackComparison
    from fl_app.runs.facts import open_auditor
    from fl_app.runs.folder import find_run
    from fl_app.runs.lock import only_one
    from fl_app.util.files import runs_folder
    from server_strategies.attack_pool import QueueEntry, enqueue, new_id, pending
    from server_strategies.observations import ObservationStore

    console = screen()
    folder = find_run(runs_folder(str(runs_dir)), run)
    if budget or attack == "all" or "," in attack:
        if set_ or follow:
            raise ConfigError("--set and --follow are allowed with one attack, without --budget")
        AttackComparison.of(attack or "all", budget or "authors").run(folder, console)
        return
    store, auditor = ObservationStore(folder), open_auditor(folder, tell)
    config = auditor.config
    warn(auditor.bad_lines())
    before = len(auditor.lines())
    if attack:
        chosen = _attack_config(attack, set_ or [])
        with only_one(folder):
            for id_ in store.ids():
                new = new_id(id_, chosen)
                enqueue(folder, QueueEntry(id_, chosen, config.prior, config.seed, new))
    finish_attacks(auditor, console, watch_input() if follow else lambda: True)
    lines, left = auditor.lines()[before:], len(pending(folder))
    if left:
        warn([f"{left} attacks are still queued: flowleak attack {run} goes on with them"])
    if follow:  # the training shows the table
        return
    if lines:
        console.print(leakage_table(lines))
    elif not left:
        console.print("Nothing to do: no observation, or every attack of the run has its line")


def score(
    run: RunName,
    truth: Annotated[
        Path, typer.Option(help="Folder whose truth/ holds the clients' private batches.")
    ],
    runs_dir: RunsDir = Path("runs"),
) -> None:
    """Score a run's reconstructions where the ground truth comes later; the lines join its log."""
    from fl_app.audit.leakage_log import read_lines
    from fl_app.audit.table import leakage_table
    from fl_app.runs.attacking import score_later
    from fl_app.runs.folder import find_run
    from fl_app.util.files import runs_folder

    folder = find_run(runs_folder(str(runs_dir)), run)
    lines, problems = score_later(folder, truth, tell)
    warn([*read_lines(folder / "leakage.jsonl")[1], *problems])
    if not lines and not problems:
        typer.echo(f"Nothing to do: {truth / 'truth'} holds none of the unscored clients")
    if lines:
        screen().print(leakage_table(lines))


def _attack_config(name: str, settings: list[str]) -> AttackConfig:
    from fl_app.config import load_config
    from server_strategies.attacks.run import create_attack

    pairs = [pair for setting in settings for pair in setting.split()]
    overrides = " ".join(f"attack.{pair}" for pair in pairs)
    chosen = load_config({"attack": name, "overrides": overrides}).attack
    create_attack(chosen)
    return chosen
