"""The page of a report: tables and pictures, as Markdown, as one HTML file that needs nothing else, and on a screen.

An estimate is a dict of mean, half_width (None: no interval) and, if known, ci95 and the paper's number, `paper`.
Pictures need matplotlib; without it a page has tables alone, and says so.
"""
import base64
import html
import importlib.util
import io
import math
import re
import textwrap
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from infra.run import write_text

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000",
          "#7F7F7F")  # Okabe and Ito's, which colour-blind readers can tell apart, and grey
MARKERS = "osD^vPX<>"  # one more than colours, so that no two lines share both
STYLE = """body { font: 15px/1.5 system-ui, sans-serif; max-width: 75em; margin: 2em auto }
table { border-collapse: collapse; font-size: 13px } tr { border-bottom: 1px solid #ddd }
td, th { padding: .2em .6em; text-align: right } :is(td, th):first-child { text-align: left }
img { max-width: 100%; display: block; margin: 1em 0 } div { overflow-x: auto }"""


@dataclass(frozen=True)
class Table:
    """Cells are text already, so that Markdown, HTML and the screen show the same."""
    title: str
    note: str
    header: list[str]
    rows: list[list[str]]


@dataclass(frozen=True)
class Picture:
    """panels: title -> label -> points (x, y, low, high); a line of one point whose x is None is drawn across."""
    file: str
    panels: dict[str, dict[str, list[tuple]]]
    y_label: str
    x_label: str
    share: bool = False  # y is in [0, 1]
    log: bool = False


def make_table(layout: list[str], head: list[str], rows: list[tuple[list[str], dict]]) -> Table:
    """Make a table of records, each after its cells under `head`.

    layout: title, note, and columns "PATTERN:FORMAT PATTERN:FORMAT ..." of keys that any record has. A record without
    the first of them is left out.
    """
    title, note, columns = layout
    patterns = [column.rsplit(":", 1) for column in columns.split()]
    rows = [(names, record) for names, record in rows if any(re.fullmatch(patterns[0][0], key) for key in record)]
    keys = dict.fromkeys(key for _, record in rows for key in record)
    used = [(key, spec) for pattern, spec in patterns for key in keys if re.fullmatch(pattern, key)]
    named = [key.removeprefix("train_").replace("ci95", "95% interval").replace("_", " ") for key, _ in used]
    return Table(title, note, [*head, *named], [
        [*names, *(text_of(record.get(key), spec) for key, spec in used)] for names, record in rows])


def text_of(value, spec: str) -> str:
    """Write a text, an interval, a number, or an estimate with its interval and the paper's number in brackets."""
    if value is None or isinstance(value, str):
        return value or ""
    if isinstance(value, (list, tuple)):
        return " to ".join(format(end, spec) for end in value)
    if not isinstance(value, dict):
        return format(value, spec)
    text = format(value["mean"], spec)
    if value["half_width"] is not None:
        text += f" ± {value['half_width']:{spec.lstrip('+')}}"
    elif "ci95" in value:
        text += f" ({text_of(value['ci95'], spec)})"
    return text + (f" [{value['paper']:{spec}}]" if "paper" in value else "")


def markdown(table: Table) -> str:
    lines = [table.header, ["---"] + ["---:"] * (len(table.header) - 1), *table.rows]
    return f"## {table.title}\n\n{table.note}\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines)


def html_section(table: Table) -> str:
    lines = ["".join(f"<td>{html.escape(cell)}</td>" for cell in line) for line in table.rows]
    header = "".join(f"<th>{html.escape(cell)}</th>" for cell in table.header)
    return (f"<h2>{html.escape(table.title)}</h2><p>{html.escape(table.note)}</p><div><table>\n<tr>"
            + "</tr>\n<tr>".join([header, *lines]) + "</tr></table></div>")


def plain(table: Table) -> str:
    """Align the columns for a terminal: the first to the left, the others to the right."""
    lines = [table.header, *table.rows]
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join([f"{table.title}: {table.note}", *(
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in lines)])


def point(x, value: dict | float) -> tuple:
    """A point of a number, or of an estimate with its interval."""
    if not isinstance(value, dict):
        return (x, value, value, value)
    half = value["half_width"] or 0.0
    return (x, value["mean"], *value.get("ci95", (value["mean"] - half, value["mean"] + half)))


def render(picture: Picture) -> bytes:
    """Draw a PNG of panels side by side; b"" without points, or without matplotlib."""
    panels = {title: lines for title, lines in picture.panels.items() if any(lines.values())}
    if not panels or importlib.util.find_spec("matplotlib") is None:
        return b""
    from matplotlib.figure import Figure
    columns = 2 if len(panels) == 4 else min(len(panels), 3)
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(max(6.4, 4.2 * columns), 1 + 3.3 * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, sharey=True, squeeze=False).flat)
    legend = {}
    for axis, (title, lines) in zip(axes, panels.items()):
        draw(axis, lines, picture)
        axis.set_title(textwrap.fill(title, 50), fontsize=10)
        legend |= {textwrap.fill(text, 60): line for line, text in zip(*axis.get_legend_handles_labels())}
    for axis in axes[len(panels):]:
        axis.remove()
    figure.supylabel(picture.y_label, fontsize=10)
    width = 0.6 + 0.08 * max(map(len, legend))  # inches of an entry
    figure.legend(legend.values(), legend, loc="outside lower center", frameon=False,
                  ncols=max(1, int(figure.get_figwidth() / width)))
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()


def draw(axis, lines: dict[str, list[tuple]], picture: Picture) -> None:
    """Draw a line per label; where points are few with error bars, moved sideways to be seen, and else with a band."""
    # Student's intervals know no bounds, and shares do
    floor, ceiling = (0.0, 1.0) if picture.share else (-math.inf, math.inf)
    xs = sorted({x for points in lines.values() for x, *_ in points if x is not None})
    gap = min((b - a for a, b in pairwise(xs)), default=1)
    for i, (label, points) in enumerate(lines.items()):
        if not points:  # a cell that is missing keeps its colour in the other panels
            continue
        x, y, low, high = zip(*points)
        low, high = [max(value, floor) for value in low], [min(value, ceiling) for value in high]
        style = {"color": COLORS[i % len(COLORS)], "label": label}
        band = {"color": style["color"], "alpha": 0.12, "linewidth": 0}
        if x == (None,):
            axis.axhline(y[0], linestyle="--", **style)
            axis.axhspan(low[0], high[0], **band)
        elif len(xs) > 12:
            axis.plot(x, y, linewidth=1.5, **style)
            axis.fill_between(x, low, high, **band)
        else:
            crowded = not picture.log and any(a < b for a, b in zip(low, high))
            shift = 0.05 * gap * (i - (len(lines) - 1) / 2) if crowded else 0
            bars = [[max(0.0, b - a) for a, b in zip(low, y)], [max(0.0, b - a) for a, b in zip(y, high)]]
            axis.errorbar([value + shift for value in x], y, bars, marker=MARKERS[i % len(MARKERS)], markersize=4.5,
                          linewidth=1.5, capsize=2, **style)
    if picture.log:
        axis.set_xscale("log")
        axis.minorticks_off()
    if 0 < len(xs) <= 12:
        axis.set_xticks(xs, [f"{x:g}" for x in xs])
    axis.set_xlabel(picture.x_label)
    axis.yaxis.set_major_formatter("{x:.0%}" if picture.share else "{x:g}")
    axis.grid(alpha=0.3)


def publish(out: Path, name: str, facts: list[str], tables: list[Table], pictures: list[Picture],
            screen: list[str]) -> None:
    """Write NAME.md, NAME.html (pictures inside) and the pictures. Print last, since a reader may leave (`| head`)."""
    tables = [table for table in tables if table.rows]
    pngs = {picture.file: png for picture in pictures if (png := render(picture))}
    out.mkdir(parents=True, exist_ok=True)
    for file, png in pngs.items():
        (out / f"{file}.tmp").write_bytes(png)
        (out / f"{file}.tmp").replace(out / file)
    write_text(out / f"{name}.md", "\n\n".join(
        [*facts, *(f"![{file}]({file})" for file in pngs), *map(markdown, tables)]) + "\n")
    images = [f'<img alt="{file}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'
              for file, png in pngs.items()]
    write_text(out / f"{name}.html", "\n".join([
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{name}</title><style>{STYLE}</style>',
        *(f"<p>{html.escape(fact)}</p>" for fact in facts), *images, *map(html_section, tables), "</html>\n"]))
    print("\n\n".join([*screen, "\n".join(facts)]).strip(), end="\n\n")
    if not pngs:
        print("no pictures: `pip install matplotlib`, then run the same command again")
    print(f"written to {out}: " + ", ".join([f"{name}.html", f"{name}.md", *pngs]))
