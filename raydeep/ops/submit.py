"""Jobs on a cluster, through Ray's job server: submit, follow, ask, stop."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import secrets
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from raydeep.config import read_yaml
from raydeep.errors import JobError, RaydeepError
from raydeep.ops import bundle

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

STAGES = ("search", "train", "compress", "doctor")
# As cluster/runtime_env.yaml, which says why: an installed raydeep does not have that file.
RUNTIME_ENV = {"env_vars": {"RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0", "RAY_JOB_STOP_WAIT_TIME_S": "60"}}
SILENT_S = 15.0  # without a line for so long, the log is asked for: a connection may be dead without being closed
LOST_S = 300.0  # a job server that does not answer for so long is given up
STOPPED_EXIT = 143  # of a job that was stopped, as of a process that SIGTERM ended
AGAIN_S = 0.5  # between two connections
LOST = (RuntimeError, OSError)  # of Ray's client: an answer that is no answer, or none


def connect(address: str) -> JobSubmissionClient:
    """The job server at an http(s) address.

    Raises:
        RaydeepError: nothing answers there, or it refuses the token.
    """
    if "@" in address:
        raise RaydeepError("--address: expected http://HOST:PORT without user and password: Ray asks for a token alone")
    if not address.startswith(("http://", "https://")):
        raise RaydeepError(
            f"--address {address}: expected the address of the job server, as http://HOST:8265 "
            f"(cluster/local.sh status prints it; RAY_API_SERVER_ADDRESS does instead of --address)"
        )
    import ray
    from ray.job_submission import JobSubmissionClient

    for module in ("job.sdk", "dashboard_sdk"):
        logging.getLogger(f"ray.dashboard.modules.{module}").setLevel(logging.ERROR)
    os.environ["RAY_API_SERVER_ADDRESS"] = address  # Ray takes the variable before the argument
    with _told(address):
        client = JobSubmissionClient(address)
    theirs = getattr(client, "_server_ray_version", None)
    if theirs and theirs != ray.__version__:
        raise RaydeepError(
            f"{address}: runs Ray {theirs}, here is {ray.__version__}; install the same version "
            f"(raydeep doctor compares all that must be the same)"
        )
    return client


@contextmanager
def _told(address: str) -> Iterator[None]:
    """Ray's errors of a job server as one line."""
    from ray.exceptions import AuthenticationError

    try:
        yield
    except AuthenticationError:
        if os.environ.get("RAY_AUTH_MODE") != "token":
            found = "asks for a token, RAY_AUTH_MODE is not set to token"
        elif "RAY_AUTH_TOKEN" in os.environ:
            found = "refuses the token of RAY_AUTH_TOKEN"
        else:
            found = f"refuses the token in {os.environ.get('RAY_AUTH_TOKEN_PATH') or '~/.ray/auth_token'}"
        raise RaydeepError(
            f"{address}: {found}; set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH to the file with the cluster's "
            f"(cluster/local.sh writes both into a file `env`)"
        ) from None
    except OSError as err:
        raise RaydeepError(f"{address}: no job server answers there ({_first(err)}); is the cluster up?") from None
    except RuntimeError as err:
        raise RaydeepError(f"{address}: answers, but not as Ray's job server: {_first(err)}") from None


def _first(err: BaseException) -> str:
    return (str(err).strip().splitlines() or [type(err).__name__])[0][:200]


# submit


def entrypoint(stage: str, job: str, options: Sequence[str], python: str | None = None) -> str:
    """The shell command of a job."""
    program = [python, "-m", "raydeep.cli"] if python else ["raydeep"]
    job = f"./{job}" if job.startswith("-") else job
    return shlex.join([*program, stage, job, *options])


def _environment(file: Path | None) -> dict[str, Any]:
    """Ray's runtime environment of a job, with what a user's file adds."""
    given = read_yaml(file) if file is not None else {}
    known = {"env_vars", "py_executable", "config", "nsight", "worker_process_setup_hook"}
    if wrong := given.keys() - known:
        raise JobError(
            f"{file}: {', '.join(sorted(map(str, wrong)))}: expected {', '.join(sorted(known))}; packages are part of "
            f"the nodes' environment (cluster/README.md), files go along with --include"
        )
    own = given.get("env_vars", {})
    odd = [name for name, text in own.items() if not isinstance(text, str)] if isinstance(own, dict) else ["it"]
    if odd:  # named, not shown: a value may be a secret
        raise JobError(f'{file}: env_vars: expected NAME: "TEXT" lines, {", ".join(map(str, odd))} is none')
    if not isinstance(given.get("py_executable", ""), str):
        raise JobError(f"{file}: py_executable: expected a path, found {given['py_executable']!r}")
    return {**given, "env_vars": {**RUNTIME_ENV["env_vars"], **own}}


def submit(
    client: JobSubmissionClient,
    address: str,
    stage: str,
    job: Path,
    options: Sequence[str],
    *,
    name: str,
    include: Sequence[str] = (),
    runtime_env: Path | None = None,
    say: Callable[[str], None],
) -> str:
    """Pack the project and start the job.

    Args:
        client: of the job server.
        address: for errors.
        stage: one of STAGES.
        job: the job file.
        options: of the command, as `--set`, `KEY=VALUE`.
        name: of the job, a part of its id.
        include: see bundle.files.
        runtime_env: a YAML file whose entries are added, as py_executable.
        say: prints a line.

    Returns:
        The id.

    Raises:
        RaydeepError: see bundle.pack, _told.
    """
    env = _environment(runtime_env)
    with tempfile.TemporaryDirectory() as scratch:
        packed = bundle.pack(Path.cwd(), job, Path(scratch) / "bundle.zip", include)
        say(f"bundle     {packed.files} files, {packed.bytes:,} bytes")
        env["working_dir"] = str(packed.path)
        job_id = f"{name}-{time.strftime('%m%d-%H%M%S')}-{secrets.token_hex(2)}"
        with _told(address):
            try:
                client.submit_job(
                    entrypoint=entrypoint(stage, packed.job, options, env.get("py_executable")),
                    runtime_env=env,
                    submission_id=job_id,
                    metadata={"raydeep_job": name, "raydeep_stage": stage},
                )
            except (RuntimeError, ValueError, TypeError) as err:  # what the server answers, or Ray of the runtime_env
                raise RaydeepError(f"{address}: the job is refused: {_first(err)}") from None
    say(f"job        {job_id} at {address}")
    return job_id


# follow


class Follower:
    """Prints the log of a job as it grows, across lost connections, until the job ends."""

    def __init__(self, client: JobSubmissionClient, job_id: str, out: TextIO | None = None) -> None:
        self.client, self.job_id, self.out = client, job_id, out or sys.stdout
        self.shown = 0  # characters of the log that are printed

    def run(self) -> JobDetails:
        """Follow to the end.

        Raises:
            RaydeepError: there is no such job, or the job server is gone for LOST_S.
        """
        import aiohttp

        seen = False  # a server that has started again may know no job for a moment, or of this one no more
        while not (found := details(self.client, self.job_id, seen=seen)).status.is_terminal():
            seen = True
            with suppress(*LOST, aiohttp.ClientError):  # it goes on where it was: the job's state tells what happened
                asyncio.run(self._tail())
            time.sleep(AGAIN_S)
        with suppress(*LOST):
            self._print(self.client.get_job_logs(self.job_id)[self.shown :])
        return found

    async def _tail(self) -> None:
        """One connection: the server sends the log from its beginning, what is printed already is passed over."""
        seen = 0
        stream: Any = self.client.tail_job_logs(self.job_id)
        step: asyncio.Future[str] | None = None
        try:
            while True:
                step = asyncio.ensure_future(anext(stream))
                while not (await asyncio.wait([step], timeout=SILENT_S))[0]:
                    if await asyncio.to_thread(self._more_than, max(seen, self.shown)):  # so the connection is dead
                        return
                text = step.result()
                self._print(text[max(0, self.shown - seen) :])
                seen += len(text)
        except StopAsyncIteration:
            return
        finally:
            if step is not None and not step.done():  # or closing the stream would raise, and hide a Ctrl-C
                step.cancel()
                await asyncio.wait([step])
            await stream.aclose()

    def _more_than(self, characters: int) -> bool:
        log = self.client.get_job_logs(self.job_id)
        return len(log) > characters or self.client.get_job_info(self.job_id).status.is_terminal()

    def _print(self, text: str) -> None:
        self.out.write(text)
        self.out.flush()
        self.shown += len(text)


def details(
    client: JobSubmissionClient, job_id: str, patience_s: float | None = None, seen: bool = False
) -> JobDetails:
    """The state of a job; a server that restarts is waited for, LOST_S unless told otherwise.

    `seen`: there is such a job, whatever the server says now.

    Raises:
        RaydeepError: there is no such job, or no answer for `patience_s`.
    """
    if not re.fullmatch(r"[\w.-]{1,200}", job_id):
        raise JobError(f"{job_id!r} is no id of a job: `ray job list` shows them")
    patience_s = LOST_S if patience_s is None else patience_s
    end, wait = time.monotonic() + patience_s, AGAIN_S
    while True:
        try:
            return client.get_job_info(job_id)
        except LOST as err:
            if "404" in str(err) and not seen:
                raise RaydeepError(f"{job_id}: the job server knows no such job; `ray job list` shows all") from None
            if time.monotonic() > end:
                raise RaydeepError(
                    f"{job_id}: the job server has not answered for {patience_s:.0f} s ({_first(err)}); the job may "
                    f"well run: raydeep submit --logs {job_id} goes back to it"
                ) from None
        time.sleep(wait)
        wait = min(10.0, 2 * wait)


def result(details: JobDetails) -> int:
    """The exit code of a job that has ended: its command's own, or what stands for it."""
    if details.status.value == "SUCCEEDED":
        return 0
    if details.status.value == "STOPPED":
        return STOPPED_EXIT
    return details.driver_exit_code or 1


def say_end(found: JobDetails, job_id: str, say: Callable[[str], None]) -> int:
    """One line on a job that has ended; returns its exit code."""
    took = f" after {(found.end_time - found.start_time) / 1000:.0f} s" if found.start_time and found.end_time else ""
    code = result(found)
    say(f"job        {job_id} {found.status.value.lower()}{took}, exit code {code}")
    if code and found.driver_exit_code is None and found.message:  # it never ran: the log has nothing on it
        say(f"  {_first(RuntimeError(found.message))}")
    return code


def stop(client: JobSubmissionClient, job_id: str, say: Callable[[str], None]) -> JobDetails:
    """Stop a job and wait: it writes its checkpoint first, and ends its Ray tasks."""
    found = details(client, job_id, patience_s=0)
    if not found.status.is_terminal():
        say(f"stopping   {job_id}: it writes a checkpoint first")
        client.stop_job(job_id)
    while not found.status.is_terminal():
        time.sleep(AGAIN_S)
        found = details(client, job_id)
    return found


def follow(client: JobSubmissionClient, job_id: str, say: Callable[[str], None], ask: Callable[[], bool]) -> int | None:
    """Follow a job to its end; Ctrl-C asks what is meant by it.

    Args:
        client: of the job server.
        job_id: the job.
        say: prints a line.
        ask: whether Ctrl-C is to stop the job too.

    Returns:
        The job's exit code; None if it was left running.
    """
    try:
        return say_end(Follower(client, job_id).run(), job_id, say)
    except KeyboardInterrupt:
        try:
            also = ask()
        except (KeyboardInterrupt, EOFError):
            also = False
        if also:
            return say_end(stop(client, job_id, say), job_id, say)
        say(f"detached   the job goes on: raydeep submit --logs {job_id} goes back to it, --stop {job_id} ends it")
        return None
