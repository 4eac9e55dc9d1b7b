"""What was trained on what: data, model, clients, how good the model was. Free of torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from fl_app.report.source import Source, plural
from fl_app.runs.folder import DESCRIBED


def setting(source: Source) -> Iterator[tuple[str, str]]:
    """Yield what was trained on what, and how good the model was, by name."""
    config = source.config
    data = source.settings.get("data")
    facts = data if isinstance(data, Mapping) else {}
    shape, classes = facts.get("image_shape"), facts.get("num_classes")
    of = f"{classes} classes" if isinstance(classes, int) else ""
    if isinstance(shape, list) and shape:
        of += f", images {'x'.join(map(str, shape))}"
    if source.described:
        yield "Federation", f"the user's own; model {source.setting(DESCRIBED, 'model')}"
        yield "Data", of or "not said"
        yield "Local training", _described_words(source)
    elif config:
        split = "" if config.dataset.split == "train" else f" ({config.dataset.split} split)"
        yield "Data", ", ".join(filter(None, [f"{config.dataset.name}{split}", of]))
        norm = f", {config.model.norm} norm" if config.model.norm not in ("", "none") else ""
        head = f", head {config.model.head}" if config.model.head else ""
        yield "Model", f"{config.model.name}{norm}{head}"
        yield "Clients", f"{plural(config.num_clients, 'client')}, {config.dataset.partitioner}"
        yield "Local training", _training_words(config.client)
        yield "Rounds", f"{config.rounds}, {config.strategy.name}"
    elif model := source.setting("model", "name"):
        yield "Model", model
    known = [(round_, share) for round_, share in source.accuracy.items() if share is not None]
    attacked = {line["round"] for line in source.lines}
    shown = [each for each in known if each[0] + 1 in attacked or each[0] in attacked]
    shown = [shown[0], shown[-1]] if len(shown) > 2 else shown
    words = ", ".join(f"{share:.1%} after round {round_}" for round_, share in shown)
    yield "Accuracy", words or "of the global model: not measured"


def _described_words(source: Source) -> str:
    """Return a described client's training in words; of a damaged description what is there."""
    where = (DESCRIBED, "training")
    said = {key: source.setting(*where, key) or "-" for key in ("optimizer", "lr", "batch_size")}
    steps, epochs = (source.setting(*where, f"local_{unit}") for unit in ("steps", "epochs"))
    count, unit = (epochs or "-", "epoch") if steps in ("", "0") else (steps, "step")
    return (
        f"{said['optimizer']}, lr {said['lr']}, batches of {said['batch_size']}, "
        f"{count} {unit}{'' if count == '1' else 's'} a round"
    )


def _training_words(client: Any) -> str:
    length = plural(client.local_steps, "step")
    if not client.local_steps:
        length = plural(client.local_epochs, "epoch")
    return (
        f"{client.optimizer}, lr {client.lr:g}, {length} of "
        f"{plural(client.batch_size, 'image')} a round"
    )
