"""The auditor of a run: grants labels, scores reconstructions, and writes the log."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn

from client_app.defenses import update_bytes
from fl_app.audit.baselines import PRIOR, TRAINING, baseline_images
from fl_app.audit.exposure import (
    chance_words,
    count_words,
    identified_of,
    mean_single_colour,
    verdict,
)
from fl_app.audit.identification import (
    Identification,
    Identifier,
    Identify,
    choose_likeness,
    nothing_to_tell_from,
)
from fl_app.audit.leakage_log import BadLine, LogLine, append_line, read_lines, thinned
from fl_app.audit.metrics import (
    MEASURES,
    Leakage,
    Measure,
    check_images,
    feature_mse,
    score,
    target_features,
)
from fl_app.audit.on_line import OnLine
from fl_app.audit.perceptual import Lpips, load_lpips
from fl_app.audit.pictures import pair_notes, save_picture
from fl_app.audit.reconstructions import (
    StoredReconstruction,
    tensors_path,
    write_reconstruction,
)
from fl_app.audit.reference_free import reference_free
from fl_app.audit.truth import Truth, check_truth, has_truth, joined, read_truth, truth_path
from fl_app.config import Config
from fl_app.data import draw_class
from fl_app.models import chosen_head, chosen_norm
from fl_app.protocol import Knowledge, Observation, Reconstruction, round_and_node
from fl_app.util.plain import plain_settings
from fl_app.util.reading import BrokenFileError
from server_strategies.priors.flow import load_flow

_SCORED = (  # of a leakage, in its line
    "metrics", "psnr_by_step", "single_colour", "recognisable", "recognisable_chance",
    "identification", "label_accuracy", "label_chance", "determined",
)  # fmt: skip
_NO_SCORE = (
    "metrics", "recognisable", "identification", "label_accuracy", "label_chance", "true_labels",
)  # fmt: skip
_AS_FOUND = (  # of a reconstruction, in its line
    "matching", "labels_source", "seconds", "iterations", "peak_memory", "flops", "stop_reason",
    "options", "diagnosis", "determined",
)  # fmt: skip


class Auditor:
    """Compares reconstructions with the Truth, which attacks may not see, and logs the scores.

    Parameters
    ----------
    run_dir : Path
        The run's folder, as `create_run` made it.
    config : Config
        The run's configuration.
    knowledge : Knowledge
        What the server knows of every client; without labels.
    truth_dir : Path, optional
        Holds ``truth/``; the run's folder where not given.
    no_data : str
        Why the data set that is there is not the run's; "": it is.
    no_candidates : str
        Why no candidates are drawn from it to identify private images among, where it is
        the run's; "": they are.
    on_line : OnLine, optional
        Takes each line that is written, see `told_lines`.
    """

    def __init__(
        self,
        run_dir: Path,
        config: Config,
        knowledge: Knowledge,
        truth_dir: Path | None = None,
        no_data: str = "",
        no_candidates: str = "",
        on_line: OnLine | None = None,
    ) -> None:
        self.run_dir = run_dir
        self.truth_dir = truth_dir or run_dir
        self.config = config
        self.knowledge = knowledge
        self.no_data = no_data
        self.no_candidates = no_data or no_candidates
        self.on_line = on_line
        self._log = run_dir / "leakage.jsonl"
        self._lock = Lock()

    def grant(self, observation: Observation) -> Knowledge:
        """Return what an attack on this observation may know.

        The labels are granted at the level ``audit.labels``, see `LABEL_LEVELS`.

        Raises
        ------
        ValueError
            If labels are to be granted but the client left no truth, or one that can't be
            of this update, see `truth`.
        """
        level = self.config.audit.labels
        if level == "unknown":
            return self.knowledge
        truth = self.truth(observation)
        if truth is None:
            path = truth_path(self.truth_dir, observation.round, observation.node)
            raise ValueError(
                f"audit.labels is {level}, but client {observation.client} left no truth at "
                f"{path}; set audit.labels=unknown, or run the clients where they can write the "
                "run's folder"
            )
        return self.knowledge.granting(level, truth.labels)

    def record(
        self,
        observation: Observation,
        reconstruction: Reconstruction,
        job: str | None = None,
        device: str | None = None,
    ) -> None:
        """Score a reconstruction, draw it beside the truth, and log both.

        One that can't be scored is logged as failed. Where there is no truth, or one that
        can't be of this update, the scores are those that need none, see `reference_free`.
        Where the disk has no room for the picture, the numbers are logged alone.

        Raises
        ------
        OSError
            If the log can't be written; then nothing else is left of it.
        """
        truth, no_truth = None, "no truth"
        try:
            truth = self.truth(observation)
        except ValueError as error:
            no_truth = f"the truth is refused: {error}"
        leakage, alone = None, {}
        reasons = dict.fromkeys(_NO_SCORE, no_truth)
        try:
            if truth is None:
                check_images(reconstruction.images, reconstruction.labels)
                network, why = self._prior
                reasons |= why
                alone = reference_free(reconstruction, network)
            else:
                leakage = self._score(observation, reconstruction, truth)
                reasons = dict(leakage.reasons)
        except ValueError as error:
            self.record_failure(observation, reconstruction.attack, str(error), job)
            return
        picture = None
        try:
            picture = self._draw(observation, reconstruction, truth, leakage)
        except OSError as error:  # the numbers matter more than the picture
            reasons["picture"] = str(error)
        rate = reconstruction.iterations / max(reconstruction.seconds, 1e-9)
        fields: dict[str, Any] = {
            "status": "ok",
            "reference_free": alone,
            "iterations_per_second": rate,
            "job": job,
            "device": device,
            "losses": thinned(reconstruction.losses),
            "true_labels": truth.labels if truth else None,
            "found_labels": _in_order(reconstruction.labels, leakage),
            **{name: getattr(reconstruction, name) for name in _AS_FOUND},
            # In the order of the private images.
            **{name: getattr(leakage, name) for name in _SCORED if leakage},
        }
        attack = reconstruction.attack
        try:
            self._append(observation, attack, picture=picture, reasons=reasons, **fields)
        except OSError as error:
            if picture is None:
                raise
            self._remove(picture)  # which makes room
            reasons["picture"] = str(error)
            self._append(observation, attack, picture=None, reasons=reasons, **fields)

    def baselines(
        self, observation: Observation
    ) -> tuple[dict[str, tuple[Tensor, Leakage]], dict[str, str]]:
        """Guess the images without the update, see `baseline_images`, and score that.

        Returns
        -------
        guesses : dict of str to (Tensor, Leakage)
            By baseline its images and their scores; empty where there is no truth.
        reasons : dict of str to str
            Why a baseline is missing.

        Raises
        ------
        ValueError
            If the truth can't be of this update.
        """
        truth = self.truth(observation)
        if truth is None:
            return {}, {}
        network, why = self._prior
        seed = (self.config.seed, observation.round, observation.node)
        mean, dataset = self.knowledge.mean, None if self.no_data else self.config.dataset
        images, reasons = baseline_images(truth.images, mean, dataset, network, seed)
        if self.no_data:
            reasons[TRAINING] = self.no_data
        guess = Reconstruction("none", torch.empty(0), truth.labels, (), 0, 0.0, 0, 0, "none")
        guesses = {
            name: (guessed, self._score(observation, replace(guess, images=guessed), truth, False))
            for name, guessed in images.items()
        }
        return guesses, reasons | dict.fromkeys([PRIOR] if why else [], "; ".join(why.values()))

    def record_failure(
        self, observation: Observation, attack: str, error: str, job: str | None = None
    ) -> None:
        """Log an attack that raised."""
        self._append(
            observation, attack, status="failed", error=error, job=job, reasons=_absent(error)
        )

    def record_unreadable(self, id_: str, attack: str, error: str, job: str) -> None:
        """Log an attack whose Observation, by its id, can't be read from the store."""
        self._append_unobserved(*round_and_node(id_), attack, error, status="failed", job=job)

    def record_skipped(self, round_: int, node: int, reason: str) -> None:
        """Log an update on which no attack was run."""
        self._append_unobserved(round_, node, self.config.attack.name, reason, status="skipped")

    def has_truth(self, observation: Observation) -> bool:
        """Say whether the private batch is there, for a sum those of all its clients."""
        nodes = observation.nodes or (observation.node,)
        return all(has_truth(self.truth_dir, observation.round, node) for node in nodes)

    def lines(self) -> list[dict[str, Any]]:
        """Return the log so far, without lines that are none."""
        return read_lines(self._log)[0]

    def bad_lines(self) -> list[BadLine]:
        """Return what `lines` leaves out."""
        return read_lines(self._log)[1]

    def _append(self, observation: Observation, attack: str, **fields: Any) -> None:
        size, encoding = None, ""
        if observation.nodes:
            why = "of a sum: masked numbers are sent, and no single update is seen"
            fields["reasons"] = {**fields["reasons"], "update_bytes": why}
        else:
            size, encoding = update_bytes(observation.update, self.config.defense.quantize)
        self._write(
            round=observation.round,
            node=str(observation.node),
            client=observation.client,
            clients=observation.clients,
            num_examples=observation.num_examples,
            attack=attack,
            truth=self.has_truth(observation),
            update_bytes=size,
            update_encoding=encoding,
            **fields,
        )

    def _append_unobserved(
        self, round_: int, node: int, attack: str, why: str, **fields: Any
    ) -> None:
        """Log an update without an Observation, and why there is none."""
        reasons = _absent(why) | {"client": why, "num_examples": why}
        self._write(
            round=round_, node=str(node), client=None, attack=attack, error=why, reasons=reasons,
            **fields,
        )  # fmt: skip

    def _write(self, **fields: Any) -> None:
        """Append a line: the given fields, and what all lines of the run have in common."""
        known = self.knowledge
        ours = isinstance(known.model, str)
        protocol = {
            "model": known.model_name,
            "norm": chosen_norm(known.model, known.norm) if ours else "",
            "head": chosen_head(known.model, known.head) if ours else "",
            **plain_settings(self.config.client),
        }
        line = LogLine(
            labels=self.config.audit.labels,
            defense=str(self.config.defense),
            defense_known=self.config.audit.defense == "given",
            protocol=protocol,
            run=self.run_dir.name,
            dataset="" if self.no_data else self.config.dataset.name,
            prior=self.config.prior.weights,
            seed=self.config.seed,
            written=datetime.now(UTC).isoformat(timespec="seconds"),
            **fields,
        )
        with self._lock:  # training and the attack pool log from their own threads
            entry = append_line(self._log, line)
            if self.on_line:
                self.on_line(entry | {"folder": str(self.run_dir)})

    def truth(self, observation: Observation) -> Truth | None:
        """Return what an update was trained on; None where a client left no truth.

        Raises
        ------
        ValueError
            If a truth can't be read, or can't be of this update; the message names its file.
        """
        if not observation.nodes:
            return self._truth(observation.round, observation.node, observation.num_examples)
        truths = [
            self._truth(observation.round, node, count)
            for node, count in zip(observation.nodes, observation.examples, strict=True)
        ]
        left = [truth for truth in truths if truth]
        return joined(left) if len(left) == len(truths) else None

    def _truth(self, round_: int, node: int, num_examples: int) -> Truth | None:
        truth = read_truth(self.truth_dir, round_, node)
        if truth is None:
            return None
        try:
            check_truth(truth, self.knowledge, self.config.client, num_examples)
        except ValueError as error:
            path = truth_path(self.truth_dir, round_, node)
            raise BrokenFileError(f"{path} is not of this update: {error}") from error
        return truth

    @cached_property
    def _lpips(self) -> tuple[dict[str, Lpips], dict[str, str]]:
        return load_lpips(self.config.audit.lpips_weights)

    @cached_property
    def _prior(self) -> tuple[nn.Module | None, dict[str, str]]:
        try:
            return load_flow(self.config.prior.weights, fetch=False), {}
        except (ValueError, OSError) as error:
            return None, {"prior_residual": str(error)}

    def _score(
        self,
        observation: Observation,
        reconstruction: Reconstruction,
        truth: Truth,
        identified: bool = True,
    ) -> Leakage:
        """Score a reconstruction; `identified`: say which images it identifies, too."""
        perceptual, reasons = self._lpips
        measures: dict[str, Measure] = {**MEASURES, **perceptual}
        features = None
        try:
            features = target_features(observation, self.knowledge)
            measures["fmse"] = feature_mse(features)
        except RuntimeError as error:
            reasons = {**reasons, "fmse": f"w0 does not fit {self.knowledge.model_name}: {error}"}
        return score(
            reconstruction,
            truth,
            self.knowledge.mean,
            measures,
            reasons,
            self.knowledge.num_classes,
            self._identify(features) if identified else nothing_to_tell_from,
        )

    def _identify(self, features: Callable[[Tensor], Tensor] | None) -> Identify:
        """Return what tells which images are identified, among the clients' data set."""
        shape, dataset = self.knowledge.image_shape, self.config.dataset

        def draw(label: int, count: int) -> Tensor:
            if self.no_candidates:
                raise ValueError(self.no_candidates)
            # Clients hold parts of the train split.
            return draw_class(dataset, "train", label, count, self.config.seed)

        lpips = self._lpips[0].get("lpips_alex")

        def identify(*told: Any) -> Identification:
            return Identifier(draw, choose_likeness(lpips, features, shape))(*told)

        return identify

    def _draw(
        self,
        observation: Observation,
        reconstruction: Reconstruction,
        truth: Truth | None,
        leakage: Leakage | None,
    ) -> str:
        """Write the picture and the tensors behind it; return its path from the run's folder."""
        who = "sum" if observation.nodes else f"client-{observation.client}"
        stem = f"round-{observation.round:04d}-{who}-{reconstruction.attack}"
        path = self._free_path(stem)
        images = reconstruction.images.detach().cpu()
        order = leakage.assignment if leakage else None
        caption = [
            f"round {observation.round}, {who.replace('-', ' ')}, {reconstruction.attack}, "
            f"labels {reconstruction.labels_level}"
        ]
        if leakage:
            caption += _caption(leakage)
        found = StoredReconstruction(images, reconstruction.labels, order)
        picture = str(path.relative_to(self.run_dir))
        try:
            write_reconstruction(path, found)
            private, classes = (truth.images, truth.labels) if truth else (None, ())
            notes = pair_notes(leakage, classes, _in_order(reconstruction.labels, leakage))
            save_picture(path, found.in_order_of_truth, private, caption, notes)
        except OSError:
            self._remove(picture)
            raise
        return picture

    def _remove(self, picture: str) -> None:
        """Remove a picture, and the tensors behind it."""
        path = self.run_dir / picture
        for file in (path, tensors_path(path)):
            with suppress(OSError):
                file.unlink()

    def _free_path(self, stem: str) -> Path:
        """Return a PNG's path not yet taken: an attack may be run on one update again."""
        folder, number = self.run_dir / "reconstructions", 1
        while True:
            path = folder / (f"{stem}.png" if number == 1 else f"{stem}-{number}.png")
            if not path.exists():
                return path
            number += 1


def _caption(leakage: Leakage) -> list[str]:
    """Say what a picture's reconstructions score."""
    psnr = leakage.metrics["psnr"]
    assert psnr is not None
    line = asdict(leakage)
    colour = mean_single_colour([line])
    words = verdict(psnr.mean, psnr.baseline, colour)
    lines = [
        f"PSNR: mean {psnr.mean:.1f} dB, median {psnr.median:.1f}, worst tenth "
        f"{psnr.worst_tenth:.1f}{words and f': {words}'}",
        f"the mean colour {psnr.baseline:.1f} dB, each image's best colour {colour:.1f} dB",
    ]
    if found := identified_of([line]):
        lines.append(f"{count_words(found)} identified: {chance_words(found)}")
    return lines


def _in_order(labels: Sequence[int], leakage: Leakage | None) -> tuple[int, ...]:
    """Return reconstructions' labels, in the order of the private images where it is known."""
    return tuple(labels[i] for i in leakage.assignment) if leakage else tuple(labels)


def _absent(reason: str) -> dict[str, str]:
    return dict.fromkeys((*_NO_SCORE, "labels_source", "device", "picture"), reason)
