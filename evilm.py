"""E-ViLM: efficient video-language model by masked video modeling with a semantic vector-quantized tokenizer.

The whole method in one file, in the paper's order and words (Fang, Zheng, Sharma, Piramuthu, 2023). What the
method needs to run (published weights, devices, checkpoints), and Table 8, stand below the line "the paper
ends here". `python evilm.py` prints Table 8, ours beside the paper's; `python evilm.py --trace` prints the
shapes of one clip at every step.

    paper                                   here
    3.1   video encoder (EdgeNeXt)          EdgeNeXt, ConvEncoder, SDTAEncoder, CrossCovarianceAttention
    3.1   language encoder (tiny BERT)      WordPiece, TextEmbedding, Transformer
    3.1   multi-modal decoder               Transformer
    (1)   e^V, e^L                          EViLM.encode_video, EViLM.encode_text
    (1), (2)  h = DEC_VL(e^V, e^L)          EViLM.fuse
    3.2   masked frames                     block_mask (4.1), mask_frames
    (3)   L_MVM                             mvm_loss
    (4)   nearest code                      VectorQuantizer
    (5)   averaged output, word logits      SemanticTokenizer.read_words
    (6)   L_TOKEN, focal                    focal_loss
    (7)   L_SVQ                             svq_loss, VectorQuantizer
    3.4   masked words                      mask_words
    (8)   L = L_MLM + L_VTM + L_MVM         pretraining_loss, EViLM.forward
    4.1   settings                          Config.paper, make_optimizer, learning_rate
    4.1   published weights                 load_published
    4.2   QA, multiple choice, probe        Choice, LinearProbe
    4.2   R@K, multiple choice, zero-shot   rank_of_truth, recalls, EViLM.match
    4.3   other tokenizers: VideoSwin       VideoSwin, SwinBlock, WindowAttention
    4.3   ... of pixels, as DALL-E's        SemanticTokenizer.draw_pixels
    4.4   fast retrieval                    FastRetrieval, contrastive_loss
    4.5   Table 8                           table8, multiply_adds

Shapes: B clips, T frames, L tokens of a caption, g patches a side, N = T*g*g patches of a clip (the images in
EdgeNeXt and ViT, a window's patches in WindowAttention), D the multi-modal decoder's width (the paper
also has D for the encoder's, 3.1, and the codes', 3.3), K words without special tokens (Eq. 6), M codes. In
3.3, E and D are the tokenizer's encoder and decoder. A `mask` is True for real tokens, False for padding;
`masked` is True where something was masked.
"""
import argparse
import ast
import contextlib
import datetime
import errno
import io
import json
import math
import multiprocessing
import os
import re
import resource
import signal
import sys
import time
import unicodedata
import warnings
from collections import Counter, OrderedDict
from dataclasses import asdict, dataclass, field, replace
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
    """Every size and training setting: `Config.paper()` is section 4.1, `Config.toy()` fits a laptop.

    Each field says where the paper preset's value comes from: `paper`; `inferred`, from Table 8's counts or
    from a release that the paper cites; `ours`, where the paper is silent.
    """
    preset: str = "paper"               # ours
    frames: int = 4                     # paper: T, sparsely sampled
    size: int = 256                     # paper: pixels a side; inferred: a patch is 32x32, EdgeNeXt's stride
    # Video encoder: EdgeNeXt-Small (paper); the numbers are its release's.
    depths: tuple = (3, 3, 9, 3)        # inferred: blocks a stage
    dims: tuple = (48, 96, 160, 304)    # inferred: channels a stage
    kernels: tuple = (3, 5, 7, 9)       # inferred: depth-wise kernel a stage
    scales: tuple = (2, 2, 3, 4)        # inferred: splits of the depth-wise cascade a stage; stage 1 has none
    xca_heads: int = 8                  # inferred
    layer_scale: float = 1e-6           # inferred: initial LayerScale of each block
    # Language encoder: a small BERT
    vocab_rows: int = 9157              # inferred: rows of the embedding, 30% of BERT's 30,522
    vocab_size: int = 9157              # ours: words in use; the rows beyond are never drawn or predicted
    positions: int = 512                # inferred: BERT's
    text_width: int = 128               # paper
    text_layers: int = 12               # inferred: Table 8's 2.4M
    text_heads: int = 4                 # paper
    max_words: int = 30                 # ours: tokens a caption, [CLS] and [SEP] too; WebVid's mean is 20
    # Multi-modal decoder
    width: int = 384                    # paper: the decoder's hidden size, D here
    decoder_layers: int = 4             # paper
    decoder_heads: int = 6              # inferred: BERT's 64 channels a head
    decoder_pre_norm: bool = False      # inferred: BERT's post-norm; Table 8 allows either
    dropout: float = 0.1                # inferred: BERT's, in the language encoder and in the decoder
    # Semantic tokenizer
    codes: int = 9420                   # paper: M
    code_dim: int = 32                  # paper
    vit_width: int = 768                # inferred: CLIP's ViT-B/32, whose stride of 32 gives EdgeNeXt's grid
    vit_layers: int = 12                # inferred
    vit_heads: int = 12                 # inferred
    tokenizer_width: int = 384          # ours: the multi-modal decoder's
    tokenizer_layers: int = 8           # paper
    tokenizer_heads: int = 6            # ours
    # Other tokenizers (4.3, Tables 6 and 7)
    tokenizer_target: str = "words"     # paper: words; ours: "pixels", in DALL-E's place
    tokenizer_encoder: str = "vit"      # paper: E, "vit" or "videoswin"
    swin_dim: int = 96                  # inferred: Video Swin-T, channels of stage 1, doubled each stage
    swin_depths: tuple = (2, 2, 6, 2)   # inferred
    swin_heads: tuple = (3, 6, 12, 24)  # inferred
    swin_window: tuple = (8, 7, 7)      # inferred: frames, rows and columns of an attention window
    # Masking and losses
    mask_ratio: float = 0.40            # paper: 40%; ours: in each frame alike
    blocks: bool = True                 # paper: block-wise; ours: False, single patches
    word_ratio: float = 0.15            # paper
    mvm_weight: float = 1.0             # paper: Eq. (8) has no weights; 0: masks patches, trains no MVM
    word_weight: float = 1.0            # paper: Eq. (7) has no weights; a value above 1 offsets L_TOKEN's 1/K
    pixel_weight: float = 200.0         # ours: factor on the pixel loss of tokenizer_target "pixels"
    negatives: int = 1                  # ours: candidate captions per mismatch; the most similar is used
    video_positions: float = 1.0        # ours: factor on the position sines added to e^V; 0 turns them off
    augment: bool = True                # paper: random; ours: one crop a clip, no flip ("left" is a word)
    # Training
    batch_size: int = 64                # ours: 15K steps (Fig. 6) in 20 epochs would take 3,300 clips a step
    epochs: int = 20                    # paper
    lr: float = 1e-4                    # paper: "initial"; here the peak after warm-up
    weight_decay: float = 0.01          # paper: pre-training's; inferred: the tokenizer's
    warmup: float = 0.05                # ours: fraction of the steps; then a cosine
    tokenizer_batch_size: int = 64      # ours
    tokenizer_epochs: int = 10          # paper
    tokenizer_lr: float = 2e-4          # paper
    # From scratch, E can map all patches to one point, which minimises Eq. (7)'s code terms. Two remedies:
    tokenizer_warm: float = 0.0         # ours: fraction of the steps in which D reads E(X) unquantized
    tokenizer_revive: int = 0           # ours: steps between moves of unused codes; 0: never

    @property
    def grid(self):
        return self.size // 32

    @classmethod
    def paper(cls):
        return cls()

    @classmethod
    def toy(cls):
        """The same method at sizes with which both stages learn the synthetic set in minutes on two cores."""
        return cls(preset="toy", size=128, depths=(1, 2, 2, 2), dims=(8, 16, 48, 96), layer_scale=1.0,
                   vocab_rows=1024, vocab_size=1024, positions=64, text_width=64, text_layers=2, text_heads=4,
                   max_words=28, width=96, decoder_layers=2, decoder_heads=4, decoder_pre_norm=True,
                   dropout=0.0, codes=64, code_dim=16, vit_width=96, vit_layers=3, vit_heads=4,
                   tokenizer_width=96, tokenizer_layers=2, tokenizer_heads=4, tokenizer_warm=0.4,
                   tokenizer_revive=20, word_weight=30.0, augment=False, batch_size=16, epochs=4, lr=5e-4,
                   tokenizer_epochs=2, tokenizer_batch_size=32, tokenizer_lr=1e-3, swin_dim=16,
                   swin_depths=(1, 2, 2, 1), swin_heads=(1, 2, 4, 8), swin_window=(4, 4, 4))


# ------------------------------------------------------------------------------------------ 3.1 Video encoder


class CrossCovarianceAttention(nn.Module):
    """XCA: attention between channels, so that its cost grows linearly with patches. (N, patches, C) -> same.

    Ali et al., "XCiT", 2021: softmax(q k^T * temperature), C/heads x C/heads for each head, where q and k are
    l2-normalised over patches. (XCiT's paper transposes this and divides by tau; ours follows its release.)
    """

    def __init__(self, dim, heads):
        super().__init__()
        assert dim % heads == 0, f"xca_heads, {heads}, must divide the {dim} channels of a stage"
        self.heads = heads
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1))
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        N, patches, C = x.shape
        qkv = self.qkv(x).view(N, patches, 3, self.heads, C // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 4, 1)                                            # (N, h, c, patches)
        attention = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1) * self.temperature
        attention = attention.softmax(-1)                                               # (N, h, c, c)
        return self.proj((attention @ v).permute(0, 3, 1, 2).reshape(N, patches, C))


class FourierPositions(nn.Module):
    """Sines of a patch's row and column, projected to `dim` channels: (H, W) -> (1, dim, H, W)."""

    def __init__(self, dim, waves=32):
        super().__init__()
        self.waves = waves
        self.token_projection = nn.Conv2d(2 * waves, dim, 1)

    def forward(self, H, W):
        weight = self.token_projection.weight
        steps = torch.arange(self.waves, device=weight.device)
        period = 10000 ** (2 * (steps // 2) / self.waves)

        def sines(n):                                                                       # (n, waves)
            angles = 2 * math.pi * torch.arange(1, n + 1, device=weight.device)[:, None] / (n + 1e-6) / period
            return torch.where(steps % 2 == 0, angles.sin(), angles.cos())

        rows, columns = sines(H)[:, None].expand(H, W, -1), sines(W)[None].expand(H, W, -1)
        positions = torch.cat([rows, columns], -1).to(weight.dtype)                         # (H, W, 2 waves)
        return self.token_projection(positions.permute(2, 0, 1)[None])


class ConvEncoder(nn.Module):
    """EdgeNeXt's convolutional block: depth-wise convolution, then two linear layers. (N, C, H, W)."""

    def __init__(self, dim, kernel, layer_scale):
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, kernel, padding=kernel // 2, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.pwconv1 = nn.Linear(dim, 4 * dim)
        self.pwconv2 = nn.Linear(4 * dim, dim)
        self.gamma = nn.Parameter(layer_scale * torch.ones(dim))

    def forward(self, x):
        # Maps are channels-last in memory, so that the permuted map is contiguous for the linear layers.
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
        """Each part plus the result of the one before is convolved; the last part passes unchanged."""
        parts = list(x.split(self.split, 1))
        for i, conv in enumerate(self.convs):
            parts[i] = conv(parts[i] if i == 0 else parts[i] + parts[i - 1])
        return torch.cat(parts, 1)

    def forward(self, x):
        N, C, H, W = x.shape
        y = self.cascade(x)
        if self.pos_embd is not None:
            y = y + self.pos_embd(H, W)
        y = y.permute(0, 2, 3, 1).reshape(N, H * W, C)                                      # (N, patches, C)
        y = y + self.gamma_xca * self.xca(self.norm_xca(y))
        y = self.gamma * self.pwconv2(F.gelu(self.pwconv1(self.norm(y))))
        return x + y.view(N, H, W, C).permute(0, 3, 1, 2)


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of each patch. (N, C, H, W) -> the same."""

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class EdgeNeXt(nn.Module):
    """ENC_V of Eq. (1): EdgeNeXt (Maaz et al., 2022). (N, 3, H, W), normalised -> (N, dims[-1], H/32, W/32).

    Parameters are named and shaped as in the authors' release, without its head. The release pools before its
    final norm; here the norm applies to each patch, since the decoder reads the grid. The release's drop-path
    is left out.
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
            if i > 0:                   # one SDTA block, last in stages 2 to 4; positions in stage 2 alone
                blocks[-1] = SDTAEncoder(dim, scales[i], heads, layer_scale, positions=i == 1)
            self.stages.append(nn.Sequential(*blocks))
        self.norm = ChannelNorm(dims[-1], eps=1e-6)

    def forward(self, x):
        x = x.contiguous(memory_format=torch.channels_last)
        for downsample, stage in zip(self.downsample_layers, self.stages):
            x = stage(downsample(x))
        return self.norm(x)


# --------------------------------------------------------------------------------------- 3.1 Language encoder

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
PAD, UNK, CLS, SEP, MASK = range(5)     # every vocabulary made here begins with these, in this order


class WordPiece:
    """BERT-uncased's splitting: words by greedy longest match in a vocabulary; `##` marks pieces that
    continue a word."""

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
        letters = []
        for letter in unicodedata.normalize("NFD", text.lower()):
            kind, code = unicodedata.category(letter), ord(letter)
            symbol = 33 <= code <= 126 and not letter.isalnum()         # $, +, ^ ... are punctuation to BERT
            cjk = 0x3400 <= code <= 0x9FFF or 0xF900 <= code <= 0xFAFF or 0x20000 <= code <= 0x2FA1F
            if letter.isspace() or kind.startswith("Z"):
                letters.append(" ")
            elif kind.startswith("P") or symbol or cjk:
                letters.append(f" {letter} ")
            elif kind != "Mn" and not kind.startswith("C") and letter != "\ufffd":
                letters.append(letter)
        return "".join(letters).split()

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

    def unknown(self, texts):
        """How often each word occurs in `texts` that the vocabulary cannot spell: {word: count}."""
        words = Counter(word for text in texts for word in self.split(text))
        return {word: count for word, count in words.items() if self.pieces(word) == ["[UNK]"]}

    def add_words(self, texts, size):
        """A WordPiece of this vocabulary, then `texts`' unknown words by count, up to `size` entries."""
        unknown = self.unknown(texts)
        added = sorted(unknown, key=lambda word: (-unknown[word], word))
        return WordPiece(self.vocab + added[:max(0, size - len(self))])

    def encode_batch(self, texts, max_len):
        """-> ids (B, L), mask (B, L); L is the longest of the texts, at most `max_len`."""
        return pad([self.encode(text, max_len) for text in texts])

    @classmethod
    def from_captions(cls, captions, size=None):
        """A vocabulary of whole words: the special tokens, then words by count, at most `size` entries."""
        counts = Counter(word for caption in captions for word in cls.split(caption))
        by_count = sorted(counts, key=lambda word: (-counts[word], word))
        return cls((SPECIAL + by_count)[:size])

    def keep_frequent(self, captions, share=0.30):
        """The vocabulary cut to its most frequent pieces (4.1: "top 30% most frequent words in COCO").

        Exactly round(share * len) entries is our reading. Special tokens come first; ties, and words that do
        not occur, keep their order; `[unused...]` entries are dropped.
        """
        words = Counter(word for caption in captions for word in self.split(caption))
        counts = Counter()
        for word, count in words.items():
            for piece in self.pieces(word):
                counts[piece] += count
        rest = [w for w in self.vocab if w not in SPECIAL and not w.startswith("[unused")]
        rest.sort(key=lambda word: -counts[word])                          # stable: ties keep their order
        return WordPiece((SPECIAL + rest)[:round(share * len(self.vocab))])


def pad(rows):
    """Lists of ids -> ids (B, L), mask (B, L)."""
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    for padded, row in zip(ids, rows):
        padded[:len(row)] = torch.tensor(row)
    return ids, ids != PAD


def quick_gelu(x):
    """CLIP's cheaper GELU."""
    return x * torch.sigmoid(1.702 * x)


class TransformerBlock(nn.Module):
    """Self-attention, then two linear layers. (B, L, C) -> the same; mask (B, 1, 1, L), True for real keys.

    Post-norm, as in BERT: the language encoder, the paper preset's decoder and (ours) the tokenizer's D.
    Pre-norm: the ViT, as in CLIP, and the toy preset's decoder.
    """

    def __init__(self, width, heads, pre_norm=False, activation=F.gelu, eps=1e-12, dropout=0.0):
        super().__init__()
        assert width % heads == 0, f"{heads} heads must divide a width of {width}"
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
        qkv = self.qkv(x).view(B, L, 3, self.heads, C // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                                                # (B, h, L, c)
        y = F.scaled_dot_product_attention(q, k, v, mask, self.dropout if self.training else 0.0)
        return self.drop(self.proj(y.transpose(1, 2).reshape(B, L, C)))

    def feed_forward(self, x):
        return self.drop(self.fc2(self.activation(self.fc1(x))))

    def forward(self, x, mask=None):
        if self.pre_norm:
            x = x + self.attend(self.norm1(x), mask)
            return x + self.feed_forward(self.norm2(x))
        x = self.norm1(x + self.attend(x, mask))
        return self.norm2(x + self.feed_forward(x))


class Transformer(nn.ModuleList):
    """Blocks one after another: (B, L, C) -> the same; mask (B, L), or None where all tokens are real."""

    def __init__(self, layers, width, heads, **settings):
        super().__init__(TransformerBlock(width, heads, **settings) for _ in range(layers))

    def forward(self, x, mask=None):
        if mask is not None:
            mask = mask[:, None, None]                              # (B, 1, 1, L): for all heads and queries
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


# ---------------------------------------------------------------------------- 3.1 Multi-modal decoder, E-ViLM


def space_time_sines(T, g, width, device=None):
    """Fixed sines of a patch's frame, row and column: (T*g*g, width), each of norm sqrt(width / 2).

    Ours: the paper mentions no position embeddings for e^V, and Table 8 has no parameters for them. Without
    any, motion to the left and to the right would be the same set of patches to the decoder.
    """
    waves = width // 6                                                  # sine and cosine for each of t, y, x
    frequency = 100.0 ** (-torch.arange(waves, device=device) / waves)  # positions stay below 100
    axes = torch.meshgrid(*(torch.arange(n, device=device) for n in (T, g, g)), indexing="ij")
    angles = [axis.reshape(-1, 1) * frequency for axis in axes]         # three of (N, waves)
    sines = torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], 1)
    return F.pad(sines, (0, width - sines.shape[1]))


# Mean and standard deviation of the pixels that the published encoders were trained on.
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class Normalise(nn.Module):
    """(..., 3, H, W) in [0, 1] -> the scale that an encoder was trained on: (frames - mean) / std."""

    def __init__(self, mean, std):
        super().__init__()
        mean, std = (torch.tensor(x).view(3, 1, 1) for x in (mean, std))
        self.register_buffer("scale", 1 / std, persistent=False)
        self.register_buffer("shift", -mean / std, persistent=False)

    def forward(self, frames):
        return torch.addcmul(self.shift, frames, self.scale)        # one pass over the pixels


def initialise(module):
    """Linear weights with std 1 / sqrt(inputs), embeddings with std 0.02 (BERT's). Ours: not in the paper."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=module.in_features ** -0.5)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    if isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)


@torch.no_grad()
def start_centred(encoder, frames):
    """Sets an encoder's LayerNorms so that on `frames` each channel of their outputs has mean 0 and std 1.

    Ours, for an encoder from scratch: at random weights all patches of a clip look alike to the later layers,
    and colours are learned long before shapes. After Mishkin and Matas, "All you need is a good init", 2016.
    """
    def centre(norm, _, output):
        channels = 1 if isinstance(norm, ChannelNorm) else -1
        values = output.movedim(channels, -1)
        mean, std = values.flatten(0, -2).mean(0), values.flatten(0, -2).std(0) + 1e-3
        norm.weight /= std
        norm.bias.copy_((norm.bias - mean) / std)
        return ((values - mean) / std).movedim(-1, channels)

    norms = [part for part in encoder.modules() if isinstance(part, nn.LayerNorm)]
    hooks = [norm.register_forward_hook(centre) for norm in norms]
    encoder(frames)
    for hook in hooks:
        hook.remove()


def full_precision(x):
    """A context without autocast on the device of `x`: in bf16, scores or codes that are close would tie."""
    return torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False)


class ScoreHead(nn.Linear):
    """A linear layer whose outputs are compared with each other, and so computed in full precision."""

    def forward(self, x):
        with full_precision(x):
            return super().forward(x.to(self.weight.dtype))


def prediction_head(width, classes):
    """HEAD^V, and MLM's head: (n, width) -> logits (n, classes). The layers are BERT's."""
    return nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width), nn.Linear(width, classes))


class EViLM(nn.Module):
    """The model of 3.1: frames (B, T, 3, H, W) in [0, 1] and a caption's ids (B, L) go in; see `forward`."""

    def __init__(self, config, vocab=None):
        super().__init__()
        self.config = c = config
        self.vocab = vocab          # the words of the embedding's rows, for load_published to match
        assert c.size % 32 == 0, f"size, {c.size}, must be a multiple of 32, a patch's pixels"
        assert 3 <= c.max_words <= c.positions, f"max_words, {c.max_words}, must lie in 3 to positions"
        fractions = c.mask_ratio, c.word_ratio, c.dropout, c.warmup, c.tokenizer_warm
        assert all(0 <= fraction <= 1 for fraction in fractions), "ratios, dropout and warm-up lie in 0 to 1"
        self.normalise = Normalise(*IMAGENET)
        self.video_encoder = EdgeNeXt(c.depths, c.dims, c.kernels, c.scales, c.xca_heads, c.layer_scale)
        self.video_proj = nn.Linear(c.dims[-1], c.width)
        self.text_embedding = TextEmbedding(c.vocab_rows, c.positions, c.text_width, c.dropout)
        self.text_encoder = Transformer(c.text_layers, c.text_width, c.text_heads, dropout=c.dropout)
        self.text_proj = nn.Linear(c.text_width, c.width)
        self.token_type = nn.Parameter(0.02 * torch.randn(3, c.width))      # e^CLS, t^L, t^V
        self.decoder = Transformer(c.decoder_layers, c.width, c.decoder_heads, pre_norm=c.decoder_pre_norm,
                                   dropout=c.dropout)
        # Pre-norm needs a final norm, whose 768 parameters would not change Table 8's rounded 7.1M.
        self.decoder_norm = nn.LayerNorm(c.width) if c.decoder_pre_norm else nn.Identity()
        self.pooler = nn.Sequential(nn.Linear(c.width, c.width), nn.Tanh())
        self.vtm_head = ScoreHead(c.width, 2)
        self.mlm_head = prediction_head(c.width, c.vocab_rows)
        self.mvm_head = prediction_head(c.width, c.codes)
        self.apply(initialise)

    def encode_video(self, frames):
        """Eq. (1): e^V, to which we add `space_time_sines`. (B, T, 3, H, W) in [0, 1] -> (B, N, D).

        The paper writes I_0 to I_T, which would be T + 1 frames; 4.1 has T = 4.
        """
        B, T = frames.shape[:2]
        maps = self.video_encoder(self.normalise(frames).flatten(0, 1))                     # (B*T, C, g, g)
        patches = self.video_proj(maps.permute(0, 2, 3, 1)).reshape(B, -1, self.config.width)   # (B, N, D)
        sines = space_time_sines(T, maps.shape[-1], self.config.width, frames.device)
        return patches + self.config.video_positions * sines                                # Eq. (1)

    def encode_text(self, ids, mask):
        """Eq. (1): e^L. ids, mask (B, L) -> (B, L, D)."""
        return self.text_proj(self.text_encoder(self.text_embedding(ids), mask))            # Eq. (1)

    def fuse(self, video, text, mask):
        """Eq. (2): -> h^CLS (B, D), h^L (B, L, D), h^V (B, N, D).

        Either of video and text may be None (4.4: text alone, video alone); its h is then None. `mask` (B, L)
        is the text's and is ignored without text.
        """
        e_cls, t_text, t_video = self.token_type
        B = len(video if text is None else text)
        parts, joint_mask = [e_cls.expand(B, 1, -1)], None          # [e^CLS, e^L + t^L, e^V + t^V]
        if text is not None:
            parts.append(text + t_text)
            patches = 0 if video is None else video.shape[1]
            joint_mask = torch.cat([mask.new_ones(B, 1), mask, mask.new_ones(B, patches)], 1)
        if video is not None:
            parts.append(video + t_video)
        h = self.decoder_norm(self.decoder(torch.cat(parts, 1), joint_mask))                # Eq. (2)
        L = 0 if text is None else text.shape[1]
        h_text = None if text is None else h[:, 1:1 + L]
        h_video = None if video is None else h[:, 1 + L:]
        return h[:, 0], h_text, h_video

    def match(self, video, text, mask):
        """How well video i (B, N, D) fits text i (B, L, D): the logit for a match minus the other, (B,)."""
        logits = self.vtm_head(self.pooler(self.fuse(video, text, mask)[0]))
        return logits[:, 1] - logits[:, 0]

    def forward(self, frames, ids, mask, masked_words=None, masked_patches=None, mismatched=None):
        """One masked pass for all objectives of Eq. (8); the paper does not say how many passes a step takes.

        frames (B, T, 3, H, W) and ids (B, L) are already masked; mask (B, L) is the text's.
        `masked_words` (B, L) and `masked_patches` (B, N) are True where something was masked; `mismatched` is
        (ids, mask) of one wrong caption per clip, padded to the same L. Returns logits, None without their
        input: vtm (2B, 2), matched pairs first; mlm (masked words, vocab_size); mvm (masked patches, M).
        """
        B = len(frames)
        video = self.encode_video(frames)                                                   # once a clip
        if mismatched is not None:
            ids, mask = torch.cat([ids, mismatched[0]]), torch.cat([mask, mismatched[1]])
            video = torch.cat([video, video])
        h_cls, h_text, h_video = self.fuse(video, self.encode_text(ids, mask), mask)
        vtm = mlm = mvm = None
        if mismatched is not None:
            vtm = self.vtm_head(self.pooler(h_cls))
        # The heads run on masked positions of the matched pairs alone. A boolean index would wait for the GPU
        # a second time in the backward pass; `nonzero` does so once.
        if masked_words is not None:
            h_masked = h_text[:B][masked_words.nonzero(as_tuple=True)]
            mlm = self.mlm_head(h_masked)[:, :self.config.vocab_size]
        if masked_patches is not None:
            mvm = self.mvm_head(h_video[:B][masked_patches.nonzero(as_tuple=True)])     # HEAD^V of Eq. (3)
        return vtm, mlm, mvm


# --------------------------------------------------------------------------------- 3.2 Masked video modeling


def block_mask(n, grid, ratio, generator):
    """Block-wise masking (4.1, after BEiT): bool (n, grid, grid), exactly round(ratio * grid^2) True in each.

    Rectangles of log-uniform aspect within [0.3, 1/0.3] and of at least max(1, target // 5) patches are added
    until the count is reached; the last one is trimmed, from either end, to the exact count. The paper does
    not say whether frames share their blocks: here each frame has its own, at the full ratio.
    """
    target = round(ratio * grid * grid)
    smallest = max(1, target // 5)
    masked = torch.zeros(n, grid * grid, dtype=torch.bool)
    for frame in masked:
        covered = set()
        while len(covered) < target:
            wanted = target - len(covered)
            area, aspect, y, x, end = torch.rand(5, generator=generator).tolist()
            area = smallest + area * max(0, wanted - smallest)
            aspect = math.exp((2 * aspect - 1) * math.log(1 / 0.3))
            height = min(grid, max(1, round(math.sqrt(area * aspect))))
            width = min(grid, max(1, round(math.sqrt(area / aspect))))
            if height * width < smallest:
                continue
            top, left = int(y * (grid - height + 1)), int(x * (grid - width + 1))
            block = [r * grid + c for r in range(top, top + height) for c in range(left, left + width)]
            block = block if end < 0.5 else block[::-1]     # trimming must not favour the upper left
            covered.update([patch for patch in block if patch not in covered][:wanted])
        frame[list(covered)] = True
    return masked.view(n, grid, grid)


def random_mask(n, grid, ratio, generator):
    """As `block_mask`, of patches drawn one by one: the ablation of blocks."""
    rank = torch.rand(n, grid * grid, generator=generator).argsort(1).argsort(1)    # in a random order
    return (rank < round(ratio * grid * grid)).view(n, grid, grid)


def mask_frames(frames, masked):
    """Sets masked patches to zero (3.2), that is black: frames (B, T, 3, H, W) in [0, 1], not yet normalised,
    masked (B, T, g, g) -> frames."""
    patch = frames.shape[-1] // masked.shape[-1]
    pixels = masked.repeat_interleave(patch, -2).repeat_interleave(patch, -1)
    return frames.masked_fill(pixels[:, :, None], 0.0)


def mean_cross_entropy(logits, targets, count=None):
    """logits (n, classes), targets (n,) -> scalar: the sum of -log softmax(logits)[targets], divided by
    `count` or, without it, by n; 0 if there are no rows.

    With the whole batch's `count`, the losses of a batch's parts (processes, accumulation) sum to its loss.
    """
    total = F.cross_entropy(logits.float(), targets, reduction="sum")
    return total / max(1, len(targets) if count is None else count)


def mvm_loss(logits, targets, count=None):
    """Eq. (3): the mean over the batch's masked patches. logits (n, M), targets (n,) codes -> scalar.

    The paper's minus before a cross-entropy, which is already positive, is one too many.
    """
    return mean_cross_entropy(logits, targets, count)                                       # Eq. (3)


# -------------------------------------------------------------------------------- 3.3, 4.3 Video tokenizers


class ViT(nn.Module):
    """E of 3.3: CLIP's vision transformer. (N, 3, H, W), normalised -> (N, patches, width): the patch
    tokens after the last block, CLS dropped."""

    def __init__(self, size=256, patch=32, width=768, layers=12, heads=12):
        super().__init__()
        self.patch = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        self.cls = nn.Parameter(torch.zeros(width))
        self.positions = nn.Parameter(0.02 * torch.randn((size // patch) ** 2 + 1, width))
        self.norm = nn.LayerNorm(width)                             # CLIP has one before the blocks
        self.blocks = Transformer(layers, width, heads, pre_norm=True, activation=quick_gelu, eps=1e-5)

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)                                    # (N, patches, width)
        x = torch.cat([self.cls.expand(len(x), 1, -1), x], 1) + self.positions
        return self.blocks(self.norm(x))[:, 1:]


def windows_of(x, window):
    """A grid in windows: (B, T, H, W, C) -> (B, windows, patches of one, C)."""
    B, T, H, W, C = x.shape
    t, h, w = window
    x = x.view(B, T // t, t, H // h, h, W // w, w, C).permute(0, 1, 3, 5, 2, 4, 6, 7)
    return x.reshape(B, -1, t * h * w, C)


def grid_of(x, window, sides):
    """The inverse of `windows_of`; sides = T, H, W: (B, windows, patches of one, C) -> (B, T, H, W, C)."""
    B, _, _, C = x.shape
    x = x.view(B, *(n // w for n, w in zip(sides, window)), *window, C).permute(0, 1, 4, 2, 5, 3, 6, 7)
    return x.reshape(B, *sides, C)


def shift_mask(sides, window, shift, device):
    """True for pairs of patches that only the cyclic shift has put into one window, so that they must not
    attend to each other: (windows, patches, patches)."""
    wrapped = [torch.arange(n, device=device) >= n - s for n, s in zip(sides, shift)]
    t, y, x = torch.meshgrid(*wrapped, indexing="ij")
    region = windows_of((4 * t + 2 * y + x)[None, ..., None], window)[0, ..., 0]        # (windows, patches)
    return region[:, :, None] != region[:, None]


class WindowAttention(nn.Module):
    """Self-attention within windows, with a learned bias for each relative offset in time, row and column.

    (B, windows, patches, C) -> the same; pairs in `blocked` (windows, patches, patches) do not attend.
    """

    def __init__(self, dim, heads, window):
        super().__init__()
        self.heads = heads
        t, h, w = (2 * n - 1 for n in window)                       # offsets from -(n - 1) to n - 1
        self.relative_position_bias_table = nn.Parameter(0.02 * torch.randn(t * h * w, heads))
        places = torch.cartesian_prod(*map(torch.arange, window))                           # (patches, 3)
        offsets = places[:, None] - places + torch.tensor(window) - 1               # (patches, patches, 3)
        self.register_buffer("relative_position_index",
                             (offsets * torch.tensor([h * w, w, 1])).sum(-1), persistent=False)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, blocked):
        B, n, N, C = x.shape
        qkv = self.qkv(x).view(B, n, N, 3, self.heads, C // self.heads)
        q, k, v = qkv.permute(3, 0, 1, 4, 2, 5).flatten(2, 3)                               # (B, n*h, N, c)
        # A smaller window takes the biases of a whole window's first N patches, as in the release.
        bias = self.relative_position_bias_table[self.relative_position_index[:N, :N]]      # (N, N, h)
        bias = bias.permute(2, 0, 1).masked_fill(blocked[:, None], -math.inf)                # (n, h, N, N)
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
        y = F.pad(self.norm1(x), (0, 0, 0, w, 0, h, 0, t))          # to whole windows, as in the release
        sides = y.shape[1:4]
        y = windows_of(y.roll([-s for s in shift], (1, 2, 3)), window)
        y = grid_of(self.attn(y, shift_mask(sides, window, shift, x.device)), window, sides)
        x = x + y.roll(shift, (1, 2, 3))[:, :T, :H, :W]
        return x + self.mlp(self.norm2(x))


class PatchMerging(nn.Module):
    """2x2 patches become one, twice as wide: (B, T, H, W, C) -> (B, T, H/2, W/2, 2C)."""

    def __init__(self, dim):
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x):
        B, T, H, W, C = x.shape
        x = x.view(B, T, H // 2, 2, W // 2, 2, C).permute(0, 1, 2, 4, 5, 3, 6)      # columns first
        return self.reduction(self.norm(x.reshape(B, T, H // 2, W // 2, 4 * C)))


class VideoSwin(nn.Module):
    """E of 4.3's other tokenizer: Video Swin (Liu et al., 2022), which sees all frames of a clip together.
    (B, T, 3, H, W), normalised -> (B, T, H/32, W/32, 8 dim).

    Parameters are named and shaped as in the authors' release, whose stochastic depth is left out.
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
        # 4.3 removes the pooling in time: the release's patches span two frames, at a stride of 2. The paper
        # does not say how. Here the stride is 1, with a zero frame after the last: one patch map a frame.
        x = F.pad(x.transpose(1, 2), (0, 0, 0, 0, 0, 1))                                # (B, 3, T + 1, H, W)
        x = self.patch_embed["norm"](self.patch_embed["proj"](x).movedim(1, -1))       # (B, T, H/4, W/4, dim)
        return self.norm(self.layers(x))


class VectorQuantizer(nn.Module):
    """q of Eq. (4): nearest code of a learned codebook. (..., dim) -> quantized (..., dim), ids (...), loss.

    Both sides are l2-normalised (4.1), so unit vectors come out and the nearest code is the largest inner
    product. `loss` is the last two terms of Eq. (7). The paper writes squared norms over all of E(X); ours
    are averaged over patches.
    """

    def __init__(self, codes, dim):
        super().__init__()
        self.codebook = nn.Parameter(torch.randn(codes, dim))       # "initialized randomly" (4.1)

    def forward(self, x):
        x = F.normalize(x.float(), dim=-1)
        codebook = F.normalize(self.codebook.float(), dim=-1)
        with full_precision(x):
            ids = (x.detach() @ codebook.detach().t()).argmax(-1)                           # Eq. (4)
        nearest = F.embedding(ids, codebook)
        codebook_term = ((x.detach() - nearest) ** 2).sum(-1).mean()                        # Eq. (7), term 2
        commitment_term = ((x - nearest.detach()) ** 2).sum(-1).mean()                      # Eq. (7), term 3
        quantized = x + (nearest - x).detach()                      # straight-through, to the normalised E(X)
        return quantized, ids, codebook_term + commitment_term

    @torch.no_grad()
    def move_codes(self, which, vectors, generator):
        """Moves the codes where `which` (M,) is True onto encoder outputs, drawn without replacement from
        `vectors` (n, dim).

        Ours. A code that is never nearest gets no gradient from Eq. (7), so it would stay unused.
        """
        moved = which.nonzero().flatten()
        drawn = torch.randperm(len(vectors), generator=generator)[:len(moved)].to(vectors.device)
        self.codebook[moved[:len(drawn)]] = F.normalize(vectors[drawn].float(), dim=-1)


class SemanticTokenizer(nn.Module):
    """The semantic vector-quantized tokenizer of 3.3: frames -> codes -> the words of the caption.

    4.3 compares it with one whose E is VideoSwin, and with DALL-E's dVAE. Ours replaces the dVAE, which is
    convolutional and samples its codes by Gumbel softmax, by a tokenizer that reconstructs pixels with the
    same E and codebook. The paper does not say whether CLIP's ViT is trained; here it is.
    """

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        self.sees_neighbours = c.tokenizer_encoder == "videoswin"   # a frame's codes depend on other frames
        if self.sees_neighbours:
            self.normalise, width = Normalise(*IMAGENET), 8 * c.swin_dim
            self.encoder = VideoSwin(c.swin_dim, c.swin_depths, c.swin_heads, c.swin_window)
        else:
            self.normalise, width = Normalise(*CLIP), c.vit_width
            self.encoder = ViT(c.size, 32, c.vit_width, c.vit_layers, c.vit_heads)
        self.proj = nn.Linear(width, c.code_dim)
        self.quantizer = VectorQuantizer(c.codes, c.code_dim)
        self.expand = nn.Linear(c.code_dim, c.tokenizer_width)
        self.decoder = Transformer(c.tokenizer_layers, c.tokenizer_width, c.tokenizer_heads)
        of_words = c.tokenizer_target == "words"
        self.head = nn.Linear(c.tokenizer_width, c.vocab_rows - len(SPECIAL) if of_words else 3 * 32 * 32)
        for part in (self.encoder, self.proj, self.decoder, self.head):
            part.apply(initialise)
        nn.init.normal_(self.expand.weight)         # maps unit vectors to outputs of std 1
        # Most words are absent: -3 is a prior of 5% (Lin et al.: 1%). Pixels start grey, not as noise.
        nn.init.constant_(self.head.bias, -3.0 if of_words else 0.5)
        if not of_words:
            nn.init.normal_(self.head.weight, std=0.02)

    def embed(self, frames):
        """E(X): (B, T, 3, H, W) in [0, 1] -> (B, T, g, g, code_dim)."""
        B, T, g = *frames.shape[:2], self.config.grid
        frames = self.normalise(frames)
        if self.sees_neighbours:
            return self.proj(self.encoder(frames))
        return self.proj(self.encoder(frames.flatten(0, 1))).view(B, T, g, g, -1)

    def decode(self, quantized):
        """D on codes with their time and place: (B, T, g, g, code_dim) -> (B, N, width)."""
        T, g = quantized.shape[1:3]
        x = self.expand(quantized).flatten(1, 3)
        return self.decoder(x + space_time_sines(T, g, x.shape[-1], x.device))

    def read_words(self, quantized):
        """Eq. (5): the words' logits from the averaged output of D. (B, T, g, g, code_dim) -> (B, K).

        D sees all codes of the clip with their time and place, or "left" and "right" would be the same to it.
        """
        words = self.config.vocab_size - len(SPECIAL)
        return self.head(self.decode(quantized).mean(1))[:, :words]             # Eq. (5): HEAD^S, mean of D

    def draw_pixels(self, quantized):
        """Each frame from its own codes, as an image's tokenizer does: (B, T, g, g, code_dim) -> frames."""
        B, T, g = quantized.shape[:3]
        patches = self.head(self.decode(quantized.flatten(0, 1)[:, None])).view(B, T, g, g, 3, 32, 32)
        return patches.permute(0, 1, 4, 2, 5, 3, 6).reshape(B, T, 3, 32 * g, 32 * g)

    def reconstruct(self, quantized):
        """The target, read from codes: words' logits (B, K), or frames (B, T, 3, H, W)."""
        of_words = self.config.tokenizer_target == "words"
        return self.read_words(quantized) if of_words else self.draw_pixels(quantized)

    def forward(self, frames, quantize=True):
        """-> what D reads from the codes, ids (B, T, g, g), the codebook and commitment terms of Eq. (7).

        Ours, for a tokenizer from scratch: without `quantize` D reads E(X) itself, l2-normalised, and the
        terms are 0.
        """
        embedded = self.embed(frames)
        quantized, ids, code_loss = self.quantizer(embedded)
        if not quantize:
            quantized, code_loss = F.normalize(embedded, dim=-1), 0.0 * code_loss
        return self.reconstruct(quantized), ids, code_loss

    @torch.no_grad()
    def tokenize(self, frames):
        """The semantic labels of MVM: (B, T, 3, H, W) in [0, 1], unmasked -> ids (B, T, g, g)."""
        return self.quantizer(self.embed(frames))[1]


def words_present(ids, mask, vocab_size):
    """y^S of Eq. (6): a caption's WordPieces up to max_words, multi-hot. ids, mask (B, L) -> float (B, K)."""
    present = torch.zeros(len(ids), vocab_size, device=ids.device)
    present.scatter_(1, ids * mask, 1.0)                            # padding falls on [PAD], which is cut off
    return present[:, len(SPECIAL):]


def focal_loss(logits, targets):
    """Eq. (6), L_TOKEN: logits (B, K), targets (B, K) in {0, 1} -> scalar, averaged over K and over B.

    The printed equation lacks its minus. The weight p of an absent word is not detached, as printed.
    """
    present = -F.logsigmoid(logits)                                 # -log p
    absent = -torch.sigmoid(logits) * F.logsigmoid(-logits)         # -p log(1 - p)
    return torch.where(targets > 0, present, absent).mean()                                 # Eq. (6)


def svq_loss(word_logits, words, code_loss, word_weight=1.0):
    """Eq. (7), L_SVQ -> (loss, {"token": L_TOKEN, "codes": the two code terms}).

    word_logits, words (B, K) as in Eq. (6); code_loss is `VectorQuantizer`'s. 3.4 names "L_SVQ and L_TOKEN";
    since L_SVQ contains L_TOKEN, it counts once. `word_weight`, 1 in the paper, offsets the 1/K of Eq. (6).
    """
    token = focal_loss(word_logits.float(), words)
    return word_weight * token + code_loss, {"token": token, "codes": code_loss}            # Eq. (7)


# --------------------------------------------------------------------------- 3.4 Video-language pre-training


def mask_words(ids, vocab_size, generator, ratio=0.15):
    """Masked words of one caption (3.4, 4.1): ids (L,) -> (ids, masked), both (L,).

    The paper says that 15% are masked at random. 80% become [MASK], 10% a random word, 10% stay, as in BERT.
    The exact count, max(1, round(ratio * n)) of n words, is ours. Special tokens are never masked or drawn.
    """
    ids, words = ids.clone(), (ids > MASK).nonzero().flatten()
    count = max(1, round(ratio * len(words))) if len(words) else 0
    picked = words[torch.randperm(len(words), generator=generator)[:count]]
    chance = torch.rand(count, generator=generator)
    drawn = torch.randint(MASK + 1, vocab_size, (count,), generator=generator)
    ids[picked] = torch.where(chance < 0.8, MASK, torch.where(chance < 0.9, drawn, ids[picked]))
    masked = torch.zeros(len(ids), dtype=torch.bool)
    masked[picked] = True
    return ids, masked


def mlm_loss(logits, targets, count=None):
    """L_MLM of Eq. (8): logits (n, vocab_size) of masked words, targets (n,) their ids -> scalar."""
    return mean_cross_entropy(logits, targets, count)


def vtm_loss(logits, targets, count=None):
    """L_VTM of Eq. (8): logits (n, 2), targets (n,): 1 for a pair that matches, else 0 -> scalar."""
    return mean_cross_entropy(logits, targets, count)


def vtm_targets(logits):
    """Which pairs match: the first half of (2B, 2), as `EViLM.forward` orders them -> (2B,) of 1 and 0."""
    return torch.arange(len(logits), device=logits.device).lt(len(logits) // 2).long()


def pretraining_loss(model, batch, objectives=("vtm", "mlm", "mvm"), mvm_weight=1.0, counts=None):
    """Eq. (8), L = L_MLM + L_VTM + L_MVM, from one masked pass -> (loss, {objective: its loss}).

    batch: `frames` (B, T, 3, H, W) in [0, 1], unmasked; the captions' `ids`, `masked_ids`, `mask` and
    `masked_words` (B, L), the mismatched captions' `mismatched_ids` and `mismatched_mask` (B, L);
    `masked_patches` and their `labels`, codes, (B, T, g, g). What only a disabled objective reads may be
    missing. `counts` {objective: count} are the whole batch's where `batch` is a part. `mvm_weight` is 1 in
    the paper.
    """
    counts, frames = counts or {}, batch["frames"]
    masked_words = masked_patches = mismatched = None
    if "mlm" in objectives:
        masked_words = batch["masked_words"]
    if "mvm" in objectives:
        masked_patches = batch["masked_patches"]
        frames = mask_frames(frames, masked_patches)
    if "vtm" in objectives:
        mismatched = batch["mismatched_ids"], batch["mismatched_mask"]
    patches = None if masked_patches is None else masked_patches.flatten(1)                 # (B, N)
    vtm, mlm, mvm = model(frames, batch["masked_ids"], batch["mask"], masked_words, patches, mismatched)
    losses = {}
    if mlm is not None:
        losses["mlm"] = mlm_loss(mlm, batch["ids"][masked_words], counts.get("mlm"))
    if vtm is not None:
        losses["vtm"] = vtm_loss(vtm, vtm_targets(vtm), counts.get("vtm"))
    if mvm is not None:
        losses["mvm"] = mvm_loss(mvm, batch["labels"][masked_patches], counts.get("mvm"))
    weights = {"mlm": 1.0, "vtm": 1.0, "mvm": mvm_weight}
    return sum(weights[name] * loss for name, loss in losses.items()), losses               # Eq. (8)


# --------------------------------------------------------------------------- 4 Downstream heads and scoring


def freeze(model, *parts):
    """Freezes parts that a loss does not use: DistributedDataParallel would wait for their gradients."""
    for part in parts:
        getattr(model, part).requires_grad_(False)
    return model


class Choice(nn.Module):
    """Question answering and multiple choice (4): a linear head on the pooled h^CLS of video and each text.

    frames (B, T, 3, H, W), ids and mask (B, O, L), O texts per clip -> logits (B, O * outputs). A question
    has one text and one output per answer; multiple choice one text per option, one output. Without frames
    (None) only the texts are seen: the question-only baseline. The paper does not describe these heads.
    """

    def __init__(self, model, outputs):
        super().__init__()
        self.model = freeze(model, "vtm_head", "mlm_head", "mvm_head")
        # With one output a bias shifts all options alike and cancels in the softmax.
        self.head = ScoreHead(model.config.width, outputs, bias=outputs > 1)
        initialise(self.head)
        if outputs == 1:            # starts from the zero-shot score, the difference of the 2-way logits
            matched = model.vtm_head.weight.detach()
            self.head.weight.data.copy_(matched[1:] - matched[:1])

    def forward(self, frames, ids, mask):
        B, O, _ = ids.shape
        ids, mask = ids.flatten(0, 1), mask.flatten(0, 1)
        video = None
        if frames is not None:
            video = self.model.encode_video(frames).repeat_interleave(O, 0)                 # once a clip
        h_cls = self.model.fuse(video, self.model.encode_text(ids, mask), mask)[0]
        return self.head(self.model.pooler(h_cls)).view(B, -1)


class FastRetrieval(nn.Module):
    """Fast retrieval (4.4): text alone and video alone go through the decoder; their pooled h^CLS are
    compared by cosine.

    -> unit vectors (B, D) of frames (B, T, 3, H, W) and of ids, mask (B, L), and the factor on the cosines in
    `contrastive_loss`. The paper names neither loss nor temperature; both are CLIP's.
    """

    def __init__(self, model):
        super().__init__()
        self.model = freeze(model, "vtm_head", "mlm_head", "mvm_head")
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))     # log(1 / temperature), as in CLIP

    def embed_video(self, frames):
        h_cls = self.model.fuse(self.model.encode_video(frames), None, None)[0]
        return F.normalize(self.model.pooler(h_cls).float(), dim=-1)

    def embed_text(self, ids, mask):
        h_cls = self.model.fuse(None, self.model.encode_text(ids, mask), mask)[0]
        return F.normalize(self.model.pooler(h_cls).float(), dim=-1)

    def forward(self, frames, ids, mask):
        with torch.no_grad():
            self.log_scale.clamp_(max=math.log(100))                # CLIP's bound, set outside autograd
        return self.embed_video(frames), self.embed_text(ids, mask), self.log_scale.exp()


def contrastive_loss(video, text, scale, video_ids):
    """Fast retrieval's loss: each text is to find its video in the batch, and each video its text.

    video, text (B, D) unit vectors, video_ids (B,): other captions of the same video are excluded, neither
    positives nor negatives.
    """
    with full_precision(video):                                     # in bf16 the gradient is 8% off
        logits = scale * text @ video.t()                                                   # (B, B)
    truth = torch.arange(len(video_ids), device=video_ids.device)
    same = (video_ids[:, None] == video_ids) & (truth[:, None] != truth)
    logits = logits.masked_fill(same, -math.inf)
    return (F.cross_entropy(logits, truth) + F.cross_entropy(logits.t(), truth)) / 2


class LinearProbe(nn.Module):
    """Activity recognition (4): a linear classifier on features of the frozen model, which sees video alone.

    `features`: frames (B, T, 3, H, W) -> (B, T * 4 * D); `forward`: features -> logits (B, classes). The
    paper does not say which features: here h^V averaged over each quadrant of each frame, which keeps
    position and time. The norm has no parameters, so that only the classifier is trained.
    """

    def __init__(self, model, classes):
        super().__init__()
        c, self.model = model.config, model.requires_grad_(False)
        features = c.frames * 4 * c.width
        self.norm, self.classifier = nn.BatchNorm1d(features, affine=False), ScoreHead(features, classes)

    @torch.no_grad()
    def features(self, frames):
        self.model.eval()
        h_video = self.model.fuse(self.model.encode_video(frames), None, None)[2]           # (B, N, D)
        g = self.model.config.grid
        maps = h_video.reshape(-1, g, g, h_video.shape[-1]).permute(0, 3, 1, 2)             # (B*T, D, g, g)
        return F.adaptive_avg_pool2d(maps, 2).reshape(len(frames), -1)

    def forward(self, features):
        return self.classifier(self.norm(features))


def rank_of_truth(scores, truth, tolerance=0.0):
    """Ranks of the right items, 1 best: scores (Q, n), truth (Q,) -> (Q,). Ties, scores within `tolerance` of
    the right item's, count against the query."""
    right = scores.gather(1, truth[:, None])
    return (~(scores < right - tolerance)).sum(1)       # counts the right item itself, and NaN as above it


def recalls(ranks):
    """R@1, R@5, R@10 and the median of ranks (Q,), 1 best."""
    return {**{f"r{k}": float((ranks <= k).float().mean()) for k in (1, 5, 10)},
            "median_rank": float(ranks.float().quantile(0.5))}


def codebook_usage(counts):
    """The fraction of codes in use, VOC. RATE in Table 6, and their perplexity: counts (M,) of patches."""
    p = counts[counts > 0] / counts.sum()
    return {"codebook_usage": len(p) / len(counts),
            "codebook_perplexity": float(torch.exp(-(p * p.log()).sum()))}


@torch.no_grad()
def joint_scores(model, video, text, mask, part=200):
    """`match` of every caption and video: video (V, N, D), text (Q, L, D), mask (Q, L) -> (Q, V);
    `part` videos at a time."""
    scores = []
    for t, m in zip(text, mask):
        t, m = t[:m.sum()], m[:m.sum()]                             # without padding
        scores.append(torch.cat([model.match(some, t.expand(len(some), -1, -1), m.expand(len(some), -1))
                                 for some in video.split(part)]))
    return torch.stack(scores)


# ------------------------------------------------------------------------------------------------------------
# ... the paper ends here. Below: Table 8 and the trace, published weights, and what training needs to run.


def table8(config):
    """Table 8: [(row, parameters, the paper's figure)] of the model that `config` makes."""
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
    """{part: billions of multiply-adds} of a clip and a caption of `words` tokens, as PyTorch counts them."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode
    with torch.device("meta"):                                      # shapes alone
        model, tokenizer = EViLM(config).eval(), SemanticTokenizer(config).eval()
        frames = torch.rand(1, config.frames, 3, config.size, config.size)
        ids, mask = torch.full((1, words), UNK), torch.ones(1, words, dtype=torch.bool)

    def cost(work, *inputs):
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            outputs = work(*inputs)
        return counter.get_total_flops() / 2e9, outputs

    (visual, video), (textual, text) = cost(model.encode_video, frames), cost(model.encode_text, ids, mask)
    decoder = cost(model.match, video, text, mask)[0]
    return {"visual": visual, "textual": textual, "decoder": decoder, "model": visual + textual + decoder,
            "tokenizer": cost(tokenizer.tokenize, frames)[0]}


@torch.no_grad()
def trace(config, words=12):
    """Prints the tensor shapes at every step of the paper, and the losses, for a clip of noise, a caption of
    `words` arbitrary ids and random weights."""
    def shapes(values):
        return ", ".join(f"{float(x):.3f}" if x.ndim == 0 else str(tuple(x.shape)) for x in values
                         if torch.is_tensor(x))

    def step(paper, function, *inputs):
        outputs = function(*inputs)
        is_module = isinstance(function, nn.Module)
        name = type(function).__name__ if is_module else function.__name__
        code = (function.forward if is_module else function).__code__
        line = code.co_firstlineno if code.co_filename == __file__ else ""
        shown = outputs if isinstance(outputs, tuple) else (outputs,)
        shown = [x for part in shown for x in (part.values() if isinstance(part, dict) else [part])]
        print(f"{paper:<10}{name:<20}{line:>9}  {shapes(inputs)} -> {shapes(shown)}")
        return outputs

    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model, tokenizer = EViLM(config).eval(), SemanticTokenizer(config).eval()
    frames = torch.rand(1, config.frames, 3, config.size, config.size, generator=generator)
    ids = torch.tensor([[CLS, *range(5, 5 + words), SEP]])
    mask = torch.ones_like(ids, dtype=torch.bool)
    print(f"{'paper':<10}{'step':<20}{'evilm.py':>9}  in -> out")
    embedded = step("3.3 E", tokenizer.embed, frames)
    quantized, labels, code_loss = step("Eq. (4)", tokenizer.quantizer, embedded)
    logits = step("Eq. (5)", tokenizer.read_words, quantized)
    present = step("3.3", words_present, ids, mask, config.vocab_size)
    step("Eq. (6)", focal_loss, logits, present)
    step("Eq. (7)", svq_loss, logits, present, code_loss, config.word_weight)
    masked = step("3.2, 4.1", block_mask, config.frames, config.grid, config.mask_ratio, generator)
    masked_patches = masked[None]                                                           # (1, T, g, g)
    seen = step("3.2", mask_frames, frames, masked_patches)
    x = model.normalise(seen).flatten(0, 1)
    for downsample, stage in zip(model.video_encoder.downsample_layers, model.video_encoder.stages):
        x = step("3.1", stage[-1], stage[:-1](step("3.1", downsample, x)))      # the stage's last block
    masked_ids, masked_words = step("3.4, 4.1", mask_words, ids[0], config.vocab_size, generator)
    video = step("Eq. (1)", model.encode_video, seen)
    text = step("Eq. (1)", model.encode_text, masked_ids[None], mask)
    h_video = step("Eq. (2)", model.fuse, video, text, mask)[2]
    step("Eq. (3)", mvm_loss, model.mvm_head(h_video[masked_patches.flatten(1)]), labels[masked_patches])
    step("Eq. (8)", pretraining_loss, model, {
        "frames": frames, "ids": ids, "masked_ids": masked_ids[None], "mask": mask,
        "masked_words": masked_words[None], "mismatched_ids": ids.flip(1), "mismatched_mask": mask,
        "masked_patches": masked_patches, "labels": labels})


def main():
    parser = Parser(description="Prints Table 8 and the multiply-adds, ours beside the paper's.")
    parser.add_argument("--preset", default="paper", choices=["toy", "paper"], help="default: paper")
    parser.add_argument("--trace", action="store_true", help="instead, print the tensor shapes of a clip and "
                        "its caption at every step")
    parser.add_argument("--encoder", default="vit", choices=["vit", "videoswin"], help="tokenizer encoder")
    args = parser.parse_args()
    config = replace(getattr(Config, args.preset)(), tokenizer_encoder=args.encoder)
    if args.trace:
        return trace(config)
    print(f"{'Table 8, preset ' + args.preset:<28}{'parameters':>12}{'paper':>9} (of the paper preset)")
    for name, count, paper in table8(config):
        print(f"{name:<28}{count:>12,}{paper:>9}")
    cost = multiply_adds(config)
    print(f"\nG multiply-adds per clip: {config.frames} frames of {config.size}x{config.size}, 30 words")
    print(f"  visual {cost['visual']:.2f} ({cost['visual'] / config.frames:.2f} a frame; the paper: 1.26) + "
          f"textual {cost['textual']:.2f} + decoder {cost['decoder']:.2f} = {cost['model']:.2f}")
    print(f"  counting multiplies and adds separately: {2 * cost['model']:.1f} GFLOPs (the paper says 12.2, "
          "which fits neither count)")
    print(f"  the tokenizer, where codes are computed online: {cost['tokenizer']:.2f}")


# ------------------------------------------------------------------------------------------ Published weights
BERT_NAMES = {  # replacements, in order, that turn our names into a release's; {q,k,v}: three tensors there
    "text_embedding.words.": "embeddings.word_embeddings.", "text_embedding.norm.": "embeddings.LayerNorm.",
    "text_embedding.positions.": "embeddings.position_embeddings.",
    "text_embedding.segments.": "embeddings.token_type_embeddings.", "text_encoder.": "encoder.layer.",
    ".qkv.": ".attention.self.{query,key,value}.", ".proj.": ".attention.output.dense.",
    ".norm1.": ".attention.output.LayerNorm.", ".norm2.": ".output.LayerNorm.",
    ".fc1.": ".intermediate.dense.", ".fc2.": ".output.dense."}
OLD_BERT_NAMES = BERT_NAMES | {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
OPENAI_NAMES = {
    "patch.": "conv1.", "cls": "class_embedding", "positions": "positional_embedding", "norm.": "ln_pre.",
    "blocks.": "transformer.resblocks.", ".norm": ".ln_", ".qkv.": ".attn.in_proj_",
    ".proj.": ".attn.out_proj.", ".fc1.": ".mlp.c_fc.", ".fc2.": ".mlp.c_proj."}
HUGGING_FACE_NAMES = {                  # "layrnorm" is the release's spelling
    "patch.": "embeddings.patch_embedding.", "cls": "embeddings.class_embedding",
    "positions": "embeddings.position_embedding.weight", "norm.": "pre_layrnorm.",
    "blocks.": "encoder.layers.", ".norm": ".layer_norm", ".qkv.": ".self_attn.{q_proj,k_proj,v_proj}.",
    ".proj.": ".self_attn.out_proj.", ".fc": ".mlp.fc"}
RELEASES = [    # what it fills, the release that fits the paper preset, a key that identifies it, its names
    (EdgeNeXt, "EdgeNeXt-Small", r"stages\.1\.\d+\.xca\.temperature", {}),
    (EViLM, "BERT L-12 H-128", r"embeddings\.LayerNorm\.weight", BERT_NAMES),         # published with 2 heads
    (EViLM, "BERT L-12 H-128", r"embeddings\.LayerNorm\.gamma", OLD_BERT_NAMES),     # in TensorFlow's time
    (ViT, "CLIP ViT-B/32", r"ln_pre\.weight", OPENAI_NAMES),
    (ViT, "CLIP ViT-B/32", r"pre_layrnorm\.weight", HUGGING_FACE_NAMES),
    (VideoSwin, "Video Swin-T", r"layers\.0\.blocks\.0\.attn\.relative_position_bias_table", {})]
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64}


@dataclass
class Published:
    """What `load_published` did: tensors filled, tensors and words left as initialised, tensors unused."""
    path: Path
    filled: list = field(default_factory=list)
    left: list = field(default_factory=list)
    unused: list = field(default_factory=list)

    def __str__(self):
        return (f"{self.path}\n  filled: {listed(self.filled)}\n  left as initialised: {listed(self.left)}\n"
                f"  unused in the file: {listed(self.unused)}")


def listed(names, most=6):
    """The number of names and the first of them, on one line: 2 (head.weight, head.bias)."""
    first = ", ".join(repr(name)[1:-1] for name in names[:most])        # repr escapes line breaks
    return f"{len(names):,} ({first}{', ...' if len(names) > most else ''})" if names else "none"


def read_safetensors(path):
    """{name: tensor} of a .safetensors file: 8 bytes with the header's length, a JSON header, the values."""
    try:
        content, tensors = np.fromfile(path, np.uint8), {}
        start = 8 + int.from_bytes(content[:8].tobytes(), "little")
        header, values = json.loads(content[8:start].tobytes()), torch.from_numpy(content[start:])
        header.pop("__metadata__", None)
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            if not 0 <= begin <= end <= len(values):
                raise ValueError(f"{name!r} lies outside the file")
            tensor = values[begin:end].clone().view(DTYPES[entry["dtype"]])
            tensors[name] = tensor.view(entry["shape"])     # raises an error if the sizes differ
        return tensors
    except Exception as error:          # a damaged header can raise anything
        raise InputError(f"{path}: not a whole .safetensors file ({' '.join(str(error).split())})") from None


def named_tensors(value, name="", depth=6):
    """(name, tensor) of all tensors in nested dicts: {"model": {"bias": x}} -> ("model.bias", x)."""
    if torch.is_tensor(value):
        yield name, value
    elif isinstance(value, dict) and depth > 0:         # a dict can contain itself
        for key, part in value.items():
            yield from named_tensors(part, f"{name}.{key}" if name else str(key), depth - 1)


def follow_words(rows, initial, ours, theirs, report):
    """Reorders a file's word embeddings `rows` (its words, width) to our words, as in `initial` (our rows,
    width); words that the file lacks keep their initial rows. `ours` and `theirs` list the words by row."""
    theirs = theirs or ours
    if rows.shape[1:] != initial.shape[1:] or not theirs and len(rows) == len(initial):
        return rows                     # another width, which load_published refuses, or rows as they are
    if not ours or len(theirs) != len(rows):
        raise InputError(f"{report.path}: its {len(rows):,} word embeddings need the checkpoint's vocab.txt "
                         f"({len(theirs or ()):,} words given) and the model's words ({len(ours or ()):,})")
    row = {word: i for i, word in enumerate(theirs)}
    known = [i for i, word in enumerate(ours) if word in row]
    report.left += [f"the word {word}" for word in ours if word not in row]
    followed = initial.clone()
    followed[known] = rows[[row[ours[i]] for i in known]].to(initial)
    return followed


def resize_positions(rows, initial):
    """CLIP's position embeddings (1 + s*s, width) -> (1 + g*g, width), interpolated; CLS keeps its own."""
    s, g = (math.isqrt(max(0, len(x) - 1)) if x.ndim == 2 else 0 for x in (rows, initial))
    if s in (0, g) or 1 + s * s != len(rows):
        return rows                     # not a grid, which load_published refuses, or the same grid
    grid = rows[1:].float().t().reshape(1, -1, s, s)
    return torch.cat([rows[:1].float(), F.interpolate(grid, (g, g), mode="bicubic")[0].flatten(1).t()])


@torch.no_grad()
def load_published(part, path, vocab=None):
    """Fills an `EdgeNeXt`, a `ViT`, a `VideoSwin` or an `EViLM`'s text side from a published checkpoint.

    BERT's word embeddings follow `part.vocab` word by word; `vocab` holds the checkpoint's words where they
    differ. Raises InputError, and fills nothing, if the file holds something else or a tensor does not fit.
    """
    report, values, used = Published(Path(path)), {}, set()
    read = read_safetensors if report.path.suffix == ".safetensors" else read_torch
    tensors = dict(named_tensors(read(path)))
    releases = [release for release in RELEASES if isinstance(part, release[0])]
    matches = [(match[1], names) for _, _, pattern, names in releases for key in tensors
               if (match := re.fullmatch(rf"(.*\.|){pattern}", key))]
    if not matches:
        raise InputError(f"{path}: expected published weights such as {releases[0][1]}; found the tensors "
                         f"{listed(list(tensors), 4)}")
    prefix, names = matches[0]              # a file may hold copies, such as model and model_ema
    network = {name: tensor for name, tensor in part.state_dict().items()
               if not isinstance(part, EViLM) or name.startswith(("text_embedding.", "text_encoder."))}
    for name, initial in network.items():
        published = name
        for ours, theirs in names.items():
            published = published.replace(ours, theirs)
        before, *choices, after = re.split(r"[{,}]", published) if "{" in published else (published, "", "")
        keys = [prefix + before + choice + after for choice in choices]
        if not all(key in tensors for key in keys):
            report.left.append(name)
            continue
        found = [tensors[key] for key in keys]
        if name == "text_embedding.words.weight":
            found = [follow_words(found[0], initial, part.vocab, vocab, report)]
        if name == "positions":
            found = [resize_positions(found[0], initial)]
        shape = (len(initial) // len(keys), *initial.shape[1:])
        for key, tensor in zip(keys, found):
            if tensor.shape != shape or not tensors[key].is_floating_point():
                raise InputError(f"{path}: {key} is {tuple(tensors[key].shape)}, {tensors[key].dtype}; "
                                 f"{name} needs floats of {shape}; {releases[0][1]} fits --preset paper")
        values[name] = torch.cat(found)
        report.filled.append(name)
        used.update(keys)
    part.load_state_dict(values, strict=False)
    report.unused = [key for key in tensors if key not in used]
    return report


# -------------------------------------------------------------------------------------------------- Training
# What the three scripts share: flags, device and processes, optimiser and schedule, checkpoints, a run.


class InputError(Exception):
    """What the user gave cannot be used. One line: what is wrong, where, how to mend it; exit status 2."""


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line, which say how a field of Config is set."""

    def __init__(self, **settings):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **settings)

    def error(self, message):
        for flag in re.findall(r"--([\w-]+)", message.partition("unrecognized arguments:")[2]):
            if flag.replace("-", "_") in Config.__dataclass_fields__:
                message += f"; a field of Config is set by --config {flag.replace('-', '_')}=VALUE"
        self.exit(2, f"error: {message} (--help lists the flags)\n")


def at_least(least, kind=int, most=2**32 - 1):
    """The type of a flag: a number from `least` to `most`."""
    def number(text):
        if not least <= kind(text) <= most:
            raise argparse.ArgumentTypeError(f"{text} does not lie in {least} to {most}")
        return kind(text)
    return number


def shared_flags(parser, out):
    """Adds the flags of every script. Epochs, batch size and rate are by default the preset's or a task's."""
    add = parser.add_argument
    add("--data", default="data/toy", metavar="DIR", help="folder with train.jsonl or captions.jsonl, or a "
        "task's files (default: data/toy, the synthetic set, rendered on first use)")
    add("--preset", default="toy", choices=["toy", "paper"], help="sizes and settings (default: toy)")
    add("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"], help="default: best available")
    add("--epochs", type=at_least(1), help="passes over the training clips")
    add("--max-steps", type=at_least(1), help="stop after this many steps; shortens the schedule to match")
    add("--batch-size", type=at_least(1), help="clips per step, over all processes and --accumulate parts")
    add("--accumulate", type=at_least(1), default=1, help="gradient accumulation: parts per batch")
    add("--lr", type=at_least(0, float), help="peak learning rate")
    add("--workers", type=at_least(0), help="processes that load clips; no effect on results (default: "
        "cores per local process, minus one; 0 where training runs on a CPU of one or two cores)")
    add("--precision", default="auto", choices=["auto", "fp32", "bf16"], help="auto: bf16 on cuda")
    add("--compile", action="store_true", help="torch.compile the model")
    add("--seed", type=at_least(0), default=0, help="seed of all random numbers (default: 0)")
    add("--save-every", type=at_least(1), default=200, metavar="STEPS", help="steps between writes of "
        "last.pt (default: 200)")
    add("--out", default=out, metavar="DIR", help=f"the run's folder (default: {out})")
    add("--resume", action="store_true", help="continue from OUT/last.pt; with the same flags the weights "
        "end up as in an uninterrupted run")
    add("--strict", action="store_true", help="stop at the first broken clip instead of replacing it")
    add("--config", metavar="NAME=VALUE", action="append", default=[], help="set a field of Config, such as "
        "mask_ratio=0.5, dims=8,16,32,64, blocks=False; may be given several times")
    add("--vocab", metavar="FILE", help="BERT's vocab.txt, of which the words most frequent in the captions "
        "are kept (default: the words of the training captions)")
    add("--vocab-captions", metavar="FILE", help="captions, one per line, to build or cut the vocabulary by")


def configure(config, args, **fields_of_flags):
    """`config` changed by --config, then by the flags that were given ({field: flag}). With --config, both
    models are built without memory (meta device), to refuse sizes that do not fit together."""
    for change in args.config:
        name, _, text = change.partition("=")
        current = asdict(config).get(name)
        if current is None or isinstance(current, str) or name == "vocab_size":
            raise InputError(f"--config {change}: Config has no such field, or --config cannot set it")
        least = 0 if isinstance(current, (bool, float)) or name == "tokenizer_revive" else 1
        try:
            value = float(text) if isinstance(current, float) else ast.literal_eval(text)
            parts = value if isinstance(current, tuple) else [value]
            if type(value) is not type(current) or isinstance(current, tuple) and len(value) != len(current):
                raise ValueError
            if not all(least <= part < math.inf for part in parts):
                raise ValueError
        except (ValueError, TypeError, SyntaxError):
            raise InputError(f"--config {change}: give a value like {name}={current}") from None
        config = replace(config, **{name: value})
    given = {name: getattr(args, flag) for name, flag in fields_of_flags.items()}
    config = replace(config, **{name: value for name, value in given.items() if value is not None})
    if not args.config:
        return config
    try:
        with torch.device("meta"), torch.no_grad():                 # raises if sizes do not fit together
            frames = torch.rand(1, config.frames, 3, config.size, config.size)
            EViLM(config).encode_video(frames), SemanticTokenizer(config)(frames)
    except (AssertionError, ValueError, TypeError, IndexError, RuntimeError, ArithmeticError) as error:
        raise InputError(f"--config {' '.join(args.config)}: no model can be built with this "
                         f"({str(error).splitlines()[0]})") from None
    return config


def read_lines(flag, path):
    """The lines of a text file that a flag names."""
    try:
        return Path(path).read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{flag} {path}: cannot be read ({error})") from None


def make_vocabulary(args, config, texts, machine):
    """WordPiece for the training texts, and the Config with the number of its words."""
    if args.vocab_captions:
        texts = read_lines("--vocab-captions", args.vocab_captions)
    if args.vocab:
        published = WordPiece(read_lines("--vocab", args.vocab))
        wordpiece = published.keep_frequent(texts, min(1.0, config.vocab_rows / len(published)))
    else:
        wordpiece = WordPiece.from_captions(texts, config.vocab_rows)
        if len(wordpiece) == config.vocab_rows:
            machine.print("rarer words are read as [UNK]; --config vocab_rows=NUMBER has room for more")
    if len(wordpiece) <= len(SPECIAL):
        raise InputError(f"--data {args.data}: no vocabulary: its texts, or --vocab, hold no words")
    machine.print(f"vocabulary: {len(wordpiece):,} entries, {len(SPECIAL)} of them special tokens")
    return wordpiece, replace(config, vocab_size=len(wordpiece))


@dataclass
class Machine:
    """Where a run computes: the device, the precision, and this process (rank) among `world_size`."""
    device: torch.device
    bf16: bool = False
    rank: int = 0
    world_size: int = 1
    day_group: object = None    # gloo with a timeout of 24 hours, for what rank 0 does alone

    def __str__(self):
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type
        return f"{name}, {'bf16' if self.bf16 else 'fp32'}, {self.world_size} process(es)"

    def print(self, line):
        if self.rank == 0:
            tqdm.write(line)

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def wrap(self, model, compiled):
        """The model as training calls it: compiled where asked for, gradients averaged over processes."""
        warnings.filterwarnings("ignore", "Grad strides do not match")      # from depth-wise convolutions
        model = torch.compile(model) if compiled else model
        return DistributedDataParallel(model) if self.world_size > 1 else model

    def parts(self, model, batch, accumulate):
        """Yields a batch in equal parts, on the device; processes exchange gradients after the last part."""
        size = len(batch["frames"]) // accumulate
        for i in range(accumulate):
            exchange = self.world_size == 1 or i == accumulate - 1
            with contextlib.nullcontext() if exchange else model.no_sync():
                yield {name: value[i * size:(i + 1) * size].to(self.device, non_blocking=True)
                       for name, value in batch.items()}

    def total(self, numbers):
        """The sum of a list or a tensor of numbers over all processes: a tensor of doubles on the CPU."""
        total = torch.as_tensor(numbers).detach().cpu().double().clone()
        if self.world_size > 1:
            dist.all_reduce(total)                                  # by gloo, whatever the device
        return total

    def gather(self, rows):
        """The rows of all processes' parts of a batch, in the batch's order; no gradient."""
        if self.world_size == 1:
            return rows
        parts = [torch.empty_like(rows) for _ in range(self.world_size)]
        dist.all_gather(parts, rows.contiguous())
        return torch.stack(parts, 1).flatten(0, 1)                  # rank r has clips r, r + world_size, ...

    def barrier(self):
        """Waits for all processes, up to a day: rank 0 renders and evaluates alone."""
        if self.world_size > 1:
            dist.barrier(self.day_group)


def set_up(args):
    """The Machine for --device and --precision; under torchrun it joins the other processes."""
    rank, world_size, local_rank, local_world_size = (
        int(os.environ.get(name, default)) for name, default in
        (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1)))
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    device = next(name for name in present if present[name]) if args.device == "auto" else args.device
    if not present[device]:
        raise InputError(f"--device {device}: PyTorch finds none here; --device auto takes what there is")
    if device == "cuda":
        torch.cuda.set_device(local_rank)
        torch.backends.cudnn.benchmark = True
    if args.workers is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        args.workers = 0 if device == "cpu" and cores <= 2 else max(0, cores // local_world_size - 1)
    if world_size > 1 and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")
    day_group = None
    if dist.is_initialized():
        day_group = dist.new_group(backend="gloo", timeout=datetime.timedelta(hours=24))
    bf16 = args.precision == "bf16" or args.precision == "auto" and device == "cuda"
    return Machine(torch.device(device), bf16, rank, world_size, day_group)


def run_script(main, *user_errors):
    """Runs a script's main. An error that the user can fix ends it with one line and status 2, a lost process
    with status 1, Ctrl-C with 130, a closed pipe ("--trace | head") with 141."""
    try:
        main()
        sys.stdout.flush()
        if dist.is_initialized():
            dist.destroy_process_group()
        return
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except KeyboardInterrupt:
        line, status = "interrupted", 130
    except (InputError, *user_errors) as error:
        line, status = f"error: {error}", 2
    except (RuntimeError, ConnectionError, EOFError) as error:
        worker = str(error).startswith("DataLoader worker") or not isinstance(error, RuntimeError)
        lost = dist.is_initialized() and re.search(r"gloo|nccl|peer|connection", str(error), re.IGNORECASE)
        mistake = str(error).startswith("Caught ")          # a bug in a worker: show its traceback
        if mistake or not (worker or lost):
            raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        who = "a worker of the loader" if worker else "another process of this run"
        line, status = f"error: {who} is gone ({reason})", 1
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        if error.filename is None and not full:
            raise
        line, status = f"error: {error.filename or 'saving'}: {error.strerror}", 2
        line += "; older files are whole" if full else ""
    finally:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)       # the loader's handler would raise an error
        for child in multiprocessing.active_children():     # Python would wait for them at exit
            child.kill()
    print(line, file=sys.stderr, flush=True)
    sys.exit(status)


def make_optimizer(model, lr, weight_decay, device):
    """AdamW (4.1). Ours: beta2 of 0.98, and no decay on norms, biases and other vectors."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trained if p.squeeze().ndim > 1], "weight_decay": weight_decay},
              {"params": [p for p in trained if p.squeeze().ndim <= 1], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), fused=device.type != "mps")


def learning_rate(step, steps, peak, warmup):
    """Linear warm-up over the first `warmup` of the steps, then half a cosine down to 0."""
    rise = max(1, round(warmup * steps))
    if step < rise:
        return peak * (step + 1) / rise
    return peak * 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


def save(checkpoint, path):
    """Writes a checkpoint whole or not at all: a kill or a full disk leaves the older file as it was."""
    content, draft = io.BytesIO(), Path(f"{path}.part")
    torch.save(checkpoint, content)
    try:
        with open(draft, "wb") as file:
            file.write(content.getbuffer())
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
        raise InputError(f"{path}: there is no such file{hint}") from None
    except Exception as error:      # torch.load raises whatever the bytes lead it to
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        if "TorchScript" in str(error):
            reason = "TorchScript; save its weights once: torch.save(torch.jit.load(FILE).state_dict(), NEW)"
        elif forbidden := re.search(r"GLOBAL (\S+)", str(error)):
            reason = f"besides tensors it holds {forbidden[1]}, a pickled object"
        raise InputError(f"{path}: not a checkpoint that can be read safely ({reason})") from None


def load(path, *kinds, hint=""):
    """Loads a checkpoint of this project, a file or a run folder's best.pt; its "config" is a Config.

    Raises InputError, naming the file, unless it is a checkpoint of one of the `kinds` ("tokenizer",
    "pretrain", a task's name); `hint` ends the message where the file is missing.
    """
    path = Path(path)
    path = path / "best.pt" if path.is_dir() or not path.suffix else path
    checkpoint = read_torch(path, hint)
    keys = {"kind", "config", "vocab", "step", "model"}
    if not isinstance(checkpoint, dict) or not keys <= set(checkpoint):
        raise InputError(f"{path}: not a checkpoint of this project")
    types = {"config": dict, "vocab": list, "step": int, "model": dict, "settings": dict, "answers": list}
    for name in types.keys() & checkpoint.keys():
        if not isinstance(checkpoint[name], types[name]):
            raise InputError(f"{path}: is damaged, its {name} is not a {types[name].__name__}")
    kind, config = checkpoint["kind"], checkpoint["config"]
    if kind not in kinds:
        raise InputError(f"{path}: a checkpoint of kind {kind!r}, where {' or '.join(kinds)} is wanted")
    if {name: type(value) for name, value in config.items()} != {
            name: type(value) for name, value in asdict(Config()).items()}:
        raise InputError(f"{path}: its config is not one of this version of evilm.py")
    return checkpoint | {"path": path, "config": Config(**config)}


def fill(model, checkpoint):
    """Loads a checkpoint's weights; raises InputError, naming the file, where they do not fit."""
    try:
        model.load_state_dict(checkpoint["model"])
    except (RuntimeError, AttributeError, TypeError) as error:
        raise InputError(f"{checkpoint['path']}: its weights do not fit the model "
                         f"({str(error).splitlines()[-1].strip()})") from None


class Run:
    """A run and its folder: last.pt (for --resume), best.pt, metrics.jsonl. Only rank 0 writes.

    Starts anew or, with --resume, from last.pt; then Config, --seed and the flags named in `decide` must be
    unchanged. `sums` {name: tensor} are each process's running totals, `extra` goes into checkpoints.
    """

    def __init__(self, args, kind, config, vocab, machine, model, optimizer, decide=(), sums=None, **extra):
        self.folder, self.args, self.machine = Path(args.out), args, machine
        self.model, self.optimizer, self.sums = model, optimizer, sums or {}
        settings = {name: getattr(args, name) for name in ("seed", *decide)}
        self.about = {"kind": kind, "config": asdict(config), "vocab": vocab, "settings": settings, **extra}
        self.step, self.best, self.loss, self.signal = 0, -math.inf, None, 0
        self.clips, self.seconds, self.broken = 0, 0.0, set()
        if args.resume:
            self.restore(load(self.folder / "last.pt", kind))

    def ask_to_stop(self, number, _):
        if self.signal:
            sys.exit(128 + number)                                  # asked twice: at once
        self.signal = number

    def restore(self, checkpoint):
        path, about = checkpoint["path"], self.about
        theirs = asdict(checkpoint["config"]) | checkpoint.get("settings", {})
        words = {name: about.get(name) for name in ("vocab", "answers")}
        for name, value in {**about["config"], **about["settings"], **words}.items():
            was = checkpoint.get(name) if name in words else theirs.get(name)
            if was != value:
                change = "" if name in words else f" ({was}, now {value})"
                raise InputError(f"{path} was trained with another {name}{change}: resume with the flags it "
                                 "began with, or choose another folder")
        fill(self.model, checkpoint)
        try:
            self.optimizer.load_state_dict(checkpoint["optimizer"])
            self.step, self.best = checkpoint["step"], float(checkpoint["best"])
            self.broken = set(checkpoint["broken"])
            for name, total in checkpoint["sums"].items():
                self.sums[name].copy_(total if self.machine.rank == 0 else 0 * total)
            if self.machine.rank == 0:      # evaluations after that step, and the final one, are made again
                kept = [json.dumps(line) + "\n" for line in read_metrics(self.folder)
                        if line["step"] <= self.step and line["split"] == "val"]
                (self.folder / "metrics.jsonl").write_text("".join(kept))
        except (KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
            raise InputError(f"{path} or metrics.jsonl beside it is damaged ({error})") from None
        self.machine.print(f"going on from {path} at step {self.step:,}")

    def batches(self, loader, steps, lr, warmup):
        """Yields the batches of the remaining steps. Each step sets its learning rate and dropout seed, which
        do not depend on earlier steps; last.pt is written every --save-every steps. Ctrl-C and SIGTERM let
        the current step end, save last.pt and exit."""
        began, machine = time.perf_counter(), self.machine
        bar = tqdm(loader, initial=self.step, total=steps, unit="step", disable=machine.rank > 0)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.ask_to_stop)
        for batch in bar:
            self.name_broken(batch.pop("broken"), "replaced")
            torch.manual_seed(self.args.seed * 1_000_003 + self.step * machine.world_size + machine.rank)
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate(self.step, steps, lr, warmup)
            yield batch
            self.clips += len(batch["frames"]) * machine.world_size
            self.seconds = time.perf_counter() - began
            if self.step % 20 == 0:
                rate = self.clips / self.seconds
                bar.set_postfix_str(f"loss {self.check_finite():.3f}, {rate:.0f} clips/s")
            stop = machine.total([self.signal]).item() > 0
            if stop or self.step % self.args.save_every == 0:
                self.save_last()
            if stop:
                machine.print(f"stopped at step {self.step:,}, saved; --resume goes on from there")
                sys.exit(128 + (self.signal or signal.SIGTERM))
        signal.signal(signal.SIGINT, signal.default_int_handler)    # what follows is made again by --resume
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def optimise(self, loss):
        """Takes an optimizer step, gradients clipped to norm 1 (ours). `loss` is this process's part of the
        batch's loss, for the log. The first step opens the run's folder."""
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        if self.step == 0 and self.machine.rank == 0:
            self.open_folder()                                      # not earlier: a failed start leaves none
        self.optimizer.zero_grad(set_to_none=True)
        self.loss = loss.detach() + 0 * norm                        # NaN if a gradient is not finite
        self.step += 1

    def open_folder(self):
        """A folder for a new run; an older run in it is moved aside."""
        if any(file.stat().st_size for name in ("*.pt", "metrics.jsonl") for file in self.folder.glob(name)):
            aside = next(p for i in range(1, 10**6) if not (p := Path(f"{self.folder}.{i}")).exists())
            self.folder.rename(aside)
            self.machine.print(f"{self.folder} held an older run, which is now {aside}; --resume would go on")
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "metrics.jsonl").write_text("")

    def check_finite(self):
        """The last step's loss over all processes; an InputError if it is infinite or NaN."""
        loss = self.machine.total(self.loss).item()
        if not math.isfinite(loss):
            raise InputError(f"the loss is not finite at step {self.step:,}; {self.folder} keeps what was "
                             "saved before. A lower --lr or --precision fp32 may help")
        return loss

    def name_broken(self, lines, what_became):
        """Names each broken clip once, and counts it; with --strict the first ends the run."""
        for line in set(lines) - self.broken:
            if self.args.strict:
                raise InputError(f"{line}; fix it, remove its line, or leave out --strict")
            tqdm.write(f"broken clip, {what_became}: {line}")
            self.broken.add(line)

    def checkpoint(self):
        return {**self.about, "step": self.step, "best": self.best, "model": self.model.state_dict()}

    def save_last(self):
        self.check_finite()
        sums = {name: self.machine.total(value) for name, value in self.sums.items()}
        if self.machine.rank == 0:
            save({**self.checkpoint(), "sums": sums, "broken": sorted(self.broken),
                  "optimizer": self.optimizer.state_dict()}, self.folder / "last.pt")

    def evaluated(self, score, **values):
        """Logs an evaluation on val; the weights become best.pt if `score` is the highest so far."""
        self.log("val", **values)
        if score > self.best:
            self.best = score
            save(self.checkpoint(), self.folder / "best.pt")

    def log(self, split, **values):
        with open(self.folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"step": self.step, "split": split, **values}) + "\n")

    def report_speed(self):
        unit = 2**30 if sys.platform == "darwin" else 2**20
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
        if self.machine.device.type == "cuda":
            memory = torch.cuda.max_memory_allocated() / 2**30
        if self.clips:
            self.machine.print(f"{self.clips / self.seconds:.0f} clips/s overall; peak {memory:.2f} GiB")
        if self.machine.world_size > 1:         # rank 0 reports all processes' broken clips
            found = [None] * self.machine.world_size
            dist.all_gather_object(found, self.broken, group=self.machine.day_group)
            self.broken = set().union(*found)


def read_metrics(folder):
    """The lines of a run's metrics.jsonl, each a dict."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# -------------------------------------------------------- Scoring of clips and captions, for two scripts
ROUNDING = 1e-5         # closer scores are ties: an input's place in its batch changes its score by less


@torch.no_grad()
def encode_clips(encode, loader, machine, run):
    """encode(frames (B, T, 3, H, W) in [0, 1]) of a loader's clips -> (V, ...), their rows; broken ones are
    left out."""
    encoded, rows = [], []
    for batch in loader:
        with machine.autocast():
            values = encode(batch["frames"].to(machine.device).float() / 255)
        run.name_broken(batch["broken"], "left out")
        encoded.append(values[batch["whole"].to(machine.device)])
        rows += [row for row, whole in zip(batch["rows"], batch["whole"].tolist()) if whole]
    return torch.cat(encoded), rows


@torch.no_grad()
def encode_captions(encode, captions, wordpiece, config, machine):
    """encode(ids (n, L), mask (n, L)) of captions -> e^L (n, L, D), or vectors (n, D); mask."""
    ids, mask = (x.to(machine.device) for x in wordpiece.encode_batch(captions, config.max_words))
    with machine.autocast():
        return encode(ids, mask), mask


@torch.no_grad()
def score_retrieval(model, captions, loader, wordpiece, machine, run, shown=5):
    """Scores captions against a loader's videos: joint scores of an `EViLM`, cosines of a `FastRetrieval`.

    -> (the caption rows whose clips can be read, their ranks (Q,), the V videos' names, and each caption's
    `shown` highest scores with their videos' indices into the names, two of (Q, min(shown, V))).
    """
    fast = isinstance(model, FastRetrieval)
    config = model.model.config if fast else model.config
    video, videos = encode_clips(model.embed_video if fast else model.encode_video, loader, machine, run)
    place = {row["video"]: i for i, row in enumerate(videos)}
    rows = [row for row in captions if row["video"] in place]
    ranks, best = [], []
    for i in range(0, len(rows), 100):                  # 100 captions with a million videos are 400 MB
        some = rows[i:i + 100]
        texts, truth = [row["caption"] for row in some], torch.tensor([place[row["video"]] for row in some])
        if fast:
            text, _ = encode_captions(model.embed_text, texts, wordpiece, config, machine)
            scores = text @ video.t()                                                       # (q, V)
        else:
            text, mask = encode_captions(model.encode_text, texts, wordpiece, config, machine)
            with machine.autocast():
                scores = joint_scores(model, video, text, mask)                             # (q, V)
        tolerance = 1e-6 if fast else ROUNDING          # cosines lie closer together
        ranks.append(rank_of_truth(scores, truth.to(scores.device), tolerance).cpu())
        best.append([x.cpu() for x in scores.topk(min(shown, len(place)))])
    return rows, torch.cat(ranks), list(place), [torch.cat(parts) for parts in zip(*best)]


@torch.no_grad()
def score_choices(model, loader, wordpiece, machine, run):
    """Zero-shot multiple choice: the option that matches the clip best, without the question; ties are wrong.

    -> {"mc": accuracy, "mc_unseen", and "mc_NAME" for each NAME of `changed_and_unseen`}.
    """
    right, kinds = [], []
    for video, row in zip(*encode_clips(model.encode_video, loader, machine, run)):
        text, mask = encode_captions(model.encode_text, row["options"], wordpiece, model.config, machine)
        with machine.autocast():
            scores = model.match(video.expand(len(text), -1, -1), text, mask)[None].cpu()
        right.append(bool(rank_of_truth(scores, torch.tensor([row["answer"]]), ROUNDING) == 1))
        kinds.append(changed_and_unseen(row))
    return accuracies("mc", right, kinds)


def changed_and_unseen(row):
    """The kinds that a question also counts under, a list: what its options differ in, such as "shape" or
    "colour+shape", and "unseen" if the clip shows a combination that training lacks."""
    names = row.get("changed")                  # in your own rows the field may be anything
    changed = ["+".join(map(str, names))] if names and isinstance(names, list) else []
    return [*changed, "unseen"] if row.get("unseen") else changed


def accuracies(name, right, kinds):
    """{name: accuracy, name_KIND: accuracy of that kind}, from whether each answer is right and its kinds."""
    hits = {}
    for hit, its_kinds in zip(right, kinds):
        for key in (name, *(f"{name}_{kind}" for kind in its_kinds)):
            hits.setdefault(key, []).append(hit)
    return {key: sum(hits[key]) / len(hits[key]) for key in hits}


if __name__ == "__main__":
    run_script(main)
