"""A command with a mistake costs nothing: neither an earlier run, nor the place of the corrected command."""

from __future__ import annotations

import json
import shutil
import socket

import pytest
import yaml

from pipeline.commands.main import main
from pipeline.config.model import TinyModelConfig
from pipeline.data.tiny_model import make_tiny_model
from pipeline.observe.run_dir import RunDirectory

CHAT = {"messages": [{"role": "user", "content": "12"}], "answer": "3"}
MISTAKES = {
    "a bad line": "questions.jsonl, line 2",
    "a long prompt": "the limit is 8",
    "no chat template": "no chat template",
    "no end": "end-of-sequence",
    "no tokenizer": "tokenizer",
}
SET = "{name: held, sources: [{kind: jsonl, path: FOLDER/questions.jsonl}]}"
SETTINGS = {
    "train.stepz=1": "there is no such key",
    "train.lr={": "is not YAML",
    "rewards=no_such_module:grade": "cannot be imported",
    "data.path=FOLDER/none.jsonl": "there is no data file",
    "data.path=FOLDER": "is a directory",
    "data.path=FOLDER/runs/run/metrics.jsonl": "line 1",
    "data.path=FOLDER/runs/run/kept.jsonl": "lies in run.directory",
    "model.path=FOLDER/runs/run/hf": "lies in run.directory",
    "model.path=FOLDER/none": "no Hugging Face model directory",
    "server.context_length=70": "do not fit server.context_length=70",
    "server.port=PORT": "cannot listen on",
    "observe.prometheus_port=PORT": "cannot listen on",
    "server.extra_args=[--no-such-argument]": "SGLang has no argument",
    "trainer.extra={no_such_field: 1}": "has no field",
    "cluster.address=127.0.0.1:1": "no Ray cluster answers",
    "alerts.command=[no-such-program]": "no-such-program",
    f"evaluate=[{SET.replace('questions', 'none')}]": "there is no data file",
    f"evaluate=[{SET.replace('questions', 'broken')}]": "broken.jsonl, line 1",
    f"evaluate=[{SET}] checkpoint={{every_steps: 1, best: {{score: eval/held/pass@1, export: FOLDER/runs}}}}": (
        "would replace run.directory"
    ),
    f"evaluate=[{SET}] checkpoint={{every_steps: 1, best: {{score: eval/held/pass@1, export: /proc/best}}}}": (
        "cannot be written"
    ),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    shape = TinyModelConfig(layers=1, hidden=32, heads=2, kv_heads=1, head_dim=16, experts=2, moe_intermediate=32)
    return make_tiny_model(tmp_path_factory.mktemp("model"), shape, 0)


def command(folder, model, mistake: str, *, overwrite: bool) -> list[str]:
    """The arguments of a run that has one mistake."""
    own, data = folder / "model", folder / "questions.jsonl"
    shutil.copytree(model, own)
    lines = [json.dumps(CHAT), json.dumps(CHAT)]
    limit = 64
    if mistake == "a bad line":
        lines[1] = '{"prompt": '
    elif mistake == "a long prompt":
        limit, lines[1] = 8, json.dumps(CHAT | {"messages": [{"role": "user", "content": "1" * 40}]})
    elif mistake == "no chat template":
        (own / "chat_template.jinja").unlink(missing_ok=True)
        settings = json.loads((own / "tokenizer_config.json").read_text())
        settings.pop("chat_template", None)
        (own / "tokenizer_config.json").write_text(json.dumps(settings))
    elif mistake == "no end":
        for name in ("generation_config.json", "tokenizer_config.json"):
            settings = json.loads((own / name).read_text())
            settings.pop("eos_token_id", None)
            settings.pop("eos_token", None)
            (own / name).write_text(json.dumps(settings))
        (own / "special_tokens_map.json").unlink(missing_ok=True)
    elif mistake == "no tokenizer":
        for file in own.glob("*token*"):
            file.unlink()
    data.write_text("\n".join(lines))
    config = {
        "run": {"directory": str(folder / "runs" / "run"), "overwrite": overwrite},
        "device": "cpu",
        "model": {"path": str(own)},
        "data": {"path": str(data), "max_prompt_tokens": limit},
        "rewards": ["exact_match"],
        "server": {"context_length": 2048},
        "train": {"steps": 1},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return ["train", str(folder / "config.yaml")]


def earlier_run(folder, model):
    """In the run directory of `command`; returns it, and what it looks like."""
    path = folder / "runs" / "run"
    with RunDirectory(path, {"name": "old"}) as run:
        run.record({"step": 1})
    shutil.copytree(model, path / "hf")
    return path, looks(path)


def looks(path):
    return {f: (f.lstat().st_ino, f.lstat().st_mtime_ns) for f in path.rglob("*")}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_an_earlier_run_stays_to_the_byte(tmp_path, model, mistake, capsys):
    path, before = earlier_run(tmp_path, model)
    assert main(command(tmp_path, model, mistake, overwrite=True)) == 2
    said = capsys.readouterr().err
    assert MISTAKES[mistake] in said
    assert "Traceback" not in said
    assert looks(path) == before


@pytest.mark.parametrize("settings", SETTINGS)
def test_an_earlier_run_stays_to_the_byte_whatever_setting_is_wrong(tmp_path, model, settings, capsys):
    path, _ = earlier_run(tmp_path, model)
    (path / "kept.jsonl").write_text(json.dumps(CHAT))
    (tmp_path / "broken.jsonl").write_text("{")
    before = looks(path)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        filled = settings.replace("FOLDER", str(tmp_path)).replace("PORT", str(taken.getsockname()[1]))
        words = command(tmp_path, model, "none", overwrite=True)
        assert main([*words, *filled.replace(" checkpoint=", "\ncheckpoint=").split("\n")]) == 2
    said = capsys.readouterr().err
    assert SETTINGS[settings] in said
    assert "Traceback" not in said
    assert looks(path) == before


@pytest.mark.parametrize("mistake", MISTAKES)
def test_nothing_stands_in_the_way_of_the_corrected_command(tmp_path, model, mistake):
    assert main(command(tmp_path, model, mistake, overwrite=False)) == 2
    assert not (tmp_path / "runs").exists()
