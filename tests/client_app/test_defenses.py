"""Each defence against its formula on a real client's update, and as the mod of a ClientApp."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from helpers.command import flowleak
from helpers.federation import (
    LocalGrid,
    average,
    real_client,
    start,
    toy_client,
)
from torch import Tensor, nn
from torch.nn import functional as F

from client_app.app import _defended_as_configured
from client_app.defended_steps import check_defense, epsilon, kept_entries
from client_app.defenses import (
    defend,
    defended,
    distortion,
    noise_generator,
    update_bytes,
)
from client_app.training import choose_batches, normalise, train
from fl_app.audit.auditor import Auditor
from fl_app.audit.defense_effect import defense_advice
from fl_app.audit.leakage_log import LogLine, append_line
from fl_app.audit.truth import Truth, write_truth
from fl_app.config import ConfigError, WatchConfig, load_config
from fl_app.data import dataset_info
from fl_app.models import create_model
from fl_app.protocol import Defense, LocalTraining, Observation
from fl_app.runs.folder import create_run
from fl_app.server_app import _prepare, create_strategy
from fl_app.util.files import project_file
from server_strategies.honest_but_curious import HonestButCurious
from server_strategies.observations import ObservationStore

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
SGD = LocalTraining("sgd", lr=0.1, batch_size=2, local_steps=3)
Update = dict[str, Tensor]


def trained(training: LocalTraining = SGD, defense: Defense = Defense()) -> Update:  # noqa: B008
    """A real client's update."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand((6, 3, 8, 8), generator=generator)
    labels = torch.randint(0, 10, (6,), generator=generator)
    model = create_model("convnet", 10, (3, 8, 8), seed=0)
    w0 = {name: value.clone() for name, value in model.state_dict().items()}
    batches = choose_batches(6, training, generator)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        train(model, images, labels, batches, training, MEAN, STD, defense)
    return {name: value - w0[name] for name, value in model.state_dict().items()}


def generator(partition: int = 0, round_: int = 1) -> torch.Generator:
    return noise_generator(0, partition, round_)


def flat(update: Update) -> Tensor:
    return torch.cat([delta.flatten() for delta in update.values()])


UPDATE = trained()
LARGEST = flat(UPDATE).abs().max().item()


def test_clipping_by_value_and_by_norm() -> None:
    bound = LARGEST / 3
    sent = flat(defend(UPDATE, Defense(clip=bound), generator()))
    expected = [max(-bound, min(bound, value)) for value in flat(UPDATE).tolist()]
    torch.testing.assert_close(sent, torch.tensor(expected))
    length = flat(UPDATE).norm().item()
    sent = flat(defend(UPDATE, Defense(clip=length / 4, clip_by="norm"), generator()))
    torch.testing.assert_close(sent, flat(UPDATE) / 4)
    loose = defend(UPDATE, Defense(clip=2 * length, clip_by="norm"), generator())
    assert distortion(UPDATE, loose) == 0


def test_sparsifying_drops_the_smallest_nonzero_coordinates() -> None:
    before = flat(UPDATE)
    nonzero = int(before.count_nonzero())
    assert nonzero < len(before)  # a share of all coordinates would set no others to zero
    sent = flat(defend(UPDATE, Defense(sparsify=0.3), generator()))
    assert int(sent.count_nonzero()) == nonzero - math.floor(0.3 * nonzero)
    assert torch.equal(sent[sent != 0], before[sent != 0])
    assert before[(sent == 0) & (before != 0)].abs().max() <= sent[sent != 0].abs().min()


@pytest.mark.parametrize("kind", ["gaussian", "laplace"])
@pytest.mark.parametrize("relative", [False, True])
def test_noise_has_its_distribution(kind: str, relative: bool) -> None:
    defense = Defense(noise=kind, sigma=0.5, relative=relative)
    sent = defend(UPDATE, defense, generator())
    noise = flat(sent) - flat(UPDATE)
    sigma = 0.5 * (flat(UPDATE).square().mean().sqrt().item() if relative else 1)
    n = len(noise)
    assert abs(noise.mean()) < 5 * sigma / math.sqrt(n)
    assert noise.std() == pytest.approx(sigma, rel=0.02)
    kurtosis = {"gaussian": 3.0, "laplace": 6.0}[kind]  # distinguishes the two
    assert ((noise / sigma) ** 4).mean() == pytest.approx(kurtosis, rel=0.15)


def test_noise_is_new_for_every_tensor_client_and_round_and_repeats() -> None:
    zeros = {"a": torch.zeros(1000), "b": torch.zeros(1000)}
    defense = Defense(noise="gaussian", sigma=1.0)
    first = defend(zeros, defense, generator())
    assert abs(torch.dot(first["a"], first["b"])) / 1000 < 0.15
    again = defend(zeros, defense, generator())
    assert all(torch.equal(first[name], again[name]) for name in zeros)
    for place in ((1, 1), (0, 2)):
        other = defend(zeros, defense, generator(*place))
        assert abs(torch.dot(first["a"], other["a"])) / 1000 < 0.15


def test_quantising_rounds_to_the_format() -> None:
    sent = defend(UPDATE, Defense(quantize="bf16"), generator())
    error = (flat(sent) - flat(UPDATE)).abs()
    assert (error <= flat(UPDATE).abs() * 2**-8).all() and error.max() > 0
    sent = defend(UPDATE, Defense(quantize="int8"), generator())
    for name, delta in UPDATE.items():
        scale = delta.abs().max() / 127
        steps = sent[name] / scale
        torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-4)
        assert (sent[name] - delta).abs().max() <= scale * 0.5001
        assert steps.abs().max() == pytest.approx(127)
    zeros = {"a": torch.zeros(3)}
    assert torch.equal(defend(zeros, Defense(quantize="int8"), generator())["a"], zeros["a"])


def test_steps_act_in_their_order() -> None:
    all_of_them = Defense(
        clip=LARGEST / 2, sparsify=0.2, noise="laplace", sigma=0.1, relative=True, quantize="int8"
    )
    one_by_one = UPDATE
    for step in (
        Defense(clip=LARGEST / 2),
        Defense(sparsify=0.2),
        Defense(noise="laplace", sigma=0.1, relative=True),
        Defense(quantize="int8"),
    ):
        after = defend(one_by_one, step, generator())
        assert distortion(one_by_one, after) > 0, f"{step} does nothing"
        one_by_one = after
    assert torch.equal(flat(defend(UPDATE, all_of_them, generator())), flat(one_by_one))


def test_bytes_of_the_best_plain_encoding() -> None:
    dense = {"a": torch.ones(80), "b": torch.ones(20)}
    assert update_bytes(dense, "none") == (400, "float32 dense")
    assert update_bytes(dense, "bf16") == (200, "bf16 dense")
    assert update_bytes(dense, "int8") == (108, "int8 dense")  # a scale for each tensor
    half = {"a": torch.tensor([1.0, 0.0] * 50)}
    assert update_bytes(half, "none") == (50 * 4 + 13, "float32 bitmap")
    one = {"a": torch.zeros(1000).index_fill(0, torch.tensor([3]), 1.0)}
    assert update_bytes(one, "none") == (8, "float32 indices")


# --- within local training ------------------------------------------------------------


def test_dp_sgd_is_the_slow_loop_over_single_images(monkeypatch: pytest.MonkeyPatch) -> None:
    training, bound, multiplier = replace(SGD, batch_size=4, local_steps=2), 0.5, 0.7
    noises: list[Tensor] = []

    def known_noise(std: float, reference: Tensor, **_: object) -> Tensor:
        assert std == pytest.approx(bound * multiplier)
        noises.append(std * torch.randn(reference.shape, generator=source))
        return noises[-1]

    monkeypatch.setattr("opacus.optimizers.optimizer._generate_noise", known_noise)
    source = torch.Generator().manual_seed(5)
    update = trained(training, Defense(dp_clip=bound, dp_noise=multiplier))

    source_again = torch.Generator().manual_seed(0)
    images = torch.rand((6, 3, 8, 8), generator=source_again)
    labels = torch.randint(0, 10, (6,), generator=source_again)
    model = create_model("convnet", 10, (3, 8, 8), seed=0)
    w0 = [p.detach().clone() for p in model.parameters()]
    left = iter(noises)
    clipped = 0
    for batch in choose_batches(6, training, source_again):  # of four images, then of two
        total = [torch.zeros_like(p) for p in w0]
        for i in batch:
            x = normalise(images[i : i + 1], MEAN, STD)
            loss = F.cross_entropy(model(x), labels[i : i + 1])
            gradient = torch.autograd.grad(loss, list(model.parameters()))
            length = torch.cat([g.flatten() for g in gradient]).norm()
            clipped += bool(length > bound)
            for t, g in zip(total, gradient, strict=True):
                t += g * min(1.0, bound / length.item())
        with torch.no_grad():
            for p, t in zip(model.parameters(), total, strict=True):
                p -= training.lr * (t + next(left)) / len(batch)
    assert clipped
    for (_, delta), p, before in zip(update.items(), model.parameters(), w0, strict=True):
        torch.testing.assert_close(delta, p.detach() - before, rtol=1e-3, atol=1e-6)


def test_epsilon_falls_with_noise_and_grows_with_rounds() -> None:
    spent = epsilon(Defense(dp_clip=1.0, dp_noise=1.0), SGD, 100, 1)
    assert 0 < epsilon(Defense(dp_clip=1.0, dp_noise=2.0), SGD, 100, 1) < spent
    assert epsilon(Defense(dp_clip=1.0, dp_noise=1.0), SGD, 100, 5) > spent
    # One step on all images is the Gaussian mechanism, for which Renyi gives
    # eps = 1/(2 z^2) a + log(1/delta)/(a - 1) at most, for the best order a.
    once = replace(SGD, batch_size=100, local_steps=1)
    known = min(a / 2 / 9 + math.log(1e5) / (a - 1) for a in np.linspace(1.1, 63, 10_000))
    assert epsilon(Defense(dp_clip=1.0, dp_noise=3.0), once, 100, 1) <= known


def test_soteria_prunes_the_entries_that_reveal_most_of_the_image() -> None:
    model = create_model("mlp", 10, (3, 4, 4), seed=0)
    x = torch.rand((1, 3, 4, 4), requires_grad=True)
    r = model.features(x)  # type: ignore[operator]
    kept = kept_entries(r, x, 0.2)
    weight = dict(model.named_parameters())["fc1.weight"]
    score = (r / weight.norm(dim=1))[0]  # a ReLU unit's slope is its row of weights
    assert int((kept == 0).sum()) == math.floor(0.2 * 256)
    assert score[kept == 0].min() >= score[kept == 1].max()

    one_step = replace(SGD, local_steps=1)
    plain, pruned = trained(one_step), trained(one_step, Defense(soteria=0.2))
    for name, delta in plain.items():
        if name != "classifier.weight":  # Soteria leaves all else as it is
            torch.testing.assert_close(pruned[name], delta)
    columns = (pruned["classifier.weight"] == 0).all(0)
    assert int((columns & (plain["classifier.weight"] != 0).any(0)).sum()) == 40
    rest = ~columns
    torch.testing.assert_close(
        pruned["classifier.weight"][:, rest], plain["classifier.weight"][:, rest]
    )


# --- as Flower mods -------------------------------------------------------------------


class Normed(nn.Module):
    """A model with BatchNorm, which none of ours has."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.classifier = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.norm(x))


def strangers_app(*mods: object) -> ClientApp:
    """A ClientApp of someone else: adds 1 to all that it gets."""
    app = ClientApp(mods=list(mods))  # type: ignore[arg-type]

    @app.train()
    def add_one(msg: Message, context: Context) -> Message:
        sent = msg.content["arrays"].to_torch_state_dict()  # type: ignore[union-attr]
        content = {
            "arrays": ArrayRecord({k: v + 1 for k, v in sent.items()}),  # type: ignore[arg-type]
            "metrics": MetricRecord({"num-examples": 3}),
        }
        return Message(RecordDict(content), reply_to=msg)

    return app


def ask(app: ClientApp, weights: Update, partition: int = 0, round_: int = 1) -> Update:
    content = {
        "arrays": ArrayRecord(weights),  # type: ignore[arg-type]
        "config": ConfigRecord({"server-round": round_}),
    }
    message = Message(RecordDict(content), dst_node_id=7, message_type="train")  # type: ignore
    node = {"partition-id": partition}
    context = Context(1, 7, node, RecordDict(), {})  # type: ignore[arg-type]
    return app(message, context).content["arrays"].to_torch_state_dict()  # type: ignore


def test_a_stranger_defends_with_one_mod() -> None:
    weights = {k: v.clone() for k, v in Normed().state_dict().items()}
    noisy = Defense(clip=0.5, noise="gaussian", sigma=0.1)
    returned = ask(strangers_app(defended(noisy, seed=3)), weights)
    for name in ("norm.running_mean", "norm.running_var", "norm.num_batches_tracked"):
        assert torch.equal(returned[name], weights[name] + 1)  # passed on
    names = ["norm.weight", "norm.bias", "classifier.weight", "classifier.bias"]
    ones = {name: torch.ones_like(weights[name]) for name in names}
    expected = defend(ones, noisy, noise_generator(3, 0, 1))
    for name in names:
        torch.testing.assert_close(returned[name] - weights[name], expected[name])
    for other in (ask(strangers_app(defended(noisy, seed=3)), weights, 1),
                  ask(strangers_app(defended(noisy, seed=3)), weights, 0, 2),
                  ask(strangers_app(defended(noisy)), weights)):  # fmt: skip
        assert not torch.equal(other["norm.weight"], returned["norm.weight"])


def test_local_dp_is_flowers_and_its_formula() -> None:
    weights = {"a": torch.zeros(20_000)}
    defense = Defense(clip=2.0, clip_by="norm", local_dp=5.0, delta=1e-4)
    first = ask(strangers_app(defended(defense, seed=0)), weights)["a"]
    assert torch.equal(first, ask(strangers_app(defended(defense, seed=0)), weights)["a"])
    plain = defense.plain()
    assert first.std() == pytest.approx(plain.sigma, rel=0.05)
    assert plain.sigma == pytest.approx(4 / 5 * math.sqrt(2 * math.log(1.25e4)))
    ours = defend({"a": torch.ones(20_000)}, defense, generator())["a"]
    assert ours.std() == pytest.approx(plain.sigma, rel=0.05)


SETTINGS = "client.batch_size=2 client.local_steps=2"


def asked(overrides: str, partition: int = 0) -> Message:
    """What our own client returns."""
    info = dataset_info(load_config().dataset)
    model = create_model("convnet", info.num_classes, info.image_shape, seed=0)
    content = {
        "arrays": ArrayRecord(model.state_dict()),
        "config": ConfigRecord({"server-round": 1}),
    }
    message = Message(RecordDict(content), dst_node_id=7, message_type="train")  # type: ignore
    return real_client(partition, f"{SETTINGS} {overrides}")(message)


def test_a_machine_may_keep_the_noises_seed_to_itself() -> None:
    content = {
        "arrays": ArrayRecord({"a": torch.zeros(5)}),  # type: ignore[arg-type]
        "config": ConfigRecord({"server-round": 1}),
    }
    message = Message(RecordDict(content), dst_node_id=7, message_type="train")  # type: ignore
    # Relative noise of a zero update would be none.
    noisy = {"defense": "gaussian", "overrides": "defense.relative=false"}
    noises = []
    for own in ({}, {"noise-seed": 0}, {"noise-seed": 12}, {"noise-seed": "x"}):
        context = Context(1, 7, {"partition-id": 0, **own}, RecordDict(), noisy)  # type: ignore

        def answer(msg: Message, ctxt: Context) -> Message:
            return Message(RecordDict({"arrays": msg.content["arrays"]}), reply_to=msg)

        if own.get("noise-seed") == "x":
            with pytest.raises(ConfigError, match="noise-seed is 'x'; allowed: an int"):
                _defended_as_configured(message, context, answer)
            continue
        noises.append(arrays(_defended_as_configured(message, context, answer))["a"])
    assert torch.equal(noises[0], noises[1]) and not torch.equal(noises[0], noises[2])


def arrays(message: Message) -> Update:
    return message.content["arrays"].to_torch_state_dict()  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "overrides",
    [
        "defense.noise=gaussian defense.sigma=0.1",
        "defense.clip=0.0001",
        "defense.sparsify=0.5",
        "defense.quantize=bf16",
        "defense.local_dp=10 defense.clip=0.1 defense.clip_by=norm",
        "defense.soteria=0.1 client.batch_size=1 client.local_steps=1",
        "defense.dp_clip=0.1 defense.dp_noise=1",
    ],
)
def test_our_client_defends_as_configured_and_repeats(overrides: str) -> None:
    info = dataset_info(load_config().dataset)
    model = create_model("convnet", info.num_classes, info.image_shape, seed=0)
    w0 = model.state_dict()
    training = " ".join(word for word in overrides.split() if word.startswith("client."))
    plain, reply, again = (arrays(asked(o)) for o in (training, overrides, overrides))
    assert all(torch.equal(reply[name], again[name]) for name in reply)
    update = {name: plain[name] - w0[name] for name in w0}
    sent = {name: reply[name] - w0[name] for name in w0}
    assert distortion(update, sent) > 1e-3
    if "dp" not in overrides and "soteria" not in overrides:
        defense = load_config({"overrides": overrides}).defense
        expected = defend(update, defense, noise_generator(0, 0, 1))
        for name in w0:
            torch.testing.assert_close(reply[name], w0[name] + expected[name])


def test_dp_reports_its_epsilon_and_nothing_else_does() -> None:
    metrics = asked("defense.dp_clip=0.1 defense.dp_noise=1").content["metrics"]
    assert set(metrics) == {"num-examples", "loss", "epsilon"} and metrics["epsilon"] > 0  # type: ignore
    assert "epsilon" not in asked("").content["metrics"]


def test_the_server_takes_a_dp_clients_reply_and_averages_its_epsilon() -> None:
    overrides = f"{SETTINGS} defense.dp_clip=0.1 defense.dp_noise=1"
    config = load_config({"overrides": f"{overrides} strategy.fraction_evaluate=0"})
    info = dataset_info(config.dataset)
    model = create_model("convnet", info.num_classes, info.image_shape, seed=0)
    grid = LocalGrid([real_client(client, overrides) for client in range(2)])
    result = create_strategy(config).start(grid, ArrayRecord(model.state_dict()), num_rounds=2)
    first, second = (result.train_metrics_clientapp[r]["epsilon"] for r in (1, 2))
    assert isinstance(first, float) and isinstance(second, float) and 0 < first < second


# --- secure aggregation ---------------------------------------------------------------


def test_under_secure_aggregation_the_server_sees_the_sum_alone(tmp_path: Path) -> None:
    seen: list[Observation] = []
    skipped: list[tuple[int, int, str]] = []
    strategy = HonestButCurious(
        average(),
        watch=WatchConfig(clients=[0]),
        on_observation=seen.append,
        on_skipped=lambda *facts: skipped.append(facts),
        secagg=True,
    )
    clients = [toy_client(0.3, 2), toy_client(0.1, 0, count=6), toy_client(0.2, 1, raises="off")]
    averaged = start(strategy, clients, 1).to_torch_state_dict()
    (total,) = seen
    assert (total.clients, total.nodes, total.num_examples) == ((0, 2), (101, 100), 8)
    assert total.examples == (6, 2)
    assert [facts[:2] for facts in skipped] == [(1, 102)]
    for name, value in averaged.items():
        torch.testing.assert_close(total.w1[name], value)  # as FedAvg makes it
    torch.testing.assert_close(total.w1["bias"], torch.full((2,), (0.1 * 6 + 0.3 * 2) / 8))

    store = ObservationStore(tmp_path)
    store.save(total)
    again = store.load(total.id)
    assert (again.clients, again.nodes, again.examples) == ((0, 2), (101, 100), (6, 2))
    assert again.client == -1


def test_a_sums_truth_is_that_of_its_clients_one_after_another(tmp_path: Path) -> None:
    overrides = f"runs_dir={tmp_path} audit.labels=by-step"
    config = load_config({"defense": "secagg", "overrides": overrides})
    config = replace(config, client=replace(config.client, batch_size=2))
    known = config.knowledge(dataset_info(config.dataset))
    auditor = Auditor(tmp_path, config, replace(known, image_shape=(3, 4, 4), num_classes=10))
    images = torch.rand(5, 3, 4, 4)
    total = Observation(
        {}, {}, 5, 1, node=0, client=-1, nodes=(9, 4), clients=(0, 1), examples=(2, 3)
    )
    write_truth(tmp_path, Truth(images[:2], (7, 8), ((0,), (1,)), 1, node=9))
    assert not auditor.has_truth(total)
    with pytest.raises(ValueError, match=r"audit\.labels is by-step, but"):
        auditor.grant(total)
    write_truth(tmp_path, Truth(images[2:], (1, 2, 3), ((0, 1), (2,), (0, 1)), 1, node=4))
    assert auditor.has_truth(total) and auditor.grant(total).labels == (7, 8, 1, 2, 3)
    assert auditor.grant(total).granting("counts").labels == (1, 2, 3, 7, 8)  # of all together
    whole = auditor.truth(total)
    assert whole is not None and torch.equal(whole.images, images)
    assert whole.batches == ((0, 2, 3), (1, 4), (2, 3))


# --- what it bought -------------------------------------------------------------------


def run_with(folder: Path, name: str, defense: str, psnr: float, accuracy: float) -> Path:
    """A run's folder with one scored attack."""
    config = load_config({"defense": defense, "overrides": f"runs_dir={folder} name={name}"})
    run = create_run(config)
    score = {"mean": psnr, "low": None, "high": None, "baseline": 12}
    line = LogLine(
        1, "5", 0, "sme", "ok", "counts", metrics={"psnr": score}, defense=str(config.defense)
    )
    append_line(run / "leakage.jsonl", line)
    rounds = [{"round": 1, "train": {}, "evaluate": {"accuracy": accuracy}}]
    (run / "training.json").write_text(json.dumps(rounds))
    return run


def test_advice_says_what_a_defence_bought_and_cost(tmp_path: Path) -> None:
    run = run_with(tmp_path, "noisy", "gaussian", 14.5, 0.38)
    alone = defense_advice(run)
    assert "14.5 dB, 2.5 dB above the mean colour (12.0 dB). No undefended run" in alone
    plain = run_with(tmp_path, "plain", "none", 21.0, 0.4)
    assert defense_advice(plain) == ""
    assert defense_advice(run) == (
        "Defence noise=gaussian sigma=1 relative=true (known to the attacker): mean PSNR 14.5 dB, "
        "undefended 21.0 dB (run plain), the mean colour 12.0 dB: it bought 6.5 dB; "
        "it cost 2.0 points of accuracy (38.0% for 40.0%)."
    )
    useless = run_with(tmp_path, "clipped", "clip", 21.0, 0.41)
    assert "it bought nothing; it cost no accuracy" in defense_advice(useless)
    shown = flowleak("show", "noisy", "--runs-dir", str(tmp_path))
    assert "Defence: noise=gaussian sigma=1 relative=true, known to the attacker." in shown
    assert "it bought 6.5 dB" in shown


# --- what is refused ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("defense.sigma=-1", "defense.sigma is -1.0; allowed: 0 or more"),
        ("defense.sigma=1", "sigma is 1.0; allowed: 0 without noise"),
        ("defense.sparsify=1.5", "sparsify is 1.5; allowed: 0 to less than 1"),
        ("defense.noise=pink", "noise is 'pink'; allowed: none, gaussian, laplace"),
        ("defense.dp_clip=1", "dp_noise is 0.0; allowed: more than 0 with dp_clip"),
        ("defense.local_dp=1", "allowed above 0 only with clip above 0 and clip_by=norm"),
        ("defense.dp_clip=1 defense.dp_noise=1 defense.soteria=0.1", "allowed with dp_clip: 0"),
        ("audit.defense=perhaps", "defense is 'perhaps'; allowed: given, unknown"),
        (
            "defense.dp_clip=1 defense.dp_noise=1 client.max_grad_norm=1",
            r"defense.dp_clip is 1.0; allowed with client.max_grad_norm 1.0: 0",
        ),
    ],
)
def test_bad_defences_are_refused_before_the_run(overrides: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _prepare({"overrides": overrides}, simulated=True)


@pytest.mark.parametrize(
    "defense",
    [Defense(dp_clip=1.0, dp_noise=1.0), Defense(clip=1.0, clip_by="norm", local_dp=1.0)],
)
def test_batch_norm_is_refused_with_what_to_do_instead(defense: Defense) -> None:
    with pytest.raises(ValueError, match=r"(dp_clip|local_dp) is 1\.0; .*use model norm group"):
        check_defense(defense, SGD, Normed())
    check_defense(Defense(noise="gaussian", sigma=1.0), SGD, Normed())


NAMES = sorted(file.stem for file in project_file("conf/defense").glob("*.yaml"))


@pytest.mark.parametrize("name", NAMES)
def test_every_defence_of_conf_runs_and_is_known_unless_hidden(name: str) -> None:
    config, knowledge, _ = _prepare({"defense": name}, simulated=True)
    assert knowledge.defense == config.defense.plain()
    assert (str(config.defense) == "none") == (name == "none")
    hidden = {"defense": name, "overrides": "audit.defense=unknown"}
    assert _prepare(hidden, simulated=True)[1].defense == Defense()
