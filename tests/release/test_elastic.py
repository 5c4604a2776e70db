"""`unloaf.load_elastic` and its model: one set of weights, a depth for each call."""

import copy
import json

import pytest
import torch

import unloaf
from unloaf.models.build import build_model
from unloaf.release.elastic import ElasticModel, save_elastic

SETTINGS = {"name": "cifar/resnet14", "num_classes": 10, "width": 4}
BATCHES = [torch.randn(16, 3, 16, 16, generator=torch.Generator().manual_seed(i)) for i in range(3)]
X = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(9))


@pytest.fixture
def network():
    model = build_model(**SETTINGS)
    unloaf.recalibrate_bn(model, BATCHES)
    return model.eval()


@pytest.fixture
def stages(network):
    return unloaf.find_stages(network, X)


@pytest.fixture
def elastic(network, stages):
    model = ElasticModel(copy.deepcopy(network), stages).eval()
    for subnet in ("1-2-1", "2-1-1"):
        model.recalibrate(subnet, BATCHES)
    return model


@pytest.fixture
def folder(elastic, tmp_path):
    save_elastic(tmp_path, elastic, SETTINGS)
    return tmp_path


def logits_by_hand(network, stages, text):
    """On a copy of the main network: recalibrated inside active_subnet, then run there."""
    whole = copy.deepcopy(network)
    subnet = unloaf.Subnet.from_depths(stages, [int(depth) for depth in text.split("-")])
    with unloaf.active_subnet(whole, stages, subnet), torch.no_grad():
        if text != "2-2-2":
            unloaf.recalibrate_bn(whole, BATCHES)
        return whole(X)


@pytest.mark.parametrize("text", ["2-2-2", "1-2-1", "2-1-1"])
def test_each_depth_runs_with_statistics_of_its_own(network, stages, elastic, folder, text):
    expected = logits_by_hand(network, stages, text)
    again = unloaf.load_elastic(folder)
    with torch.no_grad():
        assert torch.equal(elastic(X, subnet=text), expected)
        assert torch.equal(again(X, subnet=text), expected)
        assert torch.equal(again(X, subnet=[int(depth) for depth in text.split("-")]), expected)
        assert torch.equal(again.export(text)(X), expected)


def test_depth_is_set_for_calls_that_follow(network, stages, folder):
    model = unloaf.load_elastic(folder)
    with torch.no_grad():
        assert torch.equal(model(X), logits_by_hand(network, stages, "2-2-2"))
        model.set_depths("1-2-1")
        assert torch.equal(model(X), logits_by_hand(network, stages, "1-2-1"))
        with model.depths("2-1-1"):
            assert torch.equal(model(X), logits_by_hand(network, stages, "2-1-1"))
        assert torch.equal(model(X), logits_by_hand(network, stages, "1-2-1"))
        assert torch.equal(model(X, subnet="2-2-2"), logits_by_hand(network, stages, "2-2-2"))


def test_switching_copies_nothing(elastic):
    def addresses():
        return [tensor.data_ptr() for tensor in elastic.network.state_dict(keep_vars=True).values()]

    used = []
    handle = elastic.network.bn1.register_forward_pre_hook(lambda norm, _: used.append(norm.running_mean))
    before = addresses()
    with torch.no_grad():
        for _ in range(2):
            elastic(X, subnet="1-2-1")
    handle.remove()
    assert addresses() == before
    stored = elastic.statistics("1-2-1")["bn1.running_mean"]
    assert [tensor.data_ptr() for tensor in used] == [stored.data_ptr()] * 2


def test_estimating_leaves_the_main_network_alone(network, elastic):
    before, after = network.state_dict(), elastic.network.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_statistics_cost_two_numbers_for_each_channel_of_a_kept_norm(elastic):
    # Norms of 1-2-1 at width 4: the first, then 2 for each of 1, 2 and 1 blocks of 4, 8 and 16 channels.
    channels = 4 + 2 * (1 * 4 + 2 * 8 + 1 * 16)
    assert sum(tensor.numel() for tensor in elastic.statistics("1-2-1").values()) == 2 * channels


def test_statistics_follow_the_weights(elastic):
    double = copy.deepcopy(elastic).double()
    with torch.no_grad():
        for text in elastic.subnets:
            # The weights are float32 numbers: double arithmetic differs by the rounding of float32 alone.
            assert torch.allclose(double(X.double(), subnet=text).float(), elastic(X, subnet=text), atol=1e-4)
    assert {tensor.dtype for tensor in double.statistics("1-2-1").values()} == {torch.float64}
    assert {tensor.dtype for tensor in elastic.statistics("1-2-1").values()} == {torch.float32}


def test_error_in_a_call_leaves_the_main_network(elastic):
    before = elastic.network.bn1.running_mean
    with pytest.raises(RuntimeError):
        elastic(torch.zeros(1, 7, 16, 16), subnet="1-2-1")
    assert elastic.network.bn1.running_mean is before


def test_network_without_batch_norm_needs_no_statistics(tmp_path):
    settings = {"name": "timm/vit_tiny_patch16_224", "num_classes": 10, "img_size": 32}
    network, x = build_model(**settings).eval(), torch.randn(2, 3, 32, 32)
    stages = unloaf.find_stages(network, x)
    save_elastic(tmp_path, ElasticModel(network, stages), settings)
    model, subnet = unloaf.load_elastic(tmp_path), unloaf.Subnet.from_depths(stages, (4,))
    with torch.no_grad():
        with unloaf.active_subnet(network, stages, subnet):
            expected = network(x)
        assert torch.equal(model(x, subnet="4"), expected)


def test_file_holds_the_weights_once(elastic, folder):
    weights = sum(tensor.nbytes for tensor in elastic.network.state_dict().values())
    statistics = sum(t.nbytes for text in ("1-2-1", "2-1-1") for t in elastic.statistics(text).values())
    assert 0 <= (folder / "elastic.safetensors").stat().st_size - weights - statistics < 20_000  # names and offsets


def test_unknown_subnets_are_refused(elastic):
    for text, reason in (("1-1-1", "there are 2-2-2, 1-2-1, 2-1-1"), ("1-1", "got 2 depths"), ("x", "one depth")):
        with pytest.raises(ValueError, match=reason):
            elastic.set_depths(text)
        with pytest.raises(ValueError, match=reason):
            elastic(X, subnet=text)
        with pytest.raises(ValueError, match=reason):
            elastic.export(text)


@pytest.mark.parametrize("name", ["", "elastic.json", "elastic.safetensors"])
def test_folder_and_files_name_the_model(folder, name):
    assert unloaf.load_elastic(folder / name).subnets == ("2-2-2", "1-2-1", "2-1-1")


def test_damaged_files_are_refused(folder):
    weights, description = folder / "elastic.safetensors", folder / "elastic.json"
    good, text = weights.read_bytes(), description.read_text()
    weights.write_bytes(good[:-100])
    with pytest.raises(unloaf.CheckpointError, match="SHA-256"):
        unloaf.load_elastic(folder)
    weights.write_bytes(good)
    fields = json.loads(text)
    broken = [
        text[:200],
        json.dumps(fields | {"subnets": fields["subnets"][::-1]}),
        json.dumps(fields | {"stages": fields["stages"][:2]}),
        json.dumps(fields | {"architecture": fields["architecture"] | {"name": "cifar/resnet20"}}),
        json.dumps(fields | {"format_version": 99}),
        json.dumps({key: value for key, value in fields.items() if key != "weights"}),
    ]
    for words in broken:
        description.write_text(words)
        with pytest.raises(unloaf.CheckpointError, match=r"elastic\.json"):
            unloaf.load_elastic(folder)
    description.write_text("[]")
    with pytest.raises(ValueError, match="describes no elastic model"):
        unloaf.load_elastic(folder)
    weights.unlink()
    description.write_text(text)
    with pytest.raises(unloaf.CheckpointError, match="is missing"):
        unloaf.load_elastic(folder)
    with pytest.raises(ValueError, match=r"has no elastic\.json"):
        unloaf.load_elastic(folder / "nowhere")
