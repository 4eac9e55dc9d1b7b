"""Checkpointing: hands out the global model after each round."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from flwr.app import ArrayRecord, Message, MetricRecord
from flwr.serverapp.strategy import Strategy
from torch import Tensor

from server_strategies.wrapper import Wrapper


class Checkpointing(Wrapper):
    """Wrap a strategy; call `save` with each round's number and aggregated weights.

    Not in a round in which nothing could be aggregated.

    Parameters
    ----------
    inner : Strategy
        Decides everything about the training.
    save : callable
        What it raises ends the training.
    """

    def __init__(self, inner: Strategy, save: Callable[[int, Mapping[str, Tensor]], None]) -> None:
        super().__init__(inner)
        self._save = save

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Let the inner strategy aggregate, and hand out its result."""
        arrays, metrics = self._inner.aggregate_train(server_round, replies)
        if arrays is not None:
            self._save(server_round, arrays.to_torch_state_dict())
        return arrays, metrics
