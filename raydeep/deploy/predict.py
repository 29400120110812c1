"""Labels pictures with an exported model: onnxruntime and the spec, no torch, no Ray."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

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
    spec: dict[str, Any] = read_json(folder / "spec.json")
    height, width, channels = spec["input"]
    run = open_onnx(folder / "model.onnx")
    for path in pictures(paths):
        try:
            picture = decode.open_picture(path.read_bytes())
        except (DataError, OSError) as err:
            yield Prediction(str(path), None, 0.0, str(err))
            continue
        pixels = decode.to_pixels(picture, "grey" if channels == 1 else "rgb", height if height == width else None)
        if pixels.shape != (height, width, channels):  # pictures that are not square are never scaled
            found = f"{pixels.shape[0]}×{pixels.shape[1]} pixels, the model takes {height}×{width}"
            yield Prediction(str(path), None, 0.0, found)
            continue
        logits = run(pixels[None])[0].astype(np.float64)
        probabilities = np.exp(logits - logits.max())
        probabilities /= probabilities.sum()
        best = int(probabilities.argmax())
        yield Prediction(str(path), spec["classes"][best], float(probabilities[best]))
