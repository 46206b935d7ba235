"""diagnose.html: the sentence, what the gap is made of, and where it lies, in one file that needs no network."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from pipeline.diagnose.diagnosis import Diagnosis
from pipeline.observe.report.figure import Figure
from pipeline.observe.report.html import Tile, render_page
from pipeline.observe.report.theme import BOUND, blank


def write_page(found: Diagnosis, path: Path, *, name: str) -> None:
    """Write it; the file appears whole or not at all. name: what was diagnosed."""
    shown = [_exchanged(found), _by_position(found), _by_layer(found)]
    text = render_page(
        Path(__file__).with_name("page.html"), shown, name=name, found=found, figures=shown, tiles=_tiles(found)
    )
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def _tiles(found: Diagnosis) -> list[Tile]:
    gap = found.gap
    out = [
        Tile("mean |gap|", f"{gap['abs_logprob']:.1e}", f"nats a token; the bound is {found.bound:.0e}"),
        Tile("largest |gap|", f"{gap['max_abs_logprob']:.1e}", "nats, of all tokens"),
        Tile("k3", f"{gap['k3']:.1e}", "nats a token, estimates KL(mu || pi_o)"),
        Tile("ratios beyond 2", f"{gap['f2']:.2%}", "of the tokens"),
        Tile("compared", f"{found.tokens:,}", f"tokens of {found.rollouts} rollouts"),
    ]
    if found.calibration is not None:
        c = found.calibration
        out.append(
            Tile("surprisal - entropy", f"{c.difference:+.3f}", f"nats, standard error {c.error:.3f}; 0 but for chance")
        )
    return out


def _exchanged(found: Diagnosis) -> Figure:
    plot = blank("")
    names = ["the run's own setting", *(t.part for t in found.parts)]
    left = [found.gap["abs_logprob"], *(t.abs_logprob for t in found.parts)]
    words = ["nothing exchanged", *(t.exchanged for t in found.parts)]
    plot.add_bar(
        x=left, y=names, orientation="h", hovertext=words, hovertemplate="%{hovertext}: %{x:.3e}<extra></extra>"
    )
    plot.add_vline(x=found.bound, line=BOUND)
    plot.update_xaxes(title={"text": "mean |gap| that is left, nats"}, type="log", exponentformat="e", tickformat=None)
    plot.update_yaxes(autorange="reversed", showgrid=False)
    plot.update_layout(hovermode="closest", showlegend=False)
    return Figure(
        "exchanged",
        "The gap with one part exchanged",
        "Each bar exchanges one part alone, in the way that leaves least. Dotted: the bound.",
        "All bars equal, left of the dotted line: nothing that can be exchanged matters.",
        "One bar is much shorter than the first: that part makes the gap.",
        plot=plot,
    )


def _by_position(found: Diagnosis) -> Figure:
    plot = blank("nats a token")
    start = [row["start"] for row in found.by_position]
    for key, label, dash in (("abs_logprob", "mean", "solid"), ("max_abs_logprob", "largest", "dash")):
        values = np.array([row[key] for row in found.by_position])
        plot.add_scatter(x=start, y=np.where(values > 0, values, np.nan), name=label, line={"dash": dash},
                         mode="lines+markers", hovertemplate="%{y:.3e}")  # fmt: skip
    plot.update_xaxes(title={"text": "position in the response"})
    plot.update_yaxes(type="log", exponentformat="e", nticks=6)
    return Figure(
        "position",
        "The gap by position",
        "Tokens of all responses, by their place in them.",
        "Flat: rounding does not care where a token stands.",
        "It grows with the position: attention, the rotary embedding or the KV cache. High at one end: labels.",
        plot=plot,
    )


def _by_layer(found: Diagnosis) -> Figure:
    title, caption = (
        "Routing agreement by layer",
        "Share of tokens for which the trainer's own router would have chosen the experts that the server took, with "
        "the layers before it replayed.",
    )
    good, bad = (
        "1, but for rare ties.",
        "Low everywhere: routes of other tokens. Low in one layer: look at its weights.",
    )
    if not found.by_layer:
        return Figure("layer", title, caption, good, bad, missing="There are no routes to compare.")
    shares = np.array(found.by_layer)
    plot = blank("share")
    plot.add_bar(x=list(range(len(shares))), y=shares, hovertemplate="layer %{x}: %{y:.3%}<extra></extra>")
    plot.update_xaxes(title={"text": "layer"})
    plot.update_yaxes(tickformat=".0%", range=[0, 1.02])
    plot.update_layout(hovermode="closest", showlegend=False)
    low = int(np.nanargmin(shares)) if np.isfinite(shares).any() else 0
    return Figure("layer", title, caption, good, bad, f"Lowest in layer {low}: {shares[low]:.2%}.", plot)
