"""The pictures that a run leaves: what is drawn is there, and odd input does not end a run."""

import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageColor

from toy_data import plots

GREEN, RED = (ImageColor.getrgb(colour) for colour in (plots.RIGHT, plots.WRONG))
LONG = "A small red circle moves left, " * 40 + "Donaudampfschifffahrtsgesellschaft" * 20
PATCHES = np.zeros((1, 3, 3), bool), np.full((1, 3, 3), 17)  # a mask without a masked patch, and codes
LABELS = "left right up down still jumps blinks swells shakes flashes".split()
BLUE = (90, 120, 200)


def flat_clip(colour=BLUE, frames=4, height=96, width=96):
    return np.tile(np.uint8(colour), (frames, height, width, 1))


def drawn(draw, *arguments, **options):
    """The page that `draw` writes, uint8 (H, W, 3)."""
    draw(*arguments, "page.png", **options)
    with Image.open("page.png") as page:
        assert page.format == "PNG"
        return np.array(page.convert("RGB"))


def where(page, colour):
    """The rows and columns of a colour's pixels."""
    return np.nonzero((page == np.uint8(colour)).all(-1))


def count(page, colour):
    return len(where(page, colour)[0])


def clip_of_codes(mask, true, predicted, caption="a caption", **clip):
    frames = flat_clip(frames=len(mask), **clip)
    return {"frames": frames, "mask": mask, "true": true, "predicted": predicted, "caption": caption}


def queries(own, captions=("a query",), videos=3):
    """Arguments of `retrieval`: query i's clip is video own[i], and video v has the v-th highest score."""
    for v in range(videos):
        np.save(f"{v}.npy", flat_clip())
    rows = [{"caption": caption, "video": f"{v}.npy"} for caption, v in zip(captions, own)]
    scores = -torch.arange(videos).float().repeat(len(rows), 1)
    names = [f"{v}.npy" for v in range(videos)]
    return rows, torch.tensor(own) + 1, names, scores, SimpleNamespace(folder=Path(".")), 96


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("draw, nothing, long", [
    (plots.contact_sheet, [[]], [[(flat_clip(), LONG)]]),
    (plots.codebook, [[]], [[(LONG, flat_clip(), [(LONG, 3.0), ("red", 0.1)])]]),
    (plots.masked, [[]], [[clip_of_codes(*PATCHES, PATCHES[1], LONG)]]),
    (plots.curves, [[]], [[(LONG, {LONG: [(0, 1), (5, 2)]}, {LONG: 1.5}, False)]]),
    (plots.confusion, [[], []], [[[123456]], [LONG]]),
])
def test_every_picture_takes_no_entries_and_long_text(draw, nothing, long):
    page = drawn(draw, *nothing)
    assert (page < 200).any()
    assert len(drawn(draw, *nothing, title="Nothing learned")) > len(page)
    page = drawn(draw, *long, title=LONG)
    assert page.shape[0] < 1500 and page.shape[1] < 1800
    for edge in (page[:30], page[-30:], page[:, :30], page[:, -30:]):
        assert (edge == 255).all()


def test_a_page_is_written_whole_or_not_at_all(monkeypatch):
    drawn(plots.contact_sheet, [(flat_clip(), "first")])
    before = open("page.png", "rb").read()

    def fail(*_, **options):
        raise OSError("no space left on device")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError):
        plots.contact_sheet([(flat_clip(), "second")], "page.png")
    assert open("page.png", "rb").read() == before and os.listdir() == ["page.png"]


# ---- Text and frames ---------------------------------------------------------------------------------------

def test_wrapped_lines_fit_hold_every_letter_and_end_at_a_word():
    face = plots.font(26)
    lines = plots.wrap(LONG[:900], face, 300, most_lines=200)
    assert max(map(face.getlength, lines)) <= 300
    assert "".join(lines).replace(" ", "") == LONG[:900].replace(" ", "")
    first, last = plots.wrap(LONG, face, 300, most_lines=2)
    *words, dots = last.split()
    assert dots == "..." and words and set(words) <= set(LONG.split()) and face.getlength(last) <= 300
    assert plots.wrap("short", face, 300, most_lines=2) == ["short"]


def test_contact_sheet_shows_clips_in_two_columns_over_their_text():
    colours = [(200, 10, 10), (10, 200, 10), (10, 10, 200)]
    page = drawn(plots.contact_sheet, [(flat_clip(colour), "a caption") for colour in colours])
    (red_y, red_x), (green_y, green_x), (blue_y, blue_x) = (where(page, colour) for colour in colours)
    assert len(red_y) == len(green_y) == len(blue_y) == 4 * 192 * 192
    assert red_y.min() == green_y.min() and red_x.max() < green_x.min()
    assert blue_x.min() == red_x.min() and blue_y.min() > red_y.max()
    between = page[red_y.max() + 1:blue_y.min(), red_x.min():red_x.max()]
    assert (between < 100).any()


# ---- Curves ------------------------------------------------------------------------------------------------

def line_of(page, colour=plots.SERIES[0]):
    """The rows and columns of a line, without the legend below the chart."""
    return where(page[:430], ImageColor.getrgb(colour))


def test_a_curve_rises_as_its_values_do():
    page = drawn(plots.curves, [("", {"": [(x, x / 10) for x in range(11)]}, {}, True)])
    y, x = line_of(page)
    heights = [y[x == column].mean() for column in np.unique(x)][:-8]  # the dot at its end
    assert np.diff(heights).max() <= 1 and heights[0] - heights[-1] > 200


def test_a_gap_is_left_where_a_value_is_not_finite():
    line = [(x, 1.0) for x in range(11)]
    widths = []
    for hole in (1.0, float("nan"), None, float("inf")):
        line[5] = (5, hole)
        widths.append(len(np.unique(line_of(drawn(plots.curves, [("", {"": line}, {}, False)]))[1])))
    assert widths[1] == widths[2] == widths[3]
    assert widths[0] - widths[1] == pytest.approx(2 / 10 * 476, abs=12)  # the two spans beside the hole


def test_a_baseline_is_a_level_line_at_its_height():
    page = drawn(plots.curves, [("", {"": [(0, 0.0), (9, 1.0)]}, {"chance": 0.5}, True)])
    y, x = line_of(page, plots.FAINT)
    row = np.bincount(y).argmax()
    assert np.ptp(x[y == row]) > 400
    curve = line_of(page)[0]
    assert row == pytest.approx((curve.min() + curve.max()) / 2, abs=4)


def test_one_point_is_a_dot_and_an_empty_panel_says_so():
    y, x = line_of(drawn(plots.curves, [("", {"": [(500, 0.2)]}, {}, True)]))
    assert 4 < np.ptp(x) < 14 and 4 < np.ptp(y) < 14
    empty = drawn(plots.curves, [("", {"never": [], "unknown": [(0, float("nan"))]}, {}, False)])
    assert count(empty, ImageColor.getrgb(plots.SERIES[0])) == 0
    assert (empty[450:, 40:200] < 200).any()


@pytest.mark.parametrize("low, high", [(0, 1), (0, 12000), (0.93, 0.97), (-3, 8), (1e-6, 1e-4), (4.9, 5.1)])
def test_ticks_are_few_round_and_span_the_values(low, high):
    ticks = plots.round_ticks([high, float("nan"), low])
    step = ticks[1] - ticks[0]
    assert 3 <= len(ticks) <= 8
    assert ticks[0] <= low + 1e-6 * step and ticks[-1] >= high - 1e-6 * step
    assert ticks[1] > low and ticks[-2] < high
    assert f"{step:.1e}"[:3] in ("1.0", "2.0", "2.5", "5.0")


# ---- Codes -------------------------------------------------------------------------------------------------

def test_codebook_shows_up_to_eight_crops_a_code_and_its_words_below():
    crops = flat_clip(frames=12, height=32, width=32)
    pages = [drawn(plots.codebook, [("code 17", crops[:n], words)])
             for n, words in ((0, []), (3, []), (12, [("circle", 12.3), ("red", 0.04)]))]
    assert [count(page, BLUE) for page in pages] == [0, 3 * 64 * 64, 8 * 64 * 64]
    below = [(page[where(page, BLUE)[0].max() + 1:] < 100).any() for page in pages[1:]]
    assert below == [False, True]


def test_masked_patches_are_black_where_the_mask_is():
    mask = np.zeros((2, 3, 3), bool)
    mask[0, 0, 2] = mask[1, 1, 0] = mask[1, 2, 2] = True
    true = np.full((2, 3, 3), 17)
    page = drawn(plots.masked, [clip_of_codes(mask, true, true)])
    y, x = where(page, BLUE)
    top, left = y.min() + 192 + plots.GAP, x.min()
    for t, row, column in np.ndindex(2, 3, 3):
        start = left + t * (192 + plots.GAP) + column * 64
        patch = page[top + row * 64:top + row * 64 + 64, start:start + 64]
        assert (patch == ([0, 0, 0] if mask[t, row, column] else BLUE)).all()


def test_masked_patches_are_framed_by_whether_the_code_is_right():
    mask, true = np.zeros((1, 3, 3), bool), np.full((1, 3, 3), 17)
    mask[0, 1, 1] = True
    page = {code: drawn(plots.masked, [clip_of_codes(mask, true, 0 * true + code)]) for code in (17, 4)}
    nothing_masked = drawn(plots.masked, [clip_of_codes(*PATCHES, true)])
    green, red = count(nothing_masked, GREEN), count(nothing_masked, RED)  # those in the legend
    frame = 64 * 64 - 54 * 54
    assert (count(page[17], GREEN), count(page[17], RED)) == (green + frame, red)
    assert (count(page[4], GREEN), count(page[4], RED)) == (green, red + frame)


# ---- Retrieval and confusion -------------------------------------------------------------------------------

def test_the_true_clip_is_framed_green_and_no_other():
    found, lost, first = (drawn(plots.retrieval, *queries([v], videos=3), shown=2) for v in (1, 2, 0))
    assert count(lost, GREEN) == 0
    clips, frame = np.unique(where(lost, BLUE)[1]), where(found, GREEN)[1]
    assert clips.min() < frame.min() < clips[clips > frame.min()].min() and frame.max() > clips.max()
    assert count(first, GREEN) > count(found, GREEN)  # rank 1 is written in green


def test_queries_are_drawn_from_all_over_the_ranks():
    page = drawn(plots.retrieval, *queries([3, 0, 2, 1, 4], [LONG] * 5, 5), queries=3, shown=2)
    assert count(page, BLUE) == 3 * 2 * 4 * 108 * 108
    assert len(np.unique(where(page, GREEN)[0])) < 340  # of ranks 1, 3 and 5 one is among the first two


def test_right_answers_are_green_wrong_ones_red_and_the_stronger_the_more():
    right, wrong = (drawn(plots.confusion, counts, ["a", "b"])
                    for counts in ([[3, 0], [0, 7]], [[0, 3], [7, 0]]))
    assert count(right, GREEN) > 2 * 80 * 80 and count(right, RED) == 0
    assert count(wrong, RED) > 2 * 80 * 80 and count(wrong, GREEN) == 0
    y, x = where(wrong, RED)
    assert y[x > x.mean()].max() < y[x < x.mean()].min()  # (a, b) lies above and to the right of (b, a)
    page = drawn(plots.confusion, [[0, 5, 5], [0, 1, 0], [0, 0, 0]], ["a", "b", "c"])
    half = [round((255 + channel) / 2) for channel in RED]
    assert count(page, half) > 2 * 80 * 80 and count(page, GREEN) > 80 * 80


@pytest.mark.parametrize("times", [1, 5])
def test_every_label_is_written_beside_its_row_and_below_its_column(times):
    labels = LABELS * times
    page = drawn(plots.confusion, 7 * np.eye(len(labels), dtype=int), labels)
    y, x = where(page, GREEN)
    beside, below = page[y.min():y.max(), 40:x.min() - 2], page[y.max() + 3:-40, x.min():x.max()]
    for names in (beside.min((1, 2)), below.min((0, 2))):  # the darkest of each row, of each column
        parts = np.array_split(names, len(labels))
        assert all(part.min() < 160 and part[0] == part[-1] == 255 for part in parts)
