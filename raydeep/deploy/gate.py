"""The gate of an exported file: it may round otherwise than the packed model, but it must be the same model.

The packed model must predict exactly as when it was scored. A runtime's file must, on each split,
- give the same accuracy to 0.1 point (on fewer than 2,000 rows: to one picture), and
- differ in at most 1 of 100 predictions (on fewer than 200 rows: in at most one).
"""

from __future__ import annotations

import numpy as np

DIFFER_SHARE = 0.01
ACCURACY_SHARE = 0.001


def most_differing(rows: int) -> int:
    """Predictions that may differ, of so many."""
    return max(1, int(rows * DIFFER_SHARE))


def most_lost(rows: int) -> int:
    """Right predictions that one may have more than the other, of so many rows."""
    return max(1, int(rows * ACCURACY_SHARE))


def refusal(packed: np.ndarray, found: np.ndarray, labels: np.ndarray, slack: int = 0) -> str | None:
    """Why a file is not the packed model; None where it is.

    Args:
        packed: predictions of the packed model, int64 of shape [rows].
        found: predictions of the file.
        labels: int64 of shape [rows].
        slack: right predictions more that may be lost or won; for a sample of the rows.
    """
    rows = len(labels)
    differ = int((packed != found).sum())
    lost = int((packed == labels).sum()) - int((found == labels).sum())
    if differ > most_differing(rows):
        return f"{differ} of {rows} predictions differ, at most {most_differing(rows)} may"
    if abs(lost) > most_lost(rows) + slack:
        more = "fewer" if lost > 0 else "more"
        return f"{abs(lost)} {more} of {rows} predictions are right, at most {most_lost(rows) + slack} may be"
    return None
