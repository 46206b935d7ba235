"""Ranks and servers on the nodes of a Ray cluster."""

from __future__ import annotations

import pytest

from pipeline.cluster.placement import Placement, PlacementError, other_nodes, place, wait_and_place


def node(name, *, alive=True, head=False, **resources):
    if head:
        resources["node:__internal_head__"] = 1.0
    return {"NodeID": name, "Alive": alive, "NodeManagerAddress": f"10.0.0.{name[1:]}", "Resources": resources}


def test_ranks_fill_the_trainer_nodes_one_after_the_other_and_servers_the_rollout_nodes():
    nodes = [node("n1", trainer=4, GPU=4), node("n2", trainer=4, GPU=4), node("n3", rollout=4, GPU=4)]
    placed = place(nodes, 8, [2, 2], gpus=True)
    assert placed == Placement(["n1"] * 4 + ["n2"] * 4, [("n3",), ("n3",)])


def test_without_kinds_ranks_and_servers_share_the_gpus_of_all_nodes():
    nodes = [node("n1", GPU=4, CPU=64), node("n2", GPU=4, CPU=64)]
    assert place(nodes, 4, [2, 2], gpus=True) == Placement(["n1"] * 4, [("n2",), ("n2",)])
    assert place(nodes, 2, [2], gpus=False) == Placement(["n1"] * 2, [("n1",)])


def test_servers_are_spread_over_the_nodes_that_have_room():
    shared = [node("n1", GPU=4), node("n2", GPU=4)]
    assert servers_of(shared, 2, [1, 1, 2, 1], gpus=True) == ["n1", "n2", "n2", "n1"]
    assert servers_of(shared, 1, [2, 2, 2], gpus=True) == ["n1", "n2", "n2"]
    apart = [node("n1", trainer=1), node("n2", rollout=2), node("n3", rollout=2)]
    assert servers_of(apart, 1, [1, 1], gpus=False) == ["n2", "n3"]


def servers_of(*arguments, **settings):
    return ["+".join(nodes) for nodes in place(*arguments, **settings).servers]


def test_a_server_that_a_node_could_hold_does_not_span_nodes_and_a_dead_node_has_no_slots():
    nodes = [node("n1", GPU=4), node("n2", GPU=2), node("n3", alive=False, GPU=8)]
    with pytest.raises(
        PlacementError, match=r"has 6 GPUs on 2 nodes, .* parallel\.ranks=2 and 1 servers of .*=4 each;"
    ):
        place(nodes, 2, [4], gpus=True)
    with pytest.raises(PlacementError, match="has 0 trainer and 8 rollout slots on 1 nodes"):
        place([node("n1", rollout=8)], 1, [1], gpus=True)


def test_a_server_that_no_node_holds_spans_the_fewest_with_the_same_share_on_each():
    nodes = [node("n1", trainer=8), *(node(f"n{i}", rollout=8) for i in range(2, 7))]
    assert servers_of(nodes, 8, [16, 16], gpus=True) == ["n2+n3", "n4+n5"]
    assert servers_of(nodes, 8, [12, 2, 12], gpus=True) == ["n2+n3", "n4", "n5+n6"]
    assert servers_of(nodes, 8, [40], gpus=True) == ["n2+n3+n4+n5+n6"]
    with pytest.raises(
        PlacementError, match=r"2 servers of server\.tensor_parallel=24 each, 8 on each of 3 nodes; change"
    ):
        place(nodes, 8, [24, 24], gpus=True)
    with pytest.raises(
        PlacementError, match=r"=20 does not divide among the 3 machines of 8 that it takes; set 16 or 24"
    ):
        place(nodes, 8, [20], gpus=True)
    shared = [node("n1", GPU=4), node("n2", GPU=4), node("n3", GPU=4)]
    assert servers_of(shared, 4, [8], gpus=True) == ["n2+n3"]


def test_nodes_that_join_late_are_waited_for_and_the_head_comes_first():
    late = node("n1", trainer=2)
    joined = [[], [node("n2", head=True, trainer=2)], [late, node("n2", head=True, trainer=2), node("n3", rollout=1)]]
    answers = iter(joined)
    placed = wait_and_place(3, [1], gpus=False, timeout_s=30, nodes=lambda: next(answers))
    assert placed == Placement(["n2", "n2", "n1"], [("n3",)])
    with pytest.raises(PlacementError, match="has 0 CPUs on 0 nodes"):
        wait_and_place(1, [], gpus=False, timeout_s=0, nodes=list)


def test_all_machines_of_the_job_are_waited_for_but_not_for_those_that_were_lost():
    first, second = node("n1", head=True, CPU=4), node("n2", CPU=4)
    answers = iter([[first], [first, second]])
    settings = {"gpus": False, "machines": 2}
    placed = wait_and_place(1, [1, 1], timeout_s=30, nodes=lambda: next(answers), **settings)
    assert placed.servers == [("n1",), ("n2",)]
    lost = [first, node("n2", alive=False, CPU=4)]
    assert wait_and_place(1, [1, 1], timeout_s=30, nodes=lambda: lost, **settings).servers == [("n1",), ("n1",)]
    assert wait_and_place(1, [1, 1], timeout_s=0, nodes=lambda: [first], **settings).servers == [("n1",), ("n1",)]


def test_a_server_whose_node_is_gone_moves_to_one_that_has_room_beside_the_others():
    n1, n2, gone = node("n1", GPU=4), node("n2", GPU=4), node("n3", alive=False, GPU=4)
    placed = Placement(["n1", "n1"], [("n1",), ("n3",), ("n3",)])
    assert other_nodes([n1, n2, gone], placed, 1, [2, 2, 2], gpus=True) == ("n2",)
    assert other_nodes([n1, gone], placed, 1, [2, 2, 2], gpus=True) is None, "ranks and a server fill n1"
    placed.servers[1] = ("n2",)
    assert other_nodes([n1, n2, gone], placed, 2, [2, 2, 2], gpus=True) == ("n2",)
    placed.servers[2] = ("n2",)
    assert other_nodes([n1, n2, gone], placed, 0, [2, 2, 2], gpus=True) == ("n1",), "what it had itself is free"
    apart = [node("n1", trainer=4), node("n4", rollout=2)]
    assert other_nodes(apart, Placement(["n1"] * 4, [("n3",)]), 0, [2], gpus=False) == ("n4",)


def test_a_server_over_several_nodes_of_which_one_is_gone_moves_as_a_whole():
    nodes = [node("n1", trainer=8), *(node(f"n{i}", rollout=8) for i in (2, 4, 5))]
    placed = Placement(["n1"] * 8, [("n2", "n3"), ("n5",)])
    assert other_nodes(nodes, placed, 0, [16, 2], gpus=True) == ("n2", "n4"), "n5 has six left"
    assert other_nodes(nodes[:2] + nodes[3:], placed, 0, [16, 2], gpus=True) is None
