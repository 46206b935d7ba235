"""A configuration that cannot run is refused before anything starts, with a sentence that says what to change."""

import json
from pathlib import Path

import pytest
import yaml

from pipeline.config import ConfigError, load_config
from pipeline.config.load_config import check_precision
from tests.support.tiny_families import tiny_config

QUICKSTART = "configs/quickstart.yaml"


def test_the_quickstart_is_valid_and_any_field_can_be_overridden():
    arguments = "server.extra_args=[--watchdog-timeout, '9']"
    config = load_config(QUICKSTART, ["train.lr=2e-6", "data.task.max_digits=5", arguments])
    assert config.train.lr == 2e-6
    assert config.data.task is not None
    assert config.data.task.max_digits == 5
    assert config.server.extra_args == ["--watchdog-timeout", "9"]


@pytest.mark.parametrize(("override", "dumped"), [("false", []), ("true", [1, 2, 3]), ("[2]", [2]), ("[3, 1]", [1, 3])])
def test_every_step_is_dumped_or_none_or_those_that_are_listed(override, dumped):
    config = load_config(QUICKSTART, [f"debug.dump_rollouts={override}"])
    assert [step for step in (1, 2, 3) if config.debug.dumps(step)] == dumped


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.learning_rate=1e-6", r"train\.learning_rate: there is no such key; there are .*\blr\b"),
        ("trian.lr=1e-6", r"trian: there is no such key; there are .*\btrain\b"),
        ("train.lr=fast", r"train\.lr: .*number"),
        ("train.lr", r"section\.field=value"),
        ("train.lr.x=1", "lr is a value, not a section"),
        ("rollout.ahead=1", r"ahead=1 steps of prompts would grow older.*set rollout\.max_staleness=1 or more"),
        ("rollout.order=random", r"rollout\.order: .*'finish' or 'admission'"),
        ("rollout.interrupt=wait", r"rollout\.interrupt: .*'abort', 'in_place', 'retract' or 'drain'"),
        (
            "run.rollback_after=3",
            r"goes back to a checkpoint as a restart; set checkpoint\.every_steps",
        ),
        ("debug.profile={steps: [81]}", r"debug\.profile\.steps names 81, and this run has 1 to 80"),
        ("debug.profile={steps: [1], ranks: [1]}", r"debug\.profile\.ranks names 1, and this run has 0 to 0"),
        ("debug.profile={steps: [0]}", r"debug\.profile\.steps\.0: .*greater than 0"),
        ("train.skip_grad_norm_times=1", r"train\.skip_grad_norm_times: .*greater than 1"),
        ("train.mini_batches=5", "32 prompts do not divide into 5 mini-batches"),
        ("trainer.router_fusion=true", "set trainer.router_fusion=false, or set replay=none"),
        ("trainer.extra={moe_router_fusion: true}", "set trainer.router_fusion=false"),
        ("trainer.extra={moe_router_load_balancing_type: aux_loss}", "a top-k of its own, .* or set replay=none"),
        ("trainer.extra={moe_router_load_balancing_type: [seq_aux_loss]}", "seq_aux_loss counts the experts"),
        ("trainer.extra={moe_router_load_balancing_type: sinkhorn}", "never asks for routes"),
        ("trainer.extra={moe_expert_capacity_factor: 1.0}", "drops tokens"),
        ("rollout.top_p=0.9", r"rollout\.top_p: there is no such key; set precision\.top_p, which sets both engines"),
        ("trainer.dtype=bfloat16", r"set precision\.weights, which"),
        ("server.dtype=bfloat16", r"set precision\.weights, which"),
        ("trainer.head=bf16", r"set precision\.head, which"),
        ("trainer.extra={params_dtype: bfloat16}", r"apart from the server; set precision\.weights"),
        ("trainer.extra={fp8: e4m3}", r"apart from the server; set precision\.weights"),
        ("trainer.extra={moe_router_dtype: fp64}", r"apart from the server; set precision\.router"),
        ("server.extra_args=[--enable-fp32-lm-head]", r"apart from the trainer; set precision\.head"),
        ("server.extra_args=[--kv-cache-dtype=fp8_e4m3]", r"apart from the trainer; set precision\.kv_cache"),
        ("server.extra_args=[--quant, fp8]", r"--quant would set .*; set precision\.rollout_weights"),
        ("server.extra_args=[--rl-on-policy-target, fsdp]", r"set precision\.head"),
        ("precision.head=bf16", "no bf16 head on float32 weights.*set head=fp32, or weights=bfloat16"),
        ("precision.head=fp32_accumulate", "no fp32_accumulate head on float32 weights"),
        ("precision.router=bf16", "set router=fp32, or weights=bfloat16"),
        ("precision.temperature=0", r"precision\.temperature: .*greater than 0"),
        ("precision.top_p=0.9", "only where top_k is 2 to 4096.*set top_k to at most that"),
        ("precision.min_p=0.1", "or top_p=1, top_k=-1 and min_p=0"),
        ("precision.top_k=1", "only where top_k is 2 to 4096"),
        ("rollout.samples_per_prompt=1", "samples_per_prompt to at least 2"),
        ("server.context_length=16", r"do not fit server\.context_length=16: .* set that to 26 or more"),
        ("server.context_length=25", "set that to 26 or more"),
        ("server.max_total_tokens=16", r"do not fit server\.max_total_tokens=16: .* set that to 26 or more"),
        ("model.tiny.max_positions=25", r"need a context of 26 tokens .*, and the model's is 25 .*; lower one"),
        ("server.context_length=5000", r"5000 is more than the model's 4096 \(max_position_embeddings\)"),
        ("parallel.tensor=2", "1 trainer ranks do not divide into tensor 2"),
        ("parallel={ranks: 2, tensor: 2}", "set parallel.sequence=true"),
        ("parallel={ranks: 3, tensor: 2, sequence: true}", "set parallel.ranks to a multiple of 2"),
        ("parallel={ranks: 3, pipeline: 3}", "4 layers do not divide among"),
        ("parallel={ranks: 2, pipeline: 2, first_stage_layers: 4}", r"stages of \[4, 0\]|4 layers do not divide"),
        ("trainer.offload_optimizer=true", "set precision.weights=bfloat16"),
        ("parallel={ranks: 3, expert: 3}", "8 experts do not divide among parallel.expert=3"),
        ("parallel={ranks: 4, tensor: 4, sequence: true}", "2 key-value heads do not divide among parallel.tensor=4"),
        ("parallel={ranks: 2, expert: 2, tensor: 2, sequence: true}", r"parallel\.expert_tensor=1"),
        ("parallel={ranks: 2, virtual_pipeline: 2}", "virtual_pipeline needs pipeline > 1"),
        ("parallel.sequence=true", "set parallel.sequence=false"),
        ("model.path=/nowhere", "exactly one of model.path"),
        ("debug.dump_rollouts=[0]", r"debug\.dump_rollouts\..*greater than 0"),
        ("objective.preset=gpso", "gspo"),
        ("objective=grpo", r"write objective='\{preset: grpo\}', or objective: \{preset: grpo\} in a file"),
        ("data=questions.jsonl", r"write data='\{path: questions\.jsonl\}'"),
        ("model=DIRECTORY", r"write model='\{path: DIRECTORY\}'"),
        ("train=3", r"train: this is a section of fields, not 3; write train\.FIELD=VALUE, with one of beta1, .*lr"),
        ("model.tiny=true", r"model\.tiny: this is a section of fields, not True; .*with one of experts, "),
        ("objective.correction={kind: token_tis, high: 2}", "sequence"),
        ("train.lr=inf", r"train\.lr: .*finite"),
        ("train.steps=true", "train: steps=true is no number"),
        ("supervised.decay_steps=false", "supervised: decay_steps=false is no number"),
        ("train.lr=true", "train: lr=true is no number"),
        ("train.lr=.inf", r"train\.lr: .*finite"),
        ("train.clip_grad=1e999", "1e999 is more than a float64 holds"),
        ("run.seed=2147483648", r"run\.seed: .*less than or equal to 2147483647"),
        ("objective={preset: grpo, kl: {beta: .inf}}", r"objective\.kl\.beta: .*finite"),
        ('run.directory="a\\0b"', r"run\.directory: a path has no NUL in it"),
        (f"run.directory={'x' * 256}", r"run\.directory: a name in a path has at most 255 bytes"),
        (f"run.directory={'ü' * 128}", r"at most 255 bytes"),
        (f"run.directory={'/x' * 2048}", r"and a path 4095"),
        ("run.directory=~nobody_of_that_name/run", "no such user's home directory"),
    ],
)
def test_a_mistake_is_named(override, message):
    with pytest.raises(ConfigError, match=message):
        load_config(QUICKSTART, [override])


def test_a_section_that_a_file_gives_as_a_text_is_answered_with_what_to_write(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("objective: grpo\nmodel: {tiny: {}}\ndata: {task: {}}\n")
    with pytest.raises(ConfigError, match=r"^objective: .* write .*objective: \{preset: grpo\} in a file$"):
        load_config(file)
    file.write_text("objective: {preset: grpo}\nmodel: {tiny: {}}\ndata: {task: {}}\n")
    assert load_config(file).objective.preset == "grpo"


@pytest.mark.parametrize(("staleness", "ahead"), [(0, 0), (1, 1), (2, 1), (5, 4)])
def test_how_far_sampling_runs_ahead_follows_from_the_staleness(staleness, ahead):
    config = load_config(QUICKSTART, [f"rollout.max_staleness={staleness}", "objective.correction=none"])
    assert config.rollout.steps_ahead == ahead


@pytest.mark.parametrize(
    "named",
    [
        "objective={preset: gspo, correction: none}",
        "objective={preset: gspo, correction: []}",
        "objective={preset: gspo, correction: {kind: geometric_tis}}",
        "objective={preset: grpo, correction: {kind: token_tis}}",
        "objective={preset: grpo, ratio_to: rollout}",
    ],
)
def test_stale_rollouts_are_trained_on_with_a_correction_or_without_one_by_name(named):
    load_config(QUICKSTART, ["rollout.max_staleness=1", named])


def test_stale_rollouts_without_a_correction_are_refused():
    for preset in ("gspo", "grpo"):
        with pytest.raises(ConfigError, match=r"set objective\.correction='\{kind: token_tis\}'.*correction=none"):
            load_config(QUICKSTART, ["rollout.max_staleness=1", f"objective={{preset: {preset}}}"])


def test_min_p_with_seeds_is_refused():
    with pytest.raises(ConfigError, match=r"set precision\.min_p=0, or server\.deterministic=false"):
        load_config(QUICKSTART, ["precision={min_p: 0.1, top_k: 20}", "server.deterministic=true"])


def test_one_rollout_a_prompt_is_enough_where_a_critic_or_the_batch_is_the_baseline():
    for preset in ("ppo", "reinforce_plus_plus"):
        config = load_config(QUICKSTART, [f"objective={{preset: {preset}}}", "rollout.samples_per_prompt=1"])
        assert config.rollout.samples_per_prompt == 1


def test_a_model_directory_that_does_not_exist_or_is_not_supported_is_named(tmp_path):
    overrides = ["model.tiny=null"]
    with pytest.raises(ConfigError, match=r"model\.path: .* has no config\.json"):
        load_config(QUICKSTART, [*overrides, f"model.path={tmp_path / 'none'}"])
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    with pytest.raises(ConfigError, match="'mamba' is not supported; supported: qwen3_moe, qwen3"):
        load_config(QUICKSTART, [*overrides, f"model.path={tmp_path}"])


def test_what_one_engine_would_compute_otherwise_is_refused(tmp_path):
    def load(family, *overrides, **fields):
        (tmp_path / "config.json").write_text(json.dumps(tiny_config(family) | fields))
        return load_config(QUICKSTART, ["model.tiny=null", f"model.path={tmp_path}", *overrides])

    bfloat16 = "precision.weights=bfloat16"
    assert load("glm4_moe", bfloat16).precision.router == "fp32"
    with pytest.raises(ConfigError, match=r"float32 in SGLang .*; set precision\.router=fp32"):
        load("glm4_moe", bfloat16, "precision.router=bf16")
    check_precision(load("gpt_oss"), "cpu")
    check_precision(load("gpt_oss", bfloat16), "cuda")
    with pytest.raises(ConfigError, match=r"on a CPU gpt-oss .*; set precision\.weights=float32"):
        check_precision(load("gpt_oss", bfloat16), "cpu")
    check_precision(load("glm4_moe", bfloat16), "cpu")
    with pytest.raises(ConfigError, match=r"SGLang would hold mxfp4 weights.*sameroute convert"):
        load("gpt_oss", bfloat16, quantization_config={"quant_method": "mxfp4"})


def test_a_file_that_is_missing_or_not_yaml_is_named(tmp_path):
    with pytest.raises(ConfigError, match="there is no config file"):
        load_config(tmp_path / "none.yaml")
    for text, message in (("a: [", "is not YAML"), ("- 1", "must hold a mapping")):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(ConfigError, match=message):
            load_config(tmp_path / "bad.yaml")


def test_the_resolved_configuration_reads_back_as_itself(tmp_path):
    config = load_config(QUICKSTART)
    file = tmp_path / "resolved.yaml"
    file.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    assert load_config(file) == config


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("pathh: x", r"data\.sources\.0\.jsonl\.pathh: there is no such key; there are answer_pattern, .*path"),
        ("path: x, columns: {promt: q}", r"columns\.promt: there is no such key; there are answer, messages"),
        ("path: x, columns: q", r"columns: this is a section of fields, not 'q'; write .*, with one of answer"),
    ],
)
def test_a_mistake_in_a_source_names_what_that_kind_has(source, sentence):
    with pytest.raises(ConfigError, match=sentence):
        load_config(QUICKSTART, ["data.task=null", f"data.sources=[{{kind: jsonl, {source}}}]"])


def test_a_path_may_begin_with_the_home_directory(monkeypatch):
    monkeypatch.setenv("HOME", "/somebody")
    assert load_config(QUICKSTART, ["run.directory=~/runs/a"]).run.directory == Path("/somebody/runs/a")
