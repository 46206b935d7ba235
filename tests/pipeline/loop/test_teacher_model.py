"""A teacher that cannot teach a policy is refused in one sentence, before anything starts."""

from __future__ import annotations

import contextlib
import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from safetensors.numpy import save_file

from pipeline.config import load_config
from pipeline.config.file import ConfigError
from pipeline.config.model import TinyModelConfig
from pipeline.data.tokenizer import write_tokenizer
from pipeline.loop.teaching.teacher_model import TeacherError, check_teacher, teacher_directory

QUICKSTART = "configs/quickstart.yaml"
TAUGHT = "objective={preset: gspo_token, distillation: {reward: 0}}"
TERM = "objective={preset: gspo, distillation: {place: loss, top_k: 5}}"


def model(folder, tokenizer="characters", **changes):
    """A model directory whose weights nobody reads."""
    folder.mkdir(parents=True)
    write_tokenizer(folder, tokenizer)
    (folder / "config.json").write_text(json.dumps(TinyModelConfig(layers=2).hf_config() | changes))
    save_file({}, folder / "model.safetensors")
    return folder


@pytest.fixture
def policy(tmp_path):
    return model(tmp_path / "policy")


@contextlib.contextmanager
def serving(answer):
    """The address of something that answers every GET with this."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(answer).encode())

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def refused(policy, folder, *overrides, match):
    with pytest.raises(TeacherError, match=match) as raised:
        check_teacher(load_config(QUICKSTART, [TAUGHT, f"teacher={{path: {folder}}}", *overrides]), policy)
    assert "\n" not in str(raised.value)


def test_a_model_a_run_and_a_checkpoint_teach(tmp_path, policy):
    run = tmp_path / "run"
    model(run / "hf")
    (run / "config.yaml").write_text("")
    for path in (model(tmp_path / "other"), run):
        config = load_config(QUICKSTART, [TAUGHT, f"teacher.path={path}"])
        check_teacher(config, policy)
        with teacher_directory(config, serve=True) as found:
            assert found is not None
            assert (found / "config.json").is_file()
        with teacher_directory(config, serve=False) as found:
            assert found is None, "a dumped step has its scores"


def test_what_is_no_model_is_refused(tmp_path, policy):
    (tmp_path / "empty").mkdir()
    refused(policy, tmp_path / "nowhere", match=r"teacher\.path: .*nowhere is no model")
    refused(policy, tmp_path / "empty", match="is no model: neither a Hugging Face directory, a run nor a checkpoint")
    (tmp_path / "empty" / "config.yaml").write_text("")
    refused(policy, tmp_path / "empty", match=r"teacher\.path: .* has no trained model")
    bare = model(tmp_path / "bare")
    (bare / "model.safetensors").unlink()
    refused(policy, bare, match="has a config.json and no weights")


def test_another_tokenizer_and_a_vocabulary_without_room_are_refused(tmp_path, policy):
    refused(
        policy, model(tmp_path / "bytes", "bytes", vocab_size=320), match="another tokenizer .* 320 tokens against 64"
    )
    same = model(tmp_path / "swapped")
    text = (same / "tokenizer.json").read_text()
    vocab = json.loads(text)
    table = vocab["model"]["vocab"]
    table["a"], table["b"] = table["b"], table["a"]
    (same / "tokenizer.json").write_text(json.dumps(vocab))
    refused(policy, same, match=r"another tokenizer than the policy: 'a' is \d+ there and \d+ here")
    wide = model(tmp_path / "wide", vocab_size=96)
    check_teacher(load_config(QUICKSTART, [TAUGHT, f"teacher.path={wide}"]), policy)
    refused(policy, wide, TERM, match=r"vocabulary has 96 rows and the policy's 64.*top_k=0")
    refused(policy, policy, TERM.replace("5", "65"), match=r"top_k=65 asks for more tokens than the vocabulary of 64")
    short = model(tmp_path / "short", max_position_embeddings=20)
    refused(policy, short, match=r"reads 20 tokens \(max_position_embeddings\).* need 31")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("context_length=30", r"teacher\.server\.context_length=30 has no room .* need 31; set it to 31 or more"),
        ("max_total_tokens=16", r"teacher\.server\.max_total_tokens=16 has no room .* need 31"),
        ("context_length=5000", r"teacher\.server\.context_length=5000 is more than the teacher's 4096; lower it"),
    ],
)
def test_a_server_that_is_told_to_hold_too_little_is_refused(policy, setting, message):
    refused(policy, policy, f"teacher.server.{setting}", match=message)
    check_teacher(
        load_config(QUICKSTART, [TAUGHT, f"teacher={{path: {policy}, server: {{context_length: 31}}}}"]), policy
    )


def test_a_layout_that_a_teacher_does_not_divide_into_is_refused(policy):
    layout = "parallel={ranks: 3, pipeline: 3, first_stage_layers: 1, last_stage_layers: 1}"
    refused(policy, policy, layout, "teacher.engine=trainer", match=r"teacher\.path: 2 layers give stages")


def test_a_server_that_runs_already_is_asked_what_it_holds(tmp_path, policy):
    url = "teacher={url: 'http://127.0.0.1:9'}"
    with pytest.raises(TeacherError, match=r"teacher\.url: http://127\.0\.0\.1:9/model_info cannot be reached"):
        check_teacher(load_config(QUICKSTART, [TAUGHT, url]), policy)
    for held, problem in ((policy, None), (tmp_path / "away", "so its tokenizer cannot be checked; set teacher.path")):
        with serving({"model_path": str(held)}) as address:
            config = load_config(QUICKSTART, [TAUGHT, f"teacher={{url: '{address}'}}"])
            if problem is None:
                check_teacher(config, policy)
                continue
            with pytest.raises(TeacherError, match=problem):
                check_teacher(config, policy)
            check_teacher(load_config(QUICKSTART, [TAUGHT, f"teacher={{url: '{address}', path: {policy}}}"]), policy)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["teacher.path=/x"], "teacher scores what nobody learns from"),
        ([TAUGHT], "there is none; write the section teacher"),
        ([TAUGHT, "teacher={}"], r"give teacher\.path"),
        ([TAUGHT, "teacher={url: 'x:1'}"], "is no address"),
        ([TAUGHT, "teacher={url: 'http://'}"], r"is no address; write http://HOST:PORT"),
        ([TAUGHT, "teacher={url: 'http://x:99999'}"], "is no address"),
        ([TAUGHT, "teacher={url: 'http://x:1', engine: trainer}"], "wants none"),
        ([TAUGHT, "teacher={url: 'http://x:1'}", "precision.temperature=0.7"], "scores at temperature 1"),
        ([TAUGHT, "teacher={path: /x, server: {port: 31000, replicas: 2}}"], r"set teacher\.server\.port=null"),
        ([TAUGHT, "teacher.path=/x", "precision={top_k: 8}"], "over the whole vocabulary"),
        ([TAUGHT, "teacher.path=/x", "cluster.colocated=true"], "a teacher's server would keep its own"),
        ([TERM, "teacher={path: /x, engine: trainer}"], r"top_k=5 is asked of a server"),
        (["objective={preset: gspo, distillation: {}}", "teacher.path=/x"], "write ratio: sequence_token"),
        (["objective={preset: dr_grpo, distillation: {top_k: 4}}", "teacher.path=/x"], "write place: loss"),
        (["objective={preset: dr_grpo, distillation: {place: loss, gamma: 1}}", "teacher.path=/x"], "or gamma: 0"),
        (["objective={preset: ppo, distillation: {reward: 0}}", "teacher.path=/x"], "gae trains a critic"),
        (["objective={preset: dapo, distillation: {reward: 0}}", "teacher.path=/x"], "write dynamic_sampling: false"),
    ],
)
def test_settings_that_do_not_go_together_say_what_to_write(overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_config(QUICKSTART, overrides)


def test_a_teacher_alone_needs_no_second_sample_and_its_servers_take_gpus():
    config = load_config(QUICKSTART, [TAUGHT, "teacher={path: /x, server: {tensor_parallel: 2, replicas: 2}}",
                                      "rollout.samples_per_prompt=1"])  # fmt: skip
    assert config.teacher_gpus == 4
    assert config.rollout_gpus == 8 - 1 - 4
