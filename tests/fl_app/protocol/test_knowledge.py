"""What an attack may know: labels at three levels."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fl_app.protocol import LABEL_LEVELS, Knowledge, LocalTraining

LABELS = (7, 2, 7, 0, 2)
NOTHING = Knowledge("mlp", 10, (3, 8, 8), (0.5,) * 3, (0.25,) * 3, LocalTraining("sgd"))


def test_labels_are_granted_at_a_level_and_no_higher() -> None:
    by_step = NOTHING.granting("by-step", LABELS)
    assert (by_step.labels, by_step.labels_level) == (LABELS, "by-step")
    counts = by_step.granting("counts")
    assert counts.labels_level == "counts"
    # Nothing of the order is left: clients with the same counts look alike.
    assert counts.labels == (0, 2, 2, 7, 7) == NOTHING.granting("counts", LABELS[::-1]).labels
    assert by_step.granting("unknown") == counts.granting("unknown") == NOTHING
    # What an attack found of the order is not granted to the next one.
    inferred = replace(counts, labels=LABELS, labels_source="replay")
    assert inferred.granting("counts") == counts


def test_a_level_without_labels_is_refused() -> None:
    for level in LABEL_LEVELS[:2]:
        with pytest.raises(ValueError, match=f"'{level}', but there are no labels"):
            NOTHING.granting(level)
    with pytest.raises(ValueError, match="'given'; allowed: by-step, counts, unknown"):
        NOTHING.granting("given", LABELS)
