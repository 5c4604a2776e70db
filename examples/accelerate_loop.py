"""GKT of a small ViT in a loop of one's own with accelerate, on scikit-learn's digits. pip install '.[engine]'

Several GPUs: accelerate launch --num_processes 2 --mixed_precision bf16 examples/accelerate_loop.py
"""

from pathlib import Path

import timm
import torch
from accelerate import Accelerator
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

import unloaf


def digits():
    """1,297 images to train on and 500 to evaluate."""
    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32)[:, None] / 8 - 1
    labels = torch.tensor(found.target)
    return TensorDataset(images[:1297], labels[:1297]), TensorDataset(images[1297:], labels[1297:])


def main(epochs=10):
    torch.manual_seed(0)
    accelerator = Accelerator(gradient_accumulation_steps=2)
    train, test = digits()
    sizes = {"img_size": 8, "patch_size": 4, "embed_dim": 32, "depth": 6, "num_heads": 2}
    model = timm.create_model("vit_tiny_patch16_224", in_chans=1, global_pool="avg", num_classes=10, **sizes)
    stages = unloaf.find_stages(model, torch.zeros(1, 1, 8, 8))
    method = unloaf.GroupKnowledgeTraining(model, stages, groups=2, loops=1)

    optimizer, loader = torch.optim.AdamW(model.parameters(), lr=2e-3), DataLoader(train, 32, shuffle=True)
    method.model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    accelerator.register_for_checkpointing(method)  # its seed and step, in save_state and load_state
    for epoch in range(epochs):
        for x, y in loader:
            with accelerator.accumulate(method.model):
                scale = accelerator.scaler.get_scale() if accelerator.scaler else 1.0  # of float16
                out = method(x, y, lean=True, loss_scale=scale)
                accelerator.backward(out.loss)
                optimizer.step()
                optimizer.zero_grad()
        accelerator.print(f"epoch {epoch}: { ({name: f'{term:.3f}' for name, term in out.terms.items()}) }")
    accelerator.save_state(Path("output/accelerate"))

    subnets = [unloaf.Subnet.from_depths(stages, (depth,)) for depth in (2, 4, 6)]
    for row in unloaf.evaluate_subnets(model, stages, DataLoader(test, 250), subnets=subnets):
        accelerator.print(f"{row.subnet}: {row.top1:.1f} %")


if __name__ == "__main__":
    main()
