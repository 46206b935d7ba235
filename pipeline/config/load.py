"""A YAML file becomes a checked configuration; fields are overridden as `a.b=c`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from megatron_ext.hf.description import ModelDescription, describe, read_description
from pipeline.config.file import ConfigError, read_tree
from pipeline.config.precision import MOVED
from pipeline.config.tree import Config


def load_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Read a YAML file and its bases, apply overrides of the form `a.b=c` (c is YAML), validate.

    Raises ConfigError: file missing, not YAML, unknown key, wrong type, or settings that do not go together.
    """
    config, _ = _read(path, overrides)
    if config.model.path is not None:
        _check_model(config, config.model.path)
    return config


def load_config_and_model(path: str | Path, overrides: list[str] | None = None) -> tuple[Config, ModelDescription]:
    """The same where the model need not be on this machine, for plans and dry runs, with what the model is.

    Where there is no directory `model.path`, the `config.json` beside the YAML file counts, or beside its nearest base
    that has one. Raises ConfigError as load_config does, and where there is none.
    """
    config, files = _read(path, overrides)
    if config.model.tiny is not None:
        return config, describe(config.model.tiny.hf_config())
    assert config.model.path is not None
    places = [config.model.path, *(file.parent for file in files)]
    place = next((p for p in places if (p / "config.json").is_file()), config.model.path)
    return config, _check_model(config, place)


def _read(path: str | Path, overrides: list[str] | None) -> tuple[Config, list[Path]]:
    tree, files = read_tree(Path(path))
    for override in overrides or []:
        _apply(tree, override)
    try:
        return Config.model_validate(tree), files
    except ValidationError as error:
        raise ConfigError(_explain(error)) from error


def _check_model(config: Config, directory: Path) -> ModelDescription:
    """Of a model that is supported, divides into the layout and can be had in this precision."""
    try:
        model = read_description(directory)
        config.parallel.check_model(model)
    except (FileNotFoundError, ValueError) as error:
        raise ConfigError(f"model.path: {error}") from error
    if quantized := model.hf.get("quantization_config"):
        raise ConfigError(
            f"model.path: SGLang would hold {quantized.get('quant_method')} weights, which the trainer's cannot "
            "replace; write the model in bfloat16 first, with sameroute convert to-megatron and to-hf"
        )
    for needed in model.family.needs:
        if getattr(config.precision, needed.setting) != needed.value:
            raise ConfigError(f"{needed.why}; set precision.{needed.setting}={needed.value}")
    return model


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"an override reads section.field=value, not {override!r}")
    node = tree
    *sections, last = key.split(".")
    for section in sections:
        if node.get(section) is None:
            node[section] = {}
        node = node[section]
        if not isinstance(node, dict):
            raise ConfigError(f"{key}: {section} is a value, not a section")
    node[last] = yaml.safe_load(value)


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
            lines.append(f"{where}: there is no such key{instead}")
        else:
            lines.append(
                f"{where}: {mistake['msg'].removeprefix('Value error, ')}"
                if where
                else mistake["msg"].removeprefix("Value error, ")
            )
    return "\n".join(lines)


def _fields_at(location: tuple[int | str, ...]) -> list[str]:
    model: Any = Config
    for part in location:
        field = getattr(model, "model_fields", {}).get(part)
        if field is None:
            return []
        options = getattr(field.annotation, "__args__", (field.annotation,))
        model = next((o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), None)
    return sorted(getattr(model, "model_fields", {}))
