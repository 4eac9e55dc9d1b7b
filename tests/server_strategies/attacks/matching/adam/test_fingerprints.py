"""Single-step gradient rows ("fingerprints"): against Adam itself, and against real clients."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers.clients import SHAPE, client
from torch import Tensor

from fl_app.models import create_model
from fl_app.protocol import LocalTraining, Observation
from server_strategies.attacks.matching import matching_objective
from server_strategies.attacks.matching.adam.decode import Decoded, fit_rows, supported
from server_strategies.attacks.matching.adam.fingerprints import Fingerprint, find_fingerprints
from server_strategies.attacks.matching.base import MatchingObjective

ADAM = LocalTraining("adam", lr=1e-3, batch_size=2, local_steps=4)


def adam_client(training: LocalTraining) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Run torch's Adam on made-up gradients of a weight with five rows.

    Steps that touch them: row 0 the first alone, 1 the third alone, 2 the last
    alone, 3 the first and the second, 4 none.
    """
    generator = torch.Generator().manual_seed(0)
    w = torch.nn.Parameter(0.02 * torch.randn(5, 400, generator=generator))
    w0 = w.detach().clone()
    kind = torch.optim.AdamW if training.optimizer == "adamw" else torch.optim.Adam
    optimizer = kind([w], lr=training.lr, weight_decay=training.weight_decay)
    gradients = []
    for rows in ([0, 3], [3], [1], [2]):
        gradient = torch.zeros_like(w)
        gradient[rows] = 1e-3 * torch.randn(len(rows), 400, generator=generator)
        gradient[:, ::4] = 0  # features that are zero
        gradients.append(gradient)
        w.grad = gradient.clone()
        optimizer.step()
    return w0, w.detach(), gradients


@pytest.mark.parametrize("training", [ADAM, replace(ADAM, optimizer="adamw", weight_decay=0.01)])
def test_gradients_of_single_steps_follow_from_adams_updates(training: LocalTraining) -> None:
    w0, w1, gradients = adam_client(training)
    found = find_fingerprints({"w": w0}, {"w": w1}, training, 4)
    assert [(f.step, f.rows.tolist()) for f in found] == [(0, [0]), (2, [1]), (3, [2])]
    for seen in found:
        true = gradients[seen.step][seen.rows]
        assert seen.known.float().mean() > 0.9
        assert seen.known[true == 0].all()
        assert seen.gradient[true == 0].abs().max() < 1e-12
        error = ((seen.gradient - true) * seen.known).norm() / (true * seen.known).norm()
        assert error < 0.2
        # The remaining error is rounding, of known size.
        apart = (seen.gradient - true).abs()[seen.known & (true != 0)]
        spread = seen.spread[seen.known & (true != 0)]
        assert (apart < 3 * spread).float().mean() > 0.98
        assert (apart > 0.01 * spread).float().mean() > 0.5


def test_rounded_coordinates_count_less_the_better_the_rest_is_fitted() -> None:
    gradient = torch.tensor([[1.0, -1, 1, 0, 0]])
    spread = torch.tensor([[0.0, 1e-2, 0.5, 0, torch.inf]])
    seen = Fingerprint(0, "w", torch.arange(1), gradient, spread, spread.isfinite().float())
    early, late = (seen.weighted(torch.tensor([misfit])).weight for misfit in (1.0, 1e-4))
    torch.testing.assert_close(early, torch.tensor([[1, 1, 0.8**0.5, 1, 0]]), atol=1e-3, rtol=0)
    torch.testing.assert_close(late, torch.tensor([[1, 0.5**0.5, 0.02, 1, 0]]), atol=1e-3, rtol=0)


def test_updates_that_do_not_identify_the_step_leave_no_fingerprint() -> None:
    w0, w1, _ = adam_client(ADAM)
    noisy = w1 + 1e-5 * torch.randn(w1.shape, generator=torch.Generator().manual_seed(1))
    assert not find_fingerprints({"w": w0}, {"w": noisy}, ADAM, 4)
    assert not find_fingerprints({"w": w0}, {"w": w1}, replace(ADAM, optimizer="sgd"), 4)
    assert not find_fingerprints({"w": w0}, {"w": w1}, replace(ADAM, weight_decay=0.01), 4)


def test_rows_are_fitted_by_features_in_least_squares() -> None:
    features = torch.eye(3, 6)
    rows = torch.stack([2 * features[1], features[0] - features[2], torch.eye(6)[5]])
    exact, alike = torch.zeros(3, 6), torch.ones(3, 6)
    seen = Fingerprint(0, "w", torch.arange(3), rows, exact, alike)
    alone, parts, together = fit_rows(features, seen)
    half = 0.5**0.5
    torch.testing.assert_close(
        alone, torch.tensor([[1.0, 0, 1], [0.5, 1, 0.5], [1, 1, 1]]), atol=1e-2, rtol=0
    )
    torch.testing.assert_close(
        parts, torch.tensor([[0.0, 1, 0], [half, 0, -half], [0, 0, 0]]), atol=1e-2, rtol=0
    )
    torch.testing.assert_close(together, torch.tensor([0.0, 0, 1]), atol=1e-2, rtol=0)


def test_a_copy_of_an_image_is_not_supported_beside_it() -> None:
    generator = torch.Generator().manual_seed(0)
    image, other, third = torch.rand(3, 50, generator=generator)
    blend = 0.8 * image + 0.2 * torch.rand(50, generator=generator)
    rows = torch.stack([2 * image - blend, other, torch.randn(50, generator=generator)])
    exact, alike = torch.zeros(3, 50), torch.ones(3, 50)
    seen = Fingerprint(0, "w", torch.arange(3), rows, exact, alike)
    features = torch.stack([blend, image, third, other])
    _, parts, _ = fit_rows(features, seen)
    assert parts[0, 0].abs() > 0.5
    # No image fits the third row: the little that one fits of it does not count.
    expected = torch.zeros(3, 4, dtype=torch.bool)
    expected[0, 1] = expected[1, 3] = True
    assert torch.equal(supported(features, seen), expected)


def test_fingerprints_are_fitted_by_the_ground_truth_and_not_by_other_images() -> None:
    observation, knowledge, x = client(replace(ADAM, local_steps=3))
    objective = matching_objective("fingerprints", observation, knowledge)
    assert objective(x, 0.0) < 0.02
    generator = torch.Generator().manual_seed(5)
    assert objective(torch.randn(x.shape, generator=generator), 0.0) > 0.2
    # A batch's images come in no order: here the first two are swapped.
    objective = matching_objective("fingerprints", observation, knowledge)
    objective(x[[1, 0, 2, 3, 4, 5]], 0.0)
    given = knowledge.labels
    assert given and given[0] != given[1]
    assert objective.found_labels() == (given[1], given[0], *given[2:])


def simulate_again(objective: MatchingObjective, x: Tensor) -> None:
    """Call it three times, each with the weights simulated by the labels assigned before."""
    assert isinstance(objective, Decoded)
    for _ in range(3):
        objective.calls = 0
        objective(x, 0.0)


def test_labels_without_order_find_their_images() -> None:
    observation, knowledge, x = client(replace(ADAM, local_steps=3))
    given = knowledge.labels
    assert given
    counted = knowledge.granting("counts")
    assert counted.labels != given
    for known in (counted, replace(counted, labels_level="unknown", labels_source="llg")):
        objective = matching_objective("fingerprints", observation, known)
        simulate_again(objective, x)
        assert objective.found_labels() == given


def test_a_label_that_was_inferred_wrongly_is_corrected() -> None:
    observation, knowledge, x = client(replace(ADAM, local_steps=3))
    given = knowledge.labels
    assert given
    other = next(c for c in range(10) if c not in given)
    inferred = replace(
        knowledge, labels=(other, *given[1:]), labels_level="unknown", labels_source="llg"
    )
    objective = matching_objective("fingerprints", observation, inferred)
    simulate_again(objective, x)
    assert objective.found_labels() == given


def test_decoded_images_stand_still_after_the_restart() -> None:
    observation, knowledge, x = client(replace(ADAM, local_steps=3))
    objective = matching_objective("fingerprints", observation, knowledge)
    assert isinstance(objective, Decoded)
    assert objective.pace() is None
    assert objective(x, objective.restart) < 0.05
    decoded, pace = objective.decoded, objective.pace()
    assert decoded is not None
    assert pace is not None
    assert decoded.any()
    assert (pace[decoded] < 0.1).all()
    assert (pace[~decoded] == 1).all()


def test_an_image_that_its_label_contradicts_is_not_decoded() -> None:
    observation, knowledge, x = client(replace(ADAM, local_steps=3))
    given = knowledge.labels
    assert given
    right = matching_objective("fingerprints", observation, knowledge)
    # A class that no image of the first step has: the label can't be assigned to another one.
    other = next(c for c in range(10) if c not in given[:2])
    wrong = matching_objective(
        "fingerprints", observation, replace(knowledge, labels=(other, *given[1:]))
    )
    for objective in (right, wrong):
        objective(x, objective.restart)
    assert right.decoded.tolist()[:2] == [True, True]
    assert wrong.decoded.tolist()[:2] == [False, True]


def test_without_fingerprints_the_reason_is_given() -> None:
    observation, knowledge, _ = client(replace(ADAM, optimizer="sgd", local_steps=3))
    with pytest.raises(ValueError, match="holds none"):
        matching_objective("fingerprints", observation, knowledge)
    with pytest.raises(ValueError, match="needs labels"):
        matching_objective("fingerprints", observation, knowledge.granting("unknown"))
    # Of two passes the first is used.
    training = replace(ADAM, local_steps=6)
    observation, knowledge, _ = client(training)
    found = matching_objective("fingerprints", observation, knowledge)
    assert isinstance(found, Decoded)
    assert max(found.prints) < 3


def test_rows_of_an_mlps_first_layer_are_the_images() -> None:
    observation, knowledge, x = client(
        replace(ADAM, batch_size=1, local_steps=6), architecture="mlp"
    )
    objective = matching_objective("fingerprints", observation, knowledge)
    assert isinstance(objective, Decoded)
    model = create_model("mlp", 10, SHAPE)
    first = next(name for name, _ in model.named_parameters())
    rows = [f for found in objective.prints.values() for f in found if f.name == first]
    assert rows
    for seen in rows:
        image = x[seen.step].flatten() * seen.known
        assert (torch.cosine_similarity(seen.gradient, image).abs() > 0.98).all()


def test_noise_hides_them() -> None:
    observation, knowledge, _ = client(replace(ADAM, local_steps=3))
    generator = torch.Generator().manual_seed(0)
    noisy = {
        n: w + 1e-5 * torch.randn(w.shape, generator=generator) for n, w in observation.w1.items()
    }
    seen = Observation(observation.w0, noisy, 6, round=1, node=1, client=1)
    assert matching_objective("auto", seen, knowledge).name == "trajectory"
