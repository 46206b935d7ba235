"""One row of the table."""

from __future__ import annotations

from dataclasses import dataclass, field

from pipeline.objectives.composition import Composition


@dataclass(frozen=True)
class Preset:
    """One row.

    title:       the name as people write it.
    paper:       where the equation stands.
    equation:    the term of one token or sequence, and how terms are reduced; notation as in docs/objectives.md.
    coefficient: c_t, the coefficient of grad log pi_t in one sequence's term, inside every clip.
    breaks:      when it goes wrong.
    cells:       the composition.
    sources:     where each number comes from, by cell.
    """

    title: str
    paper: str
    equation: str
    coefficient: str
    breaks: str
    cells: Composition
    sources: dict[str, str] = field(default_factory=dict)
