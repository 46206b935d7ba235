"""A YAML file becomes a checked configuration; fields are overridden as `a.b=c`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ValidationError

from megatron_ext.hf.description import ModelDescription, describe, read_description
from megatron_ext.hf.tied import check_tied_head
from megatron_ext.lora.targets import choose_targets
from pipeline.config import rewards
from pipeline.config.file import ConfigError, read_tree
from pipeline.config.precision import MOVED
from pipeline.config.secrets import is_hidden
from pipeline.config.server import fit_context
from pipeline.config.tree import Config
from pipeline.engine_fields import check_megatron_fields, check_sglang_arguments
from pipeline.say import to_stderr
from pipeline.text.yaml_text import YamlError, parse

_MEANT = {"objective": "preset", "model": "path", "data": "path", "run": "directory", "precision": "weights"}
"""The field that a person means who gives a section a text: `objective=grpo`."""


def load_config(path: str | Path, overrides: list[str] | None = None, *, served: bool | None = None) -> Config:
    """Read a YAML file and its bases, apply overrides of the form `a.b=c` (c is YAML), validate.

    served: whether a server holds the model, which it then must be able to; None: where there are steps to take.
    Raises ConfigError: file missing, not YAML, unknown key, wrong type, or settings that do not go together.
    """
    config, _ = _read(path, overrides)
    return fit_context(config, _model(config, config.model.path, served))


def load_config_and_model(path: str | Path, overrides: list[str] | None = None) -> tuple[Config, ModelDescription]:
    """The same where the model need not be on this machine, for plans and dry runs, with what the model is.

    Where there is no directory `model.path`, the `config.json` beside the YAML file counts, or beside its nearest base
    that has one. Raises ConfigError as load_config does, and where there is none.
    """
    config, files = _read(path, overrides)
    places = [] if config.model.path is None else [config.model.path, *(file.parent for file in files)]
    place = next((p for p in places if (p / "config.json").is_file()), config.model.path)
    model = _model(config, place)
    return fit_context(config, model), model


def config_of_run(run: Path) -> Path:
    """The file of a run directory that holds its whole configuration, secrets included."""
    return run / ("secrets.yaml" if (run / "secrets.yaml").is_file() else "config.yaml")


def load_rewards(run: Path, other: Path | None = None) -> tuple[rewards.Rewards, rewards.GradingConfig]:
    """How a run in this directory graded, or, with a YAML file of `rewards` and perhaps `grading`, how that says.

    Raises ConfigError as load_config does, for a file without `rewards`, and for a run whose environment gave them.
    """
    tree, files = read_tree(config_of_run(run))
    if tree.pop("environment", None) is not None and other is None:
        raise ConfigError(f"the environment of {run} gave its rewards; name others with --rewards YAML")
    if other is not None:
        theirs, files = read_tree(other)
        if "rewards" not in theirs:
            raise ConfigError(f"{other} has no rewards; write them as a configuration does: rewards: [...]")
        tree |= {key: theirs[key] for key in ("rewards", "grading") if key in theirs}
    _check_hidden({key: tree[key] for key in ("rewards", "grading") if key in tree})
    try:
        config = _with_directories(Config.model_validate(tree), files)
    except ValidationError as error:
        raise ConfigError(_explain(error)) from error
    return config.rewards, config.grading


def check_precision(config: Config, device: Literal["cpu", "cuda"]) -> None:
    """Raise ConfigError where the precision, or the servers' kernels, cannot be had on the device that the run gets.
    Says where the precision is slow there."""
    try:
        config.precision.check_device(device)
        if device == "cuda":
            config.check_server_kernels()
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if (why := config.precision.slow_on(device)) is not None:
        to_stderr(why)
    if config.model.path is not None and (config.model.path / "config.json").is_file():  # a job's may be elsewhere
        _check_needs(config, read_description(config.model.path), device)


def model_of(config: Config) -> ModelDescription:
    """What the model of a configuration is, whose directory is here."""
    if config.model.tiny is not None:
        return describe(config.model.tiny.hf_config())
    assert config.model.path is not None
    return read_description(config.model.path)


def _model(config: Config, directory: Path | None, served: bool | None = None) -> ModelDescription:
    """A tiny model's, or that of what lies in `directory`. Its class says which fields trainer.extra may have."""
    if config.model.tiny is not None:
        model = model_of(config)
    else:
        assert directory is not None
        model = _check_model(config, directory, config.train.steps > 0 if served is None else served)
    try:
        if config.lora is not None:
            choose_targets(model, config.lora)
        check_megatron_fields(config.trainer.extra, latent=bool(model.fields.get("multi_latent_attention")))
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return model


def _read(path: str | Path, overrides: list[str] | None) -> tuple[Config, list[Path]]:
    tree, files = read_tree(Path(path))
    for override in overrides or []:
        _apply(tree, override)
    _check_extra(tree)
    _check_hidden(tree)
    try:
        config = Config.model_validate(tree)
        check_sglang_arguments(config.server.extra_args)
        if config.teacher is not None:
            check_sglang_arguments(config.teacher.server.extra_args)
    except ValidationError as error:
        raise ConfigError(_explain(error)) from error
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return _with_directories(config, files), files


def _with_directories(config: Config, files: list[Path]) -> Config:
    """The configuration with the folder of each function, or environment, that lies beside one of its files."""

    def beside(function: str) -> Path | None:
        name = re.split("[.:]", function)[0]
        folders = (file.resolve().parent for file in files)
        return next((f for f in folders if (f / f"{name}.py").is_file() or (f / name).is_dir()), None)

    def found(reward: rewards.RewardConfig) -> rewards.RewardConfig:
        if not isinstance(reward, rewards.FunctionReward) or reward.directory is not None:
            return reward
        return reward.model_copy(update={"directory": beside(reward.function)})

    sets = [
        one if one.rewards is None else one.model_copy(update={"rewards": tuple(map(found, one.rewards))})
        for one in config.evaluate
    ]
    own = config.environment
    if own is not None and own.function is not None and own.directory is None:
        own = own.model_copy(update={"directory": beside(own.function)})
    return config.model_copy(
        update={"rewards": tuple(map(found, config.rewards)), "evaluate": tuple(sets), "environment": own}
    )


def _check_model(config: Config, directory: Path, served: bool) -> ModelDescription:
    """Of a model that is supported, divides into the layout, can be had in this precision, and in a server if asked."""
    try:
        model = read_description(directory)
        config.parallel.check_model(model)
        check_tied_head(directory, model)
    except (FileNotFoundError, ValueError) as error:
        raise ConfigError(f"model.path: {error}") from error
    if quantized := model.hf.get("quantization_config"):
        raise ConfigError(
            f"model.path: SGLang would hold {quantized.get('quant_method')} weights, which the trainer's cannot "
            "replace; write the model in bfloat16 first, with sameroute convert to-megatron and to-hf"
        )
    if served:
        _check_served(config, directory, model, None if config.device == "auto" else config.device)
    _check_needs(config, model, None)
    return model


def check_served(config: Config, device: Literal["cpu", "cuda"]) -> None:
    """Raise ConfigError where a server on the device that the run gets would not serve the model."""
    if (directory := config.model.path) is not None and (directory / "config.json").is_file():
        _check_served(config, directory, read_description(directory), device)


def _check_served(
    config: Config, directory: Path, model: ModelDescription, device: Literal["cpu", "cuda"] | None
) -> None:
    """The same of the model that lies in `directory`; None: on any device."""
    if reasons := model.not_served(device):
        raise ConfigError(f"model.path: {directory}: {'; '.join(reasons)}")
    if model.family.indexer is not None and config.cluster.colocated:
        raise ConfigError(
            f"cluster.colocated: a server that gives its memory back loses its weights, and no transfer brings the "
            f"indexers of {model.model_type}; set cluster.colocated=false"
        )


def _check_needs(config: Config, model: ModelDescription, device: Literal["cpu", "cuda"] | None) -> None:
    """Raise ConfigError where the rollout engine has another precision for the family, on this device or (None) on
    any."""
    for needed in model.family.needs:
        if needed.device == device and getattr(config.precision, needed.setting) != needed.value:
            raise ConfigError(f"{needed.why}; set precision.{needed.setting}={needed.value}")


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"an override reads section.field=value, not {override!r}")
    if key != key.strip() or not all(key.split(".")):
        raise ConfigError(f"an override reads section.field=value, with names between the dots, not {override!r}")
    if key == "base":
        raise ConfigError(f"base stands in a file; write a file with `base: {value}`, or name that file itself")
    node = tree
    *sections, last = key.split(".")
    for section in sections:
        if node.get(section) is None:
            node[section] = {}
        node = node[section]
        if not isinstance(node, dict):
            raise ConfigError(f"{key}: {section} is a value, not a section")
    try:
        node[last] = parse(value)
    except YamlError as error:
        raise ConfigError(f"{key}: the value {value!r} is not YAML: {error}") from error


def _check_hidden(node: Any, place: str = "") -> None:
    """Raise ConfigError where a run directory's config.yaml, which holds no secrets, is taken for a whole one."""
    inner = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in inner:
        where = f"{place}.{key}" if place else str(key)
        if isinstance(value, str) and is_hidden(value):
            raise ConfigError(
                f"{where} is hidden in this file, as in every config.yaml of a run directory; take the secrets.yaml "
                "beside it, or give the value on the command line"
            )
        _check_hidden(value, where)


def _check_extra(tree: dict[str, Any]) -> None:
    """trainer.extra has no types that would turn a word into a truth value, and Megatron takes any text for true."""
    trainer = tree.get("trainer")
    extra = trainer.get("extra") if isinstance(trainer, dict) else None
    for key, value in extra.items() if isinstance(extra, dict) else ():
        if isinstance(value, str) and value.lower() in ("yes", "no", "on", "off", "y", "n"):
            raise ConfigError(f"trainer.extra.{key}: {value!r} is a text there; write true or false")


def _explain(error: ValidationError) -> str:
    """One line a mistake; unknown keys name the ones that exist."""
    lines = []
    for mistake in error.errors():
        where = ".".join(str(part) for part in mistake["loc"])
        if mistake["type"] == "extra_forbidden":
            known = _fields_at(mistake["loc"][:-1])
            instead = f"; there are {', '.join(known)}" if known else ""
            if where in MOVED:
                instead = f"; set precision.{MOVED[where]}, which sets both engines"
            elif where in rewards.MOVED:
                instead = f"; it is {rewards.MOVED[where]} now"
            lines.append(f"{where}: there is no such key{instead}")
        else:
            words = mistake["msg"].removeprefix("Value error, ")
            if mistake["type"] == "model_type":
                words = _instead_of_a_value(where, mistake["input"], _fields_at(mistake["loc"]))
            elif mistake["type"] == "tuple_type":
                words = f"this is a list, also of one; write [{mistake['input']!r}]"
            elif mistake["type"] in ("string_type", "path_type") and isinstance(mistake["input"], bool | int | float):
                words += f", not {mistake['input']!r}; write it in quotes"
            lines.append(f"{where}: {words}" if where else words)
    return "\n".join(lines)


def _instead_of_a_value(section: str, value: Any, fields: list[str]) -> str:
    """What to write where a section of fields is given one value, or nothing."""
    if value is None:
        return "the section holds nothing; give it fields, or leave it out for its defaults"
    if section in _MEANT and isinstance(value, str):
        field = f"{_MEANT[section]}: {value}"
        return f"this is a section of fields; write {section}='{{{field}}}', or {section}: {{{field}}} in a file"
    return f"this is a section of fields, not {value!r}; write {section}.FIELD=VALUE, with one of {', '.join(fields)}"


def _fields_at(location: tuple[int | str, ...]) -> list[str]:
    """Fields of the section at a place, of which a list's numbers and the kind of a source are parts too."""
    models: list[type[BaseModel]] = [Config]
    for part in location:
        if isinstance(part, int):
            continue
        fields = [model.model_fields[part] for model in models if part in model.model_fields]
        kinds = [m for m in models if "kind" in m.model_fields and m.model_fields["kind"].default == part]
        models = kinds if kinds and not fields else [m for field in fields for m in _sections_in(field.annotation)]
    return sorted(models[0].model_fields) if len(models) == 1 else []


def _sections_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for inner in get_args(annotation) for model in _sections_in(inner)]
