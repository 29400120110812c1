"""The errors that a user can mend. Everything else is a bug and keeps its traceback."""

SPACES = "\u00a0\u202f"  # that keep a number and its unit on one line


def shown(text: str, lines: bool = False) -> str:
    """A text that others had a part in (a name, a label), for a terminal: what would steer it is escaped.

    `lines`: line breaks before an indent stay; a name holds none that would pass for a line of ours.
    """
    if lines:
        return "\n  ".join(map(shown, text.split("\n  ")))
    return "".join(c if c.isprintable() or c in SPACES else c.encode("unicode_escape").decode() for c in text)


class RaydeepError(Exception):
    """Something that the user can mend; the message says what, where, what was expected and how.

    Only positional string arguments, so that instances survive pickling between processes.
    """


class JobError(RaydeepError):
    """The job file, or an override, is wrong."""


class DataError(RaydeepError):
    """The data is missing, unreadable or does not fit the job."""


class ModelError(RaydeepError):
    """A network or a model folder can't be built or loaded."""


class ArtifactError(ModelError):
    """A packed or exported model file is broken, cut off or tampered with."""


class TrainError(RaydeepError):
    """Training can't go on (a loss that is not finite, for instance)."""


class ResourceError(RaydeepError):
    """The plan does not fit the machine or the cluster."""


class ExportError(RaydeepError):
    """An exported file does not behave like the model it was made from."""


class StorageError(RaydeepError):
    """The bucket of a run can't be read or written."""
