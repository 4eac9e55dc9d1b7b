"""`flowleak prior`: flow-matching priors, trained and measured."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fl_app.commands.arguments import DatasetChoice, Weights, dataset_config, prior_weights
from fl_app.commands.group import group
from fl_app.commands.output import screen
from server_strategies.priors.settings import TrainingSettings

if TYPE_CHECKING:
    from fl_app.config import DatasetConfig
    from fl_app.data import ImageSet

prior_app = group("Flow-matching priors: train one, measure one.")


@prior_app.command("train")
def train_prior(
    source: Annotated[
        str,
        typer.Argument(
            help="A folder of images or of parquet files, a data set on the hub, or a .npy file."
        ),
    ],
    layout: Annotated[
        str, typer.Option(help="images: a file is an image; mosaic: a grid of 32x32 tiles.")
    ] = "images",
    network: Annotated[
        str, typer.Option(help="compact: for a CPU; unet64: the paper's, for a GPU.")
    ] = TrainingSettings.network,
    images: Annotated[
        int, typer.Option(help="Images to see in all, 1 or more.")
    ] = TrainingSettings.images,
    minutes: Annotated[float, typer.Option(help="Time limit over all resumptions; 0: none.")] = 0,
    batch_size: Annotated[
        int, typer.Option(help="Images a step, 1 or more.")
    ] = TrainingSettings.batch_size,
    learning_rate: Annotated[
        float, typer.Option(help="Peak rate of AdamW, 0 to 1.")
    ] = TrainingSettings.learning_rate,
    focus: Annotated[
        float, typer.Option(help="Share of flow times in [0.6, 1]; 0.4: uniform.")
    ] = TrainingSettings.focus,
    seed: Annotated[
        int, typer.Option(help="Of the weights, the order of images and the noise.")
    ] = TrainingSettings.seed,
    start: Annotated[
        str,
        typer.Option(
            help="Weights to begin with: a prior's name (`flowleak list priors`), a .safetensors "
            "file, or hub:OWNER/NAME; default: at random."
        ),
    ] = TrainingSettings.start,
    folder: Annotated[
        Path, typer.Option(help="Checkpoint and progress; one found there is resumed.")
    ] = Path("checkpoints/prior"),
    describe: Annotated[str, typer.Option(help="What the images are, for the card.")] = "",
    out: Annotated[
        Path, typer.Option(help="The weights (.safetensors); their card lies beside them.")
    ] = Path("checkpoints/prior/prior.safetensors"),
) -> None:
    """Train a flow prior; a killed training resumes with the same command."""
    from server_strategies.priors.images import load_images
    from server_strategies.priors.training import Trainer

    console = screen()
    settings = TrainingSettings(
        network=network,
        images=images,
        minutes=minutes,
        batch_size=batch_size,
        learning_rate=learning_rate,
        focus=focus,
        seed=seed,
        start=prior_weights(start),
    )
    loaded, broken = load_images(source, layout)
    skipped = f", {broken} broken ones skipped" if broken else ""
    console.print(f"{len(loaded):,} images{skipped}")
    trainer = Trainer(loaded, settings, folder, describe or Path(source).name)
    trainer.run(console)
    trainer.export(out, _commit())
    console.print(f"Weights: {out}", highlight=False, soft_wrap=True)


@prior_app.command("bank")
def draw_image_bank(
    weights: Weights = "compact",
    images: Annotated[int, typer.Option(help="A multiple of 50.", min=50)] = 2_000,
    steps: Annotated[int, typer.Option(help="Euler steps to an image.", min=1)] = 20,
    seed: Annotated[int, typer.Option(help="Of the noise that images start from.")] = 0,
    out: Annotated[Path, typer.Option(help="The mosaic, .jpg or .png.")] = Path("bank.jpg"),
) -> None:
    """Draw the images that `feature_regression` learns on from a flow prior."""
    from server_strategies.priors.bank import draw_bank, write_bank
    from server_strategies.priors.flow import load_flow

    console = screen()
    network = load_flow(prior_weights(weights))
    with console.status("drawing") as status:
        drawn = draw_bank(
            network, images, steps, seed, lambda done: status.update(f"{done:,} of {images:,}")
        )
    write_bank(drawn, out)
    console.print(f"Images: {out}", highlight=False, soft_wrap=True)


@prior_app.command("card")
def write_hub_card(
    weights: Weights,
    out: Annotated[Path, typer.Option(help="Folder of model.safetensors and README.md.")] = Path(
        "hub"
    ),
    license_: Annotated[
        str,
        typer.Option(
            "--license", help="Of the weights, such as apache-2.0 or other; empty: the card's."
        ),
    ] = "",
    training_data: Annotated[
        str, typer.Option(help="ORG/NAME of the training images on the hub; empty: the card's.")
    ] = "",
) -> None:
    """Write a folder for the Hugging Face hub: a prior, with its card in the hub's format."""
    from server_strategies.priors.card import write_hub_folder
    from server_strategies.priors.places import weights_name

    weights = prior_weights(weights)
    write_hub_folder(weights, weights_name(weights), out, license_, training_data)
    screen().print(
        f"Folder: {out}. To upload it: hf upload OWNER/NAME {out}", highlight=False, soft_wrap=True
    )


@prior_app.command("evaluate")
def evaluate_prior(
    weights: Weights,
    dataset: DatasetChoice = "cifar10",
    images: Annotated[int, typer.Option(help="Test images to denoise, 1 or more.")] = 64,
) -> None:
    """Measure how well a flow prior denoises; its card, where it has one, keeps the table."""
    from fl_app.benchmarks.denoising import denoising_table, evaluate_denoising, write_card
    from fl_app.config import HUB
    from server_strategies.priors.places import find_weights

    console = screen()
    weights = prior_weights(weights)
    card = None if weights.startswith(HUB) else find_weights(weights).with_suffix(".md")
    data, test = _test_split(dataset)
    rows = evaluate_denoising(weights, test.images, images)
    console.print(denoising_table(rows))
    if card is None:  # the hub's cache is not ours to write to
        return
    command = f"flowleak prior evaluate {card.stem} --dataset {data.name} --images {images}"
    what = f"{images} of {len(test):,} {data.name} test images"
    write_card(card, rows, what, command, _commit())
    console.print(f"Card: {card}", highlight=False, soft_wrap=True)


@prior_app.command("assumptions")
def check_assumptions(
    weights: Weights,
    dataset: DatasetChoice = "cifar10",
    images: Annotated[int, typer.Option(help="Test images to corrupt, 2 or more.")] = 64,
    iterations: Annotated[
        int, typer.Option(help="Of the attack that gives the iterates, 2 or more.")
    ] = 100,
    out: Annotated[
        Path | None, typer.Option(help="Markdown file of the tables; default: none.")
    ] = None,
) -> None:
    """Measure the paper's assumptions A1 and A2 on a flow prior."""
    from fl_app.benchmarks.assumptions import assumption_tables
    from fl_app.benchmarks.provenance import Provenance, code_hash, short_hash, version
    from fl_app.benchmarks.rows import machine
    from fl_app.data import dataset_info
    from fl_app.util.files import write_text
    from fl_app.util.markdown import sections_markdown
    from server_strategies.priors.places import weights_digest

    weights = prior_weights(weights)
    data, test = _test_split(dataset)
    facts = {"dataset": data.name, "split": "test", "commit": _commit()}
    digest = short_hash(weights_digest(weights))
    made = Provenance(version(), code_hash(), digest, f"1 of {images} images")
    lines = assumption_tables(weights, test, dataset_info(data), images, iterations)
    name = weights if not weights.endswith(".safetensors") else Path(weights).name
    command = f"flowleak prior assumptions {name} --dataset {data.name} --images {images}"
    command += f" --iterations {iterations}"
    lines = [made.line, "", *lines]
    text = sections_markdown("assumptions", command, lines, {**machine(), **facts})
    screen().print(text, markup=False, highlight=False, soft_wrap=True)
    if out:
        write_text(out, text)


def _test_split(dataset: str) -> tuple[DatasetConfig, ImageSet]:
    """Return the data set that is meant, and its test images."""
    from fl_app.data import load_split

    data = dataset_config(dataset)
    return data, load_split(data, "test")


def _commit() -> str:
    from fl_app.runs.folder import git_commit

    return git_commit() or "unknown"
