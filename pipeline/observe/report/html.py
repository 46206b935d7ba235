"""What every page is made of: one HTML file that needs no network, its figures drawn by the plotly inside it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from pipeline.observe.report.figure import Figure
from pipeline.observe.report.rollouts import LEVELS
from pipeline.observe.report.theme import template
from pipeline.text.characters import visible

_HERE = Path(__file__).parent


@dataclass(frozen=True)
class Tile:
    """A number at the top of a page, and what it says."""

    label: str
    value: str
    note: str


def render_page(file: Path, drawn: Iterable[Figure], **values: Any) -> str:
    """The page as text. file: its template, which finds those of this folder too. drawn: all figures that it shows."""
    pages = Environment(
        loader=FileSystemLoader([file.parent, _HERE]),
        autoescape=True,
        finalize=_shown,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return pages.get_template(file.name).render(
        plots=_script_json({f.name: f.plot.to_plotly_json() for f in drawn if f.plot}),
        templates=_script_json({scheme: template(scheme).to_plotly_json() for scheme in ("light", "dark")}),
        style=pages.get_template("page.css").render(levels=LEVELS),
        script=(_HERE / "page.js").read_text(encoding="utf-8"),
        plotly=get_plotlyjs(),
        **values,
    )


def _shown(value: Any) -> Any:
    """Text as a page may hold it: nothing in it turns the direction of what follows. Markup of our own stays."""
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _script_json(value: Any) -> str:
    """JSON that may stand in a script element: nothing in it can end the element or begin a comment."""
    from plotly.io.json import to_json_plotly

    return str(to_json_plotly(value)).replace("<", "\\u003c")
