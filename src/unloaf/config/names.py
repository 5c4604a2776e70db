"""Which name was meant: a similar one, or ours for what other tools call differently. Imports no torch."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

# What transformers, torchvision's references, Lightning and daily speech say, and which setting it is here.
_ELSEWHERE = {
    "arch": "model", "architecture": "model", "backbone": "model", "net": "model", "network": "model",
    "autocast": "amp", "bf16": "amp", "fp16": "amp", "half": "amp", "mixed_precision": "amp", "precision": "amp",
    "augmentation": "aa", "auto_augment": "aa", "no_aug": "augment", "crop": "augment",
    "bs": "batch_size", "train_batch_size": "batch_size", "per_device_train_batch_size": "batch_size",
    "accelerator": "device", "devices": "device", "gpu": "device", "gpus": "device",
    "accumulate": "grad_accum_steps", "gradient_accumulation_steps": "grad_accum_steps",
    "ckpt": "checkpoint", "weights": "initial_checkpoint", "init": "initial_checkpoint",
    "compile": "torchcompile",
    "data": "data_dir", "data_path": "data_dir", "root": "data_dir", "path": "data_dir", "dir": "data_dir",
    "depth": "depths", "subnet": "depths",
    "dropout": "drop", "stochastic_depth": "drop_path",
    "exp_name": "name", "experiment_name": "name", "run_name": "name",
    "gradient_clipping": "clip_grad", "grad_clip": "clip_grad", "max_grad_norm": "clip_grad",
    "image_size": "img_size", "resolution": "img_size", "size": "img_size",
    "learning_rate": "lr", "base_lr": "lr",
    "logger": "trackers", "log_wandb": "trackers", "wandb": "trackers", "report_to": "trackers",
    "lr_scheduler": "sched", "lr_scheduler_type": "sched", "scheduler": "sched", "schedule": "sched",
    "max_epochs": "epochs", "num_epochs": "epochs", "num_train_epochs": "epochs",
    "num_workers": "workers", "dataloader_num_workers": "workers",
    "optim": "opt", "optimizer": "opt",
    "out": "output", "output_dir": "output", "output_file": "output", "save_dir": "output", "save_path": "output",
    "random_seed": "seed", "manual_seed": "seed",
    "label_smoothing": "smoothing", "topk": "top_k",
    "warmup": "warmup_epochs", "wd": "weight_decay",
    # Commands.
    "benchmark": "bench", "profile": "bench", "cost": "subnets", "costs": "subnets",
    "check": "check-data", "validate-data": "check-data",
    "classify": "predict", "infer": "predict", "inference": "predict",
    "compare": "report", "plot": "report", "example": "demo",
    "convert": "export", "save": "export", "fit": "train", "finetune": "train", "fine-tune": "train",
    "evaluate": "eval", "test": "eval", "val": "eval", "validate": "eval", "info": "inspect", "summary": "inspect",
}  # fmt: skip


_FORMER = {"ema": "group_ema"}  # as files and checkpoints of before have it, and as it is called now


def current_names(settings: Mapping[Any, Any]) -> dict[Any, Any]:
    """Settings under the names of today, of a file or a checkpoint that may be older.

    Raises:
        ValueError: a setting is there under both names.

    >>> current_names({"epochs": 3, "ema": 0.9})
    {'epochs': 3, 'group_ema': 0.9}
    """
    for former, name in _FORMER.items():
        if former in settings and name in settings:
            raise ValueError(f"{former} is called {name} now, and both are given; keep {name}")
    return {_FORMER.get(name, name): value for name, value in settings.items()}


def similar(name: str, known: Iterable[str]) -> str | None:
    """The one of the known names that was meant, if that can be guessed; ``-`` and ``_`` are the same.

    >>> similar("learning-rate", ["lr", "layer_decay"]), similar("bath_size", ["batch-size"]), similar("qqq", ["lr"])
    ('lr', 'batch-size', None)
    """
    by_form = {_form(option): option for option in known}
    form = _form(name)[:100]  # a longer one is no typing error, and difflib's time is its square
    elsewhere = _form(_ELSEWHERE.get(form, _ELSEWHERE.get(form.replace("_", "-"), "")))
    if elsewhere in by_form:
        return by_form[elsewhere]
    begun = [option for known_form, option in by_form.items() if len(form) > 2 and known_form.startswith(form)]
    if len(begun) == 1:
        return begun[0]
    anagrams = [option for known_form, option in by_form.items() if sorted(known_form) == sorted(form)]
    if anagrams:  # modle is nearer to model than to modes
        return anagrams[0]
    close = difflib.get_close_matches(form, by_form, n=1)
    return by_form[close[0]] if close else None


def _form(name: str) -> str:
    return name.strip("-").replace("-", "_").lower()
