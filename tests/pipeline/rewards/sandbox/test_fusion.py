"""A service that speaks SandboxFusion's HTTP: a small real one, which runs programs as they come."""

from __future__ import annotations

import asyncio
import subprocess
import sys

import pytest
from aiohttp import web

from pipeline.rewards import Grader, VerifierError
from pipeline.rewards.sandbox import Program, SandboxError, open_sandbox
from tests.support.http_service import HttpService
from tests.support.programs import LIMITS, question, verifier


class Service(HttpService):
    """POST /run_code. asked: bodies that came. fail: how often the next calls are refused as busy."""

    path = "/run_code"

    def __init__(self):
        super().__init__()
        self.asked, self.fail, self.odd = [], 0, None

    async def heard(self, request):
        body = await request.json()
        self.asked.append(body)
        if self.fail:
            self.fail -= 1
            return web.json_response({"detail": "busy"}, status=503)
        if self.odd is not None:
            return web.json_response(self.odd)
        return web.json_response(await asyncio.to_thread(self._result, body))

    @staticmethod
    def _result(body):
        try:
            done = subprocess.run(
                [sys.executable, "-c", body["code"]], input=body["stdin"], capture_output=True, text=True,
                timeout=body["run_timeout"], check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            run = {
                "status": "TimeLimitExceeded",
                "execution_time": None,
                "return_code": None,
                "stdout": "",
                "stderr": "",
            }
            return {"status": "Failed", "message": "", "compile_result": None, "run_result": run, "files": {}}
        run = {
            "status": "Finished" if done.returncode == 0 else "Error",
            "execution_time": 0.1,
            "return_code": done.returncode,
            "stdout": done.stdout,
            "stderr": done.stderr,
        }
        status = "Success" if done.returncode == 0 else "Failed"
        return {"status": status, "message": "", "compile_result": None, "run_result": run, "files": {}}


@pytest.fixture
def service():
    with Service() as running:
        yield running


def remote(service, **limits):
    return LIMITS | {"mode": "remote", "url": service.url} | limits


def test_programs_run_there_and_their_ends_are_told_apart(service):
    sandbox = open_sandbox(remote(service), name="code")
    assert sandbox.run(Program("print(int(input()) ** 2)", "7\n"), 5).stdout == "49\n"
    wrong = sandbox.run(Program("import sys\nsys.exit(3)"), 5)
    assert (wrong.end, wrong.code, wrong.well) == ("exited", 3, False)
    killed = sandbox.run(Program("import os\nos.kill(os.getpid(), 9)"), 5)
    assert (killed.end, killed.code) == ("signal", 9)
    assert sandbox.run(Program("while True: pass"), 0.5).end == "timeout"
    assert sandbox.run(Program("print('1' * 2_000_000)"), 5).end == "output"
    sent = service.asked[1]
    assert (sent["language"], sent["run_timeout"], sent["memory_limit_MB"]) == ("python", 5, LIMITS["memory_mb"])


def test_a_service_that_is_busy_is_asked_again_and_one_that_fails_is_no_wrong_answer(service):
    sandbox = open_sandbox(remote(service), name="code")
    service.fail = 2
    assert sandbox.run(Program("print(1)"), 5).stdout == "1\n"
    for odd in ({"status": "SandboxError", "message": "no memory"}, {"status": "Success"}, [], {"run_result": {}}):
        service.odd = odd
        with pytest.raises(SandboxError, match="run_code answered"):
            sandbox.run(Program("print(1)"), 5)


def test_the_code_verifier_grades_there(service):
    with Grader([verifier(mode="remote", url=service.url, wall_s=2.0, total_s=2.0)], workers=2) as grader:
        verdicts = grader.ask([question(p) for p in ("print(int(input()) ** 2)", "print(7)", "while True: pass")])
    assert [v.reward for v in verdicts] == [1.0, 0.0, 0.0]


def test_a_service_that_is_not_there_is_refused_before_anything_starts(monkeypatch):
    monkeypatch.setattr("pipeline.rewards.sandbox.fusion._OF_THE_WAY_S", -59.0)
    gone = LIMITS | {"mode": "remote", "url": "http://127.0.0.1:9"}
    with pytest.raises(
        VerifierError, match=r"its sandbox \(remote\) does not work: http://127.0.0.1:9/run_code cannot be"
    ):
        open_sandbox(gone, name="code")
