"""A server on another node of a Ray cluster, whose node is lost: it says so, and starts on another that has room."""

from __future__ import annotations

import asyncio
import time

import pytest
import ray
from ray.cluster_utils import Cluster

from pipeline.config.server import ServerConfig
from pipeline.engine.client import SGLangClient
from pipeline.engine.nodes.remote import RemoteServer
from pipeline.engine.sampling import Sampling
from pipeline.engine.server import NodeGoneError, SGLangServer


@pytest.fixture
def cluster():
    """A head that runs nothing."""
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    ray.init(address=made.address, log_to_driver=False)
    yield made
    ray.shutdown()
    made.shutdown()


@pytest.mark.proof
@pytest.mark.usefixtures("preloaded")
def test_a_server_whose_node_is_lost_serves_from_the_next_node_that_joins(tiny_model_dir, tmp_path, cluster):
    config = ServerConfig(context_length=1024, startup_timeout_s=240)
    local = SGLangServer(
        config, tiny_model_dir, tmp_path / "sglang.log", device="cpu", seed=0, return_routed_experts=True
    )
    first, joined = cluster.add_node(num_cpus=1), []
    server = RemoteServer(
        local, [first.node_id], gpus=False, reachable=False, another=lambda: [joined[0].node_id] if joined else None
    )
    try:
        server.start()
        server.wait_ready()
        before, url = sampled(server), server.url
        cluster.remove_node(first, allow_graceful=False)
        deadline = time.monotonic() + 60
        while server.alive():  # its processes outlive the node's raylet by a moment, where a machine is not really lost
            assert time.monotonic() < deadline
            time.sleep(0.1)
        with pytest.raises(NodeGoneError, match=f"the node of the server {url} is gone"):
            server.restart()
        assert not server.alive()
        with pytest.raises(NodeGoneError, match="no node has room for the server"):
            server.restart()
        joined.append(cluster.add_node(num_cpus=1))
        server.restart()
        server.wait_ready()
        assert server.alive()
        assert sampled(server) == before
        assert server.log_path.read_text().count("fired up") == 2, "the log of the first stays"
    finally:
        server.stop()


def sampled(server: RemoteServer) -> list[int]:
    """A greedy answer."""
    client = SGLangClient(server.url, vocab_size=512, num_layers=4, topk=2, num_experts=8, keys=server.keys)

    async def run() -> list[int]:
        async with client:
            part = await client.sample([1, 2, 3], Sampling(8, 0.0))
            return part.ids.tolist()

    return asyncio.run(run())
