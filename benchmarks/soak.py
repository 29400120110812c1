"""Soak: searches on a cluster of three raylets while training workers, trials, nodes and the driver are killed.

`raydeep search` of the embedded digits (a training on two workers, then trials, four at once) on a head and two worker
nodes of this machine, one search after another for `--minutes`, each to its end. About every `--every` seconds (0.5 to
1.5 times that) one of three things gets kill -9, in rounds of three in a seeded order: a process of a training worker
or a trial; all of a worker node at work, healed by `cluster/local.sh up 2` after 10 s; the driver, started again with
`--resume` after 2 s. First the same search runs undisturbed. How lost time is counted stands in soak_count.py.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import harness
import soak_count as count
from scale_raylets import CPUS, Cluster, raylets

ROOT = Path(__file__).parent.parent
WORKERS = 2
SLOTS = WORKERS * CPUS  # trials at once
TRIALS = 100
SETS = (
    "train.epochs=60", "train.batch_size=8", "train.lr=0.01", "train.checkpoint_seconds=5", "scaling.max_failures=1000",
    f"search.trials={TRIALS}", "export.latency_rounds=3", "export.max_models=3",
)  # fmt: skip
QUICK = ("train.epochs=10", "search.trials=30")
KINDS = ("worker", "node", "driver")
HEAL_S, RESTART_S, LOOK_S, MEMORY_S = 10.0, 2.0, 0.1, 5.0
MIB = 2**20


def sessions(cluster: Cluster, name: str = "*") -> dict[int, str]:
    """Session of each node's processes → its name."""
    return {int(file.read_text()): file.stem for file in cluster.home.glob(f"nodes/{name}.pid") if file.read_text()}


def processes(wanted: set[int]) -> dict[int, str]:
    """Living processes of sessions → their command lines."""
    found = {}
    for entry in Path("/proc").iterdir():
        with suppress(OSError):
            if entry.name.isdigit():
                state, _, _, session = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
                if state != "Z" and int(session) in wanted:
                    found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
    return found


def rss_bytes(pid: int) -> int:
    """Memory that a process holds; 0 if it has gone."""
    with suppress(OSError, IndexError):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


def kill(*pids: int) -> None:
    """Kill -9."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


class Search:
    """One search, its driver, and what is seen of it."""

    def __init__(self, home: Path, name: str, sets: tuple[str, ...]) -> None:
        self.storage, self.peak_bytes = home / "soak" / name, 0
        self.record = count.Record(time.time())
        self.seen: dict[Path, int] = {}  # mtimes
        self.read = 0  # lines of the ledger
        self.start_at = 0.0  # a dead driver's next life
        pairs = [part for value in (f"storage={self.storage}", *sets) for part in ("--set", value)]
        self.arguments = [str(ROOT / "jobs" / "digits.yaml"), *pairs]
        self.storage.mkdir(parents=True)
        self.log = self.storage / "said"
        self.start()

    def start(self) -> None:
        """Start the driver, or the next one."""
        arguments = ["--resume", str(self.folder)] if self.folder else self.arguments
        with self.log.open("a") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "raydeep.cli", "search", *arguments], stdout=out, stderr=out
            )

    @property
    def folder(self) -> Path | None:
        """The run."""
        return next((file.parent for file in self.storage.glob("*-*/job.yaml")), None)

    def look(self) -> bool:
        """Note what is new; whether it goes on.

        Raises:
            RuntimeError: it failed.
        """
        now, folder = time.time(), self.folder
        self.peak_bytes = max(self.peak_bytes, rss_bytes(self.process.pid))
        if folder is not None:
            self._look(now, folder)
        if self.start_at:
            if now >= self.start_at:
                self.start_at = 0.0
                self.start()
            return True
        code = self.process.poll()
        if code:
            raise RuntimeError(f"exit code {code}:\n{self.log.read_text()[-4000:]}")
        if code == 0 and not self.record.end:
            self.record.end = now
            self.record.attempts = _lines(self.folder, "attempts.jsonl")
        return code is None

    def _look(self, now: float, folder: Path) -> None:
        record = self.record
        files = [file.read_bytes() for file in folder.glob("workers/rank-*.step")]
        step = max((int.from_bytes(data, "little") for data in files), default=0)
        if step > (record.marks[-1][1] if record.marks else 0):
            record.marks.append((now, step))
        for file in folder.glob("trials/t*/config.json"):  # written as each rung begins
            with suppress(FileNotFoundError):
                at = file.stat().st_mtime_ns
                if self.seen.get(file) != at:
                    self.seen[file] = at
                    record.begins.append((int(file.parent.name[1:]), at / 1e9))
        rows = [row for row in _lines(folder, "ledger.jsonl") if "trial" in row]
        record.lines += [(now, row) for row in rows[self.read :]]
        self.read = len(rows)

    def driver_killed(self) -> None:
        """Kill the driver; it starts again a little later."""
        kill(self.process.pid)
        self.process.wait()
        self.start_at = time.time() + RESTART_S

    def weights(self) -> bytes:
        """Those of the dense model."""
        assert self.folder is not None
        return (self.folder / "models" / "dense" / "model.safetensors").read_bytes()

    def hashes(self) -> list[str]:
        """Of the order of each epoch."""
        return [row["order_hash"] for row in _lines(self.folder, "metrics.jsonl")]

    def front(self) -> dict[str, Any]:
        """Its front.json."""
        assert self.folder is not None
        return json.loads((self.folder / "front.json").read_text())

    def best(self) -> float:
        """The best accuracy of a trial, on validation."""
        ends = [row for row in _lines(self.folder, "ledger.jsonl") if row.get("event") == "end"]
        return max(row.get("val_accuracy", 0.0) for row in ends)

    def files(self) -> set[str]:
        """Names of its files, without what differs from run to run: numbers of trials and of checkpoints."""
        assert self.folder is not None
        names = (str(p.relative_to(self.folder)) for p in self.folder.rglob("*") if p.is_file())
        return {re.sub(r"/t\d+", "/t", re.sub(r"step-\d+", "step", name)) for name in names}


def _lines(folder: Path | None, name: str) -> list[dict[str, Any]]:
    from raydeep.run import read_lines

    return read_lines(folder / name) if folder is not None else []


class Killer:
    """Kills, and heals nodes."""

    def __init__(self, cluster: Cluster, every_s: float, seed: int) -> None:
        self.cluster, self.every_s, self.chance = cluster, every_s, random.Random(seed)
        self.kinds: list[str] = []
        self.heal_at = 0.0  # 0: all are there
        self.healing: subprocess.Popen[str] | None = None
        self.healed_s: list[float] = []
        self.head = sessions(cluster, "head")
        self.gone: set[int] = set()  # sessions that were killed
        self._next()

    def _next(self) -> None:
        if not self.kinds:
            self.kinds = self.chance.sample(KINDS, len(KINDS))
        self.kind = self.kinds.pop()
        self.due = time.time() + self.every_s * self.chance.uniform(0.5, 1.5)

    def look(self, search: Search, on: bool) -> None:
        """Kill if it is time to and there is what to kill."""
        self._heal()
        if on and time.time() >= self.due and not search.start_at and self._strike(search):
            self._next()

    def _strike(self, search: Search) -> bool:
        nodes = sessions(self.cluster, "worker-*")
        busy = {
            pid: os.getsid(pid)
            for pid, command in processes(set(nodes)).items()
            if re.match(r"ray::(RayTrainWorker|\w*Trainable)", command)
        }
        at = time.time()
        if self.kind == "driver":
            search.driver_killed()
        elif self.kind == "worker" and busy:
            kill(self.chance.choice(sorted(busy)))
        elif self.kind == "node" and busy and not self.healing and not self.heal_at:
            session = self.chance.choice(sorted(set(busy.values())))
            kill(*processes({session}))
            self.gone.add(session)
            self.heal_at = at + HEAL_S
        else:
            return False  # a little later
        search.record.kills.append(count.Kill(at, self.kind))
        print(f"  {time.strftime('%T')} kill -9: {self.kind}, load {os.getloadavg()[0]:.1f}", flush=True)
        return True

    def _heal(self) -> None:
        now = time.time()
        if self.healing is None and self.heal_at and now >= self.heal_at:
            self.healing = self.cluster.up(WORKERS)
        if self.healing is not None and self.healing.poll() is not None:
            if self.healing.returncode == 0:
                self.healed_s.append(now - self.heal_at)
                self.heal_at, self.healing = 0.0, None
            else:  # Ray gives a node 30 s to start: on a busy machine that may be too few
                self.healing = self.cluster.up(WORKERS)


class Memory:
    """Memory of the head, sampled."""

    def __init__(self, head: dict[int, str]) -> None:
        self.head, self.at = head, 0.0
        self.gcs: list[float] = []  # MiB
        self.all: list[float] = []
        self.load: list[float] = []

    def look(self) -> None:
        """Sample, now and then."""
        if time.time() - self.at > MEMORY_S:
            self.at = time.time()
            found = processes(set(self.head))
            self.gcs.append(sum(rss_bytes(pid) for pid, line in found.items() if "gcs_server" in line) / MIB)
            self.all.append(sum(rss_bytes(pid) for pid in found) / MIB)
            self.load.append(os.getloadavg()[0])

    @staticmethod
    def growth(samples: list[float]) -> tuple[float, float]:
        """Medians of the first and the last tenth."""
        part = max(1, len(samples) // 10)
        return statistics.median(samples[:part]), statistics.median(samples[-part:])


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
    ledgers = [_lines(search.folder, "ledger.jsonl") for search in searches]
    lost, twice = (sum(len(found[k]) for found in (count.trials(rows, total) for rows in ledgers)) for k in (0, 1))
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
    )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the cluster is stopped
    with raylets(WORKERS) as cluster:
        found = dict(run(cluster, args))
        known = {*sessions(cluster), *found["killer"].gone}
        out = rows(found)
    left = processes(known)
    out.append(harness.result("processes left", len(left), "processes", "<= 0", which=sorted(left.values())))
    harness.finish("soak", out, args, args.seed, every_s=args.every, restart_s=RESTART_S, heal_s=HEAL_S)


if __name__ == "__main__":
    main()
