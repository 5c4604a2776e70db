"""`unloaf inspect`, and the costs of a model that nobody has trained."""

import json
import sys
from dataclasses import asdict
from itertools import pairwise

import pytest
import timm
import torch
from torch import nn

import unloaf
from unloaf.commands import main as cli
from unloaf.inspection import cost_of_model, inspect_model, sections
from unloaf.measure.costs import gmacs
from unloaf.measure.flops import StepCounter, method_flops
from unloaf.models.build import build_model


@pytest.fixture(scope="module")
def resnet():
    return inspect_model("timm/resnet50", img_size=64)


@pytest.fixture(scope="module")
def vit():
    return inspect_model("timm/vit_tiny_patch16_224", num_classes=10)


def test_stages_of_a_resnet(resnet):
    assert [stage.name for stage in resnet.stages] == ["layer1", "layer2", "layer3", "layer4"]
    assert [stage.depths[-1] for stage in resnet.stages] == [3, 4, 6, 3]  # He et al. 2016, table 1
    assert {block.kind for stage in resnet.stages for block in stage.blocks} == {"Bottleneck"}
    assert resnet.params == 25_557_032


def test_reason_names_both_shapes(resnet):
    head, second = resnet.stages[1].blocks[:2]
    assert (head.skippable, head.reason) == (False, "changes shape (256x16x16 -> 512x8x8)")
    assert (second.skippable, second.reason) == (True, None)


def test_subnets_are_counted_by_rule(resnet):
    # 3 * 4 * 6 * 3 depths; (3,), (3, 4), (3, 4, 5, 6), (3,) between stages; 2 + 3 + 5 + 2 blocks that can be skipped.
    assert resnet.subnets == {"ordered": 216, "inter-stage": 8, "stochastic": 2**12}


def test_stage_that_may_not_be_empty_has_one_subset_less(vit):
    assert vit.subnets["stochastic"] == 2**12 - 1


def test_blocks_of_no_stage_are_listed():
    found = inspect_model("timm/efficientnet_b0", img_size=32)
    assert found.timm_keyword is None
    assert [block.path for block in found.others] == ["blocks.6.0"]
    assert found.others[0].reason == "changes shape (192x1x1 -> 320x1x1)"


@pytest.mark.parametrize(
    ("name", "sides", "legal"),
    [("timm/resnet18", "any", ()), ("timm/swin_tiny_patch4_window7_224", "fixed", (224,))],
)
def test_legal_sides(name, sides, legal):
    found = inspect_model(name, img_size=None if sides == "fixed" else 64)
    assert (found.sides, found.legal_sides) == (sides, legal)


def test_vit_has_one_size_and_one_shape_of_block(vit):
    assert (vit.sides, vit.block_shapes, vit.timm_keyword) == ("fixed", 1, "depth")
    assert {cost.method: cost.note for cost in vit.methods}["st++"].startswith("inputs of full size")


def test_subnets_of_a_vit_cost_hardly_anything_where_prefixes_are_shared(vit):
    shared = {cost.method: cost.shared for cost in vit.methods}
    assert shared["st"] == pytest.approx(1, abs=0.01)
    assert shared["gkt"] == pytest.approx(1, abs=0.01)
    assert {cost.method: cost.separate for cost in vit.methods}["st"] > 1.3


def test_patches_leave_some_sides(monkeypatch, tmp_path):
    (tmp_path / "patchy.py").write_text(
        "import timm\n"
        "def net():\n"
        "    return timm.create_model('vit_tiny_patch16_224', depth=2, img_size=64, dynamic_img_size=True)\n"
    )
    monkeypatch.chdir(tmp_path)
    found = inspect_model("patchy:net", img_size=64)
    assert (found.sides, found.legal_sides) == ("legal", (32, 48, 64))
    sys.modules.pop("patchy")


def test_keyword_of_timm_is_found_for_a_model_of_a_function(monkeypatch):
    module = type(sys)("made_by_timm")
    module.net = lambda: timm.create_model("resnet18", num_classes=3)
    monkeypatch.setitem(sys.modules, "made_by_timm", module)
    found = inspect_model("made_by_timm:net", img_size=64)
    assert found.timm_keyword == "layers"
    assert found.advice["export"].startswith("timm builds ordered subnets itself (layers=...)")


@pytest.mark.parametrize(("name", "keyword"), [("timm/convnext_atto", "depths"), ("tv/resnet18", None)])
def test_keyword_of_timm(name, keyword):
    assert inspect_model(name, img_size=32).timm_keyword == keyword


def test_keyword_of_a_resnet_builds_the_subnet(resnet):
    assert resnet.timm_keyword == "layers"


@pytest.mark.parametrize("name", ["cifar/resnet20", "timm/resnet18"])
@pytest.mark.parametrize("sampler", [unloaf.OrderedSampler(), unloaf.StochasticSampler()])
def test_flops_of_separate_subnets_are_those_of_passes_that_run(name, sampler):
    model, x = build_model(name, num_classes=10), torch.zeros(1, 3, 32, 32)
    stages = unloaf.find_stages(model, x)
    method = unloaf.StimulativeTraining(model, stages, num_subnets=3, sampler=sampler)
    forward = gmacs(model, x)
    for request in method.draw(1, 32):
        flops = StepCounter(model, stages, x)([request], main=False)
        with unloaf.active_subnet(model, stages, request.subnet):
            assert flops.separate / flops.common == pytest.approx(gmacs(model, x) / forward)


def test_interpolated_sides_are_within_5_percent():
    """Sides are whole pixels after each halving; between knots the square of the side is only nearly right."""
    model, x = build_model("tv/resnet18", num_classes=10).to("meta"), torch.zeros(1, 3, 128, 128, device="meta")
    stages = unloaf.find_stages(build_model("tv/resnet18", num_classes=10), torch.zeros(1, 3, 128, 128))
    method = unloaf.stimulative_plus(model, stages, num_subnets=3)
    quick = StepCounter(model, stages, x, sides=[55, 70, 84, 99, 113, 128])
    ran = []
    whole = method_flops(method, x, range(4))
    quick.model.register_forward_hook(lambda *_: ran.append(1))
    assert quick.mean(method, x, range(4)) == pytest.approx(whole, rel=0.05)
    assert len(ran) <= len(quick.sides)


def test_model_is_looked_over_without_being_changed():
    name = "cifar/resnet14"
    assert inspect_model(name) == inspect_model(name)


def in_process(capsys, *words):
    code = cli.main([str(word) for word in words])
    return code, *capsys.readouterr()


def test_json_has_what_was_found(capsys):
    code, out, err = in_process(capsys, "inspect", "cifar/resnet14", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out) == json.loads(json.dumps(asdict(inspect_model("cifar/resnet14"))))


def test_text_names_stages_methods_and_advice(capsys):
    code, out, _ = in_process(capsys, "inspect", "cifar/resnet20", "--num-classes", "10")
    assert code == 0
    assert out.startswith("cifar/resnet20: 269,722 parameters, 0.04055 GMACs for an input of 3x32x32\n")
    for part in ("0 changes shape (16x32x32 -> 32x16x16)", "27 ordered", "stochastic-depth", "5 distinct block shapes"):
        assert part in out


def test_long_runs_of_sides_are_abbreviated(vit):
    text = "\n".join(line for section in sections(vit) for line in section.lines)
    assert "smaller inputs for subnets: none, the model has a fixed size" in text


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("tv/vgg11", "VGG has no residual blocks"),
        ("timm/resnet5O", "did you mean timm/resnet50"),
        ("hf/norfolder/x", "has no config.json"),
        ("hf/VitConfig", "no class of transformers; did you mean hf/Vi"),
        ("hf/LlamaConfig", "6,738,415,616 parameters"),
        ("nomodule_of_mine:net", "module nomodule_of_mine cannot be imported"),
        ("json:net", "module json has no function 'net'"),
        ("json:dumps", "dumps\\(\\) raised TypeError"),
        ("platform:machine", "machine\\(\\) returned str; return a torch.nn.Module"),
    ],
)
def test_bad_model_exits_2_with_one_line(capsys, model, message):
    words = ["--img-size", "64"] if model.startswith("tv") else []
    code, out, err = in_process(capsys, "inspect", model, *words)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message.replace("\\", "") in err


def test_function_is_never_run_from_a_configuration(capsys, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("raise RuntimeError('was imported')")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text("model: mine:net\n")
    code, _, err = in_process(capsys, "train", "-c", "run.yaml", "--output", tmp_path / "out", "--epochs", 1)
    assert code == 2
    assert "add --run-own-code if you trust it" in err
    assert "mine" not in sys.modules


def test_function_may_give_an_example(tmp_path, monkeypatch):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.f = nn.Linear(4, 4)

        def forward(self, x):
            return x + self.f(x)

    def made():
        return nn.Sequential(Block(), Block(), nn.Linear(4, 3)), torch.zeros(1, 4)

    module = type(sys)("made_here")
    module.net = made
    monkeypatch.setitem(sys.modules, "made_here", module)
    found = inspect_model("made_here:net")
    assert (found.sides, found.input, found.stages[0].depths) == ("none", (4,), (1, 2))


@pytest.mark.parametrize("command", [["inspect"], ["subnets", "--subnets", "1"]])
@pytest.mark.parametrize(
    ("made", "flags", "left_out"),
    [
        ("model", ["--num-classes", "10"], "--num-classes"),
        ("model and example", ["--img-size", "32"], "--img-size"),
        ("model and example", ["--img-size", "32", "--num-classes", "10"], "--num-classes and --img-size"),
    ],
)
def test_what_a_function_decides_is_not_silently_ignored(capsys, monkeypatch, command, made, flags, left_out):
    module = type(sys)("decided_here")
    model = build_model("cifar/resnet14", num_classes=3)
    module.net = lambda: model if made == "model" else (model, torch.zeros(1, 3, 16, 16))
    monkeypatch.setitem(sys.modules, "decided_here", module)
    code, out, err = in_process(capsys, *command, "decided_here:net", *flags)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert f"the {made} that net() returns" in err
    assert err.endswith(f"; leave {left_out} out\n")


def test_drawn_subnets_of_a_model_are_distinct_and_begin_with_the_whole():
    rows, times = cost_of_model("cifar/resnet32", subnets="4", device="cpu")
    assert str(rows[0].subnet) == "5-5-5"
    assert len({row.subnet for row in rows}) == 5
    assert (rows, times) == cost_of_model("cifar/resnet32", subnets="4", device="cpu")


def test_more_subnets_than_can_be_listed_are_drawn():
    rows, _ = cost_of_model("cifar/resnet110", subnets="2", device="cpu")  # 18 ** 3
    assert str(rows[0].subnet) == "18-18-18"
    assert len({row.subnet for row in rows}) == 3


def test_all_subnets_of_a_model(capsys, tmp_path):
    file = tmp_path / "costs.csv"
    code, out, err = in_process(capsys, "subnets", "cifar/resnet14", "--subnets", "all", "--output", file)
    assert (code, err) == (0, "")
    lines = [line.split() for line in out.splitlines() if line[1:2].isdigit()]
    assert [line[0] for line in lines] == ["2-2-2", "2-2-1", "2-1-2", "2-1-1", "1-2-2", "1-2-1", "1-1-2", "1-1-1"]
    assert file.read_text().splitlines()[0] == "subnet,params,gmacs"
    assert all(int(a[1].replace(",", "")) >= int(b[1].replace(",", "")) for a, b in pairwise(lines[:2]))


def test_latency_of_a_model_is_printed_with_device_and_threads(capsys):
    words = ("--latency", "-b", "1", "2", "--repeats", "2", "--subnets", "1", "--device", "cpu")
    code, out, _ = in_process(capsys, "subnets", "cifar/resnet8", *words)
    assert code == 2  # one block in each stage
    code, out, _ = in_process(capsys, "subnets", "cifar/resnet14", *words)
    assert code == 0
    assert "ms (p95), batch of 2" in out
    assert f"of 2 passes, on cpu, {torch.get_num_threads()} thread(s)" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["cifar/resnet20", "--subnets", "pareto"], "a model that is not trained has no accuracy; give a run"),
        (["cifar/resnet20", "--subnets", "0"], "subnets '0': give all, pareto or a number"),
        (["cifar/resnet20", "-b", "0"], "batch_size (0,): give one or more numbers of at least 1"),
        (["cifar/resnet20", "--repeats", "0"], "repeats 0: give at least 1"),
        (["output/norun"], "output/norun is not a run"),
        (["tv/vgg11", "--img-size", "64"], "VGG has no residual blocks"),
        (["resnet18"], "is more than one"),
    ],
)
def test_bad_subnets_exit_2_with_one_line(capsys, words, message):
    code, out, err = in_process(capsys, "subnets", *words)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err
