"""VICReg's loss is lightly's, bit by bit."""

import pytest
import torch
from lightly.loss import VICRegLoss as Lightlys

from imsvd_core.methods.vicreg import VICReg, VICRegLoss


@pytest.mark.parametrize("shape", [(2, 1), (33, 257), (128, 64)])
def test_value_and_gradients_are_those_of_lightly_to_the_last_bit(shape):
    generator = torch.Generator().manual_seed(0)
    z1, z2 = (torch.randn(shape, generator=generator, requires_grad=True) for _ in range(2))
    theirs = Lightlys(lambda_param=25.0, mu_param=20.0, nu_param=1.5)(z1, z2)
    ours = VICRegLoss(VICReg(25.0, 20.0, 1.5))(z1, z2)
    assert torch.equal(ours, theirs)
    pairs = zip(
        torch.autograd.grad(ours, (z1, z2)), torch.autograd.grad(theirs, (z1, z2)), strict=True
    )
    assert all(torch.equal(own, other) for own, other in pairs)


def test_no_index_of_the_covariances_is_kept():
    """lightly's mask is D×D, and so is the list of the places that it takes."""
    seen = set()

    def pack(tensor):
        seen.add(tensor.dtype)
        return tensor

    z = torch.randn(8, 16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        VICRegLoss(VICReg())(z, z)
    assert seen == {torch.float32}
