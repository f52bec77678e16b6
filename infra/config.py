"""One frozen dataclass per script, and the command line made from it.

The name of a field is its flag, its key in config.json and its column in the report. Defaults come first, then
--preset, then flags. There are no config files and no globals.
"""
import argparse
import dataclasses
import math
import sys
import typing
from pathlib import Path

from infra import parallel


def option(default, help: str, choices: typing.Iterable = (), low: float = -math.inf, above: float = -math.inf,
           high: float = math.inf, required: bool = False, free: bool = False):
    """Declare a field: its default, its help sentence and the values it may have.

    low and high are allowed values, `above` is not. free: the value may change when a run is resumed.
    """
    return dataclasses.field(default=default, metadata=dict(
        help=help, choices=tuple(choices), low=low, above=above, high=high, required=required, free=free))


@dataclasses.dataclass(frozen=True)
class Options:
    """Base of all configs: refuses values that its fields do not allow."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            for one in value if isinstance(value, tuple) else (value,):
                if fault := fault_of(one, field.metadata):
                    raise ValueError(f"--{field.name} {one}: {fault}")

    def settled(self) -> "Options":
        """Decide what depends on the machine (see infra/hardware.py)."""
        return self

    def own_files(self) -> dict[str, Path]:
        """Name the user's own files that results depend on, besides data and models."""
        return {}


def fault_of(value, rule: typing.Mapping) -> str:
    """Say what is wrong with a value, or nothing."""
    if rule["choices"] and value not in rule["choices"]:
        return f"choose from {', '.join(filter(None, rule['choices']))}"
    if not isinstance(value, (int, float)):
        return ""
    if isinstance(value, float) and not math.isfinite(value):  # an integer may be too large for a float
        return "must be finite"
    if value <= rule["above"]:
        return f"must be above {rule['above']:g}"
    if value < rule["low"]:
        return f"must be at least {rule['low']:g}"
    return f"must be at most {rule['high']:g}" if value > rule["high"] else ""


def parse_config(Config: type[Options], presets: dict[str, dict], doc: str, argv: list[str] | None = None):
    """Make a Config from the command line; `doc` is the text of --help."""
    parser = argparse.ArgumentParser(description=doc, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    if presets:
        parser.add_argument("--preset", choices=presets, help="start from these values instead of the defaults")
    hints = typing.get_type_hints(Config)
    for field in dataclasses.fields(Config):
        add_flag(parser, field, hints[field.name])
    if parallel.rank():  # rank 0 says what is wrong
        parser.error = lambda message: parser.exit(2)

    flags = {name: tuple(value) if isinstance(value, list) else value
             for name, value in vars(parser.parse_args(argv)).items() if value is not None}
    preset = flags.pop("preset", "")
    values = presets.get(preset, {}) | flags
    if "run_dir" in hints and not values.get("run_dir"):
        values["run_dir"] = default_run_dir(Config, {"": preset} | flags if preset not in ("", "toy") else flags)
    try:
        config = Config(**values).settled()
    except ValueError as error:
        parser.error(str(error))
    for field in dataclasses.fields(Config):
        if field.metadata["required"] and not getattr(config, field.name):
            parser.error(f"--{field.name} is missing: {field.metadata['help']}")
    return config


def add_flag(parser: argparse.ArgumentParser, field: dataclasses.Field, kind) -> None:
    shown = " ".join(map(str, field.default)) if isinstance(field.default, tuple) else field.default
    text = field.metadata["help"] + (f" (default: {shown})" if shown != "" else "")
    options = {"help": text.replace("%", "%%"), "default": None}
    if kind is bool:
        parser.add_argument(f"--{field.name}", action=argparse.BooleanOptionalAction, **options)
        parser.add_argument(f"--no_{field.name}", dest=field.name, action="store_false", default=None,
                            help=argparse.SUPPRESS)
    elif typing.get_origin(kind) is tuple:
        parser.add_argument(f"--{field.name}", type=typing.get_args(kind)[0], nargs="+", **options)
    else:
        parser.add_argument(f"--{field.name}", type=kind, **options)


def default_run_dir(Config: type[Options], flags: dict) -> str:
    """Name a run by its script, its flags and its seed: runs/irpo-alpha0.0-s0."""
    unnamed = {"seed", "model", "path", *(f.name for f in dataclasses.fields(Config) if f.metadata["free"])}
    asked = [name + ("_".join(map(str, value)) if isinstance(value, tuple) else str(value))
             for name, value in flags.items() if name not in unnamed and "/" not in str(value)]
    script = Path(sys.argv[0]).stem
    if script in ("evaluate", "evaluation") and "model" in flags:
        asked.append("_".join(Path(flags["model"]).parts[-2:]))
    return "runs/" + "-".join([script, *asked, f"s{flags.get('seed', 0)}"])
