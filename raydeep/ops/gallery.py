"""Pictures that the report shows: what the dense model errs on most surely, and what training makes of its pictures.

A run keeps them as small pictures in `gallery.json`, so that its report needs no data.
"""

from __future__ import annotations

import base64
import io
from contextlib import closing
from typing import TYPE_CHECKING, Any

import numpy as np

from raydeep.disk import write_bytes
from raydeep.errors import RaydeepError

if TYPE_CHECKING:
    from pathlib import Path

    from raydeep.config import Job
    from raydeep.data.resident import Dataset, Split

NAME = "gallery.json"
MOST_BYTES = 280_000  # of the file
MOST_CLASSES, A_CLASS = 20, 6  # classes whose errors are kept, and how many of each
ROWS, COLUMNS = 4, 6  # pictures of train; each one and its versions of the first epochs. mixup mixes two rows
SIDE = 96  # pixels; what is larger is scaled down
EXACT_SIDE = 48  # pixels up to which every pixel is kept (PNG); above, a JPEG is a fifth of its size


def write(run: Path, job: Job, data: Dataset, predicted: np.ndarray, probability: np.ndarray) -> None:
    """Write `gallery.json` into a run folder.

    Args:
        run: the folder.
        job: for its augmentation.
        data: the splits; of what is streamed only the pictures shown are read.
        predicted: int64 of shape [rows], classes that the dense model predicts for the test split.
        probability: float32 of shape [rows], of these.

    Raises:
        RaydeepError: a picture can't be read any more.
        OSError: the file can't be written.
    """
    import json

    preview = _augmentation(job, data)
    left = MOST_BYTES - len(json.dumps(preview))
    labels = data.test.labels
    chosen = worst(labels, predicted, probability)
    errors: list[dict[str, Any]] = []
    for row, pixels in zip(chosen, _read(data.test, chosen), strict=True):
        error = {
            "index": int(row), "true": int(labels[row]), "predicted": int(predicted[row]),
            "probability": round(float(probability[row]), 4), "picture": picture(pixels),
        }  # fmt: skip
        left -= len(json.dumps(error)) + 2
        if left < 0:
            break
        errors.append(error)
    found = {
        "split": "test", "rows": len(labels), "wrong": int((predicted != labels).sum()),
        "errors": errors, "augmentation": preview,
    }  # fmt: skip
    write_bytes(run / NAME, (json.dumps(found) + "\n").encode())


def worst(labels: np.ndarray, predicted: np.ndarray, probability: np.ndarray) -> np.ndarray:
    """Rows that are labelled wrongly, the surest of each class first, then the second of each, and so on.

    Args:
        labels: int64 of shape [rows].
        predicted: int64 of shape [rows].
        probability: float32 of shape [rows], of the class predicted.

    Returns:
        int64, at most A_CLASS rows of a class and MOST_CLASSES classes: those with the most errors.
    """
    wrong = np.flatnonzero(predicted != labels)
    counts = np.bincount(labels[wrong], minlength=1)
    classes = np.argsort(-counts, kind="stable")[:MOST_CLASSES]
    found = []
    for label in classes:
        rows = wrong[labels[wrong] == label]
        rows = rows[np.argsort(-probability[rows], kind="stable")][:A_CLASS]
        found += [(rank, -float(probability[row]), int(row)) for rank, row in enumerate(rows)]
    return np.array([row for _, _, row in sorted(found)], np.int64)


def picture(pixels: np.ndarray) -> str:
    """A picture, uint8 of shape [H, W, C], as a data URI of at most SIDE pixels a side."""
    from PIL import Image

    image = Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels)
    file, kind = io.BytesIO(), "png"
    if max(image.size) <= EXACT_SIDE:
        image.save(file, "PNG", optimize=True)
    else:
        kind = "jpeg"
        image.thumbnail((SIDE, SIDE))
        image.save(file, "JPEG", quality=85, optimize=True)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def _read(split: Split, rows: np.ndarray) -> np.ndarray:
    """The pictures of some rows: uint8 NHWC."""
    if not len(rows):
        return np.empty((0, *split.shape), np.uint8)
    with closing(split.read([[rows]])) as batches:
        return next(batches)


def _augmentation(job: Job, data: Dataset) -> dict[str, Any] | None:
    """Pictures of the first batch beside their versions of the first epochs."""
    from raydeep.data.augment import Augmenter
    from raydeep.data.preview import versions

    split, augmenter = data.train, Augmenter(job.augment, data.mean, data.std)
    rows = split.order(job.seed, 0, job.train.batch_size)[:ROWS]
    rows = rows[: len(rows) // 2 * 2]
    if not len(rows):
        return None
    columns = versions(_read(split, rows), split.labels[rows], data.classes, augmenter, job.seed, COLUMNS)
    return {
        "heads": [column.head for column in columns],
        "labels": split.labels[rows].tolist(),
        "captions": [column.captions for column in columns],
        "pictures": [[picture(pixels) for pixels in column.pictures] for column in columns],
        "changes": any(
            not np.array_equal(one, first)
            for column in columns[1:]
            for one, first in zip(column.pictures, columns[0].pictures, strict=True)
        ),
    }


def keep(run: Path, job: Job, data: Dataset, predicted: np.ndarray, probability: np.ndarray) -> str:
    """As `write`, but what goes wrong is no more than a line for people: a training does not fail of it."""
    try:
        write(run, job, data, predicted, probability)
    except (RaydeepError, OSError) as err:
        return f"no pictures for the report: {err}"
    return ""
