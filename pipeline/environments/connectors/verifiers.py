"""Environments of Prime Intellect's `verifiers`: their own rollouts and rubrics, over the address of a conversation.

    environment:
      function: pipeline.environments.connectors.verifiers:Verifiers
      options: {environment: NAME, arguments: {...}, python: .venv/verifiers/bin/python}

The environment is loaded once, in a process of the Python that has it, whose packages need not go with this one's. It
speaks to the policy as any client does (docs/endpoint.md). Its prompts are rows of its data set, which this writes:

    python -m pipeline.environments.connectors.verifiers NAME OUT.jsonl --python .venv/verifiers/bin/python
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.environments.connectors.peer import Child, ConnectorError, Peer, check_positive
from pipeline.environments.conversation import Conversation, LimitReached
from pipeline.environments.endpoint.listener import serve
from pipeline.environments.reward import Reward
from pipeline.types import Prompt

SCRIPT = Path(__file__).parent / "inside" / "verifiers_rollouts.py"
COLUMN = "verifiers"
"""Of a row of prompts: the row of the environment's data set that it was made of."""
_EMPTY = "EmptyModelResponseError"
"""verifiers' name for an answer without a character: the policy's doing, not the environment's."""


class Verifiers:
    """The environment `environment.function`."""

    def __init__(
        self,
        environment: str,
        python: str = sys.executable,
        arguments: Mapping[str, Any] | None = None,
        directory: str | None = None,
        variables: Sequence[str] = (),
        start_timeout_s: float = 120.0,
        empty_reward: float = 0.0,
    ):
        """environment: as load_environment takes it. python: that has it. arguments: of its load_environment.
        directory: where its module is looked for first. variables: that it gets though their names look like secrets.
        empty_reward: of a conversation in which the policy said nothing, which verifiers does not score.
        Raises ConnectorError where it cannot be loaded, or not in start_timeout_s."""
        check_positive(start_timeout_s=start_timeout_s)
        self._process = _process_of(environment, python, dict(arguments or {}), directory, tuple(variables))
        self._within_s, self._empty_reward = start_timeout_s, empty_reward
        self._process.peer(start_timeout_s)

    async def run(self, conversation: Conversation, prompt: Prompt) -> Reward:
        """Raises LimitReached where a limit ended the conversation, ConnectorError where something else did."""
        row = prompt.metadata.get(COLUMN)
        if not isinstance(row, dict):
            raise ConnectorError(
                f"the prompt has no column {COLUMN!r}; write prompts with python -m {__name__} NAME OUT.jsonl"
            )
        peer = await asyncio.to_thread(self._process.peer, self._within_s)
        try:
            async with serve(conversation) as address:
                asked = {"row": row, "url": address.url, "key": address.key, "model": address.model}
                told = await peer.ask(rollout=asked)
            if _EMPTY in (told["error"] or ""):
                return Reward(self._empty_reward, note="the policy said nothing")
            if told["error"] is not None or told["reward"] is None:
                raise ConnectorError(told["error"] or "the environment gave no reward")
        except ConnectorError as error:
            if conversation.cut is not None:
                raise LimitReached(str(error)) from error
            raise
        return Reward(float(told["reward"]), parts=told["metrics"], note=str(told["stop"] or ""))


class _Process:
    """The process of one environment, which is started again where it has died."""

    def __init__(self, python: str, settings: dict[str, Any], variables: tuple[str, ...]):
        self._python, self._settings, self._variables = python, settings, variables
        self._one, self._peer = threading.Lock(), None

    def peer(self, within_s: float) -> Peer:
        """Raises ConnectorError."""
        with self._one:
            if self._peer is None or not self._peer.alive:
                python = shutil.which(self._python)
                if python is None:
                    raise ConnectorError(f"there is no Python {self._python}; correct environment.options.python")
                command = [python, str(SCRIPT), json.dumps(self._settings)]
                what = f"the process of {self._settings['environment']}"
                self._peer = Peer(Child(command, what, variables=self._variables), within_s=within_s)
            return self._peer


_processes: dict[str, _Process] = {}
_one = threading.Lock()


def _process_of(
    environment: str, python: str, arguments: dict[str, Any], directory: str | None, variables: tuple[str, ...]
) -> _Process:
    """One for all threads of a run."""
    settings = {"environment": environment, "arguments": arguments, "directory": directory}
    key = json.dumps([python, settings, variables], default=str)
    with _one:
        return _processes.setdefault(key, _Process(python, settings, variables))


def write_prompts(rows: Sequence[Mapping[str, Any]], file: Path) -> None:
    """JSON lines for a source of prompts: the row's prompt as messages, its answer, and the row itself. Raises
    ConnectorError for a row that has no prompt."""
    lines = []
    for number, row in enumerate(rows):
        asked = row.get("prompt")
        messages = [{"role": "user", "content": asked}] if isinstance(asked, str) else asked
        if not messages:
            raise ConnectorError(f"row {number} of the environment has no prompt to begin with")
        lines.append(json.dumps({"messages": messages, "answer": row.get("answer") or "", COLUMN: row}))
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(line + "\n" for line in lines))


def main(arguments: Sequence[str]) -> None:
    """Write the prompts of an environment."""
    parser = argparse.ArgumentParser(prog=f"python -m {__spec__.name if __spec__ else __name__}", description=__doc__)
    parser.add_argument("environment")
    parser.add_argument("out", type=Path)
    parser.add_argument("--python", default=sys.executable, help="that has verifiers and the environment")
    parser.add_argument("--arguments", type=json.loads, default={}, help="of its load_environment, as JSON")
    parser.add_argument("--directory", help="where its module is looked for first")
    parser.add_argument("--split", choices=("train", "eval"), default="train")
    parser.add_argument("--limit", type=int, default=-1, help="rows; all where it is not given")
    given = parser.parse_args(arguments)
    try:
        process = _process_of(given.environment, given.python, given.arguments, given.directory, ())
        asked = {"split": given.split, "limit": given.limit}
        rows = asyncio.run(process.peer(600.0).ask(rows=asked))
        write_prompts(rows, given.out)
    except ConnectorError as error:
        sys.exit(f"error: {error}")
    print(f"{given.out}: {len(rows)} prompts of {given.environment}")


if __name__ == "__main__":
    main(sys.argv[1:])
