"""Every configuration under configs/ loads, fits the machines that it names, and is one that Megatron-Core builds."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from pipeline.config import ConfigError, load_config, load_config_and_model
from pipeline.config.file import read_tree
from pipeline.plan.plan import make_plan
from tests.support.ranks import run_alone

EVERY = sorted(Path("configs").rglob("*.yaml"))
PARTS = [path for path in EVERY if path.parent.name == "parts" or path.name == "base.yaml"]
PRESETS = [path for path in EVERY if path not in PARTS]
MODELS = sorted(path.parent for path in EVERY if path.name == "base.yaml")

every_preset = pytest.mark.parametrize("path", PRESETS, ids=str)


@every_preset
def test_it_loads_and_fits_its_machines_with_room_for_many_sequences(path):
    config, model = load_config_and_model(path)
    plan = make_plan(config, model, config.cluster.gpu or "h100")
    assert plan.reasons == ()
    if config.device == "cuda":
        assert config.cluster.gpu is not None
        assert plan.servers * config.server.tensor_parallel == config.rollout_gpus  # none is left over
        assert plan.server.sequences >= 32
        assert plan.bubble < 0.25


@every_preset
def test_it_is_short_and_says_why(path):
    text = path.read_text()
    assert text.startswith("#")
    assert len(text.splitlines()) < 50


def test_every_model_has_gspo_and_minirl_under_r3_and_an_fp8_option():
    assert len(MODELS) == 13
    for folder in MODELS:
        gspo, minirl, fp8 = (load_config_and_model(folder / f"{n}.yaml")[0] for n in ("gspo", "minirl", "gspo-fp8"))
        assert (gspo.objective.preset, minirl.objective.preset) == ("gspo", "minirl")
        assert gspo.replay == minirl.replay == "r3"
        assert fp8 != gspo
    assert {p.name for p in Path("configs/qwen3-30b-a3b").glob("*-node*.yaml")} == {
        "1-node.yaml", "1-node-lora.yaml", "2-nodes.yaml", "4-nodes.yaml",
    }  # fmt: skip


def test_a_cache_of_latents_is_not_rounded():
    with pytest.raises(ConfigError, match=r"holds latents, not keys; set precision\.kv_cache=same"):
        load_config_and_model(Path("configs/moonlight-16b-a3b/gspo-fp8.yaml"), ["precision.kv_cache=fp8_e4m3"])


def test_no_two_presets_write_into_one_run_directory():
    directories = [read_tree(path)[0]["run"]["directory"] for path in PRESETS]
    assert len(set(directories)) == len(directories)


def test_every_part_is_a_base_of_some_preset():
    used = {file.resolve() for path in PRESETS for file in read_tree(path)[1]}
    assert [str(part) for part in PARTS if part.resolve() not in used] == []


def test_a_file_of_ones_own_inherits_from_a_preset_and_plans_without_the_model(tmp_path):
    own = tmp_path / "own.yaml"
    own.write_text(
        yaml.safe_dump({"base": str(Path("configs/qwen3-30b-a3b/gspo.yaml").resolve()), "train": {"lr": 3e-6}})
    )
    config, model = load_config_and_model(own)
    assert config.train.lr == 3e-6
    assert model.num_layers == 48
    with pytest.raises(ValueError, match="no Hugging Face model directory"):
        load_config(own)


def build_configs(paths: list[str]) -> list[str]:
    """Runs in a process of its own: Megatron-Core's TransformerConfig of each, with its own checks."""
    from megatron_ext.config import replay_conflict
    from megatron_ext.model.build import transformer_config

    done = []
    for path in paths:
        config, model = load_config_and_model(path)
        built = transformer_config(
            model, config.parallel, config.trainer, config.precision, replay=config.replay != "none"
        )
        assert config.replay == "none" or replay_conflict(vars(built)) is None
        done.append(path)
    return done


def test_megatron_core_accepts_every_one_with_its_layout_and_its_replay():
    (done,) = run_alone(build_configs, [str(path) for path in PRESETS])
    assert len(done) == len(PRESETS) > 20
