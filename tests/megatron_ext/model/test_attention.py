"""Core attention without Transformer Engine against its equation, written out; on one rank, with its gradients."""

import pytest

from megatron_ext.config import ParallelConfig
from tests.support.ranks import run_ranks

LENGTHS = [1, 9, 4, 24, 5]  # of a pack; 5 is the window
CASES = {
    "full": (None, LENGTHS),
    "window": (5, LENGTHS),
    "window wider than all": (64, LENGTHS),
    "one length": (None, [7, 7, 7]),
    "lengths of one call": (None, [6, 4, 7]),
}


def equation(q, k, v, sinks, window, scale):
    """[t, heads, d] of one sequence -> [t, heads * d]."""
    import torch

    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = scale * torch.einsum("ihd,jhd->hij", q, k)
    back = torch.arange(len(q))[:, None] - torch.arange(len(q))
    hidden = (back < 0) | (back >= (window or len(q)))
    scores = torch.cat([scores.masked_fill(hidden, -torch.inf), sinks[:, None, None].expand(-1, len(q), 1)], -1)
    return torch.einsum("hij,jhd->ihd", scores.softmax(-1)[..., :-1], v).flatten(1)


def differences(_config: ParallelConfig, window: int | None, each: list[int]):
    """Largest difference of the output and of each gradient; and of the sinks' gradient, its largest element."""
    import torch

    from megatron_ext.mcore import AttnMaskType, PackedSeqParams, ProcessGroupCollection, TransformerConfig
    from megatron_ext.model.attention import SDPACoreAttention

    torch.manual_seed(0)
    config = TransformerConfig(
        num_layers=1, hidden_size=32, num_attention_heads=4, num_query_groups=2, attention_dropout=0.0,
        softmax_type="learnable", window_size=window and (window - 1, 0), use_cpu_initialization=True,
    )  # fmt: skip
    groups = ProcessGroupCollection.use_mpu_process_groups()
    layer = SDPACoreAttention(config, 1, AttnMaskType.causal, "self", softmax_scale=0.7, pg_collection=groups)
    with torch.no_grad():
        layer.softmax_offset.normal_()
    tokens = sum(each)
    inputs = [torch.randn(tokens, heads, 8, requires_grad=True) for heads in (4, 2, 2)]
    ends = torch.tensor([0, *each]).cumsum(0).int()
    packed = layer(*inputs, packed_seq_params=PackedSeqParams(qkv_format="thd", cu_seqlens_q=ends, cu_seqlens_kv=ends))
    rows = layer(*(x[:, None] for x in inputs))[:, 0]
    leaves = [*inputs, layer.softmax_offset]

    def both(ours, lengths):
        parts = zip(*(x.split(lengths) for x in inputs), strict=True)
        theirs = torch.cat([equation(*part, layer.softmax_offset, window, 0.7) for part in parts])
        weight = torch.randn_like(theirs)
        pairs = zip(*(torch.autograd.grad((out * weight).sum(), leaves) for out in (ours, theirs)), strict=True)
        return [float((a - b).abs().max()) for a, b in ((ours, theirs), *pairs)]

    sinks = torch.autograd.grad(packed.sum(), layer.softmax_offset, retain_graph=True)[0]
    return both(packed, each), both(rows, [tokens]), float(sinks.abs().min())


@pytest.mark.parametrize(("window", "each"), CASES.values(), ids=CASES)
def test_sinks_and_windows_are_the_equations_with_all_gradients(window, each):
    ((packed, rows, sinks),) = run_ranks(differences, ParallelConfig(), window, each)
    assert max(packed) < 1e-5
    assert max(rows) < 1e-5
    assert sinks > 0.01
