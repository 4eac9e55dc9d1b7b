"""Where a prior's weights are: shipped, in a checkout alone, on the hub; and its folder for it."""

from __future__ import annotations

import json
import sys
import tomllib
from pathlib import Path

import huggingface_hub
import pytest
from helpers.command import flowleak
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors import safe_open

from fl_app.config import load_config
from fl_app.registry import OURS, PRIORS
from fl_app.util.extras import MissingExtraError
from server_strategies.priors import places
from server_strategies.priors.card import card_facts, hub_card
from server_strategies.priors.flow import load_flow
from server_strategies.priors.places import FOLDER, HUB_FILE, IN_GIT_ALONE, find_weights

ROOT = Path(__file__).parents[3]
SHIPPED = [name for name, entry in PRIORS.entries.items() if entry.package == OURS]


def test_what_is_in_git_alone_leaves_the_wheel_and_is_missed_in_one_sentence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel["exclude"] == [f"/{FOLDER}/{name}.safetensors" for name in IN_GIT_ALONE]
    listed = json.loads(flowleak("list", "priors", "--json"))
    files = {each["name"]: each["file"] for each in listed}
    assert all(Path(files[name]).is_file() for name in SHIPPED)

    def without(relative: str) -> Path:
        raise FileNotFoundError(relative)

    monkeypatch.setattr(places, "project_file", without)
    with pytest.raises(ValueError, match=r"not in its wheel: install a checkout .* or give the pa"):
        load_flow("unet64")
    assert "not in its wheel" in flowleak("list", "priors", "--json")
    with pytest.raises(FileNotFoundError):  # that one is in every wheel: the installation is broken
        load_flow("compact")


def test_a_prior_is_loaded_from_the_hub_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    flowleak("prior", "card", "compact", "--out", str(tmp_path / "hub" / "owner" / "name"))
    asked: list[tuple[str, str | None, bool]] = []
    cache: set[str] = set()

    def download(
        repo_id: str, filename: str, revision: str | None, local_files_only: bool = False
    ) -> str:
        asked.append((repo_id, revision, local_files_only))
        if local_files_only and repo_id not in cache:
            raise LocalEntryNotFoundError("not in the cache")
        path = tmp_path / "hub" / repo_id / filename
        if not path.is_file():
            raise OSError("no such repository")
        cache.add(repo_id)
        return str(path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    chosen = load_config({"prior": "hub:owner/name"}).prior.weights
    with pytest.raises(ValueError, match="not downloaded; first: hf download owner/name model"):
        load_flow(chosen, fetch=False)  # as a run's folder names it
    assert places.weights_digest(chosen) is None
    asked.clear()
    network, shipped = load_flow(chosen), load_flow("compact")
    assert network.facts == shipped.facts
    assert asked == [("owner/name", None, True), ("owner/name", None, False)]
    find_weights("hub:owner/name@v2")
    assert asked[2:] == [("owner/name", "v2", True)]  # no request
    # The same bytes, so rows of both say that they were made with the same prior.
    assert places.weights_digest(chosen) == places.weights_digest("compact")
    assert places.weights_name(chosen) == chosen
    with pytest.raises(ValueError, match=rf"'hub:a/b': no {HUB_FILE} from the hub. Cause: no such"):
        find_weights("hub:a/b")
    with pytest.raises(ValueError, match=r"'hub:a'; allowed: hub:OWNER/NAME\[@REVISION\]"):
        find_weights("hub:a")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'flowleak\[data\]'"):
        find_weights(chosen)


@pytest.mark.parametrize("name", SHIPPED)
def test_the_weights_say_what_their_card_says(name: str) -> None:
    card = (ROOT / FOLDER / f"{name}.md").read_text(encoding="utf-8")
    facts = card_facts(card)
    with safe_open(ROOT / FOLDER / f"{name}.safetensors", "pt") as weights:
        metadata = weights.metadata()
    assert metadata.keys() >= {
        "network", "image_size", "data", "training_images", "images_seen", "steps", "seconds",
        "seed", "flow_times", "training_loss", "code",
    }  # fmt: skip
    for key, value in metadata.items():
        said = facts[key.replace("_", " ")]
        assert said.startswith(value) or value.startswith(said), key
    assert facts["license"] == "apache-2.0" and "research only" in card
    data = huggingface_hub.ModelCard(hub_card(card, name)).data
    assert (data.license, data.library_name) == ("apache-2.0", "flowleak")
    assert data.datasets == ["zh-plus/tiny-imagenet"] and name in data.tags
    measured = {each.metric_name: each.metric_value for each in data.eval_results}
    assert len(measured) == 4
    for words, value in measured.items():
        rows = [line for line in card.splitlines() if line.startswith(f"| {words.split()[-1]} ")]
        assert any(f"| {value:.2f} ±" in row for row in rows)


def test_a_card_of_ones_own_needs_a_licence() -> None:
    with pytest.raises(ValueError, match=r"the card of own names no licence .* needed: --license"):
        hub_card("# own\n\n- network: compact\n", "own")
    text = hub_card("# own\n\n- network: compact\n", "own", "mit", "me/pictures")
    data = huggingface_hub.ModelCard(text).data
    assert (data.license, data.datasets, data.eval_results) == ("mit", ["me/pictures"], None)
    assert "hub:OWNER/own" in text
