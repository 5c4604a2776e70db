"""Recipes: functions that return a full Config, and their names for `unloaf train --recipe NAME`.

Imports no torch. The settings, the published figure and the source of each recipe are in the docstring of its function,
in `imagenet`, `cifar`, `coco` and `digits`.
"""

from __future__ import annotations

import difflib
from dataclasses import replace

from unloaf.config import Config
from unloaf.recipes import cifar, coco, digits, imagenet
from unloaf.recipes.entry import Recipe

__all__ = ["RECIPES", "Recipe", "recipe", "recipe_names"]

_DEMO = "unloaf demo"

RECIPES: dict[str, Recipe] = {
    "digits_common": Recipe(digits.common, source=_DEMO),
    "digits_stochastic_depth": Recipe(digits.stochastic_depth, source=_DEMO),
    "digits_st": Recipe(digits.stimulative, source=_DEMO),
    "digits_stpp": Recipe(digits.stimulative_plus, source=_DEMO),
    "digits_gkt": Recipe(digits.group_knowledge, source=_DEMO),
    **cifar.RECIPES,
    **imagenet.RECIPES,
    **coco.RECIPES,
}


def recipe_names() -> list[str]:
    """The names that `recipe` knows.

    >>> recipe_names()[:2]
    ['digits_common', 'digits_stochastic_depth']
    """
    return list(RECIPES)


def recipe(name: str, *, data_dir: str | None = None) -> Config:
    """The settings of a recipe.

    Args:
        name: one of `recipe_names()`.
        data_dir: folder of the image set; default: data/imagenet, data/cifar10, data/cifar100 or data/coco. Digits
            need none.

    Raises:
        ValueError: no recipe has this name; the message suggests others.

    >>> config = recipe("imagenet_resnet50_a1", data_dir="ilsvrc")
    >>> config.method, config.epochs, config.lr, config.data_dir
    ('st++', 200, 0.2, 'ilsvrc')
    >>> recipe("digits_stp")
    Traceback (most recent call last):
    ValueError: recipe 'digits_stp': no such recipe; did you mean digits_stpp, digits_st, digits_gkt?
    """
    if name not in RECIPES:
        close = difflib.get_close_matches(name, RECIPES, n=3)
        hint = f"did you mean {', '.join(close)}?" if close else "`unloaf recipes` lists them"
        raise ValueError(f"recipe {name!r}: no such recipe; {hint}")
    config = RECIPES[name].config()
    return config if data_dir is None else replace(config, data_dir=data_dir)
