"""`unloaf bench step`: what it measures, and what becomes of networks and modes that cannot be measured."""

import csv
import json
import xml.etree.ElementTree as ET
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

import unloaf
from toy_networks import ToyNetwork
from unloaf import bench
from unloaf.bench import tables, write_rows
from unloaf.commands import main as cli
from unloaf.measure import bench as session
from unloaf.measure.networks import STANDARD, Network, build_network, chosen_networks, smaller_inputs
from unloaf.measure.step_time import Setup, StepTimeRow, by_setup, run_step, step_time_rows

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
SMALL = {"model": ("cifar/resnet14",), "batch_size": 2, "repeats": 2, "num_subnets": 2, "device": "cpu"}


def row(method, *, relative=2.0, setup=None, separate=4.0):
    return StepTimeRow(
        method=method,
        seconds=0.1,
        relative=relative,
        spread=(relative, relative),
        limit=1.5,
        over_limit=relative / 1.5,
        separate=separate,
        separate_limit=3.0,
        peak_bytes=10,
        relative_memory=1.0,
        setup=setup or Setup(network="cifar/resnet14", input_size=32, batch_size=2),
    )


@pytest.fixture
def said():
    class Lines(list):
        def __call__(self, line):
            self.append(line)

    return Lines()


def measured(said, name="cifar/resnet14", **options):
    network = chosen_networks((name,), img_size=None, num_classes=None)[0]
    given = {"methods": ("common", "st"), "modes": ("eager",), "batch_size": 2, "num_subnets": 1, "repeats": 1}
    given |= {"amp": False, "channels_last": False, "device": torch.device("cpu")} | options
    clock = given.pop("clock", session.Clock(None, parts=1))
    return list(session.measure(network, session.Plan(**given), clock=clock, say=said))


def test_names_sides_and_classes_of_networks():
    found = chosen_networks(("resnet18", "cifar/resnet56", "resnet18@96"), img_size=None, num_classes=None)
    assert found == [
        Network("resnet18", 64, 1000),
        Network("cifar/resnet56", 32, 10),
        Network("resnet18", 96, 1000),
    ]
    assert chosen_networks(("vit_tiny_patch16_224",), img_size=None, num_classes=7)[0].side == 224
    assert chosen_networks(("cifar/resnet56",), img_size=16, num_classes=None)[0].side == 16


def test_the_standard_networks_are_those_of_the_issue():
    listed = chosen_networks(("standard",), img_size=None, num_classes=None)
    assert [(n.name, n.side) for n in listed if n.name.startswith("cifar/")] == [
        ("cifar/resnet50", 32),
        ("cifar/resnet56", 32),
        ("cifar/resnet110", 32),
    ]
    assert [n.side for n in listed if n.name.startswith("timm/")] == [224] * 5
    assert len(listed) == len(STANDARD) == 8


@pytest.mark.parametrize("name", ["cifar/resnet56@", "cifar/resnet56@0", "cifar/resnet56@x"])
def test_a_side_that_is_none_is_refused(name):
    with pytest.raises(ValueError, match="give a side in pixels after the @"):
        chosen_networks((name,), img_size=None, num_classes=None)


def test_a_vision_transformer_sees_multiples_of_its_patch():
    model = build_network(Network("timm/vit_tiny_patch16_224", 64, 3), varying=True)
    assert smaller_inputs(model, 64, per="step") == unloaf.SmallerInputs(per="step", sides=(32, 48, 64))


def test_a_network_of_one_size_has_no_smaller_inputs():
    model = build_network(Network("timm/vit_tiny_patch16_224", 64, 3), varying=False)
    with pytest.raises(ValueError, match="takes none of the smaller sides 27 to 63"):
        smaller_inputs(model, 64, per="subnet")


def test_rows_carry_network_and_mode(said):
    [[common, st]] = measured(said, amp=True, channels_last=True)
    expected = Setup("cifar/resnet14", 32, 2, "cpu", "bfloat16", False, "channels_last")
    assert common.setup == st.setup == expected
    assert said == []


def test_amp_runs_the_network_in_bfloat16_and_its_gradients_in_float32():
    model, seen = ToyNetwork(classes=3), []
    model.head.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    method = unloaf.StimulativeTraining(model, unloaf.find_stages(model, torch.zeros(1, 4)))
    seen.clear()
    for separate in (False, True):
        run_step(method, torch.randn(8, 4), torch.arange(8) % 3, 0, dtype="bfloat16", separate=separate)
    assert set(seen) == {torch.bfloat16}
    assert model.head.weight.grad.dtype == torch.float32


def test_compiled_rows_say_so_and_meet_every_graph_before_the_clock_runs(said, monkeypatch):
    compile_blocks = session.compile_blocks
    monkeypatch.setattr(session, "compile_blocks", lambda *args: compile_blocks(*args, backend="eager"))
    eager, compiled = measured(said, modes=("eager", "compiled"), methods=("common", "st++-one-side"), repeats=2)
    assert [r.setup.compiled for r in (*eager, *compiled)] == [False] * 2 + [True] * 2
    # Block shapes of resnet14: 16 wide, 16 to 32, 32, 32 to 64, 64. The smaller images of ST++ are other sizes.
    assert {r.graphs for r in eager} == {0}
    assert len({r.graphs for r in compiled}) == 1
    assert compiled[0].graphs > 5
    assert [r.late_graphs for r in compiled] == [0, 0]
    assert [r.limit for r in compiled] == pytest.approx([r.limit for r in eager])


def test_a_machine_that_cannot_compile_gives_eager_figures_and_one_line(said, monkeypatch):
    def cannot(*args):
        raise RuntimeError("no compiler found\nwith many\nmore lines")

    monkeypatch.setattr(session, "compile_blocks", cannot)
    [rows] = measured(said, modes=("compiled",))
    assert [r.method for r in rows] == ["common", "st"]
    assert not rows[0].setup.compiled
    expected = "cifar/resnet14: this machine cannot compile the blocks (RuntimeError: no compiler found)"
    assert said == [expected + "; eager figures instead"]


def test_eager_figures_stand_for_both_modes_where_the_machine_cannot_compile(said, monkeypatch):
    monkeypatch.setattr(session, "compile_blocks", lambda *args: None)
    eager, compiled = measured(said, modes=("eager", "compiled"))
    assert (len(eager), compiled) == (2, [])
    assert said[0].endswith("(no graph came of it); its eager figures stand for both")


def test_a_method_that_cannot_train_a_network_costs_its_own_row(said, monkeypatch):
    monkeypatch.setattr(session, "build_network", lambda network, varying: build_network(network, varying=False))
    [rows] = measured(said, "timm/vit_tiny_patch16_224@32", methods=("common", "st++", "st"))
    assert [r.method for r in rows] == ["common", "st"]
    assert said[0].startswith("timm/vit_tiny_patch16_224: st++ left out: VisionTransformer takes none of the smaller")


def test_a_network_that_cannot_be_built_does_not_crash_the_others(tmp_path):
    rows = bench.bench_step(**SMALL | {"model": ("timm/nope", "cifar/resnet14")}, methods=["st"], output=str(tmp_path))
    assert {r.setup.network for r in rows} == {"cifar/resnet14"}
    assert "timm/nope, eager: left out" in json.loads((tmp_path / "step_time.json").read_text())["notes"][0]


def test_where_nothing_can_be_measured_the_reason_is_the_error():
    with pytest.raises(ValueError, match="no such timm model"):
        bench.bench_step(**SMALL | {"model": ("timm/nope",)}, methods=["st"])


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"methods": ["sst"]}, "methods: sst is not known; give some of common, stochastic-depth, st, "),
        ({"methods": ["st"], "modes": ("quick",)}, "modes: quick is not known; give some of eager, compiled"),
        pytest.param(
            {"methods": ["st"], "device": "cuda"},
            r"device cuda: there is no accelerator as torch .* sees this machine; give --device cpu, or leave it out",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one"),
        ),
    ],
)
def test_unknown_words_are_refused(options, reason):
    with pytest.raises(ValueError, match=reason):
        bench.bench_step(**SMALL | options)


def test_when_the_time_is_up_a_network_is_not_begun_and_a_line_says_so(said):
    clock = session.Clock(1e-9, parts=1)
    assert measured(said, clock=clock) == [[]]
    assert said == ["cifar/resnet14, eager: not begun, the time is up"]


def test_what_was_not_begun_is_in_the_file_and_on_the_bar(tmp_path, monkeypatch):
    shares = iter([60.0, 0.0])
    monkeypatch.setattr(session.Clock, "share", lambda self: next(shares))
    said, advanced = [], []

    @contextmanager
    def watched(console, *, total, label):
        yield SimpleNamespace(line=said.append, advance=advanced.append)

    monkeypatch.setattr(bench, "show_progress", watched)
    model = ("cifar/resnet14", "cifar/resnet20")
    rows = bench.bench_step(**SMALL | {"model": model}, methods=["st"], minutes=1, output=str(tmp_path))
    assert {row.setup.network for row in rows} == {"cifar/resnet14"}
    written = json.loads((tmp_path / "step_time.json").read_text(encoding="utf-8"))
    assert written["notes"] == said == ["cifar/resnet20, eager: not begun, the time is up"]
    assert len(written["rows"]) == 2
    assert advanced == list(model)


def test_time_that_one_part_leaves_is_shared_by_the_others(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(session.time, "monotonic", lambda: now[0])
    clock = session.Clock(2, parts=3)
    assert clock.share() == 40
    now[0] = 20.0
    assert clock.share() == 50
    now[0] = 130.0
    assert clock.share() == 0


def test_rounds_end_with_the_time_but_one_is_always_measured():
    model = ToyNetwork(classes=3)
    x, y = torch.randn(8, 4), torch.arange(8) % 3
    methods = {"common": unloaf.CommonTraining(model)}
    [common] = step_time_rows(methods, x, y, repeats=10**6, seconds=0.0)
    assert common.rounds == 1


def test_files_hold_the_same_figures_and_the_settings(tmp_path):
    rows = bench.bench_step(**SMALL, methods=["st"], output=str(tmp_path), minutes=5)
    written = json.loads((tmp_path / "step_time.json").read_text(encoding="utf-8"))
    assert {"command", "hardware", "versions"} <= set(written["environment"])
    assert written["settings"]["model"] == ["cifar/resnet14@32"]
    assert written["settings"]["methods"] == ["common", "st"]
    assert [entry["relative"] for entry in written["rows"]] == [r.relative for r in rows]
    with (tmp_path / "step_time.csv").open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["network"] for line in lines] == ["cifar/resnet14"] * 2
    assert [float(line["highest"]) for line in lines] == [r.spread[1] for r in rows]
    assert (lines[0]["compiled"], lines[0]["dtype"], lines[0]["memory_format"]) == ("False", "float32", "contiguous")


def test_files_that_cannot_be_written_are_told(tmp_path):
    (tmp_path / "taken").write_text("", encoding="utf-8")
    with pytest.raises(ValueError, match=r"cannot write .*taken.*give another --output"):
        write_rows(tmp_path / "taken", [row("common")], {})


def test_each_network_and_mode_has_a_table_of_its_own():
    other = Setup(network="cifar/resnet56", input_size=32, batch_size=2, compiled=True)
    made = tables([row("common"), row("common", setup=other), row("st", setup=other)])
    assert [(table.title, table.row_count) for table in made] == [
        ("cifar/resnet14, 32 px, batch 2, cpu, float32, eager", 1),
        ("cifar/resnet56, 32 px, batch 2, cpu, float32, compiled", 2),
    ]


def test_the_picture_names_networks_methods_and_measured_times():
    from unloaf.pages.plots import step_time_bars

    other = Setup(network="timm/vit_small_patch16_224", input_size=224, batch_size=2)
    picture = step_time_bars(
        by_setup([row("st", relative=2.34), row("gkt", relative=3.45, setup=other, separate=None)])
    )
    texts = {element.text for element in ET.fromstring(picture).iter() if element.tag.endswith("text")}
    assert {"cifar/resnet14", "timm/vit_small_patch16_224", "st", "gkt", "2.34", "3.45", "FLOPs limit"} <= texts
    assert "4.0" in texts  # separate passes of st


def test_command_prints_tables_and_writes_the_picture(tmp_path, capsys):
    words = (
        "bench step --model cifar/resnet14@16 cifar/resnet14 -b 2 --repeats 1 --num-subnets 1 --methods st --device cpu"
    )
    assert cli.main([*words.split(), "--plot", str(tmp_path / "bars.svg")]) == 0
    printed = capsys.readouterr().out
    assert printed.index("cifar/resnet14, 16 px, batch 2") < printed.index("cifar/resnet14, 32 px, batch 2")
    assert (tmp_path / "bars.svg").read_text(encoding="utf-8").startswith("<svg")


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("--repeats 0", "repeats 0: give at least 1"),
        ("--minutes 0", "minutes 0.0: give a number above 0"),
        ("--plot bars.png", "plot 'bars.png': give a file that ends in .svg"),
    ],
)
def test_options_out_of_range_are_refused(words, reason, capsys):
    assert cli.main(["bench", "step", *words.split()]) == 2
    assert reason in capsys.readouterr().err
