"""The pictures that a run leaves. Frames are uint8 (T, H, W, 3).

A text, a clip and a chart are blocks (Pillow images), `grid` sets blocks in rows and columns, `save` puts a
title above them and writes the file. A block is as large as what it holds and a column as wide as its widest
block, so nothing overlaps. Sizes are twice those on a screen, which keeps the pictures crisp in a README.
"""

import colorsys
import os
import textwrap
import unicodedata
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from toy_data.clips import read_clip, spans

PAPER, INK, FAINT, GRID, RIGHT, WRONG = "#ffffff", "#33373d", "#777d86", "#e4e7ea", "#1f9d55", "#d23f3f"
SERIES = ["#3b6ea8", "#d9803f", "#4b9b68", "#b5505c", "#7f66a8", "#8a6d55", "#c06fa4", "#4a8d9c"]
TITLE, BODY, SMALL = 38, 26, 22  # sizes of type
GAP, MARGIN = 8, 40
TYPED = str.maketrans({"–": "-", "—": "-", "−": "-", "→": "->", "≠": "!=", "×": "x", "ß": "ss"})


# ---- Blocks and pages --------------------------------------------------------------------------------------
@lru_cache
def font(size):
    return ImageFont.load_default(size=size)


def drawable(text):
    """Pillow's own font knows ASCII, quotes and the middle dot: accents go, other letters become "?"."""
    letters = unicodedata.normalize("NFKD", " ".join(str(text)[:1000].translate(TYPED).split()))
    letters = [letter for letter in letters if not unicodedata.combining(letter)]
    return "".join(letter if " " <= letter <= "~" or letter in "·‘’“”" else "?" for letter in letters)


def write(text, width, size=BODY, colour=INK, most_lines=3):
    """A block of text wrapped at about `width`, as large as the text is; what is left out ends in dots."""
    face, step = font(size), round(1.3 * size)
    letters = round(width / face.getlength("a red circle moves to the left") * 30)
    lines = textwrap.wrap(drawable(text), letters, max_lines=most_lines, placeholder=" ...") or [""]
    block = Image.new("RGB", (round(max(map(face.getlength, lines))) + 2, step * len(lines)), PAPER)
    for i, line in enumerate(lines):
        ImageDraw.Draw(block).text((0, i * step), line, font=face, fill=colour)
    return block


def grid(blocks, columns, gap=GAP, gap_below=GAP):
    """Blocks set row by row, each at the top left of its place; columns=1 stacks them."""
    rows = [blocks[i:i + columns] for i in range(0, len(blocks), columns)]
    widths = [max(block.width for block in blocks[i::columns]) + gap for i in range(len(rows[0]))]
    heights = [max(block.height for block in row) + gap_below for row in rows]
    paper = Image.new("RGB", (sum(widths) - gap, sum(heights) - gap_below), PAPER)
    for i, row in enumerate(rows):
        for j, block in enumerate(row):
            paper.paste(block, (sum(widths[:j]), sum(heights[:i])))
    return paper


def thumbnail(frame, side):
    """(H, W, 3) -> a block whose longer side is `side`; small frames keep their hard pixels."""
    scale = side / max(frame.shape[:2])
    size = [max(1, round(scale * length)) for length in (frame.shape[1], frame.shape[0])]
    how = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS
    return Image.fromarray(frame).resize(size, how)


def strip(frames, side, most, columns):
    """(T, H, W, 3) -> up to `most` frames, evenly spaced in time, in so many columns."""
    shown = np.linspace(0, len(frames) - 1, min(len(frames), most)).round().astype(int)
    return grid([thumbnail(frames[t], side) for t in shown], columns)


def save(path, title, blocks, columns=1, gap=GAP, gap_below=GAP):
    """A page of blocks with its title and margins, written whole or not at all."""
    body = grid(blocks or [write("Nothing to show.", 800, colour=FAINT)], columns, gap, gap_below)
    heading = [write(title, max(body.width, 800), TITLE)] if title else []
    part = Path(path).with_name(f".{Path(path).name}.part")
    ImageOps.expand(grid([*heading, body], 1, gap_below=28), MARGIN, PAPER).save(part, "PNG", optimize=True)
    os.replace(part, path)


# ---- Charts ------------------------------------------------------------------------------------------------
def round_ticks(values):
    """Round numbers, about six, the first at or below the lowest value, the last at or above the highest."""
    values = [value for value in values if np.isfinite(value)] or [0, 1]
    low, high = min(values), max(values)
    if low == high:
        low, high = low - (abs(low) / 10 or 0.5), high + (abs(high) / 10 or 0.5)
    rough = (high - low) / 5
    power = 10.0 ** np.floor(np.log10(rough))
    step = power * min(factor for factor in (1, 2, 2.5, 5, 10) if factor * power >= 0.999 * rough)
    return step * np.arange(np.floor(low / step + 1e-6), np.ceil(high / step - 1e-6) + 1)


def number(value, percent=False):
    if percent:
        return f"{100 * value:.3g}%"
    return f"{value / 1000:.4g}k" if 1000 <= abs(value) < 1e6 else f"{value:.4g}"


def chart(name, series, baselines, percent):
    """One panel of `curves`. The last value and the name of each line stand below, in its colour."""
    lines = [(label, np.array(points, float).reshape(-1, 2)) for label, points in series.items()]
    x, y = np.concatenate([np.empty((0, 2)), *(points for _, points in lines)]).T
    x_ticks = round_ticks(x)
    ends = x_ticks[[0, -1]]
    lines += [(label, np.array([*zip(ends, [level] * 2)], float)) for label, level in baselines.items()]
    y_ticks = round_ticks([*y, *baselines.values(), *[0] * percent])
    left, top, right, bottom, face = 84, 60, 560, 360, font(SMALL)
    panel = Image.new("RGB", (620, bottom + 44), PAPER)
    panel.paste(write(name, 620, most_lines=1))
    draw, legend = ImageDraw.Draw(panel), []
    for value, height in zip(y_ticks, np.linspace(bottom, top, len(y_ticks))):
        draw.line((left, height, right, height), GRID, 2)
        draw.text((left - 12, height), number(value, percent), FAINT, face, anchor="rm")
    for value, across in zip(x_ticks, np.linspace(left, right, len(x_ticks))):
        draw.text((across, bottom + 14), number(value), FAINT, face, anchor="mt")
    for i, (label, points) in enumerate(lines):
        colour, thick = (SERIES[i % len(SERIES)], 4) if i < len(series) else (FAINT, 2)
        finite = np.isfinite(points).all(1)
        if finite.any():
            last = number(points[finite][-1, 1], percent)
            legend.append(write(f"{last} {label}", 620, SMALL, colour, most_lines=1))
        pixels = np.stack([np.interp(points[:, 0], ends, (left, right)),
                           np.interp(points[:, 1], y_ticks[[0, -1]], (bottom, top))], 1)
        for run in np.split(np.arange(len(points)), np.flatnonzero(np.diff(finite)) + 1):
            if finite[run].any():  # then all of them are
                draw.line(pixels[run].ravel().tolist(), colour, thick, joint="curve")
                draw.circle(pixels[run[-1]].tolist(), thick, colour)
    return grid([panel, *(legend or [write("no points yet", 620, SMALL, FAINT)])], 1)


# ---- The pictures ------------------------------------------------------------------------------------------
def curves(panels, path, title=""):
    """panels: a list of (name, {series: [(x, y), ...]}, {baseline: y}, percent), percent being True where y
    is a fraction of 1. Line charts, two or three in a row; a y that is None or not finite is a gap."""
    charts, columns = [chart(*panel) for panel in panels], 2 if len(panels) in (2, 4) else 3
    save(path, title, charts, columns, gap=40, gap_below=48)


def contact_sheet(entries, path, title=""):
    """entries: a list of (frames uint8 (T, H, W, 3), text). Two columns of clips, each above its text."""
    width, tiles = 4 * 192 + 3 * GAP, []
    for frames, text in entries:
        columns = min(len(frames), 8)
        side = min(192, (width + GAP) // columns - GAP)
        tiles.append(grid([strip(frames, side, 8, columns), write(text, width)], 1))
    save(path, title, tiles, columns=2, gap=48, gap_below=32)


def codebook(entries, path, title=""):
    """entries: a list of (label, crops uint8 (n, h, w, 3), [(word, probability or frequency), ...]). A tile
    per code: its label, up to eight of its crops, its words."""
    width, tiles = 8 * 64 + 7 * GAP, []
    for label, crops, words in entries:
        shown = [strip(crops, 64, most=8, columns=8)] if len(crops) else []
        words = " · ".join(f"{word} {value:.3g}" for word, value in words)
        tiles.append(grid([write(label, width, SMALL, FAINT), *shown, write(words, width, SMALL)], 1))
    save(path, title, tiles, columns=3, gap=48, gap_below=36)


def code_patch(width, height, shown, true, masked):
    """A patch in the colour of its code. A masked one is framed green where that is the true code, or red."""
    hue = int(shown) * 0.618034 % 1  # golden steps keep the colours of neighbouring numbers apart
    colour = colorsys.hls_to_rgb(hue, 0.74 + 0.05 * (int(shown) % 3), 0.6)
    patch = Image.new("RGB", (width, height), tuple(round(255 * channel) for channel in colour))
    draw, text = ImageDraw.Draw(patch), str(shown) if shown == true else f"{shown}\n({true})"
    face = font(min(height * 3 // 10, 2 * (width - 14) // max(map(len, text.split()))))  # fits in the frame
    draw.multiline_text((width / 2, height / 2), text, INK, face, anchor="mm", align="center", spacing=2)
    if masked:
        draw.rectangle((0, 0, width - 1, height - 1), outline=PAPER, width=7)
        draw.rectangle((0, 0, width - 1, height - 1), outline=RIGHT if shown == true else WRONG, width=5)
    return patch


def masked_clip(frames, mask, true, predicted, caption):
    """Three rows of T frames (T, H, W, 3) of (T, g, g) patches: the frames, the model's input, the codes."""
    g = mask.shape[-1]
    whole = [thumbnail(frame, g * max(56, 192 // g)) for frame in frames]
    seen, codes = [frame.copy() for frame in whole], [frame.copy() for frame in whole]
    across, down = ([round(length * i / g) for i in range(g + 1)] for length in whole[0].size)
    for t, y, x in np.ndindex(mask.shape):
        left, top, right, bottom = box = across[x], down[y], across[x + 1], down[y + 1]
        shown = predicted[t, y, x] if mask[t, y, x] else true[t, y, x]
        codes[t].paste(code_patch(right - left, bottom - top, shown, true[t, y, x], mask[t, y, x]), box)
        if mask[t, y, x]:
            seen[t].paste("#000000", box)
    names = [write(name, 150, SMALL, FAINT) for name in ("frames", "masked frames", "codes")]
    rows = grid([names[0], *whole, names[1], *seen, names[2], *codes], 1 + len(whole))
    return grid([rows, write(caption, rows.width)], 1)


def masked(entries, path, title=""):
    """entries: a list of dicts: frames uint8 (T, H, W, 3), mask bool (T, g, g), true and predicted int
    (T, g, g), caption. Three rows of frames a clip, its caption below, and above them a legend."""
    clips = [masked_clip(**entry) for entry in entries]
    examples = [(17, 17, False, "visible patch and its code"), (17, 17, True, "masked, predicted correctly"),
                (4, 17, True, "masked, predicted 4, true 17")]
    legend = [grid([code_patch(64, 64, *code), write(text, 205, SMALL)], 2, 16) for *code, text in examples]
    columns = 2 if len(clips) > 1 and max(clip.width for clip in clips) < 1200 else 1
    save(path, title, clips and [grid(legend, 3, gap=32), grid(clips, columns, 48, 44)], gap_below=32)


def retrieval(rows, ranks, names, best, manifest, size, path, title="", queries=8):
    """Queries over the range of ranks, a row each: the caption, its clip's rank, and the clips of the highest
    scores, its own framed in green. `rows` are the Q queries, `ranks` (Q,) the ranks of their clips, `best`
    the highest scores and their videos' places in `names`, two of (Q, shown)."""
    blocks = []
    for q in ranks.argsort()[np.linspace(0, len(rows) - 1, min(queries, len(rows))).astype(int)].tolist():
        rank = write(f"its clip: rank {ranks[q]}", 300, SMALL, RIGHT if ranks[q] == 1 else FAINT)
        blocks.append(grid([write(rows[q]["caption"], 300, most_lines=6), rank], 1))
        for score, v in zip(*(x[q].tolist() for x in best)):
            video = manifest.video_path({"video": names[v]})
            frames, _ = read_clip(video, lambda count: spans(count, 4), size)
            clip = ImageOps.expand(strip(frames, 108, most=4, columns=2), 4, PAPER)
            clip = ImageOps.expand(clip, 8, RIGHT if names[v] == rows[q]["video"] else PAPER)
            blocks.append(grid([clip, write(f"{score:.2f}", clip.width, SMALL)], 1, gap_below=2))
    save(path, title, blocks, 1 + best[0].shape[1], gap=20, gap_below=36)
