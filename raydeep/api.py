"""What Python and the command line call: train, compress, search, load and predict."""

from __future__ import annotations

import shlex
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console

from raydeep.config import Job
from raydeep.errors import JobError, RaydeepError
from raydeep.ops import front, searching, session
from raydeep.ops.console import Ui
from raydeep.run import Run, locate
from raydeep.tuning import Target

Place = Run | str | Path  # a run, or a folder or address


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
        resume: a run, its folder, address or name, that is gone on with at its last checkpoint.
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
    if run is not None and ((run.path / "ledger.jsonl").exists() or session.origin(run) is not None):
        raise RaydeepError(f"{run.name}: the run of a search; go on with: raydeep search --resume {run.name}")
    ui = _terminal(quiet)
    with ExitStack() as stack:
        opened = session.open_session(stack, job, run, _command("train", command), ui)
        session.train_dense(opened)
    front.finish(opened.run, opened.data, [], ui)
    return opened.run


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
        start: a run, its folder or name, a model folder or an address, whose dense model is taken instead of training
            one.
        resume: a run, its folder, address or name: no finished trial is repeated.
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


def _search(job: Job, run: Run | None, start: Place | None, command: session.Command, ui: Ui) -> Run:
    with ExitStack() as outer:
        with ExitStack() as stack:
            dense_of = start.path if isinstance(start, Run) else locate(start) if start else None
            dense_of = dense_of if run is None else session.origin(run)
            opened = session.open_session(stack, job, run, command, ui, dense_of)
            if dense_of is not None:
                session.take_dense(opened, dense_of)
            dense = session.train_dense(opened)
            trackers = outer.enter_context(searching.tracking(job, opened.run, ui))
            done = searching.search(
                job, opened.run, opened.data, opened.shared, dense, opened.manifest.hash,
                opened.plan.concurrent_trials, ui, trackers,
            )  # fmt: skip
        models = front.finish(opened.run, opened.data, done, ui)
        for tracker in trackers:
            tracker.front(models, [opened.run.model(row["label"]) for row in models])
    searching.clean(opened.run.path)
    opened.run.save()
    return opened.run


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
    wanted = run.job if job is None else job
    if stage == "compress":
        wanted = one_trial(wanted)  # as its run holds it: another run is refused
    if wanted is not run.job:
        with run.locked():
            run.take(wanted, force)
    return run.job, run


ONE = {"space": {}, "trials": 1, "scheduler": "none", "minutes": None, "constraints": (), "target": Target()}


def one_trial(job: Job) -> Job:
    """The job of a search that tries the job's own values only."""
    return job.model_copy(update={"search": job.search.model_copy(update=ONE)})


def _command(stage: str, command: str | None, start: Place | None = None) -> session.Command:
    """What reproduces a run; of one that Python began, the command that takes the job from its folder."""
    origin = [] if start is None else ["--from", start.name if isinstance(start, Run) else str(start)]
    return command or (lambda name: shlex.join(["raydeep", stage, f"{name}/job.yaml", *origin]))


def _terminal(quiet: bool) -> Ui:
    return Ui(Console(quiet=True)) if quiet else Ui()
