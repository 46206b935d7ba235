"""The trainer's layers as a GPU has them, Transformer Engine's own Python with its kernels in torch, beside the CPU's.

What it relies on in the vendors' sources is named by file and line, and a test fails when one of these moves.
"""

from __future__ import annotations

import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from megatron_ext.config import OptimizerConfig, ParallelConfig, TrainerConfig, TrainerPrecision
from megatron_ext.hf.description import read_description
from tests.support.forked_program import run_program
from tests.support.jobs import joined, make_samples
from tests.support.proofs import parameters_of, sampled
from tests.support.ranks import run_ranks
from tests.support.te import stand_in
from tests.support.te.step import ADAPTED, Step, adapted, step, whole
from tests.support.tiny_families import DENSE_FAMILIES, FAMILIES, VOCAB, save_family
from tests.support.vendor import lines

EVERY = [*FAMILIES, *DENSE_FAMILIES]
CHANGES = {"deepseek_v3": {"v_head_dim": 16}}  # channels in powers of two, as the fused rotation wants them
EXTENSION = "megatron/core/extensions/transformer_engine.py"
TE = "transformer_engine/pytorch/"
# One of each kind of attention (grouped, latent, with a window and sinks), of router (a softmax, a sigmoid, one in
# groups), of experts (shared, biased, none), of norms (of heads, of whole projections), and a tied embedding.
SAMPLE = ("qwen2_moe", "qwen3_moe with dense layers", "deepseek_v3", "minimax_m2", "gpt_oss", "llama")
CUT_SAMPLE = ("deepseek_v3", "gpt_oss")  # latents; biases, sinks and windows
proof = pytest.mark.proof
LAYOUTS = {
    "tensor": ParallelConfig(ranks=2, tensor=2, sequence=True, expert=2, expert_tensor=1),
    "tensor, no experts": ParallelConfig(ranks=2, tensor=2),
    "context": ParallelConfig(ranks=2, context=2),
}
CUT = [
    pytest.param(layout, family, marks=() if layout != "tensor, no experts" and family in CUT_SAMPLE else proof)
    for layout in LAYOUTS for family in EVERY
    if layout == "context" or (family in DENSE_FAMILIES) == (layout == "tensor, no experts")
]  # fmt: skip
every_family = pytest.mark.parametrize("family", sampled(EVERY, SAMPLE))


@pytest.fixture(scope="module")
def models(request, tmp_path_factory):
    """family -> directory, of those that are tested, and of the one that faults are planted in."""
    asked = {parameters_of(item).get("family") for item in request.session.items if item.path == request.path}
    names = [name for name in EVERY if name in asked or name == EVERY[0]]
    return {name: str(save_family(name, tmp_path_factory.mktemp("m"), **CHANGES.get(name, {}))) for name in names}


@pytest.fixture(scope="module")
def on_gpu(preloaded, models, tmp_path_factory):
    """family -> what tests/support/te/process.py says of it."""
    folder = tmp_path_factory.mktemp("te")
    samples = make_samples(routes=False, vocab_size=VOCAB)
    (folder / "jobs").write_bytes(pickle.dumps([(name, path, samples) for name, path in models.items()]))
    run_program("tests.support.te.process", folder / "jobs", folder / "out")
    return pickle.loads((folder / "out").read_bytes())


def here(config: ParallelConfig, models: dict[str, str], samples: list) -> dict[str, tuple]:
    """Runs on a rank, with the CPU's layers: the step, the parameters in bfloat16 and log-probs, a step of adapters."""
    from megatron_ext.trainer import Trainer

    out = {}
    for name, model in models.items():
        half = Trainer(
            model,
            ParallelConfig(),
            TrainerConfig(),
            OptimizerConfig(),
            replay=True,
            precision=TrainerPrecision(weights="bfloat16"),
        )
        parameters = {n: (tuple(p.shape), str(p.dtype)) for n, p in half.policy.chunks[0].named_parameters()}
        logprobs = joined([half.logprobs(samples, "native")], len(samples))[0]
        of_adapters = adapted(model, samples) if name in ADAPTED else None
        out[name] = step(model, samples), parameters, logprobs, of_adapters
    return out


@pytest.fixture(scope="module")
def on_cpu(models):
    (answer,) = run_ranks(here, ParallelConfig(), models, make_samples(routes=False, vocab_size=VOCAB))
    return answer


@every_family
def test_parameters_have_the_names_shapes_and_dtypes_of_the_cpus(on_gpu, on_cpu, family):
    assert on_gpu[family]["held"]["parameters"] == on_cpu[family][1]
    assert on_gpu[family]["offloaded"]["parameters"] == on_cpu[family][1]


@every_family
def test_layers_are_transformer_engines_and_none_is_plain_torch(on_gpu, family):
    classes = set(on_gpu[family]["held"]["classes"])
    expected = {"TEDotProductAttention", "TERowParallelLinear", "RMSNorm"}
    if family in FAMILIES:
        expected |= {"TEColumnParallelGroupedLinear", "TERowParallelGroupedLinear", "TEGroupedMLP"}
    assert expected <= classes
    ours = {"SDPACoreAttention", "LayerNormColumnParallelLinear", "DuplicatedLinear", "ColumnParallelGroupedLinear"}
    assert not ours & classes


@every_family
def test_every_tensor_of_the_directory_is_exported(on_gpu, models, family):
    from safetensors import safe_open

    with safe_open(f"{models[family]}/model.safetensors", "np") as file:
        there = set(file.keys())
    model = read_description(models[family])
    there -= model.family.indexers(model.hf)  # are carried along
    tied = {"lm_head.weight"}
    assert set(on_gpu[family]["held"]["exported"]) | tied == there | tied


@every_family
def test_adam_is_transformer_engines_or_on_the_host_where_it_is_offloaded(on_gpu, family):
    assert on_gpu[family]["held"]["optimizers"] == ["transformer_engine.pytorch.optimizers.fused_adam.FusedAdam"]
    hybrid = "megatron.core.optimizer.cpu_offloading.hybrid_optimizer.HybridDeviceOptimizer"
    assert on_gpu[family]["offloaded"]["optimizers"] == [hybrid]


@every_family
def test_log_probs_routes_loss_and_gradients_are_those_of_the_cpus_layers(on_gpu, on_cpu, family):
    differ = differences(on_gpu[family]["step"], on_cpu[family][0])
    assert differ == []


@pytest.mark.parametrize("family", ADAPTED)
def test_adapters_come_into_its_layers_as_into_the_cpus(on_gpu, on_cpu, family):
    """Norms that it has fused into a layer are the adapter's to compute."""
    assert differences(on_gpu[family]["adapted"], on_cpu[family][3]) == []
    assert np.abs(on_gpu[family]["adapted"].logprobs - on_gpu[family]["step"].logprobs).max() > 1e-3


@every_family
def test_bfloat16_is_as_near_as_bfloat16_comes(on_gpu, on_cpu, family):
    """In it a router's logits are float32 of bfloat16 weights, and of a bfloat16 bias where it has one."""
    error = np.abs(on_gpu[family]["held"]["logprobs"] - on_cpu[family][2])
    assert np.median(error) < 0.02
    assert error.max() < 1.0  # of a token whose experts are others


def differences(a: Step, b: Step) -> list[str]:
    """What two steps have not in common."""
    found = []
    if np.abs(a.logprobs - b.logprobs).max() > 2e-5:
        found.append(f"log-probs: {np.abs(a.logprobs - b.logprobs).max()}")
    if any(not np.array_equal(np.sort(x), np.sort(y)) for x, y in zip(a.routes, b.routes, strict=True)):
        found.append("routes")
    if abs(a.loss - b.loss) > 1e-5 * abs(b.loss):
        found.append(f"loss: {a.loss} for {b.loss}")
    if a.gradients.keys() != b.gradients.keys():
        found.append("names of gradients")
    for name in a.gradients.keys() & b.gradients.keys():
        largest = max(np.abs(b.gradients[name]).max(), 1e-3)
        if np.abs(a.gradients[name] - b.gradients[name]).max() > 1e-4 * largest:
            found.append(f"gradient of {name}")
    return found


@pytest.fixture(scope="module")
def on_gpus(request, preloaded, on_cpu, models, tmp_path_factory):
    """(layout, family) -> the step on two ranks, of those that are tested."""
    asked = [parameters_of(item) for item in request.session.items if item.path == request.path]
    samples, folder = make_samples(routes=False, vocab_size=VOCAB), tmp_path_factory.mktemp("te_ranks")
    jobs = []
    for name, layout in LAYOUTS.items():
        families = [each["family"] for each in asked if each.get("layout") == name]
        jobs.append((layout, [(f, models[f], samples, on_cpu[f][0].routes) for f in families]))
    (folder / "jobs").write_bytes(pickle.dumps(jobs))
    with ThreadPoolExecutor() as threads:
        ranks = [threads.submit(run_program, "tests.support.te.rank", folder / "jobs", str(rank), folder / f"out{rank}")
                 for rank in range(2)]  # fmt: skip
        for rank in ranks:
            rank.result()
    parts = [pickle.loads((folder / f"out{rank}").read_bytes()) for rank in range(2)]
    return {
        (name, family): whole([part[number, family] for part in parts])
        for number, name in enumerate(LAYOUTS) for family in {f for n, f in parts[0] if n == number}
    }  # fmt: skip


@pytest.mark.parametrize(("layout", "family"), CUT)
def test_on_two_ranks_they_are_those_of_the_cpus_layers_on_one(on_gpus, on_cpu, layout, family):
    assert differences(on_gpus[layout, family], on_cpu[family][0]) == []


def test_an_argument_that_transformer_engine_renames_is_seen(on_gpu):
    assert "unexpected keyword argument 'eps'" in on_gpu["planted"]["a renamed argument"]


def test_an_addition_that_a_spec_leaves_out_is_seen(on_gpu, on_cpu):
    other = on_gpu["planted"]["an addition left out"]
    assert isinstance(other, Exception) or differences(other, on_cpu[EVERY[0]][0])


@pytest.mark.parametrize(
    ("file", "line", "begins"),
    [
        (EXTENSION, 1088, "out = super().forward(x, is_first_microbatch=_is_first_microbatch)"),
        (EXTENSION, 1336, "out = super().forward(x, is_first_microbatch=_is_first_microbatch)"),
        (EXTENSION, 2050, "core_attn_out = super().forward(query, key, value, attention_mask, **_fa_kwargs)"),
        (EXTENSION, 2430, "out = super().forward(x, m_splits, is_first_microbatch=_is_first_microbatch)"),
        ("megatron/core/transformer/moe/moe_utils.py", 1327, "output = te_general_gemm(weight, inp, router_dtype"),
        (TE + "module/linear.py", 2346, "def forward("),
        (TE + "module/layernorm_linear.py", 1675, "def forward("),
        (TE + "module/grouped_linear.py", 2144, "def forward("),
        (TE + "attention/dot_product_attention/dot_product_attention.py", 1935, "def forward("),
        (TE + "attention/rope.py", 346, "def apply_rotary_pos_emb("),
        (TE + "cpp_extensions/gemm.py", 192, "def general_gemm("),
    ],
)
def test_what_is_replaced_stands_where_it_was_read(file, line, begins):
    assert lines(file, line, line, begins=begins)


def test_the_version_is_the_one_that_the_image_installs():
    assert stand_in.VERSION == stand_in.PINNED["transformer-engine-torch"] == stand_in.PINNED["transformer-engine-cu13"]
