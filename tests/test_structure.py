"""The plan of the house, held against the code: what may import what, no circles, no crowded rooms, no double names.

An import under `if TYPE_CHECKING:` is for readers and type checkers and does not count.
"""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from collections import Counter, defaultdict
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("pipeline", "megatron_ext")
LARGEST_ROOM = 14
"""Files of one folder, about a dozen, besides __init__.py."""

# From the bottom up. A room may import those on the lines before its own, and itself.
ROOMS = """
pipeline.errors pipeline.imports pipeline.http pipeline.socket_folder pipeline.forks pipeline.text pipeline.say
pipeline.deaf pipeline.engine_fields pipeline.waiting
pipeline.stored pipeline.arrays pipeline.teaching
pipeline.types
pipeline.step
pipeline.objectives
pipeline.config
pipeline.rewards pipeline.cluster pipeline.dumps pipeline.disk pipeline.restart_budget
pipeline.data pipeline.engine pipeline.observe
pipeline.weights pipeline.rollout
pipeline.environments
pipeline.evaluation
pipeline.plan
pipeline.trainer
pipeline.checkpoints pipeline.diagnose
pipeline.loop
pipeline.commands
"""

SAME_NAME = {
    "alerts": {"pipeline.config", "pipeline.observe.sinks"},  # the rules of alerts, and who sends them
    "chat": {"pipeline.data", "pipeline.commands"},  # conversations: their template, and the command
    "config": {"pipeline.objectives", "megatron_ext"},  # settings of the folder they stand in
    "gpt_oss": {"megatron_ext.hf.families", "pipeline.engine.inside.cpu.models"},  # the model, in either engine
    "llama": {"megatron_ext.hf.families", "pipeline.engine.inside.cpu.models"},  # the same
    "mixtral": {"megatron_ext.hf.families", "pipeline.engine.inside.cpu.models"},  # the same
    "page": {"pipeline.evaluation", "pipeline.observe.report", "pipeline.diagnose"},  # a page in HTML
    "patches": {"pipeline.engine.inside.cpu", "megatron_ext.cpu"},  # what an engine needs without CUDA
    "plan": {"pipeline.plan", "pipeline.commands"},  # the plan, and its command
    "processes": {"pipeline.engine", "pipeline.rewards"},  # those of an engine or a verifier, and their end
    "replay": {"pipeline.config", "megatron_ext.batch"},  # router replay: its kinds, and the routers
    "run": {"pipeline.config", "pipeline.loop"},  # a run: its settings, and what it does
    "sampling": {"pipeline.engine", "pipeline.plan"},  # how answers are drawn, and what drawing them takes
    "server": {"pipeline.config", "pipeline.engine"},  # an SGLang server: its settings, and its process
    "types": {"pipeline", "pipeline.objectives"},  # what flows through the folder they stand in
    "verifiers": {"pipeline.config.rewards", "pipeline.environments.connectors"},  # what grades; a package
}
"""File names that stand twice, and where: each means one thing wherever it stands. Any other name stands once."""

ENGINES = {"torch", "transformers", "ray", "sglang", "megatron"}


def modules() -> dict[str, Path]:
    found = {}
    for package in PACKAGES:
        for file in (ROOT / package).rglob("*.py"):
            name = ".".join(file.relative_to(ROOT).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = file
    return found


MODULES = modules()


def imports(source: str, package: str = "") -> set[str]:
    """Modules that a source imports when it or one of its functions runs. package: that it stands in."""
    tree = ast.parse(source)
    for_readers = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"
        for statement in node.body
        for inner in ast.walk(statement)
    }
    found = set()
    for node in ast.walk(tree):
        if id(node) in for_readers:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            origin = ".".join([*above, *([node.module] if node.module else [])])
            inner = {f"{origin}.{alias.name}" for alias in node.names}
            found |= (inner & MODULES.keys()) or {origin}
        elif isinstance(node, ast.Call) and "import_module" in (
            getattr(node.func, "attr", ""),
            getattr(node.func, "id", ""),
        ):
            found |= {
                word.value for word in node.args if isinstance(word, ast.Constant) and isinstance(word.value, str)
            }
    return found


def package_of(module: str, file: Path) -> str:
    return module if file.name == "__init__.py" else module.rpartition(".")[0]


@functools.cache
def all_imports() -> dict[str, set[str]]:
    return {name: imports(file.read_text(), package_of(name, file)) for name, file in MODULES.items()}


def ours() -> dict[str, set[str]]:
    return {name: {other for other in found if other in MODULES} for name, found in all_imports().items()}


def room_of(module: str) -> str:
    """The folder below the package that a module stands in, or the module itself where it stands in none."""
    return ".".join(module.split(".")[:2])


def room_imports() -> dict[str, dict[str, set[str]]]:
    """room -> room that it imports -> the imports, as "a -> b"."""
    out: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for module, found in ours().items():
        for other in found:
            if room_of(module) != room_of(other):
                out[room_of(module)][room_of(other)].add(f"{module} -> {other}")
    return out


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import pipeline.loop.stop as stop", "pipeline.loop.stop"),
        ("from pipeline import loop", "pipeline.loop"),
        ("from pipeline.loop.stop import StopRequest", "pipeline.loop.stop"),
        ("from ..loop.stop import StopRequest", "pipeline.loop.stop"),
        ("from .. import loop", "pipeline.loop"),
        ("from . import admission", "pipeline.rollout.admission"),
        ("def late():\n    import pipeline.loop.stop", "pipeline.loop.stop"),
        ("import importlib\nimportlib.import_module('pipeline.loop.stop')", "pipeline.loop.stop"),
        ("if TYPE_CHECKING:\n    pass\nelse:\n    import pipeline.loop.stop", "pipeline.loop.stop"),
        ("if TYPE_CHECKING:\n    import pipeline.loop.stop", None),
    ],
)
def test_every_way_to_import_is_seen(source, found):
    assert imports(source, "pipeline.rollout") - {"importlib"} == ({found} if found else set())


def test_no_module_and_no_room_is_in_a_circle():
    for graph in (ours(), room_imports()):
        try:
            list(TopologicalSorter({name: set(found) for name, found in graph.items()}).static_order())
        except CycleError as error:
            pytest.fail(f"a circle: {' -> '.join(error.args[1])}")


def test_rooms_import_downwards_only():
    level = {room: height for height, line in enumerate(ROOMS.split("\n")) for room in line.split()}
    against = []
    for room, found in room_imports().items():
        for other, which in found.items():
            if room.startswith("pipeline.") and other.startswith("pipeline.") and not level[other] < level[room]:
                against += sorted(which)
    assert against == []


def test_every_room_has_its_place_and_every_place_a_room():
    rooms = {room_of(module) for module in MODULES if module.startswith("pipeline.")}
    assert rooms == set(ROOMS.split())


def test_megatron_is_imported_by_its_own_package_alone_and_that_knows_nothing_of_the_pipeline():
    wrong = [
        f"{module} imports {other}"
        for module, found in all_imports().items()
        for other in found
        if (module.startswith("pipeline") and other.split(".")[0] == "megatron")
        or (module.startswith("megatron_ext") and other.split(".")[0] in ("pipeline", "ray", "sglang", "aiohttp"))
    ]
    assert wrong == []
    beside = [ROOT / "sameroute.py", *(ROOT / "scripts").glob("*.py")]
    assert [f.name for f in beside if {other.split(".")[0] for other in imports(f.read_text())} & {"megatron"}] == []


def test_objectives_know_tensors_only():
    allowed = {"torch", "numpy", "pydantic", "pipeline", "megatron_ext"}
    for module, found in all_imports().items():
        if module.startswith("pipeline.objectives"):
            outside = {o.split(".")[0] for o in found} - allowed - set(sys.stdlib_module_names)
            assert outside == set(), module
            assert all(o.startswith(("pipeline.objectives", "megatron_ext.config")) for o in found if o in MODULES), (
                module
            )


@pytest.mark.parametrize("module", ["pipeline.config", "pipeline.commands.main", "pipeline.step"])
def test_what_stands_below_can_be_read_without_an_engine(module):
    script = f"import sys, {module}; print(*{{m.partition('.')[0] for m in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert set(done.stdout.split()).isdisjoint(ENGINES)


def test_a_configuration_never_imports_an_engine_also_not_later():
    wrong = {
        module: engines
        for module, found in all_imports().items()
        if module.startswith("pipeline.config") and (engines := {other.split(".")[0] for other in found} & ENGINES)
    }
    assert wrong == {}


def test_no_room_is_crowded():
    counts = Counter(file.parent.relative_to(ROOT) for file in MODULES.values() if file.name != "__init__.py")
    assert {str(folder): n for folder, n in counts.items() if n > LARGEST_ROOM} == {}


def test_a_file_name_means_one_thing():
    places: dict[str, set[str]] = defaultdict(set)
    for module, file in MODULES.items():
        if file.name != "__init__.py":
            places[file.stem].add(module.rpartition(".")[0])
    assert {name: found for name, found in places.items() if len(found) > 1} == SAME_NAME
