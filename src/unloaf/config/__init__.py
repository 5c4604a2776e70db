"""Config: everything that decides a training run, as one frozen value, and its YAML form.

Imports no torch: a wrong configuration is answered before anything heavy is loaded.
"""

from unloaf.config.fields import Config
from unloaf.config.files import dump_config, load_config
from unloaf.config.recorded import as_begun

__all__ = ["Config", "as_begun", "dump_config", "load_config"]
