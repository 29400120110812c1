"""The data plane on Ray: sharding as a Ray Data job, streaming as Ray tasks in order.

Streaming is one task a unit, `ahead` of them under way, results taken in the order of the units. Ray Data does the
same at 0.5 to 0.8 times the speed and with a second's start (benchmarks/ingest.py measures both): on two free CPUs its
tasks ran one after the other.
"""

from __future__ import annotations

import pickle
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

import ray
import ray.data
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from raydeep.data import fast, sharding
from raydeep.data.resident import Dataset
from raydeep.data.splits import read_dataset
from raydeep.errors import RaydeepError, ResourceError

if TYPE_CHECKING:
    from raydeep.data.shards import Manifest
    from raydeep.data.streamed import Unit
    from raydeep.sections import Data

STARVED_S = 60.0  # without a free CPU for so long, streaming gives up rather than wait for ever
STUCK_S = 600.0  # so does it where a unit takes so long for another reason

# Outside of any placement group: a trial's own has no CPU left for tasks, which would wait in it for ever.
OUTSIDE = PlacementGroupSchedulingStrategy(placement_group=None)  # type: ignore[arg-type]


def engine(units: Sequence[Unit], form: fast.Format, ahead: int) -> Iterator[fast.Block]:
    """Fetches units with Ray tasks (the contract is that of streamed.Engine); pixels arrive without copies.

    Raises:
        DataError: from a task.
        ResourceError: no CPU is free for the tasks.
    """
    left = iter(units)

    def more(count: int) -> list[Any]:
        return [_fetch.remote(unit, form) for unit in islice(left, count)]

    waiting = deque(more(ahead))
    try:
        while waiting:
            found = _result(waiting.popleft())
            waiting += more(1)
            yield found
    finally:
        for ref in waiting:
            ray.cancel(ref, force=False)


@ray.remote(num_cpus=1, max_retries=3, scheduling_strategy=OUTSIDE)
def _fetch(unit: Unit, form: fast.Format) -> fast.Block | RaydeepError:
    try:
        return fast.fetch(unit, form)
    except RaydeepError as err:  # as a value: Ray would wrap it
        return err


def _result(ref: Any) -> fast.Block:
    start = time.monotonic()
    while not ray.wait([ref], timeout=STARVED_S)[0]:
        free, there = (resources.get("CPU", 0.0) for resources in (ray.available_resources(), ray.cluster_resources()))
        waited = time.monotonic() - start
        if free < 1 or waited > STUCK_S:
            raise ResourceError(
                f"no pictures were decoded for {waited:.0f} s; of {there:g} CPUs {free:g} are free. Lower "
                f"scaling.workers or scaling.cpus_per_worker, add a node, check the storage of the shards, or set "
                f"data.cache resident"
            )
    found = ray.get(ref)
    if isinstance(found, RaydeepError):
        raise found
    return found


def runner(workers: int | None = None) -> sharding.Runner:
    """Runs the tasks of sharding on Ray Data, at most `workers` at once; None: as many as there are CPUs."""

    def run(work: sharding.Work, tasks: Sequence[sharding.Task], tell: Callable[[int], None]) -> None:
        if not tasks:
            return
        stop = threading.Event()

        def watch() -> None:
            while not stop.wait(1.0):
                tell(sharding.rows_done(work.folder, tasks))

        def do(batch: dict[str, Any]) -> dict[str, list[bytes]]:
            try:
                work(pickle.loads(batch["task"][0]))
            except (RaydeepError, OSError) as err:  # as a value: Ray Data would bury it in kinds of its own
                return {"error": [pickle.dumps(err)]}
            return {"error": [b""]}

        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        items: Any = ray.data.from_items(
            [{"task": pickle.dumps(task)} for task in tasks], override_num_blocks=len(tasks)
        )
        limit = {} if workers is None else {"concurrency": workers}
        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            for row in items.map_batches(do, batch_size=None, batch_format="numpy", **limit).iter_rows():
                if row["error"]:
                    raise pickle.loads(row["error"])
        finally:
            stop.set()
            thread.join()

    return run


def load(manifest: Manifest, cfg: Data, progress: sharding.Progress | None = None) -> Dataset:
    """The splits of a dataset, decoded into memory by Ray's tasks or streamed by them (see splits.read_dataset)."""
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
