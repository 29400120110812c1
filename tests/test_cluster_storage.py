"""Storage in a bucket on a Ray of several nodes that share nothing: each raylet has a cache of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs
import pytest
from commands import wait_for

from raydeep import mirror
from raydeep.run import Run, check_sums, parse_lines, read_json

pytestmark = pytest.mark.cluster

JOB = str(Path(__file__).parent.parent / "jobs" / "digits.yaml")
EPOCHS, STEPS = 12, 146  # 1,169 pictures in batches of 8


class Nodes:
    """A head without CPUs, where commands run, and nodes of one CPU."""

    def __init__(self, home: Path, count: int) -> None:
        from ray.cluster_utils import Cluster

        self.home, self.store = home, {"object_store_memory": 150 * 2**20}
        os.environ["RAYDEEP_CACHE"] = str(home / "head")
        health = {"health_check_period_ms": 1000, "health_check_failure_threshold": 3}
        self.cluster = Cluster(
            initialize_head=True,
            head_node_args={"num_cpus": 0, "include_dashboard": False, "_system_config": health, **self.store},
        )
        self.nodes: dict[str, Any] = {}  # by its cache
        for number in range(count):
            os.environ["RAYDEEP_CACHE"] = str(home / f"node{number}")  # the raylet's own, and its workers'
            self.nodes[os.environ["RAYDEEP_CACHE"]] = self.cluster.add_node(num_cpus=1, **self.store)
        os.environ["RAYDEEP_CACHE"] = str(home / "head")

    def cache_of(self, pid: int) -> str:
        """The cache of the node that a process runs on."""
        lines = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        return next(line.decode() for line in lines if line.startswith(b"RAYDEEP_CACHE=")).partition("=")[2]

    def lose(self, cache: str) -> None:
        """Kill -9 of a raylet and its workers."""
        self.cluster.remove_node(self.nodes.pop(cache), allow_graceful=False)

    def command(self, *arguments: str, cache: str = "head") -> subprocess.Popen[str]:
        env = {**os.environ, "RAYDEEP_CACHE": str(self.home / cache), "RAY_ADDRESS": self.cluster.address}
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
    monkeypatch.setenv("RAY_TMPDIR", str(home))
    monkeypatch.setenv("RAYDEEP_CACHE", str(home / "head"))
    found = Nodes(home, 3)
    try:
        yield found
    finally:
        found.cluster.shutdown()


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
    [told] = parse_lines(b" ".join((mirror.read(folder / "workers" / "rank-0.json") or b"").split()))
    gone = nodes.cache_of(told["pid"])
    nodes.lose(gone)  # that of worker 0, which wrote the checkpoints
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
    worked = {cache for cache in nodes.nodes if any(Path(cache).glob("storage/s3/*/runs/*/trials/t*"))}
    assert len(worked) == 2, "both nodes had trials"

    monkeypatch.setenv("RAYDEEP_CACHE", str(nodes.home / "other"))
    again = Run.open(f"{storage}/{file.parent.name}")
    rows = read_json(again.path / "front.json")["models"]
    assert rows
    left = {name for name in mirror.names(again.path / "trials") if "-" in name or "checkpoints" in name}
    assert left == set()
    mirror.pull(again.model(rows[0]["label"]))
    check_sums(again.model(rows[0]["label"]))
