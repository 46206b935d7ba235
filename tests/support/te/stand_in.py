"""Transformer Engine's own Python without its C++ module: its layers can be built here, and its kernels raise.

`make setup` puts the Python of the pinned version into .venv/transformer-engine, beside the environment and not in it:
in every other process Transformer Engine stays uninstalled. Call `install` in a process of its own, before
Megatron-Core is imported.
"""

from __future__ import annotations

import enum
import importlib.metadata
import os
import re
import sys
import types
from pathlib import Path
from typing import Any

from tests.support.stand_ins import StandIns

ROOT = Path(__file__).parents[3]
PINNED = dict(line.split("==") for line in (ROOT / "requirements-gpu.lock").read_text().split() if "==" in line)
VERSION = PINNED["transformer-engine"]
FOLDER = ROOT / ".venv" / "transformer-engine"

_DTYPES = ("kByte", "kInt32", "kFloat32", "kFloat16", "kBFloat16", "kFloat8E4M3", "kFloat8E5M2", "kFloat4E2M1")
_ENUMERATIONS = (
    "NVTE_QKV_Format", "NVTE_QKV_Layout", "NVTE_Softmax_Type", "NVTE_Mask_Type", "NVTE_Bias_Type",
    "NVTE_Activation_Type", "NVTE_Fused_Attn_Backend", "NVTEScalingMode", "CommOverlapType", "CommOverlapAlgo",
    "FP8FwdTensors", "FP8BwdTensors", "Float8BlockScaleTensorFormat",
)  # fmt: skip
_UNUSED = ("onnxscript", "onnx", "nvdlfw_inspect")  # exporters and a debugger, which it imports


class KernelCalledError(RuntimeError):
    """What only a GPU computes was asked for."""


class _Made:
    """A class or a function of the C++ module."""

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise KernelCalledError("a kernel of Transformer Engine was called")


class _Extension(types.ModuleType):
    """The C++ module: enumerations with the members that its Python uses, and whatever else is asked for."""

    def __init__(self, name: str, enumerations: dict[str, list[str]]):
        super().__init__(name)
        self.__dict__["enumerations"] = enumerations

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name in self.enumerations:
            made = enum.IntEnum(name, {member: i for i, member in enumerate(self.enumerations[name])})
        elif name[0].isupper():
            made = type(name, (_Made,), {})
        else:
            made = _Made()
        setattr(self, name, made)
        return made


def _enumerations() -> dict[str, list[str]]:
    """Name and members of each enumeration of the C++ module, as far as its Python writes them."""
    text = "\n".join(file.read_text() for file in sorted(FOLDER.glob("transformer_engine/**/*.py")))
    found: dict[str, list[str]] = {name: [] for name in _ENUMERATIONS}
    for name, member in re.findall(rf"\b({'|'.join(_ENUMERATIONS)})\.([A-Za-z]\w+)", text):
        if member not in (*found[name], "value", "name"):
            found[name].append(member)
    for short in ("RoutingMapFormat", "QBHistogramMode"):  # it writes these under names of its own
        found["NVTE" + short] = sorted(set(re.findall(rf"\b{short}\.(\w+)", text)))
    return found | {"DType": list(_DTYPES)}


def install() -> None:
    """Make `import transformer_engine` work. Raises AssertionError where another version, or none, lies there."""
    there = list(FOLDER.glob("transformer_engine-*.dist-info"))
    assert there, f"{FOLDER} holds no Transformer Engine; make setup puts it there"
    assert there[0].name == f"transformer_engine-{VERSION}.dist-info", f"{there[0]} is not {VERSION}; run make setup"
    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # it looks for no shared objects
    sys.path.insert(0, str(FOLDER))
    importlib.invalidate_caches()
    sys.meta_path.insert(0, StandIns(*_UNUSED))
    sys.modules["transformer_engine_torch"] = _Extension("transformer_engine_torch", _enumerations())
    sys.modules["flashinfer"] = sys.modules["flash_attn"] = None  # pyright: ignore[reportArgumentType]
    import transformer_engine.common as common

    common.load_framework_extension = lambda *args, **kwargs: None
