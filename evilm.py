"""E-ViLM: efficient video-language model by masked video modeling with a semantic vector-quantized tokenizer.

The whole method in one file, in the paper's order and words. `python evilm.py` prints Table 8, ours beside
the paper's.

    paper                                   here
    3.1   video encoder (EdgeNeXt)          EdgeNeXt, ConvEncoder, SDTAEncoder, CrossCovarianceAttention
          ... its start, from pictures      PictureTags, train_encoder.py
    3.1   language encoder (tiny BERT)      WordPiece, TextEmbedding, Transformer
    3.1   multi-modal decoder               Transformer
    (1)   e^V, e^L                          EViLM.encode_video, EViLM.encode_text
    (2)   h^CLS, h^L, h^V                   EViLM.fuse
    3.2   masked frames                     block_mask (4.1), mask_frames
    3.4   masked words                      mask_words
    (3)   L_MVM                             mvm_loss
    (4)   nearest code                      VectorQuantizer
    (5)   averaged output, word logits      SemanticTokenizer.read_words
    (6)   L_TOKEN, focal                    focal_loss
    (7)   L_SVQ                             VectorQuantizer, train_tokenizer.py
    (8)   L = L_MLM + L_VTM + L_MVM         EViLM.forward, pretrain.py
    4.1   settings                          Config.paper, make_optimizer, learning_rate
    4.1   weights that others published     load_published
    4.2   R@K, multiple choice, zero-shot   rank_of_truth, EViLM.match
    4.2   questions, options; linear probe  Choice, LinearProbe
    4.3   other tokenizers: VideoSwin       VideoSwin, SwinBlock, WindowAttention
    4.3   ... of pixels, as DALL-E's        SemanticTokenizer.draw_pixels
    4.4   fast retrieval                    FastRetrieval, contrastive_loss, ranks_by_cosine
    4.5   Table 8; a clip's way through     table8, multiply_adds, trace

Shapes: B clips, T frames, L words, g cells a side, N = T*g*g cells, D the decoder's width, K words, M codes.
A mask is True where something is there (a real word); `chosen`, and what block_mask makes, where something
was masked.
"""
import argparse
import contextlib
import errno
import inspect
import json
import math
import os
import re
import resource
import shlex
import signal
import sys
import time
import unicodedata
import warnings
from collections import Counter, OrderedDict
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

# ----------------------------------------------------------------------------------------------------- Config


@dataclass(frozen=True)
class Config:
    """Every size and training setting; `Config.paper()` is section 4.1, `Config.toy()` fits a laptop.

    Where 4.1 gives no number: the language encoder's depth follows from Table 8's count, the decoder's heads
    and inner width and the dropout are BERT's, 30 words cover WebVid's captions.
    """
    preset: str = "paper"
    frames: int = 4                     # T, sparsely sampled (4.1)
    size: int = 256                     # pixels a side; a cell is 32x32, so g = size / 32
    # video encoder: EdgeNeXt-Small
    depths: tuple = (3, 3, 9, 3)        # blocks a stage
    dims: tuple = (48, 96, 160, 304)    # channels a stage
    kernels: tuple = (3, 5, 7, 9)       # depth-wise kernel a stage
    scales: tuple = (2, 2, 3, 4)        # parts of the split depth-wise cascade a stage; stage 1 has none
    xca_heads: int = 8
    layer_scale: float = 1e-6           # what each block is multiplied by at first
    # language encoder: a BERT of 12 layers, 128 wide
    vocab_rows: int = 9157              # rows of the embedding: 30% of BERT's 30,522 words
    words: int = 9157                   # rows in use; the rest are never drawn, and count in no softmax nor K
    positions: int = 512
    text_width: int = 128
    text_layers: int = 12
    text_heads: int = 4
    max_words: int = 30                 # a caption is cut there, with [CLS] and [SEP] (WebVid's mean is 20)
    # pictures, from which the video encoder starts where nobody published weights of its size
    encoder_epochs: int = 5
    encoder_batch_size: int = 32
    encoder_lr: float = 1.5e-3
    # multi-modal decoder
    width: int = 384                    # D
    decoder_layers: int = 4
    decoder_heads: int = 6
    decoder_pre_norm: bool = False      # post-norm, BERT's, is what gives Table 8's count
    dropout: float = 0.1                # in the language encoder and the decoder, as in BERT
    # semantic tokenizer: CLIP's ViT-B/32, 9,420 codes of 32 numbers, 8 layers that read words from the codes
    codes: int = 9420                   # M
    code_dim: int = 32
    vit_width: int = 768
    vit_layers: int = 12
    vit_heads: int = 12
    tokenizer_width: int = 384          # the paper gives 8 layers and no width: the decoder's
    tokenizer_layers: int = 8
    tokenizer_heads: int = 6
    # other tokenizers (4.3, Tables 6 and 7)
    tokenizer_target: str = "words"     # what D reads from the codes: the caption's words, or the pixels
    tokenizer_encoder: str = "vit"      # E: vit, or videoswin, which sees a frame's neighbours: Video Swin-T
    swin_dim: int = 96                  # channels of stage 1; twice as many each stage
    swin_depths: tuple = (2, 2, 6, 2)
    swin_heads: tuple = (3, 6, 12, 24)
    swin_window: tuple = (8, 7, 7)      # frames, rows and columns within which cells attend to each other
    # masking (4.1)
    mask_ratio: float = 0.40
    word_ratio: float = 0.15
    mvm_weight: float = 1.0             # of L_MVM in Eq. (8); 0: cells are masked, none predicted
    blocks: bool = True                 # False: masked cells are drawn one by one (an experiment)
    negatives: int = 1                  # mismatched captions drawn, the nearest in words is taken; 1: random
    video_positions: float = 1.0        # times the sines of time and place in e^V; 0: none
    augment: bool = True                # one random crop for a clip's frames, never a flip ("left" is a word)
    # training (4.1). The paper says neither batch size nor schedule nor how weights start: linear warm-up and
    # a cosine, as its relatives do; see `initialise`. (Fig. 6's 15K steps in 20 epochs would be 3,300 clips.)
    batch_size: int = 64
    epochs: int = 20
    lr: float = 1e-4
    video_lr: float = 1.0               # the video encoder's rate, times `lr`, where it starts from weights
    weight_decay: float = 0.01
    warmup: float = 0.05                # share of the steps
    tokenizer_epochs: int = 10
    tokenizer_batch_size: int = 64
    tokenizer_lr: float = 2e-4
    # The paper's tokenizer starts from CLIP. One that starts from nothing collapses: its vectors run to one
    # point, where Eq. (7) costs nothing. Then words are learned first, for a share of the steps, from E(X)
    # unquantized.
    tokenizer_warm: float = 0.0
    tokenizer_revive: int = 0           # steps after which a code that no cell chose is moved; 0: never
    word_weight: float = 1.0            # factor on L_TOKEN in Eq. (7), small beside the code terms by its 1/K
    pixel_weight: float = 200.0         # the same of pixels: their gradient at E(X) is then as strong

    @property
    def grid(self):
        return self.size // 32

    @property
    def target_weight(self):
        """The factor on Eq. (7)'s first term, L_TOKEN or what stands in its place (4.3)."""
        return self.word_weight if self.tokenizer_target == "words" else self.pixel_weight

    @classmethod
    def paper(cls):
        return cls()

    @classmethod
    def toy(cls):
        """The same method, sized so both stages learn the synthetic clips in minutes on two CPU cores."""
        return cls(preset="toy", size=64, depths=(1, 1, 3, 1), dims=(16, 32, 64, 128), kernels=(3, 5, 5, 3),
                   scales=(2, 2, 2, 2), xca_heads=4, layer_scale=1.0, vocab_rows=1024, words=1024,
                   positions=64, text_width=64, text_layers=2, text_heads=4, max_words=24, width=128,
                   decoder_layers=2, decoder_heads=4, decoder_pre_norm=True, dropout=0.0, codes=64,
                   code_dim=16, vit_width=96, vit_layers=3, vit_heads=4, tokenizer_width=96,
                   tokenizer_layers=2, tokenizer_heads=4, tokenizer_warm=0.4, tokenizer_revive=20,
                   word_weight=30.0, augment=False, batch_size=32, epochs=6, lr=1.5e-3, video_lr=0.1,
                   mask_ratio=0.25, tokenizer_epochs=2, tokenizer_batch_size=32, tokenizer_lr=1e-3,
                   swin_dim=16, swin_depths=(1, 2, 2, 1), swin_heads=(1, 2, 4, 8), swin_window=(4, 4, 4))


# ---------------------------------------------------------------------------------------------- Video encoder


class CrossCovarianceAttention(nn.Module):
    """XCA: attention between channels, not cells: its cost grows linearly with cells. (N, cells, C) -> same.

    Ali et al., "XCiT", 2021: softmax(K^ Q^T / tau) over C/heads x C/heads, keys and queries l2-normalised
    over cells. As in its release: Q^ K^T here, times a temperature that is learned.
    """

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1))    # the release multiplies by it
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        N, cells, C = x.shape
        # q, k, v: (N, h, c, cells)
        q, k, v = self.qkv(x).view(N, cells, 3, self.heads, C // self.heads).permute(2, 0, 3, 4, 1)
        attention = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1) * self.temperature
        return self.proj((attention.softmax(-1) @ v).permute(0, 3, 1, 2).reshape(N, cells, C))


class FourierPositions(nn.Module):
    """Sines of a cell's row and column, projected to `dim` channels: (H, W) -> (1, dim, H, W)."""

    def __init__(self, dim, waves=32):
        super().__init__()
        self.waves = waves
        self.token_projection = nn.Conv2d(2 * waves, dim, 1)

    def forward(self, H, W):
        weight = self.token_projection.weight
        steps = torch.arange(self.waves, device=weight.device)
        period = 10000 ** (2 * (steps // 2) / self.waves)
        rows, columns = (2 * math.pi * torch.arange(1, n + 1, device=weight.device)[:, None] / (n + 1e-6)
                         / period for n in (H, W))
        rows, columns = (torch.where(steps % 2 == 0, angle.sin(), angle.cos()) for angle in (rows, columns))
        # (H, W, 2 waves)
        sines = torch.cat([rows[:, None].expand(H, W, -1), columns[None].expand(H, W, -1)], -1)
        return self.token_projection(sines.permute(2, 0, 1)[None].to(weight.dtype))


class ConvEncoder(nn.Module):
    """EdgeNeXt's convolutional block: depth-wise convolution, two linear layers a cell. (N, C, H, W)."""

    def __init__(self, dim, kernel, layer_scale):
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, kernel, padding=kernel // 2, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.pwconv1 = nn.Linear(dim, 4 * dim)
        self.pwconv2 = nn.Linear(4 * dim, dim)
        self.gamma = nn.Parameter(layer_scale * torch.ones(dim))

    def forward(self, x):
        # Maps are kept channels-last in memory: permutes are views, and no layer copies (tests/benchmark.py).
        y = self.norm(self.dwconv(x).permute(0, 2, 3, 1))                                   # (N, H, W, C)
        y = self.gamma * self.pwconv2(F.gelu(self.pwconv1(y)))
        return x + y.permute(0, 3, 1, 2)


class SDTAEncoder(nn.Module):
    """EdgeNeXt's split depth-wise transpose attention: cascaded 3x3 convolutions, then XCA. (N, C, H, W)."""

    def __init__(self, dim, scales, heads, layer_scale, positions):
        super().__init__()
        self.split = math.ceil(dim / scales)
        self.convs = nn.ModuleList(nn.Conv2d(self.split, self.split, 3, padding=1, groups=self.split)
                                   for _ in range(max(1, scales - 1)))
        self.pos_embd = FourierPositions(dim) if positions else None
        self.norm_xca = nn.LayerNorm(dim, eps=1e-6)
        self.gamma_xca = nn.Parameter(layer_scale * torch.ones(dim))
        self.xca = CrossCovarianceAttention(dim, heads)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.pwconv1 = nn.Linear(dim, 4 * dim)
        self.pwconv2 = nn.Linear(4 * dim, dim)
        self.gamma = nn.Parameter(layer_scale * torch.ones(dim))

    def cascade(self, x):
        """Each part is convolved together with the result of the one before; the last passes untouched."""
        parts = list(x.split(self.split, 1))
        for i, conv in enumerate(self.convs):
            parts[i] = conv(parts[i] if i == 0 else parts[i] + parts[i - 1])
        return torch.cat(parts, 1)

    def forward(self, x):
        N, C, H, W = x.shape
        y = self.cascade(x)
        if self.pos_embd is not None:
            y = y + self.pos_embd(H, W)
        y = y.permute(0, 2, 3, 1).reshape(N, H * W, C)                                      # (N, cells, C)
        y = y + self.gamma_xca * self.xca(self.norm_xca(y))
        y = self.gamma * self.pwconv2(F.gelu(self.pwconv1(self.norm(y))))
        return x + y.view(N, H, W, C).permute(0, 3, 1, 2)


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels at each cell of a map. (N, C, H, W) -> the same."""

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class EdgeNeXt(nn.Module):
    """ENC_V of Eq. (1): EdgeNeXt (Maaz et al., 2022). (N, 3, H, W), normalised -> (N, dims[-1], H/32, W/32).

    Parameters are named and shaped as in the authors' release, without its head; the release pools before the
    final norm, here it is applied at each cell, since the decoder reads the grid.
    """

    def __init__(self, depths=(3, 3, 9, 3), dims=(48, 96, 160, 304), kernels=(3, 5, 7, 9),
                 scales=(2, 2, 3, 4), heads=8, layer_scale=1e-6):
        super().__init__()
        self.downsample_layers = nn.ModuleList([nn.Sequential(nn.Conv2d(3, dims[0], 4, stride=4),
                                                              ChannelNorm(dims[0], eps=1e-6))])
        self.stages = nn.ModuleList()
        for i, (depth, dim) in enumerate(zip(depths, dims)):
            if i > 0:
                self.downsample_layers.append(nn.Sequential(ChannelNorm(dims[i - 1], eps=1e-6),
                                                            nn.Conv2d(dims[i - 1], dim, 2, stride=2)))
            blocks = [ConvEncoder(dim, kernels[i], layer_scale) for _ in range(depth)]
            if i > 0:                   # one SDTA block, last in stages 2 to 4; positions are told in stage 2
                blocks[-1] = SDTAEncoder(dim, scales[i], heads, layer_scale, positions=i == 1)
            self.stages.append(nn.Sequential(*blocks))
        self.norm = ChannelNorm(dims[-1], eps=1e-6)

    def forward(self, x):
        x = x.contiguous(memory_format=torch.channels_last)
        for downsample, stage in zip(self.downsample_layers, self.stages):
            x = stage(downsample(x))
        return self.norm(x)

    def start(self, frames):
        """Sets the norms for weights that start from nothing: frames (B, T, 3, H, W) in [0, 1]."""
        start_centred(self, normalise(frames, *IMAGENET).flatten(0, 1))


def edgenext(config):
    """The video encoder of a Config's sizes."""
    c = config
    return EdgeNeXt(c.depths, c.dims, c.kernels, c.scales, c.xca_heads, c.layer_scale)


class PictureTags(nn.Module):
    """EdgeNeXt as an image classifier: the average of its cells, a linear layer for each kind of tag.

    frames (B, T, 3, H, W) in [0, 1] -> logits (B, n) of each kind, with n tags of that kind. It stands where
    ImageNet stands for the published EdgeNeXt; beside `video_encoder` nothing of it is kept.
    """

    def __init__(self, config, tags):
        super().__init__()
        self.video_encoder = edgenext(config)
        self.heads = nn.ModuleList(nn.Linear(config.dims[-1], n) for n in tags)
        self.apply(initialise)

    def forward(self, frames):
        maps = self.video_encoder(normalise(frames, *IMAGENET).flatten(0, 1))               # (B*T, C, g, g)
        average = maps.mean((2, 3)).unflatten(0, frames.shape[:2]).mean(1)                  # (B, C)
        return [head(average) for head in self.heads]


# ------------------------------------------------------------------------------------------- Language encoder

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
PAD, UNK, CLS, SEP, MASK = range(5)     # a vocabulary that this file makes begins with these, in this order


class WordPiece:
    """BERT-uncased's splitting: words by greedy longest match in a vocabulary, `##` for what continues."""

    def __init__(self, vocab):
        missing = [token for token in SPECIAL if token not in vocab]
        if missing:
            raise InputError(f"the vocabulary has no {' '.join(missing)}: is it BERT's vocab.txt, "
                             "one word a line?")
        self.vocab = list(vocab)
        self.index = {word: i for i, word in enumerate(self.vocab)}

    def __len__(self):
        return len(self.vocab)

    @staticmethod
    def split(text):
        """Lower case, accents stripped, punctuation and CJK apart: "Été, 3x" -> ["ete", ",", "3x"]."""
        pieces = []
        for letter in unicodedata.normalize("NFD", text.lower()):
            kind, code = unicodedata.category(letter), ord(letter)
            symbol = 33 <= code <= 126 and not letter.isalnum()         # $, +, ^ ... are punctuation to BERT
            cjk = 0x3400 <= code <= 0x9FFF or 0xF900 <= code <= 0xFAFF or 0x20000 <= code <= 0x2FA1F
            if letter.isspace() or kind.startswith("Z"):
                pieces.append(" ")
            elif kind.startswith("P") or symbol or cjk:
                pieces.append(f" {letter} ")
            elif kind != "Mn" and not kind.startswith("C") and letter != "\ufffd":
                pieces.append(letter)
        return "".join(pieces).split()

    def pieces(self, word):
        """Greedy longest match: "unaffable" -> ["una", "##ffa", "##ble"], or ["[UNK]"] where nothing fits."""
        found, start = [], 0
        while start < len(word) and len(word) <= 100:
            prefix = "##" if start else ""
            end = next((e for e in range(len(word), start, -1) if prefix + word[start:e] in self.index), None)
            if end is None:
                return ["[UNK]"]
            found.append(prefix + word[start:end])
            start = end
        return found or ["[UNK]"]

    def encode(self, text, max_len):
        """-> list of at most `max_len` ids: [CLS], the pieces, [SEP]; cut so that [SEP] stays."""
        ids = [self.index[piece] for word in self.split(text) for piece in self.pieces(word)]
        return [self.index["[CLS]"], *ids[:max_len - 2], self.index["[SEP]"]]

    def add_words(self, texts, size):
        """A vocabulary of at most `size` with the words of `texts` that this one cannot spell, at its end."""
        words = Counter(word for text in texts for word in self.split(text))
        unknown = [word for word in words if self.pieces(word) == ["[UNK]"]]
        unknown.sort(key=lambda word: (-words[word], word))
        return WordPiece(self.vocab + unknown[:max(0, size - len(self))])

    @classmethod
    def from_captions(cls, captions, size=None):
        """A vocabulary of whole words: the special tokens, then words by count, at most `size` entries."""
        counts = Counter(word for caption in captions for word in cls.split(caption))
        by_count = sorted(counts, key=lambda word: (-counts[word], word))
        return cls((SPECIAL + by_count)[:size])

    def keep_frequent(self, captions, share=0.30):
        """The paper's truncation (4.1): exactly round(share * len) entries, the most frequent pieces.

        Special tokens come first; ties and words that do not occur keep order; `[unused...]` never stays.
        """
        words = Counter(word for caption in captions for word in self.split(caption))
        counts = Counter()
        for word, count in words.items():
            for piece in self.pieces(word):
                counts[piece] += count
        rest = [w for w in self.vocab if w not in SPECIAL and not w.startswith("[unused")]
        rest.sort(key=lambda word: -counts[word])                          # stable: ties keep their order
        return WordPiece((SPECIAL + rest)[:round(share * len(self.vocab))])


def quick_gelu(x):
    """CLIP's cheaper GELU."""
    return x * torch.sigmoid(1.702 * x)


class TransformerBlock(nn.Module):
    """Self-attention, then two linear layers. (B, L, C) -> the same; mask (B, 1, 1, L), True for real keys.

    Post-norm is BERT's: the language encoder and the paper preset's decoder. Pre-norm is the ViT's.
    """

    def __init__(self, width, heads, pre_norm=False, activation=F.gelu, eps=1e-12, dropout=0.0):
        super().__init__()
        self.heads, self.pre_norm, self.activation, self.dropout = heads, pre_norm, activation, dropout
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def drop(self, x):
        return F.dropout(x, self.dropout, self.training)

    def attend(self, x, mask):
        B, L, C = x.shape
        # q, k, v: (B, h, L, c)
        q, k, v = self.qkv(x).view(B, L, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, mask, self.dropout if self.training else 0.0)
        return self.drop(self.proj(y.transpose(1, 2).reshape(B, L, C)))

    def feed(self, x):
        return self.drop(self.fc2(self.activation(self.fc1(x))))

    def forward(self, x, mask=None):
        if self.pre_norm:
            x = x + self.attend(self.norm1(x), mask)
            return x + self.feed(self.norm2(x))
        x = self.norm1(x + self.attend(x, mask))
        return self.norm2(x + self.feed(x))


class Transformer(nn.ModuleList):
    """Blocks one after another: `(x (B, L, C), mask (B, L) or None) -> (B, L, C)`."""

    def __init__(self, layers, *sizes, **settings):
        super().__init__(TransformerBlock(*sizes, **settings) for _ in range(layers))

    def forward(self, x, mask=None):
        mask = mask if mask is None else mask[:, None, None]
        for block in self:
            x = block(x, mask)
        return x


class TextEmbedding(nn.Module):
    """BERT's embeddings: words + positions + segments, normalised. ids (B, L) -> (B, L, text_width)."""

    def __init__(self, rows, positions, width, dropout=0.0):
        super().__init__()
        self.words = nn.Embedding(rows, width)
        self.positions = nn.Embedding(positions, width)
        self.segments = nn.Embedding(2, width)      # BERT has two; a caption is always the first
        self.norm = nn.LayerNorm(width, eps=1e-12)
        self.dropout = nn.Dropout(dropout)

    def forward(self, ids):
        x = self.words(ids) + self.positions.weight[:ids.shape[1]] + self.segments.weight[0]
        return self.dropout(self.norm(x))


# ----------------------------------------------------------------------------------------------------- E-ViLM


def space_time_sines(T, g, width, device=None):
    """Fixed sines that tell a cell its frame, row and column: (T*g*g, width), in the cells' order.

    The paper names no positions for e^V and Table 8 has no parameters for them; without any, a clip that
    moves left and one that moves right would be the same set of cells to the decoder. Their length is
    sqrt(width / 2).
    """
    waves = width // 6                                                  # sine and cosine for each of t, y, x
    frequency = 100.0 ** (-torch.arange(waves, device=device) / waves)  # positions stay below 100
    axes = torch.meshgrid(*(torch.arange(n, device=device) for n in (T, g, g)), indexing="ij")
    angles = [axis.reshape(-1, 1) * frequency for axis in axes]         # three of (N, waves)
    sines = torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], 1)
    return F.pad(sines, (0, width - sines.shape[1]))


# Mean and deviation of the pixels that the encoders were trained on.
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def normalise(frames, mean, deviation):
    """(..., 3, H, W) in [0, 1] -> the scale that an encoder was trained on."""
    mean, deviation = (torch.tensor(c, device=frames.device).view(3, 1, 1) for c in (mean, deviation))
    return (frames - mean) / deviation


def initialise(module):
    """Linear weights of size 1 / sqrt(inputs), so signals keep theirs at any width; embeddings 0.02 (BERT).

    The paper does not say how weights start where none are loaded.
    """
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=module.in_features ** -0.5)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    if isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)


@torch.no_grad()
def start_centred(network, *inputs):
    """A start from nothing, on real inputs: over them each norm then gives all channels mean 0, deviation 1.

    Not in the paper, whose tokenizers start from CLIP's and Kinetics' weights; of EdgeNeXt, published with
    ImageNet's, it does not say. A norm over channels leaves what all cells share, their brightness above all,
    and at random weights the later layers see little else:
    on the synthetic set the toy encoder then learns colours at once and shapes hardly. After Mishkin and
    Matas, "All you need is a good init", 2016.
    """
    def centre(norm, _, output):
        channels_last = output.movedim(1, -1) if isinstance(norm, ChannelNorm) else output
        values = channels_last.flatten(0, -2)
        mean, deviation = values.mean(0), values.std(0) + 1e-3
        norm.weight /= deviation
        norm.bias.copy_((norm.bias - mean) / deviation)
        centred = (channels_last - mean) / deviation
        return centred.movedim(-1, 1) if isinstance(norm, ChannelNorm) else centred

    norms = [part for part in network.modules() if isinstance(part, nn.LayerNorm)]
    hooks = [norm.register_forward_hook(centre) for norm in norms]
    network(*inputs)
    for hook in hooks:
        hook.remove()


def prediction_head(width, classes):
    """HEAD of a masked word or cell, BERT's: (n, width) -> logits (n, classes)."""
    return nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width), nn.Linear(width, classes))


class EViLM(nn.Module):
    """The model of 3.1. Frames (B, T, 3, H, W) in [0, 1] and ids (B, L) go in; see `forward` for the rest."""

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        self.vocab = None           # the rows' words, where a published vocabulary is to be followed
        self.video_encoder = edgenext(c)
        self.video_proj = nn.Linear(c.dims[-1], c.width)
        self.text_embedding = TextEmbedding(c.vocab_rows, c.positions, c.text_width, c.dropout)
        self.text_encoder = Transformer(c.text_layers, c.text_width, c.text_heads, dropout=c.dropout)
        self.text_proj = nn.Linear(c.text_width, c.width)
        self.token_type = nn.Parameter(0.02 * torch.randn(3, c.width))      # e^CLS, t^L, t^V
        self.decoder = Transformer(c.decoder_layers, c.width, c.decoder_heads, pre_norm=c.decoder_pre_norm,
                                   dropout=c.dropout)
        # Pre-norm blocks leave their sum unnormalised; post-norm ones do not, and Table 8 has no room for a
        # norm here.
        self.decoder_norm = nn.LayerNorm(c.width) if c.decoder_pre_norm else nn.Identity()
        self.pooler = nn.Sequential(nn.Linear(c.width, c.width), nn.Tanh())
        self.vtm_head = nn.Linear(c.width, 2)
        self.mlm_head = prediction_head(c.width, c.vocab_rows)
        self.mvm_head = prediction_head(c.width, c.codes)
        self.apply(initialise)

    def encode_video(self, frames):
        """Eq. (1): e^V. (B, T, 3, H, W) in [0, 1] -> (B, N, D), with the sines of time and place.

        The paper writes I_0 to I_T, which would be T + 1 frames; 4.1 has T = 4.
        """
        B, T = frames.shape[:2]
        maps = self.video_encoder(normalise(frames, *IMAGENET).flatten(0, 1))               # (B*T, C, g, g)
        cells = self.video_proj(maps.permute(0, 2, 3, 1).flatten(1, 2)).reshape(B, -1, self.config.width)
        sines = space_time_sines(T, maps.shape[-1], self.config.width, frames.device)
        return cells + self.config.video_positions * sines

    def encode_text(self, ids, mask):
        """Eq. (1): e^L. ids, mask (B, L) -> (B, L, D)."""
        return self.text_proj(self.text_encoder(self.text_embedding(ids), mask))

    def fuse(self, video, text, mask):
        """Eq. (2): -> h^CLS (B, D), h^L (B, L, D), h^V (B, N, D).

        Either of video and text may be None (4.4: text alone, video alone); its h is then None. `mask` (B, L)
        is the text's and is not looked at without text.
        """
        e_cls, t_text, t_video = self.token_type
        B = len(video if text is None else text)
        parts, seen = [e_cls.expand(B, 1, -1)], None
        if text is not None:
            parts.append(text + t_text)
            others = 1 + (0 if video is None else video.shape[1])
            seen = torch.cat([mask.new_ones(B, 1), mask, mask.new_ones(B, others - 1)], 1)
        if video is not None:
            parts.append(video + t_video)
        h = self.decoder_norm(self.decoder(torch.cat(parts, 1), seen))
        L = 0 if text is None else text.shape[1]
        return h[:, 0], None if text is None else h[:, 1:1 + L], None if video is None else h[:, 1 + L:]

    def match(self, video, text, mask):
        """How well each video (B, N, D) fits each text (B, L, D): the difference of its 2 logits, (B,)."""
        logits = self.vtm_head(self.pooler(self.fuse(video, text, mask)[0])).float()
        return logits[:, 1] - logits[:, 0]

    def forward(self, frames, ids, mask, words=None, cells=None, mismatched=None):
        """One masked pass for all objectives of Eq. (8); the paper does not say how many a step takes.

        frames (B, T, 3, H, W) and ids (B, L) have masked what is to be predicted; mask (B, L) is the text's.
        `words` (B, L) and `cells` (B, N) are True where something was masked; `mismatched` is (ids, mask)
        of one wrong caption a clip, of the same L. Returns (vtm (2B, 2): the matched pairs, then the
        mismatched; mlm (words masked, K); mvm (cells masked, M)), None for each that was not asked for.
        """
        B = len(frames)
        video = self.encode_video(frames)                                                   # once a clip
        if mismatched is not None:
            ids, mask = torch.cat([ids, mismatched[0]]), torch.cat([mask, mismatched[1]])
            video = torch.cat([video, video])
        h_cls, h_text, h_video = self.fuse(video, self.encode_text(ids, mask), mask)
        vtm = None if mismatched is None else self.vtm_head(self.pooler(h_cls))
        # The heads run on masked positions of the matched pairs alone; rows that no word uses are cut off.
        mlm = None if words is None else self.mlm_head(h_text[:B][words])[:, :self.config.words]
        mvm = None if cells is None else self.mvm_head(h_video[:B][cells])
        return vtm, mlm, mvm


# ---------------------------------------------------------------------------------------------------- Masking


def block_mask(n, grid, ratio, generator):
    """Block-wise masking (4.1, after BEiT): bool (n, grid, grid), in each exactly round(ratio * grid^2) True.

    Rectangles of log-uniform aspect within [0.3, 1/0.3] and of at least max(1, target // 5) cells are laid
    until the count is reached; the last one is trimmed, from either end, to the exact count. The paper does
    not say whether frames share their blocks: here each frame has its own, at the full ratio.
    """
    target = round(ratio * grid * grid)
    smallest = max(1, target // 5)
    masks = torch.zeros(n, grid * grid, dtype=torch.bool)
    for mask in masks:
        covered = set()
        while len(covered) < target:
            wanted = target - len(covered)
            area, aspect, y, x, end = torch.rand(5, generator=generator).tolist()
            area = smallest + area * max(0, wanted - smallest)
            aspect = math.exp((2 * aspect - 1) * math.log(1 / 0.3))
            height, width = (min(grid, max(1, round(math.sqrt(a)))) for a in (area * aspect, area / aspect))
            if height * width < smallest:
                continue
            top, left = int(y * (grid - height + 1)), int(x * (grid - width + 1))
            block = [r * grid + c for r in range(top, top + height) for c in range(left, left + width)]
            block = block if end < 0.5 else block[::-1]     # or the cells above and to the left would gain
            covered.update([cell for cell in block if cell not in covered][:wanted])
        mask[list(covered)] = True
    return masks.view(n, grid, grid)


def random_mask(n, grid, ratio, generator):
    """What block-wise masking is compared with: as many cells, drawn one by one. Bool (n, grid, grid)."""
    order = torch.rand(n, grid * grid, generator=generator).argsort(1).argsort(1)
    return (order < round(ratio * grid * grid)).view(n, grid, grid)


def mask_frames(frames, chosen):
    """Zeros over the chosen cells (3.2), black before any normalisation. frames (B, T, 3, H, W) in [0, 1],
    chosen (B, T, g, g) -> frames."""
    scale = frames.shape[-1] // chosen.shape[-1]
    pixels = chosen.repeat_interleave(scale, -2).repeat_interleave(scale, -1)
    return frames.masked_fill(pixels[:, :, None], 0.0)


def mask_words(ids, vocab_size, generator, ratio=0.15):
    """BERT's masking of one caption (3.4; 15%: 4.1): ids (L,) -> (ids, chosen), both (L,).

    Exactly max(1, round(ratio * n)) of its n words, none when n = 0: 80% become [MASK], 10% a random word,
    10% stay. Special tokens (ids below 5) are never chosen and never drawn.
    """
    ids, words = ids.clone(), (ids > MASK).nonzero().flatten()
    count = max(1, round(ratio * len(words))) if len(words) else 0
    picked = words[torch.randperm(len(words), generator=generator)[:count]]
    fate = torch.rand(count, generator=generator)
    drawn = torch.randint(MASK + 1, vocab_size, (count,), generator=generator)
    ids[picked] = torch.where(fate < 0.8, MASK, torch.where(fate < 0.9, drawn, ids[picked]))
    chosen = torch.zeros(len(ids), dtype=torch.bool)
    chosen[picked] = True
    return ids, chosen


# ----------------------------------------------------------------------------------------------------- Losses
# Each is a sum over its count. `count` is given where a batch is cut over processes or accumulation steps:
# the count of the whole batch, so that the parts' losses add up to the loss of the whole.


def cross_entropy(logits, targets, count=None):
    """The sum over i of -log softmax(logits[i])[targets[i]], over the count. (n, classes), (n,) -> scalar."""
    total = F.cross_entropy(logits.float(), targets, reduction="sum")
    return total / max(1, len(targets) if count is None else count)


def mvm_loss(logits, targets, count=None):
    """Eq. (3): the mean over N masked cells. logits (N, M), targets (N,) codes -> scalar.

    The paper's minus before a cross-entropy, which is already positive, is one too many.
    """
    return cross_entropy(logits, targets, count)


def mlm_loss(logits, targets, count=None):
    """L_MLM of Eq. (8): logits (n, K) of the masked words, targets (n,) their ids -> scalar."""
    return cross_entropy(logits, targets, count)


def vtm_loss(logits, targets, count=None):
    """L_VTM of Eq. (8): logits (n, 2), targets (n,): 1 for a pair that matches, else 0 -> scalar."""
    return cross_entropy(logits, targets, count)


def vtm_targets(logits):
    """Which pairs match: the first half of (2B, 2), as `EViLM.forward` orders them -> (2B,) of 1 and 0."""
    return torch.arange(len(logits), device=logits.device).lt(len(logits) // 2).long()


def focal_loss(logits, targets):
    """Eq. (6), L_TOKEN: logits (B, K), targets (B, K) in {0, 1} -> scalar, averaged over K and over B.

    The printed equation lacks its minus. The weight p of an absent word carries gradient, as printed.
    """
    there = -F.logsigmoid(logits)                                   # -log p
    absent = -torch.sigmoid(logits) * F.logsigmoid(-logits)         # -p log(1 - p)
    return torch.where(targets > 0, there, absent).mean()


def rank_of_truth(scores, truth):
    """Ranks of the right items, 1 best; ties count against the query. scores (Q, n), truth (Q,) -> (Q,)."""
    right = scores.gather(1, truth[:, None])
    return (scores >= right).sum(1)                                 # the right one itself is the 1


# ----------------------------------------------------------------------------------------- Semantic tokenizer


class ViT(nn.Module):
    """E of 3.3: CLIP's vision transformer. (N, 3, H, W), normalised -> (N, cells, width): the patch tokens
    after the last block, CLS dropped."""

    def __init__(self, size=256, patch=32, width=768, layers=12, heads=12):
        super().__init__()
        self.patch = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        self.cls = nn.Parameter(torch.zeros(width))
        self.positions = nn.Parameter(0.02 * torch.randn((size // patch) ** 2 + 1, width))
        self.norm = nn.LayerNorm(width)                             # CLIP has one before the blocks
        self.blocks = Transformer(layers, width, heads, pre_norm=True, activation=quick_gelu, eps=1e-5)

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)                                    # (N, cells, width)
        x = torch.cat([self.cls.expand(len(x), 1, -1), x], 1) + self.positions
        return self.blocks(self.norm(x))[:, 1:]


def windows_of(x, window):
    """A grid cut into windows: (B, T, H, W, C) -> (B, windows, cells of one, C)."""
    B, T, H, W, C = x.shape
    t, h, w = window
    x = x.view(B, T // t, t, H // h, h, W // w, w, C).permute(0, 1, 3, 5, 2, 4, 6, 7)
    return x.reshape(B, -1, t * h * w, C)


def grid_of(x, window, sides):
    """`windows_of` undone: (B, windows, cells of one, C) -> (B, T, H, W, C), `sides` being T, H, W."""
    B, _, _, C = x.shape
    x = x.view(B, *(n // w for n, w in zip(sides, window)), *window, C).permute(0, 1, 4, 2, 5, 3, 6, 7)
    return x.reshape(B, *sides, C)


def torn_apart(sides, window, shift, device):
    """Pairs of a window's cells that were not neighbours before the shift: (windows, cells, cells)."""
    wrapped = [torch.arange(n, device=device) >= n - s for n, s in zip(sides, shift)]
    t, y, x = torch.meshgrid(*wrapped, indexing="ij")
    region = windows_of((4 * t + 2 * y + x)[None, ..., None], window)[0, ..., 0]            # (windows, cells)
    return region[:, :, None] != region[:, None]


class WindowAttention(nn.Module):
    """Self-attention within windows, with a learned bias for each distance in time, rows and columns.

    (B, windows, cells, C) -> the same; pairs of cells that are `apart` (windows, cells, cells) do not attend.
    """

    def __init__(self, dim, heads, window):
        super().__init__()
        self.heads = heads
        t, h, w = (2 * n - 1 for n in window)                       # distances from -(n - 1) to n - 1
        self.relative_position_bias_table = nn.Parameter(0.02 * torch.randn(t * h * w, heads))
        places = torch.cartesian_prod(*map(torch.arange, window))                           # (cells, 3)
        distances = places[:, None] - places + torch.tensor(window) - 1                 # (cells, cells, 3)
        self.register_buffer("relative_position_index",
                             (distances * torch.tensor([h * w, w, 1])).sum(-1), persistent=False)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, apart):
        B, n, N, C = x.shape
        qkv = self.qkv(x).view(B, n, N, 3, self.heads, C // self.heads)
        q, k, v = qkv.permute(3, 0, 1, 4, 2, 5).flatten(2, 3)                               # (B, n*h, N, c)
        # A window that was made smaller takes the biases of a whole one's first N cells, as the release does.
        bias = self.relative_position_bias_table[self.relative_position_index[:N, :N]]      # (N, N, h)
        bias = bias.permute(2, 0, 1).masked_fill(apart[:, None], -math.inf)                 # (n, h, N, N)
        y = F.scaled_dot_product_attention(q, k, v, bias.flatten(0, 1).to(q.dtype))
        return self.proj(y.view(B, n, self.heads, N, -1).transpose(2, 3).reshape(B, n, N, C))


class SwinBlock(nn.Module):
    """Attention within windows, which are shifted by half their size in every other block, then two linear
    layers. (B, T, H, W, C) -> the same."""

    def __init__(self, dim, heads, window, shifted):
        super().__init__()
        self.window, self.shift = window, [n // 2 if shifted else 0 for n in window]
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, heads, window)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(OrderedDict(fc1=nn.Linear(dim, 4 * dim), gelu=nn.GELU(),
                                             fc2=nn.Linear(4 * dim, dim)))

    def forward(self, x):
        _, T, H, W, _ = x.shape
        # Along a side that one window covers, the window is as long as the side and does not shift.
        window = [min(n, w) for n, w in zip((T, H, W), self.window)]
        shift = [s if n > w else 0 for n, w, s in zip((T, H, W), self.window, self.shift)]
        t, h, w = (-n % w for n, w in zip((T, H, W), window))
        y = F.pad(self.norm1(x), (0, 0, 0, w, 0, h, 0, t))          # to whole windows, as the release does
        sides = y.shape[1:4]
        y = windows_of(y.roll([-s for s in shift], (1, 2, 3)), window)
        y = grid_of(self.attn(y, torn_apart(sides, window, shift, x.device)), window, sides)
        x = x + y.roll(shift, (1, 2, 3))[:, :T, :H, :W]
        return x + self.mlp(self.norm2(x))


class PatchMerging(nn.Module):
    """2x2 cells become one, twice as wide: (B, T, H, W, C) -> (B, T, H/2, W/2, 2C)."""

    def __init__(self, dim):
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x):
        B, T, H, W, C = x.shape
        x = x.view(B, T, H // 2, 2, W // 2, 2, C).permute(0, 1, 2, 4, 5, 3, 6)      # the column counts first
        return self.reduction(self.norm(x.reshape(B, T, H // 2, W // 2, 4 * C)))


class VideoSwin(nn.Module):
    """E of 4.3's other tokenizer: Video Swin (Liu et al., 2022), which sees all frames of a clip together.
    (B, T, 3, H, W), normalised -> (B, T, H/32, W/32, 8 dim).

    Parameters are named and shaped as in the authors' release. Its stochastic depth is left out: the paper
    does not speak of it.
    """

    def __init__(self, dim=96, depths=(2, 2, 6, 2), heads=(3, 6, 12, 24), window=(8, 7, 7)):
        super().__init__()
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv3d(3, dim, (2, 4, 4), stride=(1, 4, 4)),
                                          "norm": nn.LayerNorm(dim)})
        self.layers = nn.Sequential()
        for i, depth in enumerate(depths):
            stage = nn.Sequential(OrderedDict(blocks=nn.Sequential(
                *(SwinBlock(dim << i, heads[i], window, shifted=j % 2 == 1) for j in range(depth)))))
            if i < len(depths) - 1:
                stage.add_module("downsample", PatchMerging(dim << i))
            self.layers.append(stage)
        self.norm = nn.LayerNorm(dim << len(depths) - 1)

    def forward(self, x):
        # The release's patches are two frames long and its stride is 2: it pools in time, which 4.3 removes.
        # With a stride of 1 and an empty frame after the last, each frame has its cells.
        x = F.pad(x.transpose(1, 2), (0, 0, 0, 0, 0, 1))                                # (B, 3, T + 1, H, W)
        x = self.patch_embed["norm"](self.patch_embed["proj"](x).movedim(1, -1))       # (B, T, H/4, W/4, dim)
        return self.norm(self.layers(x))


class VectorQuantizer(nn.Module):
    """q of Eq. (4): nearest code of a learned codebook. (..., dim) -> quantized (..., dim), ids (...), loss.

    Both sides are l2-normalised, so unit vectors come out and the nearest code is the largest inner product.
    `loss` is the last two terms of Eq. (7), squared norms averaged over cells; the paper gives them no
    weights.
    """

    def __init__(self, codes, dim):
        super().__init__()
        self.codebook = nn.Parameter(torch.randn(codes, dim))

    def forward(self, x):
        x = F.normalize(x.float(), dim=-1)
        codebook = F.normalize(self.codebook.float(), dim=-1)
        device = x.device.type if x.device.type in ("cuda", "mps") else "cpu"
        with torch.autocast(device, enabled=False):                 # in bf16 near codes would tie
            ids = (x.detach() @ codebook.detach().t()).argmax(-1)                           # Eq. (4)
        codes = F.embedding(ids, codebook)
        loss = ((x.detach() - codes) ** 2).sum(-1).mean() + ((x - codes.detach()) ** 2).sum(-1).mean()
        return x + (codes - x).detach(), ids, loss                  # straight-through gradient to E(X)

    @torch.no_grad()
    def start(self, vectors, generator):
        """The codebook starts at encoder outputs drawn at random: vectors (n, dim)."""
        self.revive(torch.zeros(len(self.codebook), dtype=torch.bool), vectors, generator)

    @torch.no_grad()
    def revive(self, used, vectors, generator):
        """Codes that no cell chose of late move to random encoder outputs: used (M,) bool, vectors (n, dim).

        Not in the paper. A code that is never nearest gets no gradient from Eq. (7), so it would stay dead.
        """
        dead = (~used).nonzero().flatten()
        drawn = torch.randint(len(vectors), (len(dead),), generator=generator).to(vectors.device)
        self.codebook[dead] = F.normalize(vectors[drawn].float(), dim=-1)


class SemanticTokenizer(nn.Module):
    """The semantic vector-quantized tokenizer of 3.3: frames -> codes -> the words of the caption.

    4.3 compares it with one whose E is VideoSwin, and with DALL-E's dVAE, for which a tokenizer of pixels
    stands here: E and codebook are the same, and D draws each frame from its codes. It is a plain
    vector-quantized autoencoder; DALL-E's is convolutional, samples its codes by Gumbel softmax under a
    uniform prior on them, and its likelihood is no squared error.
    """

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        self.sees_neighbours = c.tokenizer_encoder == "videoswin"   # a frame's codes depend on other frames
        self.encoder = (VideoSwin(c.swin_dim, c.swin_depths, c.swin_heads, c.swin_window)
                        if self.sees_neighbours else
                        ViT(c.size, 32, c.vit_width, c.vit_layers, c.vit_heads))
        self.proj = nn.Linear(8 * c.swin_dim if self.sees_neighbours else c.vit_width, c.code_dim)
        self.quantizer = VectorQuantizer(c.codes, c.code_dim)
        self.expand = nn.Linear(c.code_dim, c.tokenizer_width)
        self.decoder = Transformer(c.tokenizer_layers, c.tokenizer_width, c.tokenizer_heads)
        of_words = c.tokenizer_target == "words"
        self.head = nn.Linear(c.tokenizer_width, c.vocab_rows - len(SPECIAL) if of_words else 3 * 32 * 32)
        for part in (self.encoder, self.proj, self.decoder, self.head):
            part.apply(initialise)
        nn.init.normal_(self.expand.weight)         # unit vectors come in: this makes each number of size 1
        # Words are rare, as in Lin et al. (the focal loss). Pixels begin grey, or noise is unlearned first.
        nn.init.constant_(self.head.bias, -3.0 if of_words else 0.5)
        if not of_words:
            nn.init.normal_(self.head.weight, std=0.02)

    def start(self, frames):
        """Sets VideoSwin's norms for weights that start from nothing, or its codes would for long show little
        but the background: frames (B, T, 3, H, W). The ViT learns without."""
        start_centred(self.encoder, normalise(frames, *IMAGENET))

    def embed(self, frames):
        """E(X): (B, T, 3, H, W) in [0, 1] -> (B, T, g, g, code_dim)."""
        if self.sees_neighbours:
            return self.proj(self.encoder(normalise(frames, *IMAGENET)))
        B, T = frames.shape[:2]
        cells = self.proj(self.encoder(normalise(frames, *CLIP).flatten(0, 1)))
        g = math.isqrt(cells.shape[1])
        return cells.view(B, T, g, g, -1)

    def decode(self, quantized):
        """D on codes and their time and place: (B, T, g, g, code_dim) -> (B, N, width)."""
        T, g = quantized.shape[1:3]
        cells = self.expand(quantized).flatten(1, 3)
        return self.decoder(cells + space_time_sines(T, g, cells.shape[-1], cells.device))

    def read_words(self, quantized):
        """Eq. (5): the words' logits from the averaged output of D. (B, T, g, g, code_dim) -> (B, K).

        D sees all codes of the clip with their time and place, or "left" and "right" could not be told apart.
        """
        return self.head(self.decode(quantized).mean(1))[:, :self.config.words - len(SPECIAL)]

    def draw_pixels(self, quantized):
        """Each frame from its own codes, as an image's tokenizer does: (B, T, g, g, code_dim) -> frames."""
        B, T, g = quantized.shape[:3]
        cells = self.head(self.decode(quantized.flatten(0, 1)[:, None])).view(B, T, g, g, 3, 32, 32)
        return cells.permute(0, 1, 4, 2, 5, 3, 6).reshape(B, T, 3, 32 * g, 32 * g)

    def forward(self, frames, quantize=True):
        """-> what D reads from the codes, ids (B, T, g, g), the codebook and commitment terms of Eq. (7).

        D reads words' logits (B, K), or frames (B, T, 3, H, W) where pixels are the target. Without
        `quantize` it reads E(X) itself, l2-normalised, and the terms count nothing.
        """
        embedded = self.embed(frames)
        quantized, ids, loss = self.quantizer(embedded)
        if not quantize:
            quantized, loss = F.normalize(embedded, dim=-1), 0.0 * loss
        return self.reconstruct(quantized), ids, loss

    def reconstruct(self, quantized):
        """The target, read from codes: words' logits or pixels."""
        of_words = self.config.tokenizer_target == "words"
        return self.read_words(quantized) if of_words else self.draw_pixels(quantized)

    @torch.no_grad()
    def tokenize(self, frames):
        """The semantic labels of MVM: (B, T, 3, H, W) in [0, 1], unmasked -> ids (B, T, g, g)."""
        return self.quantizer(self.embed(frames))[1]


def words_present(ids, mask, words):
    """y^S of Eq. (6): a caption's words. ids, mask (B, L) -> float (B, words - 5), without special tokens."""
    present = torch.zeros(len(ids), words, device=ids.device)
    present.scatter_(1, ids * mask, 1.0)                            # padding falls on [PAD], which is cut off
    return present[:, len(SPECIAL):]


# ------------------------------------------------------------------------------------------- Downstream heads


def without(model, *parts):
    """The model, its unused parts frozen: DistributedDataParallel would wait for their gradients."""
    for part in parts:
        getattr(model, part).requires_grad_(False)
    return model


class Choice(nn.Module):
    """Question answering and multiple choice (4): a linear head on the pooled h^CLS of video and each text.

    frames (B, T, 3, H, W), ids and mask (B, O, L): O texts a clip -> logits (B, O * outputs). A question has
    one text and an output an answer; multiple choice has a text an option and one output. Without frames
    (None) only the texts are seen: the question-only model.

    With `fills_in` the head of MLM stays: `forward` then also takes (ids, mask, hidden), each (B, L), of the
    right option with its words hidden, and gives these words' logits (n, K). The paper has no such loss here.
    """

    def __init__(self, model, outputs, fills_in=False):
        super().__init__()
        self.model = without(model, "vtm_head", "mvm_head", *["mlm_head"] * (not fills_in))
        # A bias that all options share would change no softmax.
        self.head = nn.Linear(model.config.width, outputs, bias=outputs > 1)
        initialise(self.head)
        if outputs == 1:            # begins where zero-shot scoring ends: the difference of the 2-way logits
            matched = model.vtm_head.weight.detach()
            self.head.weight.data.copy_(matched[1:] - matched[:1])

    def forward(self, frames, ids, mask, right=None):
        video = None if frames is None else self.model.encode_video(frames)                 # once a clip
        logits = None if ids is None else self.compare(video, ids, mask)
        if right is None:
            return logits
        ids, mask, hidden = right
        h_text = self.model.fuse(video, self.model.encode_text(ids, mask), mask)[1]
        return logits, self.model.mlm_head(h_text[hidden])[:, :self.model.config.words]

    def compare(self, video, ids, mask):
        B, O, _ = ids.shape
        ids, mask = ids.flatten(0, 1), mask.flatten(0, 1)
        video = None if video is None else video.repeat_interleave(O, 0)
        h_cls = self.model.fuse(video, self.model.encode_text(ids, mask), mask)[0]
        return self.head(self.model.pooler(h_cls)).view(B, -1)


class FastRetrieval(nn.Module):
    """Fast retrieval (4.4): text alone and video alone go through the decoder, and their pooled h^CLS are
    compared by cosine. -> unit vectors (B, D) of frames (B, T, 3, H, W) and of ids, mask (B, L), and what the
    cosines are multiplied by in `contrastive_loss`. The paper names neither loss nor temperature; both are
    CLIP's."""

    def __init__(self, model):
        super().__init__()
        self.model = without(model, "vtm_head", "mlm_head", "mvm_head")
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))     # 1 / temperature, CLIP's start

    def embed_video(self, frames):
        h_cls = self.model.fuse(self.model.encode_video(frames), None, None)[0]
        return F.normalize(self.model.pooler(h_cls).float(), dim=-1)

    def embed_text(self, ids, mask):
        h_cls = self.model.fuse(None, self.model.encode_text(ids, mask), mask)[0]
        return F.normalize(self.model.pooler(h_cls).float(), dim=-1)

    def forward(self, frames, ids, mask):
        return self.embed_video(frames), self.embed_text(ids, mask), self.log_scale.exp().clamp(max=100)


def contrastive_loss(video, text, scale, names):
    """Fast retrieval's loss: each text is to find its video in the batch, and each video its text.

    video, text (B, D) unit vectors, names (B,) numbers of the videos: another caption of the same video is
    neither right nor wrong.
    """
    logits = scale * text @ video.t()                                                       # (B, B)
    same = (names[:, None] == names) & ~torch.eye(len(names), dtype=torch.bool, device=names.device)
    logits, truth = logits.masked_fill(same, -math.inf), torch.arange(len(names), device=names.device)
    return (F.cross_entropy(logits, truth) + F.cross_entropy(logits.t(), truth)) / 2


def in_chunks(vectors, chunk):
    """A tensor or a NumPy memory map part by part: (number of the first vector, a copy of the part)."""
    for start in range(0, len(vectors), chunk):
        yield start, torch.from_numpy(np.array(vectors[start:start + chunk]))


@torch.no_grad()
def nearest(queries, vectors, k, chunk=65536):
    """The k vectors of largest cosine for each query, exactly: (Q, D), (V, D) -> scores, numbers (Q, k).

    `vectors` may be a NumPy memory map: only `chunk` of them are looked at at a time.
    """
    best, numbers = torch.empty(len(queries), 0), torch.empty(len(queries), 0, dtype=torch.long)
    for start, part in in_chunks(vectors, chunk):
        scores = queries @ part.t()
        found = torch.arange(start, start + scores.shape[1]).expand_as(scores)
        best, order = torch.cat([best, scores], 1).topk(min(k, best.shape[1] + scores.shape[1]))
        numbers = torch.cat([numbers, found], 1).gather(1, order)
    return best, numbers


@torch.no_grad()
def ranks_by_cosine(queries, vectors, truth, chunk=65536):
    """`rank_of_truth` without the (Q, V) matrix: queries (Q, D), vectors (V, D), truth (Q,) -> ranks (Q,).

    Scores that differ by no more than rounding are ties, and count against the query.
    """
    right = (queries * torch.from_numpy(np.array(vectors[truth.numpy()]))).sum(1, keepdim=True)
    ranks = torch.ones(len(queries), dtype=torch.long)
    for start, part in in_chunks(vectors, chunk):
        scores = queries @ part.t()
        others = torch.arange(start, start + scores.shape[1]) != truth[:, None]
        ranks += ((scores >= right - 1e-6) & others).sum(1)
    return ranks


class LinearProbe(nn.Module):
    """Activity recognition (4): a linear classifier on the features of the frozen model; it sees video alone.

    The paper does not say which features. Ours are h^V averaged over each quarter of each frame, since an
    activity is told by where and when: (B, T, 3, H, W) -> (B, T * 4 * D); at random weights too, so compare.
    """

    def __init__(self, model, classes):
        super().__init__()
        c, self.model = model.config, model.requires_grad_(False)
        self.quarters = min(2, c.grid)
        features = c.frames * self.quarters ** 2 * c.width
        self.norm, self.classifier = nn.BatchNorm1d(features, affine=False), nn.Linear(features, classes)

    @torch.no_grad()
    def features(self, frames):
        self.model.eval()
        h_video = self.model.fuse(self.model.encode_video(frames), None, None)[2]           # (B, N, D)
        g = self.model.config.grid
        maps = h_video.reshape(-1, g, g, h_video.shape[-1]).permute(0, 3, 1, 2)             # (B*T, D, g, g)
        return F.adaptive_avg_pool2d(maps, self.quarters).reshape(len(frames), -1)

    def forward(self, features):
        return self.classifier(self.norm(features))


# ------------------------------------------------------------------------------------------ Published weights
# Our tensors' names -> those of a release, N being a layer's number; {q,k,v} where the three lie apart.

BERT_NAMES = {
    "text_embedding.words.": "embeddings.word_embeddings.",
    "text_embedding.positions.": "embeddings.position_embeddings.",
    "text_embedding.segments.": "embeddings.token_type_embeddings.",
    "text_embedding.norm.": "embeddings.LayerNorm.",
    "text_encoder.N.qkv.": "encoder.layer.N.attention.self.{query,key,value}.",
    "text_encoder.N.proj.": "encoder.layer.N.attention.output.dense.",
    "text_encoder.N.norm1.": "encoder.layer.N.attention.output.LayerNorm.",
    "text_encoder.N.fc1.": "encoder.layer.N.intermediate.dense.",
    "text_encoder.N.fc2.": "encoder.layer.N.output.dense.",
    "text_encoder.N.norm2.": "encoder.layer.N.output.LayerNorm."}
OPENAI_NAMES = {
    "patch.": "conv1.", "cls": "class_embedding", "positions": "positional_embedding", "norm.": "ln_pre.",
    "blocks.N.norm1.": "transformer.resblocks.N.ln_1.",
    "blocks.N.qkv.": "transformer.resblocks.N.attn.in_proj_",
    "blocks.N.proj.": "transformer.resblocks.N.attn.out_proj.",
    "blocks.N.norm2.": "transformer.resblocks.N.ln_2.",
    "blocks.N.fc1.": "transformer.resblocks.N.mlp.c_fc.",
    "blocks.N.fc2.": "transformer.resblocks.N.mlp.c_proj."}
HUGGING_FACE_NAMES = {
    "patch.": "embeddings.patch_embedding.", "cls": "embeddings.class_embedding",
    "positions": "embeddings.position_embedding.weight", "norm.": "pre_layrnorm.",    # their spelling
    "blocks.N.norm1.": "encoder.layers.N.layer_norm1.",
    "blocks.N.qkv.": "encoder.layers.N.self_attn.{q_proj,k_proj,v_proj}.",
    "blocks.N.proj.": "encoder.layers.N.self_attn.out_proj.",
    "blocks.N.norm2.": "encoder.layers.N.layer_norm2.",
    "blocks.N.fc1.": "encoder.layers.N.mlp.fc1.",
    "blocks.N.fc2.": "encoder.layers.N.mlp.fc2."}


@dataclass(frozen=True)
class Release:
    """A kind of checkpoint: what it looks like, the key that tells it (a regular expression), what it fills,
    and under which names; without names they are ours."""
    looks: str
    tell: str
    fills: type = type(None)
    names: dict = None
    size: str = ""                      # the one of this kind that fits the paper preset


RELEASES = [                            # the first pattern that matches decides
    Release("a checkpoint of this project", r"token_type|quantizer\.codebook"),
    Release("an EdgeNeXt", r"stages\.\d+\.\d+\.xca\.temperature", EdgeNeXt, size="EdgeNeXt-Small"),
    Release("an EdgeNeXt under timm's names", r"stages\.\d+\.blocks\.\d+\.xca\.temperature"),
    Release("a BERT", r"embeddings\.word_embeddings\.weight", EViLM, BERT_NAMES,
            "a BERT of 12 layers, 128 wide"),
    Release("a CLIP vision model", r"ln_pre\.weight", ViT, OPENAI_NAMES, "CLIP's ViT-B/32"),
    Release("a CLIP vision model", r"pre_layrnorm\.weight", ViT, HUGGING_FACE_NAMES, "CLIP's ViT-B/32"),
    Release("a CLIP text model", r"text_model\.embeddings\.token_embedding\.weight"),
    Release("a Swin transformer", r"layers\.0\.blocks\.0\.attn\.relative_position_bias_table", VideoSwin,
            size="Video Swin-T"),       # one for images has the same keys, and other shapes
    Release("a ConvNeXt", r"stages\.0\.0\.dwconv\.weight"),
    Release("a ResNet", r"layer1\.0\.conv1\.weight"),
    Release("a vision transformer, not CLIP's", r"blocks\.0\.attn\.qkv\.weight")]


@dataclass
class Published:
    """What `load_published` did, by name: the network's tensors that were filled and those left at their
    start, the file's that were not used, and the model's words that the file has no row for."""
    path: Path
    looks: str = ""
    filled: list = field(default_factory=list)
    left: list = field(default_factory=list)
    unused: list = field(default_factory=list)
    words: list = field(default_factory=list)
    notes: list = field(default_factory=list)

    def __str__(self):
        filled, whole = len(self.filled), len(self.filled) + len(self.left)
        return "\n  ".join([f"{self.path}, {self.looks}: {filled} of the network's {whole} tensors filled",
                            *self.notes, f"tensors left at their start: {folded(self.left)}",
                            f"in the file, not used: {folded(self.unused)}"])


def folded(names):
    """Names on one line; those that differ in their last number alone are one: layers.{0,1,2}.norm.weight."""
    groups = {}
    for name in names:
        numbered = re.fullmatch(r"(.*\.)(\d+)(\..*)", name)
        before, number, after = numbered.groups() if numbered else (name, "", "")
        groups.setdefault((before, after), []).append(number)
    return ", ".join(before + (f"{{{','.join(numbers)}}}" if len(numbers) > 1 else numbers[0]) + after
                     for (before, after), numbers in groups.items()) or "none"


NUMBERS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
           "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
           "BOOL": torch.bool}


def safetensors_layout(header, size):
    """[(name, kind, shape, begin, end)] that a .safetensors header tells of `size` bytes of numbers.

    It is not believed: a tensor is as long as its shape says, and they fill the bytes without gap or overlap.
    """
    layout, reached = [], 0
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        (begin, end), shape = entry["data_offsets"], entry["shape"]
        if entry["dtype"] not in NUMBERS:
            raise ValueError(f"{name} is of an unknown dtype, {entry['dtype']}")
        kind = NUMBERS[entry["dtype"]]
        if not all(type(n) is int and 0 <= n <= size for n in (begin, end, *shape)):
            raise ValueError(f"{name} has a shape or offsets that do not fit {size:,} bytes")
        if end - begin != math.prod(shape) * kind.itemsize:
            raise ValueError(f"{name}: {end - begin:,} bytes are not {shape} of {entry['dtype']}")
        layout.append((name, kind, shape, begin, end))
    for name, _, _, begin, end in sorted(layout, key=lambda entry: entry[3:]):
        if begin != reached:
            raise ValueError(f"{name} begins at {begin:,}, where {reached:,} bytes are told of")
        reached = end
    if reached != size:
        raise ValueError(f"{size:,} bytes follow the header, which tells of {reached:,}")
    return layout


def read_safetensors(path):
    """{name: tensor} of a .safetensors file: 8 bytes that are the header's length, a JSON header, numbers."""
    try:
        content = torch.from_numpy(np.memmap(path, np.uint8, mode="c"))
        start = 8 + int.from_bytes(content[:8].numpy().tobytes(), "little")
        if len(content) < 8 or start > min(len(content), 10**8):
            raise ValueError("the header is longer than the file, or than 100 MB")
        header, content = json.loads(content[8:start].numpy().tobytes()), content[start:]
        return {name: content[begin:end].clone().view(kind).view(shape)
                for name, kind, shape, begin, end in safetensors_layout(header, len(content))}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise InputError(f"{path}: not a safetensors file that can be read "
                         f"({str(error).splitlines()[0][:120]})") from None


def named_tensors(value, name=""):
    """(name, tensor) of all tensors in nested dicts: {"model": {"bias": x}} -> ("model.bias", x)."""
    if torch.is_tensor(value):
        yield name, value
    elif isinstance(value, dict):
        for key, part in value.items():
            yield from named_tensors(part, f"{name}.{key}" if name else str(key))


def recognise(tensors, part, report):
    """-> the Release that the tensors are of, and what stands before its keys ("module.", "bert.").

    Raises InputError if they are not for `part`.
    """
    wanted = next(release.looks for release in RELEASES if isinstance(part, release.fills))
    for release in RELEASES:
        told = next(filter(None, (re.fullmatch(rf"(.*\.)?(?:{release.tell})", key) for key in tensors)), None)
        if told and not isinstance(part, release.fills):
            raise InputError(f"{report.path}: looks like {release.looks}, where {wanted} is wanted")
        if told:
            report.looks = release.looks + f", under {told[1]}*" * bool(told[1])
            return release, told[1] or ""
    raise InputError(f"{report.path}: looks like nothing known, where {wanted} is wanted; it holds "
                     f"{len(tensors)} tensors: {folded(list(tensors)[:4])} ...")


def released_as(name, release, prefix, tensors):
    """The file's names of one of our tensors: three where q, k and v lie apart."""
    theirs = name
    if release.names:
        number, numberless = re.search(r"\.(\d+)\.", name), re.sub(r"\.\d+\.", ".N.", name)
        start = next(start for start in release.names if numberless.startswith(start))
        theirs = release.names[start] + numberless[len(start):]
        theirs = theirs.replace(".N.", f".{number[1]}.") if number else theirs
    before, _, rest = theirs.partition("{")
    choices, _, after = rest.partition("}")
    names = [prefix + before + choice + after for choice in choices.split(",")]
    # BERT's files of TensorFlow's time call a LayerNorm's weight and bias gamma and beta.
    older = [name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
             for name in names]
    return names if names[0] in tensors else older


def rows_of_words(published, start, ours, theirs, report):
    """BERT's word embeddings in the order of our words; one that the checkpoint lacks keeps its start."""
    if published.shape[1:] != start.shape[1:] or not (ours or theirs) and len(published) == len(start):
        return published                # it does not fit, or it is taken row by row
    theirs = theirs or ours
    if not ours or len(theirs) != len(published):
        raise InputError(f"{report.path}: it has rows for {len(published):,} words; to follow them, give the "
                         "model's words and the checkpoint's own vocab.txt, "
                         f"not {len(ours or ()):,} and {len(theirs or ()):,} words")
    row = {word: i for i, word in enumerate(theirs)}
    known = [i for i, word in enumerate(ours) if word in row]
    report.words = [word for word in ours if word not in row]
    report.notes.append(f"{len(known):,} of the model's {len(ours):,} words take one of the file's "
                        f"{len(theirs):,} rows; words without one, left at their start: "
                        f"{', '.join(report.words[:20]) or 'none'}"
                        + f" and {len(report.words) - 20:,} more" * (len(report.words) > 20))
    rows = start.clone()
    rows[known] = published[[row[ours[i]] for i in known]].to(rows)
    return rows


def positions_on_grid(published, start, report):
    """CLIP's position embeddings (1 + s*s, width) -> (1 + g*g, width), interpolated; CLS keeps its own."""
    s, g = (math.isqrt(max(0, len(x) - 1)) if x.ndim == 2 else 0 for x in (published, start))
    if s in (0, g) or s * s != len(published) - 1:
        return published                # it does not fit, or it is taken as it is
    report.notes.append(f"position embeddings interpolated from {s}x{s} to {g}x{g} cells")
    grid = published[1:].float().t().reshape(1, -1, s, s)
    grid = F.interpolate(grid, size=(g, g), mode="bicubic")[0].flatten(1).t()
    return torch.cat([published[:1].float(), grid])


def open_published(path):
    """{name: tensor} of a torch file, however nested, or of a .safetensors file."""
    if not path.is_file():
        raise InputError(f"{path}: there is no such file")
    return read_safetensors(path) if path.suffix == ".safetensors" else dict(named_tensors(read_torch(path)))


@torch.no_grad()
def load_published(part, path, vocab=None):
    """Fills an `EdgeNeXt`, a `ViT`, a `VideoSwin` or an `EViLM`'s text side from a published checkpoint.

    Returns `Published`. BERT's rows follow `part.vocab` word by word, `vocab` being the checkpoint's words
    where they are others; where neither is known they are taken row by row. Raises InputError, and fills
    nothing, if the file is of something else or a tensor cannot fit. BERT's miniature was published with 2
    heads: the paper's 4 cut the same tensors finer.
    """
    report, values, used = Published(Path(path)), {}, set()
    tensors = open_published(report.path)
    release, prefix = recognise(tensors, part, report)
    network = {name: tensor for name, tensor in part.state_dict().items()
               if not isinstance(part, EViLM) or name.startswith(("text_embedding.", "text_encoder."))}
    for name, tensor in network.items():
        keys = released_as(name, release, prefix, tensors)
        if not all(key in tensors for key in keys):
            report.left.append(name)
            continue
        found = [tensors[key] for key in keys]
        if name == "text_embedding.words.weight":
            found = [rows_of_words(found[0], tensor, part.vocab, vocab, report)]
        if name == "positions":
            found = [positions_on_grid(found[0], tensor, report)]
        for key, value in zip(keys, found):
            wanted = (len(tensor) // len(keys), *tensor.shape[1:])
            if value.shape != wanted or not tensors[key].is_floating_point():
                raise InputError(f"{path}: {key} is {tuple(tensors[key].shape)}, {tensors[key].dtype}, and "
                                 f"does not fit {name}, {wanted}: {release.size} fits --preset paper")
        values[name] = torch.cat(found)
        report.filled.append(name)
        used.update(keys)
    for name, value in values.items():
        network[name].copy_(value)
    report.unused = [key for key in tensors if key not in used]
    return report


# --------------------------------------------------------------------------------------------------- Training
# What the scripts share: flags, device, precision, processes, schedule, steps, checkpoints, the log.


class InputError(Exception):
    """What the user gave cannot be used. One line: what is wrong, where, how to mend it; exit status 2."""


class NotFinite(InputError):
    """A loss became infinite or NaN: the run stops and its last checkpoint stays."""


def common_flags(description, stage="", settings=None):
    """The flags that all scripts share. `stage` is the prefix of the presets' settings ("tokenizer_" ...);
    a task has `settings` of its own, {"toy": {"epochs": ...}, "paper": ..., "toy of captions": ...}."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False, add_help=settings is None,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)

    def preset(name):
        found = ({preset: its[name] for preset, its in settings.items() if name in its} if settings else
                 {config.preset: getattr(config, stage + name) for config in (Config.toy(), Config.paper())})
        values = ", ".join(f"{value:g} in {preset}" for preset, value in found.items())
        return f"default: the preset's, {values}"

    add = parser.add_argument
    add("--data", default="data/toy", metavar="DIR", help="folder of clips with train.jsonl or "
        "captions.jsonl; of tasks qa_train.jsonl, mc_NAME_train.jsonl, action_train.jsonl (default: "
        "data/toy, where the synthetic set is rendered on first use)")
    add("--preset", default="toy", metavar="toy|paper", help="sizes and settings (default: toy)")
    add("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"],
        help="default: auto, the best there is")
    add("--epochs", type=positive, help=f"passes over the training clips ({preset('epochs')})")
    add("--max-steps", type=positive, help="end after so many steps, the schedule shortened to them "
        "(default: none)")
    add("--batch-size", type=positive, help="clips a step in all; processes and --accumulate divide them "
        f"({preset('batch_size')})")
    add("--accumulate", type=positive, default=1, help="cut each batch in so many parts that are computed "
        "one after another: less memory, the same gradients where there is no dropout (default: 1)")
    add("--lr", type=partial(not_negative, kind=float), help=f"peak learning rate ({preset('lr')})")
    add("--workers", type=not_negative, default=max(0, min(4, (os.cpu_count() or 2) - 2)), help="processes "
        "that read clips; changes no result (default: all cores but two, at most 4; here %(default)s)")
    add("--precision", default="auto", choices=["auto", "fp32", "bf16"], help="auto: bf16 on cuda, else fp32 "
        "(default: auto)")
    add("--compile", action="store_true", help="torch.compile the model: slow start, then faster "
        "(default: off)")
    add("--seed", type=int, default=0, help="all randomness follows from it (default: 0)")
    add("--save-every", type=positive, default=200, metavar="STEPS", help="write last.pt so often, and at "
        "each evaluation (default: 200)")
    add("--resume", action="store_true", help="go on from OUT/last.pt, to the same weights as an unbroken "
        "run")
    add("--strict", action="store_true", help="stop at the first broken clip instead of replacing it")
    add("--config", metavar="NAME=VALUE", action="append", default=[], help="change a field of Config "
        "that no flag is for, such as mask_ratio=0.5, dims=8,16,32,64, blocks=False (cells masked one by "
        "one), negatives=8 (harder mismatched captions), video_positions=0; may be given several times")
    add("--vocab", metavar="FILE", help="BERT's vocab.txt, of which the words most frequent in the captions "
        "are kept (default: a vocabulary is made from the training captions)")
    add("--vocab-captions", metavar="FILE", help="captions, one a line, by which --vocab is cut, or a "
        "vocabulary made: the paper takes COCO's (default: the training captions)")
    return parser


def positive(text):
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


def not_negative(text, kind=int):
    value = kind(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number from 0 on")
    return value


def preset_named(name):
    presets = {"toy": Config.toy, "paper": Config.paper}
    if name not in presets:
        raise InputError(f"--preset {name}: there is no such preset; it is one of {', '.join(presets)}")
    return presets[name]()


SHARES = ("mask_ratio", "word_ratio", "dropout", "warmup", "tokenizer_warm")     # fields between 0 and 1


def changed(config, changes):
    """The Config with some fields changed: a list of "NAME=VALUE", each read as the field's own kind."""
    for change in changes:
        name, _, text = change.partition("=")
        if name not in asdict(config):
            raise InputError(f"--config {change}: Config has no field {name!r}; evilm.py lists them")
        if isinstance(getattr(config, name), str) or name in ("epochs", "batch_size", "lr"):
            flag = name.removeprefix("tokenizer_").replace("_", "-")
            raise InputError(f"--config {change}: {name} is chosen by --{flag}")
        if name == "words":
            raise InputError(f"--config {change}: words follows from the vocabulary; vocab_rows bounds it")
        config = replace(config, **{name: read_field(change, name, getattr(config, name), text)})
    check_sizes(config)
    return config


def read_field(change, name, usual, text):
    """A field's value from its text, of the kind and length of its `usual` value, in its range."""
    kind = type(usual)
    try:
        value = (tuple(map(int, text.split(","))) if kind is tuple
                 else bool(("False", "True").index(text)) if kind is bool else kind(text))
    except ValueError:
        value = None
    if value is None or kind is tuple and len(value) != len(usual):
        raise InputError(f"--config {change}: give {name} like {usual!r}")
    least = 0 if kind in (float, bool) or name == "tokenizer_revive" else 1
    most = 1 if name in SHARES else sys.maxsize
    if not all(least <= part <= most for part in (value if kind is tuple else (value,))):
        raise InputError(f"--config {change}: {name} goes from {least} {'to 1' if most == 1 else 'on'}")
    return value


def check_sizes(config):
    """An InputError for sizes that no model can have together."""
    if config.size % 32:
        raise InputError(f"--config size={config.size}: cells have 32 pixels a side; give a multiple of 32")
    shared = {"xca_heads": config.dims[1:], "text_heads": [config.text_width],
              "decoder_heads": [config.width], "vit_heads": [config.vit_width],
              "tokenizer_heads": [config.tokenizer_width]}
    for name, widths in shared.items():
        heads = getattr(config, name)
        if any(width % heads for width in widths):
            raise InputError(f"--config: {name}, {heads}, must divide the channels, "
                             f"{' and '.join(map(str, widths))}")
    if not 3 <= config.max_words <= config.positions:
        raise InputError(f"--config max_words={config.max_words}: from 3 to {config.positions}, the "
                         "positions that the language encoder has")


def configure(args, stage=""):
    """The preset's Config with what the flags change; the flags left out are filled from it."""
    config = changed(preset_named(args.preset), args.config)
    for name in ("epochs", "batch_size", "lr"):
        if getattr(args, name) is None:
            setattr(args, name, getattr(config, stage + name))
    return config


@dataclass
class Machine:
    """Where a run computes: the device, the precision, and this process among the others."""
    device: torch.device
    bf16: bool = False
    rank: int = 0
    world: int = 1

    @property
    def main(self):
        return self.rank == 0

    def __str__(self):
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type
        return f"{name}, {'bf16' if self.bf16 else 'fp32'}" + f", {self.world} processes" * (self.world > 1)

    def say(self, *words):
        if self.main:
            tqdm.write(" ".join(map(str, words)))

    def first(self, work):
        """Rank 0 does `work` while the others wait for what it writes."""
        if self.main:
            work()
        if self.world > 1:
            dist.barrier()

    def alone(self):
        """This process by itself, for what rank 0 does after the others have ended."""
        return Machine(self.device, self.bf16)

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16) if self.bf16 else contextlib.nullcontext()

    def wrap(self, model, compiled, idle=False):
        """The model as it is called in training: compiled where asked for, and over several processes by
        PyTorch's DistributedDataParallel, which averages their gradients. `idle`: some steps leave parts of
        it out."""
        model = torch.compile(model, dynamic=True) if compiled else model
        return DistributedDataParallel(model, find_unused_parameters=idle) if self.world > 1 else model

    def parts(self, model, batch, parts):
        """A batch cut by clips for --accumulate: (part, context). Gradients meet after the last alone."""
        size = len(batch["frames"])
        cut = -(-size // parts)
        for start in range(0, size, cut):
            last = start + cut >= size
            waits = contextlib.nullcontext() if last or self.world == 1 else model.no_sync()
            yield {name: value[start:start + cut] for name, value in batch.items()}, waits

    def total(self, values):
        """The sum over all processes of a tensor or of a list of numbers, as a tensor."""
        values = values.clone() if torch.is_tensor(values) else torch.tensor(values, dtype=torch.float64)
        if self.world == 1:
            return values
        # on nccl's side, or gloo's
        there = values.to(self.device) if self.device.type == "cuda" else values.cpu()
        dist.all_reduce(there)
        return there.to(values.device)

    def shared(self, tensor):
        """Rank 0's tensor, on all processes."""
        if self.world > 1:
            dist.broadcast(tensor, 0)
        return tensor


def set_up(device="auto", precision="auto"):
    """The Machine for the flags --device and --precision; under torchrun it joins the process group."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    mps = torch.backends.mps.is_available()
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: PyTorch finds no CUDA device here; "
                         "--device auto takes what there is")
    if device == "mps" and not mps:
        raise InputError("--device mps: PyTorch finds no Apple GPU here; --device auto takes what there is")
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        torch.set_float32_matmul_precision("high")                  # TF32
        torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device == "cuda" else "gloo")
    bf16 = precision == "bf16" or (precision == "auto" and device == "cuda")
    return Machine(torch.device(device), bf16, rank, world)


def as_typed():
    """The flags of this command, to be repeated in the next one with others behind them that win."""
    return "".join(f" {shlex.quote(flag)}" for flag in sys.argv[1:] if flag != "--resume")


def same_set(args):
    """Those flags that the next stage needs as this one had them."""
    usual = {"data": "data/toy", "preset": "toy", "vocab": None, "vocab_captions": None}
    flags = [(f"--{name.replace('_', '-')}", getattr(args, name)) for name in usual
             if getattr(args, name) != usual[name]] + [("--config", change) for change in args.config]
    return "".join(f" {name} {shlex.quote(value)}" for name, value in flags)


def run_script(main, *user_errors):
    """Runs a script's main: what the user can mend ends in one line and status 2, Ctrl-C in status 130,
    a reader that went away in 141, as SIGPIPE would."""
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:                 # "--trace | head"
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except (InputError, *user_errors) as error:
        sys.exit(fail(f"error: {error}", 2))
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            sys.exit(fail(f"error: no space left on the disk ({error}); the older checkpoint is whole", 2))
        if error.filename is None:
            raise
        sys.exit(fail(f"error: {error.filename}: {error.strerror}", 2))
    except KeyboardInterrupt:
        sys.exit(fail("interrupted", 130))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def fail(line, status):
    print(line, file=sys.stderr, flush=True)
    return status


def make_optimizer(model, lr, weight_decay, device, video_lr=1.0):
    """AdamW (4.1), with the relatives' beta of 0.98; no decay on norms, biases and other vectors.

    The video encoder's rate is `video_lr` times the others'.
    """
    groups = {}
    for name, p in model.named_parameters():
        factor = video_lr if "video_encoder." in name else 1.0
        decay = weight_decay if p.squeeze().ndim > 1 else 0.0
        if p.requires_grad:
            group = {"params": [], "weight_decay": decay, "lr": factor * lr, "factor": factor}
            groups.setdefault((factor, decay), group)["params"].append(p)
    return torch.optim.AdamW(list(groups.values()), lr=lr, betas=(0.9, 0.98), fused=device.type != "mps")


def learning_rate(step, steps, peak, warmup):
    """Linear warm-up over the first `warmup` share of the steps, then half a cosine down to 0."""
    rise = max(1, round(warmup * steps))
    if step < rise:
        return peak * (step + 1) / rise
    return peak * 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


def on_device(batch, device):
    """The batch with its tensors on the device; what stays on the CPU is NumPy's or a list."""
    return {name: value.to(device, non_blocking=True) if torch.is_tensor(value) else value
            for name, value in batch.items()}


def prefetch(loader, device):
    """Yields (batch on the device, seconds waited). On CUDA the next is copied while this one computes."""
    stream = torch.cuda.Stream() if device.type == "cuda" else None
    ahead = None
    batches = iter(loader)
    while True:
        began = time.perf_counter()
        batch = next(batches, None)
        waited = time.perf_counter() - began
        if batch is not None:
            with torch.cuda.stream(stream):                         # does nothing where stream is None
                batch = on_device(batch, device)
        if stream is None:
            ahead = (batch, waited)
        if ahead is not None and ahead[0] is not None:
            yield ahead
        if batch is None:
            return
        if stream is not None:
            torch.cuda.current_stream().wait_stream(stream)
            for value in filter(torch.is_tensor, batch.values()):
                value.record_stream(torch.cuda.current_stream())    # no reuse of its memory before it is read
            ahead = (batch, waited)


def save(checkpoint, path):
    """Writes a checkpoint whole or not at all: a kill or a full disk leaves the older file as it was."""
    path = Path(path)
    draft = path.with_name(path.name + ".part")
    try:
        with open(draft, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def read_torch(path, hint=""):
    """What `torch.save` wrote. Never a pickle that could run code: `weights_only`, always."""
    try:
        with warnings.catch_warnings(action="ignore"):              # the error below says it in one line
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path}: there is no such checkpoint{hint}") from None
    except Exception as error:      # torch.load raises whatever the bytes lead it to
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        if "TorchScript" in reason:
            reason = "a TorchScript archive; save its weights once: torch.save(torch.jit.load(FILE)" \
                     ".state_dict(), NEW)"
        elif forbidden := re.search(r"GLOBAL (\S+)", str(error)):
            reason = f"beside tensors it holds {forbidden[1]}, a pickled object"
        raise InputError(f"{path}: not a checkpoint that can be read safely ({reason})") from None


def checkpoint_path(path):
    """A checkpoint, or of a run's folder its best.pt."""
    path = Path(path)
    return path if path.suffix == ".pt" else path / "best.pt"


def is_ours(checkpoint):
    """Whether what `read_torch` read is a checkpoint of this project, rather than published weights."""
    return isinstance(checkpoint, dict) and {"kind", "config"} <= set(checkpoint)


def load(path, *kinds, hint=""):
    """Reads a checkpoint of this project, a file or a run's best.pt.

    Raises InputError, naming the file, if it is none or of none of the `kinds` ("tokenizer", "pretrain", a
    task's); `hint` says what makes one.
    """
    path = checkpoint_path(path)
    checkpoint = read_torch(path, hint)
    if not is_ours(checkpoint):
        raise InputError(f"{path}: not a checkpoint of this project")
    if checkpoint["kind"] not in kinds:
        raise InputError(f"{path}: a checkpoint of kind {checkpoint['kind']!r}, where "
                         f"{' or '.join(map(repr, kinds))} is wanted")
    return checkpoint


def config_of(checkpoint):
    """The Config that a checkpoint was trained with, from its plain dict; a field that is younger than the
    checkpoint is its preset's."""
    try:
        return replace(preset_named(checkpoint["config"].get("preset")),
                       **{name: tuple(value) if isinstance(value, list) else value
                          for name, value in checkpoint["config"].items()})
    except TypeError as error:
        raise InputError(f"the checkpoint's config does not fit this version of evilm.py ({error})") from None


class Run:
    """A run and its folder: last.pt to go on from, best.pt, metrics.jsonl. Only rank 0 writes.

    `extra` names the flags that decide the result beside the shared ones; going on with others is refused.
    """
    DECIDE = ("seed", "batch_size", "lr")

    def __init__(self, args, kind, config, vocab, extra, machine):
        self.folder, self.kind, self.machine, self.seed = Path(args.out), kind, machine, args.seed
        self.save_every, self.strict = args.save_every, args.strict
        settings = {name: getattr(args, name) for name in (*self.DECIDE, *extra)}
        self.constant = {"kind": kind, "config": asdict(config), "vocab": vocab, "settings": settings}
        self.step, self.steps, self.best = 0, 0, -math.inf
        self.state = {}             # tensors that a script wants to find again after --resume
        self.stop = False           # set by Ctrl-C and SIGTERM: the step is finished, saved, and the run ends
        self.pending, self.broken = None, set()
        self.seconds = self.waited = self.clips = 0

    # ---- beginning, and beginning again

    def start(self, model, optimizer, resume):
        """A new folder, or with `resume` the state of last.pt; an older run in the folder is moved aside."""
        self.model, self.optimizer = model, optimizer
        if resume:
            self.restore(load(self.folder / "last.pt", self.kind))
        elif self.machine.main:
            if any(self.folder.glob("*.pt")):
                aside = next(p for i in range(1, 10**6) if not (p := Path(f"{self.folder}.{i}")).exists())
                self.folder.rename(aside)
                self.machine.say(f"{self.folder} held an older run: moved to {aside} "
                                 "(--resume goes on instead)")
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "metrics.jsonl").write_text("")
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.ask_to_stop)

    def ask_to_stop(self, *_):
        if self.stop:
            raise KeyboardInterrupt                                 # asked twice: at once
        self.stop = True

    def restore(self, checkpoint):
        path, advice = self.folder / "last.pt", "resume with the flags it began with, or choose another --out"
        if checkpoint["vocab"] != self.constant["vocab"]:
            raise InputError(f"{path} was trained with another vocabulary: {advice}")
        theirs = {"config": asdict(config_of(checkpoint)), "settings": checkpoint["settings"]}
        for kind, values in theirs.items():
            for name, value in self.constant[kind].items():
                if values.get(name) != value:
                    named = f"a {name} of" if kind == "config" else f"--{name.replace('_', '-')}"
                    raise InputError(f"{path} was trained with {named} {values.get(name)}, not {value}: "
                                     f"{advice}")
        self.model.load_state_dict(checkpoint["model"])
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        self.step, self.best, self.state = checkpoint["step"], checkpoint["best"], checkpoint["state"]
        if self.machine.main:       # evaluations after that step, and the final one, are made again
            kept = [line for line in self.metrics() if line["step"] <= self.step and line["split"] == "val"]
            (self.folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
        self.machine.say(f"going on from {path} at step {self.step:,}")

    # ---- the steps

    def steps_of(self, loader):
        """The batches of the steps that are left, with a progress bar; ends in order when interrupted."""
        machine, began = self.machine, time.perf_counter()
        with tqdm(total=self.steps, initial=self.step, unit="step", disable=not machine.main) as bar:
            for batch, waited in prefetch(loader, machine.device):
                self.note(batch.pop("broken"), "replaced")
                # Dropout depends on the step alone, so that a resumed run draws the same.
                torch.manual_seed(self.seed * 1_000_003 + self.step * machine.world + machine.rank)
                yield batch
                self.clips += len(batch["frames"]) * machine.world
                self.waited += waited
                self.seconds = time.perf_counter() - began
                if self.step % 20 == 0:
                    bar.set_postfix_str(f"loss {float(self.pending.sum()):.3f}, "
                                        f"{self.clips / self.seconds:.0f} clips/s")
                bar.update()
                if self.step % self.save_every == 0:
                    self.save_last()
                if machine.total([self.stop])[0] > 0:
                    self.save_last()
                    machine.say(f"stopped at step {self.step:,}, saved; --resume goes on from there")
                    raise KeyboardInterrupt
        signal.signal(signal.SIGINT, signal.default_int_handler)    # what follows is made again by --resume
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        self.check_finite()

    def note(self, lines, what_became):
        """Names each broken clip once, and counts it; with --strict the first ends the run."""
        for line in dict.fromkeys(lines):
            if self.strict:
                raise InputError(f"{line}; mend it, take out its line, or leave out --strict")
            if line not in self.broken:
                self.machine.say(f"broken clip, {what_became}: {line}")
            self.broken.add(line)

    def set_learning_rate(self, peak, warmup, turn=0):
        """The schedule's rate at this step; at step `turn` the schedule begins anew."""
        begin, end = (0, turn) if self.step < turn else (turn, self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = group["factor"] * learning_rate(self.step - begin, end - begin, peak, warmup)

    def generator(self):
        """A generator on the CPU for this step, the same on all processes."""
        return torch.Generator().manual_seed(self.seed * 1_000_003 + self.step)

    def optimise(self, losses):
        """One step along the gradients, norm clipped to 1. `losses` are this process's share of each loss."""
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.check_finite()
        self.pending = losses
        self.step += 1

    def check_finite(self):
        """Looks at the step before's losses: by now they are there; CUDA need not wait for this step's."""
        if self.pending is not None and not torch.isfinite(self.machine.total(self.pending)).all():
            before = f" {self.folder}/last.pt is from before." * (self.folder / "last.pt").exists()
            raise NotFinite(f"the loss is not finite at step {self.step:,}.{before} A lower --lr or "
                            "--precision fp32 may help")

    # ---- what it leaves

    def checkpoint(self):
        return {**self.constant, "step": self.step, "best": self.best, "model": self.model.state_dict()}

    def save_last(self):
        self.check_finite()
        if self.machine.main:
            save({**self.checkpoint(), "state": self.state, "optimizer": self.optimizer.state_dict()},
                 self.folder / "last.pt")

    def save_best(self, score):
        """Keeps the weights as best.pt if the score is higher than all before."""
        self.check_finite()
        if score > self.best:
            self.best = score
            if self.machine.main:
                save(self.checkpoint(), self.folder / "best.pt")

    def log(self, **values):
        if self.machine.main:
            with open(self.folder / "metrics.jsonl", "a") as file:
                file.write(json.dumps({"step": self.step, **values}) + "\n")

    def metrics(self):
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]

    def end_of_steps(self):
        """Says how fast the steps went, and brings together which clips each process found broken."""
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin"
                                                                       else 2**20)
        if self.machine.device.type == "cuda":
            memory = torch.cuda.max_memory_allocated() / 2**30
        if self.clips:
            self.machine.say(f"{self.clips / self.seconds:.0f} clips/s, {self.waited / self.seconds:.1%} of "
                             f"the time spent waiting for clips, {memory:.2f} GiB at most")
        if self.machine.world > 1:
            found = [None] * self.machine.world
            dist.all_gather_object(found, self.broken)
            self.note(sorted(set().union(*found)), "met by another process")

    def say_end(self, command=""):
        """The last lines: the pictures, how many clips were broken, what to type next."""
        drawn = ", ".join(map(str, sorted(self.folder.glob("*.png"))))
        self.machine.say(f"look at {drawn or self.folder}; all figures: {self.folder}/metrics.jsonl; "
                         f"broken clips: {len(self.broken)}")
        if command:
            self.machine.say(f"next: {command}")


def table8(config):
    """Table 8: [(row, parameters, the paper's figure)] of the model that `config` makes, by counting them."""
    model = EViLM(config)
    rows = [("Textual Embedding Layer", model.text_embedding, "1.2M"),
            ("Textual Encoder", model.text_encoder, "2.4M"), ("Textual MLP Layer", model.text_proj, "49.5K"),
            ("Token Type Emb. Layer", model.token_type, "1.2K"),
            ("Visual Encoder", model.video_encoder, "5.3M"), ("Visual MLP Layer", model.video_proj, "117K"),
            ("Multi-Modal Decoder", model.decoder, "7.1M"),
            ("Multi-modal Pooling Layer", model.pooler, "147K"),
            ("CLS HEAD", model.vtm_head, "770")]        # "(VQA)" in the paper, but 2*384 + 2 is matching's
    # 4.1 gives EdgeNeXt 5.59M parameters: the 5,281,832 here and ImageNet's head of 305,000.
    if config.decoder_pre_norm:
        rows.append(("... its norm, after pre-norm", model.decoder_norm, "-"))

    def count(part):
        return part.numel() if torch.is_tensor(part) else sum(p.numel() for p in part.parameters())

    rows = [(name, count(part), paper) for name, part, paper in rows]
    rows.append(("TOTAL", sum(row[1] for row in rows), "16.3M"))
    return rows + [("MLM head, not in the total", count(model.mlm_head), "-"),
                   ("MVM head, not in the total", count(model.mvm_head), "-")]


def multiply_adds(config, words=30):
    """Multiply-adds of one clip and a caption of `words` tokens, part by part, in G: {part: G}.

    Counted by PyTorch over the running model: products of matrices and convolutions, a multiply and an add as
    one.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode
    model, tokenizer = EViLM(config).eval(), SemanticTokenizer(config).eval()
    frames = torch.rand(1, config.frames, 3, config.size, config.size)
    ids, mask = torch.full((1, words), UNK), torch.ones(1, words, dtype=torch.bool)

    def cost(work, *inputs):
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            result = work(*inputs)
        return counter.get_total_flops() / 2e9, result

    (visual, video), (textual, text) = cost(model.encode_video, frames), cost(model.encode_text, ids, mask)
    decoder = cost(model.match, video, text, mask)[0]
    return {"visual": visual, "textual": textual, "decoder": decoder, "model": visual + textual + decoder,
            "tokenizer": cost(tokenizer.tokenize, frames)[0]}


# What a trace shows: the parts whose names match, and where the paper tells of them.
TRACED = {
    r"video_encoder\.(downsample_layers\.\d|stages\.\d\.\d+|norm)": "3.1 EdgeNeXt", r"video_proj": "Eq. (1)",
    r"text_embedding": "3.1 BERT", r"text_encoder\.\d+": "3.1 BERT", r"text_proj": "Eq. (1)",
    r"decoder\.\d+": "Eq. (2)", r"decoder_norm": "Eq. (2)", r"pooler": "3.4 VTM",
    r"(vtm|mlm)_head": "Eq. (8)", r"mvm_head": "Eq. (3)"}
TRACED_TOKENIZER = {
    r"encoder\.(patch|blocks\.\d+)": "3.3 E", r"proj": "3.3 E", r"quantizer": "Eq. (4), (7)",
    r"encoder\.(patch_embed\.proj|layers\.\d\.(blocks\.\d+|downsample))": "4.3 VideoSwin",
    r"expand": "3.3 D", r"decoder\.\d+": "3.3 D", r"head": "Eq. (5)"}
TRACED_CALLS = {"encode_video": "Eq. (1)", "encode_text": "Eq. (1)", "fuse": "Eq. (2)",
                "read_words": "Eq. (5)"}


class Trace:
    """Follows one clip and its caption through the running model: a line a step, by hooks on its parts."""

    def __init__(self):
        self.told = 0.0             # seconds that telling took, which count for no step
        print(f"{'paper':<14}{'step':<38}{'evilm.py':>9}{'ms':>8}{'parameters':>12}  in -> out")

    @staticmethod
    def shapes(values):
        return ", ".join(str(tuple(x.shape)) if torch.is_tensor(x) else f"{x:g}" for x in values
                         if torch.is_tensor(x) or isinstance(x, float))

    def show(self, paper, step, source, seconds, parameters, inputs, outputs):
        began, outputs = time.perf_counter(), outputs if isinstance(outputs, tuple) else (outputs,)
        # A scalar is a loss: its value says more than its shape.
        outputs = [x.item() if torch.is_tensor(x) and x.ndim == 0 else x for x in outputs]
        if inspect.getsourcefile(source) == __file__:
            line = inspect.getsourcelines(source)[1]
        else:                       # a layer of PyTorch's: the line that calls it
            line = next(frame.lineno for frame in inspect.stack(0)
                        if frame.filename == __file__ and frame.function not in ("show", "called"))
        print(f"{paper:<14}{step:<38}{line:>9}{1000 * seconds:8.2f}{parameters or '':>12}  "
              f"{self.shapes(inputs)} -> {self.shapes(outputs)}")
        self.told += time.perf_counter() - began

    def follow(self, network, traced):
        """From now on each part of the network that `traced` matches is shown as it is called, and each of
        its methods in TRACED_CALLS after what it calls."""
        for name, paper in TRACED_CALLS.items():
            if hasattr(network, name):
                setattr(network, name, partial(self.call, paper, getattr(network, name)))
        for name, part in network.named_modules():
            paper = next((paper for pattern, paper in traced.items() if re.fullmatch(pattern, name)), None)
            if paper and next(part.parameters(), None) is not None:
                part.register_forward_pre_hook(lambda part, _: setattr(part, "began", time.perf_counter()))
                part.register_forward_hook(partial(self.called, paper, name))

    def called(self, paper, name, part, inputs, outputs):
        seconds, source = time.perf_counter() - part.began, type(part)
        count = sum(p.numel() for p in part.parameters())
        step = name if source.__module__.startswith("torch") else f"{name} {source.__name__}"
        self.show(paper, step, source, seconds, f"{count:,}", inputs, outputs)

    def call(self, paper, function, *inputs):
        """Calls a function of this file and shows it."""
        began = time.perf_counter() - self.told
        outputs = function(*inputs)
        seconds = time.perf_counter() - self.told - began
        self.show(paper, function.__name__, function, seconds, "", inputs, outputs)
        return outputs


@torch.no_grad()
def trace(config, words=12):
    """Prints what a clip and a caption pass through at random weights, down to the losses: the clip is noise,
    the caption's words have numbers alone, all of them the same each time."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model, tokenizer, tell = EViLM(config).eval(), SemanticTokenizer(config).eval(), Trace()
    frames = torch.rand(1, config.frames, 3, config.size, config.size, generator=generator)
    ids = torch.tensor([[CLS, *range(5, 5 + words), SEP]])
    mask = torch.ones_like(ids, dtype=torch.bool)
    cells = tell.call("4.1", block_mask, config.frames, config.grid, config.mask_ratio, generator)[None]
    masked, chosen = tell.call("3.4, 4.1", mask_words, ids[0], config.words, generator, config.word_ratio)
    seen = tell.call("3.2", mask_frames, frames, cells)
    tell.follow(tokenizer, TRACED_TOKENIZER)
    tell.follow(model, TRACED)
    logits, codes, code_loss = tokenizer(frames)
    tell.call("Eq. (6)", focal_loss, logits, words_present(ids, mask, config.words))
    wrong = ids.flip(1)                                             # stands for another clip's caption
    vtm, mlm, mvm = model(seen, masked[None], mask, chosen[None], cells.flatten(1), (wrong, mask))
    losses = [tell.call("Eq. (8)", vtm_loss, vtm, torch.tensor([1, 0])),
              tell.call("Eq. (8)", mlm_loss, mlm, ids[0][chosen]),
              tell.call("Eq. (3)", mvm_loss, mvm, codes[cells])]
    print(f"L = L_VTM + L_MLM + L_MVM = {float(sum(losses)):.3f}; L_SVQ's code terms {float(code_loss):.3f}")


def main():
    parser = argparse.ArgumentParser(description="Prints Table 8 and the multiply-adds, ours beside the "
                                     "paper's.", allow_abbrev=False)
    parser.add_argument("--preset", default="paper", metavar="toy|paper", help="default: paper")
    parser.add_argument("--trace", action="store_true", help="instead: follow one clip and its caption "
                        "(noise and numbers, at random weights) through the model, step by step")
    parser.add_argument("--encoder", default="vit", choices=["vit", "videoswin"], help="the "
                        "tokenizer's (4.3; default: vit)")
    args = parser.parse_args()
    config = replace(preset_named(args.preset), tokenizer_encoder=args.encoder)
    if args.trace:
        return trace(config)
    beside = args.preset == "paper"         # the paper's figures are of its own sizes
    print(f"Table 8, preset {args.preset}\n{'':<28}{'parameters':>12}" + f"{'paper':>9}" * beside)
    for name, count, paper in table8(config):
        print(f"{name:<28}{count:>12,}" + f"{paper:>9}" * beside)
    cost = multiply_adds(config)
    print(f"\nG multiply-adds a clip: {config.frames} frames of {config.size}x{config.size}, 30 words")
    print(f"  visual {cost['visual']:.2f} ({cost['visual'] / config.frames:.2f} a frame"
          + "; the paper: 1.26" * beside + ")  "
          f"+  textual {cost['textual']:.2f}  +  decoder {cost['decoder']:.2f}  =  {cost['model']:.2f}")
    # Its 1.26 a frame are multiply-adds; 12.2 is neither 7.4 nor 14.8.
    print(f"  counting a multiply and an add apart: {2 * cost['model']:.1f} GFLOPs"
          + " (the paper says 12.2, which fits neither count)" * beside)
    print(f"  the tokenizer's share, if codes are computed online: {cost['tokenizer']:.2f}")


if __name__ == "__main__":
    run_script(main)
