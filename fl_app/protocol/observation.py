"""What an honest-but-curious server has seen of a client."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def trained_names(names: Iterable[str]) -> tuple[str, ...]:
    """Return the names of the weights that an optimiser steps: no BatchNorm statistics."""
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    return tuple(name for name in names if not name.endswith(statistics))


def observation_id(round_: int, node: int) -> str:
    """Return the id of an Observation."""
    return f"round-{round_:04d}-node-{node}"


def round_and_node(id_: str) -> tuple[int, int]:
    """Return the round and the node that an Observation's id names."""
    _, round_, _, node = id_.split("-")
    return int(round_), int(node)


@dataclass(frozen=True)
class Observation:
    """Exactly what an honest-but-curious server has seen of one client in one round.

    Under secure aggregation (`Defense.secagg`) it sees no single update: then one
    Observation is the sum over all clients of the round. Its `w1` is the mean of
    the clients' weights, weighted by their `num_examples`, as FedAvg makes it; its
    `num_examples` is their total, and the images and labels of its truth are those
    of the clients one after another, in the order of `nodes`. Local step k of the
    sum is local step k of every client.

    Attributes
    ----------
    w0, w1 : mapping of str to Tensor
        Parameters by name, as sent to and as returned by the client. The
        descent direction is ``w0 - w1``: a gradient's sign, not its negative.
    num_examples : int
        Images that the client says it trained on, N.
    round : int
        Server round, from 1.
    node : int
        Flower's node id, from the message's metadata; 0 for a sum.
    client : int
        The partition that the client says it holds; `node` where it says none.
        For people to read: nothing relies on it. -1 for a sum.
    nodes, clients, examples : tuple of int
        Of a sum: the node, the `client` and the `num_examples` of each update in it,
        in the order of `clients`. Empty for a single client.
    """

    w0: Mapping[str, Tensor]
    w1: Mapping[str, Tensor]
    num_examples: int
    round: int
    node: int
    client: int
    nodes: tuple[int, ...] = ()
    clients: tuple[int, ...] = ()
    examples: tuple[int, ...] = ()

    @property
    def id(self) -> str:
        """A name for files, unique in a run."""
        return observation_id(self.round, self.node)

    @property
    def trained(self) -> tuple[str, ...]:
        """Names of the weights that an optimiser steps: all but BatchNorm's running statistics."""
        return trained_names(self.w0)

    @property
    def update(self) -> dict[str, Tensor]:
        """The update, w1 - w0, of the weights in `trained`."""
        return {name: self.w1[name] - self.w0[name] for name in self.trained}
