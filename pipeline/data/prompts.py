"""Where prompts come from: a synthetic task or a JSONL file, as a stream with a cursor that can be saved."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from megatron_ext.hf.config_json import read_hf_config
from pipeline.config.data import DataConfig
from pipeline.data.chat import DataError, answer_ids, check_vocabulary
from pipeline.data.jsonl import check_length, read_rows, tokenize
from pipeline.data.pretrained import load_tokenizer, read_json
from pipeline.data.synthetic import Stream, SupervisedPair, SyntheticTask
from pipeline.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class _Prompts(Protocol):
    """Prompts and supervised pairs by position in an endless stream."""

    def prompt(self, index: int, stream: Stream) -> Prompt: ...
    def supervised(self, index: int) -> SupervisedPair: ...


def _to_standard_error(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


class PromptSource:
    """A stream of prompts for one run, and what its answers stop at.

    The cursors of prompts and of supervised pairs move apart. Prompt `i` depends on the data and the seed only.
    """

    def __init__(
        self,
        config: DataConfig,
        model_path: str | Path,
        *,
        seed: int,
        stream: Stream = "train",
        supervised: bool = False,
        trust_remote_code: bool = False,
        say: Callable[[str], None] = _to_standard_error,
    ):
        """model_path: Hugging Face directory whose tokenizer, config.json and generation_config.json count.

        stream: "held_out" gives a synthetic task's other questions; a file has one stream only.
        supervised: pairs will be taken, so a file's answers are tokenized now as well.
        trust_remote_code: as ModelConfig has it. say: gets a line every few seconds while a file is tokenized.
        Raises DataError (data or tokenizer) before any prompt is taken.
        """
        self.config = config
        self.stream: Stream = stream
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(model_path, trust_remote_code=trust_remote_code)
        self.vocab_size: int = read_hf_config(model_path)["vocab_size"]
        self.stop_token_ids = stop_token_ids(model_path, self.tokenizer)
        if config.task is not None:
            self._data: _Prompts = SyntheticTask(config.task, self.tokenizer, seed)
        else:
            if stream != "train":
                raise DataError(f"{config.path} has no {stream} stream; give another file as data.path")
            file = FilePrompts(config, self.tokenizer, self.vocab_size, seed, say)
            if supervised:
                file.check_answers()
            self._data = file
        self._next_prompt = self._next_pair = 0

    def take(self, n: int) -> list[Prompt]:
        """The next n prompts. Raises DataError for one that is longer than max_prompt_tokens, or whose tokens the model
        does not have."""
        prompts = self.peek(n)
        self._next_prompt += n
        return prompts

    def peek(self, n: int) -> list[Prompt]:
        """The same, and the cursor stays."""
        prompts = [self._data.prompt(self._next_prompt + i, self.stream) for i in range(n)]
        for prompt in prompts:
            check_vocabulary(self.tokenizer, prompt.ids, self.vocab_size, f"prompt {prompt.index}")
            check_length(prompt, self.config.max_prompt_tokens, f"prompt {prompt.index}")
        return prompts

    def take_supervised(self, n: int) -> list[SupervisedPair]:
        """The next n prompts with an answer to imitate."""
        pairs = [self._data.supervised(self._next_pair + i) for i in range(n)]
        for pair in pairs:
            name = f"supervised prompt {pair.prompt.index}"
            check_vocabulary(self.tokenizer, pair.tokens, self.vocab_size, name)
            check_length(pair.prompt, self.config.max_prompt_tokens, name)
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


def stop_token_ids(model_path: str | Path, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """eos_token_id of generation_config.json (a number or a list) and the tokenizer's. Raises DataError for none."""
    file = Path(model_path) / "generation_config.json"
    eos: Any = read_json(file).get("eos_token_id") if file.is_file() else None
    listed = [i for i in [*(eos if isinstance(eos, list) else [eos]), tokenizer.eos_token_id] if i is not None]
    if any(not isinstance(i, int) or isinstance(i, bool) or i < 0 for i in listed):
        raise DataError(f"eos_token_id of {file} is a token id or a list of them, not {eos!r}")
    if not listed:
        raise DataError(
            f"neither generation_config.json nor the tokenizer of {model_path} names an end-of-sequence token"
        )
    return tuple(sorted(set(listed)))


class FilePrompts:
    """A JSONL file, read and tokenized whole at the start, so that a bad line stops a run before it begins."""

    def __init__(
        self,
        config: DataConfig,
        tokenizer: PreTrainedTokenizerBase,
        vocab_size: int,
        seed: int,
        say: Callable[[str], None],
    ):
        """vocab_size: of the model. say: hears how far it is. Raises DataError, naming the line."""
        assert config.path is not None
        self.path, self.shuffle, self.tokenizer = config.path, config.shuffle, tokenizer
        self.vocab_size, self.seed = vocab_size, seed
        rows = read_rows(config.path)
        self.lines = [row.line for row in rows]
        self.prompts = tokenize(
            config.path, rows, tokenizer, limit=config.max_prompt_tokens, vocab_size=vocab_size, say=say
        )
        self._orders: dict[str, tuple[int, np.ndarray]] = {}

    def check_answers(self) -> None:
        """Raise DataError, naming the line, for an answer that cannot be imitated."""
        for place in range(len(self.prompts)):
            self._answer(place)

    def prompt(self, index: int, stream: Stream = "train") -> Prompt:
        """The prompt at `index`; past the last line another epoch begins."""
        return self._at(index, self._place(index, "prompts"))

    def supervised(self, index: int) -> SupervisedPair:
        """The pair at `index`, of its own order."""
        place = self._place(index, "supervised")
        return SupervisedPair(self._at(index, place), self._answer(place))

    def _answer(self, place: int) -> np.ndarray:
        name = f"{self.path}, line {self.lines[place]}: the answer"
        try:
            ids = answer_ids(self.tokenizer, self.prompts[place].metadata["answer"])
        except DataError as error:
            raise DataError(f"{name}: {error}") from error
        check_vocabulary(self.tokenizer, ids, self.vocab_size, name)
        return ids

    def _at(self, index: int, place: int) -> Prompt:
        prompt = self.prompts[place]
        return Prompt(prompt.ids, prompt.text, prompt.metadata, index)

    def _place(self, index: int, order: str) -> int:
        epoch, position = divmod(index, len(self.prompts))
        return int(self._permutation(epoch, order)[position]) if self.shuffle else position

    def _permutation(self, epoch: int, order: str) -> np.ndarray:
        known = self._orders.get(order)
        if known is None or known[0] != epoch:
            rng = np.random.default_rng([self.seed, epoch, order == "supervised"])
            known = self._orders[order] = (epoch, rng.permutation(len(self.prompts)))
        return known[1]
