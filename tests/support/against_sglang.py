"""Our CPU kernels beside what they replace in SGLang, on random inputs; prints the largest differences as JSON.

A program of its own, forked from the process that forks servers: SGLang's import takes seconds and changes global state
of torch and transformers.
"""

from __future__ import annotations

import json
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

HEADS, KV_HEADS, DIM, SLOTS = 4, 2, 32, 4096


def largest_difference(a, b):
    return float((a.double() - b.double()).abs().max())


def random_batch(lengths, prefixes):
    """Slot table with scattered slots, and caches; the lengths are those of whole sequences."""
    requests = len(lengths)
    table = torch.zeros(requests + 1, max(lengths), dtype=torch.int32)
    free = torch.randperm(SLOTS - 1) + 1
    for row, length in enumerate(lengths, start=1):
        table[row, :length], free = free[:length].to(torch.int32), free[length:]
    keys, values = torch.randn(SLOTS, KV_HEADS, DIM), torch.randn(SLOTS, KV_HEADS, DIM)
    query = torch.randn(sum(n - p for n, p in zip(lengths, prefixes, strict=True)), HEADS, DIM)
    return table, torch.arange(1, requests + 1), keys, values, query


def attention(lengths, prefixes, *, decode):
    from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

    from pipeline.engine.inside.cpu.batched_attention import attend, make_plan

    table, rows, keys, values, query = random_batch(lengths, prefixes)
    queries = [n - p for n, p in zip(lengths, prefixes, strict=True)]
    native = TorchNativeAttnBackend.__new__(TorchNativeAttnBackend)
    common = (query, torch.empty_like(query), keys, values, table, rows, torch.tensor(lengths))
    settings = {"scaling": DIM**-0.5, "enable_gqa": True}
    if decode:
        expected = native._run_sdpa_forward_decode(*common, causal=False, **settings)
    else:
        expected = native._run_sdpa_forward_extend(
            *common, torch.tensor(prefixes), torch.tensor(queries), causal=True, **settings
        )
    plan = make_plan(table, rows.tolist(), prefixes, queries)
    return largest_difference(attend(query, keys, values, table, plan, DIM**-0.5), expected)


def by_definition(query, keys, values, table, rows, prefixes, queries, window, sinks):
    """Attention in float64, a token at a time: the softmax of the scores that the window leaves, and of a sink."""
    out, place = [], 0
    for row, prefix, count in zip(rows.tolist(), prefixes, queries, strict=True):
        for position in range(prefix, prefix + count):
            slots = table[row, max(0, position - window) : position + 1].long()
            k, v = (c[slots].double().repeat_interleave(HEADS // c.shape[1], 1) for c in (keys, values))
            scores = torch.einsum("hd,khd->hk", query[place].double(), k) * DIM**-0.5
            weights = torch.softmax(torch.cat([scores, sinks.double()[:, None]], 1), 1)[:, :-1]
            out.append(torch.einsum("hk,khd->hd", weights, v))
            place += 1
    return torch.stack(out)


def other_attention(*, window=None, sinks=False, value_dim=None):
    """Of what `torch_native` has not: windows, sinks, and (value_dim) values that are the first part of their keys."""
    from pipeline.engine.inside.cpu.batched_attention import attend, make_plan

    largest = 0.0
    for lengths, prefixes in (([1, 2, 17, 333], [0, 1, 16, 332]), ([1, 12, 500, 7, 300], [0, 3, 0, 2, 130])):
        table, rows, keys, values, query = random_batch(lengths, prefixes)
        if value_dim is not None:
            values = keys
        queries = [n - p for n, p in zip(lengths, prefixes, strict=True)]
        heads = torch.randn(HEADS) if sinks else torch.full((HEADS,), -torch.inf)
        seen = max(lengths) if window is None else window
        expected = by_definition(query, keys, values[..., :value_dim], table, rows, prefixes, queries, seen, heads)
        plan = make_plan(table, rows.tolist(), prefixes, queries)
        found = attend(
            query, keys, values, table, plan, DIM**-0.5,
            value_dim=value_dim, window=window, sinks=heads if sinks else None,
        )  # fmt: skip
        largest = max(largest, largest_difference(found, expected))
    return largest


def on_threads():
    """The same batch on one thread and on three, of which two are let before the one that waits for all."""
    from pipeline.engine.inside.cpu import batched_attention as batched

    lengths, prefixes = [1, 100, 40, 90, 7], [0, 99, 10, 2, 0]
    table, rows, keys, values, query = random_batch(lengths, prefixes)
    plan = batched.make_plan(table, rows.tolist(), prefixes, [n - p for n, p in zip(lengths, prefixes, strict=True)])
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batched, "_WORTH_THREADS", 0)
        for threads in (1, 3):
            patch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
            if threads > 1:
                taken = helpers_first(patch, batched, lambda work: work.args[-1][0])
            found.append(batched.attend(query, keys, values, table, plan, DIM**-0.5))
    return 0.0 if torch.equal(*found) and taken[0] > 0 else 1.0


def helpers_first(patch, module, parts_taken):
    """`together` of a module, so that others have begun before this thread does. Returns a list of how many parts they
    had taken then."""
    together, taken = module.together, []

    def waiting(work):
        def late(leads):
            if leads:
                until = time.monotonic() + 30
                while not parts_taken(work) and time.monotonic() < until:
                    time.sleep(1e-3)
                taken.append(int(parts_taken(work)))
            work(leads)

        together(late)

    patch.setattr(module, "together", waiting)
    return taken


def norms():
    from sglang.srt.layers.layernorm import RMSNorm

    from pipeline.engine.inside.cpu.patches import rms_norm

    norm = RMSNorm(64)
    norm.weight.data.normal_()
    x, residual = torch.randn(9, 64), torch.randn(9, 64)

    def refuse(*_):
        raise AssertionError("the replacement fell back to the original")

    plain = largest_difference(rms_norm(refuse, norm, x), norm.forward_native(x))
    with_residual = zip(rms_norm(refuse, norm, x, residual), norm.forward_native(x, residual), strict=True)
    strided = torch.randn(9, 128)[:, 32:96]
    return max(
        plain,
        *(largest_difference(a, b) for a, b in with_residual),
        largest_difference(rms_norm(refuse, norm, strided), norm.forward_native(strided)),
    )


def rotation():
    from sglang.srt.layers.layernorm import RMSNorm
    from sglang.srt.layers.rotary_embedding.base import RotaryEmbedding

    from pipeline.engine.inside.cpu.patches import norm_and_rotate

    q_norm, k_norm = RMSNorm(DIM), RMSNorm(DIM)
    q_norm.weight.data.normal_()
    k_norm.weight.data.normal_()
    rotary = RotaryEmbedding(DIM, DIM, 512, 10000.0, True, torch.float32)
    sizes = {"q_size": HEADS * DIM, "kv_size": KV_HEADS * DIM}
    layer = SimpleNamespace(
        rotary_emb=rotary, q_norm=q_norm, k_norm=k_norm, head_dim=DIM, num_heads=HEADS, num_kv_heads=KV_HEADS, **sizes
    )
    qkv, positions = torch.randn(9, (HEADS + 2 * KV_HEADS) * DIM), torch.randint(0, 512, (9,))
    q, k, v = qkv.split([HEADS * DIM, KV_HEADS * DIM, KV_HEADS * DIM], dim=-1)
    normed = [norm.forward_native(x.reshape(-1, DIM)).view(x.shape) for norm, x in ((q_norm, q), (k_norm, k))]
    expected = [*rotary.forward_native(positions, *normed), v]
    ours = norm_and_rotate(None, layer, qkv.clone(), positions, None)  # pyright: ignore[reportArgumentType]
    return max(largest_difference(a, b) for a, b in zip(ours, expected, strict=True))


def moe_settings():
    """SGLang's formula of all experts, and a configuration that it takes."""
    from sglang.srt.layers import activation
    from sglang.srt.layers.moe import fused_moe_native

    # The class asks SGLang's global configuration at construction; its formula does not.
    fused_moe_native.SiluAndMul = lambda: lambda x: activation.SiluAndMul.forward_native(None, x)  # pyright: ignore
    config = SimpleNamespace(activation="silu", gemm1_alpha=None, gemm1_clamp_limit=None)
    config.apply_router_weight_on_input = False
    return fused_moe_native.moe_forward_native, config


def rotation_alone():
    """The same bits as SGLang's, of queries and keys that lie in one tensor; and other kinds are left to SGLang."""
    from sglang.srt.layers.rotary_embedding.base import RotaryEmbedding

    from pipeline.engine.inside.cpu.patches import rotate

    def refuse(*_):
        raise AssertionError("the replacement fell back to the original")

    positions, x = torch.randint(0, 512, (9,)), torch.randn(9, (HEADS + KV_HEADS) * DIM)
    query, key = x.split([HEADS * DIM, KV_HEADS * DIM], dim=-1)
    whole = RotaryEmbedding(DIM, DIM, 512, 10000.0, True, torch.float32)
    pairs = zip(rotate(refuse, whole, positions, query, key), whole.forward_native(positions, query, key), strict=True)
    same = all(torch.equal(*pair) for pair in pairs)
    for other in ((DIM, DIM // 2, 512, 10000.0, True), (DIM, DIM, 512, 10000.0, False)):  # in part; in pairs
        rotary = RotaryEmbedding(*other, torch.float32)
        same = same and rotate(lambda *_: "SGLang's", rotary, positions, query, key) == "SGLang's"
    return 0.0 if same and rotate(lambda *_, **__: 1, whole, positions, query, key, offsets=positions) == 1 else 1.0


def storing():
    """Keys and values are where SGLang puts them, and those of half precision are left to it."""
    from sglang.srt.mem_cache import memory_pool

    from pipeline.engine.inside.cpu.patches import store

    def refuse(*_, **__):
        raise AssertionError("the replacement fell back to the original")

    given, places = torch.randn(2, 9, 3 * DIM), torch.randperm(20)[:9]
    k, v = given[0, :, :DIM].view(9, 2, -1), given[1, :, DIM:].unflatten(1, (2, -1))[..., ::2]
    caches = [torch.zeros(2, 20, 2, DIM // 2) for _ in range(2)]
    theirs = [cache.clone() for cache in caches]
    for write, (keys, values) in ((lambda *a, **n: store(refuse, *a, **n), caches), (None, theirs)):
        for i in range(2):
            (write or memory_pool._set_kv_buffer_impl)(
                k, v, keys[i], values[i], places, row_dim=DIM, v_row_dim=2 * DIM,
                store_dtype=torch.float32, device_module=None, size_limit=20,
            )  # fmt: skip
    called = []
    half = [t.bfloat16() for t in (k, v, caches[0][0], caches[1][0])]
    store(lambda *_, **__: called.append(1), *half, places)
    return 0.0 if called and all(torch.equal(*pair) for pair in zip(caches, theirs, strict=True)) else 1.0


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


def main():
    torch.manual_seed(0)
    decode = [1, 2, 17, 40, 333]
    report = {
        "decode": attention(decode, [n - 1 for n in decode], decode=True),
        "short prompts": attention([1, 5, 12, 100], [0, 0, 0, 0], decode=False),
        "short prompts after a cached prefix": attention([9, 50, 120], [3, 49, 60], decode=False),
        "a long prompt among short ones": attention([12, 500, 7], [0, 0, 2], decode=False),
        "a long prompt after a cached prefix": attention([500, 12], [130, 0], decode=False),
        "threads": on_threads(),
        "a window": other_attention(window=5),
        "a window of many tokens": other_attention(window=200),
        "sinks": other_attention(sinks=True),
        "a window and sinks": other_attention(window=5, sinks=True),
        "latents": other_attention(value_dim=20),
        "norms": norms(),
        "rotation": rotation(),
        "rotation alone": rotation_alone(),
        "storing": storing(),
        "large experts": large_experts(own=True),
        "large experts in the library's order": large_experts(own=False),
        "experts": experts(all_to_one=False),
        "experts when all tokens choose the same": experts(all_to_one=True),
        "experts of many rows and of few": experts(all_to_one=True, tokens=300),
        "largest of a softmax": largest_of_softmax(),
        "experts of several ranks": parted_experts(),
        "large experts of several ranks": parted_experts(width=512),
        "biased experts of several ranks": parted_experts(biased=True),
        "routers": routers(),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    np.seterr(all="raise")
    main()
