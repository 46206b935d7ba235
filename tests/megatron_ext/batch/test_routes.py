"""What the routes of a sequence must be, for whoever receives them."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from megatron_ext.batch.routes import check_routes, route_dtype

MODEL = SimpleNamespace(num_layers=2, topk=3, num_experts=8, moe_layers=[1])


def routes(*last):
    """Of two tokens: every layer takes experts 0, 1 and 2, but for the last token in the last layer."""
    found = np.tile(np.arange(3, dtype=np.uint8), (2, 2, 1))
    found[-1, -1] = last
    return found


@pytest.mark.parametrize(("experts", "dtype"), [(8, "uint8"), (256, "uint8"), (257, "int16"), (512, "int16")])
def test_the_narrowest_type_holds_every_expert(experts, dtype):
    assert route_dtype(experts) == dtype
    assert np.iinfo(dtype).max >= experts - 1


@pytest.mark.parametrize("last", [(4, 4, 5), (4, 5, 4), (5, 4, 4)])
def test_an_expert_that_is_named_twice_is_found_wherever_it_stands(last):
    with pytest.raises(ValueError, match="a route of layer 1 names expert 4 twice for one token"):
        check_routes(routes(*last), MODEL)


def test_the_last_expert_is_one_and_the_next_is_none():
    check_routes(routes(7, 0, 1), MODEL)
    check_routes(routes(7, 0, 1)[:0], MODEL)
    with pytest.raises(ValueError, match=r"expert ids 0 \.\. 8 are outside \[0, 8\)"):
        check_routes(routes(8, 0, 1), MODEL)


def test_a_row_of_minus_one_is_missing_and_one_that_has_it_in_some_places_is_no_row():
    found = routes(4, 5, 6).astype(np.int16)
    found[0, 1] = -1
    check_routes(found, MODEL)
    found[1, 1, 2] = -1
    with pytest.raises(
        ValueError, match="a route of layer 1 has -1 among its experts for token 1: a missing row is -1 in"
    ):
        check_routes(found, MODEL)
    found[1, 1, 2] = -2
    with pytest.raises(ValueError, match=r"expert ids -2 \.\. 5 are outside"):
        check_routes(found, MODEL)


def test_rows_of_dense_layers_may_say_anything():
    dense = routes(3, 4, 5)
    dense[:, 0] = 0
    check_routes(dense, MODEL)
    with pytest.raises(ValueError, match="a route of layer 0 names expert 0 twice"):
        check_routes(dense, SimpleNamespace(**vars(MODEL) | {"moe_layers": [0, 1]}))
