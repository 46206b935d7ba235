"""What transformers says about a sequence, in float32."""

from __future__ import annotations

import numpy as np
import torch
from transformers import Qwen3MoeForCausalLM


def load(folder):
    torch.set_num_threads(1)  # small matrices, and the server wants the other core
    return Qwen3MoeForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def logprobs(model, ids, temperature=1.0):
    """log p(token t | tokens < t) for t = 1 .. T-1, [T-1]."""
    tokens = torch.tensor(np.asarray(ids, np.int64))
    table = torch.log_softmax(model(tokens[None]).logits[0, :-1] / temperature, -1)
    return table.gather(1, tokens[1:, None])[:, 0].numpy()


@torch.no_grad()
def scores(model, ids, temperature=1.0):
    """log p(every token | tokens <= t), [T, vocabulary]."""
    tokens = torch.tensor(np.asarray(ids, np.int64))
    return torch.log_softmax(model(tokens[None]).logits[0] / temperature, -1).numpy()


@torch.no_grad()
def routes(model, ids):
    """Expert choices [T, layers, topk], best first, and the gap in logits to the best expert left out [T, layers]."""
    output = model(torch.tensor(np.asarray(ids, np.int64))[None], output_router_logits=True)
    logits = torch.stack(output.router_logits, dim=1)
    topk = model.config.num_experts_per_tok
    best = logits.topk(topk + 1, dim=-1)
    return best.indices[..., :topk].numpy(), (best.values[..., topk - 1] - best.values[..., topk]).numpy()
