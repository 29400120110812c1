"""CIFAR-10 to 94% on one GPU, through raydeep's own fit(): no Ray, no process group, one process.

Run from the repository, raydeep itself need not be installed:

    python benchmarks/gpu/cifar10.py --data FOLDER [--download] [--seeds 10] [--epochs 14]

Needs torch, torchvision (with pillow), kornia, numpy, pydantic, pyyaml, safetensors and what these need. Of raydeep it
loads errors, safeyaml, sections, config, run, data/* for pictures in memory, and the loop of train/*; this recipe's
flip and crop do not even load kornia. `foreign_modules` in the JSON names any of ray, pyarrow, onnxruntime, optuna,
sklearn and plotly that was imported: none, unless the data is Parquet (pyarrow).

The clock of a seed: whitening and fit(), from the first to the last step, until the GPU is done. Apart from it, and
printed apart: reading the data, their mean and standard deviation, compilation and warm-up (three steps on the same
network, which then starts anew), evaluation. Pictures stay decoded in memory; each step sends its uint8 batch to the
GPU and augments it there. FOLDER is torchvision's root, or holds train-*.parquet and test-*.parquet.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # harness
sys.path.insert(0, str(Path(__file__).parents[2]))  # raydeep, where it is not installed

import common
import harness
import network
import torch

from raydeep.config import Augment, Train
from raydeep.data.augment import Augmenter, to_input
from raydeep.data.batches import Batches, eval_batches
from raydeep.data.resident import Pixels, moments
from raydeep.train import losses
from raydeep.train.loop import fit
from raydeep.train.metrics import evaluate

TARGET = 0.94
REFERENCE = "published, not measured here: airbench94, 94.0% in 3.29 s on one A100 (arXiv 2404.00498)"
SEEDS, EPOCHS, RISE = 10, 14, 0.23  # RISE: share of the epochs in which the learning rate rises
AUGMENT = Augment(horizontal_flip=0.5, crop=2 / 32, padding="reflection")
RECIPE: dict[str, Any] = {
    "batch_size": 1024,
    "optimizer": "sgd",  # Nesterov
    "lr": 1.5,  # this and the next two: arXiv 2404.00498, in the units of torch.optim.SGD and a mean loss
    "momentum": 0.85,
    "weight_decay": 0.0013,
    "schedule": "one_cycle",
    "label_smoothing": 0.2,
    "channels_last": True,
    "eval_flip": True,
}
TINY = {"batch_size": 64, "lr": 0.5}
TINY_ROWS, TINY_TEST_ROWS, TINY_WIDTHS = 2048, 512, (8, 16, 16)


class Trainer:
    """One network and its data; each seed starts it anew, so that it is compiled once."""

    def __init__(self, train: Pixels, test: Pixels, cfg: Train, widths: tuple[int, int, int], device: torch.device):
        self.train, self.test, self.cfg, self.widths, self.device = train, test, cfg, widths, device
        start = time.perf_counter()
        self.mean, self.std = moments(train)
        self.statistics_s = time.perf_counter() - start
        self.model = self.fresh(0)

    def fresh(self, seed: int) -> network.Fast:
        """A network with the first weights of a seed."""
        torch.manual_seed(seed)
        return network.Fast(10, 3, self.widths).to(self.device)

    def warm_up(self) -> float:
        """Compile, choose kernels, fill the allocators: three steps. Returns seconds."""
        start = common.now_s(self.device)
        few = Pixels(*(part[: 3 * self.cfg.batch_size] for part in self.train))
        self._fit(few, 0, 1, lr=1e-3)  # three steps at the full rate may diverge
        evaluate(self.model, self._test(rows=self.cfg.eval_batch_size), self.cfg.eval_batch_size, self.device, True)
        return common.now_s(self.device) - start

    def run(self, seed: int) -> dict[str, Any]:
        """Train and evaluate one seed."""
        self.model.load_state_dict(self.fresh(seed).state_dict())
        common.forget_peak(self.device)
        before, start = compiled(), common.now_s(self.device)
        rows = self.fit(seed)
        trained = common.now_s(self.device)
        compilations = compiled() - before
        peak = common.peak_bytes(self.device)
        score = evaluate(self.model, self._test(), len(self.test.labels), self.device, self.cfg.eval_flip)
        return {
            "seed": seed,
            "accuracy": score.accuracy,
            "train_s": trained - start,
            "eval_s": common.now_s(self.device) - trained,
            "images_per_s": rows / (trained - start),
            "peak_bytes": peak,
            "compilations": compilations,  # 0, or compilation is in train_s
        }

    def fit(self, seed: int) -> int:
        """What is timed. Returns the pictures seen."""
        images = torch.from_numpy(self.train.images[: network.WHITEN_ROWS]).to(self.device)
        network.whiten(self.model, to_input(images, self.mean, self.std))
        return self._fit(self.train, seed, self.cfg.epochs)

    def _fit(self, split: Pixels, seed: int, epochs: int, lr: float | None = None) -> int:
        augmenter = Augmenter(AUGMENT, self.mean, self.std)
        source = Batches(split, augmenter, self.cfg.batch_size, seed, device=self.device)
        loss = losses.cross_entropy(self.cfg.label_smoothing)
        fit(self.model, loss, source, self.cfg, epochs=epochs, lr=lr, seed=seed)
        return epochs * source.steps_per_epoch * self.cfg.batch_size

    def _test(self, rows: int | None = None) -> Any:
        part = Pixels(*(values[:rows] for values in self.test))
        return eval_batches(part, self.mean, self.std, self.cfg.eval_batch_size, device=self.device)


def compiled() -> int:
    """Graphs that torch.compile has made in this process."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    return dynamo.counters["stats"]["unique_graphs"] if dynamo else 0


def configure(args: Any, device: torch.device) -> Train:
    """The train section: the recipe, on a GPU in bfloat16 and compiled."""
    cuda = device.type == "cuda"
    epochs = args.epochs or (1 if args.tiny else EPOCHS)
    return Train(
        **{**RECIPE, **(TINY if args.tiny else {})},
        epochs=epochs,
        warmup_epochs=RISE * epochs,
        precision="bfloat16" if cuda else "float32",
        compile=cuda and not args.eager,
        eval_batch_size=TINY_TEST_ROWS // 2 if args.tiny else 2000,
    )


def main() -> None:
    """Train every seed, then the table."""
    args = harness.arguments(
        __doc__,
        seeds={"type": int, "help": f"trainings (default {SEEDS}; --quick or --tiny: 2)"},
        epochs={"type": int, "help": f"of each (default {EPOCHS})"},
        width={"type": float, "default": 1.0, "help": "share of the network's width"},
        device={"choices": ["auto", "cuda", "cpu"], "default": "auto", "help": "auto: the GPU, if there is one"},
        tiny={"action": "store_true", "help": "made-up pictures, a tiny network: tries the script in seconds"},
        eager={"action": "store_true", "help": "no torch.compile (which only a GPU gets)"},
        download={"action": "store_true", "help": "let torchvision fetch the data into --data"},
        json={"action": "store_true", "help": "a JSON line a seed instead of words; the last line is JSON anyway"},
    )
    device = common.choose(args.device)
    cfg = configure(args, device)
    torch.backends.cudnn.benchmark = True
    seeds = args.seeds or (2 if args.tiny or args.quick else SEEDS)
    start = time.perf_counter()
    if args.tiny:
        train, test = common.made_up(TINY_ROWS, seed=1), common.made_up(TINY_TEST_ROWS, seed=2)
    else:
        train, test = common.cifar10(harness.data_folder(args), args.download)
    read_s = time.perf_counter() - start
    widths = TINY_WIDTHS if args.tiny else tuple(round(args.width * width / 8) * 8 for width in (64, 256, 256))
    trainer = Trainer(train, test, cfg, widths, device)  # type: ignore[arg-type]
    warm_up_s = trainer.warm_up()
    where = common.facts(device)
    if not args.json:
        versions = f"torch {torch.__version__}, CUDA {where['cuda']}, cuDNN {where['cudnn']}"
        print(f"{where['device']}; {versions}; {len(train.labels):,} training pictures, {cfg.epochs} epochs")
        print(f"not timed below: reading {read_s:.1f} s, mean and deviation {trainer.statistics_s:.2f} s")
        print(f"not timed below: compilation and warm-up {warm_up_s:.1f} s")
    rows = []
    for seed in range(seeds):
        rows.append(trainer.run(seed))
        one = rows[-1]
        words = f"  seed {seed}: {one['accuracy']:.2%} in {one['train_s']:.2f} s"
        print(json.dumps(one) if args.json else words, flush=True)
    report(args, rows, cfg, where, trainer, read_s=read_s, warm_up_s=warm_up_s)


def report(
    args: Any, rows: list[dict[str, Any]], cfg: Train, where: dict[str, Any], trainer: Trainer, **seconds: float
) -> None:
    """The table and the JSON line."""
    accuracies, times = [100 * row["accuracy"] for row in rows], [row["train_s"] for row in rows]
    n = len(rows)
    std = statistics.stdev if n > 1 else lambda values: 0.0
    share = statistics.mean(row["accuracy"] >= TARGET for row in rows)
    results = [
        harness.result("accuracy, mean", statistics.mean(accuracies), "%", n=n, std=std(accuracies)),
        harness.result("accuracy, standard deviation", std(accuracies), "points", n=n),
        harness.result(f"seeds of at least {TARGET:.0%}", share, "share", n=n),
        harness.result("training, median", statistics.median(times), "s", n=n, std=std(times)),
        harness.result("peak memory", max(row["peak_bytes"] for row in rows) / 2**20, "MiB", n=n),
    ]
    print(REFERENCE)
    harness.finish(
        "gpu-cifar10", results, args, seeds=rows, recipe=cfg.model_dump(), augment=AUGMENT.model_dump(),
        widths=trainer.widths, train_rows=len(trainer.train.labels), test_rows=len(trainer.test.labels),
        data="made up" if args.tiny else "CIFAR-10", reference=REFERENCE, statistics_s=trainer.statistics_s,
        **seconds, **common.facts(trainer.device),
    )  # fmt: skip


if __name__ == "__main__":
    main()
