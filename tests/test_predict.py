"""Prediction without Ray: what a user may name, what a row says, and how much is held."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
import tempfile
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from raydeep.data import decode, shards
from raydeep.data.rows import Row, Source
from raydeep.data.unlabelled import UNKNOWN, open_pictures
from raydeep.deploy import predict as predict_
from raydeep.deploy.predict import Model, Prediction, Reader
from raydeep.disk import check_sums
from raydeep.errors import DataError, JobError, ModelError, ResourceError
from raydeep.ops.predicting import predict
from raydeep.sections import Data

DIGITS = [str(i) for i in range(10)]


@pytest.fixture
def model(small_run: Path) -> Path:
    return small_run / "models" / "t000"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, digits) -> list[bytes]:
    """Eight digits of test as PNG files."""
    return [decode.encode_png(image) for image in digits.test.images[:8]]


@pytest.fixture
def pictures(tmp_path: Path, files: list[bytes]) -> Path:
    """The same in a folder, beside a file that is no picture and one that only says it is."""
    root = tmp_path / "pictures"
    (root / "deep").mkdir(parents=True)
    for i, data in enumerate(files):
        ((root / "deep" if i > 5 else root) / f"{i}.png").write_bytes(data)
    (root / "1b.jpg").write_text("hello")
    (root / "notes.txt").write_text("no picture, not listed")
    return root


@pytest.fixture
def truth(model: Path, digits) -> tuple[list[str], np.ndarray]:
    """Labels and probabilities of the eight digits."""
    run = Model.open(model).run()
    odds = predict_.softmax(run(digits.test.images[:8]))
    return [DIGITS[i] for i in odds.argmax(1)], odds.max(1)


def test_pictures_are_labelled_and_what_is_no_picture_is_reported(model, pictures, digits, truth):
    large = np.kron(digits.test.images[3, :, :, 0], np.ones((2, 2), np.uint8))
    Image.fromarray(np.stack([large] * 3, 2)).save(pictures / "3.png")  # RGB, of twice the size
    found = list(predict(model, pictures))
    assert [Path(row.path).name for row in found] == [
        "0.png", "1.png", "1b.jpg", "2.png", "3.png", "4.png", "5.png", "6.png", "7.png"
    ]  # fmt: skip
    good = [row for row in found if row.error is None]
    assert [row.label for row in good] == truth[0]
    others = [i for i in range(8) if i != 3]
    assert [good[i].probability for i in others] == truth[1][others].tolist()  # to the bit
    assert found[2][1:3] == (None, 0.0)
    assert "not a picture" in found[2].error


def test_a_run_alone_is_its_answers_model(small_run, model, pictures):
    assert list(predict(small_run, pictures)) == list(predict(model, pictures))


@pytest.mark.parametrize("size", [1, 2, 7])
def test_another_batch_size_labels_the_same(model, pictures, size):
    for one, other in zip(predict(model, pictures, batch_size=size), predict(model, pictures), strict=True):
        assert one[:2] == other[:2]
        assert one.probability == pytest.approx(other.probability, rel=1e-5)


def test_pictures_of_another_size_than_an_oblong_model_takes_are_reported():
    assert predict_.pixels(np.zeros((4, 6), np.uint8), (4, 6, 1)).shape == (4, 6, 1)
    with pytest.raises(DataError, match="6×4 pixels, the model takes 4×6"):
        predict_.pixels(np.zeros((6, 4), np.uint8), (4, 6, 1))


def test_prediction_needs_neither_torch_nor_ray(model, pictures):
    code = (
        "import sys; from raydeep.ops.predicting import predict\n"
        f"assert len(list(predict({str(model)!r}, {str(pictures)!r}))) == 9\n"
        "print(sorted({'torch', 'ray', 'kornia', 'pandas'} & sys.modules.keys()))"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout == "[]\n"


# what a user may name


def write_parquet(path: Path, data: list[bytes], **columns: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"image": pa.array(data, pa.binary()), **columns}), path, row_group_size=3)
    return path


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def sources(root: Path, files: list[bytes], manifest: shards.Manifest) -> dict[str, tuple[list[str], list[str | None]]]:
    """What is named → (what a user types, the true labels that the eight rows should have)."""
    none: list[str | None] = [None] * 8
    known = [*"01234567"]
    for i, data in enumerate(files):
        for folder in (
            root / "flat",
            root / "classes" / str(i),
            root / "splits" / ("test" if i < 5 else "val") / str(i),
        ):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{i}.png").write_bytes(data)
    lines = "".join(f"{i}.png,{i}\n" for i in range(8))
    (root / "flat" / "labels.csv").write_text("image,label\n" + lines)
    (root / "flat" / "bare.jsonl").write_text("".join(json.dumps({"image": f"{i}.png"}) + "\n" for i in range(8)))
    parquet = write_parquet(root / "p" / "some.parquet", files)
    write_parquet(root / "q" / "some.parquet", files, label=pa.array(range(8)))
    write_parquet(root / "named" / "a.parquet", files, label=pa.array(range(8)))
    (root / "named" / "classes.json").write_text(json.dumps([f"c{i}" for i in range(8)]))
    write_parquet(root / "text" / "a.parquet", files, label=pa.array([*known[:7], None]))
    tar = write_tar(root / "a.tar", {f"{i}.png": data for i, data in enumerate(files)})
    write_tar(
        root / "b.tar", {n: d for i, f in enumerate(files) for n, d in ((f"{i}.png", f), (f"{i}.cls", b"%d" % i))}
    )
    return {
        "a folder": ([str(root / "flat")], none),
        "files": ([str(root / "flat" / f"{i}.png") for i in range(8)], none),
        "a glob": ([str(root / "flat" / "*.png")], none),
        "class folders": ([str(root / "classes")], known),
        "a table": ([str(root / "flat" / "labels.csv")], known),
        "a table without labels": ([str(root / "flat" / "bare.jsonl")], none),
        "Parquet": ([str(parquet)], none),
        "a folder of Parquet": ([str(root / "q")], known),
        "Parquet with classes.json": ([str(root / "named")], [f"c{i}" for i in range(8)]),
        "Parquet with names": ([str(root / "text" / "a.parquet")], [*known[:7], None]),
        "a tar": ([str(tar)], none),
        "a tar with labels": ([str(root / "b.tar")], known),
        "two kinds": ([str(root / "flat" / "0.png"), *(str(root / "classes" / str(i)) for i in range(1, 8))], none),
    }  # fmt: skip


KINDS = [
    "a folder", "files", "a glob", "class folders", "a table", "a table without labels", "Parquet",
    "a folder of Parquet", "Parquet with classes.json", "Parquet with names", "a tar", "a tar with labels", "two kinds",
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_every_source_gives_the_same_labels(model, tmp_path, files, digits_manifest, truth, kind):
    texts, known = sources(tmp_path, files, digits_manifest)[kind]
    source = open_pictures(texts, DIGITS, Data())
    assert [None if row.label == UNKNOWN else source.classes[row.label] for row in source.rows] == known
    assert len({row.origin for row in source.rows}) == 8
    again = pickle.loads(pickle.dumps(source))
    assert [predict_.pixels(p, (8, 8, 1)).tobytes() for p in Reader(again)(source.rows)] == [
        decode.to_pixels(decode.open_picture(data), "grey", None).tobytes() for data in files
    ]
    found = list(predict(model, texts))
    assert [(row.label, row.probability) for row in found] == list(zip(truth[0], truth[1].tolist(), strict=True))


def test_shards_are_a_source(model, digits, digits_manifest):
    found = list(predict(model, digits_manifest.path, split="test"))
    run = Model.open(model).run()
    expected = predict_.softmax(run(digits.test.images))
    assert [row.label for row in found] == [DIGITS[i] for i in expected.argmax(1)]
    assert np.allclose([row.probability for row in found], expected.max(1), rtol=1e-5)
    source = open_pictures([str(digits_manifest.path)], DIGITS, Data(), "test")
    assert [row.label for row in source.rows] == digits.test.labels.tolist()
    assert len(open_pictures([str(digits_manifest.path)], DIGITS, Data()).rows) == 1797


def test_decoded_shards_and_embedded_sources_are_sources_too(model, tmp_path):
    manifest = shards.write_dataset(Data(store="decoded"), tmp_path / "decoded")
    whole = {row.path: row[1:] for row in predict(model, "digits")}
    found = list(predict(model, manifest.path, split="val"))
    assert len(found) == manifest.rows("val")
    for row in found:
        label, probability, _ = whole[row.path]
        assert (row.label, row.probability) == (label, pytest.approx(probability, rel=1e-5))
    cfg = Data(source="synthetic", rows=10, classes=3)
    source = open_pictures(["synthetic"], ["class0", "other"], cfg)
    assert source.classes == ["class0", "other", "class1", "class2"]
    assert [row.label for row in source.rows[:4]] == [0, 2, 3, 0]


def test_a_split_is_what_folders_and_names_say(model, tmp_path, files, digits_manifest):
    sources(tmp_path, files, digits_manifest)
    assert [Path(row.path).name for row in predict(model, tmp_path / "splits", split="val")] == [
        "5.png",
        "6.png",
        "7.png",
    ]
    write_parquet(tmp_path / "both" / "train-0.parquet", files)
    write_parquet(tmp_path / "both" / "test-0.parquet", files[:2])
    assert len(list(predict(model, tmp_path / "both", split="test"))) == 2
    with pytest.raises(DataError, match=r"no pictures in .*flat that are of the split val; leave --split out"):
        predict(model, tmp_path / "flat", split="val")


def test_a_bucket_is_a_source(model, pictures, bucket, s3_server, files, truth):
    base = bucket.removeprefix("s3://")
    for i, data in enumerate(files):
        with s3_server.open_output_stream(f"{base}/in/{i}.png") as file:
            file.write(data)
    with s3_server.open_output_stream(f"{base}/p/all.parquet") as file:
        pq.write_table(pa.table({"image": files}), file)
    assert [row.label for row in predict(model, f"{bucket}/in")] == truth[0]
    assert [row.label for row in predict(model, f"{bucket}/p")] == truth[0]
    assert [row.label for row in predict(model, f"{bucket}/p/all.parquet")] == truth[0]
    [one] = predict(model, f"{bucket}/in/3.png")
    assert (one.path, one.label) == (f"{bucket}/in/3.png", truth[0][3])
    with pytest.raises(DataError, match="no such bucket or folder"):
        predict(model, f"{bucket}/nothing")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere", r"nowhere: no such picture or folder"),
        ("empty", r"no pictures in .*empty"),
        ("none-*.png", r"none-\*\.png: no file matches"),
        ("torn.parquet", r"torn\.parquet: not readable as Parquet"),
        ("no-image.parquet", r"no column 'image', found x; set data\.image_column"),
        ("torn.tar", r"torn\.tar: not readable as a tar"),
        ("away.csv", r"away\.csv line 2: path '\.\./x\.png'; expected one of a file below"),
    ],
)
def test_what_can_not_be_read_is_named(model, tmp_path, name, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "torn.parquet").write_bytes(b"PAR1")
    (tmp_path / "torn.tar").write_bytes(b"x" * 700)
    (tmp_path / "away.csv").write_text("image\n../x.png\n")
    pq.write_table(pa.table({"x": [1]}), tmp_path / "no-image.parquet")
    with pytest.raises(DataError, match=message):
        predict(model, tmp_path / name)


def test_a_folder_that_is_no_model_is_refused(tmp_path):
    with pytest.raises(ModelError, match="not a model folder"):
        predict(tmp_path, tmp_path)


def test_a_picture_that_goes_away_is_a_row_with_an_error(model, pictures):
    source = open_pictures([str(pictures)], DIGITS, Data())
    (pictures / "0.png").unlink()
    first = next(iter(predict_.predict(Model.open(model), source)))
    assert first == Prediction(str(pictures / "0.png"), None, 0.0, "can't be read: No such file or directory")


def tear(path: Path, data: list[bytes]) -> Path:
    """A Parquet file whose footer is whole and whose first pages are not."""
    torn = bytearray(write_parquet(path, data).read_bytes())
    torn[200:1200] = bytes(1000)
    path.write_bytes(torn)
    return path


def test_a_source_that_breaks_ends_it_and_is_no_bad_picture(model, tmp_path, digits):
    torn = tear(tmp_path / "torn.parquet", [decode.encode_png(image) for image in digits.test.images[:60]])
    with pytest.raises(DataError, match=r"torn\.parquet row group \d+: not readable as Parquet"):
        list(predict(model, torn))


def test_a_file_that_exists_is_kept(model, pictures, tmp_path):
    (tmp_path / "p.parquet").write_text("older")
    with pytest.raises(DataError, match=r"--out .*p\.parquet: exists; name another file, or add --force"):
        predict(model, pictures, out=tmp_path / "p.parquet")
    with pytest.raises(DataError, match=r"--out .*: a folder; name a file, such as .*/predictions\.parquet"):
        predict(model, pictures, out=tmp_path, force=True)
    assert (tmp_path / "p.parquet").read_text() == "older"


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"split": "nope"}, "split 'nope': expected train, val, test"),
        ({"batch_size": 0}, "batch_size 0: expected a whole number, 1 or more"),
        ({"batch_size": -1}, "batch_size -1"),
        ({"batch_size": 2.5}, "batch_size 2.5"),
        ({"top": 0}, "top 0"),
        ({"workers": 0}, "workers 0"),
    ],
)
def test_arguments_are_checked_before_anything_is_read(how, message):
    with pytest.raises(JobError, match=message):
        predict("nowhere", "nothing", **how)


def test_a_split_that_is_none_is_refused_of_shards_too(model, digits_manifest):
    with pytest.raises(JobError, match="split 'dev'"):
        predict(model, digits_manifest.path, split="dev")


def test_hidden_pictures_are_none_and_links_are_followed(model, tmp_path, files):
    for name in (".thumbs/x.png", "._x.jpg", "4/.x.png", "4/a.png", "new/b.png"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(files[4])
    (tmp_path / "away").mkdir()
    (tmp_path / "away" / "x.png").write_bytes(files[0])
    (tmp_path / "in" / "link.png").symlink_to(tmp_path / "away" / "x.png")
    (tmp_path / "in" / "gone.png").symlink_to("nowhere.png")
    (tmp_path / "in" / "device.png").symlink_to("/dev/zero")
    (tmp_path / "in" / "folder.png").symlink_to(tmp_path / "away")
    rows = {str(Path(row.path).relative_to(tmp_path / "in")): row for row in predict(model, tmp_path / "in")}
    assert list(rows) == ["4/a.png", "gone.png", "link.png", "new/b.png"]
    assert [name for name, row in rows.items() if row.error] == ["gone.png"]
    source = open_pictures([str(tmp_path / "in")], DIGITS, Data())
    assert [row.label for row in source.rows] == [4, UNKNOWN, UNKNOWN, UNKNOWN]


def test_folders_name_the_models_classes_only(tmp_path, files):
    write_parquet(tmp_path / "p.parquet", files[:1], label=pa.array(["other"]))
    (tmp_path / "in" / "other").mkdir(parents=True)
    (tmp_path / "in" / "other" / "0.png").write_bytes(files[0])
    source = open_pictures([str(tmp_path / "p.parquet"), str(tmp_path / "in")], DIGITS, Data())
    assert [row.label for row in source.rows] == [10, UNKNOWN]  # what Parquet calls other is no class of the model


class Counted(str):
    """A class name that counts how often one is compared."""

    compared = 0
    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        Counted.compared += 1
        return str.__eq__(self, other)


def test_a_folders_class_is_not_searched_among_all(tmp_path, files):
    (tmp_path / "c999").mkdir()
    (tmp_path / "c999" / "0.png").write_bytes(files[0])
    [row] = open_pictures([str(tmp_path)], [Counted(f"c{i}") for i in range(1000)], Data()).rows
    assert row.label == 999
    assert Counted.compared < 10


def test_a_network_that_the_checksums_do_not_name_is_refused(model, pictures, tmp_path):
    folder = Path(shutil.copytree(model, tmp_path / "t000"))
    lines = (folder / "SHA256SUMS").read_text().splitlines()
    (folder / "SHA256SUMS").write_text("".join(f"{line}\n" for line in lines if not line.endswith("model.onnx")))
    with pytest.raises(ModelError, match=r"model\.onnx: SHA256SUMS does not name it"):
        predict(folder, pictures)
    check_sums(folder)  # as it is while it is verified


# on Ray: what a failure leaves


@pytest.fixture
def no_ray(monkeypatch, tmp_path) -> Path:
    """Prediction on Ray that writes on stderr and fails; gives where temporary files lie."""
    from raydeep.deploy import batch
    from raydeep.train import cluster

    @contextmanager
    def a_cluster(job: Any, log: Path) -> Iterator[None]:
        log.write_text("Ray says")
        yield

    def fail(*args: Any, **how: Any) -> None:
        os.write(2, b"core_worker says")
        raise ResourceError("no more")

    monkeypatch.setattr(cluster, "cluster", a_cluster)
    monkeypatch.setattr(batch, "predict_source", fail)
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    return tmp_path / "tmp"


@pytest.mark.parametrize("mute", [False, True])
def test_a_failure_leaves_no_log_and_stderr_is_the_callers(model, pictures, tmp_path, no_ray, capfd, mute):
    with pytest.raises(ResourceError, match="no more"):
        predict(model, pictures, out=tmp_path / "p.parquet", mute=mute)
    assert list(no_ray.iterdir()) == []
    os.write(2, b" after")
    assert capfd.readouterr().err == (" after" if mute else "core_worker says after")


# how much is held


class Counting:
    """A source's read that counts pictures which are alive."""

    def __init__(self) -> None:
        self.alive = self.most = 0

    def __call__(self, wanted: Iterable[Row]) -> Iterator[np.ndarray]:
        for _ in wanted:
            picture = np.zeros((40, 40), np.uint8)
            self.alive += 1
            self.most = max(self.most, self.alive)
            weakref.finalize(picture, self._gone)
            yield picture
            del picture

    def _gone(self) -> None:
        self.alive -= 1


def test_a_picture_is_let_go_before_the_next_is_read(model):
    read = Counting()
    rows = [Row(f"#{i}", UNKNOWN, None, i, 0) for i in range(500)]
    assert sum(1 for _ in predict_.predict(Model.open(model), Source(DIGITS, rows, read))) == 500
    assert read.alive == 0
    assert read.most <= 2  # of its full size: batches hold what the network takes


def test_a_row_group_is_read_once_however_the_rows_are_cut(tmp_path, files, monkeypatch):
    path = write_parquet(tmp_path / "a.parquet", files * 6)  # 16 groups of three
    source = open_pictures([str(path), str(path)], DIGITS, Data())
    groups: list[int] = []
    real = pq.ParquetFile.read_row_group
    monkeypatch.setattr(
        pq.ParquetFile, "read_row_group", lambda self, i, **kw: (groups.append(i), real(self, i, **kw))[1]
    )
    reader = Reader(source)
    found = [bytes(p) for at in range(0, 96, 2) for p in reader(source.rows[at : at + 2])]
    assert found == files * 12
    assert groups == [*range(16), *range(16)]


def test_a_reader_goes_on_after_an_error():
    def read(wanted: Iterable[Row]) -> Iterator[bytes]:
        for row in wanted:
            if row.key[1][0] == 1:
                raise DataError("torn")
            yield b"%d" % row.key[1][0]

    rows = [Row("", UNKNOWN, None, (0, (i,)), 0) for i in range(4)]
    reader = Reader(Source([], rows, read, lambda row: row.key))
    assert list(reader(rows[:1])) == [b"0"]
    with pytest.raises(DataError):
        list(reader(rows[1:3]))
    assert list(reader(rows[2:])) == [b"2", b"3"]
