"""Outcomes of attacks that never ran, for tests of what surrounds them."""

from __future__ import annotations

from fl_app.config import AttackConfig
from fl_app.protocol import Observation, Reconstruction


def pretended(
    observation: Observation, attack: AttackConfig, matching: str = "none"
) -> Reconstruction:
    """Return a reconstruction of one image, which is taken from the update's weights ``x``."""
    return Reconstruction(
        attack=attack.name,
        matching=matching,
        images=observation.w1["x"],
        labels=(0,),
        losses=(0.5,),
        iterations=1,
        seconds=0.0,
        peak_memory=0,
        flops=0,
        stop_reason="pretended",
    )
