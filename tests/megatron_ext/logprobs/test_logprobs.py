"""Log-probs and entropies from hidden states, and their gradients, against float64."""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_ext.config import ParallelConfig
from megatron_ext.logprobs import linear as logprobs
from megatron_ext.logprobs.linear import linear_logprobs
from megatron_ext.logprobs.sizes import KEPT as MOST_KEPT
from megatron_ext.logprobs.tiles import TorchTiles
from tests.support.logprob_cases import HIDDEN, TOKENS, VOCAB, Answer, Case, case, differentiate, exact
from tests.support.ranks import run_ranks

KINDS = {"plain": (1.0, False), "temperature": (0.7, False), "kept set and temperature": (0.7, True)}


def split_vocabulary(config: ParallelConfig) -> dict[str, list[np.ndarray]]:
    """On a rank: its share of the weights, tiles of 16 tokens x 256 columns at most."""
    from megatron_ext.mcore import parallel_state

    logprobs.MAX_ROWS, logprobs.TILE["cpu"] = 16, 2**12
    group, c, out = parallel_state.get_tensor_model_parallel_group(), case(), {}
    for name, (temperature, kept) in KINDS.items():
        hidden, weight = c.hidden.clone().requires_grad_(), c.weight.chunk(group.size())[group.rank()].requires_grad_()
        results = linear_logprobs(
            hidden, weight, c.labels, vocab_size=VOCAB, group=group, temperature=temperature,
            kept=c.kept if kept else None,
        )  # fmt: skip
        answer = differentiate(*results, hidden, weight, c.of_logprob, c.of_entropy)
        out[name] = [x.numpy() for x in answer]
    return out


@pytest.mark.parametrize("tensor", [1, 2, 4])
def test_values_and_gradients_equal_float64_on_every_split(tensor):
    layout = ParallelConfig(ranks=tensor, tensor=tensor, sequence=tensor > 1, expert_tensor=1)
    ranks = run_ranks(split_vocabulary, layout)
    for name, (temperature, kept) in KINDS.items():
        expected = exact(case(), temperature=temperature, kept=kept)
        answers = [Answer(*(torch.from_numpy(x) for x in rank[name])) for rank in ranks]
        for a in answers:
            assert torch.equal(a.logprobs, answers[0].logprobs), name
            assert torch.equal(a.entropy, answers[0].entropy), name
        whole = Answer(
            answers[0].logprobs,
            answers[0].entropy,
            torch.stack([a.of_hidden for a in answers]).sum(0),  # each rank has its part of the sum
            torch.cat([a.of_weight for a in answers]),
        )
        *values, of_hidden, of_weight = whole.errors(expected)
        assert max(values) < 1e-5, name
        assert max(of_hidden, of_weight) < 1e-4, name
        assert (whole.of_weight[VOCAB:] == 0).all(), name


def vocabulary_on_the_first_rank(config: ParallelConfig) -> tuple[np.ndarray, ...]:
    from megatron_ext.mcore import parallel_state

    group, c = parallel_state.get_tensor_model_parallel_group(), case()
    hidden, weight = c.hidden.clone().requires_grad_(), c.weight[:64].chunk(2)[group.rank()].requires_grad_()
    results = linear_logprobs(hidden, weight, c.labels % 20, vocab_size=20, group=group)
    return tuple(x.numpy() for x in differentiate(*results, hidden, weight, c.of_logprob, c.of_entropy))


def test_a_rank_that_holds_only_padding_agrees():
    first, second = run_ranks(vocabulary_on_the_first_rank, ParallelConfig(ranks=2, tensor=2, sequence=True))
    log_p = (case().hidden.double() @ case().weight[:20].double().t()).log_softmax(1)
    expected = log_p.gather(1, (case().labels % 20)[:, None])[:, 0].numpy()
    for answer in (first, second):
        assert np.abs(answer[0] - expected).max() < 1e-5
    assert not second[2].any()
    assert not second[3].any()


def realistic() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits of deviation 2 with one token about as likely as all others together, and a label sampled from them."""
    vocab, hidden, tokens = 8192, 512, 64
    generator = torch.Generator().manual_seed(0)
    weight = 2 * torch.randn(vocab, hidden, generator=generator) / hidden**0.5
    favourite = weight[torch.randint(vocab, (tokens,), generator=generator)]
    logit = 11 + 2 * torch.randn(tokens, 1, generator=generator)
    x = torch.randn(tokens, hidden, generator=generator) + logit * favourite / favourite.square().sum(1, keepdim=True)
    return x, weight, torch.multinomial((x @ weight.t()).softmax(1), 1, generator=generator)[:, 0]


def test_each_head_rounds_what_it_says():
    """Errors of the log-prob against float64, of float32 inputs and of the same inputs in bf16."""
    hidden, weight, labels = realistic()
    rounded = hidden.bfloat16(), weight.bfloat16()
    error = {}
    for name, (x, w) in {"float32 inputs": (hidden, weight), "bf16 inputs": rounded}.items():
        expected = (x.double() @ w.double().t()).log_softmax(1).gather(1, labels[:, None])[:, 0]
        for head in ("bf16", "fp32_accumulate", "fp32"):
            value, _ = linear_logprobs(x, w, labels, vocab_size=len(w), head=head)
            error[name, head] = float((value - expected).abs().mean())
            print(f"{name}, {head} head: mean |error| {error[name, head]:.1e} nats")
    assert error["bf16 inputs", "fp32_accumulate"] < 1e-5
    assert error["bf16 inputs", "fp32"] < 1e-5
    assert error["bf16 inputs", "bf16"] > 1e-3
    assert error["float32 inputs", "fp32"] < 1e-5
    assert 1e-4 < error["float32 inputs", "fp32_accumulate"] < error["float32 inputs", "bf16"]


@pytest.mark.parametrize("head", ["bf16", "fp32_accumulate"])
def test_bf16_heads_differentiate_the_rounded_inputs(head):
    c = case()
    hidden, weight = c.hidden.bfloat16(), c.weight.bfloat16()
    expected = exact(c._replace(hidden=hidden, weight=weight), temperature=0.7, kept=True)
    hidden.requires_grad_(), weight.requires_grad_()
    results = linear_logprobs(hidden, weight, c.labels, vocab_size=VOCAB, temperature=0.7, kept=c.kept, head=head)
    answer = differentiate(*results, hidden, weight, c.of_logprob, c.of_entropy)
    assert answer.of_hidden.dtype == answer.of_weight.dtype == torch.bfloat16
    for mine, true in zip(answer[2:], expected[2:], strict=True):
        assert (mine.double() - true).norm() < (0.005 if head == "fp32_accumulate" else 0.05) * true.norm()


def test_no_tensor_is_larger_than_a_tile_but_the_gradient_of_the_weight(monkeypatch):
    monkeypatch.setitem(logprobs.TILE, "cpu", TOKENS * 256)
    monkeypatch.setitem(MOST_KEPT, "cpu", TOKENS * 8192 - 1)
    c, vocab, sizes = case(), 8192, []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                sizes.append(tuple(result.shape))
            return result

    hidden, weight = c.hidden.clone().requires_grad_(), torch.randn(vocab, HIDDEN).requires_grad_()
    with Sizes():
        results = linear_logprobs(hidden, weight, c.labels, vocab_size=vocab)
        differentiate(*results, hidden, weight, c.of_logprob, c.of_entropy)
    assert (TOKENS, 256) in sizes
    assert max(a * b for a, b in (s for s in sizes if len(s) == 2 and s != (vocab, HIDDEN))) == 256 * HIDDEN


class Products(TorchDispatchMode):
    """How many matrix products there were."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function in (torch.ops.aten.mm.default, torch.ops.aten.mm.out, torch.ops.aten.addmm_.default)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("head", ["bf16", "fp32_accumulate", "fp32"])
@pytest.mark.parametrize("kept", [False, True])
def test_logits_that_are_kept_change_no_bit_and_spare_a_product_of_four(monkeypatch, head, kept):
    monkeypatch.setattr(logprobs, "MAX_ROWS", 16)  # 3 slices of tokens
    monkeypatch.setitem(logprobs.TILE, "cpu", 2**12)  # and 2 tiles of columns
    c, answers, products = case(), [], []
    if head != "fp32":
        c = c._replace(hidden=c.hidden.bfloat16(), weight=c.weight.bfloat16())
    for most in (TOKENS * VOCAB - 1, TOKENS * VOCAB):
        monkeypatch.setitem(MOST_KEPT, "cpu", most)
        hidden, weight = c.hidden.clone().requires_grad_(), c.weight.clone().requires_grad_()
        with Products() as counted:
            results = linear_logprobs(
                hidden, weight, c.labels, vocab_size=VOCAB, head=head, temperature=0.7, kept=c.kept if kept else None
            )
            (results[0] * c.of_logprob).sum().backward(retain_graph=True)  # what is kept serves twice
            hidden.grad = weight.grad = None
            answers.append(differentiate(*results, hidden, weight, c.of_logprob, c.of_entropy))
        products.append(counted.count)
    for made_again, left in zip(*answers, strict=True):
        assert torch.equal(made_again, left)
    assert products == [6 + 2 * 18, 6 + 2 * 12]


def test_logits_are_kept_only_for_a_backward(monkeypatch):
    seen, original = [], TorchTiles.stats
    monkeypatch.setattr(TorchTiles, "stats", lambda *a: seen.append(a[-1] is not None) or original(*a))
    c = case()
    for hidden, grad in ((c.hidden, True), (c.hidden.clone().requires_grad_(), False)):
        with torch.set_grad_enabled(grad):
            linear_logprobs(hidden, c.weight, c.labels, vocab_size=VOCAB)
    linear_logprobs(c.hidden.clone().requires_grad_(), c.weight, c.labels, vocab_size=VOCAB)
    assert seen == [False, False, True]


def test_only_what_the_loss_uses_is_differentiated(monkeypatch):
    seen, original = [], TorchTiles.gradient
    monkeypatch.setattr(TorchTiles, "gradient", lambda *a: seen.append(a[-2].of_entropy is None) or original(*a))
    c = case()
    hidden, weight = c.hidden.clone().requires_grad_(), c.weight.clone()
    value, entropy = linear_logprobs(hidden, weight, c.labels, vocab_size=VOCAB)
    value.sum().backward(retain_graph=True)
    entropy.sum().backward()
    assert seen == [True, False]
    assert weight.grad is None


def test_a_mask_of_one_token_is_certain_and_moves_nothing():
    c = case()
    hidden, weight = c.hidden.clone().requires_grad_(), c.weight.clone().requires_grad_()
    value, entropy = linear_logprobs(hidden, weight, c.labels, vocab_size=VOCAB, kept=c.labels[:, None])
    answer = differentiate(value, entropy, hidden, weight, c.of_logprob, c.of_entropy)
    for x in answer:
        assert (x == 0).all()


def test_no_token_is_no_error():
    c = case()
    hidden, weight = c.hidden[:0].clone().requires_grad_(), c.weight.clone().requires_grad_()
    value, _ = linear_logprobs(hidden, weight, c.labels[:0], vocab_size=VOCAB)
    value.sum().backward()
    assert value.shape == (0,)
    assert weight.grad is not None
    assert not weight.grad.any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"temperature": -1.0}, "temperature must be positive"),
        ({"labels": VOCAB}, "label 301 of token 3 is not in the vocabulary of 301"),
        ({"labels": -100}, "label -100 of token 3 is not in the vocabulary"),
        ({"kept": [5, VOCAB, -1]}, "the kept set of token 3 has an id beyond the vocabulary"),
        ({"kept": [5, 7, 5]}, "the kept set of token 3 names an id twice"),
        ({"kept": [5, 7, -1]}, "label 6 of token 3 is not in its kept set"),
        ({"weight": 300}, "do not hold a vocabulary of 301"),
    ],
)
def test_what_has_no_log_prob_is_refused(change, message):
    c: Case = case()
    labels, kept = torch.full((TOKENS,), 6), torch.full((TOKENS, 3), -1)
    if "labels" in change:
        labels[3] = change["labels"]
    if "kept" in change:
        kept[3] = torch.tensor(change["kept"])
    with pytest.raises(ValueError, match=message):
        linear_logprobs(
            c.hidden, c.weight[: change.get("weight")], labels, vocab_size=VOCAB, kept=kept,
            temperature=change.get("temperature", 1.0),
        )  # fmt: skip


def test_tf32_under_the_fp32_head_is_refused():
    c = case()
    torch.set_float32_matmul_precision("high")
    try:
        with pytest.raises(ValueError, match="full float32 matmuls"):
            linear_logprobs(c.hidden, c.weight, c.labels, vocab_size=VOCAB)
        linear_logprobs(c.hidden, c.weight, c.labels, vocab_size=VOCAB, head="fp32_accumulate")
    finally:
        torch.set_float32_matmul_precision("highest")
