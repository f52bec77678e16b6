"""One frozen dataclass per script, and the command line made from it.

The name of a field is its flag, its key in config.json and its column in the report. Flags override --preset,
which overrides the defaults. There are no config files.
"""
import argparse
import dataclasses
import difflib
import math
import numbers
import sys
import typing
from pathlib import Path

from infra import parallel


def option(default, help: str, choices: typing.Iterable = (), low: float = -math.inf, above: float = -math.inf,
           high: float = math.inf, required: bool = False, free: bool = False, group: str = ""):
    """Declare a field: its default, its help sentence and the values it may have.

    low and high are allowed values, `above` is not. free: the value may change when a run is resumed. group: heading in
    --help of this field and of those below it in its class.
    """
    return dataclasses.field(default=default, metadata=dict(
        help=help, choices=tuple(choices), low=low, above=above, high=high, required=required, free=free, group=group))


@dataclasses.dataclass(frozen=True)
class Options:
    """Base of all configs: refuses values that its fields do not allow."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(field.default, numbers.Real) and not isinstance(value, numbers.Real):
                raise ValueError(f"--{field.name} {value!r}: must be a number")
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


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, from rank 0, without the usage."""

    def error(self, message: str) -> typing.NoReturn:
        self.exit(2, "" if parallel.rank() else f"{self.prog}: error: {message}\n")


def parse_config(Config: type[Options], presets: dict[str, dict], doc: str, argv: list[str] | None = None):
    """Make a Config from the command line; `doc` is the text of --help."""
    first = Parser(add_help=False, allow_abbrev=False)
    if presets:
        first.add_argument("--preset", choices=presets, help="start from these values instead of the defaults")
    preset = vars(first.parse_known_args(argv)[0]).get("preset") or ""
    parser = Parser(description=doc, parents=[first], usage="%(prog)s [--FLAG VALUE ...]", allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    hints, values = typing.get_type_hints(Config), presets.get(preset, {})
    for heading, fields in groups_of(Config).items():
        group = parser.add_argument_group(heading) if heading else parser
        for field in fields:
            add_flag(group, field, hints[field.name], values.get(field.name, field.default))

    given, unknown = parser.parse_known_args(argv)
    if unknown:
        known = ["--preset", *(f"--{name}" for name in hints),
                 *(f"--no-{name}" for name, kind in hints.items() if kind is bool)]
        nearest = difflib.get_close_matches(unknown[0].partition("=")[0], known, 1)
        parser.error(f"there is no flag {unknown[0]}; {f'did you mean {nearest[0]}?' if nearest else 'see --help'}")
    flags = {name: tuple(value) if isinstance(value, list) else value
             for name, value in vars(given).items() if value is not None and name != "preset"}
    values = values | flags
    if "run_dir" in hints and not values.get("run_dir"):
        values["run_dir"] = default_run_dir(Config, {"": preset} | flags if preset not in ("", "toy") else flags)
    for field in dataclasses.fields(Config):
        if field.metadata["required"] and not values.get(field.name):
            parser.error(f"--{field.name} is missing: {field.metadata['help']}")
    try:
        return Config(**values).settled()
    except ValueError as error:
        parser.error(str(error))


def groups_of(Config: type[Options]) -> dict[str, list[dataclasses.Field]]:
    """Heading of --help -> its fields, those of Config's own class first, "engine" last."""
    left, groups = {field.name: field for field in dataclasses.fields(Config)}, {}
    for cls in Config.__mro__[:-1]:
        heading = ""
        for name in cls.__annotations__:  # of this class alone
            heading = cls.__dataclass_fields__[name].metadata["group"] or heading
            if name in left:
                groups.setdefault(heading, []).append(left.pop(name))
    groups["engine"] = groups.pop("engine", [])
    return groups


def add_flag(group, field: dataclasses.Field, kind, default) -> None:
    shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
    text = field.metadata["help"] + (f" (default: {shown})" if shown != "" else "")
    options = {"help": text.replace("%", "%%")}
    if typing.get_origin(kind) is tuple:
        kind, options["nargs"] = typing.get_args(kind)[0], "+"
    if kind is bool:
        options["action"] = argparse.BooleanOptionalAction
    else:
        choices = ",".join(filter(None, field.metadata["choices"]))
        options |= {"type": kind, "metavar": f"{{{choices}}}" if choices else kind.__name__.upper()}
    group.add_argument(f"--{field.name}", **options)


def default_run_dir(Config: type[Options], flags: dict) -> str:
    """Name a run by its script, its flags and its seed: runs/irpo-alpha0.0-s0."""
    unnamed = {"seed", "model", "path", *(f.name for f in dataclasses.fields(Config) if f.metadata["free"])}
    asked = [name + ("_".join(map(str, value)) if isinstance(value, tuple) else str(value))
             for name, value in flags.items() if name not in unnamed and "/" not in str(value)]
    script = Path(sys.argv[0]).stem
    if script in ("evaluate", "evaluation") and "model" in flags:
        asked.append("_".join(Path(flags["model"]).parts[-2:]))
    return "runs/" + "-".join([script, *asked, f"s{flags.get('seed', 0)}"])
