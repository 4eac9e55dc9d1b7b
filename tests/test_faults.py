"""What clients, disks and crowds can do to the server; the deaths are in test_lan.py."""

from __future__ import annotations

import io
import os
import pickle
import resource
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from helpers.attacks import pretended
from helpers.federation import Client, real_client, start, toy_client
from rich.console import Console

from fl_app.audit.auditor import Auditor
from fl_app.audit.table import leakage_table
from fl_app.benchmarks.audit_cost import AuditCost, audit_cost
from fl_app.config import (
    AttackConfig,
    AuditConfig,
    Config,
    ConfigError,
    PoolConfig,
    PriorConfig,
    StrategyConfig,
    WatchConfig,
    load_config,
)
from fl_app.data import dataset_info
from fl_app.models import create_model
from fl_app.protocol import Knowledge, LocalTraining, Observation, Reconstruction
from fl_app.runs import attacking
from fl_app.runs.attacking import finish_attacks
from fl_app.runs.folder import create_run
from fl_app.server_app import create_strategy
from fl_app.util.text import MOST, printable
from server_strategies.attack_pool import AttackPool, Job, enqueue, pending, read_queue
from server_strategies.honest_but_curious import HonestButCurious
from server_strategies.observations import ObservationStore
from server_strategies.recorder import Recorder

KNOWLEDGE = Knowledge("convnet", 10, (3, 2, 2), (0.5,) * 3, (0.5,) * 3, LocalTraining())


class Bomb:
    """Leaves a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def altered(change: Any) -> Client:
    """Return a client whose finished reply is changed."""

    def call(message: Message) -> Message:
        reply = toy_client(5.0, 1)(message)
        if "arrays" in reply.content:
            change(reply)
        return reply

    return call


def raw(data: bytes, dtype: str = "float32") -> Array:
    return Array(dtype=dtype, shape=(2,), stype="numpy.ndarray", data=data)


def hostile(tmp_path: Path) -> dict[str, Client]:
    objects = io.BytesIO()
    np.save(objects, np.array([Bomb(tmp_path / "owned")], dtype=object), allow_pickle=True)
    header = io.BytesIO()  # claims 4 TB and holds nothing of them
    np.lib.format.write_array_header_1_0(
        header, {"descr": "<f4", "fortran_order": False, "shape": (10**12,)}
    )
    nan, wide = torch.full((2,), torch.nan), torch.zeros(3)

    def put(name: str, array: Array) -> Client:
        return altered(lambda reply: reply.content["arrays"].update({name: array}))

    def metric(name: str, value: Any) -> Client:
        return altered(lambda reply: reply.content["metrics"].update({name: value}))

    return {
        "holds NaN": toy_client(0, 1, arrays={"bias": nan}),
        "shape (3,)": toy_client(0, 1, arrays={"bias": wide}),
        "8,000,128 bytes": toy_client(0, 1, arrays={"bias": torch.zeros(2_000_000)}),
        "bias.*complex": put("bias", Array(np.zeros(2, dtype=np.complex64))),
        "adds arrays: ../../../x": toy_client(0, 1, arrays={"../../../x": torch.zeros(2)}),
        r"adds arrays: \x1b[2J": toy_client(0, 1, arrays={"\x1b[2J": torch.zeros(2)}),
        "allow_pickle=False": put("bias", raw(objects.getvalue())),
        "pickle": put("bias", raw(pickle.dumps(Bomb(tmp_path / "owned")))),
        "allocate|array": put("bias", raw(header.getvalue())),
        "num-examples is -3": toy_client(0, 1, count=-3),
        "num-examples is 1000000000000000; the protocol allows 5": toy_client(9, 1, count=10**15),
        "metric loss is nan": metric("loss", float("nan")),
        "metrics are": metric("../../x", 1.0),
        r"\x1b]0;owned\x07": toy_client(0, 1, raises="\x1b]0;owned\x07" + "x" * 10**6),
        "ArrayRecords": altered(lambda reply: reply.content.pop("arrays")),
    }


def test_a_hostile_client_ends_neither_training_nor_audit(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = Config(num_clients=3)
    honest = [toy_client(0.1, 0), toy_client(0.3, 2)]
    skipped: list[str] = []
    for words, client in hostile(tmp_path).items():
        seen: list[int] = []
        strategy = HonestButCurious(
            create_strategy(config),
            watch=WatchConfig(),
            on_observation=lambda observation, seen=seen: seen.append(observation.client),
            on_skipped=lambda *facts: skipped.append(facts[2]),
            most_examples=config.most_examples,
        )
        caplog.clear()
        # An honest pair moves every weight by 0.2 a round, whatever the third one does.
        arrays = start(strategy, [honest[0], client, honest[1]], 2).to_torch_state_dict()
        torch.testing.assert_close(arrays["bias"], torch.full((2,), 0.4), msg=words)
        assert seen.count(0) == seen.count(2) == 2
        said = " ".join([*(record.getMessage() for record in caplog.records), *skipped])
        assert any(part in said for part in words.split("|")) or _matches(words, said), said
        assert "\x1b" not in said
    assert not (tmp_path / "owned").exists()
    assert max(map(len, skipped)) <= MOST + len("the client failed: ")


@pytest.mark.parametrize(
    ("training", "most"),
    [
        (LocalTraining(local_steps=3, batch_size=4), 12),
        (LocalTraining(local_steps=0), 1000),  # whole epochs leave the number open
    ],
)
def test_a_claim_of_too_many_images_weighs_nothing(training: LocalTraining, most: int) -> None:
    config = Config(client=training, strategy=StrategyConfig(max_examples=1000))
    honest = toy_client(0.1, 0, count=1)
    for claimed, mean in ((most, (0.1 + 9 * most) / (most + 1)), (most + 1, 0.1)):
        clients = [honest, toy_client(9.0, 1, count=claimed)]
        arrays = start(create_strategy(config), clients, 1).to_torch_state_dict()
        torch.testing.assert_close(arrays["bias"], torch.full((2,), mean))


def _matches(words: str, said: str) -> bool:
    first, _, second = words.partition(".*")
    return bool(second) and first in said and second in said


def test_a_stranger_can_not_write_outside_of_the_run(tmp_path: Path) -> None:
    """Names and ids of clients never become paths; only numbers do."""
    observation = Observation({}, {}, num_examples=1, round=1, node=2**64 - 1, client=-1)
    job = Job(observation, KNOWLEDGE, AttackConfig("sme"), PriorConfig(), 0)
    enqueue(tmp_path, job)
    assert [path.parent for path in tmp_path.rglob("*.json")] == [tmp_path / "queue"]
    bad = tmp_path / "queue" / "evil.json"
    bad.write_text(
        '{"observation": "../../etc/passwd", "attack": {}, "prior": {}, "seed": 0}', "utf-8"
    )
    entries, refused = read_queue(tmp_path)
    assert [entry.id for entry in entries] == [job.id]
    assert "evil.json" in refused["evil"] and "observation id" in refused["evil"]
    with pytest.raises(ValueError, match="observation id"):
        ObservationStore(tmp_path).load("../../etc/passwd")


def test_a_full_disk_fails_no_training(tmp_path: Path) -> None:
    run_dir = create_run(Config(runs_dir=str(tmp_path)))
    auditor, store = Auditor(run_dir, Config(), KNOWLEDGE), ObservationStore(run_dir)
    clients = [toy_client(0.1 * (i + 1), i) for i in range(3)]
    alone = start(create_strategy(Config()), clients)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # No file may grow beyond 100 bytes: neither an observation nor the line that says so fits.
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with Recorder(store.save, auditor.record_skipped) as recorder:
            strategy = HonestButCurious(
                create_strategy(Config()),
                watch=WatchConfig(),
                on_observation=recorder.add,
                on_skipped=auditor.record_skipped,
            )
            watched = start(strategy, clients)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [a.data for a in watched.values()] == [a.data for a in alone.values()]
    assert not store.ids() and not any((run_dir / "observations").iterdir())


def test_training_does_not_wait_for_a_slow_disk() -> None:
    """Fifty clients in a round, and a disk that takes nothing until the training is over."""
    over, written, skipped = threading.Event(), [], []

    def save(observation: Observation) -> None:
        assert over.wait(60)
        written.append(observation.round)

    with Recorder(save, lambda *facts: skipped.append(facts), most_bytes=60 * 32) as recorder:
        strategy = HonestButCurious(
            create_strategy(Config(num_clients=50)),
            watch=WatchConfig(),
            on_observation=recorder.add,
            on_skipped=lambda *facts: skipped.append(facts),
        )
        start(strategy, [toy_client(0.1, i) for i in range(50)], 2)
        over.set()
    assert Counter(written) == {1: 50, 2: 10}
    assert len(skipped) == 40 and "not written yet" in skipped[0][2]


def counting(observation: Observation, _: Knowledge, attack: AttackConfig, *rest: Any) -> Any:
    """Take as long as every other attack, and say who did it."""
    time.sleep(float(attack.options["seconds"]))
    return pretended(observation, attack, matching=str(os.getpid()))


def watched_rounds(clients: int, rounds: int) -> list[Observation]:
    """Return all that a server sees of a training; of each update an image is made up."""
    seen: list[Observation] = []
    weights = {"x": torch.rand(1, 3, 2, 2)}
    strategy = HonestButCurious(
        create_strategy(Config(num_clients=clients)),
        watch=WatchConfig(),
        on_observation=lambda each: seen.append(replace(each, w0=weights, w1=weights)),
        on_skipped=lambda *facts: pytest.fail(str(facts)),
    )
    start(strategy, [toy_client(0.1, i) for i in range(clients)], rounds)
    return seen


def run_queue(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    observations: list[Observation],
    attacks: int,
    workers: int,
    seconds: float,
) -> tuple[Counter[str], Counter[str]]:
    """Attack each update so many times; return how many each process and each update had."""
    config = Config(
        runs_dir=str(folder),
        audit=AuditConfig(truth=False, labels="unknown"),
        pool=PoolConfig(workers=workers),
    )
    auditor = Auditor(create_run(config), config, KNOWLEDGE)
    store = ObservationStore(auditor.run_dir)
    by_process, by_update = Counter[str](), Counter[str]()
    attack = AttackConfig("counting", options={"seconds": seconds})
    for seen in observations:
        store.save(seen)
        for _ in range(attacks):
            enqueue(auditor.run_dir, Job(seen, KNOWLEDGE, attack, PriorConfig(), 0))

    def count(job: Job, found: Reconstruction, _: str) -> None:
        by_process[found.matching] += 1
        by_update[job.observation.id] += 1

    def pool(of: Auditor) -> AttackPool:
        return AttackPool(
            of.run_dir,
            of.config.pool,
            on_result=count,
            on_error=lambda job, error: pytest.fail(error),
            runner=counting,
        )

    monkeypatch.setattr(attacking, "open_pool", pool)
    jobs = attacks * len(observations)
    assert finish_attacks(auditor, Console(file=io.StringIO())) == jobs
    assert pending(auditor.run_dir) == []
    return by_process, by_update


def test_a_thousand_queued_attacks_are_shared_and_have_one_outcome_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fifty clients in four rounds, each update attacked five times.

    Attacks sleep, so that two workers need no second core: each does about half.
    """
    seen = watched_rounds(clients=50, rounds=4)
    assert Counter(each.round for each in seen) == dict.fromkeys((1, 2, 3, 4), 50)
    by_process, by_update = run_queue(tmp_path, monkeypatch, seen, 5, 2, 0.02)
    assert by_update == {each.id: 5 for each in seen} and len(by_update) == 200
    assert len(by_process) == 2 and min(by_process.values()) >= 250


def test_clients_normalise_as_the_server_says_or_refuse() -> None:
    config = load_config()
    info = dataset_info(config.dataset)
    model = create_model("convnet", info.num_classes, info.image_shape, seed=0)

    def losses(mean: float, classes: int = info.num_classes) -> float:
        settings = {
            "server-round": 1,
            "mean": [mean] * 3,
            "std": list(info.std),
            "classes-and-shape": [classes, *info.image_shape],
        }
        content = {
            "arrays": ArrayRecord(model.state_dict()),
            "config": ConfigRecord(settings),  # type: ignore[arg-type]
        }
        message = Message(RecordDict(content), dst_node_id=7, message_type="train")
        return real_client(0)(message).content["metrics"]["loss"]  # type: ignore[index, return-value]

    assert losses(0.1) != losses(0.9)
    with pytest.raises(ConfigError, match=r"allowed, as on the server: \[99, 3, 32, 32\]"):
        losses(0.1, classes=99)


def test_the_cost_of_an_audit_is_measured_on_real_rounds(tmp_path: Path) -> None:
    cost = audit_cost(rounds=2, clients=2, local_steps=1, folder=tmp_path)
    assert len(cost.plain) == len(cost.watched) == 2 and min(cost.plain) > 0
    assert cost.disk_speed > 0 and cost.store_speed > 0
    assert list(tmp_path.iterdir()) == []
    slow = AuditCost([1.0, 2.0, 1.0], [1.2, 1.2, 9.0], store_speed=4e8, disk_speed=1e9)
    assert slow.overhead == pytest.approx(0.2)
    assert slow.shortfalls() == ["a round takes 20.0% longer", "the store has 40% of the disk"]
    assert AuditCost([1.0], [1.04], store_speed=5e8, disk_speed=1e9).shortfalls() == []


def test_words_from_others_are_printed_not_obeyed(tmp_path: Path) -> None:
    assert printable("a\x1b[31mb\n\u202ec") == r"a\x1b[31mb\n\u202ec"
    assert len(printable("\x00" * 10**7)) == MOST
    auditor = Auditor(create_run(Config(runs_dir=str(tmp_path))), Config(), KNOWLEDGE)
    auditor.record_skipped(1, 2, "\x1b]0;owned\x07[red]<script>")
    shown = Console(file=io.StringIO(), width=200, force_terminal=True, color_system=None)
    shown.print(leakage_table(auditor.lines()))
    text = shown.file.getvalue()  # type: ignore[attr-defined]
    assert "\x1b]0;" not in text and r"\x1b]0;owned\x07[red]<script>" in text


def test_truth_is_off_in_a_deployment_unless_it_is_asked_for() -> None:
    config = load_config()
    assert (config.settled(True).audit.truth, config.settled(True).audit.labels) == (True, "counts")
    deployed = config.settled(False)
    assert (deployed.audit.truth, deployed.audit.labels) == (False, "unknown")
    asked = load_config({"overrides": "audit.truth=true"})
    assert asked.settled(False).audit.truth is True
    with pytest.raises(ConfigError, match="labels is 'counts'"):
        load_config({"overrides": "audit.truth=false"})
