"""A converted model is served: SGLang and transformers agree on what `sameroute convert` wrote."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from tests.conftest import save_tiny_model
from tests.support import reference
from tests.support.convert_cli import convert

SEQUENCE = np.random.default_rng(0).integers(0, 500, 60)


def score(client):
    async def run():
        async with client:
            return (await client.score(SEQUENCE))[0]

    return asyncio.run(run())


@pytest.fixture
def served(client, tiny_model_dir):
    """Let the server take the weights of a directory; its own are back when the test ends."""

    def serve(folder):
        client.post("/update_weights_from_disk", {"model_path": str(folder), "flush_cache": True})

    yield serve
    serve(tiny_model_dir)


def test_sglang_serves_an_exported_directory(client, served, tiny_model_dir, tmp_path):
    model = save_tiny_model(tmp_path / "model", seed=1)
    answers = convert(
        ["to-megatron", model, tmp_path / "checkpoint", "--ep", 2],
        ["to-hf", tmp_path / "checkpoint", tmp_path / "exported", "--shard-gb", 0.001],
    )
    assert [a.code for a in answers] == [0, 0], answers
    assert len(list((tmp_path / "exported").glob("*.safetensors"))) > 2
    before = score(client)
    served(tmp_path / "exported")
    after = score(client)
    assert np.abs(after - reference.logprobs(reference.load(model), SEQUENCE)).max() < 1e-4
    assert np.abs(after - before).max() > 0.1
