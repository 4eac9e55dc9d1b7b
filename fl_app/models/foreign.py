"""Models that are a user's own: any module that maps images to logits."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from fl_app.models.extensions import MaskDropout
from fl_app.protocol import Knowledge

_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)


def foreign_model(knowledge: Knowledge, seed: int | None = None) -> nn.Module:
    """Return a user's model, so that it can be simulated.

    It is called on normalised images (B, C, H, W) and returns logits, shape (B, num_classes),
    or an object that holds them as ``logits``. Its dropout layers become `MaskDropout`, whose
    masks an attack can fit.

    Parameters
    ----------
    knowledge : Knowledge
        Whose `model` is a callable or a module.
    seed : int, optional
        Restarts what initialises its weights, without touching torch's global state.

    Raises
    ------
    ValueError
        If it can't be made, takes no such images, returns no logits of the classes, or draws
        random numbers in training other than by its dropout layers.
    """
    name = knowledge.model_name
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        try:
            model = _made(knowledge.model)
        except Exception as error:  # a user's code may raise anything
            raise ValueError(
                f"the model {name} can't be made: {type(error).__name__}: {error}"
            ) from error
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        _adapt(model, name, knowledge)
    return model


def own_model(knowledge: Knowledge, logits: bool = True) -> nn.Module:
    """Return a model as its user makes it, dropout and all.

    Parameters
    ----------
    knowledge : Knowledge
        Whose `model` is a callable or a module.
    logits : bool
        Whether it returns logits alone.
    """
    model = _made(knowledge.model)
    if logits:
        _wrap(model)
    return model


def _made(model: Any) -> nn.Module:
    made = copy.deepcopy(model) if isinstance(model, nn.Module) else model()
    if not isinstance(made, nn.Module):
        raise TypeError(f"it returned {type(made).__name__}, not an nn.Module")
    return made.float()


def _adapt(model: nn.Module, name: str, knowledge: Knowledge) -> None:
    """Make a model return logits and draw nothing but masks, in place, or say why it can't."""
    kept = {key: value.clone() for key, value in model.state_dict().items()}
    probe = torch.randn(2, *knowledge.image_shape, dtype=next(model.parameters()).dtype)
    model.train()
    shape = "x".join(map(str, knowledge.image_shape))
    with torch.no_grad():
        try:
            widths = _mask_dropouts(model, probe)
            logits = _logits(model(probe))
        except Exception as error:  # a user's code may raise anything
            raise ValueError(
                f"the model {name} can't be called on images of {shape}: "
                f"{type(error).__name__}: {error}"
            ) from error
        if logits is None or logits.shape != (2, knowledge.num_classes):
            got = type(logits).__name__ if logits is None else f"shape {tuple(logits.shape)}"
            raise ValueError(
                f"the model {name} returned {got} for 2 images; needed: logits of shape "
                f"(2, {knowledge.num_classes})"
            )
        _wrap(model)
        masks = [layer for layer in model.modules() if isinstance(layer, MaskDropout)]
        for layer, width in zip(masks, widths, strict=True):
            layer.given = torch.ones(2, width)
        model.load_state_dict(kept)
        first = model(probe)
        model.load_state_dict(kept)
        again = model(probe)
        for layer in masks:
            layer.given = None
    model.load_state_dict(kept)
    if not torch.equal(first, again):
        raise ValueError(
            f"the model {name} draws random numbers in training (such as stochastic depth, or "
            "dropout as a function): its steps can't be simulated. Make it without, or with "
            "nn.Dropout layers"
        )


def _mask_dropouts(model: nn.Module, probe: Tensor) -> list[int]:
    """Put a `MaskDropout` in the place of each dropout layer; return the numbers of each mask."""
    layers = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, _DROPOUTS) and layer.p > 0
    }
    shapes: dict[str, torch.Size] = {}
    hooks = [
        layer.register_forward_hook(_shape_into(shapes, name)) for name, layer in layers.items()
    ]
    model(probe)
    for hook in hooks:
        hook.remove()
    widths = []
    for name, layer in layers.items():
        if name not in shapes:
            raise TypeError(f"its layer {name} does not run in training")
        if not isinstance(layer, nn.Dropout):
            raise TypeError(f"its layer {name} is {type(layer).__name__}; allowed: nn.Dropout")
        width = shapes[name][1:].numel()
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, MaskDropout(width, layer.p, own=True))
        widths.append(width)
    return widths


def _shape_into(shapes: dict[str, torch.Size], name: str) -> Callable[..., None]:
    def keep(_: nn.Module, __: Any, output: Tensor) -> None:
        if name in shapes:
            raise TypeError(f"its layer {name} runs twice; allowed: one dropout layer a place")
        shapes[name] = output.shape

    return keep


def _logits(output: Any) -> Tensor | None:
    found = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    return found if isinstance(found, Tensor) else None


class _Adapted(nn.Module):
    """Returns logits alone, takes any memory format, and can be differentiated twice.

    A base class before the model's own, so that a copy calls itself.
    """

    def forward(self, *inputs: Any, **named: Any) -> Any:
        # Torch's fused attention kernels have no second derivative.
        with _Equivalents(), sdpa_kernel(SDPBackend.MATH):
            output = super().forward(*inputs, **named)
        return output if isinstance(output, Tensor) else output.logits


def _wrap(model: nn.Module) -> None:
    """Put `_Adapted` before a model's class, in place."""
    kind = type(model)
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    model.__class__ = type(kind.__name__, (_Adapted, kind), names)


class _Equivalents(TorchFunctionMode):
    """Puts what attacks can use in the place of a function of the same values.

    ``x.view(-1, 400)`` takes only what is contiguous, which channels-last activations are not.
    Torch's hard sigmoid has no second derivative.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        if func is Tensor.view and not isinstance(args[1], torch.dtype):
            func = Tensor.reshape
        elif func is F.hardsigmoid:
            return F.relu6(args[0] + 3) / 6
        return func(*args, **(kwargs or {}))
