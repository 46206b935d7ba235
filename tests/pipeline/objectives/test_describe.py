from __future__ import annotations

import pytest

from pipeline.objectives import PRESETS
from pipeline.objectives.describe import describe, describe_all


def of_preset(text: str, name: str) -> str:
    """What the table says of one preset, in one line."""
    lines = text.splitlines()
    first = next(number for number, line in enumerate(lines) if line.split()[:1] == [name])
    last = next(number for number in range(first + 1, len(lines)) if not lines[number].startswith(" "))
    return " ".join(" ".join(lines[first:last]).split())


@pytest.mark.parametrize("width", [80, 95, 100])
def test_the_table_has_every_preset_with_its_cells_and_its_coefficient_and_fits_the_terminal(width: int) -> None:
    text = describe_all(width)
    assert max(map(len, text.splitlines())) <= width
    for name, preset in PRESETS.items():
        said, cells = of_preset(text, name), preset.cells
        parts = (cells.advantage, cells.ratio, cells.surrogate, cells.reduction, preset.coefficient)
        for part in (*parts, *(correction.kind for correction in cells.corrections)):
            assert part in said
    for symbol in ("pi_o: the trainer at the start of the update.", "G: samples per prompt"):
        assert symbol in text


def test_the_columns_of_a_wide_terminal_are_aligned() -> None:
    lines = describe_all(100).splitlines()
    for label in ("advantage", "ratio", "surrogate", "reduction"):
        column = lines[0].index(label)
        assert all(line[column - 1] == " " != line[column] for line in lines[:40:2] if not line.startswith(" "))


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_a_preset_is_described_with_equation_composition_numbers_and_sources(name: str) -> None:
    preset = PRESETS[name]
    assert max(map(len, describe(name, 80).splitlines())) <= 80
    text = describe(name)
    unwrapped = " ".join(text.split())
    for part in (preset.title, preset.paper, preset.equation, preset.breaks, *preset.sources.values()):
        assert " ".join(part.split()) in unwrapped
    cells = preset.cells
    for number in (cells.clip_low, cells.clip_high, cells.tau_positive, cells.tau_negative):
        assert number is None or f" {number:g}" in text
    for correction in cells.corrections:
        assert correction.kind in text
    assert max(map(len, text.splitlines())) <= 100


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(KeyError, match="unknown objective 'gpro'; there are reinforce, "):
        describe("gpro")


def test_every_clip_says_where_its_number_comes_from() -> None:
    for name, preset in PRESETS.items():
        if preset.cells.clip_high is not None:
            assert "clip" in preset.sources, name
