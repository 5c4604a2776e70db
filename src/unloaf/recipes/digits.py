"""The recipes of `unloaf demo`: one small network on scikit-learn's digits, one function per method."""

from __future__ import annotations

from dataclasses import replace

from unloaf.engine.config import Config


def common() -> Config:
    """Common training: the cross-entropy of the main network alone."""
    return Config(
        dataset="digits",
        model="cifar/resnet26",
        width=16,
        method="common",
        epochs=25,
        batch_size=64,
        lr=0.1,
        weight_decay=5e-4,
        warmup_epochs=2,
    )


def stochastic_depth() -> Config:
    """Stochastic depth: blocks are dropped at random, later ones more often."""
    return replace(common(), method="stochastic-depth", final_survival=0.5)


def stimulative() -> Config:
    """ST: one ordered subnet per step learns the main network's prediction."""
    return replace(common(), method="st")


def stimulative_plus() -> Config:
    """ST++: six subnets per step, on smaller images, learn the direction of the main network's logits."""
    return replace(common(), method="st++", sampler="ordered", min_ratio=0.75, eps=1.0, subnet_weight=0.17)


def group_knowledge() -> Config:
    """GKT: two chains of three nested subnets, each taught by the group above it."""
    return replace(common(), method="gkt", subnet_weight=0.17)
