"""What all trials of a search need alike: calibration pictures, and what is measured of the dense model on them."""

from __future__ import annotations

from contextlib import closing
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from raydeep.compress import allocate, masks
from raydeep.compress.masks import Tensors
from raydeep.compress.observe import Labelled
from raydeep.data import order
from raydeep.data.augment import Augmenter, to_input
from raydeep.data.batches import Batches
from raydeep.data.resident import Dataset
from raydeep.model import artifact, layers

if TYPE_CHECKING:
    from raydeep.compress.plan import Dense
    from raydeep.config import Augment, Job

CALIBRATION_BATCH = 256
STATISTICS_SHARE = 4  # times calibration_rows
STATISTICS_BYTES = 2**28


class Common:
    """Computed once, when first asked for; trials read it and leave it as it is."""

    def __init__(self, dense: Dense, data: Dataset, seed: int, device: str = "cpu") -> None:
        """Begin.

        Args:
            dense: the network that trials start from.
            data: its data.
            seed: of the choice of calibration rows and their augmentation.
            device: where recovery runs.
        """
        self.dense, self.data, self.seed, self.device = dense, data, seed, device
        self.known: dict[str, Any] = {}

    def _once(self, key: str, make: Any) -> Any:
        if key not in self.known:
            self.known[key] = make()
        return self.known[key]

    def labelled(self, rows: int) -> Labelled:
        """See calibration_batches."""
        return self._once(f"labelled {rows}", lambda: calibration_batches(self.data, rows, self.seed, self.device))

    def inputs(self, cfg: Augment, rows: int) -> list[torch.Tensor]:
        """See training_inputs."""
        key = f"inputs {rows} {cfg.model_dump_json()}"
        return self._once(key, lambda: training_inputs(self.data, cfg, rows, self.seed, self.device))

    def sensitivity(self, rows: int) -> dict[str, dict[int, float]]:
        """See allocate.sensitivity: of the dense model, neither pruned nor retrained."""
        return self._once(
            f"sensitivity {rows}", lambda: allocate.sensitivity(self._model().eval(), self.labelled(rows))
        )

    def taylor(self, rows: int) -> Tensors:
        """See masks.taylor: of the dense model's layers."""

        def make() -> Tensors:
            model = self._model()
            weights = {name: layers.raw_weight(module) for name, module in layers.compressible(model)}
            return masks.taylor(model, weights, self.labelled(rows))

        return self._once(f"taylor {rows}", make)

    def _model(self) -> torch.nn.Module:
        return artifact.thaw(self.dense.spec, self.dense.tensors).requires_grad_(True).to(self.device)

    def sent(self) -> Common:
        """The same for another process, which has the data already: `receive` gives it back there."""
        other = Common(self.dense, None, self.seed, self.device)  # type: ignore[arg-type]
        other.known = self.known
        return other

    def receive(self, data: Dataset, device: str) -> Common:
        """Take the data that `sent` left out, and go to where this process trains."""
        self.data, self.device = data, device
        self.known = {name: _to(value, device) for name, value in self.known.items()}
        return self

    def prepare(self, job: Job) -> Common:
        """Compute what trials of the job's space will ask for, so that it is sent to them and not computed again."""
        rows, values = job.quantize.calibration_rows, job.search.values
        self.labelled(rows)
        self.inputs(job.augment, rows)
        if any(isinstance(bits, dict) for bits in [job.model_dump()["quantize"]["weight_bits"], *values(BITS)]):
            self.sensitivity(rows)
        if "taylor" in (job.prune.score, *values("prune.score")):
            self.taylor(rows)
        return self


BITS = "quantize.weight_bits"


def _to(value: Any, device: str) -> Any:
    """The same with its tensors on a device."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {name: _to(item, device) for name, item in value.items()}
    return type(value)(_to(item, device) for item in value) if isinstance(value, (list, tuple)) else value


def training_inputs(data: Dataset, cfg: Augment, rows: int, seed: int, device: str = "cpu") -> list[torch.Tensor]:
    """Network inputs as training sees them, augmented: what statistics and steps are estimated on.

    A network has learned with the statistics of augmented pictures: those of plain ones cost a ResNet-20 on CIFAR-10 2
    points of accuracy.

    Args:
        data: for its train split.
        cfg: the augment section.
        rows: STATISTICS_SHARE times so many, if they take no more than STATISTICS_BYTES.
        seed: of the choice and the draws.
        device: where they lie.

    Returns:
        Batches float32 NCHW of one size.
    """
    height, width, channels = data.shape
    size = min(CALIBRATION_BATCH, len(data.train.labels))
    most = max(rows, STATISTICS_BYTES // (4 * height * width * channels))
    count = max(1, min(STATISTICS_SHARE * rows, most, len(data.train.labels)) // size)
    with closing(Batches(data.train, Augmenter(cfg, data.mean, data.std), size, seed, device=device)) as batches:
        return [micro.images for [micro] in islice(batches.epoch(0), count)]


def calibration_batches(data: Dataset, rows: int, seed: int, device: str = "cpu") -> Labelled:
    """A seeded choice of train rows, not augmented: batches of inputs float32 NCHW and labels int64 N."""
    chosen = order.epoch_order(seed, 0, len(data.train.labels))[:rows]
    parts = np.array_split(chosen, -(-len(chosen) // CALIBRATION_BATCH))  # even: averages weigh batches alike
    read = data.train.read([parts])
    return [
        (
            to_input(torch.from_numpy(images).to(device), data.mean, data.std),
            torch.from_numpy(data.train.labels[part]).to(device),
        )
        for part, images in zip(parts, read, strict=True)
    ]
