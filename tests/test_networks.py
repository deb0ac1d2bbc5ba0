"""Networks: torchvision's keys, the stem, the projector, one network for both views."""

import pytest
import torch
import torchvision
from torch import nn

from imsvd_core.networks import (
    NetworkConfig,
    TwinNetwork,
    build_backbone,
    build_projector,
    represent,
)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_backbone_weights_load_into_torchvisions_own_network_and_give_its_features(name):
    ours, theirs = build_backbone(name).eval(), getattr(torchvision.models, name)(weights=None)
    missing, unexpected = theirs.load_state_dict(ours.state_dict(), strict=False)
    assert set(missing) == {"fc.weight", "fc.bias"}
    assert not unexpected
    theirs.fc = nn.Identity()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(ours(x), theirs.eval()(x))
        assert ours(x).shape[1] == ours.features


def test_the_cifar_stem_keeps_the_resolution():
    backbone = build_backbone("narrow", cifar_stem=True)
    sides = []
    backbone.layer1.register_forward_hook(lambda module, inputs, out: sides.append(out.shape[-1]))
    assert backbone(torch.randn(2, 3, 32, 32)).shape == (2, 256)
    assert sides == [32]


def test_the_narrow_network_is_small():
    assert (
        1.1e6
        < sum(p.numel() for p in build_backbone("narrow", cifar_stem=True).parameters())
        < 1.3e6
    )


@pytest.mark.parametrize("hidden", [(), (7,), (7, 9, 11)])
def test_projector_of_any_depth_ends_bare(hidden):
    projector = build_projector(5, hidden, 6)
    linears = [layer for layer in projector if isinstance(layer, nn.Linear)]
    assert [(layer.in_features, layer.out_features) for layer in linears] == list(
        zip((5, *hidden), (*hidden, 6), strict=False)
    )
    assert projector[-1] is linears[-1]
    assert projector[-1].bias is None
    assert sum(isinstance(layer, nn.BatchNorm1d) for layer in projector) == len(hidden)


def test_batch_norm_sees_one_view_at_a_time():
    network = TwinNetwork.build(NetworkConfig(hidden=(8,), dim=4)).train()
    x1, x2 = torch.randn(4, 3, 32, 32), torch.randn(4, 3, 32, 32) + 3
    together = network(x1, x2)
    torch.testing.assert_close(together[0], network.embed(x1))
    torch.testing.assert_close(together[1], network.embed(x2))


def test_representing_freezes_batch_norm_and_puts_the_mode_back():
    backbone = build_backbone("narrow", cifar_stem=True).train()
    before = backbone.bn1.running_mean.clone()
    x = torch.randn(6, 3, 32, 32)
    parts = represent(backbone, x.split(2), "cpu")
    whole = represent(backbone, [x], "cpu")
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-5)
    assert torch.equal(backbone.bn1.running_mean, before)
    assert backbone.training


def test_pytorchs_first_weights_are_smaller_by_the_root_of_six():
    """Where as many channels leave a convolution as enter it."""
    settings = {"backbone": "resnet18", "hidden": (), "dim": 8}
    kaiming = TwinNetwork.build(NetworkConfig(**settings)).backbone
    pytorch = TwinNetwork.build(NetworkConfig(**settings, init="pytorch")).backbone
    theirs, ours = (net.layer4[1].conv2.weight.detach() for net in (pytorch, kaiming))
    assert (ours.std() / theirs.std()).item() == pytest.approx(6**0.5, rel=0.01)
    bound = 1 / (9 * 512) ** 0.5  # of nn.Conv2d: uniform up to one over the root of the fan-in
    assert 0.99 * bound < theirs.abs().max() <= bound


@pytest.mark.parametrize("name", ["narrow", "resnet50"])
def test_a_zero_initialised_residual_makes_every_block_the_identity_at_first(name):
    backbone = TwinNetwork.build(
        NetworkConfig(name, hidden=(), dim=8, zero_init_residual=True)
    ).backbone.eval()
    width = backbone.layer1[-1].conv1.in_channels
    x = torch.rand(1, width, 4, 4)
    block = backbone.layer1[-1]
    assert torch.equal(block(x), x if block.downsample is None else block.downsample(x).relu())
    others = (backbone.bn1.weight, block.bn1.weight)
    assert all(weight.eq(1).all() for weight in others)


def test_impossible_networks_are_refused():
    with pytest.raises(ValueError, match="backbone='vit'"):
        NetworkConfig(backbone="vit")
    with pytest.raises(ValueError, match="dim=0"):
        NetworkConfig(dim=0)
