"""What an audit refuses before its start, and says at its end."""

from __future__ import annotations

import pytest

from fl_app.config import Config, ConfigError, WatchConfig
from fl_app.server_app import _prepare, _unwatched


def test_a_watched_client_that_a_simulation_lacks_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"watch.clients holds 4; .*num_clients=4: 0 to 3"):
        _prepare({"overrides": "watch.clients=[0,4]"}, simulated=True)
    _prepare({"overrides": "watch.clients=[0,4]"}, simulated=False)  # ids are the machines' own


def test_a_watch_that_matched_nothing_is_told_at_the_end() -> None:
    config = Config(watch=WatchConfig(clients=[0, 7]))
    assert _unwatched(config, []).startswith("NOTHING WAS WATCHED")
    lines = [{"client": 0, "node": 2**40}]
    assert _unwatched(config, lines) == "NEVER WATCHED: client 7 sent no update"
    assert not _unwatched(config, [*lines, {"client": 3, "node": 7}])
