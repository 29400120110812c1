"""The search: against plain Ray Tune for the same hypervolume, its overhead a trial, and 60 trials on digits.

`--only front`: Fashion-MNIST with the seed network, few pictures a class so that three seeds fit into an hour. The
peers (search_peers.py) train each trial from scratch; ours is the command `raydeep search`, everything from its first
import on counted. `--only overhead`: trials that do nothing. `--only digits`: the wall time of a whole command.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import harness
import search_peers as peers

from raydeep.config import Job, parse_job
from raydeep.search.tune import TrialActor

HERE = Path(__file__).parent
ROWS_A_CLASS, DENSE, RECOVER, TRIALS = 600, 20, 4, 16  # the peers': epochs from scratch, epochs of recovery
OURS_TRIALS, RUNGS = 48, (0, 1, 3, 9)
REFERENCE = (0.70, 1_700_000)  # accuracy and bytes (about those of the float file) that hypervolume begins at
AT_ONCE = 2


def fashion(data: Path, seed: int, storage: Path) -> dict[str, Any]:
    """The job that both sides run."""
    return {
        "name": "front", "seed": seed, "storage": str(storage),
        "data": {
            "source": "parquet", "path": str(data / "fashion-mnist"), "limit_per_class": ROWS_A_CLASS,
            "val_fraction": 0.05,
        },
        "augment": {"horizontal_flip": 0.5, "crop": 0.1},
        "model": {"name": "seed"},
        "train": {
            "epochs": DENSE, "batch_size": 128, "lr": 0.06, "label_smoothing": 0.05, "precision": "float32",
        },
        "recover": {"epochs": RECOVER, "lr": 0.02},
        "export": {"latency_rounds": 3, "max_models": 2},
        "search": {"trials": OURS_TRIALS, "space": peers.SPACE, "concurrent": AT_ONCE, "rungs": list(RUNGS)},
    }  # fmt: skip


def ours(job: dict[str, Any], home: Path) -> peers.Curve:
    """`raydeep search` from its first import: CPU seconds → hypervolume of every trial's best model."""
    home.mkdir(parents=True)
    (home / "job.yaml").write_text(json.dumps(job))
    env = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    tmp = tempfile.mkdtemp(prefix="rd")
    log = (home / "said.txt").open("w")
    process = subprocess.Popen(
        [sys.executable, "-m", "raydeep.cli", "search", str(home / "job.yaml")],
        env={**env, "RAY_TMPDIR": tmp}, stdout=log, stderr=log,
    )  # fmt: skip
    curve: peers.Curve = []
    seen = 0
    best: dict[int, dict[str, Any]] = {}
    with peers.CpuMeter(process.pid) as meter:
        while process.poll() is None:
            time.sleep(0.1)
            rows = [
                row for file in home.glob("runs/front-*/ledger.jsonl")
                for row in map(json.loads, file.read_text().splitlines()[1:]) if row["event"] == "rung"
            ]  # fmt: skip
            for row in rows[seen:]:
                if row["trial"] not in best or row["val_accuracy"] >= best[row["trial"]]["val_accuracy"]:
                    best[row["trial"]] = row
                curve.append((meter.seconds(), volume([(r["val_accuracy"], r["bytes"]) for r in best.values()])))
            seen = len(rows)
    shutil.rmtree(tmp, ignore_errors=True)
    if process.returncode:
        sys.exit(f"raydeep search failed, see {home / 'said.txt'}")
    return curve


def volume(points: list[tuple[float, int]]) -> float:
    """Accuracy above the reference, in points, × doublings below the reference's bytes."""
    import math

    accuracy, size = REFERENCE
    return 100 * peers.hypervolume([(a - accuracy, math.log2(size / b)) for a, b in points])


def front(args: Any) -> list[dict[str, Any]]:
    """CPU seconds that ours takes to the hypervolume at which a peer ends, as a share of the peer's."""
    from raydeep.data import shards, splits

    data, cache = harness.data_folder(args, "fashion-mnist"), Path(args.cache).resolve()
    cache.mkdir(parents=True, exist_ok=True)
    curves: dict[str, list[peers.Curve]] = {"raydeep": [], "Ray Tune, random": [], "Ray Tune, Optuna TPE": []}
    for seed in range(args.seeds):
        for name, found in curves.items():
            file = cache / f"front-{name.replace(' ', '').replace(',', '-')}-{seed}.json"
            if not file.exists():
                tree = fashion(data, seed, cache / f"ours-{seed}" / "runs")
                if name == "raydeep":
                    shutil.rmtree(cache / f"ours-{seed}", ignore_errors=True)
                    curve = ours(tree, cache / f"ours-{seed}")
                else:
                    job = parse_job({**tree, "search": {}}, "benchmarks/search.py")
                    pictures = splits.read_dataset(shards.prepare(job.data, cache), job.data)
                    sampler = "tpe" if "TPE" in name else "random"
                    points = peers.plain_tune(job, pictures, TRIALS, DENSE, RECOVER, seed, sampler, AT_ONCE)  # type: ignore[arg-type]
                    curve, so_far = [], []
                    for p in sorted(points):
                        so_far.append((p.accuracy, p.bytes))
                        curve.append((p.cpu_seconds, volume(so_far)))
                file.write_text(json.dumps(curve))
            found.append([(x, y) for x, y in json.loads(file.read_text())])
            print(f"  {name} {seed}: hypervolume {found[-1][-1][1]:.1f} after {found[-1][-1][0]:.0f} CPU s", flush=True)
    results = []
    for name in list(curves)[1:]:
        shares, ends = [], []
        for mine, theirs in zip(curves["raydeep"], curves[name], strict=True):
            spent, reached = theirs[-1]
            at = next((x for x, y in mine if y >= reached), float("inf"))
            shares.append(at / spent)
            ends.append(mine[-1][1] / reached)
        results.append(harness.result(
            f"CPU seconds to the final hypervolume of {name} ({TRIALS} trials), share of its own",
            statistics.median(shares), "ratio", "<= 0.2", n=len(shares), lowest=min(shares), highest=max(shares),
        ))  # fmt: skip
        results.append(harness.result(
            f"hypervolume of ours ({OURS_TRIALS} trials) / of {name}, at the end", statistics.median(ends), "ratio",
            n=len(ends), lowest=min(ends), highest=max(ends),
        ))  # fmt: skip
    for name, found in curves.items():
        results.append(harness.result(
            f"CPU seconds of {name}, in all", statistics.median(c[-1][0] for c in found), "s", n=len(found)
        ))  # fmt: skip
    if args.save:
        peers.picture(curves, HERE / "results" / "search-front.svg")
    return results


class Noop(TrialActor):
    """A trial that does nothing."""

    def setup(self, config: dict[str, Any], **shared: Any) -> None:
        """As TrialActor, without what only work needs."""
        self.work = config
        if shared:
            self.shared, self.started, self.job = shared, False, Job.model_validate(shared["job"])

    def step(self) -> dict[str, Any]:
        """A result by chance."""
        chance = random.Random(self.work["trial"])
        self._let_start()
        return {
            "status": "done", "error": None, "start": "dense", "val_accuracy": chance.random(),
            "bytes": chance.randint(1000, 10**6), "seconds": 0.0, "cpu_seconds": 0.0,
        }  # fmt: skip


def noop(trials: int) -> float:
    """Seconds from the first to the last of trials that do nothing, on two actors, ledger and all."""
    from raydeep.search.engine import Engine
    from raydeep.search.ledger import Ledger
    from raydeep.search.tune import run_trials
    from raydeep.train.cluster import cluster

    home = Path(tempfile.mkdtemp(prefix="rd"))
    os.environ["RAY_TMPDIR"] = str(home)
    space = {"recover.lr": {"low": 0.001, "high": 0.1}}
    search = {"trials": trials, "scheduler": "none", "sampler": "random", "concurrent": AT_ONCE, "space": space}
    job, ends = parse_job({"search": search}, "benchmarks/search.py"), []
    (home / "run" / "ray").mkdir(parents=True)
    dense = {"val_accuracy": 0.9, "bytes": 10**6}
    with cluster(job, home / "ray.log"):
        engine = Engine(
            job, Ledger(home / "run" / "ledger.jsonl", {}), dense,
            lambda _, row: ends.append(time.perf_counter()) if row["event"] == "end" else None,
        )  # fmt: skip
        run_trials(engine, home / "run", None, None, AT_ONCE, None, Noop)  # type: ignore[arg-type]
    shutil.rmtree(home, ignore_errors=True)
    assert len(ends) == trials, f"{len(ends)} of {trials} trials ended"
    return ends[-1] - ends[0]


def overhead(args: Any) -> list[dict[str, Any]]:
    """Our trials that do nothing beside those of plain Ray Tune on reused actors, in turns."""
    import ray

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers need not find this file
    trials, rounds = (200, 1) if args.quick else (1000, args.rounds)
    mine, floors = [], []
    for turn in range(rounds):
        mine.append(noop(trials) / (trials - 1))
        floors.append(peers.noop_floor(trials, AT_ONCE, turn).trial_s)
        print(f"  {mine[-1] * 1e3:.1f} ms a trial, floor {floors[-1] * 1e3:.1f} ms", flush=True)
    pairs = list(zip(mine, floors, strict=True))
    return [
        harness.result(
            "seconds a trial that does nothing, two actors", statistics.median(mine), "s", "<= 0.3", n=rounds,
            lowest=min(mine), highest=max(mine),
        ),
        harness.result(
            f"{trials} of them, over plain Ray Tune's", statistics.median(m / f for m, f in pairs),
            "ratio", "<= 1.15", n=rounds,
        ),
    ]  # fmt: skip


def digits(args: Any) -> list[dict[str, Any]]:
    """`raydeep search jobs/digits.yaml --set search.trials=60`, from the command to the table."""
    home = Path(tempfile.mkdtemp(prefix="rd"))
    start = time.perf_counter()
    done = subprocess.run(
        [
            sys.executable, "-m", "raydeep.cli", "search", str(HERE.parent / "jobs" / "digits.yaml"), "--set",
            "search.trials=60", "--set", f"storage={home / 'runs'}",
        ],
        env={**os.environ, "RAY_TMPDIR": str(home)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    took = time.perf_counter() - start
    shutil.rmtree(home, ignore_errors=True)
    if done.returncode or "60 trials finished, 0 failed" not in done.stdout:
        sys.exit(f"the search failed:\n{done.stdout}{done.stderr}")
    return [harness.result("60 trials on digits, the whole command", took, "s", "<= 300", n=1)]


SECTIONS = {"front": front, "overhead": overhead, "digits": digits}


def main() -> None:
    """Run one section, or all."""
    args = harness.arguments(
        __doc__,
        only={"choices": list(SECTIONS), "help": "one section"},
        seeds={"type": int, "default": 3, "help": "of front"},
        rounds={"type": int, "default": 3, "help": "of overhead"},
        cache={"default": "runs/benchmarks", "help": "where curves are kept: a section that was cut off goes on"},
    )
    for name in [args.only] if args.only else list(SECTIONS):
        harness.finish(f"search-{name}", SECTIONS[name](args), args)


if __name__ == "__main__":
    main()
