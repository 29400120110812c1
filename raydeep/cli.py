"""The command line: thin doors, each imports its stage when it is opened."""

from __future__ import annotations

import io
import json
import os
import shlex
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from raydeep import __version__, cli_cluster, cli_predict, cli_runs, mirror
from raydeep.cli_cluster import AsJson, JobFile, Sets
from raydeep.errors import RaydeepError, shown

app = typer.Typer(
    add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None,
    help="Scarce data, scarce compute: augment, train, compress and search image classifiers, from one job file.",
)  # fmt: skip


def _place(text: str) -> Path:
    """A path, or the one that stands for s3://… on this machine."""
    return mirror.place(text, "address")


def _run(text: str) -> Path:
    """The same, or the folder of the run of that name."""
    from raydeep.run import locate

    return locate(text)


Resume = Annotated[
    Path | None, typer.Option(metavar="RUN", parser=_run, help="Go on with a run: its folder, address or name")
]
Force = Annotated[bool, typer.Option("--force", help="With --resume: go on with a job that differs from the run's")]
Download = Annotated[bool, typer.Option("--download", help="Let torchvision fetch the dataset if it is not there")]
From = Annotated[
    Path | None,
    typer.Option("--from", metavar="RUN", parser=_run, help="Start from the dense model of this run or model folder"),
]


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"raydeep {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


def _sets(sets: list[str] | None, download: bool) -> list[str]:
    return [*(sets or []), *(["data.download=true"] if download else [])]


def _run_stage(
    stage: str,
    job: Path | None,
    sets: list[str] | None,
    resume: Path | None,
    start: Path | None,
    download: bool,
    force: bool,
) -> None:
    from raydeep import api
    from raydeep.config import Job, load_job, parse_sets
    from raydeep.errors import JobError
    from raydeep.run import Run

    resolved: Job | None = None
    if resume is not None and start is not None:
        raise JobError("--resume goes on with the run's own dense model: --from can't change it")
    run = Run.open(resume) if resume is not None else None
    if job is not None:
        resolved = load_job(job, _sets(sets, download))
    elif run is not None:
        resolved = parse_sets(run.job.model_dump(mode="json"), sets or [], "--set")
    else:
        raise JobError(f"raydeep {stage} needs a job file, or --resume RUN")
    options: dict[str, Any] = {"resume": run, "force": force, "command": shlex.join(["raydeep", *sys.argv[1:]])}
    try:
        if stage == "train":
            api.train(resolved, **options)
        elif stage == "compress":
            api.compress(resolved, start=start, **options)
        else:
            api.search(resolved, start=start, **options)
    except KeyboardInterrupt as err:
        [name] = [*getattr(err, "__notes__", []), run.name if run is not None else ""][:1]  # of the run that it was in
        then = f"go on: raydeep {stage} --resume {shlex.quote(name)}" if name else "no run was begun"
        typer.echo(f"stopped; {then}", err=True)
        raise typer.Exit(_STOPPED[-1]) from None


@app.command()
def train(
    job: JobFile = None, sets: Sets = None, resume: Resume = None, download: Download = False, force: Force = False
) -> None:
    """Train the dense model of a job on Ray Train."""
    _run_stage("train", job, sets, resume, None, download, force)


@app.command()
def compress(
    job: JobFile = None, sets: Sets = None, resume: Resume = None, start: From = None, download: Download = False,
    force: Force = False,
) -> None:  # fmt: skip
    """Compress once, as the job says; no search."""
    _run_stage("compress", job, sets, resume, start, download, force)


@app.command()
def search(
    job: JobFile = None, sets: Sets = None, resume: Resume = None, start: From = None, download: Download = False,
    force: Force = False,
) -> None:  # fmt: skip
    """Search for the Pareto front; export and report it."""
    _run_stage("search", job, sets, resume, start, download, force)


@app.command()
def shard(
    source: Annotated[
        str,
        typer.Argument(help="digits, synthetic, torchvision:NAME (in --set data.path=ROOT), a folder or its address"),
    ],
    out: Annotated[Path, typer.Argument(parser=_place, help="New dataset folder, or s3://BUCKET/FOLDER")],
    sets: Sets = None,
    resize: Annotated[int | None, typer.Option(help="Store pictures at this side: scaled, centre cropped")] = None,
    store: Annotated[str | None, typer.Option(help="encoded (files) or decoded (pixels)")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Tasks at once; one a core unless given")] = None,
    download: Download = False,
) -> None:
    """Write a dataset as Parquet shards; goes on where it was killed.

    A Ray Data job; dataset.json, the manifest, comes last.
    """
    from raydeep.config import parse_sets
    from raydeep.data.guess import source_of
    from raydeep.ops import datasets
    from raydeep.ops.console import Ui

    overrides = _sets(sets, download)
    overrides += [f"data.{key}={value}" for key, value in (("resize", resize), ("store", store)) if value is not None]
    job = parse_sets({"data": source_of(source, overrides)}, overrides)
    try:
        datasets.shard(job, out, workers, Ui())
    except KeyboardInterrupt:
        typer.echo("stopped; the same command goes on where it was", err=True)
        raise typer.Exit(_STOPPED[-1]) from None


data_app = typer.Typer(no_args_is_help=True, help="Look into a dataset, or check that it is whole.")
app.add_typer(data_app, name="data")
Folder = Annotated[Path, typer.Argument(parser=_place, help="Dataset folder, with dataset.json")]


@data_app.command()
def info(path: Folder, as_json: AsJson = False) -> None:
    """Counts, class balance, sizes and hash of a dataset."""
    from raydeep.data import inspection, shards
    from raydeep.ops import datasets
    from raydeep.ops.console import Ui

    facts = inspection.info(shards.open_manifest(path))
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
    else:
        datasets.show_info(facts, Ui())


@data_app.command()
def verify(path: Folder, as_json: AsJson = False) -> None:
    """Read a dataset whole: hashes, labels, every picture; pictures that stand in two splits."""
    from raydeep.ops import datasets
    from raydeep.ops.console import Ui

    mirror.pull(path)
    found = datasets.verify(path, Ui(), quiet=as_json)
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    if found["problems"]:
        raise typer.Exit(2)


@app.command()
def preview(
    job: Annotated[Path, typer.Argument(help="Job file (YAML); see jobs/")],
    out: Annotated[Path, typer.Option(help="The picture to write")] = Path("preview.png"),
    rows: Annotated[int, typer.Option(min=1, max=64, help="Pictures of train that are shown")] = 8,
    columns: Annotated[int, typer.Option(min=2, max=16, help="The original and its augmented versions")] = 7,
    sets: Sets = None,
    download: Download = False,
) -> None:
    """Draw pictures of train beside what training makes of them."""
    from raydeep.config import load_job
    from raydeep.ops import datasets
    from raydeep.ops.console import Ui

    datasets.preview(load_job(job, _sets(sets, download)), out, rows, columns, Ui())


@app.command()
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", parser=_run, help="Folder, address or name of a search's run")],
    trial: Annotated[int, typer.Option(min=0, help="Number of the trial (see ledger.jsonl or the report)")],
) -> None:
    """Export one trial of a search as a verified model folder."""
    from raydeep.ops import front
    from raydeep.ops.console import Ui
    from raydeep.run import Run

    front.export(Run.open(run), trial, Ui())


for _door in (cli_runs.runs, cli_runs.show, cli_runs.report):
    app.command()(_door)


app.command()(cli_predict.predict)
app.command()(cli_cluster.doctor)
app.command()(cli_cluster.submit)


@app.command()
def schema() -> None:
    """Print the JSON schema of a job, for editors."""
    from raydeep.config import Job

    typer.echo(json.dumps(Job.model_json_schema(), indent=2))


_STOPPED = [130]  # exit code of a command that a signal stopped: Ctrl-C, unless SIGTERM came


def _terminated(number: int, frame: object) -> None:
    _STOPPED.append(143)
    raise KeyboardInterrupt  # so that what is half done is cleaned up, as on Ctrl-C


def main() -> None:
    """Entry point: what a user can mend is one line and exit code 2."""
    signal.signal(signal.SIGTERM, _terminated)
    if isinstance(sys.stdout, io.TextIOWrapper):  # for names that are not UTF-8, or not this locale's
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        sys.path.insert(0, os.getcwd())  # a user's own model, package.module:factory, stands where they run
    except FileNotFoundError:
        typer.echo("error: the folder that this runs in is gone; cd to one that is there", err=True)
        sys.exit(2)
    try:
        app()
    except RaydeepError as err:
        typer.echo(f"error: {shown(str(err), lines=True)}", err=True)
        sys.exit(2)
    except OSError as err:  # a full disk, a folder that can't be read or written
        if err.filename is None and err.errno is None:
            raise
        where = shown(f"{err.filename or 'file system'}: {err.strerror or err}")
        typer.echo(f"error: {where}", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
