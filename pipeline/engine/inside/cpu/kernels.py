"""Loops over the rows of a decode step, compiled by numba (a dependency of SGLang). float32 only.

At a hidden size of 64 a PyTorch operation costs more to start than to run, so each function here does in one pass
what takes SGLang's torch fallbacks five to ten operations. They are compiled when this file is imported, and the
result is kept in `__pycache__`.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from pipeline.engine.inside.cpu.inlined import exp, look, take

# Sums may be reordered, so that they vectorise; infinities and NaN keep their meaning.
_FAST = {"fastmath": {"reassoc", "contract", "arcp", "nsz"}, "cache": True}


@njit(
    "void(f4[:,:,::1], f4[:,:,::1], f4[:,:,::1], i4[:,::1], i8[::1], i8[::1], i8[::1], f4, i8, f4[::1], f4[:,:,::1],"
    "i8[::1], b1)",
    nogil=True,
    **_FAST,
)
def causal_attention(
    query, key_cache, value_cache, slot_table, tokens, rows, positions, scale, window, sinks, output, counters, leads
):
    """Attention of single tokens over a paged KV cache: no gathering, no padding, no mask.

    query:          [tokens of the batch, heads, dim]; output: the same, with the values' dim.
    caches:         [slots, kv heads, dim]. Values may be wider than the output, whose part of them is taken.
    window:         tokens before its own that a query sees, at most.
    sinks:          [heads] scores of a term of the softmax that has no value; minus infinity: there is none.
    slot_table:     [requests, positions] slot of every position of every request.
    tokens:         the tokens to compute; the others' output is left alone.
    rows, positions: [tokens of the batch] row in the slot table, and position; keys 0 .. position are attended to.
    counters:       [2] zeros, shared by threads, which take tokens by turns. leads: this one returns when all is done.
    """
    kv_heads, dim, value_dim = key_cache.shape[1], key_cache.shape[2], output.shape[2]
    group = query.shape[1] // kv_heads
    longest = 0
    for t in tokens:
        longest = max(longest, positions[t] + 1)
    weights = np.empty(longest, np.float32)
    to_next, to_done = counters.ctypes.data, counters.ctypes.data + 8
    while True:
        number = take(to_next)
        if number >= tokens.size:
            break
        t = tokens[number]
        slots = slot_table[rows[t]]
        length = positions[t] + 1
        first = max(0, positions[t] - window)
        for head in range(kv_heads * group):
            kv_head = head // group
            largest = sinks[head]
            for j in range(first, length):
                slot = slots[j]
                score = np.float32(0)
                for d in range(dim):
                    score += query[t, head, d] * key_cache[slot, kv_head, d]
                score *= scale
                weights[j] = score
                largest = max(largest, score)
            total = np.exp(sinks[head] - largest)
            for j in range(first, length):
                weights[j] = exp(weights[j] - largest)
                total += weights[j]
            for d in range(value_dim):
                output[t, head, d] = 0
            for j in range(first, length):
                slot = slots[j]
                weight = weights[j] / total
                for d in range(value_dim):
                    output[t, head, d] += weight * value_cache[slot, kv_head, d]
        take(to_done)
    while leads and look(to_done) < tokens.size:
        pass


@njit("void(f4[:,::1], f4[::1], f4, f4[:,::1])", **_FAST)
def rms_norm(x, weight, epsilon, output):
    """output = x / sqrt(mean(x^2) + epsilon) * weight. x, output: [tokens, dim]."""
    tokens, dim = x.shape
    for t in range(tokens):
        total = np.float32(0)
        for d in range(dim):
            total += x[t, d] * x[t, d]
        factor = np.float32(1) / np.sqrt(total / np.float32(dim) + epsilon)
        for d in range(dim):
            output[t, d] = x[t, d] * factor * weight[d]


@njit("void(f4[:,::1], f4[:,::1], f4[::1], f4, f4[:,::1], f4[:,::1])", **_FAST)
def add_rms_norm(x, residual, weight, epsilon, output, new_residual):
    """new_residual = x + residual; output = its RMS norm. All [tokens, dim]."""
    tokens, dim = x.shape
    for t in range(tokens):
        total = np.float32(0)
        for d in range(dim):
            value = x[t, d] + residual[t, d]
            new_residual[t, d] = value
            total += value * value
        factor = np.float32(1) / np.sqrt(total / np.float32(dim) + epsilon)
        for d in range(dim):
            output[t, d] = new_residual[t, d] * factor * weight[d]


@njit("void(f4[:,::1], i8, i8, f4[::1], f4[::1], f4, f4[:,::1], i8[::1])", **_FAST)
def norm_and_rotate(qkv, heads, kv_heads, query_weight, key_weight, epsilon, cos_sin, positions):
    """RMS-normalise and rotate (halves, not pairs) every query and key head of `qkv`, in place.

    qkv: [tokens, (heads + 2 kv_heads) * dim]; the values are left alone.
    query_weight, key_weight: [dim]. cos_sin: [positions, dim], cosines first. positions: [tokens].
    """
    dim = query_weight.shape[0]
    half = dim // 2
    normed = np.empty(dim, np.float32)
    for t in range(qkv.shape[0]):
        position = positions[t]
        for head in range(heads + kv_heads):
            weight = query_weight if head < heads else key_weight
            row = qkv[t, head * dim : (head + 1) * dim]
            total = np.float32(0)
            for d in range(dim):
                total += row[d] * row[d]
            factor = np.float32(1) / np.sqrt(total / np.float32(dim) + epsilon)
            for d in range(dim):
                normed[d] = row[d] * factor * weight[d]
            for d in range(half):
                cos, sin = cos_sin[position, d], cos_sin[position, half + d]
                row[d] = normed[d] * cos - normed[half + d] * sin
                row[half + d] = normed[half + d] * cos + normed[d] * sin


@njit("void(f4[:,:], i8, f4[:,:], i8[::1], f4[:,::1])", cache=True)
def rotate(x, dim, cos_sin, positions, output):
    """Every head of `x`, halves and not pairs. x, output: [tokens, heads * dim]. cos_sin: [positions, dim], cosines
    first. positions: [tokens]."""
    half = dim // 2
    for t in range(x.shape[0]):
        angles = cos_sin[positions[t]]
        for start in range(0, x.shape[1], dim):
            row, out = x[t, start : start + dim], output[t, start : start + dim]
            for d in range(half):
                out[d] = row[d] * angles[d] - row[half + d] * angles[half + d]
                out[half + d] = row[half + d] * angles[d] + row[d] * angles[half + d]


@njit("void(f4[:,:,:], f4[:,:,:], i8[:])", cache=True)
def store_rows(rows, cache, places):
    """cache[places[t]] = rows[t]. rows: [tokens, heads, dim]. cache: [slots, heads, dim]. places: [tokens]."""
    for t in range(rows.shape[0]):
        cache[places[t]] = rows[t]


@njit("void(f4[:,::1], b1, f4[:,::1], i8[:,::1])", **_FAST)
def top_of_softmax(logits, renormalize, weights, experts):
    """The largest of each row's softmax, largest first, and which they are; of equal ones the first.

    logits: [tokens, experts]. weights, experts: [tokens, topk], the result; with `renormalize` divided by their sum.
    SGLang adds 1e-20 to that, which no sum of the largest feels. All weights of a row with a NaN are NaN.
    """
    topk = weights.shape[1]
    for t in range(logits.shape[0]):
        row, best, at = logits[t], weights[t], experts[t]
        found = 0
        for e in range(row.size):
            value = row[e]
            if found == topk and value <= best[topk - 1]:
                continue
            k = min(found, topk - 1)
            while k > 0 and value > best[k - 1]:
                best[k], at[k] = best[k - 1], at[k - 1]
                k -= 1
            best[k], at[k] = value, e
            found = min(found + 1, topk)
        largest, total, share = best[0], np.float32(0), np.float32(0)
        for e in range(row.size):
            total += exp(row[e] - largest)
        for k in range(topk):
            best[k] = exp(best[k] - largest) / total
            share += best[k]
        if renormalize:
            for k in range(topk):
                best[k] /= share


@njit("void(i8[:,::1], i8[::1], i8[::1])", cache=True)
def sort_by_expert(expert_ids, order, starts):
    """Counting sort of the (token, choice) pairs by expert, those of experts that other ranks hold behind all.

    expert_ids: [tokens, topk], -1 of another rank's. order: [tokens * topk] flat pairs, expert by expert.
    starts: [experts + 2]; the last but one is how many pairs are of this rank's experts.
    """
    topk, others = expert_ids.shape[1], starts.size - 2
    starts[:] = 0
    for t in range(expert_ids.shape[0]):
        for k in range(topk):
            e = expert_ids[t, k]
            starts[(e if e >= 0 else others) + 1] += 1
    for e in range(starts.size - 1):
        starts[e + 1] += starts[e]
    fill = starts[:-1].copy()
    for t in range(expert_ids.shape[0]):
        for k in range(topk):
            e = expert_ids[t, k] if expert_ids[t, k] >= 0 else others
            order[fill[e]] = t * topk + k
            fill[e] += 1


@njit("void(f4[:,::1], i8[::1], f4[:,::1], f4[:,::1])", **_FAST)
def combine_experts(expert_outputs, order, weights, output):
    """output[t] = sum over k of weights[t, k] * the output of the k-th expert of token t.

    expert_outputs: [pairs, dim] in the order of `sort_by_expert`. weights: [tokens, topk]. A pair whose expert another
    rank has is not in `order`, and adds nothing.
    """
    topk, dim = weights.shape[1], output.shape[1]
    output[:] = 0
    for i in range(order.size):
        t, k = order[i] // topk, order[i] % topk
        weight = weights[t, k]
        for d in range(dim):
            output[t, d] += weight * expert_outputs[i, d]


@njit("void(f4[:,::1], f8[::1], i4[::1])", cache=True)
def sample_rows(probabilities, uniforms, tokens):
    """Inverse of the cumulative distribution: the first token whose cumulative weight exceeds u * total.

    probabilities: [rows, vocabulary], need not sum to one. uniforms: [rows] in [0, 1). tokens: [rows], the result.
    A token of probability 0 is never drawn.
    """
    for i in range(probabilities.shape[0]):
        total = 0.0
        for probability in probabilities[i]:
            total += probability
        threshold = uniforms[i] * total
        cumulative = 0.0
        for token in range(probabilities.shape[1]):
            if probabilities[i, token] > 0:
                cumulative += probabilities[i, token]
                tokens[i] = token
                if cumulative > threshold:
                    break


@njit("void(f4[:,:,::1], f4[:,:,::1], f4[:,:,::1], f4[:,::1], f4[:,::1], f4[:,:,:,::1], i8[::1], f4[:,:,::1])", **_FAST)
def delta_step(query, key, value, decay, beta, states, slots, output):
    """One token of each request through a gated delta net, whose states are moved on in place.

        S = exp(decay) S;   S += beta (value - S key) key^T;   output = S query / sqrt(dim of a key)

    query, key: [requests, key heads, dim], normalised here. value, output: [requests, value heads, dim].
    decay, beta: [requests, value heads]. states: [slots, value heads, value dim, key dim]. slots: [requests].
    """
    group, width = value.shape[1] // key.shape[1], key.shape[2]
    scale = np.float32(1) / np.sqrt(np.float32(width))
    q, k = np.empty(width, np.float32), np.empty(width, np.float32)
    for r in range(value.shape[0]):
        for head in range(value.shape[1]):
            squares_q, squares_k = np.float32(1e-6), np.float32(1e-6)
            for i in range(width):
                q[i], k[i] = query[r, head // group, i], key[r, head // group, i]
                squares_q += q[i] * q[i]
                squares_k += k[i] * k[i]
            factor_q, factor_k = scale / np.sqrt(squares_q), np.float32(1) / np.sqrt(squares_k)
            for i in range(width):
                q[i] *= factor_q
                k[i] *= factor_k
            kept, state = np.exp(decay[r, head]), states[slots[r], head]
            for j in range(value.shape[2]):
                read = np.float32(0)
                for i in range(width):
                    state[j, i] *= kept
                    read += state[j, i] * k[i]
                change, result = beta[r, head] * (value[r, head, j] - read), np.float32(0)
                for i in range(width):
                    state[j, i] += change * k[i]
                    result += state[j, i] * q[i]
                output[r, head, j] = result
