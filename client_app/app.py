"""The ClientApp: real clients that train locally and know nothing of attacks."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from flwr.app import (
    ArrayRecord,
    ConfigRecord,
    Context,
    Message,
    MetricRecord,
    MetricRecordValues,
    RecordDict,
)
from flwr.clientapp import ClientApp
from flwr.clientapp.typing import ClientAppCallable
from torch import Tensor, nn

from client_app.defended_steps import epsilon
from client_app.defenses import defended
from client_app.training import choose_batches, evaluate, in_training_order, local_seed, train
from fl_app.audit.truth import Truth, write_truth
from fl_app.config import Config, ConfigError, load_config
from fl_app.data import ImageSet, dataset_info, load_evaluation, load_partition
from fl_app.models import known_model
from fl_app.protocol import DatasetInfo
from fl_app.util.origin import origin
from fl_app.util.ray_guard import guard_ray
from fl_app.util.text import reason

# Flower imports this module before it starts a simulation's Ray, whose workers inherit both.
guard_ray()
origin()

app = ClientApp()
_log = logging.getLogger("flwr")  # Flower streams it to the user


def _partition(context: Context, config: Config) -> tuple[int, int]:
    """Return which partition of how many this client holds; by default one for each client."""
    values = []
    for key, default in (("partition-id", None), ("num-partitions", config.num_clients)):
        value = context.node_config.get(key, default)
        if type(value) is not int or value < 0:
            raise ConfigError(
                f"node config {key} is {value!r}; allowed: an int, as in "
                "flower-supernode --node-config 'partition-id=0 num-partitions=4'"
            )
        values.append(value)
    return values[0], values[1]


def _config(context: Context) -> Config:
    """Return the run's configuration, with this machine's own path of the data."""
    config = load_config(context.run_config)
    source = context.node_config.get("data-path")
    if source is None:
        return config
    return replace(config, dataset=replace(config.dataset, source=str(source)))


def _agreed(info: DatasetInfo, settings: ConfigRecord) -> DatasetInfo:
    """Return the facts of the data with the server's normalisation, which all clients share.

    A folder of images has its own, which differs between machines.
    """
    if "mean" not in settings:
        return info
    values: dict[str, Any] = dict(settings)
    ours, theirs = [info.num_classes, *info.image_shape], list(values["classes-and-shape"])
    if ours != theirs:
        raise ConfigError(
            f"this client's data has classes and image shape {ours}; "
            f"allowed, as on the server: {theirs}"
        )
    return replace(info, mean=tuple(values["mean"]), std=tuple(values["std"]))


def _received_model(
    msg: Message, config: Config, info: DatasetInfo, device: torch.device
) -> nn.Module:
    """Return the global model that the server sent."""
    model = known_model(config.knowledge(info))
    arrays = msg.content["arrays"]
    assert isinstance(arrays, ArrayRecord)
    model.load_state_dict(arrays.to_torch_state_dict())
    return model.to(device)


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _defended_as_configured(msg: Message, ctxt: Context, call_next: ClientAppCallable) -> Message:
    """Defend the update as the run's configuration says; a mod, for the list of mods is fixed."""
    config = _config(ctxt)
    return defended(config.defense, _noise_seed(ctxt, config))(msg, ctxt, call_next)


def _noise_seed(context: Context, config: Config) -> int:
    """Return the seed of a defence's noise: the machine's own, else the run's.

    The server knows the run's, and with it the noise.
    """
    value = context.node_config.get("noise-seed", config.seed)
    if type(value) is not int or value < 0:
        raise ConfigError(f"node config noise-seed is {value!r}; allowed: an int of 0 or more")
    return value


@app.train(mods=[_defended_as_configured])
def train_locally(msg: Message, context: Context) -> Message:
    """Train the global model on this client's images and return its weights."""
    config = _config(context)
    info = dataset_info(config.dataset)
    partition, num_partitions = _partition(context, config)
    data = load_partition(config.dataset, partition, num_partitions, config.seed)
    settings = msg.content["config"]
    assert isinstance(settings, ConfigRecord)
    info = _agreed(info, settings)
    round_ = int(settings["server-round"])  # type: ignore[arg-type]

    seed = local_seed(config.seed, partition, round_)
    generator = torch.Generator().manual_seed(seed)
    order, batches = in_training_order(
        choose_batches(len(data.labels), config.client, generator),
    )
    images, labels = data.images[order].float() / 255, data.labels[order]
    device = _device()
    model = _received_model(msg, config, info, device)
    # A model with randomness of its own (dropout) repeats too.
    with torch.random.fork_rng():
        torch.manual_seed(local_seed(_noise_seed(context, config), partition, round_))
        steps = [torch.tensor(batch) for batch in batches]
        loss = train(
            model, images.to(device), labels.to(device), steps, config.client,
            info.mean, info.std, config.defense,
        )  # fmt: skip
    truth = Truth(images, tuple(labels.tolist()), batches, round_, msg.metadata.dst_node_id)
    if config.audit.truth is not False and settings.get("audit-dir"):
        _leave_truth(Path(str(settings["audit-dir"])), truth, made=True)
    if "truth-dir" in context.node_config:  # only the machine's owner sets it
        folder = Path(str(context.node_config["truth-dir"])) / str(context.run_id)
        _leave_truth(folder, truth, made=False)

    metrics: dict[str, MetricRecordValues] = {"num-examples": len(order), "loss": loss}
    if config.defense.dp_clip:
        metrics["epsilon"] = epsilon(config.defense, config.client, len(data.labels), round_)
    reply = RecordDict(
        {
            "arrays": ArrayRecord(_on_cpu(model)),
            "metrics": MetricRecord(metrics),
            "client": ConfigRecord({"partition-id": partition}),
        }
    )
    return Message(reply, reply_to=msg)


def _on_cpu(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.cpu() for name, tensor in model.state_dict().items()}


def _leave_truth(folder: Path, truth: Truth, made: bool) -> None:
    """Leave the private batch in an auditor's folder, never in a Message.

    Where the server names it, only in one that an auditor made for it: on a machine
    that is not the auditor's, a server can't make a client write its images anywhere.
    A client that can't write it trains as without an audit.

    Parameters
    ----------
    folder : Path
    truth : Truth
    made : bool
        Whether the auditor has to have made it.
    """
    try:
        if made and not (folder / "truth").is_dir():
            raise FileNotFoundError(f"{folder} is no auditor's folder on this machine")
        write_truth(folder, truth)
    except Exception as error:  # whatever it is, the audit never changes the training
        _log.warning("no truth is left: %s", reason(error))


@app.evaluate()
def evaluate_globally(msg: Message, context: Context) -> Message:
    """Evaluate the global model on this client's share of the test images."""
    config = _config(context)
    settings = msg.content["config"]
    assert isinstance(settings, ConfigRecord)
    info = _agreed(dataset_info(config.dataset), settings)
    partition, num_partitions = _partition(context, config)
    test = load_evaluation(config.dataset)
    share = ImageSet(test.images[partition::num_partitions], test.labels[partition::num_partitions])
    model = _received_model(msg, config, info, _device())
    loss, accuracy = evaluate(model, share, info.mean, info.std)
    metrics = MetricRecord({"num-examples": len(share.labels), "loss": loss, "accuracy": accuracy})
    return Message(RecordDict({"metrics": metrics}), reply_to=msg)
