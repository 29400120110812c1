"""What the GPU benchmarks share: the device, its clock and memory, CIFAR-10 from disk, pictures made up for tests."""

from __future__ import annotations

import io
import platform
import resource
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from raydeep.data.resident import Pixels

FOREIGN = ("ray", "pyarrow", "onnxruntime", "optuna", "sklearn", "plotly")  # what a run must not have imported


def choose(name: str) -> torch.device:
    """The device of that name; auto: the GPU, if there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        sys.exit("no GPU: torch.cuda.is_available() is false; give --device cpu --tiny to try the script")
    return torch.device(name)


def now_s(device: torch.device) -> float:
    """The time when all that is queued on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def forget_peak(device: torch.device) -> None:
    """Count the peak of memory anew; on a CPU it stays that of the process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> int:
    """Most memory that tensors took on the GPU; on a CPU the process's largest resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def facts(device: torch.device) -> dict[str, Any]:
    """Device and versions, for people and for the provenance; and which modules are there that should not be."""
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else f"CPU ({platform.machine()})",
        "cuda": torch.version.cuda if cuda else None,
        "cudnn": torch.backends.cudnn.version() if cuda else None,
        "threads": torch.get_num_threads(),
        "foreign_modules": [name for name in FOREIGN if name in sys.modules],
    }


def made_up(rows: int, side: int = 32, classes: int = 10, seed: int = 0) -> Pixels:
    """Pictures that are easily told apart: a colour and a wave a class, under noise. uint8 [rows, side, side, 3]."""
    rng = np.random.default_rng(seed)
    kinds = np.random.default_rng(0)  # the classes are the same for every seed
    colours, waves = kinds.uniform(60, 195, (classes, 3)), kinds.uniform(0.5, 4, (classes, 2))
    labels = rng.integers(0, classes, rows)
    y, x = np.mgrid[0:side, 0:side] / side * 2 * np.pi
    wave = 40 * np.sin(waves[:, 0, None, None] * y + waves[:, 1, None, None] * x)
    images = 25 * rng.standard_normal((rows, side, side, 3), np.float32)
    images += colours[labels][:, None, None, :].astype(np.float32)
    images += wave[labels][..., None].astype(np.float32)
    return Pixels(images.clip(0, 255).astype(np.uint8), labels.astype(np.int64))


def cifar10(folder: Path, download: bool = False) -> tuple[Pixels, Pixels]:
    """Train and test pictures.

    Args:
        folder: what torchvision.datasets.CIFAR10 takes as `root`; or it, or its `cifar10`, holds `train-*.parquet` and
            `test-*.parquet` of columns `image` (bytes of a picture file) and `label`; these need pyarrow.
        download: let torchvision fetch it.
    """
    for place in (folder, folder / "cifar10"):
        if list(place.glob("train-*.parquet")):
            return _parquet(place, "train"), _parquet(place, "test")
    from torchvision.datasets import CIFAR10

    try:
        train, test = (CIFAR10(str(folder), train=split, download=download) for split in (True, False))
    except RuntimeError as err:
        sys.exit(f"no data: {folder} holds neither cifar-10-batches-py nor train-*.parquet: {err}")
    return _torchvision(train), _torchvision(test)


def _torchvision(dataset: Any) -> Pixels:
    return Pixels(np.ascontiguousarray(dataset.data), np.asarray(dataset.targets, np.int64))


def _parquet(folder: Path, split: str) -> Pixels:
    import pyarrow.parquet as pq
    from PIL import Image

    table = pq.ParquetDataset(sorted(folder.glob(f"{split}-*.parquet"))).read(["image", "label"])
    images = [np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) for data in table["image"].to_pylist()]
    return Pixels(np.stack(images), table["label"].to_numpy().astype(np.int64))
