"""Speed of training: fit() beside a loop written by hand, on one process and on two; checkpoints; start-up.

The loop written by hand is what one would write for one network in 25 lines of PyTorch: pictures in memory, a
permutation an epoch, raydeep's Augmenter on the batch, fused SGD, cosine. Both loops train the same network on the same
pictures with the same number of threads, in turns. CIFAR-10, flip and crop, batches of 128.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import harness
import numpy as np
import scarce
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from raydeep.config import Augment, Train, load_job
from raydeep.data import shards
from raydeep.data.augment import Augmenter
from raydeep.data.batches import Batches
from raydeep.data.resident import Pixels, moments
from raydeep.disk import read_lines
from raydeep.model import zoo
from raydeep.train import checkpoint, losses
from raydeep.train.loop import fit
from raydeep.train.parallel import rank_world
from raydeep.train.saver import Saver

ROOT = Path(__file__).parent.parent
BATCH = 128
STEPS = 20  # an epoch of the two-worker trainings: data.limit_per_class 256 of ten classes, in batches of 128
LR = 0.05
SAME: dict[str, Any] = {"batch_size": BATCH, "precision": "float32", "channels_last": False, "warmup_epochs": 0.0}
EVERY = 50  # steps between checkpoints, what the target is about
MEASURED_EVERY = 5  # steps between checkpoints where they are timed, so that their cost stands out of the noise
NICE = 15  # what Ray gives its workers: the peer must not win only because others use the machine
MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(2**31 - 1), "MALLOC_TRIM_THRESHOLD_": str(2**32)}


class Setting:
    """The pictures and how they are augmented."""

    def __init__(self, folder: Path, steps: int) -> None:
        self.folder, self.steps = folder, steps
        self.pixels: Pixels = scarce.decode(*scarce.read(folder / "cifar10", "train", np.arange(steps * BATCH)))
        mean, std = moments(self.pixels)
        self.augmenter = Augmenter(Augment(horizontal_flip=0.5, crop=0.125), mean, std)

    def network(self, name: str) -> nn.Module:
        """A new network, the same each time."""
        torch.manual_seed(0)
        return zoo.build(name, {}, 10, self.pixels.shape)


def by_hand(model: nn.Module, at: Setting, epochs: int = 1, fused: bool = True) -> list[float]:
    """The loop written by hand; returns images a second of each epoch."""
    rank, world = rank_world()
    images, labels = torch.from_numpy(at.pixels.images), torch.tensor(at.pixels.labels)
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True) if world > 1 else model
    optimizer = torch.optim.SGD(
        model.parameters(), lr=LR, momentum=0.9, nesterov=True, weight_decay=5e-4, fused=fused or None
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * at.steps)
    shuffle = torch.Generator().manual_seed(0)
    rates = []
    model.train()
    for _ in range(epochs):
        start, total = time.perf_counter(), 0.0
        order = torch.randperm(len(images), generator=shuffle).view(at.steps, world, -1)[:, rank]
        for rows in order:
            x = at.augmenter(images[rows], torch.rand(len(rows), at.augmenter.draws, dtype=torch.float64))
            loss = F.cross_entropy(wrapped(x), labels[rows])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            total += loss.item()
        rates.append(len(images) / (time.perf_counter() - start))
    return rates


def by_raydeep(model: nn.Module, at: Setting, saver: Saver | None = None, **train: Any) -> None:
    """The same by fit()."""
    cfg = Train(**{**SAME, "epochs": 1, "lr": LR, **train})
    rank, world = rank_world()
    fit(model, losses.cross_entropy(), Batches(at.pixels, at.augmenter, BATCH, 0, rank=rank, world=world), cfg,
        saver=saver)  # fmt: skip


def one_process(folder: Path, work: Path, quick: bool) -> list[dict[str, Any]]:
    """fit() and the loop by hand, in turns."""
    results = []
    for name, steps, rounds in (("resnet8", 10, 4 if quick else 10), ("resnet20", 6, 4 if quick else 8)):
        at = Setting(folder, steps)
        models = {peer: at.network(name) for peer in ("fit", "hand")}
        loops: dict[str, Callable[[nn.Module, Setting], Any]] = {"fit": by_raydeep, "hand": by_hand}
        used: dict[str, list[float]] = {
            peer: [] for peer in loops
        }  # CPU time: others' work on the machine is not in it

        def run(train: Callable[[], Any], seconds: list[float]) -> None:
            start = time.process_time()
            train()
            seconds.append(time.process_time() - start)

        timed = harness.interleaved(
            {peer: partial(run, partial(loops[peer], models[peer], at), used[peer]) for peer in loops}, rounds
        )
        for peer, words in (("fit", "fit()"), ("hand", "loop by hand")):
            rate, facts = steps * BATCH / timed[peer].median_s, {"spread": timed[peer].spread, "n": rounds}
            results.append(harness.result(f"1 process, {name}: {words}", rate, "images/s", **facts))
        value, spread = harness.ratio(timed["hand"], timed["fit"])
        facts = {"spread": spread, "n": rounds, "steps": steps}
        results.append(harness.result(f"1 process, {name}: fit() / by hand", value, "ratio", ">= 0.97", **facts))
        value, facts["spread"] = harness.ratio(harness.Timing(used["hand"][1:]), harness.Timing(used["fit"][1:]))
        results.append(harness.result(f"1 process, {name}: the same in CPU seconds", value, "ratio", **facts))
    return results


def begin() -> None:
    """Set up a process of the pool."""
    torch.set_num_threads(1)


@cache
def kept(folder: Path, name: str, steps: int, options: str) -> tuple[nn.Module, Setting]:
    """A network of its own in a process of the pool."""
    at = Setting(folder, steps)
    return at.network(name), at


def train_here(folder: Path, name: str, steps: int, options: str) -> None:
    """Some steps of fit() in a process of the pool."""
    by_raydeep(*kept(folder, name, steps, options), **json.loads(options))


def defaults(folder: Path, work: Path, quick: bool) -> list[dict[str, Any]]:
    """What the settings that raydeep chooses on a CPU are worth: resnet20."""
    name, steps, rounds = "resnet20", 3, 3 if quick else 4
    at = Setting(folder, steps)
    variants: dict[str, dict[str, Any]] = {
        "default": {}, "channels_last": {"channels_last": True}, "bfloat16": {"precision": "bfloat16"},
        "compile": {"compile": True},
    }  # fmt: skip
    models = {peer: at.network(name) for peer in (*variants, "fused SGD", "plain SGD")}
    start = time.perf_counter()
    by_raydeep(models["compile"], at, compile=True)
    compiling = time.perf_counter() - start
    peers: dict[str, Callable[[], Any]] = {
        peer: lambda peer=peer: by_raydeep(models[peer], at, **variants[peer]) for peer in variants
    }
    peers |= {f"{word} SGD": lambda word=word: by_hand(models[f"{word} SGD"], at, fused=word == "fused")
              for word in ("fused", "plain")}  # fmt: skip
    with ExitStack() as stack:
        for word, environment in (("default", {}), ("kept", MALLOC)):
            os.environ.update(environment)  # glibc reads it when a process starts
            pool = stack.enter_context(ProcessPoolExecutor(1, get_context("spawn"), begin))
            for layout in (False, True):
                task = (train_here, folder, name, steps, json.dumps({"channels_last": layout}))
                peers[f"memory {word}{', channels_last' * layout}"] = lambda p=pool, t=task: p.submit(*t).result()
            pool.submit(*task).result()
            for key in environment:
                del os.environ[key]
        timed = harness.interleaved(peers, rounds)
    results = [harness.result(f"{name}: first {steps} steps of train.compile", compiling, "s", n=1)]
    for words, slow, fast in (
        ("fused SGD / torch's default", "plain SGD", "fused SGD"),
        ("channels_last true / false", "default", "channels_last"),
        ("bfloat16 / float32", "default", "bfloat16"),
        ("compile true / false", "default", "compile"),
        ("freed memory kept by malloc / given back", "memory default", "memory kept"),
        ("the same, channels_last", "memory default, channels_last", "memory kept, channels_last"),
        ("both together / neither", "memory default", "memory kept, channels_last"),
    ):
        value, spread = harness.ratio(timed[slow], timed[fast])
        results.append(harness.result(f"{name}: {words}", value, "ratio", spread=spread, n=rounds, steps=steps))
    return results


class Timed(Saver):
    """Notes for how long each save holds up the loop."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.blocked: list[float] = []

    def save(self, moment: checkpoint.Moment, state: checkpoint.State) -> None:
        start = time.perf_counter()
        super().save(moment, state)
        self.blocked.append(time.perf_counter() - start)


def checkpoints(folder: Path, work: Path, quick: bool) -> list[dict[str, Any]]:
    """What checkpoints cost: taken every few steps, so that it can be seen, and told for one every EVERY steps."""
    results = []
    for name, steps, rounds in (("resnet8", 20, 3 if quick else 5), ("resnet20", 10, 2 if quick else 5)):
        at = Setting(folder, steps)
        models = {peer: at.network(name) for peer in ("with", "without")}
        blocked: list[float] = []

        def with_saver(model: nn.Module = models["with"], at: Setting = at, blocked: list[float] = blocked) -> None:
            saver = Timed(work / "checkpoints")
            by_raydeep(model, at, saver, checkpoint_steps=MEASURED_EVERY)
            blocked += saver.blocked
            assert saver.started == at.steps // MEASURED_EVERY

        peers = {"with": with_saver, "without": lambda m=models["without"], at=at: by_raydeep(m, at)}
        timed = harness.interleaved(peers, rounds)
        saves = steps // MEASURED_EVERY
        pairs = zip(timed["with"].seconds, timed["without"].seconds, strict=True)
        each = [(a - b) / saves / (EVERY * b / steps) for a, b in pairs]  # as a share of EVERY steps
        ratios = harness.Timing([1 / (1 + cost) for cost in each])
        facts = {"n": rounds, "steps": steps, "saves": saves}
        words = f"checkpoint every {EVERY} steps, {name}: steps/s with / without"
        results.append(harness.result(words, ratios.median_s, "ratio", ">= 0.97", spread=ratios.spread, **facts))
        held = statistics.median(blocked)
        step = timed["without"].median_s / steps
        words = f"checkpoint, {name}: holds up the loop for"
        results.append(harness.result(words, 1000 * held, "ms", n=len(blocked)))
        results.append(harness.result(f"checkpoint, {name}: a step takes", 1000 * step, "ms", n=rounds))
    return results


def peer(folder: Path, told: dict[str, Any]) -> None:
    """Runs under torchrun: the loop by hand on each rank, or it and fit() in turns; rank 0 prints one JSON line."""
    torch.set_num_threads(1)
    os.nice(NICE)
    dist.init_process_group("gloo")
    at = Setting(folder, told["steps"])
    if told["turns"]:
        timed = harness.interleaved(
            {"fit": lambda: by_raydeep(at.network("resnet8"), at), "hand": lambda: by_hand(at.network("resnet8"), at)},
            told["turns"],
        )
        out: Any = {name: timing.seconds for name, timing in timed.items()}
    else:
        out = by_hand(at.network("resnet8"), at, told["epochs"])
    if dist.get_rank() == 0:
        print(json.dumps(out), flush=True)
    dist.destroy_process_group()


def torchrun(folder: Path, **told: Any) -> Any:
    """Run `peer` in two processes; returns what it prints."""
    told = {"steps": STEPS, "turns": 0, "epochs": 0, **told}
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__,
        "--data", str(folder), "--peer", json.dumps(told),
    ]  # fmt: skip
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return json.loads(done.stdout.decode().strip().splitlines()[-1])


def raydeep_train(folder: Path, work: Path, name: str, epochs: int) -> tuple[list[float], dict[str, float]]:
    """`raydeep train` on two workers: images a second of each epoch, and seconds of each part of its start."""
    storage = work / name
    shutil.copytree(work / "datasets", storage / "datasets", copy_function=os.link)
    sets = (
        f"data.path={folder / 'cifar10'}", f"storage={storage}", f"train.epochs={epochs}", "scaling.workers=2",
        *(f"train.{key}={value}" for key, value in SAME.items()),
        f"data.limit_per_class={STEPS * BATCH // 10}", "export.latency_rounds=3",
    )  # fmt: skip
    pairs = [part for value in sets for part in ("--set", value)]
    env = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | {"RAY_TMPDIR": str(work / "r")}
    start = time.time()
    with subprocess.Popen(
        [sys.executable, "-u", "-m", "raydeep.cli", "train", str(ROOT / "jobs" / "cifar10.yaml"), *pairs],
        env=env, cwd=work, stdout=(storage / "said").open("w"), stderr=subprocess.STDOUT,
    ) as process:  # fmt: skip
        seen: dict[str, float] = {}
        while process.poll() is None and "step" not in seen:
            said = (storage / "said").read_text()
            here = {
                "data": "✓ data" in said, "ray": "✓ ray" in said, "worker": any(storage.glob("*-*/workers/*.step")),
                "step": any(int.from_bytes(p.read_bytes(), "little") for p in storage.glob("*-*/workers/*.step")),
            }  # fmt: skip
            seen |= {stage: time.time() for stage, there in here.items() if there and stage not in seen}
            time.sleep(0.01)
        code = process.wait()
    said = (storage / "said").read_text()
    if code or "step" not in seen:
        raise RuntimeError(f"raydeep train ended with {code}:\n{said}")
    took = {
        stage: float(line.rsplit("(", 1)[1].split(" s)")[0])
        for line in said.splitlines()
        for stage in ("data", "ray")
        if line.startswith(f"✓ {stage} ")
    }
    [run] = (path.parent for path in storage.glob("*-*/metrics.jsonl"))
    rows = read_lines(run / "metrics.jsonl")
    assert [row["step"] for row in rows] == [STEPS * (i + 1) for i in range(epochs)]
    joined = read_lines(run / "attempts.jsonl")[0]["time"]
    parts = {
        "interpreter, imports": seen["data"] - took["data"] - start,
        "data: shards checked": took["data"],
        "network built, run folder": seen["ray"] - took["ray"] - seen["data"],
        "Ray started, pictures decoded": took["ray"],
        "TorchTrainer: workers up, process group": seen["worker"] - seen["ray"],
        "workers: storage probed, resume": joined - seen["worker"],
        "workers: network, first step": seen["step"] - joined,
        "in all": seen["step"] - start,
    }
    return [row["images_per_s"] for row in rows], parts


def two_workers(folder: Path, work: Path, quick: bool) -> list[dict[str, Any]]:
    """`raydeep train` and the loop by hand under torchrun, in turns; and start-up."""
    rounds, epochs = (2, 3) if quick else (3, 4)
    job = load_job(ROOT / "jobs" / "cifar10.yaml", [f"data.path={folder / 'cifar10'}"])
    shards.prepare(job.data, work)
    ours, theirs, starts = [], [], []
    for turn in range(rounds):
        for side in (0, 1) if turn % 2 else (1, 0):
            if side:
                rates, parts = raydeep_train(folder, work, f"t{turn}", epochs)
                ours.append(statistics.median(rates[1:]))
                starts.append(parts)
            else:
                theirs.append(statistics.median(torchrun(folder, epochs=epochs)[1:]))
    results = []
    for words, rates in (("raydeep train", ours), ("torchrun, loop by hand", theirs)):
        found = harness.Timing(rates)
        facts = {"spread": found.spread, "n": rounds}
        results.append(harness.result(f"2 workers, resnet8: {words}", found.median_s, "images/s", **facts))
    ratios = harness.Timing([a / b for a, b in zip(ours, theirs, strict=True)])
    facts |= {"spread": ratios.spread, "epochs": epochs - 1, "steps": STEPS}
    words = "2 workers, resnet8: raydeep train / by hand"
    results.append(harness.result(words, ratios.median_s, "ratio", ">= 0.95", **facts))
    turns = 3 if quick else 8
    seconds = torchrun(folder, turns=turns, steps=12)
    value, spread = harness.ratio(harness.Timing(seconds["hand"]), harness.Timing(seconds["fit"]))
    words = "2 workers, resnet8, both under torchrun: fit() / by hand"
    results.append(harness.result(words, value, "ratio", spread=spread, n=turns, steps=12))
    for part in starts[0]:
        found = harness.Timing([start[part] for start in starts])
        results.append(harness.result(f"start-up: {part}", found.median_s, "s", spread=found.spread, n=rounds))
    return results


PARTS: dict[str, Callable[[Path, Path, bool], list[dict[str, Any]]]] = {
    "one_process": one_process, "two_workers": two_workers, "checkpoints": checkpoints, "defaults": defaults,
}  # fmt: skip
SAVED = harness.RESULTS / "train.json"


def main() -> None:
    args = harness.arguments(
        __doc__,
        only={"choices": list(PARTS), "help": "one part; with --save the others stay as they are saved"},
        peer={"help": "for the benchmark itself: what to do under torchrun, as JSON"},
    )
    folder = harness.data_folder(args, "cifar10")
    if args.peer:
        peer(folder, json.loads(args.peer))
        return
    torch.set_num_threads(1)
    results, started = [], time.perf_counter()
    work = Path(tempfile.mkdtemp(prefix="bt"))
    try:
        for part in PARTS:
            if args.only in (None, part):
                print(f"{part.replace('_', ' ')}:", flush=True)
                results += [{**row, "part": part} for row in PARTS[part](folder, work, args.quick)]
            elif args.save and SAVED.exists():  # measured before, side by side as well
                results += [row for row in json.loads(SAVED.read_text())["results"] if row["part"] == part]
    finally:
        shutil.rmtree(work, ignore_errors=True)
    harness.finish(
        "train", results, args, batch=BATCH, torch_threads=1, seconds=round(time.perf_counter() - started),
        load=os.getloadavg()[1], checkpoints_timed_every=MEASURED_EVERY,
    )  # fmt: skip


if __name__ == "__main__":
    main()
