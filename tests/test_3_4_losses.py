"""3.4, pre-training: Eq. (3) and (8) against plain loops, the masked pass, a batch in parts."""
import numpy as np
import pytest
import torch

from evilm import (CLS, MASK, SEP, joint_scores, mask_frames, mlm_loss, mvm_loss, pretraining_loss,
                   rank_of_truth, recalls, vtm_loss)

LOSSES = [mvm_loss, mlm_loss, vtm_loss]
OBJECTIVES = ("vtm", "mlm", "mvm")


def near(ours, expected, atol=1e-6):
    torch.testing.assert_close(ours, expected, atol=atol, rtol=1e-5)


# ----------------------------------------------------------------------------------------------- Eq. (3), (8)

def cross_entropy(logits, targets):
    """The mean of -log p of the right class, one row at a time."""
    total = 0.0
    for row, target in zip(np.asarray(logits, np.float64), targets, strict=True):
        total -= np.log(np.exp(row[target] - row.max()) / sum(np.exp(z - row.max()) for z in row))
    return total / len(logits)


@pytest.mark.parametrize("loss", LOSSES)
def test_eq3_and_eq8_terms(loss):
    classes = 2 if loss is vtm_loss else 9
    logits, targets = 4 * torch.randn(13, classes), torch.randint(classes, (13,))
    assert float(loss(logits, targets)) == pytest.approx(cross_entropy(logits, targets), rel=1e-5)
    leaf = logits.clone().requires_grad_()
    gradient = torch.autograd.grad(loss(leaf, targets), leaf)[0]
    near(gradient, (logits.softmax(1) - torch.eye(classes)[targets]) / 13)
    half = loss(logits.bfloat16(), targets)
    assert half.dtype == torch.float32
    assert float(half) == pytest.approx(cross_entropy(logits.bfloat16().float(), targets), rel=1e-5)
    assert float(loss(torch.tensor([[200.0, 0.0]]), torch.tensor([1]))) == pytest.approx(200), \
        "where a probability underflows the loss stays finite"


@pytest.mark.parametrize("loss", LOSSES)
def test_eq3_and_eq8_parts_of_a_batch_add_up_to_the_whole(loss):
    logits, targets = torch.randn(13, 2), torch.randint(2, (13,))
    cut = (slice(0, 5), slice(5, 6), slice(6, 6), slice(6, 13))                 # uneven, one of them empty
    near(sum(loss(logits[part], targets[part], 13) for part in cut), loss(logits, targets))


@pytest.mark.parametrize("loss", LOSSES)
def test_a_loss_over_nothing_is_zero(loss):
    logits = torch.empty(0, 7, requires_grad=True)
    nothing = loss(logits, torch.empty(0, dtype=torch.long))
    assert nothing.item() == 0
    assert nothing.requires_grad, "a loss over nothing is 0 times the logits: backward is called on it too"
    assert loss(logits, torch.empty(0, dtype=torch.long), 0).item() == 0        # nor in the other parts


# -------------------------------------------------------------------------------------------- the masked pass

@pytest.fixture
def batch():
    """Four clips that differ in their number of masked words and patches; the second has no masked word."""
    source = torch.Generator().manual_seed(5)
    ids = torch.tensor([[CLS, 9, 8, 30, 7, SEP], [CLS, 12, SEP, 0, 0, 0],
                        [CLS, 17, 6, 22, SEP, 0], [CLS, 31, 5, SEP, 0, 0]])
    mismatched = torch.tensor([[CLS, 19, 9, SEP, 0, 0], [CLS, 32, 6, 5, 7, SEP],
                               [CLS, MASK, SEP, 0, 0, 0], [CLS, 9, 8, SEP, 0, 0]])
    masked_words = torch.zeros_like(ids, dtype=torch.bool)
    masked_words[0, 3] = masked_words[2, 1] = masked_words[2, 3] = masked_words[3, 1:3] = True
    masked_ids = ids.masked_fill(masked_words, MASK)
    masked_ids[0, 3] = 30                                                       # one of the 10% that stay
    ratios = torch.tensor([0.1, 0.5, 0.9, 0.4])[:, None, None, None]
    return {"frames": torch.rand(4, 2, 3, 64, 64, generator=source), "ids": ids, "masked_ids": masked_ids,
            "mask": ids > 0, "masked_words": masked_words,
            "mismatched_ids": mismatched, "mismatched_mask": mismatched > 0,
            "masked_patches": torch.rand(4, 2, 2, 2, generator=source) < ratios,
            "labels": torch.randint(11, (4, 2, 2, 2), generator=source)}


def masked_pass(model, b, objectives=OBJECTIVES):
    return model(b["frames"], b["masked_ids"], b["mask"],
                 masked_words=b["masked_words"] if "mlm" in objectives else None,
                 masked_patches=b["masked_patches"].flatten(1) if "mvm" in objectives else None,
                 mismatched=(b["mismatched_ids"], b["mismatched_mask"]) if "vtm" in objectives else None)


def calls(module):
    """A list that receives the inputs of each call of `module`."""
    received = []
    module.register_forward_hook(lambda _, inputs, output: received.append(inputs))
    return received


def test_matching_sees_each_video_with_its_caption_and_with_a_wrong_one(model, batch):
    vtm = masked_pass(model, batch)[0]
    video = model.encode_video(batch["frames"])
    expected = [model.vtm_head(model.pooler(model.fuse(video, model.encode_text(ids, ids > 0), ids > 0)[0]))
                for ids in (batch["masked_ids"], batch["mismatched_ids"])]
    assert vtm.shape == (8, 2)
    near(vtm, torch.cat(expected), atol=1e-5)
    assert (expected[0] - expected[1]).abs().min(1).values.max() > 1e-3


def test_the_video_encoder_runs_once_a_clip_and_the_decoder_once_a_pair(model, batch):
    video, text, decoder = calls(model.video_encoder), calls(model.text_embedding), calls(model.decoder)
    masked_pass(model, batch)
    assert [x.shape for x, in video] == [(8, 3, 64, 64)]                        # 4 clips of 2 frames
    assert sum(len(x) for x, in text) == 8 and sum(len(x[0]) for x in decoder) == 8


def test_heads_run_on_masked_positions_of_the_matched_pairs_alone(model, batch):
    inputs = calls(model.mlm_head[0]), calls(model.mvm_head)
    _, mlm, mvm = masked_pass(model, batch)
    words, patches = batch["masked_words"], batch["masked_patches"].flatten(1)
    n_words, n_patches = int(words.sum()), int(patches.sum())
    ran_on = [[x.shape for x, in called] for called in inputs]
    assert mlm.shape == (n_words, 33) and mvm.shape == (n_patches, 11)

    video, text = model.encode_video(batch["frames"]), model.encode_text(batch["masked_ids"], batch["mask"])
    _, h_text, h_video = model.fuse(video, text, batch["mask"])
    at = [(b, i) for b in range(4) for i in range(6) if words[b, i]]
    near(mlm, torch.stack([model.mlm_head(h_text[b, i])[:33] for b, i in at]), atol=1e-5)
    at = [(b, n) for b in range(4) for n in range(8) if patches[b, n]]
    near(mvm, torch.stack([model.mvm_head(h_video[b, n]) for b, n in at]), atol=1e-5)
    assert ran_on == [[(n_words, 36)], [(n_patches, 36)]], \
        "the values are right, but the head ran on all positions, also unmasked ones"


@pytest.mark.parametrize("on", [("vtm",), ("mlm",), ("mvm",), ("vtm", "mlm"), ("vtm", "mvm"), ("mlm", "mvm"),
                                ()])
def test_an_objective_that_is_off_leaves_out_its_output_and_its_cost(model, batch, on):
    whole = masked_pass(model, batch)
    heads = [calls(head) for head in (model.vtm_head, model.mlm_head[0], model.mvm_head)]
    decoder = calls(model.decoder)
    for name, found, expected, called in zip(OBJECTIVES, masked_pass(model, batch, on), whole, heads):
        if name in on:
            near(found, expected, atol=1e-5)
        else:
            assert found is None and not called
    assert sum(len(x[0]) for x in decoder) == (8 if "vtm" in on else 4)


@pytest.mark.parametrize("loss, rows", [
    (0, slice(0, 4)), (0, slice(4, 8)), (1, slice(None)), (2, slice(None))])    # VTM: matched, mismatched
def test_eq8_each_loss_alone_teaches_both_encoders_and_the_decoder(model, batch, loss, rows):
    masked_pass(model, batch)[loss][rows].float().softmax(1)[:, 0].sum().backward()
    for part in (model.video_encoder, model.video_proj, model.text_embedding, model.text_encoder,
                 model.text_proj, model.decoder):
        assert sum(p.grad.abs().sum() for p in part.parameters() if p.grad is not None) > 0


# ---------------------------------------------------------------------------------------------------- Eq. (8)

@pytest.mark.parametrize("mvm_weight", [1.0, 0.25, 0.0])
def test_eq8_pretraining_loss(model, batch, mvm_weight):
    frames = mask_frames(batch["frames"], batch["masked_patches"])
    vtm, mlm, mvm = masked_pass(model, {**batch, "frames": frames})
    words, patches = batch["masked_words"], batch["masked_patches"]
    expected = {"vtm": cross_entropy(vtm.detach(), [1] * 4 + [0] * 4),          # the matched pairs come first
                "mlm": cross_entropy(mlm.detach(), batch["ids"][words]),
                "mvm": cross_entropy(mvm.detach(), batch["labels"][patches])}
    before = {name: value.clone() for name, value in batch.items()}
    loss, losses = pretraining_loss(model, batch, mvm_weight=mvm_weight)
    assert set(losses) == set(expected)
    for name in expected:
        assert losses[name].item() == pytest.approx(expected[name], rel=1e-5)
    total = expected["mlm"] + expected["vtm"] + mvm_weight * expected["mvm"]
    assert loss.item() == pytest.approx(total, rel=1e-5)
    changed = [name for name in batch if not torch.equal(batch[name], before[name])]
    assert changed == [], "the caller's batch was changed"


NEEDED = {"vtm": ("mismatched_ids", "mismatched_mask"), "mlm": ("masked_words",),
          "mvm": ("masked_patches", "labels")}


@pytest.mark.parametrize("on", [("vtm",), ("mlm",), ("mvm",), ("mlm", "mvm"), ("vtm", "mlm")])
def test_eq8_an_objective_that_is_off_masks_no_frames_and_gives_no_term(model, batch, on):
    video, off = calls(model.video_encoder), set(OBJECTIVES) - set(on)
    needed_by_others = {name for objective in off for name in NEEDED[objective]}
    frames = mask_frames(batch["frames"], batch["masked_patches"]) if "mvm" in on else batch["frames"]
    for given in (batch, {name: value for name, value in batch.items() if name not in needed_by_others}):
        loss, losses = pretraining_loss(model, given, on)
        assert set(losses) == set(on) and torch.equal(loss, sum(losses.values()))
        assert torch.equal(video[-1][0], model.normalise(frames).flatten(0, 1))


@pytest.mark.parametrize("cuts", [(0, 2, 4), (0, 1, 4), (0, 1, 2, 3, 4)])
def test_eq8_accumulated_gradients_are_those_of_the_whole_batch(tiny, model, batch, cuts):
    assert tiny.dropout == 0
    counts = {"vtm": 8, "mlm": int(batch["masked_words"].sum()), "mvm": int(batch["masked_patches"].sum())}
    model.train().double()
    batch["frames"] = batch["frames"].double()
    whole = pretraining_loss(model, batch)[0]
    whole.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    assert all(grad.abs().sum() > 0 for grad in expected.values())      # Eq. (8) reaches every parameter
    model.zero_grad()
    total = 0.0
    for start, end in zip(cuts, cuts[1:]):
        part = {name: value[start:end] for name, value in batch.items()}
        loss = pretraining_loss(model, part, counts=counts)[0]
        loss.backward()
        total += loss.item()
    assert total == pytest.approx(whole.item(), rel=1e-6)
    for name, p in model.named_parameters():
        near(p.grad, expected[name])


# ---------------------------------------------------------------------------------------------------- scoring

def test_rank_of_truth_counts_every_tie_against_the_query():
    scores = torch.randint(4, (60, 7)).float()                                  # many ties
    truth = torch.randint(7, (60,))
    expected = [1 + sum(score >= row[right] for i, score in enumerate(row) if i != right)
                for row, right in zip(scores.tolist(), truth.tolist())]
    assert rank_of_truth(scores, truth).tolist() == expected


def test_rank_of_truth_counts_scores_within_the_tolerance_as_ties():
    scores, truth = torch.tensor([[0.5, 0.4375, 0.25, 0.75]]), torch.tensor([0])
    for tolerance, rank in ((0.0, 2), (0.0625, 3), (0.125, 3), (0.25, 4)):
        assert rank_of_truth(scores, truth, tolerance).tolist() == [rank]
        assert scores.tolist() == [[0.5, 0.4375, 0.25, 0.75]], "the caller's scores were changed"


def test_scores_that_are_nan_rank_last():
    scores = torch.tensor([[torch.nan] * 3, [0.5, torch.nan, 0.2]])
    assert rank_of_truth(scores, torch.tensor([1, 0])).tolist() == [3, 2]


def test_recalls_count_ranks_up_to_k_and_the_median():
    found = recalls(torch.tensor([1, 1, 2, 5, 6, 10, 11, 40]))
    assert found == {"r1": 2 / 8, "r5": 4 / 8, "r10": 6 / 8, "median_rank": 5.5}


def test_a_score_is_the_difference_of_the_logits_in_fp32(model, batch):
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        video, text = model.encode_video(batch["frames"]), model.encode_text(batch["ids"], batch["mask"])
        scores = model.match(video, text, batch["mask"])
    assert scores.shape == (4,) and scores.dtype == torch.float32
    assert (scores != scores.bfloat16()).all(), "computed in fp32, not converted"


@pytest.mark.parametrize("part", [1, 3, 200])
def test_joint_scores_are_the_match_of_each_caption_and_video(model, batch, part):
    video, ids = torch.randn(5, 8, 36), batch["ids"]                            # padding: 0, 3, 1, 2 tokens
    text = model.encode_text(ids, ids > 0).detach()
    scores = joint_scores(model, video, text, ids > 0, part)
    assert scores.shape == (4, 5) and not scores.requires_grad
    with torch.no_grad():
        for q, v in np.ndindex(4, 5):
            pair = model.match(video[v:v + 1], text[q:q + 1], ids[q:q + 1] > 0)
            near(scores[q, v], pair[0])
    assert scores.std(0).min() > 2e-3 and scores.std(1).min() > 2e-3
