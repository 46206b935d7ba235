"""A crafted checkpoint directory runs no code, whichever of its files is crafted; a damaged one is a sentence."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest

from megatron_ext.checkpoint.names import CHECKSUMS, CheckpointError
from megatron_ext.config import OptimizerConfig, ParallelConfig, TrainerConfig
from tests.support.ranks import run_alone, run_ranks


class Evil:
    """Unpickled, it makes a directory."""

    def __init__(self, marker: Path):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


def described_again(folder: Path, change) -> None:
    """Another `.metadata`, and the checksums that a forger would write for it."""
    from megatron_ext.checkpoint.training import checksum

    file = folder / ".metadata"
    metadata = pickle.loads(file.read_bytes())
    file.write_bytes(pickle.dumps(change(metadata)))
    sums = json.loads((folder / CHECKSUMS).read_text())
    sums[".metadata"] = checksum(file)
    (folder / CHECKSUMS).write_text(json.dumps(sums))


def crafted_description(folder: Path, marker: Path) -> None:
    def change(metadata):
        metadata.planner_data = Evil(marker)
        return metadata

    described_again(folder, change)


def crafted_whole(folder: Path, marker: Path) -> None:
    described_again(folder, lambda metadata: Evil(marker))


def crafted_object(folder: Path, marker: Path, key: str) -> None:
    """An object of the ranks' files: `.metadata` points to another file for it."""
    import torch

    content = io.BytesIO()
    torch.save(Evil(marker), content)
    (folder / "__9_0.distcp").write_bytes(content.getvalue())

    def change(metadata):
        (index,) = [i for i in metadata.storage_data if i.fqn.startswith(key)]
        info = metadata.storage_data[index]
        info.relative_path, info.offset, info.length = "__9_0.distcp", 0, len(content.getvalue())
        return metadata

    described_again(folder, change)


def crafted_counters(folder: Path, marker: Path) -> None:
    crafted_object(folder, marker, "common_state")


def crafted_generators(folder: Path, marker: Path) -> None:
    crafted_object(folder, marker, "rng")


def crafted_tensor(folder: Path, marker: Path) -> None:
    crafted_object(folder, marker, "decoder.final_layernorm")


def crafted_common(folder: Path, marker: Path) -> None:
    """Older checkpoints of Megatron-Core have this file, and it comes first."""
    import torch

    torch.save(Evil(marker), folder / "common.pt")


CRAFTED = {
    "description": crafted_description,
    "whole description": crafted_whole,
    "counters": crafted_counters,
    "generators": crafted_generators,
    "tensor": crafted_tensor,
    "common.pt": crafted_common,
}


def trainer_of(model: str, config: ParallelConfig):
    from megatron_ext.trainer import Trainer

    return Trainer(model, config, TrainerConfig(), OptimizerConfig(), replay=True)


def tried(config: ParallelConfig, model: str, folder: str) -> dict[str, dict[str, tuple[str, bool]]]:
    """What is crafted -> who reads it -> (what it says, whether code ran). An environment that lifts torch's own
    restriction changes nothing."""
    from megatron_ext.checkpoint.shards import load_model
    from megatron_ext.convert.tensors import CheckpointTensors
    from megatron_ext.hf.description import read_description

    os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"
    trainer, base = trainer_of(model, config), Path(folder)
    whole = base / "whole"
    whole.mkdir()
    save = trainer.begin_save(whole)
    assert save.written(wait=True)
    save.finish()
    readers = {
        "resume": trainer.resume,
        "load": lambda path: load_model(path, trainer.policy.chunks),
        "convert": lambda path: list(CheckpointTensors(path, read_description(model)).stream()),
    }
    for read in readers.values():
        read(whole)
    out: dict[str, dict[str, tuple[str, bool]]] = {}
    for name, craft in CRAFTED.items():
        out[name] = {}
        path, marker = base / name, base / f"{name} ran"
        shutil.copytree(whole, path)
        craft(path, marker)
        for reader, read in readers.items():
            try:
                read(path)
                said = ""
            except CheckpointError as error:
                said = str(error)
            out[name][reader] = said, marker.exists()
            if marker.exists():
                marker.rmdir()
    assert os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] == "1"
    return out


def test_no_crafted_file_runs_code_whoever_reads_it(tiny_model_dir, tmp_path):
    (found,) = run_ranks(tried, ParallelConfig(), str(tiny_model_dir), str(tmp_path))
    assert [(name, reader) for name, of in found.items() for reader, (_, ran) in of.items() if ran] == []
    refused = {name: {reader for reader, (said, _) in of.items() if said} for name, of in found.items()}
    everyone = {"resume", "load", "convert"}
    assert refused == {
        "description": everyone,
        "whole description": everyone,
        "counters": {"resume", "load"},  # a conversion reads no counters
        "generators": {"resume"},
        "tensor": everyone,
        "common.pt": {"resume", "load"},
    }
    for name, of in found.items():
        for said, _ in of.values():
            assert not said or "\n" not in said, (name, said)
            assert not said or "mkdir" in said, (name, said)


def damages(folder: str) -> list[str]:
    """What reading says of a description that is cut off at every so many bytes, or names a file elsewhere."""
    import torch
    import torch.distributed.checkpoint as dcp

    from megatron_ext.checkpoint.plain import read_metadata

    path, said = Path(folder), []
    state = {"a": torch.zeros(3, 4), "b": torch.ones(2, dtype=torch.bfloat16)}
    dcp.save(state, checkpoint_id=path, no_dist=True)  # pyright: ignore[reportPrivateImportUsage]
    file = path / ".metadata"
    content = file.read_bytes()
    assert read_metadata(path).state_dict_metadata.keys() == {"a", "b"}

    def asked() -> None:
        try:
            read_metadata(path)
            said.append("")
        except CheckpointError as error:
            said.append(str(error))

    for end in range(0, len(content), 7):
        file.write_bytes(content[:end])
        asked()
    metadata = pickle.loads(content)
    for info in metadata.storage_data.values():
        info.relative_path = "../" + info.relative_path
    file.write_bytes(pickle.dumps(metadata))
    asked()
    file.write_bytes(pickle.dumps({"a": 1}))
    asked()
    file.unlink()
    asked()
    return said


def test_a_description_that_is_cut_off_elsewhere_or_absent_is_one_sentence(tmp_path):
    ((*cut, outside, another, absent),) = run_alone(damages, str(tmp_path))
    assert len(cut) > 20
    for said in cut:
        assert said.startswith(f"{tmp_path / '.metadata'} is cut off or damaged: "), said
        assert "\n" not in said
    assert "a file outside its directory" in outside
    assert "describes no checkpoint" in another
    assert "cannot be read" in absent


@pytest.mark.parametrize("call", [(os.system, "true"), (eval, "1"), (getattr, (1, "real"))], ids=str)
def test_no_function_is_in_reach_of_a_description(tmp_path, call):
    from megatron_ext.checkpoint.plain import read_metadata

    class Calls:
        def __reduce__(self):
            return call[0], call[1] if isinstance(call[1], tuple) else (call[1],)

    (tmp_path / ".metadata").write_bytes(pickle.dumps(Calls()))
    with pytest.raises(CheckpointError, match="which no description of a checkpoint needs"):
        read_metadata(tmp_path)
