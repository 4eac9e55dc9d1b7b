"""The models that a federation trains: one file a family, one registry (`fl_app.registry`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from fl_app.models.extensions import extend
from fl_app.models.family import Family
from fl_app.models.foreign import foreign_model
from fl_app.models.norms import batch_norms, set_batch_norm
from fl_app.protocol import Knowledge
from fl_app.registry import MODELS


def create_model(
    name: str,
    num_classes: int,
    image_shape: tuple[int, int, int],
    seed: int | None = None,
    norm: str = "",
    *,
    head: str = "",
    precode: int = 0,
    dropout: float = 0.0,
) -> nn.Module:
    """Return a freshly initialised model.

    Every model has `features(x)`, the activations before the classifier, of
    shape (batch, width), and `classifier`, the last layer, which takes them; it is
    called on normalised images (batch, C, H, W).

    Parameters
    ----------
    name : str
        A name in `MODELS`.
    num_classes : int
        2 or more.
    image_shape : tuple of int
        (C, H, W).
    seed : int, optional
        Initialises deterministically without touching torch's global state.
    norm : {"", "batch", "group", "layer", "none"}
        By what its activations are normalised, see `chosen_norm`.
    head : {"", "gap", "flatten", "mlp"}
        What is between its last feature maps and its classifier, see `chosen_head`.
    precode, dropout : int, float
        See `extensions.extend`. With them `classifier` is a sequence that ends in
        the last layer.

    Raises
    ------
    ValueError
        If no model has this name, it can't be normalised so or have this head, it does not
        fit the image size or the number of classes, or an extension's number is out of range.
    """
    norm, head = chosen_norm(name, norm), chosen_head(name, head)
    headed = {"head": head} if head else {}
    if num_classes < 2:
        raise ValueError(f"num_classes is {num_classes}; allowed: 2 or more")
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        model = MODELS[name].build(num_classes, image_shape, norm, **headed)
        extend(model, precode, dropout)
    return model


def chosen_norm(name: str, norm: str = "") -> str:
    """Return what a model's activations are normalised by; "" is its family's default.

    Raises
    ------
    ValueError
        If no model has this name, or it can't be normalised so.
    """
    family = _family(name)
    if norm and norm not in family.norms:
        why = f" ({family.reason})" if family.reason else ""
        raise ValueError(f"norm is {norm!r}; allowed for {name}: {', '.join(family.norms)}{why}")
    return norm or family.norms[0]


def chosen_head(name: str, head: str = "") -> str:
    """Return what is before a model's classifier; "" is its family's default, or no choice.

    Raises
    ------
    ValueError
        If no model has this name, or it can't have this head.
    """
    heads = _family(name).heads
    if head and head not in heads:
        allowed = f"allowed for {name}: {', '.join(heads)}" if heads else f"{name} has no choice"
        raise ValueError(f"head is {head!r}; {allowed}")
    return head or next(iter(heads), "")


def _family(name: str) -> Family:
    if name not in MODELS:
        raise ValueError(MODELS.unknown(name))
    family: Family = MODELS[name]
    return family


def known_model(knowledge: Knowledge, seed: int | None = None) -> nn.Module:
    """Return the model that server and clients have agreed on, with weights of its own.

    Parameters
    ----------
    knowledge : Knowledge
    seed : int, optional
        See `create_model`.

    Raises
    ------
    ValueError
        See `create_model`, and `foreign_model` where the model is a user's own.
    """
    if not isinstance(knowledge.model, str):
        model = foreign_model(knowledge, seed)
        if knowledge.precode or knowledge.dropout:
            raise ValueError("precode and dropout are allowed with flowleak's own models")
        return model
    return create_model(
        knowledge.model,
        knowledge.num_classes,
        knowledge.image_shape,
        seed,
        knowledge.norm,
        head=knowledge.head,
        precode=knowledge.precode,
        dropout=knowledge.dropout,
    )


def model_features(knowledge: Knowledge, model: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return what a model makes of normalised images before its classifier: (N, ...) each.

    Of flowleak's own models `features`; of others, what goes into the last linear layer, or
    their logits where there is none.

    Parameters
    ----------
    knowledge : Knowledge
        Whose model it is.
    model : nn.Module
        In evaluation mode.
    """
    if isinstance(knowledge.model, str):
        return model.features  # type: ignore[return-value]
    last = model.get_submodule(classifier(model)) if classifier(model) else None

    def features(images: Tensor) -> Tensor:
        seen: list[Tensor] = []

        def keep(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            seen.append(inputs[0])

        hook = last.register_forward_pre_hook(keep) if last else None
        logits: Tensor = model(images)
        if hook:
            hook.remove()
        return (seen[-1] if seen else logits).flatten(1)

    return features


def classifier(model: nn.Module) -> str:
    """Return the name of a model's last linear layer, which has an output a class; "": none."""
    linear = [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)]
    return linear[-1] if linear else ""


def clients_model(knowledge: Knowledge, w0: Mapping[str, Tensor]) -> nn.Module:
    """Return the model in the client's mode, with the weights that it was sent.

    Running statistics stay as they are however often it is called: where a client trains with its
    batches' own they do not enter its updates, and otherwise they do not change.

    Parameters
    ----------
    knowledge : Knowledge
        With the client's training.
    w0 : mapping of str to Tensor
        The weights that the client was sent. The model has copies of its own.

    Raises
    ------
    ValueError
        See `create_model`.
    """
    model = known_model(knowledge)
    received = {name: value for name, value in w0.items() if name in model.state_dict()}
    model.load_state_dict(received, strict=False)
    # What is not sent, such as the weights beside an adapter, is frozen: no parameter of it.
    for name, weight in list(model.named_parameters()):
        if name not in w0:
            place, _, own = name.rpartition(".")
            module = model.get_submodule(place)
            delattr(module, own)
            module.register_buffer(own, weight.detach())
    set_batch_norm(model, knowledge.client.batch_norm)
    for _, layer in batch_norms(model):
        layer.track_running_stats = False
    return model
