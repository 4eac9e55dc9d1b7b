"""The models: their sizes, what they refuse, and that a client of each can be explained."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.clients import MEAN, STD
from PIL import Image
from torch import Tensor

from client_app.training import normalise, train
from fl_app.config import AttackConfig, ConfigError, PriorConfig
from fl_app.models import chosen_head, chosen_norm, clients_model, create_model
from fl_app.protocol import Knowledge, LocalTraining, Observation
from fl_app.registry import MODELS
from fl_app.server_app import _prepare
from server_strategies.attacks.diagnosis import diagnose
from server_strategies.attacks.matching import matching_objective
from server_strategies.attacks.matching.batch_norm import inferred_statistics, statistics_of
from server_strategies.attacks.matching.simulation import simulate
from server_strategies.attacks.run import run_attack

SGD = LocalTraining("sgd", lr=0.01, batch_size=2, local_steps=2)
ADAM = LocalTraining("adam", lr=1e-3, batch_size=2, local_steps=2)
# The smallest image of each; vgg11 halves it five times.
SIDES = {"lenet5": 12, "vgg11": 32, "resnet18": 16}
KINDS = [(name, norm) for name, family in MODELS.items() for norm in family.norms]
# Each norm and mode of one of its kind; the others as they are by default. resnet18 and
# resnet8_wide are resnet8, only larger.
SMALLER = sorted(MODELS.keys() - {"resnet18", "resnet8_wide"})
TRAINED = [
    (name, norm, mode)
    for name, norm in KINDS
    if name in SMALLER and (name != "vgg11" or norm == chosen_norm(name))
    for mode in (("train", "eval") if norm == "batch" and name == "resnet8" else ("train",))
]


def client(
    name: str, training: LocalTraining, norm: str = "", dtype: torch.dtype = torch.float32
) -> tuple[Observation, Knowledge, Tensor]:
    """Train a real client on random images; return what the server sees, and the images.

    The model is trained a little before, so that its running statistics are not those
    of a fresh one.
    """
    generator = torch.Generator().manual_seed(3)
    count = training.local_steps * training.batch_size
    shape = (3, *2 * (SIDES.get(name, 8),))
    images = torch.rand((count, *shape), generator=generator, dtype=dtype)
    labels = torch.randint(10, (count,), generator=generator)
    model = create_model(name, 10, shape, 1, norm).to(dtype)
    batches = [torch.tensor(batch) for batch in training.batches(count)]
    sent = replace(SGD, send_buffers=True)
    train(model, images.flip(3), labels, batches[:1], sent, MEAN, STD)
    w0 = {name: value.clone() for name, value in model.state_dict().items()}
    train(model, images, labels, batches, training, MEAN, STD)
    observation = Observation(w0, model.state_dict(), count, round=1, node=1, client=1)
    known = tuple(labels.tolist())
    knowledge = Knowledge(name, 10, shape, MEAN, STD, training, known, "by-step", norm=norm)
    return observation, knowledge, normalise(images, MEAN, STD)


def test_every_model_has_its_size() -> None:
    sizes = {name: count_parameters(name) for name in MODELS}
    assert sizes == {
        "convnet": 1_716_258,
        "lenet5": 83_126,
        "mlp": 789_258,
        "mlp_mixer": 1_132_170,
        "resnet8": 78_042,
        "resnet8_wide": 3_518_370,
        "resnet18": 11_173_962,
        "vgg11": 9_228_362,
        "vit_tiny": 5_362_762,
    }


def count_parameters(name: str) -> int:
    return sum(w.numel() for w in create_model(name, 10, (3, 32, 32)).parameters())


@pytest.mark.parametrize(("name", "norm"), KINDS)
def test_every_model_takes_images_of_both_sizes(name: str, norm: str) -> None:
    for side, channels, classes in ((32, 1, 10), (64, 3, 200)):
        model = create_model(name, classes, (channels, side, side), seed=0, norm=norm)
        *_, (last, classifier) = model.named_children()
        assert last == "classifier" and isinstance(classifier, torch.nn.Linear)
        x = torch.randn((2, channels, side, side), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            logits, features = model(x), model.features(x)  # type: ignore[operator]
        assert logits.shape == (2, classes)
        assert features.shape == (2, classifier.in_features)
        torch.testing.assert_close(classifier(features), logits)
        # Neither dead nor blown up: an untrained model tells images apart.
        assert 1e-3 < logits.std(0).mean() < 10


@pytest.mark.parametrize(
    ("head", "width", "parameters"),
    [("gap", 64, 78_042), ("flatten", 64 * 8 * 8, 118_362), ("mlp", 1000, 1_688_402)],
)
def test_a_model_has_the_head_that_is_asked_for(head: str, width: int, parameters: int) -> None:
    model = create_model("resnet8", 10, (3, 32, 32), head=head)
    assert sum(w.numel() for w in model.parameters()) == parameters
    assert model.classifier.in_features == width
    for side in (16, 32):
        x = torch.rand(2, 1, side, side)
        assert create_model("resnet8", 5, x.shape[1:], 0, head=head)(x).shape == (2, 5)


@pytest.mark.parametrize(("name", "norm", "mode"), TRAINED)
def test_a_simulated_client_is_the_client(name: str, norm: str, mode: str) -> None:
    training = replace(SGD, momentum=0.9, batch_norm=mode)
    observation, knowledge, x = client(name, training, norm, torch.float64)
    model = clients_model(knowledge, observation.w0).to(torch.float64)
    if norm == "batch":  # they passed through float32
        model.load_state_dict(
            {n: observation.w0[n] for n, _ in model.named_buffers()}, strict=False
        )
    labels = torch.tensor(knowledge.labels)
    batches = [(x[list(b)], labels[list(b)]) for b in training.batches(len(x))]
    w0 = {n: observation.w0[n] for n in observation.trained}
    found = simulate(model, w0, batches, training)
    for key, after in found.items():
        expected = observation.w1[key] - w0[key]
        assert (after - w0[key] - expected).norm() <= 1e-10 * observation.w1[key].norm(), key
    assert set(found) == {n for n, _ in model.named_parameters()}


@pytest.mark.parametrize("name", SMALLER)
def test_an_update_can_be_descended_to_its_images(name: str) -> None:
    for training in (SGD, ADAM):
        observation, knowledge, x = client(name, training)
        objective = matching_objective("trajectory", observation, knowledge)
        buffers = {n: b.clone() for n, b in objective.model.named_buffers()}
        other = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
        loss = objective(other, 0.5)
        (slope,) = torch.autograd.grad(loss, other)  # through the model twice
        assert slope.isfinite().all() and (slope.abs().sum((1, 2, 3)) > 0).all()
        assert objective(x, 0.5) < 0.5 * loss
        for n, b in objective.model.named_buffers():
            assert torch.equal(b, buffers[n]) and torch.equal(b, observation.w0[n])


def test_what_does_not_fit_is_refused() -> None:
    for name, shape, words in (
        ("convnet", (3, 30, 32), "divisible by 4"),
        ("vgg11", (3, 48, 48), "divisible by 32"),
        ("resnet18", (3, 28, 28), "divisible by 8"),
        ("mlp_mixer", (3, 30, 30), "divisible by 4"),
        ("vit_tiny", (3, 32, 30), "divisible by 4"),
    ):
        with pytest.raises(ValueError, match=rf"{name.rstrip('18')}.* {words}, got"):
            create_model(name, 10, shape)
    with pytest.raises(ValueError, match="num_classes is 1; allowed: 2 or more"):
        create_model("convnet", 1, (3, 32, 32))
    with pytest.raises(
        ValueError, match=r"norm is 'batch'; allowed for vit_tiny: layer .*LayerNorm"
    ):
        create_model("vit_tiny", 10, (3, 32, 32), norm="batch")
    with pytest.raises(ValueError, match="norm is 'magic'; allowed for vgg11: batch, group, none"):
        create_model("vgg11", 10, (3, 32, 32), norm="magic")
    assert (chosen_norm("convnet"), chosen_norm("resnet8")) == ("none", "batch")
    with pytest.raises(ValueError, match="head is 'mlp'; vgg11 has no choice"):
        create_model("vgg11", 10, (3, 32, 32), head="mlp")
    with pytest.raises(ValueError, match="head is 'cap'; allowed for resnet8: gap, flatten, mlp"):
        create_model("resnet8", 10, (3, 32, 32), head="cap")
    heads = [chosen_head(name) for name in ("convnet", "resnet8", "resnet8_wide")]
    assert heads == ["", "gap", "mlp"]


@pytest.mark.parametrize(
    ("run_config", "words"),
    [
        ({"model": "mlp", "overrides": "model.norm=batch"}, "model: norm is 'batch'; .*no channel"),
        (
            {"model": "magic"},
            "model is 'magic'; allowed: convnet, lenet5, mlp, mlp_mixer, resnet18",
        ),
        (
            {"model": "mlp", "overrides": "model.head=gap"},
            "model: head is 'gap'; mlp has no choice",
        ),
        ({"overrides": "model.name=magic"}, "model: model is 'magic'; allowed: convnet, lenet5"),
        (
            {"model": "resnet8", "overrides": "strategy.name=fedadam"},
            "strategy.name is 'fedadam'.*allowed with them: fedavg, or client.send_buffers=false",
        ),
    ],
)
def test_a_run_is_refused_before_it_starts(run_config: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        _prepare(run_config, simulated=True)


def test_a_model_that_does_not_fit_a_folders_images_is_refused(tmp_path: Path) -> None:
    for label in ("train/a", "train/b", "test/a"):
        (tmp_path / label).mkdir(parents=True)
        Image.effect_noise((40, 40), 50).convert("RGB").save(tmp_path / label / "image.png")
    overrides = f"dataset.source={tmp_path}"
    with pytest.raises(ConfigError, match="model: vgg11 needs a height and width divisible by 32"):
        _prepare({"dataset": "imagefolder", "model": "vgg11", "overrides": overrides}, True)


def test_batch_norm_runs_as_the_protocol_says() -> None:
    for mode, send, moves in (
        ("train", True, True),
        ("train", False, False),
        ("eval", True, False),
    ):
        training = replace(SGD, batch_norm=mode, send_buffers=send)
        observation, _, _ = client("resnet8", training)
        w0, w1 = observation.w0, observation.w1
        means = [name for name in w0 if name.endswith("running_mean")]
        assert len(means) == 9
        assert all(torch.equal(w0[n], w1[n]) != moves for n in means)
        assert not any(torch.equal(w0[n], w1[n]) for n in observation.trained)
    with pytest.raises(ValueError, match="batch_norm is 'off'; allowed: train, eval"):
        replace(SGD, batch_norm="off")


@pytest.mark.parametrize(("steps", "near"), [(1, 1e-4), (4, 2e-2)])
def test_the_batchs_statistics_are_inferred_from_the_running_ones(steps: int, near: float) -> None:
    training = replace(SGD, batch_size=3, local_steps=steps)
    observation, knowledge, x = client("resnet8", training)
    # A plain recomputation: the real client, step by step, looked into.
    model = create_model("resnet8", 10, knowledge.image_shape)
    model.load_state_dict(dict(observation.w0))
    layers = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    inputs: list[Tensor] = []
    for layer in layers:
        layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    images = x * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)
    labels = torch.tensor(knowledge.labels)
    for batch in training.batches(len(x)):
        train(model, images, labels, [torch.tensor(batch)], training, MEAN, STD)
    found = inferred_statistics(model, observation, steps)
    assert len(found) == 2 * len(layers) == 18
    shares = [0.1 * 0.9 ** (steps - 1 - step) / (1 - 0.9**steps) for step in range(steps)]
    for place in range(len(layers)):
        seen = inputs[place :: len(layers)]
        for kind, ours in enumerate(found[2 * place : 2 * place + 2]):
            each = [(a.var if kind else a.mean)((0, 2, 3)) for a in seen]
            mixed = sum(c * s for c, s in zip(shares, each, strict=True))
            torch.testing.assert_close(ours, mixed, rtol=1e-4, atol=1e-5)
    (term,) = statistics_of(1.0, observation, knowledge)
    assert term(images, 0.0) < near < 0.2 < term(images.flip(0).mean(2, True), 0.0)
    twice = torch.cat([images, images])  # as two starts of one attack
    torch.testing.assert_close(term(twice, 0.0), term(images, 0.0))


def test_statistics_that_were_not_sent_tell_nothing() -> None:
    for change in ({"batch_norm": "eval"}, {"send_buffers": False}):
        observation, knowledge, _ = client("resnet8", replace(SGD, **change))  # type: ignore[arg-type]
        assert statistics_of(1.0, observation, knowledge) == []
    observation, knowledge, _ = client("resnet8", SGD, "group")
    assert statistics_of(1.0, observation, knowledge) == []


@pytest.mark.parametrize("name", SMALLER)
def test_an_attack_chooses_for_itself(name: str) -> None:
    observation, knowledge, x = client(name, replace(SGD, batch_size=1))
    assert diagnose(observation, knowledge, [0.6, 0.05], None) == ()
    blind = knowledge.granting("unknown")  # counted from the classifier
    adam, known, _ = client(name, replace(ADAM, batch_size=1))
    for seen, told in ((observation, blind), (adam, known)):
        attack = AttackConfig("flow_matching", 1, options={"flow": 0})
        found = run_attack(seen, told, attack, PriorConfig(), 0)
        assert found.images.shape == x.shape and found.images.isfinite().all()
        # Only layers with one input an image give away features.
        single = name in ("convnet", "mlp")
        inferred = "replay" if single else "dlf"
        assert found.labels_source == (inferred if told is blind else "given")
        assert single or name == "lenet5" or found.matching.startswith("trajectory")
