"""What the tests share: sizes that take milliseconds, and weights under which no term can hide."""
from dataclasses import replace

import pytest
import torch

from evilm import Config, EViLM

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny():
    """All of the method at 2 frames of 64x64: no two widths alike, rows without a word, dropout off."""
    return replace(Config.toy(), frames=2, size=64, depths=(1, 2, 2, 1), dims=(8, 12, 20, 28),
                   kernels=(3, 5, 7, 3), scales=(2, 2, 3, 4), xca_heads=4, layer_scale=0.5, vocab_rows=40,
                   vocab_size=33, positions=16, text_width=16, text_layers=2, text_heads=2, max_words=8,
                   width=36, video_positions=0.5, decoder_layers=2, decoder_heads=3, decoder_pre_norm=False,
                   dropout=0.0, codes=11, code_dim=6, vit_width=24, vit_layers=2, vit_heads=3,
                   tokenizer_width=32, tokenizer_layers=2, tokenizer_heads=2)


@pytest.fixture
def randomise():
    """randomise(module): every parameter drawn anew, layer scales, temperatures and biases with the rest."""
    def draw(module, seed=0):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in module.parameters():
                noise = torch.randn(p.shape, generator=generator).to(p.dtype)
                p.copy_(noise / p[0].numel() ** 0.5 if p.ndim > 1 and p[0].numel() > 1 else 0.5 + 0.5 * noise)
        return module.eval()
    return draw


@pytest.fixture
def model(tiny, randomise):
    return randomise(EViLM(tiny))


@pytest.fixture
def frames():
    """Three clips for `tiny`."""
    return torch.rand(3, 2, 3, 64, 64)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
