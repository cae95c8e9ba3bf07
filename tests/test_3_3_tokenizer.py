"""3.3, the semantic tokenizer: Eq. (4) to (7) against plain computations, a clip's codes."""
import numpy as np
import plain
import pytest
import torch
import torch.nn.functional as F

from evilm import CLS, SEP, SemanticTokenizer, VectorQuantizer, focal_loss, pad, svq_loss, words_present
from plain import near


@pytest.fixture
def tokenizer(tiny, randomise):
    return randomise(SemanticTokenizer(tiny))


# -------------------------------------------------------------------------------------------------------- ViT

def test_frames_are_embedded_in_clips_scale_in_order(tokenizer, frames):
    mean, deviation = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    w = plain.weights(tokenizer)
    with torch.no_grad():
        embedded = tokenizer.embed(frames)
        assert embedded.shape == (3, 2, 2, 2, 6)
        for b, t in np.ndindex(3, 2):
            scaled = torch.stack([(frames[b, t, c] - mean[c]) / deviation[c] for c in range(3)])
            patches = plain.linear(tokenizer.encoder(scaled[None])[0].double(), w, "proj")
            near(embedded[b, t].flatten(0, 1), patches, atol=3e-3)


# ---------------------------------------------------------------------------------------- Eq. (4), (7): codes

def unit(x):
    return x / np.sqrt((x ** 2).sum(-1, keepdims=True))


def nearest(x, codebook):
    """Eq. (4) one patch at a time: the code at the least Euclidean distance, both sides l2-normalised."""
    x, codebook = unit(x.double().numpy()), unit(codebook.double().numpy())
    found = np.empty(x.shape[:-1], np.int64)
    for patch in np.ndindex(found.shape):
        distances = [np.sqrt(((x[patch] - code) ** 2).sum()) for code in codebook]
        found[patch] = int(np.argmin(distances))
    return torch.from_numpy(found), torch.from_numpy(codebook[found])


@pytest.fixture
def quantizer():
    quantizer = VectorQuantizer(50, 6)
    with torch.no_grad():
        quantizer.codebook *= torch.logspace(-2, 2, 50)[:, None]        # lengths must not matter
    return quantizer


def test_eq4_nearest_code(quantizer):
    x, before = torch.randn(4, 3, 5, 6), quantizer.codebook.detach().clone()
    x *= torch.logspace(-3, 3, 5)[:, None]
    quantized, ids, _ = quantizer(x)
    assert torch.equal(quantizer.codebook, before), "the codebook itself was changed"
    expected, codes = nearest(x, quantizer.codebook.detach())
    assert ids.shape == (4, 3, 5) and torch.equal(ids, expected) and len(ids.unique()) > 20
    near(quantized, codes, atol=1e-5)
    near(quantized.norm(dim=-1), torch.ones(4, 3, 5), atol=1e-5)


def test_eq4_nearest_code_under_autocast():
    quantizer, x = VectorQuantizer(500, 6), torch.randn(200, 6)
    with torch.autocast("cpu", torch.bfloat16):
        ids, of_halves = quantizer(x)[1], quantizer(x.bfloat16())[1]
    assert torch.equal(ids, nearest(x, quantizer.codebook.detach())[0])
    assert torch.equal(of_halves, nearest(x.bfloat16(), quantizer.codebook.detach())[0])


def test_eq7_gradients_go_where_stop_gradient_lets_them(quantizer):
    x = torch.randn(2, 4, 6, requires_grad=True)
    _, ids, loss = quantizer(x)
    to_encoder, to_codes = torch.autograd.grad(loss, [x, quantizer.codebook])

    e, c = F.normalize(x, dim=-1), F.normalize(quantizer.codebook, dim=-1)[ids]
    codebook_term = ((e.detach() - c) ** 2).sum(-1).mean()                      # ||sg[E(X)] - C_q||^2
    commitment = ((e - c.detach()) ** 2).sum(-1).mean()                         # ||E(X) - sg[C_q]||^2
    near(to_codes, torch.autograd.grad(codebook_term, quantizer.codebook)[0], atol=1e-6)
    near(to_encoder, torch.autograd.grad(commitment, x)[0], atol=1e-6)
    near(loss, codebook_term + commitment)
    assert to_codes.abs().sum() > 0 and to_encoder.abs().sum() > 0
    unused = torch.ones(50, dtype=torch.bool).index_fill(0, ids.flatten(), False)
    assert not to_codes[unused].any()


def test_straight_through_copies_the_codes_gradient_to_the_encoder(quantizer):
    x, g = torch.randn(2, 4, 6, requires_grad=True), torch.randn(2, 4, 6)
    quantized, _, _ = quantizer(x)
    to_encoder, to_codes = torch.autograd.grad((quantized * g).sum(), [x, quantizer.codebook],
                                               allow_unused=True)
    # At the normalised output it is g itself: at x, g through the normalisation alone.
    near(to_encoder, torch.autograd.grad(F.normalize(x, dim=-1), x, g)[0], atol=1e-6)
    assert to_codes is None or not to_codes.any()


@pytest.mark.parametrize("asked, vectors", [(50, 200), (50, 50), (50, 30), (17, 30), (0, 30)])
def test_move_codes_draws_without_replacement_for_the_codes_asked_for_alone(quantizer, asked, vectors):
    before, x = quantizer.codebook.detach().clone(), torch.randn(vectors, 6)
    unused = torch.arange(50) >= 50 - asked                                     # the last of the 50
    quantizer.move_codes(unused, x, torch.Generator().manual_seed(1))
    moved, after = unused.nonzero()[:vectors, 0], quantizer.codebook.detach().clone()
    nearness, drawn = (F.normalize(after[moved], dim=-1) @ F.normalize(x, dim=-1).T).max(1)
    near(nearness, torch.ones(len(moved)), atol=1e-5)
    assert len(drawn.unique()) == len(moved) and (not asked or drawn.tolist() != list(range(len(moved))))
    quantizer.move_codes(unused, x, torch.Generator().manual_seed(1))
    assert torch.equal(quantizer.codebook, after)                       # it follows from the generator
    after[moved] = before[moved]
    assert torch.equal(after, before)                                   # no other code has moved


# ---------------------------------------------------------------------------------------- Eq. (5), (6): words

def test_eq5_head_of_the_averaged_output(tokenizer):
    codes = F.normalize(torch.randn(3, 2, 2, 2, 6), dim=-1)
    w = plain.weights(tokenizer)
    x = plain.linear(codes.double().flatten(1, 3), w, "expand") + plain.sines(2, 2, 32)
    output = plain.bert(x, w, 2, 2, at="decoder.")
    average = sum(output[:, n] for n in range(8)) / 8
    with torch.no_grad():
        logits = tokenizer.read_words(codes)
    assert logits.shape == (3, 28)                                              # 33 words, 5 special tokens
    assert len(tokenizer.head.weight) == 35                                     # two rows that no word uses
    near(logits, plain.linear(average, w, "head")[:, :28], atol=1e-4)


def focal(logits, targets):
    """Eq. (6) with its minus, one word at a time."""
    total = 0.0
    for row, present in zip(np.asarray(logits, np.float64), targets):
        for z, y in zip(row, present):
            p = 1 / (1 + np.exp(-z))
            total += (-np.log(p) if y else -p * np.log(1 - p)) / len(row)
    return total / len(logits)


def test_eq6_focal_loss():
    logits, targets = 3 * torch.randn(4, 9), (torch.rand(4, 9) < 0.3).float()
    assert float(focal_loss(logits, targets)) == pytest.approx(focal(logits, targets), rel=1e-5)


def test_eq6_gradient_goes_through_the_weight_p_too():
    logits, targets = 2 * torch.randn(2, 6, dtype=torch.float64), (torch.rand(2, 6) < 0.4).float()
    assert 0 < targets.sum() < 12
    ours = torch.autograd.grad(focal_loss(logits.requires_grad_(), targets), logits)[0]
    z, step = logits.detach().numpy(), 1e-6
    for at in np.ndindex(2, 6):
        nudge = np.zeros_like(z)
        nudge[at] = step
        slope = (focal(z + nudge, targets.numpy()) - focal(z - nudge, targets.numpy())) / (2 * step)
        assert float(ours[at]) == pytest.approx(slope, abs=1e-8)


def test_eq6_does_not_overflow():
    logits = torch.tensor([[1e4, -1e4, 1e4, -1e4]], requires_grad=True)
    loss = focal_loss(logits, torch.tensor([[1.0, 1.0, 0.0, 0.0]]))
    loss.backward()
    assert loss.item() == pytest.approx((0 + 1e4 + 1e4 + 0) / 4)
    near(logits.grad, torch.tensor([[0, -0.25, 0.25, 0]]), atol=1e-6)


def test_eq6_words_of_a_caption():
    ids, mask = pad([[CLS, 7, 9, 7, SEP], [CLS, 1, SEP], [CLS, 5, 12, 6, 11, SEP]])
    expected = torch.zeros(3, 8)                                                # words 5 to 12
    for b, word in ((0, 7), (0, 9), (2, 5), (2, 12), (2, 6), (2, 11)):
        expected[b, word - 5] = 1
    assert torch.equal(words_present(ids, mask, 13), expected)
    stray = torch.tensor([[CLS, 7, SEP, 8]])
    assert words_present(stray, torch.tensor([[True, True, True, False]]), 13).nonzero().tolist() == [[0, 2]]


@pytest.mark.parametrize("word_weight", [1.0, 30.0])
def test_eq7_svq_loss(quantizer, word_weight):
    logits, words, x = 2 * torch.randn(2, 9), (torch.rand(2, 9) < 0.3).float(), torch.randn(2, 4, 6)
    _, ids, code_loss = quantizer(x)
    e, c = unit(x.double().numpy()), unit(quantizer.codebook.detach().double().numpy())[ids]
    codes = 2 * ((e - c) ** 2).sum(-1).mean()
    for logits in (logits, logits.bfloat16()):                                  # as under autocast
        token = focal(logits.float().numpy(), words.numpy())
        loss, parts = svq_loss(logits, words, code_loss, word_weight)
        assert {name: part.item() for name, part in parts.items()} == pytest.approx(
            {"token": token, "codes": codes}, rel=1e-5)
        assert loss.item() == pytest.approx(word_weight * token + codes, rel=1e-5)      # L_TOKEN counts once
        assert loss.dtype == torch.float32
    leaves = [torch.randn(2, 9).requires_grad_(), torch.ones(()).requires_grad_()]      # both terms teach
    svq_loss(leaves[0], words, leaves[1], word_weight)[0].backward()
    assert leaves[0].grad.abs().sum() > 0 and leaves[1].grad == 1


# ---------------------------------------------------------------------------------------- the tokenizer whole

def test_the_tokenizer_reads_words_from_codes_alone(tokenizer, frames):
    with torch.no_grad():
        logits, ids, loss = tokenizer(frames)
        quantized, expected, expected_loss = tokenizer.quantizer(tokenizer.embed(frames))
        near(logits, tokenizer.read_words(quantized))
    assert torch.equal(ids, expected) and torch.equal(loss, expected_loss)


def test_without_quantizing_words_are_read_from_the_encoders_unit_vectors(tokenizer, frames):
    logits, ids, code_loss = tokenizer(frames, quantize=False)
    with torch.no_grad():
        near(logits, tokenizer.read_words(F.normalize(tokenizer.embed(frames), dim=-1)))
        assert torch.equal(ids, tokenizer.tokenize(frames))
    assert code_loss.item() == 0
    (logits.sum() + code_loss).backward()
    codebook = tokenizer.quantizer.codebook
    assert tokenizer.proj.weight.grad.abs().sum() > 0 and (codebook.grad is None or not codebook.grad.any())


def test_the_words_teach_encoder_and_decoder_and_leave_the_codebook_to_eq7(tokenizer, frames):
    logits, _, _ = tokenizer(frames)
    focal_loss(logits, (torch.rand(3, 28) < 0.2).float()).backward()
    for part in (tokenizer.encoder.patch, tokenizer.proj, tokenizer.expand, tokenizer.decoder[0].qkv,
                 tokenizer.head):
        assert part.weight.grad.abs().sum() > 0
    codebook = tokenizer.quantizer.codebook
    assert codebook.grad is None or not codebook.grad.any(), "the words' loss must not move the codebook"


def test_tokenize_gives_a_code_a_patch_and_needs_no_gradient(tokenizer, frames):
    graph = []
    watch = tokenizer.proj.register_forward_hook(lambda _, inputs, out: graph.append(out.requires_grad))
    ids = tokenizer.tokenize(frames)
    watch.remove()
    assert ids.shape == (3, 2, 2, 2) and ids.dtype == torch.int64 and graph == [False]
    embedded = tokenizer.embed(frames).detach()
    assert torch.equal(ids, nearest(embedded, tokenizer.quantizer.codebook.detach())[0])
    assert torch.equal(tokenizer.tokenize(frames[1:2])[0], ids[1])          # a clip's codes need no other
    assert torch.equal(tokenizer.tokenize(frames[:, 1:])[:, 0], ids[:, 1])  # nor a frame's other frames
