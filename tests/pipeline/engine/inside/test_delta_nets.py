"""A server's gated delta nets on a CPU: prompts in any pieces, and single tokens, are the rule by its definition."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from pipeline.engine.inside.cpu import delta_nets
from tests.support import by_delta_rule

KEY_HEADS, HEADS, KEY, VALUE = 2, 4, 8, 5
PIECES = [[4, 1, 1, 70], [66, 1, 9, 0]]  # of two requests, in four steps of the server
SLOTS = torch.tensor([5, 2])


def raw(lengths):
    """q, k [tokens, key heads, key] as they come from the projection; v, a, b of every head."""
    draw = torch.Generator().manual_seed(4)
    q, k = (torch.randn(sum(lengths), KEY_HEADS, KEY, generator=draw) for _ in range(2))
    v = torch.randn(sum(lengths), HEADS, VALUE, generator=draw)
    a, b = (torch.randn(sum(lengths), HEADS, generator=draw) for _ in range(2))
    return q, k, v, a, b


def test_a_prompt_in_pieces_and_the_tokens_behind_it_are_one_sequence():
    draw = torch.Generator().manual_seed(5)
    decay, bias = torch.rand(HEADS, generator=draw), torch.randn(HEADS, generator=draw)
    lengths = [sum(pieces) for pieces in PIECES]
    parts = raw(lengths)
    states = torch.zeros(7, HEADS, VALUE, KEY)
    said = [[], []]
    for step in range(4):
        now = [pieces[step] for pieces in PIECES]
        live = [i for i, n in enumerate(now) if n]
        begins = [sum(lengths[:i]) + sum(PIECES[i][:step]) for i in live]
        rows = torch.cat([torch.arange(begin, begin + now[i]) for i, begin in zip(live, begins, strict=True)])
        q, k, v, a, b = (t[rows] for t in parts)
        cu = torch.tensor([0, *(now[i] for i in live)]).cumsum(0)
        if [now[i] for i in live] == [1] * len(live):
            out = delta_nets.step(
                decay, bias, q[None], k[None], v[None], a, b, states, SLOTS[live], cu, True, 1.0, 20.0
            )
        else:
            g, beta = delta_nets.gates(decay, a, b, bias)
            out, _, _ = delta_nets.extend(
                q[None],
                k[None],
                v[None],
                g,
                beta,
                initial_state=states,
                initial_state_indices=SLOTS[live],
                cu_seqlens=cu,
            )
        for i, part in zip(live, out[0].split([now[i] for i in live]), strict=True):
            said[i].append(part)
    q, k, v, a, b = parts
    q, k = (F.normalize(t, dim=-1).repeat_interleave(HEADS // KEY_HEADS, 1) for t in (q, k))
    g, beta = -decay.exp() * F.softplus(a + bias), torch.sigmoid(b)
    for i, sequence in enumerate(zip(*(t.split(lengths) for t in (q, k, v, g, beta)), strict=True)):
        expected, state = by_delta_rule.delta_rule(*sequence)
        assert (torch.cat(said[i]) - expected).abs().max() < 1e-5
        assert (states[SLOTS[i]].transpose(-1, -2) - state).abs().max() < 1e-5
    others = [slot for slot in range(7) if slot not in SLOTS.tolist()]
    assert not states[others].any()


def test_a_convolution_goes_on_from_the_tokens_before():
    draw = torch.Generator().manual_seed(6)
    channels, width, lengths = 6, 4, [9, 12]
    x, weight = torch.randn(sum(lengths), channels, generator=draw), torch.randn(channels, width, generator=draw)
    states = torch.full((7, channels, width - 1), torch.nan)  # of a request that was there before
    sequences = x.split(lengths)
    said = [[], []]
    for begin, end in ((0, 2), (2, 3), (3, 8)):
        pieces = [s[begin:end] for s in sequences]
        if end - begin == 1:
            out = delta_nets.convolve_token(
                torch.cat(pieces), states, weight, None, "silu", conv_state_indices=SLOTS.int()
            )
        else:
            out = delta_nets.convolve(
                torch.cat(pieces).t(), weight, None, activation="silu", conv_states=states,
                has_initial_state=torch.full((2,), begin > 0), cache_indices=SLOTS.int(),
                query_start_loc=torch.tensor([0, end - begin, 2 * (end - begin)]),
            ).t()  # fmt: skip
        for i, part in enumerate(out.split(end - begin)):
            said[i].append(part)
    for i, sequence in enumerate(sequences):
        expected = by_delta_rule.convolution(sequence[:8], weight)
        assert (torch.cat(said[i]) - expected).abs().max() < 1e-5


def test_the_norm_is_before_the_gate():
    draw = torch.Generator().manual_seed(7)
    x, gate, weight = (torch.randn(shape, generator=draw) for shape in ((5, 8), (5, 8), (8,)))
    norm = type("Norm", (), {"eps": 1e-6, "weight": weight})
    expected = F.rms_norm(x, (8,), weight, 1e-6) * F.silu(gate)
    assert (delta_nets.norm_and_gate(norm, x, gate) - expected).abs().max() < 1e-6
