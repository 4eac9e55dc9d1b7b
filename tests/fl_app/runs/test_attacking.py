"""`flowleak attack` as its user meets it: a process that others wait for, and that Ctrl-C ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.flower_home import PROJECT

from fl_app.benchmarks.case import Case
from fl_app.benchmarks.clients import draw_client
from fl_app.config import load_config
from fl_app.data import dataset_info, load_split
from fl_app.runs.folder import create_run
from fl_app.runs.lock import RunIsHeldError, only_one
from server_strategies.attack_pool import Job, enqueue, pending
from server_strategies.observations import ObservationStore


def test_ctrl_c_ends_it_and_lets_the_next_one_in(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = f"client.local_steps=1 client.batch_size=1 runs_dir={tmp_path} name=x pool.workers=1"
    config = load_config({"client": "sgd", "attack": "sme", "overrides": settings})
    info = dataset_info(config.dataset)
    case = Case(config.client, config.attack)
    observation, knowledge, _ = draw_client(case, load_split(config.dataset, "test"), info, seed=0)
    run = create_run(replace(config, audit=replace(config.audit, labels="unknown")))
    ObservationStore(run).save(observation)
    endless = replace(config.attack, iterations=10**7)
    enqueue(run, Job(observation, knowledge, endless, config.prior, 0))

    entered = threading.Event()

    def enter() -> None:
        with only_one(run):
            entered.set()

    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    with subprocess.Popen(
        [sys.executable, "-m", "flowleak", "attack", "x", "--runs-dir", str(tmp_path)],
        env=environment | {"PYTHONPATH": str(PROJECT)}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    ) as attack:  # fmt: skip
        assert attack.stdout
        said = []
        for line in attack.stdout:
            said.append(line)
            if "/10000000" in line:
                break
        else:
            pytest.fail("".join(said))
        held = f"process {attack.pid} is attacking"
        with pytest.raises(RunIsHeldError, match=held), only_one(run, wait=False):
            pass
        waiting = threading.Thread(target=enter, daemon=True)
        waiting.start()
        while "Ctrl-C here is safe" not in caplog.text:
            time.sleep(0.1)
        assert held in caplog.text and not entered.is_set()
        attack.send_signal(signal.SIGINT)
        began = time.monotonic()
        assert attack.wait(60) == 130
        print(f"ended after {time.monotonic() - began:.1f} s")
    assert entered.wait(10)
    assert len(pending(run)) == 1
