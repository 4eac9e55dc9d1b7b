"""Runs as they lie on disk after their attacks, made up: nothing trained, nothing attacked."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from fl_app.audit.exposure import summary_of
from fl_app.audit.leakage_log import LogLine, append_line
from fl_app.audit.pictures import save_picture
from fl_app.audit.reconstructions import StoredReconstruction, write_reconstruction
from fl_app.audit.truth import Truth, write_truth
from fl_app.config import load_config
from fl_app.runs.folder import create_run

_MEAN_COLOUR = 12.0  # dB


@dataclass(frozen=True)
class Pretence:
    """What a made-up run holds.

    Attributes
    ----------
    clients, rounds, images, side : int
        Images of each update, and their sides in pixels.
    attacks : tuple of str
    truth : bool
        Whether the clients left their images.
    overrides : str
    """

    clients: int = 2
    rounds: int = 1
    images: int = 5
    side: int = 32
    attacks: tuple[str, ...] = ("flow_matching",)
    truth: bool = True
    overrides: str = ""

    def write(self, runs_dir: Path, name: str = "audit") -> Path:
        """Make the run's folder; return it."""
        level = "audit.labels=counts" if self.truth else "audit.truth=false audit.labels=unknown"
        settings = (
            f"runs_dir={runs_dir} rounds={self.rounds} num_clients={self.clients + 2} {level}"
        )
        facts = {"data": {"num_classes": 10, "image_shape": [3, self.side, self.side],
                          "mean": [0.5] * 3, "std": [0.2] * 3, "fingerprint": None}}  # fmt: skip
        config = load_config({"overrides": f"name={name} {settings} {level} {self.overrides}"})
        run = create_run(config, facts)
        for round_ in range(1, self.rounds + 1):
            for client in range(self.clients):
                self._update(run, round_, client)
        rounds = [
            {"round": i, "train": {}, "evaluate": {"accuracy": 0.1 + 0.3 * i / self.rounds}}
            for i in range(1, self.rounds + 1)
        ]
        (run / "training.json").write_text(json.dumps(rounds))
        return run

    def _update(self, run: Path, round_: int, client: int) -> None:
        generator = torch.Generator().manual_seed(1000 * round_ + client)
        coarse = torch.rand((self.images, 3, 8, 8), generator=generator)
        private = torch.nn.functional.interpolate(coarse, (self.side, self.side), mode="bilinear")
        node, labels = 2**63 + client, tuple(i % 10 for i in range(self.images))
        if self.truth:
            batches = tuple((i,) for i in range(self.images))
            write_truth(run, Truth(private, labels, batches, round_, node))
        for number, attack in enumerate(self.attacks):
            noise = 0.03 * (1 + number) * round_ * torch.randn(private.shape, generator=generator)
            found = (private + noise).clamp(0, 1)
            picture = f"reconstructions/round-{round_:04d}-node-{node}-{attack}.png"
            order = tuple(reversed(range(self.images))) if self.truth else None
            stored = found.flip(0) if order else found
            write_reconstruction(run / picture, StoredReconstruction(stored, labels, order))
            if client == 0:
                save_picture(run / picture, found[:1], private[:1], [attack])
            line = LogLine(
                round_, str(node), client, attack, "ok", "counts" if self.truth else "unknown",
                matching="surrogate", truth=self.truth, num_examples=self.images, picture=picture,
                losses=[0.5 * 0.96**i for i in range(100)], iterations=200, seconds=12.0,
                stop_reason="iterations", options={"lr": 0.1, "tv": 0.03}, found_labels=labels,
                protocol={"model": "convnet", "optimizer": "adam"}, run=run.name,
            )  # fmt: skip
            append_line(run / "leakage.jsonl", self._scored(line, private, found, labels))

    def _scored(
        self, line: LogLine, private: Tensor, found: Tensor, labels: tuple[int, ...]
    ) -> LogLine:
        if not self.truth:
            score = {"mean": 0.1, "baseline": 0.6, "values": [0.1] * self.images}
            counts = {str(label): labels.count(label) for label in set(labels)}
            alone = {"matching_loss": 0.01, "tv": score, "label_counts": counts}
            return replace(line, reference_free=alone, reasons={"metrics": "no truth"})  # type: ignore[arg-type]
        psnr = (-10 * (found - private).square().flatten(1).mean(1).log10()).tolist()
        values = {"psnr": psnr, "ssim": [min(1.0, value / 40) for value in psnr]}
        metrics = {
            name: {"mean": sum(each) / len(each), "values": each,
                   "baseline": _MEAN_COLOUR if name == "psnr" else 0.1, **summary_of(name, each)}
            for name, each in values.items()
        }  # fmt: skip
        identified = [value > 25 for value in psnr]
        identification = {
            "identified": identified, "rank": [1 if each else 40 for each in identified],
            "candidates": [199] * len(psnr), "by": "LPIPS-Alex",
        }  # fmt: skip
        return replace(
            line, metrics=metrics, identification=identification, psnr_by_step=psnr,
            single_colour=[14.0] * len(psnr), recognisable=[value > 20 for value in psnr],
            recognisable_chance=0.0, true_labels=labels,
        )  # type: ignore[arg-type]  # fmt: skip
