"""Hugging Face weights in and out, bit for bit, on every layout; nothing is skipped silently."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from megatron_ext.config import OptimizerConfig, ParallelConfig, TrainerConfig
from megatron_ext.hf.description import UnsupportedModel, describe
from megatron_ext.hf.families import FAMILIES
from tests.support.ranks import run_ranks
from tests.support.tiny_families import save_family, tiny_config

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
    expected = [(name, t.shape, t.dtype) for name, t in trainer.exporter.outputs()]
    buckets = [[(name, tensor.numpy().copy()) for name, tensor in bucket] for bucket in trainer.export()]
    assert [(name, shape) for name, shape, _ in expected] == [(n, t.shape) for bucket in buckets for n, t in bucket]
    return buckets


@pytest.mark.parametrize(
    ("kind", "layout"),
    [
        *(pytest.param("moe", layout, id=f"moe-{layout}") for layout in LAYOUTS),
        # Of a model without experts the layouts of make test hold each kind of cut.
        *(
            pytest.param("dense", layout, id=f"dense-{layout}", marks=() if number in (1, 4, 6) else pytest.mark.proof)
            for number, layout in enumerate(LAYOUTS)
        ),
    ],
)
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


def sent(config: ParallelConfig, model: str, bucket_bytes: int):
    import torch.distributed as dist

    trainer = make(model, config)
    for _, parameter, _ in trainer.exporter.parameters:
        parameter.data = parameter.data.bfloat16()
    trainer.exporter = type(trainer.exporter)(trainer.policy.chunks, trainer.policy.model)
    trainer.exporter.bucket_bytes = bucket_bytes
    received = []
    gather, recv = dist.gather, dist.recv

    def counted_gather(tensor, gather_list, dst, group):
        received.extend(t.nbytes for t in gather_list or [])
        return gather(tensor, gather_list, dst=dst, group=group)

    def counted_recv(tensor, src, group):
        received.append(tensor.nbytes)
        return recv(tensor, src=src, group=group)

    dist.gather, dist.recv = counted_gather, counted_recv
    buckets = list(trainer.export(everywhere=False))
    expected = [(name, t.shape, t.dtype) for name, t in trainer.exporter.outputs()]
    assert not buckets or expected == [(n, t.shape, t.dtype) for bucket in buckets for n, t in bucket]
    assert all(t.dtype.itemsize == 2 for bucket in buckets for _, t in bucket)
    buckets = [[(n, t.float().numpy()) for n, t in bucket] for bucket in buckets]
    return buckets, sum(received), trainer.exporter.position


@pytest.mark.parametrize(
    ("family", "layout"),
    [
        ("qwen3_moe", LAYOUTS[5]),
        ("qwen3_moe", LAYOUTS[6]),
        ("qwen3_moe", {"ranks": 4, "expert": 2}),
        ("gpt_oss", LAYOUTS[6]),  # its packed experts are larger than a bucket
    ],
    ids=str,
)
def test_a_stream_to_rank_0_gives_it_everything_and_other_ranks_only_their_stages_share(
    tiny_model_dir, tmp_path, family, layout
):
    model = tiny_model_dir if family == "qwen3_moe" else save_family(family, tmp_path / "model")
    original = load_file(model / "model.safetensors")
    config, bound = ParallelConfig(**layout), 100_000
    first, *others = run_ranks(sent, config, str(model), bound)
    assert all(len(bucket) == 1 or sum(t.nbytes for _, t in bucket) <= 2 * bound for bucket in first[0])
    weights = {name: tensor for bucket in first[0] for name, tensor in bucket}
    assert sorted(weights) == sorted(original)
    for name, tensor in weights.items():
        assert np.array_equal(tensor, torch.from_numpy(original[name]).bfloat16().float()), name
    heads = [r for r in range(config.ranks) if r % (config.ranks // config.pipeline) == 0]
    for rank, (buckets, received, position) in enumerate(others, start=1):
        assert buckets == []
        assert position == first[2]
        assert bool(received) == (rank in heads)


def failures(config: ParallelConfig, models: list[str]) -> list[str]:
    out = []
    for model in models:
        try:
            make(model, config)
            out.append("")
        except (KeyError, ValueError, FileNotFoundError) as error:
            out.append(f"{type(error).__name__}: {error}")
    return out


def edited(model, folder, edit):
    shutil.copytree(model, folder)
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")
    return str(folder)


def test_missing_unknown_and_misshapen_tensors_are_named(tiny_model_dir, tmp_path):
    gate, stray = "model.layers.2.mlp.gate.weight", "model.layers.4.eh_proj.weight"
    cases = [
        (lambda t: t.pop(gate), "KeyError", f"lacks tensors of qwen3_moe: {gate}"),
        (lambda t: t.update(surplus=np.zeros(1, np.float32)), "KeyError", "has no place for: surplus"),
        (lambda t: t.update({stray: np.zeros(1, np.float32)}), "KeyError", f"has no place for: {stray}"),
        (
            lambda t: t.update({gate: t[gate][:, :-1].copy()}),
            "ValueError",
            f"{gate} [8, 63] give decoder.layers.2.mlp.router",
        ),
    ]
    paths = [edited(tiny_model_dir, tmp_path / str(i), edit) for i, (edit, _, _) in enumerate(cases)]
    (tmp_path / "empty").mkdir()
    shutil.copy(tiny_model_dir / "config.json", tmp_path / "empty")
    (answers,) = run_ranks(failures, ParallelConfig(), [*paths, str(tmp_path / "empty")])
    for answer, (_, kind, message) in zip(answers, cases, strict=False):
        assert answer.startswith(kind)
        assert message in answer
    assert "holds neither" in answers[-1]


def test_packed_experts_are_as_many_as_the_model_has(tmp_path):
    name = "model.layers.1.mlp.experts.down_proj_bias"
    model = save_family("gpt_oss", tmp_path / "gpt_oss")
    path = edited(model, tmp_path / "more", lambda t: t.update({name: np.concatenate([t[name], t[name][:1]])}))
    ((answer,),) = run_ranks(failures, ParallelConfig(), [path])
    assert answer == f"ValueError: {name} holds 9 experts; the model has 8"


def drafts_left_out(config: ParallelConfig, model: str):
    import logging

    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("megatron_ext.hf.load").addHandler(handler)
    logging.getLogger("megatron_ext.hf.load").setLevel(logging.INFO)
    return sorted(name for bucket in make(model, config).export() for name, _ in bucket), lines


def test_multi_token_prediction_layers_are_not_built_and_named_in_the_log(tiny_model_dir, tmp_path):
    drafts = {f"model.layers.4.{n}.weight": np.zeros(3, np.float32) for n in ("eh_proj", "self_attn.q_proj")}
    path = edited(tiny_model_dir, tmp_path / "drafts", lambda t: t.update(drafts))
    hf = json.loads((tiny_model_dir / "config.json").read_text()) | {"num_nextn_predict_layers": 1}
    (tmp_path / "drafts" / "config.json").write_text(json.dumps(hf))
    first, second = run_ranks(drafts_left_out, ParallelConfig(ranks=2, pipeline=2), path)
    assert first[0] == second[0] == sorted(load_file(tiny_model_dir / "model.safetensors"))
    assert first[1] == [
        f"2 tensors of {path} are not trained, and stay in what is written as they are: {', '.join(sorted(drafts))}"
    ]
    assert second[1] == []


QWEN3 = {"model_type": "qwen3_moe"}
DEEPSEEK = {"model_type": "deepseek_v3", "topk_group": 1}
GPT_OSS = {"model_type": "gpt_oss", "sliding_window": 128, "swiglu_limit": 7.0}
YARN = {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mamba"}, "'mamba' is not supported"),
        ({"model_type": "qwen3_5_moe"}, "model_type 'qwen3_5_moe' is not supported; supported: qwen3_moe, "),
        (QWEN3 | {"attention_bias": True, "use_sliding_window": True}, "attention_bias=true.*use_sliding_window"),
        (QWEN3 | {"rope_parameters": YARN}, "'yarn'"),
        (QWEN3 | {"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}, "'linear'"),
        (QWEN3 | {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        (QWEN3 | {"quantization_config": {"quant_method": "fp8"}}, "quantized weights"),
        ({"model_type": "mixtral", "sliding_window": 4096}, "sliding_window"),
        ({"model_type": "glm4_moe"}, "without partial_rotary_factor"),
        (DEEPSEEK | {"norm_topk_prob": False}, "norm_topk_prob=false"),
        (DEEPSEEK | {"scoring_func": "softmax"}, "scoring_func"),
        (DEEPSEEK | {"n_group": 4, "num_experts_per_tok": 8, "topk_group": 2}, "its two best"),
        (DEEPSEEK | {"rope_interleave": False}, "rope_interleave"),
        (DEEPSEEK | {"rope_parameters": YARN | {"mscale": 1.0}}, "one of mscale and mscale_all_dim"),
        (DEEPSEEK | {"rope_parameters": YARN | {"truncate": False}}, "truncate"),
        (GPT_OSS | {"attention_bias": False, "swiglu_alpha": 1.0}, "attention_bias=false.*swiglu_alpha=1.0"),
        (GPT_OSS | {"sliding_window": None, "layer_types": ["chunked_attention"] * 4}, "no sliding.*chunked"),
        (GPT_OSS | {"rope_parameters": YARN | {"attention_factor": 1.0}}, "attention_factor"),
        (GPT_OSS | {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "without factor or original"),
        (GPT_OSS | {"quantization_config": {"quant_method": "fp8"}}, "quantized weights"),
    ],
    ids=str,
)
def test_a_model_that_is_not_built_here_is_refused(tiny_model_dir, change, message):
    hf = json.loads((tiny_model_dir / "config.json").read_text())
    with pytest.raises(UnsupportedModel, match=message):
        describe(hf | change)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("glm4_moe_lite", {"first_k_dense_replace": 2}, "=2 and mlp_layer_types with 1 dense layers"),
        (
            "glm4_moe_lite",
            {"mlp_layer_types": ["sparse", "dense", "sparse", "sparse"]},
            "other than dense layers first",
        ),
        ("glm4_moe_lite", {"rope_parameters": YARN}, "'yarn'"),
        ("glm4_moe_lite", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
        ("deepseek_v32", {"q_lora_rank": None}, "q_lora_rank=null"),
        ("deepseek_v32", {"layer_types": ["indexed_attention", "full_attention"] * 2}, "other than indexed_attention"),
        ("deepseek_v32", {"moe_layer_freq": 2}, "moe_layer_freq=2"),
        ("deepseek_v32", {"first_k_dense_replace": 2}, "=2 and mlp_layer_types with 1 dense layers"),
        ("minimax_m2", {"use_qk_norm": False}, "use_qk_norm=False"),
        (
            "minimax_m2",
            {"use_routing_bias": False, "scoring_func": "softmax"},
            "use_routing_bias.*scoring_func",
        ),
        ("minimax_m2", {"shared_intermediate_size": 64}, "shared_intermediate_size=64"),
        ("minimax_m2", {"attn_type_list": [0, 1, 1, 1]}, "attn_type_list"),
        ("qwen3_next", {"attention_bias": True}, "attention_bias=true"),
        ("qwen3_next", {"attn_output_gate": False}, "attn_output_gate=false"),
        ("qwen3_next", {"output_gate_type": "sigmoid"}, "output_gate_type=sigmoid"),
        (
            "qwen3_next",
            {"layer_types": ["linear_attention", "full_attention", "full_attention", "full_attention"]},
            "other than full_attention in every n-th layer",
        ),
        ("qwen3_next", {"full_attention_interval": 3}, "full_attention_interval=3 and layer_types with one in 2"),
        ("qwen3_5_moe", {"norm_topk_prob": False}, "norm_topk_prob=false"),
        ("qwen3_5_moe", {"mlp_only_layers": [1]}, r"mlp_only_layers=\[1\]"),
        ("qwen3_5_moe", {"attention_bias": True}, "attention_bias=true"),
        ("qwen3_next", {"linear_num_key_heads": 3}, "=8, which does not divide by linear_num_key_heads=3"),
        (
            "qwen3_next",
            {"rope_parameters": None, "partial_rotary_factor": None},
            "without partial_rotary_factor",
        ),
    ],
)
def test_what_a_newer_family_does_not_do_here_is_refused(name, change, message):
    assert describe(tiny_config(name)).num_layers == 4
    with pytest.raises(UnsupportedModel, match=message):
        describe(tiny_config(name) | change)


def test_kimi_k2_is_deepseek_v3_under_another_name():
    assert FAMILIES["kimi_k2"] is FAMILIES["deepseek_v3"]


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


def test_biases_and_sinks_have_megatron_cores_own_keys(tmp_path):
    (keys,) = run_ranks(checkpoint_keys, ParallelConfig(), str(save_family("gpt_oss", tmp_path / "gpt_oss")))
    assert [key.removeprefix("decoder.layers.") for key in keys if "bias" in key or "softmax" in key] == [
        "mlp.experts.experts.linear_fc1.bias",
        "mlp.experts.experts.linear_fc2.bias",
        "mlp.router.bias",
        "self_attention.core_attention.softmax_offset",
        "self_attention.linear_proj.bias",
        "self_attention.linear_qkv.bias",
    ]


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
