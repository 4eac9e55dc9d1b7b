"""HonestButCurious: runs any Flower strategy as it is, and copies what the server sees."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from torch import Tensor

from fl_app.config import WatchConfig
from fl_app.protocol import Observation
from fl_app.util.text import reason
from server_strategies.updates import num_examples, returned_weights, sent_weights, weighted_mean
from server_strategies.wrapper import Wrapper

_log = logging.getLogger("flwr")  # Flower streams it to the user


class HonestButCurious(Wrapper):
    """Wrap a strategy; hand out an Observation of each watched client's update.

    The training does not change: messages and replies are passed on unmodified, and an
    error while observing is only logged. Make this the outermost wrapper, so that it
    sees replies before the server clips or adds noise to them.

    Parameters
    ----------
    inner : Strategy
        Decides everything about the training.
    watch : WatchConfig
        Which clients and rounds are watched. Ids match the partition that a
        client reports, or its node id; a client that failed reports none and is
        watched too. A share picks that share of a round's
        replies, rounded up, the same clients for the same seed.
    on_observation : callable
        Takes each Observation, in the server's thread.
    on_skipped : callable
        Takes round, node and the reason for each watched update that could not
        be observed: the client failed, or sent what is no update of the model.
    seed : int
        Restarts the share's pick.
    settings : mapping, optional
        Train settings that clients get in watched rounds only, an audit's. All
        clients of the round get them: which partition a node holds, and so
        whether it is watched, is known from its reply.
    secagg : bool
        Whether clients aggregate securely: the server then sees one sum over all
        that replied, whichever are watched, see `Observation`. The sum is made
        here in the clear: Flower 1.41 has SecAgg+ for its legacy workflows only.
    most_examples : float
        Images that the protocol lets a client train on in a round; who claims more is
        not observed.
    examples_key : str
        Where a reply says how many images its client trained on.
    examples : int
        Images of every client, whatever its reply says; 0: as that says.
    """

    def __init__(
        self,
        inner: Strategy,
        *,
        watch: WatchConfig,
        on_observation: Callable[[Observation], None],
        on_skipped: Callable[[int, int, str], None],
        seed: int = 0,
        settings: Mapping[str, str] | None = None,
        secagg: bool = False,
        most_examples: float = math.inf,
        examples_key: str = "num-examples",
        examples: int = 0,
    ) -> None:
        super().__init__(inner)
        self._watch = watch
        self._on_observation = on_observation
        self._on_skipped = on_skipped
        self._seed = seed
        self._settings = settings or {}
        self._secagg = secagg
        self._most_examples = most_examples
        self._examples_key, self._examples = examples_key, examples
        self._sent: dict[int, Mapping[str, Tensor]] = {}

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Let the inner strategy write its messages, and copy the weights in them."""
        watched = self._watch.watches(server_round)
        if watched:
            config = ConfigRecord({**config, **self._settings})
        messages = list(self._inner.configure_train(server_round, arrays, config, grid))
        self._sent = {}
        if watched:
            try:
                self._sent = _copies(messages)
            except Exception as error:  # whatever it is, training goes on
                _log.warning("round %d can't be watched: %s", server_round, error)
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Observe the watched replies, then let the inner strategy aggregate all."""
        received = list(replies)
        if self._watch.watches(server_round):
            if self._secagg:
                self._observe_sum(server_round, received)
            else:
                for reply in self._watched(received):
                    self._observe_safely(server_round, reply, self._on_observation)
        return self._inner.aggregate_train(server_round, received)

    def _watched(self, replies: list[Message]) -> list[Message]:
        clients = self._watch.clients
        if clients == "all":
            return replies
        if isinstance(clients, list):
            # A client that failed can't say which partition it holds: it may be a watched one.
            return [
                r
                for r in replies
                if r.has_error() or {_client(r), r.metadata.src_node_id} & set(clients)
            ]
        chosen = sorted(replies, key=lambda reply: _draw(self._seed, _client(reply)))
        return chosen[: math.ceil(clients * len(replies))]

    def _observe_sum(self, server_round: int, replies: list[Message]) -> None:
        seen: list[Observation] = []
        for reply in replies:
            self._observe_safely(server_round, reply, seen.append)
        if seen:
            try:
                self._on_observation(sum_of(seen))
            except Exception as error:  # whatever it is, training goes on
                self._skip(server_round, 0, reason(error))

    def _observe_safely(
        self, server_round: int, reply: Message, take: Callable[[Observation], None]
    ) -> None:
        try:
            take(self._observe(server_round, reply))
        except Exception as error:  # whatever it is, training goes on
            self._skip(server_round, reply.metadata.src_node_id, reason(error))

    def _skip(self, server_round: int, node: int, why: str) -> None:
        _log.warning("round %d, node %d is not observed: %s", server_round, node, why)
        try:
            self._on_skipped(server_round, node, why)
        except Exception as failure:
            _log.warning("round %d, node %d can't be logged: %s", server_round, node, failure)

    def _observe(self, server_round: int, reply: Message) -> Observation:
        """Copy one update, or raise ValueError with what is wrong with it."""
        node = reply.metadata.src_node_id
        if reply.has_error():
            raise ValueError(f"the client failed: {reply.error.reason}")
        if node not in self._sent:
            raise ValueError("no model was sent to this node in this round")
        w0 = self._sent[node]
        w1 = returned_weights(reply, w0)
        return Observation(
            w0={name: _as_loaded(w0[name], w1[name]) for name in w0},
            w1=w1,
            num_examples=self._examples
            or num_examples(reply, self._most_examples, self._examples_key),
            round=server_round,
            node=node,
            client=_client(reply),
        )


def sum_of(observations: Sequence[Observation]) -> Observation:
    """Return what secure aggregation shows of a round's clients, see `Observation`.

    Parameters
    ----------
    observations : sequence of Observation
        One a client, at least one, all of one round and one sent model.
    """
    each = sorted(observations, key=lambda seen: (seen.client, seen.node))
    examples = tuple(seen.num_examples for seen in each)
    w1 = weighted_mean([seen.w1 for seen in each], examples)
    return Observation(
        each[0].w0, w1, sum(examples), each[0].round, node=0, client=-1,
        nodes=tuple(seen.node for seen in each), clients=tuple(seen.client for seen in each),
        examples=examples,
    )  # fmt: skip


def _copies(messages: list[Message]) -> dict[int, Mapping[str, Tensor]]:
    """Return a copy of what each node was sent; messages of one content share one copy."""
    by_content: dict[int, dict[str, Tensor]] = {}
    for message in messages:
        if id(message.content) not in by_content:
            by_content[id(message.content)] = sent_weights(message)
    return {m.metadata.dst_node_id: by_content[id(m.content)] for m in messages}


def _as_loaded(sent: Tensor, returned: Tensor) -> Tensor:
    """Return sent weights as the client's model holds them.

    FedAdam and server-side noise make float64, which a float32 model rounds
    when it loads them: the update is what was added to the rounded ones.
    """
    if sent.dtype == torch.float64 and returned.dtype == torch.float32:
        return sent.float()
    return sent


def _client(reply: Message) -> int:
    """Return the partition that the client says it holds, its node id where it says none."""
    partition = None
    if reply.has_content() and "client" in reply.content.config_records:
        partition = reply.content.config_records["client"].get("partition-id")
    return partition if type(partition) is int else reply.metadata.src_node_id


def _draw(seed: int, client: int) -> bytes:
    """Return pseudo-random bytes that depend on nothing but the arguments."""
    return hashlib.sha256(f"{seed}:{client}".encode()).digest()
