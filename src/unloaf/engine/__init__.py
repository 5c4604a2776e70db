"""The only room that knows devices, files and clocks.

Import its modules by name (`from unloaf.config import Config`). This file
imports nothing, so that the command line can check a configuration without torch.
"""
