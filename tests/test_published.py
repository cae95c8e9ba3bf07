"""Published weights: networks against plain ones computed from the files' own tensors; what is refused."""
import argparse
import json
import struct
from dataclasses import replace

import plain
import pytest
import released
import torch

import toy_data
from evilm import (SPECIAL, Config, EdgeNeXt, EViLM, InputError, VideoSwin, ViT, WordPiece, load_published,
                   read_safetensors)
from test_scripts import run, same, train_only

PAPER = replace(Config.paper(), decoder_layers=1, codes=8)      # both encoders as published, the rest small
SMALL = {EdgeNeXt: lambda: EdgeNeXt((1, 1, 1, 1), (8, 8, 8, 8), heads=2), ViT: lambda: ViT(64, 32, 24, 1, 3),
         VideoSwin: lambda: VideoSwin(8, (1, 1, 1, 1), (1, 1, 1, 1), (2, 2, 2))}


class Doubles(dict):
    """A state dict that gives its tensors in float64."""

    def __getitem__(self, key):
        return super().__getitem__(key).double()


def near(ours, plainly):
    torch.testing.assert_close(ours, plainly.to(ours.dtype), atol=2e-4, rtol=1e-4)


def snapshot(part):
    return {name: tensor.clone() for name, tensor in part.state_dict().items()}


def under(prefix, tensors):
    return {prefix + name: tensor for name, tensor in tensors.items()}


def refused(part, path, vocab=None):
    """The one line of the refusal, which names the file; nothing was filled."""
    before = snapshot(part)
    with pytest.raises(InputError) as error:
        load_published(part, path, vocab)
    assert same(before, snapshot(part))
    line = str(error.value)
    assert str(path) in line and "\n" not in line
    return line


def written(path, tensors):
    """Writes the tensors in the format of the name's ending."""
    (released.write_safetensors if path.suffix == ".safetensors" else torch.save)(tensors, path)
    return path


def loaded(part, path, tensors, vocab=None):
    """`load_published` of a file that is written and removed: CLIP's is 175 MB."""
    try:
        return load_published(part, written(path, tensors), vocab)
    finally:
        path.unlink()


# -------------------------------------------------------------------------------------- the networks computed

@pytest.fixture(scope="module")
def edgenext():
    torch.manual_seed(0)
    return released.random_weights(released.edgenext_small())


@pytest.fixture(scope="module")
def bert():
    torch.manual_seed(0)
    return released.random_weights(released.bert_miniature())


@pytest.mark.parametrize("name, wrapped", [
    ("state_dict.pth", lambda tensors: {"state_dict": tensors}),
    ("model.pth", lambda tensors: {"model": under("module.", tensors), "epoch": 3, "lr": [0.1]}),
    ("ema.bin", lambda tensors: {"model": tensors, "model_ema": {name: -x for name, x in tensors.items()}}),
    ("bare.safetensors", lambda tensors: tensors)])
def test_edgenext_small_computes_what_its_file_says(edgenext, tmp_path, name, wrapped):
    network, x = EdgeNeXt(), torch.randn(1, 3, 64, 64)
    report = loaded(network, tmp_path / name, wrapped(edgenext))
    with torch.no_grad():
        near(network.eval()(x), plain.edgenext(x.double(), Doubles(edgenext), (3, 3, 9, 3), (3, 5, 7, 9),
                                               (2, 2, 3, 4), 8))
    assert sorted(report.filled) == sorted(network.state_dict()) and not report.left
    unused = [key for key in report.unused if not key.startswith("model_ema.")]
    assert [key.split(".")[-2:] for key in unused] == [["head", "weight"], ["head", "bias"]]


def bert_vocabulary():
    """30,522 words in BERT's order: [PAD], [unused], four more special tokens, words."""
    return ["[PAD]", *(f"[unused{i}]" for i in range(99)), *SPECIAL[1:], *(f"w{i}" for i in range(30418))]


def of_tensorflows_time(tensors):
    return {name.removeprefix("bert.").replace("LayerNorm.weight", "LayerNorm.gamma")
            .replace("LayerNorm.bias", "LayerNorm.beta"): x for name, x in tensors.items()}


@pytest.mark.parametrize("name, heads, renamed", [
    ("bert.bin", 2, dict),                                          # 2 heads as published
    ("old.bin", 4, of_tensorflows_time),                            # 4 as in the paper
    ("bert.safetensors", 4, lambda tensors: tensors | {"bert.embeddings.position_ids": torch.arange(512)})])
def test_bert_computes_what_its_file_says_of_the_models_words(bert, tmp_path, name, heads, renamed):
    model, theirs = EViLM(replace(PAPER, text_heads=heads)).eval(), bert_vocabulary()
    # 9,157 words in another order, two of them of the model's own
    model.vocab = [*SPECIAL, "ours", *(f"w{i}" for i in range(30000, 30000 - 9150, -1)), "mine"]
    before = snapshot(model)
    report = loaded(model, tmp_path / name, renamed(bert), theirs)
    words = "[CLS] w29999 w20852 w21000 [SEP] [PAD]".split()
    ids, mask = torch.tensor([[model.vocab.index(word) for word in words]]), torch.arange(6)[None] < 5
    expected = plain.published_bert(torch.tensor([[theirs.index(word) for word in words]]), Doubles(bert),
                                    heads, mask)
    with torch.no_grad():
        near(model.text_encoder(model.text_embedding(ids), mask)[:, :5], expected[:, :5])
    assert report.left == ["the word ours", "the word mine"]
    rows = [model.vocab.index("ours"), model.vocab.index("mine")]
    assert torch.equal(model.text_embedding.words.weight[rows], before["text_embedding.words.weight"][rows])
    for key, value in model.state_dict().items():       # the text side is filled, and nothing else
        assert torch.equal(before[key], value) != key.startswith(("text_embedding.", "text_encoder."))
    unused = {key.removeprefix("bert.") for key in report.unused} - {"embeddings.position_ids"}
    assert len(unused) == 11 and all(key.startswith(("cls.", "pooler.")) for key in unused)


@pytest.mark.parametrize("naming, size, layers, name", [
    ("openai", 64, 12, "clip.pt"), ("hugging_face", 64, 12, "clip.safetensors"),
    ("openai", 256, 2, "clip.safetensors"),     # the paper preset's grid; ten layers are left over
])
def test_clip_computes_what_its_file_says(tmp_path, naming, size, layers, name):
    network, x = ViT(size, layers=layers).eval(), torch.randn(1, 3, size, size)
    w = released.random_weights(released.clip_openai(), torch.float16)          # as published
    layer, positions = "transformer.resblocks", "visual.positional_embedding"
    file = w
    if naming == "hugging_face":
        file, layer = released.in_hugging_faces_names(w), "encoder.layers"
    report = loaded(network, tmp_path / name, file | {"logit_scale": torch.tensor(4.6)})
    w = Doubles({key: x for key, x in w.items() if not any(f".{i}." in key for i in range(layers, 12))})
    across = plain.bicubic(7, size // 32)
    grid = torch.einsum("ij,jkc,lk->ilc", across, w[positions][1:].view(7, 7, -1), across).flatten(0, 1)
    with torch.no_grad():
        near(network(x), plain.clip_openai(x.double(), w, 12, torch.cat([w[positions][:1], grid]))[:, 1:])
    assert all(part.eps == 1e-5 for part in network.modules() if isinstance(part, torch.nn.LayerNorm))
    assert not report.left and sorted(report.filled) == sorted(network.state_dict())
    others = {key for key in report.unused if f".{layer}." not in key}
    assert {int(key.split(".")[3]) for key in set(report.unused) - others} == set(range(layers, 12))
    assert {key.split(".", 1)[-1] for key in others} - {"logit_scale"} == (
        {"proj", "ln_post.weight", "ln_post.bias"} if naming == "openai"
        else {"post_layernorm.weight", "post_layernorm.bias"})


def test_video_swin_tiny_computes_what_its_file_says(tmp_path):
    w = released.random_weights(released.video_swin_tiny())
    for key in w:
        if key.endswith("index"):
            w[key] = torch.arange(392).repeat(392, 1)
    c, x = Config.paper(), torch.randn(1, 2, 3, 64, 64)
    network = VideoSwin(c.swin_dim, c.swin_depths, c.swin_heads, c.swin_window).eval()
    head = {"cls_head.fc_cls.bias": torch.ones(400)}
    report = loaded(network, tmp_path / "swin.pth", {"state_dict": under("backbone.", w) | head})
    with torch.no_grad():   # 16x16 and 8x8 patches are padded and shifted; 4x4, 2x2 and 2 frames are not
        ours = network(x)
        near(ours, plain.video_swin(x.double(), Doubles(w), (2, 2, 6, 2), (3, 6, 12, 24), (8, 7, 7)))
    assert ours.shape == (1, 2, 2, 2, 768) and not report.left and len(report.filled) == 171
    assert {key.split(".")[-1] for key in report.unused} == {"relative_position_index", "bias"}


# ------------------------------------------------------------------------------- what is filled, left, unused

@pytest.fixture
def small(tiny):
    """A language encoder of two layers, 16 wide, its words and a BERT that fits it but for the words."""
    model = EViLM(replace(tiny, positions=512, vocab_rows=8, vocab_size=7))
    model.vocab = [*SPECIAL, "ball", "red"]
    return model, released.random_weights(released.bert_miniature(16, 2, 9)), \
        ["[PAD]", "red", "blue", *SPECIAL[1:], "green", "ball"]


def test_words_take_their_own_rows_and_without_words_of_either_all_in_order(small, tmp_path):
    model, w, theirs = small
    rows, initial = w["bert.embeddings.word_embeddings.weight"], model.text_embedding.words.weight[7].clone()
    path = written(tmp_path / "b.pt", w)
    for vocab in (None, theirs[:-1], theirs + ["more"]):            # words of another checkpoint
        assert "9 word embeddings" in refused(model, path, vocab)
    assert not load_published(model, path, theirs).left
    assert torch.equal(model.text_embedding.words.weight[:7], rows[[0, 3, 4, 5, 6, 8, 1]])
    assert torch.equal(model.text_embedding.words.weight[7], initial)           # a row that no word uses
    model.vocab = None
    for vocab in (theirs, None):                # the model's words are unknown; 9 rows in the file, 8 here
        assert "9 word embeddings" in refused(model, path, vocab)
    w["bert.embeddings.word_embeddings.weight"] = torch.randn(8, 16)
    loaded(model, path, w)
    assert torch.equal(model.text_embedding.words.weight, w["bert.embeddings.word_embeddings.weight"])


def test_what_the_file_lacks_is_left_and_named(small, tmp_path):
    model, w, theirs = small
    before = snapshot(model)
    for missing in ("bert.encoder.layer.1.attention.self.key.weight", "bert.embeddings.LayerNorm.bias"):
        del w[missing]
    report = loaded(model, tmp_path / "b.pt", w, theirs)
    assert report.left == ["text_embedding.norm.bias", "text_encoder.1.qkv.weight"]
    assert ", ".join(report.left) in str(report)
    assert all(torch.equal(before[name], model.state_dict()[name]) for name in report.left)
    for part in ("query", "value"):
        assert f"bert.encoder.layer.1.attention.self.{part}.weight" in report.unused
    assert len(report.unused) == 11 + 2


# -------------------------------------------------------------------------------------------- what is refused

@pytest.mark.parametrize("key, fits", [
    ("module.stages.1.2.xca.temperature", EdgeNeXt), ("bert.embeddings.LayerNorm.weight", EViLM),
    ("visual.ln_pre.weight", ViT), ("vision_model.pre_layrnorm.weight", ViT),
    ("backbone.layers.0.blocks.0.attn.relative_position_bias_table", VideoSwin),
    ("stages.1.blocks.2.xca.temperature", None),                    # EdgeNeXt under timm's names
    ("stages.0.0.dwconv.weight", None), ("blocks.0.attn.qkv.weight", None), ("line\nbreak\x1b[31m", None)])
def test_a_file_of_something_else_is_refused_with_the_keys_that_it_holds(tiny, tmp_path, key, fits):
    path = written(tmp_path / "file.pt", {"model": {key: torch.zeros(3, 3), "norm.bias": torch.zeros(3)}})
    for kind, wanted in ((EdgeNeXt, "EdgeNeXt-Small"), (EViLM, "BERT L-12 H-128"), (ViT, "CLIP ViT-B/32"),
                         (VideoSwin, "Video Swin-T")):
        if kind is not fits:
            line = refused(EViLM(tiny) if kind is EViLM else SMALL[kind](), path)
            assert wanted in line and f"2 (model.{repr(key)[1:-1]}, model.norm.bias)" in line


def test_sizes_that_do_not_fit_name_the_tensor_and_fill_nothing(edgenext, bert, tmp_path):
    toy = Config.toy()
    line = refused(EViLM(toy).video_encoder, written(tmp_path / "e.pt", edgenext))
    assert all(word in line for word in ("downsample_layers.0.0.weight", "(48, 3, 4, 4)", "(8, 3, 4, 4)",
                                         "EdgeNeXt-Small fits --preset paper"))
    model = EViLM(toy)
    model.vocab = bert_vocabulary()[:1024]
    line = refused(model, written(tmp_path / "b.pt", bert), bert_vocabulary())
    assert "bert.embeddings.word_embeddings.weight" in line and "--preset paper" in line
    for name, wrong in (("norm.bias", torch.zeros(305)), ("norm.weight", torch.zeros(304, dtype=torch.int8))):
        line = refused(EdgeNeXt(), written(tmp_path / "e.pt", edgenext | {name: wrong}))    # the last of all
        assert name in line and str(tuple(wrong.shape)) in line and str(wrong.dtype) in line


@pytest.mark.parametrize("shape", [(49, 24), (50, 23), (50,), (1, 24), (), (0, 24), (50, 24)])
def test_position_embeddings_that_are_no_grid_are_refused(tmp_path, shape):
    wrong = torch.zeros(shape, dtype=torch.long if shape == (50, 24) else torch.float32)
    w = released.random_weights(released.clip_openai(24, 1)) | {"visual.positional_embedding": wrong}
    assert "visual.positional_embedding" in refused(SMALL[ViT](), written(tmp_path / "c.pt", w))


def test_what_cannot_be_read_is_refused_in_one_line(tmp_path):
    network, path = SMALL[EdgeNeXt](), tmp_path / "e.pt"
    for missing in ("missing.pt", "missing.safetensors", "."):
        refused(network, tmp_path / missing)
    torch.save({"model": {}, "args": argparse.Namespace(epochs=3)}, path)
    assert "safely" in refused(network, path)                      # an object, whose pickle could run code
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)               # as CLIP's authors publish it
    assert "TorchScript" in refused(network, path)
    path.write_bytes(b"neither this nor that")
    assert "not a checkpoint" in refused(network, path)
    endless = {}
    endless["model"] = endless["ema"] = endless
    for nothing in ({"model": {}}, [1, 2], endless):
        assert "none" in refused(network, written(path, nothing))


def test_safetensors_of_every_kind_are_read(tmp_path):
    tensors = {"a.b": torch.randn(3, 5), "half": torch.randn(2, 3, 1).half(), "bf": torch.randn(7).bfloat16(),
               "ids": torch.arange(9)[None], "scale": torch.tensor(4.6), "none": torch.zeros(0, 4)}
    assert same(read_safetensors(written(tmp_path / "t.safetensors", tensors)), tensors)


def entry(dtype="F32", shape=(2,), offsets=(0, 8), name="x"):
    return {name: {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


@pytest.mark.parametrize("header", [
    entry(shape=(4,), offsets=(0, 16)), entry(shape=(2 ** 40,), offsets=(0, 2 ** 42)), entry(offsets=(-8, 0)),
    entry(shape=(1,), offsets=(-8, -4)), entry(offsets=(8, 0)), entry(offsets=(0, 4, 8)), entry(["F32"]),
    entry(offsets=("0", "8")), entry("F7"), entry("I64"), entry(shape=(3,)), entry(shape=(-1, -2)),
    entry(shape=(0, 10 ** 30)), entry(offsets=(8, 16), name="a\nb"), {"x": {"shape": [2]}}, {"x": 7}, [1, 2],
    b"", b"{", b"{]", b"\xff\xfe", b"[" * 100_000, b"1" * 9000], ids=lambda header: str(header)[:60])
def test_safetensors_with_a_wrong_header_are_refused(tmp_path, header):
    path = tmp_path / "t.safetensors"
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    assert "not a whole .safetensors file" in refused(SMALL[ViT](), path)


# -------------------------------------------------------------------------------------------------- the flags

# The paper preset with what is not published made small; a learning rate of 0 keeps the initial weights.
PAPER_FLAGS = ["--preset=paper", "--lr=0", *(f"--config={size}" for size in (
    "size=64", "frames=2", "width=24", "decoder_layers=1", "codes=8", "vit_layers=1", "tokenizer_width=24",
    "tokenizer_layers=1"))]


def test_both_stages_start_from_published_weights(edgenext, bert, tmp_path):
    def trained(script, *flags):
        flags += tuple("--data clips --workers 0 --batch-size 4 --max-steps 1 --device cpu".split())
        return run(script, *flags, folder=tmp_path, hook=train_only)

    clip = released.random_weights(released.clip_openai(layers=1))
    toy_data.render(tmp_path / "clips", 45)
    lines = (tmp_path / "clips/train.jsonl").read_text().splitlines()
    words = sorted({word for line in lines for word in WordPiece.split(json.loads(line)["caption"])})
    theirs = bert_vocabulary()[:30522 - len(words)] + words
    (tmp_path / "vocab.txt").write_text("\n".join(theirs) + "\n")
    for name, tensors in (("edgenext.pth", edgenext), ("bert.safetensors", bert), ("clip.pt", clip)):
        written(tmp_path / name, tensors)

    printed = trained("pretrain.py", *PAPER_FLAGS, "--tokenizer=none", "--objectives=mlm", "--out=run",
                      "--vocab=vocab.txt", "--init-text=bert.safetensors", "--init-video=edgenext.pth")
    checkpoint = torch.load(tmp_path / "run/last.pt", weights_only=True)
    w, vocab = checkpoint["model"], checkpoint["vocab"]
    assert all(torch.equal(w[f"video_encoder.{name}"], edgenext[name])
               for name in edgenext.keys() - {"head.weight", "head.bias"})
    assert len(vocab) == 9157 and set(words) <= set(vocab)
    assert torch.equal(w["text_embedding.words.weight"],
                       bert["bert.embeddings.word_embeddings.weight"][[theirs.index(word) for word in vocab]])
    assert "2 (head.weight, head.bias)" in printed

    trained("train_tokenizer.py", *PAPER_FLAGS, "--init-tokenizer=clip.pt", "--out=tokenizer")
    w = torch.load(tmp_path / "tokenizer/last.pt", weights_only=True)["model"]
    assert torch.equal(w["encoder.patch.weight"], clip["visual.conv1.weight"])
    assert torch.equal(w["encoder.blocks.0.norm2.bias"], clip["visual.transformer.resblocks.0.ln_2.bias"])

    trained("train_tokenizer.py", *PAPER_FLAGS, "--lr=0.001", "--init-tokenizer=clip.pt", "--freeze-encoder",
            "--out=frozen")
    frozen = torch.load(tmp_path / "frozen/last.pt", weights_only=True)["model"]
    assert {name for name in w if torch.equal(frozen[name], w[name])} == {
        name for name in w if name.startswith("encoder.")}
