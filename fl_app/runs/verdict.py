"""One update attacked in this process, as in a notebook, and what it gave away."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from flwr.app import ArrayRecord
from torch import Tensor

from fl_app.audit.exposure import RECOGNISABLE
from fl_app.audit.metrics import Leakage, score
from fl_app.audit.pictures import pair_notes, save_picture
from fl_app.audit.truth import Truth, check_truth
from fl_app.protocol import Budget, Client, Reconstruction
from fl_app.runs.weights import observed, weights_of
from server_strategies.attacks.attack import Attack
from server_strategies.attacks.flow_matching import FlowMatching


@dataclass(frozen=True)
class Verdict:
    """What one update gave away.

    Attributes
    ----------
    found : Reconstruction
        Its `images`, shape (N, C, H, W) in [0, 1], and `labels` are the attack's estimate.
    leakage : Leakage or None
        Its scores, where the private images were given.
    private : Tensor, shape (N, C, H, W), or None
        These.
    """

    found: Reconstruction
    leakage: Leakage | None
    private: Tensor | None

    def __str__(self) -> str:
        found = self.found
        words = [f"{len(found.images)} images reconstructed in {found.seconds:.0f} s by "
                 f"{found.attack} ({found.matching})"]  # fmt: skip
        if self.leakage:
            psnr = self.leakage.metrics["psnr"]
            assert psnr is not None
            words.append(f"PSNR {psnr.mean:.1f} dB (the mean colour has {psnr.baseline:.1f})")
            if self.leakage.recognisable:
                count, of = sum(self.leakage.recognisable), len(found.images)
                words.append(f"{count} of {of} recognisable (SSIM over {RECOGNISABLE})")
        else:
            words.append(f"matching loss at the end {found.losses[-1]:.3g}")
        return "; ".join([*words, *found.diagnosis])

    def save(self, path: Path | str) -> None:
        """Draw the reconstructions as a PNG, beside the private images where they were given."""
        order = self.leakage.assignment if self.leakage else range(len(self.found.images))
        caption = str(self).split("; ")
        notes = pair_notes(self.leakage, (), [self.found.labels[i] for i in order])
        save_picture(Path(path), self.found.images[list(order)], self.private, caption, notes)


def attack_update(
    client: Client,
    before: Mapping[str, Tensor] | ArrayRecord | Path | str,
    after: Mapping[str, Tensor] | ArrayRecord | Path | str,
    examples: int = 0,
    *,
    attack: Attack | None = None,
    budget: Budget | None = None,
    labels: Sequence[int] | None = None,
    truth: tuple[Tensor, Sequence[int]] | None = None,
) -> Verdict:
    """Attack one update in this process, as in a notebook; nothing is written.

    Parameters
    ----------
    client : Client
        Of the update.
    before, after : mapping of str to Tensor, flwr.app.ArrayRecord, or path
        State dicts before and after local training, Flower's arrays of them, or files as
        `read_weights` takes them.
    examples : int
        Images that the client trained on, N; 0: as `client` says.
    attack : Attack, optional
        Default: `FlowMatching`.
    budget : Budget, optional
    labels : sequence of int, optional
        The N labels in any order, where the attack is to know their counts; default: unknown.
    truth : tuple of (Tensor (N, C, H, W) in [0, 1], sequence of N int), optional
        The private images and labels, for the scores alone.

    Raises
    ------
    ValueError
        If the weights are not of the client's model, N is missing, or `truth` can't be of the
        update.
    """
    known, count = client.knowledge, examples or client.examples
    if count < 1:
        raise ValueError("examples is 0; needed: the images that the client trained on")
    seen = observed(weights_of(before), weights_of(after), count, known)
    if labels is not None:
        known = known.granting("counts", tuple(int(label) for label in labels))
    private = None
    if truth:
        images, own = truth
        batches = client.training.batches(count)
        private = Truth(images, tuple(int(label) for label in own), batches, round=1, node=0)
        check_truth(private, known, client.training, count)  # before the time is spent
    found = (attack or FlowMatching())(seen, known, budget=budget)
    if not private:
        return Verdict(found, None, None)
    leakage = score(found, private, known.mean, num_classes=known.num_classes)
    return Verdict(found, leakage, private.images)
