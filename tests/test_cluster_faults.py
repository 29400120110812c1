"""Faults on a real Ray: each ends in its stated outcome (benchmarks/faults.py makes a table of the same).

That a node is lost and comes back is in test_cluster_jobs.py.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from commands import ray_processes, run, wait_for

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
import faults  # noqa: E402

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def whole(home: Path) -> faults.Training:
    """A training on two workers that nothing disturbs."""
    return faults.undisturbed(home)


def can_mount(folder: Path) -> bool:
    try:
        with faults.small_disk(folder, "1m"):
            return True
    except (subprocess.CalledProcessError, OSError):
        return False


def test_a_killed_worker_costs_the_steps_since_the_last_checkpoint(home: Path, whole: faults.Training) -> None:
    outcome = faults.worker_killed(home, whole)
    assert outcome.weights == "bit-identical"
    assert outcome.again < 60


@pytest.mark.slow  # a driver killed within an epoch, streaming, is in test_cluster_data.py
def test_a_killed_driver_and_a_damaged_checkpoint_cost_the_steps_since_the_one_before(
    home: Path, whole: faults.Training
) -> None:
    outcome = faults.driver_killed(home, whole)
    assert outcome.weights == "bit-identical"
    assert 0 < outcome.again < 80


@pytest.mark.slow
def test_a_terminated_driver_loses_nothing(home: Path, whole: faults.Training) -> None:
    outcome = faults.driver_terminated(home, whole)
    assert outcome.weights == "bit-identical"
    assert outcome.again <= 2


def test_a_full_disk_is_one_error_and_spares_the_last_checkpoint(home: Path, whole: faults.Training) -> None:
    if not can_mount(home / "can-mount"):
        pytest.skip("a small tmpfs can't be mounted here (it needs root)")
    assert faults.disk_full(home, whole).weights == "bit-identical"


def test_a_terminated_worker_loses_nothing(home: Path, whole: faults.Training) -> None:
    outcome = faults.worker_terminated(home, whole)
    assert outcome.weights == "bit-identical"
    assert outcome.again <= 2


@pytest.mark.slow  # the watch alone is in test_control.py
def test_a_worker_that_hangs_is_named(home: Path, whole: faults.Training) -> None:
    assert faults.stalled(home, whole).weights == "bit-identical"


BROKEN = """
import torch
import torch.distributed as dist
from torch import nn


class Broken(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.layer = nn.Linear(64, classes)

    def forward(self, x):
        if self.training and dist.is_initialized() and dist.get_rank() == 1:
            raise ValueError("rank 1 has had enough")
        return self.layer(x.flatten(1))


def make(num_classes, in_channels, image_size):
    return Broken(num_classes)
"""


def test_a_worker_that_raises_is_told_first(home: Path) -> None:
    (home / "broken.py").write_text(BROKEN)
    training = faults.Training(
        home, "broken", "model.name=broken:make", "scaling.workers=2", "scaling.max_failures=0", "train.epochs=2",
        env={"PYTHONPATH": str(home)},
    )  # fmt: skip
    code, said = training.end()
    assert code == 2, said
    error = said[said.index("error: ") :]
    assert error.startswith("error: rank 1, step 0 (computes): ValueError: rank 1 has had enough")
    assert "broken.py" in error
    assert "rank 0" not in error


@pytest.mark.parametrize("strategy", ["fsdp", "pipeline"])
def test_a_partitioned_model_is_trained_verified_and_reported(home: Path, strategy: str) -> None:
    code, said = run(
        home, "train", str(ROOT / "jobs" / "digits.yaml"), "--set", f"storage={home / strategy}", "--set",
        f"scaling.strategy={strategy}", "--set", "train.accumulate=4", "--set", "train.epochs=8", "--set",
        "export.latency_rounds=3",
    )  # fmt: skip
    assert code == 0, said
    assert "1 of 1 predict in a clean process exactly as when scored" in said
    folder = next((home / strategy).glob("digits-*"))
    assert len(list((folder / "checkpoints" / "step-000000144").glob("*.safetensors"))) == 2


def test_nothing_is_left_running(home: Path) -> None:
    wait_for(lambda: not ray_processes(home), 120, "Ray to stop")
    assert ray_processes(home) == []
