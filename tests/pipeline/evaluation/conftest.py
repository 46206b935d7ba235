"""A set of three questions, and servers that answer them as a test wants."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from pipeline.config import load_config
from pipeline.evaluation.opened_set import OpenedSet, open_sets
from pipeline.loop.inputs import prepare_model
from pipeline.types import Sampled


class FakeServers:
    """texts: of a question and a sample. version: what the fleet says; sampled_under: what each token says."""

    def __init__(self, tokenizer, text, version=3, sampled_under=None, wait=None, reason="stop"):
        self.tokenizer, self.text, self.version = tokenizer, text, version
        self.sampled_under = version if sampled_under is None else sampled_under
        self.in_flight = self.most = self.entered = 0
        self.wait, self.reason, self.asked, self.seeds = wait, reason, {}, []

    async def __aenter__(self):
        self.entered += 1
        return self

    async def __aexit__(self, *_):
        self.entered -= 1

    async def sample(self, token_ids, sampling, *, routes_from=0, group=None, on_tokens=None):
        assert self.entered
        assert not sampling.with_routes
        self.seeds.append(sampling.seed)
        self.in_flight += 1
        self.most = max(self.most, self.in_flight)
        try:
            _, question = group
            sample = self.asked[question] = self.asked.get(question, -1) + 1
            if self.wait is not None:
                await self.wait()
            end = "<|eos|>" if self.reason == "stop" else ""
            ids = self.tokenizer.encode(self.text(question, sample) + end, add_special_tokens=False)
            return Sampled(
                ids=np.array(ids, np.int32),
                logprobs=np.full(len(ids), -0.5, np.float32),
                routes=None,
                weight_versions=np.full(len(ids), self.sampled_under, np.int32),
                finish_reason=self.reason,
            )
        finally:
            self.in_flight -= 1


@pytest.fixture(scope="session")
def open_quickstart(tmp_path_factory):
    """Sets of the quickstart with other fields."""
    folder = tmp_path_factory.mktemp("evaluation")

    def opened(*overrides) -> tuple[SimpleNamespace, list[OpenedSet]]:
        config = load_config("configs/quickstart.yaml", list(overrides))
        return config, open_sets(config, prepare_model(config, folder / "model"), lambda line: None)

    return opened


@pytest.fixture
def three(open_quickstart):
    _, (asked,) = open_quickstart("evaluate=[{name: three, prompts: 3, samples: 4, k: [1, 2, 4]}]")
    return asked


@pytest.fixture
def fake_servers(three):
    def make(text=None, **changes):
        answer = {p.index: p.metadata["answer"] for p in three.prompts}

        def right(question, sample):
            return answer[question] if sample < question else "0"

        return FakeServers(three.tokenizer, text or right, **changes)

    return make
