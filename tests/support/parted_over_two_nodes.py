"""On the first node of two_nodes.py: servers whose two ranks, one on each node, part experts or requests, beside one
server of one rank.

    python -m tests.support.parted_over_two_nodes MODEL OTHER_MODEL FOLDER

MODEL, OTHER_MODEL: of one shape. FOLDER: gets the logs, and `parted`, a pickle of what the test compares.
"""

from __future__ import annotations

import pickle
import sys
from pathlib import Path
from typing import Any

import ray
from safetensors.torch import load_file

from pipeline.cluster.placement import wait_and_place
from pipeline.config.server import ServerConfig
from pipeline.config.weights import WeightsConfig
from pipeline.engine.control import ServerAddress
from pipeline.engine.nodes.remote import RemoteServer
from pipeline.engine.server import SGLangServer
from pipeline.weights.sender import WeightSender
from tests.support.ray_node import HEAD, PORT
from tests.support.server_over_two_nodes import PROMPTS, answers

WAYS = {
    "experts": ["--ep-size", "2"],
    "attention": ["--attn-dp-size", "2"],
    "both": ["--ep-size", "2", "--attn-dp-size", "2"],
}


def server(model: Path, folder: Path, name: str, ranks: int, arguments: list[str]) -> SGLangServer:
    """One that has not been started."""
    config = ServerConfig(  # pyright: ignore[reportCallIssue]
        host=HEAD, tensor_parallel=ranks, context_length=1024, startup_timeout_s=120, extra_args=arguments
    )
    return SGLangServer(config, model, folder / f"{name}.log", device="cpu", seed=0, return_routed_experts=True)


def all_answers(server: Any) -> list[tuple[Any, ...]]:
    """Of all prompts at once, two of which share a rank where requests are parted, and of two alone, one after
    another: meanwhile a rank has none."""
    return answers(server) + answers(server, PROMPTS[1:2]) + answers(server, PROMPTS[2:])


def main() -> None:
    """See above."""
    model, other, folder = map(Path, sys.argv[1:4])
    ray.init(address=f"{HEAD}:{PORT}", log_to_driver=False)
    (nodes,) = wait_and_place(1, [2], gpus=False, timeout_s=60, machines=2).servers
    servers: dict[str, Any] = {"alone": server(model, folder, "one_rank", 1, [])}
    for way, arguments in WAYS.items():
        whole = server(model, folder, way, 2, arguments)
        servers[way] = RemoteServer(whole, nodes, gpus=False, reachable=True)
    said: dict[str, Any] = {"nodes": len(set(nodes))}
    try:
        for each in servers.values():
            each.start()
        for each in servers.values():
            each.wait_ready()
        said["before"] = {name: all_answers(each) for name, each in servers.items()}
        addresses = [ServerAddress(each.url, each.log_path, each.keys) for each in servers.values()]
        sender = WeightSender(addresses, WeightsConfig(), device="cpu")  # pyright: ignore[reportCallIssue]
        sender.connect()
        weights = list(load_file(other / "model.safetensors").items())
        sender.send([weights], 1)
        said["differences"] = list(map(str, sender.differences([weights])))
        said["after"] = {name: all_answers(each) for name, each in servers.items()}
        sender.close()
    finally:
        for each in servers.values():
            each.stop()
    (folder / "parted").write_bytes(pickle.dumps(said))


if __name__ == "__main__":
    main()
