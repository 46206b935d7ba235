"""The sentence names the rank that made the first number that is not finite, and the weights."""

from __future__ import annotations

from megatron_ext.parts import NotFinite
from pipeline.diagnose.not_finite import where_not_finite

WEIGHT = NotFinite("weight", "decoder.layers.2.mlp.experts.linear_fc1.weight5", 2, 5, 1, 2048)
EXPERT = NotFinite("output", "decoder.layers.2.mlp.experts.linear_fc1", 2, 5, 64, 4096, 2, 40)
LATER = NotFinite("output", "decoder.layers.2.mlp", 2, None, 32, 4096, 2, 44)
NEXT_STAGE = NotFinite("output", "decoder.layers.3.mlp", 3, None, 32, 4096, 3, 4)


def test_the_first_in_the_model_is_named_with_its_rank_and_its_weight():
    assert where_not_finite([[LATER], [WEIGHT, EXPERT], [NEXT_STAGE]]) == (
        "The first output that is not finite is made by trainer rank 1, layer 2, expert 5: "
        "decoder.layers.2.mlp.experts.linear_fc1 (64 of 4,096 numbers). Weights that are not finite: "
        "decoder.layers.2.mlp.experts.linear_fc1.weight5 (1 of 2,048 numbers)."
    )


def test_finite_weights_are_said_to_be():
    assert "All weights are finite: its inputs" in where_not_finite([[LATER], []])


def test_a_weight_that_no_token_meets_is_named_alone():
    words = where_not_finite([[WEIGHT], []])
    assert words.startswith("Weights that are not finite: decoder.layers.2")


def test_all_finite_says_where_to_look_next():
    assert where_not_finite([[], []]).startswith("All weights and all outputs of the forward pass are finite: look")
