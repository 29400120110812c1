"""Scaling, the search: raydeep's own engine, ledger, scheduler and Tune loop over trials that sleep, on many raylets.

Part of scale.py. What a node would do is a sleep as long as a real trial of the digits takes; what is measured is all
the rest: one driver process, and the Ray under it.
"""

from __future__ import annotations

import os
import random
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import harness
from scale_raylets import CPUS, raylets

from raydeep.config import Job, parse_job
from raydeep.disk import read_lines
from raydeep.search.engine import Engine
from raydeep.search.ledger import Ledger

if TYPE_CHECKING:
    from raydeep.search.tune import TrialActor

# Median seconds of each rung of `raydeep search jobs/digits.yaml` (36 trials, 65 rungs, two at once on two cores of an
# AMD EPYC); `lengths` reads them from another ledger.
STEP_S = {0: 0.553, 1: 0.672, 2: 0.683, 3: 1.905}
SPACE = {
    "prune.sparsity": {"low": 0.5, "high": 0.98},
    "quantize.weight_bits": [2, 3, 4, 8],
    "quantize.activation_bits": ["none", 4, 8],
    "recover.lr": {"low": 0.003, "high": 0.1, "log": True},
}
DENSE = {"val_accuracy": 0.99, "bytes": 212_584}
SLICES = 6  # of the time that is measured: what the spread is over
START_S = 240.0  # most that the processes of trials may take to start


def lengths(ledger: Path) -> dict[int, float]:
    """Median seconds of each rung in a saved ledger."""
    found: dict[int, list[float]] = defaultdict(list)
    for row in read_lines(ledger):
        if row.get("event") == "rung":
            found[row["rung"]].append(row["seconds"])
    return {rung: statistics.median(seconds) for rung, seconds in sorted(found.items())}


def overlap(start: float, end: float, since: float, until: float) -> float:
    """Seconds of [start, end] that lie in [since, until]."""
    return max(0.0, min(end, until) - max(start, since))


def most_at_once(spans: Sequence[tuple[float, float]]) -> int:
    """How many of the spans overlap at most; one that ends as another begins does not."""
    now = most = 0
    for _, step in sorted([(start, 1) for start, _ in spans] + [(end, -1) for _, end in spans]):
        now += step
        most = max(most, now)
    return most


def sleeper(seconds: dict[int, float]) -> type[TrialActor]:
    """An actor of trials that sleep so long a rung."""
    from raydeep.search.tune import TrialActor

    class Sleeper(TrialActor):
        def setup(self, config: dict[str, Any], **shared: Any) -> None:
            self.work = config
            if shared:
                self.shared, self.started, self.job = shared, False, Job.model_validate(shared["job"])

        def step(self) -> dict[str, Any]:
            begun = time.time()
            time.sleep(seconds[self.work["rung"]])
            found = {"pid": os.getpid(), "begun": begun, "slept": time.time(), **measures(self.work)}
            self._let_start()
            return found

    return Sleeper


def measures(work: dict[str, Any]) -> dict[str, Any]:
    """What a trial of the digits measures, by chance: a line of the ledger is as long as a real one."""
    chance = random.Random(f"{work['trial']} {work['rung']}")
    return {
        "status": "done", "error": None, "start": "dense", "val_accuracy": chance.uniform(0.9, 0.99),
        "worst_class_accuracy": chance.uniform(0.8, 0.9), "bytes": chance.randint(2_000, 60_000), "macs": 347_392,
        "compression_ratio": chance.uniform(5, 90), "sparsity": chance.random(), "parameters": 53_002,
        "nonzeros": chance.randint(1_000, 50_000), "artifact_sha256": f"{chance.getrandbits(256):064x}",
        "seconds": chance.random(), "cpu_seconds": chance.random(), "overhead_seconds": 0.0,
    }  # fmt: skip


class Mark(NamedTuple):
    """A moment of a search."""

    at: float  # time.time()
    cpu: float  # CPU seconds of this process
    main: float  # and of its main thread
    own: float  # of it in the engine and the ledger
    ray: float  # CPU seconds of the raylets and the GCS
    actors: float  # and of the trials' processes
    machine: tuple[float, float]  # CPU seconds of all cores: busy, all
    pieces: int


class Watched(Engine):
    """The engine, with a watch: it ends the search `window` seconds after the last of `slots` processes is there."""

    def begin_watch(self, slots: int, window: float, most: int) -> None:
        """Measure from here on.

        Args:
            slots: trials that should run at once.
            window: seconds.
            most: rungs after which it ends too, once all processes are there.
        """
        self.slots, self.window, self.most = slots, window, most
        self.own, self.peeks = 0.0, 0
        self.spans: list[tuple[float, float]] = []  # of sleeps
        self.taken: list[tuple[float, int]] = []  # when the driver has a result, and of which rung
        self.first: dict[int, float] = {}  # process → begin of its first step
        self.marks: list[Mark] = []
        self.opened = time.time()
        self.added: list[float] = []  # seconds of each write to the ledger
        add = self.ledger.add

        def timed(*lines: dict[str, Any]) -> None:
            start = time.perf_counter()
            add(*lines)
            self.added.append(time.perf_counter() - start)

        self.ledger.add = timed  # type: ignore[method-assign]

    def peek(self) -> Any:
        """See Engine."""
        start = time.thread_time()
        self.peeks += 1
        try:
            return super().peek()
        finally:
            self.own += time.thread_time() - start

    def take(self, work: Any, result: Any, retries: int = 0) -> bool:
        """See Engine."""
        start = time.thread_time()
        ended = super().take(work, result, retries)
        self.own += time.thread_time() - start
        now = time.time()
        self.spans.append((result["begun"], result["slept"]))
        self.taken.append((now, work.rung))
        self.first.setdefault(result["pid"], result["begun"])
        waited = now - self.opened > START_S
        all_there = len(self.first) >= self.slots or waited
        due = now >= self.marks[-1].at + self.window / SLICES if self.marks else all_there
        last = bool(self.marks) and len(self.taken) >= self.most
        if self.stopped is None and (due or last):
            self.marks.append(self.mark())
            if last or len(self.marks) > SLICES:
                self.stopped = "measured"
        return ended

    def mark(self) -> Mark:
        """Now."""
        import psutil

        times = psutil.cpu_times()
        total = sum(times) - times.guest - times.guest_nice
        busy = total - times.idle - times.iowait
        spent = {"ray": 0.0, "actors": 0.0}
        for process in psutil.process_iter(["cmdline", "cpu_times"]):
            command, used = process.info["cmdline"] or [""], process.info["cpu_times"]
            kind = "actors" if command[0].startswith("ray::") else "ray"
            if used and (kind == "actors" or command[0].endswith(("/raylet", "/gcs_server"))):
                spent[kind] += used.user + used.system
        return Mark(
            time.time(), time.process_time(), time.thread_time(), self.own, spent["ray"], spent["actors"],
            (busy, total), len(self.taken),
        )  # fmt: skip


def searched(
    slots: int, window: float, seconds: dict[int, float], most: int = 10**9, sampler: str = "tpe"
) -> dict[str, Any]:
    """A search on the cluster of RAY_ADDRESS, from the driver's joining it to its end."""
    import ray

    from raydeep.search.tune import run_trials
    from raydeep.train.cluster import cluster

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers need not find this file
    search = {"trials": 10**6, "space": SPACE, "concurrent": slots, "sampler": sampler}
    job = parse_job({"recover": {"epochs": 10}, "search": search}, "benchmarks/scale.py")
    with tempfile.TemporaryDirectory(prefix="rs") as folder:
        home = Path(folder)
        (home / "ray").mkdir()
        with cluster(job, home / "ray.log"):
            engine = Watched(job, Ledger(home / "ledger.jsonl", {}), DENSE)
            engine.begin_watch(slots, window, most)
            run_trials(engine, home, None, None, slots, None, sleeper(seconds))  # type: ignore[arg-type]
        return summary(engine, home / "ledger.jsonl")


def summary(engine: Watched, ledger: Path) -> dict[str, Any]:
    """What the marks of a search say."""
    slices = []
    for a, b in zip(engine.marks, engine.marks[1:], strict=False):
        busy = sum(overlap(*span, a.at, b.at) for span in engine.spans)
        slices.append(((b.pieces - a.pieces) / (b.at - a.at), busy / (b.at - a.at) / engine.slots))
    first, last = engine.marks[0], engine.marks[-1]
    pieces, wall = last.pieces - first.pieces, last.at - first.at
    slept = [end - start for start, end in engine.spans if overlap(start, end, first.at, last.at)]
    machine = [b - a for a, b in zip(first.machine, last.machine, strict=True)]
    starts = sorted(engine.first.values())
    return {
        "pieces": pieces, "window_s": wall, "slices": slices, "rate": pieces / wall,
        "ideal": engine.slots / statistics.mean(slept), "efficiency": harness.Timing([e for _, e in slices]),
        "cpu": (last.cpu - first.cpu) / pieces, "main": (last.main - first.main) / pieces,
        "own": (last.own - first.own) / pieces, "driver": (last.cpu - first.cpu) / wall,
        "machine": machine[0] / machine[1], "processes": len(starts), "at_once": most_at_once(engine.spans),
        "start_s": starts[-1] - engine.opened, "first_s": starts[0] - engine.opened,
        "peeks": engine.peeks / len(engine.taken), "write_s": statistics.median(engine.added),
        "trials": len(engine.trials), "line_bytes": ledger.stat().st_size / len(ledger.read_text().splitlines()),
        "ray": (last.ray - first.ray) / pieces, "actors": (last.actors - first.actors) / pieces,
    }  # fmt: skip


def rows(
    nodes: Sequence[int], window: float, stretch: float = 1.0, seconds: dict[int, float] | None = None
) -> Iterator[dict[str, Any]]:
    """A row for each number of nodes.

    Args:
        nodes: how many raylets, each.
        window: seconds that are measured.
        stretch: steps are so many times as long.
        seconds: of each rung, else STEP_S.
    """
    steps = {rung: stretch * s for rung, s in (seconds or STEP_S).items()}
    longer = f", steps {stretch:g} times as long" if stretch != 1 else ""
    for count in nodes:
        with raylets(count) as cluster:
            found = searched(CPUS * count, window, steps)
        efficiency = found["efficiency"]
        yield harness.result(
            f"{count} node{'s' * (count > 1)}{longer}", efficiency.median_s, "of ideal", spread=efficiency.spread,
            n=SLICES, part="search", nodes=count,
            columns={
                "trials at once": f"{found['at_once']} of {CPUS * count}",
                "rungs/s": f"{found['rate']:.3g}", "ideal": f"{found['ideal']:.3g}",
                "efficiency": f"{efficiency.median_s:.0%} ± {efficiency.spread:.0%}",
                "driver, CPU ms a rung": f"{1e3 * found['cpu']:.1f}",
                "of it engine and ledger, ms": f"{1e3 * found['own']:.1f}",
                "after trials": str(found["trials"]), "ledger, ms a write": f"{1e3 * found['write_s']:.1f}",
                "raylets and GCS, CPU ms a rung": f"{1e3 * found['ray']:.1f}",
                "trials' processes": f"{1e3 * found['actors']:.1f}",
                "driver's CPUs": f"{found['driver']:.2f}", "machine busy": f"{found['machine']:.0%}",
                "raylets up, s": f"{cluster.up_s:.0f}", "all trials' processes up, s": f"{found['start_s']:.0f}",
            },
            **{k: v for k, v in found.items() if k not in ("efficiency", "slices")},
        )  # fmt: skip


def ceiling_rows(trials: int, samplers: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Trials that do nothing, on four nodes, with each sampler: the most that one driver gets through."""
    for sampler in samplers:
        with raylets(4):
            found = searched(4 * CPUS, 1e9, dict.fromkeys(STEP_S, 0.0), trials, sampler)
        yield harness.result(
            f"{sampler}, {trials} rungs that do nothing, 8 at once", found["rate"], "rungs/s", n=1, part="ceiling",
            columns={
                "rungs/s": f"{found['rate']:.3g}", "driver, CPU ms a rung": f"{1e3 * found['cpu']:.1f}",
                "of it engine and ledger, ms": f"{1e3 * found['own']:.1f}",
                "ledger: bytes a line": f"{found['line_bytes']:.0f}",
                "ms a write": f"{1e3 * found['write_s']:.1f}",
                **{
                    f"full with steps of {s} s: at once": f"{s / found['cpu']:,.0f}" for s in (1, 60)
                },
            },
            **{k: v for k, v in found.items() if k not in ("efficiency", "slices")},
        )  # fmt: skip


def engine_rows(counts: Sequence[int]) -> Iterator[dict[str, Any]]:
    """The engine and its ledger, as fast as they go, without Ray."""
    for sampler in ("random", "tpe"):
        search = {"trials": max(counts) + 1, "space": SPACE, "sampler": sampler}
        job = parse_job({"recover": {"epochs": 10}, "search": search}, "benchmarks/scale.py")
        with tempfile.TemporaryDirectory() as home:
            engine = Engine(job, Ledger(Path(home) / "ledger.jsonl", {}), DENSE)
            left, asked, written = list(counts), [], []
            while left:
                start = time.perf_counter()
                work = engine.peek()
                middle = time.perf_counter()
                assert work is not None
                engine.begin(work)
                engine.take(work, measures(work._asdict()))
                asked.append(middle - start)
                written.append(time.perf_counter() - middle)
                if len(engine.trials) == left[0]:
                    count = left.pop(0)
                    both = harness.Timing([a + b for a, b in zip(asked[-50:], written[-50:], strict=True)])
                    peeks, takes = harness.Timing(asked[-50:]), harness.Timing(written[-50:])
                    yield harness.result(
                        f"{sampler}, {count} trials", both.median_s * 1e3, "ms a rung", spread=both.spread, n=50,
                        part="engine",
                        columns={
                            "ms a rung": f"{1e3 * both.median_s:.1f} ± {both.spread:.0%}",
                            "of it: what comes next": f"{1e3 * peeks.median_s:.1f}",
                            "taking and writing down": f"{1e3 * takes.median_s:.1f}",
                            "rungs/s of a core, at most": f"{1 / both.median_s:.0f}",
                        },
                    )  # fmt: skip
