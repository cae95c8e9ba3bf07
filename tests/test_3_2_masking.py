"""3.2, masking: blocks of patches in every frame, zeros over their pixels, BERT's masking of words."""
import math

import pytest
import torch

from evilm import CLS, MASK, PAD, SEP, UNK, block_mask, mask_frames, mask_words, random_mask


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# ----------------------------------------------------------------------------------------------------- frames

@pytest.mark.parametrize("grid", [1, 2, 3, 4, 7, 8, 14])
@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.15, 0.4, 0.5, 0.75, 1.0])
def test_exactly_the_ratio_is_masked_in_each_frame(grid, ratio):
    masks = block_mask(12, grid, ratio, generator())
    assert masks.shape == (12, grid, grid) and masks.dtype == torch.bool
    assert (masks.sum((1, 2)) == round(ratio * grid * grid)).all()


def allowed_blocks(grid, target):
    """All (height, width) that an area from max(1, target // 5) to target and an aspect 0.3 to 1/0.3 give."""
    smallest = max(1, target // 5)

    def before_rounding(n):
        return (n - 0.5 if n > 1 else 0.0), (n + 0.5 if n < grid else math.inf)

    sizes = []
    for height in range(1, grid + 1):
        for width in range(1, grid + 1):
            (low, high), (left, right) = before_rounding(height), before_rounding(width)
            right = min(right, high / 0.3)          # an edge at the border may have been longer uncut
            high = min(high, right / 0.3)
            narrow = low / right > 1 / 0.3 or (left and high / left < 0.3)
            if (height * width >= smallest and not narrow and low * left <= target
                    and high * right >= smallest):
                sizes.append((height, width))
    return sizes


def uncovered(mask, sizes):
    """The masked patches that no allowed block of nothing but masked patches covers."""
    left = mask.clone()
    for height, width in sizes:
        windows = mask.unfold(0, height, 1).unfold(1, width, 1).all(-1).all(-1)
        for top, at in windows.nonzero().tolist():
            left[top:top + height, at:at + width] = False
    return left.nonzero()


@pytest.mark.parametrize("grid, ratio", [(8, 0.4), (14, 0.4), (14, 0.25), (10, 0.7)])
def test_a_mask_is_allowed_blocks_and_at_most_one_trimmed_one(grid, ratio):
    sizes = allowed_blocks(grid, round(ratio * grid * grid))
    for mask in block_mask(100, grid, ratio, generator()):
        rest = uncovered(mask, sizes)
        if len(rest):               # of the last block only as many patches count as were still wanted
            height, width = (rest.max(0).values - rest.min(0).values + 1).tolist()
            assert any(height <= h and width <= w for h, w in sizes), mask.int()


def neighbours(masks):
    """The mean number of masked patches beside a masked patch, of four."""
    pairs = (masks[:, 1:] & masks[:, :-1]).sum() + (masks[:, :, 1:] & masks[:, :, :-1]).sum()
    return float(2 * pairs / masks.sum())


def test_masked_patches_stand_together():
    assert neighbours(block_mask(300, 8, 0.4, generator())) > 2.2


def test_random_masks_have_as_many_patches_and_scatter_them():
    random = random_mask(300, 8, 0.4, generator())
    assert (random.sum((1, 2)) == 26).all() and torch.equal(random, random_mask(300, 8, 0.4, generator()))
    # Inside the frame lie 7/8 of the 4 neighbours; 25 of the 63 other patches are masked.
    assert abs(neighbours(random) - 4 * 7 / 8 * 25 / 63) < 0.07


def test_blocks_lie_and_stand_and_reach_every_patch():
    masks = block_mask(2000, 8, 0.4, generator()).float()
    often = masks.mean(0)
    assert often.min() > 0.05 and often.max() < 0.75                # corners are rarer, none is left out
    for turned in (often.T, often.flip(0), often.flip(1)):          # no side and no direction is preferred
        assert (often - turned).abs().max() < 0.07
    assert abs((masks[:, 1:] * masks[:, :-1]).mean() - (masks[:, :, 1:] * masks[:, :, :-1]).mean()) < 0.02

    shapes = [(int(m.any(1).sum()), int(m.any(0).sum())) for m in block_mask(300, 14, 0.05, generator())]
    assert 70 < sum(height > width for height, width in shapes) < 200       # 10 patches: a block or a few
    assert 70 < sum(width > height for height, width in shapes) < 200


@pytest.mark.parametrize("grid, ratio", [(2, 0.25), (2, 0.5), (3, 0.4)])
def test_no_patch_is_likelier_than_the_one_opposite(grid, ratio):
    often = block_mask(8000, grid, ratio, generator()).float().mean(0)
    assert (often - often.flip(0, 1)).abs().max() < 0.03


def test_each_frame_has_its_own_blocks_and_a_generator_repeats_them():
    masks = block_mask(50, 8, 0.4, generator(3))
    assert len({tuple(mask.flatten().tolist()) for mask in masks}) == 50
    assert torch.equal(masks, block_mask(50, 8, 0.4, generator(3)))
    assert not torch.equal(masks, block_mask(50, 8, 0.4, generator(4)))
    torch.manual_seed(7)
    assert torch.equal(masks, block_mask(50, 8, 0.4, generator(3)))     # nothing comes from global state


def test_masked_pixels_are_zero_and_no_others_change():
    frames, masked = 0.25 + 0.5 * torch.rand(2, 3, 3, 96, 96), torch.rand(2, 3, 3, 3) < 0.4
    before = frames.clone()
    found = mask_frames(frames, masked)
    for b, t, y, x in torch.cartesian_prod(*map(torch.arange, masked.shape)).tolist():
        patch = slice(None), slice(32 * y, 32 * y + 32), slice(32 * x, 32 * x + 32)
        expected = torch.zeros(3, 32, 32) if masked[b, t, y, x] else before[b, t][patch]
        assert torch.equal(found[b, t][patch], expected)
    assert torch.equal(frames, before), "the caller's frames were changed: the tokenizer sees them whole"
    assert torch.equal(mask_frames(frames, torch.zeros_like(masked)), before)
    small = mask_frames(torch.ones(1, 1, 3, 64, 64), torch.eye(4, dtype=torch.bool)[None, None])
    assert small.sum() == 3 * 12 * 16 * 16, "4 of 16 patches of 16 pixels are masked"


# ------------------------------------------------------------------------------------------------------ words

def caption(n, padding=0):
    """[CLS], the words 5, 6, ..., [SEP], padding."""
    return torch.tensor([CLS, *range(5, 5 + n), SEP] + padding * [PAD])


@pytest.mark.parametrize("ratio", [0.15, 0.3, 0.5])
def test_the_exact_ratio_of_words_is_masked(ratio):
    for n in range(1, 41):
        ids, masked = mask_words(caption(n, padding=3), 10_000, generator(n), ratio)
        assert masked.dtype == torch.bool and masked.shape == ids.shape == (n + 5,)
        assert masked.sum() == max(1, round(ratio * n))
        assert not masked[0] and not masked[n + 1:].any()                   # [CLS], [SEP], [PAD]


def test_a_caption_without_words_has_nothing_masked():
    for ids in (torch.tensor([CLS, SEP]), torch.tensor([CLS, UNK, MASK, SEP, PAD]), torch.tensor([PAD, PAD])):
        masked_ids, masked = mask_words(ids, 100, generator())
        assert torch.equal(masked_ids, ids) and not masked.any()


def test_words_not_masked_stay_as_they_are():
    for seed in range(50):
        ids = caption(30, padding=4)
        masked_ids, masked = mask_words(ids, 40, generator(seed))
        assert torch.equal(masked_ids[~masked], ids[~masked]) and torch.equal(ids, caption(30, padding=4))


def within(count, draws, p, sigmas=4.5):
    return abs(count - draws * p) < sigmas * math.sqrt(draws * p * (1 - p))


@pytest.mark.parametrize("words, ratio, captions", [(2000, 0.5, 20), (10, 0.2, 4000)])     # long, and short
def test_80_per_cent_become_mask_10_a_random_word_10_stay(words, ratio, captions):
    ids, source = caption(words), generator()
    became_mask = became_another = stayed = beside = 0
    for _ in range(captions):
        masked_ids, masked = mask_words(ids, 10 ** 6, source, ratio)
        found, was = masked_ids[masked], ids[masked]
        became_mask += int((found == MASK).sum())
        stayed += int((found == was).sum())
        became_another += int(((found != MASK) & (found != was)).sum())
        beside += int((masked[1:] & masked[:-1]).any())
    total = captions * round(ratio * words)
    assert became_mask + became_another + stayed == total
    assert within(became_mask, total, 0.8) and within(became_another, total, 0.1)
    assert within(stayed, total, 0.1)
    if words == 10:
        assert within(beside, captions, 9 / 45), "the two are neighbours no more often than by chance"


def test_random_words_are_drawn_from_all_words_and_no_special_token():
    ids, source, drawn = caption(3)[[0] + 300 * [1] + [4]], generator(), []
    for _ in range(40):
        masked_ids, masked = mask_words(ids, 15, source, 1.0)
        drawn += masked_ids[masked].tolist()
    others = [word for word in drawn if word not in (MASK, 5)]              # 5 is also what stayed
    assert set(others) == set(range(6, 15))
    assert all(within(others.count(word), len(others), 1 / 9) for word in range(6, 15))
    masked_ids, _ = mask_words(caption(1)[[0] + 5000 * [1] + [2]], 6, source, 1.0)    # one word to draw from
    assert within(int((masked_ids == MASK).sum()), 5000, 0.8)
    assert set(masked_ids.tolist()) == {CLS, SEP, MASK, 5}


def test_every_word_is_as_likely_to_be_masked():
    source, times = generator(), torch.zeros(22)
    for _ in range(4000):
        times += mask_words(caption(20), 100, source)[1]
    assert all(within(count, 4000, 3 / 20) for count in times[1:21].tolist())


def test_word_masks_follow_from_the_generator():
    first, again, other = (mask_words(caption(40), 999, generator(seed), 0.5) for seed in (1, 1, 2))
    assert all(map(torch.equal, first, again)) and not torch.equal(first[1], other[1])
