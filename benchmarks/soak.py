"""Soak: searches on a cluster of three raylets while training workers, trials, nodes and the driver are killed.

`raydeep search` of the embedded digits (a training on two workers, then trials, four at once) on a head and two worker
nodes of this machine, one search after another for `--minutes`, each to its end. About every `--every` seconds (0.5 to
1.5 times that) one of three things gets kill -9, in rounds of three in a seeded order: a process of a training worker
or a trial; all of a worker node at work, healed by `cluster/local.sh up 2` after 10 s; the driver, started again with
`--resume` after 2 s. First the same search runs undisturbed. How lost time is counted stands in soak_count.py.
"""

from __future__ import annotations

import signal
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import harness
import soak_count as count
from scale_raylets import CPUS, Cluster, raylets
from soak_watch import (
    HEAL_S,
    KINDS,
    MIB,
    RESTART_S,
    WORKERS,
    Killer,
    Memory,
    Search,
    lines,
    of_cluster,
    processes,
    sessions,
)

from raydeep.disk import append_line

SLOTS = WORKERS * CPUS  # trials at once
TRIALS = 60
SETS = (
    "train.epochs=20", "train.batch_size=8", "train.lr=0.01", "train.checkpoint_seconds=5", "scaling.max_failures=1000",
    f"search.trials={TRIALS}", "export.latency_rounds=3", "export.max_models=3",
)  # fmt: skip
QUICK = ("train.epochs=10", "search.trials=30")
LOOK_S = 0.1


def run(cluster: Cluster, args: Any) -> Iterator[tuple[str, Any]]:
    """The undisturbed search, then the others; what came of them."""
    sets = (*SETS, *(QUICK if args.quick else ()))
    killer = Killer(cluster, args.every, args.seed)
    memory, searches = Memory(killer.head), []
    calm = Search(cluster.home, "calm", sets)
    while calm.look():
        time.sleep(LOOK_S)
    print(f"  undisturbed: {calm.record.end - calm.record.begin:.0f} s", flush=True)
    killer.due = time.time() + args.every * killer.chance.uniform(0.5, 1.5)
    end = time.time() + 60 * args.minutes
    while time.time() < end:
        search = Search(cluster.home, f"search-{len(searches)}", sets)
        searches.append(search)
        while search.look():
            killer.look(search, time.time() < end)
            memory.look()
            time.sleep(LOOK_S)
        if args.records:
            append_line(Path(args.records), asdict(search.record))
        share = count.effective([search.record], SLOTS)
        print(f"  search {len(searches)}: {search.record.end - search.record.begin:.0f} s, {share:.1%}", flush=True)
    while killer.heal_at:
        killer.look(search, False)
        time.sleep(LOOK_S)
    yield from {"calm": calm, "searches": searches, "killer": killer, "memory": memory}.items()


def rows(found: dict[str, Any]) -> list[dict[str, Any]]:
    """The table."""
    calm, searches, memory = found["calm"], found["searches"], found["memory"]
    records = [search.record for search in searches]
    wall = sum(record.end - record.begin for record in records)
    kills = [kill for record in records for kill in record.kills]
    losses = [loss for record in records for loss in count.losses(record, SLOTS)]
    total = _total(calm)
    told = [count.trials(lines(search.folder, "ledger.jsonl"), total) for search in searches]
    lost, twice = sum(len(lost) for lost, _ in told), sum(len(twice) for _, twice in told)
    steps = calm.record.marks[-1][1] * len(searches)
    accuracy = statistics.mean(search.front()["dense"]["test_accuracy"] for search in searches)
    left = set().union(*(search.files() for search in searches)) - calm.files()
    alike = [search.weights() == calm.weights() for search in searches]
    ordered = [search.hashes() == calm.hashes() for search in searches]
    load = statistics.mean(memory.load)
    out = [harness.result("searches, each to its end", len(searches), "searches", minutes=wall / 60, load=load)]
    for kind in KINDS:
        mine = [kill for kill in kills if kill.kind == kind]
        seconds = [loss for loss in losses if loss.kill and loss.kill.kind == kind]
        out.append(harness.result(f"kill -9 of a {kind}", len(mine), "kills"))
        if mine:
            phases: defaultdict[str, float] = defaultdict(float)
            for loss in seconds:
                phases[loss.phase] += loss.seconds
            took = sum(phases.values()) / len(mine)
            out.append(harness.result(f"time lost to one of a {kind}", took, "s", n=len(mine), phases=phases))
    unasked = sum(loss.seconds for loss in losses if loss.kill is None)
    healed = found["killer"].healed_s
    whole = [search.record.end - search.record.begin for search in searches if not search.record.kills]
    peaks = [search.peak_bytes / MIB for search in searches]
    out += [
        harness.result("recoveries", sum(_recovered(record) for record in records), "kills", f">= {len(kills)}"),
        harness.result("time lost without a kill", unasked, "s"),
        harness.result("a node is back after", statistics.mean(healed) if healed else 0.0, "s", n=len(healed)),
        harness.result("trials lost", lost, "trials", "<= 0", of=total * len(searches)),
        harness.result("trials with a rung or an end twice", twice, "trials", "<= 0"),
        harness.result("training steps done again", sum(count.again(r.attempts) for r in records), "steps", of=steps),
        harness.result("effective time", count.effective(records, SLOTS), "of wall time", ">= 0.9"),
        harness.result(
            "effective time of the worst search", min(count.effective([r], SLOTS) for r in records), "of wall time"
        ),
        harness.result("a search undisturbed", calm.record.end - calm.record.begin, "s", n=1),
        harness.result("a search of the soak", wall / len(searches), "s", n=len(searches), without_kills=whole),
        harness.result("dense weights bit-identical to the undisturbed", sum(alike), "searches", f">= {len(alike)}"),
        harness.result("order hashes as undisturbed", sum(ordered), "searches", f">= {len(ordered)}"),
        harness.result("dense test accuracy", accuracy, "fraction", n=len(searches)),
        harness.result("dense test accuracy, undisturbed", calm.front()["dense"]["test_accuracy"], "fraction", n=1),
        harness.result(
            "best trial on validation", statistics.mean(s.best() for s in searches), "fraction", n=len(searches)
        ),
        harness.result("best trial on validation, undisturbed", calm.best(), "fraction", n=1),
        harness.result("files that no undisturbed search leaves", len(left), "files", "<= 0", which=sorted(left)),
        *_grown("GCS", memory.gcs), *_grown("head, all its processes", memory.all),
        harness.result("driver, largest of the first search", peaks[0], "MiB"),
        harness.result("driver, largest of the last search", peaks[-1], "MiB"),
    ]  # fmt: skip
    return out


def _grown(name: str, samples: list[float]) -> list[dict[str, Any]]:
    first, last = Memory.growth(samples)
    return [
        harness.result(f"{name}, memory at first", first, "MiB"), harness.result(f"{name}, memory at last", last, "MiB")
    ]  # fmt: skip


def _total(calm: Search) -> int:
    assert calm.folder is not None
    import yaml

    return int(yaml.safe_load((calm.folder / "job.yaml").read_text())["search"]["trials"])


def _recovered(record: count.Record) -> int:
    """Kills after which the search went on."""
    told = [*(at for at, _ in record.marks), *(at for at, _ in record.lines), record.end]
    return sum(any(at > kill.at for at in told) for kill in record.kills)


def main() -> None:
    """Run it."""
    args = harness.arguments(
        __doc__,
        minutes={"type": float, "default": 30.0, "help": "searches begin for so long"},
        every={"type": float, "default": 180.0, "help": "mean seconds between kills"},
        seed={"type": int, "default": 0, "help": "of what is killed and when"},
        records={"metavar": "FILE", "help": "write what was seen of each search as JSON lines"},
    )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the cluster is stopped
    with raylets(WORKERS) as cluster:
        found = dict(run(cluster, args))
        known = {*sessions(cluster), *found["killer"].gone}
        out = rows(found)
    left = {**processes(known), **of_cluster(cluster)}
    out.append(harness.result("processes left", len(left), "processes", "<= 0", which=sorted(left.values())))
    harness.finish("soak", out, args, args.seed, every_s=args.every, restart_s=RESTART_S, heal_s=HEAL_S)


if __name__ == "__main__":
    main()
