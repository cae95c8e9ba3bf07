"""The pictures that a run leaves: what is drawn is there, and odd input does not end a run."""
import os

import numpy as np
import pytest
from PIL import Image, ImageColor

from toy_data import plots

GREEN, RED = (ImageColor.getrgb(colour) for colour in (plots.RIGHT, plots.WRONG))
LONG = "A small red circle moves left, " * 40 + "Donaudampfschifffahrtsgesellschaft" * 20
PATCHES = np.zeros((1, 3, 3), bool), np.full((1, 3, 3), 17)  # a mask without a masked patch, and codes


def flat_clip(frames=4):
    return np.full((frames, 96, 96, 3), 120, np.uint8)


def drawn(draw, *arguments, **options):
    """The page that `draw` writes, uint8 (H, W, 3)."""
    draw(*arguments, "page.png", **options)
    with Image.open("page.png") as page:
        assert page.format == "PNG"
        return np.array(page.convert("RGB"))


def count(page, colour):
    """The number of a colour's pixels."""
    return int((page == np.uint8(colour)).all(-1).sum())


def clip_of_codes(mask, true, predicted, caption="a caption"):
    frames = flat_clip(frames=len(mask))
    return {"frames": frames, "mask": mask, "true": true, "predicted": predicted, "caption": caption}


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("draw, nothing, long", [
    (plots.contact_sheet, [[]], [[(flat_clip(), LONG)]]),
    (plots.codebook, [[]], [[(LONG, flat_clip(), [(LONG, 3.0), ("red", 0.1)])]]),
    (plots.masked, [[]], [[clip_of_codes(*PATCHES, PATCHES[1], LONG)]]),
    (plots.curves, [[]], [[(LONG, {LONG: [(0, 1), (2, None), (5, 2)]}, {LONG: 1.5}, False)]])])
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


def test_masked_patches_are_framed_by_whether_the_code_is_right():
    mask, true = np.zeros((1, 3, 3), bool), np.full((1, 3, 3), 17)
    mask[0, 1, 1] = True
    page = {code: drawn(plots.masked, [clip_of_codes(mask, true, 0 * true + code)]) for code in (17, 4)}
    nothing_masked = drawn(plots.masked, [clip_of_codes(*PATCHES, true)])
    green, red = count(nothing_masked, GREEN), count(nothing_masked, RED)  # those in the legend
    frame = 64 * 64 - 54 * 54
    assert (count(page[17], GREEN), count(page[17], RED)) == (green + frame, red)
    assert (count(page[4], GREEN), count(page[4], RED)) == (green, red + frame)

