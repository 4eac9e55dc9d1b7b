"""A user's description of the clients."""

from __future__ import annotations

from typing import Any

import pytest

from flowleak import Client

DESCRIPTION: dict[str, Any] = {
    "model": "lenet5", "num_classes": 10, "image_shape": (3, 32, 32), "mean": 0.5,
    "std": (0.2, 0.2, 0.3), "optimizer": "sgd", "lr": 0.1, "batch_size": 4, "epochs": 2,
}  # fmt: skip


def test_a_description_is_what_the_server_knows() -> None:
    known = Client(**DESCRIPTION, momentum=0.9).knowledge
    assert known.mean == (0.5, 0.5, 0.5) and known.std == (0.2, 0.2, 0.3)
    assert (known.client.momentum, known.client.local_steps, known.client.local_epochs) == (
        0.9,
        0,
        2,
    )
    assert known.labels is None and known.labels_level == "unknown"
    assert Client(**DESCRIPTION | {"model": "collections:OrderedDict"}).model is not None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lr": None}, "lr is missing"),
        ({"optimizer": None}, "optimizer is missing"),
        ({"steps": 3}, "epochs is 2 and steps is 3; allowed: one of them"),
        ({"epochs": None}, "epochs is 0 and steps is 0; allowed: one of them"),
        ({"local_epochs": 3}, "local_epochs is set; allowed: epochs"),
        ({"momentun": 0.9}, "'momentun' is no setting of a client; allowed: optimizer, lr"),
        ({"std": 0.0}, "std is 0.0; allowed: more than 0"),
        ({"mean": (0.5, 0.5)}, "mean has 2 values; allowed: one, or 3"),
        ({"model": "no_such_module:Net"}, "can't be imported"),
        ({"model": 3}, "model is 3; allowed: a class or function"),
    ],
)
def test_what_is_wrong_is_named(changes: dict[str, Any], words: str) -> None:
    settings = {k: v for k, v in (DESCRIPTION | changes).items() if v is not None}
    with pytest.raises(ValueError, match=words):
        Client(**settings)
