"""ST of a small ViT in Lightning, on scikit-learn's digits. pip install '.[engine,lightning]'

Several processes: Trainer(devices=2, strategy="ddp"). A scheduler, other metrics: override the hooks of MethodModule.
"""

import timm
import torch
from lightning.pytorch import Trainer
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

import unloaf
from unloaf.integrations.lightning import MethodModule


def digits():
    """1,297 images to train on and 500 to evaluate."""
    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32)[:, None] / 8 - 1
    labels = torch.tensor(found.target)
    return TensorDataset(images[:1297], labels[:1297]), TensorDataset(images[1297:], labels[1297:])


def main(epochs=10):
    torch.manual_seed(0)
    train, test = digits()
    train_loader, test_loader = DataLoader(train, 64, shuffle=True), DataLoader(test, 250)
    sizes = {"img_size": 8, "patch_size": 4, "embed_dim": 32, "depth": 6, "num_heads": 2}
    model = timm.create_model("vit_tiny_patch16_224", in_chans=1, global_pool="avg", num_classes=10, **sizes)
    stages = unloaf.find_stages(model, torch.zeros(1, 1, 8, 8))
    method = unloaf.StimulativeTraining(model, stages)

    module = MethodModule(method, optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=2e-3))
    trainer = Trainer(max_epochs=epochs, gradient_clip_val=1.0, default_root_dir="output/lightning", logger=False)
    trainer.fit(module, train_loader, test_loader)  # ckpt_path=... continues weights and draws
    print(trainer.callback_metrics["val_loss"])  # of the main network

    subnets = [unloaf.Subnet.from_depths(stages, (depth,)) for depth in (2, 4, 6)]
    for row in unloaf.evaluate_subnets(model, stages, test_loader, subnets=subnets):
        print(f"{row.subnet}: {row.top1:.1f} %")


if __name__ == "__main__":
    main()
