"""The peers of search.py: plain Ray Tune as its documentation has it. With it: what a search spends, and its curve.

The comparison is of the search and of nothing else. A trial of the peer trains the same network by the same fit(), is
compressed by the same compressor and scored on the same packed bytes as ours; but it is a function that starts from
nothing in an actor of its own, as the documentation of Ray Tune shows it, so each trial trains its dense network again.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
import statistics
import sys
import tempfile
import threading
import time
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any, Literal, NamedTuple

from raydeep.config import Job
from raydeep.data.resident import Dataset
from raydeep.machine import usable_cores
from raydeep.train.cluster import NOISY, RAY_ENV

SPACE: dict[str, list[Any]] = {
    "prune.sparsity": [0.0, 0.5, 0.7, 0.8, 0.9, 0.95],
    "quantize.weight_bits": [2, 3, 4, 8],
    "quantize.activation_bits": [None, 4, 8],
    "distill.enabled": [False, True],
}
LOOK_ROUNDS = 5  # readings of the processes that are known for one look at all that there are, which costs more
TICK_S = 1 / os.sysconf("SC_CLK_TCK")


class Point(NamedTuple):
    """A finished trial."""

    cpu_seconds: float  # since the search began, when the trial ended
    wall_seconds: float
    accuracy: float  # validation, of the packed file
    bytes: int  # of the packed file
    config: dict[str, Any]


class Floor(NamedTuple):
    """Seconds of trials that do nothing."""

    steady_s: float  # from the end of the first trial to that of the last
    total_s: float  # Ray's start, the trials, the end of Tune; not Ray's stop
    trials: int

    @property
    def trial_s(self) -> float:
        """A trial, in the steady state."""
        return self.steady_s / max(1, self.trials - 1)


class _Stat(NamedTuple):
    """A line of /proc/PID/stat."""

    pid: int
    parent: int
    born: int  # with pid, names a process: pids come again
    own_s: float  # CPU of all its threads, those that ended too
    waited_s: float  # CPU of the children that it has waited for, and of theirs


def _everything() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _stats(pids: Iterable[int]) -> dict[int, _Stat]:
    found = {}
    for pid in sorted(pids):  # parents first: a child that ends meanwhile is not counted as living and as waited for
        try:
            line = Path(f"/proc/{pid}/stat").read_bytes()
        except OSError:  # it has just ended
            continue
        f = line[line.rindex(b")") + 2 :].split()  # the name before it may hold anything
        own, waited = (int(f[k]) + int(f[k + 1]) for k in (11, 13))
        found[pid] = _Stat(pid, int(f[1]), int(f[19]), own * TICK_S, waited * TICK_S)
    return found


@dataclass
class _Process:
    """What is known of a process of the tree."""

    stat: _Stat
    own_before_s: float = 0.0  # spent before the meter began
    waited_before_s: float = 0.0
    gone: list[_Process] = field(default_factory=list)  # children that have ended

    def ended_s(self) -> float:
        """Spent by children that ended, and by theirs.

        What the kernel says is exact, but holds only children that were waited for; what was last seen holds all, each
        without its last moments.
        """
        before = sum(child.own_before_s + child.waited_before_s for child in self.gone)
        seen = sum(child.whole_s() for child in self.gone)
        return max(self.stat.waited_s - self.waited_before_s - before, seen)

    def whole_s(self) -> float:
        """Spent by itself and by what ended below it."""
        return self.stat.own_s - self.own_before_s + self.ended_s()


class CpuMeter:
    """CPU seconds, user and system, that a process and all its descendants spend while the meter is open.

    With Ray started by that process these are the driver's, gcs_server's, the raylet's, its agents' and every worker's,
    from the first import to the exit. /proc/PID/stat (Linux) is read by a thread and whenever `seconds` is called:

    - a living process counts with what the kernel says of it, exact to 10 ms;
    - a process that ended counts exactly if its parent waited for it (the kernel adds its time to the parent's), else
      with what was last seen. A raylet does not wait for its workers, so each that ends at work loses up to `every_s`;
    - a process whose parent has ended stays in the tree. One that is born, and ends or is orphaned, between two looks
      for new ones (LOOK_ROUNDS × `every_s`) is missed, unless it is waited for.

    The meter's own work, about 0.7 % of a core, is in the sum if it measures its own process. What another process tree
    does on behalf of this one (a Ray that was there before and was joined) is not.

    Args:
        pid: the root; None: this process.
        every_s: seconds between readings.

    Raises:
        ProcessLookupError: on entering, there is no such process.
    """

    def __init__(self, pid: int | None = None, every_s: float = 0.1) -> None:
        self.root, self.every_s = pid or os.getpid(), every_s
        self.alive: dict[int, _Process] = {}
        self.lineage: dict[int, _Process] = {}  # a living process → its parent, as first seen
        self.first: _Process | None = None
        self.lock, self.over = threading.Lock(), threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> CpuMeter:
        there = _stats(_everything())
        if self.root not in there:
            raise ProcessLookupError(f"no process {self.root} whose CPU seconds could be counted")
        self.first = self.alive[self.root] = _Process(there[self.root])
        self._take(there)
        for process in self.alive.values():
            process.own_before_s, process.waited_before_s = process.stat.own_s, process.stat.waited_s
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.thread.join()
        self._look()

    def seconds(self) -> float:
        """Spent since the meter was opened; once it is closed, until then."""
        if not self.over.is_set():
            self._look()
        with self.lock:
            assert self.first is not None, "the meter is not open"
            ended = 0.0 if self.root in self.alive else self.first.whole_s()
            return ended + sum(process.whole_s() for process in self.alive.values())

    def _run(self) -> None:
        rounds = 0
        while not self.over.wait(self.every_s):
            rounds += 1
            self._look(new=rounds % LOOK_ROUNDS == 0)

    def _look(self, new: bool = True) -> None:
        with self.lock:
            self._take(_stats(_everything() if new else self.alive))

    def _take(self, there: dict[int, _Stat]) -> None:
        for pid, process in list(self.alive.items()):
            now = there.get(pid)
            if now is not None and now.born == process.stat.born:
                process.stat = now
                continue
            del self.alive[pid]
            if pid in self.lineage:
                self.lineage.pop(pid).gone.append(process)
        children = defaultdict(list)
        for stat in there.values():
            children[stat.parent].append(stat)
        waiting = list(self.alive)
        while waiting:
            parent = waiting.pop()
            for stat in children[parent]:
                if stat.pid not in self.alive:
                    self.alive[stat.pid], self.lineage[stat.pid] = _Process(stat), self.alive[parent]
                    waiting.append(stat.pid)


@contextmanager
def _private_ray(cpus: int) -> Iterator[Path]:
    """A quiet Ray of this machine; gives a folder that is deleted with it."""
    for key, value in RAY_ENV.items():
        os.environ.setdefault(key, value)  # some are read when Ray is imported
    import optuna
    import ray

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    home = Path(tempfile.mkdtemp(prefix="rd"))  # short: the paths of Ray's sockets have room for 107 bytes
    try:
        ray.init(
            address="local", num_cpus=cpus, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR,
            _temp_dir=str(home / "ray"),
        )  # fmt: skip
        import ray.tune  # sets up loggers of its own

        for name in NOISY:
            logging.getLogger(name).setLevel(logging.ERROR)
        yield home
    finally:
        ray.shutdown()
        shutil.rmtree(home, ignore_errors=True)


def _when_done(tell: Callable[[Any], None]) -> Any:
    """A callback of Tune that is told each trial as it completes."""
    from ray import tune

    class Told(tune.Callback):
        tell: Callable[[Any], None]

        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            self.tell(trial)

        def __getstate__(self) -> dict[str, Any]:  # Tune pickles its callbacks, to restore what is not restored here
            return {}

    told = Told()
    told.tell = tell
    return told


def train_and_compress(
    config: dict[str, Any], job: Job, data: Dataset, dense_epochs: int, recover_epochs: int, seed: int, threads: int
) -> None:
    """A trial: the network from scratch, then compressed as `config` says. What Tune calls.

    Reports the loss of each epoch, and at the end `accuracy`, `bytes` and `log_bytes`. Accuracy is not evaluated
    between epochs, since nothing would read it.
    """
    import torch
    from ray import tune

    from raydeep.compress import plan
    from raydeep.data.augment import Augmenter
    from raydeep.data.batches import Batches
    from raydeep.model import artifact
    from raydeep.train import losses
    from raydeep.train.loop import fit

    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    job = job.with_values({**config, "recover.epochs": recover_epochs})
    spec = artifact.make_spec(job.model.name, job.model.args, data.classes, data.shape, data.mean, data.std)
    model = artifact.build(spec)

    def report(row: dict[str, Any]) -> None:
        tune.report({"train_loss": row["train_loss"]})

    fit(
        model, losses.cross_entropy(job.train.label_smoothing),
        Batches(data.train, Augmenter(job.augment, data.mean, data.std), job.train.batch_size, seed), job.train,
        epochs=dense_epochs, seed=seed, on_epoch=report,
    )  # fmt: skip
    dense = plan.Dense(*artifact.freeze(model.eval(), spec, fold=False))
    found = plan.compress(job, dense, data, seed, on_epoch=report)
    size = len(found.packed)
    tune.report({"accuracy": found.val_accuracy, "bytes": size, "log_bytes": math.log2(size)})


def plain_tune(
    job: Job,
    data: Dataset,
    trials: int,
    dense_epochs: int,
    recover_epochs: int,
    seed: int,
    sampler: Literal["random", "tpe"],
    at_once: int,
) -> list[Point]:
    """Search SPACE with plain Ray Tune: a function a trial, an actor a trial, no scheduler.

    What is counted begins before Ray is started and ends with the last trial; imports that this process has done before
    are not in it. Each trial has so many threads as ours have: the cores, shared among the trials at once.

    Args:
        job: model, augmentation, train, recover and the rest of the recipe; its search section is not read.
        data: the decoded splits.
        trials: how many.
        dense_epochs: of training from scratch, in each trial.
        recover_epochs: of training while pruned and quantized, after it.
        seed: of the sampler, and of each trial's weights, order and augmentation.
        sampler: "random", or "tpe": Optuna's TPE for the two objectives.
        at_once: trials at once, 1 CPU each.

    Returns:
        The trials in the order in which they ended.

    Raises:
        RuntimeError: a trial failed.
    """
    points: list[Point] = []
    with CpuMeter() as meter:
        start = time.perf_counter()
        with _private_ray(at_once) as home:
            import ray
            from ray import tune

            def note(trial: Any) -> None:
                found = trial.last_result
                spent, elapsed = meter.seconds(), time.perf_counter() - start
                points.append(Point(spent, elapsed, found["accuracy"], found["bytes"], dict(trial.config)))

            ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers need not find this file
            trial = tune.with_parameters(
                train_and_compress, job=job, data=data, dense_epochs=dense_epochs, recover_epochs=recover_epochs,
                seed=seed, threads=max(1, usable_cores() // at_once),
            )  # fmt: skip
            outcome = tune.Tuner(
                tune.with_resources(trial, {"cpu": 1}),
                param_space={name: tune.choice(choices) for name, choices in SPACE.items()},
                tune_config=tune.TuneConfig(
                    num_samples=trials, search_alg=_searcher(sampler, seed, at_once),
                    max_concurrent_trials=at_once if sampler == "tpe" else None,
                ),
                run_config=tune.RunConfig(
                    name=sampler, storage_path=str(home / "results"), verbose=0, callbacks=[_when_done(note)]
                ),
            ).fit()  # fmt: skip
    if outcome.errors or len(points) != trials:
        first = str(outcome.errors[0]) if outcome.errors else "no error was reported"
        raise RuntimeError(f"plain Ray Tune finished {len(points)} of {trials} trials: {first}")
    return points


def _searcher(sampler: Literal["random", "tpe"], seed: int, at_once: int) -> Any:
    from ray.tune.search.basic_variant import BasicVariantGenerator
    from ray.tune.search.optuna import OptunaSearch

    if sampler == "random":
        return BasicVariantGenerator(max_concurrent=at_once, random_state=seed)
    return OptunaSearch(metric=["accuracy", "log_bytes"], mode=["max", "min"], seed=seed)


def noop_floor(trials: int, at_once: int, seed: int) -> Floor:
    """Time trials that do nothing, in plain Ray Tune at its fastest: a class, actors reused, random search.

    Args:
        trials: how many.
        at_once: actors, 1 CPU each.
        seed: of the random search.
    """
    ends: list[float] = []
    start = time.perf_counter()
    with _private_ray(at_once) as home:
        from ray import tune

        class Nothing(tune.Trainable):
            def setup(self, config: dict[str, Any]) -> None:
                pass

            def reset_config(self, new_config: dict[str, Any]) -> bool:
                return True

            def step(self) -> dict[str, Any]:
                return {"accuracy": 0.0, "bytes": 1, "done": True}

            def save_checkpoint(self, checkpoint_dir: str) -> None:  # Tune asks each trial that is done for one
                pass

            def load_checkpoint(self, checkpoint: Any) -> None:
                pass

        outcome = tune.Tuner(
            tune.with_resources(Nothing, {"cpu": 1}),
            param_space={name: tune.choice(choices) for name, choices in SPACE.items()},
            tune_config=tune.TuneConfig(
                num_samples=trials, search_alg=_searcher("random", seed, at_once), reuse_actors=True
            ),
            run_config=tune.RunConfig(
                name="nothing", storage_path=str(home / "results"), verbose=0,
                callbacks=[_when_done(lambda trial: ends.append(time.perf_counter()))],
            ),
        ).fit()  # fmt: skip
        total = time.perf_counter() - start
    assert len(ends) == trials, f"{len(ends)} of {trials} trials ended: {outcome.errors}"
    return Floor(ends[-1] - ends[0], total, trials)


def hypervolume(points: list[tuple[float, float]]) -> float:
    """Area that lies between (0, 0) and the points, both coordinates better the larger they are."""
    area = best = 0.0
    for x, y in sorted(points, reverse=True):
        if x > 0 and y > best:
            area += x * (y - best)
            best = y
    return area


def hypervolume_curve(
    points: list[Point], reference_accuracy: float, reference_bytes: int
) -> list[tuple[float, float]]:
    """What a search has found, after so many CPU seconds.

    Args:
        points: of one search.
        reference_accuracy: points with no more than it count nothing.
        reference_bytes: points with no fewer count nothing.

    Returns:
        For each point, by CPU seconds: those, and the hypervolume so far, of accuracy above the reference times
        log2(reference_bytes / bytes).
    """
    so_far: list[tuple[float, float]] = []
    curve = []
    for point in sorted(points):
        so_far.append((point.accuracy - reference_accuracy, math.log2(reference_bytes / point.bytes)))
        curve.append((point.cpu_seconds, hypervolume(so_far)))
    return curve


Curve = list[tuple[float, float]]
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")  # Okabe and Ito: told apart by all eyes
WIDTH, HEIGHT = 860, 520
LEFT, RIGHT, TOP, BOTTOM = 76, 836, 48, 452  # of the frame
FONT = 'font-family="system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif"'


def median_curve(curves: list[Curve]) -> Curve:
    """The median of steps, at each x where one of them rises; a curve is 0 before it begins and stays when it ends."""

    def value(curve: Curve, x: float) -> float:
        reached = bisect_right(curve, x, key=lambda point: point[0])
        return curve[reached - 1][1] if reached else 0.0

    rises = sorted({x for curve in curves for x, _ in curve})
    return [(x, statistics.median(value(curve, x) for curve in curves)) for x in rises]


def picture(curves: dict[str, list[Curve]], out: Path) -> None:
    """Draw hypervolume over CPU seconds, as an SVG: thin lines for the seeds, a thick one for their median.

    Args:
        curves: method → a curve a seed (hypervolume_curve).
        out: the file, *.svg.
    """
    every = [point for found in curves.values() for curve in found for point in curve]
    low, high = (math.log10(pick(x for x, _ in every)) for pick in (min, max))
    margin = max(0.03 * (high - low), (0.5 - (high - low)) / 2)  # half a decade has a tick
    low, high, top = low - margin, high + margin, 1.06 * max(y for _, y in every) or 1.0

    def at_x(x: float) -> float:
        return LEFT + (math.log10(x) - low) / (high - low) * (RIGHT - LEFT)

    def at_y(y: float) -> float:
        return BOTTOM - y / top * (BOTTOM - TOP)

    def steps(curve: Curve) -> str:
        parts = [f"M{at_x(curve[0][0]):.1f} {at_y(0):.1f}", *(f"H{at_x(x):.1f}V{at_y(y):.1f}" for x, y in curve)]
        return "".join(parts)

    def text(x: float, y: float, words: str, anchor: str, more: str = "") -> str:
        return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" {more}>{escape(words)}</text>'

    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        f'{FONT} font-size="14" fill="#333" role="img">',
        "<title>Hypervolume found over CPU seconds spent</title>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
    ]
    for x in _ticks_log(low, high):
        lines.append(f'<path d="M{at_x(x):.1f} {TOP}V{BOTTOM}" stroke="#e6e6e6"/>')
        lines.append(text(at_x(x), BOTTOM + 20, f"{x:,g}" if x < 1e6 else f"{x:g}", "middle"))
    for y in _ticks(top):
        lines.append(f'<path d="M{LEFT} {at_y(y):.1f}H{RIGHT}" stroke="#e6e6e6"/>')
        lines.append(text(LEFT - 8, at_y(y) + 5, f"{y:g}", "end"))
    lines.append(f'<path d="M{LEFT} {TOP}V{BOTTOM}H{RIGHT}" fill="none" stroke="#888"/>')
    lines.append(text((LEFT + RIGHT) / 2, BOTTOM + 48, "CPU seconds since the search began (log scale)", "middle"))
    turned = f'transform="rotate(-90 20 {(TOP + BOTTOM) / 2:.0f})"'
    words = "hypervolume: accuracy gained × halvings of bytes"
    lines.append(text(20, (TOP + BOTTOM) / 2, words, "middle", turned))
    line = 'fill="none" stroke-linejoin="round" stroke-linecap="round"'
    coloured = [(name, found, COLOURS[k % len(COLOURS)]) for k, (name, found) in enumerate(curves.items())]
    for _, found, colour in coloured:
        for curve in found:
            lines.append(f'<path d="{steps(curve)}" {line} stroke="{colour}" stroke-width="1" stroke-opacity="0.55"/>')
    for _, found, colour in coloured:
        lines.append(f'<path d="{steps(median_curve(found))}" {line} stroke="{colour}" stroke-width="3"/>')
    x = float(LEFT)
    for name, _, colour in coloured:
        lines.append(f'<path d="M{x:.0f} {TOP - 23}h24" stroke="{colour}" stroke-width="3"/>')
        lines.append(text(x + 32, TOP - 18, name, "start"))
        x += 60 + 7.6 * len(name)
    seeds = max(len(found) for found in curves.values())
    if seeds > 1:
        lines.append(text(RIGHT, TOP - 18, f"thick: median of {seeds}", "end", 'fill="#777"'))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("\n".join([*lines, "</svg>", ""]), encoding="utf-8")


def _ticks_log(low: float, high: float) -> list[float]:
    """1, 2 and 5 of each decade within 10**low to 10**high; decades alone where that would be crowded."""
    heads = (1, 2, 5) if high - low < 3.5 else (1,)
    every = [head * 10.0**power for power in range(math.floor(low), math.ceil(high) + 1) for head in heads]
    return [x for x in every if low <= math.log10(x) <= high]


def _ticks(top: float) -> list[float]:
    """From 0 in steps of 1, 2 or 5 times a power of ten, about five of them."""
    power = 10.0 ** math.floor(math.log10(top / 5))
    step = next(head * power for head in (1, 2, 5, 10) if head * power >= top / 5)
    return [round(k * step, 12) for k in range(int(top / step) + 1)]
