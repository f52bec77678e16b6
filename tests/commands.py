"""Commands in documents, docstrings and the Makefile: found, and checked without being run."""
import argparse
import contextlib
import io
import os
import re
import runpy
import shlex
import subprocess
from pathlib import Path

import pytest

import infra.config
import infra.run
import irpo
import tools.report  # noqa: F401  imports all methods, before `command_faults` patches what they import

ROOT = Path(__file__).resolve().parent.parent
OTHERS = ("pytest", "ruff", "venv", "pip")  # programs that are not ours


def command_lines(text: str) -> list[str]:
    """List the lines that are commands, continuations joined, without `$ ` and environment settings."""
    found = (re.match(r"\s*(?:\$ )?(?:\w+=\S+ )*((?:python3?|make|\S*/python|torchrun) .*|make$)", line)
             for line in text.replace("\\\n", " ").splitlines())
    return [match.group(1) for match in found if match]


def shown_commands(markdown: str) -> list[str]:
    """List the commands of fenced blocks and of `code` in a line."""
    blocks = re.findall(r"^```[^\n]*\n(.*?)^```", markdown, re.MULTILINE | re.DOTALL)
    return [command for code in [*blocks, *code_spans(markdown)] for command in command_lines(code)]


def named_blocks(markdown: str) -> dict[str, str]:
    """Find the files that a page shows: **name**: and a fenced block."""
    return dict(re.findall(r"\*\*([\w.]+)\*\*:\n\n```\w*\n(.*?)^```", markdown, re.MULTILINE | re.DOTALL))


def code_spans(markdown: str) -> list[str]:
    prose = re.sub(r"^```.*?^```", "", markdown, flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"`([^`\n]+)`", prose)


class Parsed(Exception):
    """Raised in place of a script's work, once its command line has been understood."""


def script_fault(module: str, arguments: list[str]) -> str:
    """Say why a script would refuse these arguments; `...` stands for flags that were given before."""
    if "..." in arguments:
        arguments = ["--model", "DIR", *(argument for argument in arguments if argument != "...")]
    arguments = ["." if a.startswith("runs/") or a == "DIR" else a for a in arguments]  # made by commands before

    parse_args, parse_config = argparse.ArgumentParser.parse_args, infra.config.parse_config

    def stop_after_arguments(*args):
        parse_args(*args)
        raise Parsed

    def stop_after_config(*args):
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
        parse_config(*args)
        raise Parsed

    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(said):
        patch.setattr("sys.argv", [module, *arguments])
        patch.setattr(argparse.ArgumentParser, "parse_args", stop_after_arguments)
        for place in (infra.config, irpo):  # results/pairs.py calls irpo.main, and replaces two names
            patch.setattr(place, "parse_config", stop_after_config)
        for name in ("Config", "preference_pairs"):
            patch.setattr(irpo, name, getattr(irpo, name))
        patch.setattr(infra.run, "run_script", lambda main: main())
        try:
            runpy.run_module(module, run_name="__main__")
        except Parsed:
            return ""
        except (SystemExit, infra.InputError, ImportError) as stop:
            asked = getattr(stop, "code", 1) == 0  # --help
            return "" if asked else f"{module}: {said.getvalue() or stop}"
    return f"{module} did not read its command line"


def dry_run(arguments: list[str]) -> subprocess.CompletedProcess:
    """`make -n`, without the MAKEFLAGS of the `make test` that runs this."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))}
    return subprocess.run(["make", "-n", *arguments], cwd=ROOT, text=True, capture_output=True, env=environment)


def make_faults(arguments: list[str]) -> list[str]:
    """List what `make -n` refuses, variables that the Makefile does not use, and faults of its recipes."""
    names = {argument.split("=")[0] for argument in arguments if "=" in argument}
    faults = [f"the Makefile does not use {name}" for name in sorted(names)
              if not re.search(rf"\$\([^)]*\b{name}\b", (ROOT / "Makefile").read_text())]
    dry = dry_run(arguments)
    if dry.returncode:
        return [*faults, dry.stderr.strip()]
    recipes = {command for command in command_lines(dry.stdout) if not command.startswith("make")}
    return faults + [fault for command in sorted(recipes) for fault in command_faults(command)]


def command_faults(command: str) -> list[str]:
    """Say why a command would not run as it is written."""
    words = shlex.split(command, comments=True)
    ends = [i for i, word in enumerate(words) if word in ("&&", "|", ";", ">", "&")]
    words = words[:ends[0]] if ends else words
    if words[0] == "make":
        return make_faults(words[1:])
    while words and words[0] != "-m" and not words[0].endswith(".py"):
        words = words[1:]  # python or torchrun, and its own options
    if not words:
        return []
    module, *arguments = words[1:] if words[0] == "-m" else [words[0][:-3].replace("/", "."), *words[1:]]
    if module.split(".")[0] in OTHERS:
        return []
    return [fault for fault in [script_fault(module, arguments)] if fault]
