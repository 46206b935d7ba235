from __future__ import annotations

import pytest

from pipeline.objectives import PRESETS
from pipeline.objectives.describe import describe, describe_all


def test_the_table_has_a_line_for_every_preset_with_its_coefficient() -> None:
    lines = {line.split()[0]: line for line in describe_all().splitlines() if line.strip()}
    for name, preset in PRESETS.items():
        assert lines[name].endswith(preset.coefficient)
        assert preset.cells.reduction in lines[name]


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_a_preset_is_described_with_equation_composition_numbers_and_sources(name: str) -> None:
    preset = PRESETS[name]
    text = describe(name)
    unwrapped = " ".join(text.split())
    for part in (preset.title, preset.paper, preset.equation, preset.breaks, *preset.sources.values()):
        assert " ".join(part.split()) in unwrapped
    cells = preset.cells
    for number in (cells.clip_low, cells.clip_high, cells.tau_positive, cells.tau_negative):
        assert number is None or f" {number:g}" in text
    for correction in cells.corrections:
        assert correction.kind in text
    assert max(map(len, text.splitlines())) <= 120


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(KeyError, match="unknown objective 'gpro'; there are reinforce, "):
        describe("gpro")


def test_every_clip_says_where_its_number_comes_from() -> None:
    for name, preset in PRESETS.items():
        if preset.cells.clip_high is not None:
            assert "clip" in preset.sources, name
