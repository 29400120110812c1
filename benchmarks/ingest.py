"""Images a second from shards to a training worker: raydeep's two modes beside torch's DataLoader over the same shards.

All peers give uint8 batches of 128, shuffled each epoch, with the same number of decoding processes. Every peer runs
whole epochs in one go; peers take turns, round after round. What is timed begins when the first epoch ends.
"""

from __future__ import annotations

import io
import logging
import multiprocessing
import os
import pickle
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import harness
import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image

from raydeep.config import Augment, Data
from raydeep.data import fast, shards, splits
from raydeep.data.augment import Augmenter
from raydeep.data.batches import Batches
from raydeep.data.streamed import Streamed

BATCH = 128
PROCESSES = 2
WINDOW_BYTES = 32 * 2**20  # small, so that what is read ahead of the clock is a small part of what is timed


class Untouched(Augmenter):
    """Gives the pictures as they came: only the ingest is timed."""

    def __call__(self, images: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        return images


def dataset(source: Data, work: Path, copies: int) -> shards.Manifest:
    """Shards of a source, the train ones `copies` times (hard links)."""
    manifest = shards.write_dataset(source, work / source.source)
    train = manifest.splits["train"]
    originals = list(train["shards"])
    for copy in range(1, copies):
        for shard in originals:
            name = f"copy{copy}-{shard['name']}"
            os.link(manifest.path / shard["name"], manifest.path / name)
            train["shards"].append({**shard, "name": name})
    return manifest


def ray_data(units: Sequence[Any], form: fast.Format, ahead: int) -> Iterator[fast.Block]:
    """raydeep's units as a Ray Data pipeline, in order: what its stream mode would be on Ray Data."""
    import ray

    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False

    def work(batch: dict[str, Any]) -> dict[str, np.ndarray]:
        return {"pixels": fast.fetch(pickle.loads(batch["unit"][0]), form).pixels}

    items = ray.data.from_items([{"unit": pickle.dumps(unit)} for unit in units], override_num_blocks=len(units))
    done = items.map_batches(work, batch_size=None, batch_format="numpy")
    for batch in done.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=ahead):
        yield fast.Block(batch["pixels"], 0.0, 0.0)


class Encoded(torch.utils.data.Dataset[tuple[np.ndarray, int]]):
    """The usual way: encoded pictures of the shards in memory, one decoded at a time."""

    def __init__(self, split: Streamed, decode: Callable[[bytes], np.ndarray]) -> None:
        self.images = [x for file in split.files for x in pq.read_table(file, columns=["image"]).column(0).to_pylist()]
        self.labels, self.decode = split.labels, decode

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[np.ndarray, int]:
        return self.decode(self.images[i]), int(self.labels[i])


def torchvision_decoder(form: fast.Format) -> Callable[[bytes], np.ndarray]:
    """What torchvision's documentation recommends: decode_image, then Resize and CenterCrop of transforms.v2."""
    import warnings

    from torchvision.io import ImageReadMode, decode_image
    from torchvision.transforms import v2

    warnings.filterwarnings("ignore", message="The given buffer is not writable")
    scale = v2.Compose([v2.Resize(form.side, antialias=True), v2.CenterCrop(form.side)]) if form.side else None

    def decode(data: bytes) -> np.ndarray:
        image = decode_image(torch.frombuffer(data, dtype=torch.uint8), ImageReadMode.RGB)
        image = scale(image) if scale is not None else image
        return np.ascontiguousarray(image.permute(1, 2, 0).numpy())

    return decode


def epochs_of(batches: Iterator[int], rows: int, epochs: int) -> dict[str, float]:
    """Run whole epochs; seconds to the first batch and of the epochs after the first."""
    start = time.perf_counter()
    first = end_of_first = 0.0
    seen = 0
    for size in batches:
        first = first or time.perf_counter() - start
        seen += size
        if not end_of_first and seen >= rows // BATCH * BATCH:
            end_of_first = time.perf_counter() - start
    return {"first_s": first, "after_s": time.perf_counter() - start - end_of_first}


def raydeep_epochs(split: Any, epochs: int) -> Iterator[int]:
    """Sizes of the batches of raydeep."""
    batches = Batches(split, Untouched(Augment(), [0.5] * 3, [0.5] * 3), BATCH, 0)
    for epoch in range(epochs):
        for [micro] in batches.epoch(epoch, 0, epochs):
            yield len(micro.labels)
    batches.close()


def loader_epochs(encoded: Encoded, epochs: int) -> Iterator[int]:
    """Sizes of the batches of a DataLoader."""
    loader = torch.utils.data.DataLoader(
        encoded, BATCH, shuffle=True, drop_last=True, num_workers=PROCESSES, persistent_workers=True
    )
    for _ in range(epochs):
        for _, labels in loader:
            yield len(labels)


def _loop(split: Streamed, rows: np.ndarray) -> None:
    torch.set_num_threads(1)
    for start in range(0, len(rows), 1024):
        fast.fetch(split.unit(rows[start : start + 1024]), split.form)


def decode_limit(split: Streamed) -> float:
    """Images a second of one plain decode loop in each of PROCESSES processes, nothing handed over."""
    local = splits.in_process(split)
    context = multiprocessing.get_context("fork")
    parts = np.array_split(np.arange(len(split.labels)), PROCESSES)
    workers = [context.Process(target=_loop, args=(local, part)) for part in parts]
    start = time.perf_counter()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return len(split.labels) / (time.perf_counter() - start)


def read_limit(split: Streamed) -> float:
    """Bytes a second of reading the shards from the page cache."""
    sizes = 0
    start = time.perf_counter()
    for file in split.files:
        sizes += len(Path(file).read_bytes())
    return sizes / (time.perf_counter() - start)


def decoders(split: Streamed, name: str, results: list[dict[str, Any]]) -> None:
    """Images a second of each decoder in one loop: why fast.decode_plain is what it is."""
    images = Encoded(split, bytes).images[:2000]  # type: ignore[arg-type]
    form = split.form._replace(side=None)

    def pillow(data: bytes) -> np.ndarray:
        return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))

    peers = {
        "Pillow": pillow, "torchvision": torchvision_decoder(form),
        "kornia_rs (chosen)": lambda data: fast.decode_plain(data, form),
    }  # fmt: skip
    try:
        import simplejpeg

        if images[0][:2] == b"\xff\xd8":
            peers["simplejpeg"] = lambda data: simplejpeg.decode_jpeg(data)
    except ImportError:
        pass
    timed = harness.interleaved({n: lambda f=f: [f(x) for x in images] for n, f in peers.items()}, 5)
    for peer, found in timed.items():
        facts = {"spread": found.spread, "n": len(found.seconds)}
        results.append(harness.result(f"{name} decoder {peer}", len(images) / found.median_s, "images/s", **facts))


def compare(
    name: str, manifest: shards.Manifest, cfg: Data, rounds: int, epochs: int, results: list[dict[str, Any]]
) -> None:
    """The peers over one dataset."""
    from raydeep.data import stream

    print(f"{name}:")
    split = splits.streamed(manifest, cfg, "train", stream.engine)
    rows = len(split.labels)
    resident = splits.read_dataset(manifest, cfg.model_copy(update={"cache": "resident"}), stream.engine).train
    on_ray_data = splits.streamed(manifest, cfg, "train", ray_data)
    same, usual = Encoded(split, lambda x: fast.decode_plain(x, split.form)), torchvision_decoder(split.form)
    peers: dict[str, Callable[[], Iterator[int]]] = {
        "stream": lambda: raydeep_epochs(split, epochs),
        "stream on Ray Data": lambda: raydeep_epochs(on_ray_data, epochs),
        "DataLoader, same decoder": lambda: loader_epochs(same, epochs),
        "DataLoader, torchvision decoder": lambda: loader_epochs(Encoded(split, usual), epochs),
        "resident": lambda: raydeep_epochs(resident, epochs),
    }
    found: dict[str, list[dict[str, float]]] = {peer: [] for peer in peers}
    for turn in range(rounds + 1):
        for peer, run in peers.items():
            facts = epochs_of(run(), rows, epochs)
            if turn:  # the first round starts worker processes and fills caches
                found[peer].append(facts)
    served = (epochs - 1) * (rows // BATCH * BATCH)
    after = {peer: harness.Timing([f["after_s"] for f in facts]) for peer, facts in found.items()}
    facts = {"n": rounds, "epochs": epochs - 1, "rows": rows}
    for peer, timing in after.items():
        rate = served / timing.median_s
        results.append(harness.result(f"{name} {peer}", rate, "images/s", spread=timing.spread, **facts))
        first = float(np.median([f["first_s"] for f in found[peer]]))
        results.append(harness.result(f"{name} {peer}: first batch", first, "s", n=rounds))
    for other, target in (("DataLoader, same decoder", ">= 1.0"), ("DataLoader, torchvision decoder", ">= 1.0")):
        value, spread = harness.ratio(after[other], after["stream"])
        results.append(harness.result(f"{name} stream / {other}", value, "ratio", target, spread=spread, **facts))
    value, spread = harness.ratio(after["stream on Ray Data"], after["stream"])
    results.append(harness.result(f"{name} stream / the same on Ray Data", value, "ratio", spread=spread, **facts))
    value, spread = harness.ratio(after["stream"], after["resident"])
    results.append(harness.result(f"{name} resident / stream", value, "ratio", ">= 30.0", spread=spread, **facts))
    limits = [decode_limit(split) for _ in range(3)]
    results.append(harness.result(f"{name} limit: decode loops, {PROCESSES} processes", max(limits), "images/s", n=3))
    speed = max(read_limit(split) for _ in range(3))
    results.append(harness.result(f"{name} limit: read from page cache", speed / 2**20, "MiB/s", n=3))
    decoders(split, name, results)


def main() -> None:
    args = harness.arguments(__doc__)
    folder = harness.data_folder(args, "cifar10", "caltech101-10")
    os.environ |= {"RAY_DATA_DISABLE_PROGRESS_BARS": "1", "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}
    import ray

    torch.set_num_threads(1)
    work = Path(tempfile.mkdtemp(prefix="rd"))
    rounds, results = (2 if args.quick else 4), []
    try:
        ray.init(
            address="local", num_cpus=PROCESSES, include_dashboard=False, log_to_driver=False,
            logging_level=logging.ERROR, _temp_dir=str(work / "ray"),
        )  # fmt: skip
        import ray.data

        logging.getLogger("ray.data").setLevel(logging.ERROR)
        png = Data(source="parquet", path=str(folder / "cifar10"), cache="stream", window_bytes=WINDOW_BYTES)
        compare("CIFAR-10 PNG", dataset(png, work, 1), png, rounds, 4 if args.quick else 6, results)
        jpeg = Data(
            source="folder", path=str(folder / "caltech101-10"), cache="stream", image_size=224, window_bytes=64 * 2**20
        )
        compare("Caltech JPEG 224", dataset(jpeg, work, 4), jpeg, rounds, 4 if args.quick else 5, results)
    finally:
        ray.shutdown()
        shutil.rmtree(work, ignore_errors=True)
    harness.finish("ingest", results, args, processes=PROCESSES, batch=BATCH, torch_threads=1)


if __name__ == "__main__":
    sys.exit(main())
