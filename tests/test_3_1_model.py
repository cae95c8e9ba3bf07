"""3.1, the model: every part against a plain computation in float64, Eq. (1), Eq. (2), Table 8."""
import re
import sys
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import plain
import pytest
import torch
import torch.nn as nn
from plain import near

import evilm
from evilm import (CLS, MASK, PAD, SEP, SPECIAL, UNK, Config, EdgeNeXt, EViLM, InputError,
                   Transformer, WordPiece, multiply_adds, pad, space_time_sines, table8)

SOURCE = Path(evilm.__file__).read_text()


def test_each_field_of_config_says_where_its_value_comes_from():
    body = SOURCE[SOURCE.index("class Config:"):SOURCE.index("    def grid")]
    origins = dict(re.findall(r"^    (\w+): \w+ = [^#]*# (paper|inferred|ours)\b", body, re.MULTILINE))
    assert set(origins) == {field.name for field in fields(Config)}
    assert set(origins.values()) == {"paper", "inferred", "ours"}


# ---------------------------------------------------------------------------------------------- video encoder

@pytest.mark.parametrize("depths, dims, kernels, scales, heads, size", [
    ((1, 2, 3, 1), (8, 12, 20, 28), (3, 5, 7, 9), (2, 2, 3, 4), 4, (64, 96)),
    ((2, 1, 1, 2), (6, 16, 24, 32), (5, 3, 3, 7), (2, 4, 2, 3), 8, (96, 32))])
def test_edgenext_against_a_plain_computation(randomise, depths, dims, kernels, scales, heads, size):
    model = randomise(EdgeNeXt(depths, dims, kernels, scales, heads).double())
    assert {part.eps for part in model.modules() if isinstance(part, nn.LayerNorm)} == {1e-6}
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    with torch.no_grad():
        ours = model(x)
    assert ours.shape == (2, dims[-1], size[0] // 32, size[1] // 32)
    expected = plain.edgenext(x, plain.weights(model), depths, kernels, scales, heads)
    near(ours, expected, atol=1e-5)                                             # our sines are float32


def test_edgenext_blocks_start_at_their_layer_scale():
    model = EdgeNeXt((1, 1, 1, 1), (8, 8, 8, 8), layer_scale=1e-3)
    gammas = [value for name, value in model.named_parameters() if "gamma" in name]
    assert len(gammas) == 7 and all((gamma == 1e-3).all() for gamma in gammas)
    assert all((value == 1).all() for name, value in model.named_parameters() if "temperature" in name)
    assert Config.paper().layer_scale == 1e-6


# ----------------------------------------------------------------------------------------- transformer layers

def test_dropout_is_on_in_training_alone_and_never_in_the_video_encoder(tiny):
    model = EViLM(replace(tiny, dropout=0.5))
    frames, ids = torch.rand(1, 2, 3, 64, 64), torch.tensor([[CLS, 9, 8, SEP]])
    x, mask = torch.randn(1, 4, 36), ids > 0
    for training in (True, False):
        model.train(training)
        for work, dropped in ((lambda: model.text_embedding(ids), True),
                              (lambda: model.text_encoder(x[..., :16]), True),
                              (lambda: model.fuse(x, x, mask)[0], True),
                              (lambda: model.encode_text(ids, mask), True),
                              (lambda: model.encode_video(frames), False)):
            with torch.no_grad():
                assert ((work() - work()).abs().max() > 1e-3) == (training and dropped)


def test_dropout_is_on_both_branches_of_a_layer():
    layer, x = Transformer(1, 24, 3, dropout=1.0).train(), torch.randn(2, 5, 24)
    near(layer(x), layer[0].norm2(layer[0].norm1(x)))                   # all is dropped but the residual sum


# ------------------------------------------------------------------------------------------- language encoder

VOCAB = SPECIAL + ["a", "red", "ball", "roll", "##ing", "##s", "un", "##aff", "##able", "##a", ",", "##ff",
                   "ete"]


@pytest.mark.parametrize("text, words", [
    ("A Red BALL", ["a", "red", "ball"]),
    ("Été, naïve Ångström", ["ete", ",", "naive", "angstrom"]), ("e\u0301te\u0301", ["ete"]),
    ("don't stop!?", ["don", "'", "t", "stop", "!", "?"]),
    ("x-ray snake_case a.b", ["x", "-", "ray", "snake", "_", "case", "a", ".", "b"]),
    ("$5+3^2=~|`<", ["$", "5", "+", "3", "^", "2", "=", "~", "|", "`", "<"]),
    ("“so”—well…", ["“", "so", "”", "—", "well", "…"]), ("two红色balls", ["two", "红", "色", "balls"]),
    ("カタカナ", ["カタカナ"]),                                     # BERT sets only ideographs apart
    ("a\u00a0b\tc\nd\u3000e", ["a", "b", "c", "d", "e"]),
    ("ze\u200bro\x00\ufffd", ["zero"]), ("[SEP] ##s", ["[", "sep", "]", "#", "#", "s"]), (" \n ", [])])
def test_wordpiece_splits_as_bert_does(text, words):
    assert WordPiece.split(text) == words


def test_wordpiece_takes_the_longest_piece_first():
    pieces = WordPiece(VOCAB).pieces
    assert pieces("unaffable") == ["un", "##aff", "##able"]             # not ##a, ##ff
    assert pieces("rollings") == ["roll", "##ing", "##s"]
    assert pieces("reds") == ["red", "##s"] and pieces("red") == ["red"]
    assert WordPiece(VOCAB + ["unaf"]).pieces("unaffable") == ["[UNK]"]  # greedy: it never goes back
    assert pieces("ing") == ["[UNK]"] and pieces("balling!") == ["[UNK]"] and pieces("") == ["[UNK]"]
    assert pieces("redball") == ["[UNK]"]                               # it has ball, and no ##ball
    assert pieces("a" * 100) == ["a"] + 99 * ["##a"] and pieces("a" * 101) == ["[UNK]"]


def test_wordpiece_encodes_between_cls_and_sep():
    wordpiece = WordPiece(VOCAB)
    assert len(wordpiece) == len(VOCAB)
    ids = wordpiece.encode("Red balls, été xyz", 30)
    assert [VOCAB[i] for i in ids] == ["[CLS]", "red", "ball", "##s", ",", "ete", "[UNK]", "[SEP]"]
    assert ids[0] == CLS and ids[-1] == SEP and ids[-2] == UNK
    for max_len in (2, 3, 5, 7, 8, 9):                                  # it is cut so that [SEP] stays
        assert wordpiece.encode("Red balls, été xyz", max_len) == ids[:-1][:max_len - 1] + [SEP]
    assert wordpiece.encode("", 30) == [CLS, SEP]
    assert MASK not in wordpiece.encode("[MASK]", 30) and wordpiece.encode("[SEP]", 30).count(SEP) == 1


def test_encode_batch_pads_to_the_longest_of_the_texts():
    wordpiece, texts = WordPiece(VOCAB), ["red", "a red ball rolls", ""]
    ids, mask = wordpiece.encode_batch(texts, 5)
    assert ids.shape == mask.shape == (3, 5) and ids.dtype == torch.long and mask.dtype == torch.bool
    for row, seen, encoded in zip(ids, mask, (wordpiece.encode(text, 5) for text in texts)):
        assert row.tolist() == encoded + (5 - len(encoded)) * [PAD]
        assert seen.tolist() == len(encoded) * [True] + (5 - len(encoded)) * [False]
    assert wordpiece.encode_batch(["red", "a"], 30)[0].shape == (2, 3)          # no longer than needed
    assert pad([[7], [8, 9]])[0].tolist() == [[7, PAD], [8, 9]]


def test_unknown_words_are_those_that_no_pieces_spell_and_can_be_added():
    wordpiece = WordPiece(VOCAB)
    assert wordpiece.unknown([]) == wordpiece.unknown(["a red ball, rolling"]) == {}
    texts = ["Red balls: green!", "a BLUE ball", "unaffable blue"]
    assert wordpiece.unknown(texts) == {":": 1, "!": 1, "green": 1, "blue": 2}
    for size, added in ((99, ["blue", "!", ":", "green"]), (len(VOCAB) + 1, ["blue"]), (3, [])):
        assert wordpiece.add_words(texts, size).vocab == VOCAB + added


def test_a_vocabulary_without_special_tokens_is_refused():
    with pytest.raises(InputError, match=r"\[MASK\]"):
        WordPiece([word for word in VOCAB if word != "[MASK]"])


def test_a_vocabulary_from_captions_is_ordered_by_count():
    captions = ["a red ball", "a ball", "A ball rolls", "blue, blue"]
    whole = WordPiece.from_captions(captions)
    assert whole.vocab[:5] == SPECIAL and whole.vocab[5:7] == ["a", "ball"] and whole.vocab[7] == "blue"
    assert (sorted(whole.vocab[8:]) == [",", "red", "rolls"]
            and UNK not in whole.encode(" ".join(captions), 99))
    assert WordPiece.from_captions(captions[::-1]).vocab == whole.vocab
    assert WordPiece.from_captions(captions, 8).vocab == whole.vocab[:8]


def test_the_papers_truncation_keeps_frequent_pieces_and_breaks_ties_by_order():
    vocab = ["[PAD]", "[unused0]", "[unused1]", "[UNK]", "[CLS]", "[SEP]", "[MASK]",
             "zebra", "yak", "##s", "ant", "cat", "dog", "the", "fox", "owl", "##zz"]         # 17 entries
    # the 3, ##s 3, cat 2, dog, fox, yak 1
    captions = ["the cats", "the Dogs", "the cats sleep", "fox", "yak"]
    wordpiece = WordPiece(vocab)
    order = SPECIAL + ["##s", "the", "cat", "yak", "dog", "fox", "zebra", "ant", "owl", "##zz"]
    for share in (0.3, 0.4, 0.5, 0.6, 0.75, 0.85):
        kept = wordpiece.keep_frequent(captions, share).vocab
        assert len(kept) == round(share * 17) and kept == order[:len(kept)]
    assert wordpiece.keep_frequent(captions).vocab == order[:5]             # 30%
    assert wordpiece.keep_frequent(captions, 1.0).vocab == order            # [unused] never stays
    assert wordpiece.vocab == vocab
    assert Config.paper().vocab_rows == round(0.30 * 30_522)                # BERT's


def test_eq1_language_against_a_plain_computation(tiny, randomise):
    model = randomise(EViLM(tiny).double())
    ids = torch.tensor([[CLS, 9, 8, 30, SEP], [CLS, 12, SEP, 0, 0]])
    w = plain.weights(model)
    words, positions, segments = (w[f"text_embedding.{part}.weight"]
                                  for part in ("words", "positions", "segments"))
    rows = [torch.stack([words[i] + positions[at] + segments[0] for at, i in enumerate(row)]) for row in ids]
    x = plain.norm(torch.stack(rows), w, "text_embedding.norm", 1e-12)
    with torch.no_grad():
        near(model.text_embedding(ids), x)
        near(model.encode_text(ids, ids > 0),
             plain.linear(plain.bert(x, w, 2, 2, ids > 0, "text_encoder."), w, "text_proj"))


# ----------------------------------------------------------------------------------------------- Eq. (1), (2)

def test_eq1_video_is_projected_patches_in_order_of_time_row_column_plus_sines(tiny, randomise):
    model, frames = randomise(EViLM(tiny)), torch.rand(3, 2, 3, 64, 64)
    w, expected = plain.weights(model), torch.zeros(3, 8, 36)
    with torch.no_grad():
        video = model.encode_video(frames)
        for b, t in np.ndindex(3, 2):
            frame = torch.stack([(frames[b, t, c] - (0.485, 0.456, 0.406)[c]) / (0.229, 0.224, 0.225)[c]
                                 for c in range(3)])
            patches = model.video_encoder(frame[None])[0].double()                          # (28, 2, 2)
            for y, x in np.ndindex(2, 2):
                expected[b, 4 * t + 2 * y + x] = plain.linear(patches[:, y, x], w, "video_proj")
    assert video.shape == (3, 8, 36) and not any("normalise" in name for name in model.state_dict())
    near(video, expected + tiny.video_positions * plain.sines(2, 2, 36), atol=1e-4)


@pytest.mark.parametrize("T, g, width", [(4, 8, 384), (2, 3, 16), (3, 2, 12)])
def test_eq1_sines_tell_every_patch_from_every_other(T, g, width):
    sines = space_time_sines(T, g, width)
    assert sines.shape == (T * g * g, width)
    near(sines, plain.sines(T, g, width), atol=1e-5)
    apart = torch.cdist(sines.double(), sines.double()) + torch.eye(len(sines))
    assert apart.min() > 0.1


@pytest.mark.parametrize("pre_norm", [False, True])
def test_eq2_order_and_token_types(tiny, randomise, pre_norm):
    model = randomise(EViLM(replace(tiny, decoder_pre_norm=pre_norm)).double())
    video, text = torch.randn(2, 8, 36, dtype=torch.float64), torch.randn(2, 5, 36, dtype=torch.float64)
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    w, ones = plain.weights(model), torch.ones(2, 9, dtype=torch.bool)
    e_cls, t_text, t_video = w["token_type"]

    def decode(*parts, seen=None):
        x = torch.cat([e_cls.expand(2, 1, -1), *parts], 1)
        if not pre_norm:
            return plain.bert(x, w, 2, 3, seen, "decoder.")
        return plain.norm(plain.pre_norm(x, w, 2, 3, seen, "decoder."), w, "decoder_norm", 1e-5)

    with torch.no_grad():
        h = decode(text + t_text, video + t_video, seen=torch.cat([ones[:, :1], mask, ones[:, :8]], 1))
        for ours, plainly in zip(model.fuse(video, text, mask), (h[:, 0], h[:, 1:6], h[:, 6:])):
            near(ours, plainly)
        logits = plain.linear(torch.tanh(plain.linear(h[:, 0], w, "pooler.0")), w, "vtm_head")
        near(model.match(video, text, mask), logits[:, 1] - logits[:, 0], atol=1e-6)

        text_alone, video_alone = model.fuse(None, text, mask), model.fuse(video, None, None)          # 4.4
        assert text_alone[2] is None and video_alone[1] is None
        h = decode(text + t_text, seen=torch.cat([ones[:, :1], mask], 1))
        near(torch.cat([text_alone[0][:, None], text_alone[1]], 1), h)
        near(torch.cat([video_alone[0][:, None], video_alone[2]], 1), decode(video + t_video))


# ---------------------------------------------------------------------------------------------------- Table 8

def test_table8_rows():
    with torch.device("meta"):
        rows = {name: count for name, count, _ in table8(Config.paper())}
        model = EViLM(Config.paper())
    assert list(rows.values())[:10] == [1_238_144, 2_379_264, 49_536, 1_152, 5_281_832, 117_120, 7_097_856,
                                        147_840, 770, 16_313_514]
    assert rows["TOTAL"] == 16_313_514 and len(rows) == 12
    heads = [sum(p.numel() for p in head.parameters()) for head in (model.mlm_head, model.mvm_head)]
    assert sum(p.numel() for p in model.parameters()) == 16_313_514 + sum(heads)
    assert list(rows.values())[10:] == heads                             # outside the total


def test_table8_does_not_tell_pre_norm_from_post_norm():
    with torch.device("meta"):
        rows = {name: count for name, count, _ in table8(replace(Config.paper(), decoder_pre_norm=True))}
    assert rows["Multi-Modal Decoder"] == 7_097_856
    assert rows["TOTAL"] == 16_313_514 + 768 and f"{rows['TOTAL'] / 1e6:.1f}" == "16.3"


def test_the_papers_multiply_adds():
    cost = multiply_adds(replace(Config.paper(), vit_width=96, vit_layers=1, tokenizer_layers=1))
    assert 1.25 <= cost["visual"] / 4 <= 1.26
    assert 0.07 <= cost["textual"] < 0.08 and round(cost["decoder"], 2) == 2.28
    assert round(cost["model"], 1) == 7.4 and 14.65 < 2 * cost["model"] < 14.8


# -------------------------------------------------------------------------------------------------- The trace

@pytest.mark.parametrize("encoder", ["vit", "videoswin"])
def test_the_trace_names_the_line_of_each_step(monkeypatch, capsys, encoder):
    monkeypatch.setattr(sys, "argv", ["evilm.py", "--trace", "--preset", "toy", "--encoder", encoder])
    evilm.main()
    shown, lines = capsys.readouterr().out, SOURCE.splitlines()
    steps = re.findall(r"^(.{10})(\w+) +(\d+)  (.*) -> (.+)$", shown, re.MULTILINE)
    for _, name, number, _, _ in steps:
        assert f"def {'forward' if name[0].isupper() else name}(" in lines[int(number) - 1], name
    steps = {(paper.strip(), name): shapes for paper, name, _, *shapes in steps}
    assert {("Eq. (1)", "encode_text"), ("Eq. (2)", "fuse"), ("Eq. (3)", "mvm_loss"),
            ("Eq. (4)", "VectorQuantizer"), ("Eq. (5)", "read_words"), ("Eq. (6)", "focal_loss"),
            ("3.2", "mask_frames")} <= set(steps)
    assert steps["Eq. (1)", "encode_video"] == ["(1, 4, 3, 128, 128)", "(1, 64, 96)"]
