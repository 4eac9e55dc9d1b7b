"""Recorder: writes observations in a thread of its own, so that the training does not wait."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable

from fl_app.protocol import Observation
from fl_app.util.text import reason

_log = logging.getLogger("flwr")  # Flower streams it to the user
_MOST_BYTES = 2**31  # waiting in memory, before observations are skipped


class Recorder:
    """Calls `record` with each observation in one thread of its own.

    A slow disk does not delay the training, and a full one fails only the record.
    Observations that do not fit into memory meanwhile are skipped, with a line in the
    log. Use it as a context manager: leaving it waits for the observations added.

    Parameters
    ----------
    record : callable
        Takes an Observation.
    on_skipped : callable
        Takes round, node and the reason, if `record` raised.
    most_bytes : int
        Of the weights that wait to be recorded.
    """

    def __init__(
        self,
        record: Callable[[Observation], None],
        on_skipped: Callable[[int, int, str], None],
        most_bytes: int = _MOST_BYTES,
    ) -> None:
        self._record = record
        self._on_skipped = on_skipped
        self._most_bytes = most_bytes
        self._waiting: deque[Observation] = deque()
        self._bytes = 0
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="recorder", daemon=True)

    def __enter__(self) -> Recorder:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def add(self, observation: Observation) -> None:
        """Take an observation, and return at once.

        Raises
        ------
        ValueError
            If too much is waiting already.
        """
        size = _num_bytes(observation)
        with self._changed:
            if self._bytes and self._bytes + size > self._most_bytes:
                raise ValueError(
                    f"{self._bytes:,} bytes of earlier updates are not written yet; "
                    "the disk is too slow to record every one"
                )
            self._bytes += size
            self._waiting.append(observation)
            self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._waiting and not self._closed:
                    self._changed.wait()
                if not self._waiting:
                    return
                observation = self._waiting.popleft()
            try:
                self._record(observation)
            except Exception as error:  # whatever it is, the next one is recorded
                self._skip(observation, reason(error))
            with self._changed:
                self._bytes -= _num_bytes(observation)

    def _skip(self, observation: Observation, why: str) -> None:
        where = (observation.round, observation.node)
        _log.warning("round %d, node %d is not recorded: %s", *where, why)
        try:
            self._on_skipped(*where, why)
        except Exception as error:
            _log.warning("round %d, node %d can't be logged: %s", *where, error)


def _num_bytes(observation: Observation) -> int:
    """Return the bytes of the client's weights; the sent ones are shared by a round's clients."""
    return sum(tensor.nbytes for tensor in observation.w1.values())
