"""What is tried on a run's clients, and what its DP-SGD guarantees."""

from __future__ import annotations

import pytest
import torch

from client_app.defended_steps import epsilon
from fl_app.protocol import Defense, Knowledge, LocalTraining, Observation
from fl_app.runs.changes import EPSILON, changes_for, times_seen
from fl_app.runs.privacy import epsilon_of, noise_for

TRAINING = LocalTraining("adam", batch_size=1, local_steps=5)
KNOWN = Knowledge("convnet", 6, (3, 32, 32), (0.5,) * 3, (0.2,) * 3, TRAINING)


def update(size: float, round_: int = 1) -> Observation:
    """Return an update of 4 coordinates of one size, and a statistic, which is none of it."""
    w0 = {"fc.weight": torch.zeros(4), "norm.running_mean": torch.zeros(4)}
    w1 = {"fc.weight": torch.full((4,), size), "norm.running_mean": torch.full((4,), 9.0)}
    return Observation(w0, w1, 5, round_, 7, 0)


def test_clipping_is_to_half_the_norm_of_the_smallest_update() -> None:
    changes = changes_for([update(0.3), update(0.1)], TRAINING, KNOWN, 30)
    assert len({change.key for change in changes}) == len(changes)
    assert Defense(clip=0.1, clip_by="norm") in [change.defense for change in changes]
    assert not any("clipped" in each.words for each in changes_for([update(0)], TRAINING, KNOWN, 1))


def test_the_other_norm_is_tried_where_there_is_one() -> None:
    def norms(model: str, norm: str = "", round_: int = 1) -> list[str]:
        known = Knowledge(model, 6, (3, 32, 32), (0.5,) * 3, (0.2,) * 3, TRAINING, norm=norm)
        tried = changes_for([update(1, round_)], TRAINING, known, 30)
        return [each.words for each in tried if each.norm]

    assert norms("convnet") == norms("vit_tiny") == []
    assert norms("resnet8") == ["GroupNorm for BatchNorm, at its start"]
    words = "BatchNorm for GroupNorm, trained again for 2 rounds"
    assert norms("convnet", "group", 3) == [words]


def test_an_epsilon_holds_by_an_accountant_and_without_trust_in_the_batches() -> None:
    pytest.importorskip("opacus", reason="the extra dp is not installed")
    # Every image in one noisy sum a round: opacus with a sampling rate of 1.
    whole = LocalTraining("sgd", batch_size=5, local_steps=1)
    for noise, rounds in ((0.1, 30), (1.0, 30), (4.0, 30), (10.0, 200)):
        known = epsilon(Defense(dp_clip=1.0, dp_noise=noise), whole, 5, rounds)
        assert known <= epsilon_of(noise, rounds, 1e-5) < 1.2 * known
    # Mironov, 2017, proposition 3: one sum, noise 1, ln(1/delta) = 2: 1/2 + 2 sqrt(2 / 2).
    assert epsilon_of(1.0, 1, 2.718281828459045**-2) == pytest.approx(2.5)
    assert epsilon_of(noise_for(3.0, 17, 1e-6), 17, 1e-6) == pytest.approx(3.0)


def test_dp_sgd_is_tried_at_its_epsilon_over_all_rounds() -> None:
    taken = [update(1.0)]
    assert times_seen(taken, TRAINING, 30) == 30  # five steps of one of five images
    twice = LocalTraining("adam", batch_size=1, local_steps=10)
    assert times_seen(taken, twice, 30) == 60
    for training, rounds in ((TRAINING, 1), (TRAINING, 30), (twice, 1000)):
        changes = changes_for(taken, training, KNOWN, rounds)
        (defense,) = (each.defense for each in changes if "at epsilon" in each.words)
        assert defense
        spent = epsilon_of(defense.dp_noise, times_seen(taken, training, rounds), defense.delta)
        assert EPSILON - 0.1 < spent <= EPSILON
