"""Paths, full disks, and bundles sent to a job server."""

from __future__ import annotations

import os
import shutil
import socket
from pathlib import Path

from hostile.harness import Case, MiB, Stock
from hostile.parts import Make, a_dataset, a_run, all_of, classes, fifo, file, link, sparse

JOB = "name: x\ndata: {path: shards}\n"
SHARDED = ("out", "out/*")
DISK = 40_000  # bytes that a file may have on a disk that is full


def path(name: str, command: str, says: str, make: Make | None = None, code: int = 2, leaves: tuple[str, ...] = (),
         **more: object) -> Case:  # fmt: skip
    return Case("paths", name, command, says, make or (lambda folder, stock: None), code, leaves, **more)  # type: ignore[arg-type]


def bundle(name: str, make: Make, says: str, code: int = 2, options: str = "--detach", **more: object) -> Case:
    """A project, and a job server that takes it."""
    whole = all_of(file("job.yaml", "name: x\n"), make)
    command = f"raydeep submit job.yaml --address {{server}} {options}"
    return Case("job bundles", name, command, says, whole, code, **more)  # type: ignore[arg-type]


def many(count: int) -> Make:
    def make(folder: Path, stock: Stock) -> None:
        for i in range(count):
            if i % 1000 == 0:
                (folder / f"p{i // 1000}").mkdir()
            os.close(os.open(folder / f"p{i // 1000}" / f"{i}.py", os.O_CREAT, 0o600))

    return make


def a_socket(folder: Path, stock: Stock) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        here = os.getcwd()
        os.chdir(folder)  # a socket's path has at most 107 characters
        try:
            made.bind("s.py")
        finally:
            os.chdir(here)


def no_text(folder: Path, stock: Stock) -> None:
    with open(os.fsencode(folder) + b"/caf\xe9.py", "wb"):
        pass


SENT = r"detached   raydeep submit --logs"
CASES = [
    path("a link in a circle for a model", "raydeep predict loop x.png", "loop", link("loop", "loop")),
    path("a link in a circle for a run", "raydeep report loop", "loop", link("loop", "loop")),
    path("a link in a circle for a dataset", "raydeep data info loop", "loop", link("loop", "loop")),
    path("a link in a circle for a run to resume", "raydeep train --resume loop", "loop", link("loop", "loop")),
    path("a link in a circle to write to", "raydeep shard pics loop/out", "loop", all_of(classes(), link("loop", "loop"))),
    path("a home of nobody for a run", "raydeep report ~nobody-here/run", "nobody-here"),
    path("a home of nobody for a dataset", "raydeep data info ~nobody-here/x", "nobody-here"),
    path("a home of nobody for storage", "raydeep train job.yaml --set storage=~nobody-here/x", "nobody-here",
         all_of(a_dataset, file("job.yaml", JOB))),
    path("a NUL in storage", "raydeep train job.yaml --set 'storage=\"a\\0b\"'", "storage",
         all_of(a_dataset, file("job.yaml", JOB))),
    path("storage that is a file", "raydeep train job.yaml --set storage=job.yaml", "storage: can't make",
         all_of(a_dataset, file("job.yaml", JOB))),
    path("storage in /proc", "raydeep train job.yaml --set storage=/proc/x", "/proc/x",
         all_of(a_dataset, file("job.yaml", JOB))),
    path("storage with a password", "raydeep train job.yaml --set storage=s3://k:secret@b/x",
         "^(?!.*secret@).*credentials", all_of(a_dataset, file("job.yaml", JOB))),
    path("a name that begins with a dash", "raydeep report -- -rf", "-rf: no such run folder"),
    path("an option that is none", "raydeep report --rf", "No such option", usage=True),
    path("spaces and brackets", "raydeep shard 'my [/] pics' 'out [bold] here'", r"dataset    out \[bold\] here",
         classes(root="my [/] pics"), 0, ("out [[]bold] here", "out [[]bold] here/*")),
    path("a dataset for a run", "raydeep report shards", "is not a run folder", a_dataset),
    path("a run for a dataset", "raydeep data info run", "not a dataset", a_run),
    path("a run for a job", "raydeep train run", "run: can't be read as text", a_run),
    path("a device for a job", "raydeep train /dev/zero", "/dev/zero"),
    path("shards into the folder they are of", "raydeep shard pics pics", "exists and is not empty", classes()),
    path("shards into a pipe", "raydeep shard pics out", "exists and is not empty", all_of(classes(), fifo("out"))),
    path("shards into a link to nothing", "raydeep shard pics out", "a link to nothing",
         all_of(classes(), link("out", "nothing"))),
    path("a preview into a pipe", "raydeep preview job.yaml --out pipe", "pipe: there is something else than a file",
         all_of(a_dataset, file("job.yaml", JOB), fifo("pipe")), leaves=("runs", "runs/datasets")),
    path("a preview below a file", "raydeep preview job.yaml --out job.yaml/x.png", "job.yaml",
         all_of(a_dataset, file("job.yaml", JOB)), leaves=("runs", "runs/datasets")),
    path("a disk that is full under shards", "raydeep shard pics out", "File too large|can't be written|full",
         classes(count=200), file_bytes=DISK // 10, leaves=(".out.part", ".out.part/*")),
    path("a disk that is full under a preview", "raydeep preview job.yaml", "File too large",
         all_of(a_dataset, file("job.yaml", JOB)), file_bytes=DISK // 10, leaves=("runs", "runs/datasets")),
    path("a disk that is full under a report", "raydeep report run", "File too large", a_run, file_bytes=DISK),
    path("a folder that is a link out", "raydeep shard pics out", "2 classes",
         lambda folder, stock: _linked(folder, stock), 0, SHARDED),
    path("an address of a scheme that is none", "raydeep data info ftp://x/y", "expected a folder, or an address"),
    path("a climb in an address", "raydeep data info s3://bucket/../../x", "has an empty part, . or .. in it"),
    # bundles
    bundle("a project that can be sent", file("net.py", "x = 1\n"), SENT, 0),
    bundle("links in a circle and out", all_of(link("a/b", ".."), link("self.py", "self.py"), link("p.py", "/etc/passwd")),
           "bundle     1 files", 0),
    bundle("a pipe and a socket called .py", all_of(fifo("pipe.py"), a_socket), "bundle     1 files", 0),
    bundle("a name that is no UTF-8", no_text, "a name that other systems can't have"),
    bundle("a name with a line break", file("a\nb.py", ""), "a name that other systems can't have"),
    bundle("a name that clears the terminal", file("\x1b[2J.py", ""), "a name that other systems can't have"),
    bundle("20,001 Python files", many(20_001), "more than 20,000 Python files"),
    bundle("a file that claims 8 GiB", sparse("big.bin", 8 * 1024 * MiB), "larger than 90 MiB packed",
           options="--include big.bin"),
    bundle("an include that climbs out", file("x", ""), "--include ../../etc: expected", options="--include ../../etc"),
    bundle("an include of the root", file("x", ""), "--include /: expected", options="--include /"),
    bundle("a secret file", all_of(file(".env", "KEY=1"), file(".ssh/id.py", "x")), "bundle     1 files", 0),
    bundle("a runtime environment that is a list", file("env.yaml", "- a\n"), "expected KEY: VALUE lines",
           options="--runtime-env env.yaml"),
    bundle("a runtime environment with a working_dir", file("env.yaml", "working_dir: /\n"), "working_dir: expected",
           options="--runtime-env env.yaml"),
    bundle("a runtime environment with a secret that is no text", file("env.yaml", "env_vars: {KEY: [hunter2]}\n"),
           "^(?!.*hunter2).*KEY is none", options="--runtime-env env.yaml"),
    bundle("a runtime environment with a tag", file("env.yaml", "env_vars: !!python/name:os.system\n"), "tags",
           options="--runtime-env env.yaml"),
    bundle("a hook that is no name", file("env.yaml", "worker_process_setup_hook: [1]\n"), "refused|hook",
           options="--runtime-env env.yaml"),
    bundle("an id that asks for another page", file("x", ""), "is no id of a job", options="x",
           argv=("submit", "--status", "../version", "--address", "{server}")),
    bundle("an id that adds a header", file("x", ""), "is no id of a job", options="x",
           argv=("submit", "--stop", "a\r\nHost: evil", "--address", "{server}")),
    bundle("a password in the address", file("x", ""), "^(?!.*hunter2).*without user and password", options="x",
           argv=("submit", "job.yaml", "--address", "http://me:hunter2@127.0.0.1:9")),
    bundle("a job that is no job", file("job.yaml", "name: ../x\n"), "name: found"),
]  # fmt: skip


def _linked(folder: Path, stock: Stock) -> None:
    classes(root="../pics")(folder, stock)
    (folder / "pics").symlink_to("../pics")
    shutil.copytree(folder.parent / "pics", folder / "copy")
