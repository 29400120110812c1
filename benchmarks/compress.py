"""What compression reaches, on real data, beside papers and peers: files, accuracies and latencies of what ships.

Each section is a table of benchmarks/README.md: `--only SECTION` runs one. Settings were chosen on validation pictures
with seed 0; test accuracy is looked at once, at the end. Float networks come from dense.py and are kept in `--cache`.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import dense
import harness


def compressed(name: str, seed: int, values: dict[str, Any], args: Any) -> tuple[Any, Any, Any]:
    """Compress a float network: the job, the dense model's scores, the compressed one's."""
    from raydeep.compress import pack, plan

    data, cache = harness.data_folder(args), Path(args.cache).resolve()
    one, pictures, start = dense.dense(name, data, cache, seed, args.dense_epochs)
    one = one.with_values(values)
    began = time.perf_counter()
    found = plan.compress(
        one, start, pictures, seed,
        on_epoch=lambda row: print(
            f"    epoch {row['epoch']}: loss {row['train_loss']:.4f}, {row['seconds']:.0f} s", file=sys.stderr
        ),
    )  # fmt: skip
    before = plan.measure(pack.pack(*start), pictures, one.train.eval_batch_size)
    print(
        f"  {name} {seed} {values}: val {before.val_accuracy:.4f} -> {found.val_accuracy:.4f}, test "
        f"{before.test_accuracy:.4f} -> {found.test_accuracy:.4f}, {len(found.packed):,} bytes, "
        f"{time.perf_counter() - began:.0f} s", flush=True,
    )  # fmt: skip
    return one, before, found


def spread(values: list[float]) -> dict[str, Any]:
    """Number and standard deviation of a result over seeds."""
    return {"n": len(values), **({"std": statistics.stdev(values)} if len(values) > 1 else {})}


LENETS: dict[str, dict[str, Any]] = {
    "lenet_300_100": {
        "title": "LeNet-300-100", "ratio": ">= 100.0", "error": "<= 1.64",
        "papers": "Deep Compression 40×, Sparse VD 68× in parameters",
        "errors": "Deep Compression 1.58, Sparse VD 1.92",
        "values": {
            "prune.sparsity": 0.98, "prune.score": "lamp", "recover.epochs": 30, "recover.lr": 0.05,
            "quantize.weight_bits": 4, "quantize.edge_bits": None, "quantize.epochs": 15, "quantize.lr_factor": 0.2,
            "distill.enabled": True,
        },
    },
    "lenet5": {
        "title": "LeNet-5", "ratio": ">= 200.0", "error": "<= 0.80",
        "papers": "Deep Compression 39×, Sparse VD 280× in parameters, MIRACLE 568×",
        "errors": "Deep Compression 0.74, Sparse VD 0.75, MIRACLE 0.69",
        "values": {
            "prune.sparsity": 0.99, "prune.score": "lamp", "recover.epochs": 10, "recover.lr": 0.03,
            "quantize.weight_bits": 4, "quantize.edge_bits": None, "quantize.epochs": 5, "quantize.lr_factor": 0.2,
            "distill.enabled": True,
        },
    },
}  # fmt: skip


def lenet(name: str, args: Any) -> list[dict[str, Any]]:
    """A LeNet on MNIST: bytes of the file against the float32 weights, test error of the file re-read."""
    task = LENETS[name]
    ratios, errors, floats, sizes = [], [], [], []
    for seed in range(args.seeds):
        _, before, found = compressed(name, seed, {**task["values"], **args.values}, args)
        ratios.append(4 * before.cost.parameters / len(found.packed))
        errors.append(100 * (1 - found.test_accuracy))
        floats.append(100 * (1 - before.test_accuracy))
        sizes.append(float(len(found.packed)))
    title, mean = task["title"], statistics.mean
    return [
        harness.result(f"{title}: bytes, float32 over file ({task['papers']})", mean(ratios), "ratio", task["ratio"],
                       **spread(ratios)),
        harness.result(f"{title}: file", mean(sizes), "bytes", **spread(sizes)),
        harness.result(f"{title}: test error ({task['errors']})", mean(errors), "%", task["error"], **spread(errors)),
        harness.result(f"{title}: test error of the float network", mean(floats), "%", **spread(floats)),
    ]  # fmt: skip


BITS = {  # bits → epochs, learning rate, target, what papers have against their 91.6
    4: (5, 0.01, "<= 0.3", "PACT -0.1, APoT -0.7"), 3: (6, 0.02, "<= 0.8", "PACT 0.5, APoT -0.6"),
    2: (10, 0.03, "<= 2.0", "PACT 1.9, APoT 0.6"),
}  # fmt: skip


def bits(args: Any) -> list[dict[str, Any]]:
    """ResNet-20 on CIFAR-10 with 4, 3 and 2 bits for weights and activations."""
    drops: dict[int, list[float]] = {width: [] for width in BITS}
    floats, longer, average, quick = [], [], [], []
    for seed in range(args.seeds):

        def run(values: dict[str, Any], epochs: int, lr: float, seed: int = seed) -> tuple[float, float]:
            taught = {"recover.epochs": args.epochs or epochs if epochs else 0, "recover.lr": lr}
            _, before, found = compressed("resnet20", seed, {**taught, **values, **args.values}, args)
            return 100 * before.test_accuracy, 100 * found.test_accuracy

        four = {"quantize.weight_bits": 4, "quantize.activation_bits": 4}
        before, after = run({**four, "quantize.rounding": "adaptive"}, 0, 0.01)
        quick.append(before - after)
        for width, (epochs, lr, *_) in BITS.items():
            both = {"quantize.weight_bits": width, "quantize.activation_bits": width, "distill.enabled": True}
            before, after = run(both, epochs, lr)
            drops[width].append(before - after)
        floats.append(before)
        longer.append(run({}, BITS[4][0], BITS[4][1])[1])
        mixed = {**four, "quantize.weight_bits": {"average": 3.0}, "distill.enabled": True}
        before, after = run(mixed, *BITS[4][:2])
        average.append(before - after)
    mean = statistics.mean
    rows = [
        harness.result("float, test accuracy", mean(floats), "%", **spread(floats)),
        harness.result(f"float, {BITS[4][0]} epochs more", mean(longer), "%", **spread(longer)),
    ]
    for width, (epochs, _, target, papers) in BITS.items():
        name = f"W{width}A{width}, {args.epochs or epochs} epochs: points below float ({papers})"
        rows.append(harness.result(name, mean(drops[width]), "points", target, **spread(drops[width])))
    name = f"W3 on average, A4, {args.epochs or BITS[4][0]} epochs: points below float"
    rows.append(harness.result(name, mean(average), "points", **spread(average)))
    rows.append(harness.result("W4A4 without training: points below float", mean(quick), "points", **spread(quick)))
    return rows


def brevitas(args: Any) -> list[dict[str, Any]]:
    """The same network, data, batches, optimizer and number of steps through brevitas' layers."""
    import peers

    return peers.brevitas(args)


def channels(args: Any) -> list[dict[str, Any]]:
    """ResNet-20 on CIFAR-10 with half of the multiply-accumulates, beside plain torch-pruning and fine-tuning."""
    import peers

    epochs, ours, plain, macs = args.epochs or 6, [], [], []
    for seed in range(args.seeds):
        values = {
            "prune.kind": "channels", "prune.sparsity": 0.5, "recover.epochs": epochs, "recover.lr": 0.05,
            "distill.enabled": True, **args.values,
        }  # fmt: skip
        one, _, found = compressed("resnet20", seed, values, args)
        ours.append(100 * found.test_accuracy)
        macs.append(peers.share_of_macs(found.packed))
        accuracy, share = peers.torch_pruning(one, seed, epochs, args)
        plain.append(100 * accuracy)
        print(f"  torch-pruning {seed}: test {accuracy:.4f}, MACs {share:.3f} (ours {macs[-1]:.3f})", flush=True)
    gains = [a - b for a, b in zip(ours, plain, strict=True)]
    return [
        harness.result("ours, test accuracy", statistics.mean(ours), "%", **spread(ours)),
        harness.result("ours, share of MACs", statistics.mean(macs), "of dense", **spread(macs)),
        harness.result("torch-pruning + fine-tuning, test accuracy", statistics.mean(plain), "%", **spread(plain)),
        harness.result("ours above torch-pruning", statistics.mean(gains), "points", ">= 0.5", **spread(gains)),
    ]


def patterns(args: Any) -> list[dict[str, Any]]:
    """ResNet-20 on CIFAR-10 with 2:4 and as many zeros anywhere: accuracy, and what the packed file makes of them."""
    import numpy as np

    from raydeep.compress import pack

    rows, recover = [], {"recover.epochs": args.epochs or 3, "recover.lr": 0.02, "distill.enabled": True}
    eight = {"quantize.weight_bits": 8}
    _, before, all_weights = compressed("resnet20", 0, {**eight, "recover.epochs": 0}, args)
    _, _, two_four = compressed("resnet20", 0, {**recover, **eight, "prune.kind": "2:4"}, args)
    _, _, anywhere = compressed("resnet20", 0, {**recover, **eight, "prune.sparsity": 0.5}, args)
    broken = checked = 0
    for name, tensor in pack.unpack(two_four.packed)[1].items():
        if name.endswith(".weight.q") and tensor.dim() == 4 and tensor.shape[1] % 4 == 0:
            groups = tensor.permute(0, 2, 3, 1).reshape(-1, 4).numpy()
            broken += int((np.count_nonzero(groups, axis=1) > 2).sum())
            checked += len(groups)
    rows.append(harness.result("2:4: groups with more than 2 of 4", broken, "groups", "<= 0.0", of=checked))
    for title, found in (("all weights", all_weights), ("2:4", two_four), ("half of the weights anywhere", anywhere)):
        rows.append(harness.result(f"{title}, 8 bits: file", len(found.packed), "bytes", n=1))
        points = 100 * (before.test_accuracy - found.test_accuracy)
        rows.append(harness.result(f"{title}, 8 bits: points below float", points, "points", n=1))
    return rows


def photos(args: Any) -> list[dict[str, Any]]:
    """ResNet-18 at 128 pixels on ten classes of photographs: narrow, 8 bits, in onnxruntime, one thread."""
    import peers

    return peers.photos(args, compressed)


SECTIONS: dict[str, Callable[[Any], list[dict[str, Any]]]] = {
    "lenet_300_100": partial(lenet, "lenet_300_100"), "lenet5": partial(lenet, "lenet5"), "bits": bits,
    "brevitas": brevitas, "channels": channels, "patterns": patterns, "photos": photos,
}  # fmt: skip


def main() -> None:
    """Run the sections asked for; each is a result of its own."""
    args = harness.arguments(
        __doc__,
        only={"choices": list(SECTIONS), "help": "one section"},
        cache={"default": "runs/benchmarks", "help": "where float networks are kept"},
        threads={"type": int, "default": 1, "help": "of torch"},
        seeds={"type": int, "help": "how many; else 3 for LeNets, 1 for the others"},
        epochs={"type": int, "help": "of recovery, in sections of CIFAR-10 and photos"},
        dense_epochs={"type": int, "help": "of the float networks (pilot runs)"},
        set={"action": "append", "default": [], "metavar": "KEY=VALUE", "help": "job keys (pilot runs)"},
    )
    if any(os.environ.get(key) != value for key, value in dense.MALLOC.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **dense.MALLOC})
    import torch

    from raydeep.safeyaml import load_yaml

    torch.set_num_threads(args.threads)
    args.values = {key: load_yaml(value) for key, _, value in (text.partition("=") for text in args.set)}
    seeds = args.seeds
    for name in [args.only] if args.only else SECTIONS:
        args.seeds = seeds or (3 if name in LENETS and not args.quick else 1)
        if args.quick:
            args.epochs = 1
        print(f"{name}:", flush=True)
        start = time.perf_counter()
        rows = SECTIONS[name](args)
        harness.finish(
            f"compress-{name}", rows, args, threads=args.threads, settings=args.values,
            minutes=(time.perf_counter() - start) / 60,
        )  # fmt: skip


if __name__ == "__main__":
    main()
