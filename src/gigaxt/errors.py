"""Everything gigaxt raises on purpose.

    GigaxtError
    ├── ImageError       a file or array that cannot be read or written as asked
    ├── ConfigError      settings that contradict each other, unknown keys, values out of range
    ├── DataError        a manifest, label or target that does not fit
    ├── CheckpointError  a model folder or run that cannot be loaded or saved
    └── TrainingError    a run that had to stop, such as a loss that is not finite

Messages say what was expected, what came, and what to do, in one line. The command line prints them as they are
(exit status 2 for the user's mistakes, 1 for failures while running); library users get the exception.
"""

from __future__ import annotations


class GigaxtError(Exception):
    """Base of all errors that gigaxt raises on purpose."""

    exit_status = 2


class ImageError(GigaxtError):
    """An image cannot be read or written.

    Args:
        path: the file (or a description of the array) in question.
        cause: what was expected and what came, and what to do.
        place: where in the image, e.g. "level 0, x 512, y 0, 256 x 256 px"; empty for the whole.
    """

    def __init__(self, path: object, cause: str, place: str = "") -> None:
        # One line, whatever a library put into its message.
        self.path, self.cause, self.place = str(path), " ".join(cause.split()), place
        super().__init__(path, cause, place)

    def __str__(self) -> str:
        return f"{self.path}{f' ({self.place})' if self.place else ''}: {self.cause}"


class ConfigError(GigaxtError):
    """Settings that contradict each other, are unknown or out of range."""


class DataError(GigaxtError):
    """A manifest, label or target that does not fit the images or the model."""


class CheckpointError(GigaxtError):
    """A model folder or a run that cannot be loaded or saved."""


class TrainingError(GigaxtError):
    """Training stopped for a reason that is not the user's mistake, such as a loss that is not finite."""

    exit_status = 1


def one_line(error: BaseException) -> str:
    """What an exception says, without line breaks: of one of the system's the cause alone, else all of its text."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(f"{text or type(error).__name__}".split())
