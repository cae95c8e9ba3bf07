"""Published weights: networks against plain ones computed from the files' own tensors; what is refused."""
import argparse
import json
import struct
from dataclasses import replace

import plain
import pytest
import released
import torch
from test_training import Malicious

import pretrain
import toy_data
import train_tokenizer
from evilm import (SPECIAL, Config, EdgeNeXt, EViLM, InputError, SemanticTokenizer, ViT, WordPiece, folded,
                   VideoSwin, load_published, read_safetensors, run_script, save, set_up)

PAPER = replace(Config.paper(), decoder_layers=1, codes=8)      # both encoders as published, little beside


class Doubles(dict):
    """A state dict that gives its tensors in float64."""

    def __getitem__(self, key):
        return super().__getitem__(key).double()


def near(ours, plainly):
    torch.testing.assert_close(ours, plainly.to(ours.dtype), atol=2e-4, rtol=1e-4)


def snapshot(part):
    return {name: tensor.clone() for name, tensor in part.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def under(prefix, tensors):
    return {prefix + name: tensor for name, tensor in tensors.items()}


def refused(part, path, vocab=None):
    """The one line that says why; nothing was filled."""
    before = snapshot(part)
    with pytest.raises(InputError) as error:
        load_published(part, path, vocab)
    assert same(before, snapshot(part))
    line = str(error.value)
    assert str(path) in line and "\n" not in line
    return line


def written(path, tensors):
    """The tensors in a file of the kind that its name's ending tells."""
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
    ("ema.pt", lambda tensors: {"model_ema": tensors}),
    ("bare.safetensors", lambda tensors: tensors),
])
def test_edgenext_small_computes_what_its_file_says(edgenext, tmp_path, name, wrapped):
    network, x = EdgeNeXt(), torch.randn(1, 3, 64, 64)
    report = loaded(network, tmp_path / name, wrapped(edgenext))
    with torch.no_grad():
        near(network.eval()(x), plain.edgenext(x.double(), Doubles(edgenext), (3, 3, 9, 3), (3, 5, 7, 9),
                                               (2, 2, 3, 4), 8))
    assert sorted(report.filled) == sorted(network.state_dict()) and not report.left
    assert [key.split(".")[-2:] for key in report.unused] == [["head", "weight"], ["head", "bias"]]
    assert "head.weight, " in str(report) and "left at their start: none" in str(report)


def bert_vocabulary():
    """30,522 words in BERT's order: [PAD], [unused], four more special tokens, words."""
    return (["[PAD]"] + [f"[unused{i}]" for i in range(99)] + SPECIAL[1:]
            + [f"w{i}" for i in range(30522 - 104)])


def truncated():
    """9,157 of them in another order, two of them of the model's own."""
    return SPECIAL + ["ours"] + [f"w{i}" for i in range(30000, 30000 - 9150, -1)] + ["mine"]


def of_tensorflows_time(tensors):
    return {name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): x
            for name, x in tensors.items()}


def without_prefix(tensors):
    return {name.removeprefix("bert."): x for name, x in tensors.items()}


@pytest.mark.parametrize("name, heads, renamed", [
    ("bert.bin", 2, lambda tensors: tensors),                               # 2 heads as published
    ("old.bin", 4, lambda tensors: without_prefix(of_tensorflows_time(tensors))),   # 4 as in the paper
    ("bert.safetensors", 4, lambda tensors: tensors | {"bert.embeddings.position_ids": torch.arange(512)}),
])
def test_bert_computes_what_its_file_says_of_the_models_words(bert, tmp_path, name, heads, renamed):
    model = EViLM(replace(PAPER, text_heads=heads)).eval()
    model.vocab, theirs = truncated(), bert_vocabulary()
    before = snapshot(model)
    report = loaded(model, tmp_path / name, renamed(bert), theirs)
    words = "[CLS] w29999 w20852 w21000 [SEP] [PAD]".split()
    ids, mask = torch.tensor([[model.vocab.index(word) for word in words]]), torch.arange(6)[None] < 5
    expected = plain.published_bert(torch.tensor([[theirs.index(word) for word in words]]), Doubles(bert),
                                    heads, mask)
    with torch.no_grad():
        near(model.text_encoder(model.text_embedding(ids), mask)[:, :5], expected[:, :5])
    assert report.words == ["ours", "mine"] and "9,155 of the model's 9,157 words" in str(report)
    assert "left at their start: ours, mine" in str(report)
    for word in report.words:
        row = model.vocab.index(word)
        assert torch.equal(model.text_embedding.words.weight[row], before["text_embedding.words.weight"][row])
    for key, value in model.state_dict().items():       # the text side is filled, and nothing else
        assert torch.equal(before[key], value) != key.startswith(("text_embedding.", "text_encoder."))
    unused = without_prefix(dict.fromkeys(report.unused)).keys() - {"embeddings.position_ids"}
    assert len(unused) == 11 and all(key.startswith(("cls.", "pooler.")) for key in unused)
    assert "cls.seq_relationship.bias" in str(report) and ("position_ids" in str(report)) == ("safe" in name)


@pytest.mark.parametrize("naming, size, layers, name", [
    ("openai", 64, 12, "clip.pt"),
    ("hugging_face", 64, 12, "clip.safetensors"),
    ("openai", 256, 2, "clip.safetensors"),     # the paper preset's grid; ten layers are left over
    ("hugging_face", 224, 2, "clip.bin"),       # the published grid
])
def test_clip_computes_what_its_file_says(tmp_path, naming, size, layers, name):
    network, x = ViT(size, layers=layers).eval(), torch.randn(1, 3, size, size)
    if naming == "openai":
        w = released.random_weights(released.clip_openai(), torch.float16)          # as published
        layer, positions, forward = "transformer.resblocks", "visual.positional_embedding", plain.clip_openai
    else:
        w = under("vision_model.", released.random_weights(released.clip_hugging_face(), torch.float16))
        layer, forward = "encoder.layers", plain.clip_hugging_face
        positions = "vision_model.embeddings.position_embedding.weight"
    report = loaded(network, tmp_path / name, w | {"logit_scale": torch.tensor(4.6)})
    w = Doubles({key: x for key, x in w.items() if not any(f".{i}." in key for i in range(layers, 12))})
    across = plain.bicubic(7, size // 32)
    grid = torch.einsum("ij,jkc,lk->ilc", across, w[positions][1:].view(7, 7, -1), across).flatten(0, 1)
    with torch.no_grad():
        near(network(x), forward(x.double(), w, 12, torch.cat([w[positions][:1], grid]))[:, 1:])
    assert not report.left and sorted(report.filled) == sorted(network.state_dict())
    assert ("interpolated from 7x7 to" in str(report)) == (size != 224)
    left_over = f".{layer}.{{2,3,4,5,6,7,8,9,10,11}}." if layers == 2 else "logit_scale"
    assert left_over in str(report) and "logit_scale" in report.unused
    others = {key for key in report.unused if layer not in key} - {"logit_scale"}
    assert others == ({"visual.proj", "visual.ln_post.weight", "visual.ln_post.bias"} if naming == "openai"
                      else {"vision_model.post_layernorm.weight", "vision_model.post_layernorm.bias"})


def test_video_swin_tiny_computes_what_its_file_says(tmp_path):
    w = released.random_weights(released.video_swin_tiny())
    for key in w:
        if key.endswith("index"):
            w[key] = torch.arange(392).repeat(392, 1)
    network, x = VideoSwin().eval(), torch.randn(1, 2, 3, 64, 64)
    head = {"cls_head.fc_cls.bias": torch.ones(400)}
    report = loaded(network, tmp_path / "swin.pth", {"state_dict": under("backbone.", w) | head})
    with torch.no_grad():       # 16x16 and 8x8 cells are padded and shifted; 4x4, 2x2 and 2 frames are not
        ours = network(x)
        near(ours, plain.video_swin(x.double(), Doubles(w), (2, 2, 6, 2), (3, 6, 12, 24), (8, 7, 7)))
    assert ours.shape == (1, 2, 2, 2, 768) and not report.left
    assert "a Swin transformer, under state_dict.backbone.*: 171 of the network's 171 tensors" in str(report)
    assert {key.split(".")[-1] for key in report.unused} == {"relative_position_index", "bias"}
    assert "backbone.layers.0.blocks.{0,1}.attn.relative_position_index" in str(report)


# ------------------------------------------------------------------------------- what is filled, left, unused


@pytest.fixture
def small(tiny):
    """A language encoder of two layers, 16 wide, its words and a BERT that fits it but for the words."""
    model = EViLM(replace(tiny, positions=512, vocab_rows=8, words=7))
    model.vocab = [*SPECIAL, "ball", "red"]
    return model, released.random_weights(released.bert_miniature(16, 2, 9)), \
        ["[PAD]", "red", "blue", *SPECIAL[1:], "green", "ball"]


def test_words_take_their_own_rows(small, tmp_path):
    model, w, theirs = small
    rows, start = w["bert.embeddings.word_embeddings.weight"], model.text_embedding.words.weight[7].clone()
    report = loaded(model, tmp_path / "b.pt", w, theirs)
    assert torch.equal(model.text_embedding.words.weight[:7], rows[[0, 3, 4, 5, 6, 8, 1]])
    assert torch.equal(model.text_embedding.words.weight[7], start)             # a row that no word uses
    assert not report.words and "left at their start: none" in report.notes[0]


def test_without_words_of_either_rows_are_taken_in_order(small, tmp_path):
    model, w, theirs = small
    model.vocab = None
    assert "9 words" in refused(model, written(tmp_path / "b.pt", w), theirs)   # whose are the model's?
    assert "9 words" in refused(model, tmp_path / "b.pt")                       # 9 rows, 8 here
    w["bert.embeddings.word_embeddings.weight"] = torch.randn(8, 16)
    loaded(model, tmp_path / "b.pt", w)
    assert torch.equal(model.text_embedding.words.weight, w["bert.embeddings.word_embeddings.weight"])


def test_a_vocabulary_of_another_checkpoint_is_refused(small, tmp_path):
    model, w, theirs = small
    written(tmp_path / "b.pt", w)
    for vocab in (None, theirs[:-1], theirs + ["more"]):
        assert "9 words" in refused(model, tmp_path / "b.pt", vocab)


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
    used = {name for name in w if name not in report.unused}
    assert len(used) == len(w) - 11 - 2


def test_two_copies_in_one_file_are_told_apart(tmp_path):
    sizes = (1, 1, 1, 1), (8, 8, 8, 8), (3, 3, 3, 3), (2, 2, 2, 2), 2
    network, one, other = EdgeNeXt(*sizes), EdgeNeXt(*sizes), EdgeNeXt(*sizes)
    report = loaded(network, tmp_path / "e.pt", {"model": one.state_dict(), "model_ema": other.state_dict()})
    assert same(network.state_dict(), one.state_dict()) and "under model.*" in str(report)
    assert report.unused == [f"model_ema.{name}" for name in other.state_dict()]


def test_names_are_folded_without_loss():
    names = ["a.0.w", "a.1.w", "a.0.b1", "c", "a.2.3.w", "a.2.4.w"]
    assert folded(names) == "a.{0,1}.w, a.0.b1, c, a.2.{3,4}.w"
    assert folded([]) == "none"


# -------------------------------------------------------------------------------------------- what is refused


OTHERS = {
    "an EdgeNeXt": "module.stages.1.2.xca.temperature",
    "an EdgeNeXt under timm's names": "stages.1.blocks.2.xca.temperature",
    "a BERT": "bert.embeddings.word_embeddings.weight",
    "a CLIP vision model": "vision_model.pre_layrnorm.weight",
    "a CLIP text model": "text_model.embeddings.token_embedding.weight",
    "a checkpoint of this project": "model.token_type",
    "a Swin transformer": "backbone.layers.0.blocks.0.attn.relative_position_bias_table",
    "a ConvNeXt": "stages.0.0.dwconv.weight",
    "a ResNet": "layer1.0.conv1.weight",
    "a vision transformer, not CLIP's": "blocks.0.attn.qkv.weight",
    "nothing known": "conv.weight",
}


@pytest.mark.parametrize("looks", OTHERS)
def test_a_file_of_something_else_says_what_it_looks_like(tiny, tmp_path, looks):
    tensors = {OTHERS[looks]: torch.zeros(3, 3), "norm.bias": torch.zeros(3)}
    path = written(tmp_path / "file.pt", {"model": tensors})
    for wanted, part in (("an EdgeNeXt", EdgeNeXt((1, 1, 1, 1), (8, 8, 8, 8), heads=2)),
                         ("a BERT", EViLM(tiny)), ("a CLIP vision model", ViT(64, 32, 24, 1, 3)),
                         ("a Swin transformer", VideoSwin(8, (1, 1, 1, 1), (1, 1, 1, 1), (2, 2, 2)))):
        if looks != wanted:
            line = refused(part, path)
            assert f"looks like {looks}, where {wanted} is wanted" in line
            assert looks != "nothing known" or "conv.weight" in line


def test_the_projects_own_checkpoints_are_none_of_the_published(tiny, tmp_path):
    for model in (EViLM(tiny), SemanticTokenizer(tiny)):
        save({"kind": "pretrain", "config": {}, "model": model.state_dict()}, tmp_path / "best.pt")
        for part in (EdgeNeXt(), ViT(64, 32, 24, 1, 3)):
            assert "a checkpoint of this project" in refused(part, tmp_path / "best.pt")


def test_sizes_that_do_not_fit_name_the_tensor_and_fill_nothing(edgenext, bert, tmp_path):
    toy = Config.toy()
    line = refused(EViLM(toy).video_encoder, written(tmp_path / "e.pt", edgenext))
    assert all(word in line for word in ("downsample_layers.0.0.weight", "(48, 3, 4, 4)", "(16, 3, 4, 4)",
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
    assert "visual.positional_embedding" in refused(ViT(64, 32, 24, 1, 3), written(tmp_path / "c.pt", w))


def test_a_published_file_cannot_run_code(edgenext, tmp_path):
    trap, path = tmp_path / "owned", tmp_path / "e.pth"
    torch.save({"state_dict": edgenext, "extra": Malicious(trap)}, path)
    assert "safely" in refused(EdgeNeXt(), path) and not trap.exists()
    torch.load(path, weights_only=False)
    assert trap.exists()                            # the pickle does what it says, where it is let


def test_what_cannot_be_read_is_said_in_one_line(tmp_path):
    network = EdgeNeXt((1, 1, 1, 1), (8, 8, 8, 8), heads=2)
    assert "no such file" in refused(network, tmp_path / "missing.pt")
    assert "no such file" in refused(network, tmp_path)
    path = tmp_path / "e.pt"
    torch.save({"model": {}, "args": argparse.Namespace(epochs=3)}, path)
    assert "argparse.Namespace" in refused(network, path)
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)               # as CLIP's authors publish it
    assert "torch.jit.load(FILE).state_dict()" in refused(network, path)
    path.write_bytes(b"neither this nor that")
    assert "not a checkpoint" in refused(network, path)
    assert "0 tensors" in refused(network, written(path, {"model": {}}))


# ------------------------------------------------------------------------------------------------ safetensors


def test_safetensors_of_every_kind_are_read(tmp_path):
    tensors = {"a.b": torch.randn(3, 5), "half": torch.randn(2, 3, 1).half(), "bf": torch.randn(7).bfloat16(),
               "ids": torch.arange(9)[None], "scale": torch.tensor(4.6), "none": torch.zeros(0, 4)}
    assert same(read_safetensors(written(tmp_path / "t.safetensors", tensors)), tensors)
    path = tmp_path / "odd.safetensors"             # not aligned, and not in the order of the numbers
    header = json.dumps({"x": {"dtype": "F32", "shape": [2], "data_offsets": [1, 9]},
                         "y": {"dtype": "U8", "shape": [], "data_offsets": [0, 1]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + struct.pack("<Bff", 200, 1.5, -2.0))
    x = read_safetensors(path)
    assert x["x"].tolist() == [1.5, -2.0] and x["y"].item() == 200


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


WRONG_HEADERS = {
    "an offset beyond the end": {"x": entry(shape=(4,), offsets=(0, 16))},
    "an offset far beyond the end": {"x": entry(shape=(2 ** 40,), offsets=(0, 2 ** 42))},
    "a negative offset": {"x": entry(offsets=(-8, 0))},
    "offsets the wrong way round": {"x": entry(offsets=(8, 0))},
    "three offsets": {"x": entry(offsets=(0, 4, 8))},
    "offsets that are no numbers": {"x": entry(offsets=("0", "8"))},
    "offsets that are no whole numbers": {"x": entry(offsets=(0.0, 8.0))},
    "overlapping tensors": {"x": entry(shape=(1,), offsets=(0, 4)), "y": entry("F16", (3,), (2, 8))},
    "the same bytes twice": {"x": entry(), "y": entry()},
    "a gap": {"x": entry("U8", (2,), (0, 2)), "y": entry("U8", (4,), (4, 8))},
    "bytes of no tensor": {"x": entry(shape=(1,), offsets=(0, 4))},
    "an unknown dtype": {"x": entry("F7")},
    "a dtype that is no word": {"x": entry(["F32"])},
    "a dtype of another length": {"x": entry("F64")},
    "a shape of another length": {"x": entry(shape=(3,))},
    "a negative shape": {"x": entry(shape=(-1, -2))},
    "a shape that is no list": {"x": entry(shape=2)},
    "an endless shape of nothing": {"x": entry(), "y": entry(shape=(0, 10 ** 30), offsets=(8, 8))},
    "a wide shape of nothing": {"x": entry(), "y": entry(shape=(0, *[8] * 40), offsets=(8, 8))},
    "no dtype": {"x": {"shape": [2], "data_offsets": [0, 8]}},
    "an entry that is no table": {"x": 7},
    "a list": [1, 2],
    "a number": 5,
}


@pytest.mark.parametrize("name", WRONG_HEADERS)
def test_safetensors_whose_header_is_wrong_are_refused(tmp_path, name):
    path, header = tmp_path / "t.safetensors", json.dumps(WRONG_HEADERS[name]).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    assert "not a safetensors file" in refused(ViT(64, 32, 24, 1, 3), path)


@pytest.mark.parametrize("content", [
    b"", b"1234567", struct.pack("<Q", 2 ** 63) + b"{}", struct.pack("<Q", 3) + b"{}",
    struct.pack("<Q", 2) + b"{]", struct.pack("<Q", 2) + b"\xff\xfe",
    struct.pack("<Q", 100_000) + b"[" * 100_000, struct.pack("<Q", 0), struct.pack("<Q", 9000) + b"1" * 9000,
], ids=["empty", "short", "huge header", "cut", "no JSON", "no text", "nested", "no header",
        "endless number"])
def test_safetensors_that_are_none_are_refused(tmp_path, content):
    path = tmp_path / "t.safetensors"
    path.write_bytes(content)
    assert "not a safetensors file" in refused(ViT(64, 32, 24, 1, 3), path)


# -------------------------------------------------------------------------------------------------- the flags


@pytest.fixture(scope="module")
def home(tmp_path_factory, edgenext, bert):
    """A few synthetic clips, a vocab.txt of BERT's length with their words, and the published files."""
    folder = tmp_path_factory.mktemp("home")
    toy_data.render(folder / "clips", 45)
    lines = (folder / "clips/train.jsonl").read_text().splitlines()
    words = sorted({word for line in lines for word in WordPiece.split(json.loads(line)["caption"])})
    (folder / "vocab.txt").write_text("\n".join((bert_vocabulary()[:30522 - len(words)] + words)) + "\n")
    written(folder / "edgenext.pth", {"state_dict": edgenext})
    written(folder / "bert.safetensors", bert)
    written(folder / "clip.pt", released.random_weights(released.clip_openai(layers=1)))
    swin = released.random_weights(released.video_swin_tiny(depths=(1, 1, 1, 1)))
    written(folder / "swin.pth", {"state_dict": under("backbone.", swin)})
    return folder


# The paper preset with what is not published made small; at a learning rate of 0 weights stay as they start.
PAPER_FLAGS = ("--preset paper --lr 0 --config size=64 --config frames=2 --config width=24 "
               "--config decoder_layers=1 --config codes=8 --config vit_layers=1 "
               "--config tokenizer_width=24 --config tokenizer_layers=1 --config swin_depths=1,1,1,1")
TEXT_FLAGS = "--tokenizer none --objectives mlm --init-text bert.safetensors --vocab vocab.txt"


def run(script, flags, home, monkeypatch, steps=1):
    monkeypatch.chdir(home)
    flags += f" --data clips --workers 0 --batch-size 4 --max-steps {steps} --device cpu"
    script.train(script.parse(flags.split()), set_up("cpu", "fp32"))


def test_pretraining_starts_from_published_weights(home, edgenext, bert, monkeypatch, capsys):
    flags = f"{PAPER_FLAGS} {TEXT_FLAGS} --init-video edgenext.pth --out run"
    monkeypatch.setattr(EdgeNeXt, "start", lambda *_: pytest.fail("the loaded encoder's norms were set anew"))
    run(pretrain, flags, home, monkeypatch)
    said, checkpoint = capsys.readouterr().out, torch.load(home / "run/last.pt", weights_only=True)
    w, vocab, theirs = checkpoint["model"], checkpoint["vocab"], (home / "vocab.txt").read_text().split()
    for name in edgenext.keys() - {"head.weight", "head.bias"}:
        assert torch.equal(w[f"video_encoder.{name}"], edgenext[name])
    assert len(vocab) == 9157 and "" not in vocab
    assert torch.equal(w["text_embedding.words.weight"],
                       bert["bert.embeddings.word_embeddings.weight"][[theirs.index(word) for word in vocab]])
    assert "edgenext.pth, an EdgeNeXt, under state_dict.*: 212 of the network's 212 tensors filled" in said
    assert "in the file, not used: state_dict.head.weight, state_dict.head.bias" in said
    assert "9,157 of the model's 9,157 words" in said and "cls.seq_relationship.bias" in said

    for name in ("edgenext.pth", "bert.safetensors"):
        (home / name).rename(home / f"{name}.away")                 # going on needs them no more
    run(pretrain, flags + " --resume", home, monkeypatch, steps=2)
    assert torch.load(home / "run/last.pt", weights_only=True)["step"] == 2
    assert "tensors filled" not in capsys.readouterr().out
    with pytest.raises(InputError, match="--init-video"):
        run(pretrain, flags.replace("edgenext.pth", "other.pth") + " --resume", home, monkeypatch, steps=2)
    for name in ("edgenext.pth", "bert.safetensors"):
        (home / f"{name}.away").rename(home / name)


def test_one_encoder_alone_can_start_from_published_weights(home, monkeypatch):
    started = []
    monkeypatch.setattr(EdgeNeXt, "start", lambda *_: started.append(True))
    run(pretrain, f"{PAPER_FLAGS} {TEXT_FLAGS} --out text", home, monkeypatch)
    assert started


def test_the_tokenizer_starts_from_published_weights(home, monkeypatch, capsys):
    run(train_tokenizer, f"{PAPER_FLAGS} --out tokenizer --init-tokenizer clip.pt", home, monkeypatch)
    w, clip = (torch.load(home / name, weights_only=True) for name in ("tokenizer/last.pt", "clip.pt"))
    assert torch.equal(w["model"]["encoder.patch.weight"], clip["visual.conv1.weight"])
    assert torch.equal(w["model"]["encoder.blocks.0.fc2.weight"],
                       clip["visual.transformer.resblocks.0.mlp.c_proj.weight"])
    said = capsys.readouterr().out
    assert "interpolated from 7x7 to 2x2" in said and "visual.ln_post.weight" in said


def test_the_videoswin_tokenizer_starts_from_published_weights(home, monkeypatch, capsys):
    run(train_tokenizer, f"{PAPER_FLAGS} --encoder videoswin --out swin --init-tokenizer swin.pth", home,
        monkeypatch)
    w, swin = (torch.load(home / name, weights_only=True) for name in ("swin/last.pt", "swin.pth"))
    table = "layers.3.blocks.0.attn.relative_position_bias_table"
    for name in ("patch_embed.proj.weight", table, "norm.bias"):
        assert torch.equal(w["model"]["encoder." + name], swin["state_dict"]["backbone." + name])
    assert "left at their start: none" in capsys.readouterr().out


@pytest.mark.parametrize("script, flags, named", [
    (pretrain, "--init-video edgenext.pth", "edgenext.pth: state_dict.downsample_layers.0.0.weight"),
    (pretrain, "--init-text bert.safetensors --vocab vocab.txt", "bert.embeddings.word_embeddings.weight"),
    (pretrain, "--init-text bert.safetensors", "vocab.txt with --vocab"),
    (pretrain, "--init-video clip.pt", "looks like a CLIP vision model, where an EdgeNeXt is wanted"),
    (pretrain, "--init-video nowhere.pt", "nowhere.pt"),
    (train_tokenizer, "--init-tokenizer clip.pt", "ViT-B/32 fits --preset paper"),
    (train_tokenizer, "--init-tokenizer swin.pth --encoder videoswin", "Video Swin-T fits --preset paper"),
    (train_tokenizer, "--init-tokenizer swin.pth",
     "looks like a Swin transformer, where a CLIP vision model is wanted"),
    (train_tokenizer, "--init-tokenizer clip.pt --encoder videoswin",
     "looks like a CLIP vision model, where a Swin transformer is wanted"),
])
def test_wrong_published_weights_end_in_one_line_before_any_training(home, monkeypatch, capsys, script, flags,
                                                                     named):
    flags += " --out bad" + " --tokenizer bad" * (script is pretrain)
    with pytest.raises(SystemExit) as end:
        run_script(lambda: run(script, flags, home, monkeypatch))
    said = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and len(said) == 1 and named in said[0] and said[0].startswith("error:")
    assert not (home / "bad").exists()
