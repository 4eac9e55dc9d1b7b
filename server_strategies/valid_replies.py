"""ValidReplies: one client's broken reply does not end the training of all."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from torch import Tensor

from fl_app.util.text import reason
from server_strategies.updates import array_tensor, num_examples, returned_weights
from server_strategies.wrapper import Wrapper

_log = logging.getLogger("flwr")  # Flower streams it to the user


@dataclass(frozen=True)
class Expected:
    """The metrics of a valid reply.

    Attributes
    ----------
    names : frozenset of str
        Beside ``num-examples``.
    most_examples : float
        What ``num-examples`` may say at most.
    """

    names: frozenset[str]
    most_examples: float


class ValidReplies(Wrapper):
    """Wrap a strategy, and leave out replies that it could not average.

    Flower's strategies average what they get: an array of another shape, or one
    that can't be read, raises in the server, and a NaN spreads to every client.
    Such a reply is left out, as is that of a client that failed, with its reason
    in the log. All others are passed on as they came.

    Parameters
    ----------
    inner : Strategy
        Decides everything else.
    train, evaluate : Expected
        The metrics of a valid reply.
    """

    def __init__(self, inner: Strategy, train: Expected, evaluate: Expected) -> None:
        super().__init__(inner)
        self._train, self._evaluate = train, evaluate
        self._model: Mapping[str, Tensor] = {}

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Remember the model, and delegate."""
        self._model = {name: array_tensor(array) for name, array in arrays.items()}
        return self._inner.configure_train(server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Delegate, with the valid replies; whole numbers stay whole."""

        def check(reply: Message) -> None:
            returned_weights(reply, self._model)
            _check_metrics(reply, self._train)

        valid = _valid(server_round, replies, check)
        arrays, metrics = self._inner.aggregate_train(server_round, valid)
        return arrays and self._as_sent(arrays), metrics

    def _as_sent(self, arrays: ArrayRecord) -> ArrayRecord:
        """Return aggregated arrays with whole numbers, as BatchNorm's counts, whole again.

        Their mean is a fraction. Clients would return whole numbers, and so no valid update
        of what they were sent.
        """
        whole = {
            name: Array(array_tensor(array).round().to(self._model[name].dtype).numpy())
            for name, array in arrays.items()
            if not self._model[name].is_floating_point()
        }
        return ArrayRecord({**arrays, **whole})

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Delegate, with the valid replies."""

        def check(reply: Message) -> None:
            _check_metrics(reply, self._evaluate)

        return self._inner.aggregate_evaluate(server_round, _valid(server_round, replies, check))


def _valid(
    server_round: int, replies: Iterable[Message], check: Callable[[Message], None]
) -> list[Message]:
    kept = []
    for reply in replies:
        try:
            if reply.has_error():  # Flower would log its words as they are
                raise ValueError(f"the client failed: {reply.error.reason}")
            check(reply)
        except Exception as error:  # whatever is wrong with it, the others are averaged
            node = reply.metadata.src_node_id
            _log.warning("round %d, node %d is left out: %s", server_round, node, reason(error))
        else:
            kept.append(reply)
    return kept


def _check_metrics(reply: Message, expected: Expected) -> None:
    """Raise ValueError if a reply's metrics can't be averaged with the others'."""
    num_examples(reply, expected.most_examples)
    records = list(reply.content.metric_records.values())
    if len(records) != 1 or set(records[0]) != expected.names | {"num-examples"}:
        found = ", ".join(sorted(name for record in records for name in record))
        names = ", ".join(sorted(expected.names))
        raise ValueError(f"metrics are {found}; expected {names}, num-examples")
    for name, value in records[0].items():
        if isinstance(value, list) or not math.isfinite(value):
            raise ValueError(f"metric {name} is {value}; allowed: a finite number")
