"""Pictures that a run keeps for its report: the right ones, small enough, and never at the cost of the run."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from raydeep.config import Augment, Data, Job
from raydeep.data import shards
from raydeep.data.resident import Dataset, Pixels
from raydeep.data.splits import read_dataset
from raydeep.ops import gallery


def dataset(rows: int, height: int, width: int, channels: int, classes: int = 3, test: Any = None) -> Dataset:
    def split(seed: int) -> Pixels:
        images = np.random.default_rng(seed).integers(0, 256, (rows, height, width, channels), np.uint8)
        return Pixels(images, np.arange(rows) % classes)

    names = [f"class {k}" for k in range(classes)]
    return Dataset(split(0), split(1), test or split(2), names, [0.3] * channels, [0.2] * channels)


def written(tmp_path: Path, data: Dataset, predicted: np.ndarray, probability: np.ndarray, **augment: Any) -> Any:
    gallery.write(tmp_path, Job(augment=Augment(**augment)), data, predicted, probability.astype(np.float32))
    return json.loads((tmp_path / gallery.NAME).read_text())


def pixels(uri: str) -> np.ndarray:
    kind, _, text = uri.partition(";base64,")
    image = Image.open(io.BytesIO(base64.b64decode(text, validate=True)))
    assert f"data:image/{image.format.lower()}" == kind
    return np.asarray(image)


def test_the_surest_errors_of_each_class_come_first():
    labels = np.array([0, 0, 0, 1, 1, 2, 2, 2])
    predicted = np.array([1, 0, 2, 0, 1, 2, 0, 1])
    sure = np.array([0.6, 0.99, 0.9, 0.7, 0.99, 0.99, 0.4, 0.8])
    # wrong: class 0 rows 2 (0.9), 0 (0.6); class 1 row 3 (0.7); class 2 rows 7 (0.8), 6 (0.4)
    assert gallery.worst(labels, predicted, sure).tolist() == [2, 7, 3, 0, 6]
    assert gallery.worst(labels, labels, sure).tolist() == []


def test_classes_and_errors_of_a_class_are_few():
    labels = np.repeat(np.arange(30), 10)
    wrong = np.tile(np.arange(10), 30) < np.repeat(np.where(np.arange(30) < 5, 2, 9), 10)  # classes 0 to 4 err less
    found = gallery.worst(labels, np.where(wrong, (labels + 1) % 30, labels), np.linspace(0, 1, 300))
    assert np.bincount(labels[found]).tolist() == [0] * 5 + [gallery.A_CLASS] * gallery.MOST_CLASSES
    assert sorted(labels[found[: gallery.MOST_CLASSES]].tolist()) == list(range(5, 25))


@pytest.mark.parametrize("channels", [1, 3])
def test_small_pictures_are_kept_to_the_pixel(tmp_path, channels):
    data = dataset(12, 8, 10, channels)
    predicted = data.test.labels.copy()
    predicted[[4, 7]] = [2, 0]
    found = written(tmp_path, data, predicted, np.linspace(0.5, 0.9, 12), horizontal_flip=1.0)
    assert (found["rows"], found["wrong"]) == (12, 2)
    assert [(e["index"], e["true"], e["predicted"]) for e in found["errors"]] == [(7, 1, 0), (4, 1, 2)]
    assert found["errors"][0]["probability"] == pytest.approx(0.5 + 0.4 * 7 / 11, abs=1e-4)
    for error in found["errors"]:
        assert np.array_equal(pixels(error["picture"]), data.test.images[error["index"]].squeeze())
    preview = found["augmentation"]
    assert preview["heads"] == ["original", *(f"epoch {k}" for k in range(gallery.COLUMNS - 1))]
    assert preview["changes"] is True
    for originals, flipped in zip(preview["pictures"][0], preview["pictures"][1], strict=True):
        assert np.array_equal(pixels(originals)[:, ::-1], pixels(flipped))


def test_without_augmentation_nothing_changes_and_that_is_said(tmp_path):
    data = dataset(5, 8, 8, 1)
    found = written(tmp_path, data, data.test.labels, np.ones(5))
    assert found["errors"] == []
    assert found["augmentation"]["changes"] is False


def test_large_pictures_of_many_classes_stay_below_the_limit(tmp_path):
    data = dataset(400, 224, 300, 3, classes=40)
    found = written(tmp_path, data, (data.test.labels + 1) % 40, np.linspace(0, 1, 400), mixup=0.4)
    assert (tmp_path / gallery.NAME).stat().st_size < 300_000
    assert 20 < len(found["errors"]) < 120  # as many as there is room for; noise is the worst there is for JPEG
    first = [error["true"] for error in found["errors"][:20]]
    assert len(set(first)) == 20  # the worst of each class before any second one
    assert {pixels(error["picture"]).shape for error in found["errors"]} == {(72, 96, 3)}


def test_of_streamed_pictures_only_those_shown_are_read(tmp_path):
    manifest = shards.write_dataset(Data(), tmp_path / "digits")
    memory, streamed = (read_dataset(manifest, Data(cache=cache)) for cache in ("resident", "stream"))
    wrong = [3, 100, 170]
    predicted = memory.test.labels.copy()
    predicted[wrong] = (predicted[wrong] + 1) % 10
    sure = np.linspace(0, 1, len(predicted))
    fetched: list[int] = []

    def engine(units: Any, form: Any, ahead: int) -> Any:
        fetched.extend(len(part.rows) for unit in units for part in unit)
        return read_in_process(units, form, ahead)

    read_in_process, streamed.test.engine = streamed.test.engine, engine
    there = written(tmp_path, memory, predicted, sure, rotation=10)
    assert written(tmp_path, streamed, predicted, sure, rotation=10)["errors"] == there["errors"]
    assert len(there["errors"]) == sum(fetched) == 3


def test_a_run_does_not_fail_of_a_picture(tmp_path):
    manifest = shards.write_dataset(Data(), tmp_path / "digits")
    data = read_dataset(manifest, Data(cache="stream"))
    wrong = (data.test.labels + 1) % 10
    for shard in (tmp_path / "digits").glob("*.parquet"):
        shard.write_bytes(b"")
    said = gallery.keep(tmp_path, Job(), data, wrong, np.ones(len(wrong), np.float32))
    assert said.startswith("no pictures for the report: ")
    assert not list(tmp_path.glob("*gallery*"))
    held = dataset(4, 8, 8, 1)
    said = gallery.keep(tmp_path / "digits" / "dataset.json", Job(), held, held.test.labels, np.ones(4, np.float32))
    assert said.startswith("no pictures for the report: ")
