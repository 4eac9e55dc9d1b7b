from __future__ import annotations

import io
import os
import shutil
import struct
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from flwr_datasets import FederatedDataset
from flwr_datasets.partitioner import IidPartitioner
from PIL import Image

from fl_app import data
from fl_app.commands.arguments import named_after
from fl_app.config import DatasetConfig, load_config
from fl_app.data import (
    DataError,
    dataset_info,
    fingerprint,
    halves,
    load_evaluation,
    load_partition,
    load_split,
    photos,
)
from fl_app.data.base import channel_statistics, read_image
from fl_app.models import create_model
from fl_app.server_app import _prepare

PHOTOS = DatasetConfig(name="photos")
SHARED = Path(os.environ.get("FLOWLEAK_SHARED", Path(__file__).resolve().parents[4] / "shared"))


def write_image(path: Path, value: int, size: tuple[int, int] = (12, 10)) -> None:
    """Write noise that is `value` bright on average; size is (width, height)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(value).integers(0, 50, (size[1], size[0], 3))
    Image.fromarray((value - 25 + noise).astype(np.uint8)).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for label, name in enumerate(("cat", "dog")):
        for number in range(4):
            write_image(tmp_path / "train" / name / f"{number}.png", 60 + 100 * label + number)
    write_image(tmp_path / "test" / "dog" / "0.png", 200)
    return tmp_path


def test_clients_may_hold_test_images_and_the_others_evaluate() -> None:
    config = replace(PHOTOS, split="test")
    held = [load_partition(config, client, 3, seed=1).images for client in range(3)]
    both = torch.cat([*held, load_evaluation(config).images])
    test = load_split(PHOTOS, "test").images
    assert sorted(map(bytes_of, both)) == sorted(map(bytes_of, test))
    counts = [
        torch.cat(labels).bincount(minlength=10)
        for labels in (
            [load_partition(config, client, 3, seed=1).labels for client in range(3)],
            [load_evaluation(config).labels],
        )
    ]
    assert (counts[1] - counts[0]).abs().max() <= 1
    assert torch.equal(load_evaluation(PHOTOS).images, test)
    assert fingerprint(config) != fingerprint(PHOTOS)


def test_halves_hold_every_class_whatever_the_order() -> None:
    assert halves([0, 1, 0, 1, 0, 1, 1]) == ([0, 1, 4, 5], [2, 3, 6])
    assert halves([0, 0, 0, 1, 1]) == ([0, 2, 3], [1, 4])
    assert halves([]) == ([], [])


def bytes_of(image: torch.Tensor) -> bytes:
    return image.numpy().tobytes()


def test_photos_facts() -> None:
    info, train, test = (
        dataset_info(PHOTOS),
        load_split(PHOTOS, "train"),
        load_split(PHOTOS, "test"),
    )
    for images in (train, test):
        assert images.images.dtype == torch.uint8 and images.labels.dtype == torch.int64
        assert images.images.shape == (len(images), *info.image_shape)
        assert images.labels.unique().tolist() == list(range(info.num_classes))
    assert 200 <= len(train) <= 1000
    assert len(torch.unique(train.images.flatten(1), dim=0)) == len(train)
    mean, std = channel_statistics(train.images)
    # JPEG decoders may differ by a grey level.
    assert mean == pytest.approx(info.mean, abs=1e-3) and std == pytest.approx(info.std, abs=1e-3)
    assert train.images.float().std(dim=(2, 3)).mean(dim=1).min() > 0.09 * 255


def test_photos_are_deterministic() -> None:
    before = load_split(PHOTOS, "train")
    photos.crops.cache_clear()
    after = photos.SOURCE.split(PHOTOS, "train")
    assert after["label"][:] == before.labels.tolist()
    again = [crop.image for crop in photos.crops("train")]
    assert np.array_equal(np.stack(again).transpose(0, 3, 1, 2), before.images.numpy())


def test_no_pixel_is_in_a_train_and_a_test_crop() -> None:
    for label, name in enumerate(photos.PHOTOS):
        seen = {}
        for split in ("train", "test"):
            mask = np.zeros((2000, 2000), dtype=bool)
            for crop in photos.crops(split):
                if crop.label == label:
                    left, top, right, bottom = crop.box
                    mask[top:bottom, left:right] = True
            seen[split] = mask
            assert mask.any()
        assert not (seen["train"] & seen["test"]).any(), name


def test_a_crop_is_the_area_average_of_its_box() -> None:
    crop = next(crop for crop in photos.crops("train") if crop.box[2] - crop.box[0] == 128)
    box = np.asarray(photos.open_photo(photos.PHOTOS[crop.label]).crop(crop.box), dtype=float)
    average = box.reshape(32, 4, 32, 4, 3).mean(axis=(1, 3))
    assert np.abs(average - np.asarray(crop.image)).max() <= 1


@pytest.mark.parametrize("partitioner", ["iid", "dirichlet"])
def test_partitions_cover_every_example_once(partitioner: str) -> None:
    config = replace(PHOTOS, partitioner=partitioner)
    parts = [load_partition(config, part, 7, seed=3) for part in range(7)]
    assert all(len(part) for part in parts)
    rows = sorted(
        (int(label), image.numpy().tobytes())
        for part in parts
        for image, label in zip(part.images, part.labels, strict=True)
    )
    whole = load_split(PHOTOS, "train")
    expected = sorted(
        (int(label), image.numpy().tobytes())
        for image, label in zip(whole.images, whole.labels, strict=True)
    )
    assert rows == expected


def test_seed_decides_the_partition() -> None:
    first = load_partition(PHOTOS, 0, 4, seed=0)
    other = load_partition(PHOTOS, 0, 4, seed=1)
    load_partition.cache_clear()
    again = load_partition(PHOTOS, 0, 4, seed=0)
    assert again is not first and torch.equal(again.images, first.images)
    assert not torch.equal(other.images, first.images)


def test_small_alpha_skews_the_labels() -> None:
    def largest_share(config: DatasetConfig) -> float:
        parts = [load_partition(config, part, 5, seed=0).labels for part in range(5)]
        return float(np.mean([labels.bincount().max() / len(labels) for labels in parts]))

    iid = largest_share(PHOTOS)
    skewed = largest_share(replace(PHOTOS, partitioner="dirichlet", dirichlet_alpha=0.1))
    assert skewed > 1.5 * iid


@pytest.mark.parametrize(
    ("partition", "clients", "alpha", "words"),
    [
        (4, 4, 1.0, "partition is 4; allowed: 0 to 3"),
        (-1, 4, 1.0, "partition is -1"),
        (0, 10_000, 1.0, "num_clients is 10000; allowed for photos: 1 to"),
        (0, 100, 1e-3, "dirichlet_alpha is 0.001.*raise it"),
    ],
)
def test_impossible_partitions(partition: int, clients: int, alpha: float, words: str) -> None:
    config = replace(PHOTOS, partitioner="dirichlet", dirichlet_alpha=alpha)
    with pytest.raises(DataError, match=words):
        load_partition(config, partition, clients, seed=0)


def test_a_simulation_cuts_the_data_before_it_starts() -> None:
    with pytest.raises(DataError, match="num_clients is 10000; allowed for photos: 1 to"):
        _prepare({"overrides": "num_clients=10000"}, simulated=True)
    # On real machines the server holds no data.
    _prepare({"overrides": "num_clients=10000"}, simulated=False)


def test_unknown_split() -> None:
    with pytest.raises(DataError, match="split is 'valid'; allowed: train, test"):
        load_split(PHOTOS, "valid")


def test_imagefolder(folder: Path) -> None:
    config = DatasetConfig(name="imagefolder", source=str(folder))
    info, train, test = (
        dataset_info(config),
        load_split(config, "train"),
        load_split(config, "test"),
    )
    assert (info.num_classes, info.image_shape) == (2, (3, 10, 12))
    assert train.labels.tolist() == [0] * 4 + [1] * 4 and test.labels.tolist() == [1]
    with Image.open(folder / "train" / "dog" / "1.png") as image:
        assert np.array_equal(train.images[5].permute(1, 2, 0).numpy(), np.asarray(image))
    pixels = train.images.double() / 255
    assert info.mean == pytest.approx(pixels.mean(dim=(0, 2, 3)).tolist())
    assert info.std == pytest.approx(pixels.std(dim=(0, 2, 3), correction=0).tolist())


def test_grey_images_get_three_channels(folder: Path) -> None:
    path = folder / "train" / "cat" / "0.png"
    with Image.open(path) as image:
        grey = image.convert("L")
    grey.save(path)
    images = load_split(DatasetConfig(name="imagefolder", source=str(folder)), "train").images
    assert torch.equal(images[0], torch.from_numpy(np.array(grey)).expand(3, -1, -1))


def _truncate(folder: Path) -> None:
    path = folder / "train" / "cat" / "2.png"
    path.write_bytes(path.read_bytes()[:100])


def _sixteen_bits(folder: Path) -> None:
    Image.fromarray(np.zeros((10, 12), np.uint16)).save(folder / "train" / "cat" / "2.png")


def _sixteen_bits_of_colour(folder: Path) -> None:
    """Write a PNG that Pillow opens as RGB, and would cut to 8 bits a channel."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check)

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 12, 10, 16, 2, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress((b"\0" + bytes(12 * 6)) * 10))
    png = b"\x89PNG\r\n\x1a\n" + head + body + chunk(b"IEND", b"")
    (folder / "train" / "cat" / "2.png").write_bytes(png)


def _transparent(folder: Path) -> None:
    path = folder / "train" / "cat" / "2.png"
    with Image.open(path) as image:
        clear = image.convert("RGBA")
    clear.putpixel((3, 3), (1, 2, 3, 254))
    clear.save(path)


def test_images_are_those_of_hugging_faces_decoder(tmp_path: Path) -> None:
    """Turned by their orientation, and of an animation the first frame."""
    noise = np.random.default_rng(0).integers(0, 255, (2, 10, 12, 3)).astype(np.uint8)
    first, second = (Image.fromarray(each) for each in noise)
    sideways = Image.Exif()
    sideways[0x0112] = 6
    first.save(tmp_path / "turned.png", exif=sideways)
    first.save(tmp_path / "frames.tiff", save_all=True, append_images=[second])
    first.convert("P").save(tmp_path / "palette.png")
    first.convert("RGBA").save(tmp_path / "opaque.png")
    for path in tmp_path.iterdir():
        theirs = datasets.Image().decode_example({"path": str(path), "bytes": None})
        ours = read_image(str(path), path.name).transpose(1, 2, 0)
        assert np.array_equal(ours, np.asarray(theirs.convert("RGB"))), path
    assert read_image(str(tmp_path / "turned.png"), "").shape == (3, 12, 10)


def test_a_missing_or_empty_test_folder_is_told_before_training(folder: Path) -> None:
    settings = f"dataset.source={folder} num_clients=2 rounds=1"
    run_config = {"dataset": "imagefolder", "model": "mlp"}
    for spoil, words in (
        (lambda: None, "the test split holds 1 images for 2 clients; allowed: one each"),
        (lambda: shutil.rmtree(folder / "test" / "dog"), "the test split holds no image"),
        (lambda: (folder / "test").rmdir(), "test is not a folder; needed"),
    ):
        spoil()
        for cached in (dataset_info, data._encoded_split, data._partitioner, load_partition):
            cached.cache_clear()
        with pytest.raises(DataError, match=words):
            _prepare(run_config | {"overrides": settings}, simulated=True)
    settings += " strategy.fraction_evaluate=0"
    _prepare(run_config | {"overrides": settings}, simulated=True)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (_truncate, r"cat/2.png can't be read as an image"),
        (_sixteen_bits, r"cat/2.png has mode I;16; allowed: 8 bits"),
        (
            lambda folder: write_image(folder / "train" / "dog" / "9.png", 99, size=(8, 8)),
            r"dog/9.png has shape \(3, 8, 8\).*must have \(3, 10, 12\)",
        ),
        (_sixteen_bits_of_colour, r"cat/2.png has 16 bits a channel; allowed: 8 bits"),
        (_transparent, r"cat/2.png has transparent pixels; allowed: opaque ones"),
        (
            lambda folder: (folder / "train" / "cat" / "more").mkdir(),
            "cat/more is a folder in a class folder; move its images to .*train/cat",
        ),
        (
            lambda folder: (folder / "train" / "cat" / "notes.txt").touch(),
            r"cat/notes.txt is no image file; allowed: .bmp, .*Convert or remove it",
        ),
        (
            lambda folder: os.mkfifo(folder / "train" / "cat" / "9.png"),
            "cat/9.png is no image file",
        ),
        (
            lambda folder: (folder / "train" / "9.png").touch(),
            "train/9.png is in no class folder; move or remove it",
        ),
        (lambda folder: (folder / "train" / "cow").mkdir(), "cow holds no image"),
        (
            lambda folder: (folder / "train" / "dog").rename(folder / "dog"),
            "the train split has fewer than two classes",
        ),
        (
            lambda folder: (folder / "train").rename(folder / "training"),
            "train is not a folder; needed: .*CLASS",
        ),
    ],
)
def test_imagefolder_that_cannot_be_used(folder: Path, spoil, words: str) -> None:
    spoil(folder)
    with pytest.raises(DataError, match=words):
        load_split(DatasetConfig(name="imagefolder", source=str(folder)), "train")


def test_one_class_is_refused_before_a_run_starts(folder: Path) -> None:
    (folder / "train" / "dog").rename(folder / "dog")
    with pytest.raises(DataError, match="train holds one class folder, cat; needed: two or more"):
        dataset_info(DatasetConfig(name="imagefolder", source=str(folder)))
    (folder / "train" / "cat").rename(folder / "cat")
    dataset_info.cache_clear()
    with pytest.raises(DataError, match="train holds no class folder; needed: two or more"):
        dataset_info(DatasetConfig(name="imagefolder", source=str(folder)))


def test_a_broken_image_is_refused_before_a_run_starts(folder: Path) -> None:
    _truncate(folder)
    with pytest.raises(DataError, match=r"cat/2\.png can't be read as an image"):
        dataset_info(DatasetConfig(name="imagefolder", source=str(folder)))


def test_extreme_skew_leaves_no_client_empty() -> None:
    config = replace(PHOTOS, partitioner="dirichlet", dirichlet_alpha=1e-3)
    parts = [load_partition(config, part, 3, seed=0).labels for part in range(3)]
    assert min(map(len, parts)) >= 1
    # Every class is with one client, all but a few images.
    counts = torch.stack([labels.bincount(minlength=6) for labels in parts])
    assert (counts.amax(0) > 0.9 * counts.sum(0)).all()


def test_test_class_that_train_lacks(folder: Path) -> None:
    write_image(folder / "test" / "emu" / "0.png", 100)
    with pytest.raises(DataError, match="emu has no folder in train; allowed: cat, dog"):
        load_split(DatasetConfig(name="imagefolder", source=str(folder)), "test")


@pytest.fixture
def hub_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a local copy of a tiny data set in CIFAR-10's layout."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    features = datasets.Features(
        {"img": datasets.Image(), "label": datasets.ClassLabel(num_classes=10)}
    )
    for split in ("train", "test"):
        rows = [photo.image for photo in photos.crops(split)[:60:2]]
        columns = {"img": rows, "label": [row % 10 for row in range(len(rows))]}
        datasets.Dataset.from_dict(columns, features=features).to_parquet(
            tmp_path / "set" / "data" / f"{split}-00000-of-00001.parquet"
        )
    return tmp_path / "set"


def test_hub_layout_is_cut_as_federated_dataset_cuts_it(hub_folder: Path) -> None:
    config = DatasetConfig(name="cifar10", source=str(hub_folder))
    federated = FederatedDataset(
        dataset=str(hub_folder), partitioners={"train": IidPartitioner(4)}, seed=5
    )
    part, expected = load_partition(config, 2, 4, seed=5), federated.load_partition(2)
    assert part.labels.tolist() == expected["label"][:]
    for image, row in zip(part.images, expected, strict=True):
        assert np.array_equal(image.permute(1, 2, 0).numpy(), np.asarray(row["img"]))
    assert len(load_split(config, "test")) == 30


def grey_digits(folder: Path, count: int = 24) -> list[np.ndarray]:
    """Write a data set in MNIST's layout; return the train images."""
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=10)}
    )
    noise = np.random.default_rng(0).integers(0, 256, (2, count, 28, 28), "uint8")
    for split, pixels in zip(("train", "test"), noise, strict=True):
        columns = {
            "image": [Image.fromarray(image) for image in pixels],
            "label": [row % 10 for row in range(count)],
        }
        datasets.Dataset.from_dict(columns, features=features).to_parquet(
            folder / "mnist" / f"{split}-00000-of-00001.parquet"
        )
    return list(noise[0])


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_grey_data_sets_have_one_channel(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    written = grey_digits(tmp_path)
    config = load_config({"dataset": name, "overrides": f"dataset.source={tmp_path}/mnist"}).dataset
    info, train = dataset_info(config), load_split(config, "train")
    assert train.images.shape == (24, *info.image_shape) == (24, 1, 28, 28)
    assert np.array_equal(train.images[:, 0].numpy(), np.stack(written))
    assert len(info.mean) == len(info.std) == 1
    create_model("convnet", info.num_classes, info.image_shape)


def test_cifar100_has_its_fine_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [photo.image for photo in photos.crops("train")[:60:2]]
    columns = {
        "img": rows,
        "fine_label": [99 - row for row in range(len(rows))],
        "coarse_label": [row % 20 for row in range(len(rows))],
    }
    features = datasets.Features(
        {
            "img": datasets.Image(),
            "fine_label": datasets.ClassLabel(num_classes=100),
            "coarse_label": datasets.ClassLabel(num_classes=20),
        }
    )
    datasets.Dataset.from_dict(columns, features=features).to_parquet(
        tmp_path / "set" / "train-00000-of-00001.parquet"
    )
    config = load_config(
        {"dataset": "cifar100", "overrides": f"dataset.source={tmp_path}/set"}
    ).dataset
    train = load_split(config, "train")
    assert train.labels.tolist() == columns["fine_label"]
    assert np.array_equal(train.images[3].permute(1, 2, 0).numpy(), np.asarray(rows[3]))
    assert dataset_info(config).num_classes == 100


def _without(image: Any, label: Any) -> Callable[[Path], None]:
    """Return a function that writes a data set whose fourth row is this."""

    def write(path: Path) -> None:
        photo = io.BytesIO()
        photos.crops("train")[0].image.save(photo, "PNG")
        cells: list[Any] = [{"bytes": photo.getvalue(), "path": None}] * 6
        labels: list[Any] = [0, 1] * 3
        cells[3] = cells[3] if image == "whole" else image and image(photo.getvalue())
        labels[3] = label
        features = datasets.Features({"img": datasets.Image(), "label": datasets.Value("int64")})
        dataset = datasets.Dataset.from_dict({"img": cells, "label": labels}, features=features)
        dataset.to_parquet(path / "train-00000-of-00001.parquet")

    return write


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (
            _without(lambda data: {"bytes": data[:200], "path": None}, 1),
            "cifar10: image 3 can't be read as an image",
        ),
        (_without(None, 1), "cifar10: image 3 is missing"),
        (_without("whole", None), "cifar10: image 3 has no label"),
        (_without("whole", 10), "cifar10 has labels from 0 to 10; allowed: 0 to 9"),
    ],
)
def test_a_broken_row_of_a_public_data_set_is_refused(
    write: Callable[[Path], None], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "set").mkdir()
    write(tmp_path / "set")
    with pytest.raises(DataError, match=words):
        load_split(DatasetConfig(name="cifar10", source=str(tmp_path / "set")), "train")


def test_wrong_layout(hub_folder: Path) -> None:
    with pytest.raises(DataError, match="has the columns img, label; needed: image, label"):
        # Tiny-ImageNet's train split has another image column.
        load_split(DatasetConfig(name="tiny_imagenet", source=str(hub_folder)), "train")
    with pytest.raises(DataError, match=r"test split can't be loaded.*must have the layout.*valid"):
        load_split(DatasetConfig(name="tiny_imagenet", source=str(hub_folder)), "test")


@pytest.mark.parametrize("source", ["/no/such/folder", "./no/such", "~/no/such", "no-such", ""])
def test_missing_folder_is_not_looked_for_on_the_hub(
    source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flwr_datasets.FederatedDataset", lambda **_: pytest.fail("tried the hub"))
    with pytest.raises(DataError, match=r"dataset\.source is .*set"):
        load_split(DatasetConfig(name="cifar10", source=source), "train")


def test_unreachable_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        DataError, match=r"cifar10.*nobody/nothing .*dataset\.source=/path/to/folder"
    ):
        load_split(DatasetConfig(name="cifar10", source="nobody/nothing"), "train")


def test_a_folders_name_says_which_data_set_it_holds() -> None:
    for folder, name in (
        ("tiny-imagenet-200", "tiny_imagenet"),
        ("CIFAR-100", "cifar100"),
        ("cifar10", "cifar10"),
        ("FashionMNIST", "fashion_mnist"),
        ("mnist", "mnist"),
        ("parquet", "cifar10"),
    ):
        assert named_after(folder) == name


def needs(name: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(not (SHARED / name).is_dir(), reason=f"{SHARED / name} is not here")


@needs("data/cifar10")
def test_cifar10_from_a_folder() -> None:
    config = DatasetConfig(
        name="cifar10", source=str(SHARED / "data/cifar10"), partitioner="dirichlet"
    )
    info, part = dataset_info(config), load_partition(config, 0, 20, seed=0)
    assert part.images.shape == (len(part), 3, 32, 32)
    mean, std = channel_statistics(load_split(config, "test").images)
    assert mean == pytest.approx(info.mean, abs=0.02) and std == pytest.approx(info.std, abs=0.02)


@needs("data/tiny-imagenet")
def test_tiny_imagenet_from_a_folder() -> None:
    config = DatasetConfig(name="tiny_imagenet", source=str(SHARED / "data/tiny-imagenet"))
    info, part = dataset_info(config), load_partition(config, 3, 10, seed=0)
    assert part.images.shape == (1000, 3, 64, 64)
    mean, std = channel_statistics(part.images)
    assert mean == pytest.approx(info.mean, abs=0.02) and std == pytest.approx(info.std, abs=0.02)
    grey = (part.images[:, :1] == part.images).flatten(1).all(dim=1)
    assert grey.any() and not grey.all()
