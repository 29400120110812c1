"""The two Ray Data jobs of the data plane: sharding a source, and streaming shards into batches.

Both are one pipeline: items in a fixed order, one task an item, results in the order of the items.
"""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import ray
import ray.data

from raydeep.data import fast, sharding
from raydeep.data.resident import Dataset
from raydeep.data.splits import read_dataset
from raydeep.errors import RaydeepError

if TYPE_CHECKING:
    from raydeep.data.shards import Manifest
    from raydeep.sections import Data

ERROR = "error"  # key of a result that is a pickled RaydeepError: Ray Data would bury it in its own kinds


def engine(units: Sequence[Any], form: fast.Format, ahead: int) -> Iterator[fast.Block]:
    """Fetches units on Ray Data (the contract is that of streamed.Engine); pixels arrive without copies."""

    def work(item: bytes) -> dict[str, np.ndarray]:
        block = fast.fetch(pickle.loads(item), form)
        seconds = np.zeros((len(block.pixels), 2))
        seconds[0] = block.read_s, block.decode_s
        return {"pixels": block.pixels, "seconds": seconds}

    for found in _pipeline([pickle.dumps(unit) for unit in units], work, ahead):
        yield fast.Block(found["pixels"], *found["seconds"].sum(0).tolist())


def runner(workers: int | None = None) -> sharding.Runner:
    """Runs the tasks of sharding on Ray Data, at most `workers` at once; None: as many as there are CPUs."""

    def run(work: sharding.Work, tasks: Sequence[sharding.Task], tell: Callable[[int], None]) -> None:
        stop = threading.Event()

        def watch() -> None:
            while not stop.wait(1.0):
                tell(sharding.rows_done(work.folder, tasks))

        def do(item: bytes) -> dict[str, np.ndarray]:
            work(pickle.loads(item))
            return {"done": np.ones(1)}

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            for _ in _pipeline([pickle.dumps(task) for task in tasks], do, 1, workers):
                pass
        finally:
            stop.set()
            thread.join()

    return run


def _pipeline(
    items: list[bytes], work: Callable[[bytes], dict[str, np.ndarray]], ahead: int, workers: int | None = None
) -> Iterator[dict[str, np.ndarray]]:
    """What `work` makes of each item, in order; one Ray Data task an item.

    Args:
        items: pickled arguments.
        work: gives columns.
        ahead: results that are fetched before they are asked for.
        workers: most tasks at once.

    Raises:
        RaydeepError: raised by a task.
    """
    if not items:
        return
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    context.print_on_execution_start = False

    def task(batch: dict[str, Any]) -> dict[str, np.ndarray]:
        try:
            return work(batch["item"][0])
        except RaydeepError as err:
            return {ERROR: np.frombuffer(pickle.dumps(err), np.uint8)}

    rows: Any = ray.data.from_items([{"item": item} for item in items], override_num_blocks=len(items))
    limit = {} if workers is None else {"concurrency": workers}
    done = rows.map_batches(task, batch_size=None, batch_format="numpy", **limit)
    for batch in done.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=ahead):
        if ERROR in batch:
            raise pickle.loads(batch[ERROR].tobytes())
        yield batch


def load(manifest: Manifest, cfg: Data, progress: sharding.Progress | None = None) -> Dataset:
    """The splits of a dataset, decoded into memory by Ray Data or streamed by it (see splits.read_dataset)."""
    return read_dataset(manifest, cfg, engine, progress)


class Shared(NamedTuple):
    """A Dataset in the object store: one copy a node, read without copying."""

    refs: dict[str, Any]
    classes: list[str]
    mean: list[float]
    std: list[float]

    def get(self) -> Dataset:
        """The dataset; its arrays are read-only views of the object store."""
        names = list(self.refs)
        parts = dict(zip(names, ray.get([self.refs[name] for name in names]), strict=True))
        return Dataset(parts["train"], parts["val"], parts["test"], self.classes, self.mean, self.std)


def share(data: Dataset) -> Shared:
    """Put a dataset into the object store."""
    refs = {name: ray.put(getattr(data, name)) for name in ("train", "val", "test")}
    return Shared(refs, data.classes, data.mean, data.std)
