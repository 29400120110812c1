"""What is streamed is what is in memory: the same pictures, each once, for any number of workers, from any step on."""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from raydeep.config import Augment, Data
from raydeep.data import decode, fast, sharding, shards
from raydeep.data.augment import Augmenter
from raydeep.data.batches import Batches, eval_batches
from raydeep.data.resident import Dataset, Pixels
from raydeep.data.splits import in_process, is_resident, read_dataset, streamed
from raydeep.data.streamed import Streamed, Unit, threads
from raydeep.errors import DataError

MOVES = Augment(rotation=10, crop=0.1, horizontal_flip=0.5)
STREAM = Data(cache="stream", window_bytes=2**20)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Iterator[shards.Manifest]:
    """The digits in several shards of small row groups."""
    patch = pytest.MonkeyPatch()
    patch.setattr(sharding, "GROUP_ROWS", 50)
    yield shards.write_dataset(Data(shard_bytes=25_000), tmp_path_factory.mktemp("streamed") / "out")
    patch.undo()


@pytest.fixture(scope="module")
def memory(manifest: shards.Manifest) -> Dataset:
    return read_dataset(manifest, Data(cache="resident"))


def split(manifest: shards.Manifest, window_rows: int = 300, unit_rows: int = 70, **keys: object) -> Streamed:
    found = streamed(manifest, STREAM.model_copy(update=keys), "train")
    found.window_rows, found.unit_rows = window_rows, unit_rows
    return found


def served(source: Batches, epochs: Sequence[int], start_step: int = 0) -> list[torch.Tensor]:
    """This worker's pictures and labels of each step."""
    out = []
    for epoch in epochs:
        for micros in source.epoch(epoch, start_step if epoch == epochs[0] else 0, max(epochs) + 1):
            flat = [torch.cat([m.images.flatten(1), m.labels[:, None].float()], 1)[: m.valid] for m in micros]
            out.append(torch.cat(flat))
    return out


def batches(found: Streamed | Pixels, batch_size: int = 64, **parts: object) -> Batches:
    return Batches(found, Augmenter(MOVES, [0.3], [0.4]), batch_size, 5, **parts)  # type: ignore[arg-type]


def test_the_dataset_has_what_the_tests_need(manifest):
    assert len(manifest.splits["train"]["shards"]) > 3
    assert len(split(manifest).sizes) > 20


def test_rows_read_in_any_order_are_those_in_memory(manifest, memory):
    found = split(manifest)
    assert np.array_equal(found.labels, memory.train.labels)
    wanted = [np.random.default_rng(i).permutation(len(found.labels))[: 5 + 90 * i] for i in range(3)]
    for rows, images in zip(wanted, found.read([[part] for part in wanted]), strict=True):
        assert np.array_equal(images, memory.train.images[rows])
        assert images.flags.writeable


def test_a_streamed_batch_is_what_memory_gives_for_the_same_order(manifest, memory, monkeypatch):
    found = split(manifest)
    monkeypatch.setattr(Pixels, "order", lambda self, *at: found.order(*at))
    pairs = zip(served(batches(found), [0, 1]), served(batches(memory.train), [0, 1]), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert batches(found).order_hash(1) == batches(memory.train).order_hash(1)


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("drop_last", [True, False])
def test_workers_only_divide_the_global_batches(manifest, world, drop_last):
    whole = served(batches(split(manifest), drop_last=drop_last), [0])
    ranks = [
        served(batches(split(manifest), rank=rank, world=world, drop_last=drop_last), [0]) for rank in range(world)
    ]
    assert len(whole) == 1439 // 64 + (not drop_last)
    for step, batch in enumerate(whole):
        together = torch.cat([rank[step] for rank in ranks])
        assert torch.allclose(together, batch, atol=1e-6)


@pytest.mark.parametrize("start_step", [1, 7, 18])
def test_a_resume_at_any_step_goes_on_with_the_tail(manifest, start_step):
    whole = served(batches(split(manifest)), [2, 3])
    tail = served(batches(split(manifest)), [2, 3], start_step)
    assert len(tail) == len(whole) - start_step
    assert all(torch.equal(a, b) for a, b in zip(tail, whole[start_step:], strict=True))


def test_epochs_that_are_read_together_are_those_read_alone(manifest):
    together = served(batches(split(manifest)), [0, 1, 2])
    alone = [batch for epoch in range(3) for batch in served(batches(split(manifest)), [epoch])]
    assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))


def test_an_epoch_that_is_given_up_can_be_asked_for_again(manifest):
    source = batches(split(manifest))
    reading = source.epoch(0, 0, 2)
    first = next(reading)[0].images
    reading.close()
    again = next(source.epoch(0, 0, 2))[0].images
    assert torch.equal(first, again)


def test_no_more_is_held_than_lies_in_two_windows(manifest):
    found = split(manifest, window_rows=200, unit_rows=20)
    held: list[int] = []
    given = []

    def counted(units: Sequence[Unit], form: fast.Format, ahead: int) -> Iterator[fast.Block]:
        for block in threads(units, form, 1):
            given.append(len(block.pixels))
            yield block

    found.engine = counted
    rows = 0
    for micros in batches(found).epoch(0):
        rows += len(micros[0].images)
        held.append(sum(given) - rows)
    assert max(held) <= 2 * 250 + 20  # a window ends with a whole group of 50


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_evaluation_takes_every_row_once(manifest, memory, world):
    found = streamed(manifest, STREAM, "test")
    parts = [list(eval_batches(found, [0.0], [1.0], 50, rank, world)) for rank in range(world)]
    images = torch.cat([micro.images for part in parts for micro in part]).permute(0, 2, 3, 1) * 255
    assert np.array_equal(images.round().byte().numpy(), memory.test.images)
    assert torch.cat([micro.labels for part in parts for micro in part]).tolist() == memory.test.labels.tolist()


def test_few_pictures_a_class_can_be_streamed(manifest):
    few = Data(limit_per_class=7)
    memory, disk = read_dataset(manifest, few), read_dataset(manifest, few.model_copy(update={"cache": "stream"}))
    assert isinstance(disk.train, Streamed)
    assert np.bincount(disk.train.labels).tolist() == [7] * 10
    [images] = disk.train.read([[np.arange(70)]])
    assert np.array_equal(images, memory.train.images)
    assert (disk.mean, disk.std) == (memory.mean, memory.std)


def test_auto_goes_by_the_decoded_bytes_and_the_job_alone(manifest):
    need = 1797 * 64
    assert is_resident(manifest, Data(memory_bytes=2**20))
    assert is_resident(manifest, Data(image_size=24, memory_bytes=2**20)) == (need * 9 <= 2**20)
    assert not is_resident(manifest, Data(image_size=48, memory_bytes=2**20))
    assert is_resident(manifest, Data(image_size=48, memory_bytes=2**20, limit_per_class=1))
    assert not is_resident(manifest, Data(cache="stream"))
    with pytest.raises(DataError, match=r"more than data\.memory_bytes 1,048,576; raise it, set data\.cache stream"):
        is_resident(manifest, Data(image_size=48, memory_bytes=2**20, cache="resident"))


def test_scaled_and_coloured_alike_in_both_modes(manifest):
    keys = {"image_size": 12, "mode": "rgb"}
    memory, disk = (read_dataset(manifest, Data(cache=cache, **keys)) for cache in ("resident", "stream"))
    [images] = disk.val.read([[np.arange(179)]])
    assert images.shape == (179, 12, 12, 3)
    assert np.array_equal(images, memory.val.images)
    assert (disk.mean, disk.std) == (memory.mean, memory.std)


def plain_files() -> dict[str, bytes]:
    rng = np.random.default_rng(0)
    smooth = Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8)).resize((61, 47), Image.Resampling.BICUBIC)
    files = {}
    for kind, options in (("PNG", {}), ("JPEG", {"quality": 70}), ("JPEG", {"progressive": True})):
        for mode in ("L", "RGB"):
            out = io.BytesIO()
            smooth.convert(mode).save(out, kind, **options)
            files[f"{kind} {mode} {' '.join(options)}"] = out.getvalue()
    return files


@pytest.mark.parametrize("name", plain_files())
@pytest.mark.parametrize(("mode", "channels"), [("grey", 1), ("rgb", 3)])
def test_the_fast_decoder_gives_pillows_pixels(name, mode, channels):
    data = plain_files()[name]
    image = decode.open_picture(data)
    found = fast.decode_plain(data, fast.Format("encoded", (47, 61), (47, 61, channels), None))
    assert np.array_equal(found, decode.to_pixels(image, mode, None))
    for side in (16, 47, 80):
        found = fast.decode_plain(data, fast.Format("encoded", (47, 61), (side, side, channels), side))
        assert np.abs(found.astype(int) - decode.to_pixels(image, mode, side)).max() <= 2


@pytest.mark.parametrize("mode", ["auto", "grey", "rgb"])
@pytest.mark.parametrize("side", [None, 12])
def test_stored_pixels_are_those_of_stored_files(tmp_path, write_pictures, mode, side):
    write_pictures(tmp_path / "in", {"cat": 10, "dog": 10}, size=(20, 20))
    write_pictures(tmp_path / "in", {"cow": 10}, size=(20, 20), mode="L")
    found = []
    for store in ("encoded", "decoded"):
        cfg = Data(source="folder", path=str(tmp_path / "in"), store=store, mode=mode, image_size=side)
        data = read_dataset(shards.write_dataset(cfg, tmp_path / store), cfg)
        found.append(data)
        assert data.shape == (side or 20, side or 20, 1 if mode == "grey" else 3)
    assert np.array_equal(found[0].train.labels, found[1].train.labels)
    assert np.array_equal(found[0].train.images, found[1].train.images)


def test_pictures_of_many_sizes_cannot_be_stored_as_pixels(tmp_path, write_pictures):
    write_pictures(tmp_path / "in", {"cat": 10, "dog": 10}, size=(20, 20))
    write_pictures(tmp_path / "in", {"cow": 10}, size=(24, 20))
    cfg = Data(source="folder", path=str(tmp_path / "in"), store="decoded")
    with pytest.raises(
        DataError, match=r"20×20 and of 20×24 pixels can't be stored decoded; name one size \(--resize N"
    ):
        shards.write_dataset(cfg, tmp_path / "out")
    manifest = shards.write_dataset(cfg.model_copy(update={"resize": 16}), tmp_path / "out")
    assert manifest.size_range == (16, 16, 16, 16)


def test_a_split_for_another_process_needs_no_cluster(manifest):
    found = split(manifest)
    found.engine = lambda units, form, ahead: iter(())  # type: ignore[assignment]
    other = in_process(found)
    assert isinstance(other, Streamed)
    assert other.engine is threads
    assert found.engine is not threads


def test_a_shard_that_was_replaced_is_noticed(manifest, tmp_path):
    copy = shards.load_manifest(Path(shutil.copytree(manifest.path, tmp_path / "copy")))
    found = split(copy)
    Path(found.files[1]).write_bytes(Path(found.files[0]).read_bytes())
    with pytest.raises(DataError, match=r"train-00001\.parquet: changed since its labels were read"):
        list(found.read([[np.arange(len(found.labels))]]))


def test_labels_that_are_no_classes_are_refused(manifest, tmp_path):
    copy = shards.load_manifest(Path(shutil.copytree(manifest.path, tmp_path / "copy")))
    with pytest.raises(DataError, match=r"train-00000\.parquet: labels from 0 to 9, expected 0 to 4"):
        streamed(copy._replace(classes=copy.classes[:5]), STREAM, "train")


def test_a_shard_that_went_missing_is_named(manifest, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(manifest.path, copy)
    found = split(shards.load_manifest(copy))
    Path(found.files[0]).unlink()
    with pytest.raises(DataError, match=r"train-00000\.parquet.* shard the source again"):
        list(found.read([[np.arange(50)]]))
