"""mbridge, another bridge from Hugging Face to Megatron-Core, puts the same shards into the same parameters."""

import dataclasses

import pytest

from megatron_ext.config import OptimizerConfig, ParallelConfig, TrainerConfig
from tests.support.ranks import run_ranks
from tests.support.tiny_families import save_family

LAYOUT = ParallelConfig(ranks=2, tensor=2, sequence=True, expert=2, expert_tensor=1)
DENSE = ParallelConfig(ranks=2, tensor=2, sequence=True)  # the same groups, without experts
FAMILIES = ["llama", "llama, untied", "qwen2", "qwen2_moe", "mixtral", "deepseek_v3", "moonlight", "glm4_moe"]


@pytest.fixture(scope="module")
def models(tmp_path_factory, tiny_model_dir, tiny_dense_model_dir):
    """family -> directory; of the models of the session and of tiny_families."""
    made = {name: str(save_family(name, tmp_path_factory.mktemp("mbridge"))) for name in FAMILIES}
    return {"qwen3_moe": str(tiny_model_dir), "qwen3": str(tiny_dense_model_dir)} | made


def bridge_of(model: str, described):
    """mbridge 0.15.1, told what it reads of a config of transformers 4, and of the model that it would make."""
    import torch
    from mbridge import AutoBridge
    from mbridge.core.parallel_states import ParallelStates
    from mbridge.core.safetensor_io import SafeTensorIO
    from mbridge.models import DeepseekV3Bridge
    from transformers import AutoConfig

    from megatron_ext.mcore import MLATransformerConfig

    fields = {field.name for field in dataclasses.fields(MLATransformerConfig)}

    def latent(**settings):
        """Without what this Megatron-Core (0.19.2) does not know, and no weight depends on."""
        return MLATransformerConfig(**{k: v for k, v in settings.items() if k in fields})

    DeepseekV3Bridge.TransformerConfigClass = staticmethod(latent)
    config = AutoConfig.from_pretrained(model)
    config.rope_theta = config.rope_parameters["rope_theta"]
    if getattr(config, "head_dim", 0) is None:
        config.head_dim = config.hidden_size // config.num_attention_heads
    states = ParallelStates.get_parallel_state()
    if not described.num_experts:
        states = dataclasses.replace(states, ep_size=1, ep_rank=0)
    bridge = AutoBridge.from_config(config, dtype=torch.float32, make_vocab_size_divisible_by=1, parallel_states=states)
    bridge.vocab_size, bridge.padded_vocab_size = described.vocab_size, described.padded_vocab_size(LAYOUT.tensor)
    bridge._get_safetensor_io = SafeTensorIO  # of DeepSeek-V3 it would read float8 on a GPU
    return bridge


def loaded_by_both(config: ParallelConfig, models: dict[str, str]) -> dict[str, tuple[int, list[str]]]:
    """Runs on a rank: for each family, how many tensors were compared and which differ."""
    import torch

    from megatron_ext.hf.description import read_description
    from megatron_ext.trainer import Trainer

    out = {}
    for family, model in models.items():
        layout = config if read_description(model).num_experts else DENSE
        policy = Trainer(model, layout, TrainerConfig(), OptimizerConfig(), replay=False).policy
        ours = [{n: t.clone() for n, t in chunk.state_dict().items() if t is not None} for chunk in policy.chunks]
        with torch.no_grad():
            for chunk in policy.chunks:
                for tensor in (*chunk.parameters(), *chunk.buffers()):
                    tensor.fill_(float("nan"))
            bridge_of(model, policy.model).load_weights(policy.chunks, model)
        theirs = [chunk.state_dict() for chunk in policy.chunks]
        pairs = [(n, t, other[n]) for mine, other in zip(ours, theirs, strict=True) for n, t in mine.items()]
        out[family] = len(pairs), [n for n, t, other in pairs if not torch.equal(t, other)]
    return out


def test_every_shard_of_every_rank_equals_mbridges(models):
    for answers in run_ranks(loaded_by_both, LAYOUT, models):
        assert {family: wrong for family, (_, wrong) in answers.items()} == {family: [] for family in models}
        assert all(compared > 20 for compared, _ in answers.values())
