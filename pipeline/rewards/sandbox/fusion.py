"""Programs on another machine: a service that speaks SandboxFusion's HTTP, `POST URL/run_code`.

sent      {"code", "language": "python", "stdin", "run_timeout", "compile_timeout", "memory_limit_MB"}
comes     {"status": "Success" | "Failed" | "SandboxError", "message", "run_result":
           {"status": "Finished" | "Error" | "TimeLimitExceeded", "return_code", "stdout", "stderr",
            "execution_time"}}
"""

from __future__ import annotations

from typing import Any

from pipeline.rewards.ask import AskError, ask
from pipeline.rewards.sandbox.program import Outcome, Program, SandboxError, SandboxLimits

_OF_THE_WAY_S = 30.0
"""Seconds beyond a program's own: of the network, and of the service's queue."""


class Fusion:
    """A sandbox. url: of the service, without /run_code."""

    def __init__(self, limits: SandboxLimits, url: str):
        self.limits, self.url = limits, f"{url.rstrip('/')}/run_code"

    def run(self, program: Program, wall_s: float) -> Outcome:
        """Run one to its end, or for `wall_s` seconds. Raises SandboxError where the service fails."""
        body = {
            "code": program.source,
            "language": "python",
            "stdin": program.stdin,
            "run_timeout": wall_s,
            "compile_timeout": wall_s,
            "memory_limit_MB": self.limits.memory_mb,
        }
        try:
            answer = ask(self.url, body, timeout_s=wall_s + _OF_THE_WAY_S)
        except AskError as error:
            raise SandboxError(str(error)) from error
        status = answer.get("status") if isinstance(answer, dict) else None
        result = answer.get("run_result") if isinstance(answer, dict) else None
        if status not in ("Success", "Failed") or not isinstance(result, dict):
            raise SandboxError(f"{self.url} answered {status!r}: {str(answer)[:300]}")
        return self._outcome(result)

    def _outcome(self, result: dict[str, Any]) -> Outcome:
        seconds = float(result.get("execution_time") or 0.0)
        texts = [str(result.get(name) or "") for name in ("stdout", "stderr")]
        if result.get("status") == "TimeLimitExceeded":
            return Outcome("timeout", 0, *texts, seconds=seconds)
        if sum(map(len, texts)) > self.limits.output_kb * 1000:
            return Outcome("output", 0, *texts, seconds=seconds)
        code = result.get("return_code")
        if result.get("status") not in ("Finished", "Error") or not isinstance(code, int):
            raise SandboxError(f"{self.url} answered a run_result that says nothing: {str(result)[:300]}")
        return Outcome("signal" if code < 0 else "exited", abs(code), *texts, seconds=seconds)
