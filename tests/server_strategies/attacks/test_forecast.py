"""What is told of an attack before it starts."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from helpers.clients import CLIENTS, client

from server_strategies.attacks.forecast import Forecast, forecast


def test_a_forecast_counts_what_an_update_holds() -> None:
    observation, knowledge, _ = client(replace(CLIENTS["sgd"], batch_size=6, local_steps=1))
    state = torch.get_rng_state()
    found = forecast(observation, knowledge)
    assert torch.equal(torch.get_rng_state(), state)
    assert (found.images, found.steps) == (observation.num_examples, 1)
    assert found.unknowns == observation.num_examples * math.prod(knowledge.image_shape)
    changed = sum(int(part.count_nonzero()) for part in observation.update.values())
    assert found.numbers == changed and found.seconds > 0


def test_a_forecast_in_words() -> None:
    found = Forecast(images=1600, steps=50, numbers=60_000, unknowns=4_915_200, seconds=3.0)
    words = found.words(200)
    assert words.startswith("1600 images in 50 local steps: 60,000 numbers")
    assert "1.2% of them can be determined at most; a search takes up to 10.0 minutes" in words
    assert "2.0 minutes, which hold about 40 of its iterations" in found.words(200, 120.0)
    enough = replace(found, numbers=5_000_000)
    assert enough.share == 1.0 and "determined" not in enough.words(1)
