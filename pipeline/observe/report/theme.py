"""How figures look. Colours are Okabe and Ito's, told apart with every common colour vision, and every line of a figure
has its own dash as well."""

from __future__ import annotations

import math
from collections.abc import Sequence

import plotly.graph_objects as go

DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
BOUND = {"dash": "dot", "width": 1.5, "color": "#d6336c"}
"""A line that is no measurement."""

_COLUMNS = 400  # of a heat map

_INK = {"light": "#1f2328", "dark": "#e6e8eb"}
_GRID = {"light": "#e3e6ea", "dark": "#333a44"}
_HOVER = {"light": "#ffffff", "dark": "#20262e"}
_LINES = {
    "light": ["#0072b2", "#d55e00", "#009e73", "#b0508c", "#5a5a5a", "#a07d00", "#2b8fc7"],
    "dark": ["#56b4e9", "#f0a03c", "#2fc79a", "#e29ac4", "#b8bec6", "#f0e442", "#7fa8ff"],
}


def template(scheme: str) -> go.layout.Template:
    """Plotly's template for "light" or "dark"."""
    axis = {
        "gridcolor": _GRID[scheme],
        "linecolor": _GRID[scheme],
        "zeroline": False,
        "automargin": True,
        "title": {"standoff": 8},
    }
    return go.layout.Template(
        layout={
            "colorway": _LINES[scheme],
            "font": {"color": _INK[scheme], "size": 12, "family": "system-ui, 'Segoe UI', Roboto, sans-serif"},
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "hoverlabel": {"bgcolor": _HOVER[scheme], "font": {"color": _INK[scheme]}, "bordercolor": _GRID[scheme]},
            "xaxis": axis,
            "yaxis": axis,
            "annotationdefaults": {"font": {"color": _INK[scheme], "size": 11}},
            "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
        },
        data={"heatmap": [go.Heatmap(colorscale="Viridis")], "bar": [go.Bar(marker={"line": {"width": 0}})]},
    )


def blank(unit: str) -> go.Figure:
    """An empty figure over steps. unit: of its vertical axis."""
    figure = go.Figure()
    figure.update_layout(margin={"l": 8, "r": 8, "t": 8, "b": 8}, height=300, hovermode="x unified", template=None)
    figure.update_xaxes(title={"text": "step"}, tickformat="d", nticks=8)
    figure.update_yaxes(title={"text": unit})
    return figure


def thinned[Item](rows: Sequence[Item]) -> tuple[Sequence[Item], str]:
    """Every k-th row where there are more than a heat map has columns, and a sentence that says so."""
    every = math.ceil(len(rows) / _COLUMNS)
    return (rows[::every], f" One step in {every} is drawn.") if every > 1 else (rows, "")
