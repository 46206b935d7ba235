"""Where a run's prompts come from: its sources as one stream, with a cursor that can be saved."""

from __future__ import annotations

import base64
import sys
import zlib
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_ext.hf.config_json import read_hf_config
from pipeline.config.data import DataConfig
from pipeline.data.chat import Asked, DataError, TooLongError
from pipeline.data.mixture import Cursor, Mixture
from pipeline.data.opened import open_sources
from pipeline.data.pass_rates import pass_rate
from pipeline.data.pretrained import load_tokenizer, read_json
from pipeline.data.streams import Order, Part
from pipeline.data.tables.row_reader import Lacks, nothing
from pipeline.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MOST_DROPPED = 10_000  # too long one after another
_REMEMBERED = 16_384
"""Prompts behind the cursor that `PromptSource.at` knows; more than any run has open at a time."""


@dataclass(frozen=True)
class SupervisedPair:
    """A prompt and the answer to imitate. answer_ids: [N] int32, the end-of-sequence token last."""

    prompt: Prompt
    answer_ids: np.ndarray

    @property
    def tokens(self) -> np.ndarray:
        """[P + N] int32, the prompt and the answer behind it."""
        return np.concatenate([self.prompt.ids, self.answer_ids])

    @property
    def prompt_length(self) -> int:
        """P, tokens."""
        return len(self.prompt.ids)


def _to_standard_error(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


class PromptSource:
    """A stream of prompts for one run, and what its answers stop at.

    The cursors of prompts and of supervised pairs move apart. Prompt `i` depends on the data and the seed only, and on
    what was learned of pass rates where data.curriculum passes prompts over.
    """

    def __init__(
        self,
        config: DataConfig,
        model_path: str | Path,
        *,
        seed: int,
        part: Part = "train",
        supervised: bool = False,
        trust_remote_code: bool = False,
        lacks: Lacks = nothing,
        say: Callable[[str], None] = _to_standard_error,
    ):
        """model_path: Hugging Face directory whose tokenizer, config.json and generation_config.json count.

        part: "held_out" gives what is never trained on; see `Part`.
        supervised: pairs will be taken, so answers of rows are looked at now as well.
        trust_remote_code: as ModelConfig has it. lacks: what verifiers would miss of a row. say: gets a line every few
        seconds while rows are read.
        Raises DataError (data or tokenizer) before any prompt is taken.
        """
        self.config = config
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(model_path, trust_remote_code=trust_remote_code)
        self.vocab_size: int = read_hf_config(model_path)["vocab_size"]
        self.stop_token_ids = stop_token_ids(model_path, self.tokenizer)
        opened = open_sources(
            config, self.tokenizer, self.vocab_size, seed=seed, part=part, supervised=supervised, lacks=lacks, say=say
        )
        self.sources = [questions for questions, _ in opened]
        self._by_name = {questions.name: questions for questions in self.sources}
        orders: tuple[Order, ...] = ("prompts", "supervised")
        self._mixtures = {o: Mixture(list(self._by_name), [weights[o] for _, weights in opened]) for o in orders}
        for order, mixture in self._mixtures.items():
            if not mixture.total and (order == "prompts" or supervised):
                raise DataError(f"no source of data.sources is for {order}; correct `use` of one of them")
        self._cursors: dict[Order, Cursor] = {order: self._mixtures[order].start() for order in orders}
        self._visits: dict[str, list[float]] = {}
        self._dropped = Counter[str]()
        self._recent: deque[str] = deque(maxlen=_REMEMBERED)

    @property
    def size(self) -> int | None:
        """Prompts until each has been asked once; None where a source has no end."""
        sizes = [source.size for source in self.sources]
        return None if None in sizes else sum(size for size in sizes if size is not None)

    def take(self, n: int) -> list[Prompt]:
        """The next n prompts. Raises DataError for one that is longer than max_prompt_tokens, unless such are dropped,
        for one whose tokens the model does not have, and where no source has a prompt left."""
        prompts, self._cursors["prompts"], dropped = self._ahead(n)
        self._dropped += dropped
        self._recent.extend(prompt.origin for prompt in prompts)
        return prompts

    def at(self, index: int) -> Prompt:
        """A prompt that was taken not long ago, as it was then: a resumed run asks those again that were open. Raises
        DataError where it was taken too long ago, or its source is no longer there."""
        behind = self._cursors["prompts"].count - index
        if not 0 < behind <= len(self._recent):
            raise DataError(f"prompt {index} is not one of the last {len(self._recent):,} that were taken")
        name, _, place = self._recent[-behind].rpartition(":")
        if (source := self._by_name.get(name)) is None:
            raise DataError(f"prompt {index} is of the source {name!r}, which is not in data.sources any more")
        (prompt,) = source.writer.prompts([source.again(int(place))], [index])
        if isinstance(prompt, DataError):
            raise prompt
        return prompt

    def peek(self, n: int) -> list[Prompt]:
        """The same, and the cursor stays."""
        return self._ahead(n)[0]

    def take_supervised(self, n: int) -> list[SupervisedPair]:
        """The next n prompts with an answer to imitate. Raises DataError as `take`, and for answers."""
        asked, which, cursor = self._questions(self._cursors["supervised"], n, "supervised")
        pairs = []
        first = self._cursors["supervised"].count
        prompts = self._written(asked, which, range(first, first + n))
        for one, source, prompt in zip(asked, which, prompts, strict=True):
            if isinstance(prompt, DataError):
                raise prompt
            pairs.append(SupervisedPair(prompt, self.sources[source].writer.answer(one)))
        self._cursors["supervised"] = cursor
        return pairs

    def learned(self, prompt: Prompt, rewards: Sequence[float] | np.ndarray) -> None:
        """A group of answers to a prompt of this source was graded: pass rates are kept of it.

        rewards: of the answers that have one, before any group is left out for what they are.
        """
        name, _, row = prompt.origin.rpartition(":")
        source = self._by_name.get(name)
        if source is None or not len(rewards):
            return
        self._visits.setdefault(name, []).append(pass_rate(rewards, self.config.curriculum))
        if source.rates is not None:
            source.rates.learn(int(row), rewards)

    def metrics(self) -> dict[str, float]:
        """data/NAME/...: of each source its epoch, the pass rate of what was learned since the last call, and of rows
        how many were visited and which shares of them were always, sometimes, never solved."""
        out: dict[str, float] = {}
        for source, position in zip(self.sources, self._cursors["prompts"].positions, strict=True):
            numbers = {} if source.size is None else {"epoch": position / source.size}
            if visits := self._visits.get(source.name):
                numbers["pass_rate"] = float(np.mean(visits))
            numbers |= {} if source.rates is None else source.rates.metrics()
            if self._dropped[source.name]:
                numbers["dropped_too_long"] = float(self._dropped[source.name])
            out |= {f"data/{source.name}/{name}": value for name, value in numbers.items()}
        self._visits.clear()
        return out

    def facts(self) -> dict[str, Any]:
        """For facts.json: of each source what became of its rows."""
        return {s.name: {} if s.report is None else s.report.facts() for s in self.sources}

    def state(self) -> dict[str, Any]:
        """Both cursors, the pass rates of rows that were visited, and which prompts were taken last; JSON holds it."""
        names = list(self._by_name)
        out: dict[str, Any] = {order: cursor.count for order, cursor in self._cursors.items()}
        out["sources"] = {order: cursor.state(names) for order, cursor in self._cursors.items()}
        out["pass_rates"] = {s.name: s.rates.state() for s in self.sources if s.rates and s.rates.visits.any()}
        out["recent"] = base64.b64encode(zlib.compress("\n".join(self._recent).encode())).decode("ascii")
        return out

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken. Raises DataError for anything that `state` does not return."""
        try:
            cursors: dict[Order, Cursor] = {
                o: self._mixtures[o].restored(_count(state[o]), state["sources"][o]) for o in self._cursors
            }
            rates = {name: str(packed) for name, packed in state["pass_rates"].items()}
            recent = zlib.decompress(base64.b64decode(state["recent"])).decode().split("\n")
            if len(state) != len(cursors) + 3:
                raise ValueError("more keys than it has")
            for source in self.sources:
                if source.rates is not None:
                    source.rates.restore(rates[source.name]) if source.name in rates else source.rates.forget()
        except (KeyError, TypeError, ValueError, AttributeError, zlib.error) as error:
            raise DataError(f"a prompt cursor is not what this version of sameroute saves: {error!r}") from error
        self._cursors = cursors
        self._recent = deque((origin for origin in recent if origin), maxlen=_REMEMBERED)

    def _ahead(self, n: int) -> tuple[list[Prompt], Cursor, Counter[str]]:
        """The next n prompts, where the cursor is behind them, and how many of each source were dropped on the way."""
        cursor, out, dropped = self._cursors["prompts"], list[Prompt](), Counter[str]()
        while len(out) < n:
            count = n - len(out)
            asked, which, cursor = self._questions(cursor, count, "prompts")
            first = self._cursors["prompts"].count + len(out)
            for source, prompt in zip(which, self._written(asked, which, range(first, first + count)), strict=True):
                if isinstance(prompt, TooLongError) and self.config.filters.too_long == "drop":
                    dropped[self.sources[source].name] += 1
                    if dropped.total() > _MOST_DROPPED:
                        raise prompt
                elif isinstance(prompt, DataError):
                    raise prompt
                else:
                    out.append(replace(prompt, index=first))
                    first += 1
        return out, Cursor(self._cursors["prompts"].count + n, cursor.positions, cursor.credits), dropped

    def _questions(self, cursor: Cursor, n: int, order: Order) -> tuple[list[Asked], list[int], Cursor]:
        """The next n questions of a cursor, which source each is of, and the cursor behind them."""
        asked, which = [], []
        for _ in range(n):
            chosen, credit = self._mixtures[order].next(cursor)
            source, positions = self.sources[chosen], list(cursor.positions)
            position = source.due(positions[chosen], order)
            asked.append(source.asked(position, order))
            which.append(chosen)
            positions[chosen] = position + 1
            cursor = Cursor(cursor.count + 1, tuple(positions), credit)
        return asked, which, cursor

    def _written(self, asked: list[Asked], which: list[int], indices: Sequence[int]) -> list[Prompt | DataError]:
        """A prompt for each question, tokenized together where sources share how they speak."""
        out: list[Prompt | DataError | None] = [None] * len(asked)
        for writer in {id(w): w for w in (self.sources[i].writer for i in which)}.values():
            places = [p for p, i in enumerate(which) if self.sources[i].writer is writer]
            written = writer.prompts([asked[p] for p in places], [indices[p] for p in places])
            for place, prompt in zip(places, written, strict=True):
                out[place] = prompt
        return [prompt for prompt in out if prompt is not None]


def _count(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{value!r} is no count")
    return value


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
