"""The model that teaches: where its files are, and whether it goes with the policy. Nothing is started."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from megatron_ext.hf.description import ModelDescription, read_description
from pipeline.checkpoints.weights_of import NoModelError, model_of_run, weights_of, without_weights
from pipeline.config import Config
from pipeline.config.model import TeacherConfig
from pipeline.config.server import longest_context, request_tokens
from pipeline.data.tokenizer import load_tokenizer
from pipeline.engine.control import SGLangControl
from pipeline.engine.keys import ServerKeys
from pipeline.engine.server import ServerError
from pipeline.errors import NOT_STARTED, SamerouteError

_ANSWER_S = 10.0  # in which a server that runs says what it holds


class TeacherError(SamerouteError):
    """The teacher cannot teach this policy; found before anything was started."""

    exit_code = NOT_STARTED


def check_teacher(config: Config, policy: Path, device: Literal["cpu", "cuda"] = "cpu") -> None:
    """Raise TeacherError where there is no teacher, or it is none of this policy. policy: its model directory. device:
    that the run gets."""
    teacher = config.teacher
    if teacher is None:
        return
    folder = _folder(teacher)
    try:
        model, own = read_description(folder), read_description(policy)
        if teacher.engine == "trainer":
            config.parallel.check_model(model)
        tokenizers = [load_tokenizer(p, trust_remote_code=config.model.trust_remote_code) for p in (folder, policy)]
    except (SamerouteError, FileNotFoundError, ValueError) as error:
        raise TeacherError(f"teacher.path: {error}") from error
    theirs, mine = (tokenizer.get_vocab() for tokenizer in tokenizers)
    if theirs != mine:
        raise TeacherError(f"teacher.path: {folder} has another tokenizer than the policy: {_difference(theirs, mine)}")
    _check_vocabulary(config, model, own, len(mine))
    if teacher.engine == "server" and (reasons := model.not_served(device)):
        raise TeacherError(f"teacher.path: {folder}: {'; '.join(reasons)}; set teacher.engine=trainer")
    needed, (longest, field) = score_tokens(config), longest_context(model)
    if needed > longest:
        raise TeacherError(
            f"teacher.path: {folder} reads {longest} tokens ({field}), and the longest prompt and "
            f"answer of this run need {needed}; lower data.max_prompt_tokens or {config.longest_from}"
        )
    _check_room(teacher, needed, longest)


def score_tokens(config: Config) -> int:
    """The context that a server needs to score the longest prompt and answer."""
    return request_tokens(config.data.max_prompt_tokens + config.longest_rollout, 0)


@contextlib.contextmanager
def teacher_directory(config: Config, *, serve: bool) -> Iterator[Path | None]:
    """A Hugging Face directory with the teacher's weights; without them where a server runs already. None: there is no
    teacher, or its server is not asked. serve: the run starts servers."""
    teacher = config.teacher
    if teacher is None or (teacher.engine == "server" and not serve):
        yield None
    elif teacher.url is not None:
        yield _folder(teacher)
    else:
        with weights_of(_model(teacher)) as directory:
            yield directory


def _folder(teacher: TeacherConfig) -> Path:
    """With config.json and tokenizer, weights or none. Raises TeacherError where there is none."""
    if teacher.url is None:
        return without_weights(_model(teacher))
    try:
        served = Path(str(control_of(teacher).model_info().get("model_path", "")))
    except ServerError as error:
        raise TeacherError(f"teacher.url: {error}; start that server, or leave teacher.url out") from error
    folder = teacher.path or served
    if not (folder / "config.json").is_file():
        raise TeacherError(
            f"teacher.url: its server holds {served}, which is not on this machine, so its tokenizer cannot be "
            "checked; set teacher.path to a folder with its config.json and tokenizer"
        )
    return folder


def _model(teacher: TeacherConfig) -> Path:
    """A model directory or a checkpoint. Raises TeacherError."""
    assert teacher.path is not None
    try:
        found = model_of_run(teacher.path) if (teacher.path / "config.yaml").is_file() else teacher.path
    except NoModelError as error:
        raise TeacherError(f"teacher.path: {error}") from error
    folder = without_weights(found)
    if not (folder / "config.json").is_file():
        raise TeacherError(
            f"teacher.path: {found} is no model: neither a Hugging Face directory, a run nor a checkpoint"
        )
    if folder == found and not any(found.glob("*.safetensors")):
        raise TeacherError(f"teacher.path: {found} has a config.json and no weights (*.safetensors)")
    return found


def control_of(teacher: TeacherConfig) -> SGLangControl:
    """Of a server that runs already."""
    assert teacher.url is not None
    return SGLangControl(teacher.url, keys=keys_of(teacher), timeout_s=_ANSWER_S)


def keys_of(teacher: TeacherConfig) -> ServerKeys:
    """That open it."""
    return ServerKeys(teacher.api_key or "", teacher.api_key or "")


def _difference(theirs: dict[str, int], mine: dict[str, int]) -> str:
    if len(theirs) != len(mine):
        return f"{len(theirs)} tokens against {len(mine)}"
    token = next(token for token in sorted(mine) if theirs.get(token) != mine[token])
    return f"{token!r} is {theirs.get(token)} there and {mine[token]} here"


def _check_room(teacher: TeacherConfig, needed: int, longest: int) -> None:
    """Of a server that the run starts, where it is told how much it holds. longest: that the model reads."""
    for name in ("context_length", "max_total_tokens") if teacher.engine == "server" and teacher.url is None else ():
        room = getattr(teacher.server, name)
        if room is not None and room < needed:
            raise TeacherError(
                f"teacher.server.{name}={room} has no room for the longest prompt and answer of this run, which need "
                f"{needed}; set it to {needed} or more, or leave it out"
            )
    if (context := teacher.server.context_length) is not None and context > longest:
        raise TeacherError(f"teacher.server.context_length={context} is more than the teacher's {longest}; lower it")


def _check_vocabulary(config: Config, model: ModelDescription, own: ModelDescription, tokens: int) -> None:
    """Rows of padding may differ, but where top tokens are asked for, which might be of these."""
    top_k = config.objective.composition().teacher_top
    if (top_k and model.vocab_size != own.vocab_size) or model.vocab_size < tokens:
        raise TeacherError(
            f"teacher.path: its vocabulary has {model.vocab_size} rows and the policy's {own.vocab_size}, so one's "
            "token is none of the other's; set objective.distillation.top_k=0, or take another teacher"
        )
    if top_k > own.vocab_size:
        raise TeacherError(
            f"objective.distillation.top_k={top_k} asks for more tokens than the vocabulary of {own.vocab_size} has; "
            "lower it"
        )
