"""Storage in a bucket, against a local S3 server: two nodes are two cache folders."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pyarrow.fs as pafs
import pytest

from raydeep import mirror, remote
from raydeep.config import parse_sets
from raydeep.disk import append_line, read_json, read_lines, write_bytes
from raydeep.errors import JobError, RaydeepError, StorageError
from raydeep.run import Run


def write(path: Path, data: bytes) -> Path:
    write_bytes(path, data)
    return path


# addresses


@pytest.mark.parametrize(
    "text",
    [
        "s3://bucket", "s3://bucket/a/b%20c", "gs://bucket/x", "s3://b/x?region=eu-west-1",
        "s3://b/x?endpoint_override=127.0.0.1:9000&scheme=http",
    ],
)  # fmt: skip
def test_an_address_is_a_path_and_back(on, text):
    path = mirror.place(text)
    assert path.is_relative_to(mirror.cache())
    assert mirror.name(path) == text
    below = mirror.place(mirror.name(path / "run-1" / "models"))
    assert below == path / "run-1" / "models"


def test_a_path_stays_a_path(on, tmp_path):
    assert mirror.place("runs") == Path("runs")
    for path in (Path("runs"), tmp_path / "runs", mirror.cache().parent / "runs", mirror.cache() / "s3"):
        assert mirror.address(path) is None
        assert mirror.name(path) == str(path)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("s3://KEY:hunter2@bucket/x", "AWS_ACCESS_KEY_ID"),
        ("s3://KEY:hun/ter2@bucket/x", "AWS_ACCESS_KEY_ID"),
        ("s3://bucket/x?secret_key=hunter2", "AWS_ACCESS_KEY_ID"),
        ("s3:///x", "names no bucket"),
        ("s3://bucket/a/../b", "has an empty part, . or .. in it"),
        ("s3://bucket/a//b", "has an empty part"),
        ("hdfs://host/x", "expected a folder, or an address that begins with s3://"),
    ],
)
def test_an_address_that_can_not_be_stored_to_is_refused_and_a_secret_not_repeated(text, why):
    for refuse in (lambda: mirror.place(text), lambda: parse_sets({}, [f"storage={text}"])):
        with pytest.raises(RaydeepError, match="storage") as caught:
            refuse()
        assert why in str(caught.value)
        for secret in ("hunter2", "ter2"):
            assert secret not in str(caught.value)


def test_a_job_takes_an_address():
    assert parse_sets({}, ["storage=s3://bucket/runs"]).storage == "s3://bucket/runs"
    with pytest.raises(JobError):
        parse_sets({}, ["storage=s3://"])


# files


def test_what_one_node_pushes_another_fetches(on, bucket):
    file = mirror.place(bucket) / "deep" / "file"
    assert not mirror.exists(file)
    assert mirror.read(file) is None
    assert not mirror.fetch(file)
    mirror.push(write(file, b"one"))
    on("b")
    other = mirror.place(bucket) / "deep" / "file"
    assert other != file
    assert mirror.exists(other)
    assert mirror.read(other) == b"one"
    assert not other.exists()
    assert mirror.fetch(other)
    assert other.read_bytes() == b"one"
    mirror.push(write(other, b"other"))
    on("a")
    assert mirror.fetch(file)
    assert file.read_bytes() == b"other"
    mirror.drop(file)
    assert not file.exists()
    assert not mirror.exists(file)
    mirror.drop(file)


@pytest.mark.parametrize("size", [0, 1, 21 * 2**20])
def test_files_of_all_sizes_come_whole(on, bucket, size):
    data = os.urandom(size)
    file = mirror.place(bucket) / "file"
    mirror.push(write(file, data))
    on("b")
    assert mirror.local(f"{bucket}/file").read_bytes() == data
    assert mirror.place(bucket).is_relative_to(mirror.cache())


def test_what_is_there_as_it_is_is_not_moved_again(on, bucket, monkeypatch):
    folder = mirror.place(bucket) / "folder"
    for name in ("x", "y/z"):
        write(folder / name, name.encode())
    mirror.push_folder(folder)
    moved: list[str] = []
    put, opened = remote.put, pafs.S3FileSystem.open_input_file
    monkeypatch.setattr(remote, "put", lambda system, key, what: (moved.append(key), put(system, key, what)))
    mirror.push_folder(folder)
    mirror.pull(folder)
    assert moved == []
    write(folder / "x", b"X")
    mirror.push_folder(folder)
    assert [key.split("/")[-1] for key in moved] == ["x"]
    assert opened is pafs.S3FileSystem.open_input_file
    on("b")
    mirror.pull(mirror.place(bucket) / "folder")
    assert (mirror.place(bucket) / "folder" / "x").read_bytes() == b"X"


def test_a_folder_is_committed_by_its_last_file(on, bucket, monkeypatch):
    folder = mirror.place(bucket) / "folder"
    for name in ("a.json", "weights", "z"):
        write(folder / name, b"1")
    order: list[str] = []
    put = remote.put

    def slow(system, key, what):
        put(system, key, what)
        order.append(key.split("/")[-1])

    monkeypatch.setattr(remote, "put", slow)
    mirror.push_folder(folder, last="a.json")
    assert order[-1] == "a.json"
    assert sorted(order) == ["a.json", "weights", "z"]


def test_hidden_files_stay_and_an_exact_pull_leaves_nothing_else(on, bucket):
    folder = mirror.place(bucket) / "folder"
    write(folder / ".lock", b"")
    write(folder / ".part" / "x", b"1")
    write(folder / "x", b"1")
    mirror.push_folder(folder)
    assert mirror.names(folder) == ["x"]
    write(folder / "stale", b"1")
    mirror.pull(folder)
    assert (folder / "stale").exists()
    mirror.pull(folder, exact=True)
    assert not (folder / "stale").exists()
    assert (folder / ".lock").exists()


def test_a_pull_takes_what_is_asked_for(on, bucket):
    folder = mirror.place(bucket) / "folder"
    for name in ("small", "big/x"):
        write(folder / name, b"1")
    mirror.push_folder(folder)
    on("b")
    folder = mirror.place(bucket) / "folder"
    mirror.pull(folder, lambda name: name == "small")
    assert [path.name for path in folder.iterdir()] == ["small"]
    assert mirror.names(folder) == ["big/x", "small"]
    mirror.drop(folder)
    assert mirror.names(folder) == []
    assert not folder.exists()


def test_lines_that_were_not_pushed_any_more_count(on, bucket):
    file = mirror.place(bucket) / "ledger.jsonl"
    append_line(file.parent.mkdir(parents=True) or file, {"a": 1})
    mirror.push(file)
    append_line(file, {"a": 2})
    mirror.fetch(file)
    assert read_lines(file) == [{"a": 1}, {"a": 2}]
    on("b")
    other = mirror.place(bucket) / "ledger.jsonl"
    mirror.fetch(other)
    append_line(other, {"a": 3})
    mirror.push(other)
    on("a")
    mirror.fetch(file)  # what others went on with counts more
    assert read_lines(file) == [{"a": 1}, {"a": 3}]


def test_a_file_that_grows_is_pushed_while_it_does(on, bucket, monkeypatch):
    monkeypatch.setattr(mirror, "PUSH_S", 0.05)
    file = mirror.place(bucket) / "ledger.jsonl"
    file.parent.mkdir(parents=True)
    seen = threading.Event()
    with mirror.kept(file):
        append_line(file, {"a": 1})
        while not seen.wait(0.02):
            if mirror.exists(file):
                seen.set()
        append_line(file, {"a": 2})
    assert mirror.read(file) == file.read_bytes()


# what goes wrong


def test_no_bucket_and_no_server_are_one_error_with_a_mend(on, s3_server, monkeypatch):
    with pytest.raises(StorageError, match=r"^storage s3://nowhere-to-be/x can't be used: ") as caught:
        mirror.check(mirror.place("s3://nowhere-to-be/x"))
    assert "AWS_ACCESS_KEY_ID" in str(caught.value)
    monkeypatch.setattr(mirror, "ATTEMPTS", 1)
    nobody = mirror.place("s3://bucket/x?endpoint_override=127.0.0.1:9&scheme=http")
    with pytest.raises(StorageError, match=r"^storage s3://bucket/x/file\?endpoint.* can't be written: "):
        mirror.push(write(nobody / "file", b"1"))
    with pytest.raises(StorageError, match="can't be read"):
        mirror.fetch(nobody / "file")


def test_an_object_that_comes_short_is_no_file(on, bucket, monkeypatch):
    file = mirror.place(bucket) / "file"
    mirror.push(write(file, b"whole"))
    on("b")
    file = mirror.place(bucket) / "file"
    system, key = remote.connect(bucket, "storage", mirror.ATTEMPTS)
    with pytest.raises(OSError, match="5 of 6 bytes came"):
        remote.get(system, f"{key}/file", file, remote.Stamp(6, 0))
    assert list(file.parent.iterdir()) == []


# runs


def test_a_run_is_opened_where_nothing_of_it_is(on, bucket, job):
    job = job.model_copy(update={"storage": bucket})
    run = Run.create(job, "raydeep search")
    assert run.name.startswith(f"{bucket}/tiny-")
    for name in ("metrics.jsonl", "models/dense/spec.json", "models/t001/spec.json", "checkpoints/step-1/state.json"):
        write(run.path / name, b"{}")
    run.note(more=1)
    run.save()
    mirror.push(run.path / "checkpoints" / "step-1" / "state.json")
    name = run.name
    on("b")
    again = Run.open(name)
    assert again.job == job
    assert again.name == name
    assert read_json(again.path / "provenance.json")["more"] == 1
    found = {str(path.relative_to(again.path)) for path in again.path.rglob("*") if path.is_file()}
    assert found == {"job.yaml", "provenance.json", "metrics.jsonl", "models/dense/spec.json"}
    mirror.pull(again.model("t001"))
    assert (again.model("t001") / "spec.json").exists()
    with pytest.raises(RaydeepError, match=rf"^{bucket}/none: not a run "):
        Run.open(f"{bucket}/none")
