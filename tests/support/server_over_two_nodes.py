"""On the first node of two_nodes.py: a server of two ranks over both nodes beside one on this node alone.

    python -m tests.support.server_over_two_nodes MODEL OTHER_MODEL FOLDER [SGLang's arguments]

MODEL, OTHER_MODEL: of one shape. FOLDER: gets the logs, and `said`, a pickle of what the test compares.
"""

from __future__ import annotations

import asyncio
import os
import pickle
import signal
import sys
import time
from pathlib import Path
from typing import Any

import ray
from safetensors.torch import load_file

from pipeline.cluster.placement import on_node, wait_and_place
from pipeline.config.server import ServerConfig
from pipeline.config.weights import WeightsConfig
from pipeline.engine.client import SGLangClient
from pipeline.engine.control import ServerAddress
from pipeline.engine.nodes.remote import RemoteServer
from pipeline.engine.processes import TOKEN_VARIABLE
from pipeline.engine.sampling import Sampling
from pipeline.engine.server import SGLangServer
from pipeline.weights.sender import WeightSender
from tests.support.ray_node import HEAD, PORT

PROMPTS = [[1, 2, 3], [7] * 30, [*range(100, 260)]]


def answers(server: Any, prompts: list[list[int]] = PROMPTS) -> list[tuple[Any, ...]]:
    """Greedy ones, of all prompts at once: (token ids, log-probs, routes)."""
    client = SGLangClient(
        server.url, vocab_size=512, num_layers=4, topk=2, num_experts=8, routes=True, keys=server.keys
    )

    async def run() -> list[tuple[Any, ...]]:
        async with client:
            parts = await asyncio.gather(*(client.sample(prompt, Sampling(12, 0.0)) for prompt in prompts))
            return [(part.ids, part.logprobs, part.routes) for part in parts]

    return asyncio.run(run())


def of_servers() -> dict[int, str]:
    """Command lines of all processes of servers on a node, by their number there."""
    found = {}
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and f"{TOKEN_VARIABLE}=".encode() in (folder / "environ").read_bytes():
                found[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:  # gone meanwhile
            continue
    return found


def kill(process: int) -> None:
    """At once."""
    os.kill(process, signal.SIGKILL)


def on(node: str, function: Any, *arguments: Any) -> Any:
    """What it returns there."""
    return ray.get(ray.remote(function).options(num_cpus=0, **on_node(node)).remote(*arguments))


def main() -> None:
    """See above."""
    model, other, folder = map(Path, sys.argv[1:4])
    ray.init(address=f"{HEAD}:{PORT}", log_to_driver=False)
    placement = wait_and_place(1, [2], gpus=False, timeout_s=60, machines=2)
    (nodes,) = placement.servers
    config = ServerConfig(  # pyright: ignore[reportCallIssue]
        host=HEAD, tensor_parallel=2, context_length=1024, startup_timeout_s=120, extra_args=sys.argv[4:]
    )
    made = [
        SGLangServer(config, model, folder / f"{name}.log", device="cpu", seed=0, return_routed_experts=True)
        for name in ("alone", "spanning")
    ]
    alone, spanning = made[0], RemoteServer(made[1], nodes, gpus=False, reachable=True)
    said: dict[str, Any] = {"nodes": len(set(nodes))}
    servers = [alone, spanning]
    try:
        for server in servers:
            server.start()
        for server in servers:
            server.wait_ready()
        said["processes"] = [len(on(node, of_servers)) for node in nodes]
        said["before"] = [answers(server) for server in servers]
        addresses = [ServerAddress(server.url, server.log_path, server.keys) for server in servers]
        sender = WeightSender(addresses, WeightsConfig(), device="cpu")  # pyright: ignore[reportCallIssue]
        sender.connect()
        said["transport"] = type(sender.transport).__name__
        sender.send([list(load_file(other / "model.safetensors").items())], 1)
        said["differences"] = list(map(str, sender.differences([list(load_file(other / "model.safetensors").items())])))
        said["after"] = [answers(server) for server in servers]
        sender.close()

        second = on(nodes[1], of_servers)
        scheduler = next(pid for pid, line in second.items() if "scheduler" in line)
        on(nodes[1], kill, scheduler)
        deadline = time.monotonic() + 60
        while spanning.alive():
            assert time.monotonic() < deadline
            time.sleep(0.1)
        spanning.restart()
        spanning.wait_ready()
        said["again"] = answers(spanning)
        said["restarted"] = [len(on(node, of_servers)) for node in nodes]
        said["logs"] = [log.name for log in sorted(folder.glob("spanning*.log"))]
        said["tail"] = spanning.log_tail()
    finally:
        for server in servers:
            server.stop()
    said["left"] = [list(on(node, of_servers).values()) for node in nodes]
    (folder / "said").write_bytes(pickle.dumps(said))


if __name__ == "__main__":
    main()
