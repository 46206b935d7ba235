"""Whether all that is pinned can be had and goes together: both lock files, and the packages the Dockerfile names.

    .venv/bin/python scripts/check_pins.py PATH_OF_UV

A resolver is given pyproject.toml under the constraints of a lock file: it must come to just that set. The digests of
the base images and the commit of apex are not looked up; `docker build` does.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOCKS = {"requirements.lock": "dev", "requirements-gpu.lock": "gpu"}
CONNECTED = ("verifiers", "openenv")
"""Folders of examples/ that have packages of their own."""


def resolved(uv: str, *arguments: str, given: str = "") -> set[str]:
    """What a resolver makes of the requirements. Raises SystemExit with its reason where it cannot."""
    command = [uv, "pip", "compile", "--quiet", "--python-version", "3.12", "--no-header", "--no-annotate", *arguments]
    done = subprocess.run(command, input=given, text=True, capture_output=True, cwd=ROOT)
    if done.returncode:
        sys.exit(done.stderr)
    return _pins(done.stdout)


def _pins(text: str) -> set[str]:
    return {line for line in text.splitlines() if "==" in line}


def main(uv: str) -> None:
    asked = [(name, ("pyproject.toml", "--extra", extra)) for name, extra in LOCKS.items()]
    asked += [(f"examples/{name}/requirements.lock", (f"examples/{name}/requirements.in",)) for name in CONNECTED]
    for name, (source, *more) in asked:
        locked = _pins((ROOT / name).read_text())
        found = resolved(uv, source, *more, "--constraint", name)
        if found != locked:
            missing, over = ", ".join(sorted(found - locked)), ", ".join(sorted(locked - found))
            sys.exit(f"{name} is not what {source} asks for (missing: {missing}; too much: {over}): make lock")
        print(f"{name}: {len(locked)} packages")
    named = set(re.findall(r"[a-z][\w.-]+==[\d.]+", (ROOT / "Dockerfile").read_text()))
    resolved(uv, "-", given="\n".join(named))
    print(f"Dockerfile: {', '.join(sorted(named))}")


if __name__ == "__main__":
    main(sys.argv[1])
