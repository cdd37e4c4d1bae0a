"""One typed, frozen tree from the code's defaults, YAML files and `key=value` overrides, with the source of every value.

Nothing here imports torch, so that `--help` and `--print-config` answer at once.
"""

from atlas.config.fields import SCHEMAS, TrainSchema
from atlas.config.identity import config_hash, experiment
from atlas.config.load import LoadedConfig, load_config, packaged_configs
from atlas.config.render import render_config
from atlas.config.schema import DATA_ENDINGS, Config, EvalTask, LoraSettings, QuantizationConfig, Source
from atlas.files import is_path

__all__ = ["DATA_ENDINGS", "SCHEMAS", "Config", "EvalTask", "LoadedConfig", "LoraSettings", "QuantizationConfig"]
__all__ += ["Source", "TrainSchema", "config_hash", "experiment", "is_path", "load_config", "packaged_configs"]
__all__ += ["render_config"]
