"""The trained float networks that benchmarks compress: trained once, kept in `--cache`.

`python benchmarks/dense.py --only resnet20 --seed 0` trains one of them; whoever needs one takes it from `dense()`.
A folder is named after all that makes the network what it is: the job and the data.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

import harness

# glibc would give back each batch's activations to the system and fault them in again: a third of the time
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "2000000000", "MALLOC_TRIM_THRESHOLD_": "4000000000"}
MNIST = {
    "data": {"source": "parquet", "path": "mnist", "val_fraction": 0.0833},
    "augment": {"rotation": 8, "scale": [0.9, 1.1], "translate": 0.07},
    "train": {"epochs": 30, "batch_size": 128, "lr": 0.05, "weight_decay": 1e-4, "precision": "float32"},
}
JOBS: dict[str, dict[str, Any]] = {
    "lenet_300_100": {**MNIST, "model": {"name": "lenet_300_100"}},
    "lenet5": {**MNIST, "model": {"name": "lenet5"}, "train": {**MNIST["train"], "epochs": 15}},
    "resnet20": {
        "data": {"source": "parquet", "path": "cifar10", "val_fraction": 0.1},
        "augment": {"horizontal_flip": 0.5, "crop": 0.125},
        "model": {"name": "resnet20"},
        "train": {"epochs": 40, "batch_size": 128, "lr": 0.2, "warmup_epochs": 3, "precision": "bfloat16"},
    },
    "photos": {
        "data": {"source": "folder", "path": "caltech101-10", "image_size": 128, "mode": "rgb"},
        "augment": {"horizontal_flip": 0.5, "resized_crop": 0.4, "policy": "trivialaugment", "erasing": 0.1},
        "model": {"name": "resnet18"},
        "train": {
            "epochs": 60, "batch_size": 32, "lr": 0.05, "warmup_epochs": 3, "weight_decay": 1e-3,
            "label_smoothing": 0.1, "precision": "bfloat16", "eval_batch_size": 64,
        },
        "quantize": {"calibration_rows": 256},
    },
}  # fmt: skip


def job(name: str, data: Path, cache: Path, values: dict[str, Any] | None = None) -> Any:
    """The job of a network, with dotted values set."""
    from raydeep.config import parse_job

    tree = json.loads(json.dumps(JOBS[name]))
    tree["data"]["path"] = str(data / tree["data"]["path"])
    tree |= {"name": name, "storage": str(cache)}
    found = parse_job(tree, f"benchmarks/dense.py {name}")
    return found.with_values(values) if values else found


def load(one: Any) -> Any:
    """The decoded data of a job."""
    from raydeep.data import shards, splits

    return splits.read_dataset(shards.prepare(one.data, Path(one.storage)), one.data)


def dense(name: str, data: Path, cache: Path, seed: int, epochs: int | None = None) -> tuple[Any, Any, Any]:
    """A float network, trained if the cache does not hold it.

    Args:
        name: of JOBS.
        data: folder of the data sets.
        cache: folder of what is kept.
        seed: of first weights, order and augmentation.
        epochs: instead of the job's (pilot runs).

    Returns:
        The job, its data and the dense model.
    """
    import torch

    from raydeep.compress.plan import Dense
    from raydeep.data.augment import Augmenter
    from raydeep.data.batches import Batches
    from raydeep.disk import write_json
    from raydeep.model import artifact
    from raydeep.train import losses
    from raydeep.train.loop import fit

    one = job(name, data, cache, {"train.epochs": epochs} if epochs else None)
    pictures = load(one)
    known = json.dumps([JOBS[name], one.train.epochs, len(pictures.train.labels), seed], sort_keys=True)
    folder = cache / "dense" / f"{name}-{seed}-{hashlib.sha256(known.encode()).hexdigest()[:8]}"
    if not (folder / "trained.json").exists():
        start = time.perf_counter()
        spec = artifact.make_spec(
            name if name != "photos" else "resnet18", {}, pictures.classes, pictures.shape, pictures.mean, pictures.std
        )
        torch.manual_seed(seed)
        model = artifact.build(spec)
        batches = Batches(
            pictures.train, Augmenter(one.augment, pictures.mean, pictures.std), one.train.batch_size, seed
        )
        fit(
            model, losses.cross_entropy(one.train.label_smoothing), batches, one.train, seed=seed,
            on_epoch=lambda row: print(
                f"  {name} {seed}: epoch {row['epoch']}/{row['epochs']} loss {row['train_loss']:.4f} "
                f"{row['seconds']:.0f} s", flush=True,
            ),
        )  # fmt: skip
        folder.mkdir(parents=True, exist_ok=True)
        artifact.save_model(folder, *artifact.freeze(model.eval(), spec, fold=False))
        write_json(folder / "trained.json", {"seconds": time.perf_counter() - start, "seed": seed})
    return one, pictures, Dense(*artifact.load_model(folder))


def main() -> None:
    """Train one network, or take it, and score it."""
    args = harness.arguments(
        __doc__,
        only={"choices": list(JOBS), "required": True, "help": "which network"},
        seed={"type": int, "default": 0, "help": "of weights, order and augmentation"},
        epochs={"type": int, "help": "instead of the job's"},
        cache={"default": "runs/benchmarks", "help": "where trained networks are kept"},
        threads={"type": int, "default": 1, "help": "of torch"},
    )
    if any(os.environ.get(key) != value for key, value in MALLOC.items()):
        import sys

        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **MALLOC})
    import torch

    from raydeep.compress import pack, plan

    torch.set_num_threads(args.threads)
    data, cache = harness.data_folder(args), Path(args.cache).resolve()
    one, pictures, found = dense(args.only, data, cache, args.seed, args.epochs)
    scored = plan.measure(pack.pack(*found), pictures, one.train.eval_batch_size)
    print(f"{args.only} {args.seed}: val {scored.val_accuracy:.4f} test {scored.test_accuracy:.4f}", flush=True)


if __name__ == "__main__":
    main()
