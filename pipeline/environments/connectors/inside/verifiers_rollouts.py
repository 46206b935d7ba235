"""Rollouts of an environment of `verifiers`, in the Python that has it: lines of JSON in, lines of JSON out.

    python verifiers_rollouts.py '{"environment": "NAME", "arguments": {}, "directory": null}'

    out  {"ready": {"environment": "NAME"}}, or {"error": "..."} and the end
    in   {"id": 1, "rows": {"split": "train", "limit": 100}}
    out  {"id": 1, "answer": [...]}
    in   {"id": 2, "rollout": {"row": {...}, "url": "...", "key": "...", "model": "..."}}
    out  {"id": 2, "answer": {"reward": 1.0, "metrics": {...}, "error": null, "stop": "..."}}
         or {"id": 2, "error": "..."}
    in   {"cancel": 2}

Rollouts are asked for at any time and go on at once. What the environment prints goes to standard error. It ends, with
all that it started, when its standard input is closed.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

INSTALL = f"{sys.executable} -m pip install 'verifiers>=0.1.9,<0.4'"
Say = Callable[[dict[str, Any]], None]


class Unusable(Exception):
    """The environment cannot be used; the message says what to change."""


def load(settings: dict[str, Any]) -> Any:
    """The environment. Raises Unusable."""
    name, arguments = settings["environment"], settings["arguments"]
    if settings.get("directory"):
        sys.path.insert(0, settings["directory"])
    try:
        library = importlib.import_module("verifiers")
    except ImportError as error:
        raise Unusable(
            f"{sys.executable} has no verifiers ({error}): name one that has it in environment.options.python, or "
            f"{INSTALL}"
        ) from error
    version = getattr(library, "__version__", "of an unknown version")
    try:
        make = library.load_environment
    except AttributeError as error:
        raise Unusable(f"verifiers {version} has no load_environment: {INSTALL}") from error
    try:
        made = make(name, **arguments)
    except BaseException as error:  # an environment may raise anything
        reason = error if error.__cause__ is None else f"{error} ({error.__cause__})"
        raise Unusable(f"verifiers cannot load {name!r} with {arguments}: {type(error).__name__}: {reason}") from error
    if not hasattr(made, "run_rollout"):
        raise Unusable(f"verifiers {version} has no run_rollout: {INSTALL}")
    if getattr(made, "requires_group_rollouts", False):
        raise Unusable(f"{name!r} scores groups, not single attempts; that cannot be done")
    return made


def rows(environment: Any, split: str, limit: int) -> list[dict[str, Any]]:
    """Rows of its data set, as JSON has them; limit: -1 for all."""
    table = environment.get_eval_dataset(n=limit) if split == "eval" else environment.get_dataset(n=limit)
    return json.loads(json.dumps(list(table), default=str))


async def rollout(environment: Any, asked: dict[str, Any]) -> dict[str, Any]:
    """One attempt at a row, led over the address."""
    httpx, openai = importlib.import_module("httpx"), importlib.import_module("openai")
    direct = httpx.AsyncClient(trust_env=False, timeout=None)  # no proxy stands before the address
    async with openai.AsyncOpenAI(
        base_url=asked["url"], api_key=asked["key"], max_retries=0, http_client=direct
    ) as native:
        told = await environment.run_rollout(asked["row"], wrapped(native), asked["model"], {})
    metrics = {name: float(value) for name, value in (told.get("metrics") or {}).items() if is_number(value)}
    return {
        "reward": told.get("reward"),
        "metrics": metrics,
        "error": reason(told.get("error")),
        "stop": told.get("stop_condition"),
    }


def wrapped(native: Any) -> Any:
    """The client as this version takes it."""
    try:
        return importlib.import_module("verifiers.clients").OpenAIChatCompletionsClient(native)
    except (ImportError, AttributeError):
        return native


def is_number(value: Any) -> bool:
    """Whether a metric says something: None and texts do not."""
    return isinstance(value, int | float) and value == value


def reason(error: Any) -> str | None:
    """Why a rollout ended early, in words; None: it did not."""
    if not error:
        return None
    return str((error.get("error_chain_str") or error.get("error") or error) if isinstance(error, dict) else error)


async def serve(environment: Any, say: Say) -> None:
    """Answer what comes in, until the run is gone."""
    loop, came = asyncio.get_running_loop(), asyncio.Queue()
    threading.Thread(target=listen, args=(loop, came), daemon=True).start()
    working: dict[int, asyncio.Task[None]] = {}

    async def work(asked: dict[str, Any]) -> None:
        try:
            if "rows" in asked:
                answer: Any = await asyncio.to_thread(rows, environment, **asked["rows"])
            else:
                answer = await rollout(environment, asked["rollout"])
            say({"id": asked["id"], "answer": answer})
        except asyncio.CancelledError:
            pass
        except BaseException as error:  # of an environment's code
            say({"id": asked["id"], "error": f"{type(error).__name__}: {error}"})
        finally:
            del working[asked["id"]]

    while True:
        asked = await came.get()
        if "cancel" in asked:
            if (task := working.get(asked["cancel"])) is not None:
                task.cancel()
        else:
            working[asked["id"]] = asyncio.create_task(work(asked))


def listen(loop: asyncio.AbstractEventLoop, came: asyncio.Queue[dict[str, Any]]) -> None:
    """Hand over the lines of standard input, and end everything with it."""
    for line in sys.stdin:
        loop.call_soon_threadsafe(came.put_nowait, json.loads(line))
    os.killpg(0, signal.SIGKILL)


def main(settings: dict[str, Any]) -> None:
    """Load, say so, and serve."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    one = threading.Lock()

    def say(told: dict[str, Any]) -> None:
        with one:
            answers.write(json.dumps(told, default=str) + "\n")
            answers.flush()

    try:
        environment = load(settings)
    except Unusable as error:
        say({"error": str(error)})
        sys.exit(2)
    say({"ready": {"environment": settings["environment"]}})
    asyncio.run(serve(environment, say))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
