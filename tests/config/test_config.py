"""The configuration: what it accepts, what it answers."""

import contextlib
import math
import os
import re
import subprocess
import sys

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from unloaf.config import Config, dump_config, load_config
from unloaf.config.without_effect import without_effect


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
        ({"group_ema": 1.0}, "group_ema 1.0: give a number from 0 to below 1"),
        ({"amplitude": "large"}, "amplitude 'large': give a number, auto"),
        (
            {"method": "sst"},
            "method 'sst': give common or stochastic-depth or st or st++ or gkt or st-star; did you mean st?",
        ),
        ({"warmup_epochs": 30}, "warmup_epochs 30 leaves none of the 30 epochs; give at most 29"),
        (
            {"sched": "wsd", "epochs": 3, "warmup_epochs": 1},
            "decay_epochs 30: --sched wsd has 2 epochs after those of --warmup-epochs; give --decay-epochs 2 at most",
        ),
        ({"seed": 2**32}, "seed 4294967296: give an integer from 0 to 2**32 - 1"),
        (
            {"method": "gkt", "subnet_inputs": "smaller"},
            "subnet_inputs smaller: method gkt gives its subnets no smaller images; leave it out, or give --method st",
        ),
        ({"method": "common", "subnet_inputs": "smaller"}, "subnet_inputs smaller: method common"),
        ({"method": "stochastic-depth", "subnet_inputs": "smaller"}, "subnet_inputs smaller: method stochastic-depth"),
        ({"fsdp": True, "model_ema": True}, "model_ema keeps a whole copy of the weights, which fsdp shards"),
        ({"fsdp": True, "clip_grad": 0.01, "clip_mode": "agc"}, "clip_mode agc looks at whole weights, which fsdp"),
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
    "entries",
    [
        {"sched": "wsd"},  # 30 of 30 epochs
        {"sched": "wsd", "epochs": 3, "decay_epochs": 0.2},
        {"sched": "step", "epochs": 3},
        {"seed": 2**32 - 1},
        {"method": "st", "subnet_inputs": "smaller"},
        {"method": "st++", "subnet_inputs": "smaller"},
        {"method": "gkt", "subnet_inputs": "same", "min_ratio": 0.5},
        {"fsdp": True, "clip_grad": 1.0},
        {"clip_grad": 0.01, "clip_mode": "agc"},
    ],
)
def test_what_goes_together_is_accepted(entries):
    assert Config(**entries)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epoch: 3", "unknown entry 'epoch'; did you mean epochs?"),
        ("learning_rate: 0.1", "unknown entry 'learning_rate'; did you mean lr?"),
        ("optimizer: sgd", "unknown entry 'optimizer'; did you mean opt?"),
        ("epochs: 0", "epochs 0: give at least 1"),
        ("device: gpu", "device 'gpu': give auto, cpu, cuda, cuda:1 or mps; did you mean cuda?"),
        ("device: cuda:x", "device 'cuda:x': give auto"),
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


def test_setting_under_its_former_name_is_read(tmp_path):
    path = tmp_path / "args.yaml"
    path.write_text("method: gkt\nema: 0.25\n")
    assert load_config(path) == Config(method="gkt", group_ema=0.25)
    path.write_text("ema: 0.25\ngroup_ema: 0.5\n")
    with pytest.raises(ValueError, match=r"args.yaml: ema is called group_ema now, and both are given; keep group_ema"):
        load_config(path)


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


@pytest.mark.parametrize(
    ("settings", "sampler", "loss"),
    [
        ({"method": "st"}, "ordered", "kl"),  # Ye et al. 2022
        ({"method": "st++"}, "inter-stage", "kl-"),  # Ye et al. 2023
        ({"method": "gkt"}, "exponential-decay", "kl"),
        ({"method": "st++", "sampler": "ordered", "subnet_loss": "kl"}, "ordered", "kl"),
        ({"method": "gkt", "sampler": "stochastic", "subnet_loss": "kl-"}, "stochastic", "kl-"),
    ],
)
def test_auto_is_what_the_methods_paper_takes(settings, sampler, loss):
    config = Config(**settings)
    assert (config.sampler_or_default, config.subnet_loss_or_default) == (sampler, loss)


def test_import_loads_no_torch():
    code = "import sys, unloaf.config; sys.exit('torch' in sys.modules or 'timm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("lr: 0.1\nepochs: 3\nlr: 0.2\n", "line 3: 'lr' is given a second time; keep one"),
        ("{lr: 0.1, 'lr': 0.2}", "line 1: 'lr' is given a second time; keep one"),
        ("model_kwargs: {a: 1, a: 2}\n", "line 1: 'a' is given a second time; keep one"),
        ("a: &a {lr: 0.1}\n<<: *a\n", "line 2: entries are taken over by '<<'; write them out"),
        ("<<: {lr: 0.1}\n", "line 1: entries are taken over by '<<'; write them out"),
        ("a: &a [1, 2]\nb: *a\n", "line 1: is used at two places by '*'; write it out at both"),
        ("a: &a [*a]\n", "line 1: is used at two places by '*'; write it out at both"),
    ],
)
def test_entries_that_are_hidden_or_multiplied_are_refused_with_their_line(tmp_path, text, told):
    file = tmp_path / "a.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=rf"^{re.escape(f'{file}, {told}')}$"):
        load_config(file)


def test_merged_mappings_do_not_multiply(tmp_path):
    """415 bytes of this kind took half a minute; a run in a process of its own ends it if it does again."""
    lines = ["a0: &a0 {lr: 1}", *(f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}" for n in range(1, 9))]
    (tmp_path / "a.yaml").write_text("\n".join(lines))
    code = "import sys; from unloaf.commands.main import main; sys.exit(main(['train', '-c', sys.argv[1]]))"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.yaml")], timeout=90, capture_output=True)
    assert (done.returncode, b"write" in done.stderr) == (2, True)


def test_one_value_may_be_used_twice(tmp_path):
    (tmp_path / "a.yaml").write_text("lr: &a 0.25\nweight_decay: *a\n")
    config = load_config(tmp_path / "a.yaml")
    assert (config.lr, config.weight_decay) == (0.25, 0.25)


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("pipe", "it is no ordinary file"),
        ("endless", "it is no ordinary file"),
        ("folder", "it is no ordinary file"),
        ("long", "it has more than 65,536 bytes"),
    ],
)
def test_configuration_that_never_ends_is_refused(tmp_path, kind, told):
    file = tmp_path / "a.yaml"
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "endless":
        file.symlink_to("/dev/zero")
    elif kind == "folder":
        file.mkdir()
    else:
        with file.open("wb") as opened:
            opened.truncate(1 << 40)
    with pytest.raises(ValueError, match=rf"^cannot read the configuration {re.escape(str(file))}: {told}$"):
        load_config(file)


# --- settings of other methods


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"method": "st"}, []),
        (
            {"method": "st", "groups": 5, "teacher": "main", "final_survival": 0.5},
            ["groups", "teacher", "final_survival"],
        ),
        ({"method": "gkt", "groups": 5, "group_ema": 0.9, "decay_base": 0.7, "subnet_weight": 0.5}, []),
        ({"method": "gkt", "num_subnets": 4, "per": "step", "eps": 0.1}, ["num_subnets", "per", "eps"]),
        ({"method": "common", "num_subnets": 4, "sampler": "ordered"}, ["num_subnets", "sampler"]),
        ({"method": "stochastic-depth", "final_survival": 0.5, "subnet_weight": 2.0}, ["subnet_weight"]),
        ({"method": "st", "min_ratio": 0.5, "decay_base": 0.3}, ["min_ratio", "decay_base"]),
        ({"method": "st", "min_ratio": 0.5, "subnet_inputs": "smaller", "sampler": "exponential-decay"}, []),
        ({"method": "st++", "min_ratio": 0.5, "sides": (16,), "amplitude": 2.0, "eps": 0.1}, []),
        ({"method": "st++", "min_ratio": 0.5, "subnet_inputs": "same"}, ["min_ratio"]),
        ({"method": "st", "amplitude": 2.0, "main_logits": "direction"}, []),
    ],
)
def test_settings_of_other_methods_are_told_of(settings, names):
    assert [line.partition(" ")[0] for line in without_effect(Config(**settings))] == names


def test_every_setting_that_methods_alone_read_is_known():
    # Those of the group "method" in the help, but for what all methods have.
    from unloaf.commands.help import options_of
    from unloaf.config.without_effect import _READ

    flags = {option.flags[0] for option in options_of(Config) if option.group == "method"}
    known = {f"--{name.replace('_', '-')}" for names, _, _ in _READ for name in names}
    assert known == flags - {"--method"}
