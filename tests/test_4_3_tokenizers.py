"""4.3 and Tables 6, 7, the other tokenizers: VideoSwin as the encoder, pixels as the target."""
import json
from dataclasses import replace

import plain
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from plain import near

import pretrain
import toy_data
import train_tokenizer
from evilm import (IMAGENET, MASK, SPECIAL, EdgeNeXt, InputError, Normalise, SemanticTokenizer, VideoSwin,
                   WordPiece, load, start_centred)


@pytest.fixture
def make(tiny, randomise):
    """make(target, encoder): a tokenizer of that kind, its weights random."""
    def made(target, encoder):
        return randomise(SemanticTokenizer(replace(tiny, tokenizer_target=target, tokenizer_encoder=encoder)))
    return made


# -------------------------------------------------------------------------------------------------- VideoSwin

@pytest.mark.parametrize("T, window", [
    (5, (2, 3, 3)),             # padded and shifted in time, rows and columns; the last stage is one window
    (4, (4, 4, 4)),             # whole windows
    (3, (8, 7, 7)),             # a clip shorter than a window
])
def test_videoswin_is_the_releases_with_a_stride_of_1_in_time(randomise, T, window):
    depths, heads = (2, 2, 1, 1), (1, 2, 2, 4)
    swin = randomise(VideoSwin(8, depths, heads, window).double())
    x = torch.randn(2, T, 3, 32, 64, dtype=torch.float64)
    with torch.no_grad():
        ours = swin(x)
    assert ours.shape == (2, T, 1, 2, 64)
    near(ours, plain.video_swin(x, plain.weights(swin), depths, heads, window))


def test_videoswin_gets_frames_in_the_scale_it_was_trained_in(make, frames):
    tokenizer = make("words", "videoswin")
    with torch.no_grad():
        near(tokenizer.embed(frames), tokenizer.proj(tokenizer.encoder(Normalise(*IMAGENET)(frames))))


@pytest.mark.parametrize("encoder, shape, channels", [
    (VideoSwin(4, (1, 2, 1, 1), (1, 2, 2, 4), (2, 3, 3)), (3, 2, 3, 64, 64), -1),
    (EdgeNeXt((1, 1, 1, 1), (8, 8, 16, 32), heads=4), (12, 3, 64, 64), 1)])
def test_an_encoders_norms_can_start_centred_on_real_frames(encoder, shape, channels):
    norms = {id(p) for part in encoder.modules() if isinstance(part, nn.LayerNorm) for p in part.parameters()}
    before, frames = {name: p.detach().clone() for name, p in encoder.named_parameters()}, torch.rand(shape)
    start_centred(encoder, frames)
    for name, p in encoder.named_parameters():
        assert torch.equal(p, before[name]) != (id(p) in norms), name
    with torch.no_grad():
        patches = encoder(frames).movedim(channels, -1).flatten(0, -2)
    near(patches.mean(0), torch.zeros(32), atol=1e-4)
    near(patches.std(0), torch.ones(32), atol=0.05)


# --------------------------------------------------------------------------------------- Pixels as the target

def test_pixels_are_drawn_in_their_places_from_the_frames_own_codes(make):
    tokenizer, codes = make("pixels", "vit"), F.normalize(torch.randn(2, 2, 2, 2, 6), dim=-1)
    w = plain.weights(tokenizer)
    with torch.no_grad():
        drawn = tokenizer.draw_pixels(codes)
    assert drawn.shape == (2, 2, 3, 64, 64)
    for b, t in ((0, 0), (0, 1), (1, 0), (1, 1)):
        x = plain.linear(codes[b:b + 1, t].double().flatten(1, 2), w, "expand") + plain.sines(1, 2, 32)
        patches = plain.linear(plain.bert(x, w, 2, 2, at="decoder."), w, "head")[0].view(2, 2, 3, 32, 32)
        for row, column in ((0, 0), (0, 1), (1, 0), (1, 1)):
            near(drawn[b, t, :, 32 * row:32 * row + 32, 32 * column:32 * column + 32],
                 patches[row, column], atol=1e-4)


# ------------------------------------------------------------------------------------------------ The scripts

@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home")
    toy_data.render(folder / "clips", 45)
    return folder


SMALL = ("--data clips --workers 0 --batch-size 4 --device cpu --config frames=2 --config size=64 "
         "--config swin_dim=8 --config swin_depths=1,1,1,1 --config vit_layers=1 --config tokenizer_layers=1")


@pytest.fixture
def run(home, monkeypatch):
    """run(script, flags, steps): trains in `home` on 45 rendered clips."""
    def run(script, flags, steps=2):
        script.train(script.parse(f"{SMALL} {flags} --max-steps {steps}".split()))
    monkeypatch.chdir(home)
    return run


def beside_the_loss(checkpoint, folder):
    """A checkpoint's tokenizer on val: the recall of words, or the squared error of the mean colour."""
    config, wordpiece = checkpoint["config"], WordPiece(checkpoint["vocab"])
    tokenizer, val = SemanticTokenizer(config), toy_data.open_splits(folder)["val"]
    tokenizer.load_state_dict(checkpoint["model"])
    clips = toy_data.ClipCaptions(val, config.frames, config.size, 0, False, mismatched=False)
    part = whole = 0
    for i in range(len(clips)):
        frames = clips[0, i]["frames"][None].float() / 255
        if config.tokenizer_target == "pixels":
            part += float(((frames - frames.mean((1, 3, 4), keepdim=True)) ** 2).sum())
            whole += frames.numel()
        else:       # of a caption's k words, those among the k that score highest
            there = {k for k in wordpiece.encode(clips[0, i]["caption"], config.max_words) if k > MASK}
            best = tokenizer.eval()(frames)[0][0].topk(len(there)).indices + len(SPECIAL)
            part += len(there & set(best.tolist()))
            whole += len(there)
    return part / whole


@pytest.mark.parametrize("target, encoder", [("words", "videoswin"), ("pixels", "vit")])
def test_each_kind_trains_and_labels_pretraining(home, run, monkeypatch, target, encoder):
    kind, whole = f"--target {target} --encoder {encoder} --warm 0.5", f"{target}-{encoder}"
    run(train_tokenizer, f"{kind} --out {whole}", steps=3)
    one = load(f"{whole}/last.pt", "tokenizer")
    assert all((home / whole / picture).exists() for picture in ("codebook.png", "curves.png"))
    val, test = map(json.loads, (home / whole / "metrics.jsonl").read_text().splitlines())
    beside = "word_recall" if target == "words" else "pixel_mean_colour"
    assert (val["step"], val["split"], test["split"]) == (3, "val", "test") and set(test) <= set(val)
    assert val[beside] == pytest.approx(beside_the_loss(one, "clips"), rel=1e-4)

    monkeypatch.setattr(pretrain, "finish", lambda *_: None)
    flags = f"--tokenizer {whole} --out p-{whole}"
    run(pretrain, flags)
    online = load(f"p-{whole}/last.pt", "pretrain")["model"]
    if encoder == "videoswin":
        with pytest.raises(InputError, match="--codes offline.*one frame at a time"):
            run(pretrain, f"{flags} --codes offline")
    else:
        read = pretrain.WholeClips.__getitem__
        for broken in (0, 3):       # of some clips only the frames that a step takes can be read
            monkeypatch.setattr(pretrain.WholeClips, "__getitem__",
                                lambda clips, i: read(clips, i)[:0 if i < broken else None])
            run(pretrain, f"{flags} --codes offline")
            offline = load(f"p-{whole}/last.pt", "pretrain")["model"]
            assert all(torch.equal(online[name], offline[name]) for name in online)
