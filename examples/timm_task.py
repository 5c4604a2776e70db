"""ST of a small ResNet by a training task of timm, on scikit-learn's digits. pip install '.[engine]'

Several processes: task.prepare_distributed(device_ids=[local_rank]) before the loop, as in timm.
"""

import timm
import torch
from sklearn.datasets import load_digits
from timm.optim import create_optimizer_v2
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import unloaf
from unloaf.integrations.timm import MethodTask


def digits():
    """1,297 images to train on and 500 to evaluate, 16 pixels wide."""
    found = load_digits()
    images = F.interpolate(torch.tensor(found.images, dtype=torch.float32)[:, None] / 8 - 1, scale_factor=2)
    labels = torch.tensor(found.target)
    return TensorDataset(images[:1297], labels[:1297]), TensorDataset(images[1297:], labels[1297:])


def main(epochs=10):
    torch.manual_seed(0)
    train, test = digits()
    train_loader, test_loader = DataLoader(train, 64, shuffle=True), DataLoader(test, 250)
    model = timm.create_model("resnet18", in_chans=1, num_classes=10, channels=(8, 16, 24, 32))
    stages = unloaf.find_stages(model, torch.zeros(2, 1, 16, 16))
    criterion = torch.nn.CrossEntropyLoss(label_smoothing=0.1)

    task = MethodTask(unloaf.StimulativeTraining(model, stages, criterion=criterion))
    task.setup_ema(decay=0.99)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=2e-3)
    for epoch in range(epochs):
        task.train()
        for step, (x, y) in enumerate(train_loader):
            result = task(x, y)
            result["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
            task.update_ema(epoch * len(train_loader) + step)
        print(f"epoch {epoch}: loss {result['loss'].item():.3f}")
    torch.save(task.get_checkpoint_state(), "output-timm.pth")  # with the method's state; task.load_checkpoint_state

    averaged = task.get_eval_model(ema=True).module
    for row in unloaf.evaluate_subnets(averaged, stages, test_loader, subnets=4, calibration=train_loader):
        print(f"{row.subnet}: {row.top1:.1f} %")


if __name__ == "__main__":
    main()
