"""Small claims about one part at a time, by hand: whoever writes that part anew can follow them on paper."""
import math

import pytest
import torch
import torch.nn as nn
from torch.testing import assert_close as near

from evilm import CrossCovarianceAttention, EViLM, FastRetrieval, SDTAEncoder, contrastive_loss


# --------------------------------------------------------------------------------- Cross-covariance attention

def bare_attention(dim, heads, temperature):
    """q, k and v are the input itself, and nothing is projected after."""
    xca = CrossCovarianceAttention(dim, heads)
    with torch.no_grad():
        xca.qkv.weight.copy_(torch.eye(dim).repeat(3, 1))
        xca.proj.weight.copy_(torch.eye(dim))
        xca.temperature.copy_(torch.tensor(temperature)[:, None, None])
        for linear in (xca.qkv, xca.proj):
            linear.bias.zero_()
    return xca


def test_xca_by_hand_mixes_a_long_and_a_short_channel_three_to_one():
    x = torch.tensor([[[100.0, 0.0], [0.0, 1.0], [0.0, 0.0]]])  # (1, 3 patches, 2 channels): none in common
    expected = torch.tensor([[[75.0, 25.0], [0.25, 0.75], [0.0, 0.0]]])
    near(bare_attention(2, 1, [math.log(3)])(x), expected)      # softmax of (ln 3, 0) is (3/4, 1/4)


def test_xca_each_head_has_its_own_channels_and_its_own_temperature():
    x = torch.tensor([[[1.0, 0.0, 1.0, 0.0], [0.0, 1.0, 0.0, 1.0]]])
    expected = torch.tensor([[[0.75, 0.25, 0.5, 0.5], [0.25, 0.75, 0.5, 0.5]]])
    near(bare_attention(4, 2, [math.log(3), 0.0])(x), expected)


# ------------------------------------------------------------------------------------------------ The cascade

def bare_cascade(dim, scales, factors):
    """The convolutions are products with a number: part i with factors[i]."""
    block = SDTAEncoder(dim, scales, heads=1, layer_scale=1.0, positions=False)
    with torch.no_grad():
        for conv, factor in zip(block.convs, factors, strict=True):
            conv.bias.zero_()
            conv.weight.zero_()[:, :, 1, 1] = factor
    return block.cascade


def test_cascade_by_hand_convolves_each_part_with_the_result_before_it():
    x = torch.tensor([1.0, 10.0, 100.0, 1000.0])[None, :, None, None].requires_grad_()
    y = bare_cascade(4, 4, [2.0, 3.0, 5.0])(x)                  # 2 * 1, 3 * (10 + 2), 5 * (100 + 36)
    assert y.flatten().tolist() == [2.0, 36.0, 680.0, 1000.0]
    assert torch.autograd.grad(y.sum(), x)[0].flatten().tolist() == [38.0, 18.0, 5.0, 1.0]


def test_cascade_of_one_part_convolves_all_of_it():
    x = torch.randn(2, 4, 3, 5)
    near(bare_cascade(4, 1, [2.0])(x), 2 * x)


# ---------------------------------------------------------------------------------------------------- Eq. (2)

class Echo(nn.Module):
    """Stands in for the decoder: returns its input and keeps the mask that it was given."""

    def forward(self, x, mask=None):
        self.mask = mask
        return x


@pytest.fixture
def echoing(tiny):
    """A model whose token types are 1, 10 and 100 for e^CLS, t^L and t^V, and whose decoder does nothing."""
    model = EViLM(tiny)
    model.decoder = Echo()
    with torch.no_grad():
        model.token_type.copy_(torch.tensor([[1.0], [10.0], [100.0]]).expand(3, 36))
    return model


def test_eq2_by_hand_each_side_gets_its_token_type(echoing):
    text, video = torch.full((2, 5, 36), 2.0), torch.full((2, 8, 36), 3.0)
    h_cls, h_text, h_video = echoing.fuse(video, text, torch.ones(2, 5, dtype=torch.bool))
    assert (text == 2).all() and (video == 3).all(), "the caller's text or video was changed"
    near(h_cls, torch.full((2, 36), 1.0))                       # e^CLS
    near(h_text, torch.full((2, 5, 36), 12.0))                  # e^L + t^L
    near(h_video, torch.full((2, 8, 36), 103.0))                # e^V + t^V


def test_eq2_the_decoder_is_shown_everything_but_padding(echoing):
    mask = torch.tensor([[True, True, True], [True, False, False]])
    echoing.fuse(torch.zeros(2, 4, 36), torch.zeros(2, 3, 36), mask)
    assert echoing.decoder.mask is not None, "the decoder was given no mask"
    assert echoing.decoder.mask.int().tolist() == [[1, 1, 1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 1, 1, 1, 1]]


# -------------------------------------------------------------------------------------- The contrastive loss

def test_contrastive_loss_has_the_fp32_gradient_under_autocast():
    video, text = (nn.functional.normalize(torch.randn(6, 8), dim=-1).requires_grad_() for _ in range(2))
    inputs, names = (video, text, torch.tensor(14.0, requires_grad=True)), torch.arange(6)
    expected = contrastive_loss(*inputs, names)
    with torch.autocast("cpu", torch.bfloat16):
        found = contrastive_loss(*inputs, names)
    assert found.dtype == torch.float32 and torch.equal(found, expected)
    gradients = [torch.autograd.grad(loss, inputs) for loss in (found, expected)]
    assert all(map(torch.equal, *gradients))


def test_the_temperature_of_fast_retrieval_is_bounded_and_can_leave_its_bound(tiny, frames):
    fast, ids = FastRetrieval(EViLM(tiny)), torch.full((3, 4), 7)
    with torch.no_grad():
        fast.log_scale.fill_(9.0)
    video, text, scale = fast(frames, ids, ids > 0)
    contrastive_loss(video, text, scale, torch.arange(3)).backward()
    assert scale.item() == pytest.approx(100, rel=1e-5) and fast.log_scale.grad != 0
