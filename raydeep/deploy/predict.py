"""Labels pictures with an exported model: onnxruntime and the spec, no torch, no Ray."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from raydeep.data import decode
from raydeep.data.sources import SUFFIXES
from raydeep.deploy.runtimes import open_onnx
from raydeep.errors import DataError, ModelError
from raydeep.run import check_sums, read_json


class Prediction(NamedTuple):
    """One labelled picture; `error` says why where there is no label."""

    path: str
    label: str | None
    probability: float
    error: str | None = None


def pictures(paths: list[Path]) -> list[Path]:
    """The files named, and those in the folders named.

    Raises:
        DataError: a path does not exist, or there is no picture at all.
    """
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            found += sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
        elif path.is_file():
            found.append(path)
        else:
            raise DataError(f"{path}: no such picture or folder")
    if not found:
        raise DataError(f"no pictures in {', '.join(map(str, paths))}")
    return found


def _spec(folder: Path) -> tuple[tuple[int, int, int], list[str]]:
    """Input shape HWC and class names of a model folder."""
    spec = read_json(folder / "spec.json")
    try:
        (height, width, channels), classes = spec["input"], spec["classes"]
        whole = 0 < height * width <= decode.MAX_PIXELS and channels in (1, 3) and len(classes) > 0
        whole = whole and all(type(n) is int and n > 0 for n in (height, width)) and type(classes) is list
    except (KeyError, TypeError, ValueError):
        whole = False
    if not whole or not all(isinstance(name, str) for name in classes):
        raise ModelError(f"{folder}/spec.json: not the spec of a model that takes pictures; export the model again")
    return (height, width, channels), classes


def predict(folder: Path, paths: list[Path]) -> Iterator[Prediction]:
    """Label pictures; one that can't be read is reported in its row, the others go on.

    Args:
        folder: a model folder.
        paths: pictures and folders of pictures.

    Raises:
        ModelError: the folder is no model.
    """
    if not (folder / "model.onnx").is_file() or not (folder / "spec.json").is_file():
        raise ModelError(f"{folder}: not a model folder (no model.onnx and spec.json); see RUN/models/")
    check_sums(folder)
    (height, width, channels), classes = _spec(folder)
    run = open_onnx(folder / "model.onnx")
    try:
        found = run(np.zeros((1, height, width, channels), np.uint8)).shape
    except Exception as err:  # onnxruntime's own kinds share no public base
        raise ModelError(f"{folder}: model.onnx does not take what spec.json says: {err}") from None
    if found != (1, len(classes)):
        raise ModelError(f"{folder}: model.onnx gives {list(found)}, spec.json names {len(classes)} classes")
    for path in pictures(paths):
        try:
            with path.open("rb") as file:
                picture = decode.open_picture(decode.read_file(file))
        except (DataError, OSError) as err:
            yield Prediction(str(path), None, 0.0, str(err))
            continue
        pixels = decode.to_pixels(picture, "grey" if channels == 1 else "rgb", height if height == width else None)
        if pixels.shape != (height, width, channels):  # pictures that are not square are never scaled
            size = f"{pixels.shape[0]}×{pixels.shape[1]} pixels, the model takes {height}×{width}"
            yield Prediction(str(path), None, 0.0, size)
            continue
        logits = run(pixels[None])[0].astype(np.float64)
        probabilities = np.exp(logits - logits.max())
        probabilities /= probabilities.sum()
        best = int(probabilities.argmax())
        yield Prediction(str(path), classes[best], float(probabilities[best]))
