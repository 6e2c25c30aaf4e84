"""`gigaxt train`: train a model on the images of a CSV, or continue a stopped run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gigaxt.cli.flags import parse
from gigaxt.errors import ConfigError

if TYPE_CHECKING:
    from gigaxt.training.config import RunConfig

DESCRIPTION = """gigaxt train data.csv                                   settings follow from the data
gigaxt train --config run.yaml --out runs/a             settings from a file (gigaxt check data.csv --write run.yaml)
gigaxt train --config run.yaml --train.lr 1e-3          flags win over the file

--out FOLDER holds the run: checkpoints, model/, metrics.csv, report.html (default: runs/<name of the CSV or YAML>).
The same command continues a run that was stopped. SIGTERM, SIGUSR1 and Ctrl-C save first. --debug shows tracebacks."""


def main(args: Sequence[str]) -> int:
    """Train; exit status 0, or 128 + n where signal n stopped the run (the same command continues it)."""
    from gigaxt.training import train

    rest, csv, config_path, out = split_arguments(args)
    folder = Path(out) if out is not None else Path("runs") / Path(csv or config_path or "").stem
    config = run_config_from(rest, csv, config_path, folder)
    result = train(config, folder)
    if result.signal is not None:
        return 128 + int(result.signal)
    print(f"report: {folder / 'report.html'}")
    return 0


def split_arguments(args: Sequence[str]) -> tuple[list[str], str | None, str | None, str | None]:
    """The flags for tyro, and the CSV, `--config` and `--out`, which must be known before there are defaults.

    Raises:
        ConfigError: a flag without its value, or two CSVs.
    """
    rest: list[str] = []
    found: dict[str, str] = {}
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
    from gigaxt.training.config import RunConfig, read_yaml, run_config
    from gigaxt.training.defaults import EXAMPLE, config_for

    if {"-h", "--help"} & set(flags) and csv is None and config_path is None:
        data: dict[str, Any] = EXAMPLE
    elif config_path is not None:
        data = read_yaml(Path(config_path))
    elif csv is not None:
        data = read_yaml(out / "config.yaml") if (out / "config.yaml").exists() else config_for(csv)
    else:
        raise ConfigError("expected a CSV or a config: gigaxt train data.csv, or gigaxt train --config run.yaml")
    if csv is not None:
        data["data"] = {**(data.get("data") or {}), "csv": csv}
    filled = parse(RunConfig, flags, verb="train", description=DESCRIPTION, default=run_config(data))
    return run_config(to_dict(filled))


def _wants_value(arg: str) -> bool:
    return arg.startswith("--") and "=" not in arg
