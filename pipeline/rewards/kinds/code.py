"""1 where the program in the response passes its tests, run in a sandbox.

What is right never enters the sandbox: a program gets inputs, and what comes out is compared here. Whatever a program
does wrong (crash, hang, flood, take too much) is a wrong answer; only a sandbox that fails is a failure.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.rewards.program_tests import Call, Calls, Streams, Tests, read_tests, same_output, same_value
from pipeline.rewards.protocol import Question
from pipeline.rewards.registry import Verifier
from pipeline.rewards.sandbox import Program, Sandbox, open_sandbox
from pipeline.rewards.sandbox.calls import calling, values_of

_FENCED = re.compile(r"```[ \t]*(?:python3?|py)?[ \t]*\r?\n(.*?)```", re.DOTALL | re.IGNORECASE)


def load(settings: Mapping[str, Any]) -> Verifier:
    """1.0 where all tests pass, else 0.0, or the share of them; 0.0 for a response that did not end by itself.

    The verifier raises KeyError for a prompt without tests, ValueError for tests of no form that there is, SandboxError
    where the sandbox fails. Raises VerifierError where no sandbox can be had.
    """
    limits = settings["sandbox"]
    sandbox = open_sandbox(limits, name=settings["kind"])
    key, share = settings["tests"], settings["share"]

    def code(question: Question) -> float:
        tests = read_tests(question.prompt.metadata[key])
        if question.finish_reason != "stop":
            return 0.0
        source = program_in(question.response_text)
        if isinstance(tests, Calls):
            passed = _calls_passed(sandbox, source, tests, min(limits["wall_s"], limits["total_s"]))
        else:
            passed = _streams_passed(sandbox, source, tests, limits, to_the_end=share)
        count = _count(tests)
        return passed / count if share else float(passed == count)

    return code


def program_in(response: str) -> str:
    """The last fenced block of Python, or of no language; all of it where there is none."""
    blocks = _FENCED.findall(response)
    return blocks[-1] if blocks else response


def _count(tests: Tests) -> int:
    return len(tests.calls) if isinstance(tests, Calls) else len(tests)


def _streams_passed(
    sandbox: Sandbox, source: str, tests: Sequence[Streams], limits: Mapping[str, Any], *, to_the_end: bool
) -> int:
    """How many pass; where not all are wanted, up to the first that does not."""
    passed, deadline = 0, time.monotonic() + limits["total_s"]
    for test in tests:
        left = min(limits["wall_s"], deadline - time.monotonic())
        if left <= 0:
            break
        outcome = sandbox.run(Program(source, test.stdin), left)
        right = outcome.well and same_output(outcome.stdout, test.stdout)
        passed += right
        if not right and not to_the_end:
            break
    return passed


def _calls_passed(sandbox: Sandbox, source: str, tests: Calls, wall_s: float) -> int:
    """How many give what they should; all of them are made in one process."""
    outcome = sandbox.run(Program(calling(source, [_told(call) for call in tests.calls])), wall_s)
    values = values_of(outcome.stdout)
    return sum(same_value(value, call) for value, call in zip(values, tests.calls, strict=False))


def _told(call: Call) -> dict[str, Any]:
    """Of a call what the program may know."""
    return {"name": call.name, "arguments": call.arguments, "expression": call.expression}
