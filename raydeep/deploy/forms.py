"""Which form of ONNX file a model gets: the fastest of those that predict what the packed model predicts, measured.

- whole: integers from the first layer to the last (see integers.py); calibrated on pictures.
- exact: integers in layers, float between them; number for number what the packed model computes.
- float: the same weights as float32. On narrow and depthwise networks it is the fastest.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from raydeep.deploy import gate, timing
from raydeep.deploy.runtimes import Run, runner

if TYPE_CHECKING:
    from raydeep.data.resident import Dataset, Split

CALIBRATION_ROWS = 256
CHECK_ROWS = 1024
CHECK_BYTES = 64 << 20  # of pictures that are compared
CHECK_S = 4.0  # seconds of predictions a form, about
ROUNDS, ROUNDS_S = 9, 4.0  # of the speed test, and the most seconds that it takes, about
FLOAT_GAIN = 1.1  # float weights take 4 times the bytes: only for a gain beyond noise
RUN_BATCH = 64


class Sample(NamedTuple):
    """Pictures that decide the form of a model, and what its packed file predicts for some of them."""

    calibration: np.ndarray  # uint8 NHWC, of train
    images: np.ndarray  # uint8 NHWC, of val
    labels: np.ndarray  # int64 N, of images
    predictions: np.ndarray  # int64 N, of the packed model


def sample(data: Dataset, val_predictions: np.ndarray) -> Sample:
    """Pictures of a dataset, the same each time.

    Args:
        data: for its train and val splits.
        val_predictions: of the packed model, int64 of shape [val rows].
    """
    height, width, channels = data.shape
    most = max(64, min(CHECK_ROWS, CHECK_BYTES // (height * width * channels)))
    rows = _spread(len(data.val.labels), most)
    return Sample(
        _pictures(data.train, _spread(len(data.train.labels), CALIBRATION_ROWS)), _pictures(data.val, rows),
        data.val.labels[rows], val_predictions[rows],
    )  # fmt: skip


def _spread(rows: int, most: int) -> np.ndarray:
    """A seeded choice of rows, in order."""
    return np.sort(np.random.default_rng(0).permutation(rows)[:most])


def _pictures(split: Split, rows: np.ndarray) -> np.ndarray:
    [images] = split.read([[rows]])
    return images


def choose(
    candidates: dict[str, bytes], pictures: Sample, target: str, batch_size: int
) -> tuple[str, dict[str, dict[str, Any]]]:
    """The form of a model, measured.

    Args:
        candidates: form → ONNX bytes, of all three.
        pictures: what the forms are compared on.
        target: see export.target. Speed counts only where this machine is one; elsewhere whole goes first.
        batch_size: of the speed test.

    Returns:
        The name of the form, and for each form: bytes, rows, differ, accuracy, ms a call, ratio (how many times
        as fast as float) and refused (why it is out, or None).
    """
    facts: dict[str, dict[str, Any]] = {}
    runs = {name: runner(data) for name, data in candidates.items()}
    for name, run in runs.items():
        found = _predictions(run, pictures.images)
        n = len(found)
        packed, labels = pictures.predictions[:n], pictures.labels[:n]
        facts[name] = {
            "bytes": len(candidates[name]), "rows": n, "differ": int((found != packed).sum()),
            "accuracy": float((found == labels).mean()),
            "refused": gate.refusal(packed, found, labels, slack=1),
        }  # fmt: skip
    example = np.resize(pictures.images, (batch_size, *pictures.images.shape[1:]))
    times = dict(zip(runs, timing.interleaved(list(runs.values()), example, ROUNDS, ROUNDS_S), strict=True))
    for name, timed in times.items():
        facts[name]["ms"] = timed.facts()["median_ms"]
        facts[name]["ratio"] = timing.ratio(times["float"], timed)[0]
    passed = [name for name in facts if facts[name]["refused"] is None] or [
        "exact"
    ]  # which differs in the last bits only
    return _first(passed, facts, _is_here(target)), facts


def _first(passed: Sequence[str], facts: dict[str, dict[str, Any]], timed: bool) -> str:
    """The fastest form that passed."""
    if not timed:
        return next(name for name in ("whole", "exact", "float") if name in passed)
    return max(passed, key=lambda name: facts[name]["ratio"] / (FLOAT_GAIN if name == "float" else 1))


def _is_here(target: str) -> bool:
    arm = platform.machine().lower() in ("arm64", "aarch64")
    return target != "gpu" and arm == (target == "arm")


def _predictions(run: Run, images: np.ndarray) -> np.ndarray:
    """Predictions of the first pictures, as many as CHECK_S allows, 200 at least."""
    found: list[np.ndarray] = []
    start = time.perf_counter()
    for at in range(0, len(images), RUN_BATCH):
        found.append(run(images[at : at + RUN_BATCH]).argmax(1))
        if time.perf_counter() - start > CHECK_S and at + RUN_BATCH >= 200:
            break
    return np.concatenate(found)
