"""Adapters against plain torch in float64, and against full training where the two must be the same."""

import functools

import numpy as np
import pytest
import torch

from megatron_ext.config import LoraConfig, OptimizerConfig, ParallelConfig, TrainerConfig
from tests.conftest import TINY
from tests.megatron_ext.test_trainer import LAYOUTS
from tests.support.jobs import SAMPLES, make_samples, weighted_likelihood
from tests.support.lora import Learned, gathered, learn
from tests.support.proofs import sampled
from tests.support.ranks import run_ranks

LORA = LoraConfig(rank=4, alpha=8.0)
ETP = "tensor 2, expert 2, expert tensor 1"
TRAINER = TrainerConfig(micro_batch_tokens=100)


@functools.cache
def learned(model: str) -> Learned:
    return learn(ParallelConfig(), model, LORA, TRAINER, make_samples(routes=False))


def qkv_rows() -> list[np.ndarray]:
    """Of queries, keys and values: their rows in Megatron-Core's joined weight, a group of heads after another."""
    groups, width = TINY["num_key_value_heads"], TINY["head_dim"]
    heads = TINY["num_attention_heads"] // groups
    rows = np.arange(groups * (heads + 2) * width).reshape(groups, heads + 2, width)
    return [rows[:, :heads].ravel(), rows[:, heads].ravel(), rows[:, heads + 1].ravel()]


def places(adapters):
    """(parameter in transformers, expert, its rows there, A's key and place, B's key and place and rows) of each
    adapter."""
    out, ffn = [], TINY["moe_intermediate_size"]
    for layer in range(TINY["num_hidden_layers"]):
        of, to = f"adapters.decoder.layers.{layer}.", f"model.layers.{layer}."
        for part, (name, rows) in enumerate(zip("qkv", qkv_rows(), strict=True)):
            key = of + "self_attention.linear_qkv."
            out.append((f"{to}self_attn.{name}_proj.weight", None, slice(None), key, 0, part, rows))
        key = of + "self_attention.linear_proj."
        out.append((f"{to}self_attn.o_proj.weight", None, slice(None), key, 0, 0, slice(None)))
        for expert in range(TINY["num_experts"]):
            for part in range(2):
                rows = slice(part * ffn, (part + 1) * ffn)
                key = of + "mlp.experts.linear_fc1."
                out.append((f"{to}mlp.experts.gate_up_proj", expert, rows, key, expert, part, rows))
            key = of + "mlp.experts.linear_fc2."
            out.append((f"{to}mlp.experts.down_proj", expert, slice(None), key, expert, 0, slice(None)))
    assert {key + kind for *_, key, _, _, _ in out for kind in "AB"} == adapters.keys()
    return out


def matrices(adapters, key, expert, part, rows):
    """(A [rank, in], B [out, rank]) of one of Hugging Face's matrices, float64."""
    a = adapters[key + "A"][expert, part]
    b = adapters[key + "B"][expert].reshape(-1, LORA.rank)[rows]
    return torch.from_numpy(a).double(), torch.from_numpy(b).double()


def test_loss_and_gradients_equal_plain_torch_in_float64(tiny_model_dir):
    from transformers import AutoModelForCausalLM

    found = learned(str(tiny_model_dir))
    plain = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float64, experts_implementation="eager")
    parameters = dict(plain.named_parameters())
    with torch.no_grad():
        for name, number, rows, *where in places(found.adapters):
            a, b = matrices(found.adapters, *where)
            weight = parameters[name] if number is None else parameters[name][number]
            weight[rows] += 2.0 * b @ a
    loss = torch.zeros((), dtype=torch.float64)
    for sample in make_samples(routes=False):
        ids = torch.from_numpy(sample.tokens.astype(np.int64))
        scores = torch.log_softmax(plain(ids[None]).logits[0], -1)
        chosen = scores[:-1].gather(1, ids[1:, None])[sample.prompt_length - 1 :, 0]
        loss = loss - sample.row["weight"] * chosen.sum() / SAMPLES
    loss.backward()
    assert found.loss == pytest.approx(float(loss), rel=1e-6)
    for name, number, rows, *where in places(found.adapters):
        (a, b), (of_a, of_b) = (matrices(t, *where) for t in (found.adapters, found.gradients))
        whole = parameters[name].grad if number is None else parameters[name].grad[number]
        full = whole[rows]
        for mine, theirs in ((of_a, 2.0 * b.t() @ full), (of_b, 2.0 * full @ a.t())):
            assert (mine - theirs).abs().max() <= 1e-6 + 1e-5 * theirs.abs().max(), where


def test_the_merged_stream_is_base_plus_product_to_rounding(tiny_model_dir):
    """Of every tensor, by its name in the directory."""
    from safetensors.numpy import load_file

    found, base = learned(str(tiny_model_dir)), load_file(tiny_model_dir / "model.safetensors")
    expected = {name: tensor.astype(np.float64) for name, tensor in base.items()}
    for name, number, _, *where in places(found.adapters):
        a, b = matrices(found.adapters, *where)
        if number is not None:
            kind = ("gate_proj", "up_proj")[where[2]] if "gate_up" in name else "down_proj"
            name = f"{name.rpartition('.')[0]}.{number}.{kind}.weight"
        expected[name] = expected[name] + (2.0 * b @ a).numpy()
    assert found.sent.keys() == expected.keys()
    changed = 0
    for name, tensor in expected.items():
        assert np.abs(found.sent[name] - tensor).max() <= 2e-7 * max(1, np.abs(tensor).max()), name
        changed += not np.array_equal(found.sent[name], base[name])
    assert changed == 4 * (4 + 3 * 8)


def full_and_adapters(config: ParallelConfig, model: str, rank: int):
    """Two policies after a step of Adam without clipping: trained whole, and by adapters whose A is the identity."""
    from megatron_ext.lora.attach import adapters_of
    from megatron_ext.trainer import Trainer

    sent, gradients = [], {}
    for lora in (None, LoraConfig(rank=rank, alpha=float(rank))):
        optimizer = OptimizerConfig(lr=1e-3, clip_grad=0.0)
        it = Trainer(model, config, TRAINER, optimizer, replay=True, lora=lora)
        for adapter in adapters_of(it.policy.chunks) if lora is not None else ():
            width, start = adapter.A.shape[-1], adapter.A.shape[-1] * adapter.rank if adapter.kind == "row" else 0
            whole = torch.eye(rank, start + width)
            with torch.no_grad():
                adapter.A.copy_(whole[:, start:].expand_as(adapter.A))
        it.restart_optimizer(optimizer)
        before = {name: t.clone() for bucket in it.export() for name, t in bucket}
        it.update(make_samples(routes=True), weighted_likelihood)
        sent.append({name: (t - before[name]).numpy() for bucket in it.export() for name, t in bucket})
        gradients |= gathered(it) if lora is not None else {}
    return sent


@pytest.mark.parametrize("layout", sampled(["data 2", ETP], [ETP]))
def test_adapters_of_full_rank_move_the_matrices_as_full_training_does(tiny_model_dir, layout):
    """With alpha / r = 1, A the identity and B = 0 the gradient of B is the matrix's own, and that of A is 0: Adam
    moves B as it moves the matrix."""
    ranks = run_ranks(full_and_adapters, ParallelConfig(**LAYOUTS[layout]), str(tiny_model_dir), 128)
    whole, adapted = ranks[0]
    matrices = [name for name in whole if name.endswith("_proj.weight")]
    assert len(matrices) == 4 * (4 + 3 * 8)
    for name in matrices:
        # a step of Adam is 1e-3 in the sign of the gradient, which decides where that is near 0
        apart = np.abs(whole[name] - adapted[name])
        assert np.mean(apart < 2e-6) > 0.999, name
        assert np.abs(whole[name]).max() > 9e-4
    assert all(np.array_equal(adapted[name], np.zeros_like(adapted[name])) for name in whole if name not in matrices)
