"""No search: what a regression predicts is the result."""

from __future__ import annotations

from fl_app.protocol import Budget, Observation, Reconstruction
from server_strategies.attacks.accounting import Report, Run
from server_strategies.attacks.optimise import Parts
from server_strategies.attacks.regression.objective import Regression


def predict(
    parts: Parts, observation: Observation, budget: Budget, report: Report | None = None
) -> Reconstruction:
    """Return what a regression predicts, in one iteration, however many the budget holds.

    Parameters
    ----------
    parts : Parts
        Of which the matching counts, a `Regression`.
    observation, budget, report
        See `optimise`.

    Raises
    ------
    AttackError
        If the distance of the predicted images is not finite.
    """
    matching = parts.matching
    assert isinstance(matching, Regression)
    run = Run(matching, observation, budget, report, counted=1)
    with run.counted(0.0):
        images = matching.predict()
        distance = matching(images, 0.0)
    run.note(distance)
    run.end("predicted")
    return run.found(images)
