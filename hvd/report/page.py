"""The parts of report.html: page, sections, tables, figures, videos. Everything is inside the one file."""

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass, field

import matplotlib

matplotlib.use("Agg")

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator

# One colour a meaning, the same in every figure.
POLICY, BASELINE, GREY = "#1f6feb", "#8b949e", "#c8ccd1"
LEVELS = ("#d9480f", "#2f9e44", "#7048e8", "#0c8599", "#c2255c", "#846358")
INK, GRID = "#1f2328", "#e5e8eb"

matplotlib.rcParams.update(
    {
        "font.family": "sans-serif",
        "axes.titlesize": 10,
        "axes.labelsize": 9,
        "xtick.labelsize": 8.5,
        "ytick.labelsize": 8.5,
        "legend.fontsize": 8,
        "legend.frameon": False,
        "svg.fonttype": "none",  # text stays text
        "svg.hashsalt": "hvd",  # the same figure, the same file
    }
)

# Nothing is fetched and no script runs, whatever a text in the page may hold
_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; img-src data:; media-src data:; base-uri 'none'; form-action 'none'"
)
_CSS = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; color: #1f2328; background: #fff;
       max-width: 1060px; margin: 0 auto; padding: 28px 24px 64px; }
h1 { font-size: 26px; margin: 0 0 4px; } h2 { font-size: 19px; margin: 40px 0 8px; border-bottom: 1px solid #d8dee4;
     padding-bottom: 4px; } h3 { font-size: 15px; margin: 22px 0 6px; }
p { margin: 6px 0 10px; max-width: 76ch; } .quiet { color: #656d76; } .big { font-size: 17px; }
table { border-collapse: collapse; margin: 10px 0 14px; font-variant-numeric: tabular-nums; }
th, td { padding: 4px 14px 4px 0; text-align: left; border-bottom: 1px solid #e5e8eb; vertical-align: top; }
th { font-weight: 600; border-bottom: 2px solid #d8dee4; } td.n, th.n { text-align: right; white-space: nowrap; }
tr.ours td { font-weight: 600; }
img { max-width: 100%; height: auto; display: block; margin: 6px 0 12px; }
.videos { display: flex; flex-wrap: wrap; gap: 14px; } .videos figure { margin: 0; width: 320px; }
video { width: 100%; background: #f6f8fa; border-radius: 4px; } figcaption { font-size: 13px; color: #656d76; }
.note { background: #fff8c5; border-left: 3px solid #d4a72c; padding: 8px 12px; margin: 10px 0; max-width: 76ch; }
.note ul { margin: 4px 0 4px 18px; padding: 0; }
details { margin: 8px 0; } summary { cursor: pointer; } pre { font-size: 12px; overflow-x: auto; background: #f6f8fa;
     padding: 10px 12px; border-radius: 4px; }
nav { margin: 10px 0 0; } nav a { color: #0969da; text-decoration: none; margin-right: 16px; }
"""


@dataclass
class Section:
    """A part of the page. `missing` says what should be here and is not, each entry one sentence."""

    title: str
    body: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    @property
    def anchor(self) -> str:
        return "".join(c if c.isalnum() else "-" for c in self.title.lower())

    def text(self, words: str, kind: str = "") -> None:
        """A paragraph of plain text (escaped here)."""
        self.body.append(f'<p class="{kind}">{html.escape(words)}</p>' if kind else f"<p>{html.escape(words)}</p>")

    def heading(self, words: str) -> None:
        self.body.append(f"<h3>{html.escape(words)}</h3>")

    def figure(self, figure: Figure, alt: str) -> None:
        self.body.append(f'<img alt="{html.escape(alt, quote=True)}" src="{_svg(figure)}">')

    def table(self, header: Sequence[str], rows: Sequence[Sequence[str]], ours: Sequence[int] = ()) -> None:
        """A table of text cells; columns after the first are numbers where every cell of them looks like one."""
        numbers = [i > 0 and all(_is_number(row[i]) for row in rows) for i in range(len(header))]
        kinds = [' class="n"' if number else "" for number in numbers]
        cells = [f"<th{kind}>{html.escape(name)}</th>" for kind, name in zip(kinds, header, strict=True)]
        lines = [f"<tr>{''.join(cells)}</tr>"]
        for index, row in enumerate(rows):
            cells = [f"<td{kind}>{html.escape(cell)}</td>" for kind, cell in zip(kinds, row, strict=True)]
            lines.append(f"<tr{' class=ours' if index in ours else ''}>{''.join(cells)}</tr>")
        self.body.append(f"<table>{''.join(lines)}</table>")

    def videos(self, files: Sequence[tuple[bytes, str]]) -> None:
        """mp4 files side by side, each with a line below it."""
        shown = []
        for data, caption in files:
            source = "data:video/mp4;base64," + base64.b64encode(data).decode()
            shown.append(
                f'<figure><video controls muted loop playsinline preload="metadata" src="{source}"></video>'
                f"<figcaption>{html.escape(caption)}</figcaption></figure>"
            )
        self.body.append(f'<div class="videos">{"".join(shown)}</div>')

    def fold(self, summary: str, text: str) -> None:
        """Preformatted text that is shown on a click."""
        self.body.append(f"<details><summary>{html.escape(summary)}</summary><pre>{html.escape(text)}</pre></details>")


def page(title: str, subtitle: str, sections: Sequence[Section]) -> str:
    """The whole report. What is missing stands first, where a reader sees it."""
    missing = [line for section in sections for line in section.missing]
    parts = [f"<h1>{html.escape(title)}</h1>", f'<p class="quiet">{html.escape(subtitle)}</p>']
    links = [f'<a href="#{s.anchor}">{html.escape(s.title)}</a>' for s in sections if s.body]
    parts.append(f"<nav>{''.join(links)}</nav>")
    if missing:
        items = "".join(f"<li>{html.escape(line)}</li>" for line in missing)
        parts.append(f'<div class="note">Not in this report:<ul>{items}</ul></div>')
    for section in sections:
        if section.body:
            parts.append(f'<h2 id="{section.anchor}">{html.escape(section.title)}</h2>')
            parts += section.body
    head = (
        f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f'<meta name="viewport" content="width=device-width"><title>{html.escape(title)}</title>'
    )
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}<style>{_CSS}</style></head>\n<body>\n{body}\n</body></html>\n'
    )


def axes(columns: int, width: float = 10.4, height: float = 2.9, rows: int = 1, **options):
    """(figure, array of axes [rows, columns]) in the report's style."""
    figure = Figure(figsize=(width, height * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, **options)
    for ax in grid.flat:
        style(ax)
    return figure, grid


def style(ax) -> None:
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color("#afb8c1")
    ax.tick_params(colors=INK)
    ax.grid(color=GRID, linewidth=0.8)
    ax.set_axisbelow(True)


def log_scale(ax, which: str) -> None:
    """A logarithmic "x" or "y" axis with plain numbers at 1, 2 and 5."""
    getattr(ax, f"set_{which}scale")("log")
    axis = getattr(ax, f"{which}axis")
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=12))
    axis.set_major_formatter(FuncFormatter(lambda value, position: f"{value:g}"))
    axis.set_minor_formatter(FuncFormatter(lambda value, position: ""))


def beside(ax) -> None:
    """The legend to the right of the axes, where it hides nothing."""
    ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))


def _svg(figure: Figure) -> str:
    data = io.BytesIO()
    figure.savefig(data, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(data.getvalue()).decode()


def _is_number(cell: str) -> bool:
    return cell in ("", "-") or cell.strip()[:1] in "0123456789.-+\u2212"
