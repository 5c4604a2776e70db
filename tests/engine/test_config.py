"""The configuration: what it accepts, what it answers."""

import contextlib
import math
import re
import subprocess
import sys

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from unloaf.engine.config import Config, dump_config, load_config


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"epochs": 0}, "epochs 0: give at least 1"),
        ({"batch_size": 1}, "batch_size 1: give at least 2"),
        ({"lr": -0.1}, "lr -0.1: give a finite number above 0"),
        ({"lr": math.inf}, "lr inf: give a finite number above 0"),
        ({"lr": math.nan}, "lr nan: give a finite number above 0"),
        ({"lr": "1e-3"}, "lr '1e-3': give a number; in YAML write 1.0e-3"),
        ({"epochs": 2.5}, "epochs 2.5: give an integer"),
        ({"epochs": True}, "epochs True: give an integer"),
        ({"ema": 1.0}, "ema 1.0: give a number from 0 to below 1"),
        ({"amplitude": "large"}, "amplitude 'large': give a number, auto"),
        ({"method": "sst"}, "method 'sst': give common or stochastic-depth or st or st++ or gkt; did you mean st?"),
        ({"warmup_epochs": 30}, "warmup_epochs 30 leaves none of the 30 epochs; give at most 29"),
        ({"dataset": "cifar10"}, "dataset 'cifar10' is read from files: give --data-dir"),
        ({"output": None}, "output None: give a text"),
        ({"model_kwargs": ("depth",)}, "model_kwargs 'depth' is not of the form name=value"),
        ({"model_kwargs": ("depth=3", "depth=4")}, "model_kwargs 'depth=4' comes twice"),
        ({"model_kwargs": ("depth={3}",)}, "model_kwargs 'depth={3}': give a number, a text, True, False or a list"),
        ({"model_kwargs": ("qkv_bias=false",)}, "model_kwargs 'qkv_bias=false': write True or False, as in Python"),
        (
            {"model_kwargs": ("init_values=None",)},
            "model_kwargs 'init_values=None': write True or False, as in Python; ",
        ),
        ({"model_kwargs": ("depth=1e999",)}, "model_kwargs 'depth=1e999': give a number"),
        ({"model_kwargs": ("act_layer=\x00",)}, "model_kwargs 'act_layer=\\x00': give a text without control"),
    ],
)
def test_illegal_value_is_answered_with_what_is_legal(entries, message):
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        Config(**entries)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epoch: 3", "unknown entry 'epoch'; did you mean epochs?"),
        ("epochs: 0", "epochs 0: give at least 1"),
        ("- epochs", "give lines of the form 'epochs: 30', not list"),
        ("epochs: [", "is not YAML"),
        ("", "give lines of the form 'epochs: 30', not NoneType"),
        ("!!python/object/apply:os.getcwd []", "is not YAML"),
    ],
)
def test_file_error_names_the_file_and_the_remedy(tmp_path, text, message):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}.*{re.escape(message)}"):
        load_config(path)


@pytest.mark.parametrize(
    "config",
    [
        Config(),
        Config(method="gkt", lr=1e-5, amplitude=2.5, name="a: b", img_size=48),
        Config(model_kwargs=("depth=3", "act_layer=silu")),
    ],
)
def test_file_reads_back_to_an_equal_value(tmp_path, config):
    path = tmp_path / "args.yaml"
    path.write_text(dump_config(config))
    assert load_config(path) == config


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("n=4", 4),
        ("n=-1e-6", -1e-6),
        ("n=True", True),
        ("n=(2, 2)", (2, 2)),
        ("n=gelu", "gelu"),
        ("n=a=b", "a=b"),
        ("n=", ""),
        ("n=" + "(" * 240, "(" * 240),
        ("n=" + "[" + "0.1," * 80 + "]", [0.1] * 80),
        ("n=1if x else 2", "1if x else 2"),
        ("n=9**9", "9**9"),
        ("n=open('x')", "open('x')"),
    ],
)
def test_model_kwargs_are_literals_or_text(word, value):
    assert Config(model_kwargs=(word,)).model_arguments == {"n": value}


scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.just("auto"))


@given(st.dictionaries(st.sampled_from([*Config.__dataclass_fields__, "unknown"]), scalars, max_size=6))
def test_any_entries_give_a_config_or_a_value_error(tmp_path_factory, entries):
    path = tmp_path_factory.mktemp("config") / "run.yaml"
    path.write_text(yaml.safe_dump(entries), encoding="utf-8")
    with contextlib.suppress(ValueError):
        assert isinstance(load_config(path), Config)


@pytest.mark.parametrize(
    ("method", "given_number", "expected"),
    [
        ("common", 4, 0),
        ("stochastic-depth", None, 0),
        ("st", None, 1),
        ("st++", None, 6),
        ("st++", 2, 2),
        ("gkt", 9, 6),
    ],
)
def test_number_of_subnets_follows_the_method(method, given_number, expected):
    assert Config(method=method, num_subnets=given_number).num_subnets_or_default == expected


def test_import_loads_no_torch():
    code = "import sys, unloaf.engine.config; sys.exit('torch' in sys.modules or 'timm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
