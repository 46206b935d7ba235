"""The last pipeline stage answers log-probs and entropies where GPTModel would answer logits."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from megatron_ext.config import Head
from megatron_ext.logprobs.linear import linear_logprobs
from megatron_ext.logprobs.named_tokens import named_logprobs
from megatron_ext.mcore import copy_to_tensor_model_parallel_region, gather_from_sequence_parallel_region


def logprob_head(
    labels: Tensor,
    *,
    vocab_size: int,
    temperature: float,
    head: Head,
    kept: Tensor | None = None,
    named: Tensor | None = None,
) -> Callable[..., tuple[Tensor, ...]]:
    """The `output_processor` argument of GPTModel's forward: the model then returns log-probs and entropies of
    `labels`, two [tokens] float32 with gradient. Stages before the last ignore it.

    named: [tokens, k] ids, -1 for none; then a third, [tokens, k], has the log-probs of these.

    labels, kept, named: of this context-parallel rank's tokens, before sequence parallelism divides them; see
    `linear_logprobs`, which raises where they are wrong.

    The output layer lends its weight, tied or its own, and is not called; a hook on its forward (Megatron's
    overlap_param_gather sets one) would not run.
    """

    def process(*, hidden_states: Tensor, output_layer, output_weight: Tensor | None, **_) -> tuple[Tensor, ...]:
        # Each rank differentiates its part of the vocabulary; these sum the parts in backward.
        if output_layer.sequence_parallel:
            hidden_states = gather_from_sequence_parallel_region(hidden_states, group=output_layer.tp_group)
        else:
            hidden_states = copy_to_tensor_model_parallel_region(hidden_states, group=output_layer.tp_group)
        hidden = hidden_states.transpose(0, 1).flatten(0, 1)  # from [tokens, rows, h]
        weight = output_layer.weight if output_weight is None else output_weight
        group = output_layer.tp_group
        answer = linear_logprobs(
            hidden, weight, labels, vocab_size=vocab_size, group=group, temperature=temperature, head=head, kept=kept
        )
        if named is None:
            return answer
        return *answer, named_logprobs(
            answer[0], hidden, weight, labels, named, group=group, temperature=temperature, head=head
        )

    return process
