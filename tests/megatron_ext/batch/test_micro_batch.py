"""Which places of a micro-batch belong to answers, and that the LM head makes log-probs of these alone."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import numpy as np

from megatron_ext.config import ParallelConfig
from tests.support.jobs import make_samples
from tests.support.ranks import run_alone, run_ranks

CUTS = [[{}], [{"cp_size": 2, "cp_rank": rank} for rank in (0, 1)], [{"sequence_parallel_size": 2}], [{"align": 16}]]


def answered_places() -> list[tuple[list[int], list[int]]]:
    """By layout: places that all context ranks answer together, and those of the labels that are of responses."""
    import torch

    from megatron_ext.batch.layout import TokenLayout
    from megatron_ext.batch.micro_batch import make_micro_batch

    out = []
    for count, packed, cut in itertools.product((1, 5), (True, False), CUTS):
        samples, found = make_samples(routes=False)[:count], []
        for rank in cut:
            layout = TokenLayout(tuple(s.input_length for s in samples), packed=packed, **rank)
            batch = make_micro_batch(range(count), samples, layout, torch.device("cpu"), None)
            found += layout.local[batch.answered].tolist()
        starts = zip(layout.starts, samples, strict=True)
        out.append(
            (sorted(found), [start + i for start, s in starts for i in range(s.prompt_length - 1, s.input_length)])
        )
    empty = make_micro_batch((), (), TokenLayout((1,)), torch.device("cpu"), None)
    return [*out, (empty.answered.tolist(), [0])]


def test_the_places_that_are_answered_are_those_of_the_responses():
    (layouts,) = run_alone(answered_places)
    assert len(layouts) == 2 * 2 * len(CUTS) + 1
    for found, expected in layouts:
        assert found == expected


def heads(config: ParallelConfig) -> tuple[float, float, float]:
    """How far log-probs, entropies and gradients of some places are from those of all; the largest at the others."""
    import torch

    from megatron_ext.logprobs.head import logprob_head
    from megatron_ext.mcore import parallel_state

    places, found = torch.tensor([1, 4, 5]), []
    for answered in (None, places):
        torch.manual_seed(0)
        hidden = torch.randn(7, 1, 8, requires_grad=True)
        weight = torch.randn(32, 8, requires_grad=True)
        labels, kept = torch.randint(0, 30, (7,)), torch.full((7, 3), -1, dtype=torch.int32)
        kept[4, 0] = labels[4]
        group = parallel_state.get_tensor_model_parallel_group()
        layer = SimpleNamespace(sequence_parallel=False, tp_group=group, weight=weight)
        process = logprob_head(labels, vocab_size=30, temperature=0.7, head="fp32", kept=kept, answered=answered)
        outputs = process(hidden_states=hidden, output_layer=layer, output_weight=None)
        (outputs[0][places].sum() + outputs[1][places].square().sum()).backward()
        found.append((torch.stack([o.detach() for o in outputs]), hidden.grad, weight.grad))
    (all_, *gradients), (some, *others) = found
    rest = np.setdiff1d(np.arange(7), places.numpy())
    apart = max(float((a - b).abs().max()) for a, b in zip(gradients, others, strict=True))
    return float((all_ - some)[:, places].abs().max()), apart, float(some[:, rest].abs().max())


def test_log_probs_and_gradients_of_answers_are_those_of_a_head_that_makes_all():
    ((values, gradients, others),) = run_ranks(heads, ParallelConfig())
    assert values < 1e-6
    assert gradients < 1e-6
    assert others == 0
