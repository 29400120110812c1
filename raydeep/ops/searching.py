"""The search stage: what trials are held against, the live view, trackers, and what is said when it ends badly."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from raydeep import mirror
from raydeep.config import Job
from raydeep.disk import sha256_file
from raydeep.errors import RaydeepError
from raydeep.ops.console import Stage, Ui
from raydeep.run import Run

if TYPE_CHECKING:
    from raydeep.compress.plan import Dense
    from raydeep.data.resident import Dataset
    from raydeep.search.engine import Engine
    from raydeep.search.track import Careful, Tracker


# what the meaning of a ledger's lines depends on
FACTS = ("space", "objectives", "constraints", "sampler", "scheduler", "reduction", "promote", "warm_starts")


def measures(job: Job, run: Run, dense: Dense, data: Dataset) -> dict[str, Any]:
    """Measures of the dense model, by the names of a trial's: what the hypervolume begins at."""
    from raydeep.compress import cost
    from raydeep.model import artifact
    from raydeep.search.objectives import Objectives
    from raydeep.search.trial import load_predictions

    labels = data.val.labels
    right = load_predictions(run.path / "trials" / "dense")["val"] == labels
    folder = run.model("dense")
    out: dict[str, Any] = {
        "val_accuracy": float(right.mean()),
        "worst_class_accuracy": min(float(right[labels == k].mean()) for k in np.unique(labels)),
        "bytes": (folder / "model.safetensors").stat().st_size,
        "macs": cost.macs(artifact.thaw(dense.spec, dense.tensors), tuple(dense.spec["input"])),
    }
    if "latency" in Objectives.of(job.search).names:
        from raydeep.deploy import timing
        from raydeep.deploy.runtimes import open_onnx

        rows = np.arange(job.export.batch_sizes[0]) % len(labels)
        [timed] = timing.interleaved(
            [open_onnx(folder / "model.onnx")], next(iter(data.val.read([[rows]]))), job.export.latency_rounds
        )
        out["latency_ms"] = float(f"{timed.facts()['median_ms']:.4g}")
    return out


@contextmanager
def tracking(job: Job, run: Run, ui: Ui) -> Iterator[list[Careful]]:
    """The trackers that search.track names, told at the end how it ended."""
    from raydeep.disk import read_lines
    from raydeep.search import track
    from raydeep.search.objectives import Objectives

    old = [row for row in read_lines(run.path / "ledger.jsonl") if "trial" in row]
    names = [name for name in job.search.track if name != "wandb"]  # that is Ray's callback: tune.callbacks
    found = track.trackers(
        names, run.path, job.name, job.model_dump(mode="json")["search"], old, Objectives.of(job.search).front
    )
    status = "failed"
    try:
        yield found
        status = "finished"
    except KeyboardInterrupt:
        status = "stopped"
        raise
    finally:
        for tracker in found:
            tracker.close(status)
            if tracker.tracker is None:
                ui.say(f"  note       search.track {tracker.name} failed and was left off: see {run.path / 'ray.log'}")


def search(
    job: Job, run: Run, data: Dataset, shared: Any, dense: Dense, dataset_hash: str, concurrent: int, ui: Ui,
    trackers: Sequence[Tracker] = (),
) -> list[dict[str, Any]]:  # fmt: skip
    """Run the trials that the ledger does not hold yet, to the end of the search.

    Returns:
        The ends of the finished trials.

    Raises:
        RaydeepError: too many failed, or none finished.
        KeyboardInterrupt: the search was interrupted.
    """
    from raydeep.compress.common import Common
    from raydeep.search import tune
    from raydeep.search.engine import Engine
    from raydeep.search.ledger import Ledger

    file = run.model("dense") / "model.safetensors"
    dump = job.model_dump(mode="json")["search"]
    facts = {name: dump[name] for name in FACTS}
    facts["ladder"] = job.search.ladder(job.train.epochs if job.search.trains else job.recover.epochs)
    facts |= {"seed": job.seed, "dense_sha256": sha256_file(file), "dataset": dataset_hash}
    ledger = Ledger(run.path / "ledger.jsonl", facts)
    reference = measures(job, run, dense, data)
    run.note(reference=reference)
    with ui.stage("search") as stage:
        common = Common(dense, data, job.seed)
        if not job.search.trains:
            common.prepare(job)

        def on_row(engine: Engine, row: dict[str, Any]) -> None:
            for tracker in trackers:
                tracker.row(row)
            show(stage, engine)

        engine = Engine(job, ledger, reference, on_row)
        loggers = tune.callbacks(job, run.path.name)
        with mirror.kept(ledger.path):
            tune.run_trials(engine, run.path, shared, common.sent(), concurrent, loggers)
        done, failed = ledger.done(), ledger.failed()
        told = f" ({engine.stopped})" if engine.stopped else ""
        stage.text = f"{len(done)} trials finished, {len(failed)} failed{told}"
        if len(failed) > job.search.max_failed or not done:
            reason = failed[0]["error"].strip().splitlines()[-1] if failed else "no trial ran"
            raise RaydeepError(
                f"{len(failed)} trials failed (search.max_failed {job.search.max_failed}): {reason}; tracebacks "
                f"are in {mirror.name(ledger.path)}; once mended, start anew with --from {run.name}"
            )
        if not engine.finished:
            raise KeyboardInterrupt  # Ray Tune ends quietly on Ctrl-C, its front would be that of a part
    settle_all(run.path, done)
    return done


def settle_all(run: Path, done: list[dict[str, Any]]) -> None:
    """Each finished trial keeps the files of its best rung; from a bucket they are fetched."""
    from raydeep.search.trial import OF_A_RUNG, SETTLED, settle
    from raydeep.search.work import label

    wanted = {
        f"{label(row['trial'])}/{name}"
        for row in done
        for name in [*SETTLED, *(kind.format(row["rung"]) for kind in OF_A_RUNG)]
    }
    mirror.pull(run / "trials", lambda name: name in wanted)
    for row in done:
        settle(run, row["trial"], row["rung"])


def show(stage: Stage, engine: Engine) -> None:
    """The front so far, with the dense model's measures beside it."""
    from raydeep.search.objectives import FIELDS
    from raydeep.search.work import label

    ledger, objectives = engine.ledger, engine.objectives
    failed = f", {len(ledger.failed())} failed" if ledger.failed() else ""
    found = {trial.number: trial.best for trial in engine.trials.values() if trial.best is not None}
    begun = sum(bool(trial.rows) or trial.ended for trial in engine.trials.values())
    rows = list(found.values())
    front = [rows[i] for i in objectives.front(rows)]
    text = f"trials, {len(front)} on the front, hypervolume {engine.volume:.3g}{failed}"
    stage.update(begun, engine.total, text)
    columns = [FIELDS[name] for name in objectives.modes]
    stage.table(
        ["model", *objectives.modes, "epochs"],
        [["dense", *(words(c, engine.dense.get(c)) for c in columns), ""]]
        + [[label(row["trial"]), *(words(c, row[c]) for c in columns), str(row["epochs"])] for row in front],
    )


def words(name: str, value: Any) -> str:
    """A measure as people read it."""
    if value is None:
        return ""
    if name.endswith("accuracy"):
        return f"{value:.2%}"
    return f"{value:.3g} ms" if name == "latency_ms" else f"{value:,}"


GONE_ON_FROM = ("state-*.safetensors", "checkpoints", "rung-*", "answer-*.json")


def clean(run: Path) -> None:
    """Remove what trials would go on from: the search is over."""
    import shutil

    from raydeep.search.trial import OF_A_RUNG

    for pattern in GONE_ON_FROM:
        for path in (run / "trials").glob(f"t*/{pattern}"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    trials = run / "trials"
    if mirror.address(trials) is not None:
        mirror.push_folder(trials)
        over = [*GONE_ON_FROM, *(kind.format("*") for kind in OF_A_RUNG)]
        mirror.forget(*{
            trials / "/".join(name.split("/")[:2])
            for name in mirror.names(trials)
            if any(fnmatch(name, f"t*/{pattern}") or fnmatch(name, f"t*/{pattern}/*") for pattern in over)
        })  # fmt: skip
