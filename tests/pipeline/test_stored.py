"""Routes that lie elsewhere are joined by their references, and read as an array is."""

import numpy as np
import pytest
import ray
from ray.exceptions import ObjectLostError

from pipeline.stored import StoredRoutes, StoredRoutesLostError, join_routes

STORE = {"a": np.arange(24, dtype=np.uint8).reshape(3, 4, 2), "b": np.ones((2, 4, 2), np.uint8)}


@pytest.fixture(autouse=True)
def store(monkeypatch):
    monkeypatch.setattr(ray, "get", lambda names: [STORE[name] for name in names])


def stored(name):
    return StoredRoutes((name,), STORE[name].shape, STORE[name].dtype)


def test_joined_routes_are_read_in_their_order():
    both = join_routes(stored("a"), stored("b"))
    assert isinstance(both, StoredRoutes)
    assert (len(both), both.size, both.nbytes) == (5, 40, 40)
    assert np.array_equal(np.asarray(both), np.concatenate([STORE["a"], STORE["b"]]))


def test_routes_that_are_here_and_stored_ones_come_here():
    """An answer of which a checkpoint had a part."""
    both = join_routes(STORE["b"], stored("a"))
    assert np.array_equal(both, np.concatenate([STORE["b"], STORE["a"]]))


def test_routes_of_other_layers_or_another_type_do_not_go_on():
    for other in (
        StoredRoutes(("b",), (2, 3, 2), np.dtype(np.uint8)),
        StoredRoutes(("b",), (2, 4, 2), np.dtype(np.int16)),
    ):
        with pytest.raises(ValueError, match="do not go on from uint8"):
            join_routes(stored("a"), other)


def test_routes_whose_node_is_gone_are_named_as_lost(monkeypatch):
    def gone(_):
        raise ObjectLostError("00", None, "")

    monkeypatch.setattr(ray, "get", gone)
    with pytest.raises(StoredRoutesLostError, match="are lost with the node that had them"):
        np.asarray(stored("a"))
