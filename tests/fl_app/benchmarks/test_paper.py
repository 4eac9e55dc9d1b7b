"""Every table and figure of the paper, by its command."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.clients import SHAPE, STD, client
from helpers.command import flowleak
from torch import Tensor, nn
from torch.func import functional_call

from fl_app.benchmarks.paper.elements import BUDGETS, ELEMENTS, OURS
from fl_app.benchmarks.paper.published import COLUMNS, TABLE_2, TABLE_3, TABLE_4
from fl_app.benchmarks.paper.suite import paper_suite
from fl_app.benchmarks.suite import Setting
from fl_app.config import DatasetConfig, load_config
from fl_app.models import create_model
from fl_app.protocol import Budget, LocalTraining
from server_strategies.attacks.attack import Task
from server_strategies.attacks.flow_matching_paper import FlowMatchingPaper
from server_strategies.priors.total_variation import TotalVariation


def test_every_line_of_a_table_stands_below_the_papers() -> None:
    for name, element in ELEMENTS.items():
        for budget in BUDGETS:
            cases = element.cases(budget)
            assert len({case.name for case in cases}) == len(cases), name
            lines = {element.published("cifar10", case) for case in cases}
            assert (None in lines) == name.startswith("figure")
            if name.startswith("table") and budget != "smoke":
                assert {case.attack.name for case in cases} >= {OURS[1]}
    # Two lines read off the paper's page.
    assert TABLE_2["cifar10"]["flow_matching"][0] == 20.861
    assert TABLE_4["precode"]["sme"][:2] == (14.712, 0.369)
    both = [*TABLE_2["cifar10"].values(), *TABLE_2["tiny_imagenet"].values()]
    assert all(len(line) == len(COLUMNS) for line in both)
    assert len({*TABLE_3}) == 5


@pytest.mark.parametrize(
    ("element", "cases"),
    [
        ("--table 1", "B=1, .*flow_matching"),
        ("--table 2", "sme"),
        ("--table 3", "resnet8_wide .*paper"),
        ("--table 4", "clip.* sme"),
        ("--figure 2", ""),
        ("--figure 3", "B=[12].* sme"),
        ("--figure 4", "sme"),
        ("--figure 5", "(sme|dlf)"),
    ],
)
def test_it_is_made_by_one_command(element: str, cases: str, tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    shown = flowleak(
        "bench", "paper", *element.split(), "--budget", "smoke", "--dataset", "photos",
        "--trials", "1", "--out", str(out), "--cases", cases,
    )  # fmt: skip
    drawn = element.startswith("--figure")
    assert out.with_suffix(".png").is_file() == drawn
    if element == "--figure 2":
        assert "mosaic" in shown
        return
    table = out.with_suffix(".md").read_text()
    assert f"flowleak bench paper {element} --budget smoke --dataset photos" in table
    assert "The paper gives no batch size" in table and "recovery threshold" in table
    head = next(line for line in table.splitlines() if line.startswith("|"))
    columns = COLUMNS[: ELEMENTS[element.removeprefix("--")].columns]
    assert all(f"| {name} |" in head for name in columns)
    if element.startswith("--table") and element != "--table 2":  # that one is of two data sets
        assert "**the paper: " in table


def test_the_literal_method_is_eq_18_with_what_the_paper_says_of_its_search() -> None:
    """The loss of one iteration, written out; then that it stops at a low enough loss."""
    preset = load_config({"attack": "flow_matching_paper"}).attack
    assert preset.iterations == 20_000 and preset.recovery_threshold > 0
    assert preset in [case.attack for case in ELEMENTS["table 2"].cases("gpu")]
    observation, knowledge, x = client(LocalTraining("sgd", lr=0.01, local_steps=2), count=2)

    def velocity(images: Tensor, t: Tensor) -> Tensor:
        return images * t.view(-1, 1, 1, 1)

    network = nn.Module()
    network.forward, network.multiple = velocity, 4
    attack = FlowMatchingPaper()
    parts = attack.parts(Task(observation, knowledge, network, Budget()))
    (alpha,) = parts.matching.unknowns
    assert (alpha.value.item(), alpha.low, alpha.high) == (0.5, 0, 1)
    assert parts.prior_strength is None and parts.schedule(0.0) == parts.schedule(0.9) == 1
    halfway = {k: (w + observation.w1[k]) / 2 for k, w in observation.w0.items()}
    halfway = {k: w.requires_grad_() for k, w in halfway.items()}
    model = create_model("convnet", 10, SHAPE)
    outputs = functional_call(model, halfway, x)
    loss = nn.functional.cross_entropy(outputs, torch.tensor(knowledge.labels))
    slopes = torch.autograd.grad(loss, list(halfway.values()))
    slope, update = (
        torch.cat([part.flatten() for part in whole])
        for whole in (slopes, [-observation.update[name] for name in halfway])
    )
    cosine = nn.functional.cosine_similarity(slope, update, dim=0)
    assert parts.matching(x, 0.0).item() == pytest.approx(1 - cosine.item(), abs=1e-5)
    images = torch.rand((2, 3, 32, 32), generator=torch.Generator().manual_seed(0))
    variation, flow = (prior(images, 0.5).item() for prior in parts.priors)
    t = (attack.t_start + attack.t_end) / 2  # t(k) is linear
    square = (t * (2 * images - 1)).square().mean().item()
    assert flow == pytest.approx(attack.flow * square, rel=1e-5)
    assert variation == pytest.approx(TotalVariation(attack.tv, STD)(images, 0.5).item())


def test_a_prior_that_saw_the_train_split_is_marked() -> None:
    def words(data: str) -> dict[str, str]:
        suite = paper_suite("table 2", "smoke")
        results = suite.results("table 2", Setting(DatasetConfig(data), trials=1))
        return {case.attack.name: results.attack_words(case) for case in results.cases}

    marked = {name for name, line in words("tiny_imagenet").items() if "saw the train" in line}
    assert marked == {"ggl", "flow_matching", "flow_matching_paper"}
    assert not any("saw" in line for line in words("cifar10").values())
