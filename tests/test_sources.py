"""Sources: the same pictures from a folder, S3 or memory, in any order, in any process; and plain picture files."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import socket
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cloudpickle
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest
from PIL import Image

from raydeep.data import decode, files, shards, sources
from raydeep.errors import DataError
from raydeep.fields import SOURCES
from raydeep.sections import Data

RNG = np.random.default_rng(1)
CLASSES = ["ant", "bee", "cat"]


def encode(pixels: np.ndarray | Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    out = io.BytesIO()
    (pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)).save(out, kind, **options)
    return out.getvalue()


def noise(*shape: int) -> np.ndarray:
    return RNG.integers(0, 256, shape, np.uint8)


PICTURES = [encode(noise(6 + i % 3, 7, 3)) for i in range(18)]
LABELS = [CLASSES[i % 3] for i in range(18)]


def tar(members: dict[str, bytes], **options: Any) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", **options) as made:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            made.addfile(info, io.BytesIO(data))
    return out.getvalue()


def parquet_bytes(columns: dict[str, Any], **options: Any) -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.table(columns), out, **options)
    return out.getvalue()


# each source as files: path → bytes, with the pictures of PICTURES in order


def as_folder() -> dict[str, bytes]:
    return {f"{label}/{i:02d}.png": data for i, (label, data) in enumerate(zip(LABELS, PICTURES, strict=True))}


def as_images() -> dict[str, bytes]:
    lines = [f"all/{i:02d}.png,{label},train" for i, label in enumerate(LABELS)]
    found = {f"all/{i:02d}.png": data for i, data in enumerate(PICTURES)}
    return {**found, "labels.csv": "\n".join(["image,label,split", *lines]).encode()}


def as_parquet() -> dict[str, bytes]:
    def part(a: int, b: int) -> bytes:
        return parquet_bytes({"image": PICTURES[a:b], "label": LABELS[a:b]}, row_group_size=4)

    return {"a.parquet": part(0, 9), "b.parquet": part(9, 18)}


def as_webdataset() -> dict[str, bytes]:
    def part(a: int, b: int) -> bytes:
        return tar({f"{i:02d}.{kind}": data for i in range(a, b) for kind, data in member(i)})

    def member(i: int) -> list[tuple[str, bytes]]:
        return [("png", PICTURES[i]), ("cls", LABELS[i].encode())]

    return {"a.tar": part(0, 9), "b.tar": part(9, 18)}


KINDS: dict[str, Callable[[], dict[str, bytes]]] = {
    "folder": as_folder,
    "images": as_images,
    "parquet": as_parquet,
    "webdataset": as_webdataset,
}


@pytest.fixture
def s3(s3_server: pafs.S3FileSystem, new_bucket: Callable[[], str]) -> Callable[[dict[str, bytes]], str]:
    """Puts files into a bucket of a local S3 server of its own; gives the address."""

    def put(contents: dict[str, bytes]) -> str:
        bucket = new_bucket()
        for path, data in contents.items():
            with s3_server.open_output_stream(f"{bucket}/some/set/{path}") as out:
                out.write(data)
        return f"s3://{bucket}/some/set"

    return put


@pytest.fixture
def put(tmp_path: Path, request: pytest.FixtureRequest) -> Callable[[str, dict[str, bytes]], str]:
    """Writes files to a place (local, s3 or memory) and gives its address."""

    def write(place: str, contents: dict[str, bytes]) -> str:
        if place == "s3":
            return str(request.getfixturevalue("s3")(contents))
        root = f"memory://{tmp_path.name}/set" if place == "memory" else str(tmp_path / "set")
        system = fsspec.filesystem("memory" if place == "memory" else "file")
        for path, data in contents.items():
            system.makedirs(f"{root}/{path}".rpartition("/")[0], exist_ok=True)
            system.pipe_file(f"{root}/{path}", data)
        return root

    return write


def refusal(cfg: Data) -> str:
    with pytest.raises(DataError) as caught:
        sources.open_source(cfg)
    return str(caught.value)


# the contract


def test_the_job_and_the_code_know_the_same_sources():
    assert sorted(sources.SOURCES) == sorted(SOURCES)


@pytest.mark.parametrize("place", ["local", "s3", "memory"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_source_gives_the_same_pictures_from_every_place(put, kind, place):
    source = sources.open_source(Data(source=kind, path=put(place, KINDS[kind]())))
    assert source.classes == CLASSES
    assert len({row.key for row in source.rows}) == 18
    found = list(source.read(source.rows))
    wanted = {hashlib.sha256(data).digest(): CLASSES.index(label) for data, label in zip(PICTURES, LABELS, strict=True)}
    assert {hashlib.sha256(data).digest(): row.label for data, row in zip(found, source.rows, strict=True)} == wanted
    for row, data in zip(source.rows, found, strict=True):
        assert row.split == ("train" if kind == "images" else None)
        assert abs(row.nbytes - len(data)) <= (600 if kind == "parquet" else 0)  # 600: what pages hold besides
    again = sources.open_source(Data(source=kind, path=source_address(source)))
    assert again.rows == source.rows


def source_address(source: sources.Source) -> str:
    return source.read.args[0].address  # type: ignore[attr-defined]


def digest(pictures: Any) -> list[str]:
    return [hashlib.sha256(np.ascontiguousarray(p) if isinstance(p, np.ndarray) else p).hexdigest() for p in pictures]


def test_a_source_reads_any_rows_in_any_order_in_another_process(put, tmp_path):
    cfgs = [Data(source=kind, path=put("s3", make())) for kind, make in KINDS.items()]
    cfgs.append(Data(source="webdataset", path=put("local", as_webdataset())))
    cfgs += [Data(), Data(source="synthetic", rows=20)]
    write_mnist(tmp_path / "mnist")
    cfgs.append(Data(source="torchvision:MNIST", path=str(tmp_path / "mnist")))
    todo, wanted = [], []
    for cfg in cfgs:
        source = sources.open_source(cfg)
        order = RNG.permutation(len(source.rows))[:11]
        rows = [source.rows[i] for i in order]
        whole = digest(source.read(source.rows))
        wanted.append([whole[i] for i in order])
        assert pickle.loads(pickle.dumps(source)).rows == source.rows
        todo.append((sources.Source(source.classes, [], source.read, source.block), rows))
    (tmp_path / "todo").write_bytes(cloudpickle.dumps(todo))
    code = (
        "import sys, pickle, hashlib, json, numpy as np\n"
        "todo = pickle.load(open(sys.argv[1], 'rb'))\n"
        "assert 'ray' not in sys.modules\n"
        "one = lambda p: hashlib.sha256(np.ascontiguousarray(p) if isinstance(p, np.ndarray) else p).hexdigest()\n"
        "print(json.dumps([[one(p) for p in source.read(rows)] for source, rows in todo]))"
    )
    said = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "todo")], capture_output=True, text=True, check=False
    )
    assert said.returncode == 0, said.stderr
    assert json.loads(said.stdout) == wanted


def test_pictures_are_read_one_at_a_time_and_row_groups_once(put, monkeypatch):
    source = sources.open_source(Data(source="folder", path=put("local", as_folder())))
    seen: list[str] = []
    opened = files.Files.open
    monkeypatch.setattr(files.Files, "open", lambda self, path: [seen.append(path), opened(self, path)][1])
    reading = source.read(source.rows)
    next(reading)
    assert len(seen) == 1
    source = sources.open_source(Data(source="parquet", path=put("local", as_parquet())))
    assert source.block is not None
    blocks = [source.block(row) for row in source.rows]
    assert blocks == sorted(blocks)
    assert [blocks.count(block) for block in dict.fromkeys(blocks)] == [4, 4, 1] * 2
    groups: list[int] = []
    read_group = pq.ParquetFile.read_row_group
    monkeypatch.setattr(
        pq.ParquetFile, "read_row_group", lambda self, i, **kw: [groups.append(i), read_group(self, i, **kw)][1]
    )
    list(source.read(source.rows[2:11]))
    assert groups == [0, 1, 2, 0]


def test_indexing_resolves_links_only(put, monkeypatch):
    root = put("local", as_folder())
    calls: list[str] = []
    real = os.path.realpath
    monkeypatch.setattr(os.path, "realpath", lambda path, **kw: [calls.append(path), real(path, **kw)][1])
    assert len(sources.open_source(Data(source="folder", path=root)).rows) == 18
    assert len(calls) <= 1


@pytest.mark.parametrize("place", ["local", "s3", "memory"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_fingerprint_changes_with_the_files(put, kind, place):
    contents = KINDS[kind]()
    address = put(place, contents)
    cfg = Data(source=kind, path=address)
    first = sources.fingerprint(cfg)
    assert json.loads(json.dumps(first)) == first
    assert sources.fingerprint(cfg) == first
    name = next(iter(contents))
    if place == "s3":
        with files._arrow(address)[0].open_output_stream(f"{address[5:]}/{name}") as out:
            out.write(b"changed")
    else:
        put(place, {name: b"changed"})
    assert sources.fingerprint(cfg) != first


def test_what_is_made_needs_no_fingerprint():
    assert sources.fingerprint(Data()) == sources.fingerprint(Data(source="synthetic")) == []


@pytest.mark.parametrize("kind", KINDS)
def test_shards_from_a_bucket_are_those_from_a_folder(put, tmp_path, kind):
    contents = KINDS[kind]()
    hashes = []
    for place in ("local", "s3"):
        cfg = Data(source=kind, path=put(place, contents), val_fraction=0.2, test_fraction=0.2)
        manifest = shards.write_dataset(cfg, tmp_path / place)
        assert (manifest.classes, sum(map(manifest.rows, sources.SPLITS))) == (CLASSES, 18)
        hashes.append(manifest.hash)
    assert hashes[0] == hashes[1]


# addresses


def test_a_bucket_or_folder_that_is_not_there_is_told(s3):
    known = s3({"ant/1.png": PICTURES[0]})
    for address in ("s3://no-such-bucket/x", f"{known}/nothing"):
        message = refusal(Data(source="folder", path=address))
        assert message == f"data.path: {address}: no such bucket or folder; check the address"
    message = refusal(Data(source="folder", path=f"{known}/ant/1.png"))
    assert message == f"data.path: {known}/ant/1.png is a file; give the folder that holds it"


def test_a_server_that_is_not_there_is_told_within_seconds(monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"s3://b/x?scheme=http&endpoint_override=127.0.0.1:{unused.getsockname()[1]}"
        start = time.monotonic()
        message = refusal(Data(source="folder", path=address))
    assert time.monotonic() - start < 15
    assert message.startswith("data.path: s3://b/x can't be read: ")
    assert "check the address, the credentials in the environment and the network" in message


def test_an_endpoint_may_stand_in_the_address(s3, monkeypatch):
    address = s3(as_folder())
    endpoint = os.environ["AWS_ENDPOINT_URL"].removeprefix("http://")
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    cfg = Data(source="folder", path=f"{address}/?scheme=http&endpoint_override={endpoint}")
    source = sources.open_source(cfg)
    assert next(source.read(source.rows[:1])) == PICTURES[0]


def test_a_source_of_files_needs_a_path():
    for kind in KINDS:
        assert refusal(Data(source=kind)).startswith("data.path: this source needs a folder; give one with --set")
    assert refusal(Data(source="torchvision:MNIST")).startswith("torchvision:MNIST: needs data.path")


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("s3://key:secret@bucket/x", "credentials belong into the environment, not into a job"),
        ("s3://bucket/x?secret_key=abc", "credentials belong into the environment, not into a job"),
        ("nosuch://bucket/x", "expected a folder, s3://, gs:// or a scheme of fsspec"),
        ("az://bucket/x", "az:// needs a package that is missing: "),
        ("memory://nothing/there", "memory://nothing/there: no such bucket or folder"),
        ("s3:///x", "names no bucket; expected s3://BUCKET/FOLDER"),
        ("file:///no/such/folder", "/no/such/folder is not a folder"),
    ],
)
def test_addresses_that_are_none(address, message):
    found = refusal(Data(source="folder", path=address))
    assert found.startswith("data.path: ")
    assert message in found
    assert "secret@" not in found
    assert "abc" not in found


def test_a_file_address_is_a_folder(put):
    root = put("local", as_folder())
    assert len(sources.open_source(Data(source="folder", path=f"file://{root}")).rows) == 18


def test_a_picture_that_went_away_is_told_apart_from_a_server_that_did(put, s3, monkeypatch):
    for place in ("local", "s3"):
        source = sources.open_source(Data(source="folder", path=put(place, as_folder())))
        gone = source.rows[0]._replace(key="ant/gone.png")
        assert str(next(source.read([gone]))) == "no such file"
    monkeypatch.setattr(files, "_arrow", lambda address: (None, "bucket"))
    reading = source.read(source.rows[:1])
    with pytest.raises(DataError, match=r"^data\.path: s3://.* can't be read: "):
        next(reading)


# label tables


def test_a_table_gives_paths_labels_and_splits(put):
    words = ["train", "val", "test"]
    lines = [{"file": f"all/{i:02d}.png", "kind": i % 3, "part": words[i // 6]} for i in range(18)]
    contents = {
        **as_images(),
        "meta.jsonl": "\n".join(map(json.dumps, lines)).encode(),
        "classes.json": b'["x","y","z"]',
    }
    root = put("local", contents)
    keys = {"image_column": "file", "label_column": "kind", "split_column": "part"}
    source = sources.open_source(Data(source="images", path=root, labels="meta.jsonl", **keys))
    assert source.classes == ["x", "y", "z"]
    assert [(row.label, row.split) for row in source.rows] == [(i % 3, words[i // 6]) for i in range(18)]
    assert list(source.read(source.rows)) == PICTURES
    assert "holds 2 tables (labels.csv, meta.jsonl)" in refusal(Data(source="images", path=root))


@pytest.mark.parametrize(
    "labels", [LABELS, [CLASSES.index(label) for label in LABELS], pa.array(LABELS).dictionary_encode()]
)
def test_a_parquet_table_of_labels(put, labels):
    paths = [f"all/{i:02d}.png" for i in range(18)]
    contents = {k: v for k, v in as_images().items() if k != "labels.csv"}
    root = put("local", {**contents, "labels.parquet": parquet_bytes({"image": paths, "label": labels})})
    source = sources.open_source(Data(source="images", path=root))
    assert [row.label for row in source.rows] == [CLASSES.index(label) for label in LABELS]
    assert {row.split for row in source.rows} == {None}


# tar files


def test_splits_of_tars_come_from_names_or_folders(put):
    parts = as_webdataset()
    for first, second in (("train-0.tar", "test-0.tar"), ("train/0.tar", "test/0.tar")):
        root = put("local", {first: parts["a.tar"], second: parts["b.tar"]})
        source = sources.open_source(Data(source="webdataset", path=root))
        found = {row.key[0]: row.split for row in source.rows}
        assert found[first] == "train"
        assert found[second] == "test"


def test_labels_of_tars_are_cls_json_or_txt(put, tmp_path):
    root = put(
        "local",
        {
            "a.tar": tar({"1.png": PICTURES[0], "1.cls": b"1\n", "1.json": b"{}", "1.txt": b"a caption"}),
            "b.tar": tar({"2.json": b'{"label": 0}', "2.png": PICTURES[1]}),
            "classes.json": b'["no", "yes"]',
        },
    )
    message = refusal(Data(source="webdataset", path=root))
    assert "a.tar key '1': label '1'; expected integers from 0" in message or "strings" in message
    (Path(root) / "b.tar").write_bytes(tar({"2.txt": b"0", "2.png": PICTURES[1], "2.left.png": b"another view"}))
    source = sources.open_source(Data(source="webdataset", path=root))
    assert [(row.origin, row.label) for row in source.rows] == [("a.tar#1", 1), ("b.tar#2", 0)]
    assert source.classes == ["no", "yes"]
    assert list(source.read(source.rows[::-1])) == PICTURES[1::-1]
    assert {path.name for path in Path(root).iterdir()} == {"a.tar", "b.tar", "classes.json"}  # nothing is unpacked


@pytest.mark.parametrize("style", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_long_and_unicode_names_in_tars(put, style):
    folder = "é" * 30 if style != tarfile.USTAR_FORMAT else "e"
    names = [f"{folder}/{'x' * 90}{i}" for i in range(2)]
    members = {
        f"{name}.{kind}": data
        for i, name in enumerate(names)
        for kind, data in (("png", PICTURES[i]), ("cls", b"%d" % i))
    }
    source = sources.open_source(Data(source="webdataset", path=put("local", {"a.tar": tar(members, format=style)})))
    assert [row.origin for row in source.rows] == [f"a.tar#{name}" for name in names]
    assert list(source.read(source.rows)) == PICTURES[:2]


# torchvision


def write_mnist(root: Path, name: str = "MNIST") -> None:
    """Raw idx files as torchvision keeps them."""
    raw = root / name / "raw"
    raw.mkdir(parents=True)
    for part, count in (("train", 12), ("t10k", 4)):
        images, labels = noise(count, 28, 28), np.arange(count, dtype=np.uint8) % 10
        head = b"\0\0\x08\x03" + b"".join(n.to_bytes(4, "big") for n in images.shape)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(head + images.tobytes())
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(b"\0\0\x08\x01" + count.to_bytes(4, "big") + labels.tobytes())


@pytest.mark.parametrize("name", ["MNIST", "FashionMNIST"])
def test_mnist_is_read_from_its_raw_files(tmp_path, name):
    write_mnist(tmp_path, name)
    source = sources.open_source(Data(source=f"torchvision:{name}", path=str(tmp_path)))
    assert [row.split for row in source.rows] == ["train"] * 12 + ["test"] * 4
    assert [row.label for row in source.rows] == [i % 10 for i in (*range(12), *range(4))]
    assert (source.classes[0], len(source.classes)) == ({"MNIST": "0 - zero", "FashionMNIST": "T-shirt/top"}[name], 10)
    raw = (tmp_path / name / "raw" / "t10k-images-idx3-ubyte").read_bytes()[16:]
    [last] = source.read(source.rows[-1:])
    assert last.tobytes() == raw[-784:]
    assert source.rows[0].nbytes == 784


def test_cifar_is_read_from_its_batches(tmp_path, monkeypatch):
    from torchvision.datasets import CIFAR10

    folder = tmp_path / CIFAR10.base_folder
    folder.mkdir()

    def batch(name: str, content: dict[str, Any]) -> list[str]:
        data = pickle.dumps(content)
        (folder / name).write_bytes(data)
        return [name, hashlib.md5(data).hexdigest()]

    pixels = {name: noise(10, 3 * 32 * 32) for name in ("data_batch_1", "test_batch")}
    made = {name: batch(name, {"data": data, "labels": list(range(10))}) for name, data in pixels.items()}
    _, md5 = batch("batches.meta", {"label_names": [f"class {i}" for i in range(10)]})
    monkeypatch.setattr(CIFAR10, "train_list", [made["data_batch_1"]])
    monkeypatch.setattr(CIFAR10, "test_list", [made["test_batch"]])
    monkeypatch.setattr(CIFAR10, "meta", {"filename": "batches.meta", "key": "label_names", "md5": md5})
    source = sources.open_source(Data(source="torchvision:CIFAR10", path=str(tmp_path)))
    assert (source.classes[3], [row.label for row in source.rows]) == ("class 3", [*range(10)] * 2)
    found = np.stack(list(source.read(source.rows[10:])))
    assert np.array_equal(found, pixels["test_batch"].reshape(10, 3, 32, 32).transpose(0, 2, 3, 1))


def test_fake_data_is_asked_for_its_labels(monkeypatch):
    from torchvision import datasets

    class Tiny(datasets.FakeData):
        def __init__(self) -> None:
            super().__init__(12, (3, 8, 8), 3)

    monkeypatch.setattr(datasets, "Tiny", Tiny, raising=False)
    source = sources.open_source(Data(source="torchvision:Tiny"))
    assert len(source.rows) == 12
    assert next(source.read(source.rows)).shape == (8, 8, 3)
    assert {row.split for row in source.rows} == {None}


def test_image_folders_give_the_files_as_they_are(put):
    cfg = Data(source="torchvision:ImageFolder", path=put("local", as_folder()))
    source = sources.open_source(cfg)
    assert source.classes == CLASSES
    assert sorted(source.read(source.rows)) == sorted(PICTURES)
    assert [row.nbytes for row in source.rows] == [len(data) for data in source.read(source.rows)]
    first = sources.fingerprint(cfg)
    put("local", {"ant/new.png": PICTURES[0]})
    assert sources.fingerprint(cfg) != first


def test_a_dataset_is_fetched_only_if_the_job_says_so(tmp_path, monkeypatch):
    from torchvision.datasets import MNIST

    cfg = Data(source="torchvision:MNIST", path=str(tmp_path))
    message = refusal(cfg)
    assert message.startswith(f"torchvision:MNIST: not to be read in {tmp_path}: ")
    assert message.endswith("fetch it with --download (or --set data.download=true)")
    monkeypatch.setattr(MNIST, "download", lambda self: None if self._check_exists() else write_mnist(tmp_path))
    facts = sources.fingerprint(cfg)
    assert len(sources.open_source(cfg.model_copy(update={"download": True})).rows) == 16
    assert sources.fingerprint(cfg) == facts


class Boxes:
    """What a detection dataset's targets look like."""


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("FashionMINST", "did you mean torchvision:FashionMNIST?"),
        ("Nothing", "torchvision.datasets has no such class"),
        ("CocoDetection", "needs annFile: no classification dataset that a job can name"),
        ("EMNIST", "its splits are none of train, val and test"),
        ("Boxes", "Boxes row 0: its target is a dict; expected a class number"),
        ("Masks", "Masks row 0: its target is a Image; expected a class number"),
        ("Wrong", "Wrong row 1: label -1; expected integers from 0, or strings"),
        ("Yes", "Yes row 0: its target is a bool; expected a class number"),
        ("Secret", "Secret: all labels are the same; expected 2 or more classes"),
    ],
)
def test_what_is_no_classification_dataset_is_refused(monkeypatch, tmp_path, name, message):
    from torchvision import datasets

    picture = Image.new("L", (4, 4))
    for key, targets in (
        ("Boxes", [{"boxes": []}]),
        ("Masks", [picture]),
        ("Wrong", [0, -1, 1]),
        ("Yes", [True]),
        ("Secret", [None]),
    ):

        def init(self: Any, targets: list[Any] = targets) -> None:
            self.given = targets

        parts = {
            "__init__": init,
            "__len__": lambda self: len(self.given),
            "__getitem__": lambda self, i: (picture, self.given[i]),
        }
        monkeypatch.setattr(datasets, key, type(key, (datasets.VisionDataset,), parts), raising=False)
    assert message in refusal(Data(source=f"torchvision:{name}", path=str(tmp_path)))


# links in folders


def test_links_within_the_root_are_followed_and_dangling_ones_stay_rows(put):
    root = Path(put("local", as_folder()))
    (root / "ant" / "again.png").symlink_to(root / "ant" / "00.png")
    (root / "bee" / "gone.png").symlink_to(root / "nowhere.png")
    (root / "bee" / "self.png").symlink_to(root / "bee" / "self.png")
    (root / "dog").symlink_to(root / "cat")
    source = sources.open_source(Data(source="folder", path=str(root)))
    found = dict(zip([row.origin for row in source.rows], source.read(source.rows), strict=True))
    assert found["ant/again.png"] == PICTURES[0]
    assert str(found["bee/gone.png"]) == "no such file"
    assert str(found["bee/self.png"]).startswith("can't be read: Too many levels")
    assert found["dog/02.png"] == PICTURES[2]
    (root / "cat" / "loop").symlink_to(root)
    assert "cat/loop: a link to a folder that holds it; remove it" in refusal(Data(source="folder", path=str(root)))


def test_a_pipe_is_not_waited_for(put):
    root = Path(put("local", as_images()))
    os.mkfifo(root / "pipe.png")
    (root / "labels.csv").write_text("image,label\nall/00.png,a\npipe.png,b\nall,c\n")
    source = sources.open_source(Data(source="images", path=str(root)))
    assert [str(p) for p in list(source.read(source.rows))[1:]] == ["can't be read: not a regular file"] * 2


def test_names_that_are_no_text_are_shown(put):
    root = Path(put("local", as_folder()))
    (root / "ant" / os.fsdecode(b"\xff.png")).write_bytes(PICTURES[0])
    source = sources.open_source(Data(source="folder", path=str(root)))
    row = next(row for row in source.rows if "xff" in row.origin)
    assert row.origin == "ant/\\xff.png"
    assert list(source.read([row])) == [PICTURES[0]]
    json.dumps(sources.fingerprint(Data(source="folder", path=str(root)))).encode()


# plain pictures and geometry


def fast(data: bytes, image: Image.Image) -> np.ndarray:
    from kornia_rs import io as kio

    mode = "mono" if image.mode == "L" else "rgb"
    if data[:2] == b"\xff\xd8":
        return kio.decode_image_jpegturbo(data, mode)
    return kio.decode_image_png_u8(data, (image.height, image.width), mode)


SMOOTH = np.asarray(Image.fromarray(noise(5, 7, 3)).resize((45, 37), Image.Resampling.BICUBIC))
UPRIGHT = Image.Exif()
UPRIGHT[0x0112] = 1
TURNED = Image.Exif()
TURNED[0x0112] = 6


@pytest.mark.parametrize(
    ("data", "kept"),
    [
        (encode(SMOOTH), True),
        (encode(SMOOTH[:, :, 0]), True),
        (encode(SMOOTH, optimize=True, dpi=(72, 72), exif=UPRIGHT), True),
        *((encode(SMOOTH, "JPEG", quality=q, subsampling=s), True) for q in (30, 75, 95) for s in (0, 1, 2)),
        *((encode(SMOOTH[:h, :w], "JPEG"), True) for h, w in ((1, 1), (1, 9), (7, 8), (17, 31))),
        (encode(SMOOTH, "JPEG", progressive=True), True),
        (encode(SMOOTH, "JPEG", optimize=True, restart_marker_rows=1), True),
        (encode(SMOOTH[:, :, 0], "JPEG"), True),
        (encode(SMOOTH[:, :, 0], "JPEG", progressive=True), True),
        (encode(SMOOTH, "JPEG", keep_rgb=True), True),
        (encode(SMOOTH, "JPEG", exif=UPRIGHT, icc_profile=b"x" * 200), True),
        (encode(SMOOTH, "JPEG", exif=TURNED), False),
        (encode(Image.fromarray(SMOOTH).convert("CMYK"), "JPEG"), False),
        (encode(Image.fromarray(SMOOTH).quantize(16)), False),
        (encode(Image.fromarray(SMOOTH).convert("RGBA")), False),
        (encode(Image.fromarray(SMOOTH).convert("1")), False),
        (encode(SMOOTH[:, :, 0].astype(np.uint16) * 257), False),
        (encode(SMOOTH, exif=TURNED), False),
        (encode(Image.fromarray(SMOOTH), transparency=(1, 2, 3)), False),
        (encode(SMOOTH, save_all=True, append_images=[Image.fromarray(SMOOTH[::-1].copy())]), False),
        (encode(SMOOTH, "WEBP"), False),
        (encode(SMOOTH, "BMP"), False),
        (encode(SMOOTH, "TIFF"), False),
        (encode(SMOOTH, "GIF"), False),
    ],
)
def test_plain_files_are_the_same_to_every_decoder(data, kept):
    image, plain = decode.read_picture(data)
    assert (plain == data) == kept
    assert np.array_equal(np.asarray(image), np.asarray(decode.open_picture(data)))
    assert np.array_equal(np.asarray(decode.open_picture(plain)), np.asarray(image))
    assert np.array_equal(fast(plain, image).squeeze(), np.asarray(image).squeeze())


@pytest.mark.parametrize(
    ("height", "width", "size"), [(40, 61, 16), (61, 40, 24), (33, 33, 8), (7, 9, 20), (200, 31, 31)]
)
@pytest.mark.parametrize("mode", ["grey", "rgb"])
def test_pictures_are_cropped_and_scaled_as_torch_does_it(height, width, size, mode):
    import torch

    pixels = noise(height, width) if mode == "grey" else noise(height, width, 3)
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = pixels[top : top + side, left : left + side].reshape(side, side, -1)
    batch = torch.from_numpy(square.copy()).permute(2, 0, 1)[None]
    wanted = torch.nn.functional.interpolate(batch, (size, size), mode="bilinear", antialias=True)[0]
    found = decode.to_pixels(Image.fromarray(pixels), mode, size)
    assert found.shape == (size, size, 1 if mode == "grey" else 3)
    assert np.abs(found.astype(int) - wanted.permute(1, 2, 0).numpy().astype(int)).max() <= 1
