"""A scrape over HTTP, read by prometheus_client's own parser, says what the run knows."""

import re
import socket
import threading
import time
import urllib.error

import pytest

from pipeline.config.alerts import CORRECTION_RULES, DEFAULT_RULES
from pipeline.observe.run_dir import RunDirectory
from pipeline.observe.sinks.prometheus import PrometheusEndpoint, gauge_name, port_error
from pipeline.observe.sinks.sinks import ObserveError, Sinks, check_sinks
from tests.support.receivers import Said, config_of, free_port, scrape
from tests.support.runs import metrics


def test_every_number_of_the_last_step_is_served_from_the_start_to_the_end_of_a_run(tmp_path):
    port, threads = free_port(), set(threading.enumerate())
    config = config_of(tmp_path, f"observe.prometheus_port={port}", "alerts.rules=[{metric: reward/mean, above: 0.8}]")
    check_sinks(config)
    said = Said()
    with RunDirectory.create(config) as run, Sinks(config, run.path, said) as sinks:
        before = scrape(port)
        assert before["sameroute_steps_total"] == [({}, 0.0)]
        ((info, one),) = before["sameroute_run_info"]
        assert one == 1.0
        assert info == {
            "run": "run", "model": "tiny", "objective": "gspo", "replay": "r3", "ranks": "1", "dtype": "float32",
            "seed": "0", "steps": "80",
        }  # fmt: skip
        assert not any(name.startswith("sameroute_reward") for name in before)
        for number in range(1, 13):
            row = metrics(number) | ({"probe/k3_native": 0.5} if number < 12 else {})
            sinks.record(row)
            seen = scrape(port)
            for key, value in row.items():
                assert seen[gauge_name(key)] == [({}, pytest.approx(value, rel=1e-15))]
            assert seen["sameroute_steps_total"] == [({}, number)]
        assert "sameroute_probe_k3_native" not in seen
        assert seen["sameroute_reward_mean"] == [({}, pytest.approx(0.9))]
        assert time.time() - 5 < seen["sameroute_last_step_timestamp_seconds"][0][1] <= time.time()
        fires = {labels["rule"]: value for labels, value in seen["sameroute_alert_firing"]}
        assert fires.pop("reward/mean above 0.8") == 1
        assert set(fires.values()) == {0}
        assert len(fires) == len(DEFAULT_RULES) + len(CORRECTION_RULES)
        assert seen["sameroute_delivery_failures_total"] == [({"receiver": "alerts"}, 0.0)]
        assert all(re.fullmatch(r"[a-zA-Z_:][a-zA-Z0-9_:]*", name) for name in seen)
    with pytest.raises(urllib.error.URLError, match="refused"):
        scrape(port)
    assert port_error("127.0.0.1", port) is None
    assert not [t for t in set(threading.enumerate()) - threads if t.name.startswith("sameroute")]


def test_a_run_that_fails_leaves_nothing_listening(tmp_path):
    port = free_port()
    config = config_of(tmp_path, f"observe.prometheus_port={port}")

    def fail():
        with Sinks(config, tmp_path, Said()):
            scrape(port)
            raise RuntimeError("a rank died")

    with pytest.raises(RuntimeError, match="a rank died"):
        fail()
    with pytest.raises(urllib.error.URLError, match="refused"):
        scrape(port)


def test_a_port_in_use_or_a_host_that_is_not_here_is_refused_before_anything_starts(tmp_path):
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = busy.getsockname()[1]
        with pytest.raises(
            ObserveError, match=rf"observe\.prometheus_port: cannot listen on 127\.0\.0\.1:{port}: Addr"
        ):
            check_sinks(config_of(tmp_path, f"observe.prometheus_port={port}"))
        with pytest.raises(ObserveError, match=r"Address already in use; correct it, or set that sink to null"):
            Sinks(config_of(tmp_path, f"observe.prometheus_port={port}"), tmp_path, Said())
    with pytest.raises(ObserveError, match=r"cannot listen on 192\.0\.2\.1"):
        check_sinks(config_of(tmp_path, "observe={prometheus_port: 9400, prometheus_host: 192.0.2.1}"))


def test_two_metrics_never_share_a_name():
    endpoint = PrometheusEndpoint("127.0.0.1", free_port(), {})
    try:
        with pytest.raises(ValueError, match="'a_b' has the Prometheus name sameroute_a_b of another"):
            endpoint.record(1, {"a/b": 1.0, "a_b": 2.0})
        with pytest.raises(ValueError, match="sameroute_steps of another"):
            endpoint.record(1, {"steps": 1.0})
    finally:
        endpoint.close(True)
