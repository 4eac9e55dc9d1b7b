"""Two files of weights, to a run with pictures; the same in one call."""

from __future__ import annotations

import copy
import json
import shutil
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from flwr.app import ArrayRecord
from helpers.command import flowleak
from helpers.foreign import Small, client, trained
from safetensors.torch import save_file
from torch import Tensor, nn

from fl_app.config import ConfigError
from fl_app.runs.weights import observed, read_weights, replies, weights_of
from fl_app.util.reading import BrokenFileError
from flowleak import Budget, attack_update

DESCRIPTION = """
import flowleak
from helpers.foreign import Small
client = flowleak.Client(model=Small, num_classes=10, image_shape=(3, 16, 16), mean=0.5, std=0.5,
                         optimizer="sgd", lr=0.01, batch_size=1, steps=2)
"""


@pytest.fixture
def images() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(2, 3, 4, 4, generator=generator)
    return nn.functional.interpolate(coarse, (16, 16), mode="bilinear")


@pytest.fixture
def pair(tmp_path: Path, images: Tensor, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder with the weights before and after, the truth and audit.py."""
    torch.manual_seed(0)
    model = Small()
    torch.save(model.state_dict(), tmp_path / "before.pt")
    torch.save(trained(images, torch.tensor([3, 7]), model).state_dict(), tmp_path / "after.pt")
    torch.save({"images": images, "labels": torch.tensor([3, 7])}, tmp_path / "truth.pt")
    (tmp_path / "audit.py").write_text(DESCRIPTION)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_two_files_become_a_scored_run(pair: Path) -> None:
    arguments = ("--before", "before.pt", "--after", "after.pt", "--examples", "2")
    (pair / "hooks.py").write_text("def keep(line, kept=[]):\n    kept.append(line['folder'])\n")
    arguments += ("--on-line", "hooks:keep")
    flowleak("attack", *arguments, "--truth", "truth.pt", "--set", "iterations=150")
    line = json.loads((pair / "leak" / "leakage.jsonl").read_text())
    assert sys.modules["hooks"].keep.__defaults__ == ([str(pair / "leak")],)
    assert line["device"] == "cpu" or torch.cuda.is_available()
    assert line["status"] == "ok" and line["labels"] == "unknown" and line["label_accuracy"] == 1
    assert line["protocol"]["model"] == "helpers.foreign:Small"
    assert line["metrics"]["psnr"]["mean"] > line["metrics"]["psnr"]["baseline"] + 3
    assert (pair / "leak" / line["picture"]).is_file()
    # The run is attacked again as any other; audit.py here describes its clients.
    flowleak("attack", "./leak", "--attack", "sme", "--set", "iterations=3")
    lines = (pair / "leak" / "leakage.jsonl").read_text().splitlines()
    assert [json.loads(each)["attack"] for each in lines] == ["flow_matching", "sme"]
    (pair / "audit.py").unlink()
    with pytest.raises(ConfigError, match=r"described by .*audit\.py: name the file by --client"):
        flowleak("attack", "./leak", "--attack", "sme")


def test_one_call_gives_a_verdict(pair: Path, images: Tensor) -> None:
    verdict = attack_update(
        client(), pair / "before.pt", pair / "after.pt", 2, budget=Budget(iterations=50),
        truth=(images, [3, 7]),
    )  # fmt: skip
    assert sorted(verdict.found.labels) == [3, 7]
    assert "2 images reconstructed" in str(verdict) and "the mean colour has" in str(verdict)
    verdict.save(pair / "leak.png")
    assert (pair / "leak.png").is_file()


def test_private_images_that_are_not_in_0_to_1_are_refused(images: Tensor) -> None:
    model = Small()
    after = trained(images, torch.tensor([3, 7]), copy.deepcopy(model)).state_dict()
    before = model.state_dict()
    with pytest.raises(ValueError, match=r"images are from .* allowed: 0 to 1"):
        attack_update(
            client(), before, after, 2, budget=Budget(iterations=1), truth=(255 * images, (3, 7))
        )


def test_a_folder_holds_the_replies_of_several_clients(pair: Path) -> None:
    (pair / "replies").mkdir()
    for name in ("a", "b"):
        shutil.copy(pair / "after.pt", pair / "replies" / f"{name}.pt")
    (pair / "replies" / "aa.pt").write_text("broken")
    arguments = ("attack", "--before", "before.pt", "--after", "replies", "--examples", "2")
    printed = flowleak(*arguments, "--set", "iterations=3")
    assert "Left out: aa.pt: " in printed and "client 2: b.pt" in printed

    def lines() -> list[dict[str, Any]]:
        log = (pair / "leak/leakage.jsonl").read_text()
        return [json.loads(each) for each in log.splitlines()]

    assert [int(line["node"]) for line in lines()] == [0, 2]
    with pytest.raises(
        ConfigError,
        match=r"allowed for 2 updates: a folder with a file for each, such as a.pt, b.pt",
    ):
        flowleak(*arguments, "--truth", "truth.pt")
    # The private images come later, of one client.
    (pair / "private").mkdir()
    shutil.copy(pair / "truth.pt", pair / "private" / "b.pt")
    printed = flowleak("score", "./leak", "--truth", "private")
    assert "Not scored: private holds no private images of a.pt" in printed
    scored = [line for line in lines() if line["metrics"]]
    assert [int(line["node"]) for line in scored] == [2]
    # A recorded federation has no files of replies: its updates name those of the images.
    settings = yaml.safe_load((pair / "leak/config.yaml").read_text())
    del settings["described"]["replies"]
    (pair / "leak/config.yaml").write_text(yaml.safe_dump(settings))
    shutil.copy(pair / "truth.pt", pair / "private" / "round-0001-node-0.pt")
    flowleak("score", "./leak", "--truth", "private")
    assert [int(line["node"]) for line in lines() if line["metrics"]] == [2, 0]
    assert replies(pair / "before.pt", pair / "after.pt") == [
        (pair / "before.pt", pair / "after.pt")
    ]
    (pair / "sent").mkdir()
    with pytest.raises(BrokenFileError, match="has no weights before"):
        replies(pair / "sent", pair / "replies")
    with pytest.raises(BrokenFileError, match="sent holds no weights"):
        replies(pair / "before.pt", pair / "sent")


def test_flowers_arrays_and_lower_precision_are_taken(pair: Path) -> None:
    before, after = (read_weights(pair / name) for name in ("before.pt", "after.pt"))
    half = {name: value.bfloat16() for name, value in after.items()}
    torch.save(half, pair / "half.pt")
    seen = observed(before, read_weights(pair / "half.pt"), 2, client().knowledge)
    assert all(value.dtype == before[name].dtype for name, value in seen.w1.items())
    arrays = ArrayRecord(torch_state_dict=OrderedDict(after))
    verdict = attack_update(client(), before, arrays, 2, budget=Budget(iterations=1))
    same = attack_update(client(), before, after, 2, budget=Budget(iterations=1))
    assert torch.equal(verdict.found.images, same.found.images)
    unnamed = ArrayRecord([value.numpy() for value in after.values()])  # as NumPy clients send
    seen = observed(before, weights_of(unnamed), 2, client().knowledge)
    assert all(torch.equal(value, after[name]) for name, value in seen.w1.items())


def test_weights_are_read_as_users_save_them(pair: Path) -> None:
    state = read_weights(pair / "before.pt")
    plain = {name: value.contiguous() for name, value in state.items()}
    save_file(plain, pair / "w.safetensors")
    np.savez(pair / "named.npz", **{name: value.numpy() for name, value in state.items()})
    np.savez(pair / "listed.npz", *[value.numpy() for value in state.values()])
    torch.save({"epoch": 3, "model_state_dict": state}, pair / "checkpoint.pth")
    torch.save({f"module.{name}": value for name, value in state.items()}, pair / "parallel.pt")
    after = read_weights(pair / "after.pt")
    for name in ("w.safetensors", "named.npz", "listed.npz", "checkpoint.pth", "parallel.pt"):
        seen = observed(read_weights(pair / name), after, 2, client().knowledge)
        assert all(torch.equal(seen.w0[key], state[key]) for key in state), name
        assert list(seen.w0) == list(state)


class Payload:
    def __reduce__(self) -> tuple[object, ...]:
        return (Path("ran").touch, ())


def test_no_file_runs_code(pair: Path) -> None:
    torch.save({"state_dict": Payload()}, pair / "evil.pt")
    with pytest.raises(BrokenFileError, match="could run code when it is read"):
        read_weights(pair / "evil.pt")
    np.savez(pair / "evil.npz", np.array([Payload()], dtype=object))
    with pytest.raises(BrokenFileError):
        read_weights(pair / "evil.npz")
    assert not (pair / "ran").exists()


def test_what_is_no_update_is_named(pair: Path) -> None:
    before, after = read_weights(pair / "before.pt"), read_weights(pair / "after.pt")
    known = client().knowledge
    with pytest.raises(ValueError, match="there is no update"):
        observed(before, before, 2, known)
    with pytest.raises(ValueError, match=r"none of helpers\.foreign:Small's"):
        observed({"other": before["fc2.bias"]}, after, 2, known)
    with pytest.raises(ValueError, match=r"fc2.bias after has shape \(9,\)"):
        observed(before, after | {"fc2.bias": torch.zeros(9)}, 2, known)
    with pytest.raises(ConfigError, match="examples is 0; needed"):
        flowleak("attack", "--before", "before.pt", "--after", "after.pt")


def test_an_adapter_alone_is_an_update(images: Tensor) -> None:
    torch.manual_seed(0)
    model = Small()
    own = copy.deepcopy(model)
    for name, weight in model.named_parameters():
        weight.requires_grad_(name.startswith("fc"))
    before = {name: value.clone() for name, value in model.state_dict().items() if "fc" in name}
    trained(images, torch.tensor([3, 7]), model)
    after = {name: value for name, value in model.state_dict().items() if "fc" in name}
    budget = Budget(iterations=60)
    verdict = attack_update(client(own), before, after, 2, budget=budget, truth=(images, [3, 7]))
    assert sorted(verdict.found.labels) == [3, 7]
    psnr = verdict.leakage.metrics["psnr"]  # type: ignore[union-attr]
    assert psnr.mean > psnr.baseline  # type: ignore[union-attr]
