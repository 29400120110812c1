"""Where the time of training goes on one GPU: augmentation alone, the step alone, both in fit(). No Ray.

Run from the repository, with the same few packages as cifar10.py (mixup and cutmix would need SciPy besides and are
left out; torchvision's ResNet-18 is the network at 224 pixels):

    python benchmarks/gpu/throughput.py [--quick]

Pictures are made up. *Augmentation alone*: a uint8 batch that is on the GPU already becomes normalised floats, policies
taking turns. *Step alone*: fit() on one batch that stays as it is. *Both*: fit() as it trains, its share of each stage
from raydeep's own meter (CUDA events on a GPU), the rest being Python, launches and waiting. The first epoch, in which
the network is compiled, does not count.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))  # harness
sys.path.insert(0, str(Path(__file__).parents[2]))  # raydeep, where it is not installed

import common
import harness
import network
import torch
from torch import nn

from raydeep.config import Augment, Train
from raydeep.data import order
from raydeep.data.augment import DRAWS, Augmenter
from raydeep.data.batches import Batches, Micro
from raydeep.data.meter import STAGES
from raydeep.data.resident import Pixels, moments
from raydeep.model import zoo
from raydeep.train import losses
from raydeep.train.loop import fit

BASIC: dict[str, Any] = {"horizontal_flip": 0.5, "crop": 0.0625, "padding": "reflection"}
KINDS: dict[str, dict[str, Any]] = {
    "none": {},
    "flip + crop": BASIC,
    "affine + colour": {
        **BASIC, "rotation": 15, "shear": 5, "scale": (0.8, 1.2),
        "brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1,
    },
    "trivialaugment": {**BASIC, "policy": "trivialaugment"},
    "randaugment": {**BASIC, "policy": "randaugment"},
    "autoaugment": {**BASIC, "policy": "autoaugment"},
    "blur + erasing": {**BASIC, "blur": 0.5, "erasing": 0.5},
}  # fmt: skip
IN_FIT = ("none", "flip + crop", "autoaugment")


class Case(NamedTuple):
    """A size of pictures and the batches that are tried."""

    side: int
    batches: tuple[int, ...]
    steps: int  # of a timed epoch


CASES = (Case(32, (256, 1024), 50), Case(224, (64, 256), 20))
TINY_CASES = (Case(32, (32,), 4), Case(48, (16,), 4))


class Same(Batches):
    """One batch, again and again, read and augmented once: fit() on it is the step alone."""

    def epoch(self, epoch: int, start_step: int = 0, epochs: int | None = None) -> Iterator[list[Micro]]:
        """Yield the first batch so often."""
        if epoch == 0:
            self.kept = next(iter(super().epoch(0)))
        for _ in range(self.steps_per_epoch):
            yield self.kept


def augmentation(
    pixels: Pixels, batch: int, device: torch.device, rounds: int, calls: int
) -> dict[str, tuple[harness.Timing, int]]:
    """Kind → seconds of `calls` batches a round, and peak memory."""
    images = torch.from_numpy(pixels.images[:batch]).to(device)
    peers: dict[str, Callable[[], None]] = {}
    peaks: dict[str, int] = {}
    for name, keys in KINDS.items():
        augmenter = Augmenter(Augment(**keys), [0.5] * 3, [0.25] * 3)
        host = torch.from_numpy(order.draws(0, 0, 0, batch, DRAWS))
        numbers = host.to(device)

        def peer(
            name: str = name, augmenter: Augmenter = augmenter, numbers: torch.Tensor = numbers, host: Any = host
        ) -> None:
            common.forget_peak(device)
            for _ in range(calls):
                augmenter(images, numbers, host)
            common.now_s(device)
            peaks[name] = common.peak_bytes(device)

        peers[name] = peer
    timings = harness.interleaved(peers, rounds)
    return {name: (timings[name], peaks[name]) for name in KINDS}


def training(
    source: Batches, model: nn.Module, cfg: Train, device: torch.device
) -> tuple[list[float], dict[str, float], int]:
    """Seconds of each epoch after the first, the share of each stage and of the rest, peak memory."""
    ends = []
    rows: list[dict[str, Any]] = []

    def on_epoch(row: dict[str, Any]) -> None:
        ends.append(common.now_s(device))
        rows.append(row)
        if len(ends) == 1:
            common.forget_peak(device)

    fit(model, losses.cross_entropy(), source, cfg, on_epoch=on_epoch)
    seconds = [b - a for a, b in pairwise(ends)]
    spent = {stage: sum(row["meter"][f"{stage}_s"] for row in rows[1:]) for stage in STAGES}
    spent["other"] = max(0.0, sum(seconds) - sum(spent.values()))
    whole = sum(spent.values())
    return seconds, {stage: part / whole for stage, part in spent.items()}, common.peak_bytes(device)


def build(side: int, tiny: bool, device: torch.device) -> nn.Module:
    """The network at a size."""
    torch.manual_seed(0)
    if tiny:
        return network.Fast(widths=(8, 16, 16)).to(device)
    return (network.Fast() if side == 32 else zoo.build("resnet18", {}, 10, (side, side, 3))).to(device)


def measure(case: Case, batch: int, args: Any, device: torch.device) -> list[dict[str, Any]]:
    """All lines of a size and a batch."""
    rounds, epochs = (2, 2) if args.tiny else (3, 3) if args.quick else (9, 6)
    pixels = common.made_up(batch * case.steps if case.side == 32 or args.tiny else batch * 4, case.side)
    steps = len(pixels.labels) // batch
    calls = 1 if args.tiny or device.type == "cpu" else 20
    where = {"side": case.side, "batch": batch}
    results = []
    for name, (timing, peak) in augmentation(pixels, batch, device, rounds, calls).items():
        results.append(harness.result(
            f"{case.side} px, batch {batch}: augment, {name}", calls * batch / timing.median_s, "images/s",
            n=rounds, spread=timing.spread, what="augment", kind=name, peak_bytes=peak, **where,
        ))  # fmt: skip
    cuda = device.type == "cuda"
    repeats = max(1, case.steps // steps)  # few large pictures: more epochs of them
    cfg = Train(
        epochs=1 + epochs * repeats, batch_size=batch, lr=1e-3, compile=cuda and not args.eager,
        precision="bfloat16" if cuda else "float32", channels_last=True,
    )  # fmt: skip
    mean, std = moments(pixels)
    for what, kind in [("step", "none"), *(("fit", kind) for kind in IN_FIT)]:
        source = (Same if what == "step" else Batches)(
            pixels, Augmenter(Augment(**KINDS[kind]), mean, std), batch, 0, device=device
        )
        seconds, shares, peak = training(source, build(case.side, args.tiny, device), cfg, device)
        timing = harness.Timing(seconds)
        title = "step alone" if what == "step" else f"fit, {kind}"
        results.append(harness.result(
            f"{case.side} px, batch {batch}: {title}", steps * batch / timing.median_s, "images/s",
            n=len(seconds), spread=timing.spread, what=what, kind=kind, shares=shares, peak_bytes=peak, **where,
        ))  # fmt: skip
        print(
            "    " + ", ".join(f"{stage} {share:.0%}" for stage, share in shares.items() if share >= 0.005), flush=True
        )
    return results


def main() -> None:
    """Every size and batch."""
    args = harness.arguments(
        __doc__,
        device={"choices": ["auto", "cuda", "cpu"], "default": "auto", "help": "auto: the GPU, if there is one"},
        tiny={"action": "store_true", "help": "tiny pictures, batches and network: tries the script in seconds"},
        eager={"action": "store_true", "help": "no torch.compile (which only a GPU gets)"},
    )
    device = common.choose(args.device)
    torch.backends.cudnn.benchmark = True
    print(f"{common.facts(device)['device']}; torch {torch.__version__}")
    results = []
    for case in TINY_CASES if args.tiny else CASES:
        for batch in case.batches:
            results += measure(case, batch, args, device)
    peak = max(row["peak_bytes"] for row in results)
    results.append(harness.result("peak memory", peak / 2**20, "MiB", n=len(results)))
    harness.finish(
        "gpu-throughput", results, args, kinds=KINDS, data="made up",
        **common.facts(device),
    )  # fmt: skip


if __name__ == "__main__":
    main()
