"""The part of `against_sglang.py` that is about experts and their routers."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch


def largest_difference(a, b):
    return float((a.double() - b.double()).abs().max())


def moe_settings():
    """SGLang's formula of all experts, and a configuration that it takes."""
    from sglang.srt.layers import activation
    from sglang.srt.layers.moe import fused_moe_native

    # The class asks SGLang's global configuration at construction; its formula does not.
    fused_moe_native.SiluAndMul = lambda: lambda x: activation.SiluAndMul.forward_native(None, x)  # pyright: ignore
    config = SimpleNamespace(activation="silu", gemm1_alpha=None, gemm1_clamp_limit=None)
    config.apply_router_weight_on_input = False
    return fused_moe_native.moe_forward_native, config


def large_experts(own):
    """Of which some have few rows, one many, and one none. own: whether products of a few rows may be our own."""
    from pipeline.engine.inside.cpu import few_rows
    from pipeline.engine.inside.cpu.patches import mixture_of_experts

    native, config = moe_settings()
    w13, w2 = torch.randn(6, 1024, 512) / 512**0.5, torch.randn(6, 512, 512) / 512**0.5
    layer = SimpleNamespace(num_experts=6, w13_weight=w13, w2_weight=w2)
    logits = torch.randn(80, 6) + torch.tensor([9.0, 1, 0, 0, 0, -99])
    weights, ids = torch.topk(logits.softmax(-1), 2)
    counts = torch.bincount(ids.flatten(), minlength=6)
    assert counts[0] > few_rows.MOST_ROWS > counts[2] > 0 == counts[5]
    x, topk = torch.randn(80, 512), (weights, ids.to(torch.int32), None)
    expected = native(layer, x, topk, config)  # pyright: ignore[reportArgumentType]
    with pytest.MonkeyPatch.context() as patch:
        called, original = [], few_rows.experts
        patch.setattr(few_rows, "experts", lambda *a: called.append(1) or original(*a))
        ours = mixture_of_experts(None, layer, x, topk, config, own=own)  # pyright: ignore[reportArgumentType]
        assert bool(called) == own
    return largest_difference(ours, expected)


def largest_of_softmax():
    """SGLang's own choice, of few experts and of many, some equally likely; and other kinds are left to SGLang."""
    from sglang.srt.layers.moe.topk import fused_topk_torch_native

    from pipeline.engine.inside.cpu.patches import top_of_softmax

    def refuse(*_):
        raise AssertionError("the replacement fell back to the original")

    largest = 0.0
    for tokens, number, topk, renormalize in (
        (1, 4, 1, False),
        (90, 8, 2, True),
        (33, 128, 8, True),
        (20, 6, 6, False),
    ):
        logits = 4 * torch.randn(tokens, number)
        weights, ids = top_of_softmax(refuse, logits, logits, topk, renormalize)
        expected, chosen = fused_topk_torch_native(logits, logits, topk, renormalize)
        assert torch.equal(ids, chosen)
        assert (weights.dtype, ids.dtype) == (expected.dtype, chosen.dtype)
        largest = max(largest, largest_difference(weights, expected))
    equal = torch.tensor([[0.0, 5, -1, 5, 5, -torch.inf, 0, 0], [-torch.inf] * 7 + [1.0]])
    weights, ids = top_of_softmax(refuse, equal, equal, 2, True)
    assert ids[0].tolist() == [1, 3]
    assert ids[1, 0] == 7
    largest = max(largest, largest_difference(weights, torch.tensor([[0.5, 0.5], [1, 0]])))
    for place in range(4):
        logits = torch.randn(3, 4)
        logits[1, place] = torch.nan
        weights, ids = top_of_softmax(refuse, logits, logits, 2, True)
        assert weights.isnan().all(1).tolist() == [False, True, False]
        assert sorted({*ids[1].tolist()} & {*range(4)}) == sorted(ids[1].tolist())
    called = []
    for more in ((torch.zeros(4), "softmax"), (None, "sigmoid")):
        top_of_softmax(lambda *given: called.append(given[-2:]), logits, logits, 2, True, *more)
    top_of_softmax(lambda *_: called.append(1), logits, logits.bfloat16(), 2, True)
    return largest if len(called) == 3 else 1.0


def experts(all_to_one, tokens=50):
    from pipeline.engine.inside.cpu.patches import mixture_of_experts

    native, config = moe_settings()
    layer = SimpleNamespace(num_experts=8, w13_weight=torch.randn(8, 128, 64) / 8, w2_weight=torch.randn(8, 64, 64) / 8)
    logits = torch.randn(tokens, 8) + (torch.tensor([9.0, 6.0] + [0.0] * 6) if all_to_one else 0.0)
    weights, ids = torch.topk(logits.softmax(-1), 2)
    x, topk = torch.randn(tokens, 64), (weights, ids.to(torch.int32), None)
    expected = native(layer, x, topk, config)  # pyright: ignore[reportArgumentType]
    ours = mixture_of_experts(None, layer, x, topk, config)  # pyright: ignore[reportArgumentType]
    return largest_difference(ours, expected)


def parted_experts(*, biased=False, width=64):
    """Experts of four ranks, which each have two and are told -1 of the others: summed up, they are one rank's."""
    from sglang.srt.layers.moe.token_dispatcher.standard import _map_topk_ids_to_local_experts
    from sglang.srt.layers.moe.topk import StandardTopKOutput

    from pipeline.engine.inside.cpu.patches import mixture_of_experts

    native, config = moe_settings()
    scale = width**-0.5
    whole = {"w13_weight": torch.randn(8, 2 * width, width) * scale, "w2_weight": torch.randn(8, width, width) * scale}
    if biased:
        whole |= {"w13_weight_bias": torch.randn(8, 2 * width), "w2_weight_bias": torch.randn(8, width)}
    # All tokens want an expert of the first rank, and none wants one of the last.
    logits = torch.randn(50, 8) + torch.tensor([99.0, 0, 0, 0, 0, 0, -99, -99])
    weights, ids = torch.topk(logits.softmax(-1), 2)
    x, ids = torch.randn(50, width), ids.to(torch.int32)
    weights = weights + 0.5  # the second is next to nothing else
    layer = SimpleNamespace(num_experts=8, **whole)
    expected = native(layer, x, StandardTopKOutput(weights, ids, logits), config)  # pyright: ignore
    found = torch.zeros_like(x)
    for first in range(0, 8, 2):
        held = SimpleNamespace(num_experts=8, **{name: each[first : first + 2] for name, each in whole.items()})
        places = torch.full((8,), -1, dtype=torch.int32)
        places[first : first + 2] = torch.arange(2, dtype=torch.int32)
        topk = StandardTopKOutput(weights, _map_topk_ids_to_local_experts(ids, places), logits)
        found += mixture_of_experts(native if biased else None, held, x, topk, config)  # pyright: ignore
    return largest_difference(found, expected)


def routers():
    """The float32 logits of a bfloat16 router, against the product in float64; a router of another kind is refused."""
    from sglang.srt.layers.linear import ReplicatedLinear
    from sglang.srt.models.deepseek_v2 import MoEGate
    from sglang.srt.models.glm4_moe import Glm4MoeGate

    from pipeline.engine.inside.router import make_routers_float32

    def model_with(gate):
        block = torch.nn.Module()
        block.gate, block.experts = gate, torch.nn.Module()
        return torch.nn.ModuleDict({"mlp": block})

    def biased_model_with(gate):  # as gpt-oss has it
        block = torch.nn.Module()
        block.router, block.experts = gate, torch.nn.Module()
        return torch.nn.ModuleDict({"mlp": block})

    gate, x = ReplicatedLinear(64, 8, bias=False, params_dtype=torch.bfloat16), torch.randn(50, 64).bfloat16()
    gate.weight.data.normal_()
    expected = x.double() @ gate.weight.double().t()
    assert largest_difference(gate(x)[0], expected) > 1e-2
    make_routers_float32(model_with(gate))
    with pytest.raises(RuntimeError, match=r"router of mlp is a Linear, .* set precision\.router=bf16"):
        make_routers_float32(model_with(torch.nn.Linear(64, 8)))
    found = largest_difference(gate(x)[0], expected)
    fields = SimpleNamespace(n_routed_experts=8, hidden_size=64, topk_method="noaux_tc")
    for other in (MoEGate(fields, None).bfloat16(), Glm4MoeGate(fields)):  # of DeepSeek, of GLM
        other.weight.data.copy_(gate.weight.data)
        make_routers_float32(model_with(other))
        found = max(found, largest_difference(other(x).detach(), expected))
    biased = ReplicatedLinear(64, 8, params_dtype=torch.bfloat16)
    biased.weight.data.copy_(gate.weight.data)
    biased.bias.data.normal_()
    make_routers_float32(biased_model_with(biased))
    return max(found, largest_difference(biased(x)[0].detach(), expected + biased.bias.double()))
