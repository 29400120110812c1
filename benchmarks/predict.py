"""Pictures a second a core of `raydeep predict --out` beside a plain loop of Pillow and onnxruntime in one process.

The loop is what its users would write: read, decode, scale and crop with Pillow, batches of 32 on one thread. raydeep
runs two workers on two cores, into a Parquet file. Its speed is that of the steady state, from the end of the first
unit to that of the last but one: by the clock over its two cores, which also run the driver, and by the CPU seconds of
all its processes (driver, actors, raylet, GCS), which other work on the machine changes less. Starting Ray and the
actors is told apart. Both see the same files and label them the same.

- overhead: 28×28 PNGs and a network of 11 µs a picture: what is not decoding or arithmetic weighs most
- inference: JPEGs of photographs at 224 pixels and ResNet-18
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import harness
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from raydeep.compress import pack
from raydeep.deploy import export
from raydeep.deploy.predict import BATCH, Model
from raydeep.deploy.runtimes import session
from raydeep.model import artifact

WORKERS = 2


def photographs(count: int) -> list[bytes]:
    """JPEGs of varied size that compress like photographs: smoothed noise."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(min(count, 64)):
        small = Image.fromarray(rng.integers(0, 256, (24, 32, 3), np.uint8))
        size = (int(rng.integers(256, 400)), int(rng.integers(256, 400)))
        out = io.BytesIO()
        small.resize(size, Image.Resampling.BICUBIC).save(out, "JPEG", quality=90)
        found.append(out.getvalue())
    return (found * (count // len(found) + 1))[:count]


def drawings(count: int) -> list[bytes]:
    """PNGs of 28×28 grey pixels, as those of Fashion-MNIST: 500 bytes about."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(min(count, 512)):
        small = Image.fromarray(rng.integers(0, 256, (7, 7), np.uint8)).resize((28, 28), Image.Resampling.BICUBIC)
        out = io.BytesIO()
        small.save(out, "PNG")
        found.append(out.getvalue())
    return (found * (count // len(found) + 1))[:count]


def model(work: Path, name: str, args: dict[str, Any], shape: tuple[int, int, int]) -> Model:
    """A model folder of a network that was not trained."""
    spec = artifact.make_spec(name, args, [str(i) for i in range(10)], shape, [0.5] * shape[2], [0.5] * shape[2])
    torch.manual_seed(0)
    export.write_model(work / name, pack.pack(*artifact.freeze(artifact.build(spec).eval(), spec)))
    return Model.open(work / name)


def cpu_s() -> float:
    """CPU seconds of this process and all below it: Ray's own among them."""
    total = 0.0
    me = psutil.Process()
    for process in [me, *me.children(recursive=True)]:
        with contextlib.suppress(psutil.Error):
            total += sum(process.cpu_times()[:2])
    return total


def loop(table: Path, opened: Model) -> tuple[float, float, np.ndarray]:
    """Seconds by clock and of CPU of the plain loop over a file, and the classes; its session is made before."""
    run = session((opened.path / "model.onnx").read_bytes())
    height, width, channels = opened.shape
    found = []

    def pictures() -> Iterator[np.ndarray]:
        with pq.ParquetFile(table) as file:
            for group in range(file.num_row_groups):
                for data in file.read_row_group(group, columns=["image"]).column(0):
                    picture = Image.open(io.BytesIO(data.as_py())).convert("L" if channels == 1 else "RGB")
                    if picture.size != (width, height):
                        side = min(picture.size)
                        left, top = (picture.width - side) // 2, (picture.height - side) // 2
                        picture = picture.crop((left, top, left + side, top + side))
                        picture = picture.resize((width, height), Image.Resampling.BILINEAR)
                    yield np.asarray(picture).reshape(opened.shape)

    start, began = time.perf_counter(), time.process_time()
    held = []
    for pixels in pictures():
        held.append(pixels)
        if len(held) == BATCH:
            found.append(run.run(None, {"images": np.stack(held)})[0])
            held = []
    if held:
        found.append(run.run(None, {"images": np.stack(held)})[0])
    return time.perf_counter() - start, time.process_time() - began, np.concatenate(found).argmax(1)


def batches(table: Path, opened: Model, out: Path) -> tuple[float, float, float, np.ndarray]:
    """Pictures a second and a CPU second in the steady state, seconds until the first unit was done, the classes."""
    from raydeep.data.decode import MAX_PIXELS
    from raydeep.data.unlabelled import open_pictures
    from raydeep.deploy import batch
    from raydeep.sections import Data

    ticks: list[tuple[float, int, float]] = []
    pictures = open_pictures([str(table)], opened.classes, Data())
    start = time.perf_counter()
    batch.predict_source(
        opened, pictures, out, max_pixels=MAX_PIXELS, workers=WORKERS,
        tell=lambda done, total: ticks.append((time.perf_counter() - start, done, cpu_s())),
    )  # fmt: skip
    first, last = ticks[0], ticks[-WORKERS]  # in the very end one worker waits for the other
    labels = pq.read_table(out, columns=["label"]).column(0).to_pylist()
    done = last[1] - first[1]
    classes = np.array([int(label) for label in labels])
    return done / (last[0] - first[0]), done / (last[2] - first[2]), first[0], classes


def compare(
    name: str, table: Path, opened: Model, work: Path, rounds: int, target: str | None, results: list[dict[str, Any]]
) -> None:
    """The loop and raydeep in turn, a round that does not count first."""
    print(f"{name}:")
    rows = pq.ParquetFile(table).metadata.num_rows
    plain: list[float] = []
    plain_cpu: list[float] = []
    steady: list[float] = []
    steady_cpu: list[float] = []
    starts: list[float] = []
    for turn in range(rounds + 1):
        seconds, cpu, alone = loop(table, opened)
        rate, rate_cpu, start_s, found = batches(table, opened, work / "out.parquet")
        assert (alone == found).mean() > 0.999, "the two label differently"
        if turn:
            plain.append(rows / seconds)
            plain_cpu.append(rows / cpu)
            steady.append(rate / WORKERS)
            steady_cpu.append(rate_cpu)
            starts.append(start_s)
    facts = {"n": rounds, "rows": rows}
    for what, values, unit in (
        ("plain loop, one process", plain, "pictures/s"), ("raydeep, a core of two", steady, "pictures/s"),
        ("plain loop, a CPU second", plain_cpu, "pictures"), ("raydeep, a CPU second", steady_cpu, "pictures"),
        ("raydeep, until the first unit is done", starts, "s"),
    ):  # fmt: skip
        timing = harness.Timing(values)
        results.append(harness.result(f"{name}: {what}", timing.median_s, unit, spread=timing.spread, **facts))
    for what, mine, theirs in (("by the clock", steady, plain), ("by CPU seconds", steady_cpu, plain_cpu)):
        shares = harness.Timing([a / b for a, b in zip(mine, theirs, strict=True)])
        title = f"{name}: raydeep over the loop, a core, {what}"
        results.append(harness.result(title, shares.median_s, "ratio", target, spread=shares.spread, **facts))


def main() -> None:
    args = harness.arguments(__doc__)
    torch.set_num_threads(1)
    import ray

    rounds = 2 if args.quick else 5
    with tempfile.TemporaryDirectory(prefix="rdb") as name:
        work = Path(name)
        cases = [
            ("overhead", drawings(30_000 if args.quick else 60_000), "seed", {"width": 8}, (28, 28, 1)),
            ("inference", photographs(320 if args.quick else 640), "resnet18", {}, (224, 224, 3)),
        ]
        started = time.perf_counter()
        ray.init(
            address="local", num_cpus=WORKERS, include_dashboard=False, log_to_driver=False,
            logging_level=logging.ERROR, _temp_dir=os.environ.get("RAY_TMPDIR"),
        )  # fmt: skip
        results = [harness.result("Ray's own start", time.perf_counter() - started, "s", n=1)]
        for label, data, network, arguments, shape in cases:
            table = work / f"{label}.parquet"
            pq.write_table(
                pa.table({"image": pa.array(data, pa.binary())}), table, row_group_size=1000, compression="none"
            )
            compare(label, table, model(work, network, arguments, shape), work, rounds, ">= 0.9", results)
        ray.shutdown()
    harness.finish("predict", results, args, workers=WORKERS, batch=BATCH, load=os.getloadavg())


if __name__ == "__main__":
    main()
