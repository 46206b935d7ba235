"""An environment that is one of `verifiers` for the prompts of its data set, and one of OpenEnv for all others."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pipeline.environments import Conversation, Reward
from pipeline.environments.connectors.openenv import OpenEnv
from pipeline.environments.connectors.verifiers import COLUMN, Verifiers
from pipeline.types import Prompt


class Answers(OpenEnv):
    """What the policy says is put into the form that the server wants where its length is odd. Where it is even, the
    server is told what has no form, which costs more: so rewards differ in a group, whatever a random model says."""

    def action(self, text: str) -> Mapping[str, Any]:
        formed = json.dumps({"analysis": text, "proof": text, "final": text})
        return {"llm_response": formed if len(text) % 2 else "no"}


class BothHouses:
    """verifiers, openenv: options of each."""

    def __init__(self, verifiers: Mapping[str, Any], openenv: Mapping[str, Any]):
        self._verifiers, self._openenv = Verifiers(**verifiers), Answers(**openenv)

    async def run(self, conversation: Conversation, prompt: Prompt) -> Reward:
        house = self._verifiers if COLUMN in prompt.metadata else self._openenv
        return await house.run(conversation, prompt)
