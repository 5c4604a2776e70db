"""Runs of dense tasks that are killed at random moments and resumed: the run that was never killed, to the last bit."""

import os
import random
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest

import annotated_files
import mask_files
import people_files
import tiny
from checkpoint_tools import outcome
from unloaf.config import Config
from unloaf.engine.run import train

TASKS = {
    "detection": (annotated_files.coco, {"dataset": "coco", "model": "fcos", "img_size": 48}),
    "semantic": (mask_files.masked, {"dataset": "masks", "model": "semantic-fpn", "img_size": 32}),
    "pose": (people_files.people, {"dataset": "coco", "model": "simple-baseline", "img_size": 64}),
}


def settings(task: str, place: Path) -> Config:
    make, its = TASKS[task]
    usual = {"task": task, "backbone": "timm/resnet18", "method": "st-star", "device": "cpu", "batch_size": 4}
    usual |= {"epochs": 2, "opt": "adamw", "lr": 1e-3, "recalibrate": 4, "log_interval": 1, "checkpoint_interval": 1}
    usual |= {"model_ema": True, "model_ema_decay": 0.9}
    return Config(**usual | its, data_dir=str(make(place / "set")), output=str(place), name="run")


def start(config: Config) -> int:
    def work() -> None:
        os.setsid()
        train(config, console=tiny.quiet(), resume="auto")

    return tiny.fork(work, errors=Path(config.output) / "errors.txt")


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_killed_ten_times_it_ends_with_the_same_bits(tmp_path, task):
    config = settings(task, tmp_path)
    begin = time.perf_counter()
    train(replace(config, name="whole"), console=tiny.quiet())
    seconds, whole = time.perf_counter() - begin, outcome(tmp_path / "whole")
    moments, hits, ends = random.Random(task), 0, 0
    while hits < 10 or ends == 0:
        child = start(config)
        if hits < 10:
            time.sleep(moments.uniform(0, seconds))
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            hits += 1
            continue
        assert os.waitstatus_to_exitcode(status) == 0, (tmp_path / "errors.txt").read_text()
        assert tiny.same(outcome(tmp_path / "run"), whole)
        shutil.rmtree(tmp_path / "run")
        ends += 1
    print(f"{task}: {hits} kills hit, {ends} runs ended alike")
