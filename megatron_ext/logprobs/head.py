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
    answered: Tensor | None = None,
) -> Callable[..., tuple[Tensor, ...]]:
    """The `output_processor` argument of GPTModel's forward: the model then returns log-probs and entropies of
    `labels`, two [tokens] float32 with gradient. Stages before the last ignore it.

    named: [tokens, k] ids, -1 for none; then a third, [tokens, k], has the log-probs of these.

    labels, kept, named: of this context-parallel rank's tokens, before sequence parallelism divides them; see
    `linear_logprobs`, which raises where they are wrong.
    answered: [n] int64, which of them are asked for, 0 for the others; None: all. A prompt costs nothing then.

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
        weight, group = output_layer.weight if output_weight is None else output_weight, output_layer.tp_group

        def chosen(rows: Tensor) -> Tensor:
            return rows if answered is None else rows.index_select(0, answered)

        hidden, asked = chosen(hidden), chosen(labels)
        settings = {"group": group, "temperature": temperature, "head": head}
        out: tuple[Tensor, ...] = linear_logprobs(
            hidden, weight, asked, vocab_size=vocab_size, kept=None if kept is None else chosen(kept), **settings
        )
        if named is not None:
            out = *out, named_logprobs(out[0], hidden, weight, asked, chosen(named), **settings)
        if answered is None:
            return out
        return tuple(part.new_zeros(len(labels), *part.shape[1:]).index_copy(0, answered, part) for part in out)

    return process
