"""What of this process's environment a grader inherits: nothing that opens a door.

A name that looks like a secret, a variable of the cluster and of tracking, and an address with a password in it stay
here. This keeps secrets from what a verifier prints and starts; it is no wall against one that looks for them, which
`/proc` would show as long as it runs as the same user.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

_OF_THE_RUN = ("RAY_", "SAMEROUTE_", "SGLANG_", "WANDB_", "MLFLOW_")
_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSWO?R?D|CREDENTIAL|(^|_)AUTH", re.IGNORECASE)
_PASSWORD_IN_ADDRESS = re.compile(r"://[^/@\s]*:[^/@\s]+@")


def without_secrets(environment: Mapping[str, str], allowed: Collection[str] = ()) -> dict[str, str]:
    """The variables that a grader inherits. allowed: names that it gets whatever they look like."""
    return {
        name: value
        for name, value in environment.items()
        if name in allowed
        or not (name.startswith(_OF_THE_RUN) or _SECRET.search(name) or _PASSWORD_IN_ADDRESS.search(value))
    }
