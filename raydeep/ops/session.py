"""A run with Ray started and its data loaded, and the dense model that every stage begins with."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raydeep import mirror
from raydeep.config import Job
from raydeep.disk import read_json, write_json
from raydeep.errors import DataError, ModelError, RaydeepError, StorageError
from raydeep.ops import datasets, doctor, gallery
from raydeep.ops.console import Ui
from raydeep.run import Run, storage_folder

if TYPE_CHECKING:
    from raydeep.compress.plan import Dense, Result
    from raydeep.data.resident import Dataset
    from raydeep.data.shards import Manifest
    from raydeep.train.sizing import Plan

Command = str | Callable[[str], str]  # what reproduces a run, or what makes that of the run's name


@dataclass
class Session:
    """One run with Ray started and the data loaded."""

    job: Job
    run: Run
    ui: Ui
    manifest: Manifest
    plan: Plan
    data: Dataset
    shared: Any
    spec: dict[str, Any]


def open_session(
    stack: ExitStack, job: Job, run: Run | None, command: Command, ui: Ui, start: Path | None = None
) -> Session:
    """Check everything that can be checked, make the run folder, start Ray, load the data.

    `start`: of take_dense, which is told before Ray starts what is wrong with it.
    """
    from raydeep.compress import plan as recipe
    from raydeep.deploy import runtimes
    from raydeep.model import artifact
    from raydeep.search import track
    from raydeep.train import cluster

    doctor.preflight(job, ui)
    manifest = datasets.prepare(job, ui)
    spec = artifact.make_spec(
        job.model.name, job.model.args, manifest.classes, manifest.shape(job.data), manifest.mean, manifest.std
    )
    model = artifact.build(spec)
    if ":" in job.model.name:  # a network of one's own: better refused now than after it is trained
        from raydeep.deploy import export

        export.to_onnx(*artifact.freeze(model.eval(), spec, fold=False))
    recipe.check(job, spec)
    if start is not None:
        _dense_of(start, job, spec)
    runtimes.check_runtimes(job.export)
    track.check(job.search.track, shared=mirror.address(storage_folder(job)) is None)
    fresh = run is None
    run = run or Run.create(job, command, **({} if start is None else {"start": mirror.name(mirror.real(start))}))
    stack.enter_context(run.working())
    noted = read_json(run.path / "provenance.json").get("dataset", {}).get("hash", manifest.hash)
    if noted != manifest.hash:
        raise DataError(
            f"{manifest.path}: not the data that {run.name} began with (hash {manifest.hash[:12]}…, then "
            f"{noted[:12]}…): what it trained on could now be in its test split; start a new run"
        )
    stack.callback(_keep_log, run)
    with ui.stage("ray") as stage:
        try:
            plan = stack.enter_context(cluster.cluster(job, run.path / "ray.log"))
            if os.environ.get("RAY_ADDRESS"):
                doctor.compare(ui)
        except RaydeepError:
            if fresh:  # nothing has been done yet: nothing is left
                mirror.drop(run.path)
            raise
        ui.say(f"  run        {run.name}")
        from raydeep.data import stream

        data = stream.load(manifest, job.data, lambda done, total: stage.update(done, total, "pictures decoded"))
        shared = stream.share(data)
        stage.text = f"{_workers(job)} workers, {plan.concurrent_trials} trials at once"
    run.unfinish()
    spec |= {"mean": data.mean, "std": data.std}
    sizes = {split: len(getattr(data, split).labels) for split in ("train", "val", "test")}
    run.note(dataset={
        "hash": manifest.hash, "classes": manifest.classes, "rows": sizes, "image": list(data.shape),
        "path": mirror.name(manifest.path),
    })  # fmt: skip
    return Session(job, run, ui, manifest, plan, data, shared, spec)


def origin(run: Run) -> Path | None:
    """The run or model folder whose dense model a run began with (--from) and has not taken yet; None: it has one.

    Raises:
        ModelError: it is not there any more.
    """
    noted = read_json(run.path / "provenance.json").get("start")
    if noted is None or (run.model("dense") / "SHA256SUMS").exists():
        return None
    start = mirror.place(str(noted), "start")
    if mirror.address(start) is None and not start.is_dir():
        raise ModelError(
            f"{run.name}: began with --from {noted}, whose dense model it has not taken yet, and that is gone: bring "
            f"it back, or start a new run"
        )
    return start


def _keep_log(run: Run) -> None:
    with suppress(StorageError):  # whatever ends the session is told, not this
        if (run.path / "ray.log").exists():
            mirror.push(run.path / "ray.log")


def _workers(job: Job) -> str:
    scaling = job.scaling
    return f"{scaling.min_workers} to {scaling.max_workers}" if scaling.elastic else str(scaling.min_workers)


def train_dense(session: Session) -> Dense:
    """The dense model of a run: trained (or resumed), exported to `models/dense`, evaluated."""
    from raydeep.compress import pack, plan, teachers
    from raydeep.compress.distill import PROJECTIONS
    from raydeep.deploy import export
    from raydeep.model import artifact
    from raydeep.train import checkpoint, launch

    run, ui, job = session.run, session.ui, session.job
    folder = run.model("dense")
    if (folder / "SHA256SUMS").exists():
        done = checkpoint.latest(run.path / "checkpoints")
        if done is not None and done.moment.epoch < job.train.epochs:
            raise RaydeepError(
                f"{run.name}: its training is finished, with {done.moment.epoch} epochs, the job now says "
                f"{job.train.epochs}: start a new run"
            )
        artifact.check_sums(folder)
        return plan.Dense(*artifact.load_model(folder))
    with ui.stage("train") as stage:

        def line(row: dict[str, Any]) -> None:
            if "attempt" in row:
                _say_attempt(row, ui)
                return
            stage.update(
                row["epoch"], row["epochs"],
                f"epochs, loss {row['train_loss']:.3f}, val {row['val_accuracy']:.2%}",
            )  # fmt: skip

        distill = teachers.OnWorker(job, session.spec) if job.distill.trains_dense else None
        launch.train(job, run, session.shared, session.spec, line, distill)
        last = checkpoint.latest(run.path / "checkpoints")
        if last is None or last.moment.epoch < job.train.epochs:
            raise RaydeepError(f"{run.name}: training ended without its last checkpoint; see {run.path}/ray.log")
        model = artifact.build(session.spec)
        weights = last.weights()
        model.load_state_dict({k: v for k, v in weights.items() if not k.startswith(PROJECTIONS)})
        spec, tensors = artifact.freeze(model.eval(), session.spec, fold=False)
        packed = pack.pack(spec, tensors)
        result = _evaluate(session, packed)
        export.write_model(folder, packed)
        run.save()
        stage.text = (
            f"{job.model.name}: {result.test_accuracy:.2%} test, {result.val_accuracy:.2%} val accuracy after "
            f"{last.moment.epoch} epochs"
        )
    datasets.say_input(job, run, session.manifest, ui)
    return plan.Dense(*artifact.load_model(folder))


def _evaluate(session: Session, packed: bytes) -> Result:
    """Score the dense model; keep what it predicts, its confusion matrix and pictures of its worst errors."""
    from raydeep.compress import plan
    from raydeep.search.trial import save_predictions
    from raydeep.train.metrics import confusion

    run, data = session.run.path, session.data
    result = plan.measure(packed, data, session.job.train.eval_batch_size)
    test = result.test_predictions
    save_predictions(run / "trials" / "dense", val=result.val_predictions, test=test)
    counts = confusion(data.test.labels, test, len(data.classes)).tolist()
    write_json(run / "evaluation.json", {"split": "test", "accuracy": result.test_accuracy, "confusion": counts})
    if trouble := gallery.keep(run, session.job, data, test, result.test_probability):
        session.ui.say(f"note       {trouble}")
    return result


def _say_attempt(row: dict[str, Any], ui: Ui) -> None:
    """A training that begins again: from where, with how many workers, and what it lost."""
    for note in row["notes"]:
        ui.say(f"  checkpoint {note}")
    if row["attempt"] > 1 or row["from_step"]:
        lost = max(0, row["reached_before"] - row["from_step"])
        ui.say(f"  goes on at step {row['from_step']} with {row['workers']} workers; {lost} steps are done again")


def take_dense(session: Session, start: Path) -> None:
    """Copy the dense model of another run, with what it predicts here."""
    from raydeep.compress import pack
    from raydeep.deploy import export

    packed = pack.pack(*_dense_of(start, session.job, session.spec))
    _evaluate(session, packed)
    export.write_model(session.run.model("dense"), packed)
    session.run.save()


def _dense_of(start: Path, job: Job, own: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Spec and tensors of a dense model that a job with the spec `own` can go on with."""
    from raydeep.model import artifact

    folder = artifact.dense_folder(start)
    if not (folder / "spec.json").is_file():
        raise ModelError(f"{mirror.name(start)}: neither a run with models/dense nor a model folder")
    artifact.check_sums(folder)
    spec, tensors = artifact.load_model(folder)
    wanted = {"name": job.model.name, "args": job.model.args}
    if spec["model"] != wanted:
        raise ModelError(f"{folder}: its network is {spec['model']}, the job's {wanted}; set model.name and model.args")
    if spec["layers"] or spec["folded"]:
        raise ModelError(f"{folder}: compressed already; give a dense model")
    if spec["classes"] != own["classes"] or spec["input"] != own["input"]:
        raise ModelError(f"{folder}: made for other classes or another picture size than this job's data")
    artifact.thaw(spec, tensors)
    return spec, tensors
