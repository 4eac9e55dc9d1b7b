"""`flowleak advise`: changes tried on a run's own clients."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from helpers.audit import line_of
from helpers.pools import pool_here
from helpers.runs import recorded_run

from fl_app.audit.leakage_log import append_line
from fl_app.config import load_config
from fl_app.protocol import Defense, LocalTraining
from fl_app.report.words import measures
from fl_app.runs import advising
from fl_app.runs.advice import AS_IT_IS, FILE, Advice, best, read_advice
from fl_app.runs.advising import advise
from fl_app.runs.changes import Change
from fl_app.runs.deleting import delete_run
from fl_app.runs.facts import open_auditor
from fl_app.util.reading import BrokenFileError
from server_strategies.observations import ObservationStore

NOW = Advice(AS_IT_IS, leaked=8, of=10, accuracy=0.50)


def test_changes_are_tried_scored_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(advising, "process_pool", pool_here)
    config = load_config({"overrides": "client.local_steps=2 client.batch_size=1 num_clients=2"})
    folder, observation, _ = recorded_run(replace(config, runs_dir=str(tmp_path), name="run"))
    one = {"identified": [True], "rank": [1], "candidates": [9]}
    found = {name: 3 * value for name, value in one.items()} | {"by": "pixels"}
    place = {"round": observation.round, "node": str(observation.node), "attack": "flow_matching"}
    append_line(folder / "leakage.jsonl", line_of(**place, identification=found))
    told: list[str] = []
    changes = (
        Change(AS_IT_IS),
        Change("updates in bfloat16", Defense(quantize="bf16")),
        Change("one batch", one_batch=True),
        Change("GroupNorm", norm="group"),
        Change("a sum", Defense(secagg=True)),
    )
    auditor = open_auditor(folder, told.append)
    rows = advise(auditor, 2, 1.0, 0, told.append, changes)
    assert [row.of for row in rows] == [2, 2, 2, 2, 0]
    assert all(row.psnr is not None and row.seconds > 0 for row in rows[:4])
    assert rows[4].problem == "a sum needs two clients or more"
    own = "the run's own attack identified 3 of 3: too few --seconds"
    assert [row.note for row in rows] == [own, "", "", "", ""]
    # Nothing of it is tried again, and the run's own log is as it was.
    assert advise(auditor, 2, 1.0, 0, told.append, changes) == rows == read_advice(folder)
    assert len(told) == 5 and len(auditor.lines()) == 1
    # What was attacked: the same images; the same update but for its rounding.
    store = folder / "advise" / "updates-in-bfloat16"
    assert (store / "leakage.jsonl").is_file() and (store / "truth").is_dir()
    assert ObservationStore(folder).ids() == [observation.id]
    delete_run(folder, private_only=True)
    assert not (folder / "advise").exists() and read_advice(folder) == rows
    with pytest.raises(ValueError, match="no single client's update with its private images"):
        advise(open_auditor(folder, told.append), 1, 1.0, 0, told.append)


def test_what_cannot_be_sent_to_a_process_is_attacked_here(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Own:
        """A model of a user's file, which no other process can import."""

    monkeypatch.setattr(advising, "run_attack", lambda _, known: known)
    with advising.process_pool(1, 1) as pool:  # no process starts before its first call
        assert isinstance(advising._attacked(pool, 0, Own()).result(), Own)


def test_a_changed_training() -> None:
    own = LocalTraining("sgd", lr=0.1, batch_size=2, local_steps=3)
    assert Change("x", one_batch=True).training(own, 6).batches(6) == ((0, 1, 2, 3, 4, 5),)
    assert Change("x", passes=4).training(own, 6).passes(6) == 4
    epochs = LocalTraining("sgd", lr=0.1, batch_size=2, local_steps=0, local_epochs=1)
    assert Change("x", passes=4).training(epochs, 6).local_epochs == 4


def test_the_best_halve_what_leaks_at_the_least_cost() -> None:
    rows = [
        NOW,
        Advice("half", leaked=4, of=10, accuracy=0.40),
        Advice("free", leaked=3, of=10, accuracy=0.498),
        Advice("as free", leaked=2, of=10, accuracy=0.502),
        Advice("too little", leaked=5, of=10, accuracy=0.60),
        Advice("failed", problem="no"),
    ]
    assert [row.change for row in best(rows)] == ["as free", "free", "half"]
    assert best(rows[1:]) == [] == best([replace(NOW, leaked=0), *rows[1:]])
    first = measures(rows)[0]
    assert first.words == "As free"
    assert first.effect == "identified 2 of 10, as it is 8 of 10; accuracy 50.2%, as it is 50.0%"
    assert measures([])[0].effect == "not measured on this run"
    # What was tried has its figures, and stands there once.
    tried = [NOW, Advice("secure aggregation", leaked=1, of=10, accuracy=0.5),
             Advice("DP-SGD at epsilon 8: clip 1", leaked=6, of=10, accuracy=0.1)]  # fmt: skip
    first, second, *rest = measures(tried)
    assert first.words == "Secure aggregation"
    assert second.words.startswith("Train with DP-SGD") and "identified 6 of 10" in second.effect
    assert {each.effect for each in rest} == {"not measured on this run"}


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text('{"rows": [{"odd": 1}]}')
    with pytest.raises(BrokenFileError, match="no advice of this version"):
        read_advice(tmp_path)
