"""Local folders and remote addresses behind one small face: list, read, open and seek.

Local folders are read by the operating system, s3:// and gs:// by pyarrow.fs, every other scheme by fsspec. A
`Files` is its address and nothing else, so it survives pickling; connections are made where they are used.
"""

from __future__ import annotations

import functools
import os
import posixpath
import stat
import urllib.parse
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from raydeep import remote
from raydeep.data import decode
from raydeep.data.rows import Picture, Row, printable
from raydeep.errors import DataError, RaydeepError
from raydeep.remote import SCHEME

if TYPE_CHECKING:
    from typing import BinaryIO

    from raydeep.config import Data

DANGLING, AWAY, AWAY_FOLDER, LOOP = "dangling link", "link away", "link to a folder away", "link in a circle"


class Entry(NamedTuple):
    """One file below the root. Entries with a fault are links that can't be followed."""

    path: str  # relative to the root, parts joined by /
    size: int
    stamp: int | str | None  # changes when the file does: mtime in ns, or an etag
    fault: str = ""


@dataclass(frozen=True)
class Files:
    """The files below a local folder or a remote address. Paths are relative to it."""

    address: str  # a local path, or scheme://…

    @property
    def remote(self) -> bool:
        """Whether it is read over a network."""
        return SCHEME.match(self.address) is not None

    def name(self, path: str = "") -> str:
        """A file's whole name, for people."""
        root = self.address.split("?")[0] if self.remote else self.address
        return printable(f"{root.rstrip('/')}/{path}" if path else root)

    def entries(self, deep: bool = True) -> list[Entry]:
        """Every file that is not hidden, sorted by path; links are followed while they stay below the root.

        Raises:
            DataError: a folder can't be listed, or the server can't be asked.
        """
        if not self.remote:
            return sorted(_walk(self.address, deep))
        with self._told():
            listing = _arrow_list if _by_arrow(self.address) else _fsspec_list
            found = [entry for entry in listing(self.address, deep) if not _hidden(entry.path)]
        return sorted(found)

    def folders(self, under: str = "") -> list[str]:
        """Names of the folders directly below one of the root's, sorted, hidden ones left out.

        Raises:
            DataError: the folder can't be listed, or the server can't be asked.
        """
        if not self.remote:
            with _listing(), os.scandir(os.path.join(self.address, under)) as found:
                return sorted(entry.name for entry in found if entry.is_dir() and entry.name[0] != ".")
        with self._told():
            names = (_arrow_folders if _by_arrow(self.address) else _fsspec_folders)(self.address, under)
            return sorted(name for name in names if name[:1] not in ("", "."))

    def open(self, path: str) -> BinaryIO:
        """A file to read and seek in.

        Raises:
            OSError: this one file can't be read.
            DataError: the server can't be asked.
        """
        if not self.remote:
            whole = os.path.join(self.address, path)
            if not stat.S_ISREG(os.stat(whole).st_mode):  # opening a pipe would wait for ever
                raise OSError(0, "not a regular file")
            return open(whole, "rb")
        with self._told(one=True):
            if _by_arrow(self.address):
                system, base = _arrow(self.address)
                return cast("BinaryIO", system.open_input_file(f"{base}/{path}"))
            system, base = _fsspec(self.address)
            return cast("BinaryIO", system.open(posixpath.join(base, path), "rb"))

    def read(self, path: str) -> bytes:
        """A whole file. Raises as `open` does."""
        with self.open(path) as file, self._told(one=True):
            return file.read()

    def picture(self, path: str) -> bytes | DataError:
        """A whole file, or why this one can't be read.

        Raises:
            DataError: the server can't be asked.
        """
        try:
            with self.open(path) as file, self._told(one=True):
                return decode.read_file(file)
        except FileNotFoundError:
            return DataError("no such file")
        except OSError as err:
            return DataError(f"can't be read: {err.strerror or err}")
        except DataError as err:
            if self.remote and str(err).startswith("data.path"):
                raise
            return err

    def inside(self, path: str) -> str | None:
        """A path from a table, made relative to the root; None: it leaves the root, or is no path."""
        try:
            os.fsencode(path)
        except UnicodeEncodeError:  # half a character, as JSON can spell it
            return None
        if not path or "\0" in path:
            return None
        root = (self.address.split("?")[0] if self.remote else self.address).rstrip("/") + "/"
        if path.startswith(root):
            path = path.removeprefix(root)
        if path.startswith("/") or SCHEME.match(path):
            return None
        clean = posixpath.normpath(path)
        return None if clean in (".", "..") or clean.startswith("../") else clean

    def probe(self, path: str) -> int | None:
        """Size of a file that a listing lacks (hidden, or not there: None).

        Raises:
            DataError: a link leads away from the root.
        """
        if self.remote:
            return None
        whole = os.path.join(self.address, path)
        if not _below(os.path.realpath(self.address), os.path.realpath(whole)):
            raise self.leaves(path)
        try:
            return os.stat(whole).st_size
        except OSError:
            return None

    def leaves(self, path: str) -> DataError:
        """What to raise for a link that leads away."""
        return DataError(f"{self.name(path)}: a link that leaves {self.name()}; copy it there")

    @contextmanager
    def _told(self, one: bool = False) -> Iterator[None]:
        """Turns what a remote system says into one error that names the address; `one`: unless one file is missing."""
        try:
            yield
        except DataError:
            raise
        except Exception as err:  # every back end has exceptions of its own
            if not self.remote or (one and isinstance(err, (FileNotFoundError, IsADirectoryError))):
                raise
            reason = " ".join(str(err).split())[:300] or type(err).__name__
            raise DataError(
                f"data.path: {self.name()} can't be read: {reason}; check the address, the credentials in the "
                f"environment and the network"
            ) from None


def open_files(cfg: Data) -> Files:
    """The files below data.path.

    Raises:
        DataError: there is no such folder, or it can't be reached.
    """
    given = cfg.path or ""
    match = SCHEME.match(given)
    if match is None or match[1].lower() in ("file", "local"):
        root = os.path.expanduser(urllib.parse.unquote(match[2]) if match else given)
        if not root:
            raise DataError("data.path: this source needs a folder; give one with --set data.path=FOLDER")
        root = os.path.normpath(root)
        if not os.path.isdir(root):
            raise DataError(f"data.path: {root} is not a folder; give an existing one with --set data.path=FOLDER")
        return Files(root)
    files = Files(f"{match[1].lower()}://{match[2]}")
    with files._told():
        if _by_arrow(files.address):
            from pyarrow.fs import FileType

            system, base = _arrow(files.address)
            kind = system.get_file_info(base).type
            there, is_file = kind != FileType.NotFound, kind == FileType.File
        else:
            system, base = _fsspec(files.address)
            there, is_file = system.exists(base), system.isfile(base)
    if not there:
        raise DataError(f"data.path: {files.name()}: no such bucket or folder; check the address")
    if is_file:
        raise DataError(f"data.path: {files.name()} is a file; give the folder that holds it")
    return files


def read_files(files: Files, wanted: Iterable[Row]) -> Iterator[Picture]:
    """What a source reads whose rows are files: their keys are paths."""
    return (files.picture(row.key) for row in wanted)


# local folders


def _hidden(path: str) -> bool:
    return path.startswith(".") or "/." in path


def _below(home: str, real: str) -> bool:
    return real == home or real.startswith(home.rstrip("/") + "/")


@contextmanager
def _listing() -> Iterator[None]:
    try:
        yield
    except OSError as err:
        raise DataError(f"{err.filename}: can't be listed: {err.strerror}; mend its permissions") from None


def _walk(root: str, deep: bool) -> Iterator[Entry]:
    """Files below a folder. A name is resolved only where it is a link: one system call a file is enough."""
    home = os.path.realpath(root)
    todo: list[tuple[str, tuple[str, ...]]] = [("", (home,))]  # folder, the real folders that hold it and itself
    while todo:
        under, chain = todo.pop()
        with _listing():
            with os.scandir(os.path.join(root, under)) as found:
                entries = [entry for entry in found if entry.name[0] != "."]
            for entry in entries:
                path = f"{under}/{entry.name}" if under else entry.name
                real = f"{chain[-1]}/{entry.name}"
                folder = entry.is_dir(follow_symlinks=False)
                if entry.is_symlink():
                    try:
                        real = os.path.realpath(entry.path, strict=True)
                    except OSError:
                        yield Entry(path, 0, None, DANGLING)
                        continue
                    folder = os.path.isdir(real)
                    if not _below(home, real):
                        yield Entry(path, 0, None, AWAY_FOLDER if folder else AWAY)
                        continue
                    if real in chain:
                        yield Entry(path, 0, None, LOOP)
                        continue
                if folder:
                    if deep:
                        todo.append((path, (*chain, real)))
                    continue
                facts = os.stat(real)
                if stat.S_ISREG(facts.st_mode):
                    yield Entry(path, facts.st_size, facts.st_mtime_ns)


# s3:// and gs:// through pyarrow


def _by_arrow(address: str) -> bool:
    return address.split("://")[0] in remote.SCHEMES


def _arrow(address: str) -> tuple[Any, str]:
    try:
        return remote.connect(address, "data.path")
    except RaydeepError as err:
        raise DataError(str(err)) from None


def _arrow_list(address: str, deep: bool) -> Iterator[Entry]:
    from pyarrow.fs import FileSelector, FileType

    system, base = _arrow(address)
    for info in system.get_file_info(FileSelector(base, recursive=deep)):
        if info.type == FileType.File:
            yield Entry(info.path[len(base) + 1 :], info.size, info.mtime_ns)


def _arrow_folders(address: str, under: str) -> list[str]:
    from pyarrow.fs import FileSelector, FileType

    system, base = _arrow(address)
    found = system.get_file_info(FileSelector(posixpath.join(base, under), allow_not_found=True))
    return [info.base_name for info in found if info.type == FileType.Directory]


# every other scheme through fsspec


@functools.lru_cache(16)
def _fsspec(address: str) -> tuple[Any, str]:
    import fsspec
    from fsspec.registry import known_implementations

    scheme = address.split("://")[0]
    try:
        system, base = fsspec.core.url_to_fs(address)
    except ImportError as err:
        what = known_implementations.get(scheme, {}).get("err") or f"install the package of {err.name}"
        raise DataError(f"data.path: {address}: {scheme}:// needs a package that is missing: {what}") from None
    except ValueError as err:
        raise DataError(f"data.path: {address}: {err}; expected a folder, s3://, gs:// or a scheme of fsspec") from None
    return system, base.rstrip("/") or base


def _fsspec_list(address: str, deep: bool) -> Iterator[Entry]:
    system, base = _fsspec(address)
    system.invalidate_cache()
    for path, facts in system.find(base, maxdepth=None if deep else 1, detail=True).items():
        marks = (facts.get(key) for key in ("ETag", "etag", "blob_id", "mtime", "LastModified", "last_modified"))
        stamp = next((str(mark) for mark in (*marks, facts.get("created")) if mark), None)
        yield Entry(path[len(base) :].lstrip("/"), int(facts.get("size") or 0), stamp)


def _fsspec_folders(address: str, under: str) -> list[str]:
    system, base = _fsspec(address)
    try:
        found = system.ls(posixpath.join(base, under), detail=True)
    except FileNotFoundError:
        return []
    return [posixpath.basename(facts["name"].rstrip("/")) for facts in found if facts["type"] == "directory"]
