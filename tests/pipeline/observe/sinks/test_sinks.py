"""The real packages, without a network: W&B in offline mode, MLflow on its file store."""

import importlib.util
import json
import struct
import time

import pytest

from pipeline.observe.run_dir import RunDirectory
from pipeline.observe.sinks.background import Background, DeliveryError
from pipeline.observe.sinks.mlflow import flat, named
from pipeline.observe.sinks.sinks import Distant, ObserveError, Sinks, check_sinks
from tests.support.receivers import Said, config_of
from tests.support.runs import metrics


def wandb_records(file):
    """Every record of an offline run's file, a LevelDB log behind a header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    data, position, parts = file.read_bytes(), 7, []
    while position + 7 <= len(data):
        if 32768 - position % 32768 < 7:  # the rest of a block holds no header
            position += 32768 - position % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        parts.append(data[position + 7 : position + 7 + length])
        position += 7 + length
        if len(parts[-1]) < length:  # not written yet
            return
        if kind in (1, 4):  # a whole record, or its last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(b"".join(parts))
            parts = []
            yield record


def finished_records(folder, deadline_s=20.0):
    """All records of the one offline run below a folder, once W&B's process has written its end."""
    (file,) = (folder / "wandb").glob("offline-run-*/*.wandb")
    deadline = time.monotonic() + deadline_s
    while True:
        records = list(wandb_records(file))
        if any(r.WhichOneof("record_type") == "exit" for r in records):
            return records
        assert time.monotonic() < deadline, f"{file} has no end: {[r.WhichOneof('record_type') for r in records]}"
        time.sleep(0.05)


def names(item):
    return item.key or "/".join(item.nested_key)


@pytest.fixture
def offline(monkeypatch, tmp_path):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    return [
        "observe.wandb={project: sorting, mode: offline}",
        f"observe.mlflow={{tracking_uri: 'file://{tmp_path / 'mlruns'}', experiment: sorting, name: first}}",
    ]


def test_wandb_and_mlflow_hold_every_number_the_configuration_and_how_the_run_ended(offline, tmp_path):
    from mlflow import MlflowClient

    config = config_of(tmp_path, *offline, "alerts.webhook=http://127.0.0.1:9/secret")
    check_sinks(config)
    said, rows = Said(), [metrics(step) for step in (1, 2, 3)]
    with RunDirectory.create(config) as run, Sinks(config, run.path, said) as sinks:
        for row in rows:
            sinks.record(row)
    assert said == []

    client = MlflowClient(tracking_uri=f"file://{tmp_path / 'mlruns'}")
    experiment = client.get_experiment_by_name("sorting")
    (found,) = client.search_runs([experiment.experiment_id])
    assert (found.info.run_name, found.info.status) == ("first", "FINISHED")
    assert found.data.params["objective.preset"] == "gspo"
    assert found.data.params["train.lr"] == "0.0005"
    for key in rows[0].keys() - {"step"}:
        history = client.get_metric_history(found.info.run_id, key)
        assert [(m.step, m.value) for m in history] == [(row["step"], row[key]) for row in rows]

    records = finished_records(run.path)
    history = [
        {names(item): json.loads(item.value_json) for item in r.history.item}
        for r in records
        if r.WhichOneof("record_type") == "history"
    ]
    assert [{k: row[k] for k in rows[0] if k != "step"} for row in history] == [
        {k: v for k, v in row.items() if k != "step"} for row in rows
    ]
    assert [row["_step"] for row in history] == [1, 2, 3]
    (begun,) = [r.run for r in records if r.WhichOneof("record_type") == "run"]
    assert (begun.project, begun.display_name) == ("sorting", "run")
    config_there = {names(item): json.loads(item.value_json) for item in begun.config.update}
    assert config_there["train"]["lr"] == 5e-4
    assert "webhook" not in config_there["alerts"]  # its address may hold a secret
    assert "alerts.webhook" not in found.data.params
    assert [r.exit.exit_code for r in records if r.WhichOneof("record_type") == "exit"] == [0]


def test_a_run_that_fails_is_failed_in_both(offline, tmp_path):
    from mlflow import MlflowClient

    def fail():
        with Sinks(config_of(tmp_path, *offline), tmp_path, Said()) as sinks:
            sinks.record(metrics(1))
            raise RuntimeError("a rank died")

    with pytest.raises(RuntimeError, match="a rank died"):
        fail()
    client = MlflowClient(tracking_uri=f"file://{tmp_path / 'mlruns'}")
    (found,) = client.search_runs([client.get_experiment_by_name("sorting").experiment_id])
    assert found.info.status == "FAILED"
    codes = [r.exit.exit_code for r in finished_records(tmp_path) if r.WhichOneof("record_type") == "exit"]
    assert codes == [1]


@pytest.mark.parametrize(
    ("package", "settings"), [("wandb", "{project: x}"), ("mlflow", "{tracking_uri: 'http://127.0.0.1:9'}")]
)
def test_a_package_that_is_not_installed_is_named_before_anything_starts(package, settings, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr("pipeline.observe.sinks.sinks.find_spec", lambda name: None if name == package else find(name))
    with pytest.raises(
        ObserveError, match=rf"observe\.{package} needs a package .*pip install 'sameroute\[{package}\]"
    ):
        check_sinks(config_of(tmp_path, f"observe.{package}={settings}"))


def test_a_tracking_server_that_is_away_is_said_before_the_first_step_and_closes_what_was_open(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    config = config_of(tmp_path, "observe.mlflow={tracking_uri: 'http://127.0.0.1:9'}")
    with pytest.raises(ObserveError, match=r"observe\.mlflow: http://127\.0\.0\.1:9: .*or set that sink to null"):
        Sinks(config, tmp_path, Said())


class Refusing:
    def __init__(self, error):
        self.error = error

    def record(self, step, metrics):
        raise self.error

    def close(self, finished):
        pass


def test_what_a_receiver_does_not_take_is_counted_and_what_is_our_mistake_is_raised():
    said = Said()
    sink = Distant("mlflow", Refusing(DeliveryError("step 1: disk full")), said)
    sink.record(1, {})
    sink.record(2, {})
    sink.close(True)
    assert sink.failures == 2
    assert said[0] == "mlflow: step 1: disk full (failures so far: 1)"
    wrong = Distant("mlflow", Refusing(TypeError("no number")), said)
    wrong.record(1, {})
    with pytest.raises(TypeError, match="no number"):
        wrong.close(True)


def test_calls_that_never_come_to_their_turn_are_dropped_counted_and_said():
    import threading

    gate, said = threading.Event(), Said()
    calls = Background("wandb", said)
    calls.submit(lambda: gate.wait(5))
    for _ in range(3):
        calls.submit(lambda: None)
    calls.close(0.1)
    gate.set()
    assert calls.failures == 3
    assert said == ["wandb: 3 calls were dropped, wandb did not answer in 0.1 s (failures so far: 3)"]


def test_settings_are_flat_in_mlflow():
    assert dict(flat({"a": {"b": 1, "c": {}}, "d": [1, 2]})) == {"a.b": 1, "d": [1, 2]}


def test_mlflow_has_a_name_for_every_score():
    assert named("eval/held/pass@4") == "eval/held/pass_at_4"


def test_what_is_evaluated_before_the_first_step_goes_where_a_row_a_step_is_kept(tmp_path):
    class Far:
        def __init__(self):
            self.rows = []

        def record(self, step, metrics):
            self.rows.append((step, dict(metrics)))

        def close(self, finished):
            pass

    far, near = Far(), Far()
    sinks = Sinks(config_of(tmp_path), tmp_path, Said())
    distant = Distant("far", far, Said())
    sinks._sinks += [distant, near]
    sinks.record_beginning(0, {"eval/held/pass@1": 0.5})
    distant.close(True)
    assert far.rows == [(0, {"eval/held/pass@1": 0.5})]
    assert near.rows == [], "a step's sinks hear of steps"
