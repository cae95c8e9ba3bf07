"""The pictures that a run leaves: what is drawn is there, and odd input does not end a run."""

import os
import runpy
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageColor

from toy_data import pictures

GREEN, RED = (ImageColor.getrgb(colour) for colour in (pictures.RIGHT, pictures.WRONG))
LONG = "A small red circle moves left, " * 40 + "Donaudampfschifffahrtsgesellschaft" * 20
BOXES = np.zeros((1, 3, 3), bool), np.full((1, 3, 3), 17)  # a mask without a masked cell, and codes


def flat_clip(colour=(90, 120, 200), frames=4, height=96, width=96):
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


LABELS = "left right up down still jumps blinks swells shakes flashes".split()


def query(true_place, found=3, rank=1):
    clips = [(flat_clip(), 1 - i / 10, i == true_place, "a clip") for i in range(found)]
    return {"caption": "a query", "rank": rank, "found": clips}


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


# ---- Every picture -----------------------------------------------------------------------------------------

EMPTY = [(pictures.contact_sheet, [[]]), (pictures.curves, [[]]), (pictures.codebook, [[]]),
         (pictures.masked, [[]]), (pictures.retrieval, [[]]), (pictures.confusion, [[], []])]


@pytest.mark.parametrize("draw, nothing", EMPTY)
def test_no_entries_still_make_a_page_that_says_so(draw, nothing):
    page = drawn(draw, *nothing)
    assert (page < 200).any()
    assert len(drawn(draw, *nothing, title="Nothing learned")) > len(page)


@pytest.mark.parametrize("draw, one", [
    (pictures.contact_sheet, [[(flat_clip(), LONG)]]),
    (pictures.codebook, [[(LONG, flat_clip(), [(LONG, 3.0), ("red", 0.1)])]]),
    (pictures.masked, [[clip_of_codes(*BOXES, BOXES[1], LONG)]]),
    (pictures.retrieval, [[{**query(0), "caption": LONG}]]),
    (pictures.curves, [[(LONG, {LONG: [(0, 1), (5, 2)]}, {LONG: 1.5}, False)]]),
    (pictures.confusion, [[[123456]], [LONG]]),
])
def test_long_text_neither_runs_off_the_page_nor_stretches_it(draw, one):
    page = drawn(draw, *one, title=LONG)
    assert page.shape[0] < 1500 and page.shape[1] < 1800
    for edge in (page[:30], page[-30:], page[:, :30], page[:, -30:]):
        assert (edge == 255).all()


def test_a_page_is_written_whole_or_not_at_all(monkeypatch):
    drawn(pictures.contact_sheet, [(flat_clip(), "first")])
    before = open("page.png", "rb").read()

    def fail(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError):
        pictures.contact_sheet([(flat_clip(), "second")], "page.png")
    assert open("page.png", "rb").read() == before
    assert os.listdir() == ["page.png"]


def test_a_heavy_picture_is_made_lighter():
    noise = np.random.default_rng(0).integers(0, 256, (8, 4, 192, 192, 3), dtype=np.uint8)
    pictures.contact_sheet([(frames, "noise") for frames in noise], "page.png")
    assert os.path.getsize("page.png") < noise.nbytes / 2.5
    page = np.array(Image.open("page.png").convert("RGB"))
    assert abs(page[70:200, 60:200].mean() - 127.5) < 10


# ---- Text and frames ---------------------------------------------------------------------------------------

def test_wrapped_lines_fit_and_hold_every_letter():
    face = pictures.font(26)
    lines = pictures.wrap(LONG[:900], face, 300, most_lines=200)
    assert max(map(face.getlength, lines)) <= 300
    assert "".join(lines).replace(" ", "") == LONG[:900].replace(" ", "")


def test_text_past_the_last_line_ends_in_dots():
    face = pictures.font(26)
    lines = pictures.wrap(LONG, face, 300, most_lines=2)
    assert len(lines) == 2 and lines[1].endswith("...")
    assert max(map(face.getlength, lines)) <= 300
    assert pictures.wrap("short", face, 300, most_lines=2) == ["short"]


def test_letters_that_the_font_lacks_are_spelled_as_typed():
    assert pictures.drawable("Café  –\n17≠4 · 中") == "Cafe - 17!=4 · ?"


def test_thumbnails_keep_shape_and_hard_pixels():
    frame = np.zeros((2, 4, 3), np.uint8)
    frame[:, 2:] = 255
    small = np.array(pictures.thumbnail(frame, 96))
    assert small.shape == (48, 96, 3)
    assert (small[:, :48] == 0).all() and (small[:, 48:] == 255).all()
    assert pictures.thumbnail(flat_clip(height=854, width=480)[0], 192).size == (108, 192)


# ---- Contact sheet -----------------------------------------------------------------------------------------

def test_contact_sheet_shows_clips_in_two_columns_over_their_text():
    colours = [(200, 10, 10), (10, 200, 10), (10, 10, 200)]
    page = drawn(pictures.contact_sheet, [(flat_clip(colour), "a caption") for colour in colours])
    (red_y, red_x), (green_y, green_x), (blue_y, blue_x) = (where(page, colour) for colour in colours)
    assert len(red_y) == len(green_y) == len(blue_y) == 4 * 192 * 192
    assert red_y.min() == green_y.min() and red_x.max() < green_x.min()
    assert blue_x.min() == red_x.min() and blue_y.min() > red_y.max()
    between = page[red_y.max() + 1:blue_y.min(), red_x.min():red_x.max()]
    assert (between < 100).any()


@pytest.mark.parametrize("frames, shown", [(1, 1), (3, 3), (50, 8)])
def test_contact_sheet_takes_any_number_of_frames(frames, shown):
    page = drawn(pictures.contact_sheet, [(flat_clip(frames=frames), "")])
    _, x = where(page[:60], (90, 120, 200))
    assert (np.diff(np.unique(x)) == pictures.GAP + 1).sum() == shown - 1


# ---- Curves ------------------------------------------------------------------------------------------------

def test_a_higher_value_is_drawn_higher():
    page = drawn(pictures.curves, [("loss", {"low": [(0, 1), (9, 1)], "high": [(0, 2), (9, 2)]}, {}, False)])
    (low, across), (high, _) = (where(page, ImageColor.getrgb(colour)) for colour in pictures.SERIES[:2])
    assert np.median(high) < np.median(low) - 100
    assert np.ptp(across) > 300


def test_a_curve_rises_as_its_values_do():
    page = drawn(pictures.curves, [("", {"": [(x, x / 10) for x in range(11)]}, {}, True)])
    y, x = where(page[:, :460], ImageColor.getrgb(pictures.SERIES[0]))
    heights = [y[x == column].mean() for column in np.unique(x)]
    assert heights == sorted(heights, reverse=True) and heights[0] - heights[-1] > 200


def test_a_gap_is_left_where_a_value_is_not_finite():
    line = [(x, 1.0) for x in range(11)]
    widths = []
    for hole in (1.0, float("nan"), None, float("inf")):
        line[5] = (5, hole)
        page = drawn(pictures.curves, [("", {"": line}, {}, False)])
        widths.append(len(np.unique(where(page[:, :460], ImageColor.getrgb(pictures.SERIES[0]))[1])))
    assert widths[1] == widths[2] == widths[3]
    assert widths[0] - widths[1] == pytest.approx(2 / 10 * 340, abs=12)  # the two spans beside the hole


def test_a_baseline_is_a_dashed_line_at_its_height():
    page = drawn(pictures.curves, [("", {"": [(0, 0.0), (9, 1.0)]}, {"chance": 0.5}, True)])
    y, x = where(page[:380, 130:450], ImageColor.getrgb(pictures.FAINT))  # above the axis
    row = np.bincount(y).argmax()
    dashes = np.unique(x[y == row])
    assert 10 < (np.diff(dashes) > 1).sum() < 30
    plot = where(page[:, :460], ImageColor.getrgb(pictures.SERIES[0]))[0]
    assert row == pytest.approx((plot.min() + plot.max()) / 2, abs=4)


def test_one_point_is_a_dot_and_an_empty_panel_says_so():
    page = drawn(pictures.curves, [("", {"": [(500, 0.2)]}, {}, True)])
    y, x = where(page[:, :460], ImageColor.getrgb(pictures.SERIES[0]))
    assert 4 < np.ptp(x) < 14 and 4 < np.ptp(y) < 14
    empty = drawn(pictures.curves, [("", {"never": [], "unknown": [(0, float("nan"))]}, {}, False)])
    assert count(empty, ImageColor.getrgb(pictures.SERIES[0])) == 0
    assert (empty[180:300, 190:400] < 200).any()


@pytest.mark.parametrize("low, high", [(0, 1), (0, 12000), (0.93, 0.97), (-3, 8), (1e-6, 1e-4), (4.9, 5.1)])
def test_ticks_are_few_round_and_span_the_values(low, high):
    ticks = pictures.round_ticks(low, high)
    step = ticks[1] - ticks[0]
    assert 3 <= len(ticks) <= 8
    assert ticks[0] <= low + 1e-6 * step and ticks[-1] >= high - 1e-6 * step
    assert ticks[1] > low and ticks[-2] < high
    assert f"{step:.1e}"[:3] in ("1.0", "2.0", "2.5", "5.0")


def test_labels_are_moved_apart_and_keep_their_order():
    placed = pictures.spread([100, 101, 20, 99], apart=30, lowest=110)
    assert list(np.argsort(placed)) == [2, 3, 0, 1]
    assert (np.diff(np.sort(placed)) >= 30).all() and placed.max() <= 110


def test_panels_stand_side_by_side():
    panel = ("loss", {"total": [(0, 2), (9, 1)]}, {}, False)
    sizes = [drawn(pictures.curves, [panel] * n).shape[:2] for n in (1, 2, 3, 4)]
    assert sizes[0][0] == sizes[1][0] == sizes[2][0] < sizes[3][0]
    assert sizes[0][1] < sizes[1][1] == sizes[3][1] < sizes[2][1]


# ---- Scatter -----------------------------------------------------------------------------------------------

BLUE, ORANGE, SAGE, PINK = pictures.SERIES[:4]


def scattered(dots, bars=()):
    """The pixels, (y, x), of each dot and bar."""
    panel = np.array(pictures.scatter("", "", dots, bars))
    return [where(panel, ImageColor.getrgb(colour)) for *_, colour in [*dots, *bars]]


def test_equal_factors_are_equal_steps_to_the_right_and_higher_is_higher():
    dots = [("", 10, 1, 100, BLUE), ("", 100, 2, 100, ORANGE), ("", 1000, 3, 100, SAGE)]
    y, x = np.array([[y.mean(), x.mean()] for y, x in scattered(dots)]).T
    assert x[2] - x[1] == pytest.approx(x[1] - x[0], abs=1) and x[1] - x[0] > 100
    assert y[0] - y[1] == pytest.approx(y[1] - y[2], abs=1) and y[0] - y[1] > 50


def test_a_dot_is_as_large_as_its_area_even_at_the_edge():
    large, small = scattered([("", 1, 0, 2000, BLUE), ("", 9, 1, 500, ORANGE)])
    assert len(large[0]) == pytest.approx(2000, rel=0.1) and len(small[0]) == pytest.approx(500, rel=0.2)


def test_a_bar_reaches_from_one_value_to_the_other():
    dots = [("", 1, 1, 50, BLUE), ("", 100, 2, 50, ORANGE)]
    (_, low), (_, high), (_, bar) = scattered(dots, [(1, 100, 1.5, PINK)])
    assert bar.min() == pytest.approx(low.mean(), abs=4) and bar.max() == pytest.approx(high.mean(), abs=4)


def test_labels_take_the_first_free_place():
    page = 0, 0, 400, 400
    place = {name: pictures.free_place((100, 20), (200, 200), 10, taken, page) for name, taken in [
        ("right", []), ("left", [(220, 180, 230, 220)]), ("above", [(100, 195, 300, 205)])]}
    assert place["right"][0] > 210 and place["left"][2] < 190 and place["above"][3] < 190
    assert pictures.free_place((100, 20), (350, 200), 10, [], page)[2] < 340  # no room on the right


@pytest.mark.parametrize("low, high, ticks", [(5, 300, [5, 10, 20, 50, 100, 200]), (0.3, 2, [0.5, 1, 2])])
def test_log_ticks_are_one_two_five(low, high, ticks):
    assert pictures.log_ticks(low, high) == pytest.approx(ticks)


def test_the_papers_figures_are_drawn_from_any_folder():
    script = Path(pictures.__file__).parents[1] / "docs" / "figures.py"
    figures = runpy.run_path(str(script))
    for name in ("figure1", "figure5"):
        figures[name](Path(f"{name}.png"))
        assert 10_000 < os.path.getsize(f"{name}.png") < 100_000


# ---- Codebook ----------------------------------------------------------------------------------------------

def test_codebook_shows_up_to_eight_crops_a_code():
    colour = (200, 10, 10)
    crops = flat_clip(colour, frames=12, height=32, width=32)
    pages = [drawn(pictures.codebook, [("code 17", crops[:n], [("red", 3.1)])]) for n in (0, 3, 12)]
    shown = [count(page, colour) for page in pages]
    assert shown == [0, 3 * 64 * 64, 8 * 64 * 64]


def test_codebook_words_are_written_below_the_crops():
    crops = flat_clip((200, 10, 10), frames=8, height=32, width=32)
    without, with_words = (drawn(pictures.codebook, [("code 17", crops, words)])
                           for words in ([], [("circle", 12.3), ("red", 0.04)]))
    below = where(with_words, (200, 10, 10))[0].max() + 1
    assert (with_words[below:] < 100).any() and not (without[below:] < 100).any()


def test_codes_of_two_numbers_stand_around_a_circle_where_they_point():
    colours = {(1, 0): (200, 10, 10), (0, 1): (10, 200, 10), (-1, 0): (10, 10, 200), (0, -1): (200, 200, 10)}
    page = drawn(pictures.circle, [(np.array(way), flat_clip(colour, 1)[0], "a word")
                                   for way, colour in colours.items()])
    middle = np.array(page.shape[:2])[::-1] / 2
    for way, colour in colours.items():
        y, x = where(page, colour)
        towards = (np.array([x.mean(), y.mean()]) - middle) * (1, -1)
        assert np.dot(towards / np.linalg.norm(towards), way) > 0.98


# ---- Masked ------------------------------------------------------------------------------------------------

def test_masked_cells_are_black_where_the_mask_is():
    mask = np.zeros((2, 3, 3), bool)
    mask[0, 0, 2] = mask[1, 1, 0] = mask[1, 2, 2] = True
    true = np.full((2, 3, 3), 17)
    page = drawn(pictures.masked, [clip_of_codes(mask, true, true)])
    y, x = where(page, (90, 120, 200))  # the frames' own colour
    top, left = y.min() + 192 + pictures.GAP, x.min()
    for t in range(2):
        for row, column in np.ndindex(3, 3):
            start = left + t * (192 + pictures.GAP) + column * 64
            cell = page[top + row * 64:top + row * 64 + 64, start:start + 64]
            assert (cell == ([0, 0, 0] if mask[t, row, column] else [90, 120, 200])).all()


def test_masked_cells_are_framed_by_whether_the_code_was_found():
    mask, true = np.zeros((1, 3, 3), bool), np.full((1, 3, 3), 17)
    mask[0, 1, 1] = True
    page = {code: drawn(pictures.masked, [clip_of_codes(mask, true, 0 * true + code)]) for code in (17, 4)}
    nothing_masked = drawn(pictures.masked, [clip_of_codes(*BOXES, true)])
    green, red = count(nothing_masked, GREEN), count(nothing_masked, RED)  # those in the legend
    frame = 64 * 64 - 54 * 54
    assert (count(page[17], GREEN), count(page[17], RED)) == (green + frame, red)
    assert (count(page[4], GREEN), count(page[4], RED)) == (green, red + frame)


def test_a_code_has_one_colour_and_near_codes_differ():
    colours = [pictures.code_cell(64, 64, code, code, False).getpixel((2, 2)) for code in range(40)]
    again = [pictures.code_cell(64, 64, code, code, False).getpixel((2, 2)) for code in np.arange(40)]
    assert colours == again
    assert len(set(colours)) == 40 and min(map(min, colours)) > 120
    assert min(np.abs(np.subtract(a, b)).sum() for a, b in zip(colours, colours[1:])) > 40


def test_masked_takes_eight_cells_a_side_wide_frames_and_large_codes():
    generator = np.random.default_rng(0)
    mask, true = generator.random((1, 8, 8)) < 0.4, generator.integers(0, 9420, (1, 8, 8))
    page = drawn(pictures.masked, [clip_of_codes(mask, true, true[..., ::-1], height=144, width=256)])
    assert count(page, (90, 120, 200)) == 448 * 252 + sum(
        (round(252 * (y + 1) / 8) - round(252 * y / 8)) * 56 for y in np.nonzero(~mask[0])[0])


# ---- Retrieval ---------------------------------------------------------------------------------------------

def test_the_right_clip_is_framed_green_and_no_other():
    found, lost = (drawn(pictures.retrieval, [query(place, rank=7)]) for place in (1, None))
    assert count(lost, GREEN) == 0
    clips = where(lost, (90, 120, 200))[1]
    frame = where(found, GREEN)[1]
    second = np.unique(clips)[np.unique(clips) > frame.min()]
    assert second.min() > frame.min() and frame.max() < clips.max() - 108
    assert clips.min() < frame.min()


def test_the_best_rank_is_written_in_green():
    first, later = (count(drawn(pictures.retrieval, [query(None, rank=rank)]), GREEN) for rank in (1, 2))
    assert first > 0 == later


def test_retrieval_takes_one_frame_and_queries_that_found_nothing():
    one_frame = {"caption": "a", "rank": 1, "found": [(flat_clip(frames=1), -3.2, True, LONG)]}
    page = drawn(pictures.retrieval, [one_frame, query(None, found=0, rank=9), query(0, found=2)])
    assert count(page, (90, 120, 200)) == 108 * 108 * (1 + 4 + 4)


# ---- Confusion ---------------------------------------------------------------------------------------------

def test_right_answers_are_green_and_wrong_ones_red():
    right, wrong = (drawn(pictures.confusion, counts, ["a", "b"])
                    for counts in ([[3, 0], [0, 7]], [[0, 3], [7, 0]]))
    assert count(right, GREEN) > 2 * 80 * 80 and count(right, RED) == 0
    assert count(wrong, RED) > 2 * 80 * 80 and count(wrong, GREEN) == 0
    y, x = where(wrong, RED)
    assert y[x > x.mean()].max() < y[x < x.mean()].min()  # (a, b) lies above and to the right of (b, a)


def test_a_colour_is_the_stronger_the_larger_its_share_of_the_row():
    tints = [pictures.tint(pictures.WRONG, share) for share in (0, 0.2, 0.5, 1)]
    assert tints[0] == (255, 255, 255) and tints[-1] == RED
    assert [min(tint) for tint in tints] == sorted(map(min, tints), reverse=True)
    page = drawn(pictures.confusion, [[0, 5, 5], [0, 1, 0], [0, 0, 0]], ["a", "b", "c"])
    assert count(page, pictures.tint(pictures.WRONG, 0.5)) > 2 * 80 * 80 and count(page, GREEN) > 80 * 80


@pytest.mark.parametrize("times", [1, 5])
def test_every_label_is_written_beside_its_row_and_below_its_column(times):
    labels = LABELS * times
    page = drawn(pictures.confusion, 7 * np.eye(len(labels), dtype=int), labels)
    y, x = where(page, GREEN)
    beside, below = page[y.min():y.max(), 40:x.min() - 2], page[y.max() + 3:-40, x.min():x.max()]
    for names in (beside.min((1, 2)), below.min((0, 2))):  # the darkest of each row, of each column
        parts = np.array_split(names, len(labels))
        assert all(part.min() < 160 and part[0] == part[-1] == 255 for part in parts)


@pytest.mark.slow
def test_four_hundred_labels_stay_one_page():
    page = drawn(pictures.confusion, np.eye(400, dtype=int), [f"{LONG[:20]} {i}" for i in range(400)])
    assert max(page.shape) < 3600 and count(page, GREEN) > 400 * 6 * 6
