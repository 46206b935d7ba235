"""Start, watch and stop one SGLang server (0.5.23) as a child of this process, on GPUs or on the CPU.

start() returns at once, wait_ready() when the server answers; in between the caller may start other things.
Whatever way this process ends, no process of the server outlives it (`inside/serve.py`).
"""

from __future__ import annotations

import json
import os
import random
import re
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from megatron_ext.hf.families import FAMILIES
from pipeline import http
from pipeline.cluster.loopback import is_loopback, loopback_environment
from pipeline.cluster.stacks import ProcessStacks, stacks_of
from pipeline.cluster.threads import thread_environment
from pipeline.config.precision import PrecisionConfig
from pipeline.config.server import CAPTURING, ServerConfig
from pipeline.deaf import deaf_children
from pipeline.engine.keys import ServerKeys
from pipeline.engine.processes import TOKEN_VARIABLE, processes_of, remove_server, shared_memory_of
from pipeline.errors import NOT_STARTED, SamerouteError
from pipeline.imports import own_folder
from pipeline.say import to_stderr
from pipeline.socket_folder import make_socket_folder
from pipeline.waiting import START_S, Waiting

CPU_ATTENTION_BACKEND = "sameroute_cpu"
_CPU_TOTAL_TOKENS = 65_536
FREE_PORTS = range(20_000, 32_000)
CPU_STUBS = Path(__file__).parent / "inside" / "cpu" / "stub"
_LOG_TAIL_LINES = 30
_START_S, _START_S_PER_GB = 600.0, 3.0  # a file system of many readers gives each a third of a GB a second at least
_LONGEST_SCRATCH = 60  # bytes; behind it stand names as multiprocessing's /pymp-abcdefgh/listener-abcdefgh

# SGLang logs these and goes on waiting, or goes on without what failed.
_FATAL_LOG_LINE = re.compile(
    r"Scheduler hit an exception|Failed to (load|execute)( general)? plugin:? sameroute|Failed to apply hooks"
    r"|error while attempting to bind on address"
)


class ServerError(SamerouteError):
    """The rollout engine could not be started, died, or cannot be reached."""


class PortError(ServerError):
    """A port cannot be had, found before anything was started."""

    exit_code = NOT_STARTED


class NodeGoneError(ServerError):
    """The machine of a server is gone, so it cannot be started again."""


_FULL = PrecisionConfig()  # pyright: ignore[reportCallIssue]


class SGLangServer:
    """One server process tree.

    model_path: Hugging Face folder (config, weights). log_path: file that gets all output of the server.
    device: "cpu" or "cuda". precision: what it computes with. seed: of the sampler.
    trust_remote_code: let SGLang run the Python code that the folder's config.json names.
    base_gpu: the first of the GPUs that this process sees which the server takes. environment: further variables.
    return_routed_experts: let requests ask for the experts of every token (mixture-of-experts models only).
    memory_saver: it can give its GPUs' memory away and take it back.
    keys: that open it; None: a pair of its own.
    """

    def __init__(
        self,
        config: ServerConfig,
        model_path: Path,
        log_path: Path,
        *,
        device: Literal["cpu", "cuda"],
        seed: int,
        return_routed_experts: bool,
        precision: PrecisionConfig = _FULL,
        trust_remote_code: bool = False,
        keys: ServerKeys | None = None,
        base_gpu: int = 0,
        environment: Mapping[str, str] | None = None,
        memory_saver: bool = False,
    ) -> None:
        self.config = config
        self.model_path = Path(model_path)
        self.log_path = Path(log_path)
        self.device: Literal["cpu", "cuda"] = device
        self.precision = precision
        self.trust_remote_code = trust_remote_code
        self.keys = keys or ServerKeys.random()
        self.seed = seed
        self.return_routed_experts = return_routed_experts
        self.base_gpu, self.environment, self.memory_saver = base_gpu, dict(environment or {}), memory_saver
        self._port: int | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._token = secrets.token_hex(6)
        self._scratch: Path | None = None
        self._shared_memory: set[Path] = set()
        self._log_start = 0

    @property
    def url(self) -> str:
        """http://host:port of the started server. Raises ServerError before start()."""
        if self._port is None:
            raise ServerError("the SGLang server has not been started")
        return f"http://{self.config.host}:{self._port}"

    @property
    def pid(self) -> int:
        """Process id of the server's first process. Raises ServerError before start()."""
        if self._process is None:
            raise ServerError("the SGLang server has not been started")
        return self._process.pid

    def start(self) -> None:
        """Start the server's processes and return; raises ServerError when they could never work."""
        if self._process is not None:
            raise ServerError("this SGLang server has already been started")
        if not (self.model_path / "config.json").is_file():
            raise ServerError(f"no model at {self.model_path}: there is no config.json")
        self._port = reserve_port(self.config.host, self.config.port)
        try:
            self._scratch = make_socket_folder(_LONGEST_SCRATCH)
        except OSError as error:
            raise ServerError(str(error)) from error
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        # -P: what lies in the working directory is no part of the path.
        command = [sys.executable, "-P", "-m", "pipeline.engine.inside.serve", str(os.getpid()), *self.arguments()]
        with self.log_path.open("ab" if self._log_start else "wb") as log, deaf_children():
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=self._environment(),
            )
        assert self._process.stdin is not None
        try:
            with self._process.stdin as pipe:
                pipe.write(self.keys.to_bytes())
        except BrokenPipeError:  # it has ended already; `wait_ready` says how
            return

    def restart(self) -> None:
        """End whatever is left of the server and start it again, in the same log; `wait_ready` follows. It has another
        port where none is configured. Raises ServerError as `start` and `stop` do."""
        self.stop()
        self._process, self._token, self._shared_memory = None, secrets.token_hex(6), set()
        self._log_start = self.log_path.stat().st_size if self.log_path.exists() else 0
        self.start()

    def arguments(self) -> list[str]:
        """SGLang's command line. Raises ServerError before start(), which settles the port."""
        config = self.config
        if self._port is None:
            raise ServerError("the SGLang server has not been started")
        arguments = {
            "--model-path": self.model_path,
            "--host": config.host,
            "--port": self._port,
            "--device": self.device,
            "--random-seed": self.seed,
            "--tp-size": config.tensor_parallel,
            "--context-length": config.context_length,
            "--max-running-requests": config.max_running_requests,
            "--max-total-tokens": config.max_total_tokens,
            "--mem-fraction-static": config.mem_fraction_static,
            "--attention-backend": config.attention_backend,
            "--base-gpu-id": self.base_gpu or None,
            "--weight-version": 0,
            "--log-level-http": "warning",
        }
        # Prompts and answers travel as token ids, so neither SGLang's tokenizer nor its detokenizer is needed.
        flags = ["--skip-tokenizer-init", "--incremental-streaming-output"]
        if self.return_routed_experts:
            flags.append("--enable-return-routed-experts")
        if self.device == "cuda":
            flags += ["--enable-memory-saver"] * self.memory_saver
            arguments["--attention-backend"] = self.precision.cache_backend(config.attention_backend)
            if self.return_routed_experts:
                arguments["--moe-runner-backend"] = config.moe_runner or CAPTURING[0]
                flags.append("--disable-shared-experts-fusion")  # as one more expert it has no place among the routes
        if self.trust_remote_code:
            flags.append("--trust-remote-code")
        if config.deterministic:
            flags.append("--enable-deterministic-inference")
        if not (self.device == "cuda" if config.prefix_cache is None else config.prefix_cache):
            flags.append("--disable-radix-cache")
        if not (self.device == "cuda" if config.overlap_schedule is None else config.overlap_schedule):
            flags.append("--disable-overlap-schedule")
        if self.device == "cpu":
            plain = self.precision.weights == "float32" and self.precision.kv_cache == "same"
            batched = CPU_ATTENTION_BACKEND if plain else "torch_native"
            arguments["--attention-backend"] = config.attention_backend or batched
            arguments["--max-total-tokens"] = config.max_total_tokens or max(
                _CPU_TOTAL_TOKENS, config.context_length or 0
            )
            arguments["--sampling-backend"] = "pytorch"
            # Nothing is compiled on the CPU, so there is nothing to warm up.
            flags += ["--skip-server-warmup", "--sleep-on-idle"]
            flags += ["--cuda-graph-backend-decode", "disabled", "--cuda-graph-backend-prefill", "disabled"]
        flags += self._family_arguments()
        pairs = [text for name, value in arguments.items() if value is not None for text in (name, str(value))]
        return pairs + flags + self.precision.server_arguments() + config.extra_args

    def _family_arguments(self) -> list[str]:
        """What the model's family needs, of SGLang's command line."""
        written = json.loads((self.model_path / "config.json").read_bytes())
        if (family := FAMILIES.get(written.get("model_type"))) is None:
            return []
        arguments = list(family.server_cpu_arguments if self.device == "cpu" else family.server_gpu_arguments)
        if missing := {name: value for name, value in family.server_fields(written).items() if name not in written}:
            arguments += ["--json-model-override-args", json.dumps(missing)]
        return arguments

    def environment_of_imports(self) -> dict[str, str]:
        """What its process has in its environment, but for what is its own."""
        return {k: v for k, v in self._environment().items() if k not in (TOKEN_VARIABLE, "TMPDIR")}

    def _environment(self) -> dict[str, str]:
        environment = dict(os.environ)
        environment[TOKEN_VARIABLE] = self._token
        environment["TMPDIR"] = str(self._scratch)
        environment["SPT_NOENV"] = "1"  # else setproctitle overwrites the environment that carries the token
        environment["HF_HUB_OFFLINE"] = "1"  # the model is a local folder
        kept = Path("~/.cache/sglang").expanduser()  # where it keeps what it compiles, unless it is told
        if "SGLANG_CACHE_DIR" not in environment and not _may_write(kept):
            to_stderr(
                f"{kept} cannot be written: a server compiles again at each start; set SGLANG_CACHE_DIR to a folder"
            )
            environment["SGLANG_CACHE_DIR"] = str(self._scratch)
        environment |= _without_proxy(self.config.host)
        if is_loopback(self.config.host):
            environment |= loopback_environment()
        environment |= self.precision.server_environment()
        environment |= self.environment
        paths = own_folder()
        if self.device == "cpu":
            environment["SGLANG_USE_CPU_ENGINE"] = "1"
            environment["CUDA_VISIBLE_DEVICES"] = ""
            environment |= thread_environment(self.config.cpu_threads or 1)
            environment["TORCHDYNAMO_DISABLE"] = "1"  # importing and compiling costs more than it brings
            environment["SGLANG_EXTERNAL_MODEL_PACKAGE"] = "pipeline.engine.inside.cpu.models"
            if self.config.tensor_parallel > 1:  # SGLang wants as many NUMA nodes, or to be told which core each takes
                cores = sorted(os.sched_getaffinity(0))
                chosen = [str(cores[rank % len(cores)]) for rank in range(self.config.tensor_parallel)]
                environment["SGLANG_CPU_OMP_THREADS_BIND"] = "|".join(chosen)
                environment["SGLANG_NCCL_SO_PATH"] = "none"  # it finds NCCL installed and takes that for a GPU
            paths.append(str(CPU_STUBS))
        paths.append(environment.get("PYTHONPATH", ""))
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        return environment

    def wait_ready(self, timeout_s: float | None = None) -> None:
        """Block until the server answers.

        timeout_s: seconds from now; None takes `startup_timeout_s`.
        Raises ServerError with the end of the log when the server dies, reports a fatal error, or is too slow.
        """
        timeout_s = timeout_s or self.config.startup_timeout_s or startup_timeout(self.model_path)
        deadline, wait = time.monotonic() + timeout_s, Waiting().begin("starting", START_S)
        while True:
            wait.look(lambda: f"the SGLang server (log: {self.log_path})")
            if not self.alive():
                code = None if self._process is None else self._process.returncode
                raise ServerError(f"the SGLang server ended with code {code} while starting\n{self.log_tail()}")
            if self._answers():
                self._shared_memory = shared_memory_of(self._token)
                self._freeze_garbage_collection()
                return
            if _FATAL_LOG_LINE.search(self._log_text()):
                raise ServerError(f"the SGLang server failed while starting\n{self.log_tail()}")
            if time.monotonic() > deadline:
                raise ServerError(f"the SGLang server did not answer in {timeout_s:g} s\n{self.log_tail()}")
            time.sleep(0.1)

    def _answers(self) -> bool:
        try:
            return http.request("GET", f"{self.url}/ready", timeout_s=5).status == 200
        except (http.HttpError, TimeoutError):  # not listening yet
            return False

    def _freeze_garbage_collection(self) -> None:
        """Take what start-up made out of every later collection, which is 0.5 s of each in each process.

        SGLang does it after its own warm-up; without one it tries before the port is open, and fails.
        """
        if self.device == "cpu":
            try:
                answer = http.request("POST", f"{self.url}/freeze_gc", key=self.keys.admin, timeout_s=60)
            except (http.HttpError, TimeoutError) as error:  # it has ended since it answered, or hangs
                raise ServerError(f"{self.url}/freeze_gc: {error!r}\n{self.log_tail()}") from error
            if answer.status != 200:
                raise ServerError(f"{self.url}/freeze_gc answered {answer.status}: {answer.text[:1000]}")

    def alive(self) -> bool:
        """Whether the server's first process runs; SGLang ends it when a scheduler dies."""
        return self._process is not None and self._process.poll() is None

    def stacks(self) -> list[ProcessStacks]:
        """Of all its processes, now."""
        found = stacks_of(sorted(process.pid for process in processes_of(self._token)))
        return [one for one in found if one.state != "gone"]  # between the listing and the reading

    def log_tail(self, lines: int = _LOG_TAIL_LINES) -> str:
        """The last lines of the log, under its path."""
        return "\n".join([f"{self.log_path}:", *self._log_text().splitlines()[-lines:]])

    def _log_text(self) -> str:
        """Since the last start."""
        if not self.log_path.exists():
            return ""
        with self.log_path.open("rb") as log:
            log.seek(self._log_start)
            return log.read().decode(errors="replace")

    def stop(self) -> None:
        """End every process of the server and remove what it left in /dev/shm and in the temporary folder.

        May be called at any time and again. Raises ServerError when a process cannot be killed.
        """
        if self._process is None or self._scratch is None:
            return
        self._process.kill()  # just started, it has no environment yet by which it could be found
        try:
            remove_server(self._token, self._scratch, self._shared_memory)
        except TimeoutError as error:
            raise ServerError(str(error)) from error
        self._process.wait()

    def __enter__(self) -> Self:
        self.start()
        try:
            self.wait_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def startup_timeout(model: Path) -> float:
    """Seconds in which a server must have read the weights in a directory and answer."""
    return _START_S + _START_S_PER_GB * sum(file.stat().st_size for file in model.glob("*.safetensors")) / 1e9


def _may_write(folder: Path) -> bool:
    """Whether this user may make files in a folder that need not be there yet."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    return os.access(there, os.W_OK)


def _without_proxy(host: str) -> dict[str, str]:
    """Variables under which the server's processes ask each other directly, whatever proxies the environment names."""
    hosts = [os.environ.get("no_proxy"), os.environ.get("NO_PROXY"), host, "127.0.0.1", "localhost"]
    value = ",".join(dict.fromkeys(filter(None, hosts)))
    return {"no_proxy": value, "NO_PROXY": value}


def reserve_port(host: str, port: int | None) -> int:
    """`port` if it can be bound, or a free one for None. Raises ServerError when it is in use.

    The server binds it only seconds later, so a free one is taken from below the range that the kernel hands out to
    whoever asks (32768 on Linux) and above Ray's (10002 to 19999): nobody else takes it meanwhile by chance.
    """
    candidates = [port] if port is not None else random.sample(FREE_PORTS, 50)
    for candidate in candidates:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, candidate))
            except OSError as error:
                reason = error.strerror
                continue
            return candidate
    raise ServerError(f"cannot listen on {host}:{port if port is not None else candidates}: {reason}")
