"""ST of a small ViT in the Trainer of transformers, on scikit-learn's digits. pip install '.[engine,transformers]'

Several GPUs: torchrun --nproc-per-node 2 examples/transformers_trainer.py
"""

import torch
from sklearn.datasets import load_digits
from transformers import TrainingArguments, ViTConfig, ViTForImageClassification

import unloaf
from unloaf.integrations.transformers import MethodTrainer


def digits():
    """1,297 images to train on and 500 to evaluate, as the Trainer takes them."""
    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32)[:, None] / 8 - 1
    examples = [{"pixel_values": x, "labels": int(y)} for x, y in zip(images, found.target, strict=True)]
    return examples[:1297], examples[1297:]


def small_vit():
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 6, "num_attention_heads": 2}
    return ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, num_channels=1, num_labels=10, **sizes))


def main(epochs=10):
    torch.manual_seed(0)
    train, test = digits()
    model = small_vit()
    stages = unloaf.find_stages(model, {"pixel_values": torch.zeros(1, 1, 8, 8)})
    method = unloaf.StimulativeTraining(model, stages)
    args = TrainingArguments(
        "output/transformers",
        num_train_epochs=epochs,
        per_device_train_batch_size=32,
        gradient_accumulation_steps=2,
        learning_rate=2e-3,
        save_strategy="epoch",  # with the method's state: trainer.train(resume_from_checkpoint=True)
        save_total_limit=1,
        report_to="none",
    )
    trainer = MethodTrainer(model, args, train_dataset=train, eval_dataset=test, method=method)
    trainer.train()
    print(trainer.evaluate())  # of the main network
    for depth in (2, 4, 6):
        subnet = unloaf.Subnet.from_depths(stages, (depth,))
        with unloaf.active_subnet(model, stages, subnet):
            found = trainer.predict(test)
        print(f"depth {depth}: {100 * (found.predictions.argmax(1) == found.label_ids).mean():.1f} %")


if __name__ == "__main__":
    main()
