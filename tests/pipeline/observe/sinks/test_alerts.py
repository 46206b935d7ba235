"""Rules, told to a real command and a real HTTP server."""

import json
import sys
import time

import psutil
import pytest

from pipeline.config import ConfigError
from pipeline.config.alerts import DEFAULT_RULES, AlertsConfig
from pipeline.objectives.correction_config import DROPS
from pipeline.observe.sinks.alerts import Alerts, AlertStop, RuleState
from pipeline.observe.sinks.sinks import ObserveError, check_sinks
from tests.support.receivers import Said, config_of, webhook
from tests.support.runs import metrics


def gone(pid):
    """Dead, if not yet waited for."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def rule(**cells):
    return AlertsConfig.model_validate({"rules": [{"metric": "x", **cells}]}).rules[0]


@pytest.mark.parametrize(
    ("cells", "values", "firing"),
    [
        ({"above": 1.0}, [1.0, 1.1, 5.0, 1.0, 2.0], [0, 1, 1, 0, 1]),
        ({"below": 1.0}, [1.0, 0.9, 1.0], [0, 1, 0]),
        ({"above": 1.0, "for_steps": 3}, [2, 2, 0, 2, 2, 2, 2, 0, 2, 2], [0, 0, 0, 0, 0, 1, 1, 0, 0, 0]),
        ({"falls_by": 0.5}, [0.2, 0.8, 0.5, 0.3, 0.5], [0, 0, 0, 1, 0]),
        ({"falls_by": 0.5, "for_steps": 2}, [0.8, 0.8, 0.3, 0.3, 0.3, 0.5], [0, 0, 0, 1, 1, 0]),
        ({"falls_by": 0.5, "for_steps": 2}, [0.4, 1.0, 0.4, 0.4, 0.4], [0, 0, 0, 0, 0]),  # one step is no best
        ({"rises_by": 1.0}, [5.5, 5.6, 6.4, 6.6, 5.0, 6.6], [0, 0, 0, 1, 0, 1]),
        ({"rises_by": 1.0, "for_steps": 2}, [0.2, 0.4, 1.2, 1.4, 1.4, 1.2], [0, 0, 0, 0, 1, 0]),
        ({"rises_by": 1.0}, [-3.0, -2.5, -1.5], [0, 0, 1]),
        ({"falls_by": 0.5}, [-1.0, -2.0, -9.0, 0.0], [0, 0, 0, 0]),
    ],
)
def test_a_rule_fires_while_it_holds_for_so_many_steps_in_a_row(cells, values, firing):
    state, seen, changes = RuleState(rule(**cells)), [], []
    for value in values:
        changes.append(state.step(value))
        seen.append(int(state.firing))
    assert seen == firing
    assert changes == [now != before for now, before in zip(firing, [0, *firing], strict=False)]


@pytest.mark.parametrize("cells", [{}, {"above": 1, "below": 0}, {"falls_by": 1.0}, {"above": 1, "for_steps": 0}])
def test_a_rule_that_means_nothing_is_refused(cells, tmp_path):
    with pytest.raises(ConfigError, match=r"alerts\.rules"):
        config_of(tmp_path, f"alerts.rules=[{json.dumps({'metric': 'reward/mean', **cells})}]")


def test_a_command_and_a_webhook_hear_of_an_alert_once_and_of_its_end(tmp_path):
    heard = tmp_path / "heard"
    script = f"import sys; open({str(heard)!r}, 'a').write(sys.stdin.read() + '\\n')"
    with webhook() as hook:
        config = AlertsConfig(
            defaults=False,
            rules=(rule(metric="mismatch/k3", above=1e-3, for_steps=2, why="the engines drift apart"),),
            command=(sys.executable, "-c", script),
            webhook=hook.url,
        )
        said = Said()
        alerts = Alerts(config, tmp_path, said)
        for step, value in enumerate([1e-4, 1e-2, 2e-2, 3e-2, 3e-2, 1e-4, 1e-4], start=1):
            alerts.record(step, metrics(step) | {"mismatch/k3": value})
        alerts.close(True)
    by_command = [json.loads(line) for line in heard.read_text().splitlines()]
    by_file = [json.loads(line) for line in (tmp_path / "alerts.jsonl").read_text().splitlines()]
    assert [event for _, _, event in hook.received] == by_command == by_file
    assert [(path, kind) for path, kind, _ in hook.received] == [("/hook", "application/json")] * 2
    fired, resolved = by_file
    assert (fired["state"], fired["step"], fired["value"]) == ("firing", 3, 0.02)
    assert (resolved["state"], resolved["step"], resolved["value"]) == ("resolved", 6, 1e-4)
    assert fired["text"] == (
        f"{tmp_path.name}, step 3: alert fires: mismatch/k3 above 0.001 for 2 steps (the engines drift apart). "
        "The value is 0.02."
    )
    assert {fired[k] for k in ("run", "rule")} == {tmp_path.name, "mismatch/k3 above 0.001 for 2 steps"}
    assert said == [event["text"] for event in by_file]
    assert alerts.failures == 0


def test_deliveries_that_fail_are_said_and_counted_and_the_run_goes_on(tmp_path):
    script = "import sys; sys.exit('no such room')"
    with webhook(status=500) as hook:
        said = Said()
        config = AlertsConfig(rules=(rule(above=1),), command=(sys.executable, "-c", script), webhook=hook.url)
        alerts = Alerts(config, tmp_path, said)
        alerts.record(1, {**metrics(1), "x": 2.0})
        alerts.close(True)
        assert len(hook.received) == 1
    assert alerts.failures == 2
    assert [line for line in said if "failures so far" in line] == [
        f"alerts: {sys.executable} ended with 1: no such room (failures so far: 1)",
        "alerts: webhook at 127.0.0.1 answered 500 (failures so far: 2)",
    ]
    unreachable = Alerts(AlertsConfig(rules=(rule(above=1),), webhook=hook.url), tmp_path, said)
    unreachable.record(1, {**metrics(1), "x": 2.0})
    unreachable.close(True)
    assert "webhook at 127.0.0.1: ClientConnectorError (failures so far: 1)" in said[-1]


def test_a_command_that_hangs_holds_up_no_step_and_is_killed_with_what_it_started(tmp_path):
    pid = tmp_path / "pid"
    config = AlertsConfig(
        rules=(rule(above=1),), command=("sh", "-c", f"sleep 600 & echo $! > {pid}; sleep 600"), timeout_s=3.0
    )
    said = Said()
    alerts = Alerts(config, tmp_path, said)
    start = time.monotonic()
    alerts.record(1, {**metrics(1), "x": 2.0})
    assert time.monotonic() - start < 2.5
    alerts.close(True)
    assert "sh took longer than alerts.timeout_s=3, and was killed (failures so far: 1)" in said[-1]
    started, deadline = int(pid.read_text()), time.monotonic() + 60
    while not gone(started) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert gone(started)


def test_a_rule_that_stops_ends_the_run_once_it_is_delivered(tmp_path):
    with webhook() as hook:
        alerts = Alerts(AlertsConfig(rules=(rule(below=0, stop=True),), webhook=hook.url), tmp_path, Said())
        alerts.record(1, {**metrics(1), "x": 2.0})
        with pytest.raises(AlertStop, match=r"step 2: alert fires: x below 0\. The value is -1\. .*\(stop: true\)"):
            alerts.record(2, {**metrics(2), "x": -1.0})
        assert [event["stop"] for _, _, event in hook.received] == [True]
        alerts.close(False)


def test_a_run_that_learns_raises_no_default_alert_and_each_sign_of_a_collapse_raises_its_own(tmp_path):
    said = Said()
    quiet = Alerts(AlertsConfig(), tmp_path, said)
    for step in range(1, 13):
        quiet.record(step, metrics(step))
    assert said == []
    signs = {
        "mismatch/k3": 0.05,
        "policy/entropy": 1e-5,
        "response/length_mean": 1.0,
        "response/truncated_fraction": 0.9,
        "response/repeating_fraction": 0.4,
        "response/garbage_fraction": 0.4,
        "reward/mean": 0.2,
        "reward/std": 0.0,
    }
    for key, value in [*signs.items(), ("policy/entropy", 9.0)]:
        alerts = Alerts(AlertsConfig(), tmp_path, said)
        for step in range(1, 25):
            alerts.record(step, metrics(min(step, 12)) | ({key: value} if step > 12 else {}))
        fired = [name for name, fires in alerts.firing().items() if fires]
        assert len(fired) == 1
        assert fired[0].startswith(key)
    assert len(said) == len(DEFAULT_RULES)
    silent = Alerts(AlertsConfig(defaults=False), tmp_path, said)
    silent.record(1, metrics(1) | signs)
    assert silent.firing() == {}


@pytest.mark.parametrize("kind", DROPS)
def test_a_correction_that_drops_more_than_half_is_named_with_its_share_once(tmp_path, kind):
    said = Said()
    alerts = Alerts(AlertsConfig(), tmp_path, said)
    for step, share in enumerate([0.5, 0.66, 0.7, 0.9], 1):
        alerts.record(step, metrics(step) | {f"correction/{kind}_cut": share})
    (line,) = said
    assert f"step 2: alert fires: correction/{kind}_cut above 0.5" in line
    assert f"the correction {kind} drops more than half" in line
    assert "The value is 0.66." in line


def test_a_correction_that_only_bounds_its_weight_is_not_warned_about(tmp_path):
    said = Said()
    alerts = Alerts(AlertsConfig(), tmp_path, said)
    alerts.record(1, metrics(1) | {"correction/token_tis_cut": 0.9, "correction/geometric_tis_cut": 1.0})
    assert said == []


def test_a_metric_that_does_not_exist_is_refused_or_told_after_the_first_step(tmp_path):
    for name in ("mismatch/k4", "reward/max", "response/length"):
        with pytest.raises(ObserveError, match=rf"there is no metric '{name}'; there are {name.partition('/')[0]}/"):
            check_sinks(config_of(tmp_path, f"alerts.rules=[{{metric: {name}, above: 1}}]"))
    check_sinks(config_of(tmp_path, "alerts.rules=[{metric: mismatch/k3, above: 1}, {metric: my/own, above: 1}]"))
    said = Said()
    alerts = Alerts(AlertsConfig(rules=(rule(metric="my/own", above=1),)), tmp_path, said)
    alerts.record(1, metrics(1))
    alerts.record(2, metrics(2))
    (line,) = said
    assert line.startswith("alerts: step 1 has no metric my/own; a rule on it waits")
    alerts.record(3, metrics(3) | {"my/own": 2.0})
    assert alerts.firing()["my/own above 1"]


def test_a_program_that_is_not_there_and_a_url_that_is_none_are_refused(tmp_path):
    with pytest.raises(ObserveError, match=r"alerts\.command: there is no program 'no-such-program'"):
        check_sinks(config_of(tmp_path, "alerts.command=[no-such-program]"))
    with pytest.raises(ConfigError, match=r"alerts\.webhook"):
        config_of(tmp_path, "alerts.webhook=ftp://host/x")
