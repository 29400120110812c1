"""What is done with datasets: prepare one for a job, shard, preview, info, verify, as a terminal shows it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ProcessPoolExecutor, wait
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raydeep import mirror
from raydeep.config import Job
from raydeep.disk import read_lines
from raydeep.errors import DataError
from raydeep.machine import memory_bytes, usable_cores
from raydeep.ops.console import Stage, Ui
from raydeep.run import Run, storage_folder

if TYPE_CHECKING:
    from raydeep.data import sharding
    from raydeep.data.inspection import Report
    from raydeep.data.sharding import Runner
    from raydeep.data.shards import Manifest

SHOWN = 10  # problems or pairs that are printed


def rate(stage: Stage, what: str = "pictures") -> Callable[[int, int], None]:
    """A progress function that shows rows a second and how long it will take yet."""
    start = time.monotonic()
    first: list[int] = []  # done already when it began (a continued command)

    def tell(done: int, total: int) -> None:
        first.append(done)
        speed = (done - first[0]) / max(1e-9, time.monotonic() - start)
        left = f", {(total - done) / speed:,.0f} s left" if speed and done < total else ""
        stage.update(done, total, f"{what}, {speed:,.0f}/s{left}")

    return tell


def prepare(job: Job, ui: Ui) -> Manifest:
    """Shard the job's source if need be, and check that job, data and network go together."""
    from raydeep.data import shards, splits

    with ui.stage("data") as stage:
        storage = storage_folder(job)
        mirror.check(storage)
        if storage.exists() and not storage.is_dir():
            raise DataError(f"storage: can't make run folders in {storage}: it is a file; set storage=FOLDER")
        run = _runner(job, None, storage / "datasets")
        manifest = shards.prepare(job.data, storage, rate(stage), run)
        resident = splits.is_resident(manifest, job.data)
        counts = manifest.splits["train"]["class_counts"]
        limit = job.data.limit_per_class or max(counts)
        rows = sum(min(count, limit) for count in counts)
        for key, batch in (("train", job.train.batch_size), ("recover", job.recover.batch_size or 1)):
            if batch > rows:
                most = f"larger than the train split of {rows:,} rows; lower it to at most {rows}"
                raise DataError(f"{key}.batch_size {batch} is {most}")
        height, width, channels = manifest.shape(job.data)
        stage.text = (
            f"{rows:,} train, {manifest.rows('val'):,} val, {manifest.rows('test'):,} test pictures of "
            f"{height}×{width}×{channels}, {len(manifest.classes)} classes"
            f"{'' if resident else ', streamed'}"
        )
        low = min(manifest.stored)
        if height > low:
            stage.text += f"; pictures of {low} pixels are enlarged"
        if manifest.quarantined:
            stage.text += f"; {manifest.quarantined} in quarantine ({manifest.path / 'quarantine.jsonl'})"
    return manifest


def _runner(job: Job, workers: int | None, folder: Path) -> Runner:
    """Runs the tasks of sharding: on Ray where a split has more than one; a single one gains nothing from it."""
    from raydeep.data import sharding
    from raydeep.data.sources import SPLITS

    def run(work: sharding.Work, tasks: Sequence[sharding.Task], tell: Callable[[int], None]) -> None:
        if len(tasks) <= len(SPLITS):
            sharding.one_by_one(work, tasks, tell)
            return
        if mirror.address(work.folder) is not None:  # other nodes can't write there
            processes(work, tasks, tell, workers or usable_cores())
            return
        from raydeep.train import cluster

        with cluster.cluster(job, folder / f"{job.data.source.replace(':', '-')}.ray.log"):
            from raydeep.data import stream

            at_once = workers if workers or os.environ.get("RAY_ADDRESS") else usable_cores()
            stream.runner(at_once)(work, tasks, tell)

    return run


def processes(work: sharding.Work, tasks: Sequence[sharding.Task], tell: Callable[[int], None], workers: int) -> None:
    """A runner of sharding: processes of this machine."""
    from raydeep.data import sharding

    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        left: set[Future[None]] = {pool.submit(_do, work, task) for task in tasks}
        try:
            while left:
                done, left = wait(left, timeout=1.0, return_when=FIRST_EXCEPTION)
                for future in done:
                    future.result()
                tell(sharding.rows_done(work.folder, tasks))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _do(work: sharding.Work, task: sharding.Task) -> None:
    work(task)


def shard(job: Job, out: Path, workers: int | None, ui: Ui) -> Manifest:
    """Write the dataset of a job's data section.

    Args:
        job: the job.
        out: the new folder.
        workers: tasks at once; None: one a core.
        ui: the terminal.
    """
    from raydeep.data import shards

    with ui.stage("shard") as stage:
        if mirror.address(out) is not None and mirror.exists(out / "dataset.json"):
            raise DataError(f"{mirror.name(out)}: exists; name a new folder or remove it")
        run = _runner(job, workers, mirror.real(out).parent)
        manifest = shards.write_dataset(job.data, out, rate(stage), run)
        mirror.push_folder(out, last="dataset.json")
        rows = ", ".join(f"{manifest.rows(split):,} {split}" for split in manifest.splits)
        stage.text = f"{rows}, {len(manifest.classes)} classes, {manifest.quarantined} in quarantine"
    ui.say(f"dataset    {mirror.name(out)}")
    if job.data.limit_per_class is not None:
        ui.say("note       data.limit_per_class takes effect when a job trains; the shards hold all pictures")
    return manifest


def preview(job: Job, out: Path, rows: int, columns: int, ui: Ui) -> Path:
    """Draw a few pictures of train beside what training makes of them.

    Args:
        job: the job.
        out: the picture to write, PNG.
        rows: pictures of train.
        columns: the original and its versions in the first epochs.
        ui: the terminal.
    """
    from raydeep.data import splits
    from raydeep.data.augment import Augmenter
    from raydeep.data.preview import contact_sheet
    from raydeep.disk import atomic

    manifest = prepare(job, ui)
    train = splits.streamed(manifest, job.data, "train")
    chosen = train.order(job.seed, 0, job.train.batch_size)[:rows]
    [images] = train.read([[chosen]])
    mean, std = manifest.mean, manifest.std
    if len(mean) != train.shape[2]:
        mean, std = [0.5] * train.shape[2], [0.25] * train.shape[2]  # taken off again when drawn
    sheet = contact_sheet(
        images, train.labels[chosen], manifest.classes, Augmenter(job.augment, mean, std), job.seed, columns
    )
    with atomic(out) as aside:
        sheet.save(aside, "PNG")
    ui.say(f"preview    {out}")
    return out


def say_input(job: Job, run: Run, manifest: Manifest, ui: Ui) -> None:
    """One line: was the training of a run bound by its input?"""
    from raydeep.data import meter, splits

    rows = [row for row in read_lines(run.path / "metrics.jsonl") if row.get("stage") == "train"]
    if rows:
        cfg = job.data
        cache = "resident" if splits.is_resident(manifest, cfg) else "stream"
        text = meter.verdict(rows, cache, splits.decoded_bytes(manifest, cfg), memory_bytes())
        run.note(input=text)
        ui.say(f"  input      {text}")


def show_info(facts: dict[str, Any], ui: Ui) -> None:
    """Print what inspection.info gives."""
    heights, widths = ("–".join(map(str, sorted(set(facts[key])))) for key in ("height", "width"))
    ui.say(f"dataset    {facts['path']}")
    ui.say(f"hash       {facts['hash']}")
    ui.say(f"pictures   {facts['rows']:,}, {heights}×{widths} pixels, {facts['mode']}, stored {facts['store']}")
    if facts["decoded_bytes"] is not None:
        ui.say(f"decoded    {facts['decoded_bytes']:,} bytes")
    ui.say(f"quarantine {facts['quarantined']:,}" + (" (quarantine.jsonl)" if facts["quarantined"] else ""))
    for name, split in facts["splits"].items():
        ui.say(f"{name:<10} {split['rows']:,} pictures, {split['shards']} shards, {split['bytes']:,} bytes")
    ui.say("")
    names = list(facts["splits"])
    width = max(5, *(len(label) for label in facts["splits"]["train"]["class_counts"]))
    ui.say(f"{'class':<{width}} " + " ".join(f"{name:>8}" for name in names) + "   share of train")
    train = facts["splits"]["train"]["class_counts"]
    for label, count in train.items():
        bar = "█" * max(1, round(24 * count / max(train.values())))
        counts = " ".join(f"{facts['splits'][name]['class_counts'][label]:>8,}" for name in names)
        ui.say(f"{label:<{width}} {counts}   {count / max(1, sum(train.values())):>6.1%} {bar}")
    if (ratio := facts["splits"]["train"]["imbalance"]) and ratio > 1.5:
        ui.say(f"the largest class of train has {ratio:.1f} times the pictures of the smallest")


def verify(path: Path, ui: Ui, quiet: bool) -> dict[str, Any]:
    """Verify a dataset, print what is found unless `quiet`, and give it back ready for JSON."""
    from raydeep.data import inspection

    if quiet:
        report = inspection.verify(path)
    else:
        with ui.stage("verify") as stage:
            report = inspection.verify(path, rate(stage))
            stage.text = f"{len(report.problems)} problems, {len(report.pairs)} pairs of pictures in two splits"
        _show(report, ui)
    return {**report._asdict(), "pairs": [pair._asdict() for pair in report.pairs]}


def _show(report: Report, ui: Ui) -> None:
    for split, count in report.repeated.items():
        if count:
            ui.say(f"{split}: {count:,} pictures stand in it more than once, pixel for pixel")
    for same, words in ((True, "are the same, pixel for pixel"), (False, "look alike (as thumbnails)")):
        pairs = [pair for pair in report.pairs if pair.same is same]
        if pairs:
            ui.say(f"{len(pairs):,} pairs of pictures in two splits {words}; the score on them is no test:")
            for pair in pairs[:SHOWN]:
                ui.say(f"  {pair.first}  =  {pair.second}")
    if not report.pairs:
        ui.say("no picture of one split found in another")
    for problem in report.problems[:SHOWN]:
        ui.say(f"error: {problem}")
    if len(report.problems) > SHOWN:
        ui.say(f"and {len(report.problems) - SHOWN:,} problems more (--json lists all)")
