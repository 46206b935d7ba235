"""The process that becomes the server: `python -m pipeline.engine.inside.serve PARENT_PID [SGLang's arguments]`.

It adds two things to SGLang's own entry point. The server's keys come by standard input, where no list of processes
shows them. And when the process PARENT_PID is gone, even by SIGKILL, the whole server goes too. The parent is polled
rather than watched with PR_SET_PDEATHSIG, because that signal is sent when the *thread* that started the child ends,
and a server may be started from a short-lived thread.
SGLang's schedulers and detokenizers follow this process by PR_SET_PDEATHSIG of their own.
Where a process forks servers (`preloaded.py`), this one lets it, and waits for the one it got.
"""

from __future__ import annotations

import importlib
import os
import sys
import threading
import time
from pathlib import Path

from pipeline.engine.keys import ServerKeys
from pipeline.engine.processes import TOKEN_VARIABLE, remove_files, remove_server, shared_memory_of
from pipeline.forks import FORKS_VARIABLE, ForkError, ask, end_as
from pipeline.imports import lasting_imports

_POLL_S = 0.5

if __name__ in ("__main__", "__mp_main__"):  # also in the processes that SGLang spawns
    # SGLang's debug dumper imports Megatron-Core where it finds it: 1 s, and it replaces torch's unpickling.
    sys.modules["megatron"] = None  # pyright: ignore[reportArgumentType]


def leave() -> None:
    """End the whole server, this process last. What it has made goes first: SGLang watches its schedulers, and once one
    of them is gone it ends this process too."""
    token, scratch = os.environ[TOKEN_VARIABLE], Path(os.environ["TMPDIR"])
    try:
        shared_memory = shared_memory_of(token)
        remove_files(scratch, shared_memory)
        remove_server(token, scratch, shared_memory)
    finally:
        os._exit(1)


def _end_with_parent(parent_pid: int) -> None:
    while os.getppid() == parent_pid:
        time.sleep(_POLL_S)
    leave()


def _take_keys() -> ServerKeys:
    """From standard input, which is empty from then on."""
    keys = ServerKeys.from_bytes(os.read(0, 4096))  # what was written at once is read at once
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    return keys


def serve(arguments: list[str]) -> None:
    """Serve under SGLang's `arguments`; returns when the server has been asked to stop."""
    keys = _take_keys()
    with lasting_imports():
        from sglang.launch_server import run_server
        from sglang.srt.plugins import load_plugins
        from sglang.srt.server_args import prepare_server_args

        load_plugins()
        importlib.import_module("sglang.srt.entrypoints.http_server")  # what run_server imports
    server_args = prepare_server_args(arguments)
    server_args.api_key, server_args.admin_api_key = keys.api, keys.admin
    run_server(server_args)


def main() -> None:
    """Watch the parent and serve."""
    parent_pid = int(sys.argv[1])
    watch = threading.Thread(target=_end_with_parent, args=(parent_pid,), daemon=True)
    watch.start()
    if FORKS_VARIABLE in os.environ:
        code, failed = None, None
        try:
            code = ask(os.environ[FORKS_VARIABLE], sys.argv[2:])
        except ForkError as error:  # its imports failed, or it is gone; a child of it ends all that has this token
            failed = error
        if os.getppid() != parent_pid:
            watch.join()  # the server was ended here; this process ends once what it left is removed
        if code is not None:
            end_as(code)
        print(f"{failed}; this process makes the imports itself", file=sys.stderr, flush=True)
    serve(sys.argv[2:])  # its imports take seconds, in which the parent may already be gone


if __name__ == "__main__":
    main()
