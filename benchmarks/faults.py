"""Faults: what a training survives, how many steps it does again, and whether its weights end the same.

Each fault hits a training of its own, of the embedded digits on a local Ray (or, for lost nodes, on a cluster of
two raylets of this machine). soak.py has them come at random.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import harness

ROOT = Path(__file__).parent.parent
STEPS = 12 * 146  # 1,169 pictures in batches of 8
SETS = (
    "train.epochs=12", "train.batch_size=8", "train.lr=0.01", "train.checkpoint_steps=20", "scaling.workers=2",
    "export.latency_rounds=3",
)  # fmt: skip
LONGER = ("train.epochs=20", "model.name=slow:make")  # slow enough for a node to come back
TOLERANCE = 1e-3  # of an epoch's mean loss, where another number of workers adds in another order


def paths() -> str:
    """PYTHONPATH, with slow.py on it."""
    return os.pathsep.join(filter(None, [str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH")]))


class Outcome(NamedTuple):
    """What a fault did."""

    fault: str
    happened: str
    again: int  # steps that were done again
    weights: str  # identical, or within what


class Training:
    """A `raydeep train` of the digits in a process of its own."""

    def __init__(self, home: Path, name: str, *sets: str, job: str = "digits", env: dict[str, str] | None = None):
        self.home, self.storage, self.env = home, home / name, env or {}
        pairs = [part for value in (f"storage={self.storage}", *sets) for part in ("--set", value)]
        self.start(str(ROOT / "jobs" / f"{job}.yaml"), *pairs)

    def start(self, *arguments: str) -> None:
        """Run `raydeep train`."""
        env = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "RAY_TMPDIR")}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "raydeep.cli", "train", *arguments],
            env={**env, "RAY_TMPDIR": str(self.home), "PYTHONPATH": paths(), **self.env}, cwd=self.home, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def resume(self, *more: str) -> None:
        """Go on with the run."""
        self.start("--resume", str(self.folder), *more)

    @property
    def folder(self) -> Path:
        """The run."""
        return next(self.storage.glob("*-*/job.yaml")).parent

    def saved(self) -> list[int]:
        """Steps of the checkpoints."""
        return sorted(int(p.name[5:]) for p in self.storage.glob("*-*/checkpoints/step-*"))

    def wait(self, condition: Callable[[], Any], what: str, seconds: float = 240) -> None:
        """Wait while the training runs.

        Raises:
            RuntimeError: it ended, or the time is over.
        """
        end = time.monotonic() + seconds
        while not condition():
            if self.process.poll() is not None:
                raise RuntimeError(f"the training ended before {what}:\n{self.process.communicate()[0]}")
            if time.monotonic() > end:
                self.process.kill()
                raise RuntimeError(f"waited {seconds:g} s for {what}:\n{self.process.communicate()[0]}")
            time.sleep(0.02)

    def wait_step(self, step: int) -> None:
        """Wait for a checkpoint of this step or a later one."""
        self.wait(lambda: (self.saved() or [0])[-1] >= step, f"step {step}")

    def pid(self, rank: int) -> int:
        """Process of a worker."""
        return int(json.loads((self.folder / "workers" / f"rank-{rank}.json").read_text())["pid"])

    def end(self) -> tuple[int, str]:
        """Exit code and output."""
        said, _ = self.process.communicate(timeout=900)
        return self.process.returncode, said

    def well(self) -> Training:
        """Itself, once it has ended.

        Raises:
            RuntimeError: with an error.
        """
        code, said = self.end()
        if code:
            raise RuntimeError(f"exit code {code}:\n{said}")
        return self

    def attempts(self) -> list[dict[str, Any]]:
        """Lines of attempts.jsonl."""
        return _lines(next(self.storage.glob("*-*/attempts.jsonl"), None))

    def epochs(self) -> list[dict[str, Any]]:
        """Lines of metrics.jsonl."""
        return _lines(self.folder / "metrics.jsonl")

    def again(self) -> int:
        """Steps that were done more than once."""
        return sum(max(0, a["reached_before"] - a["from_step"]) for a in self.attempts())

    def model(self) -> bytes:
        """The weights that came out."""
        return (self.folder / "models" / "dense" / "model.safetensors").read_bytes()


def _lines(path: Path | None) -> list[dict[str, Any]]:
    from raydeep.disk import read_lines

    return read_lines(path) if path is not None else []


def ended_well(training: Training, reference: Training, within: float | None = None) -> str:
    """Finish a training and compare it with an undisturbed one: "identical", or the largest difference of losses.

    Raises:
        RuntimeError: it failed, or differs.
    """
    if training.well().model() == reference.model():
        return "bit-identical"
    pairs = list(zip(training.epochs(), reference.epochs(), strict=True))
    furthest = max(abs(a["train_loss"] - b["train_loss"]) / b["train_loss"] for a, b in pairs)
    if within is None or furthest > within or any(a["order_hash"] != b["order_hash"] for a, b in pairs):
        raise RuntimeError(f"the weights differ; losses by up to {furthest:.2g}")
    return f"same batches; losses of epochs within {furthest:.1g}"


def undisturbed(home: Path, name: str = "whole", *sets: str) -> Training:
    """The training that the others are compared with."""
    return Training(home, name, *SETS, *sets).well()


def signalled(home: Path, whole: Training, name: str, rank: int, kind: signal.Signals, *sets: str) -> tuple[int, str]:
    """A worker of two gets a signal; the steps that were done again, and the weights."""
    training = Training(home, name, *SETS, *sets)
    training.wait_step(300)
    os.kill(training.pid(rank), kind)
    training.wait(lambda: len(training.attempts()) == 2, "another attempt")
    weights = ended_well(training, whole)
    return training.again(), weights


def worker_killed(home: Path, whole: Training) -> Outcome:
    """Kill -9 of one of two workers."""
    found = signalled(home, whole, "worker-killed", 1, signal.SIGKILL)
    return Outcome("kill -9 of a worker", "Ray starts the workers anew", *found)


def sharded_worker_killed(home: Path, whole: Training) -> Outcome:
    """The same where the model is sharded."""
    found = signalled(home, whole, "sharded-killed", 1, signal.SIGKILL, "scaling.strategy=fsdp")
    return Outcome("kill -9 of a worker, fsdp", "Ray starts the workers anew", *found)


def worker_terminated(home: Path, whole: Training) -> Outcome:
    """SIGTERM to one of two workers."""
    found = signalled(home, whole, "worker-terminated", 0, signal.SIGTERM)
    return Outcome("SIGTERM to a worker", "a checkpoint at once, then anew", *found)


def driver_killed(home: Path, whole: Training) -> Outcome:
    """Kill -9 of the driver, and its newest checkpoint is damaged before the resume."""
    training = Training(home, "driver-killed", *SETS)
    training.wait_step(300)
    workers = [training.pid(0), training.pid(1)]
    training.process.kill()
    training.end()
    while any(Path(f"/proc/{pid}").exists() for pid in workers):  # Ray follows its driver; till then they train on
        time.sleep(0.2)
    newest = training.folder / "checkpoints" / f"step-{training.saved()[-1]:09d}"
    with (newest / "tensors.safetensors").open("rb+") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    training.resume()
    weights = ended_well(training, whole)
    [note] = training.attempts()[-1]["notes"]
    if not note.startswith(f"{newest.name} is torn or changed"):
        raise RuntimeError(note)
    happened = "--resume passes over the damaged one, says so, and takes the one before"
    return Outcome("kill -9 of the driver, newest checkpoint damaged", happened, training.again(), weights)


def driver_terminated(home: Path, whole: Training) -> Outcome:
    """SIGTERM to the driver, then --resume."""
    training = Training(home, "driver-terminated", *SETS)
    training.wait_step(300)
    training.process.terminate()
    code, said = training.end()
    if code != 143:
        raise RuntimeError(f"exit code {code}:\n{said}")
    training.resume()
    weights = ended_well(training, whole)
    return Outcome("SIGTERM to the driver", "a checkpoint at once; --resume", training.again(), weights)


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A file system of its own in memory; needs root."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)], check=True, capture_output=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False)


def disk_full(home: Path, whole: Training) -> Outcome:
    """The storage runs full in the middle of a training; room is made, then --resume."""
    with small_disk(home / "disk", "24m") as disk:
        training = Training(home, "disk/runs", *SETS, "scaling.max_failures=0")
        training.wait_step(300)
        filler = disk / "filler"
        with filler.open("wb", buffering=0) as file:  # or close would raise too
            try:
                while True:
                    file.write(bytes(4096))
            except OSError:
                pass
        code, said = training.end()
        if code != 2 or "no space left on the device" not in said or "Traceback" in said:
            raise RuntimeError(f"exit code {code}:\n{said}")
        filler.unlink()
        training.resume()
        weights = ended_well(training, whole)
        happened = "one error that names the folder and the last checkpoint; room made, --resume"
        return Outcome("disk full", happened, training.again(), weights)


class Nodes:
    """A Ray cluster of raylets on this machine, which a training joins."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        self.options = {"num_cpus": 1, "object_store_memory": 200 * 2**20}
        health = {"health_check_period_ms": 1000, "health_check_failure_threshold": 5}
        self.cluster = Cluster(
            initialize_head=True,
            head_node_args={**self.options, "include_dashboard": False, "_system_config": health},
        )
        self.other = self.cluster.add_node(**self.options)

    def lose(self) -> None:
        """Kill -9 of the second raylet and its workers."""
        self.cluster.remove_node(self.other, allow_graceful=False)

    def drain(self, seconds: int) -> None:
        """Ray's notice that the second node will be preempted."""
        subprocess.run(
            [sys.executable, "-m", "ray.scripts.scripts", "drain-node", "--address", self.cluster.address, "--node-id",
             self.other.node_id, "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot",
             "--deadline-remaining-seconds", str(seconds)],
            check=True, capture_output=True,
        )  # fmt: skip

    def give(self) -> None:
        """A second node again."""
        self.other = self.cluster.add_node(**self.options)


@contextmanager
def nodes(home: Path) -> Iterator[Nodes]:
    """Two nodes of one CPU; stopped afterwards."""
    before = dict(os.environ)
    os.environ |= {"RAY_TMPDIR": str(home), "PYTHONPATH": paths()}  # the raylets' own, and their workers'
    try:
        both = Nodes()
        try:
            yield both
        finally:
            both.cluster.shutdown()
    finally:
        os.environ.clear()
        os.environ.update(before)


def node_lost(home: Path, whole: Training) -> list[Outcome]:
    """Kill -9 of a raylet under `workers: [1, 2]`; later the node comes back."""
    with nodes(home) as both:
        training = Training(
            home, "node-lost", *SETS, *LONGER, "scaling.workers=[1, 2]", "scaling.resize_interval_s=5",
            env={"RAY_ADDRESS": both.cluster.address},
        )  # fmt: skip
        training.wait_step(300)
        both.lose()
        training.wait(lambda: len(training.attempts()) == 2, "going on with one worker")
        training.wait_step(training.attempts()[1]["from_step"] + 300)
        both.give()
        training.wait(lambda: len(training.attempts()) == 3, "going on with two workers")
        weights = ended_well(training, whole, TOLERANCE)
    _, shrunk, grown = training.attempts()
    if (shrunk["workers"], grown["workers"]) != (1, 2):
        raise RuntimeError(f"workers {shrunk['workers']}, then {grown['workers']}")
    down, up = (max(0, a["reached_before"] - a["from_step"]) for a in (shrunk, grown))
    return [
        Outcome("kill -9 of a raylet, workers: [1, 2]", "goes on with one worker, same global batches", down, weights),
        Outcome("the node comes back", "a checkpoint, then on with two workers", up, weights),
    ]


def node_preempted(home: Path, whole: Training) -> Outcome:
    """Ray says that a node will go in 20 s, and it goes."""
    with nodes(home) as both:
        training = Training(
            home, "node-preempted", *SETS, *LONGER, "scaling.workers=[1, 2]", "train.checkpoint_steps=none",
            "train.checkpoint_seconds=none", env={"RAY_ADDRESS": both.cluster.address},
        )  # fmt: skip
        training.wait_step(146)
        both.drain(20)
        training.wait(lambda: any(step % 146 for step in training.saved()), "a checkpoint inside an epoch", 30)
        time.sleep(15)
        both.lose()
        training.wait(lambda: len(training.attempts()) == 2, "going on with one worker")
        weights = ended_well(training, whole, TOLERANCE)
    happened = "checkpoints at the notice and every 5 s, on with one worker"
    return Outcome("a node is preempted (20 s notice)", happened, training.again(), weights)


def stalled(home: Path, whole: Training) -> Outcome:
    """A worker stops answering (SIGSTOP); then --resume."""
    training = Training(home, "stalled", *SETS, "scaling.stall_timeout_s=8")
    training.wait_step(300)
    stopped = training.pid(1)
    os.kill(stopped, signal.SIGSTOP)
    code, said = training.end()
    with_rank = f"rank 1 ({os.uname().nodename}, process {stopped}) does not answer"
    if code != 2 or with_rank not in said or "rank 0" not in said:
        raise RuntimeError(f"exit code {code}:\n{said}")
    training.resume()
    weights = ended_well(training, whole)
    happened = "after scaling.stall_timeout_s one error: who waits where, who does not answer; --resume"
    return Outcome("a worker hangs (SIGSTOP)", happened, training.again(), weights)


# name → what it takes: the home, and an undisturbed training with these sets
FAULTS: dict[str, tuple[Callable[..., Any], tuple[str, ...]]] = {
    "worker_killed": (worker_killed, ()),
    "worker_terminated": (worker_terminated, ()),
    "driver_killed": (driver_killed, ()),
    "driver_terminated": (driver_terminated, ()),
    "disk_full": (disk_full, ()),
    "stalled": (stalled, ()),
    "node_lost": (node_lost, LONGER),
    "node_preempted": (node_preempted, LONGER),
    "sharded_worker_killed": (sharded_worker_killed, ("scaling.strategy=fsdp",)),
}


def table(home: Path, names: list[str]) -> Iterator[Outcome]:
    """The faults of these names, one after the other."""
    references: dict[tuple[str, ...], Training] = {}
    for name in names:
        fault, sets = FAULTS[name]
        if sets not in references:
            references[sets] = undisturbed(home, f"whole{len(references)}", *sets)
        found = fault(home, references[sets])
        yield from found if isinstance(found, list) else [found]


def main() -> None:
    """Run the table."""
    args = harness.arguments(
        __doc__,
        only={"nargs": "+", "choices": list(FAULTS), "default": list(FAULTS), "help": "others keep their saved rows"},
    )
    home = Path(tempfile.mkdtemp(prefix="rdf", dir="/tmp"))  # short: Ray's sockets have long names
    try:
        saved = harness.RESULTS / "faults.json"
        rows = json.loads(saved.read_text())["results"] if saved.exists() and args.save else []
        for o in table(home, args.only):
            rows = [row for row in rows if row["name"] != o.fault]
            rows.append(
                harness.result(o.fault, o.again, "steps again", happened=o.happened, weights=o.weights)
            )  # fmt: skip
            harness.finish("faults", rows, args)
    finally:
        shutil.rmtree(home, ignore_errors=True)


if __name__ == "__main__":
    main()
