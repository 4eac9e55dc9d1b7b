"""Attackers who know the defence: against slow, obvious oracles and real clients."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from helpers.clients import MEAN, SHAPE, STD, client
from helpers.matching import objective_of, setting_of
from torch import Tensor

from client_app.training import evaluate, normalise, train
from fl_app.config import AttackConfig, PriorConfig
from fl_app.data import ImageSet
from fl_app.models import create_model, known_model
from fl_app.models.extensions import RandomLayer, given_noise, local_loss, random_layers
from fl_app.protocol import Budget, Defense, Knowledge, LocalTraining, Observation
from server_strategies.attacks.attack import Task
from server_strategies.attacks.ggl import GGL
from server_strategies.attacks.infer import infer
from server_strategies.attacks.matching import OBJECTIVES, choose
from server_strategies.attacks.matching.adam.decode import usable_fingerprints
from server_strategies.attacks.matching.adam.one_step import EpsInversion
from server_strategies.attacks.matching.defended import consistent, estimated
from server_strategies.attacks.matching.distance import SquaredDistance
from server_strategies.attacks.matching.gradient_match import GradientMatch
from server_strategies.attacks.matching.summed import Summed
from server_strategies.attacks.matching.surrogate import Surrogate
from server_strategies.attacks.matching.trajectory import Trajectory
from server_strategies.attacks.run import run_attack
from server_strategies.priors.flow import load_flow

SGD = LocalTraining("sgd", lr=0.05, batch_size=2, local_steps=3)
ADAM = LocalTraining("adam", lr=1e-3, batch_size=2, local_steps=3)

DEFENSES = {
    "clip": Defense(clip=0.3),
    "clip_norm": Defense(clip=0.5, clip_by="norm"),
    "sparsify": Defense(sparsify=0.6),
    "clip_and_sparsify": Defense(clip=0.3, sparsify=0.6),
}


def defended(update: list[Tensor], defense: Defense, seed: int = 0) -> list[Tensor]:
    """Return what a client sends instead of an update, by plain loops over numbers."""
    flat = torch.cat([part.flatten() for part in update]).tolist()
    if defense.clip and defense.clip_by == "value":
        flat = [max(-defense.clip, min(defense.clip, u)) for u in flat]
    elif defense.clip:
        length = math.sqrt(sum(u * u for u in flat))
        flat = [u * min(1.0, defense.clip / length) for u in flat]
    moved = [place for place, u in enumerate(flat) if u]
    zeroed = int(defense.sparsify * len(moved))
    for place in sorted(moved, key=lambda i: abs(flat[i]))[:zeroed]:
        flat[place] = 0.0
    values = torch.tensor(flat, dtype=update[0].dtype)
    if defense.noise != "none":
        sigma = defense.sigma * (values.square().mean().sqrt() if defense.relative else 1)
        values = values + sigma * torch.randn(
            len(flat), generator=torch.Generator().manual_seed(seed), dtype=values.dtype
        )
    parts = [
        part.view_as(like)
        for part, like in zip(values.split([u.numel() for u in update]), update, strict=True)
    ]
    if defense.quantize == "bf16":
        return [part.bfloat16().to(part) for part in parts]
    if defense.quantize == "int8":
        steps = [part.abs().max() / 127 for part in parts]
        return [(part / step).round() * step for part, step in zip(parts, steps, strict=True)]
    return parts


def seen_through(
    seen: tuple[Observation, Knowledge, Tensor], defense: Defense
) -> tuple[Observation, Knowledge, Knowledge]:
    """Return a defended client's observation, and knowledge without and with the defence."""
    observation, knowledge, _ = seen
    names = list(observation.w0)
    update = [observation.w1[name] - observation.w0[name] for name in names]
    sent = dict(zip(names, defended(update, defense), strict=True))
    w1 = {name: w + sent[name] for name, w in observation.w0.items()}
    return replace(observation, w1=w1), knowledge, replace(knowledge, defense=defense)


def tiny(seed: int = 0, scale: float = 0.4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        scale * torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((4, 5), (3,))
    ]


@pytest.mark.parametrize("name", [name for name in DEFENSES if name != "clip_norm"])
def test_consistent_updates_are_those_that_the_defence_sends_alike(name: str) -> None:
    defense = DEFENSES[name]
    true = tiny()
    observed = defended(true, defense)
    known = consistent(observed, defense)
    assert known is not None
    # The true update is consistent, so it equals the observed one.
    for found, seen in zip(known.as_observed(true), observed, strict=True):
        assert torch.allclose(found, seen, rtol=0, atol=1e-12)
    # A coordinate moved beyond its bounds, alone, would have been sent as another value.
    kept = min(float(b.abs()[b != 0].min()) for b in observed)
    for part, (low, high) in enumerate(zip(known.low, known.high, strict=True)):
        for place in torch.cartesian_prod(*[torch.arange(n) for n in true[part].shape]):
            i = tuple(int(n) for n in place.view(-1))
            for bound, step in ((low[i], -1), (high[i], 1)):
                if bound.isinf():
                    continue
                moved = [part.clone() for part in true]
                # Past both bounds' tolerance, and past the least that was kept.
                moved[part][i] = bound + step * (0.002 + 0.01 * kept)
                resent = defended(moved, defense)
                assert not torch.equal(resent[part][i], observed[part][i]), (part, i, step)


def test_a_residual_is_the_distance_from_the_consistent_updates() -> None:
    # Bound 1, least kept 0.5, so the zero was at most 0.5.
    observed = [torch.tensor([1.0, -1.0, 0.5, 0.0], dtype=torch.float64)]
    known = consistent(observed, Defense(clip=1.0, sparsify=0.25))
    assert known is not None
    candidate = [torch.tensor([3.0, 0.25, 0.75, -0.75], dtype=torch.float64, requires_grad=True)]
    (found,) = known.as_observed(candidate)
    # Only 0.5 is exact, and missed by 0.25; the zero is known up to 1 / sqrt(12).
    weight = 0.25**2 / (0.25**2 + 1 / 12)
    expected = torch.tensor([1.0, 0.25, 0.75, -0.25 - weight * 0.5], dtype=torch.float64)
    assert torch.allclose(found, expected, atol=2e-3, rtol=0)
    (slope,) = torch.autograd.grad(found.sum(), candidate)
    assert slope.tolist() == [0, 1, 1, 1]
    # At the true update hidden coordinates have no gradient.
    candidate = [torch.tensor([3.0, -2.0, 0.500001, -0.25]).double().requires_grad_()]
    (found,) = known.as_observed(candidate)
    (slope,) = torch.autograd.grad(found.sum(), candidate)
    assert torch.allclose(slope, torch.tensor([0.0, 0, 1, 0]).double(), atol=1e-9)


@pytest.mark.parametrize("kind", ["trajectory", "passes"])
@pytest.mark.parametrize("name", DEFENSES)
def test_the_ground_truth_matches_a_defended_update_if_the_defence_is_known(
    kind: str, name: str
) -> None:
    seen = client(SGD, torch.float64)
    size = torch.cat([(seen[0].w1[n] - w).flatten() for n, w in seen[0].w0.items()])
    defense = DEFENSES[name]
    if defense.clip:  # a bound that bites
        bound = size.norm() / 2 if defense.clip_by == "norm" else size.abs().max() / 4
        defense = replace(defense, clip=float(bound))
    observation, unaware, aware = seen_through(seen, defense)
    at_truth = []
    for knowledge in (unaware, aware):
        objective = objective_of(OBJECTIVES[kind], observation, knowledge)
        at_truth.append(float(objective(seen[2], 1.0)))
    assert abs(at_truth[1]) < 1e-9
    # A cosine sees only the direction anyway.
    assert at_truth[0] > 1e-6 or name == "clip_norm"


def randomised(
    training: LocalTraining, *, precode: int = 0, dropout: float = 0.0, known: bool = True
) -> tuple[Observation, Knowledge, Tensor, list[Tensor]]:
    """Train a client whose model has random layers; also return the noise of each, by row."""
    model = create_model("mlp", 10, SHAPE, 1, precode=precode, dropout=dropout).double()
    generator = torch.Generator().manual_seed(0)
    images = torch.rand((6, *SHAPE), generator=generator, dtype=torch.float64)
    labels = torch.randint(10, (6,), generator=generator)
    drawn: list[list[Tensor]] = [[] for _ in random_layers(model)]
    for layer, kept in zip(random_layers(model), drawn, strict=True):

        def draw(like: Tensor, layer: RandomLayer = layer, kept: list[Tensor] = kept) -> Tensor:
            kept.append(type(layer).draw(layer, like))
            return kept[-1]

        layer.draw = draw  # type: ignore[method-assign]
    w0 = {name: value.clone() for name, value in model.state_dict().items()}
    batches = [torch.tensor(batch) for batch in training.batches(6)]
    train(model, images, labels, batches, training, MEAN, STD)
    observation = Observation(w0, model.state_dict(), 6, round=1, node=1, client=1)
    knowledge = Knowledge(
        "mlp", 10, SHAPE, MEAN, STD, training, tuple(labels.tolist()), labels_level="by-step",
        defense=Defense(precode=precode, dropout=dropout) if known else Defense(),
        precode=precode, dropout=dropout,
    )  # fmt: skip
    return observation, knowledge, normalise(images, MEAN, STD), [torch.cat(d) for d in drawn]


def test_the_bottlenecks_loss_is_the_papers() -> None:
    torch.manual_seed(0)
    model = create_model("mlp", 10, SHAPE, 1, precode=3).double()
    x, y = torch.randn(4, *SHAPE, dtype=torch.float64), torch.tensor([1, 2, 3, 4])
    for mode in (True, False):  # it samples in evaluation, too
        assert not torch.equal(model.train(mode)(x), model(x))
    eps = torch.randn(4, 3, dtype=torch.float64)
    with given_noise(model, [eps]):
        found = local_loss(model, model(x), y, LocalTraining())
    bottleneck, classifier = model.classifier[0], model.classifier[1]
    total, divergence = 0.0, 0.0
    for row, h in enumerate(model.features(x).detach()):
        encoded = bottleneck.encode(h).detach()
        z = []
        for j in range(3):
            mu, std = float(encoded[j]), math.log1p(math.exp(float(encoded[3 + j])))
            divergence += (mu**2 + std**2 - 1 - math.log(std**2)) / 2
            z.append(mu + std * float(eps[row, j]))
        logits = classifier(bottleneck.decode(torch.tensor(z, dtype=torch.float64)))
        total += float((logits.exp().sum().log() - logits[y[row]]).detach())
    assert float(found.detach()) == pytest.approx(total / 4 + 1e-3 * divergence / 4 / math.log(2))


def test_a_model_that_samples_is_evaluated_alike_every_time() -> None:
    model = create_model("mlp", 10, SHAPE, 1, precode=3)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (20, *SHAPE), dtype=torch.uint8, generator=generator)
    images = ImageSet(pixels, torch.arange(20) % 10)
    torch.manual_seed(1)
    first = evaluate(model, images, MEAN, STD)
    torch.manual_seed(2)
    assert evaluate(model, images, MEAN, STD) == first


def test_dropout_is_torchs() -> None:
    torch.manual_seed(0)
    model = create_model("mlp", 10, SHAPE, 1, dropout=0.5).double()
    x = torch.randn(4, *SHAPE, dtype=torch.float64)
    torch.manual_seed(1)
    mask = model.classifier[0].draw(model.features(x))
    assert 0.4 < mask.mean() < 0.6
    with given_noise(model, [mask]):
        found = model(x)
    kept = torch.where(mask > 0, 2 * model.features(x), 0)
    assert torch.allclose(found, model.classifier[1](kept))
    assert torch.allclose(model.eval()(x), model.classifier[1](model.features(x)))
    with pytest.raises(ValueError, match=r"dropout is 1.0; allowed: 0"):
        create_model("mlp", 10, SHAPE, dropout=1.0)


@pytest.mark.parametrize("layers", [{"precode": 4}, {"dropout": 0.5}])
@pytest.mark.parametrize("kind", ["trajectory", "passes"])
def test_with_the_clients_noise_the_ground_truth_matches_the_update(
    kind: str, layers: dict[str, float]
) -> None:
    observation, knowledge, x, drawn = randomised(SGD, **layers)
    objective = objective_of(OBJECTIVES[kind], observation, knowledge)
    (unknown,) = [noise for noise in objective.noise if noise]
    before = float(objective(x, 1.0))
    with torch.no_grad():
        unknown.value.copy_(drawn[0])
    assert float(objective(x, 1.0)) < 1e-9 < 0.01 * before


@pytest.mark.parametrize("layers", [{"precode": 4}, {"dropout": 0.5}])
def test_noise_of_an_unknown_defence_is_sampled_in_every_call(
    layers: dict[str, float],
) -> None:
    observation, knowledge, x, _ = randomised(SGD, known=False, **layers)
    objective = objective_of(Trajectory, observation, knowledge)
    assert objective.unknowns == []
    assert not torch.equal(objective(x, 1.0), objective(x, 1.0))


def test_masks_are_recovered_jointly_with_the_image() -> None:
    one_step = replace(SGD, local_steps=1, batch_size=6)
    observation, knowledge, x, drawn = randomised(one_step, dropout=0.5)
    objective = objective_of(GradientMatch, observation, knowledge)
    (mask,) = [noise for noise in objective.noise if noise]
    optimizer = torch.optim.Adam([mask.value], 0.05)
    for _ in range(150):
        optimizer.zero_grad()
        objective(x, 0.0).backward()
        optimizer.step()
        with torch.no_grad():
            mask.value.clamp_(mask.low, mask.high)
    # Inactive units do not depend on the mask.
    model = known_model(knowledge).double()
    model.load_state_dict(observation.w0)
    active = model.features(x) > 0
    right = (mask.value.round() == drawn[0])[active].double().mean()
    assert right > 0.9, float(right)


def summed(
    training: LocalTraining, sizes: tuple[int, ...]
) -> tuple[Observation, Knowledge, Tensor]:
    """Train clients from the same weights; return their weighted mean, as FedAvg makes it."""
    w0: dict[str, Tensor] = {}
    w1: dict[str, Tensor] = {}
    labels: tuple[int, ...] = ()
    images = []
    for place, size in enumerate(sizes):
        _, known, x = client(training, torch.float64, architecture="mlp", count=size + place)
        # Different images: the last ones of a longer draw.
        model = create_model("mlp", 10, SHAPE, seed=1).double()
        w0 = {name: value.clone() for name, value in model.state_dict().items()}
        own, classes = x[place:], (known.labels or ())[place:]
        mean, std = (torch.tensor(v, dtype=x.dtype).view(-1, 1, 1) for v in (MEAN, STD))
        batches = [torch.tensor(batch) for batch in training.batches(size)]
        train(model, own * std + mean, torch.tensor(classes), batches, training, MEAN, STD)
        for name, value in model.state_dict().items():
            w1[name] = w1.get(name, 0) + value * size / sum(sizes)
        labels, images = labels + classes, [*images, own]
    observation = Observation(w0, w1, sum(sizes), 1, node=0, client=-1, examples=sizes)
    knowledge = Knowledge(
        "mlp", 10, SHAPE, MEAN, STD, training, labels, "by-step", defense=Defense(secagg=True)
    )
    return observation, knowledge, torch.cat(images)


def test_a_sum_is_matched_by_all_clients_images() -> None:
    observation, knowledge, x = summed(SGD, (4, 6, 2))
    kind, why = choose(known_model(knowledge), observation, knowledge)
    assert (kind, why) == ("sum", "secure aggregation of 3 clients")
    objective = objective_of(Summed, observation, knowledge)
    assert float(objective(x, 1.0)) < 1e-9
    swapped = x[torch.tensor([11, *range(1, 11), 0])]
    assert float(objective(swapped, 1.0)) > 1e-3
    assert all(
        knowledge.labels and knowledge.labels[a] == knowledge.labels[b]
        for a, b in objective.reassignments()
    )
    counted = objective_of(Summed, observation, knowledge.granting("counts"))
    assert (0, 11) in counted.reassignments()  # of the first client and the last
    counted.labels = objective.labels
    assert float(counted(x, 1.0)) < 1e-9
    unknown = knowledge.granting("unknown")
    objective = objective_of(Summed, observation, unknown)
    assert len(objective.found_labels()) == 12
    with pytest.raises(ValueError, match=r"examples are \(\); allowed"):
        objective_of(Summed, replace(observation, examples=()), knowledge)


def test_a_sum_is_attacked_by_name_alone() -> None:
    seen = summed(SGD, (2, 1))
    options = {"matching": "auto", "tv": 0.01}
    found = run_attack(
        seen[0], seen[1].granting("unknown"),
        AttackConfig("sme", 3, options=options), PriorConfig(), seed=0,
    )  # fmt: skip
    assert found.images.shape == (3, *SHAPE)
    assert "not from a sum" in found.matching


def test_a_sum_of_single_steps_is_one_step_on_all_images() -> None:
    seen = summed(replace(SGD, local_steps=1, batch_size=4), (4, 2, 3))
    observation, knowledge, x = seen
    known = infer(observation, knowledge)
    assert not known.defense.secagg and "one step on all images" in known.inferred[0]
    assert float(objective_of(GradientMatch, observation, known)(x, 0.0)) < 1e-9
    w0, w1 = ({n: w.float() for n, w in of.items()} for of in (observation.w0, observation.w1))
    single = replace(observation, w0=w0, w1=w1)
    blind = infer(single, knowledge.granting("unknown"))
    assert blind.labels is not None  # inferred, as from one client's update
    several = summed(SGD, (4, 2, 3))
    assert infer(*several[:2]).defense.secagg


def test_the_dropout_inversion_fits_masks_jointly_with_the_image() -> None:
    one_step = replace(SGD, local_steps=1, batch_size=1)
    observation, knowledge, _, _ = randomised(one_step, dropout=0.5, known=False)
    observation = replace(observation, num_examples=1)
    knowledge = replace(knowledge, labels=(knowledge.labels or ())[:1])

    fitted, sampled = (
        run_attack(observation, knowledge, AttackConfig(name, 60), PriorConfig(), seed=0)
        for name in ("dropout_inversion", "inverting_gradients")
    )
    assert fitted.losses[-1] < 0.5 * sampled.losses[-1]


def test_without_dropout_its_inversion_is_inverting_gradients() -> None:
    seen = client(replace(SGD, local_steps=1, batch_size=1), count=1)
    inverted, plain = (
        run_attack(seen[0], seen[1], AttackConfig(name, 3), PriorConfig(), seed=0)
        for name in ("dropout_inversion", "inverting_gradients")
    )
    assert torch.equal(inverted.images, plain.images)


ONE_STEP = replace(ADAM, local_steps=1, batch_size=1)


@pytest.mark.parametrize("training", [ONE_STEP, replace(ADAM, batch_size=1)], ids=["K=1", "K=3"])
@pytest.mark.parametrize(
    ("defense", "why"),
    [
        (Defense(clip=3e-4), "clipped"),
        (Defense(clip=1e-3, clip_by="norm"), "clipped the update's norm"),
        (Defense(noise="gaussian", sigma=1e-6), "adds gaussian noise"),
        (Defense(quantize="bf16"), "sends bf16"),
        (Defense(quantize="int8"), "sends int8"),
    ],
    ids=str,
)
def test_adams_sizes_are_not_read_where_the_defence_hides_them(
    training: LocalTraining, defense: Defense, why: str
) -> None:
    if training is not ONE_STEP and why == "clipped":
        return  # fingerprints below the bound are whole
    seen = client(training, count=training.local_steps)
    plain, _ = choose(known_model(seen[1]), seen[0], seen[1])
    assert plain == ("inversion" if training is ONE_STEP else "fingerprints")
    observation, _, aware = seen_through(seen, defense)
    kind, reason = choose(known_model(aware), observation, aware)
    assert kind == "trajectory" and why in reason


def test_rows_keep_small_coordinates_that_were_set_to_zero_and_lose_large_ones() -> None:
    seen = client(replace(ADAM, batch_size=1), count=3)
    model = known_model(seen[1])
    for share, whole in ((0.05, True), (0.6, False)):
        observation, unaware, aware = seen_through(seen, Defense(sparsify=share))
        everything, known = (
            sum(int(row.known.sum()) for row in usable_fingerprints(model, observation, knowledge))
            for knowledge in (unaware, aware)
        )
        assert everything
        assert (known == everything) == whole


def test_adams_gradient_is_known_at_zeros_where_the_least_kept_coordinate_is_small() -> None:
    known = consistent([torch.tensor([0.0, 0.5, -1.0])], Defense(sparsify=0.3))
    assert known is not None
    assert known.sizes_known(step=1.0)[0].tolist() == [True, True, True]
    assert known.sizes_known(step=0.5)[0].tolist() == [False, True, True]


def test_what_was_set_to_zero_does_not_count_in_an_inversion() -> None:
    seen = client(ONE_STEP, count=1)
    observation, unaware, aware = seen_through(seen, Defense(sparsify=0.6))
    losses = []
    for knowledge in (unaware, aware):
        kind, _ = choose(known_model(knowledge), observation, knowledge)
        assert kind == "inversion"
        objective = objective_of(EpsInversion, observation, knowledge)
        losses.append(float(objective(seen[2], 1.0)))
    assert losses[1] < 0.01 < losses[0], losses


@pytest.mark.parametrize("kind", ["gradient", "surrogate"])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_a_single_gradient_is_compared_with_the_consistent_ones(kind: str, decay: float) -> None:
    training = replace(SGD, local_steps=1, weight_decay=decay if kind == "gradient" else 0.0)
    seen = client(training, torch.float64, count=2)
    size = torch.cat([(seen[0].w1[n] - w).flatten() for n, w in seen[0].w0.items()]).abs()
    defense = Defense(clip=float(size.max()) / 4, sparsify=0.5)
    observation, unaware, aware = seen_through(seen, defense)
    losses = []
    for knowledge in (unaware, aware):
        setting = setting_of(observation, knowledge, SquaredDistance)
        surrogate = kind == "surrogate"
        objective = Surrogate(setting, alpha=0.0) if surrogate else GradientMatch(setting)
        losses.append(float(objective(seen[2], 1.0)))
    assert losses[1] < 1e-6 < 1e-3 < losses[0]


def test_an_update_shows_its_clipping_and_its_pruning() -> None:
    generator = torch.Generator().manual_seed(0)
    update = [0.01 * torch.randn(20_000, generator=generator), torch.zeros(0)]
    none, norm = Defense(), Defense(clip=0.5, clip_by="norm")
    assert estimated(update, none) == none
    for defense in (Defense(clip=0.012), Defense(sparsify=0.3), Defense(clip=0.02, sparsify=0.1)):
        found = estimated(defended(update, defense), none)
        assert found.clip == pytest.approx(defense.clip)
        assert found.sparsify == pytest.approx(defense.sparsify, abs=1e-3)
    # Clipping by norm is seen where it is known to be, and its bound is the update's norm.
    assert estimated(defended(update, norm), none) == none
    assert estimated(defended(update, norm), replace(norm, clip=9.0)).clip == pytest.approx(0.5)
    # Adam's steps are alike, and noise hides the zeros and the bound.
    signs = [0.001 * part.sign() for part in update]
    assert estimated(signs, none).clip > 0 and estimated(signs, none, adaptive=True).clip == 0
    noisy = Defense(sparsify=0.2, noise="gaussian", sigma=1e-4)
    assert estimated(update, noisy) == noisy


@pytest.mark.parametrize(
    "defense", [Defense(clip=1e-4), Defense(sparsify=0.9), Defense(clip=0.05, clip_by="norm")]
)
def test_ggl_estimates_the_defence_and_does_to_its_gradient_what_it_did(defense: Defense) -> None:
    seen = client(replace(SGD, batch_size=2, local_steps=1), count=2)
    observation, unaware, aware = seen_through(seen, defense)
    told = aware if defense.clip_by == "norm" else unaware  # its kind, see `estimated`
    losses = []
    for attack, knowledge in ((GGL(), unaware), (GGL(defense="estimated"), told)):
        parts = attack.parts(Task(observation, knowledge, load_flow("compact"), Budget()))
        losses.append(float(parts.matching(seen[2], 1.0)))
    assert losses[1] < 0.02 * losses[0], losses
    assert parts.chosen.keys() == {"clip", "sparsify"} and any(parts.chosen.values())


@pytest.mark.parametrize("relative", [False, True])
def test_the_ground_truth_is_at_zero_under_known_noise(relative: bool) -> None:
    seen = client(SGD, torch.float64)
    size = torch.cat([(seen[0].w1[n] - w).flatten() for n, w in seen[0].w0.items()])
    rms = float(size.square().mean().sqrt())
    defense = Defense(noise="gaussian", sigma=2.0 if relative else 2 * rms, relative=relative)
    observation, unaware, aware = seen_through(seen, defense)
    losses = []
    for knowledge in (unaware, aware):
        objective = objective_of(Trajectory, observation, knowledge)
        losses.append(float(objective(seen[2], 1.0)))
    assert losses[0] == pytest.approx(1 - 1 / math.sqrt(5), abs=0.05)
    assert abs(losses[1]) < 0.1


@pytest.mark.parametrize("share", ["clip", "sparsify"])
def test_knowledge_of_the_defence_improves_the_images(share: str) -> None:
    training = replace(SGD, batch_size=1, local_steps=2)
    seen = client(training, count=2, smooth=True)
    size = torch.cat([(seen[0].w1[n] - w).flatten() for n, w in seen[0].w0.items()]).abs()
    bound = float(size[size > 0].quantile(0.5))
    defense = Defense(clip=bound) if share == "clip" else Defense(sparsify=0.98)
    observation, unaware, aware = seen_through(seen, defense)
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (MEAN, STD))
    errors = []
    for knowledge in (unaware, aware):
        config = AttackConfig("sme", 120, options={"matching": "trajectory", "lr": 0.3})
        found = run_attack(observation, knowledge, config, PriorConfig(), seed=0)
        errors.append(float((found.images - (seen[2] * std + mean)).square().mean()))
    assert errors[1] < 0.8 * errors[0], errors


def test_knowledge_of_noise_improves_the_images() -> None:
    seen = client(replace(SGD, batch_size=1, local_steps=2), count=2, smooth=True)
    noisy = Defense(noise="gaussian", sigma=2.0, relative=True)
    observation, unaware, aware = seen_through(seen, noisy)
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (MEAN, STD))
    errors = []
    for knowledge in (unaware, aware):
        config = AttackConfig("flow_matching", 80, options={"flow": 0})
        found = run_attack(observation, knowledge, config, PriorConfig(), seed=0)
        errors.append(float((found.images - (seen[2] * std + mean)).square().mean()))
    assert errors[1] < 0.8 * errors[0], errors


def test_noise_without_fingerprints_is_fitted_too() -> None:
    observation, knowledge, _, _ = randomised(replace(ADAM, batch_size=2), dropout=0.5)
    w0, w1 = ({n: w.float() for n, w in side.items()} for side in (observation.w0, observation.w1))
    observation = replace(observation, w0=w0, w1=w1)
    config = AttackConfig("sme", 5, options={"matching": "fingerprints"})
    found = run_attack(observation, knowledge, config, PriorConfig(), seed=0)
    assert found.iterations == 5 and math.isfinite(found.losses[-1])
