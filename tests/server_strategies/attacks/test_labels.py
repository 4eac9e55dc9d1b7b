"""Labels inferred from an update: known answers, real clients, and how counts are scored."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from client_app.training import train
from fl_app.audit.metrics import label_accuracy, label_chance, score
from fl_app.audit.truth import Truth
from fl_app.models import create_model
from fl_app.models.family import Family
from fl_app.protocol import Knowledge, LocalTraining, Observation, Reconstruction
from fl_app.registry import MODELS
from server_strategies.attacks.infer import infer
from server_strategies.attacks.labels import (
    _Head,
    _likeliest,
    _Search,
    choose_method,
    displacement,
    infer_labels,
    order_labels,
    random_images,
)

SHAPE = (3, 8, 8)
SGD = LocalTraining("sgd", lr=0.1, local_steps=1, batch_size=1)
ADAM = LocalTraining("adam", lr=1e-3, local_steps=1, batch_size=1)


def known(training: LocalTraining, model: str = "convnet") -> Knowledge:
    return Knowledge(model, 10, SHAPE, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), training)


def client(
    training: LocalTraining, labels: Tensor, seed: int, model: str = "convnet"
) -> Observation:
    """Train a real client on smooth random images; return what the server sees."""
    knowledge = known(training, model)
    generator = torch.Generator().manual_seed(1000 + seed)  # not the attack's own images
    images = random_images(len(labels), knowledge, generator) * 0.25 + 0.5
    net = create_model(model, 10, SHAPE, seed=seed)
    w0 = {name: value.clone() for name, value in net.state_dict().items()}
    batches = [torch.tensor(batch) for batch in training.batches(len(labels))]
    train(net, images, labels, batches, training, knowledge.mean, knowledge.std)
    return Observation(w0, net.state_dict(), len(labels), round=1, node=1, client=1)


def one_step_of_zeros(counts: Tensor, training: LocalTraining) -> Observation:
    """Return one SGD step's update of a classifier of zeros, where p is 1 / C exactly."""
    w0 = create_model("convnet", 10, SHAPE, seed=0).state_dict()
    w0 = {name: w.zero_() if name.startswith("classifier") else w for name, w in w0.items()}
    w1 = dict(w0)
    w1["classifier.bias"] = -training.lr * (0.1 - counts / counts.sum())
    return Observation(w0, w1, int(counts.sum()), round=1, node=1, client=1)


@pytest.mark.parametrize("training", [SGD, ADAM, replace(ADAM, local_steps=5)])
def test_one_image_has_the_only_negative_gradient(training: LocalTraining) -> None:
    for label in (0, 7, 9):
        found = infer_labels(
            "auto", client(training, torch.tensor([label]), label), known(training)
        )
        assert found.labels == (label,) and found.counts.sum() == 1
        assert found.method == "idlg" and "one image" in found.reason


def test_distinct_labels_are_the_negative_gradients() -> None:
    labels = torch.tensor([8, 1, 4])
    training = replace(SGD, batch_size=3)
    assert infer_labels("idlg", client(training, labels, 0), known(training)).labels == (1, 4, 8)
    twice = client(training, torch.tensor([8, 1, 8]), 0)
    with pytest.raises(ValueError, match=r"2 classes .* for 3 images: it needs distinct labels"):
        infer_labels("idlg", twice, known(training))


@pytest.mark.parametrize(
    ("method", "counts"),
    [
        ("dlf", [9, 0, 4, 0, 3, 1, 0, 2, 0, 5]),  # duplicates, more images than classes
        ("dlf", [0, 0, 0, 6, 0, 0, 0, 0, 0, 0]),
        ("llg", [3, 1, 0, 0, 0, 0, 0, 0, 0, 0]),
    ],
)
def test_counts_of_a_constructed_gradient(method: str, counts: list[int]) -> None:
    training = replace(SGD, batch_size=sum(counts))
    observation = one_step_of_zeros(torch.tensor(counts), training)
    found = infer_labels(method, observation, known(training))
    assert found.counts.tolist() == counts
    assert found.labels == tuple(c for c, n in enumerate(counts) for _ in range(n))


class NoBias(nn.Module):
    """A classifier of mean colours without a bias."""

    def __init__(self, num_classes: int, image_shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.last = nn.Linear(image_shape[0], num_classes, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(x.mean((2, 3)) + 10)


class NoLinear(nn.Module):
    def __init__(self, num_classes: int, image_shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.last = nn.Conv2d(image_shape[0], num_classes, 8)


@pytest.mark.parametrize("method", ["dlf", "simulate"])
def test_without_a_bias_the_weights_are_used(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODELS, "nobias", Family(lambda c, s, _: NoBias(c, s), ("none",)))
    labels = torch.tensor([1, 1, 1, 2, 5, 5, 9, 1])
    training = replace(SGD, lr=1e-4, batch_size=8)
    observation = client(training, labels, 0, "nobias")
    counts = infer_labels(method, observation, known(training, "nobias")).counts
    assert label_accuracy(counts, labels.tolist()) >= 0.75


def test_adams_labels_are_found_by_simulation() -> None:
    training = replace(ADAM, local_steps=3, batch_size=4)
    scores: dict[str, list[float]] = {"auto": [], "dlf": []}
    for seed in range(4):
        labels = torch.randint(10, (12,), generator=torch.Generator().manual_seed(seed))
        observation = client(training, labels, seed)
        for method, values in scores.items():
            found = infer_labels(method, observation, known(training))
            assert int(found.counts.sum()) == len(found.labels) == 12
            values.append(label_accuracy(found.counts, labels.tolist()))
    assert found.method == "dlf"
    assert sum(scores["auto"]) / 4 >= 0.85 > sum(scores["dlf"]) / 4


@pytest.mark.parametrize("seed", range(4))
def test_counted_labels_of_an_adam_client_are_put_at_their_steps(seed: int) -> None:
    training = replace(ADAM, local_steps=5)
    labels = torch.randint(10, (5,), generator=torch.Generator().manual_seed(seed))
    true = tuple(labels.tolist())
    observation, counted = client(training, labels, seed), known(training).granting("counts", true)
    assert counted.labels == tuple(sorted(true)) != true
    found = order_labels(observation, counted)
    assert (found.labels, found.method) == (true, "simulate")
    inferred = infer(observation, counted)
    assert (inferred.labels, inferred.labels_level) == (true, "counts")
    assert "labels assigned to the local steps by simulate" in inferred.inferred[-1]
    by_step = counted.granting("by-step", true)
    assert infer(observation, by_step) == by_step  # nothing is left to infer


def test_signs_of_single_steps_show_no_class_that_the_step_does_not_hold() -> None:
    for size, steps in ((1, 5), (2, 4)):
        training = replace(ADAM, local_steps=steps, batch_size=size)
        labels = torch.randint(10, (size * steps,), generator=torch.Generator().manual_seed(size))
        observation, knowledge = client(training, labels, size), known(training)
        head = _Head(observation, knowledge, torch.device("cpu"))
        columns, negative, _ = _Search(head, observation, knowledge).shown
        held = torch.stack([batch.bincount(minlength=10) for batch in labels.split(size)])
        assert int(columns.count_nonzero()) >= steps - 1
        assert not negative[held == 0].any()
        assert negative[held > 0].count_nonzero() >= size * (steps - 1)
    # SGD's update shows no single step.
    training = replace(SGD, local_steps=5)
    observation = client(training, labels[:5], 0)
    head = _Head(observation, known(training), torch.device("cpu"))
    assert not _Search(head, observation, known(training)).shown[0].any()


def test_labels_without_an_order_to_find_are_spread_over_the_steps() -> None:
    training = replace(SGD, batch_size=3)
    counted = known(training).granting("counts", (8, 1, 4))
    observation = client(training, torch.tensor([8, 1, 4]), 0)
    assert infer(observation, counted) == counted  # one step has no order
    with pytest.raises(ValueError, match="no order without labels"):
        order_labels(observation, known(training))
    several = replace(counted, training=replace(SGD, local_steps=3))
    zero = infer(replace(observation, w1=observation.w0), several)
    assert zero.labels == (1, 4, 8)
    assert zero.inferred[-1].startswith(
        "labels spread over the local steps at first: the update of class"
    )


def test_counts_over_many_steps_are_found_without_their_order() -> None:
    training = replace(ADAM, local_steps=30, batch_size=4)
    labels = torch.tensor([1] * 60 + [2] * 10 + [7] * 50)
    shuffled = labels[torch.randperm(120, generator=torch.Generator().manual_seed(0))]
    observation = client(training, shuffled, 0)
    found = infer_labels("auto", observation, known(training))
    assert found.method == "simulate" and found.counts.sum() == 120
    # Even counts would have 86 labels wrong.
    assert (found.counts - labels.bincount(minlength=10)).abs().sum() / 2 < 40
    # Every step has its share, as far as nothing is known of the order.
    first = torch.tensor(found.labels[:60]).bincount(minlength=10)
    assert (2 * first - found.counts).abs().max() <= 1
    inferred = infer(observation, known(training).granting("counts", tuple(labels.tolist())))
    assert inferred.labels is not None and sorted(inferred.labels) == labels.tolist()
    assert "at most 20 local steps" in inferred.inferred[-1]


def test_likeliest_counts_are_those_of_every_choice() -> None:
    likely = torch.randn(3, 6, generator=torch.Generator().manual_seed(0)).numpy()
    every = [(a, b, 5 - a - b) for a in range(6) for b in range(6 - a)]
    best = max(every, key=lambda c: sum(row[n] for row, n in zip(likely, c, strict=True)))
    assert tuple(_likeliest(likely, 5).tolist()) == best


def test_sgd_over_several_steps_and_passes() -> None:
    training = replace(SGD, lr=0.01, local_steps=0, local_epochs=2, batch_size=4)
    labels = torch.randint(10, (12,), generator=torch.Generator().manual_seed(3))
    observation = client(training, labels, 3)
    for method in ("auto", "simulate"):
        found = infer_labels(method, observation, known(training))
        assert found.counts.tolist() == labels.bincount(minlength=10).tolist()


def test_auto_says_what_it_chose_and_why() -> None:
    five = replace(SGD, local_steps=5, batch_size=8)
    for training, count, chosen, why in (
        (replace(ADAM, local_steps=5), 1, "idlg", "one image"),
        (five, 40, "dlf", "sums its gradients"),
        (five, 38, "simulate", "smaller batch"),
        (replace(five, momentum=0.9), 40, "simulate", "momentum"),
        (replace(five, optimizer="adamw"), 40, "simulate", "adamw hides"),
    ):
        method, reason = choose_method(training, count)
        assert method == chosen and why in reason


def test_true_labels_are_not_read() -> None:
    training = replace(ADAM, local_steps=2, batch_size=2)
    observation = client(training, torch.tensor([3, 3, 0, 6]), 0)
    blind = infer_labels("simulate", observation, known(training))
    wrong = replace(known(training), labels=(9, 9, 9, 9), labels_source="llg")
    assert infer_labels("simulate", observation, wrong).labels == blind.labels


def test_displacement_is_the_optimisers() -> None:
    momentum = LocalTraining("sgd", lr=0.1, momentum=0.5, weight_decay=0.1)
    start = torch.tensor([1.0])
    # g = 2 + 0.1 w: steps of 0.21, then 0.5 * 2.1 + 2.079 = 3.129.
    moved = displacement([start * 2, start * 2], start, momentum)
    assert moved.item() == pytest.approx(-0.21 - 0.3129, abs=1e-6)
    # Adam's first step is the gradient's sign.
    signs = displacement([torch.tensor([3.0, -0.02])], torch.zeros(1), ADAM)
    assert signs.tolist() == pytest.approx([-1e-3, 1e-3], rel=1e-4)


def test_what_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    observation = client(SGD, torch.tensor([1]), 0)
    with pytest.raises(ValueError, match="'magic'; allowed: auto, idlg, llg, dlf, simulate"):
        infer_labels("magic", observation, known(SGD))
    with pytest.raises(ValueError, match=r"update of classifier is zero"):
        infer_labels("dlf", replace(observation, w1=observation.w0), known(SGD))
    spoilt = {name: w * torch.nan for name, w in observation.w1.items()}
    with pytest.raises(ValueError, match=r"update of classifier is not finite"):
        infer_labels("dlf", replace(observation, w1=spoilt), known(SGD))
    with pytest.raises(ValueError, match="num_examples is 7"):
        infer_labels("simulate", replace(observation, num_examples=7), known(SGD))
    monkeypatch.setitem(MODELS, "nolinear", Family(lambda c, s, _: NoLinear(c, s), ("none",)))
    with pytest.raises(ValueError, match="nolinear has no linear layer"):
        infer_labels("dlf", observation, known(SGD, "nolinear"))


def test_label_accuracy_and_its_chance() -> None:
    true = [0, 0, 0, 2, 2, 1, 4]
    assert label_accuracy(torch.tensor([2, 1, 3, 1, 0]), true) == pytest.approx(5 / 7)
    assert label_accuracy(torch.tensor(true).bincount(), true) == 1
    with pytest.raises(ValueError, match="6 labels inferred for 7 images"):
        label_accuracy(torch.tensor([2, 1, 3, 0, 0]), true)
    with pytest.raises(ValueError, match="labels from 0 to 4; allowed: 0 to 2"):
        label_chance(true, 3)
    # The slow oracle: one of each class, and two more classes drawn at random.
    generator = torch.Generator().manual_seed(0)
    guesses = []
    for _ in range(4000):
        counts = torch.ones(5, dtype=torch.long)
        counts[torch.randperm(5, generator=generator)[:2]] += 1
        guesses.append(label_accuracy(counts, true))
    assert label_chance(true, 5) == pytest.approx(sum(guesses) / 4000, abs=0.005)


def test_inferred_labels_are_scored_and_given_ones_are_not() -> None:
    x = torch.rand((3, 3, 16, 16), generator=torch.Generator().manual_seed(0))
    truth = Truth(x, (0, 1, 1), ((0, 1, 2),), round=1, node=1)
    given = Reconstruction("", x, (1, 0, 0), (0.1,), 1, 1.0, 0, 0, "iterations")
    assert score(given, truth, (0.5,) * 3, num_classes=10).label_accuracy is None
    found = replace(given, labels_source="dlf", labels_level="unknown")
    inferred = score(found, truth, (0.5,) * 3, num_classes=10)
    assert inferred.label_accuracy == pytest.approx(2 / 3)  # counts: the order does not matter
    assert inferred.label_chance == pytest.approx(0.3 * 2 / 3)
