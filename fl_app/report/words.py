"""What surrounds the figures: who attacks, what it was given, what was not tested, what to do.

Free of torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fl_app.audit.exposure import FEW_ITERATIONS, hardly_searched
from fl_app.config import Config
from fl_app.protocol import Defense
from fl_app.registry import ATTACKS, OURS
from fl_app.report.model import Assumption, Measure
from fl_app.report.source import Source, plural, rounds_words
from fl_app.runs.advice import Advice, as_it_is, best, privacy_words

_MOST_ROUNDS = 100_000  # that are looked through; a damaged file may say any number

NOT_MEASURED = "not measured on this run"

_LABELS: Mapping[str, tuple[str, Any]] = {
    "by-step": ("which label belongs to which local step; no server knows that", "generous"),
    "counts": (
        "how many images of each class, as published attacks assume; a server has to infer it",
        "generous",
    ),
    "unknown": ("nothing; what the attack says of labels it inferred from the update", "realistic"),
}


def assumptions(source: Source) -> Iterator[Assumption]:
    """Yield who the attacker is and what it was given, each thing in words and marked."""
    config, lines = source.config, source.lines
    yield Assumption(
        "Attacker",
        "the server, or whoever runs it: honest but curious. It follows the protocol, and reads "
        "what it gets anyway",
        "realistic",
    )
    if any(line["clients"] for line in lines):
        yield Assumption(
            "Sees", "the sum over a round's clients alone (secure aggregation)", "realistic"
        )
    else:
        yield Assumption("Sees", "each client's own weights before and after training", "realistic")
    for level in dict.fromkeys(line["labels"] for line in lines):
        words, mark = _LABELS.get(level, (level, "generous"))
        yield Assumption("Labels", words, mark)
    yield from _model_state(source)
    if config:
        yield from _protocol(config)
    yield Assumption(
        "Number of images",
        "as the client reports it; Flower's clients do, for the weighted mean",
        "realistic",
    )
    yield Assumption(
        "Normalisation",
        "mean and standard deviation of the data set, which are part of the app's code",
        "realistic",
    )


def _model_state(source: Source) -> Iterator[Assumption]:
    """Yield what the model had learnt when its updates were attacked."""
    rounds = sorted({line["round"] for line in source.lines if line["status"] != "skipped"})
    start = source.setting("start_from")
    if 1 in rounds and not start and not source.described:
        words = "in round 1 not trained yet: its updates leak most. Later rounds leak less"
        yield Assumption("Model", words, "generous")
    if start:
        yield Assumption("Model", f"trained already (from {start})", "realistic")
    later = [round_ for round_ in rounds if round_ > 1]
    if later:
        known = [source.accuracy.get(round_ - 1) for round_ in later]
        shares = sorted(share for share in known if share is not None)
        words = f"trained by the rounds before it in {rounds_words(later)}"
        if shares:
            low, high = f"{shares[0]:.0%}", f"{shares[-1]:.0%}"
            words += f", accuracy {low if low == high else f'{low} to {high}'}"
        yield Assumption("Model", words, "realistic")


def _protocol(config: Config) -> Iterator[Assumption]:
    if config.audit.training == "given":
        words = "optimiser, learning rate, steps and batch size: the server hands out the app"
        yield Assumption("Local training", words, "realistic")
    else:
        yield Assumption("Local training", "not known: the attack guesses it", "strict")
    if config.defense != Defense():
        if config.audit.defense == "given":
            words = f"known to the attacker: {config.defense}. It is part of the protocol"
            yield Assumption("Defence", words, "realistic")
        else:
            words = f"not known to the attacker: {config.defense}. A server would know it"
            yield Assumption("Defence", words, "strict")
    budget = config.attack.seconds and f"{config.attack.seconds:g} seconds"
    budget = budget or plural(config.attack.iterations, "iteration")
    words = f"at most {budget} an update; a real attacker has as long as it likes"
    yield Assumption("Time", words, "strict")


def untested(source: Source) -> Iterator[str]:
    """Yield what the run says nothing about."""
    lines, config = source.lines, source.config
    if source.attacks:
        ours = [name for name, entry in ATTACKS.entries.items() if entry.package == OURS]
        left = [name for name in ours if name not in source.attacks]
        if left:
            yield f"Attacks that were not run: {', '.join(left)}."
    if config and not source.described:
        yield from _unwatched(source, config)
    failed = sum(line["status"] == "failed" for line in lines)
    skipped = sum(line["status"] == "skipped" for line in lines)
    missed = [f"{plural(failed, 'attack')} failed"] * bool(failed)
    missed += [f"{plural(skipped, 'update')} not attacked"] * bool(skipped)
    if missed:
        yield f"{', '.join(missed)}."
    if hardly := [line for line in lines if hardly_searched(line)]:
        images = plural(sum(line["num_examples"] for line in hardly), "image")
        yield (
            f"{images} of {plural(len(hardly), 'update')}, for which an attack's time held fewer "
            f"than {FEW_ITERATIONS} iterations: take them as not tried by it."
        )
    yield (
        "Servers that change the model, the messages or the sampling to leak more; servers with "
        "clients of their own; whoever listens on the network or reads the server's disk."
    )
    if config and config.defense.secagg:
        yield "The protocol of secure aggregation itself: the sum was made without it."
    yield (
        "Everything but images: whose data it was (membership), what all images of a client have "
        "in common (properties), what the trained model remembers."
    )


def _unwatched(source: Source, config: Config) -> Iterator[str]:
    rounds = {line["round"] for line in source.lines}
    last = min(config.rounds, max([*rounds, *source.accuracy], default=0))
    missing = {*range(1, min(last, _MOST_ROUNDS) + 1)} - rounds
    if missing and rounds:
        yield f"Updates of {rounds_words(missing)}."
    clients = {line["client"] for line in source.lines if line["client"] is not None}
    left = config.num_clients - len(clients)
    if clients and left > 0 and not any(line["clients"] for line in source.lines):
        yield f"{plural(left, 'client')} of {config.num_clients}, which were not watched."


_CHOSEN = "Tried on this run by flowleak advise. A longer attack may find more."

# What it is, what to know of it, and how the change of `flowleak advise` begins that tries it.
_MEASURES: Sequence[tuple[str, str, str]] = (
    (
        "Aggregate securely: the server sees sums alone",
        "It takes away a single client's update. A sum over few images can still leak.",
        "secure aggregation",
    ),
    (
        "Train with DP-SGD on the clients, and state epsilon",
        "A guarantee against every attacker, as strong as its epsilon is small; it costs accuracy.",
        "DP-SGD at epsilon",
    ),
    (
        "Make an update of more images: larger batches, epochs",
        "More images share an update's numbers. Clients with little data stay exposed.",
        "all images of a round in one batch",
    ),
    (
        "Add noise of ten times the update's size",
        "The most that cost less than two points of accuracy in our benchmark.",
        "noise 10 times",
    ),
    (
        "Send updates as bfloat16 or int8",
        "Cost no accuracy there, and the attack on Adam 7 dB. No protection alone.",
        "updates in bfloat16",
    ),
    (
        "Start from a model trained on public data",
        "The updates of an untrained model leak most.",
        "",
    ),
)


def measures(advice: Sequence[Advice]) -> tuple[Measure, ...]:
    """Return what helps: the best of what `flowleak advise` tried, then what does so in general.

    docs/defenses.md has the figures of the latter; what was tried has those of this run.
    """
    now, chosen = as_it_is(advice), best(advice)
    measured = [Measure(_capital(row.change), _CHOSEN, _effect(row, now)) for row in chosen]
    for words, why, change in _MEASURES:
        tried = next((row for row in advice if change and row.change.startswith(change)), None)
        if tried is None or not tried.of:
            measured.append(Measure(words, why, NOT_MEASURED))
        elif tried not in chosen:
            measured.append(Measure(words, why, _effect(tried, now)))
    return tuple(measured[: len(_MEASURES)])  # the first screen is one page


def _capital(words: str) -> str:
    return words[:1].upper() + words[1:]


def _effect(row: Advice, now: Advice | None) -> str:
    words = f"{row.by} {row.leaked} of {row.of}"
    words += f", as it is {now.leaked} of {now.of}" if now else ""
    if row.accuracy is not None:
        words += f"; accuracy {row.accuracy:.1%}"
        words += f", as it is {now.accuracy:.1%}" if now and now.accuracy is not None else ""
    return "; ".join(filter(None, (words, privacy_words(row))))
