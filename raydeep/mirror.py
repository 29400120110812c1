"""Storage in a bucket: each node works in a folder of its own, and pushes and pulls what others shall see.

A path in the node's cache stands for an address: `$RAYDEEP_CACHE/storage/s3/BUCKET/x/y` for `s3://BUCKET/x/y`. Whoever
shares what it writes pushes it; whoever needs what others wrote fetches or pulls it; between nodes paths travel as
`name` gives them. For all other paths, those of a shared file system, each of these does nothing.

Objects appear whole, so a file is its own commit, and a folder is committed by its last file. A local file is known to
be that of the bucket by its size and time: it gets the object's when it was pushed or fetched.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import secrets
import shutil
import socket
import threading
import urllib.parse
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any

from raydeep import remote
from raydeep.errors import RaydeepError, StorageError

ATTEMPTS = 8  # at a request, over half a minute: then it is an error
THREADS = 16  # files under way at once
PUSH_S = 1.0  # between two pushes of a file that grows


# paths and addresses


def cache() -> Path:
    """Where this node keeps its copies; may be emptied while nothing runs."""
    return Path(os.environ.get("RAYDEEP_CACHE") or "~/.cache/raydeep").expanduser().resolve() / "storage"


def place(text: str | Path, what: str = "storage") -> Path:
    """The path that stands for an address on this node; a path as it is.

    Args:
        text: s3://…, gs://…, or a path.
        what: the job's key or the option that it stands in, for errors.

    Raises:
        RaydeepError: an address that can't be stored to, or no path.
    """
    if not isinstance(text, str) or not remote.is_address(text):
        if "\0" in str(text):
            raise RaydeepError(f"{what}: {text}: no path has a NUL in it; name another folder")
        path = os.path.expanduser(text)
        if path[:1] == "~" and not os.path.lexists(path):
            raise RaydeepError(f"{what}: {text}: there is no such home; for a folder of that name write ./{text}")
        return Path(path)
    found = remote.check(text, what)
    head = f"{found.scheme}?{found.options}" if found.options else found.scheme
    return cache().joinpath(urllib.parse.quote(head, safe=""), found.bucket, *found.key.split("/"))


def real(path: Path) -> Path:
    """A path without links and dots; one whose links go in a circle as far as it can be followed: it is not there."""
    return Path(os.path.realpath(path))


def address(path: Path) -> remote.Address | None:
    """The address that a path stands for; None: the path is just a path."""
    try:
        head, bucket, *parts = path.relative_to(cache()).parts
    except ValueError:
        return None
    scheme, _, options = urllib.parse.unquote(head).partition("?")
    return remote.Address(scheme, options, bucket, "/".join(parts))


def name(path: Path) -> str:
    """A path for people and for other nodes: its address, where it stands for one. `place` is the way back."""
    return str(address(path) or path)


def local(text: str) -> Path:
    """The file that a name stands for, fetched if it is not on this node yet."""
    path = place(text)
    if remote.is_address(text) and not path.exists():
        with alone(path):
            if not path.exists():
                fetch(path)
    return path


# one file


def fetch(path: Path) -> bool:
    """Make a file what it is in the bucket; False: it is in neither."""
    if (found := _open(path)) is None:
        return path.exists()
    system, key = found
    with _told(path, "read"):
        info = system.get_file_info(key)
        if not info.is_file:
            return False
        remote.get(system, key, path, remote.stamp_of(info))
    return True


def push(*paths: Path) -> None:
    """Bring files to the bucket, one after the other: each is there before the next, the last one commits."""
    for path in paths:
        if (found := _open(path)) is not None:
            with _told(path, "written"):
                remote.put(*found, path)


def read(path: Path) -> bytes | None:
    """What a file holds now, in the bucket if it stands for an address: the node's own copy is left alone."""
    if (found := _open(path)) is None:
        return path.read_bytes() if path.exists() else None
    system, key = found
    with _told(path, "read"):
        try:
            with system.open_input_stream(key) as file:
                return bytes(file.read())
        except FileNotFoundError:
            return None


def exists(path: Path) -> bool:
    """Whether a file is there, in the bucket if it stands for an address."""
    if (found := _open(path)) is None:
        return path.exists()
    system, key = found
    with _told(path, "read"):
        return bool(system.get_file_info(key).is_file)


def drop(*paths: Path) -> None:
    """Remove files or whole folders, from the bucket too."""
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    forget(*paths)


def follow(*paths: Path) -> None:
    """Remove this node's copies of files that the bucket does not have any more."""
    for path in paths:
        if address(path) is not None and path.exists() and not exists(path):
            path.unlink(missing_ok=True)


def forget(*paths: Path) -> None:
    """Remove files or whole folders from the bucket alone."""

    def remove(path: Path) -> None:
        system, key = _opened(path)
        with _told(path, "written"):
            if system.get_file_info(key).is_file:
                system.delete_file(key)
            else:
                system.delete_dir_contents(key, missing_dir_ok=True)

    _all(remove, [path for path in paths if address(path) is not None])


# a folder


def names(folder: Path) -> list[str]:
    """Files below a folder, by their paths in it, sorted; in the bucket if it stands for an address."""
    if (found := _open(folder)) is None:
        return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    with _told(folder, "read"):
        return sorted(remote.listing(*found))


def folders(folder: Path) -> list[str]:
    """Names of the folders directly in a folder, sorted; in the bucket if it stands for an address."""
    if (found := _open(folder)) is None:
        return sorted(path.name for path in folder.iterdir() if path.is_dir())
    with _told(folder, "read"):
        return sorted(remote.folders(*found))


def pull(folder: Path, only: Callable[[str], bool] = lambda name: True, exact: bool = False, deep: bool = True) -> None:
    """Make the files of a folder what they are in the bucket.

    Args:
        folder: to fill.
        only: of a file's path in the folder: whether it is fetched.
        exact: also remove what the bucket does not have, fetched or not.
        deep: False: files in folders below it are not even looked for.
    """
    if (found := _open(folder)) is None:
        return
    system, key = found
    with _told(folder, "read"):
        there = remote.listing(system, key, deep)
        wanted = [name for name in sorted(there) if only(name)]
        _all(lambda name: remote.get(system, f"{key}/{name}", folder / name, there[name]), wanted)
    for path in [p for p in folder.rglob("*") if p.is_file()] if exact else []:
        relative = str(path.relative_to(folder))
        if relative not in there and not _hidden(relative):
            path.unlink(missing_ok=True)
            with suppress(OSError):  # it holds more
                path.parent.rmdir()


def push_folder(folder: Path, last: str | None = None, only: Callable[[str], bool] = lambda name: True) -> None:
    """Bring the files of a folder to the bucket that are not there as they are here.

    Args:
        folder: hidden files and those in hidden folders stay.
        last: the file that commits the folder: it comes when all others are there.
        only: of a file's path in the folder: whether it is pushed.
    """
    if (found := _open(folder)) is None:
        return
    system, key = found
    own = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    with _told(folder, "written"):
        there = remote.listing(system, key)
        new = [n for n in own if not _hidden(n) and only(n) and remote.stamp(folder / n) != there.get(n)]
        _all(lambda name: remote.put(system, f"{key}/{name}", folder / name), [n for n in new if n != last])
        if last in new:
            remote.put(system, f"{key}/{last}", folder / last)


@contextmanager
def kept(*paths: Path) -> Iterator[None]:
    """Push files that grow while the block runs, at most once in PUSH_S seconds, and at its end.

    While the bucket can't be reached the block goes on; at its end that is an error.
    """
    mirrored = [path for path in paths if address(path) is not None]
    if not mirrored:
        yield
        return
    stop, seen = threading.Event(), dict.fromkeys(mirrored, b"")

    def look() -> None:
        for path in mirrored:
            data = path.read_bytes() if path.exists() else b""
            if (digest := hashlib.sha256(data).digest()) != seen[path] and data:
                remote.put(*_opened(path), data)
                seen[path] = digest

    def watch() -> None:
        while not stop.wait(PUSH_S):
            with suppress(Exception):  # tried again a second later, and told at the end
                look()

    thread = threading.Thread(target=watch, daemon=True, name="mirror")
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        with _told(mirrored[0], "written"):
            look()


def check(path: Path) -> None:
    """Write, read and remove an object, to know that it can be done.

    Raises:
        StorageError: it can't.
    """
    if (found := _open(path)) is not None:
        system, key = found
        probe = f"{key}/.probe-{secrets.token_hex(4)}"
        with _told(path, "used"):
            remote.put(system, probe, b"raydeep")
            with system.open_input_stream(probe) as file:
                assert file.read() == b"raydeep"
            system.delete_file(probe)


# underneath


def _open(path: Path) -> tuple[Any, str] | None:
    return None if address(path) is None else _opened(path)


def _opened(path: Path) -> tuple[Any, str]:
    """The file system and the key of a path that stands for an address."""
    found = address(path)
    assert found is not None
    with _told(path, "reached"):
        system, bucket = remote.connect(str(found._replace(key="")), "storage", ATTEMPTS)
    return system, f"{bucket}/{found.key}".rstrip("/")


@contextmanager
def _told(path: Path, what: str) -> Iterator[None]:
    """Turns what the object store says into one error that names the address."""
    try:
        yield
    except RaydeepError:
        raise
    except Exception as err:  # pyarrow's and the system's
        full = getattr(err, "errno", None) == errno.ENOSPC
        reason = " ".join(str(err).split())[:400] or type(err).__name__
        mend = (
            f"free space on {socket.gethostname()}, or set RAYDEEP_CACHE there" if full else
            f"check the address, and on {socket.gethostname()} the network and the credentials in the environment "
            f"(AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL)"
        )  # fmt: skip
        raise StorageError(f"storage {name(path)} can't be {what}: {reason}; {mend}") from None


def _all(do: Callable[[Any], None], wanted: Sequence[Any]) -> None:
    if len(wanted) <= 1:
        for one in wanted:
            do(one)
        return
    with ThreadPoolExecutor(THREADS) as pool:
        for _ in pool.map(do, wanted):
            pass


def _hidden(relative: str) -> bool:
    return any(part[0] == "." for part in PurePosixPath(relative).parts)


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """One process of this node at a time fetches a file or a folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f".{path.name}.lock").open("w") as file:
        with suppress(OSError):  # a file system without locks: then it is fetched twice
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
