"""docs/detection.md says what its record says."""

import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
NAMES = {
    "common training": "common",
    "ST*, the same images": "same, shared",
    "ST*, the same images, separate passes": "same, separate",
    "ST*, smaller images": "smaller, shared",
    "ST*, smaller images, separate passes": "smaller, separate",
}


def test_costs_of_a_step_are_those_of_the_record():
    text = (ROOT / "docs" / "detection.md").read_text(encoding="utf-8")
    record = json.loads((ROOT / "docs" / "results" / "detection-step.json").read_text(encoding="utf-8"))
    stated = re.findall(r"^\| ([^|]+) \| ([\d.]+) \| ([\d.]+) \|$", text, flags=re.M)
    assert [row[0] for row in stated] == list(NAMES)
    for label, time, flops in stated:
        assert (time, flops) == tuple(f"{record[kind][NAMES[label]]:.2f}" for kind in ("time", "flops"))
