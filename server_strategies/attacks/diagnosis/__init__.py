"""What is likely wrong where an attack fails, from what the server can measure.

Each sign is one function, which returns a sentence or None. It is told where an absolute rule
holds, and the update's statistic also lies clearly beyond those of healthy clients of the same
model and training. These are simulated, see `Healthy`, where a rule holds and not before. Absolute
thresholds are measured on ConvNet and MLP, untrained, Adam and SGD, K = 1 to 20, B = 1 to 32, on
CIFAR-10. `flowleak bench diagnosis` counts false alarms and faults that are found.

Some faults are left out because an update does not show them: a wrong normalisation;
clipping of the whole update's norm; noise in a model without dead units; noise of a
quarter of Adam's rate or more, unless it changes a weight more than Adam can; a
converged model under Adam, whose steps hide the gradient's size until it is near eps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fl_app.protocol import Knowledge, Observation
from server_strategies.attacks.diagnosis import signs
from server_strategies.attacks.diagnosis.calibration import Healthy
from server_strategies.attacks.diagnosis.update import Update
from server_strategies.attacks.matching.defended import noise_part
from server_strategies.attacks.matching.distance import CosineDistance


def diagnose(
    observation: Observation,
    knowledge: Knowledge,
    losses: Sequence[float],
    alpha: float | None,
    at_truth: Callable[[float], float] = CosineDistance.at_truth,
    device: str = "cpu",
) -> tuple[str, ...]:
    """Return sentences on what is likely wrong; none for a healthy update that was matched.

    It draws no random number of torch's global state.

    Parameters
    ----------
    observation : Observation
    knowledge : Knowledge
    losses : sequence of float
        The matching loss by iteration.
    alpha : float or None
        A surrogate's alpha at the end; None: the objective has none.
    at_truth : callable
        The loss at the ground truth, by the noise's share of the update's square; see
        `Distance.at_truth`.
    device : str
        The torch device to simulate healthy clients on.
    """
    training = knowledge.client
    update = Update.of(observation, training)
    if not update.size.any():
        return ("the update is zero: the client returned what it was sent",)
    healthy = Healthy(observation, knowledge, device)
    rounding = signs.rounded(update, healthy)
    # Coarse rounding is noise too, but has a better name.
    sigma = 0.0 if rounding else signs.noise(update, healthy)
    clamp = signs.clipped(update, healthy)
    sparse = signs.sparse(update, healthy)
    # Sizes and layers show the training only where nothing has changed the update since.
    changed = rounding or sigma or clamp or sparse
    optimiser = None if changed else signs.wrong_optimiser(update, healthy)
    found = (
        rounding,
        signs.noisy(sigma),
        clamp,
        sparse,
        optimiser,
        None if changed else signs.frozen(update, healthy),
        None if changed or optimiser else signs.scaled(update, healthy, losses),
        None if clamp else signs.converged(update, healthy),  # what is clamped is small
        signs.batch_norm(observation, training),
        signs.hardly_depends(healthy, losses),
        signs.unmatched(losses, at_truth(noise_part(update.size, sigma))),
        signs.flat(losses),
        signs.edge_alpha(alpha, update),
    )
    return tuple(sentence for sentence in found if sentence)
