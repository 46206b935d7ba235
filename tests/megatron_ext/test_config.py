"""Layers on pipeline stages, as Megatron-Core divides them."""

import pytest

from megatron_ext.config import ParallelConfig


@pytest.mark.parametrize(
    ("settings", "layers", "expected"),
    [
        ({}, 5, [5]),
        ({"ranks": 2, "pipeline": 2}, 8, [4, 4]),
        ({"ranks": 2, "pipeline": 2, "first_stage_layers": 1}, 4, [1, 3]),
        ({"ranks": 2, "pipeline": 2, "first_stage_layers": 1, "last_stage_layers": 4}, 5, [1, 4]),
        ({"ranks": 8, "pipeline": 8, "last_stage_layers": 5}, 61, [8, 8, 8, 8, 8, 8, 8, 5]),
        ({"ranks": 4, "pipeline": 4, "first_stage_layers": 23, "last_stage_layers": 23}, 94, [23, 24, 24, 23]),
    ],
)
def test_stages_have_the_layers_that_are_asked_for(settings, layers, expected):
    assert ParallelConfig(**settings).stage_layers(layers) == expected


@pytest.mark.parametrize(
    ("settings", "layers"),
    [
        ({"ranks": 2, "pipeline": 2}, 5),
        ({"ranks": 2, "pipeline": 2, "virtual_pipeline": 2}, 6),
        ({"ranks": 2, "pipeline": 2, "first_stage_layers": 3, "last_stage_layers": 3}, 7),
        ({"ranks": 3, "pipeline": 3, "first_stage_layers": 4}, 4),
        ({"ranks": 2, "pipeline": 2, "virtual_pipeline": 2, "first_stage_layers": 3}, 7),
    ],
)
def test_layers_that_do_not_divide_are_refused(settings, layers):
    with pytest.raises(ValueError, match=rf"{layers} layers"):
        ParallelConfig(**settings).stage_layers(layers)
