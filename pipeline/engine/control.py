"""The calls to an SGLang server (0.5.23) that steer it: cache, pause, abort, weights. Synchronous, one at a time.

The calls that sample are in `client.py`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from pipeline import http
from pipeline.cluster.colocation import ServerPart
from pipeline.engine.keys import ServerKeys
from pipeline.engine.server import ServerError

PauseMode = Literal["abort", "in_place", "retract"]
HELD_WEIGHTS, ALIVE = "sameroute_held_weights", "sameroute_alive"
"""The actions of /weights_checker that `inside/hooks.py` adds to SGLang's own."""

VERSION_KEY = "weights "
"""How a key of the prefix cache begins."""


class UnreachableError(ServerError):
    """The server was gone before it had answered, or did not get on."""


def cache_key(version: int | str) -> str:
    """SGLang's `extra_key` of a request under these weights: a prefix is found only under the key that it was computed
    under."""
    return f"{VERSION_KEY}{version}"


@dataclass(frozen=True)
class ServerAddress:
    """Where a server listens, the file that gets its output, which error messages name, and the keys that open it."""

    url: str
    log_path: Path | None = None
    keys: ServerKeys | None = None


@dataclass(frozen=True)
class HeldWeights:
    """What one rank of a server holds.

    tensors:    Hugging Face name -> (elements on this rank, checksum of these).
    parameters: SGLang's names of the parameters that hold them.
    """

    tensors: dict[str, tuple[int, int]]
    parameters: list[str]


class Transfer(Protocol):
    """Whoever owns the trained weights: from all its owners to the servers that are named."""

    def send_weights(self, version: int, servers: Sequence[ServerAddress], *, flush: bool) -> None:
        """The current weights, under this version. flush: the servers forget their prefix cache, they run nothing.

        Raises ServerError where a server does not take part, and another error for what the owners cannot do.
        """
        ...

    def send_again(self, version: int, servers: Sequence[ServerAddress]) -> bool:
        """The same weights to servers that came later; False, and nothing is sent, where the owners hold others by
        now. From any thread."""
        ...


class SGLangControl:
    """One server.

    keys: that open it; None: it has none. timeout_s: seconds for one call. log_path: the server's log, for error
    messages.
    """

    def __init__(
        self, url: str, *, keys: ServerKeys | None = None, timeout_s: float = 600.0, log_path: Path | None = None
    ) -> None:
        self.url = url.rstrip("/")
        self.keys = keys
        self.timeout_s = timeout_s
        self.log_path = log_path

    def post(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """POST `body` as JSON and return the answer's JSON ({} when it is none, or null).

        Raises ServerError, with SGLang's own message, when the server refuses, and UnreachableError when it does not
        answer.
        """
        return self._call("POST", path, body or {})

    def get(self, path: str) -> dict[str, Any]:
        """GET; same answer and errors as `post`."""
        return self._call("GET", path, None)

    def _call(self, method: str, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        try:
            answer = http.request(method, self.url + path, body=body, key=self._key(path), timeout_s=self.timeout_s)
        except TimeoutError as error:
            raise UnreachableError(
                f"{self.url}{path} did not answer in {self.timeout_s:g} s{self._see_log()}"
            ) from error
        except http.HttpError as error:
            raise UnreachableError(f"{self.url}{path} cannot be reached: {error}{self._see_log()}") from error
        return self._content(path, answer)

    def _content(self, path: str, answer: http.Answer) -> dict[str, Any]:
        """The answer's JSON. Raises ServerError for a refusal."""
        try:
            content = answer.json() or {}  # null, of calls about memory
        except ValueError:
            content = {}
        if answer.status != 200 or content.get("success") is False:
            reason = content.get("message") or answer.text[:1000]
            raise ServerError(f"{self.url}{path} answered {answer.status}: {reason}{self._see_log()}")
        return content

    def _key(self, path: str) -> str | None:
        return None if self.keys is None else self.keys.of_path(path)

    def _see_log(self) -> str:
        return f"; its log is {self.log_path}" if self.log_path else ""

    def healthy(self) -> bool:
        """Whether the server answers and takes requests (False while generation is paused)."""
        try:
            return http.request("GET", f"{self.url}/ready", timeout_s=min(5.0, self.timeout_s)).status == 200
        except (http.HttpError, TimeoutError):
            return False

    def ask_schedulers(self) -> None:
        """Nothing but an answer of each of its ranks, a fifth of the time of `server_info`. The process for HTTP alone
        answers other calls for a scheduler that hangs. Raises ServerError."""
        self.post("/weights_checker", {"action": ALIVE, "selector": "target"})

    def model_info(self) -> dict[str, Any]:
        """What is served: model_path, weight_version, architectures, ..."""
        return self.get("/model_info")

    def server_info(self) -> dict[str, Any]:
        """All settings of the server, and its schedulers' state under internal_states."""
        return self.get("/server_info")

    def loads(self) -> list[dict[str, Any]]:
        """What each scheduler was doing when it last said so: num_running_reqs, num_waiting_reqs, num_used_tokens,
        timestamp, ... SGLang's process for HTTP answers, from memory that the schedulers write to as they get on."""
        return self.get("/v1/loads")["loads"]

    def release_memory(self) -> None:
        """Give back the memory of weights, cache and CUDA graphs; what is still in hand is aborted.

        SGLang's scheduler dies of this call while it has a request, so its cache is flushed before, which waits until
        it has none and is refused where that does not come. Raises ServerError.
        """
        self.abort()
        self.post(f"/flush_cache?timeout={self.timeout_s:g}")
        self.post("/release_memory_occupation")

    def resume_memory(self, part: ServerPart) -> None:
        """Memory for the weights, or for all else; what was in it is gone, and of the weights must be sent."""
        self.post(
            "/resume_memory_occupation", {"tags": ["weights"] if part == "weights" else ["kv_cache", "cuda_graph"]}
        )

    def flush_cache(self) -> None:
        """Forget all cached prefixes. ServerError when requests are still running."""
        self.post("/flush_cache")

    def pause(self, mode: PauseMode = "in_place") -> None:
        """Stop generating.

        abort: running requests end and return what they have. in_place: they wait and keep their KV cache.
        retract: they wait, and recompute their KV cache (under the weights of then) when they go on.
        """
        self.post("/pause_generation", {"mode": mode})

    def resume(self) -> None:
        """Go on after `pause`."""
        self.post("/continue_generation")

    def abort(self, request_id: str | None = None) -> None:
        """End one request, or all of them; each returns what it has, with finish_reason "abort"."""
        self.post("/abort_request", {"abort_all": True} if request_id is None else {"rid": request_id})

    def begin_weight_update(self) -> None:
        """Open the session without which SGLang refuses new weights."""
        self.post("/begin_weight_update")

    def end_weight_update(self) -> None:
        """Close it; quantized weights are packed here."""
        self.post("/end_weight_update")

    def set_weight_version(self, version: int) -> None:
        """Name the weights now loaded; every token sampled from now on carries the number."""
        self.post("/update_weight_version", {"new_version": str(version), "abort_all_requests": False})

    def weight_version(self) -> int:
        """The number that `set_weight_version` gave last; 0 at start-up."""
        return int(self.model_info()["weight_version"])

    def checksums(self) -> list[dict[str, str]]:
        """SGLang's checksum of every parameter, by SGLang's own fused names: one dict per tensor-parallel rank."""
        answer = self.post("/weights_checker", {"action": "checksum"})
        return [rank["checksums"] for rank in answer["ranks"]]

    def held_weights(self, tensors: Sequence[tuple[str, str, Sequence[int]]]) -> list[HeldWeights]:
        """What the server holds of each tensor (Hugging Face name, dtype, shape), one answer a rank of the server.

        Of no tensors, the answers name all parameters. Raises ServerError where the server cannot say.
        """
        body = {"action": HELD_WEIGHTS, "skip_tensor_list": [json.dumps(list(tensors))], "selector": "target"}
        out = []
        for rank in self.post("/weights_checker", body)["ranks"]:
            lines, mark = rank["checksums"], "parameter "
            parameters = [name.removeprefix(mark) for name in lines if name.startswith(mark)]
            pairs = {name: line.split() for name, line in lines.items() if not name.startswith(mark)}
            out.append(
                HeldWeights({n: (int(elements), int(value)) for n, (elements, value) in pairs.items()}, parameters)
            )
        return out
