"""`gigaxt train`: train a model on the images of a CSV, or continue a stopped run."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gigaxt.cli.flags import parse
from gigaxt.errors import ConfigError

if TYPE_CHECKING:
    from gigaxt.training.config import RunConfig

DESCRIPTION = """gigaxt train data.csv                                   settings follow from the data
gigaxt train --config run.yaml --out runs/a             settings from a file (gigaxt check data.csv --write run.yaml)
gigaxt train --config run.yaml --train.lr 1e-3          flags win over the file, and the file over its `base: FILE`
gigaxt train data.csv --train.init runs/a/model         go on from a model's weights and settings
gigaxt train data.csv --folds 5 --out runs/cv           five runs, fold-1 to fold-5, each scored on its own fifth
gigaxt train data.csv --cache /scratch/images           local copies of what is read from slow storage (data.cache)

--out FOLDER holds the run: checkpoints, model/, metrics.csv, report.html (default: runs/<name of the CSV or YAML>).
The same command continues a run that was stopped. SIGTERM, SIGUSR1 and Ctrl-C save first. --debug shows tracebacks."""


def main(args: Sequence[str]) -> int:
    """Train; exit status 0, or 128 + n where signal n stopped the run (the same command continues it)."""
    from gigaxt.training import train

    args, folds = take_folds(args)
    rest, csv, config_path, out = split_arguments(args)
    folder = Path(out) if out is not None else Path("runs") / Path(csv or config_path or "").stem
    config = run_config_from(rest, csv, config_path, folder)
    if folds is not None:
        return run_folds(config, folder, folds)
    result = train(config, folder)
    if result.signal is not None:
        return 128 + int(result.signal)
    print(f"report: {folder / 'report.html'}")
    return 0


def run_folds(config: RunConfig, out: Path, folds: int) -> int:
    """Train a model a fold and print the summary; exit status as of `main`."""
    from gigaxt.cli.tables import print_folds
    from gigaxt.training.folds import train_folds

    result = train_folds(config, out, folds)
    if result.signal is not None:
        return 128 + int(result.signal)
    print_folds(result.spreads, f"{out}: each model's best epoch on its own fold, which is a little too kind to it")
    print(f"summary: {out / 'summary.csv'}; all folds together: gigaxt eval {out} {config.data.csv} --folds")
    return 0


def take_folds(args: Sequence[str]) -> tuple[list[str], int | None]:
    """The arguments without `--folds N`, which is no setting of one run, and N.

    Raises:
        ConfigError: no number follows.
    """
    for i, arg in enumerate(args):
        name, equals, number = arg.partition("=")
        if name == "--folds":
            number = number if equals else "".join(args[i + 1 : i + 2])
            if not number.isdigit():
                raise ConfigError(f"--folds: expected a number after it, such as 5, got {number or 'nothing'}")
            return [*args[:i], *args[i + (1 if equals else 2) :]], int(number)
    return list(args), None


def split_arguments(args: Sequence[str]) -> tuple[list[str], str | None, str | None, str | None]:
    """The flags for tyro, and the CSV, `--config` and `--out`, which must be known before there are defaults.

    Raises:
        ConfigError: a flag without its value, or two CSVs.
    """
    rest: list[str] = []
    found: dict[str, str] = {}
    args = [re.sub(r"^--cache(?=$|=|[-_]gib)", "--data.cache", arg) for arg in args]  # as of the other verbs
    waiting = ""
    for arg in args:
        name, equals, value = arg.partition("=")
        if waiting:
            found[waiting], waiting = arg, ""
        elif name in ("--config", "--out"):
            waiting = "" if equals else name
            found[name] = value
        elif arg.endswith(".csv") and not arg.startswith("-") and not (rest and _wants_value(rest[-1])):
            if "csv" in found:
                raise ConfigError(f"expected one CSV, got {found['csv']} and {arg}")
            found["csv"] = arg
        else:
            rest.append(arg)
    if waiting:
        raise ConfigError(f"{waiting}: expected a path after it")
    return rest, found.get("csv"), found.get("--config"), found.get("--out")


def run_config_from(flags: Sequence[str], csv: str | None, config_path: str | None, out: Path) -> RunConfig:
    """A run's settings: those of the YAML file or what follows from the CSV, then the CSV, then the flags.

    Without a YAML file, a run that exists goes on with its own, so that the images need not be looked through again.
    """
    from gigaxt.config import to_dict
    from gigaxt.training.config import RunConfig, named_files, read_yaml, run_config
    from gigaxt.training.defaults import EXAMPLE, config_for, with_classes_of

    init = _value_of("--train.init", flags)  # decides what the other flags' defaults are
    if {"-h", "--help"} & set(flags) and csv is None and config_path is None:
        data: dict[str, Any] = EXAMPLE
    elif config_path is not None:
        data = read_yaml(Path(config_path))
    elif csv is not None and (out / "config.yaml").exists():
        data = read_yaml(out / "config.yaml")
    elif csv is not None:
        data = config_for(csv) if init is None else {}
    else:
        raise ConfigError("expected a CSV or a config: gigaxt train data.csv, or gigaxt train --config run.yaml")
    if csv is not None:
        data["data"] = {**(data.get("data") or {}), "csv": csv}
    if init is not None:
        data["train"] = {**(data.get("train") or {}), "init": init}
    try:
        given = run_config(data)
    except ConfigError as error:
        if config_path is None:
            raise
        raise ConfigError(f"{named_files(Path(config_path))}: {error}") from error
    if init is not None and "head" not in (data.get("model") or {}):  # that of another task, maybe
        given.model.head = with_classes_of(given.data.csv, given.model.head)
    filled = parse(RunConfig, flags, verb="train", description=DESCRIPTION, default=given)
    return run_config(to_dict(filled))


def _value_of(name: str, flags: Sequence[str]) -> str | None:
    for i, flag in enumerate(flags):
        if flag.startswith(f"{name}="):
            return flag.partition("=")[2]
        if flag == name and i + 1 < len(flags):
            return flags[i + 1]
    return None


def _wants_value(arg: str) -> bool:
    return arg.startswith("--") and "=" not in arg
