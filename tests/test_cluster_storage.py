"""Storage in a bucket on a Ray of several nodes that share nothing: each raylet has a cache of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs
import pytest
from commands import wait_for
from raylets import Raylets

from raydeep import mirror
from raydeep.disk import check_sums, parse_lines, read_json
from raydeep.run import Run

pytestmark = pytest.mark.cluster

JOB = str(Path(__file__).parent.parent / "jobs" / "digits.yaml")
EPOCHS, STEPS = 8, 146  # 1,169 pictures in batches of 8


def can_mount() -> bool:
    made = subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False)
    return made.returncode == 0 and os.geteuid() == 0


class Nodes:
    """A head without CPUs, where commands run, and nodes of one CPU; what the head has, no other sees."""

    def __init__(self, home: Path, raylets: Raylets, count: int) -> None:
        self.home, self.head, self.raylets = home, home / "head", raylets
        self.head.mkdir()
        health = json.dumps({"health_check_period_ms": 1000, "health_check_failure_threshold": 3})
        self._start("head", "--num-cpus", "0", "--system-config", health, "--dashboard-host", "127.0.0.1")
        self.sessions = {self._start(f"node{number}"): home / f"node{number}" for number in range(count)}

    def _start(self, name: str, *options: str) -> int:
        """The session of a new node with a cache of that name."""
        before = set(self.raylets.sessions)
        mounts = {str(self.head): "size=1m"} if name != "head" and can_mount() else None
        self.raylets.start(*options, env={"RAYDEEP_CACHE": str(self.home / name)}, mounts=mounts)
        [session] = self.raylets.sessions - before
        return session

    def lose(self, pid: int) -> None:
        """Kill -9 of a node that a process runs on: of all its processes."""
        session = os.getsid(pid)
        del self.sessions[session]
        for other in self.raylets.processes():
            with suppress(ProcessLookupError):
                if os.getsid(other) == session:
                    os.kill(other, signal.SIGKILL)

    def command(self, *arguments: str, cache: str = "head") -> subprocess.Popen[str]:
        env = {**self.raylets.env, "RAYDEEP_CACHE": str(self.home / cache), "RAY_ADDRESS": self.raylets.address}
        return subprocess.Popen(
            [sys.executable, "-m", "raydeep.cli", *arguments], env=env, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )  # fmt: skip

    def well(self, *arguments: str, cache: str = "head") -> str:
        """What a command says that ends well."""
        process = self.command(*arguments, cache=cache)
        said = process.communicate(timeout=400)[0]
        assert process.returncode == 0, said
        return said


@pytest.fixture
def nodes(home: Path, s3_server: pafs.S3FileSystem, monkeypatch: pytest.MonkeyPatch) -> Iterator[Nodes]:
    monkeypatch.setenv("RAYDEEP_CACHE", str(home / "seen"))  # of this process, which looks into the bucket
    raylets = Raylets(home / "c")
    try:
        yield Nodes(home, raylets, 3)
    finally:
        raylets.stop()
        assert raylets.processes() == []


def sets(**values: object) -> list[str]:
    return [part for key, value in values.items() for part in ("--set", f"{key.replace('__', '.')}={value}")]


def lines(file: Path) -> list[dict[str, Any]]:
    return parse_lines(mirror.read(file) or b"")


def test_nodes_that_share_nothing_lose_a_worker_and_a_driver(
    nodes: Nodes, new_bucket: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = f"s3://{new_bucket()}/runs"
    common = sets(storage=storage, export__latency_rounds=3)
    process = nodes.command(
        "train", JOB, *common,
        *sets(scaling__workers=2, train__epochs=EPOCHS, train__batch_size=8,
              train__checkpoint_steps=20, train__lr=0.01),
    )  # fmt: skip

    def run() -> Path | None:
        files = [name for name in mirror.names(mirror.place(storage)) if name.endswith("/job.yaml")]
        return mirror.place(storage) / files[0].split("/")[0] if files else None

    def saved() -> bool:
        assert process.poll() is None, process.communicate()[0]
        folder = run()
        return folder is not None and any(
            name.endswith("/state.json") and int(name[5:14]) > STEPS for name in mirror.names(folder / "checkpoints")
        )

    wait_for(saved, 120, "a checkpoint inside the second epoch or a later one")
    folder = run()
    assert folder is not None
    told = json.loads(mirror.read(folder / "workers" / "rank-0.json") or b"{}")
    nodes.lose(told["pid"])  # the node of worker 0, which wrote the checkpoints
    said = process.communicate(timeout=300)[0]
    assert process.returncode == 0, said
    first, second = lines(folder / "attempts.jsonl")
    assert first["from_step"] == 0
    assert second["from_step"] > STEPS
    assert second["reached_before"] - second["from_step"] < 60
    assert [line["epoch"] for line in lines(folder / "metrics.jsonl")] == list(range(1, EPOCHS + 1))
    assert f"goes on at step {second['from_step']} with 2 workers" in said
    name = f"{storage}/{folder.name}"
    assert f"report     {name}/report.html" in said

    process = nodes.command("search", JOB, *common, "--from", name, *sets(search__trials=5, recover__epochs=3))

    def ledger() -> list[Path]:
        assert process.poll() is None, process.communicate()[0]
        files = [mirror.place(storage) / n for n in mirror.names(mirror.place(storage)) if n.endswith("ledger.jsonl")]
        return [file for file in files if sum("rung" in row for row in lines(file)) >= 3]

    wait_for(ledger, 120, "three rungs in the ledger of the bucket")
    [file] = ledger()
    before = lines(file)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    said = nodes.well("search", "--resume", mirror.name(file.parent), cache="empty")  # as on another machine
    assert "5 trials finished, 0 failed" in said
    after = lines(file)
    assert after[: len(before)] == before
    rungs = [(row["trial"], row["rung"]) for row in after if row.get("event") == "rung"]
    assert len(set(rungs)) == len(rungs)
    worked = {cache for cache in nodes.sessions.values() if any(cache.glob("storage/s3/*/runs/*/trials/t*"))}
    assert len(worked) == 2, "both nodes had trials"

    monkeypatch.setenv("RAYDEEP_CACHE", str(nodes.home / "other"))
    again = Run.open(f"{storage}/{file.parent.name}")
    rows = read_json(again.path / "front.json")["models"]
    assert rows
    left = {name for name in mirror.names(again.path / "trials") if "-" in name or "checkpoints" in name}
    assert left == set()
    mirror.pull(again.model(rows[0]["label"]))
    check_sums(again.model(rows[0]["label"]))
