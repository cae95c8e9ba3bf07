"""The pictures a run leaves, for people who would rather look than read.

Every picture is set like a page of type: a text, a clip and a chart are blocks (Pillow images), `grid` sets
blocks in rows and columns, `save` puts a title above them and writes the file. A block is as large as what it
holds and a column as wide as its widest block, so nothing overlaps and nothing runs off the page. Sizes are
twice those on a screen, which keeps the pictures crisp in a README. Frames are uint8 (T, H, W, 3), of any
size.
"""

import colorsys
import io
import os
import unicodedata
from bisect import bisect_right
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFont

PAPER, INK, FAINT, GRID, RIGHT, WRONG = "#ffffff", "#33373d", "#777d86", "#e4e7ea", "#1f9d55", "#d23f3f"
SERIES = ["#3b6ea8", "#d9803f", "#4b9b68", "#b5505c", "#7f66a8", "#8a6d55", "#c06fa4", "#4a8d9c"]
TITLE, BODY, SMALL = 38, 26, 22  # sizes of type
GAP, MARGIN = 8, 40
HEAVY = 300_000  # bytes; a heavier picture goes down to 256 colours
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


def wrap(text, face, width, most_lines):
    """Lines at most `width` wide, of a text or of a list of phrases that stay whole; what does not fit in
    `most_lines` of them ends in three dots."""
    lines = [""]
    for word in drawable(text).split() if isinstance(text, str) else map(drawable, text):
        if lines[-1] and face.getlength(f"{lines[-1]} {word}") > width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
        while face.getlength(line := lines[-1]) > width and len(line) > 1:  # one word, longer than a line
            cut = max(1, bisect_right(range(1, len(line)), width, key=lambda n: face.getlength(line[:n])))
            lines[-1:] = line[:cut], line[cut:]
    if len(lines) > most_lines:
        last = lines[most_lines - 1]
        while last and face.getlength(last + "...") > width:
            last = last[:-1]
        lines[most_lines - 1:] = [last.rstrip() + "..."]
    return lines


def write(text, width, size=BODY, colour=INK, most_lines=3):
    """A block of wrapped text, as large as the text is."""
    face, step = font(size), round(1.3 * size)
    lines = wrap(text, face, width, most_lines)
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


def framed(block, colour, thickness):
    outer = Image.new("RGB", (block.width + 2 * thickness, block.height + 2 * thickness), colour)
    outer.paste(block, (thickness, thickness))
    return outer


def save(path, title, blocks, columns=1, gap=GAP, gap_below=GAP, heavy=HEAVY):
    """A page of blocks with its title and margins, written whole or not at all."""
    body = grid(blocks or [write("Nothing to show.", 800, colour=FAINT)], columns, gap, gap_below)
    heading = [write(title, max(body.width, 800), TITLE)] if title else []
    page, encoded = framed(grid([*heading, body], 1, gap_below=28), PAPER, MARGIN), io.BytesIO()
    page.save(encoded, "PNG", optimize=True)
    if encoded.tell() > heavy:
        encoded = io.BytesIO()
        page.quantize(256).save(encoded, "PNG", optimize=True)
    part = Path(path).with_name(f".{Path(path).name}.{os.getpid()}.part")
    try:
        part.write_bytes(encoded.getvalue())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


# ---- Charts ------------------------------------------------------------------------------------------------

def round_ticks(low, high):
    """Four to seven round numbers, the first at or below `low`, the last at or above `high`."""
    rough = (high - low) / 5
    power = 10.0 ** np.floor(np.log10(rough))
    step = power * min(factor for factor in (1, 2, 2.5, 5, 10) if factor * power >= 0.999 * rough)
    return step * np.arange(np.floor(low / step + 1e-6), np.ceil(high / step - 1e-6) + 1)


def log_ticks(low, high):
    """1, 2, 5, 10, 20 ... from `low` to `high`."""
    powers = range(int(np.floor(np.log10(low))), int(np.log10(high)) + 1)
    ticks = [factor * 10.0 ** power for power in powers for factor in (1, 2, 5)]
    return [tick for tick in ticks if low <= tick <= high]


def span(values, percent=False):
    """The lowest and highest of the values, apart even when all are equal; shares are shown from 0."""
    if percent:
        return min([0, *values]), max([0, *values]) or 1
    low, high = (min(values), max(values)) if len(values) else (0, 1)
    apart = 0 if high > low else abs(low) / 10 or 0.5
    return low - apart, high + apart


def number(value, percent, digits=4):
    if percent:
        return f"{100 * value:.3g}%"
    return f"{value / 1000:.{digits}g}k" if 1000 <= abs(value) < 1e6 else f"{value:.{digits}g}"


def spread(heights, apart, lowest):
    """Heights moved until they are `apart` from each other, in the same order, none below `lowest`."""
    order, placed = np.argsort(heights, kind="stable"), np.array(heights, float)
    for above, below in zip(order, order[1:]):
        placed[below] = max(placed[below], placed[above] + apart)
    for i in reversed(order):
        placed[i] = min(placed[i], lowest)
        lowest = placed[i] - apart
    return placed


def draw_line(panel, points, colour):
    """A line through (n, 2) pixels with a gap where one is not finite; a point alone is a dot. Pillow's lines
    are jagged, so this one is drawn three times as large and reduced."""
    mask = Image.new("L", (3 * panel.width, 3 * panel.height))
    draw, finite = ImageDraw.Draw(mask), np.isfinite(points).all(1)
    for run in np.split(3 * points, np.flatnonzero(np.diff(finite)) + 1):
        if len(run) == 1 and np.isfinite(run).all():
            draw.circle(run[0].tolist(), 15, fill=255)
        elif np.isfinite(run).all():
            draw.line(run.ravel().tolist(), fill=255, width=12, joint="curve")
    panel.paste(colour, mask=mask.reduce(3))


def draw_dot(panel, centre, radius, colour):
    """A round dot with a thin edge of paper, which keeps it apart from what lies below it."""
    for outer, fill in ((radius + 2, PAPER), (radius, colour)):
        mask = Image.new("L", (3 * panel.width, 3 * panel.height))
        ImageDraw.Draw(mask).circle([3 * length for length in centre], 3 * outer, fill=255)
        panel.paste(fill, mask=mask.reduce(3))


def axes(name, x_range, y_ticks, percent, box, size, log=False):
    """A panel with its name, grid and ticks, and the function that turns (n, 2) values into its pixels; `log`
    is for x alone."""
    left, top, right, bottom = box
    panel = Image.new("RGB", size, PAPER)
    panel.paste(write(name, size[0], most_lines=1), (0, 0))
    draw, y_range = ImageDraw.Draw(panel), (y_ticks[0], y_ticks[-1])

    def place(points):
        x, y = np.asarray(points, float).reshape(-1, 2).T
        along = (np.log(x), np.log(x_range)) if log else (x, x_range)
        return np.stack([np.interp(*along, (left, right)), np.interp(y, y_range, (bottom, top))], 1)

    for value in y_ticks:
        (_, y), = place((x_range[0], value))
        draw.line((left, y, right, y), fill=GRID, width=2)
        draw.text((left - 12, y), number(value, percent), font=font(SMALL), fill=FAINT, anchor="rm")
    for value in log_ticks(*x_range) if log else round_ticks(*x_range):
        if x_range[0] <= value <= x_range[1]:
            (x, _), = place((value, 0))
            draw.line((x, bottom, x, bottom + 8), fill=FAINT, width=2)
            draw.text((x, bottom + 14), number(value, False), font=font(SMALL), fill=FAINT, anchor="mt")
    draw.line((left, bottom, right, bottom), fill=FAINT, width=2)
    return panel, place


def chart(name, series, baselines, percent):
    """One panel of `curves`. A line's last value and name stand at its end, moved apart where lines meet."""
    series = {label: np.array(points, float).reshape(-1, 2) for label, points in series.items()}
    series = {label: np.where(np.isfinite(points), points, np.nan) for label, points in series.items()}
    known = {label: points[np.isfinite(points).all(1)] for label, points in series.items()}
    x, y = np.concatenate([np.empty((0, 2)), *known.values()]).T
    baselines = {label: level for label, level in baselines.items() if np.isfinite(level)}
    left, top, right, width = 84, 60, 424, 650
    bottom = top + max(300, 30 * (len(series) + len(baselines)))
    y_ticks, labels = round_ticks(*span([*y, *baselines.values()], percent)), []
    panel, place = axes(name, span(x), y_ticks, percent, (left, top, right, bottom), (width, bottom + 44))
    draw = ImageDraw.Draw(panel)
    for label, level in baselines.items():
        (_, height), = place((0, level))
        for dash in range(left, right, 18):
            draw.line((dash, height, min(dash + 10, right), height), fill=FAINT, width=3)
        labels.append((height, level, label, FAINT))
    for (label, points), colour in zip(series.items(), SERIES * len(series)):
        if len(known[label]):
            draw_line(panel, place(points), colour)
            labels.append((place(known[label])[-1, 1], known[label][-1, 1], label, colour))
    if not len(x):
        middle = (left + right) / 2, (top + bottom) / 2
        draw.text(middle, "no points yet", font=font(SMALL), fill=FAINT, anchor="mm")
    heights = spread([label[0] for label in labels], apart=30, lowest=bottom)
    for height, (_, value, label, colour) in zip(heights, labels):
        label = write(f"{number(value, percent, 3)} {label}", width - right - 14, SMALL, colour, most_lines=1)
        panel.paste(label, (right + 14, round(height) - label.height // 2))
    return panel


def free_place(size, centre, radius, taken, within):
    """The box of a label beside a dot: the first of eight places, right, left, above, below and between, that
    lies in the box `within` and on none of the boxes `taken`; where there is none, that on the right."""
    def apart(one, other):
        return one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1]

    boxes = []
    for x, y in ((1, 0), (-1, 0), (0, -1), (0, 1), (1, -1), (1, 1), (-1, -1), (-1, 1)):
        left = centre[0] + x * (radius + 8) + (x - 1) / 2 * size[0]
        top = centre[1] + y * (radius + 4) + (y - 1) / 2 * size[1]
        boxes.append((left, top, left + size[0], top + size[1]))
    for box in boxes:
        inside = within[0] <= box[0] and within[1] <= box[1] and box[2] <= within[2] and box[3] <= within[3]
        if inside and all(apart(box, other) for other in taken):
            return box
    return boxes[0]


def scatter(name, x_name, dots, bars=()):
    """A panel of dots over x on a log scale. dots: a list of (label, x, y, area in pixels, colour); bars: a
    list of (x from, x to, y, colour), drawn as ranges are. Labels stand where there is room."""
    left, top, right, bottom, width, face = 64, 60, 640, 420, 650, font(SMALL)
    x, y, areas = np.array([dot[1:4] for dot in dots], float).T
    radii, (low, high) = np.sqrt(areas / np.pi), span(y)
    room = (high - low) * radii.max() / (bottom - top - 2 * radii.max())  # for whole dots
    ends = [*x, *(end for bar in bars for end in bar[:2])]
    panel, place = axes(name, (min(ends) / 1.5, max(ends) * 1.5), round_ticks(low - room, high + room), False,
                        (left, top, right, bottom), (width, bottom + 74), log=True)
    draw, centres = ImageDraw.Draw(panel), place(np.stack([x, y], 1))
    draw.text((right, bottom + 44), drawable(x_name), FAINT, face, anchor="rt")
    taken = [(*centre - radius, *centre + radius) for centre, radius in zip(centres, radii)]
    for start, end, level, colour in bars:
        line = place([(start, level), (end, level)])
        for stroke in (line, line[0] + [(0, -9), (0, 9)], line[1] + [(0, -9), (0, 9)]):
            draw_line(panel, stroke, colour)
        taken.append((*line[0] - 9, *line[1] + 9))
    largest_first = np.argsort(-radii, kind="stable")
    for i in largest_first:
        draw_dot(panel, centres[i], radii[i], dots[i][-1])
    for i in largest_first:
        label, colour = drawable(dots[i][0]), dots[i][-1]
        size = face.getlength(label), SMALL + 6
        box = free_place(size, centres[i], radii[i], taken, (left, top, right, bottom))
        left_middle = box[0], (box[1] + box[3]) / 2
        draw.text(left_middle, label, colour, face, anchor="lm", stroke_width=3, stroke_fill=PAPER)
        taken.append(box)
    return panel


# ---- The pictures ------------------------------------------------------------------------------------------

def contact_sheet(entries, path, title=""):
    """entries: a list of (frames uint8 (T, H, W, 3), text). Two columns of clips, each above its text."""
    width, tiles = 4 * 192 + 3 * GAP, []
    for frames, text in entries:
        columns = min(len(frames), 8)
        side = min(192, (width + GAP) // columns - GAP)
        tiles.append(grid([strip(frames, side, 8, columns), write(text, width)], 1))
    save(path, title, tiles, columns=2, gap=48, gap_below=32)


def curves(panels, path, title=""):
    """panels: a list of (name, {series: [(x, y), ...]}, {baseline: y}, percent), percent being True where y
    is a share of 1. Line charts, two or three in a row; a y that is None or not finite is a gap."""
    charts, columns = [chart(*panel) for panel in panels], 2 if len(panels) in (2, 4) else 3
    save(path, title, charts, columns, gap=40, gap_below=48)


def codebook(entries, path, title=""):
    """entries: a list of (label, crops uint8 (n, h, w, 3), [(word, lift or probability), ...]). A tile per
    code: its label, up to eight of its crops, the words it predicts most."""
    width, tiles = 8 * 64 + 7 * GAP, []
    for label, crops, words in entries:
        pictures = [strip(crops, 64, most=8, columns=8)] if len(crops) else []
        words = [f"{word} {value:.2g}" if value < 10 else f"{word} {value:.0f}" for word, value in words]
        words[:-1] = [f"{word} ·" for word in words[:-1]]
        tiles.append(grid([write(label, width, SMALL, FAINT), *pictures, write(words, width, SMALL)], 1))
    save(path, title, tiles, columns=3, gap=48, gap_below=36)


def circle(entries, path, title="", radius=420, side=72, rings=4):
    """Codes of two numbers, which lie on a circle. entries: a list of (point (2,), crop uint8 (h, w, 3),
    word); each crop stands outside of its code, on one of `rings`, with the word below it."""
    reach = radius + rings * (side + 40) + side
    page = Image.new("RGB", (2 * reach, 2 * reach), PAPER)
    pen = ImageDraw.Draw(page)
    pen.ellipse((reach - radius, reach - radius, reach + radius, reach + radius), outline=GRID, width=3)
    tiles = []
    for i, (point, crop, word) in enumerate(sorted(entries, key=lambda entry: np.arctan2(*entry[0][::-1]))):
        way = np.array([point[0], -point[1]]) / np.linalg.norm(point)  # up is up
        code, place = (reach + way * far for far in (radius, radius + (0.7 + i % rings) * (side + 40)))
        pen.line((*code, *place), fill=GRID, width=2)
        pen.circle(code.tolist(), 6, fill=SERIES[0])
        tile = grid([thumbnail(crop, side), write(word, 2 * side, SMALL, most_lines=1)], 1, gap=0)
        tiles.append((tile, tuple(np.round(place - side / 2).astype(int))))
    for tile, corner in tiles:
        page.paste(tile, corner)
    save(path, title, [page])


def code_cell(width, height, shown, true, masked):
    """A cell in the colour of its code; where it was masked, framed by whether that code is the true one."""
    hue = int(shown) * 0.618034 % 1  # golden steps keep the colours of neighbouring numbers apart
    colour = colorsys.hls_to_rgb(hue, 0.74 + 0.05 * (int(shown) % 3), 0.6)
    cell = Image.new("RGB", (width, height), tuple(round(255 * channel) for channel in colour))
    draw, text = ImageDraw.Draw(cell), str(shown) if shown == true else f"{shown}\n({true})"
    face = font(min(height * 3 // 10, 2 * (width - 14) // max(map(len, text.split()))))  # fits in the frame
    draw.multiline_text((width / 2, height / 2), text, INK, face, anchor="mm", align="center", spacing=2)
    if masked:
        draw.rectangle((0, 0, width - 1, height - 1), outline=PAPER, width=7)
        draw.rectangle((0, 0, width - 1, height - 1), outline=RIGHT if shown == true else WRONG, width=5)
    return cell


def masked_clip(frames, mask, true, predicted, caption):
    """Three rows of T frames (T, H, W, 3) of (T, g, g) cells: the frames, what the model saw, the codes."""
    cells = mask.shape[-1]
    whole = [thumbnail(frame, cells * max(56, 192 // cells)) for frame in frames]
    seen, codes = [frame.copy() for frame in whole], [frame.copy() for frame in whole]
    across, down = ([round(length * i / cells) for i in range(cells + 1)] for length in whole[0].size)
    for t, y, x in np.ndindex(mask.shape):
        left, top, right, bottom = box = across[x], down[y], across[x + 1], down[y + 1]
        shown = predicted[t, y, x] if mask[t, y, x] else true[t, y, x]
        codes[t].paste(code_cell(right - left, bottom - top, shown, true[t, y, x], mask[t, y, x]), box)
        if mask[t, y, x]:
            seen[t].paste("#000000", box)
    names = [write(name, 150, SMALL, FAINT) for name in ("frames", "what the model saw", "codes")]
    rows = grid([names[0], *whole, names[1], *seen, names[2], *codes], 1 + len(whole))
    return grid([rows, write(caption, rows.width)], 1)


def masked(entries, path, title=""):
    """entries: a list of dicts: frames uint8 (T, H, W, 3), mask bool (T, g, g), true and predicted int
    (T, g, g), caption. Three rows of frames a clip, its caption below, and above them a legend."""
    clips = [masked_clip(**entry) for entry in entries]
    examples = [(17, 17, False, "seen, with its code"), (17, 17, True, "masked, predicted rightly"),
                (4, 17, True, "masked, predicted 4 for 17")]
    legend = [grid([code_cell(64, 64, *code), write(text, 205, SMALL)], 2, 16) for *code, text in examples]
    columns = 2 if len(clips) > 1 and max(clip.width for clip in clips) < 1000 else 1
    save(path, title, clips and [grid(legend, 3, gap=32), grid(clips, columns, 48, 44)], gap_below=32)


def retrieval(queries, path, title=""):
    """queries: a list of dicts: caption, rank (int, 1 is best), found, a list of (frames uint8 (T, H, W, 3),
    score, is_true, caption). A row per query: its caption, the right clip's rank, and what it found, the
    right clip framed in green."""
    columns, blocks = max((len(query["found"]) for query in queries), default=0), []
    for query in queries:
        rank = write(f"right clip: rank {query['rank']}", 300, SMALL, RIGHT if query["rank"] == 1 else FAINT)
        blocks.append(grid([write(query["caption"], 300, most_lines=6), rank], 1))
        for frames, score, is_true, caption in query["found"]:
            clip = framed(strip(frames, 108, most=4, columns=2), PAPER, thickness=4)
            clip = framed(clip, RIGHT if is_true else PAPER, thickness=8)
            texts = write(f"{score:.2f}", clip.width, SMALL), write(caption, clip.width, SMALL, FAINT)
            blocks.append(grid([clip, *texts], 1, gap_below=2))
        blocks += [Image.new("RGB", (1, 1), PAPER)] * (columns - len(query["found"]))
    save(path, title, blocks, 1 + columns, gap=20, gap_below=36)


def tint(colour, share):
    """The colour on paper, the stronger the larger the share."""
    return tuple(round(255 + share * (channel - 255)) for channel in ImageColor.getrgb(colour))


def confusion(counts, labels, path, title=""):
    """counts: int (n, n), rows the true labels, columns what their clips were taken for. A cell's colour is
    stronger with its share of the row, and green where that is right. Many labels are drawn smaller."""
    counts = np.asarray(counts).reshape(len(labels), len(labels))
    side = min(88, max(8, 2600 // max(1, len(labels))))
    edge, type_size = min(1, side // 20), min(SMALL, side // 2)
    face = font(type_size)
    digits = font(min(type_size, 4 * side // (3 * len(str(counts.max(initial=0))))))
    labels = [wrap(label, face, 300, most_lines=1)[0] for label in labels]
    width, cells, below = round(max(map(face.getlength, labels), default=0)) + 2 * GAP, [], []
    for i, label in enumerate(labels):
        beside = Image.new("RGB", (width, side), PAPER)
        ImageDraw.Draw(beside).text((width - GAP, side / 2), label, INK, face, anchor="rm")
        cells.append(beside)
        below.append(beside.rotate(90, expand=True))
        for j, count in enumerate(counts[i]):
            colour = tint(RIGHT if i == j else WRONG, count / max(1, counts[i].sum()))
            cell = framed(Image.new("RGB", (side - 2 * edge, side - 2 * edge), colour), GRID, edge)
            if count:
                ImageDraw.Draw(cell).text((side / 2, side / 2), str(count), INK, digits, anchor="mm")
            cells.append(cell)
    legend = write("rows: the true label · columns: what it was taken for", 800, SMALL, FAINT)
    table = [*cells, Image.new("RGB", (1, 1), PAPER), *below]
    save(path, title, labels and [legend, grid(table, 1 + len(labels), gap=0, gap_below=0)], gap_below=24)
