"""The recipes of `unloaf demo`: one small network on scikit-learn's digits, one function per method.

All five share images, network, number of epochs, batch size and warm-up. Learning rate, weight
decay and one setting of the method's own were chosen on the 300 validation images, with the
same budget for each method: four tries at seed 0, then three candidates at seeds 0 to 2. Taken
was the candidate with the highest mean accuracy of the main network, at a tie the one with the
higher mean over subnets. They are listed at each function as lr / weight decay: main, subnets
(percent, mean over three seeds).

Result of `unloaf demo --seeds 3`, top-1 in percent of the 600 test images, mean and
standard deviation over seeds 0 to 2 (torch 2.15, one thread of a shared 2-core AMD EPYC
virtual machine, 81 s of processor time for a seed):

    method             main          mean subnet   worst subnet   cost    FLOPs limit
    common training    97.9 +- 0.4   86.7 +- 3.9   58.7 +- 10.0   1.00    1.00
    stochastic depth   97.5 +- 0.6   94.0 +- 1.1   81.6 +-  2.3   0.94    0.91
    ST                 98.4 +- 0.5   98.3 +- 0.5   97.8 +-  0.6   1.39    1.33
    ST++               97.9 +- 0.2   97.1 +- 0.2   94.0 +-  1.0   3.40    3.20
    GKT                98.7 +- 0.3   98.2 +- 0.6   97.4 +-  0.5   2.29    2.24

Caveats. The test images were looked at twice: first with settings chosen from the four tries
at seed 0 alone, then, because one seed of 300 images decides little, with those of the three
candidates. The choice for three methods changed. In the first look common training (0.1 / 2e-3,
which ties with the present setting on validation) had 98.4 +- 0.2, subnets 86.1 +- 4.5, and
ST 98.2 +- 0.3; against that baseline ST++ is 0.5 points behind. 600 images alone give an
accuracy of 98 % a standard error of 0.6 points: the main networks do not differ significantly here.
Their subnets do.
"""

from __future__ import annotations

from dataclasses import replace

from unloaf.config import Config


def common() -> Config:
    """Common training: the cross-entropy of the main network alone.

    0.2 / 5e-4: 98.3, 86.7. Others: 0.1 / 2e-3: 98.3, 85.5; 0.2 / 2e-3: 98.2, 89.1.

    >>> common().method, common().epochs
    ('common', 25)
    """
    return Config(
        dataset="digits",
        model="cifar/resnet26",
        width=8,
        method="common",
        epochs=25,
        batch_size=64,
        lr=0.2,
        weight_decay=5e-4,
        warmup_epochs=2,
    )


def stochastic_depth() -> Config:
    """Stochastic depth: blocks are dropped at random, later ones more often.

    0.1 / 2e-3: 97.9, 94.6. Others: 0.05 / 5e-4: 97.2, 90.4; 0.05 / 2e-3: 96.9, 90.0. A final
    survival of 0.5 was no better at seed 0.
    """
    return replace(common(), method="stochastic-depth", lr=0.1, weight_decay=2e-3, final_survival=0.8)


def stimulative() -> Config:
    """ST: one ordered subnet per step learns the main network's prediction.

    0.2 / 2e-3: 99.1, 98.7. Others: 0.2 / 5e-4: 98.8, 98.2; 0.1 / 2e-3: 98.1, 97.4. A weight of 0.5
    was worse at seed 0.
    """
    return replace(common(), method="st", lr=0.2, weight_decay=2e-3)


def stimulative_plus() -> Config:
    """ST++: six subnets per step, on smaller images, learn the direction of the main network's logits.

    0.05 / 5e-4: 98.6, 97.5. Others: 0.05 / 2e-3: 98.4, 97.6; 0.1 / 2e-3: 98.1, 97.8. Inter-stage
    sampling, the paper's, gave 99.0 and 96.2 at seed 0 (ordered: 99.3, 98.2): it never trains
    subnets of fewer than 6 blocks, which are evaluated here.

    Three settings depart from the paper's, which are meant for ImageNet, and were found in nine
    more trials on a network twice as wide, where the paper's gave 43.7 % (lr 0.1). With ten
    classes a direction is a matter of few numbers and, while the logits are small, of noise:
    `eps` 1 lets short logits have short directions. The six losses weigh one together, not
    six. Eight pixels do not bear a third of their side, hence `min_ratio` 0.75.
    """
    return replace(
        common(),
        method="st++",
        lr=0.05,
        weight_decay=5e-4,
        sampler="ordered",
        min_ratio=0.75,
        eps=1.0,
        subnet_weight=0.17,
    )


def group_knowledge() -> Config:
    """GKT: two chains of three nested subnets, each taught by the group above it.

    0.2 / 5e-4: 98.3, 98.0. Others: 0.2 / 2e-3: 98.0, 97.8; 0.1 / 2e-3: 98.1, 98.2.

    The six losses weigh one together, as in ST++; a weight of 0.5 for each was no better at
    seed 0, and one of 1 cost the main network of a network twice as wide 1.4 points.
    """
    return replace(common(), method="gkt", lr=0.2, weight_decay=5e-4, subnet_weight=0.17)
