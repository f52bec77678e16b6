"""The page of a report: tables, pictures and texts, written once as Markdown, of which NAME.html is the rendering.

An estimate is a dict of mean, ci95 ([low, high], or None), half_width (None where that is not mean ± half) and perhaps
the paper's number, `paper`.
"""
import base64
import html
import importlib.util
import io
import math
import re
from collections.abc import Collection
from itertools import pairwise
from pathlib import Path

from infra.progress import printable
from infra.run import write_text

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000",
          "#7F7F7F")  # Okabe and Ito's, which colour-blind readers can tell apart, and grey
MARKERS = "osD^vPX<>"  # one more than colours, so that no two lines share both
HEAD = """<!doctype html><html lang="en"><meta charset="utf-8"><title>{}</title>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<style>body {{ font-family: sans-serif; margin: 2em }} td, th {{ padding: .2em .6em }} img {{ max-width: 100% }}</style>
"""  # the policy: whatever a page holds, no script of it runs and nothing is fetched


def make_table(layout: list[str], head: list[str], rows: list[tuple[list[str], dict]]) -> str:
    """Make a table of records, each after its cells under `head`, with columns aligned for a terminal, too.

    layout: title, note, and columns "PATTERN:FORMAT PATTERN:FORMAT ..." of keys that any record has. A record without
    any of them is left out, and a table without records is empty. One of more than 8 columns is continued below itself.
    """
    title, note, columns = layout
    keys = dict.fromkeys(key for _, record in rows for key in record)
    used = {key: spec for pattern, spec in (column.rsplit(":", 1) for column in columns.split())
            for key in keys if re.fullmatch(pattern, key)}
    parts, width = [], 8 - len(head)
    for some in ([*used][i:i + width] for i in range(0, len(used), width)):
        lines = [[*map(plain, names), *(text_of(record.get(key), used[key]) for key in some)]
                 for names, record in rows if record.keys() & some]
        lines.insert(0, [*head, *(plain(key.removeprefix("train_").replace("_", " ")) for key in some)])
        widths = [max(3, *map(len, column)) for column in zip(*lines)]
        lines = [[line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])] for line in lines]
        lines.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
        parts.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
    return "\n\n".join([f"## {title}", note, *parts]) if parts else ""


def text_of(value, spec: str) -> str:
    """Write a text, a number, or an estimate with its interval and the paper's number in brackets."""
    if not isinstance(value, dict):
        return plain(value or "") if value is None or isinstance(value, str) else format(value, spec)
    text = format(value["mean"], spec)
    if value["half_width"] is not None:
        text += f" ± {value['half_width']:{spec.lstrip('+')}}"
    elif value["ci95"]:
        text += " ({:{spec}} to {:{spec}})".format(*value["ci95"], spec=spec)
    return text + (f" [{value['paper']:{spec}}]" if "paper" in value else "")


def plain(text: str) -> str:
    """Show a name, a path or a command in a line of Markdown: nothing in it is markup, nor another line or cell."""
    markup = r"([\\`*\[\]|#]|(?<![a-zA-Z0-9])_|_(?![a-zA-Z0-9]))"  # inside a word _ is none
    return re.sub(markup, r"\\\1", html.escape(" ".join(text.split()), quote=False))


def fenced(text: str) -> str:
    """Show a model's text as text: nothing in it is Markdown or HTML, for the fence is longer than any inside."""
    fence = "`" * max([3, *(len(run) + 1 for run in re.findall("`+", text))])
    return f"{fence}\n{text}\n{fence}"


def to_html(text: str, name: str, pngs: dict[str, bytes]) -> str:
    """Render Markdown as one file that needs nothing else; HTML inside it is shown as text. What follows a heading of
    the fourth level, a question, is folded up under it."""
    import markdown
    renderer = markdown.Markdown(extensions=["tables", "fenced_code"])
    renderer.preprocessors.deregister("html_block")
    renderer.inlinePatterns.deregister("html")
    page = re.sub(r"<h4>(.*?)</h4>(.*?)(?=<h\d>|\Z)", r"<details><summary>\1</summary>\2</details>\n",
                  renderer.convert(text), flags=re.DOTALL)
    for file, png in pngs.items():
        page = page.replace(f'src="{file}"', f'src="data:image/png;base64,{base64.b64encode(png).decode()}"')
    return f"{HEAD.format(name)}{page}\n</html>\n"


def point(x, value: dict | float) -> tuple:
    """A point of a number, or of an estimate with its interval and the value of each seed."""
    if not isinstance(value, dict):
        return (x, value, value, value, [])
    seeds = [*value["values"].values()]
    return (x, value["mean"], *(value["ci95"] or [value["mean"]] * 2), seeds if len(seeds) > 1 else [])


def render(panels: dict[str, dict[str, list[tuple]]], y_label: str, x_label: str, order: Collection[str] = (),
           y_scale: str = "", x_scale: str = "linear"):
    """Draw panels side by side, title -> label -> points (x, y, low, high, values of seeds); None without points, or
    without matplotlib.

    order: labels, each with the same style in all pictures; others come after them. Scales: linear; symlog, which
    shows 0, too; share for a y in [0, 1]; free for panels that do not share y.
    """
    panels = {literal(title): {literal(label): points for label, points in lines.items()}
              for title, lines in panels.items()}
    labels = list(dict.fromkeys([*map(literal, order), *(label for lines in panels.values() for label in lines)]))
    panels = {title: lines for title, lines in panels.items() if any(lines.values())}
    if not panels or "matplotlib" in absent():
        return None
    from matplotlib.figure import Figure
    columns = min(len(panels), 3)
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(max(6.4, 4.2 * columns), 1 + 3.3 * rows), layout="constrained")
    legend: dict[str, object] = {}
    for i, (title, lines) in enumerate(panels.items()):
        axis = figure.add_subplot(rows, columns, i + 1, sharey=figure.axes[0] if i and y_scale != "free" else None)
        axis.set(title=title, xlabel=x_label)
        legend |= draw(axis, lines, labels, y_scale, x_scale)
    figure.supylabel(y_label, fontsize=10)
    figure.legend(legend.values(), legend, loc="outside lower center", frameon=False,
                  ncols=max(1, int(12 * figure.get_figwidth() / (8 + max(map(len, legend))))))  # 12 letters an inch
    return figure


def draw(axis, lines: dict[str, list[tuple]], labels: list[str], y_scale: str, x_scale: str) -> dict[str, object]:
    """Draw a line per label, in the style of its place in `labels`, moved sideways to be seen, with some dozen markers
    and error bars, and small dots for the seeds; return the lines."""
    import numpy
    from matplotlib.ticker import PercentFormatter
    axis.set_xscale(x_scale)
    if y_scale == "symlog":
        axis.set_yscale("symlog", linthresh=0.01)
    xs, drawn = sorted({x for points in lines.values() for x, *_ in points}), {}
    gap = 0 if x_scale != "linear" else min((b - a for a, b in pairwise(xs)), default=0)
    for label, points in lines.items():
        if not points:
            continue
        i, every = labels.index(label), max(1, len(points) // 12)
        x, y, low, high = numpy.array([point[:4] for point in points], dtype=float).T
        if y_scale == "share":
            low, high = low.clip(0, 1), high.clip(0, 1)
        shift = min(0.05, 0.3 / len(lines)) * gap * (list(lines).index(label) - (len(lines) - 1) / 2)
        color = COLORS[i % len(COLORS)]
        bars = [numpy.where(end > 0, end, numpy.nan) for end in (y - low, high - y)]
        drawn[label] = axis.errorbar(
            x + shift, y, bars, errorevery=every, markevery=every, capsize=2, elinewidth=1, color=color,
            marker=MARKERS[i % len(MARKERS)], linestyle="-" if i < len(COLORS) else "--", linewidth=1.5, markersize=4.5)
        dots = [(x + shift + 0.025 * gap, value) for x, *_, values in points[::every] for value in values]
        axis.plot(*numpy.array(dots).reshape(-1, 2).T, ".", color=color, markersize=4, alpha=0.7)
    if len(xs) <= 12 and max(xs) < 10**6:
        room = (xs[-1] - xs[0]) / 20 if x_scale == "linear" else 0
        ticks = xs[:1]
        for x in xs:
            if x - ticks[-1] > room:  # else the numbers would overlap
                ticks.append(x)
        axis.set_xticks(ticks, [f"{x:g}" for x in ticks])
        axis.minorticks_off()
    if y_scale == "symlog":
        axis.set_ylim(bottom=min(0, axis.dataLim.ymin))
    axis.yaxis.set_major_formatter(PercentFormatter(1) if y_scale == "share" else "{x:g}")
    axis.grid(alpha=0.3)
    return drawn


def literal(label: str) -> str:
    """A label as matplotlib shows it: $ would begin a formula, and a line whose name begins with _ is left out."""
    return re.sub("^_", " _", label.replace("$", r"\$"))


def absent() -> list[str]:
    """List the packages that are optional and not installed."""
    return [package for package in ("matplotlib", "markdown") if importlib.util.find_spec(package) is None]


def publish(out: Path, name: str, heading: str, facts: list[str], figures: dict, sections: list[str],
            screen: list[str]) -> None:
    """Write NAME.md, NAME.html (pictures inside) and each picture as PNG and SVG. Print last, since a reader may leave
    (`| head`).

    facts: sentences, each a paragraph. The screen shows what it is given and then the facts.
    """
    out.mkdir(parents=True, exist_ok=True)
    files = {f"{stem}.{kind}": picture(figure, kind) for stem, figure in figures.items() if figure
             for kind in ("png", "svg")}
    for file, content in files.items():
        (out / f"{file}.tmp").write_bytes(content)
        (out / f"{file}.tmp").replace(out / file)
    facts, pngs = [plain(fact) for fact in facts], {file: content for file, content in files.items() if "png" in file}
    text = "\n\n".join([f"# {plain(heading)}", *facts, *(f"![{file}]({file})" for file in pngs),
                        *filter(None, sections)])
    text = printable(text) + "\n"
    write_text(out / f"{name}.md", text)
    written = [f"{name}.md", *files]
    if "markdown" not in absent():
        written.append(f"{name}.html")
        write_text(out / f"{name}.html", to_html(text, name, pngs))
    print(printable("\n\n".join([*filter(None, screen), *facts])), end="\n\n")
    if absent():
        print(f"pictures need matplotlib, {name}.html needs markdown: `pip install {' '.join(absent())}`, then run the "
              "same command again")
    print(f"written to {out}: " + ", ".join(written))


def picture(figure, kind: str) -> bytes:
    """Save a figure as png or svg; the same figure gives the same bytes."""
    import matplotlib
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "picture"}):
        figure.savefig(buffer, format=kind, dpi=130, metadata={"Date": None} if kind == "svg" else None)
    return buffer.getvalue()
