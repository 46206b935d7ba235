"""`sameroute upcycle`: an exact copy computes what the dense model does; whole or nothing; what it refuses."""

from __future__ import annotations

import json
import signal

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_ext.config import OptimizerConfig, ParallelConfig, TrainerConfig
from megatron_ext.convert import upcycling
from megatron_ext.hf.description import read_description
from megatron_ext.hf.files import TensorFiles
from pipeline.commands.main import main
from pipeline.plan.counts import parameters
from tests.support.jobs import SAMPLES, joined, make_samples
from tests.support.ranks import run_ranks
from tests.support.tiny_families import VOCAB, save_family, transformers_says

CASES = {
    "llama to mixtral": ("llama", "mixtral", ["--experts", "4", "--topk", "2"]),
    "llama to mixtral, slices": ("llama, untied", "mixtral", ["--experts", "8", "--topk", "4", "--granularity", "4"]),
    "llama to qwen2_moe": (
        "llama", "qwen2_moe", ["--experts", "8", "--topk", "4", "--granularity", "2", "--shared-width", "64"],
    ),
    "qwen2 to qwen2_moe": ("qwen2", "qwen2_moe", ["--experts", "4", "--topk", "1", "--shared-width", "32"]),
    "qwen3 to qwen3_moe": ("qwen3", "qwen3_moe", ["--experts", "6", "--topk", "2", "--granularity", "2"]),
}  # fmt: skip
TWO = ["--experts", "4", "--topk", "2"]


@pytest.fixture(scope="module", autouse=True)
def the_process_is_as_before():
    """The command hides GPUs and takes signals, as a process of its own may."""
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        yield
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """family -> directory."""
    changes = {"llama, untied": {"head_dim": 16}}
    return {
        name: save_family(name, tmp_path_factory.mktemp("dense"), **changes.get(name, {}))
        for name in ("llama", "llama, untied", "qwen2", "qwen3")
    }


@pytest.fixture(scope="module")
def sparse(dense, tmp_path_factory):
    """case -> (dense directory, directory of the mixture)."""
    out = {}
    for case, (source, _, recipe) in CASES.items():
        folder = tmp_path_factory.mktemp("sparse") / "out"
        assert main(["upcycle", str(dense[source]), str(folder), *recipe]) == 0
        out[case] = dense[source], folder
    return out


@pytest.mark.parametrize("case", CASES)
def test_an_exact_copy_computes_the_dense_model_in_transformers(sparse, case):
    samples, (source, mixture) = make_samples(routes=False, vocab_size=VOCAB), sparse[case]
    (before, _), (after, routes) = (transformers_says(folder, samples) for folder in (source, mixture))
    assert np.abs(after - before).max() < 1e-5
    model = read_description(mixture)
    assert model.model_type == CASES[case][1]
    chosen = np.concatenate(routes)
    assert len(np.unique(chosen)) == model.num_experts  # the router is no constant
    slices = model.num_experts // len(np.unique(load_file(mixture / "model.safetensors")[router(mixture)], axis=0))
    by_copy = np.sort(chosen, -1).reshape(*chosen.shape[:2], -1, slices)
    assert (by_copy % slices == np.arange(slices)).all()  # a copy is chosen with all its slices


def router(mixture) -> str:
    (name,) = [n for n in TensorFiles(mixture).files if ".layers.1." in n and n.endswith(".gate.weight")]
    return name


def logprobs_on_a_rank(config: ParallelConfig, folders: list[str], samples):
    from megatron_ext.trainer import Trainer

    trainer, adam = TrainerConfig(micro_batch_tokens=100), OptimizerConfig()
    return [Trainer(f, config, trainer, adam, replay=True).logprobs(samples, "record") for f in folders]


def test_the_trainer_computes_the_dense_model_too(sparse):
    samples = make_samples(routes=False, vocab_size=VOCAB)
    (answers,) = run_ranks(logprobs_on_a_rank, ParallelConfig(), [str(f) for _, f in sparse.values()], samples)
    for (case, (source, _)), answer in zip(sparse.items(), answers, strict=True):
        assert np.abs(joined([answer], SAMPLES)[0] - transformers_says(source, samples)[0]).max() < 1e-5, case


def test_the_parameters_that_are_told_are_those_of_plan_and_as_many_are_active_as_before(dense, tmp_path, capsys):
    recipe = ["--experts", "8", "--topk", "4", "--granularity", "4"]
    assert main(["upcycle", str(dense["llama, untied"]), str(tmp_path / "out"), *recipe]) == 0
    before, after = (read_description(f) for f in (dense["llama, untied"], tmp_path / "out"))
    routers = after.num_layers * after.num_experts * after.hidden
    assert parameters.active(after) - routers == parameters.total(before)
    told = capsys.readouterr().out
    assert f"{parameters.total(after):,} parameters, {parameters.active(after):,} active" in told
    assert "mixtral of 8 experts, 4 a token" in told
    assert "tensors as they were made" in told


def test_noise_sets_routed_experts_apart_by_as_much_as_asked_and_the_seed_counts(dense, tmp_path):
    def made(name, *more):
        assert main(["upcycle", str(dense["qwen2"]), str(tmp_path / name), *TWO, "--shared-width", "32", *more]) == 0
        return load_file(tmp_path / name / "model.safetensors")

    exact, one, same, other = (
        made("a"),
        made("b", "--noise", "0.1"),
        made("c", "--noise", "0.1"),
        made("d", "--seed", "1"),
    )
    first, second = (f"model.layers.2.mlp.experts.{e}.up_proj.weight" for e in (0, 1))
    assert torch.equal(exact[first], exact[second])
    for name in (first, second):
        assert float((one[name] / exact[name] - 1).std()) == pytest.approx(0.1, rel=0.05)
    assert not torch.equal(one[first], one[second])
    assert all(torch.equal(one[n], same[n]) for n in one)
    changed = {n for n in exact if not torch.equal(exact[n], one[n])}
    assert changed == {n for n in exact if ".experts." in n}
    assert {n for n in exact if not torch.equal(exact[n], other[n])} == {
        n for n in exact if n.endswith("mlp.gate.weight")
    }


def test_the_rest_of_the_directory_comes_along_and_ties_are_undone(dense, tmp_path, capsys):
    (dense["llama"] / "LICENSE").write_text("Free.")
    assert main(["upcycle", str(dense["llama"]), str(tmp_path / "out"), *TWO, "--dtype", "bfloat16"]) == 0
    out = capsys.readouterr().out
    assert "the LM head, which was the embedding, is a copy of it" in out
    assert "not for a run with a server: SGLang gives mixtral a plain rotary embedding" in out
    weights, before = (load_file(f / "model.safetensors") for f in (tmp_path / "out", dense["llama"]))
    assert torch.equal(weights["lm_head.weight"], before["model.embed_tokens.weight"].bfloat16())
    assert {t.dtype for t in weights.values()} == {torch.bfloat16}
    hf = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (hf["dtype"], hf["tie_word_embeddings"], hf["num_local_experts"]) == ("bfloat16", False, 4)
    assert (tmp_path / "out" / "LICENSE").read_text() == "Free."


def test_files_are_split_where_asked(dense, tmp_path):
    assert main(["upcycle", str(dense["qwen3"]), str(tmp_path / "out"), *TWO, "--shard-gb", "0.0005"]) == 0
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    assert read_description(tmp_path / "out").num_experts == 4


@pytest.mark.parametrize(
    ("source", "recipe", "sentence"),
    [
        ("llama", ["--experts", "4", "--topk", "5"], "--topk 5 is more than --experts 4; lower it"),
        (
            "llama",
            ["--experts", "4", "--topk", "1", "--granularity", "2"],
            "--topk 1 is no multiple of --granularity 2",
        ),
        ("llama", ["--experts", "3", "--topk", "2", "--granularity", "2"], "--experts 3 is no multiple of"),
        ("llama", ["--experts", "0", "--topk", "0"], "--experts must be at least 1, not 0"),
        ("llama", ["--experts", "6", "--topk", "3", "--granularity", "3"], "128 inner elements do not divide into"),
        ("llama", [*TWO, "--shared-width", "128"], "--shared-width must be of 0 to 127"),
        ("llama", [*TWO, "--noise", "-1"], "--noise must be 0 or more"),
        ("qwen2", TWO, "qwen2 becomes qwen2_moe, which has a shared expert; give its width, --shared-width"),
        ("qwen3", [*TWO, "--shared-width", "8"], "qwen3 becomes qwen3_moe, which has no shared expert; leave"),
    ],
)
def test_what_does_not_go_together_is_a_sentence_and_nothing_is_begun(
    dense, tmp_path, capsys, source, recipe, sentence
):
    assert main(["upcycle", str(dense[source]), str(tmp_path / "out"), *recipe]) == 2
    assert sentence in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("source", "shared", "family"),
    [
        ("llama", [], "mixtral"),
        ("llama", ["--shared-width", "64"], "qwen2_moe"),
        ("qwen2", ["--shared-width", "64"], "qwen2_moe"),
    ],
)
def test_heads_of_another_width_than_a_server_gives_are_refused_before_anything_is_read(
    dense, tmp_path, capsys, source, shared, family
):
    own, out = tmp_path / "own", tmp_path / "out"
    own.mkdir()
    hf = json.loads((dense[source] / "config.json").read_text())
    (own / "config.json").write_text(json.dumps(hf | {"head_dim": 32}))
    assert main(["upcycle", str(own), str(out), *TWO, *shared]) == 2
    said = capsys.readouterr().err
    assert (
        f"head_dim=32: a {source} becomes {family}, to which SGLang gives heads of hidden_size / num_attention" in said
    )
    assert "= 16: no server would hold it; take a dense model with such heads, or a qwen3" in said
    assert not out.exists()


def test_a_mixture_a_directory_without_a_model_and_a_damaged_one_are_refused(dense, sparse, tmp_path, capsys):
    _, mixture = sparse["llama to mixtral"]
    broken = save_family("llama", tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    gone = "model.layers.2.self_attn.q_proj.weight"
    save_file({n: t for n, t in weights.items() if n != gone} | {"odd": torch.zeros(1)}, broken / "model.safetensors")
    for source, sentence in (
        (mixture, "mixtral has experts already"),
        (tmp_path, "it has no config.json"),
        (broken, f"lacks tensors of llama: {gone}"),
    ):
        assert main(["upcycle", str(source), str(tmp_path.parent / "out"), *TWO]) == 2
        assert sentence in capsys.readouterr().err
    assert not (tmp_path.parent / "out").exists()
    assert main(["upcycle", str(dense["llama"]), str(mixture), *TWO]) == 1
    assert "is already there; give another directory, or --overwrite" in capsys.readouterr().err


def test_what_was_not_written_as_it_was_made_leaves_nothing(dense, tmp_path, capsys, monkeypatch):
    write = upcycling.write_weights

    def flipping(expected, values, directory, **settings):
        write(expected, values, directory, **settings)
        content = bytearray((directory / "model.safetensors").read_bytes())
        content[-5] ^= 16
        (directory / "model.safetensors").write_bytes(content)

    monkeypatch.setattr(upcycling, "write_weights", flipping)
    assert main(["upcycle", str(dense["llama"]), str(tmp_path / "out"), *TWO]) == 1
    assert "was not written as it was read" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
