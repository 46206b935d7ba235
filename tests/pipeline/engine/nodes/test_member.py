"""A server over two nodes: real SGLang, two sets of Linux namespaces as the nodes, gloo between them."""

from __future__ import annotations

import pickle
import sys
import time

import numpy as np
import psutil
import pytest

from pipeline.config.server import ServerConfig
from pipeline.engine.nodes.member import Member, meeting_at
from pipeline.engine.server import ServerError, SGLangServer
from tests.conftest import save_tiny_model
from tests.end_to_end.test_asynchronous import rows_of
from tests.support.command import QUICKSTART, SMALL
from tests.support.processes import command_line
from tests.support.two_nodes import TwoNodes


@pytest.fixture(scope="module")
def two():
    with TwoNodes() as nodes:
        yield nodes


def whole(folder, **settings):
    (folder / "config.json").write_text('{"model_type": "qwen3_moe"}')
    config = ServerConfig(tensor_parallel=16, **settings)  # pyright: ignore[reportCallIssue]
    return SGLangServer(config, folder, folder / "sglang_3.log", device="cuda", seed=5, return_routed_experts=True)


def test_a_part_is_told_where_the_others_are_and_has_a_log_and_a_mark_of_its_own(tmp_path):
    server = whole(tmp_path)
    parts = [Member(server, rank, 2) for rank in range(2)]
    lines = []
    for part in parts:
        part.meeting, part._port = "10.0.0.1:25000", 30000
        lines.append(part.arguments())
    assert lines[0][-6:] == ["--nnodes", "2", "--node-rank", "0", "--dist-init-addr", "10.0.0.1:25000"]
    assert lines[1][-6:] == ["--nnodes", "2", "--node-rank", "1", "--dist-init-addr", "10.0.0.1:25000"]
    assert lines[0][:-6] == lines[1][:-6]
    server._port = 30000
    assert lines[0][:-6] == server.arguments()
    assert [part.log_path.name for part in parts] == ["sglang_3.log", "sglang_3_node_1.log"]
    assert parts[0].keys == parts[1].keys == server.keys
    assert len({part._token for part in [*parts, server]}) == 3, "what ends one ends no other on the same machine"
    alone = Member(server, 0, 1)
    alone._port = 30000
    assert alone.arguments() == server.arguments()


def test_ranks_meet_at_ports_that_are_free():
    host, _, port = meeting_at("127.0.0.1").rpartition(":")
    assert host == "127.0.0.1"
    assert 20_000 <= int(port) < 32_000 - 6
    with pytest.raises(ServerError, match=r"cannot listen on 7 ports of 192\.0\.2\.1 in a row: Cannot assign"):
        meeting_at("192.0.2.1")


@pytest.mark.proof
def test_a_server_over_two_nodes_is_the_one_node_server_takes_weights_and_dies_and_returns_as_one(
    two, tiny_model_dir, tmp_path_factory
):
    other = save_tiny_model(tmp_path_factory.mktemp("other"), seed=1)
    arguments = [tiny_model_dir, other, two.folder]
    driver = two.start(
        two.folder / "driver.out", sys.executable, "-m", "tests.support.server_over_two_nodes", *arguments
    )
    assert driver.wait(240) == 0, two.logs()
    said = pickle.loads((two.folder / "said").read_bytes())
    assert said["nodes"] == 2
    assert min(said["processes"]) >= 2, "a first process and a scheduler on each"
    for what in ("before", "after"):
        alone, spanning = said[what]
        for one, many in zip(alone, spanning, strict=True):
            for ours, theirs in zip(many, one, strict=True):
                np.testing.assert_array_equal(ours, theirs, err_msg=what)
    assert not np.array_equal(said["before"][0][0][1], said["after"][0][0][1]), "other weights"
    assert (said["transport"], said["differences"]) == ("Distributed", [])
    for one, again in zip(said["before"][1], said["again"], strict=True):
        for ours, theirs in zip(again, one, strict=True):
            np.testing.assert_array_equal(ours, theirs)
    assert said["restarted"][1] == said["processes"][1]
    assert said["logs"] == ["spanning.log", "spanning_node_1.log"]
    assert all(f"{two.folder}/{name}:" in said["tail"] for name in said["logs"])
    assert said["left"] == [[], []]


@pytest.mark.proof
def test_experts_and_requests_parted_over_two_nodes_give_the_answers_of_one_rank(two, tiny_model_dir, tmp_path_factory):
    """Expert parallelism, attention that is data-parallel, and both; before and after a transfer of weights."""
    other = save_tiny_model(tmp_path_factory.mktemp("other"), seed=1)
    program = "tests.support.parted_over_two_nodes"
    driver = two.start(two.folder / "parted.out", sys.executable, "-m", program, tiny_model_dir, other, two.folder)
    assert driver.wait(240) == 0, two.logs()
    said = pickle.loads((two.folder / "parted").read_bytes())
    assert said["nodes"] == 2
    assert said["differences"] == []
    for when in ("before", "after"):
        expected = said[when].pop("alone")
        assert sorted(said[when]) == ["attention", "both", "experts"]
        for way, found in said[when].items():
            for (ids, logprobs, routes), (own_ids, own_logprobs, own_routes) in zip(expected, found, strict=True):
                np.testing.assert_array_equal(own_ids, ids, err_msg=f"{when} {way}")
                np.testing.assert_allclose(own_logprobs, logprobs, atol=1e-5, err_msg=f"{when} {way}")
                np.testing.assert_array_equal(own_routes, routes, err_msg=f"{when} {way}")


@pytest.mark.proof
def test_a_run_goes_on_when_a_part_of_its_only_server_dies(two):
    """A trainer rank on the first node, a server over both."""
    run, output = two.folder / "run", two.folder / "train.out"
    settings = [f"run.directory={run}", f"cluster={{address: {two.address}, nodes: 2}}", "server.tensor_parallel=2",
                *SMALL, "train.steps=4", "weights.checksum_every=1", "checks.first_rollouts=0"]  # fmt: skip
    driver = two.start(output, sys.executable, "-m", "pipeline.commands.main", "train", QUICKSTART, *settings)
    deadline = time.monotonic() + 120
    while "step 2/4" not in output.read_text():
        assert driver.poll() is None, two.logs()
        assert time.monotonic() < deadline, two.logs()
        time.sleep(0.1)
    (second,) = schedulers(two, 2)
    second.kill()
    assert driver.wait(120) == 0, two.logs()
    assert "and is started again" in output.read_text()
    rows = rows_of(run)
    assert [row["weights/version"] for row in rows] == [1, 2, 3, 4]
    assert max(row["mismatch/abs_logprob"] for row in rows) < 1e-5
    assert all(row["routing/replayed_fraction"] == 1 for row in rows)
    assert rows[-1]["servers/restarted"] == 1
    assert (run / "logs" / "sglang_node_1.log").is_file()
    assert schedulers(two, 1) + schedulers(two, 2) == []


def schedulers(two: TwoNodes, node: int) -> list[psutil.Process]:
    """SGLang's that live on a node."""
    return [p for p in two.node(node).children(recursive=True) if "sglang::scheduler" in command_line(p)]
