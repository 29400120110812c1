"""Memory of the stream mode as the dataset grows: Fashion-MNIST at 1, 4 and 16 times its size, by repeating shards.

Each size runs in a process of its own with a Ray of its own, one epoch and a bit, and is sampled all along: memory
that the training worker and Ray's workers hold alone (USS), and what the object store takes of /dev/shm.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import harness
import psutil
from ingest import dataset, raydeep_epochs

from raydeep.config import Data
from raydeep.data import shards, splits

SIZES = (1, 4, 16)
REPEATS = 3
WINDOW_BYTES = 16 * 2**20  # well below the smallest size (47 MB), so that every size is streamed through windows


class Sampler:
    """The most that was seen, in bytes."""

    def __init__(self) -> None:
        self.worker = self.tasks = self.store = 0
        self.base = self._shm()
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True)

    @staticmethod
    def _shm() -> int:
        found = os.statvfs("/dev/shm")
        return (found.f_blocks - found.f_bfree) * found.f_frsize

    def _run(self) -> None:
        me = psutil.Process()
        while not self.stop.wait(0.2):
            self.worker = max(self.worker, me.memory_full_info().uss)
            total = 0
            for child in me.children(recursive=True):
                try:
                    if "ray::" in " ".join(child.cmdline()):
                        total += child.memory_full_info().uss
                except psutil.Error:
                    continue
            self.tasks = max(self.tasks, total)
            self.store = max(self.store, self._shm() - self.base)


def child(folder: str, copies: int, work: str) -> None:
    """Serve the dataset once and print the peaks."""
    os.environ |= {"RAY_DATA_DISABLE_PROGRESS_BARS": "1", "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}
    import ray

    cfg = Data(source="parquet", path=folder, cache="stream", window_bytes=WINDOW_BYTES)
    manifest = shards.Manifest(**json.loads((Path(work) / f"{copies}.json").read_text()))
    manifest = manifest._replace(path=Path(manifest.path), size_range=tuple(manifest.size_range))
    sampler = Sampler()
    ray.init(
        address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR,
        _temp_dir=str(Path(work) / "ray"), object_store_memory=2 * 2**30,
    )  # fmt: skip
    import ray.data

    from raydeep.data import stream

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    split = splits.streamed(manifest, cfg, "train", stream.engine)
    sampler.thread.start()
    start = time.perf_counter()
    served = sum(raydeep_epochs(split, max(1, 16 // copies)))  # the same number of pictures for every size
    seconds = time.perf_counter() - start
    sampler.stop.set()
    sampler.thread.join()
    ray.shutdown()
    peaks = {"worker": sampler.worker, "tasks": sampler.tasks, "store": sampler.store}
    print(json.dumps({**peaks, "served": served, "seconds": seconds, "decoded": len(split.labels) * 784}))


def main() -> None:
    args = harness.arguments(__doc__)
    folder = harness.data_folder(args, "fashion-mnist") / "fashion-mnist"
    work = Path(tempfile.mkdtemp(prefix="rd"))
    results = []
    try:
        cfg = Data(source="parquet", path=str(folder))
        for copies in SIZES[: 2 if args.quick else 3]:
            manifest = dataset(cfg, work / str(copies), copies)
            facts = {**manifest._asdict(), "path": str(manifest.path)}
            (work / f"{copies}.json").write_text(json.dumps(facts))
        sizes = SIZES[: 2 if args.quick else 3]
        found: dict[int, list[dict[str, float]]] = {copies: [] for copies in sizes}
        for _ in range(1 if args.quick else REPEATS):
            for copies in sizes:
                script = [sys.executable, __file__, "--child", str(folder), str(copies), str(work)]
                said = subprocess.run(script, capture_output=True, text=True, check=True)
                found[copies].append(json.loads(said.stdout.splitlines()[-1]))
        for part in ("worker", "tasks", "store"):
            peaks = {copies: [run[part] / 2**20 for run in runs] for copies, runs in found.items()}
            for copies, seen in peaks.items():
                name = f"{part}: {copies}×, {found[copies][0]['decoded'] / 2**20:.0f} MiB decoded"
                std = statistics.stdev(seen) if len(seen) > 1 else 0.0
                results.append(harness.result(name, statistics.median(seen), "MiB", n=len(seen), std=std))
            value = statistics.median(peaks[max(sizes)]) / statistics.median(peaks[1])
            results.append(harness.result(f"{part}: {max(sizes)}× over 1×", value, "ratio", "<= 1.25", n=len(peaks[1])))
    finally:
        shutil.rmtree(work, ignore_errors=True)
    harness.finish("memory", results, args, window_bytes=WINDOW_BYTES)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], int(sys.argv[3]), sys.argv[4])
    else:
        main()
