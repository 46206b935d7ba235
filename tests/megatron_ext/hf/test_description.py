"""One description of a model, from its config.json alone; what is particular about a family stands in its file."""

from __future__ import annotations

import ast
import dataclasses
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open

from megatron_ext.hf.description import describe, read_description
from megatron_ext.hf.families import FAMILIES
from tests.support.tiny_families import FAMILIES as TINY
from tests.support.tiny_families import save_family, tiny_config

ROOT = Path(__file__).parents[3]
LATENT, FLOAT32_ROUTER = ("kv_cache", "same"), ("router", "fp32")
DEMANDS = {
    "glm4_moe": [FLOAT32_ROUTER],
    "deepseek_v3": [LATENT],
    "kimi_k2": [LATENT],
    "deepseek_v32": [LATENT],
    "glm4_moe_lite": [LATENT, FLOAT32_ROUTER],
    "minimax_m2": [FLOAT32_ROUTER],
}
WHOLE = ("embed_tokens.weight", "lm_head.weight", "gate.weight", "router.weight", "_bias", "conv1d.weight")
"""Endings of matrices that SGLang's own quantisation leaves alone."""
EXCEPTIONS = {
    "pipeline/config/model.py": "writes the config.json of a tiny model, and so says of which type it is",
    "pipeline/environments/turn_parser.py": "a parser of SGLang has the name, and its calls have ids of their own",
}


def test_a_description_is_read_without_torch_transformers_or_megatron():
    source = (
        "import sys\n"
        "from megatron_ext.hf.description import read_description\n"
        "model = read_description('configs/deepseek-v3')\n"
        "assert (model.query, model.expert_ffn, model.padded_vocab_size(7)) == (24576, 2048, 129283), model\n"
        "print(sorted({'torch', 'transformers', 'megatron', 'ray', 'sglang', 'pipeline'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", source], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize("name", TINY)
def test_every_family_is_described_once_for_all_and_a_description_travels(name):
    model = describe(tiny_config(name))
    assert model.family is FAMILIES[model.model_type]
    assert model.num_experts == 8
    assert pickle.loads(pickle.dumps(model)) == model
    assert "rms_norm_eps" not in repr(model)  # a config.json is no part of an error message
    with pytest.raises(dataclasses.FrozenInstanceError):
        model.num_layers = 3  # pyright: ignore[reportAttributeAccessIssue]


def test_a_model_without_a_sparse_layer_has_no_experts(tmp_path):
    hf = tiny_config("qwen3_moe with dense layers") | {"mlp_only_layers": [0, 1, 2, 3]}
    (tmp_path / "config.json").write_text(json.dumps(hf))
    model = read_description(tmp_path)
    assert (model.num_experts, model.topk, model.moe_layers, model.expert_ffn) == (0, 0, (), 0)


@pytest.mark.parametrize("name", TINY)
def test_matrices_of_attention_and_mlps_are_quantised_and_no_others(tmp_path, name):
    """On the tensors that transformers writes, against the rule by names that held for all families."""
    with safe_open(save_family(name, tmp_path) / "model.safetensors", "pt") as file:
        shapes = {n: file.get_slice(n).get_shape() for n in file.keys()}  # noqa: SIM118  (no dictionary)
    kept = describe(tiny_config(name)).family.kept_whole
    matrices = [n for n, shape in shapes.items() if len(shape) > 1]
    assert [n for n in matrices if n.endswith(kept)] == [n for n in matrices if n.endswith(WHOLE)] != []
    assert [n for n in matrices if not n.endswith(kept)]


def test_what_a_family_leaves_no_choice_in_is_refused_with_what_to_write(tmp_path):
    from pipeline.config import ConfigError, load_config

    for name, family in FAMILIES.items():
        needed = [(n.setting, n.value) for n in family.needs if n.device is None]
        assert needed == DEMANDS.get(name, [])
    for name, wrong in {
        "glm4_moe": "router: bf16",
        "moonlight": "kv_cache: bfloat16",
        "minimax_m2": "router: bf16",
    }.items():
        model = tmp_path / name
        model.mkdir()
        (model / "config.json").write_text(json.dumps(tiny_config(name)))
        other = {"weights": "bfloat16", "router": "fp32"}
        key, value = wrong.split(": ")
        settings = ", ".join(f"{k}: {v}" for k, v in (other | {key: value}).items())
        file = tmp_path / f"{name}.yaml"
        file.write_text(f"model: {{path: {model}}}\ndata: {{task: {{name: digit_sort}}}}\nprecision: {{{settings}}}\n")
        ((setting, right),) = DEMANDS[describe(tiny_config(name)).model_type]
        with pytest.raises(ConfigError, match=rf"set precision\.{setting}={right}$"):
            load_config(file)


def family_names(source: str) -> set[str]:
    """Strings of a module, docstrings aside, that name a family: in full, or as what one begins with."""
    tree, found = ast.parse(source), set()
    texts = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant)}
    for node in ast.walk(tree):
        said = isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in texts
        if said and node.value in FAMILIES:
            found.add(node.value)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "startswith":
            starts = [n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
            found |= {s for s in starts if len(s) > 2 and any(name.startswith(s) for name in FAMILIES)}
    return found


def test_no_file_but_a_familys_own_asks_which_family_a_model_is_of():
    found = {}
    for package in ("pipeline", "megatron_ext"):
        for file in sorted((ROOT / package).rglob("*.py")):
            name = str(file.relative_to(ROOT))
            if not name.startswith("megatron_ext/hf/families/") and (names := family_names(file.read_text())):
                found[name] = names
    assert found.keys() == EXCEPTIONS.keys(), found
    assert family_names('if hf["model_type"].startswith("glm4"): pass') == {"glm4"}
    assert family_names('if kind == "gpt_oss": pass') == {"gpt_oss"}
    assert family_names('"""mixtral"""') == set()


def test_megatron_ext_never_imports_pipeline():
    for file in sorted((ROOT / "megatron_ext").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not [m for m in modules if m.partition(".")[0] == "pipeline"], file
