"""What an audit refuses before its start, and says at its end."""

from __future__ import annotations

from pathlib import Path

import pytest
from flwr.app import Context, RecordDict
from helpers.federation import LocalGrid, toy_client

from fl_app import server_app
from fl_app.config import Config, ConfigError, WatchConfig
from fl_app.server_app import _prepare, _unwatched


def test_a_watched_client_that_a_simulation_lacks_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"watch.clients holds 4; .*num_clients=4: 0 to 3"):
        _prepare({"overrides": "watch.clients=[0,4]"}, simulated=True)
    _prepare({"overrides": "watch.clients=[0,4]"}, simulated=False)  # ids are the machines' own


def test_a_prior_that_is_not_there_is_refused_where_the_attack_needs_one() -> None:
    missing = {"overrides": "prior.weights=nope", "attack": "flow_matching"}
    with pytest.raises(ConfigError, match=r"prior\.weights: .*'nope'"):
        _prepare(missing, simulated=False)
    _prepare({**missing, "attack": "sme"}, simulated=False)


def test_a_watch_that_matched_nothing_is_told_at_the_end() -> None:
    config = Config(watch=WatchConfig(clients=[0, 7]))
    assert _unwatched(config, []).startswith("NOTHING WAS WATCHED")
    lines = [{"client": 0, "node": str(2**40)}]
    assert _unwatched(config, lines) == "NEVER WATCHED: client 7 sent no update"
    assert not _unwatched(config, [*lines, {"client": 3, "node": "7"}])


@pytest.mark.parametrize("place", ["a file", "a folder that is no folder's"])
def test_what_the_system_refuses_at_the_start_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], place: str
) -> None:
    runs_dir = tmp_path / "runs"
    runs_dir.touch()
    runs_dir = runs_dir if place == "a file" else runs_dir / "deeper"
    run_config = {"overrides": f"runs_dir={runs_dir} num_clients=1 rounds=1"}
    context = Context(1, 1, {}, RecordDict(), run_config)  # type: ignore[arg-type]
    with pytest.raises(OSError):
        server_app.main(LocalGrid([toy_client(0.1, 0)]), context)
    said = capsys.readouterr().out.strip()
    assert said.startswith("Nothing was started: ") and str(runs_dir) in said
    assert len(said.splitlines()) == 1
