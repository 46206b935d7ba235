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

from tests.support.experts_against_sglang import (
    experts,
    large_experts,
    largest_difference,
    largest_of_softmax,
    parted_experts,
    routers,
)

HEADS, KV_HEADS, DIM, SLOTS = 4, 2, 32, 4096


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
