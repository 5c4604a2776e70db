"""Masked images: which patches are hidden, gradients of ST* and ST, figures, runs, the probe and fine-tuning."""

import copy
import shutil

import pytest
import torch
from rich.console import Console

import unloaf
from unloaf.commands.main import main
from unloaf.config import Config
from unloaf.data import load_data
from unloaf.data.patch_batches import PatchEvalBatches, PatchTrainBatches
from unloaf.engine.run import train
from unloaf.models.masked import build_masked, masked_config, whole_features
from unloaf.stages import find_stages
from unloaf.tasks.masked import Masked, reconstruction, reconstruction_loss

pytest.importorskip("transformers")

SMALL = (
    "hidden_size=16", "num_hidden_layers=3", "num_attention_heads=2", "intermediate_size=32", "patch_size=2",
    "decoder_hidden_size=16", "decoder_num_hidden_layers=1", "decoder_num_attention_heads=2",
    "decoder_intermediate_size=32",
)  # fmt: skip


def config(**settings):
    usual = {"task": "masked", "model": "hf/ViTMAEForPreTraining", "model_kwargs": SMALL, "method": "st-star"}
    usual |= {"batch_size": 128, "epochs": 1, "device": "cpu", "opt": "adamw", "lr": 1e-3, "log_interval": 100}
    return Config(**usual | settings)


def autoencoder(**settings):
    torch.manual_seed(0)
    given = Config(model_kwargs=SMALL, model="timm/x").model_arguments
    usual = {"in_chans": 1, "img_size": 8, "mask_ratio": 0.75, "norm_pix_loss": False, "given": given}
    return build_masked(masked_config("hf/ViTMAEForPreTraining", **usual | settings)).double()


def inputs(count=4):
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(count, 1, 8, 8, dtype=torch.float64, generator=generator)
    return {"pixel_values": images, "noise": torch.rand(count, 16, dtype=torch.float64, generator=generator)}


def error_by_hand(network, x):
    """Of the 12 of 16 patches with the highest noise, 2 x 2 pixels each, row by row."""
    logits, total = network(**x)["logits"], 0.0
    for image, noise, found in zip(x["pixel_values"][:, 0], x["noise"], logits, strict=True):
        for patch in noise.argsort()[4:].tolist():
            row, column = 2 * (patch // 4), 2 * (patch % 4)
            pixels = image[row : row + 2, column : column + 2].flatten()
            total = total + ((found[patch] - pixels) ** 2).sum()
    return total / (len(logits) * 12 * 4)


# --- the loss and its gradients


def test_the_loss_is_that_of_transformers_and_by_hand():
    network, x = autoencoder(), inputs()
    theirs = super(type(network), network).forward(**x).loss.item()
    ours = reconstruction_loss(network, (x, None)).item()
    assert ours == pytest.approx(theirs, abs=1e-12)
    assert ours == pytest.approx(error_by_hand(network, x).item(), abs=1e-12)


@pytest.mark.parametrize("method", ["st-star", "st"])
def test_gradients_are_those_of_separate_passes(method):
    network, x = autoencoder(), inputs()
    plain = copy.deepcopy(network)
    stages, apart = (find_stages(one, x, within="vit") for one in (network, plain))
    assert [len(stage.blocks) for stage in stages] == [3]
    settings = config(method=method, num_subnets=2)
    out = Masked().method(settings, network, stages).backward(x, torch.zeros(4, dtype=torch.int64))
    assert len(out.subnets) == 2
    taught = plain(**x)["features"].detach()
    error_by_hand(plain, x).backward()
    for subnet in out.subnets:
        with unloaf.active_subnet(plain, apart, subnet):
            if method == "st-star":
                error_by_hand(plain, x).backward()
            else:
                ((plain(**x)["features"] - taught) ** 2).mean().backward()
    for (name, one), other in zip(network.named_parameters(), plain.parameters(), strict=True):
        if other.grad is not None:
            assert torch.allclose(one.grad, other.grad, rtol=0, atol=1e-10), name


def test_fresh_networks_know_where_patches_are():
    """He et al. 2022: sines and cosines; transformers 5.23 leaves zeros, with which only the mean patch is learned."""
    network = autoencoder()
    embedded = network.vit.embeddings.position_embeddings[0]
    assert embedded[0].abs().max() == 0
    # Patch 6 of 4 x 4 is in row 1, column 2; of 16 numbers four are of each wave, of frequencies 1, 0.1, 0.01, 0.001.
    places = torch.tensor([1.0, 0.1, 0.01, 0.001], dtype=torch.float64)
    waves = torch.cat([(2 * places).sin(), (2 * places).cos(), places.sin(), places.cos()])
    assert torch.allclose(embedded[7], waves, atol=1e-6)
    assert torch.allclose(network.decoder.decoder_pos_embed[0, 7], waves, atol=1e-6)


# --- which patches are hidden


def test_noise_is_of_seed_epoch_and_step_alone():
    data, settings = load_data(config()), config()

    def noises(epoch, *, start=0, rank=0, world=1, **changed):
        one = Config(**vars(settings) | changed)
        batches = PatchTrainBatches(data, one, patches=16, device="cpu", rank=rank, world=world)
        return [batch.x["noise"] for step in batches.epoch(epoch, start=start) for batch in step]

    first = noises(1)
    assert all(torch.equal(one, other) for one, other in zip(first[2:], noises(1, start=2), strict=True))
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], noises(2)[0])
    assert not torch.equal(first[0], noises(1, seed=1)[0])
    both = [noises(1, rank=rank, world=2, batch_size=64) for rank in range(2)]
    assert torch.equal(torch.stack([both[0][0], both[1][0]], dim=1).flatten(0, 1), first[0])


def test_evaluated_images_keep_their_noise_at_any_batch_size():
    data = load_data(config())
    given = {"patches": 16, "device": "cpu"}
    sets = [PatchEvalBatches(data.val, data, config(), batch_size=size, **given) for size in (64, 100)]
    parts = [torch.cat([batch.x["noise"] for batch in batches]) for batches in sets]
    assert torch.equal(*parts)


# --- figures


def test_figures_by_hand():
    """Hidden pixels 0, 2 and 4, told as 1, 2 and 4: squared error 1/3, variance 8/3."""

    class Told(torch.nn.Linear):
        def forward(self, pixel_values, noise):
            target = torch.tensor([[[0.0], [2.0], [4.0], [9.0]]])
            logits, hidden = torch.tensor([[[1.0], [2.0], [4.0], [0.0]]]), torch.tensor([[1.0, 1.0, 1.0, 0.0]])
            return {"logits": logits, "target": target, "hidden": hidden, "features": target}

    found = reconstruction(Told(1, 1), [({"pixel_values": None, "noise": None}, torch.tensor([0]))])
    assert found.loss == pytest.approx(1 / 3)
    assert found.explained == pytest.approx(100 * (1 - (1 / 3) / (8 / 3)))


# --- runs


def test_a_run_is_trained_resumed_probed_and_fine_tuned(tmp_path, capsys):
    settings = config(output=str(tmp_path), name="run", epochs=2)
    whole = train(settings, console=Console(quiet=True))
    shutil.copytree(whole.path, tmp_path / "again", symlinks=True)
    newest = sorted((tmp_path / "again/checkpoints").iterdir())[-1]
    shutil.rmtree(newest)
    train(Config(**vars(settings) | {"name": "again"}), resume=str(tmp_path / "again"), console=Console(quiet=True))
    heads, *_, last = (whole.path / "summary.csv").read_text().splitlines()
    again = (tmp_path / "again/summary.csv").read_text().splitlines()[-1]
    pairs = zip(heads.split(","), last.split(","), again.split(","), strict=True)
    assert {name for name, one, other in pairs if one != other} <= {"time"}
    assert main(["eval", str(whole.path), "--subnets", "1", "--device", "cpu"]) == 0
    capsys.readouterr()
    assert main(["probe", str(whole.path), "--subnets", "1", "--device", "cpu"]) == 0
    assert "val top-1 %" in capsys.readouterr().out
    assert main(["export", str(whole.path), "--device", "cpu", "--output", str(tmp_path / "x")]) == 2
    assert "task masked has no export" in capsys.readouterr().err
    encoder = [word for word in SMALL if not word.startswith("decoder")]
    words = ["train", "--model", "hf/ViTForImageClassification", "--model-kwargs", *encoder, "--method", "st"]
    words += [
        "--initial-checkpoint",
        str(whole.path),
        "--partial-weights",
        "--output",
        str(tmp_path),
        "--name",
        "tuned",
    ]
    assert main([*words, "--epochs", "1", "--device", "cpu"]) == 0
    # All but the classifier was there.
    assert "classifier" in (tmp_path / "tuned/log.txt").read_text()


def test_features_of_whole_images_hide_nothing():
    network, x = autoencoder().eval(), inputs()
    found = whole_features(network, x["pixel_values"])
    assert found.shape == (4, 16)
    assert network.config.mask_ratio == 0.75
    # Without masking every patch is seen, in whatever order.
    network.config.mask_ratio = 0.0
    assert torch.allclose(found, network.vit(**x).last_hidden_state[:, 1:].mean(1), atol=1e-12)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"model": "timm/vit_tiny_patch16_224"}, "task masked trains a ViT-MAE of transformers"),
        ({"method": "st++"}, "task masked has common, st and st-star"),
        ({"subnet_inputs": "smaller"}, "a ViT-MAE takes images of one side"),
        ({"smoothing": 0.1}, "--smoothing: without effect in task masked"),
        ({"mask_ratio": 1.0}, "mask_ratio 1.0: give a share above 0 and below 1"),
        ({"task": "classification", "model": "timm/resnet18", "mask_ratio": 0.5}, "--mask-ratio: without effect"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, expected):
    with pytest.raises(ValueError, match=expected):
        config(**settings)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"given": {"depth": 3}}, "model_kwargs depth: is no entry of its config.json"),
        ({"given": {"mask_ratio": 0.5}}, "model_kwargs mask_ratio: has a flag of its own"),
        ({"img_size": 9, "given": {"patch_size": 2}}, "img_size 9 is no multiple of the patches' 2 pixels"),
        ({"mask_ratio": 0.99, "given": {"patch_size": 2}}, "leaves nothing to see or to hide of 16 patches"),
    ],
)
def test_networks_that_cannot_be_are_refused(settings, expected):
    with pytest.raises(ValueError, match=expected):
        autoencoder(**settings)
