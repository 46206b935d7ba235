"""The pages name only what there is: fields, metrics, error messages, files."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import get_args

import pytest
from pydantic import BaseModel

from pipeline.commands.main import COMMANDS
from pipeline.config import Config
from pipeline.config.precision import MOVED
from pipeline.config.rewards import MOVED as MOVED_REWARDS
from pipeline.observe.sinks.alerts import known_metrics

ROOT = Path(__file__).parents[1]
ROOMS = ("pipeline", "megatron_ext", "scripts", "tests", "configs", "examples")
MADE = ("config.md",)
"""Pages made from the code, which cannot know where it is installed."""
THEIR_OWN = {"grading.py", "pipeline.py", "checks.py", "my_environment.py", "my_agent.py"}
"""Files that a page tells its reader to write."""
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@cache
def messages() -> list[str]:
    """Every text of the source with {} for its values."""
    found = []
    for package in ("pipeline", "megatron_ext"):
        for file in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    parts = [p.value if isinstance(p, ast.Constant) else "{}" for p in node.values]
                    found.append("".join(map(str, parts)))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
    return found


def field_exists(path: list[str]) -> bool:
    """Whether the configuration has the field a.b.c; below a free mapping anything is."""
    models: list[type[BaseModel]] = [Config]
    for position, part in enumerate(path):
        fields = [model.model_fields[part] for model in models if part in model.model_fields]
        if not fields:
            return False
        types, models = [field.annotation for field in fields], []
        while types:
            kind = types.pop()
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                models.append(kind)
            types += get_args(kind)
        if not models:
            return position == len(path) - 1 or "dict" in str(fields[0].annotation)
    return True


def function_exists(module: str, name: str) -> bool:
    """Whether it is a function of a module, as a page of formulas names it."""
    files = (ROOT / "pipeline").rglob(f"{module}.py")
    return any(f"\ndef {name}(" in file.read_text(encoding="utf-8") for file in files)


def test_a_field_that_a_page_names_is_one_of_the_configuration():
    assert field_exists(["train", "lr"])
    assert field_exists(["observe", "wandb", "mode"])
    assert not field_exists(["train", "stepz"])
    sections = "|".join(Config.model_fields)
    wrong = [
        f"{page.name}: {found}"
        for page in PAGES
        for found in re.findall(rf"(?<![\w./-])(?:{sections})(?:\.[a-z_]\w*)+(?![\w/(])", page.read_text())
        if not re.search(r"\.(py|md|yaml|jsonl?|html|png|log|safetensors|stepz)$", found)
        and not field_exists(found.split("."))
        and found not in {*MOVED, *MOVED_REWARDS}  # the page says where it has gone
        and not function_exists(*found.split(".")[:2])
    ]
    assert wrong == []


def test_a_metric_that_a_page_names_is_measured():
    families = known_metrics()
    wrong = [
        f"{page.name}: {family}/{name}"
        for page in PAGES
        for family, name in re.findall(rf"(?<![\w/.])({'|'.join(families)})/(\w+)", page.read_text())
        if f"{family}/{name}" not in families[family]
    ]
    assert wrong == []


def test_a_file_that_a_page_links_or_runs_is_there():
    for page in PAGES:
        text = page.read_text()
        linked = [page.parent / link for link in re.findall(r"\]\(([^)#:]+)\)", text)]
        run = [
            ROOT / file
            for file in re.findall(r"\b((?:scripts|tests|configs|examples)/(?!NAME)[\w/.-]+\.(?:py|yaml|sbatch))", text)
        ]
        assert [str(file) for file in (*linked, *run) if not file.exists()] == [], page
    index = (ROOT / "docs" / "README.md").read_text()
    assert [page.name for page in PAGES[1:] if page.name != "README.md" and f"({page.name})" not in index] == []


def test_a_source_file_or_folder_that_a_page_names_is_there():
    files = [str(file.relative_to(ROOT)) for room in ROOMS for file in (ROOT / room).rglob("*") if file.is_file()]
    wrong = []
    for page in PAGES:
        for words in re.findall(r"`([^`\n]+)`", page.read_text()):
            for name in re.findall(
                r"(?<![\w/.-])((?:\w[\w.-]*/)*\w+\.py|(?:pipeline|megatron_ext|scripts)(?:/\w+)*/)", words
            ):
                if name.rpartition("/")[2] in THEIR_OWN:
                    continue
                there = (
                    (ROOT / name).is_dir() if name.endswith("/") else any(f"/{f}".endswith(f"/{name}") for f in files)
                )
                if not there:
                    wrong.append(f"{page.name}: {name}")
    assert wrong == []


def test_a_command_to_be_typed_is_written_in_one_way():
    """`.venv/bin/sameroute ...`, so that it works without a step before it; the name alone is `sameroute train`."""
    lines = [(page.name, line) for page in PAGES if page.name not in MADE for line in page.read_text().splitlines()]
    commands = "|".join(COMMANDS)
    name = rf"sameroute (?:{commands})(?: slurm| to-megatron| to-hf| to-peft)?"
    wrong = [
        f"{page}: {line}"
        for page, line in lines
        if re.search(rf"^ {{4,}}(?:sameroute (?:{commands}|--)|pytest |python )", line)
        or any(not re.fullmatch(name, words) for words in re.findall(r"`(sameroute [^`]+)`", line))
        or re.search(r"`(?:pytest|python) [^`]", line)
    ]
    assert wrong == []


def test_a_command_that_a_page_shows_is_one_that_the_parser_takes():
    wrong = []
    for page in PAGES:
        for command in re.findall(r"\.venv/bin/sameroute (\S+)", page.read_text()):
            if command.strip("`,.") not in (*COMMANDS, "--version", "--help"):
                wrong.append(f"{page.name}: {command}")
    assert wrong == []


def programs() -> list[tuple[str, str]]:
    """Programs of library.md, each with what the page says that it prints."""
    page = (ROOT / "docs" / "library.md").read_text(encoding="utf-8")
    return re.findall(r"```python\n(.*?)```.*?```text\n(.*?)```", page, re.DOTALL)


@pytest.mark.parametrize("number", [0, 1])
def test_a_program_of_the_library_page_runs_as_it_stands_and_prints_what_the_page_says(number):
    assert len(programs()) == 2
    program, printed = programs()[number]
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout == printed


def symptoms() -> list[str]:
    """What the tables of troubleshoot.md quote in their first column as words of this project."""
    rows = [line.split("|")[1] for line in (ROOT / "docs" / "troubleshoot.md").read_text().splitlines() if "|" in line]
    quoted = [words for row in rows for words in re.findall(r"`([^`]+)`", row)]
    return [words for words in quoted if " " in words]


@pytest.mark.parametrize("symptom", symptoms())
def test_an_error_that_the_table_explains_is_one_that_is_raised(symptom):
    pattern = ".*".join(re.escape(words.strip()) for words in symptom.split("..."))
    assert any(re.search(pattern, message, re.DOTALL) for message in messages())


def test_the_table_explains_many():
    assert len(symptoms()) > 40


def test_the_walk_from_an_answer_to_the_gradient_is_twelve_files_with_what_it_says_of_each():
    page = (ROOT / "docs" / "architecture.md").read_text()
    rows = re.findall(r"^\| (\d+) \| `([\w/.]+)` \| (.+) \|$", page, re.MULTILINE)
    assert [int(number) for number, _, _ in rows] == list(range(1, 13))
    assert len({file for _, file, _ in rows}) == 12
    for _, file, words in rows:
        source, names = (ROOT / file).read_text(), re.findall(r"`(\w+)`", words)
        assert re.search(rf"^(def|class) {names[0]}\b", source, re.MULTILINE), f"{file} does not define {names[0]}"
        assert [name for name in names if not re.search(rf"\b{name}\b", source)] == [], file
    picture = (ROOT / "docs" / "figures" / "architecture.svg").read_text()
    drawn = re.findall(r">(\d+)\. ([\w/.]+)<", picture)
    assert [int(number) for number, _ in drawn] == list(range(1, 13))
    assert all(file.endswith(f"/{name}") or file == name for (_, name), (_, file, _) in zip(drawn, rows, strict=True))


def test_the_page_of_the_architecture_has_every_room():
    page = (ROOT / "docs" / "architecture.md").read_text()
    rooms = [
        f"{entry.name}/" if entry.is_dir() else entry.name
        for package in ("pipeline", "megatron_ext")
        for entry in (ROOT / package).iterdir()
        if (entry.suffix == ".py" or (entry / "__init__.py").exists()) and entry.name != "__init__.py"
    ]
    assert [room for room in rooms if not re.search(rf"[`/]{re.escape(room)}[`\]]", page)] == []
