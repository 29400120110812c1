"""Labels pictures with an exported model: onnxruntime and the spec, no torch, no Ray.

N: pictures of a batch; K: classes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from raydeep.data import decode
from raydeep.data.rows import Picture, Row, Source
from raydeep.deploy import folder as folders
from raydeep.deploy.runtimes import Run, checked, open_onnx
from raydeep.disk import read_json
from raydeep.errors import DataError, ModelError

BATCH = 32  # pictures that the network takes at once


class Prediction(NamedTuple):
    """One labelled picture; `error` says why where there is no label."""

    path: str
    label: str | None
    probability: float  # of float32
    error: str | None = None


class Batch(NamedTuple):
    """What a network says of some rows of a source, in their order."""

    rows: list[Row]
    probabilities: np.ndarray  # float32 [N, K], NaN where a picture can't be read
    errors: list[str | None]

    def best(self) -> np.ndarray:
        """The class of each row, int64 [N]; of several equal ones the first, 0 of a row that can't be read."""
        return np.where(np.isnan(self.probabilities), -1, self.probabilities).argmax(1)


class Model(NamedTuple):
    """What labelling needs of a model folder."""

    path: Path
    classes: list[str]
    shape: tuple[int, int, int]  # height, width, channels

    @classmethod
    def open(cls, model: str | Path) -> Model:
        """Of a model folder, a run with one answer, or the address of either.

        Raises:
            ModelError: it is none, or a file is missing or changed.
        """
        path = folders.find(model, "model.onnx")
        if not (path / "model.onnx").is_file():
            raise ModelError(f"{path}: not a model folder that can predict (no model.onnx); export the model again")
        shape, classes = _spec(path)
        return cls(path, classes, shape)

    def onnx(self) -> bytes:
        """Its ONNX file, checked (see runtimes.py)."""
        return checked(self.path / "model.onnx")

    def run(self) -> Run:
        """Its network on one thread.

        Raises:
            ArtifactError: the ONNX file is broken.
            ModelError: it takes or gives something else than the spec says.
        """
        run = open_onnx(self.path / "model.onnx")
        try:
            found = run(np.zeros((1, *self.shape), np.uint8)).shape
        except Exception as err:  # onnxruntime's own kinds share no public base
            raise ModelError(f"{self.path}: model.onnx does not take what spec.json says: {err}") from None
        if found != (1, len(self.classes)):
            raise ModelError(
                f"{self.path}: model.onnx gives {list(found)}, spec.json names {len(self.classes)} classes"
            )
        return run


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


def pixels(picture: Picture, shape: tuple[int, int, int], max_pixels: int = decode.MAX_PIXELS) -> np.ndarray:
    """Any picture as the network takes it: uint8 of that shape, [height, width, channels].

    Raises:
        DataError: it can't be read, or has another size than a network takes whose pictures are not square.
    """
    if isinstance(picture, DataError):
        raise picture
    if isinstance(picture, np.ndarray):
        image = Image.fromarray(picture.squeeze(-1) if picture.shape[2:] == (1,) else picture)
    else:
        image = decode.open_picture(picture, max_pixels)
    height, width, channels = shape
    found = decode.to_pixels(image, "grey" if channels == 1 else "rgb", height if height == width else None)
    if found.shape != shape:  # pictures that are not square are never scaled
        raise DataError(f"{found.shape[0]}×{found.shape[1]} pixels, the model takes {height}×{width}")
    return found


def label(
    run: Run, model: Model, rows: Iterable[Row], pictures: Iterator[Picture], batch_size: int, max_pixels: int
) -> Iterator[Batch]:
    """Batches of so many rows, the last one perhaps of fewer; what can't be read has an error, the others go on.

    What a picture gets depends on its batch in the last bit at most: the same rows and batch size give the same bits.
    One batch of decoded pictures and one encoded picture are held.

    Args:
        run: the network.
        model: its classes and shape.
        rows: of a source.
        pictures: theirs, in the same order.
        batch_size: N.
        max_pixels: of one picture.
    """
    left = iter(rows)
    while some := list(islice(left, batch_size)):
        good: list[np.ndarray] = []
        errors: list[str | None] = []
        for _ in some:
            picture = next(pictures)  # a source that can't be read any more raises: that is not this picture's fault
            try:
                good.append(pixels(picture, model.shape, max_pixels))
                errors.append(None)
            except DataError as err:
                errors.append(str(err))
        probabilities = np.full((len(some), len(model.classes)), np.nan, np.float32)
        if good:
            logits = run(np.stack(good))
            if not np.isfinite(logits).all():
                raise ModelError(f"{model.path}: the network's outputs are not all finite numbers: there is no class")
            probabilities[[error is None for error in errors]] = softmax(logits)
        yield Batch(some, probabilities, errors)


def softmax(logits: np.ndarray) -> np.ndarray:
    """Float32 logits [N, K] → probabilities, computed in float64 and rounded to float32."""
    odds = np.exp(logits.astype(np.float64) - logits.max(1, keepdims=True))
    return (odds / odds.sum(1, keepdims=True)).astype(np.float32)


class Reader:
    """Reads rows of a source, some at a time, with what the source holds (an open file, a row group) kept between."""

    def __init__(self, source: Source) -> None:
        self._read, self._blocks = source.read, source.block is not None
        self._asked: deque[Row] = deque()
        self._stream: Iterator[Picture] | None = None

    def __call__(self, rows: Iterable[Row]) -> Iterator[Picture]:
        """The pictures of rows, in order."""
        if not self._blocks:
            yield from self._read(rows)
            return
        for row in rows:
            self._asked.append(row)
            self._stream = self._stream or self._read(self._feed())
            try:
                picture = next(self._stream)
            except BaseException:
                self._stream = None
                raise
            yield picture

    def _feed(self) -> Iterator[Row]:
        while True:
            yield self._asked.popleft()  # a source with blocks asks for a row when it has given the one before


def predict(
    model: Model, source: Source, batch_size: int = BATCH, max_pixels: int = decode.MAX_PIXELS
) -> Iterator[Prediction]:
    """Label the pictures of a source in this process, in their order.

    Args:
        model: an opened model.
        source: see data.unlabelled.open_pictures.
        batch_size: pictures that the network takes at once.
        max_pixels: of one picture.

    Raises:
        DataError: the source can't be read any more.
        ModelError: the ONNX file is broken, is not what the spec says, or gives no finite numbers.
    """
    run = model.run()
    for batch in label(run, model, source.rows, source.read(source.rows), batch_size, max_pixels):
        best = batch.best()
        for i, (row, error) in enumerate(zip(batch.rows, batch.errors, strict=True)):
            if error is None:
                yield Prediction(row.origin, model.classes[best[i]], float(batch.probabilities[i, best[i]]))
            else:
                yield Prediction(row.origin, None, 0.0, error)
