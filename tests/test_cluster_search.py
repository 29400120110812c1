"""What goes wrong in a search on a real local Ray, and that it ends with the others and says so."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
from commands import ray_processes, run, start, wait_for

from raydeep.disk import read_lines

JOBS = Path(__file__).parent.parent / "jobs"
QUICK = ["--set", "export.latency_rounds=3", "--set", "export.max_models=2"]

# A network of one's own whose argument says what goes wrong in its trial.
FAULTY = """
import os, pathlib, time
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, classes, size, mode):
        super().__init__()
        self.mode, self.head = mode, nn.Linear(size[0] * size[1], classes)

    def forward(self, x):
        out = self.head(x.flatten(1))
        return out * float("nan") if self.mode == "nan" and not self.training else out

def make(num_classes, in_channels, image_size, mode="good"):
    if mode == "raise":
        raise ValueError("this network can't be built")
    if mode == "memory":
        torch.ones(3 * 2**30, dtype=torch.uint8)
    if mode == "killed":
        seen = pathlib.Path(os.environ["FAULTY_HOME"]) / "pid"
        if not seen.exists():
            seen.write_text(str(os.getpid()))
            time.sleep(60)
    return Net(num_classes, image_size, mode)
"""
MODES = ["good", "raise", "killed", "memory", "nan"]


@pytest.mark.cluster
def test_a_search_ends_with_the_others_and_says_what_happened(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "faulty.py").write_text(FAULTY)
    monkeypatch.setenv("PYTHONPATH", str(home))
    monkeypatch.setenv("FAULTY_HOME", str(home))
    args = [{"mode": mode} for mode in MODES]
    process = start(
        home, "search", str(JOBS / "digits.yaml"), "--set", f"storage={home / 'faults'}", "--set", "train.epochs=1",
        "--set", "model.name=faulty:make", "--set", f"search.space={{model.args: {json.dumps(args)}}}",
        "--set", "search.sampler=grid", "--set", "search.scheduler=none", "--set", "search.trials=5",
        "--set", "search.trial_memory_bytes=2_000_000_000", "--set", "search.objectives=[accuracy, bytes]", *QUICK,
    )  # fmt: skip
    pid = home / "pid"
    wait_for(lambda: (pid.exists() and pid.read_text()) or process.poll() is not None, 120, "the trial to be killed")
    assert process.poll() is None, process.stdout.read()  # type: ignore[union-attr]
    os.kill(int(pid.read_text()), signal.SIGKILL)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    assert "2 trials finished, 3 failed" in said
    [ledger] = (home / "faults").glob("digits-*/ledger.jsonl")
    ends = {row["config"]["model.args"]["mode"]: row for row in read_lines(ledger) if row.get("event") == "end"}
    assert sorted(ends) == sorted(MODES)
    assert {mode for mode, row in ends.items() if row["status"] == "done"} == {"good", "killed"}
    assert "ValueError: this network can't be built" in ends["raise"]["error"]
    assert "allocate memory" in ends["memory"]["error"]
    assert "outputs are not all finite" in ends["nan"]["error"]
    assert ends["killed"]["retries"] == 1
    report = (ledger.parent / "report.html").read_text()
    assert "this network can&#39;t be built" in report


@pytest.mark.slow
def test_a_driver_killed_at_twenty_moments_loses_and_repeats_no_trial(home: Path) -> None:
    storage, trials, chance = home / "kills", 120, random.Random(0)
    size = ["--set", f"search.trials={trials}", "--set", "train.epochs=5", *QUICK]
    code, said = run(home, "train", str(JOBS / "digits.yaml"), "--set", f"storage={storage}", *size)
    assert code == 0, said
    [dense] = storage.glob("digits-*")
    command = ["search", str(JOBS / "digits.yaml"), "--from", str(dense), "--set", f"storage={storage}", *size]
    before: list[bytes] = []  # whole lines of the ledger

    def lines() -> list[bytes]:
        found = [path.read_bytes() for path in storage.glob("digits-*/ledger.jsonl")]
        return found[0].split(b"\n")[:-1] if found else []

    for kill in range(20):
        process = start(home, *command)
        if kill % 5:  # at any moment of the search; else before or just as it begins
            wait_for(lambda: len(lines()) > len(before) or process.poll() is not None, 120, "the search")  # noqa: B023
        time.sleep(chance.uniform(0, 2) if kill % 5 else chance.uniform(1, 8))
        assert process.poll() is None, process.stdout.read()  # type: ignore[union-attr]
        process.send_signal(signal.SIGKILL)
        process.communicate()
        wait_for(lambda: not ray_processes(home), 60, "Ray to follow its driver")
        now = lines()
        assert now[: len(before)] == before, "a line that was written has changed"
        before = now
        if runs := [path.parent for path in storage.glob("digits-*/ledger.jsonl")]:
            command = ["search", "--resume", str(runs[0])]
    code, said = run(home, *command)
    assert code == 0, said
    [ledger] = storage.glob("digits-*/ledger.jsonl")
    rows = [row for row in read_lines(ledger) if "trial" in row]
    ends = [row["trial"] for row in rows if row["event"] == "end"]
    assert sorted(ends) == list(range(trials))
    rungs = [(row["trial"], row["rung"]) for row in rows if row["event"] == "rung"]
    assert len(rungs) == len(set(rungs))
    assert len({json.dumps(row["config"], sort_keys=True) for row in rows if row["event"] == "end"}) == trials


@pytest.mark.cluster
def test_nothing_is_left_running(home: Path) -> None:
    wait_for(lambda: not ray_processes(home), 60, "Ray to stop")
    assert ray_processes(home) == []
