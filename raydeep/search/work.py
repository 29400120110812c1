"""A piece of work: one rung of one trial; its names and seeds. Pure."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from raydeep.search.space import Config


def trial_seed(seed: int, trial: int) -> int:
    """Seed of a trial's training, from the job's seed and the trial's number."""
    return int(np.random.SeedSequence([seed, trial]).generate_state(1)[0] & 0x7FFFFFFF)


def label(trial: int) -> str:
    """Name of a trial in files and tables."""
    return f"t{trial:03d}"


class Work(NamedTuple):
    """One rung of one trial."""

    trial: int
    values: Config
    seed: int
    rung: int
    epochs: int  # that the trial has had after it
    before: int  # and before it
    start: str = "dense"  # what it began from: dense, or the label of another trial
    score: float | None = None  # its accuracy without training from there, if that is known
    neighbour: str | None = None  # a trained trial whose weights may be better to begin from
    donor: str | None = None  # population-based training: whose checkpoint it goes on from
