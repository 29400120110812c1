"""What augmentation is worth with few data: CIFAR-10 with 50 pictures a class, Fashion-MNIST with 100.

The same network, the same number of steps and the same pictures for every kind of augmentation; a seed picks the
pictures, the first weights and the order. Accuracy on the whole test set, looked at once, after the last step.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import statistics
import time
from pathlib import Path
from typing import Any, NamedTuple

import harness
import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image

from raydeep.config import Augment, Train
from raydeep.data import order
from raydeep.data.augment import Augmenter
from raydeep.data.batches import Batches, eval_batches
from raydeep.data.resident import Pixels, moments
from raydeep.model import zoo
from raydeep.train import losses
from raydeep.train.loop import fit
from raydeep.train.metrics import evaluate


class Set(NamedTuple):
    """A data set and how it is learned."""

    folder: str
    per_class: int
    network: str
    args: dict[str, Any]
    epochs: int
    batch: int
    lr: float


SETS = {
    "cifar10": Set("cifar10", 50, "resnet8", {"width": 8}, 100, 50, 0.1),
    "fashion-mnist": Set("fashion-mnist", 100, "resnet8", {"width": 8}, 40, 50, 0.1),
}
BASIC = {"horizontal_flip": 0.5, "crop": 0.125}
KINDS: dict[str, dict[str, Any]] = {
    "none": {},
    "basic": BASIC,
    "trivialaugment": {**BASIC, "policy": "trivialaugment"},
    "randaugment": {**BASIC, "policy": "randaugment"},
    "autoaugment": {**BASIC, "policy": "autoaugment"},
    "basic + cutmix": {**BASIC, "cutmix": 1.0},
    "trivialaugment + cutmix": {**BASIC, "policy": "trivialaugment", "cutmix": 1.0},
}
# glibc would give back each batch's activations to the system and fault them in again: half of the time
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "2000000000", "MALLOC_TRIM_THRESHOLD_": "4000000000"}
POLICIES = ("trivialaugment", "randaugment", "autoaugment")
SEEDS = 3
DATA: dict[tuple[str, int], tuple[Pixels, Pixels]] = {}  # set and seed → train and test, in each process


def read(folder: Path, split: str, rows: np.ndarray | None = None) -> tuple[list[bytes], np.ndarray]:
    """Picture files and labels of a split, or of some of its rows."""
    table = pq.ParquetDataset(sorted(folder.glob(f"{split}-*.parquet"))).read(["image", "label"])
    table = table if rows is None else table.take(rows)
    return table["image"].to_pylist(), table["label"].to_numpy()


def decode(files: list[bytes], labels: np.ndarray) -> Pixels:
    """Picture files → pixels."""
    images = np.stack([np.asarray(Image.open(io.BytesIO(data))) for data in files])
    return Pixels(images[..., None] if images.ndim == 3 else images, labels)


def load(folder: Path, seeds: int) -> dict[tuple[str, int], tuple[Pixels, Pixels]]:
    """The few training pictures of each seed, and the whole test set."""
    found = {}
    for name, one in SETS.items():
        test = decode(*read(folder / one.folder, "test"))
        labels = read(folder / one.folder, "train")[1]
        for seed in range(seeds):
            rows = order.few(labels, one.per_class, seed)
            found[name, seed] = (decode(*read(folder / one.folder, "train", rows)), test)
    return found


def begin(data: dict[tuple[str, int], tuple[Pixels, Pixels]]) -> None:
    """Set up a process."""
    torch.set_num_threads(1)
    DATA.update(data)


def run(task: tuple[str, str, int, int]) -> tuple[float, float]:
    """Train once: (set, kind, seed, epochs) → accuracy in percent, seconds."""
    name, kind, seed, epochs = task
    start = time.perf_counter()
    train, test = DATA[name, seed]
    one = SETS[name]
    mean, std = moments(train)
    torch.manual_seed(seed)
    model = zoo.build(one.network, one.args, 10, train.shape)
    source = Batches(train, Augmenter(Augment(**KINDS[kind]), mean, std), one.batch, seed)
    cfg = Train(epochs=epochs, batch_size=one.batch, lr=one.lr, precision="float32", warmup_epochs=epochs / 20)
    fit(model, losses.cross_entropy(), source, cfg, seed=seed)
    score = evaluate(model, eval_batches(test, mean, std, 100), len(test.labels))
    return 100 * score.accuracy, time.perf_counter() - start


def main() -> None:
    """Run every kind with every seed, two processes at a time."""
    args = harness.arguments(
        __doc__,
        processes={"type": int, "default": 2, "help": "trainings at once, a thread each"},
        epochs_share={"type": float, "default": 1.0, "help": "share of the epochs (pilot runs)"},
        only={"metavar": "SET", "choices": list(SETS), "help": "one of the sets"},
    )
    folder = harness.data_folder(args, *(one.folder for one in SETS.values()))
    seeds, share = (1, 0.25) if args.quick else (SEEDS, args.epochs_share)
    names = [args.only] if args.only else list(SETS)
    tasks = [
        (name, kind, seed, max(1, round(SETS[name].epochs * share)))
        for name in names
        for seed in range(seeds)
        for kind in KINDS
    ]
    started = time.perf_counter()
    os.environ.update(MALLOC)  # read by the processes that start now
    with multiprocessing.get_context("spawn").Pool(args.processes, begin, (load(folder, seeds),)) as pool:
        found: dict[tuple[str, str], list[float]] = {}
        for (name, kind, seed, epochs), (accuracy, seconds) in zip(tasks, pool.imap(run, tasks), strict=True):
            found.setdefault((name, kind), []).append(accuracy)
            print(f"  {name} {kind}, seed {seed}, {epochs} epochs: {accuracy:.2f}% in {seconds:.0f} s", flush=True)
    results = []
    for name in names:
        one = SETS[name]
        epochs = max(1, round(one.epochs * share))
        steps = epochs * (10 * one.per_class // one.batch)
        print(
            f"\n{name}: {one.per_class} pictures a class, {one.network} {one.args or ''}, {steps} steps of {one.batch}"
        )
        for kind in KINDS:
            values = found[name, kind]
            spread = statistics.stdev(values) if seeds > 1 else 0.0
            results.append(
                harness.result(f"{name}: {kind}", statistics.mean(values), "% accuracy", n=seeds, std=spread)
            )
            print(f"{'± ' + format(spread, '.2f'):>73}")
        gains = {
            kind: [a - b for a, b in zip(found[name, kind], found[name, "none"], strict=True)]
            for kind in KINDS
            if kind != "none"
        }
        best = max(POLICIES, key=lambda kind: statistics.mean(gains[kind]))
        facts = {"n": seeds, "std": statistics.stdev(gains[best]) if seeds > 1 else 0.0, "best": best}
        target = ">= 5.0" if name == "cifar10" else None
        results.append(
            harness.result(f"{name}: best policy over none", statistics.mean(gains[best]), "points", target, **facts)
        )
    harness.finish(
        "scarce", results, args, threads=1, processes=args.processes, seconds=round(time.perf_counter() - started),
        sets={name: {**SETS[name]._asdict(), "epochs": round(SETS[name].epochs * share)} for name in names},
        kinds=KINDS, test="whole test set, once, after the last step", cifar10_rows="30,000 of the 50,000 to pick from",
    )  # fmt: skip


if __name__ == "__main__":
    main()
