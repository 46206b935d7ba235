"""Where prompts come from: a synthetic task or a JSONL file, as a stream with a cursor that can be saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from pipeline.config.data import DataConfig
from pipeline.data.chat import DataError, answer_ids, chat_prompt
from pipeline.data.synthetic import Stream, SupervisedPair, SyntheticTask
from pipeline.data.tokenizer import load_tokenizer
from pipeline.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class _Prompts(Protocol):
    """Prompts and supervised pairs by position in an endless stream."""

    def prompt(self, index: int, stream: Stream) -> Prompt: ...
    def supervised(self, index: int) -> SupervisedPair: ...


class PromptSource:
    """A stream of prompts for one run, and what its answers stop at.

    The cursors of prompts and of supervised pairs move apart. Prompt `i` depends on the data and the seed only.
    """

    def __init__(self, config: DataConfig, model_path: str | Path, *, seed: int, stream: Stream = "train"):
        """model_path: Hugging Face directory whose tokenizer and generation_config.json count.

        stream: "held_out" gives a synthetic task's other questions; a file has one stream only.
        Raises DataError or FileNotFoundError (data or tokenizer), before any prompt is taken.
        """
        self.config = config
        self.stream: Stream = stream
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(model_path)
        self.stop_token_ids = stop_token_ids(model_path, self.tokenizer)
        if config.task is not None:
            self._data: _Prompts = SyntheticTask(config.task, self.tokenizer, seed)
        else:
            if stream != "train":
                raise DataError(f"{config.path} has no {stream} stream; give another file as data.path")
            assert config.path is not None
            self._data = FilePrompts(config.path, self.tokenizer, config.max_prompt_tokens, config.shuffle, seed)
        self._next_prompt = self._next_pair = 0

    def take(self, n: int) -> list[Prompt]:
        """The next n prompts. Raises DataError for one that is longer than max_prompt_tokens."""
        prompts = self.peek(n)
        self._next_prompt += n
        return prompts

    def peek(self, n: int) -> list[Prompt]:
        """The same, and the cursor stays."""
        prompts = [self._data.prompt(self._next_prompt + i, self.stream) for i in range(n)]
        for prompt in prompts:
            check_length(prompt, self.config.max_prompt_tokens, f"prompt {prompt.index}")
        return prompts

    def take_supervised(self, n: int) -> list[SupervisedPair]:
        """The next n prompts with an answer to imitate."""
        pairs = [self._data.supervised(self._next_pair + i) for i in range(n)]
        for pair in pairs:
            check_length(pair.prompt, self.config.max_prompt_tokens, f"supervised prompt {pair.prompt.index}")
        self._next_pair += n
        return pairs

    def state(self) -> dict[str, int]:
        """Both cursors; JSON can hold it."""
        return {"prompts": self._next_prompt, "supervised": self._next_pair}

    def restore(self, state: dict[str, int]) -> None:
        """Go on where `state` was taken. Raises ValueError for anything that `state` does not return."""
        if set(state) != {"prompts", "supervised"} or any(not isinstance(n, int) or n < 0 for n in state.values()):
            raise ValueError(f"a prompt cursor holds prompts and supervised, two counts, not {state}")
        self._next_prompt, self._next_pair = state["prompts"], state["supervised"]


def check_length(prompt: Prompt, limit: int, name: str) -> None:
    """Raise DataError where a prompt has more than `limit` tokens."""
    if len(prompt.ids) > limit:
        raise DataError(
            f"{name} has {len(prompt.ids)} tokens, the limit is {limit}; raise data.max_prompt_tokens or remove it"
        )


def stop_token_ids(model_path: str | Path, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """eos_token_id of generation_config.json (a number or a list) and the tokenizer's. Raises DataError for none."""
    file = Path(model_path) / "generation_config.json"
    eos: Any = json.loads(file.read_text()).get("eos_token_id") if file.is_file() else None
    listed = eos if isinstance(eos, list) else [eos]
    ids = {int(i) for i in [*listed, tokenizer.eos_token_id] if i is not None}
    if not ids:
        raise DataError(
            f"neither generation_config.json nor the tokenizer of {model_path} names an end-of-sequence token"
        )
    return tuple(sorted(ids))


class FilePrompts:
    """A JSONL file, read and tokenized whole at the start, so that a bad line stops a run before it begins."""

    def __init__(self, path: Path, tokenizer: PreTrainedTokenizerBase, limit: int, shuffle: bool, seed: int):
        """limit: longest prompt, tokens. Raises DataError, naming the line."""
        self.tokenizer, self.shuffle, self.seed = tokenizer, shuffle, seed
        self.prompts = read_jsonl(path, tokenizer, limit)
        self._orders: dict[str, tuple[int, np.ndarray]] = {}

    def prompt(self, index: int, stream: Stream = "train") -> Prompt:
        """The prompt at `index`; past the last line another epoch begins."""
        return self._at(index, "prompts")

    def supervised(self, index: int) -> SupervisedPair:
        """The pair at `index`, of its own order."""
        prompt = self._at(index, "supervised")
        return SupervisedPair(prompt, answer_ids(self.tokenizer, prompt.metadata["answer"]))

    def _at(self, index: int, order: str) -> Prompt:
        epoch, position = divmod(index, len(self.prompts))
        if self.shuffle:
            position = int(self._permutation(epoch, order)[position])
        prompt = self.prompts[position]
        return Prompt(prompt.ids, prompt.text, prompt.metadata, index)

    def _permutation(self, epoch: int, order: str) -> np.ndarray:
        known = self._orders.get(order)
        if known is None or known[0] != epoch:
            rng = np.random.default_rng([self.seed, epoch, order == "supervised"])
            known = self._orders[order] = (epoch, rng.permutation(len(self.prompts)))
        return known[1]


def read_jsonl(path: Path, tokenizer: PreTrainedTokenizerBase, limit: int) -> list[Prompt]:
    """Every line of a file as a prompt; metadata: all keys but prompt and messages. Blank lines are passed over.

    Raises DataError: no such file, no lines, or a line (by number) that is not JSON, lacks a key, or is too long.
    """
    if not path.is_file():
        raise DataError(f"there is no data file {path}")
    prompts: list[Prompt] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if line.strip():
            where = f"{path}, line {number}"
            try:
                prompt = _parse(line, tokenizer)
            except DataError as error:
                raise DataError(f"{where}: {error}") from error
            check_length(prompt, limit, where)
            prompts.append(prompt)
    if not prompts:
        raise DataError(f"{path} holds no prompts")
    return prompts


def _parse(line: str, tokenizer: PreTrainedTokenizerBase) -> Prompt:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"not JSON: {error}") from error
    if not isinstance(row, dict):
        raise DataError(f"a line holds an object with a prompt and an answer, not a {type(row).__name__}")
    if ("prompt" in row) == ("messages" in row):
        raise DataError(f'needs exactly one of the keys "prompt" and "messages"; it has {", ".join(row) or "no keys"}')
    if not isinstance(row.get("answer"), str):
        raise DataError('needs the key "answer", a text; write a number in quotes')
    messages = row["messages"] if "messages" in row else [{"role": "user", "content": row["prompt"]}]
    well_formed = isinstance(messages, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in messages
    )
    if not messages or not well_formed:
        raise DataError('"prompt" is a text, "messages" a list of {"role": text, "content": text}')
    metadata = {key: value for key, value in row.items() if key not in ("prompt", "messages")}
    return chat_prompt(tokenizer, messages, metadata, index=0)
