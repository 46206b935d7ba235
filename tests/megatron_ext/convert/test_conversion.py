"""`sameroute convert`: there and back bit for bit; whatever fails says why and leaves nothing behind."""

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_ext.hf.files import TensorFiles
from pipeline.data.tokenizer import write_character_tokenizer
from tests.support.convert_cli import Call, convert
from tests.support.tiny_families import FAMILIES, save_family

TO_MEGATRON, TO_HF = "to-megatron", "to-hf"


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    return {name: save_family(name, tmp_path_factory.mktemp("family")) for name in FAMILIES}


@pytest.fixture(scope="module")
def source(families):
    """A model directory with everything around the weights."""
    folder = families["deepseek_v3"]
    write_character_tokenizer(folder)
    (folder / "LICENSE").write_text("Free.")
    return folder


@pytest.fixture(scope="module")
def checkpoint(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("checkpoint") / "it"
    (answer,) = convert([TO_MEGATRON, source, out])
    assert answer.code == 0, answer.text
    return out


def tensors(folder):
    return {n: t for file in sorted(folder.glob("*.safetensors")) for n, t in load_file(file).items()}


def same(a, b):
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


def digest(folder):
    return {p.relative_to(folder): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()}


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


@pytest.mark.parametrize(
    ("family", "layout"),
    [
        ("moonlight", ["--tp", 2, "--pp", 2, "--vpp", 2, "--etp", 1]),
        ("qwen2_moe", ["--ep", 2]),
        ("gpt_oss", ["--tp", 2, "--pp", 2, "--ep", 2, "--etp", 1]),
        ("gpt_oss", ["--tp", 2, "--etp", 2]),
    ],
    ids=str,
)
def test_ranks_of_a_layout_write_it_together(families, tmp_path, family, layout):
    answers = convert(
        [TO_MEGATRON, families[family], tmp_path / "it", *layout], [TO_HF, tmp_path / "it", tmp_path / "back"]
    )
    assert [a.code for a in answers] == [0, 0], answers
    assert same(tensors(families[family]), tensors(tmp_path / "back"))
    assert len(list((tmp_path / "it").glob("__*.distcp"))) == (4 if "--pp" in layout else 2)


def launched(ranks):
    """Environments as a launcher sets them."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
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


def with_tensors(source, folder, edit):
    shutil.copytree(source, folder)
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def with_config(source, folder, **changes):
    shutil.copytree(source, folder)
    config = json.loads((source / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def cut(file, bytes_left):
    file.write_bytes(file.read_bytes()[:bytes_left])


def disk_is_full():
    shutil.disk_usage = lambda path: shutil._ntuple_diskusage(10**12, 10**12, 10**5)  # pyright: ignore


def files_stay_small():
    """From here on the kernel refuses to let a file of this process grow beyond 50 kB."""
    import resource
    import signal

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))


def a_value_is_lost():
    from megatron_ext.convert import tensors as module

    original = module.read_shard

    def forgetful(files, match, model):
        shard = original(files, match, model).clone()
        if match.row.megatron.endswith("linear_proj.weight") and match.layer == 2:
            shard[3, 4] = 0.0
        return shard

    module.read_shard = forgetful


def two_experts_change_places():
    from megatron_ext.convert import tensors as module

    original = module.read_shard

    def elsewhere(files, match, model):
        if match.row.expert and match.layer == 2 and match.expert in (0, 1):
            match = dataclasses.replace(match, expert=1 - match.expert)
        return original(files, match, model)

    module.read_shard = elsewhere


def two_tensors_change_places():
    from megatron_ext.hf import writer as module

    class Elsewhere(module.SafetensorsWriter):
        def write(self, name, tensor):
            places = {"0.down_proj.weight": "1.down_proj.weight", "1.down_proj.weight": "0.down_proj.weight"}
            before, experts, rest = name.partition("layers.2.mlp.experts.")
            super().write(before + experts + places.get(rest, rest), tensor)

    module.SafetensorsWriter = Elsewhere


def a_bit_flips(written, pattern):
    """In the middle of a tensor in a file, when a function of `command` has written it."""
    from megatron_ext.convert import conversion as module

    original = getattr(module, written)

    def flipping(source, out, *args):
        original(source, out, *args)
        folder = source if isinstance(source, Path) else out  # that has safetensors
        weight = load_file(folder / "model.safetensors")["model.layers.2.self_attn.o_proj.weight"].numpy().tobytes()
        (file,) = out.glob(pattern)
        content = bytearray(file.read_bytes())
        content[content.index(weight) + len(weight) // 2] ^= 16
        file.write_bytes(content)

    setattr(module, written, flipping)


def a_bit_flips_in_the_checkpoint():
    a_bit_flips("write_checkpoint", "*.distcp")


def a_bit_flips_in_the_weights():
    a_bit_flips("write_hf", "*.safetensors")


def interrupted_in_the_middle():
    from megatron_ext.convert import tensors as module

    original, calls = module.read_shard, []

    def stopped(*args):
        calls.append(args)
        if len(calls) == 20:
            raise KeyboardInterrupt
        return original(*args)

    module.read_shard = stopped


def fails(parent, source, *calls: tuple[Call | list, int, list[str]]):
    """Each call ends with its code and words, the source is as it was, and beside it there is nothing new."""
    before, there = digest(source), {p.name for p in parent.iterdir()}
    answers = convert(*(call for call, _, _ in calls))
    for (call, code, words), answer in zip(calls, answers, strict=True):
        assert answer.code == code, (call, answer)
        for word in words:
            assert word in answer.text, (call, answer)
        assert "Traceback" not in answer.text
    assert digest(source) == before
    assert {p.name for p in parent.iterdir()} == there


def test_a_model_directory_that_is_damaged_or_another_model_is_refused_in_words(source, tmp_path):
    gate = "model.layers.3.mlp.gate.weight"
    truncated = with_config(source, tmp_path / "truncated")
    cut(truncated / "model.safetensors", -1000)
    headless = with_config(source, tmp_path / "headless")
    cut(headless / "model.safetensors", 5)
    split = tmp_path / "split"
    convert([TO_MEGATRON, source, tmp_path / "whole"], [TO_HF, tmp_path / "whole", split, "--shard-gb", 0.0003])
    (split / "model-00002-of-00005.safetensors").unlink()
    half = with_tensors(source, tmp_path / "half", lambda t: t.update({n: x.half() for n, x in t.items()}))
    out = tmp_path / "out"
    fails(
        tmp_path,
        source,
        ([TO_MEGATRON, truncated, out], 2, [str(truncated / "model.safetensors"), "damaged"]),
        ([TO_MEGATRON, headless, out], 2, [str(headless / "model.safetensors"), "damaged"]),
        ([TO_MEGATRON, split, out], 1, ["lacks files", "model-00002-of-00005.safetensors"]),
        ([TO_MEGATRON, tmp_path / "nowhere", out], 1, ["no Hugging Face model directory"]),
        ([TO_MEGATRON, half, out], 1, ["F16", "--dtype"]),
        (
            [TO_MEGATRON, with_tensors(source, tmp_path / "less", lambda t: t.pop(gate)), out],
            2,
            [f"lacks tensors of deepseek_v3: {gate}"],
        ),
        ([TO_MEGATRON, with_config(source, tmp_path / "deep", num_hidden_layers=5), out], 2, ["lacks", "layers.4"]),
        (
            [
                TO_MEGATRON,
                with_config(source, tmp_path / "shallow", num_hidden_layers=3, num_nextn_predict_layers=0),
                out,
            ],
            2,
            ["has no place for", gate],
        ),
        (
            [TO_MEGATRON, with_config(source, tmp_path / "wide", v_head_dim=16), out],
            2,
            ["o_proj.weight [64, 48]", "the model has (64, 64)"],
        ),
        ([TO_MEGATRON, with_config(source, tmp_path / "llama", model_type="llama"), out], 2, ["'llama'"]),
        ([TO_MEGATRON, source, out, "--tp", 3], 2, ["4 attention heads do not divide"]),
        ([TO_MEGATRON, source, out, "--tp", 2, "--vpp", 2], 2, ["virtual_pipeline needs pipeline"]),
        ([TO_MEGATRON, source, tmp_path / "whole"], 1, ["already there", "--overwrite"]),
        ([TO_MEGATRON, source, source / "inside"], 1, ["lie in one another"]),
        ([TO_MEGATRON, source, source, "--overwrite"], 1, ["lie in one another"]),
    )


def test_a_checkpoint_that_is_damaged_or_another_models_is_refused_in_words(source, checkpoint, families, tmp_path):
    truncated, flipped, lost, unfinished, undescribed, crafted = (
        shutil.copytree(checkpoint, tmp_path / n)
        for n in ("truncated", "flipped", "lost", "unfinished", "undescribed", "crafted")
    )
    cut(undescribed / ".metadata", -100)
    (crafted / ".metadata").write_bytes(b"cos\nsystem\n(S'touch %b'\ntR." % bytes(tmp_path / "it ran"))
    cut(truncated / "__0_0.distcp", -5000)
    content = bytearray((flipped / "__0_0.distcp").read_bytes())
    weight = tensors(source)["model.layers.2.self_attn.o_proj.weight"]
    content[content.index(weight.numpy().tobytes()) + 1000] ^= 1
    (flipped / "__0_0.distcp").write_bytes(content)
    (lost / "__0_0.distcp").unlink()
    (unfinished / "metadata.json").unlink()
    deeper, shallower = (with_config(source, tmp_path / f"{n} layers", num_hidden_layers=n) for n in (5, 3))
    out = tmp_path / "out"
    fails(
        tmp_path,
        checkpoint,
        ([TO_HF, truncated, out], 1, [str(truncated / "__0_0.distcp"), "is cut off"]),
        ([TO_HF, flipped, out], 1, [str(flipped / "__0_0.distcp"), "damaged", "checksum"]),
        ([TO_HF, lost, out], 1, [str(lost / "__0_0.distcp"), "missing"]),
        ([TO_HF, unfinished, out], 1, ["no finished Megatron-Core checkpoint"]),
        ([TO_HF, undescribed, out], 1, [str(undescribed / ".metadata"), "is cut off or damaged"]),
        ([TO_HF, crafted, out], 1, [str(crafted / ".metadata"), "it asks for os.system"]),
        (
            [TO_HF, checkpoint, out, "--hf", families["mixtral"]],
            1,
            ["holds another model", "linear_qkv.weight is not in it"],
        ),
        ([TO_HF, checkpoint, out, "--hf", deeper], 1, ["decoder.layers.4.self_attention.linear_proj.weight is not"]),
        ([TO_HF, checkpoint, out, "--hf", shallower], 1, ["decoder.layers.3.mlp.router.weight is in it and not in"]),
        ([TO_HF, checkpoint, out, "--hf", tmp_path], 1, ["has no config.json", "--hf"]),
        ([TO_HF, checkpoint, checkpoint / "hf" / "out"], 1, ["lie in one another"]),
    )
    assert not (tmp_path / "it ran").exists()


def test_a_conversion_that_fails_half_way_leaves_nothing(source, checkpoint, tmp_path):
    out = tmp_path / "out"
    for before, code, words in (
        (disk_is_full, 1, ["GB free", "are needed"]),
        (files_stay_small, 1, ["File too large"]),
        (a_value_is_lost, 1, ["model.layers.2.self_attn.o_proj.weight was not written as it was read"]),
        (two_experts_change_places, 1, ["model.layers.2.mlp.experts.0.", "was not written as it was read"]),
        (a_bit_flips_in_the_checkpoint, 1, ["__0_0.distcp is damaged at byte", "the checksum of data/0 is wrong"]),
        (interrupted_in_the_middle, 130, ["interrupted"]),
    ):
        fails(tmp_path, source, (Call([TO_MEGATRON, source, out], before), code, words))
    for before, code, words in (
        (disk_is_full, 1, ["GB free", "are needed"]),
        (files_stay_small, 1, ["File too large"]),
        (two_tensors_change_places, 1, ["model.layers.2.mlp.experts.0.down_proj.weight was not written as it"]),
        (a_bit_flips_in_the_weights, 1, ["model.layers.2.self_attn.o_proj.weight was not written as it was read"]),
    ):
        fails(tmp_path, checkpoint, (Call([TO_HF, checkpoint, out], before), code, words))


def test_an_output_is_replaced_only_by_a_whole_one(source, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("kept")
    fails(
        tmp_path,
        source,
        ([TO_MEGATRON, source, out], 1, ["already there"]),
        (Call([TO_MEGATRON, source, out, "--overwrite"], a_value_is_lost), 1, ["was not written"]),
    )
    assert (out / "precious").read_text() == "kept"
    (answer,) = convert([TO_MEGATRON, source, out, "--overwrite"])
    assert answer.code == 0
    assert not (out / "precious").exists()
    assert {p.name for p in tmp_path.iterdir()} == {"out"}


def test_without_comparison_it_says_so(source, tmp_path):
    (answer,) = convert(Call([TO_MEGATRON, source, tmp_path / "out", "--no-verify"], a_value_is_lost))
    assert answer.code == 0
    assert "not compared with the source" in answer.text


def test_draft_layers_are_left_out_with_notice(source, tmp_path):
    drafts = {"model.layers.4.eh_proj.weight": torch.zeros(3), "model.layers.4.norm.weight": torch.zeros(3)}
    folder = with_tensors(source, tmp_path / "drafts", lambda t: t.update(drafts))
    answers = convert([TO_MEGATRON, folder, tmp_path / "it"], [TO_HF, tmp_path / "it", tmp_path / "back"])
    assert [a.code for a in answers] == [0, 0], answers
    assert f"2 multi-token-prediction tensors of {folder} left out: {', '.join(drafts)}" in answers[0].text
    assert same(tensors(tmp_path / "back"), tensors(source))
    assert json.loads((tmp_path / "back" / "config.json").read_text())["num_nextn_predict_layers"] == 0
