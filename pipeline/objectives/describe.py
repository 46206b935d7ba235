"""The text of `sameroute objectives` and `sameroute objectives NAME`."""

from __future__ import annotations

import dataclasses
import textwrap

from pipeline.objectives.composition import Composition, CorrectionConfig
from pipeline.objectives.presets import PRESETS

NOTATION = """\
mu: the rollout engine that sampled the tokens.  pi_o: the trainer at the start of the update.  pi: the trainer now.
r_t = pi/pi_o   w_t = pi_o/mu   rho_t = pi/mu   s = exp(mean_t log r_t)   N: tokens of a response   S: responses
A: advantage   R: reward   G: samples per prompt   sg: held constant   k1 = log pi_o - log pi_ref"""

_HIDDEN = ("advantage", "ratio", "surrogate", "reduction", "corrections", "std", "ratio_to")


def describe_all() -> str:
    """The table of presets: name, cells, corrections, c_t."""
    rows = [("preset", "advantage", "ratio", "surrogate", "reduction", "correction", "c_t")]
    for name, preset in PRESETS.items():
        cells = preset.cells
        correction = ", ".join(_correction(c) for c in cells.corrections) or "-"
        rows.append(
            (name, cells.advantage, cells.ratio, cells.surrogate, cells.reduction, correction, preset.coefficient)
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join([*lines, "", NOTATION, "", "`sameroute objectives NAME` prints one of them in full."])


def describe(name: str) -> str:
    """One preset: equation, composition, numbers with their source, when it breaks.

    Raises KeyError, with a sentence that lists the names, for a name that is not in the table.
    """
    if name not in PRESETS:
        raise KeyError(f"unknown objective {name!r}; there are {', '.join(PRESETS)}")
    preset = PRESETS[name]
    cells = preset.cells
    lines = [
        f"{preset.title}  (preset: {name})",
        "",
        _field("paper", preset.paper),
        _field("maximises", preset.equation),
        _field("c_t", preset.coefficient),
        _field("breaks", preset.breaks),
        "",
        "composition",
        *(_field(f"  {cell}", text) for cell, text in _cells(cells)),
        _field("  correction", ", ".join(_correction(c) for c in cells.corrections) or "none"),
        "",
        "numbers",
        *(_field(f"  {cell}", value) for cell, value in _numbers(cells)),
        "",
        "sources",
        *(_field(f"  {cell}", source) for cell, source in preset.sources.items()),
        "",
        NOTATION,
    ]
    return "\n".join(lines)


def _cells(cells: Composition) -> list[tuple[str, str]]:
    std = f" ({cells.std} std)" if cells.whiten or cells.advantage.endswith("_std") else ""
    return [
        ("advantage", cells.advantage + std),
        ("ratio", f"{cells.ratio} (current/{cells.ratio_to})"),
        ("surrogate", cells.surrogate),
        ("reduction", cells.reduction),
    ]


def _field(label: str, text: str) -> str:
    wrapped = textwrap.wrap(text, width=96, break_long_words=False) or [""]
    return "\n".join([f"{label:20}{wrapped[0]}", *(" " * 20 + line for line in wrapped[1:])])


def _correction(correction: CorrectionConfig) -> str:
    bounds = [f"{side} {value:g}" for side in ("low", "high") if (value := getattr(correction, side)) is not None]
    return " ".join([correction.kind, f"({correction.numerator}/rollout)", *bounds])


def _numbers(cells: Composition) -> list[tuple[str, str]]:
    """The cells that are numbers or switches and that this composition reads."""
    critic = ("gae_gamma", "gae_lambda", "value_coefficient", "value_clip")
    out: list[tuple[str, str]] = []
    for field in dataclasses.fields(cells):
        value = getattr(cells, field.name)
        if field.name in _HIDDEN or value is None or (field.name in critic and cells.advantage != "gae"):
            continue
        if field.name == "std_epsilon" and not (cells.whiten or cells.advantage.endswith("_std")):
            continue
        if field.name == "kl":
            out.append((field.name, f"{value.estimator} in the {value.place}, beta {value.beta:g}"))
        elif value is not False and (value != 0 or field.name.startswith("clip")):
            out.append((field.name, "yes" if value is True else f"{value:g}"))
    return out or [("-", "none")]
