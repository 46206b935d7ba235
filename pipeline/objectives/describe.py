"""The text of `sameroute objectives` and `sameroute objectives NAME`."""

from __future__ import annotations

import dataclasses
import re
import textwrap

from pipeline.objectives.composition import Composition
from pipeline.objectives.correction_config import CorrectionConfig
from pipeline.objectives.presets import PRESETS

NOTATION = """\
mu: the rollout engine that sampled the tokens.  pi_o: the trainer at the start of the update.  pi: the trainer now.
r_t = pi/pi_o   w_t = pi_o/mu   rho_t = pi/mu   s = exp(mean_t log r_t)   N: tokens of a response   S: responses
A: advantage   R: reward   G: samples per prompt   sg: held constant   k1 = log pi_o - log pi_ref"""

_HIDDEN = ("advantage", "ratio", "surrogate", "reduction", "corrections", "std", "ratio_to", "credit", "turn_gamma")


_COLUMNS = ("preset", "advantage", "ratio", "surrogate", "reduction")
_MORE = ("c_t", "correction")
_INDENT = 21
"""Of what is said of a preset below its name."""


def describe_all(width: int = 100) -> str:
    """The table of presets: name, cells, c_t, corrections. width: of the lines, at least 80.

    Two lines a preset, in columns. Where the columns do not fit, the cells of a preset stand behind one another.
    """
    rows = [(_columns(name), _more(name)) for name in PRESETS]
    first = [max(len(text) for text in column) for column in zip(_COLUMNS, *(row for row, _ in rows), strict=True)]
    second = [max(len(text) for text in column) for column in zip(_MORE, *(more for _, more in rows), strict=True)]
    if max(_row_width(first), _INDENT + _row_width(second)) <= width:
        shown = [(_COLUMNS, _MORE), (tuple("-" * n for n in first), tuple("-" * n for n in second)), *rows]
        lines = [line for row, more in shown for line in (_aligned(row, first), " " * _INDENT + _aligned(more, second))]
    else:
        lines = [line for row, more in rows for line in _block(row, more, width)]
    end = "`sameroute objectives NAME` prints one of them in full."
    return "\n".join([*lines, "", *_wrapped_notation(width), "", end])


def _columns(name: str) -> tuple[str, ...]:
    cells = PRESETS[name].cells
    return name, cells.advantage, cells.ratio, cells.surrogate, cells.reduction


def _more(name: str) -> tuple[str, ...]:
    preset = PRESETS[name]
    return preset.coefficient, ", ".join(_correction(c) for c in preset.cells.corrections) or "-"


def _row_width(widths: list[int]) -> int:
    return sum(widths) + 2 * (len(widths) - 1)


def _aligned(row: tuple[str, ...], widths: list[int]) -> str:
    return "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()


def _block(row: tuple[str, ...], more: tuple[str, ...], width: int) -> list[str]:
    """The cells of a preset behind its name, then c_t, then the correction if there is one."""
    name, *cells = row
    texts = [", ".join(cells), f"c_t = {more[0]}", *(f"correction {text}" for text in more[1:] if text != "-")]
    lines = [line for text in texts for line in textwrap.wrap(text, width - _INDENT, subsequent_indent="  ")]
    return [name.ljust(_INDENT) + lines[0], *(" " * _INDENT + line for line in lines[1:])]


def _wrapped_notation(width: int) -> list[str]:
    """Three spaces part two symbols, and a line breaks there only."""
    lines = [""]
    for symbol in (part.strip() for line in NOTATION.splitlines() for part in re.split(r" {2,}", line)):
        joined = f"{lines[-1]}   {symbol}" if lines[-1] else symbol
        lines = [*lines[:-1], joined] if len(joined) <= width else [*lines, symbol]
    return lines


def describe(name: str, width: int = 100) -> str:
    """One preset: equation, composition, numbers with their source, when it breaks. width: of its lines, at least 80.

    Raises KeyError, with a sentence that lists the names, for a name that is not in the table.
    """
    if name not in PRESETS:
        raise KeyError(f"unknown objective {name!r}; there are {', '.join(PRESETS)}")
    preset = PRESETS[name]
    cells = preset.cells

    def field(label: str, text: str) -> str:
        wrapped = textwrap.wrap(text, width=width - 20, break_long_words=False) or [""]
        return "\n".join([f"{label:20}{wrapped[0]}", *(" " * 20 + line for line in wrapped[1:])])

    lines = [
        f"{preset.title}  (preset: {name})",
        "",
        field("paper", preset.paper),
        field("maximises", preset.equation),
        field("c_t", preset.coefficient),
        field("breaks", preset.breaks),
        "",
        "composition",
        *(field(f"  {cell}", text) for cell, text in _cells(cells)),
        field("  correction", ", ".join(_correction(c) for c in cells.corrections) or "none"),
        "",
        "numbers",
        *(field(f"  {cell}", value) for cell, value in _numbers(cells)),
        "",
        "sources",
        *(field(f"  {cell}", source) for cell, source in preset.sources.items()),
        "",
        *_wrapped_notation(width),
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


def _correction(correction: CorrectionConfig) -> str:
    bounds = [f"{side} {value:g}" for side in ("low", "high") if (value := getattr(correction, side)) is not None]
    statistic = [] if correction.by is None else [f"{correction.over} {correction.by}"]
    return " ".join([correction.kind, *statistic, f"({correction.numerator}/rollout)", *bounds])


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
            near = "" if value.to == "reference" else ", near mu"
            out.append((field.name, f"{value.estimator} in the {value.place}, beta {value.beta:g}{near}"))
        elif field.name == "distillation":
            out.append((field.name, f"{value.place}, coefficient {value.coefficient:g}, reward {value.reward:g}"))
        elif isinstance(value, str):
            out.append((field.name, value))
        elif value is not False and (value != 0 or field.name.startswith("clip")):
            out.append((field.name, "yes" if value is True else f"{value:g}"))
    return out or [("-", "none")]
