"""Whether all that is pinned can be had and goes together: both lock files, and the packages the Dockerfile names.

    .venv/bin/python scripts/check_pins.py PATH_OF_UV

A resolver is given each lock file as its only requirements: it must find every version, and come to the same set. The
digests of the base images and the commit of apex are not looked up; `docker build` does.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESOLVE = ["pip", "compile", "--quiet", "--python-version", "3.12", "--no-header", "--no-annotate", "-"]


def resolved(uv: str, pins: set[str]) -> set[str]:
    """What a resolver makes of the pins. Raises SystemExit with its reason where it cannot."""
    done = subprocess.run([uv, *RESOLVE], input="\n".join(pins), text=True, capture_output=True)
    if done.returncode:
        sys.exit(done.stderr)
    return {line for line in done.stdout.splitlines() if "==" in line}


def main(uv: str) -> None:
    for name in ("requirements.lock", "requirements-gpu.lock"):
        pins = {line for line in (ROOT / name).read_text().splitlines() if line and not line.startswith("#")}
        if added := resolved(uv, pins) - pins:
            sys.exit(f"{name} is not complete: {', '.join(sorted(added))}; run make lock")
        print(f"{name}: {len(pins)} packages")
    named = set(re.findall(r"[a-z][\w.-]+==[\d.]+", (ROOT / "Dockerfile").read_text()))
    resolved(uv, named)
    print(f"Dockerfile: {', '.join(sorted(named))}")


if __name__ == "__main__":
    main(sys.argv[1])
