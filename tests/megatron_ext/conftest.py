import pytest

from tests.conftest import TINY


@pytest.fixture(scope="session")
def tiny_dense_model_dir(tmp_path_factory):
    """A random Qwen3 of the same shape, without experts."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    shape = {key: value for key, value in TINY.items() if "expert" not in key and "moe" not in key}
    shape.pop("norm_topk_prob")
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("dense")
    Qwen3ForCausalLM(Qwen3Config(**shape)).to(torch.float32).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def coded_model_dir(tmp_path_factory):
    """A random Qwen3-MoE with experts enough to write (sample, position, layer) in a route."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    from tests.megatron_ext.route_codes import MODEL

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("coded")
    Qwen3MoeForCausalLM(Qwen3MoeConfig(**MODEL)).save_pretrained(folder)
    return folder
