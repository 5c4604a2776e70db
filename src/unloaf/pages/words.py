"""What methods, rows and columns of the pages mean, a line each. Imports nothing."""

from __future__ import annotations

# By the flag of `unloaf train --method`.
METHOD_MEANINGS = {
    "common": "Common training: the main network alone on the labels; the baseline.",
    "stochastic-depth": "Stochastic depth: each step skips some blocks at random, the deeper the more often "
    "(Huang et al. 2016).",
    "st": "Stimulative training: a drawn subnet also learns the main network's prediction, by KL divergence "
    "(Ye et al. 2022).",
    "st++": "ST++: stimulative training with several subnets, smaller inputs for them and a loss that leaves the size "
    "of the logits alone, KL- (Ye et al. 2023).",
    "gkt": "Group knowledge training: subnets in groups by size, each taught by the group above it (Tang et al. 2023).",
    "st-star": "ST*: subnets learn the targets themselves, for tasks without logits to imitate.",
}

# Of the demo, by the label of a method there.
COMPARISON_WORDS = {
    "main network": "The network with all its blocks; as trained: with the batch-norm statistics of its training; "
    "re-estimated: with statistics estimated anew, as its subnets have them.",
    "mean subnet, worst subnet": "Mean and lowest accuracy of all other ordered subnets: the first blocks of each "
    "stage and no others.",
    "measured cost": "Time of a training step over that of common training.",
    "FLOPs limit": "The same for its arithmetic, no block computed twice: the least that the method can cost.",
    "at equal cost": "The main network on the validation images when its training had cost as much as the cheapest "
    "method's whole training: in the middle of a schedule made for more epochs. What a method reaches at a cost that "
    "it is trained for may be more.",
}

# By the name of a command: what its picture shows, and what the heads of its table mean.
ANALYSIS_PICTURES = {
    "damage": "The figure that decides over the number of deleted blocks: each damaged network a dot, a line through "
    "the means.",
    "logits": "Accuracy over the mean L2 norm of the logits: main networks large, with the standard deviation over the "
    "images, their subnets small.",
    "receptive-field": "How much each pixel contributes to the centre of the last features: the darker, the more.",
    "subnets": "Accuracy over GMACs and, where it was measured, latency; calibration error and agreement over GMACs: a "
    "dot for each subnet, a square for the main network, a line through the Pareto front, a dashed one at the "
    "ensemble.",
    "loafing": "Accuracy of subnets trained alone, hollow, and inside the network, filled; means over seeds.",
    "ablate": "Accuracy of main networks, filled, and of their mean subnets, hollow, and of common training of the "
    "same cost, a bar or a cross; means over seeds.",
    "bound": "Distance of a subnet's cross-entropy from the main network's, a line, and the bound on it, dashes, over "
    "the epochs; medians over images, means over subnets.",
}
ANALYSIS_WORDS = {
    "damage": {"deleted": "How many blocks were deleted.", "networks": "How many networks lack so many blocks."},
    "logits": {
        "depths": "Blocks that are kept in each stage.",
        "magnitude, sd": "L2 norm of an image's logits, mean and standard deviation over the images.",
        "confidence": "The highest probability, mean over the images.",
        "cosine to main": "Between an image's logits and those of the main network, mean over the images.",
    },
    "receptive-field": {
        "depths": "Blocks that are kept in each stage.",
        "side": "Shorter side of the images.",
        "50 % in": "Area of the smallest square around the centre that holds so much of all contributions, in percent "
        "of the image; so the others.",
    },
    "subnets": {
        "depths": "Blocks that are kept in each stage; ensemble: the mean of the probabilities of all networks.",
        "ECE": "Expected calibration error: how far confidence is from accuracy, a mean over 15 bins of confidence.",
        "agreement": "Images on which a network gives the class that the main network gives.",
        "ms": "Median milliseconds of a forward pass of one image.",
        "unknown": "Area under the ROC curve of telling images of another data set by a low highest probability; 50 "
        "says nothing.",
        "by disagreement": "The same by how much the networks disagree: their mean KL divergence from their mean.",
    },
    "loafing": {
        "alone": "The architecture of the subnet, trained as a network of its own by common training.",
        "inside": "The subnet of the network that was trained by this method, trained no further.",
        "gap": "Points that the subnet loses inside the network: alone minus inside.",
    },
    "ablate": {
        "main": "The network with all its blocks, with the batch-norm statistics of its training.",
        "mean subnet, worst subnet": "Of the subnets that are evaluated, with re-estimated batch-norm statistics.",
        "cost": "FLOPs of the training over those of common training for the first row's epochs, no block "
        "computed twice.",
        "common training at this cost": "The main network after common training for as many epochs as cost what the "
        "row costs, with the row's other settings.",
    },
    "bound": {
        "CE main, CE subnets": "Cross-entropy of the main network and of its subnets.",
        "KL": "Divergence from the main network's prediction to a subnet's.",
        "gap": "Distance of the two cross-entropies on an image.",
        "bound": "The largest distance that the image's KL and the main network's cross-entropy allow.",
    },
}

_RUN_WORDS = {
    "run": "Name of the run's folder, or its path where two have the same.",
    "state": "Finished; in progress: a process trains it now; stopped: neither, `unloaf train --resume` continues it.",
    "epochs": "Done, of those that were asked for.",
    "best val": "Best value on the validation images, and after which epoch.",
    "last val": "The newest value on the validation images.",
    "test": "On the test images, after the last epoch; nothing was chosen by it.",
    "EMA val": "Of the moving average of the weights.",
    "mean subnet": "Mean over the subnets that were evaluated, with re-estimated batch-norm statistics.",
    "worst subnet": "The worst of them.",
    "main re-estimated": "The main network with batch-norm statistics re-estimated as its subnets have them.",
    "s per epoch": "Median seconds of an epoch, validation not included.",
    "training time": "All epochs so far, validation not included.",
}


def method_words(flags: list[str]) -> dict[str, str]:
    """The methods of a page.

    >>> list(method_words(["st", "st"]))
    ['st']
    """
    return {flag: METHOD_MEANINGS[flag] for flag in METHOD_MEANINGS if flag in flags}


def run_words(heads: list[str]) -> dict[str, str]:
    r"""The columns of the table of runs, those that it has.

    >>> list(run_words(["run", "best val\nmAP % (epoch)"]))
    ['run', 'best val']
    """
    flat = [" ".join(head.split()) for head in heads]
    return {word: text for word, text in _RUN_WORDS.items() if any(head.startswith(word) for head in flat)}
