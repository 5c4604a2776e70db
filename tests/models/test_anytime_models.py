"""Cascades of networks of timm, torchvision and transformers: each exit's own logits, float64."""

import pytest
import timm
import torch
import torchvision
import transformers

import unloaf
from unloaf.batchnorm import statistics_replaced
from unloaf.passes import logits_of

VIT = transformers.ViTConfig(
    hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8
)
NETWORKS = {
    # Overwrites what its stem returns; stages with downsampling in blocks.
    "tv/resnet18": (lambda: torchvision.models.resnet18(num_classes=10), [(2, 2, 1, 1), (2, 2, 2, 1), (2, 2, 2, 2)]),
    # Position tables go into every block.
    "timm/vit_base_patch16_rope_224": (
        lambda: timm.create_model(
            "vit_base_patch16_rope_224", img_size=32, patch_size=8, depth=3, embed_dim=48, num_heads=3, num_classes=10
        ),
        [(1,), (2,), (3,)],
    ),
    # Returns an object with .logits.
    "hf/vit": (lambda: transformers.ViTForImageClassification(VIT), [(1,), (3,)]),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_each_image_gets_the_logits_of_the_subnet_that_answered(name):
    torch.manual_seed(0)
    build, depths = NETWORKS[name]
    model, x = build().double().eval(), torch.randn(7, 3, 32, 32, dtype=torch.float64)
    stages = unloaf.find_stages(model, x[:1])
    chain = [unloaf.Subnet.from_depths(stages, one) for one in depths]
    anytime = unloaf.Anytime(model, stages, chain)
    anytime.recalibrate([torch.randn(8, 3, 32, 32, dtype=torch.float64)])
    anytime.set_threshold(float(anytime.all_exits(x)[0].softmax(-1).amax(-1).median()))
    logits, exits = anytime(x)
    assert len(set(exits.tolist())) > 1
    for index, subnet in enumerate(chain):
        own = statistics_replaced(model, anytime.statistics.get(subnet, {}))
        with torch.no_grad(), unloaf.active_subnet(model, stages, subnet), own:
            expected = logits_of(model(x))
        here = exits == index
        assert torch.allclose(logits[here], expected[here], rtol=0, atol=1e-12)


def test_activations_of_a_shared_prefix_are_not_kept_where_only_their_shape_is_read():
    model = torchvision.models.resnet18(num_classes=10).eval()
    stages = unloaf.find_stages(model, torch.zeros(1, 3, 32, 32))
    chain = [unloaf.Subnet.from_depths(stages, depths) for depths in [(2, 2, 2, 1), (2, 2, 2, 2)]]
    sharing = unloaf.Anytime(model, stages, chain)._sharing
    assert sharing is not None
    # What the last shared block returned is read, and nothing before it.
    assert sum(not kept.empty for kept in sharing.kept.values()) == 1
