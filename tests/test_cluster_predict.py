"""Batch prediction on a real local Ray: the file, whatever the workers; nothing under its name when it is killed."""

from __future__ import annotations

import json
import logging
import pickle
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest
from commands import ray_processes, run, start, wait_for
from test_predict import DIGITS, tear, write_parquet

from raydeep import mirror
from raydeep.data import decode
from raydeep.data.unlabelled import open_pictures
from raydeep.deploy import predict as predict_
from raydeep.deploy.predict import Model
from raydeep.disk import sha256_file
from raydeep.errors import DataError
from raydeep.sections import Data

pytestmark = pytest.mark.cluster

ROWS = 600


@pytest.fixture(scope="module")
def on_ray(home: Path) -> Iterator[None]:
    """A Ray of two CPUs that this process is connected to."""
    import ray

    ray.init(
        address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR,
        _temp_dir=str(home),
    )  # fmt: skip
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Digits in one Parquet file with their labels; every hundredth is no picture."""
    from sklearn.datasets import load_digits

    values, labels = load_digits(return_X_y=True)
    pixels = np.rint(values.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)[:ROWS]
    data = [b"no" if i % 100 == 7 else decode.encode_png(picture) for i, picture in enumerate(pixels)]
    return write_parquet(tmp_path_factory.mktemp("table") / "digits.parquet", data, label=labels[:ROWS])


def to_file(model: Path, source: Path, out: Path, **how: int) -> object:
    from raydeep.deploy import batch

    opened = Model.open(model)
    pictures = open_pictures([str(source)], opened.classes, Data())
    return batch.predict_source(opened, pictures, out, max_pixels=decode.MAX_PIXELS, **how)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def written(
    on_ray: None, small_run: Path, table: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, object]:
    """The file of two workers, and what was counted."""
    out = tmp_path_factory.mktemp("out") / "predictions.parquet"
    return out, to_file(small_run / "models" / "t000", table, out, workers=2)


def test_the_file_holds_what_one_process_predicts(written, small_run, table):
    out, counted = written
    model = Model.open(small_run / "models" / "t000")
    source = open_pictures([str(table)], DIGITS, Data())
    rows = pq.read_table(out).to_pylist()
    alone = list(predict_.predict(model, source))
    assert [(r["path"], r["label"], r["probability"] or 0.0, r["error"]) for r in rows] == alone  # to the bit
    right = known = 0
    for i, row in enumerate(rows):
        assert row["true_label"] == source.classes[source.rows[i].label]
        if row["error"] is not None:
            assert i % 100 == 7
            assert row["top"] is row["top_probability"] is row["probabilities"] is None
            continue
        odds = np.array(row["probabilities"], np.float32)
        assert odds.sum() == pytest.approx(1, abs=1e-5)
        order = np.argsort(-odds, kind="stable")[:5]
        assert row["top"] == [DIGITS[k] for k in order]
        assert row["top_probability"] == odds[order].tolist()
        assert (row["label"], row["probability"]) == (row["top"][0], row["top_probability"][0])
        known += 1
        right += row["label"] == row["true_label"]
    assert (counted.rows, counted.bad, counted.labelled, counted.right) == (ROWS, 6, known, right)
    assert counted.accuracy == right / known > 0.8
    assert 0 < counted.start_s <= counted.seconds


def test_the_file_says_what_made_it(written, small_run):
    folder = small_run / "models" / "t000"
    file = pq.ParquetFile(written[0])
    facts = json.loads(file.schema_arrow.metadata[b"raydeep"])
    assert facts["model_onnx_sha256"] == sha256_file(folder / "model.onnx")
    assert facts["model_rdz_sha256"] == sha256_file(folder / "model.rdz")
    assert (facts["classes"], facts["top"], facts["batch_size"], facts["raydeep"]) == (DIGITS, 5, 32, "0.1.0")
    group = file.metadata.row_group(0)
    assert {group.column(i).compression for i in range(group.num_columns)} == {"ZSTD"}


def test_one_worker_writes_the_same_bytes(written, small_run, table, tmp_path):
    to_file(small_run / "models" / "t000", table, tmp_path / "p.parquet", workers=1)
    assert (tmp_path / "p.parquet").read_bytes() == written[0].read_bytes()


def test_what_travels_is_small_and_actors_share_the_rows(small_run, on_ray):
    from raydeep.deploy import batch

    model = Model.open(small_run / "models" / "t000")
    source = open_pictures(["synthetic"], DIGITS, Data(source="synthetic", rows=20_000))
    units = batch.plan(model, source, 32, 2)
    assert [row for unit in units for row in unit] == source.rows
    assert len(units) >= 8
    assert {len(unit) % 32 for unit in units[:-1]} == {0}
    assert max(len(pickle.dumps(unit)) / len(unit) for unit in units) < 100  # bytes a picture


def test_row_groups_of_the_file_have_one_size(small_run, table, tmp_path, on_ray, monkeypatch):
    from raydeep.deploy import batch

    monkeypatch.setattr(batch, "GROUP_BYTES", 1)  # then 1,024 rows
    opened = Model.open(small_run / "models" / "t000")
    pictures = open_pictures([str(table)] * 4, opened.classes, Data())
    batch.predict_source(opened, pictures, tmp_path / "p.parquet", max_pixels=decode.MAX_PIXELS)
    facts = pq.ParquetFile(tmp_path / "p.parquet").metadata
    assert [facts.row_group(i).num_rows for i in range(facts.num_row_groups)] == [1024, 1024, 352]


def test_a_source_that_breaks_is_an_error_and_leaves_nothing(small_run, on_ray, tmp_path, digits):
    torn = tear(tmp_path / "torn.parquet", [decode.encode_png(image) for image in digits.test.images[:60]])
    with pytest.raises(DataError, match=r"torn\.parquet row group \d+: not readable as Parquet"):
        to_file(small_run / "models" / "t000", torn, tmp_path / "out" / "p.parquet")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_bucket_takes_the_file(small_run, on_ray, table, bucket, s3_server: pafs.S3FileSystem, written):
    out = mirror.place(f"{bucket}/p.parquet")
    to_file(small_run / "models" / "t000", table, out)
    with s3_server.open_input_file(f"{bucket.removeprefix('s3://')}/p.parquet") as file:
        assert pq.read_table(file).equals(pq.read_table(written[0]))


# the command


def test_the_command_says_what_it_did_and_what_is_bad(tmp_path, home, small_run, table):
    out = tmp_path / "p.parquet"
    out.write_text("older")
    arguments = ["predict", str(small_run), str(table), "--out", str(out), "--top", "2", "--workers", "2"]
    code, said = run(home, *arguments, "--force")
    assert code == 2, said
    assert "6 of the pictures can't be read; the others are labelled (column error says why)" in said
    assert f"model      {small_run / 'models' / 't000'}" in said
    assert "600 pictures" in said
    assert "accuracy 9" in said
    assert "core_worker" not in said
    assert len([line for line in said.splitlines() if not line.startswith("  predict:")]) == 4, said
    found = pq.read_table(out)
    assert len(found) == ROWS
    assert {len(top) for top in found.column("top").to_pylist() if top} == {2}


@pytest.fixture
def apart() -> Iterator[Path]:
    """A folder for a Ray of the command's own: in `home` lives the one that other tests share."""
    path = Path(tempfile.mkdtemp(prefix="rd"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


def test_a_kill_leaves_nothing_under_the_name(tmp_path, apart, small_run):
    out = tmp_path / "out" / "p.parquet"
    process = start(apart, "predict", str(small_run), "synthetic", "--set", "data.rows=400000", "--out", str(out))
    wait_for(
        lambda: process.poll() is not None or list(out.parent.glob(".p.parquet.*.part")), 120, "a part of the file"
    )
    assert process.poll() is None, process.communicate()
    process.kill()
    process.communicate(timeout=60)
    assert not out.exists()
    wait_for(lambda: not ray_processes(apart), 60, "Ray to end")
