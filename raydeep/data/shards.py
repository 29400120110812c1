"""A dataset folder: Parquet shards and the manifest that describes them. sharding.py writes it.

It holds `dataset.json`, `<split>-00000.parquet …` (columns image, label, origin) and `quarantine.jsonl`, and
appears under its final name only when whole. Pictures are stored as plain PNG or JPEG files, or as their pixels.
"""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from raydeep import mirror, remote
from raydeep.data import decode, sharding, sources
from raydeep.data.files import Files
from raydeep.disk import read_json, sha256_file
from raydeep.errors import DataError

if TYPE_CHECKING:
    from raydeep.data.sharding import Progress, Runner
    from raydeep.sections import Data

MAX_HASHED_BYTES = 2**30  # larger datasets are hashed by `raydeep data verify` only, not before each run
# Keys that matter when shards are read, not when they are written:
LATER = {"limit_per_class", "mode", "cache", "memory_bytes", "window_bytes", "image_size", "download"}


class Manifest(NamedTuple):
    """What `dataset.json` says."""

    path: Path
    classes: list[str]
    mode: str  # grey or rgb
    store: str  # encoded or decoded
    size_range: tuple[int, int, int, int]  # smallest height, width, largest height, width
    mean: list[float]  # a channel, of train, in [0, 1]
    std: list[float]
    splits: dict[str, dict[str, Any]]
    quarantined: int
    hash: str

    def files(self, split: str) -> list[Path]:
        """Shards of a split, in order."""
        return [self.path / shard["name"] for shard in self.splits[split]["shards"]]

    def rows(self, split: str) -> int:
        """Rows of a split."""
        return int(self.splits[split]["rows"])

    @property
    def stored(self) -> tuple[int, int]:
        """Smallest height and width: those of every picture where pixels are stored."""
        return self.size_range[:2]

    def side(self, cfg: Data) -> int | None:
        """Side in pixels that pictures are decoded to; None leaves them as they are.

        Raises:
            DataError: the sizes vary and the job names none.
        """
        low_h, low_w, high_h, high_w = self.size_range
        if cfg.image_size is None and (low_h, low_w) != (high_h, high_w):
            raise DataError(
                f"{self.path}: pictures are {low_h}×{low_w} to {high_h}×{high_w} pixels; "
                f"name one size with data.image_size"
            )
        return cfg.image_size

    def shape(self, cfg: Data) -> tuple[int, int, int]:
        """Height, width, channels of a decoded picture."""
        side = self.side(cfg)
        height, width = (side, side) if side else self.stored
        return height, width, decode.CHANNELS[self.pixel_mode(cfg)]

    def pixel_mode(self, cfg: Data) -> str:
        """Grey or rgb, as the job says, or as the pictures are."""
        return self.mode if cfg.mode == "auto" else cfg.mode


def read_manifest(path: Path) -> Manifest:
    """Read and check `dataset.json` alone.

    Raises:
        DataError: the folder is no dataset, or one of another version.
    """
    file = path / "dataset.json"
    if not path.is_dir():
        raise DataError(f"{path}: no such folder; make a dataset with: raydeep shard SOURCE OUT")
    if not file.is_file():
        raise DataError(f"{path}: not a dataset (it has no dataset.json); make one with: raydeep shard SOURCE OUT")
    raw = read_json(file)
    if not isinstance(raw, dict):
        raise DataError(f"{file}: expected a JSON object; shard the source again")
    if raw.get("schema") != sharding.SCHEMA_VERSION:
        raise DataError(
            f"{file}: schema {raw.get('schema')}, expected {sharding.SCHEMA_VERSION}; shard the source again"
        )
    try:
        fields = {name: raw[name] for name in Manifest._fields if name != "path"}
        manifest = Manifest(path=path, **{**fields, "size_range": tuple(fields["size_range"])})
        wrong = _contradiction(manifest)
    except (KeyError, TypeError, AttributeError, ValueError) as err:
        raise DataError(f"{file}: lacks {err}; shard the source again") from None
    if wrong:
        raise DataError(f"{file}: {wrong}; it was changed by hand: shard the source again")
    return manifest


def open_manifest(path: Path) -> Manifest:
    """Of a dataset that is looked at, not used: one in a bucket is not fetched for it."""
    if mirror.address(path) is None:
        return load_manifest(path)
    mirror.fetch(path / "dataset.json")
    return read_manifest(path)


def load_manifest(path: Path, check_hashes: bool = False) -> Manifest:
    """Read and check `dataset.json`, and that its shards are there.

    Args:
        path: the dataset folder.
        check_hashes: read the shards too, unless they are larger than MAX_HASHED_BYTES together.

    Raises:
        DataError: as `read_manifest`, or shards are missing or changed.
    """
    manifest = read_manifest(path)
    total = sum(shard["bytes"] for split in manifest.splits.values() for shard in split["shards"])
    for split in manifest.splits.values():
        for shard in split["shards"]:
            found = path / shard["name"]
            if not found.is_file() or found.stat().st_size != shard["bytes"]:
                raise DataError(f"{found}: missing or not {shard['bytes']:,} bytes; shard the source again")
            if check_hashes and total <= MAX_HASHED_BYTES and sha256_file(found) != shard["sha256"]:
                raise DataError(f"{found}: its sha256 is not that of dataset.json; shard the source again")
    return manifest


def _contradiction(m: Manifest) -> str | None:
    """What in a manifest can't be, or None."""
    if m.hash != sharding.content_hash(m.classes, m.splits):
        return "its hash is not that of its classes and splits"
    if m.mode not in decode.CHANNELS or m.store not in ("encoded", "decoded"):
        return f"mode {m.mode!r}, store {m.store!r}"
    sizes = [*m.size_range]
    if len(sizes) != 4 or not all(isinstance(v, int) and v > 0 for v in sizes) or m.stored > m.size_range[2:]:
        return f"size_range {sizes}"
    if len(m.mean) != len(m.std) or not all(0 <= v <= 1 for v in m.mean) or not all(0 < v <= 1 for v in m.std):
        return f"mean {m.mean}, std {m.std}"
    if list(m.splits) != list(sources.SPLITS):
        return f"splits {', '.join(m.splits)}"
    names: list[str] = []
    for split, facts in m.splits.items():
        for shard in facts["shards"]:
            names.append(shard["name"])
            if len(shard["sha256"]) != 64 or shard["bytes"] < 0:
                return f"sha256 or bytes of {shard['name']}"
            if Path(shard["name"]).name != shard["name"] or sum(shard["groups"]) != shard["rows"]:
                return f"shard {shard['name']!r} of {split}"
            if not all(isinstance(rows, int) and rows > 0 for rows in shard["groups"]):
                return f"row groups of {shard['name']}"
        counts = facts["class_counts"]
        rows = sum(shard["rows"] for shard in facts["shards"])
        if not rows or facts["rows"] != rows or sum(counts) != rows or len(counts) != len(m.classes) or min(counts) < 0:
            return f"rows and class counts of {split}"
    return "a shard stands in it twice" if len(set(names)) < len(names) else None


def dataset_folder(cfg: Data, storage: Path) -> Path:
    """Where the shards of a job's source stand: its own path if that is a dataset, else a folder in storage."""
    if cfg.path and "://" not in cfg.path and (Path(os.path.expanduser(cfg.path)) / "dataset.json").is_file():
        return mirror.real(Path(os.path.expanduser(cfg.path)))
    if cfg.path and cfg.path.split("://")[0].lower() in remote.SCHEMES:
        with suppress(OSError):
            Files(cfg.path).read("dataset.json")
            return mirror.place(cfg.path, "data.path")
    later = LATER - {"image_size"} if cfg.source == "synthetic" else LATER | {"rows", "classes"}
    facts = [sharding.SCHEMA_VERSION, cfg.model_dump(exclude=later), sources.fingerprint(cfg)]
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]
    return storage / "datasets" / f"{cfg.source.replace(':', '-')}-{key}"


def prepare(cfg: Data, storage: Path, progress: Progress | None = None, run: Runner = sharding.one_by_one) -> Manifest:
    """The dataset of a job, sharded first if it is not yet.

    Args:
        cfg: the data section.
        storage: datasets are made in its `datasets` folder.
        progress: told of pictures done, while sharding.
        run: what runs the tasks of sharding.
    """
    out = dataset_folder(cfg, storage)
    if mirror.exists(out / "dataset.json"):
        mirror.pull(out, exact=True)
        return load_manifest(out, check_hashes=True)
    manifest = write_dataset(cfg, out, progress, run, made_elsewhere=True)
    mirror.push_folder(out, last="dataset.json")
    return manifest


def write_dataset(
    cfg: Data,
    out: Path,
    progress: Progress | None = None,
    run: Runner = sharding.one_by_one,
    made_elsewhere: bool = False,
) -> Manifest:
    """Shard a source: check every picture, split, write Parquet, describe it in `dataset.json`.

    A call that was killed is continued by the next one: tasks that are done are not repeated.

    Args:
        cfg: the data section.
        out: the new dataset folder.
        progress: told of pictures done.
        run: what runs the tasks.
        made_elsewhere: another process may make the same dataset meanwhile: then it is taken.

    Raises:
        DataError: nothing to read, too many bad pictures, or `out` exists already.
    """
    facts = sharding.write(cfg, out, progress, run)
    if facts is None and not made_elsewhere:
        raise DataError(f"{out}: exists and is not empty; name a new folder or remove it")
    return load_manifest(out)
