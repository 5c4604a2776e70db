"""Peak memory of the losses over a large vocabulary, each in a process of its own.

    python benchmarks/language/loss_memory.py [--positions 1024] [--classes 49152] [--width 576]

Counted from the resident memory with features, head and its gradient in place, MiB. "at once" are torch's losses on all
logits, "in parts" those of `unloaf.language.losses`.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys

CASES = ("cross-entropy at once", "cross-entropy in parts", "KL at once", "KL in parts", "both in parts")


def one(case: str, positions: int, classes: int, width: int) -> float:
    """MiB above what lay there before."""
    import torch
    import torch.nn.functional as F
    from torch import nn

    import unloaf
    from unloaf.language.losses import NextTokenDistance, NextTokenLoss

    torch.set_num_threads(1)
    torch.manual_seed(0)
    head = nn.Linear(width, classes, bias=False)
    head.weight.grad = torch.ones_like(head.weight)
    student, teacher = torch.randn(1, positions, width, requires_grad=True), torch.randn(1, positions, width)
    student.grad = torch.ones_like(student)
    y = torch.randint(classes, (1, positions))
    NextTokenLoss(head)(student[:, :2], y[:, :2]).backward()  # what torch loads when it is first called
    before = resident()
    if case == "cross-entropy at once":
        F.cross_entropy(head(student).flatten(0, 1), y.flatten()).backward()
    if case == "KL at once":
        with torch.no_grad():
            taught = head(teacher)
        unloaf.kl_loss(head(student), taught).backward()
    if case.startswith(("cross-entropy in", "both")):
        NextTokenLoss(head)(student, y).backward()
    if case.startswith(("KL in", "both")):
        NextTokenDistance(head)(student, teacher).backward()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before


def resident() -> float:
    """MiB."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("positions", 1024), ("classes", 49152), ("width", 576)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--case", choices=CASES)
    given = parser.parse_args()
    if given.case:
        print(f"{given.case}: {one(given.case, given.positions, given.classes, given.width):.0f} MiB")
        return
    for case in CASES:
        subprocess.run([sys.executable, __file__, *sys.argv[1:], "--case", case], check=True)


if __name__ == "__main__":
    main()
