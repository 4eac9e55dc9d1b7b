"""Local training, the client and the curious server, without Ray."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import (
    ArrayRecord,
    ConfigRecord,
    Message,
    RecordDict,
)
from flwr.serverapp.strategy import (
    DifferentialPrivacyServerSideFixedClipping,
    FedAdam,
    FedAvg,
    Strategy,
)
from helpers.federation import (
    NODES,
    LocalGrid,
    average,
    real_client,
    start,
    toy_client,
    watch,
)
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from client_app.training import (
    choose_batches,
    evaluate,
    in_training_order,
    local_seed,
    normalise,
    train,
)
from fl_app.audit.truth import read_truth
from fl_app.config import ConfigError, WatchConfig, load_config
from fl_app.data import ImageSet, dataset_info
from fl_app.models import create_model
from fl_app.protocol import LocalTraining, Observation
from fl_app.server_app import create_strategy, wait_for_nodes
from fl_app.util.reading import BrokenFileError
from server_strategies.honest_but_curious import HonestButCurious
from server_strategies.observations import ObservationStore

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


# --- local training -------------------------------------------------------------------


def test_batches_are_shuffled_passes_as_the_server_assumes() -> None:
    training = LocalTraining(batch_size=4, local_steps=5)
    batches = choose_batches(10, training, torch.Generator().manual_seed(0))
    assert [len(batch) for batch in batches] == [4, 4, 2, 4, 4]
    assert sorted(torch.cat(batches[:3]).tolist()) == list(range(10))
    order, renumbered = in_training_order(batches)
    assert [tuple(order[list(batch)].tolist()) for batch in renumbered] == [
        tuple(batch.tolist()) for batch in batches
    ]
    assert renumbered[:3] == training.batches(10)[:3]  # the first pass, numbered by first use


def test_epochs_train_on_every_image_newly_shuffled() -> None:
    training = LocalTraining(batch_size=4, local_steps=0, local_epochs=2)
    batches = choose_batches(8, training, torch.Generator().manual_seed(0))
    first, second = torch.cat(batches[:2]).tolist(), torch.cat(batches[2:]).tolist()
    assert sorted(first) == sorted(second) == list(range(8)) and first != second


def test_normalise_takes_bytes_and_keeps_float64() -> None:
    images = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (MEAN, STD))
    expected = (images.double() / 255 - mean) / std
    torch.testing.assert_close(normalise(images, MEAN, STD), expected.float())
    torch.testing.assert_close(normalise(images.double() / 255, MEAN, STD), expected)


def _images(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand((count, 3, 8, 8), generator=generator, dtype=torch.float64)
    return images, torch.randint(0, 10, (count,), generator=generator)


def test_training_is_adam_as_kingma_and_ba_wrote_it() -> None:
    training = LocalTraining(lr=0.01, batch_size=2, local_steps=3)
    images, labels = _images(6)
    batches = [torch.tensor(batch) for batch in training.batches(6)]
    model = create_model("convnet", 10, (3, 8, 8), seed=0).double()
    slow = create_model("convnet", 10, (3, 8, 8), seed=0).double()
    loss = train(model, images, labels, batches, training, MEAN, STD)

    weights = list(slow.parameters())
    first = [torch.zeros_like(w) for w in weights]
    second = [torch.zeros_like(w) for w in weights]
    mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (MEAN, STD))
    losses = []
    for step, batch in enumerate(batches, start=1):
        x = (images[batch] - mean) / std
        error = F.cross_entropy(slow(x), labels[batch])
        losses.append(error.item())
        gradients = torch.autograd.grad(error, weights)
        with torch.no_grad():
            for w, m, v, g in zip(weights, first, second, gradients, strict=True):
                m.mul_(0.9).add_(0.1 * g)
                v.mul_(0.999).add_(0.001 * g * g)
                w -= 0.01 * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
    assert loss == pytest.approx(np.mean(losses), rel=1e-6)
    for trained, expected in zip(model.parameters(), weights, strict=True):
        torch.testing.assert_close(trained, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    "training",
    [
        LocalTraining(optimizer="sgd", lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
        LocalTraining(optimizer="adamw", weight_decay=0.1),
    ],
)
def test_training_repeats_to_the_bit(training: LocalTraining) -> None:
    images, labels = _images(5)
    runs = []
    for _ in range(2):
        model = create_model("convnet", 10, (3, 8, 8), seed=0)
        generator = torch.Generator().manual_seed(local_seed(0, 1, 2))
        batches = choose_batches(5, training, generator)
        train(model, images.float(), labels, batches, training, MEAN, STD)
        runs.append(model.state_dict())
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])
    assert len({local_seed(0, 1, 2), local_seed(0, 2, 1), local_seed(1, 1, 2)}) == 3


def test_evaluation_is_its_formula() -> None:
    class Brightness(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unused = nn.Parameter(torch.zeros(1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            level = x.mean(dim=(1, 2, 3))
            return torch.stack([-level, level], dim=1)

    images = torch.tensor([0, 255, 255, 0], dtype=torch.uint8).view(4, 1, 1, 1).expand(4, 3, 2, 2)
    data = ImageSet(images, torch.tensor([0, 1, 0, 0]))
    loss, accuracy = evaluate(Brightness(), data, (0.5,) * 3, (0.5,) * 3)
    right, wrong = np.log1p(np.exp(-2)), np.log1p(np.exp(2))
    assert accuracy == 0.75
    assert loss == pytest.approx((3 * right + wrong) / 4, rel=1e-6)


# --- the federation, in this process --------------------------------------------------


STRATEGIES: dict[str, Callable[[], Strategy]] = {
    "fedavg": FedAvg,
    "fedadam": FedAdam,
    "dp": lambda: DifferentialPrivacyServerSideFixedClipping(FedAvg(), 0.1, 0.05, NODES),
}


@pytest.mark.parametrize("name", STRATEGIES)
def test_watching_changes_no_bit_of_the_training(name: str) -> None:
    clients = [toy_client(0.1 * (i + 1), i) for i in range(NODES)]
    seen: list[Observation] = []
    alone = start(STRATEGIES[name](), clients).to_numpy_ndarrays()
    watched = start(watch(STRATEGIES[name](), seen, []), clients).to_numpy_ndarrays()
    assert all(np.array_equal(a, b) for a, b in zip(alone, watched, strict=True))
    assert len(seen) == 2 * NODES
    for observation in seen:  # what the client sent, before the server clipped it
        shift = 0.1 * (observation.client + 1)
        torch.testing.assert_close(
            observation.w1["bias"] - observation.w0["bias"], torch.full((2,), shift)
        )


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"arrays": {"bias": torch.tensor([0.0, torch.nan])}}, "bias holds NaN"),
        ({"arrays": {"bias": torch.zeros(3)}}, "bias has shape (3,); expected (2,)"),
        ({"arrays": {"extra": torch.zeros(1)}}, "adds arrays: extra"),
        ({"count": 0}, "num-examples is 0"),
        ({"raises": "no memory"}, "the client failed: no memory"),
    ],
)
def test_bad_update_is_skipped_with_its_reason(changes: dict[str, object], reason: str) -> None:
    clients = [toy_client(0.1, 0), toy_client(0.2, 1, **changes)]
    strategies: list[Strategy] = [average()]
    seen: list[Observation] = []
    skipped: list[tuple[int, int, str]] = []
    strategies.append(watch(strategies[0], seen, skipped))
    outcomes = []
    for strategy in strategies:  # aggregation goes on as the inner strategy decides
        try:
            outcomes.append([a.tolist() for a in start(strategy, clients, 1).to_numpy_ndarrays()])
        except Exception as error:
            outcomes.append([type(error).__name__])
    assert str(outcomes[0]) == str(outcomes[1])
    assert [observation.client for observation in seen] == [0]
    assert [facts[:2] for facts in skipped] == [(1, 101)]
    assert reason in skipped[0][2]


def test_an_error_while_observing_does_not_reach_training() -> None:
    def fail(*_: object) -> None:
        raise OSError("disk full")

    strategy = HonestButCurious(FedAvg(), watch=WatchConfig(), on_observation=fail, on_skipped=fail)
    clients = [toy_client(0.1, i) for i in range(NODES)]
    assert len(start(strategy, clients)) == 2


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"clients": [1, 102]}, [(r, c) for r in (1, 2) for c in (1, 2)]),  # partition, node
        ({"rounds": [2]}, [(2, 0), (2, 1), (2, 2)]),
    ],
)
def test_watch_picks_clients_and_rounds(
    options: dict[str, object], expected: list[tuple[int, int]]
) -> None:
    seen: list[Observation] = []
    start(watch(FedAvg(), seen, [], **options), [toy_client(0.1, i) for i in range(NODES)])
    assert sorted((o.round, o.client) for o in seen) == expected


def test_an_audits_settings_are_sent_in_watched_rounds_only() -> None:
    sent: list[dict[str, object]] = []

    def client(message: Message) -> Message:
        if message.metadata.message_type == "train":
            sent.append(dict(message.content["config"]))  # type: ignore[arg-type]
        return toy_client(0.1, 0)(message)

    strategy = HonestButCurious(
        average(),
        watch=WatchConfig(rounds=[2]),
        on_observation=lambda _: None,
        on_skipped=lambda *_: None,
        settings={"audit-dir": "here"},
    )
    start(strategy, [client], rounds=3, lr="1")
    plain = [{"server-round": round_, "lr": "1"} for round_ in (1, 2, 3)]
    assert sent == [plain[0], {**plain[1], "audit-dir": "here"}, plain[2]]


def test_a_share_is_the_same_clients_every_round() -> None:
    seen: list[Observation] = []
    start(watch(FedAvg(), seen, [], clients=0.5), [toy_client(0.1, i) for i in range(NODES)])
    rounds = [{o.client for o in seen if o.round == r} for r in (1, 2)]
    assert rounds[0] == rounds[1] and len(rounds[0]) == 2


def test_a_client_that_can_not_leave_its_truth_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    info = dataset_info(load_config().dataset)
    model = create_model("convnet", info.num_classes, info.image_shape, seed=0)
    arrays = ArrayRecord(model.state_dict())
    (tmp_path / "truth").mkdir()

    def ask(**settings: str | int) -> Message:
        content = {"arrays": arrays, "config": ConfigRecord({"server-round": 1, **settings})}
        message = Message(RecordDict(content), dst_node_id=7, message_type="train")
        return real_client(1, "client.local_steps=2")(message)

    alone = ask().content["arrays"]
    for error in (OSError(28, "No space left on device"), SafetensorError("I/O error: no space")):

        def full(*_: object, error: Exception = error, **__: object) -> None:
            raise error

        monkeypatch.setattr("fl_app.util.tensors.save_file", full)
        reply = ask(**{"audit-dir": str(tmp_path)})
        assert "no truth is left: " in caplog.text and "o space" in caplog.text
        for name, array in reply.content["arrays"].items():  # type: ignore[union-attr]
            assert array.data == alone[name].data  # type: ignore[index]
        caplog.clear()
    assert not any((tmp_path / "truth").iterdir())


def test_client_trains_as_configured_and_leaves_truth_only_when_asked(tmp_path: Path) -> None:
    overrides = "client.batch_size=2 client.local_steps=3"
    config = load_config({"overrides": overrides})
    info = dataset_info(config.dataset)
    model = create_model("convnet", info.num_classes, info.image_shape, seed=0)
    arrays = ArrayRecord(model.state_dict())

    def ask(**settings: str | int) -> Message:
        content = {"arrays": arrays, "config": ConfigRecord({"server-round": 1, **settings})}
        message = Message(RecordDict(content), dst_node_id=7, message_type="train")
        return real_client(1, overrides)(message)

    ask()
    assert not list(tmp_path.iterdir())
    ask(**{"audit-dir": str(tmp_path)})
    assert not list(tmp_path.iterdir())  # it is no auditor's folder
    (tmp_path / "truth").mkdir()
    reply = ask(**{"audit-dir": str(tmp_path)})
    assert reply.content["client"]["partition-id"] == 1  # type: ignore[index]
    assert reply.content["metrics"]["num-examples"] == 6  # type: ignore[index]
    truth = read_truth(tmp_path, 1, 7)
    assert truth is not None and truth.batches == ((0, 1), (2, 3), (4, 5))
    train(
        model,
        truth.images,
        torch.tensor(truth.labels),
        [torch.tensor(batch) for batch in truth.batches],
        config.client,
        info.mean,
        info.std,
    )
    returned = reply.content["arrays"].to_torch_state_dict()  # type: ignore[union-attr]
    for name, value in model.state_dict().items():
        torch.testing.assert_close(returned[name], value)


def test_batch_norms_statistics_are_averaged_round_after_round() -> None:
    overrides = "model.name=resnet8 model.norm=batch client.local_steps=2"
    config = load_config({"overrides": overrides})
    info = dataset_info(config.dataset)
    model = create_model("resnet8", info.num_classes, info.image_shape, seed=0)
    seen: list[Observation] = []
    skipped: list[tuple[int, int, str]] = []
    strategy = watch(create_strategy(config), seen, skipped)
    clients = [real_client(partition, overrides) for partition in range(NODES)]
    arrays = ArrayRecord(model.state_dict())
    result = strategy.start(LocalGrid(clients), arrays, 2)
    assert (len(seen), skipped) == (2 * NODES, [])
    count = "body.1.num_batches_tracked"
    for observation in seen:
        assert observation.w0[count].dtype == observation.w1[count].dtype == torch.int64
        assert observation.w1[count] - observation.w0[count] == 2
    final = result.arrays.to_torch_state_dict()
    model.load_state_dict(final)
    name = "body.1.running_var"
    torch.testing.assert_close(final[name], torch.stack([o.w1[name] for o in seen[NODES:]]).mean(0))


def test_other_number_of_clients_is_refused() -> None:
    grid = LocalGrid([toy_client(0.1, 0)])
    with pytest.raises(ConfigError, match=r"num_clients is 4, but 1 clients are connected"):
        wait_for_nodes(grid, 4, patience=0.3)
    wait_for_nodes(grid, 1, patience=0.3)


# --- the store of observations --------------------------------------------------------


def test_observation_survives_the_store(tmp_path: Path) -> None:
    weights = {"a.b": torch.randn(2, 3), "count": torch.tensor(3)}
    observation = Observation(weights, weights, num_examples=5, round=2, node=2**63 + 1, client=0)
    store = ObservationStore(tmp_path)
    store.save(observation)
    (tmp_path / "observations" / "notes.txt").write_text("not an observation")
    assert store.ids() == [observation.id]
    loaded = store.load(observation.id)
    assert (loaded.num_examples, loaded.round, loaded.node, loaded.client) == (5, 2, 2**63 + 1, 0)
    assert all(torch.equal(loaded.w1[name], weights[name]) for name in weights)
    with pytest.raises(FileNotFoundError, match=observation.id):
        store.load("round-0001-node-1")


def test_clients_of_a_round_share_the_file_of_what_they_were_sent(tmp_path: Path) -> None:
    store, sent = ObservationStore(tmp_path), {"w": torch.randn(3)}
    seen = [
        Observation({"w": w}, {"w": torch.randn(3)}, 1, round_, node, 0)
        for round_, node, w in ((1, 7, sent["w"]), (1, 8, sent["w"]), (2, 7, sent["w"] + 1))
    ]
    for each in seen:
        store.save(each)
    files = sorted(path.name[:5] for path in (tmp_path / "observations").iterdir())
    assert files == ["round"] * 3 + ["sent-"] * 2
    for each in seen:
        assert torch.equal(ObservationStore(tmp_path).load(each.id).w0["w"], each.w0["w"])


def test_an_observation_without_its_sent_weights_is_broken(tmp_path: Path) -> None:
    store, weights = ObservationStore(tmp_path), {"w": torch.zeros(1)}
    seen = Observation(weights, weights, 1, 1, 7, 0)
    store.save(seen)
    next((tmp_path / "observations").glob("sent-*")).unlink()
    with pytest.raises(BrokenFileError, match="sent-"):
        store.load(seen.id)


def test_an_observation_of_an_older_version_holds_what_was_sent(tmp_path: Path) -> None:
    facts = {"num_examples": 1, "round": 1, "node": 7, "client": 0}
    (tmp_path / "observations").mkdir()
    save_file(
        {"w0.w": torch.zeros(2), "w1.w": torch.ones(2)},
        tmp_path / "observations" / "round-0001-node-7.safetensors",
        {"observation": json.dumps(facts)},
    )
    loaded = ObservationStore(tmp_path).load("round-0001-node-7")
    assert loaded.update["w"].tolist() == [1, 1]


@pytest.mark.parametrize(
    "id_", ["../config", "round-0001-node-1/../../x", "round-0001-node-1\n", ""]
)
def test_store_refuses_ids_that_it_did_not_make(tmp_path: Path, id_: str) -> None:
    with pytest.raises(ValueError, match="observation id"):
        ObservationStore(tmp_path).load(id_)


def test_a_failed_client_leaves_a_line_also_where_ids_are_watched() -> None:
    skipped: list[tuple[int, int, str]] = []
    clients = [toy_client(0.1, 0), toy_client(0.2, 1, raises="no data")]
    start(watch(average(), [], skipped, clients=[1]), clients, 1)
    assert skipped == [(1, 101, "the client failed: no data")]
