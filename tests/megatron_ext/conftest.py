import pytest


def _save(config, model_class, folder):
    import torch

    torch.manual_seed(0)
    model_class(config).to(torch.float32).save_pretrained(folder)
    return folder


SHAPE = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "initializer_range": 0.1,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory):
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        **SHAPE, moe_intermediate_size=64, num_experts=8, num_experts_per_tok=2, norm_topk_prob=True
    )
    return _save(config, Qwen3MoeForCausalLM, tmp_path_factory.mktemp("moe"))


@pytest.fixture(scope="session")
def tiny_dense_model_dir(tmp_path_factory):
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return _save(Qwen3Config(**SHAPE), Qwen3ForCausalLM, tmp_path_factory.mktemp("dense"))
