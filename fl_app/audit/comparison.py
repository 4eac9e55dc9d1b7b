"""A comparison of attacks on the same updates, with baselines that do not use the update.

Of a job's lines in the log the last one counts, whatever it scored: nothing is
chosen by its likeness to the truth.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from fl_app.audit.auditor import Auditor
from fl_app.audit.exposure import bounds_of, identified_of, mean_single_colour, summary_over
from fl_app.audit.pictures import save_grid
from fl_app.audit.reconstructions import read_reconstruction
from fl_app.util.intervals import mean_interval, spread
from server_strategies.observations import ObservationStore

NOISE = "uniform noise"

_COSTS = ("seconds", "iterations", "peak_memory", "flops")
_SHOWN = 4  # observations in the picture
_ROWS = 12  # private images in the picture

Scores = dict[str, dict[str, float]]
"""By metric and by observation id: the mean over the observation's images."""


@dataclass(frozen=True)
class Comparison:
    """Attacks and baselines on the same observations.

    Attributes
    ----------
    observations : tuple of str
        Their ids.
    lines : mapping of str to mapping of str to dict
        By attack and observation id: the log's line of the attack's outcome;
        without those that have none.
    baselines : mapping of str to Scores
        By baseline, see `baseline_images`; `NOISE` where there is no truth.
    guesses : mapping of (str, str) to Tensor
        By baseline and observation id: its images, of the observations that the picture shows.
    reasons : mapping of str to str
        Why a baseline or a metric is missing.
    """

    observations: tuple[str, ...]
    lines: Mapping[str, Mapping[str, dict[str, Any]]]
    baselines: Mapping[str, Scores]
    guesses: Mapping[tuple[str, str], Tensor] = field(default_factory=dict)
    reasons: Mapping[str, str] = field(default_factory=dict)

    def summary(self) -> dict[str, Any]:
        """Return everything as plain JSON; intervals are over observations, see `spread`.

        Returns
        -------
        dict
            ``baselines``: by name the metrics; ``attacks``: by name, the best PSNR first,
            ``succeeded`` (observations), ``failures`` (observation and error),
            ``metrics``, ``identified`` (see `Identified`), ``single_colour`` (mean PSNR
            in dB), ``psnr_by_step``, the mean costs ``seconds``,
            ``iterations``, ``peak_memory`` (bytes) and ``flops``, ``stop_reasons``
            and ``options``. A metric has ``mean``, ``low``, ``high``, ``values``
            by observation and, for an attack, ``median`` and ``worst_tenth`` over the
            images of all observations, and ``chance``: each baseline's mean over the
            same observations. ``label_accuracy`` is among the metrics
            where labels were inferred.
        """
        attacks = {name: self._attack(lines) for name, lines in self.lines.items()}
        return {
            "observations": list(self.observations),
            "baselines": {
                name: {metric: _spread(metric, values) for metric, values in scores.items()}
                for name, scores in self.baselines.items()
            },
            "attacks": dict(sorted(attacks.items(), key=lambda each: -_psnr(each[1], -math.inf))),
            "reasons": dict(self.reasons),
        }

    def _attack(self, lines: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
        done = {id_: line for id_, line in lines.items() if line["status"] == "ok"}
        errors = {id_: str(lines[id_]["error"]) for id_ in lines if id_ not in done}
        errors |= dict.fromkeys(
            (id_ for id_ in self.observations if id_ not in lines),
            "no outcome yet; the same command goes on",
        )
        metrics = {
            metric: {
                **_spread(metric, values),
                **summary_over(metric, (_scores_of(line).get(metric) for line in done.values())),
                "chance": self._chance(metric, values),
            }
            for metric, values in _collected(done).items()
        }
        accuracy = {i: line["label_accuracy"] for i, line in done.items()}
        if inferred := {i: share for i, share in accuracy.items() if share is not None}:
            chance = mean_interval([done[id_]["label_chance"] for id_ in inferred])[0]
            metrics["label_accuracy"] = {
                **_spread("label_accuracy", inferred),
                "chance": {"guessed without the update": chance},
            }
        reasons = [line["stop_reason"] for line in done.values()]
        return {
            "succeeded": len(done),
            "failures": [{"observation": id_, "error": errors[id_]} for id_ in sorted(errors)],
            "metrics": metrics,
            "identified": identified_of(done.values()),
            "single_colour": mean_single_colour(done.values()),
            "psnr_by_step": _mean_by_step([line["psnr_by_step"] for line in done.values()]),
            **{cost: _mean([line[cost] for line in done.values()]) for cost in _COSTS},
            "stop_reasons": {reason: reasons.count(reason) for reason in sorted(set(reasons))},
            "options": next((line["options"] for line in done.values()), {}),
        }

    def _chance(self, metric: str, values: Mapping[str, float]) -> dict[str, float]:
        """Return each baseline's mean over the observations that have a value."""
        chance = {}
        for name, scores in self.baselines.items():
            known = scores.get(metric, {})
            if shared := [known[id_] for id_ in values if id_ in known]:
                chance[name] = mean_interval(shared)[0]
        return chance


def compare(
    auditor: Auditor, store: ObservationStore, jobs: Mapping[str, Mapping[str, str]]
) -> Comparison:
    """Read some jobs from the log, and score the baselines on the same observations.

    Parameters
    ----------
    auditor : Auditor
    store : ObservationStore
    jobs : mapping of str to mapping of str to str
        By attack and observation id: the job's id.
    """
    observations = tuple(dict.fromkeys(id_ for ids in jobs.values() for id_ in ids))
    logged = {line["job"]: line for line in auditor.lines() if line.get("job")}
    lines = {
        attack: {id_: logged[job] for id_, job in ids.items() if job in logged}
        for attack, ids in jobs.items()
    }
    baselines: dict[str, Scores] = {}
    guesses: dict[tuple[str, str], Tensor] = {}
    reasons: dict[str, str] = {}
    for id_ in observations:
        kept = guesses if id_ in observations[:_SHOWN] else {}
        for name, metric, mean in _chances(auditor, store, id_, lines, kept, reasons):
            if math.isfinite(mean):
                baselines.setdefault(name, {}).setdefault(metric, {})[id_] = mean
    return Comparison(observations, lines, baselines, guesses, reasons)


def _chances(
    auditor: Auditor,
    store: ObservationStore,
    id_: str,
    lines: Mapping[str, Mapping[str, dict[str, Any]]],
    guesses: dict[tuple[str, str], Tensor],
    reasons: dict[str, str],
) -> Iterator[tuple[str, str, float]]:
    """Yield baseline, metric and score of one observation; add to the guesses and the reasons."""
    try:
        found, why = auditor.baselines(store.load(id_))
    except Exception as error:  # whatever is wrong with the file, the others are compared
        reasons[id_] = f"no baselines: {error}"
        return
    reasons.update(why)
    for name, (images, leakage) in found.items():
        guesses[name, id_] = images
        reasons.update({k: v for k, v in leakage.reasons.items() if k in leakage.metrics})
        for metric, score in leakage.metrics.items():
            if score:
                yield name, metric, score.mean
    if not found:
        reasons["metrics"] = "no truth: only scores without one, and those of uniform noise"
    for logged in lines.values():
        for metric, score in (logged.get(id_) or {}).get("reference_free", {}).items():
            if _scored(score) and score["baseline"] is not None:
                yield NOISE, metric, score["baseline"]


def save_comparison_picture(
    path: Path,
    auditor: Auditor,
    store: ObservationStore,
    comparison: Comparison,
    caption: Sequence[str],
) -> None:
    """Write a grid of a few private images: the ground truth, each attack's reconstruction, chance.

    Attacks come best first, then the baselines, each with its mean PSNR over all observations.
    Images are the first of the first observations, in training order.

    Parameters
    ----------
    path : Path
        Written whole or not at all.
    auditor : Auditor
    store : ObservationStore
    comparison : Comparison
    caption : sequence of str
        Lines above the grid.
    """
    summary, guesses = comparison.summary(), comparison.guesses
    truths: dict[str, Tensor] = {}
    found: dict[tuple[str, str], Tensor] = {}
    shown = comparison.observations[:_SHOWN]
    for id_ in shown:
        with suppress(ValueError, FileNotFoundError):  # it is among the comparison's reasons
            if truth := auditor.truth(store.load(id_)):
                truths[id_] = truth.images
        for attack, lines in comparison.lines.items():
            picture = lines.get(id_, {}).get("picture")
            with suppress(ValueError):  # that cell says none
                if picture:
                    stored = read_reconstruction(auditor.run_dir / picture)
                    found[attack, id_] = stored.in_order_of_truth
    sizes = {id_: len(images) for id_, images in truths.items()}
    sizes |= {id_: len(images) for (_, id_), images in found.items()}
    each = math.ceil(_ROWS / max(1, len(shown)))
    rows = [(id_, i) for id_ in shown for i in range(min(each, sizes.get(id_, 0)))][:_ROWS]
    if not rows:
        return
    columns = {"private": [_at(truths.get(id_), i) for id_, i in rows]}
    if not truths:
        columns, caption = {}, [*caption, "no truth: reconstructions alone"]
    for name, entry in summary["attacks"].items():
        columns[_head(name, entry["metrics"])] = [_at(found.get((name, id_)), i) for id_, i in rows]
    for name, metrics in summary["baselines"].items() if truths else ():
        columns[_head(name, metrics)] = [_at(guesses.get((name, id_)), i) for id_, i in rows]
    save_grid(path, columns, caption)


def _head(name: str, metrics: Mapping[str, Any]) -> str:
    """Return a column's name, and its mean PSNR below it."""
    psnr = _psnr({"metrics": metrics}, math.nan)
    return name if math.isnan(psnr) else f"{name}\n{psnr:.1f} dB"


def _psnr(entry: Mapping[str, Any], otherwise: float) -> float:
    """Return the mean PSNR of an attack or a baseline, where it has one."""
    score = entry["metrics"].get("psnr")
    return float(score["mean"]) if score else otherwise


def _at(images: Tensor | None, place: int) -> Tensor | None:
    return images[place] if images is not None and place < len(images) else None


def _scores_of(line: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a line's scores; without a truth the reference-free ones."""
    return line["metrics"] or line.get("reference_free") or {}


def _collected(lines: Mapping[str, Mapping[str, Any]]) -> Scores:
    """Return the scores of some lines."""
    scores: Scores = {}
    for id_, line in lines.items():
        for metric, score in _scores_of(line).items():
            if _scored(score):
                scores.setdefault(metric, {})[id_] = score["mean"]
    return scores


def _scored(score: object) -> bool:
    return isinstance(score, Mapping) and isinstance(score.get("mean"), float)


def _spread(metric: str, values: Mapping[str, float]) -> dict[str, Any]:
    return {**spread(list(values.values()), bounds_of(metric)), "values": dict(values)}


def _mean(values: Sequence[float]) -> float | None:
    return mean_interval(values)[0] if values else None


def _mean_by_step(rows: Sequence[Sequence[float | None]]) -> list[float | None]:
    """Return the mean of each step over the observations that have one; steps may differ."""
    longest = max(map(len, rows), default=0)
    columns = ([row[step] for row in rows if step < len(row)] for step in range(longest))
    return [_mean([value for value in column if value is not None]) for column in columns]
