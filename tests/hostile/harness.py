"""Hostile cases: what each is, how it is run, and what must be true of it afterwards."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
import re
import shlex
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq
from PIL import Image

from raydeep import disk
from raydeep.errors import SPACES

ROOT = Path(__file__).parents[2]
MiB = 2**20
HASHED_BYTES = 64 * MiB  # larger inputs (sparse files) are compared by size
# What every process has: the locale of a user, one thread, nothing of this machine's own settings.
ENV = {
    "PATH": os.environ["PATH"], "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1",
    "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore",
}  # fmt: skip
SERVER_ENV = {**ENV, "ARROW_DEFAULT_MEMORY_POOL": "system", "JE_ARROW_MALLOC_CONF": "background_thread:false"}


class Stock(NamedTuple):
    """What cases are made from; read only."""

    model: Path  # a model folder: ten classes, 8×8 grey
    dataset: Path  # the digits as shards
    run: Path  # the run folder of a finished search, with that model as models/dense
    checkpoint: Path  # a checkpoint of its network
    server: str  # address of a job server that takes every job


@dataclass(frozen=True)
class Case:
    """One hostile input and what must come of it."""

    group: str
    name: str
    command: str  # as a user types it, in the case's own folder; {server} stands for a job server
    says: str  # a pattern that the error (the output, if the code is 0) matches
    make: Callable[[Path, Stock], None] = lambda folder, stock: None
    code: int = 2
    leaves: tuple[str, ...] = ()  # patterns of what may be there afterwards and was not before
    changes: tuple[str, ...] = ()  # patterns of inputs that may change
    argv: tuple[str, ...] | None = None  # where a shell's words can't be written down
    env: dict[str, str] = field(default_factory=dict)
    file_bytes: int | None = None  # a disk that is full: no file may grow beyond it
    peak: int = 150 * MiB  # over what a command needs that does nothing
    python: bool = False  # the command is a line of Python; its RaydeepError ends as that of a command does
    usage: bool = False  # it ends in other words than one line with error:, those of the parser or of `data verify`

    @property
    def words(self) -> list[str]:
        """The arguments, without the program."""
        return list(self.argv) if self.argv is not None else shlex.split(self.command)[1:]


class Ended(NamedTuple):
    """What a process left."""

    code: int
    out: str
    err: str
    peak: int  # bytes
    seconds: float


class Server:
    """The process of forks.py; commands may be asked of it from several threads."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("forks.py"))], env=SERVER_ENV, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        self.lock, self.answers, self.events, self.count = threading.Lock(), {}, {}, 0  # type: ignore[var-annotated]
        self.ready = threading.Event()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            value = json.loads(line)
            if "ready" in value:
                self.ready.set()
                continue
            self.answers[value["id"]] = value
            self.events[value["id"]].set()

    def ask(self, **request: Any) -> dict[str, Any]:
        """Run a command; its exit code, peak memory and seconds."""
        assert self.ready.wait(120), "the fork server did not start"
        assert self.process.stdin is not None
        with self.lock:
            self.count += 1
            number = self.count
            self.events[number] = threading.Event()
            self.process.stdin.write(json.dumps({**request, "id": number}) + "\n")
            self.process.stdin.flush()
        assert self.events[number].wait(request["seconds"] + 60), "the fork server does not answer"
        return self.answers.pop(number)

    def close(self) -> None:
        """End it."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(30)


def run_in(case: Case, stock: Stock, server: Server | None, box: Path) -> tuple[Ended, Path, dict[str, Any]]:
    """Make the input in `box`/here and run the command there, by the server or in a fresh interpreter.

    Gives how it ended, `box`, and the inputs as they were before.
    """
    here, home, tmp = box / "here", box / "home", box / "tmp"
    for folder in (here, home, tmp):
        folder.mkdir(parents=True)
    case.make(here, stock)
    before = seen(here)
    env = {**ENV, "HOME": str(home), "TMPDIR": str(tmp), **case.env}
    words = [word.replace("{server}", stock.server) for word in case.words]
    out, err = box / "out", box / "err"
    if server is None:
        assert not case.python
        program = [sys.executable, "-m", "raydeep.cli", *words]
        with out.open("wb") as to, err.open("wb") as also:
            process = subprocess.Popen(program, cwd=here, env=env, stdin=subprocess.DEVNULL, stdout=to, stderr=also)
            _, status, used = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        answer = {"code": process.returncode, "peak": used.ru_maxrss * 1024, "seconds": 0.0}
    else:
        what = {"python": case.command, "argv": []} if case.python else {"argv": words}
        answer = server.ask(
            folder=str(here), env=env, out=str(out), err=str(err), seconds=120.0, file_bytes=case.file_bytes, **what
        )
    texts = [file.read_bytes().decode("utf-8", "surrogateescape") for file in (out, err)]
    return Ended(answer["code"], *texts, answer["peak"], answer["seconds"]), box, before


def examine(case: Case, ended: Ended, box: Path, before: dict[str, Any], base: int) -> list[str]:
    """What is wrong with the end of a case; `base` is the memory of a command that does nothing, 0: not looked at."""
    wrong = []
    said = ended.out + ended.err
    if ended.code != case.code:
        wrong.append(f"exit code {ended.code}, expected {case.code}")
    if "Traceback" in said or "Error: " in said.replace("\nError: ", "\n"):
        wrong.append("a traceback, or the name of an exception")
    if odd := sorted({c for c in said if not c.isprintable() and c not in f"\n\t{SPACES}"}):
        wrong.append(f"characters that steer a terminal, or are none: {odd}")
    lines = ended.err.splitlines()
    errors = [at for at, line in enumerate(lines) if line.startswith("error:")]
    if case.code == 2 and not case.usage and errors != [len(lines) - 1]:
        wrong.append("stderr does not end in its one line that begins with error:")
    where = lines[-1] if case.code and lines and not case.usage else said
    if not re.search(case.says, where):
        wrong.append(f"expected words that match {case.says!r}")
    if base and ended.peak - base > case.peak:
        wrong.append(
            f"{(ended.peak - base) / MiB:.0f} MiB more than a command that does nothing, at most {case.peak // MiB}"
        )
    after = seen(box / "here")
    for name in before.keys() - after.keys():
        wrong.append(f"{name!r} is gone")
    for name in before.keys() & after.keys():
        if before[name] != after[name] and not any(fnmatch.fnmatch(name, wanted) for wanted in case.changes):
            wrong.append(f"{name!r} has changed")
    for name in sorted(after.keys() - before.keys()):
        if not any(fnmatch.fnmatch(name, wanted) for wanted in case.leaves):
            wrong.append(f"left {name!r}")
        wrong += broken(box / "here" / name)
    for folder in ("home", "tmp"):
        if found := [str(path) for path in (box / folder).rglob("*")]:
            wrong.append(f"left in {folder}: {found[:5]}")
    if wrong:
        wrong.append(f"it said:\n{said[-1500:]}")
    return wrong


def seen(folder: Path) -> dict[str, Any]:
    """Everything below a folder: relative name → what it is. Links are not followed."""
    found: dict[str, Any] = {}
    for here, folders, files in os.walk(folder):
        for name in [*folders, *files]:
            path = os.path.join(here, name)
            facts = os.lstat(path)
            value: Any = (stat.S_IFMT(facts.st_mode), stat.S_IMODE(facts.st_mode))
            if stat.S_ISLNK(facts.st_mode):
                value += (os.readlink(path),)
            elif stat.S_ISREG(facts.st_mode):
                value += (facts.st_size,)
                if facts.st_size < HASHED_BYTES:
                    with open(path, "rb") as file:
                        value += (hashlib.sha256(file.read()).hexdigest(),)
            found[os.path.relpath(path, folder)] = value
    return found


def broken(path: Path) -> list[str]:
    """What is not whole about a file that a command left under its final name."""
    try:
        if path.suffix == ".json":
            json.loads(path.read_bytes())
        elif path.suffix == ".jsonl":
            [json.loads(line) for line in path.read_bytes().splitlines()]
        elif path.suffix == ".parquet":
            pq.read_table(path)
        elif path.suffix == ".png":
            Image.open(path).load()
        elif path.suffix == ".html" and not path.read_text().rstrip().endswith("</html>"):
            return [f"{path.name} is cut off"]
        elif path.name == "SHA256SUMS":
            disk.check_sums(path.parent)
    except Exception as err:
        return [f"{path.name} is not whole: {err}"]
    return []
