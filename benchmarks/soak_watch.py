"""What soak.py kills, and what it sees of the searches meanwhile."""

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
from contextlib import suppress
from pathlib import Path
from typing import Any

import soak_count as count
from scale_raylets import Cluster

ROOT = Path(__file__).parent.parent
WORKERS = 2  # nodes beside the head
KINDS = ("worker", "node", "driver")
HEAL_S, RESTART_S, MEMORY_S = 10.0, 2.0, 5.0
STUCK_S = 900.0  # then it is an error
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


def of_cluster(cluster: Cluster) -> dict[int, str]:
    """Living processes that were started with the cluster's environment, or for it: drivers and what they started."""
    found = {}
    for entry in Path("/proc").iterdir():
        with suppress(OSError):
            if entry.name.isdigit() and str(cluster.home).encode() in (entry / "environ").read_bytes():
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
        self.last_at = 0.0  # it got further
        self.start_at = 0.0  # a dead driver's next life
        pairs = [part for value in (f"storage={self.storage}", *sets) for part in ("--set", value)]
        self.arguments = [str(ROOT / "jobs" / "digits.yaml"), *pairs]
        self.storage.mkdir(parents=True)
        self.log = self.storage / "said"
        self.start()

    def start(self) -> None:
        """Start the driver, or the next one."""
        arguments = ["--resume", str(self.folder)] if self.folder else self.arguments
        self.record.starts.append(time.time())
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
        if code is None and now - max(self.last_at, self.record.begin) > STUCK_S:
            raise RuntimeError(f"nothing new for {STUCK_S:g} s:\n{self.log.read_text()[-4000:]}")
        if code == 0 and not self.record.end:
            self.record.end = now
            self.record.attempts = lines(self.folder, "attempts.jsonl")
        return code is None

    def _look(self, now: float, folder: Path) -> None:
        record = self.record
        files = [file.read_bytes() for file in folder.glob("workers/rank-*.step")]
        step = max((int.from_bytes(data, "little") for data in files), default=0)
        if step > (record.marks[-1][1] if record.marks else 0):
            record.marks.append((now, step))
            self.last_at = now
        for file in folder.glob("trials/t*/config.json"):  # written as each rung begins
            with suppress(FileNotFoundError):
                at = file.stat().st_mtime_ns
                if self.seen.get(file) != at:
                    self.seen[file] = at
                    record.begins.append((int(file.parent.name[1:]), at / 1e9))
        ledger = folder / "ledger.jsonl"
        at = ledger.stat().st_mtime_ns if ledger.exists() else 0
        if self.seen.get(ledger) != at:
            self.seen[ledger] = at
            rows = [row for row in lines(folder, "ledger.jsonl") if "trial" in row]
            record.lines += [(at / 1e9, row) for row in rows[self.read :]]
            self.read, self.last_at = len(rows), now

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
        return [row["order_hash"] for row in lines(self.folder, "metrics.jsonl")]

    def front(self) -> dict[str, Any]:
        """Its front.json."""
        assert self.folder is not None
        return json.loads((self.folder / "front.json").read_text())

    def best(self) -> float:
        """The best accuracy of a trial, on validation."""
        ends = [row for row in lines(self.folder, "ledger.jsonl") if row.get("event") == "end"]
        return max(row.get("val_accuracy", 0.0) for row in ends)

    def files(self) -> set[str]:
        """Names of its files, without numbers of trials and checkpoints, and the log of what Ray had to say."""
        assert self.folder is not None
        names = (str(p.relative_to(self.folder)) for p in self.folder.rglob("*") if p.is_file())
        return {re.sub(r"/t\d+", "/t", re.sub(r"step-\d+", "step", name)) for name in names if name != "ray.log"}


def lines(folder: Path | None, name: str) -> list[dict[str, Any]]:
    """Of a file of the run."""
    from raydeep.disk import read_lines

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
