"""The table of presets: a name is its paper's equation; its numbers are its paper's, or the row says whose they are."""

from __future__ import annotations

from pipeline.objectives.table.areal import AREAL
from pipeline.objectives.table.newer import NEWER
from pipeline.objectives.table.preset import Preset
from pipeline.objectives.table.published import PUBLISHED

__all__ = ["PRESETS", "Preset"]

PRESETS: dict[str, Preset] = PUBLISHED | NEWER | AREAL
