"""What a person writes, checked before anything starts. Nothing here imports an engine."""

from pipeline.config.file import ConfigError
from pipeline.config.load_config import load_config, load_config_and_model
from pipeline.config.tree import Config

__all__ = ["Config", "ConfigError", "load_config", "load_config_and_model"]
