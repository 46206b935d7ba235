"""A model directory without its weights says what the weights are that are written into it."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_ext.hf.companions import Carried, exported_config, write_companions
from megatron_ext.hf.files import TensorFiles
from megatron_ext.hf.writer import write_weights
from tests.support.tiny_families import FAMILIES, save_family

ALL = (*FAMILIES, "llama")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    return {name: save_family(name, tmp_path_factory.mktemp("family")) for name in ALL}


def edit_config(folder, **fields):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


@pytest.mark.parametrize("family", ALL)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_written_model_loads_in_transformers_with_every_value_that_was_written(families, tmp_path, family, dtype):
    """The source says another dtype, and promises draft layers: bfloat16 trained in float32, or the opposite."""
    from transformers import AutoModelForCausalLM

    source = tmp_path / "source"
    write_companions(families[family], source, "bfloat16" if dtype == "float32" else "float32")
    edit_config(source, num_nextn_predict_layers=1)
    random, carried = torch.Generator().manual_seed(1), set(Carried(source).names)
    moved = {  # as a trainer leaves them: values that bfloat16 does not hold, where they are float32
        name: t + 1e-4 * torch.randn(t.shape, generator=random)
        for name, t in load_file(families[family] / "model.safetensors").items()
        if name not in carried
    }
    biases = {name for name in moved if name.endswith("e_score_correction_bias")}  # their dtype is their own
    written = {name: t if name in biases else t.to(DTYPES[dtype]) for name, t in moved.items()}
    out = tmp_path / "hf"
    write_companions(source, out, dtype)
    write_weights(written.items(), written.items(), out)
    model, report = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert {kind: keys for kind, keys in report.items() if keys} == {}
    assert model.dtype == DTYPES[dtype]
    assert model.config.num_hidden_layers == 4
    model.save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert again.keys() == written.keys() | carried
    for name, tensor in written.items():
        # transformers reads MiniMax-M2's biases in the dtype of all else, and alone these
        read = tensor.to(DTYPES[dtype]) if family == "minimax_m2" else tensor
        assert again[name].dtype == read.dtype, name
        assert torch.equal(again[name], read), name
    files, before = TensorFiles(out), load_file(families[family] / "model.safetensors")
    assert all(files[name].dtype == before[name].dtype for name in carried)
    assert all(torch.equal(files[name], before[name]) for name in carried)


FOREIGN = (
    "model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "pytorch_model.bin",
    "pytorch_model.bin.index.json", "training_args.bin", "tf_model.h5", "flax_model.msgpack", "rust_model.ot",
    "model.Q4_K_M.gguf", "consolidated.00.pth", "optimizer.pt", "model.onnx", "model.onnx_data", "last.ckpt",
    "model.ckpt.index", "model.ckpt.data-00000-of-00001",
)  # fmt: skip
KEPT = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "chat_template.jinja", "generation_config.json",
    "modeling_other.py", "LICENSE", "README.md", "merges.txt",
)  # fmt: skip


def test_no_weights_of_any_format_are_copied_and_everything_else_is(tmp_path):
    source = tmp_path / "source"
    for folder in ("additional_chat_templates", "original", "onnx", ".git"):
        (source / folder).mkdir(parents=True)
        (source / folder / "tool_use.jinja").write_text(folder)
    for name in (*FOREIGN, *KEPT):
        (source / name).write_text(name)
    (source / "config.json").write_text("{}")
    for _ in range(2):  # a resumed run writes its directory again
        write_companions(source, tmp_path / "hf", "float32")
    found = {str(f.relative_to(tmp_path / "hf")) for f in (tmp_path / "hf").rglob("*") if f.is_file()}
    assert found == {*KEPT, "config.json", "additional_chat_templates/tool_use.jinja"}
    assert (tmp_path / "hf" / "tokenizer.model").read_text() == "tokenizer.model"


def test_additional_chat_templates_of_a_written_model_are_its_tokenizers(tiny_model_dir, tmp_path):
    from transformers import AutoTokenizer

    source = tmp_path / "source"
    write_companions(tiny_model_dir, source, "float32")
    (source / "chat_template.jinja").write_text("usual")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tool_use.jinja").write_text("with tools")
    write_companions(source, tmp_path / "hf", "float32")
    assert AutoTokenizer.from_pretrained(tmp_path / "hf").chat_template == {
        "default": "usual",
        "tool_use": "with tools",
    }


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ({}, {"dtype": "bfloat16"}),
        ({"dtype": "float32"}, {"dtype": "bfloat16"}),
        ({"torch_dtype": "float16"}, {"torch_dtype": "bfloat16"}),
        ({"dtype": "float32", "torch_dtype": "float32"}, {"dtype": "bfloat16", "torch_dtype": "bfloat16"}),
        ({"num_nextn_predict_layers": 3}, {"num_nextn_predict_layers": 0, "dtype": "bfloat16"}),
        ({"num_nextn_predict_layers": 0}, {"num_nextn_predict_layers": 0, "dtype": "bfloat16"}),
        ({"quantization_config": {"quant_method": "fp8"}, "x": None}, {"x": None, "dtype": "bfloat16"}),
    ],
    ids=str,
)
def test_the_configuration_says_what_is_written(source, expected):
    assert exported_config(source, "bfloat16") == expected


def test_a_source_without_a_configuration_is_named_and_nothing_is_written(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        write_companions(tmp_path, tmp_path / "hf", "float32")
    assert not (tmp_path / "hf").exists()


def test_what_is_carried_lies_beside_the_weights_and_in_their_index(tmp_path):
    """A run writes companions first, and weights into the same folder."""
    source, out = tmp_path / "source", tmp_path / "hf"
    source.mkdir()
    weights = {"a": torch.ones(4), "b": torch.zeros(4)}
    drafts = {"model.layers.2.x": torch.arange(3, dtype=torch.bfloat16), "model.layers.3.x": torch.ones(2)}
    both = weights | drafts
    write_weights(both.items(), both.items(), source)
    config = {"num_hidden_layers": 2, "num_mtp_modules": 2}
    (source / "config.json").write_text(json.dumps(config))
    write_companions(source, out, "float32")
    moved = {name: t + 1 for name, t in weights.items()}
    write_weights(moved.items(), moved.items(), out)
    files = TensorFiles(out)
    assert files.files.keys() == both.keys()
    assert all(torch.equal(files[name], (moved | drafts)[name]) for name in both)
    assert all(files[name].dtype == drafts[name].dtype for name in drafts)
    assert json.loads((out / "config.json").read_text()) == config | {"dtype": "float32"}
    assert Carried(out).names == sorted(drafts)
    (source / "config.json").write_text(json.dumps(config | {"num_mtp_modules": 0}))
    write_companions(source, out, "float32")
    assert not (out / "carried.safetensors").exists()


def test_draft_layers_with_names_of_their_own_are_carried_though_the_configuration_counts_none(tmp_path):
    """As Qwen3-Next's published files have them."""
    source, out = tmp_path / "source", tmp_path / "hf"
    source.mkdir()
    drafts = {"mtp.fc.weight": torch.arange(3, dtype=torch.bfloat16), "mtp.layers.0.x": torch.ones(2)}
    both = {"model.layers.0.x": torch.ones(4)} | drafts
    write_weights(both.items(), both.items(), source)
    (source / "config.json").write_text(json.dumps({"model_type": "qwen3_next", "num_hidden_layers": 1}))
    write_companions(source, out, "float32")
    assert Carried(out).names == sorted(drafts)
    assert all(torch.equal(tensor, drafts[name]) for name, tensor in Carried(out).stream())


def test_indexers_are_carried_and_a_model_that_lacks_one_is_refused(families, tmp_path):
    source = families["deepseek_v32"]
    assert len(Carried(source).names) == 4 * 5
    weights = load_file(source / "model.safetensors")
    del weights["model.layers.2.self_attn.indexer.k_norm.bias"]
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(
        ValueError, match=r"lacks tensors of deepseek_v32: model\.layers\.2\.self_attn\.indexer\.k_norm\.b"
    ):
        write_companions(tmp_path, tmp_path / "hf", "float32")
    assert not (tmp_path / "hf").exists()


def test_what_is_carried_in_a_dtype_that_is_not_written_from_here_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"num_hidden_layers": 2, "num_nextn_predict_layers": 1}))
    save_file({"model.layers.2.x": torch.ones(4, dtype=torch.int8)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.layers\.2\.x is I8; write it in float32, bfloat16 or float16"):
        Carried(tmp_path)
