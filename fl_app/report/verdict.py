"""The verdict on a run, in a sentence. Free of torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from fl_app.audit.exposure import (
    RECOGNISABLE,
    Identified,
    chance_words,
    identified_of,
    mean_single_colour,
    recognised_of,
    summary_over,
    verdict,
)
from fl_app.report.model import Verdict
from fl_app.report.source import Source, plural, rounds_words

IDENTIFIED = (
    "Identified: of the private image and all other candidates of its class in the data set, the "
    "private one is the nearest to its reconstruction (image identifiability, Yin et al., 2021). "
    "A reconstruction that shows a cat, and no more, identifies none of the cats."
)
_RECOGNISABLE = (
    f"Recognisable: the structural similarity (SSIM) of the reconstruction and its private image "
    f"is over {RECOGNISABLE:g}, where people see the same content."
)
_UNKNOWN = (
    "Without the ground truth, the clients' own images, a reconstruction can be seen, and not "
    "compared. flowleak score brings the ground truth later."
)
_NO_PROOF = (
    "This is no proof of privacy. It says that these attacks, with this budget, failed; a stronger "
    "one may succeed."
)
_RARE = 0.01  # probability of as many by guessing, below which it was no guessing


def main_attack(source: Source) -> str:
    """Return the attack that the report is about: the one that identified the most images.

    Of those that identify as many, the one of the highest mean PSNR.
    """

    def key(attack: str) -> tuple[float, ...]:
        lines = [line for line in source.of(attack) if line["status"] == "ok"]
        found = identified_of(lines)
        means = [score["mean"] for line in lines if (score := line["metrics"].get("psnr"))]
        known = [mean for mean in means if mean is not None]
        return (found["count"] if found else -1, sum(known) / len(known) if known else -1,
                len(lines))  # fmt: skip

    return max(source.attacks, key=key, default="")


def verdict_of(source: Source, attack: str) -> Verdict:
    """Return the verdict by an attack, see `main_attack`."""
    lines = source.of(attack)
    good = [line for line in lines if line["status"] == "ok"]
    if not good:
        return _nothing(source)
    scored = [line for line in good if line["metrics"].get("psnr")]
    if not scored:
        return Verdict("unknown", _unscored(source, good), _beside(source, attack), _UNKNOWN)
    if found := identified_of(scored):
        return _of_identified(source, attack, scored, found)
    return _of_recognised(source, attack, scored)


def _nothing(source: Source) -> Verdict:
    failed = [line for line in source.lines if line["status"] == "failed"]
    skipped = len(source.lines) - len(failed)
    if failed:
        attacks = plural(len(failed), "attack")
        sentence = f"What the server could see is not known: no attack succeeded. {attacks} failed"
        sentence += f", {plural(skipped, 'update')} not attacked." if skipped else "."
    elif skipped:
        sentence = (
            "What the server could see is not known: none of the "
            f"{plural(skipped, 'update')} was attacked."
        )
    else:
        sentence = "What the server could see is not known: the run holds no attack yet."
    beside = ("The reasons stand under Failed and skipped.",) if source.lines else ()
    return Verdict("unknown", sentence, beside, "A failed attack is no sign of privacy.")


def _unscored(source: Source, lines: Sequence[Mapping[str, Any]]) -> str:
    clients = len({source.client(line) for line in lines})
    rounds = rounds_words(line["round"] for line in lines)
    return (
        "What the server could see is not known: there is no ground truth to compare with. "
        f"{plural(len(lines), 'update')} of {plural(clients, 'client')} in {rounds} "
        f"{'was' if len(lines) == 1 else 'were'} reconstructed."
    )


def _of_identified(
    source: Source, attack: str, lines: Sequence[Mapping[str, Any]], found: Identified
) -> Verdict:
    count, of = found["count"], found["of"]
    sure = beyond_chance(count, of, found["chance"])
    number = f"{count:,} of" if count else "none of"
    sentence = f"The server could identify {number} {_whose(source, lines, of)}."
    if count and not sure:
        sentence = sentence[:-1] + ": no more than by guessing."
    beside = [f"Identified: {chance_words(found)}.", *_beside(source, attack)]
    beside += [_psnr_words(lines)]
    if not sure:
        beside.append(_NO_PROOF)
    return Verdict("leaks" if sure else "quiet", sentence, tuple(beside), IDENTIFIED)


def _of_recognised(source: Source, attack: str, lines: Sequence[Mapping[str, Any]]) -> Verdict:
    """Return the verdict where there was nothing to compare the private images with."""
    reasons = dict.fromkeys(line["reasons"].get("identification", "") for line in lines)
    why = next(filter(None, reasons), "no reason is logged")
    beside = [f"Which images are identified is not known: {why}.", *_beside(source, attack)]
    beside.append(_psnr_words(lines))
    seen = recognised_of(lines)
    if seen is None:
        level, words = _by_psnr(lines)
        return Verdict(level, words, tuple(beside), "PSNR: 10 log10(1 / mean squared error), dB.")
    count, of = seen["count"], seen["of"]
    sure = beyond_chance(count, of, seen["chance"])
    sentence = (
        f"{f'{count:,}' if count else 'None'} of {_whose(source, lines, of)} "
        f"{'was' if count == 1 else 'were'} recognisable to the server"
    )
    sentence += "." if sure or not count else ": no more than the mean colour is."
    beside.insert(0, f"An image of the mean colour is as similar to {seen['chance']:.1%} of them.")
    if not sure:
        beside.append(_NO_PROOF)
    return Verdict("leaks" if sure else "quiet", sentence, tuple(beside), _RECOGNISABLE)


def _by_psnr(lines: Sequence[Mapping[str, Any]]) -> tuple[Any, str]:
    scores = [line["metrics"]["psnr"] for line in lines]
    known = [score for score in scores if None not in (score["mean"], score["baseline"])]
    if not known:
        return "unknown", "What the server could see is not known: no score is finite."
    mean = sum(score["mean"] for score in known) / len(known)
    colour = sum(score["baseline"] for score in known) / len(known)
    words = verdict(mean, colour, mean_single_colour(lines))
    if words:
        return "quiet", f"No reconstruction was shown: {words} (PSNR {mean:.1f} dB)."
    return "leaks", (
        f"The server could reconstruct images: PSNR {mean:.1f} dB, the mean colour {colour:.1f} dB."
    )


def _whose(source: Source, lines: Sequence[Mapping[str, Any]], images: int) -> str:
    """Return whose images: ``the 10 images that 2 of 4 clients trained on in round 1``."""
    rounds = rounds_words(line["round"] for line in lines)
    summed = [len(line["clients"]) for line in lines if line["clients"]]
    if summed:
        return f"the {plural(images, 'image')} in the sums of up to {max(summed)} clients, {rounds}"
    clients = len({source.client(line) for line in lines})
    there = source.config.num_clients if source.config and not source.described else 0
    who = f"{clients} of {plural(there, 'client')}" if there else plural(clients, "client")
    return f"the {plural(images, 'image')} that {who} trained on in {rounds}"


def _beside(source: Source, attack: str) -> tuple[str, ...]:
    count = len(source.attacks)
    if count == 1:
        return (f"Attack: {attack}.",)
    return (f"Attack: {attack}, of the {count} that were run the one that shows the most.",)


def _psnr_words(lines: Sequence[Mapping[str, Any]]) -> str:
    scores = [line["metrics"]["psnr"] for line in lines]
    found = summary_over("psnr", scores)
    colours = [score["baseline"] for score in scores if score["baseline"] is not None]
    if found["median"] is None or not colours:
        return "No PSNR is finite."
    words = f"PSNR: median {found['median']:.1f} dB, the worst tenth {found['worst_tenth']:.1f} dB"
    words += f"; an image of the mean colour has {sum(colours) / len(colours):.1f} dB"
    if (single := mean_single_colour(lines)) is not None:
        words += f", and of each one's best single colour {single:.1f} dB"
    return f"{words}."


def beyond_chance(count: int, of: int, chance: float) -> bool:
    """Say whether so many of `of` are rarely had by guessing: with probability below 0.01.

    Parameters
    ----------
    count, of : int
    chance : float
        Of one guess, in [0, 1]. Guesses are taken as independent.
    """
    if not count or chance >= 1:
        return False
    if chance <= 0:
        return True

    def log_probability(k: int) -> float:
        ways = math.lgamma(of + 1) - math.lgamma(k + 1) - math.lgamma(of - k + 1)
        return ways + k * math.log(chance) + (of - k) * math.log1p(-chance)

    return math.fsum(math.exp(log_probability(k)) for k in range(count, of + 1)) < _RARE
