"""Groups as flat arrays, and as a file of them: all rollouts one behind the other, in the order of the groups.

    group_sizes       [groups] int32       episodes of each prompt
    prompts           [bytes] uint8        JSON, a list of {text, metadata, index, origin}
    episode_sizes     [episodes] int32     rollouts of each
    rewards           [episodes] float32   0 where it failed
    failures          [bytes] uint8        JSON, a list: why an episode has no reward, or null
    has_turn_rewards  [episodes] bool      and
    turn_rewards      [sum of turns where has_turn_rewards] float32; both absent where no episode has any
    prompt_lengths    [rollouts] int32     P
    prompt_ids        [sum P] int32        a group's prompt is that of its first rollout
    response_lengths  [rollouts] int32     N
    response_ids      [sum N] int32
    rollout_logprobs  [sum N] float32      nats, at the sampling temperature, over the kept tokens if any
    weight_versions   [sum N] int32
    trained           [sum N] bool
    finish_reasons    [rollouts] uint8     position in FINISH_REASONS
    retractions       [rollouts] int32
    has_routes        [rollouts] bool
    routes            [sum of P + N - 1 where has_routes, layers, topk] uint8 or int16; absent where no rollout has any
    mixed_kv          [sum N] bool; absent where no token is marked
    kept              [sum N, K] int32, as Rollout says; absent where sampling was from the whole vocabulary
    has_teacher       [rollouts] bool      and of those that have its scores
    teacher_logprobs  [sum N] float32; both absent where no rollout has any
    teacher_top_ids, teacher_top_logprobs  [sum N, k] int32 and float32, the same; absent where they were not asked for

Nothing in such a file is code, and it appears whole or not at all. What a rollout may hold, `Rollout` checks when it is
read.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.arrays import stack_kept
from pipeline.errors import NOT_STARTED, SamerouteError
from pipeline.teaching.teacher_scores import TeacherScores
from pipeline.types import Episode, FinishReason, Group, Prompt, Rollout

FORMAT, FORMAT_VERSION = "sameroute.rollouts", 2
FINISH_REASONS: tuple[FinishReason, ...] = ("stop", "length", "abort", "time")
_ARRAYS: dict[str, tuple[str, ...]] = {
    "group_sizes": ("int32",),
    "prompts": ("uint8",),
    "episode_sizes": ("int32",),
    "rewards": ("float32",),
    "failures": ("uint8",),
    "has_turn_rewards": ("bool",),
    "turn_rewards": ("float32",),
    "prompt_lengths": ("int32",),
    "prompt_ids": ("int32",),
    "response_lengths": ("int32",),
    "response_ids": ("int32",),
    "rollout_logprobs": ("float32",),
    "weight_versions": ("int32",),
    "trained": ("bool",),
    "finish_reasons": ("uint8",),
    "retractions": ("int32",),
    "has_routes": ("bool",),
    "routes": ("uint8", "int16"),
    "kept": ("int32",),
    "mixed_kv": ("bool",),
    "has_teacher": ("bool",),
    "teacher_logprobs": ("float32",),
    "teacher_top_ids": ("int32",),
    "teacher_top_logprobs": ("float32",),
}
_TEACHER = {"has_teacher": 1, "teacher_logprobs": 1, "teacher_top_ids": 2, "teacher_top_logprobs": 2}
_SCORES = ("logprobs", "top_ids", "top_logprobs")
_OPTIONAL = {"routes": 3, "kept": 2, "mixed_kv": 1, "has_turn_rewards": 1, "turn_rewards": 1} | _TEACHER
"""Arrays that a step may lack, and their dimensions; all others have one."""


class DumpError(SamerouteError, ValueError):
    """A dump cannot be written, read or used; the message says which and why."""

    exit_code = NOT_STARTED


def write_groups(path: Path, groups: Sequence[Group], header: Mapping[str, str] | None = None) -> None:
    """Write groups into a file; header: words of it beside its format and version. An episode that is not graded yet
    is read back with reward 0.

    Raises DumpError for what could not be read back as it is: a group whose first rollout has another prompt, routes of
    two shapes, a reward that is not finite, or metadata that JSON does not hold.
    """
    from safetensors.numpy import save_file

    arrays = _flatten(groups)
    _check(arrays)
    words = {"format": FORMAT, "format_version": str(FORMAT_VERSION)} | dict(header or {})
    partial = path.with_name(f".{path.name}.partial")
    save_file(arrays, partial, words)
    partial.chmod(0o644)  # safetensors 0.8 writes for its owner only
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)


def read_groups(path: Path) -> tuple[Group, ...]:
    """Of a file that `write_groups` wrote. Raises DumpError for any other, naming what is wrong with it."""
    return groups_of(path, open_groups(path)[1])


def groups_of(path: Path, arrays: dict[str, np.ndarray]) -> tuple[Group, ...]:
    """The groups of a file's arrays. Raises DumpError where they cannot be."""
    try:
        _check(arrays)
        return _restore(arrays)
    except ValueError as error:  # of ours, or of a rollout that cannot be
        raise DumpError(f"{path}: {error}") from error


def open_groups(path: Path, *, header_only: bool = False) -> tuple[dict[str, str], dict[str, np.ndarray]]:
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
    if names - _OPTIONAL.keys() != _ARRAYS.keys() - _OPTIONAL.keys():
        odd = sorted((names ^ _ARRAYS.keys()) - _OPTIONAL.keys())
        raise DumpError(f"{path} lacks or has more than it should: {', '.join(odd)}")
    return header, arrays


def _flatten(groups: Sequence[Group]) -> dict[str, np.ndarray]:
    """Arrays of all groups. Raises DumpError for what would be lost in them."""
    episodes = [e for g in groups for e in g.episodes]
    rollouts = [r for e in episodes for r in e.rollouts]
    _must(rollouts, "a step without rollouts cannot be dumped")
    for group in groups:
        where = f"prompt {group.prompt.index}"
        first = group.rollouts[0].prompt_ids
        _must(np.array_equal(first, group.prompt.ids), f"{where} has a rollout of another prompt")
    routes = [r.routes for r in rollouts if r.routes is not None]
    kinds = {f"{rows.shape[1:]} {rows.dtype}" for rows in routes}
    _must(len(kinds) < 2, f"routes of one step have one shape and dtype, not {' and '.join(sorted(kinds))}")
    kept = [r.kept for r in rollouts if r.kept is not None]
    some = f"{len(kept)} of {len(rollouts)} rollouts have kept tokens; a step has them for all or none"
    _must(not kept or len(kept) == len(rollouts), some)
    arrays = {
        "group_sizes": np.array([len(g.episodes) for g in groups], np.int32),
        "prompts": np.frombuffer(_prompts_json([g.prompt for g in groups]), np.uint8),
        "episode_sizes": np.array([len(e.rollouts) for e in episodes], np.int32),
        "rewards": np.array([0.0 if e.reward is None else e.reward for e in episodes], np.float32),
        "failures": np.frombuffer(json.dumps([e.failure for e in episodes]).encode(), np.uint8),
        "prompt_lengths": np.array([len(r.prompt_ids) for r in rollouts], np.int32),
        "response_lengths": np.array([len(r) for r in rollouts], np.int32),
        "finish_reasons": np.array([FINISH_REASONS.index(r.finish_reason) for r in rollouts], np.uint8),
        "retractions": np.array([r.retractions for r in rollouts], np.int32),
        "has_routes": np.array([r.routes is not None for r in rollouts]),
    }
    for name in ("prompt_ids", "response_ids", "rollout_logprobs", "weight_versions", "trained"):
        arrays[name] = np.concatenate([getattr(r, name) for r in rollouts])
    arrays |= _turn_rewards(episodes) | _teacher(rollouts)
    arrays |= {"routes": np.concatenate(routes)} if routes else {}
    arrays |= {"kept": stack_kept(kept)} if kept else {}
    marks = [np.zeros(len(r), bool) if r.mixed_kv is None else r.mixed_kv for r in rollouts]
    return arrays | ({"mixed_kv": np.concatenate(marks)} if any(row.any() for row in marks) else {})


def _teacher(rollouts: Sequence[Rollout]) -> dict[str, np.ndarray]:
    given = [r.teacher for r in rollouts if r.teacher is not None]
    if not given:
        return {}
    _must(len({scores.top_k for scores in given}) == 1, "a teacher's scores of one step have one top_k")
    arrays = {"has_teacher": np.array([r.teacher is not None for r in rollouts])}
    for name in _SCORES[: 3 if given[0].top_k else 1]:
        arrays[f"teacher_{name}"] = np.concatenate([getattr(scores, name) for scores in given])
    return arrays


def _turn_rewards(episodes: Sequence[Episode]) -> dict[str, np.ndarray]:
    given = [e.turn_rewards for e in episodes if e.turn_rewards is not None]
    if not given:
        return {}
    has = np.array([e.turn_rewards is not None for e in episodes])
    return {"has_turn_rewards": has, "turn_rewards": np.concatenate([np.array(row, np.float32) for row in given])}


def _prompts_json(prompts: Sequence[Prompt]) -> bytes:
    rows = []
    for prompt in prompts:
        row = {"text": prompt.text, "metadata": prompt.metadata, "index": prompt.index, "origin": prompt.origin}
        try:
            text = json.dumps(row, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise DumpError(f"the metadata of prompt {prompt.index} is not JSON: {error}") from error
        if json.loads(text) != row:  # a tuple, a key that is no text
            raise DumpError(f"the metadata of prompt {prompt.index} changes in JSON: {prompt.metadata}")
        rows.append(text)
    return f"[{','.join(rows)}]".encode()


def _check(arrays: dict[str, np.ndarray]) -> None:
    """Raise DumpError where arrays are not of the dtypes and lengths that a file has, or a reward is not finite."""
    for name, array in arrays.items():
        _must(array.dtype.name in _ARRAYS[name], f"{name} is {array.dtype}, not {' or '.join(_ARRAYS[name])}")
        _must(array.ndim == _OPTIONAL.get(name, 1), f"{name} has shape {list(array.shape)}")
    groups, episodes = arrays["group_sizes"], arrays["episode_sizes"]
    prompts, lengths = arrays["prompt_lengths"], arrays["response_lengths"]
    _must(len(groups) and groups.min() > 0, "a group has no episodes")
    _must(len(episodes) and episodes.min() > 0, "an episode has no rollouts")
    _must(lengths.min(initial=0) >= 0, "a response has a negative length")
    _must(prompts.min(initial=1) > 0, "a prompt has no tokens")
    count = int(episodes.sum(dtype=np.int64))
    of_episode = [name for name in ("episode_sizes", "rewards", "has_turn_rewards") if name in arrays]
    expected = dict.fromkeys(of_episode, int(groups.sum(dtype=np.int64)))
    expected |= dict.fromkeys(("prompt_lengths", "response_lengths", "finish_reasons", "retractions"), count)
    expected |= {"has_routes": count, "prompt_ids": int(prompts.sum(dtype=np.int64))}
    tokens = int(lengths.sum(dtype=np.int64))
    expected |= dict.fromkeys(("response_ids", "rollout_logprobs", "weight_versions", "trained"), tokens)
    expected |= {name: tokens for name in ("kept", "mixed_kv") if name in arrays}
    expected |= {"routes": int(_route_rows(arrays).sum())} if "routes" in arrays else {}
    taught = [name for name in _TEACHER if name in arrays]
    _must(not taught or {"has_teacher", "teacher_logprobs"} <= {*taught}, "a teacher's arrays come together")
    _must(len(taught) != 3, "a teacher's top tokens come with their log-probs")
    expected |= dict.fromkeys(taught, int(_taught_lengths(arrays).sum())) | ({"has_teacher": count} if taught else {})
    for name, size in expected.items():
        _must(len(arrays[name]) == size, f"{name} has {len(arrays[name])} entries, not {size}")
    for name in ("rewards", "turn_rewards"):
        _must(np.isfinite(arrays.get(name, 0.0)).all(), f"{name} holds a number that is not finite")
    both = ("turn_rewards" in arrays) + ("has_turn_rewards" in arrays)
    _must(both != 1, "turn_rewards and has_turn_rewards come together")
    _must(arrays["finish_reasons"].max(initial=0) < len(FINISH_REASONS), "finish_reasons holds an unknown one")
    _must("routes" in arrays or not arrays["has_routes"].any(), "there are no routes, though has_routes says so")


def _route_rows(arrays: dict[str, np.ndarray]) -> np.ndarray:
    """[rollouts] int64: rows that each rollout has in `routes`."""
    rows = arrays["prompt_lengths"].astype(np.int64) + arrays["response_lengths"] - 1
    return np.where(arrays["has_routes"], rows, 0)


def _taught_lengths(arrays: dict[str, np.ndarray]) -> np.ndarray:
    """[rollouts] int64: tokens of each that a teacher has scored."""
    lengths = arrays["response_lengths"].astype(np.int64)
    return np.where(arrays["has_teacher"], lengths, 0) if "has_teacher" in arrays else 0 * lengths


def _restore(arrays: dict[str, np.ndarray]) -> tuple[Group, ...]:
    """The groups of checked arrays. Raises ValueError for prompts or rollouts that cannot be."""
    failures = _read_json(arrays["failures"], "failures", len(arrays["episode_sizes"]))
    _must(all(why is None or isinstance(why, str) for why in failures), "a failure is a text, or null")
    episodes = iter(_episodes(arrays, failures))
    prompts = _read_json(arrays["prompts"], "prompts", len(arrays["group_sizes"]))
    groups = []
    for row, size in zip(prompts, arrays["group_sizes"], strict=True):
        own = tuple(next(episodes) for _ in range(size))
        groups.append(Group(_prompt(row, own[0].rollouts[0].prompt_ids), own))
    return tuple(groups)


def _episodes(arrays: dict[str, np.ndarray], failures: Sequence[str | None]) -> list[Episode]:
    out: list[Episode] = []
    rollouts, sizes = _rollouts(arrays), arrays["episode_sizes"].tolist()
    by_turn = iter(arrays.get("turn_rewards", np.zeros(0)).tolist())
    has = arrays.get("has_turn_rewards", np.zeros(len(sizes), bool)).tolist()
    for size, reward, why, turned in zip(sizes, arrays["rewards"].tolist(), failures, has, strict=True):
        own = tuple(next(rollouts) for _ in range(size))
        rewards = tuple(itertools.islice(by_turn, sum(r.turns for r in own))) if turned else None
        out.append(Episode(own, reward if why is None else None, why, turn_rewards=rewards))
    _must(next(by_turn, None) is None, "turn_rewards has more than there are turns")
    return out


def _rollouts(arrays: dict[str, np.ndarray]) -> Iterator[Rollout]:
    def split(name: str, lengths: np.ndarray) -> list[np.ndarray]:
        return np.split(arrays[name], np.cumsum(lengths, dtype=np.int64)[:-1])

    lengths, has_routes = arrays["response_lengths"], arrays["has_routes"]
    prompts = split("prompt_ids", arrays["prompt_lengths"])
    routes = split("routes", _route_rows(arrays)) if "routes" in arrays else [None] * len(lengths)
    kept = [_narrow(k) for k in split("kept", lengths)] if "kept" in arrays else [None] * len(lengths)
    marks = split("mixed_kv", lengths) if "mixed_kv" in arrays else [None] * len(lengths)
    has_teacher, told = arrays.get("has_teacher", np.zeros(len(lengths), bool)), _taught_lengths(arrays)
    parts = {name: split(f"teacher_{name}", told) for name in _SCORES if f"teacher_{name}" in arrays}
    names = ("response_ids", "rollout_logprobs", "weight_versions", "trained")
    by_token = zip(*(split(name, lengths) for name in names), strict=True)
    for i, (ids, logprobs, versions, trained) in enumerate(by_token):
        yield Rollout(
            prompt_ids=prompts[i],
            response_ids=ids,
            rollout_logprobs=logprobs,
            routes=routes[i] if has_routes[i] else None,
            weight_versions=versions,
            finish_reason=FINISH_REASONS[arrays["finish_reasons"][i]],
            kept=kept[i],
            retractions=int(arrays["retractions"][i]),
            trained=trained,
            mixed_kv=None if (mixed := marks[i]) is None or not mixed.any() else mixed,
            teacher=TeacherScores(**{name: rows[i] for name, rows in parts.items()}) if has_teacher[i] else None,
        )


def _narrow(kept: np.ndarray) -> np.ndarray:
    """Without the columns that only rows of other rollouts fill."""
    return kept[:, : max(1, int((kept >= 0).sum(1).max(initial=0)))]


def _read_json(encoded: np.ndarray, name: str, count: int) -> list[Any]:
    """A list of `count` entries. Raises DumpError for anything else."""
    try:
        rows: Any = json.loads(encoded.tobytes().decode())
    except ValueError as error:
        raise DumpError(f"{name} is not JSON: {error}") from error
    _must(isinstance(rows, list) and len(rows) == count, f"{name} is not a list of {count}")
    return rows


def _prompt(row: Any, ids: np.ndarray) -> Prompt:
    well_formed = (
        isinstance(row, dict)
        and isinstance(row.get("text"), str)
        and isinstance(row.get("metadata"), dict)
        and isinstance(row.get("index"), int)
        and isinstance(row.get("origin"), str)
    )
    _must(well_formed, "a prompt is not {text, metadata, index, origin}")
    return Prompt(ids, row["text"], row["metadata"], row["index"], row["origin"])


def _must(holds: object, otherwise: str) -> None:
    if not holds:
        raise DumpError(otherwise)
