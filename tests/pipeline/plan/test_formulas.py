"""Formulas against published figures; docs/plan.md names where each was read."""

import json

import pytest

from megatron_ext.config import ParallelConfig, TrainerConfig, TrainerPrecision
from megatron_ext.hf.description import describe, read_description
from pipeline.config import ConfigError, load_config
from pipeline.config.model import TinyModelConfig
from pipeline.plan import memory
from pipeline.plan.counts import flops, parameters
from pipeline.plan.hardware import EFFICIENCY, GPUS
from pipeline.plan.plan import teacher_of
from pipeline.plan.sampling import server as server_of

BF16 = TrainerPrecision(weights="bfloat16")
QWEN2_MOE = {
    "model_type": "qwen2_moe", "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 5632,
    "rms_norm_eps": 1e-6, "num_hidden_layers": 24, "num_attention_heads": 16, "num_key_value_heads": 16,
    "num_experts": 60, "num_experts_per_tok": 4, "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632,
    "norm_topk_prob": False, "decoder_sparse_step": 1, "tie_word_embeddings": False,
}  # fmt: skip
MIXTRAL = {
    "model_type": "mixtral", "rms_norm_eps": 1e-6, "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "num_local_experts": 8,
    "num_experts_per_tok": 2, "sliding_window": None, "rope_theta": 1e6, "tie_word_embeddings": False,
}  # fmt: skip

GPT_OSS_20B = {
    "model_type": "gpt_oss", "rms_norm_eps": 1e-6, "vocab_size": 201088, "hidden_size": 2880, "intermediate_size": 2880,
    "num_hidden_layers": 24, "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64,
    "num_local_experts": 32, "num_experts_per_tok": 4, "sliding_window": 128, "swiglu_limit": 7.0,
    "tie_word_embeddings": False, "rope_theta": 150000.0, "quantization_config": {"quant_method": "mxfp4"},
}  # fmt: skip
GPT_OSS_120B = GPT_OSS_20B | {"num_hidden_layers": 36, "num_local_experts": 128}
LLAMA_8B = {
    "model_type": "llama", "rms_norm_eps": 1e-5, "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "rope_theta": 500000.0,
    "tie_word_embeddings": False,
}  # fmt: skip
LLAMA_1B = LLAMA_8B | {
    "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "tie_word_embeddings": True,
}  # fmt: skip
QWEN2_7B = {
    "model_type": "qwen2", "rms_norm_eps": 1e-6, "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944,
    "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4, "tie_word_embeddings": False,
}  # fmt: skip


def published(name):
    return read_description(f"configs/{name}")


@pytest.mark.parametrize(
    ("hf", "total", "tolerance"),
    [
        ("qwen3-30b-a3b", 30.5e9, 0.01),
        ("qwen3-235b-a22b", 235e9, 0.01),
        ("deepseek-v3", 671e9, 0.01),
        ("glm-4.5-air", 106e9, 0.01),
        ("moonlight-16b-a3b", 16e9, 0.01),
        ("minimax-m2", 228.7e9, 0.001),
        ("qwen3-next-80b-a3b", 80e9, 0.005),
        (QWEN2_MOE, 14.3e9, 0.01),
        (MIXTRAL, 46.7e9, 0.01),
        (GPT_OSS_20B, 20.91e9, 0.0005),
        (GPT_OSS_120B, 116.83e9, 0.0005),
        (LLAMA_8B, 8.03e9, 0.001),
        (LLAMA_1B, 1.236e9, 0.001),
        (QWEN2_7B, 7.62e9, 0.001),
    ],
    ids=lambda value: value["model_type"] if isinstance(value, dict) else str(value),
)
def test_total_parameters_are_the_published_ones_within_one_percent(hf, total, tolerance):
    model = published(hf) if isinstance(hf, str) else describe(hf)
    assert parameters.total(model) == pytest.approx(total, rel=tolerance)


def test_kimi_k2_has_the_parameters_of_its_published_files_to_the_digit():
    model = published("kimi-k2")
    biases = parameters.rank_count(model, ParallelConfig()).buffers // 2  # the other half counts tokens
    assert parameters.total(model) + biases == 1_026_408_232_448


def test_qwen3_5_has_the_parameters_of_the_published_files_text_models_to_the_digit():
    """What others counted from the files' headers, without the model of pictures and the layer that predicts a second
    token."""
    small, middle, large = (published(f"qwen3.5-{name}") for name in ("35b-a3b", "122b-a10b", "397b-a17b"))
    assert parameters.total(small) == 34_660_610_688
    assert parameters.total(middle) == 122_111_526_912
    assert parameters.total(large) == 396_346_350_336


def test_deepseek_v3_2_has_the_parameters_of_its_published_files_to_the_digit():
    """685,396,921,376, of which 41,591,584 are scales of fp8. Indexers stand in every layer, and one in the layer that
    predicts a second token, which also has norms, a projection of both inputs and both matrices at the ends of its own;
    routing biases count."""
    model = published("deepseek-v3.2")
    (chooser, _), h = parameters.indexer(model), model.hidden
    biases = parameters.rank_count(model, ParallelConfig()).buffers // 2
    last = parameters.layer(model, 60, ParallelConfig()).parameters + model.num_experts
    second = last + 2 * h**2 + 3 * h + 2 * model.vocab_size * h
    total = parameters.total(model) + biases + second + (model.num_layers + 1) * chooser
    assert total == 685_396_921_376 - 41_591_584
    assert parameters.indexer(published("deepseek-v3")) == (0, 0)


def test_a_server_holds_an_indexer_whole_on_each_gpu_with_a_cache_of_its_keys():
    """DeepSeek-V3.2's 61 indexers in bfloat16 are 1.6 GiB; its keys take 132 bytes a token and layer, latents 1,152."""
    v3, v32 = (
        server_of(published(name), GPUS["b200"], tp=8, weight_bytes=2.0, cache_bytes=2.0, tokens_each=1024.0,
                  longest=2048, most=64, static=0.93)
        for name in ("deepseek-v3", "deepseek-v3.2")
    )  # fmt: skip
    assert v32.weights - v3.weights == 61 * 2 * 13_959_424
    assert v32.cache / v32.cache_tokens == pytest.approx(61 * (2 * 576 + 132), rel=1e-4)
    assert v32.step_s(64, 1024.0) > v3.step_s(64, 1024.0)


def test_glm_4_7_flash_has_the_bytes_of_its_published_files_with_its_layer_that_predicts_a_second_token():
    """62.5 GB of bfloat16. Norms, a projection of both inputs and both matrices at the ends are that layer's own."""
    model = published("glm-4.7-flash")
    last, h = parameters.layer(model, 46, ParallelConfig()).parameters, model.hidden
    second = last + 2 * h**2 + 3 * h + 2 * model.vocab_size * h
    assert 2 * (parameters.total(model) + second) == pytest.approx(62.5e9, rel=0.001)


def test_qwen3_next_has_the_parameters_of_its_published_files_with_its_layer_that_predicts_a_second_token():
    """81.3B. That layer attends, and has a projection of both inputs and three norms of its own."""
    model = published("qwen3-next-80b-a3b")
    second = parameters.layer(model, 47, ParallelConfig()).parameters + 2 * model.hidden**2 + 3 * model.hidden
    assert parameters.total(model) + second == pytest.approx(81.3e9, rel=0.001)


def test_states_of_gated_delta_nets_take_the_place_of_a_cache_in_most_layers():
    """Qwen3-Next: 36 layers of 32 heads of 128 x 128, and three tokens before filters over 8,192 channels."""
    model = published("qwen3-next-80b-a3b")
    assert parameters.delta_state(model, 4) == (36 * 32 * 128 * 128 // 4, 36 * 3 * 8192 // 4)
    assert parameters.delta_state(published("qwen3-30b-a3b")) == (0, 0)
    token, square = flops.forward(model, 1.0, 0.0), flops.forward(model, 0.0, 1.0)
    assert square == 12 * 2 * 16 * 256
    assert token - 2 * flops.matmul_parameters(model) == 36 * 6 * 32 * 128 * 128


@pytest.mark.parametrize(
    ("name", "active", "digit", "ends"),
    [
        ("qwen3-30b-a3b", 3.3e9, 0.1e9, True),
        ("qwen3-235b-a22b", 22e9, 1e9, True),
        ("deepseek-v3", 37e9, 1e9, True),
        ("kimi-k2", 32e9, 1e9, True),
        ("glm-4.7-flash", 3e9, 1e9, True),
        ("minimax-m2", 10e9, 1e9, False),
        ("qwen3-next-80b-a3b", 3e9, 1e9, False),
        ("qwen3.5-35b-a3b", 3e9, 1e9, True),
        ("qwen3.5-122b-a10b", 10e9, 1e9, True),
        ("qwen3.5-397b-a17b", 17e9, 1e9, True),
        ("deepseek-v3.2", 37e9, 1e9, True),
        # these two are published without embedding and LM head
        ("glm-4.5-air", 12e9, 1e9, False),
        ("moonlight-16b-a3b", 2.24e9, 0.01e9, False),
    ],
)
def test_active_parameters_are_the_published_ones_within_one_of_their_last_digit(name, active, digit, ends):
    model = published(name)
    outside = 0 if ends else 2 * model.vocab_size * model.hidden
    assert abs(parameters.active(model) - outside - active) < digit


@pytest.mark.parametrize(("hf", "active"), [(GPT_OSS_20B, 3.61e9), (GPT_OSS_120B, 5.13e9)])
def test_active_parameters_of_gpt_oss_are_the_published_ones_without_the_embedding(hf, active):
    model = describe(hf)
    assert parameters.active(model) - model.vocab_size * model.hidden == pytest.approx(active, abs=0.005e9)


def test_moonlight_without_embedding_and_head_has_the_published_total():
    model = published("moonlight-16b-a3b")
    assert parameters.total(model) - 2 * model.vocab_size * model.hidden == pytest.approx(15.29e9, abs=0.005e9)


@pytest.mark.parametrize(
    ("name", "tokens_s", "tflops"),
    [
        ("qwen3-30b-a3b", 10494, 241),
        ("qwen3-30b-a3b", 28934, 666),
        ("qwen3-235b-a22b", 1204, 178),
        ("qwen3-235b-a22b", 5350, 792),
    ],
)
def test_flops_of_a_token_are_those_of_published_throughputs(name, tokens_s, tflops):
    """Megatron-Bridge's tables give both for sequences of 4,096 tokens; three digits are printed."""
    assert flops.training(published(name), 4096, 4096**2) / 4096 == pytest.approx(tflops * 1e12 / tokens_s, rel=0.01)


@pytest.mark.parametrize(("tokens_s", "tflops"), [(1297, 338), (3943, 1026)])
def test_flops_of_deepseek_v3_are_published_with_its_layer_that_predicts_a_second_token(tokens_s, tflops):
    a = published("deepseek-v3")
    last = parameters.layer(a, 60, ParallelConfig())
    idle = (a.num_experts - a.topk) * 3 * a.hidden * a.expert_ffn
    second = last.parameters - idle + 2 * a.hidden**2 + a.hidden * a.vocab_size
    both = (flops.training(a, 4096, 4096**2) + 6 * second * 4096) / 4096 + 3 * (a.query + a.value) * 4096
    assert both == pytest.approx(tflops * 1e12 / tokens_s, rel=0.01)


def test_the_trainers_efficiency_lies_within_what_is_published_for_bf16_on_h100():
    reached = EFFICIENCY.train * GPUS["h100"].bf16
    assert 153e12 <= reached <= 276e12


def test_a_layer_keeps_34_bytes_a_hidden_element_where_it_is_the_papers_layer():
    """2205.05198, equation 2 without its attention matrices: 34 s b h = 11 attention + 19 MLP + 4 norms, of which two
    masks of dropout are 2. That layer has no gate and no rotation, so neither the gate's F = 4 H nor the rotated copies
    of queries and keys count."""
    h = 64
    a = describe(
        {
            "model_type": "qwen3", "vocab_size": 512, "hidden_size": h, "intermediate_size": 4 * h, "head_dim": 16,
            "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 4, "rms_norm_eps": 1e-6,
        }
    )  # fmt: skip
    attention = memory.kept_attention(a) - (a.query + a.key_value)
    mlp = memory.kept_mlp(a, sparse=False) - a.ffn
    assert 2 * (attention + mlp) + 2 * h == 34 * h


def test_selective_and_full_recomputation_keep_less_and_pay_in_flops():
    model = published("qwen3-30b-a3b")
    kept, paid = [], []
    for recompute in ("none", "selective", "full"):
        kept.append(memory.kept(model, ParallelConfig(), TrainerConfig(recompute=recompute), BF16, 4096)[0])
        paid.append(flops.training(model, 4096, 4096**2, recompute=recompute))
    assert kept == sorted(kept, reverse=True)
    assert paid == sorted(paid)
    assert paid[2] == pytest.approx(paid[0] * 4 / 3)


def test_a_pipeline_holds_as_many_micro_batches_as_the_papers_say():
    plain = ParallelConfig(ranks=8, pipeline=8)
    assert [memory.in_flight(plain, stage) for stage in range(8)] == [8, 7, 6, 5, 4, 3, 2, 1]
    assert memory.in_flight(plain, 0, micro_batches=3) == 3
    chunked = ParallelConfig(ranks=8, pipeline=8, virtual_pipeline=3)
    assert memory.in_flight(chunked, 0) == pytest.approx(8 * (1 + 7 / 24))  # 2205.05198, section 4.2.3


def test_tensor_parallel_ranks_divide_what_is_kept_and_context_ranks_too():
    model, trainer = published("qwen3-30b-a3b"), TrainerConfig()
    one, _ = memory.kept(model, ParallelConfig(), trainer, BF16, 8192)
    for settings in ({"tensor": 2, "sequence": True}, {"context": 2}):
        two, _ = memory.kept(model, ParallelConfig(ranks=2, **settings), trainer, BF16, 8192)
        assert two == pytest.approx(one / 2)


def test_an_offloaded_optimizer_lies_in_the_machines_memory():
    model, parallel = published("qwen3-30b-a3b"), ParallelConfig(ranks=8, expert=8)
    on, off = (
        memory.rank_memory(model, parallel, TrainerConfig(offload_optimizer=o), BF16, 4096, stage=0)
        for o in (False, True)
    )
    assert (on.host, off.optimizer) == (0.0, 0.0)
    assert on.optimizer == pytest.approx(12 * parameters.total(model) / 8)
    assert off.host == pytest.approx(16 * parameters.total(model) / 8)


def test_a_teacher_beside_the_policy_holds_its_own_weights_and_a_server_is_no_part_of_the_trainer(tmp_path):
    policy, teacher = published("qwen3-30b-a3b"), published("glm-4.5-air")
    parallel = ParallelConfig(ranks=8, expert=8)
    alone, taught = (
        memory.rank_memory(policy, parallel, TrainerConfig(), BF16, 4096, stage=0, teacher=known)
        for known in (None, teacher)
    )
    count = parameters.rank_count(teacher, parallel, 0)
    assert alone.others == 0
    assert taught.others == memory.states(count, parallel, BF16)[0] > 20e9
    (tmp_path / "config.json").write_text(json.dumps(TinyModelConfig().hf_config()))
    own = [f"teacher.path={tmp_path}", "objective={preset: gspo, distillation: {place: loss}}"]
    config = load_config("configs/quickstart.yaml", own)
    assert teacher_of(config) is None
    config = load_config("configs/quickstart.yaml", [*own, "teacher.engine=trainer"])
    assert teacher_of(config) is not None
    (tmp_path / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"teacher\.path: .* has no config\.json"):
        teacher_of(config)
