"""What the rollout engine's loader joins within one request travels in one bucket, at every preset's real sizes.

A request of SGLang's is one bucket. Of DeepSeek's two down-projections to latents it keeps the first that comes, joins
both when the second comes, and forgets, without a word, what has no partner when the request ends.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from megatron_ext.config import ParallelConfig, TrainerConfig
from megatron_ext.hf.bucket import cut, join_small, together
from megatron_ext.hf.families import FAMILIES
from pipeline.config import load_config_and_model
from tests.support.ranks import run_ranks
from tests.support.vendor import lines

LOADERS = "sglang/srt/models/"
PRESETS = sorted(
    p for p in Path("configs").rglob("*.yaml") if p.name != "base.yaml" and p.parent.name not in ("parts", "recipes")
)


def test_a_set_is_never_cut_and_keeps_the_place_of_its_first_member():
    sizes = {"a": 4, "q1": 3, "b": 3, "kv1": 3, "c": 1, "q2": 9, "kv2": 9}
    names = list(sizes)

    def set_of(name):
        return name[-1] if name[-1].isdigit() else None

    assert together(names, set_of) == [["a"], ["q1", "kv1"], ["b"], ["c"], ["q2", "kv2"]]
    pieces = list(cut(names, lambda n: (sizes[n], torch.int8), 10, set_of))
    assert pieces == [["a", "q1", "kv1"], ["b", "c"], ["q2", "kv2"]]  # the last is larger than a piece by itself
    with pytest.raises(ValueError, match="several dtypes"):
        list(cut(names, lambda n: (1, torch.int8 if n == "q1" else torch.int16), 10, set_of))


def test_small_buckets_in_a_row_become_one_and_a_large_one_stays_alone():
    def bucket(*sizes):
        return [(f"{size} bytes", torch.zeros(size, dtype=torch.int8)) for size in sizes]

    came = []

    def stream():
        for each in (bucket(2, 1), bucket(4), bucket(5), bucket(20), bucket(1), bucket(9)):
            came.append(each)
            yield each

    joined = join_small(stream(), 10)
    assert next(joined) == came[0] + came[1]
    assert len(came) == 3  # no more than the next is held
    assert [[name for name, _ in each] for each in joined] == [["5 bytes"], ["20 bytes"], ["1 bytes", "9 bytes"]]
    assert list(join_small(iter([]), 10)) == []


def test_names_of_a_set_are_found_by_layer_and_others_are_in_none():
    family = FAMILIES["deepseek_v3"]
    q, kv = (f"model.layers.12.self_attn.{name}.weight" for name in ("q_a_proj", "kv_a_proj_with_mqa"))
    assert family.joined_set(q) == family.joined_set(kv) == (0, "12")
    assert family.joined_set(q.replace("12", "3")) == (0, "3")
    for name in (q.replace("q_a_proj", "q_a_layernorm"), q.replace("12", "x"), "model.norm.weight"):
        assert family.joined_set(name) is None


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_joined_tensor_is_all_that_its_parameter_becomes(model_type):
    family = FAMILIES[model_type]
    rows = {name: row for row in family.table for name in row.hf}
    for names in family.joined:
        assert all(rows[name].hf == (name,) and not rows[name].expert for name in names)


def test_sglangs_loader_joins_what_the_family_says():
    loader = LOADERS + "deepseek_common/deepseek_weight_loader.py"
    lines(loader, 280, 283, begins='fuse_qkv_a_proj = hasattr(self.config, "q_lora_rank") and (')
    joins = lines(loader, 438, 441, begins="if fuse_qkv_a_proj and (")
    (names,) = FAMILIES["deepseek_v3"].joined
    lite = lines(LOADERS + "glm4_moe_lite.py", 1008, 1011, begins="if fuse_qkv_a_proj and (")
    assert FAMILIES["glm4_moe_lite"].joined == FAMILIES["deepseek_v3"].joined
    for name in names:
        condition = f'"{name.rpartition(".weight")[0].rpartition(".")[2]}" in name'
        assert condition in joins
        assert condition in lite


# Each of these loaders hands a tensor to the loader of its parameter, with its place in it, as it comes: none keeps one
# to join it with another. What would change that is a dict of tensors, or a cat, in load_weights.
@pytest.mark.parametrize(
    ("file", "first", "last", "begins"),
    [
        ("qwen3_moe.py", 1157, 1283, "def load_weights("),
        ("qwen3.py", 686, 757, "def load_weights("),
        ("qwen2.py", 644, 716, "def load_weights("),
        ("llama.py", 708, 778, "def _legacy_load_weights("),
        ("qwen2_moe.py", 1324, 1408, "def load_weights("),
        ("mixtral.py", 392, 459, "def load_weights("),
        ("glm4_moe.py", 1071, 1237, "def load_weights("),
        ("qwen3_next.py", 1138, 1276, "def load_weights("),
        ("qwen3_5.py", 2091, 2371, "def load_weights("),
        ("minimax_m2.py", 1113, 1224, "def load_weights("),
        ("gpt_oss.py", 1224, 1290, "for name, loaded_weight in weights:"),  # behind it, sinks are padded
    ],
)
def test_sglangs_other_loaders_join_nothing(file, first, last, begins):
    code = lines(LOADERS + file, first, last, begins=begins)
    assert "weight_loader(param, loaded_weight" in code
    for joining in ("torch.cat", "torch.stack", "cached_", "pending", "list(weights)"):
        assert joining not in code.replace("cos_cached", "").replace("sin_cached", ""), joining


def buckets_of(config: ParallelConfig, cases: list[tuple[str, int]], joins: bool):
    """Runs on a rank, which holds nothing: for each preset and tensor-parallel size, the names in each bucket."""
    from megatron_ext.hf.export import HFExporter

    if not joins:
        HFExporter._joined = lambda self, names: None
    return [_names(Path(path), tensor) for path, tensor in cases]


def _names(path: Path, tensor: int) -> list[list[str]]:
    config, model = load_config_and_model(path)
    # One layer of each kind says what all are made of; the sizes are the real ones.
    kinds = [[n for n in range(model.num_layers) if (n in model.moe_layers) == sparse] for sparse in (False, True)]
    exporter = _exporter_of_first_layers(config, model, 1 + max(kind[0] for kind in kinds if kind))
    (items,) = exporter.stages
    items = [_shard(exporter, item, model, tensor) for item in items if not item.match.row.expert]
    first = [i for i in items if i.match.row.megatron.startswith("embedding.")]
    last = [i for i in items if i.match.layer is None and i not in first]

    buffers = {m.row.megatron for _, p, m in exporter.parameters if not isinstance(p, torch.nn.Parameter)}

    def of_layers(layers: range, *, buffer: bool) -> list:
        alike = {n: kind[0] for kind in kinds for n in kind}
        return [
            dataclasses.replace(i, match=dataclasses.replace(i.match, layer=n))
            for n in layers
            for i in items
            if i.match.layer == alike[n] and (i.match.row.megatron in buffers) == buffer
        ]

    sizes, exporter.stages = config.parallel.stage_layers(model.num_layers), []
    for stage in range(len(sizes)):
        layers = range(sum(sizes[:stage]), sum(sizes[: stage + 1]))
        inner = (first if stage == 0 else []) + of_layers(layers, buffer=False)
        outer = (last if stage == len(sizes) - 1 else []) + of_layers(layers, buffer=True)  # a chunk's buffers are last
        exporter.stages.append(inner + outer)
    exporter.model, exporter.pp_group = model, _Nowhere()
    exporter._ways = lambda expert: 1 if expert else tensor
    exporter._gather = lambda bucket, expert, stage: exporter._empty(bucket, exporter._ways(expert))
    return [[name for name, _ in bucket] for bucket in exporter.stream()]


def _exporter_of_first_layers(config, model, layers: int):
    """Of the model's first layers, built without storage."""
    from megatron_ext.hf.export import HFExporter
    from megatron_ext.model.build import build_model

    short = dataclasses.replace(
        model,
        hf=model.hf | {"num_hidden_layers": layers},
        num_layers=layers,
        moe_layers=tuple(n for n in model.moe_layers if n < layers),
    )
    with torch.device("meta"):
        _, chunks = build_model(short, ParallelConfig(), TrainerConfig(), config.precision, replay=False)
    return HFExporter(chunks, short, bucket_bytes=config.weights.bucket_bytes)


class _Nowhere:
    """A rank of no stage: it is given what the others gathered."""

    def rank(self) -> int:
        return -1


def _shard(exporter, item, model, tensor: int):
    """The same parameter as one of `tensor` ranks holds it."""
    flat = torch.empty(item.shape, device="meta").flatten()
    ((_, whole),) = exporter._merge([item], flat, False)
    return dataclasses.replace(item, shape=tuple(item.match.row.transform.shard(whole, model, 0, tensor).shape))


def cut_sets(path: str, buckets: list[list[str]]) -> int:
    """How many layers have a set that lies in several buckets."""
    _, model = load_config_and_model(path)
    home = {name: number for number, names in enumerate(buckets) for name in names}
    assert len(home) == sum(map(len, buckets)) > model.num_layers
    if model.hf.get("q_lora_rank") is None:  # SGLang then has nothing to join, and Moonlight one of the two
        return 0
    homes = [{home[n.format(layer=layer)] for n in s} for s in model.family.joined for layer in range(model.num_layers)]
    return sum(len(each) > 1 for each in homes)


def different_presets() -> dict[tuple, str]:
    """A preset of each model and layout."""
    found = {}
    for path in PRESETS:
        config, _ = load_config_and_model(path)
        if config.device == "cuda":
            found[(path.parent.name, config.parallel, config.weights.bucket_bytes)] = (
                str(path),
                config.parallel.tensor,
            )
    return found


@pytest.mark.slow
def test_no_preset_cuts_what_the_loader_joins():
    cases = list(different_presets().values())
    assert len({Path(path).parent for path, _ in cases}) == 13
    (found,) = run_ranks(buckets_of, ParallelConfig(), cases, True)
    assert [cut_sets(path, buckets) for (path, _), buckets in zip(cases, found, strict=True)] == [0] * len(cases)
    assert all(len(buckets) > 1 for buckets in found)


@pytest.mark.slow
def test_at_their_sizes_most_layers_would_be_cut_if_sets_did_not_travel_together():
    deepseek, kimi = (f"configs/{name}/gspo.yaml" for name in ("deepseek-v3", "kimi-k2"))
    cases = [(deepseek, 1), (deepseek, 8), (kimi, 2)]
    (apart,) = run_ranks(buckets_of, ParallelConfig(), cases, False)
    assert [cut_sets(path, buckets) for (path, _), buckets in zip(cases, apart, strict=True)] == [61, 61, 29]
    (together_,) = run_ranks(buckets_of, ParallelConfig(), cases, True)
    assert [cut_sets(path, buckets) for (path, _), buckets in zip(cases, together_, strict=True)] == [0, 0, 0]
