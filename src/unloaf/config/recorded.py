"""Settings that a run fills in when it begins, and keeps."""

from __future__ import annotations

import dataclasses

from unloaf.config.fields import Config

_FILLED = {"mean": (), "std": (), "interpolation": "auto", "crop_pct": None}  # and what each says before


def as_begun(config: Config, begun: Config) -> Config:
    """The settings asked for of a resumed run, with what was left open as the run filled it in.

    >>> as_begun(Config(std=(0.5,)), Config(std=(0.5, 0.5, 0.5), crop_pct=0.9)).crop_pct
    0.9
    """
    kept = {name: getattr(begun, name) for name, unsaid in _FILLED.items() if getattr(config, name) == unsaid}
    for name in ("mean", "std"):
        asked, had = getattr(config, name), getattr(begun, name)
        if len(asked) == 1 and asked * len(had) == had:
            kept[name] = had
    return dataclasses.replace(config, **kept)
