"""3.1, the model: every part against a plain computation in float64, Eq. (1), Eq. (2), Table 8."""
import math
from dataclasses import replace
from pathlib import Path

import plain
import pytest
import released
import torch
import torch.nn as nn
import torch.nn.functional as F

import evilm
from evilm import (CLS, IMAGENET, MASK, SEP, SPECIAL, UNK, Config, EdgeNeXt, EViLM, InputError, PictureTags,
                   Transformer, ViT, WordPiece, multiply_adds, quick_gelu, space_time_sines, table8,
                   trace)


def near(ours, plainly, atol=1e-9):
    torch.testing.assert_close(ours, plainly.to(ours.dtype), atol=atol, rtol=1e-6)


def unlike(a, b):
    return (a - b).abs().max() > 1e-3


# ---------------------------------------------------------------------------------------------- video encoder


@pytest.mark.parametrize("depths, dims, kernels, scales, heads, size", [
    ((1, 2, 3, 1), (8, 12, 20, 28), (3, 5, 7, 9), (2, 2, 3, 4), 4, (64, 96)),
    ((2, 1, 1, 2), (6, 16, 24, 32), (5, 3, 3, 7), (2, 4, 2, 3), 8, (96, 32)),
])
def test_edgenext_against_a_plain_computation(randomise, depths, dims, kernels, scales, heads, size):
    model = randomise(EdgeNeXt(depths, dims, kernels, scales, heads).double())
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    with torch.no_grad():
        ours = model(x)
    assert ours.shape == (2, dims[-1], size[0] // 32, size[1] // 32)
    # our sines are float32
    near(ours, plain.edgenext(x, plain.weights(model), depths, kernels, scales, heads), atol=1e-5)


def test_tags_are_read_from_the_average_of_all_cells_of_all_stills(randomise):
    model = randomise(PictureTags(Config.toy(), [3, 5]).double())
    frames = torch.rand(2, 3, 3, 64, 96, dtype=torch.float64)
    mean, deviation = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in IMAGENET)
    with torch.no_grad():
        found = model(frames)
        for b in range(2):
            maps = [model.video_encoder(((still - mean) / deviation)[None])[0] for still in frames[b]]
            average = sum(still[:, i, j] for still in maps for i in range(2) for j in range(3)) / (3 * 6)
            for head, logits in zip(model.heads, found):
                near(logits[b], head.weight @ average + head.bias, atol=1e-6)
    assert [logits.shape for logits in found] == [(2, 3), (2, 5)]


def test_edgenext_small_has_the_releases_keys_and_shapes():
    with torch.device("meta"):
        ours = {name: tuple(value.shape) for name, value in EdgeNeXt().state_dict().items()}
    assert ours == {key: shape for key, shape in released.edgenext_small().items() if key[:4] != "head"}
    assert sum(map(math.prod, ours.values())) == 5_281_832


def test_edgenext_blocks_start_at_their_layer_scale():
    model = EdgeNeXt((1, 1, 1, 1), (8, 8, 8, 8), layer_scale=1e-3)
    gammas = [value for name, value in model.named_parameters() if "gamma" in name]
    assert len(gammas) == 7 and all((gamma == 1e-3).all() for gamma in gammas)
    assert all((value == 1).all() for name, value in model.named_parameters() if "temperature" in name)
    assert Config.paper().layer_scale == 1e-6


# ----------------------------------------------------------------------------------------- transformer layers


def test_post_norm_block_against_a_plain_computation(randomise):
    layers = randomise(Transformer(2, 24, 3).double())
    x = torch.randn(3, 7, 24, dtype=torch.float64)
    seen = torch.arange(7) < torch.tensor([[7], [4], [1]])
    with torch.no_grad():
        near(layers(x), plain.bert(x, plain.weights(layers), 2, 3))
        near(layers(x, seen), plain.bert(x, plain.weights(layers), 2, 3, seen))


def test_pre_norm_block_against_a_plain_computation(randomise):
    x, seen = torch.randn(3, 7, 24, dtype=torch.float64), torch.arange(7) < torch.tensor([[7], [4], [1]])
    with torch.no_grad():
        layers = randomise(Transformer(2, 24, 3, pre_norm=True).double())
        near(layers(x, seen), plain.pre_norm(x, plain.weights(layers), 2, 3, seen))
        layers = randomise(Transformer(2, 24, 3, pre_norm=True, activation=quick_gelu, eps=1e-5).double())
        near(layers(x), plain.clip(x, plain.weights(layers), 2, 3))


def test_norms_have_their_releases_eps(tiny):
    def eps(module):
        return {norm.eps for norm in module.modules() if isinstance(norm, nn.LayerNorm)}

    model = EViLM(tiny)
    assert eps(model.video_encoder) == {1e-6}                                               # EdgeNeXt's
    assert eps(model.text_embedding) == eps(model.text_encoder) == eps(model.decoder) == {1e-12}    # BERT's
    assert eps(ViT(64, 32, 24, 2, 3)) == {1e-5}                                             # CLIP's


def test_dropout_is_on_in_training_alone_and_never_in_the_video_encoder(tiny):
    model = EViLM(replace(tiny, dropout=0.5))
    frames, ids = torch.rand(1, 2, 3, 64, 64), torch.tensor([[CLS, 9, 8, SEP]])

    def twice(work, *inputs):
        return unlike(work(*inputs), work(*inputs))

    with torch.no_grad():
        video = model.encode_video(frames)
        text = [ids, ids > 0]
        for training in (True, False):
            model.train(training)
            assert twice(model.text_embedding, ids) == training
            assert twice(model.text_encoder, torch.randn(1, 4, 16)) == training
            assert twice(lambda v, t: model.fuse(v, t, ids > 0)[0], video, torch.randn(1, 4, 36)) == training
            assert twice(model.encode_text, *text) == training
            assert not twice(model.encode_video, frames)


def test_dropout_is_on_both_branches_of_a_layer():
    layer, x = Transformer(1, 24, 3, dropout=1.0).train(), torch.randn(2, 5, 24)
    near(layer(x), layer[0].norm2(layer[0].norm1(x)))                   # all is dropped but the residual sum


# ------------------------------------------------------------------------------------------- language encoder


VOCAB = SPECIAL + ["a", "red", "ball", "roll", "##ing", "##s", "un", "##aff", "##able", "##a", ",", "##ff",
                   "ete"]


@pytest.mark.parametrize("text, words", [
    ("A Red BALL", ["a", "red", "ball"]),
    ("Été, naïve Ångström", ["ete", ",", "naive", "angstrom"]),
    ("e\u0301te\u0301", ["ete"]),
    ("don't stop!?", ["don", "'", "t", "stop", "!", "?"]),
    ("x-ray snake_case a.b", ["x", "-", "ray", "snake", "_", "case", "a", ".", "b"]),
    ("$5+3^2=~|`<", ["$", "5", "+", "3", "^", "2", "=", "~", "|", "`", "<"]),
    ("“so”—well…", ["“", "so", "”", "—", "well", "…"]),
    ("two红色balls", ["two", "红", "色", "balls"]),
    ("カタカナ", ["カタカナ"]),                                     # BERT sets only ideographs apart
    ("a\u00a0b\tc\nd\u3000e", ["a", "b", "c", "d", "e"]),
    ("ze\u200bro\x00\ufffd", ["zero"]),
    ("[SEP] ##s", ["[", "sep", "]", "#", "#", "s"]),
    (" \n ", []),
])
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
    assert wordpiece.encode("", 30) == [CLS, SEP]
    assert MASK not in wordpiece.encode("[MASK]", 30) and wordpiece.encode("[SEP]", 30).count(SEP) == 1


@pytest.mark.parametrize("max_len", [2, 3, 5, 7, 8, 9])
def test_wordpiece_cuts_so_that_sep_stays(max_len):
    wordpiece = WordPiece(VOCAB)
    whole = wordpiece.encode("red balls, été xyz", 30)                   # 8 with [CLS] and [SEP]
    assert wordpiece.encode("red balls, été xyz", max_len) == whole[:-1][:max_len - 1] + [SEP]


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


def test_thirty_per_cent_of_bert_is_9157_words():
    vocab = (["[PAD]"] + [f"[unused{i}]" for i in range(994)] + SPECIAL[1:]
             + [f"w{i}" for i in range(30522 - 999)])
    kept = WordPiece(vocab).keep_frequent(["w29000 w29000 w4"]).vocab
    assert len(kept) == 9157 == Config.paper().vocab_rows
    assert kept[:9] == SPECIAL + ["w29000", "w4", "w0", "w1"] and kept[-1] == "w9150"


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


def test_padding_changes_nothing(tiny, randomise):
    model = randomise(EViLM(tiny))
    ids, other = torch.tensor([[CLS, 9, 8, SEP, 0, 0]]), torch.tensor([[CLS, 9, 8, SEP, 22, 31]])
    mask, video = ids > 0, torch.randn(1, 8, 36)
    with torch.no_grad():
        texts = [model.encode_text(*text) for text in ((ids, mask), (other, mask), (ids[:, :4], mask[:, :4]))]
        near(texts[0][:, :4], texts[1][:, :4], atol=1e-6)
        near(texts[0][:, :4], texts[2], atol=1e-5)
        seen = [model.fuse(v, text, m) for v in (video, None)
                for text, m in ((texts[0], mask), (texts[1], mask), (texts[2], mask[:, :4]))]
        for with_padding in (0, 1, 3, 4):
            without = seen[2 if with_padding < 3 else 5]
            near(seen[with_padding][0], without[0], atol=1e-5)
            near(seen[with_padding][1][:, :4], without[1], atol=1e-5)
        near(seen[0][2], seen[2][2], atol=1e-5)
        assert unlike(model.fuse(video, texts[1], other > 0)[0], seen[0][0])        # as words they do count


# ----------------------------------------------------------------------------------------------- Eq. (1), (2)


def test_eq1_video_is_projected_cells_in_order_of_time_row_column_plus_sines(tiny, randomise):
    model, frames = randomise(EViLM(tiny)), torch.rand(3, 2, 3, 64, 64)
    w, expected = plain.weights(model), torch.zeros(3, 8, 36)
    with torch.no_grad():
        video = model.encode_video(frames)
        for b in range(3):
            for t in range(2):
                frame = torch.stack([(frames[b, t, c] - (0.485, 0.456, 0.406)[c]) / (0.229, 0.224, 0.225)[c]
                                     for c in range(3)])
                cells = model.video_encoder(frame[None])[0]                                 # (28, 2, 2)
                for y in range(2):
                    for x in range(2):
                        expected[b, 4 * t + 2 * y + x] = plain.linear(cells[:, y, x].double(), w,
                                                                      "video_proj")
    assert video.shape == (3, 8, 36)
    near(video, expected + tiny.video_positions * plain.sines(2, 2, 36), atol=1e-4)


def test_without_positions_a_clip_played_backwards_is_the_same_set_of_cells(tiny):
    config = replace(tiny, video_positions=0.0)
    model, frames = EViLM(config).eval(), torch.rand(2, config.frames, 3, config.size, config.size)
    forwards, backwards = (model.encode_video(x).view(2, config.frames, -1, config.width)
                           for x in (frames, frames.flip(1)))
    near(forwards.flip(1), backwards, atol=1e-5)


@pytest.mark.parametrize("T, g, width", [(4, 8, 384), (2, 3, 16), (3, 2, 12)])
def test_eq1_sines_tell_every_cell_from_every_other(T, g, width):
    sines = space_time_sines(T, g, width)
    assert sines.shape == (T * g * g, width)
    near(sines, plain.sines(T, g, width), atol=1e-5)
    apart = torch.cdist(sines.double(), sines.double()) + torch.eye(len(sines))
    assert apart.min() > 0.1


class MeanColour(nn.Module):
    """Stands in for EdgeNeXt where a cell must see itself alone."""

    def forward(self, x):
        return F.avg_pool2d(x, 32).repeat(1, 10, 1, 1)[:, :28]


def test_eq1_swapped_frames_and_swapped_cells_are_another_video(tiny, randomise):
    model, colours = randomise(EViLM(tiny)), torch.rand(1, 2, 3, 2, 2)
    model.video_encoder, frames = MeanColour(), colours.repeat_interleave(32, -1).repeat_interleave(32, -2)
    sines = tiny.video_positions * space_time_sines(2, 2, 36)
    later = frames.flip(1)
    moved = frames.clone()
    moved[:, 0, :, :32, 32:], moved[:, 0, :, 32:, :32] = frames[:, 0, :, 32:, :32], frames[:, 0, :, :32, 32:]
    with torch.no_grad():
        video = model.encode_video(frames)
        for other, order in ((later, [4, 5, 6, 7, 0, 1, 2, 3]), (moved, [0, 2, 1, 3, 4, 5, 6, 7])):
            found = model.encode_video(other)
            near(found - sines, (video - sines)[:, order], atol=1e-5)   # the content moves, the sines stay
            assert unlike(model.fuse(found, None, None)[0], model.fuse(video, None, None)[0])
            bare = [model.fuse(v - sines, None, None)[0] for v in (found, video)]
            near(bare[0], bare[1], atol=1e-4)                           # without sines: one and the same set


@pytest.mark.parametrize("pre_norm", [False, True])
def test_eq2_order_and_token_types(tiny, randomise, pre_norm):
    model = randomise(EViLM(replace(tiny, decoder_pre_norm=pre_norm)).double())
    video, text = torch.randn(2, 8, 36, dtype=torch.float64), torch.randn(2, 5, 36, dtype=torch.float64)
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    w, one, eight = (plain.weights(model), torch.ones(2, 1, dtype=torch.bool),
                     torch.ones(2, 8, dtype=torch.bool))
    e_cls, t_text, t_video = w["token_type"]

    def decode(*parts, seen=None):
        x = torch.cat([e_cls.expand(2, 1, -1), *parts], 1)
        if not pre_norm:
            return plain.bert(x, w, 2, 3, seen, "decoder.")
        return plain.norm(plain.pre_norm(x, w, 2, 3, seen, "decoder."), w, "decoder_norm", 1e-5)

    with torch.no_grad():
        h = decode(text + t_text, video + t_video, seen=torch.cat([one, mask, eight], 1))
        for ours, plainly in zip(model.fuse(video, text, mask), (h[:, 0], h[:, 1:6], h[:, 6:])):
            near(ours, plainly)
        logits = plain.linear(torch.tanh(plain.linear(h[:, 0], w, "pooler.0")), w, "vtm_head")
        near(model.match(video, text, mask), logits[:, 1] - logits[:, 0], atol=1e-6)

        h_cls, h_text, h_video = model.fuse(None, text, mask)               # 4.4: text alone
        h = decode(text + t_text, seen=torch.cat([one, mask], 1))
        near(h_cls, h[:, 0])
        near(h_text, h[:, 1:])
        assert h_video is None

        h_cls, h_text, h_video = model.fuse(video, None, None)              # video alone
        h = decode(video + t_video)
        near(h_cls, h[:, 0])
        near(h_video, h[:, 1:])
        assert h_text is None


# ---------------------------------------------------------------------------------------------------- Table 8


def test_table8_rows():
    with torch.device("meta"):
        rows = {name: count for name, count, _ in table8(Config.paper())}
    assert list(rows.values())[:10] == [1_238_144, 2_379_264, 49_536, 1_152, 5_281_832, 117_120, 7_097_856,
                                        147_840, 770, 16_313_514]
    assert rows["TOTAL"] == 16_313_514 and len(rows) == 12


def test_table8_total_is_the_model_without_its_masked_heads():
    with torch.device("meta"):
        model = EViLM(Config.paper())
        rows = {name: count for name, count, _ in table8(Config.paper())}
    heads = [sum(p.numel() for p in head.parameters()) for head in (model.mlm_head, model.mvm_head)]
    assert sum(p.numel() for p in model.parameters()) == 16_313_514 + sum(heads)
    assert list(rows.values())[10:] == heads


def test_the_papers_multiply_adds():
    with torch.device("meta"):
        cost = multiply_adds(Config.paper())
    assert 1.25 <= cost["visual"] / 4 <= 1.26
    assert 0.07 <= cost["textual"] < 0.08 and round(cost["decoder"], 2) == 2.28
    assert round(cost["model"], 1) == 7.4 and 14.65 < 2 * cost["model"] < 14.8


def test_the_trace_names_the_line_of_each_step(tiny, capsys):
    trace(tiny)
    source = Path(evilm.__file__).read_text().splitlines()
    steps = {}
    for line in capsys.readouterr().out.splitlines()[1:-1]:
        step, number, ms = line[14:52].split(), int(line[52:61]), float(line[61:69])
        steps[step[0]] = source[number - 1], ms, step
    for name, (text, _, step) in steps.items():
        said = f"class {step[1]}(" if len(step) == 2 else f"def {name}("
        assert said in text or name.split(".")[-1] in text or "downsample" in text or "self.patch" in text, name
    for name in ("encode_video", "encode_text", "fuse", "read_words"):
        assert f"def {name}(" in steps[name][0]
    inside = sum(ms for name, (_, ms, _) in steps.items() if name.startswith("video_"))
    assert inside < steps["encode_video"][1]
