"""A parent that has imported what commands import, and forks a process for each: milliseconds, not seconds, a command.

`python forks.py` reads requests, JSON lines, from stdin and answers each when its process has ended. A request names
argv, folder, environment, files for stdout and stderr, a time limit, and perhaps the size that no file may exceed.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import time
from typing import Any

LOADED = (
    "aiohttp", "jinja2", "kornia", "kornia_rs", "onnx", "optuna", "PIL.Image", "plotly.offline",
    "pyarrow.compute", "pyarrow.csv", "pyarrow.dataset", "pyarrow.fs", "pyarrow.json", "pyarrow.parquet",
    "ray.job_submission", "safetensors.torch", "sklearn.datasets", "torch", "torchvision", "raydeep.cli",
    "raydeep.api", "raydeep.ops.doctor", "raydeep.ops.submitting", "raydeep.ops.submit", "raydeep.data.inspection",
    "raydeep.data.preview", "raydeep.data.splits", "raydeep.deploy.export", "raydeep.deploy.predict",
    "raydeep.deploy.verify", "raydeep.report.page", "raydeep.search.track", "raydeep.train.checkpoint",
    "raydeep.train.cluster",
)  # fmt: skip


def serve() -> None:
    """Answer requests until stdin ends."""
    import importlib

    for name in LOADED:
        importlib.import_module(name)
    threads = len(os.listdir("/proc/self/task"))
    assert threads == 1, f"{threads} threads: a fork would copy their locks but not them"
    answer({"ready": True})
    waiting: dict[int, dict[str, Any]] = {}
    buffer, more = b"", True
    while more or waiting:
        if more and select.select([0], [], [], 0.01 if waiting else None)[0]:
            got = os.read(0, 1 << 16)
            more = bool(got)
            *lines, buffer = (buffer + got).split(b"\n")
            for line in lines:
                request = json.loads(line)
                request["end"] = time.monotonic() + request["seconds"]
                waiting[fork(request)] = request
        for pid, request in list(waiting.items()):
            if time.monotonic() > request["end"]:
                os.killpg(pid, signal.SIGKILL)
            done, status, used = os.wait4(pid, os.WNOHANG)
            if done:
                del waiting[pid]
                code = os.waitstatus_to_exitcode(status)
                took = time.monotonic() - request["end"] + request["seconds"]
                answer({"id": request["id"], "code": code, "peak": used.ru_maxrss * 1024, "seconds": took})


def answer(value: dict[str, Any]) -> None:
    """One line to the one who asks."""
    os.write(1, json.dumps(value).encode() + b"\n")


def fork(request: dict[str, Any]) -> int:
    """Start a command as a process of its own, in a process group of its own; its id."""
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        os.setsid()
        for number, file in ((0, os.devnull), (1, request["out"]), (2, request["err"])):
            opened = os.open(file, os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            os.dup2(opened, number)
            os.close(opened)
        code = command(request)
    finally:
        os._exit(code)


def command(request: dict[str, Any]) -> int:
    """What `python -m raydeep.cli` does from its first line to its last."""
    import atexit
    import resource
    import tempfile
    import traceback

    from raydeep import cli

    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["env"])
    tempfile.tempdir = None
    sys.argv = ["raydeep", *request["argv"]]
    sys.stdin, sys.stdout = os.fdopen(0), os.fdopen(1, "w", encoding="utf-8")  # strict, as under most locales
    sys.stderr = os.fdopen(2, "w", encoding="utf-8", errors="backslashreplace", buffering=1)
    if request.get("file_bytes"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_bytes"], request["file_bytes"]))
    code = 0
    try:
        if "python" in request:
            python(request["python"])
        else:
            cli.main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    try:
        atexit._run_exitfuncs()
        sys.stdout.flush()
    except BaseException:
        traceback.print_exc()
        code = 120
    sys.stderr.flush()
    return code


def python(line: str) -> None:
    """A line of Python; what a caller could catch is told as the command line tells it."""
    from raydeep.errors import RaydeepError

    try:
        exec(compile(line, "<case>", "exec"), {"__name__": "__main__"})
    except RaydeepError as err:
        print(f"error: {err}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    serve()
