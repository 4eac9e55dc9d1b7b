"""What to do about what leaks: each measure applied to a run's own clients, and attacked again.

The auditor holds the private images, so that the clients' rounds can be trained again, with a
defence, in larger batches or longer. The attack knows what was changed. A federation trained with
the change and without says what it costs in accuracy. Attacks and federations have a process of
one thread each, as many at once as there are cores: a search whose threads wait for another's is
many times slower, and what it then does not find is taken for the change's merit.
"""

from __future__ import annotations

import os
import pickle
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, Future
from dataclasses import asdict, dataclass, replace
from typing import Any

from client_app.defended_steps import check_defense
from fl_app.audit.auditor import Auditor
from fl_app.audit.exposure import identified_of
from fl_app.benchmarks.processes import process_pool
from fl_app.config import UNBOUNDED, AttackConfig
from fl_app.models import known_model
from fl_app.protocol import Knowledge, Observation, Reconstruction
from fl_app.runs.advice import AS_IT_IS, FOLDER, Advice, read_advice, write_advice
from fl_app.runs.changes import Change, changes_for, times_seen
from fl_app.runs.privacy import epsilon_of
from fl_app.runs.retraining import Federations, changed_update, model_before
from server_strategies.attacks.run import run_attack
from server_strategies.honest_but_curious import sum_of
from server_strategies.observations import ObservationStore

_MOST = 4  # processes: each has torch in memory, and the prior
_AHEAD = 1  # changes whose attacks begin before those of the one before have ended


def advise(
    auditor: Auditor,
    clients: int,
    seconds: float,
    rounds: int,
    tell: Callable[[str], None],
    changes: Sequence[Change] | None = None,
) -> list[Advice]:
    """Try changes on a run's clients; what is in its advise.json already is not tried again.

    Parameters
    ----------
    auditor : Auditor
        Of a run with Truth.
    clients : int
        Updates of the first attacked round that are taken, 1 or more.
    seconds : float
        That each attack may take, above 0; as many for every change.
    rounds : int
        Of the federations whose accuracy is measured; 0: it is not.
    tell : callable
        Takes a line when a change begins.
    changes : sequence of Change, optional
        See `changes_for`.

    Raises
    ------
    ValueError
        If no update has its private images here.
    """
    store, folder = ObservationStore(auditor.run_dir), auditor.run_dir
    seen = [store.load(id_) for id_ in store.ids()]
    held = [each for each in seen if not each.nodes and auditor.truth(each) is not None]
    if not held:
        raise ValueError(
            f"{folder.name} holds no single client's update with its private images: advice needs "
            "both; they are written where audit.truth is on, and secagg off"
        )
    first = min(each.round for each in held)
    taken = [each for each in held if each.round == first][:clients]
    attack = replace(auditor.config.attack, iterations=UNBOUNDED, seconds=seconds)
    setting = {"clients": len(taken), "rounds": rounds, "attack": asdict(attack)}
    done = read_advice(folder, setting)
    if changes is None:
        spent = rounds or auditor.config.rounds
        changes = changes_for(taken, auditor.config.client, auditor.knowledge, spent)
    known = {row.change for row in done}
    with process_pool(min(_MOST, os.cpu_count() or 1), threads=1) as pool:
        federations, trials = Federations(rounds, pool), deque[_Trial]()

        def end_one() -> None:
            row = _ended(trials.popleft(), taken, rounds)
            done.append(_beside_the_run(row, auditor, taken) if row.change == AS_IT_IS else row)
            write_advice(folder, setting, done)

        for change in changes:
            if change.words not in known:
                tell(f"advise: {change.words}, on {len(taken)} updates of round {first}")
                trials.append(_begun(change, auditor, taken, attack, federations))
            if len(trials) > _AHEAD:
                end_one()
        while trials:
            end_one()
    return done


@dataclass(frozen=True)
class _Trial:
    """A change, the auditor of a run with it, what speaks against it, and what is to come.

    Attributes
    ----------
    attacks : sequence of (Observation, Future of Reconstruction)
    accuracy : Future of float or None
    """

    change: Change
    own: Auditor
    problem: str = ""
    attacks: Sequence[tuple[Observation, Future[Reconstruction]]] = ()
    accuracy: Future[float] | None = None


def _begun(
    change: Change,
    auditor: Auditor,
    taken: Sequence[Observation],
    attack: AttackConfig,
    federations: Federations,
) -> _Trial:
    """Train the clients with a change, and begin to attack them and to train the federation."""
    own = _changed(change, auditor, max(each.num_examples for each in taken))
    config, defense, attacks = own.config, own.config.defense, []
    try:
        check_defense(defense, config.client, known_model(own.knowledge))
        if defense.secagg and len(taken) < 2:
            raise ValueError("a sum needs two clients or more")
        own.run_dir.mkdir(parents=True, exist_ok=True)
        if change.norm:
            w0 = model_before(taken[0].round, own)
            taken = [replace(each, w0=w0) for each in taken]
        updates = [changed_update(each, auditor, own) for each in taken]
        for each in [sum_of(updates)] if defense.secagg else updates:
            setting = (attack, config.prior, config.seed)
            attacks.append((each, _attacked(federations.pool, each, own.grant(each), *setting)))
        return _Trial(change, own, "", attacks, federations.accuracy(own))
    except (ValueError, RuntimeError) as error:  # a pool that is broken among them
        return _Trial(change, own, str(error))


def _attacked(
    pool: Executor, seen: Observation, known: Knowledge, *setting: Any
) -> Future[Reconstruction]:
    """Begin an attack in another process; here where a user's model can't be sent to one."""
    try:
        pickle.dumps(known)
    except (pickle.PicklingError, AttributeError, TypeError):
        done: Future[Reconstruction] = Future()
        try:
            done.set_result(run_attack(seen, known, *setting))
        except (ValueError, RuntimeError) as error:
            done.set_exception(error)
        return done
    return pool.submit(run_attack, seen, known, *setting)


def _ended(trial: _Trial, taken: Sequence[Observation], rounds: int) -> Advice:
    """Return what a change does; what does not fit the clients is told."""
    own, config, defense = trial.own, trial.own.config, trial.own.config.defense
    row = Advice(trial.change.words, str(defense), problem=trial.problem)
    if trial.problem:
        return row
    try:
        found = [(seen, attack.result()) for seen, attack in trial.attacks]
        for seen, each in found:
            own.record(seen, each)
        row = _row(row, own.lines()[-len(found) :])
        accuracy = trial.accuracy.result() if trial.accuracy else None
    except (ValueError, RuntimeError) as error:
        return replace(row, problem=str(error))
    if defense.dp_clip:
        times = times_seen(taken, config.client, rounds or config.rounds)
        epsilon = round(epsilon_of(defense.dp_noise, times, defense.delta), 2)
        row = replace(row, epsilon=epsilon, delta=defense.delta)
    seconds = sum(each.seconds for _, each in found)
    return replace(row, accuracy=accuracy, seconds=round(seconds, 1))


def _changed(change: Change, auditor: Auditor, count: int) -> Auditor:
    """Return an auditor of a run with a change, of clients of so many images."""
    config, known = auditor.config, auditor.knowledge
    config = replace(
        config,
        defense=config.defense if change.defense is None else change.defense,
        client=change.training(config.client, count),
        model=replace(config.model, norm=change.norm or config.model.norm),
        audit=replace(config.audit, defense="given"),
    )
    known = replace(
        known,
        defense=config.defense.plain(),
        training=config.client,
        norm=change.norm or known.norm,
    )
    return Auditor(
        auditor.run_dir / FOLDER / change.key,
        config,
        known,
        no_data=auditor.no_data,
        no_candidates=auditor.no_candidates,
    )


def _row(row: Advice, lines: Sequence[Mapping[str, Any]]) -> Advice:
    """Return a row with what the attacks found."""
    failed = [line["error"] for line in lines if line["status"] != "ok"]
    if failed:
        return replace(row, problem=failed[0])
    found = identified_of(lines)
    recognised = [bool(one) for line in lines for one in line["recognisable"] or ()]
    scores = [line["metrics"]["psnr"] for line in lines]
    values = [value for score in scores for value in score["values"]]
    images = [len(score["values"]) for score in scores]
    baseline = sum(s["baseline"] * n for s, n in zip(scores, images, strict=True)) / sum(images)
    return replace(
        row,
        leaked=found["count"] if found else sum(recognised),
        of=found["of"] if found else len(recognised),
        by="identified" if found else "recognisable",
        psnr=round(sum(values) / len(values), 2),
        mean_colour=round(baseline, 2),
    )


def _beside_the_run(row: Advice, auditor: Auditor, taken: Sequence[Observation]) -> Advice:
    """Return the row of unchanged clients, with a note where the run's own attack found more."""
    ids = {(each.round, str(each.node)) for each in taken}
    lines = {
        (line["round"], line["node"]): line
        for line in auditor.lines()
        if line["status"] == "ok" and line["attack"] == auditor.config.attack.name
    }
    found = identified_of([line for id_, line in lines.items() if id_ in ids])
    if row.problem or not found or found["count"] <= row.leaked:
        return row
    words = f"the run's own attack identified {found['count']} of {found['of']}"
    return replace(row, note=f"{words}: too few --seconds")
