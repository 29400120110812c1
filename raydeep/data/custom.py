"""A dataset of the user's own as a source: `data.source: package.module:factory`.

Contract: `factory(path)`, with data.path or None, gives one map-style dataset, to be split, or a dict of them by split
(train, val, test). A dataset has a length, and its item i is (picture, label): the bytes of a picture file, a PIL image
or uint8 pixels of shape [H, W] or [H, W, C]; an integer from 0 or a string. If it has `targets` (as torchvision's),
these are the labels and no picture is made to learn them; `classes` names integer labels.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from raydeep import own
from raydeep.data.decode import flat
from raydeep.data.files import Files
from raydeep.data.rows import SPLITS, Picture, Row, Source, code, labels_of_list
from raydeep.data.vision import class_names, picture_bytes
from raydeep.disk import sha256_file
from raydeep.errors import DataError

if TYPE_CHECKING:
    from raydeep.config import Data


def custom(cfg: Data) -> Source:
    """The index of a dataset of the user's own.

    Raises:
        DataError: its factory can't be called, or gives no such datasets; the row is named where it is one.
    """
    _open.cache_clear()  # what is below data.path may have changed since
    datasets = _open(cfg.source, cfg.path)
    columns = {}
    for split, dataset in datasets.items():
        where = partial(_where, cfg.source, split)
        columns[split] = labels_of_list(where, _labels(cfg.source, split, dataset))
    classes, codes = code(cfg.source, list(columns.values()), class_names(next(iter(datasets.values()))))
    rows = []
    for (split, dataset), coded in zip(datasets.items(), codes, strict=True):
        nbytes = picture_bytes(dataset)
        for i, label in enumerate(coded.tolist()):
            rows.append(Row(_where(cfg.source, split, i), label, split, (split, i), nbytes))
    return Source(classes, rows, partial(_read, cfg.source, cfg.path))


def custom_facts(cfg: Data) -> list[Any]:
    """Facts that change when the dataset does, as far as can be seen: its module, and the files below data.path."""
    own.find("data.source", cfg.source, DataError)
    file = getattr(sys.modules[cfg.source.partition(":")[0]], "__file__", None)
    facts: list[Any] = [sha256_file(Path(file))] if file is not None and Path(file).is_file() else []
    if cfg.path and "://" not in cfg.path:
        path = Path(cfg.path).expanduser()
        if path.is_dir():
            facts += [[entry.path, entry.size, entry.stamp] for entry in Files(str(path)).entries()]
        elif path.is_file():
            facts.append(sha256_file(path))
    return facts


def _where(source: str, split: str | None, i: int) -> str:
    return f"{source} {split or 'all'}#{i}"


@functools.lru_cache(2)
def _open(source: str, path: str | None) -> dict[str | None, Any]:
    """The datasets by split; one that is still to be split stands under None."""
    factory = own.find("data.source", source, DataError)
    try:
        made = factory(path)
    except DataError:
        raise
    except Exception as err:  # a user's own code may raise anything
        raise DataError(f"data.source {source}: its factory failed: {own.reason(err)}") from err
    found: dict[str | None, Any] = made if isinstance(made, dict) else {None: made}
    if isinstance(made, dict) and ("train" not in made or not set(made) <= set(SPLITS)):
        raise DataError(
            f"data.source {source}: its factory gave the splits {', '.join(map(str, made)) or 'none'}; expected train, "
            f"and val and test if there are such"
        )
    for split, dataset in found.items():
        if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
            raise DataError(
                f"data.source {source}: its factory gave a {type(dataset).__name__}"
                f"{f' for {split}' if split else ''}; expected a dataset: len(d), and d[i] of (picture, label)"
            )
    return found


def _labels(source: str, split: str | None, dataset: Any) -> list[Any]:
    """The label of each row, tensors and numpy numbers unpacked."""
    given = getattr(dataset, "targets", None)
    if given is None or len(given) != len(dataset):
        given = (_item(source, split, dataset, i)[1] for i in range(len(dataset)))
    return [label.item() if getattr(label, "shape", None) == () else label for label in given]


def _item(source: str, split: str | None, dataset: Any, i: int) -> tuple[Any, Any]:
    try:
        item = dataset[i]
    except Exception as err:  # a user's own code may raise anything
        raise DataError(f"{_where(source, split, i)}: can't be read: {own.reason(err)}") from err
    if not isinstance(item, (tuple, list)) or len(item) != 2:
        raise DataError(f"{_where(source, split, i)}: a {type(item).__name__}; expected (picture, label)")
    return item[0], item[1]


def _read(source: str, path: str | None, wanted: Iterable[Row]) -> Iterator[Picture]:
    for row in wanted:
        split, i = row.key
        try:
            picture, _ = _item(source, split, _open(source, path)[split], i)
        except DataError as err:
            yield err
            continue
        if isinstance(picture, bytes) or (isinstance(picture, np.ndarray) and picture.dtype == np.uint8):
            yield picture
        elif hasattr(picture, "convert"):
            yield np.asarray(flat(picture))
        else:
            kind = f"{picture.dtype} array" if hasattr(picture, "dtype") else type(picture).__name__
            yield DataError(f"no picture but a {kind}; expected bytes of a file, a PIL image or uint8 pixels")
