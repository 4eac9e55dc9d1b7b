"""What the server does not know of a client, and an attack works out itself."""

from __future__ import annotations

from dataclasses import replace

from fl_app.protocol import Knowledge, Observation
from server_strategies.attacks.labels import infer_labels
from server_strategies.attacks.matching.guess import guess_training


def infer(
    observation: Observation, knowledge: Knowledge, device: str = "cpu", labels: str = "auto"
) -> Knowledge:
    """Return the knowledge with the client's training and labels filled in from its update.

    What is known stays as it is. The training is guessed by `guess_training`, the
    labels are counted by `infer_labels`; where that can't be they stay unknown, and
    an objective fits them beside the images.

    Parameters
    ----------
    observation : Observation
    knowledge : Knowledge
    device : str
        The torch device to work on.
    labels : str
        How unknown labels are counted, see `infer_labels`; ``fitted``: not at all.

    Raises
    ------
    ValueError
        If the training is missing and the update does not tell it, as a zero one.
    """
    inferred = list(knowledge.inferred)
    if knowledge.training is None:
        guess = guess_training(observation)
        t = guess.training
        told = f"{t.optimizer}, lr {t.lr:.2g}, {t.local_steps} steps of {t.batch_size}"
        surely = "" if guess.confident else ", unsure"
        inferred.append(f"training guessed ({told}{surely}): {guess.reason}")
        knowledge = replace(knowledge, training=t)
    if knowledge.labels is None and labels == "fitted":
        knowledge = replace(knowledge, labels_source="fitted")
    elif knowledge.labels is None:
        try:
            estimate = infer_labels(labels, observation, knowledge, device)
        except ValueError as error:
            inferred.append(f"labels fitted beside the images: {error}")
            knowledge = replace(knowledge, labels_source="fitted")
        else:
            inferred.append(f"labels recovered by {estimate.reason}")
            knowledge = replace(knowledge, labels=estimate.labels, labels_source=estimate.method)
    return replace(knowledge, inferred=tuple(inferred))
