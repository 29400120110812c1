"""The data plane on a real local Ray: a kill in the middle of an epoch or of sharding costs time and nothing else."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
from commands import ray_processes, run, start, wait_for

from raydeep.disk import read_lines, sha256_file

pytestmark = pytest.mark.cluster

JOBS = Path(__file__).parent.parent / "jobs"
EPOCHS, STEPS = 6, 146  # 1,169 pictures in batches of 8
SMALL = [
    "--set", f"train.epochs={EPOCHS}", "--set", "train.batch_size=8", "--set", "train.checkpoint_steps=20",
    "--set", "train.lr=0.01", "--set", "export.latency_rounds=3", "--set", "data.window_bytes=1048576",
]  # fmt: skip


def train(home: Path, name: str, *sets: str) -> list[str]:
    pairs = [part for value in (f"storage={home / name}", *sets) for part in ("--set", value)]
    return ["train", str(JOBS / "digits.yaml"), *pairs, *SMALL]


def folder(home: Path, name: str) -> Path:
    [found] = (home / name).glob("digits-*")
    return found


@pytest.fixture(scope="module")
def undisturbed(home: Path) -> Path:
    """Run folder of a streamed training on two workers that nothing disturbed (in memory: test_cluster_faults.py)."""
    code, said = run(home, *train(home, "stream-whole", "data.cache=stream"))
    assert code == 0, said
    assert "input-bound" in said
    return folder(home, "stream-whole")


def steps_saved(run_folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in run_folder.glob("checkpoints/step-*"))


def facts(run_folder: Path) -> list[tuple[object, ...]]:
    """What an epoch's line says beside times."""
    keys = ("epoch", "step", "train_loss", "lr", "order_hash", "val_loss", "val_accuracy", "val_rows")
    return [tuple(row[key] for key in keys) for row in read_lines(run_folder / "metrics.jsonl")]


def test_killed_in_the_middle_of_an_epoch_the_weights_end_bit_identical(home: Path, undisturbed: Path) -> None:
    whole, name = undisturbed, "stream-killed"
    process = start(home, *train(home, name, "data.cache=stream"))

    def inside_an_epoch() -> bool:
        saved = [s for path in (home / name).glob("digits-*") for s in steps_saved(path)]
        return process.poll() is not None or bool(saved and saved[-1] > STEPS and 20 <= saved[-1] % STEPS <= 80)

    wait_for(inside_an_epoch, 300, "a checkpoint inside the second epoch or a later one")
    process.send_signal(signal.SIGKILL)
    process.communicate()
    wait_for(lambda: not ray_processes(home), 60, "Ray to follow its driver")
    killed = folder(home, name)
    last = steps_saved(killed)[-1]
    assert last % STEPS, "the kill came at the end of an epoch"
    assert last < EPOCHS * STEPS
    code, said = run(home, "train", "--resume", str(killed))
    assert code == 0, said
    model = Path("models", "dense", "model.safetensors")
    assert sha256_file(killed / model) == sha256_file(whole / model)
    assert facts(killed) == facts(whole)


def test_one_worker_sees_the_batches_of_two(home: Path, undisturbed: Path) -> None:
    code, said = run(home, *train(home, "stream-one", "data.cache=stream", "scaling.workers=1"))
    assert code == 0, said
    lines = read_lines(folder(home, "stream-one") / "metrics.jsonl")
    two = read_lines(undisturbed / "metrics.jsonl")
    assert [row["order_hash"] for row in lines] == [row["order_hash"] for row in two]
    assert {row["val_rows"] for row in lines} == {269}
    assert lines[-1]["train_loss"] == pytest.approx(two[-1]["train_loss"], rel=0.1)  # BatchNorm sees other shares
    assert set(lines[0]["meter"]) == {"read_s", "decode_s", "wait_s", "transfer_s", "augment_s", "step_s"}
    assert lines[0]["first_batch_s"] > 0
    assert lines[0]["meter"]["decode_s"] > 0


def test_a_search_streams_too(home: Path, undisturbed: Path) -> None:
    """Its trials run in placement groups of their own, which have no CPU for the tasks that read."""
    job = train(home, "stream-search", "data.cache=stream")[1:]
    code, said = run(
        home, "search", *job, "--from", str(undisturbed), "--set", "search.trials=2", "--set", "recover.epochs=1"
    )  # fmt: skip
    assert code == 0, said
    assert "2 trials finished, 0 failed" in said


@pytest.fixture(scope="module")
def pictures(home: Path, write_many) -> Path:
    return write_many(home / "pictures", 6000)


SHARD = ["--set", "data.shard_bytes=200000", "--workers", "2"]


def test_sharding_that_is_killed_goes_on(home: Path, pictures: Path) -> None:
    code, said = run(home, "shard", str(pictures), str(home / "whole"), *SHARD)
    assert code == 0, said
    process = start(home, "shard", str(pictures), str(home / "killed"), *SHARD)
    aside = home / ".killed.part"
    wait_for(lambda: len(list(aside.glob("task-*.json"))) >= 2 or process.poll() is not None, 120, "two shards")
    process.send_signal(signal.SIGKILL)
    process.communicate()
    wait_for(lambda: not ray_processes(home), 60, "Ray to follow its driver")
    assert not (home / "killed").exists()
    kept = {path.name: path.stat().st_mtime_ns for path in aside.glob("task-*.json")}
    assert kept
    code, said = run(home, "shard", str(pictures), str(home / "killed"), *SHARD)
    assert code == 0, said
    assert not aside.exists()
    whole, killed = (json.loads((home / name / "dataset.json").read_text()) for name in ("whole", "killed"))
    assert killed == whole
    assert {path.name for path in (home / "killed").iterdir()} == {path.name for path in (home / "whole").iterdir()}
    first = home / "killed" / min(shard["name"] for shard in whole["splits"]["train"]["shards"])
    assert first.stat().st_mtime_ns <= max(kept.values())  # it was not written again


def test_a_picture_that_stops_sharding_is_one_error(home: Path, pictures: Path) -> None:
    for path in sorted(pictures.glob("*/*.png"))[:100]:
        path.write_bytes(path.read_bytes()[:60])
    code, said = run(home, "shard", str(pictures), str(home / "bad"), *SHARD)
    assert code == 2, said
    assert "error: 100 of 6000 pictures can't be read (1.7%, allowed 1.0%)" in said
    assert "Traceback" not in said
    assert not (home / "bad").exists()
    assert not (home / ".bad.part").exists()


def test_nothing_is_left_running(home: Path) -> None:
    wait_for(lambda: not ray_processes(home), 60, "Ray to stop")
    assert ray_processes(home) == []
