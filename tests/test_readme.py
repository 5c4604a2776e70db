"""What README and docs say: their examples run, their commands parse, their links and defaults hold."""

import re
import runpy
import shlex
from pathlib import Path

import pytest
import torch

import unloaf
import unloaf.analysis.grids
import unloaf.analysis.loafing
import unloaf.analysis.runs
import unloaf.bench
import unloaf.commands.train
import unloaf.data
import unloaf.demo
import unloaf.language_demo
import unloaf.release.exports
import unloaf.runs.anytime
import unloaf.runs.exits
import unloaf.runs.histories
import unloaf.runs.judge
import unloaf.runs.probe
from unloaf.commands import main as cli
from unloaf.commands.help import options_of
from unloaf.config import Config, dump_config
from unloaf.engine.changed_settings import FREE_SETTINGS
from unloaf.engine.log_lines import summary
from unloaf.engine.loop import EpochRow

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
TEXTS = {page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8") for page in PAGES}
PROSE = {name: re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S) for name, text in TEXTS.items()}


def fenced(text: str, *languages: str) -> list[str]:
    blocks = re.findall(r"^```(\w+)\n(.*?)^```$", text, flags=re.M | re.S)
    return [code for language, code in blocks if language in languages]


def shell_lines(name: str) -> list[str]:
    lines = [line for block in fenced(TEXTS[name], "sh", "bash") for line in block.splitlines()]
    return [line.removeprefix("$ ") for line in lines] + re.findall(r"`([^`\n]+)`", PROSE[name])


def commands(program: str) -> list[str]:
    return sorted({line for name in TEXTS for line in shell_lines(name) if line.startswith(f"{program} ")})


@pytest.mark.parametrize("name", [name for name, text in TEXTS.items() if fenced(text, "python")])
def test_examples_of_a_page_run_from_top_to_bottom(name: str):
    torch.manual_seed(0)
    namespace: dict[str, object] = {"__name__": "example"}
    for code in fenced(TEXTS[name], "python"):
        exec(compile(code, name, "exec"), namespace)


def test_every_kind_of_command_is_documented():
    assert set(cli._COMMANDS) <= {command.split()[1] for command in commands("unloaf")}


def write_config(file: Path) -> None:
    file.parent.mkdir(parents=True)
    file.write_text(dump_config(Config()), encoding="utf-8")


@pytest.mark.parametrize("command", commands("unloaf"))
def test_command_parses(command: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def parsed(*args: object, **kwargs: object):
        raise SystemExit(0)

    for module, name in (
        (unloaf.commands.train, "open_run"),
        (unloaf.demo, "run_demo"),
        (unloaf.language_demo, "run_language_demo"),
        (unloaf.bench, "bench_step"),
        (unloaf.runs.judge, "judge_run"),
        (unloaf.runs.anytime, "judge_anytime"),
        (unloaf.runs.exits, "judge_exits_of"),
        (unloaf.analysis.runs, "open_alike"),
        (unloaf.analysis.loafing, "subnets_to_compare"),
        (unloaf.analysis.loafing, "untrained"),
        (unloaf.analysis.grids, "own_grid"),
        (unloaf.runs.histories, "read_histories"),
        (unloaf.runs.probe, "probe_run"),
        (unloaf.data, "check_images"),
        (unloaf.release.exports, "export_run"),
        (unloaf.release.predictions, "predict_run"),
        (unloaf.release.exports, "export_elastic"),
    ):
        monkeypatch.setattr(module, name, parsed)
    monkeypatch.chdir(tmp_path)
    words = shlex.split(command, comments=True)[1:]
    if "-c" in words:
        write_config(Path(words[words.index("-c") + 1]))
    if "--resume" in words and words[words.index("--resume") + 1] != "auto":
        write_config(Path(words[words.index("--resume") + 1]) / "args.yaml")
    try:
        code = cli.main(words)
    except SystemExit as error:
        code = error.code
    assert code == 0


@pytest.mark.parametrize("command", commands("make"))
def test_make_target_exists(command: str):
    target = shlex.split(command, comments=True)[1]
    assert f"\n{target}:" in (ROOT / "Makefile").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", TEXTS)
def test_relative_links_resolve(name: str):
    for link in re.findall(r"\]\(([^)\s]+)\)", PROSE[name]):
        if link.startswith(("https://", "http://")):
            continue
        path, _, anchor = link.partition("#")
        target = ((ROOT / name).parent / path).resolve() if path else ROOT / name
        assert target.is_file() or (target.is_dir() and not anchor), link
        if anchor:
            heads = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), flags=re.M)
            assert anchor in [re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads], link


@pytest.mark.parametrize("name", TEXTS)
def test_public_names_exist(name: str):
    rooms = {"integrations", "language", "measure", "passes", "recipes"}
    for public in set(re.findall(r"\bunloaf\.([A-Za-z_]\w*)", TEXTS[name])) - rooms:
        assert public in unloaf.__all__


CARDS = {
    "common-training": unloaf.CommonTraining,
    "stochastic-depth": unloaf.StochasticDepth,
    "stimulative-training": unloaf.StimulativeTraining,
    "stimulative-training-plus": unloaf.stimulative_plus,
    "group-knowledge-training": unloaf.GroupKnowledgeTraining,
    "ground-truth-training": unloaf.GroundTruthTraining,
}


GENERATE = runpy.run_path(str(ROOT / "docs" / "generate.py"))


@pytest.mark.parametrize("name", [name for name, text in TEXTS.items() if "<!-- end of table -->" in text])
def test_generated_tables_are_current(name: str):
    assert GENERATE["current"](TEXTS[name]) == TEXTS[name], "make docs"


def test_every_option_and_parameter_has_a_table():
    page = TEXTS["docs/command-line.md"]
    for command, kind in GENERATE["COMMANDS"].items():
        table = "".join(
            re.findall(rf"<!-- options: {command}(?:, [\w ]+)? -->(.*?)<!-- end of table -->", page, flags=re.S)
        )
        stated = {flag for row in re.findall(r"^\| (`-[^|]*) \|", table, flags=re.M) for flag in row.split("`")[1::2]}
        assert stated == {flag for one in options_of(kind) for flag in one.flags if not flag.startswith("--no-")}
    for card, method in CARDS.items():
        assert f"<!-- parameters: {method.__name__} -->" in TEXTS[f"docs/methods/{card}.md"]


def section(heading: str) -> str:
    return TEXTS["docs/command-line.md"].partition(f"# {heading}\n")[2].partition("\n#")[0]


def test_settings_that_may_change_on_resume_are_stated():
    stated = section("Resuming").partition("may change:")[2].partition(". ")[0]
    assert set(re.findall(r"`(\w+)`", stated)) == FREE_SETTINGS


def test_columns_of_the_summary_are_stated_in_their_order():
    row = EpochRow(epoch=1, steps=1, train_loss=1.0, eval=None, lr=0.1, seconds=1.0)
    table = section("The run folder").partition("Columns of `summary.csv`")[2].partition("Events")[0]
    stated = [name for cell in re.findall(r"^\| ([a-z][\w, ]*) \|", table, flags=re.M) for name in cell.split(", ")]
    assert stated[1:] == list(summary(row, Config(model_ema=True, eval_subnets=1)))
