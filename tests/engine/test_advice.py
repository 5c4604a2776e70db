"""The warning about a default learning rate; what is usual is what the optimizers' papers and classes say."""

import pytest
from torch import nn

import tiny
from unloaf.config import Config
from unloaf.engine.optimizer import learning_rate_advice

BATCH_NORM = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
LAYER_NORM = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))


@pytest.mark.parametrize(
    ("settings", "model", "told"),
    [
        ({"opt": "adamw"}, BATCH_NORM, "adamw usually takes 0.001: give --lr"),
        ({"opt": "AdamW"}, LAYER_NORM, "AdamW usually takes 0.001: give --lr"),
        ({"opt": "lion"}, BATCH_NORM, "lion usually takes 0.0001: give --lr"),
        ({"opt": "rmsprop"}, BATCH_NORM, "rmsprop usually takes 0.01: give --lr"),
        ({"opt": "adamw", "pretrained": True}, LAYER_NORM, "adamw usually takes 0.0001 in fine-tuning: give --lr"),
        ({"initial_checkpoint": "a.pth"}, BATCH_NORM, "fine-tuning usually takes 0.01: give --lr"),
        ({}, LAYER_NORM, "networks with layer norm usually take --opt adamw --lr 0.001"),
        ({"pretrained": True}, LAYER_NORM, "networks with layer norm usually take --opt adamw --lr 0.0001"),
    ],
)
def test_a_default_that_does_not_fit_is_told_with_what_is_usual_and_the_flag(settings, model, told):
    start = "warning: lr 0.1 is the default, for sgd and random weights; "
    assert learning_rate_advice(Config(**settings), model) == [start + told]


@pytest.mark.parametrize(
    "settings",
    [{}, {"opt": "momentum"}, {"opt": "lars"}, {"opt": "sgdw"}, {"opt": "adamw", "lr": 0.01}, {"opt": "adadelta"}],
)
def test_a_rate_that_was_chosen_or_fits_is_not_spoken_of(settings):
    assert learning_rate_advice(Config(**settings), BATCH_NORM) == []


def test_the_warning_is_in_the_log_of_the_beginning_and_not_of_a_resumed_run(tmp_path):
    config = tiny.config(output=str(tmp_path), name="run", method="common", epochs=1, opt="adam", lr=0.1)
    run = tiny.run(config).path
    told = "warning: lr 0.1 is the default, for sgd and random weights; adam usually takes 0.001: give --lr\n"
    assert (run / "log.txt").read_text().count(told) == 1
    tiny.run(config, resume="auto")
    assert (run / "log.txt").read_text().count(told) == 1
