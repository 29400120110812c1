"""raydeep: augment, train, compress and search image classifiers on Ray, from one job file.

The commands of these names call these:

- `Job`, `load_job`: a job, made in Python or read from its file
- `train`, `compress`, `search`: a job → a `Run`
- `load`, `save`: a model folder → a torch module, and back
- `predict`: a model folder and pictures → labels
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from raydeep.api import compress, search, train
    from raydeep.config import Job, load_job
    from raydeep.deploy.loading import load, save
    from raydeep.errors import RaydeepError
    from raydeep.ops.predicting import predict
    from raydeep.run import Run

__version__ = "0.1.0"
__all__ = ["Job", "RaydeepError", "Run", "compress", "load", "load_job", "predict", "save", "search", "train"]

_HOME = {
    **dict.fromkeys(("compress", "search", "train"), "raydeep.api"),
    **dict.fromkeys(("Job", "load_job"), "raydeep.config"),
    **dict.fromkeys(("load", "save"), "raydeep.deploy.loading"),
    "RaydeepError": "raydeep.errors",
    "predict": "raydeep.ops.predicting",
    "Run": "raydeep.run",
}
# Packages of the same names stand beside three functions. Python sets a package as an attribute here when it is first
# imported: done now, and taken away again, the name is free for the function. `from raydeep.train import loop` works.
for _name in ("compress", "search", "train"):
    importlib.import_module(f"raydeep.{_name}")
    del globals()[_name]


def __getattr__(name: str) -> Any:
    """Import what is asked for first: `import raydeep` alone costs nothing, labelling pictures needs no torch."""
    if name not in _HOME:
        raise AttributeError(f"module 'raydeep' has no attribute {name!r}")
    globals()[name] = found = getattr(importlib.import_module(_HOME[name]), name)
    return found


def __dir__() -> list[str]:
    return [*globals(), *__all__]
