"""`sameroute chat`: what a person says and what a run's model answers, turn after turn."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from megatron_ext.hf.description import read_description
from pipeline.checkpoints.weights_of import model_of_run, weights_of, without_weights
from pipeline.config import Config, ConfigError, load_config
from pipeline.config.load_config import config_of_run
from pipeline.config.server import request_tokens
from pipeline.data.chat import chat_text, token_ids
from pipeline.data.pretrained import load_tokenizer
from pipeline.data.prompts import stop_token_ids
from pipeline.disk.scratch import scratch_folder
from pipeline.engine.fleet import Fleet
from pipeline.engine.sampling import Sampling
from pipeline.loop.engines import start_servers
from pipeline.loop.evaluations import on_own_loop
from pipeline.loop.inputs import config_device
from pipeline.rewards import response_text
from pipeline.rollout.session import Session
from pipeline.say import to_stderr
from pipeline.text.characters import visible

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_NEW = "/new"


def chat(
    run: Path,
    *,
    checkpoint: str | None = None,
    system: str | None = None,
    temperature: float | None = None,
    max_new_tokens: int | None = None,
    said: Iterable[str] | None = None,
    out: TextIO = sys.stdout,
) -> None:
    """Answer each line that is said until there are no more. A line "/new" begins a new conversation.

    run: a run directory. checkpoint: as model_of_run has it. system, temperature, max_new_tokens: None is the run's.
    said: lines; None: of standard input, with a prompt where that is a terminal.
    Raises NoModelError, ConfigError and ServerError.
    """
    model = model_of_run(run, checkpoint)
    config = load_config(config_of_run(run), ["server.port=null"], served=False)
    described = read_description(without_weights(model))
    if reasons := described.not_served(config_device(config)):
        raise ConfigError(f"{model}: {'; '.join(reasons)}")
    tokenizer = load_tokenizer(without_weights(model), trust_remote_code=config.model.trust_remote_code)
    sampling = Sampling(
        max_new_tokens=max_new_tokens or config.rollout.max_new_tokens,
        temperature=config.precision.temperature if temperature is None else temperature,
        stop_token_ids=stop_token_ids(without_weights(model), tokenizer),
        with_routes=False,
    )
    talk = Talk(config, tokenizer, sampling, config.data.chat.system_prompt if system is None else system)
    to_stderr(f"starting a server with {model}")
    with (
        scratch_folder() as logs,
        weights_of(model) as directory,
        start_servers(config, directory, described, logs, most=1) as fleet,
    ):
        for line in _lines() if said is None else said:
            if line.strip() == _NEW:
                talk.begin()
            elif (reply := talk.reply(line, fleet)) is not None:
                print(visible(reply), file=out, flush=True)


class Talk:
    """What was said so far, a message each."""

    def __init__(self, config: Config, tokenizer: PreTrainedTokenizerBase, sampling: Sampling, system: str | None):
        """Raises ConfigError where the server has no room for an answer."""
        assert config.server.context_length is not None  # load_config settles it
        self.tokenizer, self.sampling, self.system = tokenizer, sampling, system
        self.variables, self.context = config.data.chat.template_variables, config.server.context_length
        limit = sampling.max_new_tokens
        if limit < 1 or request_tokens(1, limit) > self.context:
            raise ConfigError(f"--max-new-tokens={limit} is not between 1 and what context_length={self.context} holds")
        self.begin()

    def begin(self) -> None:
        """Forget what was said."""
        self.messages = [{"role": "system", "content": self.system}] if self.system else []

    def reply(self, line: str, fleet: Fleet) -> str | None:
        """The answer to a line, both of which belong to the conversation from now on; None where there is no room."""
        said = [*self.messages, {"role": "user", "content": line}]
        (ids,) = token_ids(self.tokenizer, [chat_text(self.tokenizer, said, variables=self.variables)])
        if request_tokens(len(ids), self.sampling.max_new_tokens) > self.context:
            to_stderr(f"the conversation has {len(ids)} tokens, too many for {self.context}; {_NEW} begins a new one")
            return None

        async def answer() -> str:
            async with fleet:
                return response_text(await Session(fleet, ids).sample(self.sampling), self.tokenizer)

        text = on_own_loop(answer)
        self.messages = [*said, {"role": "assistant", "content": text}]
        return text


def _lines() -> Iterator[str]:
    """What stands on standard input, without empty lines."""
    shown = sys.stdin.isatty() and os.isatty(2)
    if shown:
        import readline  # noqa: F401  (lines can be edited)

        to_stderr(f"say something; {_NEW} begins a new conversation, Ctrl-D ends")
    while True:
        try:
            line = input("> " if shown else "")
        except EOFError:
            return
        if line.strip():
            yield line
