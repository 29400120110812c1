"""What Python and the command line call: train, compress, search, load and predict."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from raydeep import mirror
from raydeep.config import Job
from raydeep.errors import DataError, JobError, ModelError, RaydeepError, StorageError
from raydeep.ops import datasets, doctor, front, gallery, searching
from raydeep.ops.console import Ui
from raydeep.run import Run, read_json, storage_folder, write_json
from raydeep.tuning import Target

if TYPE_CHECKING:
    from raydeep.compress.plan import Dense, Result
    from raydeep.data.resident import Dataset
    from raydeep.data.shards import Manifest
    from raydeep.train.sizing import Plan


Place = Run | str | Path  # a run, or a folder or address
Command = str | Callable[[str], str]


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


def open_session(stack: ExitStack, job: Job, run: Run | None, command: Command, ui: Ui) -> Session:
    """Check everything that can be checked, make the run folder, start Ray, load the data."""
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
    runtimes.check_runtimes(job.export)
    track.check(job.search.track, shared=mirror.address(storage_folder(job)) is None)
    fresh = run is None
    run = run or Run.create(job, command)
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
    spec |= {"mean": data.mean, "std": data.std}
    sizes = {split: len(getattr(data, split).labels) for split in ("train", "val", "test")}
    run.note(dataset={
        "hash": manifest.hash, "classes": manifest.classes, "rows": sizes, "image": list(data.shape),
        "path": mirror.name(manifest.path),
    })  # fmt: skip
    return Session(job, run, ui, manifest, plan, data, shared, spec)


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


def train(
    job: Job | None = None,
    *,
    resume: Place | None = None,
    force: bool = False,
    command: str | None = None,
    quiet: bool = False,
) -> Run:
    """Train the dense model of a job; verify and report it.

    Args:
        job: the job; None: that of the run that is resumed.
        resume: a run, its folder or its address, that is gone on with at its last checkpoint.
        force: with `resume`, take a job that differs from the run's.
        command: what provenance.json says that reproduces it; None: `raydeep train RUN/job.yaml`.
        quiet: print nothing.

    Returns:
        The run: `path`, `dense` (its measures), `model("dense")` (its folder).

    Raises:
        JobError: there is no job, or it is not the run's.
        DataError: the source can't be read.
        TrainError: training failed for good; `resume` goes on.
        RaydeepError: the run is one of a search, or in use, or storage or cluster can't be used.
    """
    job, run = _take("train", job, None, resume, force)
    if run is not None and (run.path / "ledger.jsonl").exists():
        raise RaydeepError(f"{run.name}: the run of a search; go on with: raydeep search --resume {run.name}")
    ui = _terminal(quiet)
    with ExitStack() as stack:
        session = open_session(stack, job, run, _command("train", command), ui)
        train_dense(session)
    front.finish(session.run, session.data, [], ui)
    return session.run


def compress(
    job: Job | None = None,
    *,
    start: Place | None = None,
    resume: Place | None = None,
    force: bool = False,
    command: str | None = None,
    quiet: bool = False,
) -> Run:
    """Compress once, as the prune, quantize, distill and recover sections say: a search of one trial.

    Arguments, result and errors are those of `search`.
    """
    job, run = _take("compress", job, start, resume, force)
    return _search(job, run, start, _command("compress", command, start), _terminal(quiet))


def search(
    job: Job | None = None,
    *,
    start: Place | None = None,
    resume: Place | None = None,
    force: bool = False,
    command: str | None = None,
    quiet: bool = False,
) -> Run:
    """Train, search, export the front, verify it in a clean process, report.

    Args:
        job: the job; None: that of the run that is resumed.
        start: a run, its folder, a model folder or an address, whose dense model is taken instead of training one.
        resume: a run, its folder or its address: no finished trial is repeated.
        force: with `resume`, take a job that differs from the run's.
        command: what provenance.json says that reproduces it; None: `raydeep search RUN/job.yaml`.
        quiet: print nothing.

    Returns:
        The run: `path`, `front` (the measures of each model), `model(label)` (its folder).

    Raises:
        JobError: there is no job, it is not the run's, or `start` is given with `resume`.
        DataError: the source can't be read.
        ModelError: `start` is no model, or does not fit the job.
        TrainError: training failed for good; `resume` goes on.
        RaydeepError: too many trials failed, the run is in use, or storage or cluster can't be used.
    """
    job, run = _take("search", job, start, resume, force)
    return _search(job, run, start, _command("search", command, start), _terminal(quiet))


def _search(job: Job, run: Run | None, start: Place | None, command: Command, ui: Ui) -> Run:
    with ExitStack() as outer:
        with ExitStack() as stack:
            session = open_session(stack, job, run, command, ui)
            if start is not None:
                _take_dense(session, start.path if isinstance(start, Run) else mirror.place(start, "address"))
            dense = train_dense(session)
            trackers = outer.enter_context(searching.tracking(job, session.run, ui))
            done = searching.search(
                job, session.run, session.data, session.shared, dense, session.manifest.hash,
                session.plan.concurrent_trials, ui, trackers,
            )  # fmt: skip
        models = front.finish(session.run, session.data, done, ui)
        for tracker in trackers:
            tracker.front(models, [session.run.model(row["label"]) for row in models])
    searching.clean(session.run.path)
    session.run.save()
    return session.run


def _take(
    stage: str, job: Job | None, start: Place | None, resume: Place | None, force: bool
) -> tuple[Job, Run | None]:
    """The job that a stage runs, and the run that it goes on with."""
    if job is not None and not isinstance(job, Job):
        raise JobError(f"expected a raydeep.Job, found {type(job).__name__}; raydeep.load_job(PATH) reads a job file")
    if resume is None:
        if job is None:
            raise JobError(f"raydeep {stage} needs a job, or a run to resume")
        return one_trial(job) if stage == "compress" else job, None
    if start is not None:
        raise JobError("a resumed run goes on with its own dense model: `start` can't change it")
    run = resume if isinstance(resume, Run) else Run.open(resume)
    if job is not None:
        with run.locked():
            run.take(one_trial(job) if stage == "compress" else job, force)  # as its run holds it
    return run.job, run


ONE = {"space": {}, "trials": 1, "scheduler": "none", "minutes": None, "constraints": (), "target": Target()}


def one_trial(job: Job) -> Job:
    """The job of a search that tries the job's own values only."""
    return job.model_copy(update={"search": job.search.model_copy(update=ONE)})


def _command(stage: str, command: str | None, start: Place | None = None) -> Command:
    """What reproduces a run; of one that Python began, the command that takes the job from its folder."""
    origin = [] if start is None else ["--from", start.name if isinstance(start, Run) else str(start)]
    return command or (lambda name: shlex.join(["raydeep", stage, f"{name}/job.yaml", *origin]))


def _terminal(quiet: bool) -> Ui:
    return Ui(Console(quiet=True)) if quiet else Ui()


def _take_dense(session: Session, start: Path) -> None:
    """Copy the dense model of another run, with what it predicts here."""
    from raydeep.compress import pack
    from raydeep.deploy import export
    from raydeep.model import artifact

    folder = artifact.dense_folder(start)
    if not (folder / "spec.json").is_file():
        raise ModelError(f"{mirror.name(start)}: neither a run with models/dense nor a model folder")
    artifact.check_sums(folder)
    spec, tensors = artifact.load_model(folder)
    wanted = {"name": session.job.model.name, "args": session.job.model.args}
    if spec["model"] != wanted:
        raise ModelError(f"{folder}: its network is {spec['model']}, the job's {wanted}; set model.name and model.args")
    if spec["layers"] or spec["folded"]:
        raise ModelError(f"{folder}: compressed already; give a dense model")
    if spec["classes"] != session.spec["classes"] or spec["input"] != session.spec["input"]:
        raise ModelError(f"{folder}: made for other classes or another picture size than this job's data")
    packed = pack.pack(spec, tensors)
    _evaluate(session, packed)
    export.write_model(session.run.model("dense"), packed)
    session.run.save()
