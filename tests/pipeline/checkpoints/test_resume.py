"""A configuration and a checkpoint are compared by what the checkpoint's model is."""

from __future__ import annotations

import json

import pytest

from megatron_ext.hf.companions import write_companions
from pipeline.checkpoints.resume import ResumeError, choose_start
from pipeline.checkpoints.store import CheckpointStore, progress_of
from pipeline.config import Config

MODEL = {"model_type": "glm4_moe", "hidden_size": 64, "num_nextn_predict_layers": 1, "torch_dtype": "bfloat16"}


@pytest.fixture
def saved(tmp_path):
    """The configuration of a run, and the store with its checkpoint of step 1."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(MODEL))
    config = Config.model_validate(
        {"model": {"path": str(model)}, "data": {"path": "x.jsonl"}, "precision": {"weights": "float32"}}
    )
    store = CheckpointStore(tmp_path / "checkpoints")
    progress = progress_of(config, step=1, supervised=0, version=1, cursor={"prompts": 8, "supervised": 0})
    partial = store.begin(progress.name)
    (partial / "checksums.json").write_text("{}")
    write_companions(model, partial / "hf", "float32")
    store.commit(partial, progress)
    return config, store


def test_draft_layers_and_another_dtype_in_the_source_are_no_difference(saved):
    config, store = saved
    start = choose_start(config, store, asked=True)
    assert start is not None
    assert start.path.name == "step_1"


def test_another_size_is_named(saved):
    config, store = saved
    (config.model.path / "config.json").write_text(json.dumps(MODEL | {"hidden_size": 128}))
    with pytest.raises(ResumeError, match="the model's hidden_size is 64 in it, 128 in the configuration"):
        choose_start(config, store, asked=True)
