"""Layers on pipeline stages, as Megatron-Core divides them."""

import pytest

from megatron_ext.config import ParallelConfig
from megatron_ext.hf.description import read_description


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


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ranks": 32, "context": 32}, r"16 key heads .* parallel\.tensor x parallel\.context=32; use a divisor of 16"),
        ({"ranks": 32, "tensor": 2, "sequence": True, "context": 16}, "16 key heads of its gated delta nets do not"),
        ({"ranks": 2, "tensor": 2}, r"gradients of gated delta nets .*; set parallel\.sequence=true"),
    ],
)
def test_a_layout_that_gated_delta_nets_do_not_divide_into_is_refused(settings, message):
    """Qwen3-Next: 16 heads of keys, 32 of values."""
    model = read_description("configs/qwen3-next-80b-a3b")
    ParallelConfig(ranks=16, tensor=2, sequence=True, context=8).check_model(model)
    with pytest.raises(ValueError, match=message):
        ParallelConfig(**settings).check_model(model)
