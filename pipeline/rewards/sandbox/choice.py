"""The sandbox that a configuration asks for, tried before anything starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from pipeline.rewards.registry import VerifierError
from pipeline.rewards.sandbox.bubblewrap import Bubblewrap, why_not
from pipeline.rewards.sandbox.fusion import Fusion
from pipeline.rewards.sandbox.program import Program, Sandbox, SandboxError, SandboxLimits
from pipeline.rewards.sandbox.unsafe import Unsafe

_ELSE = "or give sandbox: {mode: remote, url: ...} of a SandboxFusion service"
_TRIAL = Program("print(input())", "7\n")
_TRIAL_S = 60.0


def open_sandbox(settings: Mapping[str, Any], *, name: str) -> Sandbox:
    """Of a SandboxConfig as plain values; a trivial program has run in it. name: of the verifier that asks.

    Raises VerifierError where it cannot be had, with what to install or to write instead.
    """
    limits = SandboxLimits(**{f.name: settings[f.name] for f in fields(SandboxLimits) if f.name in settings})
    python = Path(settings["python"]) if settings.get("python") else None
    mode = settings["mode"]
    if mode == "bubblewrap" and (missing := why_not()) is not None:
        raise VerifierError(f"the verifier {name!r} runs programs in a sandbox, and {missing}, {_ELSE}")
    try:
        if mode == "remote":
            sandbox: Sandbox = Fusion(limits, settings["url"])
        else:
            sandbox = (Bubblewrap if mode == "bubblewrap" else Unsafe)(limits, python)
        outcome = sandbox.run(_TRIAL, _TRIAL_S)
        if outcome.stdout != "7\n":
            raise SandboxError(f"a trivial program did not work in it: {outcome}"[:400])
    except SandboxError as error:
        advice = f", {_ELSE}" if mode == "bubblewrap" else ""
        if mode == "bubblewrap" and "namespace" in str(error).lower():
            advice = (
                "; allow user namespaces (sysctl user.max_user_namespaces above 0 and, on Ubuntu, "
                f"kernel.apparmor_restrict_unprivileged_userns=0; in a container, its seccomp profile), {_ELSE}"
            )
        raise VerifierError(
            f"the verifier {name!r} runs programs in a sandbox, and its sandbox ({mode}) does not work: {error}{advice}"
        ) from error
    return sandbox
