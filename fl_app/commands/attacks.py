"""`flowleak attack` and `score`: a run's recorded updates, attacked again, scored later."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fl_app.commands.arguments import RunName, RunsDir
from fl_app.commands.output import screen, tell, warn

if TYPE_CHECKING:
    from fl_app.audit.on_line import OnLine
    from fl_app.config import AttackConfig
    from fl_app.runs.pairs import Pair


ClientFile = Annotated[
    Path | None,
    typer.Option(
        "--client",
        help="The file that describes the clients of your own federation (flowleak.Client); "
        "default: audit.py here. It is run.",
    ),
]
OnLineName = Annotated[
    str,
    typer.Option(
        help="module:function of yours that gets each line as it joins the log (docs/log.md)."
    ),
]


def attack(
    run: RunName = "",
    attack: Annotated[
        str,
        typer.Option(
            help="A name (`flowleak list attacks`), several with commas between, or all; "
            "default: finish what the run left unfinished, and attack the updates that have no "
            "attack yet by the run's own, of a recorded federation flow_matching."
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
    client: ClientFile = None,
    before: Annotated[
        Path | None,
        typer.Option(
            help="Instead of a run: weights that a client was sent (.pt, .pth, .safetensors, "
            ".npz), or a folder of them by the names in --after's."
        ),
    ] = None,
    after: Annotated[
        Path | None,
        typer.Option(
            help="With --before: the weights that it returned, or a folder with a file a client."
        ),
    ] = None,
    examples: Annotated[
        int, typer.Option(help="With --before: images that it trained on.", min=0)
    ] = 0,
    truth: Annotated[
        Path | None,
        typer.Option(
            help="With --before: its private images, for scores: torch.save of images (N, C, H, W) "
            "in [0, 1] and labels (N); for a folder in --after a folder, files by the same names."
        ),
    ] = None,
    labels: Annotated[
        str,
        typer.Option(
            help="With --truth: what the attack is granted of the labels: unknown, counts, by-step."
        ),
    ] = "unknown",
    out: Annotated[
        Path, typer.Option(help="With --before: folder that the result is written to.")
    ] = Path("leak"),
    lpips_weights: Annotated[
        str, typer.Option(help="With --truth: LPIPS weights, as audit.lpips_weights.")
    ] = "",
    on_line: OnLineName = "",
    runs_dir: RunsDir = Path("runs"),
) -> None:
    """Attack a run's recorded Observations, for the first time or again, or two files of weights.

    The lines join the run's log. Several attacks, or one with a budget, make a comparison: what
    has its line already is not run again, and comparison.md, .json and .png in the run's folder
    compare them. With --before and --after the result is a run of its own.
    """
    from fl_app.audit.on_line import told_lines

    if before or after:
        from fl_app.runs.pairs import Pair

        if not (before and after) or run or budget or follow:
            raise typer.BadParameter("--before goes with --after, and with no run or budget")
        file = client or Path("audit.py")
        pair = Pair(before, after, file, examples, truth, labels)
        with told_lines(on_line) as take:
            _attack_pair(pair, attack or "flow_matching", set_ or [], out, lpips_weights, take)
        return
    if not run:
        raise typer.BadParameter("name a run, or give --before and --after")
    from fl_app.audit.table import leakage_table
    from fl_app.config import ConfigError
    from fl_app.runs.attacking import finish_attacks, queue_attacks, watch_input
    from fl_app.runs.comparison import AttackComparison
    from fl_app.runs.facts import open_auditor
    from fl_app.runs.folder import find_run
    from fl_app.util.files import runs_folder
    from server_strategies.attack_pool import pending

    console = screen()
    folder = find_run(runs_folder(str(runs_dir)), run)
    if budget or attack == "all" or "," in attack:
        if set_ or follow:
            raise ConfigError("--set and --follow are allowed with one attack, without --budget")
        compared = AttackComparison.of(attack or "all", budget or "authors")
        with told_lines(on_line) as take:
            compared.run(folder, console, client, take)
        _report(folder)
        return
    auditor = open_auditor(folder, tell, client=client)
    warn(auditor.bad_lines())
    earlier = len(auditor.lines())
    with told_lines(on_line) as auditor.on_line:
        if attack or not follow:
            chosen = auditor.config.attack
            if attack or set_:
                chosen = _attack_config(attack or chosen.name, set_ or [])
            queued = queue_attacks(auditor, chosen, again=bool(attack))
            if set_ and not queued:
                raise ConfigError(
                    "--set is for an attack to come, and every update of the run has one: "
                    f"name another, --attack {chosen.name}"
                )
        finish_attacks(auditor, console, watch_input() if follow else lambda: True)
    lines, left = auditor.lines()[earlier:], len(pending(folder))
    if left:
        warn([f"{left} attacks are still queued: flowleak attack {run} goes on with them"])
    if follow:  # the training shows the table
        return
    if lines:
        console.print(leakage_table(lines))
        _report(folder)
    elif not left:
        console.print("Nothing to do: no observation, or every attack of the run has its line")


def score(
    run: RunName,
    truth: Annotated[
        Path,
        typer.Option(
            help="Folder whose truth/ holds the clients' private batches; for a run from files as "
            "--truth of `flowleak attack`; for a recorded federation of your own a folder of such "
            "files, each named as its update in observations/, in .pt."
        ),
    ],
    client: ClientFile = None,
    on_line: OnLineName = "",
    runs_dir: RunsDir = Path("runs"),
) -> None:
    """Score a run's reconstructions where the ground truth comes later; the lines join its log."""
    from fl_app.audit.leakage_log import read_lines
    from fl_app.audit.on_line import told_lines
    from fl_app.audit.table import leakage_table
    from fl_app.runs.attacking import score_later
    from fl_app.runs.folder import find_run
    from fl_app.util.files import runs_folder

    folder = find_run(runs_folder(str(runs_dir)), run)
    if truth.exists() and not (truth / "truth").is_dir():
        from fl_app.runs.pairs import take_private

        take_private(folder, truth, client, screen())
        truth = folder
    with told_lines(on_line) as take:
        lines, problems = score_later(folder, truth, tell, client, take)
    warn([*read_lines(folder / "leakage.jsonl")[1], *problems])
    if not lines and not problems:
        typer.echo(f"Nothing to do: {truth / 'truth'} holds none of the unscored clients")
    if lines:
        screen().print(leakage_table(lines))
        _report(folder)


def _report(folder: Path) -> None:
    """Write a run's report again, and say where it lies."""
    from fl_app.report.writing import try_report

    if path := try_report(folder):
        screen().print(path, highlight=False, soft_wrap=True, markup=False)


def _attack_pair(
    pair: Pair, attack: str, settings: list[str], out: Path, lpips_weights: str, on_line: OnLine
) -> None:
    from fl_app.audit.table import leakage_table
    from fl_app.runs.pairs import attack_pair

    console = screen()
    chosen = _attack_config(attack, settings)
    auditor = attack_pair(pair, chosen, out, console, lpips_weights, on_line)
    lines = auditor.lines()
    console.print(leakage_table(lines))
    for line in lines:
        for words in line["diagnosis"]:
            console.print(f"Note: {words}", markup=False, highlight=False, soft_wrap=True)
    for name in ("leakage.jsonl", *(line["picture"] for line in lines if line["picture"])):
        console.print(f"{auditor.run_dir / name}", highlight=False, soft_wrap=True, markup=False)
    _report(auditor.run_dir)


def _attack_config(name: str, settings: list[str]) -> AttackConfig:
    from fl_app.config import load_config
    from server_strategies.attacks.run import create_attack

    pairs = [pair for setting in settings for pair in setting.split()]
    overrides = " ".join(f"attack.{pair}" for pair in pairs)
    chosen = load_config({"attack": name, "overrides": overrides}).attack
    create_attack(chosen)
    return chosen
