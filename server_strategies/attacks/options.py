"""The constants of an attack: fields of a dataclass that say what they are and what they may be."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import Field, dataclass, field, replace
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

from server_strategies.attacks.matching import OBJECTIVES
from server_strategies.attacks.matching.distance import DISTANCES

_KINDS: Mapping[type, tuple[tuple[type, ...], str]] = {
    bool: ((bool,), "true or false"),
    int: ((int,), "a whole number"),
    float: ((int, float), "a number"),
    str: ((str,), "a word"),
}


@dataclass(frozen=True)
class About:
    """What is to be said of an option, and its range; see `option`."""

    help: str
    low: float | None = None
    high: float | None = None
    allowed: tuple[str, ...] = ()


MATCHING = About("how the update is matched, see docs/matching.md", allowed=("auto", *OBJECTIVES))
DISTANCE = About(
    "distance of the simulated update from the observed one, see docs/matching.md",
    allowed=("auto", *DISTANCES),
)
STEPPED_LR = About("learning rate of Adam on normalised pixels; x0.1 at 3/8, 5/8 and 7/8", low=0)
COSINE_LR = About("peak learning rate of Adam on normalised pixels; falls by a half cosine", low=0)
TV = About("weight of total variation", low=0)
STATISTICS = About("weight of BatchNorm's statistics, where clients send them", low=0)


def option(default: Any, about: str | About, **limits: Any) -> Any:
    """Return a dataclass field for a constant of an attack.

    Parameters
    ----------
    default : bool, int, float, str or None
        None, where the annotation allows it: the attack chooses.
    about : str or About
        One line, with its unit.
    limits
        ``low`` and ``high``, the range with both ends; ``allowed``, a tuple of the words that
        it takes. By default any.
    """
    about = About(about) if isinstance(about, str) else about
    return field(default=default, metadata={"about": replace(about, **limits)})


@dataclass(frozen=True)
class Option:
    """A constant of an attack: what the log, validation, `--help` and the docs say of it.

    Attributes
    ----------
    name : str
    default : bool, int, float, str or None
    kind : type
    optional : bool
        Whether it may be None: the attack chooses.
    about : About
    """

    name: str
    default: Any
    kind: type
    optional: bool
    about: About

    @classmethod
    def of(cls, constant: Field[Any], annotation: Any) -> Option:
        """Return the option that a dataclass's field is.

        Raises
        ------
        ValueError
            If it is not made by `option`, or a setting can't have its type.
        """
        union = get_origin(annotation) in (Union, UnionType)
        kinds = get_args(annotation) if union else (annotation,)
        kind, *others = [each for each in kinds if each is not NoneType] or [NoneType]
        if others or kind not in _KINDS or "about" not in constant.metadata:
            raise ValueError(
                f"the constant {constant.name} is no option of an attack; allowed: "
                f"{constant.name}: TYPE = option(DEFAULT, HELP), with a TYPE among "
                f"{', '.join(each.__name__ for each in _KINDS)}, or one of these | None"
            )
        about = constant.metadata["about"]
        return cls(constant.name, constant.default, kind, NoneType in kinds, about)

    @property
    def help(self) -> str:
        """What it is, in one line."""
        return self.about.help

    @property
    def allowed(self) -> str:
        """What it may be, in words."""
        if self.about.allowed:
            return ", ".join(self.about.allowed)
        words = _KINDS[self.kind][1]
        if self.about.low is not None and self.about.high is not None:
            words += f" from {self.about.low:g} to {self.about.high:g}"
        elif self.about.low is not None:
            words += f", {self.about.low:g} or more"
        return words + ", or null" * self.optional

    def check(self, value: object) -> None:
        """Raise ValueError, with the name, the value and what is allowed, for any other value."""
        if value is None and self.optional:
            return
        right = isinstance(value, _KINDS[self.kind][0])
        right &= isinstance(value, bool) == (self.kind is bool)
        if right and isinstance(value, int | float):
            low = -math.inf if self.about.low is None else self.about.low
            high = math.inf if self.about.high is None else self.about.high
            right = math.isfinite(value) and low <= value <= high
        if not right or (self.about.allowed and value not in self.about.allowed):
            raise ValueError(f"{self.name} is {value!r}; allowed: {self.allowed}")
