"""What a step trained on, as one file that can be read again without a server.

dumps/step_000012.safetensors holds flat arrays, all rollouts one behind the other in the order of training:

    group_sizes       [groups] int32       rollouts of each prompt
    prompts           [bytes] uint8        JSON, a list of {text, metadata, index}
    prompt_lengths    [groups] int32       P
    prompt_ids        [sum P] int32
    response_lengths  [rollouts] int32     N
    response_ids      [sum N] int32
    rollout_logprobs  [sum N] float32      nats, at the sampling temperature, over the kept tokens if any
    weight_versions   [sum N] int32
    finish_reasons    [rollouts] uint8     position in FINISH_REASONS
    rewards           [rollouts] float32
    has_routes        [rollouts] bool
    routes            [sum of P + N - 1 where has_routes, layers, topk] uint8 or int16; absent where no rollout has any
    kept              [sum N, K] int32, as Rollout says; absent where sampling was from the whole vocabulary

and in its header: format, format_version, step, weight_version, temperature. Nothing in it is code, and a file appears
whole or not at all.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import NOT_STARTED, SamerouteError
from pipeline.types import FinishReason, Group, Prompt, Rollout, stack_kept

FORMAT, FORMAT_VERSION = "sameroute.rollouts", 1
FINISH_REASONS: tuple[FinishReason, ...] = ("stop", "length", "abort")
_ARRAYS: dict[str, tuple[str, ...]] = {
    "group_sizes": ("int32",),
    "prompts": ("uint8",),
    "prompt_lengths": ("int32",),
    "prompt_ids": ("int32",),
    "response_lengths": ("int32",),
    "response_ids": ("int32",),
    "rollout_logprobs": ("float32",),
    "weight_versions": ("int32",),
    "finish_reasons": ("uint8",),
    "rewards": ("float32",),
    "has_routes": ("bool",),
    "routes": ("uint8", "int16"),
    "kept": ("int32",),
}
_OPTIONAL = {"routes": 3, "kept": 2}
"""Arrays that a step may lack, and their dimensions; all others have one."""


class DumpError(SamerouteError, ValueError):
    """A dump cannot be written, read or used; the message says which and why."""

    exit_code = NOT_STARTED


@dataclass(frozen=True)
class Dump:
    """One step's rollouts.

    step:           its number in the run that sampled them.
    weight_version: of the weights that the trainer held when the step began.
    temperature:    of the log-probs.
    groups:         graded.
    """

    step: int
    weight_version: int
    temperature: float
    groups: tuple[Group, ...]


def dump_path(directory: Path, step: int) -> Path:
    """Where a step's dump lies."""
    return directory / f"step_{step:06d}.safetensors"


def write_dump(directory: Path, dump: Dump) -> Path:
    """Write a step into a directory, which is made where there is none; returns the file.

    Raises DumpError for what could not be read back as it is: an ungraded group, a rollout with another prompt than its
    group's, an array of another dtype or length than Rollout says, routes of two shapes, a number that is not finite,
    or metadata that JSON does not hold.
    """
    from safetensors.numpy import save_file

    arrays = _flatten(dump.groups)
    _check(arrays)
    header = {
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        "step": str(dump.step),
        "weight_version": str(dump.weight_version),
        "temperature": repr(float(dump.temperature)),
    }
    directory.mkdir(parents=True, exist_ok=True)
    target = dump_path(directory, dump.step)
    partial = target.with_name(f".{target.name}.partial")
    save_file(arrays, partial, header)
    partial.chmod(0o644)  # safetensors 0.8 writes for its owner only
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(partial, target)
    return target


def read_dump(path: str | Path) -> Dump:
    """Read a file that `write_dump` wrote. Raises DumpError for any other, naming what is wrong with it."""
    path = Path(path)
    header, arrays = _open(path, header_only=False)
    try:
        _check(arrays)
        groups = _restore(arrays)
    except DumpError as error:
        raise DumpError(f"{path}: {error}") from error
    return Dump(int(header["step"]), int(header["weight_version"]), float(header["temperature"]), groups)


def read_step(path: str | Path) -> int:
    """The step of a dump, from its header alone. Raises DumpError for a file that is no dump, or not a whole one."""
    return int(_open(Path(path), header_only=True)[0]["step"])


def _flatten(groups: Sequence[Group]) -> dict[str, np.ndarray]:
    """Arrays of all groups. Raises DumpError for what would be lost in them; `_check` looks at the rest."""
    rollouts = [r for g in groups for r in g.rollouts]
    if not rollouts:
        raise DumpError("a step without rollouts cannot be dumped")
    for group in groups:
        where = f"prompt {group.prompt.index}"
        if len(group.rewards) != len(group.rollouts):
            raise DumpError(f"{where} has {len(group.rewards)} rewards for {len(group.rollouts)} rollouts")
        for rollout in group.rollouts:
            if not np.array_equal(rollout.prompt_ids, group.prompt.ids):
                raise DumpError(f"{where} has a rollout of another prompt")
            if not len(rollout) == len(rollout.rollout_logprobs) == len(rollout.weight_versions):
                raise DumpError(f"{where} has a rollout whose arrays differ in length")
            rows = len(rollout.prompt_ids) + len(rollout) - 1
            if rollout.routes is not None and len(rollout.routes) != rows:
                raise DumpError(f"{where} has {len(rollout.routes)} route rows for {rows} input tokens")
            if rollout.kept is not None and len(rollout.kept) != len(rollout):
                raise DumpError(f"{where} has {len(rollout.kept)} kept sets for {len(rollout)} tokens")
    routes = [r.routes for r in rollouts if r.routes is not None]
    kinds = {f"{rows.shape[1:]} {rows.dtype}" for rows in routes}
    if len(kinds) > 1:
        raise DumpError(f"routes of one step have one shape and dtype, not {' and '.join(sorted(kinds))}")
    kept = [r.kept for r in rollouts if r.kept is not None]
    if kept and len(kept) != len(rollouts):
        raise DumpError(f"{len(kept)} of {len(rollouts)} rollouts have kept tokens; a step has them for all or none")
    arrays = {
        "group_sizes": np.array([len(g.rollouts) for g in groups], np.int32),
        "prompts": np.frombuffer(_prompts_json([g.prompt for g in groups]), np.uint8),
        "prompt_lengths": np.array([len(g.prompt.ids) for g in groups], np.int32),
        "prompt_ids": np.concatenate([g.prompt.ids for g in groups]),
        "response_lengths": np.array([len(r) for r in rollouts], np.int32),
        "response_ids": np.concatenate([r.response_ids for r in rollouts]),
        "rollout_logprobs": np.concatenate([r.rollout_logprobs for r in rollouts]),
        "weight_versions": np.concatenate([r.weight_versions for r in rollouts]),
        "finish_reasons": np.array([FINISH_REASONS.index(r.finish_reason) for r in rollouts], np.uint8),
        "rewards": np.concatenate([g.rewards for g in groups]),
        "has_routes": np.array([r.routes is not None for r in rollouts]),
    }
    arrays |= {"routes": np.concatenate(routes)} if routes else {}
    return arrays | ({"kept": stack_kept(kept)} if kept else {})


def _prompts_json(prompts: Sequence[Prompt]) -> bytes:
    rows = []
    for prompt in prompts:
        row = {"text": prompt.text, "metadata": prompt.metadata, "index": prompt.index}
        try:
            text = json.dumps(row, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise DumpError(f"the metadata of prompt {prompt.index} is not JSON: {error}") from error
        if json.loads(text) != row:  # a tuple, a key that is no text
            raise DumpError(f"the metadata of prompt {prompt.index} changes in JSON: {prompt.metadata}")
        rows.append(text)
    return f"[{','.join(rows)}]".encode()


def _open(path: Path, *, header_only: bool) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    """Header and arrays of a file; what the header says, and the arrays' names, are checked."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            header = file.metadata() or {}
            names = set(file.keys())
            arrays = {} if header_only else {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        raise DumpError(f"{path} is no safetensors file, or not a whole one: {error}") from error
    if header.get("format") != FORMAT:
        raise DumpError(f"{path} is no dump of rollouts: its header says format {header.get('format')!r}")
    if header.get("format_version") != str(FORMAT_VERSION):
        raise DumpError(f"{path} has format version {header.get('format_version')}; this code reads {FORMAT_VERSION}")
    for name, read in (("step", int), ("weight_version", int), ("temperature", float)):
        _number(path, header, name, read)
    if names - _OPTIONAL.keys() != _ARRAYS.keys() - _OPTIONAL.keys():
        odd = sorted((names ^ _ARRAYS.keys()) - _OPTIONAL.keys())
        raise DumpError(f"{path} lacks or has more than it should: {', '.join(odd)}")
    return header, arrays


def _number(path: Path, header: dict[str, str], name: str, read: Callable[[str], float]) -> None:
    try:
        value = read(header[name])
    except (KeyError, ValueError) as error:
        raise DumpError(f"{path}: its header has no number {name}, but {header.get(name)!r}") from error
    if not (math.isfinite(value) and value >= 0):
        raise DumpError(f"{path}: its header has {name} {value}")


def _check(arrays: dict[str, np.ndarray]) -> None:
    """Raise DumpError where dtypes, lengths or values cannot be those of a step."""
    for name, array in arrays.items():
        _must(array.dtype.name in _ARRAYS[name], f"{name} is {array.dtype}, not {' or '.join(_ARRAYS[name])}")
        _must(array.ndim == _OPTIONAL.get(name, 1), f"{name} has shape {list(array.shape)}")
    sizes, prompt_lengths, lengths = (arrays[n] for n in ("group_sizes", "prompt_lengths", "response_lengths"))
    _must(len(sizes) and sizes.min() > 0, "a group has no rollouts")
    _must(prompt_lengths.min(initial=1) > 0, "a prompt has no tokens")
    _must(lengths.min(initial=0) >= 0, "a response has a negative length")
    count, tokens = int(sizes.sum(dtype=np.int64)), int(lengths.sum(dtype=np.int64))
    expected = {"kept": tokens} if "kept" in arrays else {}
    expected |= dict.fromkeys(("response_lengths", "finish_reasons", "rewards", "has_routes"), count)
    expected |= dict.fromkeys(("response_ids", "rollout_logprobs", "weight_versions"), tokens)
    expected |= {"prompt_lengths": len(sizes), "prompt_ids": int(prompt_lengths.sum(dtype=np.int64))}
    for name, size in expected.items():
        _must(len(arrays[name]) == size, f"{name} has {len(arrays[name])} entries, not {size}")
    for name in ("prompt_ids", "response_ids", "weight_versions"):
        _must(arrays[name].min(initial=0) >= 0, f"{name} holds {arrays[name].min(initial=0)}")
    for name in ("rollout_logprobs", "rewards"):
        _must(np.isfinite(arrays[name]).all(), f"{name} holds a number that is not finite")
    _must(arrays["rollout_logprobs"].max(initial=0) <= 1e-3, "rollout_logprobs holds a number above 0")
    _must(arrays["finish_reasons"].max(initial=0) < len(FINISH_REASONS), "finish_reasons holds an unknown one")
    if "kept" in arrays:
        kept = arrays["kept"]
        _must(kept.min(initial=-1) >= -1, f"kept holds token {kept.min(initial=-1)}")
        _must((kept == arrays["response_ids"][:, None]).any(1).all(), "kept lacks a token that was sampled")
    if "routes" in arrays:
        routes, rows = arrays["routes"], _route_rows(arrays).sum()
        _must(len(routes) == rows, f"routes has {len(routes)} rows, not {rows}")
        _must(routes.min(initial=0) >= 0, f"routes holds expert {routes.min(initial=0)}")
    else:
        _must(not arrays["has_routes"].any(), "there are no routes, though has_routes says so")


def _route_rows(arrays: dict[str, np.ndarray]) -> np.ndarray:
    """[rollouts] int64: rows that each rollout has in `routes`."""
    prompts = np.repeat(arrays["prompt_lengths"].astype(np.int64), arrays["group_sizes"])
    return np.where(arrays["has_routes"], prompts + arrays["response_lengths"] - 1, 0)


def _restore(arrays: dict[str, np.ndarray]) -> tuple[Group, ...]:
    """The groups of checked arrays. Raises DumpError for prompts that are not what they should be."""

    def split(name: str, lengths: np.ndarray) -> list[np.ndarray]:
        return np.split(arrays[name], np.cumsum(lengths, dtype=np.int64)[:-1])

    sizes, lengths, has_routes = (arrays[n] for n in ("group_sizes", "response_lengths", "has_routes"))
    prompts = _read_prompts(arrays["prompts"], split("prompt_ids", arrays["prompt_lengths"]))
    rows = split("routes", _route_rows(arrays)) if "routes" in arrays else [None] * len(lengths)
    kept = [_narrow(k) for k in split("kept", lengths)] if "kept" in arrays else [None] * len(lengths)
    rollouts = iter(
        zip(
            *(split(name, lengths) for name in ("response_ids", "rollout_logprobs", "weight_versions")),
            (r if has else None for r, has in zip(rows, has_routes, strict=True)),
            (FINISH_REASONS[i] for i in arrays["finish_reasons"]),
            kept,
            strict=True,
        )
    )
    groups = []
    for prompt, size, rewards in zip(prompts, sizes, split("rewards", sizes), strict=True):
        own = [next(rollouts) for _ in range(size)]
        groups.append(Group(prompt, tuple(_rollout(prompt, *parts) for parts in own), rewards))
    return tuple(groups)


def _narrow(kept: np.ndarray) -> np.ndarray:
    """Without the columns that only rows of other rollouts fill."""
    return kept[:, : max(1, int((kept >= 0).sum(1).max(initial=0)))]


def _rollout(
    prompt: Prompt,
    ids: np.ndarray,
    logprobs: np.ndarray,
    versions: np.ndarray,
    routes: np.ndarray | None,
    reason: FinishReason,
    kept: np.ndarray | None,
) -> Rollout:
    return Rollout(
        prompt_ids=prompt.ids,
        response_ids=ids,
        rollout_logprobs=logprobs,
        routes=routes,
        weight_versions=versions,
        finish_reason=reason,
        kept=kept,
    )


def _read_prompts(encoded: np.ndarray, ids: Sequence[np.ndarray]) -> list[Prompt]:
    try:
        rows: Any = json.loads(encoded.tobytes().decode())
    except ValueError as error:
        raise DumpError(f"prompts is not JSON: {error}") from error
    _must(isinstance(rows, list) and len(rows) == len(ids), f"prompts is not a list of {len(ids)}")
    for row in rows:
        well_formed = (
            isinstance(row, dict)
            and isinstance(row.get("text"), str)
            and isinstance(row.get("metadata"), dict)
            and isinstance(row.get("index"), int)
        )
        _must(well_formed, "a prompt is not {text, metadata, index}")
    return [Prompt(i, row["text"], row["metadata"], row["index"]) for i, row in zip(ids, rows, strict=True)]


def _must(holds: object, otherwise: str) -> None:
    if not holds:
        raise DumpError(otherwise)
