"""info and verify: what a dataset holds, what is wrong with it, and which pictures stand in two splits."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from raydeep.config import Data
from raydeep.data import inspection, sharding, shards
from raydeep.disk import sha256_file

SIDE = 48


def scene(seed: int) -> Image.Image:
    """A picture with structure: coloured discs on a ramp."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:SIDE, :SIDE]
    pixels = np.stack([x * rng.uniform(1, 3), y * rng.uniform(1, 3), (x + y) * rng.uniform(0.5, 2)], -1)
    for _ in range(6):
        cx, cy, r = [*rng.uniform(0, SIDE, 2).tolist(), rng.uniform(4, 14)]
        pixels[(x - cx) ** 2 + (y - cy) ** 2 < r * r] = rng.uniform(0, 255, 3)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


@pytest.fixture
def leaky(tmp_path: Path) -> shards.Manifest:
    """train, val and test of ten scenes each; test holds one of train as it is and one as a JPEG of it."""
    for split, first in (("train", 0), ("val", 100), ("test", 200)):
        for i in range(10):
            path = tmp_path / "in" / split / ("cat", "dog")[i % 2] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            scene(first + i).save(path)
    scene(3).save(tmp_path / "in" / "test" / "dog" / "same.png")
    scene(4).save(tmp_path / "in" / "test" / "cat" / "alike.jpg", quality=80)
    scene(7).save(tmp_path / "in" / "train" / "dog" / "twice.png")
    return shards.write_dataset(Data(source="folder", path=str(tmp_path / "in")), tmp_path / "out")


def test_info_counts_what_is_there(digits_manifest):
    facts = inspection.info(digits_manifest)
    assert facts["rows"] == 1797
    assert facts["decoded_bytes"] == 1797 * 64
    assert sum(facts["splits"]["train"]["class_counts"].values()) == 1439
    assert 1 <= facts["splits"]["train"]["imbalance"] < 1.1
    assert facts["hash"] == digits_manifest.hash
    json.dumps(facts)


def test_a_whole_dataset_has_no_problems(digits_manifest):
    seen: list[tuple[int, int]] = []
    report = inspection.verify(digits_manifest.path, lambda done, total: seen.append((done, total)))
    assert report.problems == []
    assert report.pairs == []
    assert seen[-1] == (1797, 1797)


def test_pictures_in_two_splits_are_found_exactly_and_by_their_looks(leaky):
    report = inspection.verify(leaky.path)
    assert report.problems == []
    found = {(pair.first, pair.second): pair.same for pair in report.pairs}
    assert found == {
        ("train: train/dog/3.png", "test: test/dog/same.png"): True,
        ("train: train/cat/4.png", "test: test/cat/alike.jpg"): False,
    }
    assert report.repeated == {"train": 2, "val": 0, "test": 0}


def test_decoded_shards_are_verified_alike(tmp_path, leaky):
    cfg = Data(source="folder", path=str(tmp_path / "in"), store="decoded")
    manifest = shards.write_dataset(cfg, tmp_path / "decoded")
    report = inspection.verify(manifest.path)
    assert report.problems == []
    assert len(report.pairs) == 2


def rewrite(manifest: shards.Manifest, split: str, change: dict[str, list[object]], honest: bool = True) -> None:
    """Change columns of a split's first shard; `honest` makes dataset.json agree with its bytes."""
    file = manifest.files(split)[0]
    table = pq.read_table(file)
    for name, values in change.items():
        column = table.schema.get_field_index(name)
        table = table.set_column(column, name, pa.array(values, table.schema.field(name).type))
    pq.write_table(table, file)
    if honest:
        raw = json.loads((manifest.path / "dataset.json").read_text())
        raw["splits"][split]["shards"][0] |= {"bytes": file.stat().st_size, "sha256": sha256_file(file)}
        raw["hash"] = sharding.content_hash(raw["classes"], raw["splits"])
        (manifest.path / "dataset.json").write_text(json.dumps(raw))


def test_a_changed_shard_is_named(leaky):
    file = leaky.files("val")[0]
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    problems = inspection.verify(leaky.path).problems
    assert problems[0] == f"{file}: its sha256 is not that of dataset.json"


def test_labels_and_pictures_that_are_none_are_named_by_file_and_row(leaky):
    file = leaky.files("val")[0]
    table = pq.read_table(file)
    images = table.column("image").to_pylist()
    images[1] = images[1][:-30]
    rewrite(leaky, "val", {"label": [0, 0, 7, -1, None, 1, 1, 1, 1, 1], "image": images})
    problems = inspection.verify(leaky.path).problems
    origins = table.column("origin").to_pylist()
    assert problems[0].startswith(f"{file} row 1 ({origins[1]}): can't be decoded")
    assert f"{file} row 2 ({origins[2]}): label 7, expected 0 to 1" in problems
    assert f"{file} row 3 ({origins[3]}): label -1, expected 0 to 1" in problems
    assert f"{file} row 4 ({origins[4]}): label None, expected 0 to 1" in problems


def test_labels_that_were_swapped_are_noticed_by_the_counts(leaky):
    rewrite(leaky, "val", {"label": [0] * 10})
    assert inspection.verify(leaky.path).problems == [
        "val: class counts are [10, 0], dataset.json says otherwise"
    ]  # fmt: skip


def test_a_thumbnail_survives_encoding_and_scaling_but_not_another_scene():
    def likeness(a: Image.Image, b: Image.Image) -> float:
        return float(inspection.thumbnail(a).astype(np.float32) @ inspection.thumbnail(b).astype(np.float32))

    out = io.BytesIO()
    scene(1).save(out, "JPEG", quality=60)
    assert likeness(scene(1), Image.open(out)) > inspection.ALIKE
    assert likeness(scene(1), scene(1).resize((96, 96), Image.Resampling.BICUBIC)) > inspection.ALIKE
    assert max(likeness(scene(1), scene(i)) for i in range(2, 40)) < 0.95


def test_pictures_without_structure_look_like_nothing():
    flat = Image.new("RGB", (64, 64), (10, 20, 30))
    assert not inspection.thumbnail(flat).any()
    assert not inspection.thumbnail(scene(0).resize((12, 12))).any()
