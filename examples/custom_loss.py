"""Losses of one's own: two tasks from one network and its subnets, on scikit-learn's digits. pip install '.[engine]'

Which digit, and how much ink: no single output is "the logits", so each subnet learns from the targets (ST*).
"""

import timm
import torch
from sklearn.datasets import load_digits
from torch.nn import functional as F

import unloaf


def digits():
    """1,297 images to train on and 500 to evaluate, with their labels."""
    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32)[:, None] / 8 - 1
    labels = torch.tensor(found.target)
    return (images[:1297], labels[:1297]), (images[1297:], labels[1297:])


def ink(x):  # mean brightness, from -1 to 1
    return x.mean(dim=(1, 2, 3))


def losses(model, batch):
    """Calls the model once; all that the mapping holds is summed."""
    x, y = batch
    output = model(x)
    return {"digit": F.cross_entropy(output[:, :10], y), "ink": 10 * F.mse_loss(output[:, 10], ink(x))}


@torch.no_grad()
def figures(model, x, y):
    output = model(x)
    right = (output[:, :10].argmax(1) == y).float().mean()
    return f"{100 * right:.1f} %, ink off by {(output[:, 10] - ink(x)).abs().mean():.3f}"


def main(epochs=10):
    torch.manual_seed(0)
    train, test = digits()
    sizes = {"img_size": 8, "patch_size": 4, "embed_dim": 32, "depth": 6, "num_heads": 2}
    model = timm.create_model("vit_tiny_patch16_224", in_chans=1, global_pool="avg", num_classes=11, **sizes)
    stages = unloaf.find_stages(model, train[0][:1])
    method = unloaf.GroundTruthTraining(model, stages, losses, sampler=unloaf.OrderedSampler())
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(epochs):
        for part in torch.randperm(len(train[0])).split(64):
            method.backward((train[0][part], train[1][part]))
            optimizer.step()
            optimizer.zero_grad()
    for depth in (2, 4, 6):
        with unloaf.active_subnet(model.eval(), stages, unloaf.Subnet.from_depths(stages, (depth,))):
            print(f"depth {depth}: {figures(model, *test)}")


if __name__ == "__main__":
    main()
