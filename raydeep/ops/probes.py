"""What a node can reach: the storage, written and read, and the dataset. Each is tried, not inferred."""

from __future__ import annotations

import os
import posixpath
import shutil
import time
from pathlib import Path
from typing import Any

from raydeep import mirror
from raydeep.errors import RaydeepError
from raydeep.ops import nodefacts

SEEN_S = 4.0  # a file that another node wrote may take so long to be seen: NFS keeps what it knows for 3 s
DEEP = 3  # folders that are looked into for one file
HEAD_BYTES = 64 * 1024


def remote(address: str) -> bool:
    """Whether it is an address, scheme://…, not a folder."""
    return "://" in address


def _system(address: str) -> tuple[Any, str]:
    """A pyarrow file system, and the path in it."""
    from raydeep.data import files

    if files._by_arrow(address):
        return files._arrow(address)
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    system, base = files._fsspec(address)
    return PyFileSystem(FSSpecHandler(system)), base


def _put(storage: str, name: str, text: str) -> None:
    if remote(storage):
        system, base = _system(storage)
        system.create_dir(posixpath.dirname(f"{base}/{name}"))
        with system.open_output_stream(f"{base}/{name}") as file:
            file.write(text.encode())
    else:
        with Path(storage, name).open("x") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())  # a full disk or a quota is told here, not later


def _get(storage: str, name: str, wait_s: float) -> str | None:
    """A file's text; None: there is none, not even after a while."""
    end = time.monotonic() + wait_s
    while True:
        try:
            if remote(storage):
                system, base = _system(storage)
                with system.open_input_file(f"{base}/{name}") as file:
                    return str(file.read().decode())
            return Path(storage, name).read_text()
        except FileNotFoundError:
            if time.monotonic() > end:
                return None
            time.sleep(0.25)


class Storage:
    """The driver's side: puts a file where nodes look for it, reads what they wrote, leaves nothing behind."""

    def __init__(self, storage: str, token: str) -> None:
        self.storage, self.folder = storage, f".doctor-{token}"
        self.made: list[Path] = []
        self.error = ""

    def __enter__(self) -> Storage:
        try:
            if not remote(self.storage):
                folder = Path(self.storage) / self.folder
                missing = [path for path in folder.parents if not path.exists()]
                folder.mkdir(parents=True)
                self.made = missing  # the innermost first
            _put(self.storage, f"{self.folder}/driver", self.folder)
            if _get(self.storage, f"{self.folder}/driver", 0) != self.folder:
                self.error = "reads otherwise than it was written"
        except (OSError, RaydeepError) as err:
            self.error = told(err)
        return self

    def wrote(self, node: str) -> bool:
        """Whether what a node says that it has written is there."""
        try:
            return _get(self.storage, f"{self.folder}/{node}", SEEN_S) == node
        except (OSError, RaydeepError):
            return False

    def __exit__(self, *_: object) -> None:
        try:
            if remote(self.storage):
                system, base = _system(self.storage)
                system.delete_dir(f"{base}/{self.folder}")
            else:
                shutil.rmtree(Path(self.storage) / self.folder, ignore_errors=True)
                for path in self.made:
                    path.rmdir()
        except (OSError, RaydeepError):
            pass


def told(err: BaseException) -> str:
    """An error in a few words."""
    if isinstance(err, OSError) and err.strerror:
        return err.strerror
    return " ".join(str(err).split())[:300].replace("data.path: ", "") or type(err).__name__


def reach(node: str, storage: str | None, folder: str, data: dict[str, Any] | None) -> dict[str, Any]:
    """What one node reaches.

    Args:
        node: its id, the name of the file that it writes.
        storage: of the job; None: not asked.
        folder: in it, made by Storage.
        data: what `plan_data` gave; None: not asked.
    """
    found: dict[str, Any] = {}
    if storage is not None:
        found["storage"] = _reach_storage(node, storage, folder)
    if data is not None:
        try:
            found["data"] = {"error": None, "text": read_data(data)}
        except (RaydeepError, OSError, ImportError, ValueError) as err:
            found["data"] = {"error": told(err), "text": ""}
    return found


def _reach_storage(node: str, storage: str, folder: str) -> dict[str, Any]:
    there = remote(storage) or Path(storage).is_dir()
    space = None if remote(storage) else nodefacts.disk(storage)
    found: dict[str, Any] = {
        "there": there,
        "seen": False,
        "wrote": False,
        "error": None,
        "free_bytes": space and space[1],
    }
    try:
        found["seen"] = there and _get(storage, f"{folder}/driver", SEEN_S) == folder
        if found["seen"]:
            _put(storage, f"{folder}/{node}", node)
            found["wrote"] = True
    except (OSError, RaydeepError) as err:
        found["error"] = told(err)
    return found


def writable(storage: str) -> str:
    """Why run folders can't be made in a local storage; "": they can. Leaves nothing behind, makes no folder."""
    path = Path(storage)
    for folder in (path, *path.parents):
        try:
            if folder.is_dir():
                break
            if folder.exists():
                return f"{folder} is a file" if folder != path else "it is a file"
        except OSError as err:
            return told(err)
    if not os.access(folder, os.W_OK | os.X_OK):
        return f"{folder} can't be written" if folder != path else "it can't be written"
    return ""


# the dataset


def plan_data(job: dict[str, Any], storage: str) -> dict[str, Any]:
    """What nodes have to read of a job's dataset: its shards if they are made, else its source.

    Args:
        job: Job.model_dump(mode="json").
        storage: where its shards would be.
    """
    from raydeep.config import Data
    from raydeep.data import shards, splits

    cfg = Data.model_validate(job["data"])
    plan: dict[str, Any] = {"data": job["data"], "shards": None, "resident_bytes": 0, "streamed": False, "error": None}
    try:
        folder = shards.dataset_folder(cfg, mirror.place(storage))
        if mirror.fetch(folder / "dataset.json"):
            plan["shards"] = mirror.name(folder)
            manifest = shards.open_manifest(folder)
            if splits.is_resident(manifest, cfg):
                plan["resident_bytes"] = splits.decoded_bytes(manifest, cfg)
            else:
                plan["streamed"] = True
    except (RaydeepError, OSError) as err:
        plan["error"] = told(err)
    return plan


def read_data(plan: dict[str, Any]) -> str:
    """Read a little of a dataset, and say of what.

    Raises:
        RaydeepError: it can't be read here.
    """
    from raydeep.config import Data

    cfg = Data.model_validate(plan["data"])
    if plan["shards"]:
        import pyarrow.parquet as pq

        from raydeep.data import shards
        from raydeep.data.files import Files

        manifest = shards.open_manifest(mirror.place(plan["shards"]))
        for split in manifest.splits:
            with Files(plan["shards"]).open(manifest.files(split)[0].name) as source, pq.ParquetFile(source) as file:
                file.read_row_group(0, columns=["label"])
        return f"shards of {sum(manifest.rows(split) for split in manifest.splits):,} pictures in {plan['shards']}"
    if cfg.is_own:
        return f"{cfg.source} (your own code, not run for this)"
    if not cfg.needs_path:
        return f"{cfg.source} (embedded)"
    from raydeep.data.files import Files, open_files
    from raydeep.errors import DataError

    if cfg.download and cfg.path and not remote(cfg.path) and not os.path.isdir(os.path.expanduser(cfg.path)):
        return f"{cfg.source} (to be fetched into {cfg.path})"
    root = open_files(cfg)

    def look(files: Files, depth: int) -> bool:
        for entry in files.entries(deep=False):
            if not entry.fault:
                with files.open(entry.path) as file:
                    file.read(HEAD_BYTES)
                return True
        if not depth:
            return False
        address, sep, options = files.address.partition("?") if files.remote else (files.address, "", "")
        return any(look(Files(f"{address}/{name}{sep}{options}"), depth - 1) for name in files.folders())

    if not look(root, DEEP):
        raise DataError(f"{root.name()} holds no file")
    return f"{cfg.source} in {root.name()}"
