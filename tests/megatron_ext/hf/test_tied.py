"""A tied model whose files hold an LM head: taken where it is the embedding, in any file and dtype, else refused."""

import json
import shutil
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_ext.config import OptimizerConfig, ParallelConfig, TrainerConfig
from megatron_ext.hf.description import UnsupportedModel, read_description
from megatron_ext.hf.tied import check_tied_head
from pipeline.config import ConfigError, load_config
from tests.support.convert_cli import TO_HF, TO_MEGATRON, convert
from tests.support.ranks import run_ranks

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def tied_model(dense_model, folder, head, *, embedding=None, sharded=False):
    """The dense model of the session, tied. head, embedding: from the embedding's [512, 64] float32 to what is stored.
    sharded: the LM head in a file of its own."""
    shutil.copytree(dense_model, folder)
    config = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    if embedding is not None:
        tensors[EMBEDDING] = embedding(tensors[EMBEDDING])
    tensors[HEAD] = head(tensors[EMBEDDING]).contiguous()
    if sharded:
        (folder / "model.safetensors").unlink()
        files = {
            "a.safetensors": {n: t for n, t in tensors.items() if n != HEAD},
            "b.safetensors": {HEAD: tensors[HEAD]},
        }
        for file, part in files.items():
            save_file(part, folder / file)
        index = {"weight_map": {name: file for file, part in files.items() for name in part}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    else:
        save_file(tensors, folder / "model.safetensors")
    return folder


def one_more(embedding):
    out = embedding.clone()
    out[17, 3] += 1.0
    return out


def bf16(tensor):
    return tensor.bfloat16()


EQUAL = {
    "the same": {"head": torch.clone},
    "in another file": {"head": torch.clone, "sharded": True},
    "in float32, of bfloat16": {"head": torch.Tensor.float, "embedding": bf16},
    "in bfloat16, of float32 that needs no more": {"head": bf16, "embedding": lambda t: t.bfloat16().float()},
    "in float64, in another file": {"head": torch.Tensor.double, "sharded": True},
    "NaN and all": {"head": torch.clone, "embedding": lambda t: t.index_fill(0, torch.tensor([5]), float("nan"))},
}
DIFFERENT = {
    "another number": ({"head": one_more}, r"row 17 is the first that differs \(F32 and F32\)"),
    "another file": ({"head": one_more, "sharded": True}, "row 17 is the first"),
    "rounded": ({"head": bf16}, r"row 0 is the first that differs \(BF16 and F32\)"),
    "another dtype too": ({"head": lambda t: one_more(t).half(), "embedding": bf16}, "is the first that differs"),
    "fewer rows": ({"head": lambda t: t[:-1].clone()}, r"the shapes are \[511, 64\] and \[512, 64\]"),
    "whole numbers": ({"head": lambda t: t.to(torch.int32)}, "the dtype I32 is not compared"),
}


def config_of(folder):
    return load_config("configs/quickstart.yaml", ["model.tiny=null", f"model.path={folder}"])


@pytest.mark.parametrize("case", EQUAL.values(), ids=EQUAL)
def test_an_lm_head_that_is_the_embedding_is_accepted(tiny_dense_model_dir, tmp_path, case):
    folder = tied_model(tiny_dense_model_dir, tmp_path / "model", **case)
    assert config_of(folder).model.path == folder


@pytest.mark.parametrize(("case", "sentence"), DIFFERENT.values(), ids=DIFFERENT)
def test_another_lm_head_is_refused_before_anything_starts(tiny_dense_model_dir, tmp_path, case, sentence):
    folder = tied_model(tiny_dense_model_dir, tmp_path / "model", **case)
    whole = f"model.path: {folder}: tie_word_embeddings is true, and {HEAD} is not {EMBEDDING}: .*{sentence}.*leave"
    with pytest.raises(ConfigError, match=whole):
        config_of(folder)
    (answer,) = convert([TO_MEGATRON, folder, tmp_path / "out"])
    assert answer.code == 2
    assert "tie_word_embeddings is true" in answer.text
    assert not (tmp_path / "out").exists()


def test_untied_models_and_files_without_an_lm_head_are_not_read(tiny_dense_model_dir, tmp_path):
    folder = tied_model(tiny_dense_model_dir, tmp_path / "model", one_more)
    config = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config))
    assert config_of(folder).model.path == folder
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    (folder / "model.safetensors").unlink()
    check_tied_head(folder, read_description(folder))


@pytest.mark.parametrize("content", [b"", b"\x01", struct.pack("<Q", 1 << 40), struct.pack("<Q", 4) + b"{no}", None])
def test_a_damaged_file_is_named(tiny_dense_model_dir, tmp_path, content):
    folder = tied_model(tiny_dense_model_dir, tmp_path / "model", torch.clone)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:20_000] if content is None else content)
    with pytest.raises(ConfigError, match=rf"model\.path: {file} is damaged"):
        config_of(folder)


def answers(config: ParallelConfig, same: str, other: str):
    """The names that a policy with critic and reference streams, of the first; what the second is refused with."""
    from megatron_ext.trainer import Trainer

    def make(model: str, **more):
        return Trainer(model, config, TrainerConfig(), OptimizerConfig(), replay=False, **more)

    names = [name for bucket in make(same, critic=OptimizerConfig(), reference=True).export() for name, _ in bucket]
    with pytest.raises(UnsupportedModel) as refused:
        make(other)
    return names, str(refused.value)


def test_policy_critic_and_reference_take_it_and_a_rank_refuses_another(tiny_dense_model_dir, tmp_path):
    same = tied_model(tiny_dense_model_dir, tmp_path / "same", torch.clone, sharded=True)
    other = tied_model(tiny_dense_model_dir, tmp_path / "other", one_more)
    ((names, refused),) = run_ranks(answers, ParallelConfig(), str(same), str(other))
    assert sorted(names) == sorted(set(load_file(tiny_dense_model_dir / "model.safetensors")) - {HEAD})
    assert "row 17 is the first that differs" in refused


def test_a_conversion_leaves_it_out_and_takes_the_embeddings_dtype(tiny_dense_model_dir, tmp_path):
    case = {"head": torch.Tensor.float, "embedding": bf16, "sharded": True}
    folder = tied_model(tiny_dense_model_dir, tmp_path / "model", **case)
    calls = [[TO_MEGATRON, folder, tmp_path / "it"], [TO_HF, tmp_path / "it", tmp_path / "again"]]
    texts = [a.text for a in convert(*calls) if a.code == 0]
    assert len(texts) == 2
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert HEAD not in again
    assert again[EMBEDDING].dtype == torch.bfloat16
