"""Servers without engines: SGLang's calls for new weights, whose ranks meet the senders in real gloo groups.

A rank keeps whatever comes under its name. Faults are told before: what the server does in place of taking its n-th
request of tensors.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from math import prod
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.engine.checksum import checksum
from pipeline.engine.inside.many_groups import parts

Fault = Literal["dies", "stops", "refuses"]


class Receiver:
    """One server. held: of each rank, name -> tensor. came: how often each name came. calls: paths, in their order.
    together: senders in each request of tensors. fault: (what it does, at which request of tensors)."""

    def __init__(self, ranks: int, fault: tuple[Fault, int] | None = None):
        self.ranks, self.fault = ranks, fault
        self.held: list[dict[str, Tensor]] = [{} for _ in range(ranks)]
        self.came, self.calls, self.together, self.version = Counter[str](), list[str](), list[int](), ""
        self.groups: list[dict[str, Any]] = [{} for _ in range(ranks)]
        self.alive, self.over, self.lock = True, threading.Event(), threading.Lock()
        self.threads = ThreadPoolExecutor(ranks)
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                self.answer({"tp_size": receiver.ranks, "nnodes": 1})

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or b"{}")
                with receiver.lock:
                    answer = receiver.take(self.path, body) if receiver.alive else None
                if answer is None:
                    self.close_connection = True
                    self.connection.close()
                else:
                    self.answer(answer)

            def answer(self, content):
                data = json.dumps(content).encode()
                self.send_response(200 if receiver.alive else 503)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def take(self, path: str, body: dict[str, Any]) -> dict[str, Any] | None:
        """The answer to a call; None: the server is gone."""
        self.calls.append(path)
        match path:
            case "/init_weights_update_group":
                list(self.threads.map(lambda rank: self.join(rank, body), range(self.ranks)))
            case "/destroy_weights_update_group":
                for groups in self.groups:
                    del groups[body["group_name"]]
            case "/update_weights_from_distributed":
                return self.tensors(body)
            case "/update_weight_version":
                self.version = body["new_version"]
            case "/weights_checker":
                return {"ranks": [self.sums(rank, json.loads(body["skip_tensor_list"][0])) for rank in self.held]}
        return {"success": True}

    def join(self, rank: int, body: dict[str, Any]) -> None:
        store: Any = dist.TCPStore(body["master_address"], body["master_port"], body["world_size"], False)
        for prefix in (body["group_name"], f"{body['group_name']}/", "cpu/"):  # as torch makes a group's
            store = dist.PrefixStore(prefix, store)
        number = body["rank_offset"] + rank
        self.groups[rank][body["group_name"]] = dist.ProcessGroupGloo(
            store, number, body["world_size"], timedelta(seconds=30)
        )

    def tensors(self, body: dict[str, Any]) -> dict[str, Any] | None:
        self.together.append(1 if body["group_name"][0] != "[" else len(json.loads(body["group_name"])))
        if self.fault is not None and self.fault[1] == len(self.together) - 1:
            match self.fault[0]:
                case "dies":
                    self.alive = False
                    self.groups.clear()
                    return None
                case "stops":
                    self.over.wait(60)
                    return None
                case "refuses":
                    return {"success": False, "message": "no room"}
        self.came.update(body["names"])
        list(self.threads.map(lambda rank: self.receive(rank, body), range(self.ranks)))
        return {"success": True}

    def receive(self, rank: int, body: dict[str, Any]) -> None:
        """As `many_groups.receive` does."""
        name = body["group_name"]
        groups = json.loads(name) if name[0] == "[" else [(name, len(body["names"]))]
        described = list(zip(body["names"], body["dtypes"], body["shapes"], strict=True))
        begun = []
        for group, part in parts(groups):
            sizes = [prod(shape) * getattr(torch, dtype).itemsize for _, dtype, shape in described[part]]
            flat = torch.empty(sum(sizes), dtype=torch.uint8)
            begun.append((self.groups[rank][group].broadcast(flat, 0), flat, sizes, described[part]))
        for work, flat, sizes, tensors in begun:
            work.wait()
            for (name, dtype, shape), data in zip(tensors, flat.split(sizes), strict=True):
                self.held[rank][name] = data.clone().view(getattr(torch, dtype)).view(shape)

    @staticmethod
    def sums(held: dict[str, Tensor], described: list) -> dict[str, Any]:
        """What a rank holds of these tensors; of none, the names of all."""
        if not described:
            return {"checksums": {f"parameter {name}": "" for name in held}}
        lines = {name: f"{held[name].numel()} {checksum(held[name])}" for name, _, _ in described}
        return {"checksums": lines | {f"parameter {name}": "" for name in lines}}


@contextlib.contextmanager
def receivers(count: int, ranks: int, faults: dict[int, tuple[Fault, int]] | None = None) -> Iterator[list[Receiver]]:
    """`count` servers of so many ranks each. faults: of a server, by its number."""
    made = [Receiver(ranks, (faults or {}).get(number)) for number in range(count)]
    threads = [threading.Thread(target=each.server.serve_forever) for each in made]
    for thread in threads:
        thread.start()
    try:
        yield made
    finally:
        for each in made:
            each.over.set()
            each.server.shutdown()
            each.server.server_close()
            each.threads.shutdown(wait=False)
        for thread in threads:
            thread.join()
