"""The rotary embedding of packed sequences equals Megatron-Core's own, value and gradient."""

import numpy as np
import pytest

from megatron_ext.config import ParallelConfig
from tests.support.ranks import run_ranks

LENGTHS = (8, 4, 12)


def both(config: ParallelConfig, rows: int, rotated: int, interleaved: bool):
    """(ours, theirs, our gradient, their gradient) on this rank."""
    import importlib.util

    import torch
    from megatron.core.models.common.embeddings import rope_utils

    from megatron_ext.mcore import parallel_state

    # a second copy of the module, with the vendor's functions in it
    spec = importlib.util.find_spec(rope_utils.__name__)
    assert spec is not None
    assert spec.loader is not None
    vendor = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(vendor)

    generator = torch.Generator().manual_seed(0)
    tokens = sum(LENGTHS) // config.context
    freqs = torch.rand(rows, 1, 1, rotated // 2, generator=generator)
    freqs = torch.cat([freqs, freqs], -1)
    values = torch.randn(tokens, 3, 8, generator=generator)
    weights = torch.randn(tokens, 3, 8, generator=generator)
    out = []
    for module in (rope_utils, vendor):
        t = values.clone().requires_grad_()
        cu = torch.tensor((0, *np.cumsum(LENGTHS)), dtype=torch.int32)
        group = parallel_state.get_context_parallel_group()
        result = module._apply_rotary_pos_emb_thd(
            t, cu, freqs, mla_rotary_interleaved=interleaved, mscale=1.2, cp_group=group
        )
        (result * weights).sum().backward()
        assert t.grad is not None
        out.append((result.detach().numpy(), t.grad.numpy()))
    return rope_utils._apply_rotary_pos_emb_thd.__module__, out


@pytest.mark.parametrize("rows", [max(LENGTHS), sum(LENGTHS)], ids=["angles of a sequence", "angles of the pack"])
@pytest.mark.parametrize("context", [1, 2])
@pytest.mark.parametrize(("rotated", "interleaved"), [(8, False), (4, False), (8, True)], ids=str)
def test_packed_rotary_embedding_equals_megatrons(context, rows, rotated, interleaved):
    config = ParallelConfig(ranks=context, context=context)
    for module, (ours, theirs) in run_ranks(both, config, rows, rotated, interleaved):
        assert module == "megatron_ext.cpu.rope"
        assert np.abs(ours[0] - theirs[0]).max() < 1e-6
        assert np.abs(ours[1] - theirs[1]).max() < 1e-6
