"""Sharding by tasks: what a stopped call did is kept, what changed is done anew, one process works at a time."""

from __future__ import annotations

import pickle
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from raydeep.config import Data
from raydeep.data import sharding, shards, sources
from raydeep.disk import sha256_file
from raydeep.errors import DataError


class Stopped(BaseException):
    """In place of a kill."""


def stops_after(count: int) -> sharding.Runner:
    """A runner that does some tasks and is stopped."""

    def run(work: sharding.Work, tasks: Sequence[sharding.Task], tell: Callable[[int], None]) -> None:
        for task in tasks[:count]:
            work(task)
        raise Stopped

    return run


def counting(done: list[str]) -> sharding.Runner:
    """A runner that notes what it is given, and pickles it as one that sends it elsewhere would."""

    def run(work: sharding.Work, tasks: Sequence[sharding.Task], tell: Callable[[int], None]) -> None:
        there = pickle.loads(pickle.dumps(work))
        for task in tasks:
            done.append(task.name)
            there(pickle.loads(pickle.dumps(task)))
            tell(sharding.rows_done(work.folder, tasks))

    return run


@pytest.fixture
def photos(tmp_path: Path, write_pictures) -> Data:
    write_pictures(tmp_path / "photos", {"cat": 40, "dog": 40})
    return Data(source="folder", path=str(tmp_path / "photos"), shard_bytes=2500)


def files(folder: Path) -> dict[str, str]:
    return {path.name: sha256_file(path) for path in folder.iterdir()}


def test_a_stopped_call_is_gone_on_with(tmp_path, photos):
    whole = shards.write_dataset(photos, tmp_path / "whole")
    assert len(whole.splits["train"]["shards"]) > 4
    with pytest.raises(Stopped):
        shards.write_dataset(photos, tmp_path / "out", run=stops_after(3))
    assert not (tmp_path / "out").exists()
    done: list[str] = []
    seen: list[tuple[int, int]] = []
    shards.write_dataset(photos, tmp_path / "out", lambda *at: seen.append(at), counting(done))
    assert done[0] == "train-00003"
    assert len(done) == sum(len(split["shards"]) for split in whole.splits.values()) - 3
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    assert seen[-1] == (80, 80)
    assert seen[0][0] > sum(shard["rows"] for shard in whole.splits["train"]["shards"][:3])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "photos", "whole"]


@pytest.mark.parametrize("change", ["job", "picture"])
def test_another_source_or_job_is_begun_anew(tmp_path, photos, change):
    with pytest.raises(Stopped):
        shards.write_dataset(photos, tmp_path / "out", run=stops_after(3))
    if change == "job":
        photos = photos.model_copy(update={"resize": 6})
    else:
        (tmp_path / "photos" / "cat" / "000.png").unlink()
    done: list[str] = []
    shards.write_dataset(photos, tmp_path / "out", run=counting(done))
    assert done[0] == "train-00000"


def test_a_shard_without_its_note_is_written_again(tmp_path, photos):
    with pytest.raises(Stopped):
        shards.write_dataset(photos, tmp_path / "out", run=stops_after(3))
    (tmp_path / ".out.part" / "task-train-00001.json").unlink()
    (tmp_path / ".out.part" / ".train-00001.parquet").write_bytes(b"torn")
    done: list[str] = []
    shards.write_dataset(photos, tmp_path / "out", run=counting(done))
    assert done[:2] == ["train-00001", "train-00003"]
    assert not [name for name in files(tmp_path / "out") if name.startswith((".", "task", "rows", "plan"))]


def staged(tmp_path: Path, photos: Data) -> Path:
    with pytest.raises(Stopped):
        shards.write_dataset(photos, tmp_path / "out", run=stops_after(3))
    return tmp_path / ".out.part"


@pytest.mark.parametrize(
    "harm",
    [
        lambda part: (part / "train-00001.parquet").unlink(),
        lambda part: (part / "train-00001.parquet").write_bytes(b"PAR1"),
        lambda part: (part / "task-train-00001.json").write_text("{"),
        lambda part: (part / "task-train-00001.json").write_text("[]"),
    ],
    ids=["shard gone", "shard torn", "note torn", "note is a list"],
)
def test_a_task_is_done_only_if_its_note_and_shard_are_whole(tmp_path, photos, harm):
    harm(staged(tmp_path, photos))
    done: list[str] = []
    shards.write_dataset(photos, tmp_path / "out", run=counting(done))
    assert done[:2] == ["train-00001", "train-00003"]
    shards.load_manifest(tmp_path / "out", check_hashes=True)


@pytest.mark.parametrize("plan", ["{", "\0", None])
def test_litter_in_the_hidden_folder_is_removed(tmp_path, photos, plan):
    part = staged(tmp_path, photos)
    (part / "folder").mkdir()
    (part / "train-00099.parquet").write_bytes(b"foreign")
    if plan is None:
        (part / "plan.json").unlink()
    else:
        (part / "plan.json").write_text(plan)
    manifest = shards.write_dataset(photos, tmp_path / "out")
    shards_named = {shard["name"] for split in manifest.splits.values() for shard in split["shards"]}
    assert {path.name for path in manifest.path.iterdir()} == shards_named | {"dataset.json", "quarantine.jsonl"}


def test_a_place_that_cannot_take_the_final_name_is_refused_first(tmp_path, photos):
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with pytest.raises(DataError, match="a link to nothing"):
        shards.write_dataset(photos, tmp_path / "link")


def test_a_source_that_fails_on_the_way_costs_only_what_was_not_done(tmp_path, photos):
    def fails(work: sharding.Work, tasks: Sequence[sharding.Task], tell: Callable[[int], None]) -> None:
        for task in tasks[:2]:
            work(task)
        raise DataError("data.path: the server is gone")

    with pytest.raises(DataError, match="the server is gone"):
        shards.write_dataset(photos, tmp_path / "out", run=fails)
    done: list[str] = []
    shards.write_dataset(photos, tmp_path / "out", run=counting(done))
    assert done[0] == "train-00002"


def test_what_can_not_be_mended_by_going_on_leaves_nothing(tmp_path, photos):
    for i in range(5):
        (tmp_path / "photos" / "cat" / f"{i:03d}.png").write_text("no picture")
    with pytest.raises(DataError, match="5 of 80 pictures can't be read"):
        shards.write_dataset(photos, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.quarantine.jsonl", "photos"]


def test_two_calls_at_once_make_one_dataset(tmp_path, photos):
    done: list[str] = []

    def slow(work: sharding.Work, tasks: Sequence[sharding.Task], tell: Callable[[int], None]) -> None:
        time.sleep(0.3)
        counting(done)(work, tasks, tell)

    found: list[str] = []

    def prepare() -> None:
        found.append(shards.prepare(photos, tmp_path / "runs", run=slow).hash)

    threads = [threading.Thread(target=prepare) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3
    assert len(set(found)) == 1
    assert len(done) == len(set(done))


def test_train_is_shuffled_over_its_shards_and_the_others_keep_their_order(photos):
    source = sources.open_source(photos)
    tasks = sharding.plan(source, photos)
    train = [task for task in tasks if task.split == "train"]
    assert all(0 < sum(row.label for row in task.rows) < len(task.rows) for task in train[:-1])  # both classes in each
    names = [row.origin for task in tasks if task.split == "test" for row in task.rows]
    assert names == sorted(names)
    rows = [row.key for task in tasks for row in task.rows]
    assert sorted(map(str, rows)) == sorted(str(row.key) for row in source.rows)


def test_rows_of_a_block_stay_in_one_piece(tmp_path):
    rows = [sources.Row(f"r{i}", i % 2, "train", i, 10) for i in range(100)]
    rows += [sources.Row(f"{split}{i}", i % 2, split, f"{split}{i}", 10) for split in ("val", "test") for i in range(4)]
    source = sources.Source(["a", "b"], rows, lambda wanted: iter(()), block=lambda row: row.key // 10)  # type: ignore[operator]
    tasks = sharding.plan(source, Data(shard_bytes=1024))
    [train] = [task for task in tasks if task.split == "train"]
    assert [row.key for row in train.rows] == list(range(100))  # read in the order of the source
    tasks = sharding.plan(source, Data(shard_bytes=1024).model_copy(update={"shard_bytes": 200}))
    blocks = [[row.key // 10 for row in task.rows] for task in tasks if task.split == "train"]
    assert [len(set(found)) for found in blocks] == [2] * 5
    assert blocks != sorted(blocks)


def test_row_groups_are_small_enough_to_be_read_at_once(tmp_path, monkeypatch, write_pictures):
    write_pictures(tmp_path / "photos", {"cat": 30, "dog": 30})
    monkeypatch.setattr(sharding, "GROUP_BYTES", 2000)
    cfg = Data(source="folder", path=str(tmp_path / "photos"))
    manifest = shards.write_dataset(cfg, tmp_path / "out")
    [shard] = manifest.splits["train"]["shards"]
    assert sum(shard["groups"]) == shard["rows"] == 48
    assert len(shard["groups"]) > 3
    assert np.ptp(shard["groups"][:-1]) == 0
