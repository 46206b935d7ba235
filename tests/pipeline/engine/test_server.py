"""The life of a server process tree: how it starts, fails, and ends, whoever ends first."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from pipeline.config.server import ServerConfig
from pipeline.engine.client import SGLangClient
from pipeline.engine.control import SGLangControl
from pipeline.engine.processes import TOKEN_VARIABLE, processes_of, shared_memory_of
from pipeline.engine.sampling import Sampling
from pipeline.engine.server import ServerError, SGLangServer, reserve_port
from pipeline.forks import FORKS_VARIABLE
from tests.support.processes import command_line
from tests.support.sampling import sampling_begins

pytestmark = pytest.mark.usefixtures("preloaded")
SHAPE = {"vocab_size": 512, "num_layers": 4, "topk": 2, "num_experts": 8}


def make_server(model, folder, **config):
    return SGLangServer(
        ServerConfig(context_length=1024, startup_timeout_s=240, **config),
        model,
        folder / "sglang.log",
        device="cpu",
        seed=0,
        return_routed_experts=True,
    )


def wait_until_gone(token, timeout_s):
    """Seconds until no process carries the token."""
    began = time.monotonic()
    while processes_of(token):
        assert time.monotonic() - began < timeout_s, [p.cmdline() for p in processes_of(token)]
        time.sleep(0.1)
    return time.monotonic() - began


def wait_until_removed(folder, timeout_s):
    began = time.monotonic()
    while folder.exists():
        assert time.monotonic() - began < timeout_s, folder
        time.sleep(0.1)


def test_a_port_in_use_is_refused_before_anything_starts(tiny_model_dir, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        server = make_server(tiny_model_dir, tmp_path, port=port)
        with pytest.raises(ServerError, match=rf"127\.0\.0\.1:{port}: Address already in use"):
            server.start()
    assert not server.alive()
    assert not server.log_path.exists()


def test_a_missing_model_directory_is_refused_by_name(tmp_path):
    with pytest.raises(ServerError, match=r"no model at .*nowhere"):
        make_server(tmp_path / "nowhere", tmp_path).start()


def test_a_server_that_ends_while_starting_is_reported_at_once_with_its_log(tiny_model_dir, tmp_path):
    server = make_server(tiny_model_dir, tmp_path)
    try:
        server.start()
        server.log_path.write_text("the last words\n")
        os.kill(server.pid, signal.SIGKILL)
        with pytest.raises(ServerError, match=r"ended with code -9(?s:.)*sglang\.log(?s:.)*the last words"):
            server.wait_ready(60)
    finally:
        server.stop()


def test_a_server_whose_environment_cannot_be_read_yet_is_stopped_all_the_same(tiny_model_dir, tmp_path, monkeypatch):
    """Between fork and exec it has none; to be stopped just then is too rare to wait for."""
    monkeypatch.setattr("pipeline.engine.processes.processes_of", lambda token: [])
    server = make_server(tiny_model_dir, tmp_path)
    server.start()
    process = server.pid
    stopping = threading.Thread(target=server.stop, daemon=True)
    stopping.start()
    stopping.join(20)
    ended = not stopping.is_alive()
    if not ended:
        os.kill(process, signal.SIGKILL)
    assert ended


def test_a_server_that_logs_a_fatal_error_is_not_waited_for(tiny_model_dir, tmp_path):
    server = make_server(tiny_model_dir, tmp_path)
    try:
        server.start()
        server.log_path.write_text("[2026-01-01] Scheduler hit an exception: Traceback (most recent call last):\n")
        with pytest.raises(ServerError, match=r"failed while starting(?s:.)*hit an exception"):
            server.wait_ready(5)
    finally:
        server.stop()


def test_a_server_that_ends_as_soon_as_it_has_answered_is_reported_with_its_log(tiny_model_dir, tmp_path):
    server = make_server(tiny_model_dir, tmp_path)
    server._port = reserve_port("127.0.0.1", None)
    server.log_path.write_text("the last words\n")
    with pytest.raises(ServerError, match=r"/freeze_gc: Client(?s:.)*the last words"):
        server._freeze_garbage_collection()


def test_a_server_that_is_too_slow_is_reported_and_stop_ends_it(tiny_model_dir, tmp_path):
    server = make_server(tiny_model_dir, tmp_path)
    server.start()
    with pytest.raises(ServerError, match=r"did not answer in 0\.1 s"):
        server.wait_ready(0.1)
    token = psutil.Process(server.pid).environ()[TOKEN_VARIABLE]  # empty for a moment while the process begins
    assert server.alive()
    server.stop()
    server.stop()
    assert not server.alive()
    assert not processes_of(token)


def test_the_url_is_refused_before_the_start(tiny_model_dir, tmp_path):
    with pytest.raises(ServerError, match="not been started"):
        _ = make_server(tiny_model_dir, tmp_path).url


def test_the_shared_server_runs_on_the_batched_backend_and_owns_shared_memory(server):
    token = psutil.Process(server.pid).environ()[TOKEN_VARIABLE]
    info = SGLangControl(server.url, keys=server.keys).server_info()
    assert info["attention_backend"] == "sameroute_cpu"
    assert len(processes_of(token)) >= 3
    assert shared_memory_of(token)


@pytest.mark.slow
def test_a_killed_scheduler_fails_its_requests_in_time_and_leaves_nothing(tiny_model_dir, tmp_path):
    server = make_server(tiny_model_dir, tmp_path)
    with server:
        token = psutil.Process(server.pid).environ()[TOKEN_VARIABLE]
        files = shared_memory_of(token)
        client = SGLangClient(server.url, **SHAPE, keys=server.keys, log_path=server.log_path)
        (scheduler,) = [p for p in processes_of(token) if "scheduler" in command_line(p)]

        async def generate_and_kill():
            async with client:
                task = asyncio.create_task(client.sample([1, 2, 3], Sampling(900, 1.0, ignore_eos=True)))
                await sampling_begins(server)
                scheduler.kill()
                return await task

        began = time.monotonic()
        with pytest.raises(ServerError, match=r"sglang\.log"):
            asyncio.run(generate_and_kill())
        assert time.monotonic() - began < 20
        with pytest.raises(ServerError, match=r"sglang\.log"):
            client.flush_cache()
    assert not processes_of(token)
    assert files
    assert not any(file.exists() for file in files)


PARENT = """
import sys, time
from pathlib import Path
from pipeline.config.server import ServerConfig
from pipeline.engine.server import SGLangServer
server = SGLangServer(ServerConfig(context_length=1024), Path(sys.argv[1]), Path(sys.argv[2]) / "sglang.log",
                      device="cpu", seed=0, return_routed_experts=True)
server.start()
print(server.pid, flush=True)
server.wait_ready()
print("ready", flush=True)
time.sleep(600)
"""
IMPORTING = """
from pipeline.engine.inside import preloaded
from pipeline.config.server import ServerConfig
importing = preloaded.importing(ServerConfig())
importing.__enter__()
"""


@pytest.mark.proof
def test_where_the_process_that_forks_is_gone_a_server_makes_its_imports_itself(tiny_model_dir, tmp_path, monkeypatch):
    (tmp_path / "forks").touch()  # nobody listens there
    monkeypatch.setenv(FORKS_VARIABLE, str(tmp_path / "forks"))
    with make_server(tiny_model_dir, tmp_path) as server:
        assert "no process forks at" in server.log_path.read_text()


def test_a_server_whose_parent_is_killed_while_it_makes_its_imports_itself_ends(tiny_model_dir, tmp_path):
    plain = {name: value for name, value in os.environ.items() if name != FORKS_VARIABLE}
    command = [sys.executable, "-c", PARENT, str(tiny_model_dir), str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=plain) as parent:
        assert parent.stdout is not None
        process = psutil.Process(int(parent.stdout.readline()))
        while "torch" not in " ".join(mapped.path for mapped in process.memory_maps()):  # its imports have begun
            time.sleep(0.02)
        environment = process.environ()
        parent.kill()
    wait_until_gone(environment[TOKEN_VARIABLE], timeout_s=15)
    assert not Path(environment["TMPDIR"]).exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "how",
    [pytest.param("plain", marks=pytest.mark.proof), pytest.param("importing", marks=pytest.mark.proof), "forked"],
)
def test_a_killed_parent_takes_the_whole_server_with_it(tiny_model_dir, tmp_path, how):
    """importing: as `train` has it, forked from a process that the parent has let make the imports."""
    environment = {name: value for name, value in os.environ.items() if how == "forked" or name != FORKS_VARIABLE}
    program = IMPORTING + PARENT if how == "importing" else PARENT
    command = [sys.executable, "-c", program, str(tiny_model_dir), str(tmp_path)]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert parent.stdout is not None
    try:
        pid = int(parent.stdout.readline())
        assert parent.stdout.readline() == "ready\n"
        environment = psutil.Process(pid).environ()
        token, scratch = environment[TOKEN_VARIABLE], Path(environment["TMPDIR"])
        forks = Path(environment[FORKS_VARIABLE]) if how == "importing" else None
        assert forks is None or forks.exists()
        files = shared_memory_of(token)
        assert len(processes_of(token)) >= 3
        os.kill(parent.pid, signal.SIGKILL)
    finally:
        parent.kill()
        parent.wait()
    wait_until_gone(token, timeout_s=15)
    wait_until_removed(scratch, timeout_s=15)
    if forks is not None:
        wait_until_removed(forks.parent, timeout_s=15)
    assert files
    assert not any(file.exists() for file in files)
