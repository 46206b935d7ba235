"""Hugging Face weights in and out, bit for bit, on every layout; nothing is skipped silently."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from megatron_ext.config import OptimizerConfig, ParallelConfig, TrainerConfig
from megatron_ext.hf.config import UnsupportedModel, model_shape
from tests.megatron_ext.ranks import run_ranks

LAYOUTS = [
    {},
    {"ranks": 2, "tensor": 2, "sequence": True},
    {"ranks": 2, "pipeline": 2},
    {"ranks": 2, "expert": 2},
    {"ranks": 2, "pipeline": 2, "virtual_pipeline": 2},
    {"ranks": 2, "tensor": 2, "sequence": True, "expert_tensor": 2},
    {"ranks": 4, "tensor": 2, "sequence": True, "pipeline": 2, "expert": 2, "expert_tensor": 1},
    {"ranks": 8, "tensor": 2, "sequence": True, "pipeline": 2, "expert": 2, "expert_tensor": 2},
]


def make(model: str, config: ParallelConfig):
    from megatron_ext.trainer import Trainer

    return Trainer(model, config, TrainerConfig(), OptimizerConfig(), replay=False)


def exported(config: ParallelConfig, model: str, bucket_bytes: int):
    trainer = make(model, config)
    trainer.exporter.bucket_bytes = bucket_bytes
    return [[(name, tensor.numpy().copy()) for name, tensor in bucket] for bucket in trainer.export()]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("kind", ["moe", "dense"])
def test_every_rank_streams_every_tensor_bit_for_bit(tiny_model_dir, tiny_dense_model_dir, layout, kind):
    model = tiny_model_dir if kind == "moe" else tiny_dense_model_dir
    if kind == "dense" and layout.get("expert", 1) > 1:
        layout = layout | {"expert": 1}
    original = load_file(model / "model.safetensors")
    bound = 100_000
    for buckets in run_ranks(exported, ParallelConfig(**layout), str(model), bound):
        names = [name for bucket in buckets for name, _ in bucket]
        assert sorted(names) == sorted(original)
        for bucket in buckets:
            assert len(bucket) <= 3 or sum(t.nbytes for _, t in bucket) <= bound
            for name, tensor in bucket:
                assert np.array_equal(tensor, original[name]), name


def failure(config: ParallelConfig, model: str) -> str:
    try:
        make(model, config)
    except (KeyError, ValueError, FileNotFoundError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def edited(model, folder, edit):
    shutil.copytree(model, folder)
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")
    return str(folder)


def test_missing_unknown_and_misshapen_tensors_are_named(tiny_model_dir, tmp_path):
    gate = "model.layers.2.mlp.gate.weight"
    cases = [
        (lambda t: t.pop(gate), "KeyError", f"lacks tensors of qwen3_moe: {gate}"),
        (lambda t: t.update(surplus=np.zeros(1, np.float32)), "KeyError", "has no place for: surplus"),
        (lambda t: t.update({gate: t[gate][:, :-1].copy()}), "ValueError", f"{gate} give decoder.layers.2.mlp.router"),
    ]
    for number, (edit, kind, message) in enumerate(cases):
        path = edited(tiny_model_dir, tmp_path / str(number), edit)
        (answer,) = run_ranks(failure, ParallelConfig(), path)
        assert answer.startswith(kind)
        assert message in answer
    (tmp_path / "empty").mkdir()
    shutil.copy(tiny_model_dir / "config.json", tmp_path / "empty")
    (answer,) = run_ranks(failure, ParallelConfig(), str(tmp_path / "empty"))
    assert "holds neither" in answer


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "'llama' is not supported"),
        ({"attention_bias": True}, "attention_bias"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "'yarn'"),
        ({"mlp_only_layers": [0]}, "dense layers among the sparse ones"),
    ],
)
def test_a_model_that_is_not_built_here_is_refused(tiny_model_dir, change, message):
    hf = json.loads((tiny_model_dir / "config.json").read_text())
    with pytest.raises(UnsupportedModel, match=message):
        model_shape(hf | change)


def tied(config: ParallelConfig, model: str):
    return [name for bucket in make(model, config).export() for name, _ in bucket]


@pytest.mark.parametrize("layout", [{}, {"ranks": 2, "pipeline": 2}], ids=str)
def test_tied_embeddings_are_exported_once(tiny_model_dir, tmp_path, layout):
    path = edited(tiny_model_dir, tmp_path / "tied", lambda t: t.pop("lm_head.weight"))
    config = json.loads((tiny_model_dir / "config.json").read_text()) | {"tie_word_embeddings": True}
    (tmp_path / "tied" / "config.json").write_text(json.dumps(config))
    for names in run_ranks(tied, ParallelConfig(**layout), path):
        assert "lm_head.weight" not in names
        assert sorted(names) == sorted(load_file(tmp_path / "tied" / "model.safetensors"))


def checkpoint_keys(config: ParallelConfig, model: str):
    from megatron_ext.mcore import parallel_state

    chunk = make(model, config).policy.chunks[0]
    metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    sharded = chunk.sharded_state_dict(metadata=metadata)
    return sorted({s.key for name, s in sharded.items() if "_extra_state" not in name})


def test_checkpoint_keys_are_those_of_the_transformer_engine_spec(tiny_model_dir):
    (keys,) = run_ranks(checkpoint_keys, ParallelConfig(), str(tiny_model_dir))
    assert keys == [
        "decoder.final_layernorm.weight",
        "decoder.layers.mlp.experts.experts.linear_fc1.weight",
        "decoder.layers.mlp.experts.experts.linear_fc2.weight",
        "decoder.layers.mlp.router.weight",
        "decoder.layers.pre_mlp_layernorm.weight",
        "decoder.layers.self_attention.k_layernorm.weight",
        "decoder.layers.self_attention.linear_proj.weight",
        "decoder.layers.self_attention.linear_qkv.layer_norm_weight",
        "decoder.layers.self_attention.linear_qkv.weight",
        "decoder.layers.self_attention.q_layernorm.weight",
        "embedding.word_embeddings.weight",
        "output_layer.weight",
    ]
