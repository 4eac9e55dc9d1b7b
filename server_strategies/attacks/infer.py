"""Inferring from an update what the server does not know of a client."""

from __future__ import annotations

from dataclasses import replace

from fl_app.models import classifier, known_model
from fl_app.protocol import Knowledge, Observation
from server_strategies.attacks.labels import infer_labels, order_labels, spread_labels
from server_strategies.attacks.matching.guess import guess_training


def infer(
    observation: Observation, knowledge: Knowledge, device: str = "cpu", labels: str = "auto"
) -> Knowledge:
    """Return the knowledge with the client's training and labels inferred from its update.

    What is known stays as it is. The training is guessed by `guess_training`, the
    labels are inferred by `infer_labels`, or their order where their counts are known, by
    `order_labels`. Where labels can't be inferred they stay unknown, and the matching
    objective fits them jointly with the images; where their order can't, every step
    starts with its share of each class.

    Parameters
    ----------
    observation : Observation
    knowledge : Knowledge
    device : str
        The torch device to work on.
    labels : str
        How unknown labels are inferred, see `infer_labels`; ``fitted``: not at all.

    Raises
    ------
    ValueError
        If the training is unknown and can't be guessed, as from a zero update.
    """
    inferred = list(knowledge.inferred)
    if knowledge.training is None:
        guess = guess_training(observation, classifier(known_model(knowledge)))
        t = guess.training
        words = f"{t.optimizer}, lr {t.lr:.2g}, {t.local_steps} steps of {t.batch_size}"
        words += "" if guess.confident else ", unsure"
        inferred.append(f"training guessed ({words}): {guess.reason}")
        knowledge = replace(knowledge, training=t)
    if _sums_one_step(observation, knowledge):
        inferred.append("every client made one step of sgd: their sum is one step on all images")
        knowledge = replace(
            knowledge,
            training=replace(knowledge.client, local_steps=1, batch_size=observation.num_examples),
            defense=replace(knowledge.defense, secagg=False),
        )
    if knowledge.labels is None and labels == "fitted":
        knowledge = replace(knowledge, labels_source="fitted")
    elif knowledge.labels is None:
        try:
            estimate = infer_labels(labels, observation, knowledge, device)
        except ValueError as error:
            inferred.append(f"labels fitted jointly with the images: {error}")
            knowledge = replace(knowledge, labels_source="fitted")
        else:
            inferred.append(f"labels inferred by {estimate.reason}")
            knowledge = replace(knowledge, labels=estimate.labels, labels_source=estimate.method)
    if _lacks_order(observation, knowledge):
        try:
            estimate = order_labels(observation, knowledge, device)
        except ValueError as error:
            inferred.append(f"labels spread over the local steps at first: {error}")
            assert knowledge.labels is not None
            knowledge = replace(knowledge, labels=spread_labels(sorted(knowledge.labels)))
        else:
            inferred.append(f"labels assigned to the local steps by {estimate.reason}")
            source = knowledge.labels_source
            source = estimate.method if source == "given" else source
            knowledge = replace(knowledge, labels=estimate.labels, labels_source=source)
    return replace(knowledge, inferred=tuple(inferred))


def _sums_one_step(observation: Observation, knowledge: Knowledge) -> bool:
    """Return whether an update is a sum of several clients' single steps of SGD.

    With weights n_c / N the mean of the clients' mean gradients is that of all images.
    """
    training = knowledge.client
    return (
        knowledge.defense.secagg
        and training.optimizer == "sgd"
        and not training.max_grad_norm
        and not training.beyond("label_smoothing", "trainable", "proximal")
        and sum(observation.examples) == observation.num_examples
        and all(len(training.batches(count)) == 1 for count in observation.examples)
    )


def _lacks_order(observation: Observation, knowledge: Knowledge) -> bool:
    """Return whether the labels are known, but nothing yet of their local steps."""
    if knowledge.labels is None or knowledge.labels_level == "by-step":
        return False
    if knowledge.labels_source == "simulate" or knowledge.defense.secagg:
        return False
    return len(set(knowledge.client.batches(observation.num_examples))) > 1
