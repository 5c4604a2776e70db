"""ST* of torchvision's Faster R-CNN: the backbone's subnets learn from the boxes too. pip install '.[engine]'

On squares of 12 to 28 pixels on noise, drawn here; two classes, bright and dark.
"""

import torch
from torch import nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

import unloaf


def squares(count, generator):
    """Images, (3, 64, 64), and targets with one box each."""
    images, targets = [], []
    for _ in range(count):
        side = int(torch.randint(12, 29, (), generator=generator))
        left, top = torch.randint(64 - side, (2,), generator=generator).tolist()
        label = int(torch.randint(1, 3, (), generator=generator))
        image = 0.5 + 0.05 * torch.randn(3, 64, 64, generator=generator)
        image[:, top : top + side, left : left + side] = 0.9 if label == 1 else 0.1
        box = torch.tensor([[left, top, left + side, top + side]], dtype=torch.float32)
        images.append(image)
        targets.append({"boxes": box, "labels": torch.tensor([label])})
    return images, targets


def loss(model, batch):
    images, targets = batch
    return model(images, targets)  # torchvision's mapping of losses; their sum counts


def main(steps=60):
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    backbone = resnet_fpn_backbone(
        backbone_name="resnet18", weights=None, trainable_layers=5, norm_layer=nn.BatchNorm2d
    )
    anchors = AnchorGenerator(((8,), (16,), (32,), (64,), (128,)), ((1.0,),) * 5)
    few = {"rpn_pre_nms_top_n_train": 100, "rpn_post_nms_top_n_train": 50, "box_batch_size_per_image": 32}
    model = FasterRCNN(backbone, num_classes=3, min_size=64, max_size=64, rpn_anchor_generator=anchors, **few)
    stages = unloaf.find_stages(model, [torch.rand(3, 64, 64)], within="backbone.body")
    method = unloaf.GroundTruthTraining(model, stages, loss, sampler=unloaf.OrderedSampler())

    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    model.train()
    for step in range(steps):
        out = method.backward(squares(4, generator))
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step}: main {out.terms['main']:.3f}, subnet {out.subnets[0]} {out.terms['subnet0']:.3f}")


if __name__ == "__main__":
    main()
