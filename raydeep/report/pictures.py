"""The pictures of the page, out of gallery.json: the surest errors, and what augmentation makes of a few."""

from __future__ import annotations

import re
from typing import Any

from raydeep.report import words
from raydeep.report.folder import Run, number

PICTURE = re.compile(r"data:image/(png|jpeg);base64,[A-Za-z0-9+/]+=*")  # nothing else goes into the page


def classes(run: Run) -> list[str]:
    """Names of the classes, as far as the provenance tells them."""
    dataset = run.provenance.get("dataset")
    names = dataset.get("classes") if isinstance(dataset, dict) else None
    return [str(name) for name in names] if isinstance(names, list) else []


def errors(run: Run) -> dict[str, Any] | None:
    """The surest errors of the dense model.

    Returns:
        `wrong` and `rows` of the split, and `groups`, those with the most errors first: the `name` of the true class
        and its `pictures` (`src`, `alt`, `caption`); None where the run kept none.
    """
    found = run.gallery or {}
    names = classes(run)
    groups: dict[str, list[dict[str, str]]] = {}
    for row in found.get("errors") or []:
        true, taken, sure = (number(row.get(key)) for key in ("true", "predicted", "probability"))
        if true is None or taken is None or not _sound(row.get("picture")):
            continue
        name, other, share = _name(names, true), _name(names, taken), words.percent(sure, 0)
        shown = {
            "src": row["picture"],
            "alt": f"true {name}, taken for {other}, {share}",
            "taken": other,
            "sure": share,
        }
        groups.setdefault(name, []).append(shown)
    if not groups:
        return None
    ordered = sorted(groups.items(), key=lambda group: -_wrong(run, names, group[0], len(group[1])))
    return {
        "wrong": number(found.get("wrong")), "rows": number(found.get("rows")),
        "groups": [{"name": name, "pictures": pictures} for name, pictures in ordered],
    }  # fmt: skip


def _wrong(run: Run, names: list[str], name: str, shown: int) -> float:
    """Errors of a class: those of the confusion matrix, else those shown."""
    counts = (run.evaluation or {}).get("confusion")
    k = names.index(name) if name in names else -1
    if not isinstance(counts, list) or not 0 <= k < len(counts) or len(counts[k]) != len(names):
        return shown
    return sum(number(n) or 0 for j, n in enumerate(counts[k]) if j != k)


def augmentation(run: Run) -> dict[str, Any] | None:
    """Pictures of train beside their augmented versions.

    Returns:
        `heads` of the columns, `rows` (one a picture: its `name` and its `cells` of `src`, `alt` and `caption`) and
        whether augmentation `changes` anything; None where the run kept none.
    """
    found = (run.gallery or {}).get("augmentation")
    if not isinstance(found, dict):
        return None
    heads, columns = [str(head) for head in found.get("heads") or []], found.get("pictures") or []
    captions, names = found.get("captions") or [], classes(run)
    rows = []
    for i, label in enumerate(found.get("labels") or []):
        name = _name(names, number(label) or 0)
        cells: list[dict[str, str]] = []
        for head, pictures, texts in zip(heads, columns, captions, strict=False):
            if i < min(len(pictures), len(texts)) and _sound(pictures[i]):
                caption = str(texts[i])
                what = f"{name}, as it is" if not cells else f"{caption or name}, as trained on in {head}"
                cells.append({"src": pictures[i], "alt": what, "caption": caption})
        if len(cells) == len(heads) > 1:
            rows.append({"name": name, "cells": cells})
    return {"heads": heads, "rows": rows, "changes": bool(found.get("changes"))} if rows else None


def _sound(picture: Any) -> bool:
    return isinstance(picture, str) and PICTURE.fullmatch(picture) is not None


def _name(names: list[str], label: float) -> str:
    return names[int(label)] if 0 <= label < len(names) else f"class {label:.0f}"
