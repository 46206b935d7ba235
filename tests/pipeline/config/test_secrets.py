"""What may be a secret stands in one file that only its owner reads, and nowhere else in a run directory."""

import json
import stat
import sys

import pytest

from pipeline.checkpoints.store import progress_of
from pipeline.config import Config, ConfigError, load_config
from pipeline.config.file import merge
from pipeline.config.secrets import hidden, hide_in_command, hide_in_text, shown
from pipeline.observe.facts import write_facts
from pipeline.observe.report.page import write_report
from pipeline.observe.run_dir import RunDirectory

QUICKSTART = "configs/quickstart.yaml"
SECRET = "s3cr3t"
OVERRIDES = [
    f"alerts.webhook=https://hooks.example.com/services/{SECRET}",
    f"alerts.command=[curl, -H, 'Authorization: Bearer {SECRET}']",
    f"observe.mlflow.tracking_uri=http://me:{SECRET}@mlflow:5000/?token={SECRET}",
    f"server.extra_args=[--ssl-keyfile-password, {SECRET}, --ssl-keyfile-password={SECRET}, --max-total-tokens, '99']",
    "trainer.extra={moe_token_dispatcher_type: alltoall}",
]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """The directory of a run with every kind of secret, as the run makes it."""
    monkeypatch.setattr(
        sys, "argv", ["sameroute", "train", QUICKSTART, *OVERRIDES, f"alerts={{webhook: https://{SECRET}}}"]
    )
    monkeypatch.setenv("NCCL_NET_PLUGIN", f"http://me:{SECRET}@proxy/")
    config = load_config(QUICKSTART, [*OVERRIDES, f"run.directory={tmp_path / 'run'}"])
    with RunDirectory.create(config) as directory:
        write_facts(directory.path)
        progress = progress_of(config, step=1, supervised=0, version=1, cursor={})
        (directory.path / "progress.json").write_text(json.dumps(progress.config))
    write_report(directory.path)
    return config, directory.path


def test_only_a_file_for_its_owner_holds_the_secrets(run):
    _, path = run
    having = [file.name for file in path.rglob("*") if file.is_file() and SECRET.encode() in file.read_bytes()]
    assert having == ["secrets.yaml"]
    assert stat.S_IMODE((path / "secrets.yaml").stat().st_mode) == 0o600


def test_that_file_is_the_whole_configuration(run):
    config, path = run
    assert load_config(path / "secrets.yaml") == config


def test_the_others_file_is_refused_in_its_place(run):
    config, path = run
    with pytest.raises(ConfigError, match=r"is hidden in this file.*take the secrets\.yaml beside it"):
        load_config(path / "config.yaml")
    assert load_config(path / "config.yaml", OVERRIDES) == config


def test_what_is_shown_is_still_a_valid_configuration_with_all_that_is_no_secret(run):
    config, _ = run
    tree = config.model_dump(mode="json")
    seen = Config.model_validate(shown(tree))
    assert seen.alerts.webhook == "https://***"
    assert seen.alerts.command == ("curl", "***", "***")
    assert seen.observe.mlflow is not None
    assert seen.observe.mlflow.tracking_uri == "http://***@mlflow:5000/?***"
    assert seen.server.extra_args == [
        "--ssl-keyfile-password",
        "***",
        "--ssl-keyfile-password=***",
        "--max-total-tokens",
        "99",
    ]
    assert seen.trainer.extra == {"moe_token_dispatcher_type": "alltoall"}
    extra = {"storage_password": SECRET, "moe_token_dispatcher_type": "alltoall"}  # of another Megatron-Core
    tree["trainer"]["extra"] = extra
    assert shown(tree)["trainer"]["extra"] == extra | {"storage_password": "***"}
    assert merge(shown(tree), hidden(tree)) == tree


def test_a_run_without_secrets_has_no_file_of_them_and_loses_that_of_an_earlier_start(run, tmp_path):
    config, path = run
    plain = load_config(QUICKSTART, [f"run.directory={path}"])
    assert shown(plain.model_dump(mode="json")) == plain.model_dump(mode="json")
    assert hidden(plain.model_dump(mode="json")) == {}
    (path / "progress.json").unlink()
    RunDirectory.create(plain, resume_after=1).close()
    assert not (path / "secrets.yaml").exists()
    (path / "secrets.yaml").write_text("readable by all")
    RunDirectory.create(config, resume_after=1).close()
    assert stat.S_IMODE((path / "secrets.yaml").stat().st_mode) == 0o600


def test_a_command_line_keeps_what_is_no_secret():
    words = ["train", "x.yaml", "train.lr=1e-3", "alerts.timeout_s=3", f"alerts={{webhook: 'https://{SECRET}'}}", "a={"]
    assert hide_in_command(words) == [*words[:4], "alerts=***", "a={"]
    assert hide_in_command([f"--uri=https://me:{SECRET}@host/x"]) == ["--uri=***"]


def test_an_address_in_a_message_loses_its_password_and_its_query():
    message = f"cannot reach https://me:{SECRET}@host:80/a?sig={SECRET}&b=1 at all, see https://docs.example.com/a"
    assert hide_in_text(message) == "cannot reach https://***@host:80/a?*** at all, see https://docs.example.com/a"
