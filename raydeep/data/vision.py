"""torchvision:NAME — the image classification datasets of torchvision.

A dataset that keeps picture files gives their bytes; others give pixels. What a class offers is read off its
constructor and its attributes: torchvision has no common interface for splits, labels and names.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import os
import re
from collections.abc import Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from raydeep.data.decode import flat
from raydeep.data.files import Entry, Files, open_files
from raydeep.data.rows import SPLITS, Picture, Row, Source, code, labels_of_list, printable
from raydeep.errors import DataError
from raydeep.fields import TORCHVISION

if TYPE_CHECKING:
    from raydeep.config import Data

WORDS = {"train": ("train", "trainval", "train-standard"), "val": ("val", "valid"), "test": ("test",)}
LABELS = ("targets", "_labels", "labels", "y")
PATHS = ("samples", "imgs", "_samples", "_image_files", "_images")  # of paths, or of (path, label)
Options = tuple[tuple[str, Any], ...]


def vision(cfg: Data) -> Source:
    """A dataset of torchvision, with the splits it has.

    Raises:
        DataError: no such dataset, it is not there (and not to be fetched), or its targets are no classes.
    """
    name = cfg.source.removeprefix(TORCHVISION)
    kind = _class(name)
    parameters = _parameters(kind)
    root = None
    if "root" in parameters:
        if not cfg.path:
            raise DataError(f"{cfg.source}: needs data.path, the folder that holds it or that it is fetched into")
        if cfg.download and "://" not in cfg.path:
            os.makedirs(os.path.expanduser(cfg.path), exist_ok=True)
        files = open_files(cfg)
        if files.remote:
            raise DataError(f"{cfg.source}: torchvision reads local folders only; data.path is {files.name()}")
        root = files.address
    datasets = {split: (options, _open(name, root, options)) for split, options in _splits(cfg, root)}
    columns = {}
    for split, (_, dataset) in datasets.items():
        labels = _labels(cfg.source, split, dataset)
        if labels is not None or split in (None, "train"):
            columns[split] = labels_of_list(partial(_where, cfg.source, split), labels or [])
    names = class_names(next(iter(datasets.values()))[1])
    if names is not None and set(names) <= set(SPLITS):
        raise DataError(f"{cfg.source}: its classes are {', '.join(names)}: splits; use data.source=folder")
    classes, codes = code(cfg.source, list(columns.values()), names)
    rows = []
    listed: dict[str, Entry] = {}
    for split, coded in zip(columns, codes, strict=True):
        options, dataset = datasets[split]
        paths = _paths(dataset)
        nbytes = 0 if paths else picture_bytes(dataset)
        for i, label in enumerate(coded.tolist()):
            origin = f"{name}/{split or 'all'}#{i}"
            if paths and root is not None:
                listed = listed or {entry.path: entry for entry in Files(root).entries()}
                path, size = _inside(Files(root), listed, paths[i])
                rows.append(Row(printable(f"{origin} {path}"), label, split, (path, i, options), size))
            else:
                rows.append(Row(origin, label, split, (None, i, options), nbytes))
    return Source(classes, rows, partial(_read, name, root))


def vision_facts(cfg: Data) -> list[Any]:
    """Facts that change when the dataset does. One that torchvision fetches is always the same."""
    import torchvision

    kind = _class(cfg.source.removeprefix(TORCHVISION))
    facts: list[Any] = [torchvision.__version__.split("+")[0]]
    parameters = _parameters(kind)
    if "root" in parameters and "download" not in parameters:
        facts += [[entry.path, entry.size, entry.stamp] for entry in open_files(cfg).entries()]
    return facts


def _where(source: str, split: str | None, i: int) -> str:
    return f"{source} {split or ''} row {i}".replace("  ", " ")


def _class(name: str) -> Any:
    """The class of that name."""
    from torchvision import datasets

    known = [key for key in datasets.__all__ if inspect.isclass(getattr(datasets, key))]
    kind = getattr(datasets, name, None)
    if not (inspect.isclass(kind) and issubclass(kind, datasets.VisionDataset)):
        near = difflib.get_close_matches(name.lower(), [key.lower() for key in known], 1, 0.5)
        hint = next((f"; did you mean {TORCHVISION}{key}?" for key in known if key.lower() in near), "")
        raise DataError(f"{TORCHVISION}{name}: torchvision.datasets has no such class{hint}")
    return kind


def _parameters(kind: Any) -> dict[str, inspect.Parameter]:
    """Parameters of the constructor; with **kwargs, those of the base class too."""
    found: dict[str, inspect.Parameter] = {}
    for base in kind.__mro__:
        if "__init__" in vars(base):
            own = inspect.signature(vars(base)["__init__"]).parameters
            found = {**own, **found}
            if not any(p.kind is p.VAR_KEYWORD for p in own.values()):
                break
    return found


def _splits(cfg: Data, root: str | None) -> list[tuple[str | None, Options]]:
    """The splits that a dataset has, with the constructor's options for each."""
    name = cfg.source.removeprefix(TORCHVISION)
    parameters = _parameters(_class(name))
    missing = [
        p.name
        for p in parameters.values()
        if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD and p.name not in ("self", "root", "split")
    ]
    if missing:
        raise DataError(f"{cfg.source}: needs {', '.join(missing)}: no classification dataset that a job can name")
    if "split" not in parameters:
        found: list[tuple[str | None, Options]] = [(None, ())]
        if "train" in parameters:
            found = [("train", (("train", True),)), ("test", (("train", False),))]
        for _, options in found:
            _make(name, root, options, cfg.download)
        return found
    found = []
    for split, words in WORDS.items():
        for word in words:
            try:
                _make(name, root, (("split", word),), cfg.download)
            except ValueError:  # no split of this name
                continue
            found.append((split, (("split", word),)))
            break
    if "train" not in [split for split, _ in found]:
        raise DataError(f"{cfg.source}: its splits are none of train, val and test; it can't be named in a job")
    return found


@functools.lru_cache(3)  # one a split
def _open(name: str, root: str | None, options: Options) -> Any:
    """A dataset that is there."""
    return _make(name, root, options, False)


def _make(name: str, root: str | None, options: Options, download: bool) -> Any:
    """A dataset, fetched if asked.

    Raises:
        ValueError: it has no such split.
        DataError: it is not there, or can't be fetched or read.
    """
    kind = _class(name)
    can_fetch = "download" in _parameters(kind)
    keys = dict(options) | ({"download": True} if download and can_fetch else {})
    try:
        dataset = kind(**keys) if root is None else kind(root, **keys)
        len(dataset)
        return dataset
    except ImportError as err:
        raise DataError(f"{TORCHVISION}{name}: needs a package that is missing: {err}") from None
    except Exception as err:  # what they raise for a missing or a broken file is not agreed upon
        reason = re.sub(r"\s*You can (use|set) download=True[^.;]*\.?", "", str(err)).rstrip(".") or type(err).__name__
        if "split" in keys and isinstance(err, ValueError) and "split" in reason:
            raise ValueError(reason) from None
        if keys.get("download"):
            raise DataError(f"{TORCHVISION}{name}: can't be fetched into {root}: {reason}") from None
        if "pip install" in reason:
            raise DataError(f"{TORCHVISION}{name}: {reason}") from None
        mend = "fetch it with --download (or --set data.download=true)" if can_fetch else "put it there"
        raise DataError(f"{TORCHVISION}{name}: not to be read in {root}: {reason}; {mend}") from None


def _labels(source: str, split: str | None, dataset: Any) -> list[Any] | None:
    """One class number a row. None: it has no targets (some test splits are kept secret)."""
    given = next((v for v in (getattr(dataset, key, None) for key in LABELS) if _is_column(v, len(dataset))), None)
    if given is None:
        given = []
        for i in range(len(dataset)):
            try:
                item = dataset[i]
            except Exception as err:  # a broken picture: its label is not to be had apart
                raise DataError(f"{_where(source, split, i)}: can't be read: {err or type(err).__name__}") from None
            given.append(item[1] if isinstance(item, tuple) and len(item) == 2 else item)
            if i == 0 and given[0] is None:
                return None
            _whole(source, split, i, given[i])  # an object detection dataset is told at its first row
    return [_whole(source, split, i, label) for i, label in enumerate(given)]


def _is_column(value: Any, rows: int) -> bool:
    return value is not None and hasattr(value, "__len__") and len(value) == rows and rows > 0


def _whole(source: str, split: str | None, i: int, label: Any) -> Any:
    """A label as int; tensors and numpy numbers are unpacked."""
    if getattr(label, "shape", None) == () and hasattr(label, "item"):
        label = label.item()
    if isinstance(label, bool) or not isinstance(label, int):
        what = type(label).__name__
        raise DataError(
            f"{_where(source, split, i)}: its target is a {what}; expected a class number: raydeep classifies pictures"
        )
    return label


def class_names(dataset: Any) -> list[str] | None:
    """The names of a dataset's classes, all different; None: it has none."""
    classes = getattr(dataset, "classes", None) or getattr(dataset, "categories", None)
    if not isinstance(classes, (list, tuple)) or not classes:
        return None
    names = [", ".join(map(str, name)) if isinstance(name, (list, tuple)) else str(name) for name in classes]
    if len(set(names)) < len(names):  # ImageNet has two cranes
        names = [f"{name} ({i})" if names.count(name) > 1 else name for i, name in enumerate(names)]
    return names


def _paths(dataset: Any) -> list[str] | None:
    """The picture files of a dataset that keeps such, one a row."""
    for key in PATHS:
        found = getattr(dataset, key, None)
        if isinstance(found, list) and _is_column(found, len(dataset)):
            paths = [item[0] if isinstance(item, tuple) else item for item in found]
            if all(isinstance(path, (str, os.PathLike)) for path in paths) and os.path.isfile(paths[0]):
                return [os.fspath(path) for path in paths]
    return None


def _inside(files: Files, listed: dict[str, Entry], path: str) -> tuple[str, int]:
    """A path relative to the root, and the size of the file."""
    inner = files.inside(os.path.normpath(path))
    if inner is None:
        raise DataError(f"{path}: not below {files.name()}; copy it there")
    entry = listed.get(inner)
    return inner, entry.size if entry is not None and not entry.fault else files.probe(inner) or 0


def picture_bytes(dataset: Any) -> int:
    """Bytes of the first picture, as a measure of all."""
    try:
        return int(np.asarray(dataset[0][0]).nbytes)
    except Exception:  # told when the picture is read
        return 0


def _read(name: str, root: str | None, wanted: Iterable[Row]) -> Iterator[Picture]:
    for row in wanted:
        path, i, options = row.key
        if path is not None:
            yield Files(root or "").picture(path)
            continue
        dataset = _open(name, root, options)
        try:
            picture = dataset[i][0]
        except Exception as err:  # whatever the dataset's own decoder says
            yield DataError(f"can't be decoded: {err or type(err).__name__}")
            continue
        if isinstance(picture, np.ndarray) and picture.dtype == np.uint8:
            yield picture
        elif hasattr(picture, "convert"):
            yield np.asarray(flat(picture))
        else:
            yield DataError(f"no picture but a {type(picture).__name__}")
