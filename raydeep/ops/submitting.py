"""`raydeep submit`: what is asked for, checked here before it costs a minute there."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from raydeep.errors import JobError, RaydeepError
from raydeep.ops.console import Ui

LEFT_EXIT = 130  # the job goes on, Ctrl-C ended only this command


def run(
    address: str | None,
    job: Path | None,
    stage: str,
    options: Sequence[str],
    include: Sequence[str],
    runtime_env: Path | None,
    detach: bool,
    asked: dict[str, str],
) -> int:
    """Submit a job and follow it, or do what is asked of one that is there.

    Args:
        address: of the job server.
        job: the job file.
        stage: command of raydeep.
        options: of that command.
        include: files and folders that go along.
        runtime_env: YAML file for Ray.
        detach: do not follow.
        asked: status, logs or stop → id of a job.

    Returns:
        Exit code: the job's own; 0 if it was detached from at once, 130 if it was left running by Ctrl-C.

    Raises:
        RaydeepError: what the user can mend.
    """
    from raydeep.ops import submit

    ui = Ui()
    if len(asked) + (job is not None) != 1:
        raise JobError("raydeep submit needs a job file, or one of --status ID, --logs ID, --stop ID")
    if stage not in submit.STAGES:
        raise JobError(f"--stage {stage}: expected {', '.join(submit.STAGES)}")
    if not address:
        raise RaydeepError(
            "no cluster named: give --address http://HOST:8265 or set RAY_API_SERVER_ADDRESS; cluster/local.sh up "
            "starts one on this machine"
        )
    if job is None:
        client = submit.connect(address)
        [(what, job_id)] = asked.items()
        found = submit.details(client, job_id, patience_s=0)
        if what == "status":
            ui.say(f"{job_id} {found.status.value.lower()}: {found.entrypoint}")
            return 0 if not found.status.is_terminal() else submit.result(found)
        if what == "stop":
            submit.say_end(submit.stop(client, job_id, ui.say), job_id, ui.say)
            return 0
    else:
        name = _name(job, stage, options)
        client = submit.connect(address)
        job_id = submit.submit(
            client, address, stage, job, options, name=name, include=include, runtime_env=runtime_env, say=ui.say
        )
        if detach:
            ui.say(f"detached   raydeep submit --logs {job_id} follows it, --status and --stop {job_id} do as they say")
            return 0
    code = submit.follow(client, job_id, ui.say, _ask)
    return LEFT_EXIT if code is None else code


def _name(job: Path, stage: str, options: Sequence[str]) -> str:
    """The job's name, once it is known to load with these options."""
    from raydeep.config import load_job

    loaded = load_job(job, [value for key, value in zip(options[::2], options[1::2], strict=True) if key == "--set"])
    if stage == "doctor" and any(key != "--set" for key in options[::2]):
        raise JobError("--stage doctor takes --set only, not --resume or --from")
    if stage == "train" and "--from" in options[::2]:
        raise JobError("--stage train begins anew: --from goes with search and compress; --resume goes on with a run")
    return loaded.name


def _ask() -> bool:
    """Ctrl-C: stop the job too? Where nobody can answer, it is left running."""
    if not sys.stdin.isatty():
        return False
    answer = input("\nCtrl-C: [d]etach, the job goes on, or [s]top it? [d] ")
    return answer.strip().lower().startswith("s")
