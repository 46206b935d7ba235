"""A conversion that fails says why and leaves nothing behind, whatever it was that failed."""

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path

from safetensors.torch import load_file

from tests.support.convert_cli import TO_HF, TO_MEGATRON, Call, convert, with_tensors


def digest(folder):
    return {p.relative_to(folder): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()}


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
        ([TO_MEGATRON, with_config(source, tmp_path / "mamba", model_type="mamba"), out], 2, ["'mamba'"]),
        ([TO_MEGATRON, source, out, "--tp", 3], 2, ["4 attention heads do not divide"]),
        ([TO_MEGATRON, source, out, "--tp", 2, "--vpp", 2], 2, ["virtual_pipeline needs pipeline"]),
        ([TO_MEGATRON, source, tmp_path / "whole"], 1, ["already there", "--overwrite"]),
        ([TO_MEGATRON, source, source / "inside"], 1, ["lie in one another"]),
        ([TO_MEGATRON, source, source, "--overwrite"], 1, ["lie in one another"]),
    )
    assert not (tmp_path / "it ran").exists()


def test_a_checkpoint_that_is_damaged_or_another_models_is_refused_in_words(source, checkpoint, families, tmp_path):
    truncated, flipped, lost, unfinished, undescribed, crafted = (
        shutil.copytree(checkpoint, tmp_path / n)
        for n in ("truncated", "flipped", "lost", "unfinished", "undescribed", "crafted")
    )
    cut(undescribed / ".metadata", -100)
    (crafted / ".metadata").write_bytes(b"cos\nsystem\n(S'touch %b'\ntR." % bytes(tmp_path / "it ran"))
    cut(truncated / "__0_0.distcp", -5000)
    content = bytearray((flipped / "__0_0.distcp").read_bytes())
    weight = load_file(source / "model.safetensors")["model.layers.2.self_attn.o_proj.weight"]
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


def test_a_conversion_that_fails_half_way_leaves_nothing(source, checkpoint, tmp_path):
    out = tmp_path / "out"
    for before, code, words in (
        (disk_is_full, 1, [" free, ", "are needed"]),
        (files_stay_small, 1, ["File too large"]),
        (a_value_is_lost, 1, ["model.layers.2.self_attn.o_proj.weight was not written as it was read"]),
        (two_experts_change_places, 1, ["model.layers.2.mlp.experts.0.", "was not written as it was read"]),
        (a_bit_flips_in_the_checkpoint, 1, ["__0_0.distcp is damaged at byte", "the checksum of data/0 is wrong"]),
        (interrupted_in_the_middle, 130, ["interrupted"]),
    ):
        fails(tmp_path, source, (Call([TO_MEGATRON, source, out], before), code, words))
    for before, code, words in (
        (disk_is_full, 1, [" free, ", "are needed"]),
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
