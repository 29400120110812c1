"""Parts of a job that are a user's own code, named `package.module:name`."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from typing import Any

from raydeep.errors import RaydeepError

NAME = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def find(key: str, text: str, error: type[RaydeepError]) -> Callable[..., Any]:
    """The function or class that a job names; its module is imported from where the command runs.

    Args:
        key: of the job, for errors.
        text: `package.module:name`.
        error: the class of error that is raised.

    Raises:
        RaydeepError: `error`: it can't be imported, is not there or can't be called.
    """
    module, _, name = text.partition(":")
    try:
        found = importlib.import_module(module)
    except (ImportError, ValueError) as err:
        raise error(f"{key} {text}: can't import {module}: {err}; run where it can be imported") from None
    except (Exception, SystemExit) as err:  # the module's own code may raise anything, or try to end the process
        raise error(f"{key} {text}: {module} fails when it is imported: {reason(err)}") from err
    if not hasattr(found, name):
        raise error(f"{key} {text}: {module} has no {name}")
    made = getattr(found, name)
    if not callable(made):
        raise error(f"{key} {text}: {name} is a {type(made).__name__}, expected a function or a class")
    return made


def reason(err: BaseException) -> str:
    """An exception in one line: its first one, or its class."""
    return next((line for line in str(err).splitlines() if line.strip()), "") or type(err).__name__
