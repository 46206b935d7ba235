"""`sameroute convert`: there and back bit for bit."""

import functools
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from megatron_ext.hf.files import TensorFiles
from tests.support.convert_cli import TO_HF, TO_MEGATRON, Call, convert, with_tensors
from tests.support.receivers import free_port


def tensors(folder):
    return {n: t for file in sorted(folder.glob("*.safetensors")) for n, t in load_file(file).items()}


def same(a, b):
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


def test_every_family_comes_back_bit_for_bit(families, tmp_path):
    there = [[TO_MEGATRON, folder, tmp_path / name] for name, folder in families.items()]
    back = [[TO_HF, tmp_path / name, tmp_path / f"{name} again"] for name in families]
    for call, answer in zip([*there, *back], convert(*there, *back), strict=True):
        assert answer.code == 0, (call, answer.text)
        assert "equal the source's, bit for bit" in answer.text
    for name, folder in families.items():
        again = tmp_path / f"{name} again"
        assert same(tensors(folder), tensors(again)), name
        before, after = (json.loads((f / "config.json").read_text()) for f in (folder, again))
        assert after == before | ({"num_nextn_predict_layers": 0} if "num_nextn_predict_layers" in before else {})


def test_mxfp4_weights_become_bfloat16_and_the_configuration_says_so(families, tmp_path):
    def quantise(weights):
        for name in [n for n in weights if n.endswith("_proj")]:
            experts, columns, rows = weights.pop(name).shape
            weights[name + "_blocks"] = torch.randint(0, 256, (experts, rows, columns // 32, 16), dtype=torch.uint8)
            weights[name + "_scales"] = torch.randint(118, 125, (experts, rows, columns // 32), dtype=torch.uint8)
        weights.update({n: t.bfloat16() for n, t in weights.items() if t.is_floating_point()})

    model = with_tensors(families["gpt_oss"], tmp_path / "mxfp4", quantise)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "mxfp4"}}))
    answers = convert([TO_MEGATRON, model, tmp_path / "it"], [TO_HF, tmp_path / "it", tmp_path / "plain"])
    assert [a.code for a in answers] == [0, 0], answers
    assert f"8 MXFP4 tensors of {model} are read as bfloat16; what is written from here is not" in answers[0].text
    files = TensorFiles(model)
    assert same(tensors(tmp_path / "plain"), {name: files[name] for name in files.files})
    assert json.loads((tmp_path / "plain" / "config.json").read_text()) == config | {"dtype": "bfloat16"}


WRITTEN_IN_LAYOUTS = [
    ("moonlight", ["--tp", 2, "--pp", 2, "--vpp", 2, "--etp", 1]),
    ("qwen2_moe", ["--ep", 2]),
    ("gpt_oss", ["--tp", 2, "--pp", 2, "--ep", 2, "--etp", 1]),
    ("gpt_oss", ["--tp", 2, "--etp", 2]),
]


@pytest.mark.proof
def test_ranks_of_a_layout_write_it_together(families, tmp_path):
    """All in one process: the first that needs ranks starts the server that forks them, five seconds."""
    calls = []
    for number, (family, layout) in enumerate(WRITTEN_IN_LAYOUTS):
        it, back = tmp_path / f"{number}", tmp_path / f"{number} back"
        calls += [[TO_MEGATRON, families[family], it, *layout], [TO_HF, it, back]]
    for call, answer in zip(calls, convert(*calls), strict=True):
        assert answer.code == 0, (call, answer)
    for number, (family, layout) in enumerate(WRITTEN_IN_LAYOUTS):
        assert same(tensors(families[family]), tensors(tmp_path / f"{number} back")), (family, layout)
        written = list((tmp_path / f"{number}").glob("__*.distcp"))
        assert len(written) == (4 if "--pp" in layout else 2), (family, layout)


def launched(ranks):
    """Environments as a launcher sets them."""
    port = str(free_port())
    world = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo"}
    return tuple(world | {"RANK": str(rank)} for rank in range(ranks))


def test_processes_of_a_launcher_write_it_together(source, tmp_path):
    call = [TO_MEGATRON, source, tmp_path / "it", "--pp", 2]
    first, again, wrong = (convert(call, environments=launched(ranks)) for ranks in (2, 2, 3))
    assert [a.code for a in first] == [0, 0], first
    assert sorted("129 tensors equal" in a.text for a in first) == [False, True]
    assert all(a.code == 1 and "is already there" in a.text for a in again)
    assert all(a.code == 2 and "the launcher started 3 processes" in a.text for a in wrong)
    (back,) = convert([TO_HF, tmp_path / "it", tmp_path / "back"])
    assert back.code == 0
    assert same(tensors(source), tensors(tmp_path / "back"))


def test_files_are_split_indexed_and_read_by_transformers(source, checkpoint, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    (answer,) = convert([TO_HF, checkpoint, tmp_path / "out", "--shard-gb", 0.0003])
    assert answer.code == 0
    files = sorted(f.name for f in (tmp_path / "out").glob("*.safetensors"))
    assert files == [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    assert len(files) > 3
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(tensors(source))
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors(source).values())
    # a file is as large as asked for, or holds a single tensor
    assert all(
        (tmp_path / "out" / f).stat().st_size < 310_000 or list(index["weight_map"].values()).count(f) == 1
        for f in files
    )
    ids = torch.arange(20)[None]
    with torch.no_grad():
        one, two = (AutoModelForCausalLM.from_pretrained(f)(ids).logits for f in (source, tmp_path / "out"))
    assert torch.equal(one, two)
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("abc") == AutoTokenizer.from_pretrained(source)("abc")
    (again,) = convert([TO_MEGATRON, tmp_path / "out", tmp_path / "again"])
    assert again.code == 0, again.text


def test_what_is_not_weights_is_carried_along(source, checkpoint, tmp_path):
    (answer,) = convert([TO_HF, checkpoint, tmp_path / "out"])
    assert answer.code == 0
    companions = {f.name for f in source.iterdir()} - {"model.safetensors"}
    assert {"LICENSE", "tokenizer.json", "generation_config.json", "config.json"} <= companions
    assert {f.name for f in (checkpoint / "hf").iterdir()} == companions
    assert {f.name for f in (tmp_path / "out").iterdir()} == companions | {"model.safetensors"}
    for name in companions - {"config.json"}:
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()


def test_the_dtype_can_be_chosen_and_a_routing_bias_keeps_its_own(source, checkpoint, tmp_path):
    answers = convert(
        [TO_MEGATRON, source, tmp_path / "bf16", "--dtype", "bfloat16"],
        [TO_HF, tmp_path / "bf16", tmp_path / "one"],
        [TO_HF, checkpoint, tmp_path / "two", "--dtype", "bfloat16"],
        [TO_HF, tmp_path / "bf16", tmp_path / "three", "--dtype", "float32"],
    )
    assert [a.code for a in answers] == [0] * 4, answers
    rounded = {n: t if n.endswith("correction_bias") else t.to(torch.bfloat16) for n, t in tensors(source).items()}
    assert same(tensors(tmp_path / "one"), rounded)
    assert same(tensors(tmp_path / "two"), rounded)
    assert same(tensors(tmp_path / "three"), {n: t.float() for n, t in rounded.items()})
    assert [json.loads((tmp_path / n / "config.json").read_text())["dtype"] for n in ("one", "three")] == [
        "bfloat16",
        "float32",
    ]
    assert "changed by the cast: 126 tensors" in answers[0].text


DRAFTS = {
    "model.layers.4.eh_proj.weight": torch.arange(6, dtype=torch.bfloat16).view(2, 3),
    "model.layers.4.mlp.gate.weight": torch.randn(8, 64),
    "model.layers.4.norm.weight": torch.full((3,), -0.0, dtype=torch.float16),
}


def with_drafts(source, folder):
    with_tensors(source, folder, lambda t: t.update(DRAFTS))
    config = json.loads((source / "config.json").read_text()) | {"num_nextn_predict_layers": 1}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_draft_layers_come_back_bit_for_bit_in_their_own_dtypes_and_the_configuration_names_them(source, tmp_path):
    folder = with_drafts(source, tmp_path / "drafts")
    answers = convert(
        [TO_MEGATRON, folder, tmp_path / "it", "--dtype", "bfloat16"],
        [TO_HF, tmp_path / "it", tmp_path / "back"],
        [TO_MEGATRON, tmp_path / "back", tmp_path / "twice"],
        [TO_HF, tmp_path / "twice", tmp_path / "again"],
    )
    assert [a.code for a in answers] == [0] * 4, answers
    assert all("as they were, in the dtype that they had: 3 tensors that are not trained" in a.text for a in answers)
    count = len(tensors(folder))
    assert all(f"{count} tensors equal the source's" in a.text for a in answers)
    assert load_file(tmp_path / "it" / "hf" / "carried.safetensors").keys() == DRAFTS.keys()
    for out in (tmp_path / "back", tmp_path / "again"):
        written = tensors(out)
        assert same({name: written[name] for name in DRAFTS}, DRAFTS)
        assert written.keys() == tensors(folder).keys()
        index = json.loads((out / "model.safetensors.index.json").read_text())
        assert index["weight_map"].keys() == written.keys()
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in written.values())
        assert json.loads((out / "config.json").read_text())["num_nextn_predict_layers"] == 1


def test_indexers_come_back_bit_for_bit_in_their_own_dtypes_beside_draft_layers(families, tmp_path):
    """DeepSeek-V3.2: of its layer that predicts a second token the indexer too."""
    source, folder = families["deepseek_v32"], tmp_path / "model"
    chooser, second = "model.layers.1.self_attn.indexer.", "model.layers.4.self_attn.indexer.wk.weight"

    def change(weights):
        weights[chooser + "wk.weight"] = weights[chooser + "wk.weight"].bfloat16()
        weights[second] = torch.randn(16, 64)

    with_tensors(source, folder, change)
    config = json.loads((source / "config.json").read_text()) | {"num_nextn_predict_layers": 1}
    (folder / "config.json").write_text(json.dumps(config))
    lacking = with_tensors(source, tmp_path / "lacking", lambda weights: weights.pop(chooser + "wq_b.weight"))
    *answers, refused = convert(
        [TO_MEGATRON, folder, tmp_path / "it", "--dtype", "bfloat16"],
        [TO_HF, tmp_path / "it", tmp_path / "back"],
        [TO_MEGATRON, lacking, tmp_path / "none"],
    )
    assert [a.code for a in answers] == [0, 0], answers
    before, after = tensors(folder), tensors(tmp_path / "back")
    carried = [name for name in before if ".indexer." in name]
    assert len(carried) == 4 * 5 + 1
    assert after.keys() == before.keys()
    assert same({name: after[name] for name in carried}, {name: before[name] for name in carried})
    assert all("as they were, in the dtype that they had: 21 tensors that are not trained" in a.text for a in answers)
    assert json.loads((tmp_path / "back" / "config.json").read_text())["num_nextn_predict_layers"] == 1
    assert refused.code == 2, refused
    assert f"lacks tensors of deepseek_v32: {chooser}wq_b.weight" in refused.text


def test_a_model_that_names_draft_layers_and_has_none_is_written_without(source, tmp_path):
    folder = with_drafts(source, tmp_path / "drafts")
    for name in ("model.safetensors", "LICENSE"):
        shutil.copyfile(source / name, folder / name)
    answers = convert([TO_MEGATRON, folder, tmp_path / "it"], [TO_HF, tmp_path / "it", tmp_path / "back"])
    assert [a.code for a in answers] == [0, 0], answers
    assert f"{folder} has no tensors of multi-token-prediction layers" in answers[0].text
    assert json.loads((tmp_path / "back" / "config.json").read_text())["num_nextn_predict_layers"] == 0


def flip_last_bit(file):
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def test_a_flipped_bit_in_the_draft_layers_of_a_checkpoint_is_named(source, tmp_path):
    folder, file = with_drafts(source, tmp_path / "drafts"), tmp_path / "it" / "hf" / "carried.safetensors"
    back = Call([TO_HF, tmp_path / "it", tmp_path / "back"], functools.partial(flip_last_bit, file))
    answers = convert([TO_MEGATRON, folder, tmp_path / "it"], back)
    assert [a.code for a in answers] == [0, 2], answers
    assert f"{file} is damaged: the checksum of model.layers.4.norm.weight is wrong" in answers[1].text
    assert not (tmp_path / "back").exists()
