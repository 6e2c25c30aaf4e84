"""The command line: one file a verb, each with `main(args) -> exit status`; imported only when it is called."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

from gigaxt.allocator import keep_freed_memory
from gigaxt.config import nearest
from gigaxt.errors import ConfigError, GigaxtError

VERBS = {
    "demo": ("gigaxt.cli.demo", "see it work: made-up scenes, two short trainings, a map, in five minutes"),
    "check": ("gigaxt.cli.check", "look through a CSV of images before training; --write makes a config"),
    "train": ("gigaxt.cli.train", "train a model on the images of a CSV, or continue a stopped run"),
    "plan": ("gigaxt.cli.plan", "memory, disk and time of a run before it starts; --fit writes settings that fit"),
    "eval": ("gigaxt.cli.eval", "score a model or a run on the images of a CSV"),
    "predict": ("gigaxt.cli.predict", "answer for new images: class scores as CSV, masks as tiled TIFF"),
    "info": ("gigaxt.cli.info", "what an image file or a model folder holds"),
    "convert": ("gigaxt.cli.convert", "make a tiled TIFF pyramid of an image, in bounded memory"),
    "import-coco": ("gigaxt.cli.import_coco", "make a CSV of the images and boxes of a COCO JSON"),
    "import-inat": ("gigaxt.cli.import_inat", "make a CSV of iNaturalist 2018, or of some of its supercategories"),
    "import-xview3": ("gigaxt.cli.import_xview3", "make a CSV of the scenes of xView3-SAR"),
    "import-xt": ("gigaxt.cli.import_xt", "make a model folder of a published xT checkpoint"),
}
"""Verb -> its module and what it is for."""

USAGE = """usage: gigaxt <verb> [arguments]     gigaxt <verb> --help

{verbs}

Own data in two commands:
  gigaxt check data.csv --write run.yaml      # columns image and label, mask, boxes or points
  gigaxt train --config run.yaml --out runs/first

--debug after any verb shows the traceback of an error; --version the version."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb.

    Args:
        argv: arguments without the program's name; None: those of this process.

    Returns:
        0; 2 for the user's mistakes, 1 for failures while running, 128 + n where signal n ended it.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in args
    args = [arg for arg in args if arg != "--debug"]
    try:
        return dispatch(args)
    except KeyboardInterrupt:
        if debug:
            raise
        return fail("interrupted", 130)
    except BrokenPipeError:  # the reader of a pipe, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except GigaxtError as error:
        if debug:
            raise
        return fail(f"error: {error}", error.exit_status)
    except Exception as error:
        if debug:
            raise
        return fail(f"error: {type(error).__name__}: {error}; run again with --debug for the traceback", 1)


def dispatch(args: Sequence[str]) -> int:
    """The verb's own exit status.

    Raises:
        ConfigError: there is no such verb.
    """
    if not args or args[0] in ("-h", "--help", "help"):
        width = max(map(len, VERBS))
        print(USAGE.format(verbs="\n".join(f"  {verb:<{width}}  {text}" for verb, (_, text) in VERBS.items())))
        return 0
    if args[0] in ("-V", "--version", "version"):
        from importlib.metadata import version

        print(f"gigaxt {version('gigaxt')}")
        return 0
    if args[0] not in VERBS:
        raise ConfigError(f"there is no verb `{args[0]}`{nearest(args[0], VERBS)}")
    keep_freed_memory()
    module = importlib.import_module(VERBS[args[0]][0])
    status: int = module.main(list(args[1:]))
    return status


def fail(text: str, status: int) -> int:
    """Print one line to standard error; returns `status`."""
    print(" ".join(text.split()), file=sys.stderr)
    return status
