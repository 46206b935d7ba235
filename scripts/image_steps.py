"""Run the steps of the Dockerfile's CPU image in order, without Docker, then its health check, a short quickstart, and
1,000 hostile programs in its sandbox of code.

    sudo .venv/bin/python scripts/image_steps.py

Every RUN, COPY, ENV, WORKDIR and USER that leads to the last stage with DEVICE=cpu is done as it is written, in an
overlay over this machine's root: what is installed or made there goes with the overlay. So the base image is not
python:3.12-slim but this machine, which must be Debian 12 as that is, with its own python3.12; that the base image has
all that is needed is not shown. All stages share the one root, so COPY --from only has to find what it copies.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from string import Template

ROOT = Path(__file__).resolve().parents[1]
SHORT = ["supervised.steps=5", "supervised.decay_steps=null", "supervised.warmup_steps=0", "train.decay_steps=null",
         "rollout.prompts_per_step=8", "rollout.samples_per_prompt=4", "train.steps=2"]  # fmt: skip
ROOM = 15e9  # bytes: packages are copied into the image, 12 GB
KEPT = ("PIP_", "UV_", "SSL_", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy")

_PIVOT = 'cd "$1" && shift && mkdir -p .outside && pivot_root . .outside && umount -l /.outside && exec "$@"'


@dataclass
class Stage:
    """FROM ... AS name, and its instructions: (instruction, value)."""

    base: str
    name: str
    steps: list[tuple[str, str]] = field(default_factory=list)


def stages_of(text: str, arguments: dict[str, str]) -> list[Stage]:
    """The stages of a Dockerfile. arguments: of the build; ARG lines before the first FROM give the others."""
    from dockerfile_parse import DockerfileParser

    with tempfile.TemporaryDirectory() as folder:
        parser = DockerfileParser(folder)
        parser.content = text
        found: list[Stage] = []
        for line in parser.structure:
            instruction, value = line["instruction"], line["value"]
            if instruction == "COMMENT":
                continue
            if instruction == "FROM":
                words = value.split()
                base = Template(words[0]).substitute(arguments)
                found.append(Stage(base, words[2] if len(words) > 2 else f"stage{len(found)}"))
            elif found:
                found[-1].steps.append((instruction, value))
            elif instruction == "ARG":
                name, _, default = value.partition("=")
                arguments.setdefault(name, default)
    return found


def needed(stages: list[Stage]) -> list[Stage]:
    """Those that the last one is made of, by FROM or by COPY --from, each after what it needs."""
    by_name, order = {s.name: s for s in stages}, []

    def visit(stage: Stage) -> None:
        sources = [
            w.removeprefix("--from=") for i, v in stage.steps if i == "COPY" for w in v.split() if "--from=" in w
        ]
        for name in [stage.base, *sources]:
            if name in by_name:
                visit(by_name[name])
        if stage not in order:
            order.append(stage)

    visit(stages[-1])
    return order


class Image:
    """A root to build in. Must be made in mount and process namespaces of their own."""

    def __init__(self, folder: Path, overrides: dict[str, str]):
        cache = Path.home() / ".cache" / "uv"  # stands for the cache mounts
        self.root, self.overrides = folder / "root", {"UV_CACHE_DIR": str(cache)} | overrides
        self.environment = {k: v for k, v in os.environ.items() if k.startswith(KEPT)}
        self.environment |= {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
        self.environment |= overrides
        self.directory, self.user, self.instructions = "/", "0:0", dict[str, str]()
        for name in ("upper", "work", "root"):
            (folder / name).mkdir()
        options = f"lowerdir=/,upperdir={folder}/upper,workdir={folder}/work"
        subprocess.run(["mount", "-t", "overlay", "overlay", "-o", options, self.root], check=True)
        for name in ("dev", "proc", "sys"):
            subprocess.run(["mount", "--rbind", f"/{name}", self.root / name], check=True)
        subprocess.run(["mount", "-t", "proc", "proc", self.root / "proc"], check=True)
        # What stands for the base image: a python3.12 that every user can run.
        python = Path(sys.executable).resolve()
        (self.root / "usr/local/bin/python3.12").unlink(missing_ok=True)
        (self.root / "usr/local/bin/python3.12").symlink_to(python)
        for place in (python, cache / "archive-v0"):
            for parent in place.parents:
                if parent != Path("/") and (inside := self.root / parent.relative_to("/")).exists():
                    inside.chmod(inside.stat().st_mode | 0o055)

    def state(self) -> tuple[dict[str, str], str, str]:
        """Environment, working directory and user."""
        return dict(self.environment), self.directory, self.user

    def do(self, instruction: str, value: str) -> None:
        """One instruction. Raises CalledProcessError for a command that fails."""
        if instruction == "RUN":
            words = value
            while words.startswith("--"):
                words = words.partition(" ")[2].lstrip()
            self.run(["/bin/sh", "-c", words])
        elif instruction in ("ENV", "ARG"):
            for pair in shlex.split(value):
                name, _, given = pair.partition("=")
                if instruction == "ENV" or name not in self.environment:
                    self.environment[name] = self.overrides.get(name, Template(given).safe_substitute(self.environment))
        elif instruction == "WORKDIR":
            self.directory = value
            self.inside(value).mkdir(parents=True, exist_ok=True)
        elif instruction == "USER":
            self.user = value
        elif instruction == "COPY":
            self.copy(value.split())
        else:
            self.instructions[instruction] = value  # of the finished image

    def inside(self, path: str) -> Path:
        return self.root / (Path(self.directory) / path).relative_to("/")

    def run(self, command: list[str], *, pivot: bool = False) -> None:
        """As the image's user. pivot: with the image as the root of a mount namespace, as a container has it; in a
        changed root alone Linux makes no user namespaces."""
        uid, gid = self.user.split(":")
        users = [line.split(":") for line in self.inside("/etc/passwd").read_text().splitlines()]
        home = {"HOME": next(user[5] for user in users if user[2] == uid)}
        as_user = ["setpriv", f"--reuid={uid}", f"--regid={gid}", "--clear-groups"]
        place = ["env", f"--chdir={self.directory}"]
        into = ["unshare", "--mount", "sh", "-c", _PIVOT, "sh"] if pivot else ["chroot"]
        subprocess.run([*into, self.root, *as_user, *place, *command], check=True, env=self.environment | home)

    def copy(self, words: list[str]) -> None:
        *sources, target = [w for w in words if not w.startswith("--")]
        if any(w.startswith("--from=") for w in words):
            if sources != [target] or not self.inside(target).exists():
                raise RuntimeError(f"COPY {' '.join(words)}: there is no {target} of an earlier stage")
            return
        for source in sources:
            if source == ".":
                shutil.copytree(ROOT, self.inside(target), ignore=ignored, dirs_exist_ok=True)
            elif not included(source):
                raise RuntimeError(f"COPY {source}: .dockerignore leaves it out")
            else:
                shutil.copy(ROOT / source, self.inside(target))


def included(path: str) -> bool:
    """Whether .dockerignore leaves a path of the repository in. Its last line that matches decides."""
    answer = True
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if line and not line.startswith("#"):
            pattern = line.removeprefix("!")
            parts = [*Path(path).parts] if pattern.startswith("**/") else [str(Path(*Path(path).parts[:1]))]
            if any(fnmatch(part, pattern.removeprefix("**/")) for part in parts):
                answer = line.startswith("!")
    return answer


def ignored(folder: str, names: list[str]) -> set[str]:
    """For shutil.copytree."""
    return {name for name in names if not included(str((Path(folder) / name).relative_to(ROOT)))}


def build(arguments: argparse.Namespace) -> None:
    """All steps, the health check and the command."""
    stages = needed(stages_of((ROOT / "Dockerfile").read_text(), {"DEVICE": "cpu"}))
    image = Image(arguments.folder, dict(pair.split("=", 1) for pair in arguments.env))
    fresh = image.state()
    ended = {}  # a stage goes on with the settings of the one it is made from
    for stage in stages:
        image.environment, image.directory, image.user = ended.get(stage.base, fresh)
        for instruction, value in stage.steps:
            start = time.monotonic()
            print(f"[{stage.name}] {instruction} {value[:100]}", flush=True)
            image.do(instruction, value)
            if instruction in ("RUN", "COPY"):
                print(f"[{stage.name}] {time.monotonic() - start:.1f} s", flush=True)
        ended[stage.name] = image.state()
    check = image.instructions["HEALTHCHECK"]
    command = json.loads(image.instructions["ENTRYPOINT"]) + json.loads(image.instructions["CMD"])
    for what in (json.loads(check[check.index("[") :]), [*command, *SHORT]):
        print(f"[image] {shlex.join(what)}", flush=True)
        image.run(what)
    programs = Path("/tmp/hostile")  # the tests are no part of the image
    shutil.copytree(ROOT / "tests", image.inside(str(programs / "tests")))
    image.environment["PYTHONPATH"] = str(programs)
    hostile = ["python", "-m", "tests.hostile", "--inside"]
    print(f"[image] {shlex.join(hostile)}", flush=True)
    image.run(hostile, pivot=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--env", action="append", default=[], metavar="NAME=VALUE", help="whatever ENV says")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)  # given by the call of itself below
    arguments = parser.parse_args()
    if os.geteuid() != 0:
        print("image_steps: this mounts an overlay and changes root: run it as root", file=sys.stderr)
        return 2
    if arguments.folder is not None:
        build(arguments)
        return 0
    free = shutil.disk_usage(tempfile.gettempdir()).free
    if free < ROOM:
        print(
            f"image_steps: {tempfile.gettempdir()} has {free / 1e9:.0f} GB free, and an image takes up to "
            f"{ROOM / 1e9:.0f}: make room, or name another place in TMPDIR",
            file=sys.stderr,
        )
        return 2
    folder = Path(tempfile.mkdtemp(prefix="image-"))
    namespaces = ["unshare", "--mount", "--pid", "--fork", "--kill-child"]
    try:
        return subprocess.run([*namespaces, sys.executable, __file__, *sys.argv[1:], "--folder", folder]).returncode
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    sys.exit(main())
