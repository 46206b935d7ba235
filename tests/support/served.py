"""Conversations at an address, with an engine that says what it is told."""

from __future__ import annotations

import contextlib
import json

import aiohttp

from pipeline.engine.sampling import Sampling
from pipeline.environments.conversation import Conversation
from pipeline.environments.endpoint import serve
from pipeline.environments.templates import TemplateWriter
from pipeline.environments.turn_parser import TurnParser
from pipeline.types import Opening, Prompt
from tests.support.scripted import Scripted
from tests.support.templates import FAMILIES, tokenizer_of

ASKED = [{"role": "user", "content": "question"}]
END = "<|im_end|>"
TOOL = {
    "type": "function",
    "function": {
        "name": "look",
        "description": "look something up",
        "parameters": {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]},
    },
}


def call_text(x: int) -> str:
    """What Qwen's models write to call TOOL, in spaces that no `json.dumps` would write."""
    return f'<tool_call>\n{{"name": "look", "arguments": {{"x":{x}}} }}\n</tool_call>'


def prompt_of(tokenizer, tools=(), metadata=None):
    """(prompt, writer) of ASKED."""
    stops = [tokenizer.convert_tokens_to_ids(stop) for stop in FAMILIES["kimi-k2"].stops]
    writer = TemplateWriter(tokenizer, Opening(tuple(ASKED), tuple(tools)), stops)
    text = writer.render(ASKED)
    return Prompt(writer.ids(text), text, metadata or {}, opening=writer.opening), writer


def talk_of(tokenizer, said, *, engine=None, parser=None, tools=(), temperature=1.0, **limits):
    """(conversation, engine); on the running loop."""
    prompt, writer = prompt_of(tokenizer, tools)
    engine = engine or Scripted(tokenizer, said)
    limits = {"max_turns": 9, "max_tokens": 3000} | limits
    return Conversation(engine, prompt, writer, Sampling(400, temperature), parser=parser, **limits), engine


@contextlib.asynccontextmanager
async def served(tokenizer, said=(), **options):
    """(conversation, engine, address)"""
    made, engine = talk_of(tokenizer, said, **options)
    async with serve(made) as address:
        yield made, engine, address


def body(messages=None, **fields) -> bytes:
    return json.dumps({"model": "policy", "messages": messages or ASKED} | fields).encode()


async def post(address, data, *, key=None, path="/chat/completions", method="POST"):
    """(status, body)"""
    headers = {"Authorization": f"Bearer {key or address.key}", "Content-Type": "application/json"}
    async with (
        aiohttp.ClientSession() as session,
        session.request(method, address.url + path, data=data, headers=headers) as answer,
    ):
        return answer.status, await answer.json()


def kimi_tokenizer(folder):
    return tokenizer_of(FAMILIES["kimi-k2"], folder)


QWEN = TurnParser("qwen25")
