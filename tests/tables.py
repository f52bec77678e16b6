"""Calling a report script, and reading its tables."""
import json
import re
import sys
from pathlib import Path
from types import ModuleType
from unittest import mock


def report(script: ModuleType, root: Path, out: Path) -> tuple[str, dict]:
    """The Markdown and the JSON that report_NAME.py writes of runs."""
    name = script.__name__.removeprefix("tools.").removeprefix("report_")
    with mock.patch.object(sys, "argv", [script.__file__, str(root), "--out", str(out)]):
        script.main()
    return (out / f"{name}.md").read_text(), json.loads((out / f"{name}.json").read_text())


def line(text: str, name: str) -> list[str]:
    """The cells of a table's line, after the first, which is its name."""
    return [cell.strip() for cell in re.search(rf"^\| {re.escape(name)} \|(.*) \|$", text, re.M)[1].split("|")]
