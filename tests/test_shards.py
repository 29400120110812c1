"""Sources to shards and back: nothing is lost, nothing broken gets in, and every refusal names its picture."""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from raydeep import mirror
from raydeep.config import Data
from raydeep.data import decode, fast, sharding, shards, sources
from raydeep.data.resident import Pixels
from raydeep.data.splits import read_dataset, streamed
from raydeep.disk import sha256_file
from raydeep.errors import DataError
from raydeep.ops.datasets import processes

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (12, 8), np.uint8)
COLOUR = RNG.integers(0, 256, (12, 8, 3), np.uint8)


def encode(image: Image.Image | np.ndarray, kind: str = "PNG", **options: Any) -> bytes:
    out = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(out, kind, **options)
    return out.getvalue()


GREY_PNG = encode(GREY)


def refusal(cfg: Data, out: Path) -> str:
    with pytest.raises(DataError) as caught:
        shards.write_dataset(cfg, out)
    return str(caught.value)


def origins(manifest: shards.Manifest, split: str) -> list[str]:
    return [o for file in manifest.files(split) for o in pq.read_table(file).column("origin").to_pylist()]


def write_parquet(
    root: Path,
    name: str,
    labels: list[Any],
    images: list[Any] | None = None,
    columns: tuple[str, str] = ("image", "label"),
) -> Path:
    """One Parquet file of small pictures in `root`, which it gives back."""
    root.mkdir(exist_ok=True)
    images = images or [encode(RNG.integers(0, 256, (6, 6), np.uint8)) for _ in labels]
    pq.write_table(pa.table(dict(zip(columns, (images, labels), strict=True))), root / name, row_group_size=4)
    return root


@pytest.fixture
def photos(tmp_path: Path, write_pictures) -> Path:
    """Class folders: 20 cats, 20 dogs."""
    return write_pictures(tmp_path / "photos", {"cat": 20, "dog": 20})


@pytest.fixture
def folder(photos: Path) -> Data:
    return Data(source="folder", path=str(photos))


# digits: the whole way there and back


def test_the_digits_come_back_as_scikit_learn_has_them(digits_manifest, digits):
    pixels, labels = load_digits(return_X_y=True)
    wanted = np.rint(pixels.reshape(-1, 8, 8, 1) * 255 / 16).astype(np.uint8)
    seen = []
    for split in sources.SPLITS:
        rows = [int(origin.split("#")[1]) for origin in origins(digits_manifest, split)]
        part = getattr(digits, split)
        assert np.array_equal(part.images, wanted[rows])
        assert np.array_equal(part.labels, labels[rows])
        seen += rows
    assert sorted(seen) == list(range(1797))


def test_the_manifest_tells_the_facts(digits_manifest, digits):
    assert (digits_manifest.mode, digits_manifest.size_range, digits_manifest.quarantined) == ("grey", (8, 8, 8, 8), 0)
    assert digits_manifest.classes == list("0123456789")
    for name in sources.SPLITS:
        part, facts = getattr(digits, name), digits_manifest.splits[name]
        assert facts["rows"] == len(part.labels)
        assert facts["class_counts"] == np.bincount(part.labels, minlength=10).tolist()
        for shard in facts["shards"]:
            assert sha256_file(digits_manifest.path / shard["name"]) == shard["sha256"]
    unit = digits.train.images / 255
    assert digits_manifest.mean == pytest.approx([unit.mean()], abs=1e-6)
    assert digits_manifest.std == pytest.approx([unit.std()], abs=1e-6)


def test_mean_and_std_are_a_channel(tmp_path, photos, folder):
    manifest = shards.write_dataset(folder, tmp_path / "out")
    unit = read_dataset(manifest, folder).train.images / 255
    assert manifest.mean == pytest.approx(unit.mean((0, 1, 2)), abs=1e-6)
    assert manifest.std == pytest.approx(unit.std((0, 1, 2)), abs=1e-6)


def test_small_shards_hold_the_same_dataset(tmp_path, digits, digits_manifest):
    cfg = Data(shard_bytes=4096)
    manifest = shards.write_dataset(cfg, tmp_path / "out")
    assert len(manifest.files("train")) > 5
    found, names = read_dataset(manifest, cfg), (origins(manifest, "train"), origins(digits_manifest, "train"))
    assert names[0] != names[1]  # shuffled in other shards
    by_name = [np.argsort(each) for each in names]
    assert np.array_equal(found.train.images[by_name[0]], digits.train.images[by_name[1]])


def test_the_same_source_and_seed_give_the_same_hash(tmp_path, digits_manifest):
    hashes = [shards.write_dataset(Data(split_seed=i), tmp_path / str(i)).hash for i in range(2)]
    assert hashes[0] == digits_manifest.hash
    assert hashes[1] != digits_manifest.hash


def test_progress_is_told_up_to_the_last_picture(tmp_path, folder):
    seen: list[tuple[int, int]] = []
    shards.write_dataset(folder, tmp_path / "out", lambda done, total: seen.append((done, total)))
    assert seen[-1] == (40, 40)


def test_prepare_shards_once_and_anew_when_the_pictures_change(tmp_path, photos, folder):
    first = shards.prepare(folder, tmp_path / "runs")
    stamp = (first.path / "dataset.json").stat().st_mtime_ns
    again = shards.prepare(folder.model_copy(update={"limit_per_class": 2}), tmp_path / "runs")
    assert (again.path, (again.path / "dataset.json").stat().st_mtime_ns) == (first.path, stamp)
    (photos / "cat" / "000.png").unlink()
    changed = shards.prepare(folder, tmp_path / "runs")
    assert changed.path != first.path
    assert sum(changed.rows(split) for split in sources.SPLITS) == 39


def test_a_dataset_folder_is_taken_as_it_is(tmp_path, digits_manifest):
    cfg = Data(source="parquet", path=str(digits_manifest.path))
    assert shards.prepare(cfg, tmp_path).path == digits_manifest.path
    assert list(tmp_path.iterdir()) == []


# folders


def test_plain_class_folders_are_split_by_class(tmp_path, folder):
    manifest = shards.write_dataset(folder, tmp_path / "out")
    assert manifest.classes == ["cat", "dog"]
    assert [manifest.splits[s]["class_counts"] for s in sources.SPLITS] == [[16, 16], [2, 2], [2, 2]]
    data = read_dataset(manifest, folder)
    first = origins(manifest, "train")[0]
    assert np.array_equal(data.train.images[0], np.asarray(Image.open(Path(folder.path or "") / first)))
    assert data.classes[data.train.labels[0]] == first.split("/")[0]


def test_split_folders_keep_their_pictures(tmp_path, write_pictures):
    for split, count in (("train", 5), ("val", 3), ("test", 2)):
        write_pictures(tmp_path / "photos" / split, {"cat": count, "dog": count})
    manifest = shards.write_dataset(Data(source="folder", path=str(tmp_path / "photos")), tmp_path / "out")
    assert [manifest.rows(split) for split in sources.SPLITS] == [10, 6, 4]
    assert {origin.split("/")[0] for origin in origins(manifest, "val")} == {"val"}


def test_a_missing_val_folder_is_taken_from_train_not_from_test(tmp_path, write_pictures):
    for split in ("train", "test"):
        write_pictures(tmp_path / "photos" / split, {"cat": 10, "dog": 10})
    manifest = shards.write_dataset(Data(source="folder", path=str(tmp_path / "photos")), tmp_path / "out")
    assert [manifest.rows(split) for split in sources.SPLITS] == [18, 2, 20]
    assert {origin.split("/")[0] for origin in origins(manifest, "val")} == {"train"}


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({}, "holds 0 class folders, expected 2 or more (one a class)"),
        ({"cat": 5}, "holds 1 class folders, expected 2 or more (one a class)"),
        ({"cat": 0, "dog": 0}, "no pictures found"),
        ({"cat": 1, "dog": 1}, "the val split would be empty; give more pictures"),
    ],
)
def test_a_folder_with_too_little_in_it_is_refused(tmp_path, write_pictures, counts, message):
    root = tmp_path / "photos"
    root.mkdir()
    write_pictures(root, counts)
    found = refusal(Data(source="folder", path=str(root)), tmp_path / "out")
    assert str(root) in found
    assert message in found


def test_a_missing_folder_names_the_key_that_mends_it(tmp_path):
    message = refusal(Data(source="folder", path=str(tmp_path / "no")), tmp_path / "out")
    assert message.startswith(f"data.path: {tmp_path / 'no'} is not a folder")
    assert "--set data.path=FOLDER" in message


@pytest.mark.parametrize("link_folder", [False, True])
def test_a_link_that_leaves_the_folder_is_refused(tmp_path, photos, folder, write_pictures, link_folder):
    away = write_pictures(tmp_path / "away", {"bird": 3}) / "bird"
    link = photos / "bird" if link_folder else photos / "cat" / "link.png"
    link.symlink_to(away if link_folder else away / "000.png")
    message = refusal(folder, tmp_path / "out")
    assert message.startswith(str(link))
    assert "a link that leaves" in message


# pictures that can't be read


@pytest.fixture
def two_bad(photos: Path) -> Path:
    """Of 42 pictures one is torn and one is text."""
    whole = encode(RNG.integers(0, 256, (64, 64, 3), np.uint8), "JPEG")
    (photos / "cat" / "torn.jpg").write_bytes(whole[: len(whole) // 2])
    (photos / "dog" / "text.jpg").write_text("no picture")
    return photos


def test_too_many_bad_pictures_fail_and_leave_only_the_list_of_them(tmp_path, two_bad, folder):
    out = tmp_path / "made" / "out"
    message = refusal(folder, out)
    assert message.startswith("2 of 42 pictures can't be read (4.8%, allowed 1.0%): ")
    assert "cat/torn.jpg: can't be decoded: image file is truncated" in message
    assert "dog/text.jpg: not a picture in a known format" in message
    assert [path.name for path in out.parent.iterdir()] == ["out.quarantine.jsonl"]


def test_a_few_bad_pictures_are_put_in_quarantine_and_counted(tmp_path, two_bad, folder):
    cfg = folder.model_copy(update={"max_bad_fraction": 0.05})
    manifest = shards.write_dataset(cfg, tmp_path / "made" / "out")
    assert manifest.quarantined == 2
    assert sum(manifest.rows(split) for split in sources.SPLITS) == 40
    rows = [json.loads(line) for line in (manifest.path / "quarantine.jsonl").read_text().splitlines()]
    assert {row["origin"]: row["reason"].split(":")[0] for row in rows} == {
        "cat/torn.jpg": "can't be decoded",
        "dog/text.jpg": "not a picture in a known format",
    }
    assert [path.name for path in manifest.path.parent.iterdir()] == ["out"]
    assert read_dataset(manifest, cfg).shape == (8, 8, 3)


def test_when_every_picture_is_bad_the_error_still_says_why(tmp_path, photos, folder):
    for path in photos.rglob("*.png"):
        path.write_text("no picture")
    out = tmp_path / "made" / "out"
    message = refusal(folder, out)
    assert "cat/000.png: not a picture in a known format" in message
    assert len((out.parent / "out.quarantine.jsonl").read_text().splitlines()) == 40


def test_a_second_try_after_mending_succeeds(tmp_path, two_bad, folder):
    refusal(folder, tmp_path / "out")
    (two_bad / "cat" / "torn.jpg").unlink()
    (two_bad / "dog" / "text.jpg").unlink()
    assert shards.write_dataset(folder, tmp_path / "out").quarantined == 0
    assert not (tmp_path / "out.quarantine.jsonl").exists()


# Parquet


def parquet(root: Path, **keys: Any) -> Data:
    return Data(source="parquet", path=str(root), **keys)


def test_integer_labels_count_the_classes(tmp_path):
    labels = [0, 2, 1] * 10
    manifest = shards.write_dataset(parquet(write_parquet(tmp_path / "in", "a.parquet", labels)), tmp_path / "out")
    assert manifest.classes == ["0", "1", "2"]
    assert [manifest.splits[s]["class_counts"] for s in sources.SPLITS] == [[8] * 3, [1] * 3, [1] * 3]


def test_strings_and_own_column_names(tmp_path):
    labels, images = ["dog", "cat"] * 10, [encode(np.full((6, 6), i, np.uint8)) for i in range(20)]
    root = write_parquet(tmp_path / "in", "a.parquet", labels, images, columns=("picture", "animal"))
    cfg = parquet(root, image_column="picture", label_column="animal")
    manifest = shards.write_dataset(cfg, tmp_path / "out")
    assert manifest.classes == ["cat", "dog"]
    data = read_dataset(manifest, cfg)
    assert [labels[i] for i in data.train.images[:, 0, 0, 0]] == [data.classes[i] for i in data.train.labels]
    assert origins(manifest, "train")[0] == f"a.parquet#{data.train.images[0, 0, 0, 0]}"


def test_hugging_face_pictures_names_and_splits(tmp_path):
    def struct(i: int) -> dict[str, Any]:
        return {"bytes": encode(np.full((6, 6), i, np.uint8)), "path": f"{i}.png"}

    root = write_parquet(tmp_path / "in", "train-0.parquet", [0, 1] * 5, [struct(i) for i in range(10)])
    write_parquet(root, "test-0.parquet", [1, 0], [struct(100), struct(101)])
    write_parquet(root, "other.parquet", [0, 1])
    (root / "classes.json").write_text('["cat", "dog"]')
    manifest = shards.write_dataset(parquet(root), tmp_path / "out")
    assert manifest.classes == ["cat", "dog"]
    assert [manifest.rows(split) for split in sources.SPLITS] == [8, 2, 2]
    assert read_dataset(manifest, parquet(root)).test.images[:, 0, 0, 0].tolist() == [100, 101]


@pytest.mark.parametrize(
    ("labels", "names", "message"),
    [
        ([0, 1, -1, 1], None, "a.parquet row 2: label -1; expected integers from 0, or strings"),
        ([0, 1, None, 1], None, "a.parquet row 2: label None; expected one of 2 classes (0, 1)"),
        ([0, 1, 1, 2], '["cat", "dog"]', "a.parquet row 3: label 2; expected one of 2 classes (0, 1)"),
        (["a", "b", None], None, "a.parquet row 2: label None; expected one of 2 classes (a, b)"),
        ([0.0, 1.5], None, "a.parquet row 0: label 0.0; expected integers from 0, or strings"),
        ([True, False], None, "a.parquet row 0: label True; expected integers from 0, or strings"),
        ([[0], [1]], None, "a.parquet row 0: label [0]; expected integers from 0, or strings"),
        ([1] * 20, None, "all labels are the same; expected 2 or more classes"),
        (["a"] * 20, None, "all labels are the same; expected 2 or more classes"),
        ([0, 1], "{", "classes.json: not valid JSON"),
        ([0, 1], '{"a": 0}', "classes.json: expected a list of class names"),
    ],
)
def test_labels_that_are_none_are_named_by_file_and_row(tmp_path, labels, names, message):
    root = write_parquet(tmp_path / "in", "a.parquet", labels)
    if names is not None:
        (root / "classes.json").write_text(names)
    found = refusal(parquet(root), tmp_path / "out")
    assert found.startswith(str(root))
    assert message in found


@pytest.mark.parametrize(("key", "column"), [("image_column", "picture"), ("label_column", "class")])
def test_a_missing_column_names_the_file_what_it_has_and_the_key(tmp_path, key, column):
    root = write_parquet(tmp_path / "in", "a.parquet", [0, 1])
    message = refusal(parquet(root, **{key: column}), tmp_path / "out")
    assert message == f"{root / 'a.parquet'}: no column '{column}', found image, label; set data.{key}"


def test_a_file_that_is_no_parquet_is_named(tmp_path):
    root = write_parquet(tmp_path / "in", "a.parquet", [0, 1])
    (root / "b.parquet").write_bytes((root / "a.parquet").read_bytes()[:-9])
    assert refusal(parquet(root), tmp_path / "out").startswith(f"{root / 'b.parquet'}: not readable as Parquet: ")


def test_a_folder_without_parquet_is_refused(tmp_path):
    assert refusal(parquet(tmp_path), tmp_path / "out") == f"data.path: {tmp_path} holds no *.parquet files"


# the dataset folder


def test_a_folder_in_use_is_never_overwritten(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").touch()
    (tmp_path / "file").touch()
    for name in ("out", "file"):
        assert refusal(Data(), tmp_path / name) == (
            f"{tmp_path / name}: exists and is not empty; name a new folder or remove it"
        )
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "mine.txt", "out"]


def test_an_empty_folder_may_be_filled(tmp_path, folder):
    (tmp_path / "out").mkdir()
    assert shards.write_dataset(folder, tmp_path / "out").rows("train") == 32


@pytest.mark.parametrize("harm", ["missing", "truncated", "changed"])
def test_a_shard_that_was_harmed_is_found(tmp_path, folder, harm):
    shard = shards.write_dataset(folder, tmp_path / "out").files("val")[0]
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.unlink()
    if harm != "missing":
        shard.write_bytes(data if harm == "changed" else data[:-1])
    with pytest.raises(DataError, match=rf"^{shard}: .*; shard the source again$"):
        shards.load_manifest(tmp_path / "out", check_hashes=harm == "changed")


def test_a_folder_that_is_no_dataset_says_how_to_make_one(tmp_path):
    with pytest.raises(DataError, match=r"no dataset\.json\); make one with: raydeep shard SOURCE OUT"):
        shards.load_manifest(tmp_path)


def edited(manifest: shards.Manifest, home: Path, edit: Callable[[dict[str, Any]], Any], rehash: bool = True) -> Path:
    """A copy of a dataset whose manifest was changed by hand."""
    copy = shutil.copytree(manifest.path, home / "edited")
    raw = json.loads((copy / "dataset.json").read_text())
    edit(raw)
    if rehash:
        raw["hash"] = sharding.content_hash(raw["classes"], raw["splits"])
    (copy / "dataset.json").write_text(json.dumps(raw))
    return copy


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda m: m.update(store="zip"), "store 'zip'"),
        (lambda m: m.update(mode="cmyk"), "mode 'cmyk'"),
        (lambda m: m.update(size_range=[8, 8, 8]), "size_range"),
        (lambda m: m.update(size_range=[8, 0, 8, 8]), "size_range"),
        (lambda m: m.update(mean=[float("nan")]), "mean"),
        (lambda m: m.update(std=[0]), "std"),
        (lambda m: m["classes"].pop(), "class counts of train"),
        (lambda m: m["splits"].pop("val"), "splits train, test"),
        (lambda m: m["splits"]["val"].update(rows=-4), "rows and class counts of val"),
        (lambda m: m["splits"]["val"]["shards"][0].update(name="../x.parquet"), "shard '../x.parquet' of val"),
        (lambda m: m["splits"]["val"]["shards"][0].update(groups=[1]), "shard 'val-00000.parquet' of val"),
        (lambda m: m["splits"]["val"]["shards"][0].update(groups=None), "lacks"),
        (lambda m: m["splits"]["val"]["shards"].clear(), "rows and class counts of val"),
        (lambda m: m["splits"]["val"]["shards"][0].pop("sha256"), "lacks"),
    ],
)
def test_a_manifest_that_was_changed_by_hand_is_refused(tmp_path, digits_manifest, edit, message):
    folder = edited(digits_manifest, tmp_path, edit)
    with pytest.raises(DataError, match=re.escape(message)) as caught:
        shards.load_manifest(folder, check_hashes=True)
    assert str(folder / "dataset.json") in str(caught.value)


def test_a_hash_that_is_not_that_of_the_content_is_refused(tmp_path, digits_manifest):
    folder = edited(digits_manifest, tmp_path, lambda m: m["classes"].reverse(), rehash=False)
    with pytest.raises(DataError, match="its hash is not that of its classes and splits"):
        shards.load_manifest(folder)


def test_a_dataset_of_another_version_is_refused(tmp_path):
    (tmp_path / "dataset.json").write_text('{"schema": 0}')
    with pytest.raises(DataError, match="schema 0, expected 2; shard the source again"):
        shards.load_manifest(tmp_path)


def test_pictures_of_many_sizes_need_image_size(tmp_path, photos, folder):
    Image.fromarray(np.zeros((16, 30, 3), np.uint8)).save(photos / "cat" / "large.png")
    manifest = shards.write_dataset(folder, tmp_path / "out")
    with pytest.raises(DataError, match=r"pictures are 8×8 to 16×30 pixels; name one size with data\.image_size"):
        read_dataset(manifest, folder)
    assert read_dataset(manifest, folder.model_copy(update={"image_size": 10})).shape == (10, 10, 3)


@pytest.mark.parametrize(("mode", "channels"), [("rgb", 3), ("grey", 1)])
def test_the_job_may_ask_for_grey_or_rgb_with_a_fitting_mean(digits_manifest, tmp_path, folder, mode, channels):
    manifest = digits_manifest if mode == "rgb" else shards.write_dataset(folder, tmp_path / "out")
    data = read_dataset(manifest, Data(mode=mode))
    assert data.shape == (8, 8, channels)
    unit = data.train.images / 255
    assert data.mean == pytest.approx(unit.mean((0, 1, 2)), abs=1e-6)
    assert data.std == pytest.approx(unit.std((0, 1, 2)), abs=1e-6)


def test_limit_per_class_takes_few_of_train_and_all_of_the_others(digits_manifest, digits):
    data = read_dataset(digits_manifest, Data(limit_per_class=3))
    assert np.bincount(data.train.labels).tolist() == [3] * 10
    assert np.array_equal(data.test.images, digits.test.images)
    assert data.mean == pytest.approx([(data.train.images / 255).mean()], abs=1e-6)
    assert data.std == pytest.approx([(data.train.images / 255).std()], abs=1e-6)


def test_pictures_beyond_the_memory_allowed_are_refused_with_the_numbers(digits_manifest):
    cfg = Data(image_size=64, memory_bytes=2**20, cache="resident")
    need = 1797 * 64 * 64
    message = rf"pictures of 64×64×1 take {need:,} bytes decoded, more than data\.memory_bytes 1,048,576"
    with pytest.raises(DataError, match=message):
        read_dataset(digits_manifest, cfg)


def test_no_more_is_decoded_than_the_memory_allowed(digits_manifest, monkeypatch):
    cfg = Data(image_size=64, memory_bytes=2 * 2**20, limit_per_class=1)
    decoded = []

    def spy(*args: Any) -> np.ndarray:
        pixels = decode_plain(*args)
        decoded.append(pixels.nbytes)
        return pixels

    decode_plain = fast.decode_plain
    monkeypatch.setattr(fast, "decode_plain", spy)
    data = read_dataset(digits_manifest, cfg)
    assert isinstance(data.train, Pixels)
    assert len(decoded) == 10 + len(data.val.labels) + len(data.test.labels)
    assert sum(decoded) <= cfg.memory_bytes


# single pictures


@pytest.mark.parametrize(
    ("data", "wanted"),
    [
        (encode(GREY), GREY),
        (encode(COLOUR), COLOUR),
        (encode(np.dstack([COLOUR, np.full_like(GREY, 255)])), COLOUR),
        (encode(np.dstack([COLOUR, np.zeros_like(GREY)])), np.zeros_like(COLOUR)),
        (encode(Image.merge("LA", [Image.fromarray(GREY), Image.new("L", (8, 12), 0)])), np.zeros_like(GREY)),
        (encode(GREY.astype(np.uint16) * 257), GREY),
        (encode(GREY > 127), np.where(GREY > 127, 255, 0)),
        (encode(COLOUR, "WEBP", lossless=True), COLOUR),
        (encode(COLOUR, "BMP"), COLOUR),
    ],
    ids=["grey", "rgb", "rgba", "transparent", "transparent-grey", "16-bit", "1-bit", "webp", "bmp"],
)
def test_pictures_of_every_mode_become_grey_or_rgb(data, wanted):
    pixels = np.asarray(decode.open_picture(data))
    if wanted.ndim == 2 and pixels.ndim == 3:
        wanted = np.repeat(wanted[:, :, None], 3, 2)
    assert np.array_equal(pixels, wanted)


def test_palettes_are_resolved():
    picture = Image.fromarray(COLOUR).quantize(8)
    assert np.array_equal(np.asarray(decode.open_picture(encode(picture))), np.asarray(picture.convert("RGB")))


@pytest.mark.parametrize(("mode", "bands"), [("L", 1), ("RGB", 3), ("CMYK", 3)])
def test_jpeg_keeps_the_colours_about(mode, bands):
    flat = Image.new("RGB", (16, 16), (200, 100, 50)).convert(mode)
    found = decode.open_picture(encode(flat, "JPEG", quality=95))
    assert len(found.getbands()) == bands
    wanted = np.asarray(flat.convert(found.mode), np.int64)
    assert np.abs(np.asarray(found, np.int64) - wanted).max() <= 8


def test_the_exif_orientation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show the picture turned clockwise
    assert np.array_equal(np.asarray(decode.open_picture(encode(COLOUR, exif=exif))), np.rot90(COLOUR, -1))


def test_broken_exif_is_a_bad_picture_not_a_crash():
    with pytest.raises(DataError, match="can't be decoded"):
        decode.open_picture(encode(COLOUR, exif=b"Exif\0\0MM\x8c*\0\0\0\x08"))


def test_huge_pictures_are_refused_before_they_are_decoded(monkeypatch):
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(DataError, match="8×12 pixels, more than 95"):
        decode.open_picture(GREY_PNG, 95)


def test_an_empty_file_is_called_so():
    with pytest.raises(DataError, match="empty file"):
        decode.open_picture(b"")


def test_a_picture_is_scaled_by_its_shorter_side_and_cropped_in_the_middle():
    wide = np.zeros((10, 30), np.uint8)
    wide[:, 10:20] = 255
    assert (decode.to_pixels(Image.fromarray(wide), "grey", 10) == 255).all()
    assert decode.to_pixels(Image.fromarray(wide), "rgb", None).shape == (10, 30, 3)


# the synthetic source


def test_synthetic_pictures_follow_from_their_number_and_seed():
    def make(seed: int) -> np.ndarray:
        source = sources.synthetic(Data(source="synthetic", rows=12, classes=3, split_seed=seed))
        return np.stack(list(source.read(source.rows)))

    assert np.array_equal(make(0), make(0))
    assert not np.array_equal(make(0), make(1))
    assert len({picture.tobytes() for picture in make(0)}) == 12


def test_the_synthetic_source_makes_the_rows_and_classes_asked_for(tmp_path):
    cfg = Data(source="synthetic", rows=60, classes=3, image_size=12)
    manifest = shards.write_dataset(cfg, tmp_path / "out")
    assert manifest.classes == ["class0", "class1", "class2"]
    assert sum(manifest.rows(split) for split in sources.SPLITS) == 60
    assert read_dataset(manifest, cfg).shape == (12, 12, 1)


# in a bucket


def test_a_dataset_in_a_bucket_is_made_once_and_read_where_it_is_needed(on, bucket, digits_manifest, monkeypatch):
    made = shards.prepare(Data(), mirror.place(bucket))
    assert made.hash == digits_manifest.hash
    split = streamed(made, Data(), "train")
    assert split.files[0].startswith(f"{bucket}/datasets/digits-")
    rows = np.arange(32)
    wanted = next(iter(split.read([[rows]])))
    units = [split.unit(rows)]
    on("b")  # a task that reads for another node
    assert not mirror.cache().exists()
    assert np.array_equal(fast.fetch(units[0], split.form).pixels, wanted)
    assert sum(path.suffix == ".parquet" for path in mirror.cache().rglob("*")) == 1
    monkeypatch.setattr(sharding, "write", None)  # it is not made again
    again = shards.prepare(Data(), mirror.place(bucket))
    assert again.hash == made.hash
    assert len([path for path in mirror.cache().rglob("*.parquet") if path.name[0] != "."]) == 3
    on("c")  # the address of a dataset is a dataset, whatever the storage is
    address = mirror.name(mirror.place(bucket) / "datasets" / made.path.name)
    assert shards.prepare(Data(path=address), Path("nowhere")).hash == made.hash
    assert streamed(shards.prepare(Data(path=address), Path("nowhere")), Data(), "val").files[0].startswith(address)


def test_a_push_of_a_dataset_that_was_cut_off_is_taken_up(on, bucket):
    made = shards.prepare(Data(), mirror.place(bucket))
    mirror.forget(made.path / "dataset.json", made.files("train")[0])
    assert shards.prepare(Data(), mirror.place(bucket)).hash == made.hash
    assert sorted(mirror.names(made.path)) == sorted(path.name for path in made.path.iterdir() if path.name[0] != ".")


def test_processes_of_one_machine_make_the_same_dataset(tmp_path, write_many):
    write_many(tmp_path / "pictures", 200)
    cfg = Data(source="folder", path=str(tmp_path / "pictures"), shard_bytes=5000)
    told: list[int] = []

    def run(work: sharding.Work, tasks: Sequence[sharding.Task], tell: Callable[[int], None]) -> None:
        processes(work, tasks, lambda rows: (told.append(rows), tell(rows)), 2)  # type: ignore[func-returns-value]

    one, two = (
        shards.write_dataset(cfg, tmp_path / name, run=how)
        for name, how in (("one", sharding.one_by_one), ("two", run))
    )
    assert one.hash == two.hash
    assert told[-1] == 200
    next((tmp_path / "pictures" / "cat").iterdir()).write_bytes(b"no picture")
    with pytest.raises(DataError, match="1 of 200 pictures can't be read"):
        shards.write_dataset(cfg.model_copy(update={"max_bad_fraction": 0.0}), tmp_path / "bad", run=run)
