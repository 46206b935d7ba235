"""A verifier that does what its prompt's metadata says under "do", and the questions that ask it to."""

from __future__ import annotations

import asyncio
import ctypes
import os
import resource
import signal
import subprocess
import sys
import threading
import time
import uuid
from multiprocessing import resource_tracker

import numpy as np

from pipeline.rewards.protocol import Question, pack
from pipeline.types import Prompt

TAG = os.environ.setdefault("LEFT_BEHIND_BY_TESTS", f"sameroute-test-left-behind-{uuid.uuid4().hex}")
"""Stands in the command line of every process that is to be left behind. A variable of SAMEROUTE_ would not reach the
workers, which would have a tag of their own."""

SLEEP = [sys.executable, "-c", f"import time; time.sleep(1000)  # {TAG}"]


def question(do="right", index=0, **metadata):
    """One answer, "an answer"."""
    ids = np.arange(3, dtype=np.int32)
    return Question(Prompt(ids, "a question", {"do": do, **metadata}, index), "an answer", ids, "stop")


def verify(prompt, response_text, response_ids, finish_reason):
    """1.0, or what it was asked to do."""
    value = _DO[prompt.metadata["do"]](prompt.metadata)
    return 1.0 if value is None else None if value is _NONE else value


async def verify_later(prompt, response_text, response_ids, finish_reason):
    """The same, as a coroutine."""
    await asyncio.sleep(0.001)
    if prompt.metadata["do"] == "hang":
        await asyncio.sleep(1000)
    asyncio.create_task(asyncio.sleep(1000))  # noqa: RUF006  ends with the loop
    await asyncio.to_thread(time.sleep, 0.001)  # as does the loop's own thread
    return verify(prompt, response_text, response_ids, finish_reason)


def echo(prompt, response_text, response_ids, finish_reason):
    """Raises what it was given."""
    raise ValueError(repr((prompt, response_text, response_ids, finish_reason)))


def number(prompt, response_text, response_ids, finish_reason):
    """The answer as a number; raises for what is none, and ends its process for "!"."""
    if response_text == "!":
        os._exit(0)
    return float(response_text)


def _raise(metadata):
    raise ZeroDivisionError("no such thing")


def _hang_deaf(metadata):
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM):
        signal.signal(number, signal.SIG_IGN)
    time.sleep(1000)


def _spin(metadata):
    while True:
        pass


def _flood(metadata):
    for _ in range(100):
        os.write(metadata.get("to", 1), b"x" * (1 << 20))
    time.sleep(1000)


def _memory(metadata):
    kept = b"\1" * (2 << 30)
    time.sleep(1000)
    return len(kept)


def _memory_of_child(metadata):
    subprocess.run([sys.executable, "-c", f"b = b'1' * (2 << 30); import time; time.sleep(1000)  # {TAG}"])


def _deaf_grandchild(metadata):
    """Of its own session, without this environment, its parent gone, its signals ignored."""
    subprocess.run(["setsid", "sh", "-c", "trap '' TERM INT HUP; \"$@\" &", "sh", "env", "-i", *SLEEP])


def _fork_both_return(metadata):
    os.fork()


def _bomb(metadata):
    for _ in range(400):
        subprocess.Popen(SLEEP)
    time.sleep(1000)


def _junk(metadata):
    """Into every descriptor there is, the worker's own channel among them."""
    for descriptor in range(64):
        try:
            os.write(descriptor, b"\xff" * 64)
        except OSError:
            continue


def _forge(metadata):
    """A verdict on another answer."""
    for descriptor in range(3, 64):
        try:
            os.write(descriptor, pack(1 << 40, 0, 1.0))
        except OSError:
            continue


def _close_and_stay(metadata):
    os.closerange(0, 64)
    time.sleep(1000)


def _thread(metadata):
    threading.Thread(target=time.sleep, args=(1000,), name="stays", daemon=metadata.get("daemon", False)).start()


def _raise_interrupt(metadata):
    raise KeyboardInterrupt


def _raise_unprintable(metadata):
    class UnprintableError(Exception):
        def __str__(self):
            raise ValueError("no words")

    raise UnprintableError


_NONE = object()  # to be returned as None

_DO = {
    "right": lambda m: None,
    "value": lambda m: m["value"],
    "inf": lambda m: float("inf"),
    "nan": lambda m: np.float32("nan"),
    "large": lambda m: 1e39,
    "larger": lambda m: 10**400,
    "unprintable": lambda m: 10**5000,
    "largest": lambda m: float(np.finfo(np.float32).max),
    "true": lambda m: np.bool_(True),
    "half": lambda m: np.float16(0.5),
    "wide": lambda m: np.float64(1e300),
    "array": lambda m: np.zeros(1),
    "text": lambda m: "1.0",
    "nothing": lambda m: [],
    "complex": lambda m: 1j,
    "none": lambda m: _NONE,
    "generator": lambda m: (score for score in (1.0,)),
    "list": lambda m: [1.0],
    "mapping": lambda m: {"score": 1.0},
    "raise_interrupt": _raise_interrupt,
    "raise_unprintable": _raise_unprintable,
    "slow": lambda m: time.sleep(0.5),
    "hang": lambda m: time.sleep(1000),
    "hang_deaf": _hang_deaf,
    "spin": _spin,
    "raise": _raise,
    "raise_exit": lambda m: sys.exit(0),
    "interrupt": lambda m: signal.raise_signal(signal.SIGINT),
    "exit": lambda m: os._exit(0),
    "terminate": lambda m: os.kill(os.getpid(), signal.SIGTERM),
    "deaf_grandchild_and_hang": lambda m: _deaf_grandchild(m) or time.sleep(1000),
    "deaf_grandchild_and_kill": lambda m: _deaf_grandchild(m) or os.kill(os.getpid(), signal.SIGKILL),
    "kill": lambda m: os.kill(os.getpid(), signal.SIGKILL),
    "stop": lambda m: os.kill(os.getpid(), signal.SIGSTOP),
    "segfault": lambda m: ctypes.string_at(0),
    "abort": lambda m: os.abort(),
    "flood": _flood,
    "flood_error": lambda m: _flood({"to": 2}),
    "print": lambda m: print("a few words \ud800"),
    "memory": _memory,
    "memory_of_child": _memory_of_child,
    "raise_memory": lambda m: bytearray(1 << 60),
    "thread": _thread,
    "thread_that_ends": lambda m: threading.Thread(target=time.sleep, args=(0.05,)).start(),
    "child": lambda m: subprocess.Popen(SLEEP) and None,
    "child_that_ends": lambda m: subprocess.run(["true"]) and None,
    "child_not_waited_for": lambda m: subprocess.Popen(["true"]) and None,
    "deaf_grandchild": _deaf_grandchild,
    "fork": _fork_both_return,
    "bomb": _bomb,
    "junk": _junk,
    "forge": _forge,
    "close": lambda m: os.closerange(0, 64),
    "close_and_stay": _close_and_stay,
    "read_stdin": lambda m: float(len(sys.stdin.read())) + 1,
    "forget_and_hang": lambda m: subprocess.Popen(SLEEP, env={}, start_new_session=True) and time.sleep(1000),
    "kill_supervisor": lambda m: os.kill(os.getppid(), signal.SIGKILL) or time.sleep(1000),
    "modules": lambda m: float(sum(name in sys.modules for name in ("torch", "ray", "transformers", "pydantic"))),
    "environment": lambda m: float(m["name"] in os.environ),
    "helper_of_multiprocessing": lambda m: resource_tracker.ensure_running(),
    "core": lambda m: float(resource.getrlimit(resource.RLIMIT_CORE) == (0, 0)),
    "process": lambda m: float(os.getpid()),
    "descriptors": lambda m: float(len(os.listdir("/proc/self/fd"))),
    "change": lambda m: float(m.setdefault("count", []).append(1) or len(m["count"])),
}
