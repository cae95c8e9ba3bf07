"""3.4, pretraining: Eq. (3) and (8) against plain loops, one masked pass for all, a batch in parts, ranks."""

import numpy as np
import pytest
import torch

from evilm import CLS, MASK, SEP, EViLM, mlm_loss, mvm_loss, rank_of_truth, vtm_loss
from train_encoder import tag_loss

LOSSES = [mvm_loss, mlm_loss, vtm_loss]


def near(ours, expected, atol=1e-6):
    torch.testing.assert_close(ours, expected, atol=atol, rtol=1e-5)


# ----------------------------------------------------------------------------------------------- Eq. (3), (8)


def cross_entropy(logits, targets):
    """The mean of -log p of the right class, one row at a time."""
    total = 0.0
    for row, target in zip(np.asarray(logits, np.float64), targets):
        total -= np.log(np.exp(row[target] - row.max()) / sum(np.exp(z - row.max()) for z in row))
    return total / len(logits)


@pytest.mark.parametrize("loss", LOSSES)
def test_eq3_and_eq8_terms(loss):
    classes = 2 if loss is vtm_loss else 9
    logits, targets = 4 * torch.randn(13, classes), torch.randint(classes, (13,))
    assert float(loss(logits, targets)) == pytest.approx(cross_entropy(logits.numpy(), targets.numpy()),
                                                         rel=1e-5)
    half = loss(logits.bfloat16(), targets)
    assert half.dtype == torch.float32
    assert float(half) == pytest.approx(cross_entropy(logits.bfloat16().float().numpy(), targets.numpy()),
                                        rel=1e-5)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_loss_stays_finite_where_a_probability_underflows(loss):
    assert float(loss(torch.tensor([[200.0, 0.0]]), torch.tensor([1]))) == pytest.approx(200)


@pytest.mark.parametrize("loss", LOSSES)
def test_eq3_and_eq8_parts_of_a_batch_add_up_to_the_whole(loss):
    logits, targets = torch.randn(13, 2), torch.randint(2, (13,))
    cut = (slice(0, 5), slice(5, 6), slice(6, 6), slice(6, 13))                 # uneven, one of them empty
    near(sum(loss(logits[part], targets[part], 13) for part in cut), loss(logits, targets))


@pytest.mark.parametrize("loss", LOSSES)
def test_a_loss_over_nothing_is_zero(loss):
    logits = torch.empty(0, 7, requires_grad=True)
    nothing = loss(logits, torch.empty(0, dtype=torch.long))
    assert nothing.item() == 0 and nothing.requires_grad
    assert loss(logits, torch.empty(0, dtype=torch.long), 0).item() == 0        # nor in the other parts


# -------------------------------------------------------------------------------------------- the masked pass


@pytest.fixture
def model(tiny, randomise):
    return randomise(EViLM(tiny))


@pytest.fixture
def batch():
    """Four clips; their words and cells to predict differ in number, the second has no word to predict."""
    source = torch.Generator().manual_seed(5)
    ids = torch.tensor([[CLS, 9, 8, 30, 7, SEP], [CLS, 12, SEP, 0, 0, 0],
                        [CLS, MASK, 6, 22, SEP, 0], [CLS, MASK, MASK, SEP, 0, 0]])
    wrong = torch.tensor([[CLS, 19, 9, SEP, 0, 0], [CLS, 32, 6, 5, 7, SEP],
                          [CLS, MASK, SEP, 0, 0, 0], [CLS, 9, 8, SEP, 0, 0]])
    words = torch.zeros_like(ids, dtype=torch.bool)
    words[0, 3] = words[2, 1] = words[2, 2] = words[3, 1] = words[3, 2] = True
    return {"frames": torch.rand(4, 2, 3, 64, 64, generator=source), "ids": ids, "mask": ids > 0,
            "words": words, "wrong": wrong,
            "cells": torch.rand(4, 8, generator=source) < torch.tensor([[0.1], [0.5], [0.9], [0.4]]),
            "truth": torch.randint(5, 33, (4, 6), generator=source),
            "codes": torch.randint(11, (4, 8), generator=source)}


def masked_pass(model, b):
    return model(b["frames"], b["ids"], b["mask"], words=b["words"], cells=b["cells"],
                 mismatched=(b["wrong"], b["wrong"] > 0))


def calls(module):
    """A list that receives the inputs of each call of `module`."""
    seen = []
    module.register_forward_hook(lambda _, inputs, output: seen.append(inputs))
    return seen


def test_matching_sees_each_video_with_its_caption_and_with_a_wrong_one(model, batch):
    vtm = masked_pass(model, batch)[0]
    video = model.encode_video(batch["frames"])
    expected = [model.vtm_head(model.pooler(model.fuse(video, model.encode_text(ids, ids > 0), ids > 0)[0]))
                for ids in (batch["ids"], batch["wrong"])]
    assert vtm.shape == (8, 2)
    near(vtm, torch.cat(expected), atol=1e-5)
    assert (expected[0] - expected[1]).abs().min(1).values.max() > 1e-3


def test_the_video_encoder_runs_once_a_clip_and_the_decoder_once_a_pair(model, batch):
    video, text, decoder = calls(model.video_encoder), calls(model.text_embedding), calls(model.decoder)
    masked_pass(model, batch)
    assert [x.shape for x, in video] == [(8, 3, 64, 64)]                        # 4 clips of 2 frames
    assert sum(len(x) for x, in text) == 8 and sum(len(x[0]) for x in decoder) == 8


def test_heads_run_on_masked_positions_of_the_matched_pairs_alone(model, batch):
    to_words, to_cells = calls(model.mlm_head[0]), calls(model.mvm_head)
    _, mlm, mvm = masked_pass(model, batch)
    n_words, n_cells = int(batch["words"].sum()), int(batch["cells"].sum())
    assert [x.shape for x, in to_words] == [(n_words, 36)] and [x.shape for x, in to_cells] == [(n_cells, 36)]
    assert mlm.shape == (n_words, 33) and mvm.shape == (n_cells, 11)

    video = model.encode_video(batch["frames"])
    _, h_text, h_video = model.fuse(video, model.encode_text(batch["ids"], batch["mask"]), batch["mask"])
    at = [(b, i) for b in range(4) for i in range(6) if batch["words"][b, i]]
    near(mlm, torch.stack([model.mlm_head(h_text[b, i])[:33] for b, i in at]), atol=1e-5)
    at = [(b, n) for b in range(4) for n in range(8) if batch["cells"][b, n]]
    near(mvm, torch.stack([model.mvm_head(h_video[b, n]) for b, n in at]), atol=1e-5)


def test_rows_that_no_word_uses_are_cut_off(model, batch):
    def mlm():
        return masked_pass(model, batch)[1]

    before = mlm()
    with torch.no_grad():
        model.mlm_head[-1].bias[33:] = 1e6                                      # words 33 to 39 do not exist
        assert len(model.mlm_head[-1].bias) == 40 and torch.equal(mlm(), before)
        model.mlm_head[-1].bias[32] = 1e6
        assert (mlm().argmax(1) == 32).all()


@pytest.mark.parametrize("on", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2), ()])
def test_an_objective_that_is_off_leaves_out_its_output_and_its_cost(model, batch, on):
    whole = masked_pass(model, batch)
    heads, decoder = ([calls(head) for head in (model.vtm_head, model.mlm_head[0], model.mvm_head)],
                      calls(model.decoder))
    found = model(batch["frames"], batch["ids"], batch["mask"],
                  mismatched=(batch["wrong"], batch["wrong"] > 0) if 0 in on else None,
                  words=batch["words"] if 1 in on else None, cells=batch["cells"] if 2 in on else None)
    for which in range(3):
        if which in on:
            near(found[which], whole[which], atol=1e-5)
        else:
            assert found[which] is None and not heads[which]
    assert sum(len(x[0]) for x in decoder) == (8 if 0 in on else 4)


@pytest.mark.parametrize("loss", [0, 1, 2])
def test_eq8_each_loss_alone_teaches_both_encoders_and_the_decoder(model, batch, loss):
    masked_pass(model, batch)[loss].float().softmax(1)[:, 0].sum().backward()
    for part in (model.video_encoder, model.video_proj, model.text_embedding, model.text_encoder,
                 model.text_proj, model.decoder):
        assert sum(p.grad.abs().sum() for p in part.parameters() if p.grad is not None) > 0


# ------------------------------------------------------------------------------------------- a batch in parts


def losses(model, b, counts):
    """Eq. (8), each term over the count of the whole batch."""
    vtm, mlm, mvm = masked_pass(model, b)
    pairs = torch.arange(len(vtm)).lt(len(vtm) // 2).long()
    return (vtm_loss(vtm, pairs, counts["pairs"]) + mlm_loss(mlm, b["truth"][b["words"]], counts["words"])
            + mvm_loss(mvm, b["codes"][b["cells"]], counts["cells"]))


@pytest.mark.parametrize("cuts", [(0, 2, 4), (0, 1, 4), (0, 1, 2, 3, 4)])
def test_eq8_accumulated_gradients_are_those_of_the_whole_batch(tiny, model, batch, cuts):
    assert tiny.dropout == 0
    counts = {"pairs": 8, "words": int(batch["words"].sum()), "cells": int(batch["cells"].sum())}
    model.train().double()
    batch["frames"] = batch["frames"].double()
    whole = losses(model, batch, dict.fromkeys(counts))
    whole.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    assert all(grad.abs().sum() > 0 for grad in expected.values())      # Eq. (8) reaches every parameter
    model.zero_grad()
    total = 0.0
    for start, end in zip(cuts, cuts[1:]):
        part = losses(model, {name: value[start:end] for name, value in batch.items()}, counts)
        part.backward()
        total += part.item()
    assert total == pytest.approx(whole.item(), rel=1e-6)
    for name, p in model.named_parameters():
        near(p.grad, expected[name])


# ------------------------------------------------------------------------------------------------------- tags


def test_tag_loss_is_each_kinds_cross_entropy_and_a_tag_without_a_name_adds_nothing():
    colour, shape = torch.randn(4, 3), torch.randn(4, 5)
    targets = torch.tensor([[2, 4], [0, -1], [-1, 1], [1, -1]])
    expected = (3 * cross_entropy(colour[[0, 1, 3]], [2, 0, 1])
                + 2 * cross_entropy(shape[[0, 2]], [4, 1])) / 4
    assert float(tag_loss([colour, shape], targets)) == pytest.approx(expected, rel=1e-5)
    assert float(tag_loss([colour, shape], torch.full((4, 2), -1))) == 0


# ------------------------------------------------------------------------------------------------------ ranks


def test_rank_of_truth_counts_every_tie_against_the_query():
    scores = torch.randint(4, (60, 7)).float()                                  # many ties
    truth = torch.randint(7, (60,))
    expected = []
    for row, right in zip(scores.tolist(), truth.tolist()):
        expected.append(1 + sum(score >= row[right] for i, score in enumerate(row) if i != right))
    assert rank_of_truth(scores, truth).tolist() == expected
    assert rank_of_truth(torch.zeros(1, 5), torch.tensor([2])).tolist() == [5]
    assert rank_of_truth(torch.tensor([[0.1, 0.9, 0.3]]), torch.tensor([1])).tolist() == [1]


def test_a_score_is_the_difference_of_the_logits_in_fp32(model, batch):
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        video, text = model.encode_video(batch["frames"]), model.encode_text(batch["ids"], batch["mask"])
        scores = model.match(video, text, batch["mask"])
    assert scores.shape == (4,) and scores.dtype == torch.float32
    with torch.no_grad():
        model.vtm_head.weight.zero_()
        model.vtm_head.bias.copy_(torch.tensor([1.0, 4.0]))
        near(model.match(video, text, batch["mask"]), torch.full((4,), 3.0))    # the matching pair is logit 1
