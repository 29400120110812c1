"""The command line's doors to clusters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

JobFile = Annotated[Path | None, typer.Argument(help="Job file (YAML); see jobs/")]
Sets = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override: section.key=value")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object")]


def doctor(
    job: JobFile = None,
    address: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="GCS of the cluster; else RAY_ADDRESS, else this machine")
    ] = None,
    as_json: AsJson = False,
    sets: Sets = None,
) -> None:
    """Check a cluster or this machine, and whether a job would run.

    Each line says OK, WARN or FAIL with the mend. Exit code: 0, 1 if a check failed, 2 if the job or the address is
    wrong.
    """
    from raydeep.config import load_job, parse_sets
    from raydeep.ops import doctor

    wanted = load_job(job, sets or []) if job else parse_sets({}, sets) if sets else None
    report = doctor.run(wanted, address)
    typer.echo(json.dumps(report.as_json(), indent=2) if as_json else "\n".join(report.lines()))
    if not report.ok:
        raise typer.Exit(1)


def submit(
    job: JobFile = None,
    address: Annotated[
        str | None,
        typer.Option(envvar="RAY_API_SERVER_ADDRESS", metavar="URL", help="Job server, http://HOST:8265"),
    ] = None,
    stage: Annotated[str, typer.Option(metavar="STAGE", help="search, train, compress or doctor")] = "search",
    sets: Sets = None,
    resume: Annotated[str | None, typer.Option(metavar="RUN", help="Go on with a run of the cluster")] = None,
    start: Annotated[str | None, typer.Option("--from", metavar="RUN", help="As of search; on the cluster")] = None,
    include: Annotated[
        list[str] | None, typer.Option(metavar="PATH", help="Send this file or folder too; Python files go anyway")
    ] = None,
    runtime_env: Annotated[
        Path | None, typer.Option(metavar="FILE", help="YAML with py_executable, env_vars …")
    ] = None,
    detach: Annotated[bool, typer.Option("--detach", help="Do not follow the job")] = False,
    status: Annotated[str | None, typer.Option(metavar="ID", help="Say how a job is")] = None,
    logs: Annotated[str | None, typer.Option(metavar="ID", help="Go back to a job: its log, to its end")] = None,
    stop: Annotated[str | None, typer.Option(metavar="ID", help="Stop a job, after its checkpoint")] = None,
) -> None:
    """Run a job on a cluster; ends with the job's own exit code.

    It goes through the cluster's job server. Exit code 130: the job was left running.
    """
    from raydeep.ops import submitting

    options = {"--set": sets or [], "--resume": [resume] if resume else [], "--from": [start] if start else []}
    asked = {"status": status, "logs": logs, "stop": stop}
    code = submitting.run(
        address, job, stage, [part for key, values in options.items() for value in values for part in (key, value)],
        include or [], runtime_env, detach, {what: job_id for what, job_id in asked.items() if job_id},
    )  # fmt: skip
    raise typer.Exit(code)
