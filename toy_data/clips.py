"""Clips and captions on disk: what they look like there, and how they reach the three scripts.

A folder holds `train.jsonl`, `val.jsonl` and `test.jsonl`, one JSON object a line, and the clips they name:

    DIR/train.jsonl     {"video": "clips/0007.gif", "caption": "a red circle moves left"}
    DIR/clips/0007.gif

A clip is an animated GIF, WebP or PNG, a folder of images, a `.npy` of uint8 (frames, H, W, 3), or anything
that the `ffmpeg` program decodes. From top to bottom: clips, manifests, splits, samples, batches.
"""

import contextlib
import functools
import io
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import uuid
import warnings
from array import array
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path

import numpy as np
import torch
from PIL import Image

MOST_PIXELS = 100_000_000  # of one frame
MOST_FRAMES = 1_000_000  # of one clip
SMALL = 20_000  # bytes of a clip on disk that is decoded whole and stays in memory
MOST_KEPT = 1 << 31  # bytes of such clips, decoded, that a training keeps; its workers share them out
PATIENCE = 120  # seconds that one ffmpeg call may take
VIDEO_SUFFIXES = {".mp4", ".avi", ".mkv", ".webm", ".gif", ".webp", ".apng", ".mov", ".m4v", ".mpg", ".mpeg",
                  ".wmv", ".flv", ".3gp", ".3g2", ".mts", ".m2ts", ".npy"}
IMAGE_SUFFIXES = {".gif", ".webp", ".png", ".apng", ".jpg", ".jpeg", ".bmp"}
IMAGE_FORMATS = ("GIF", "WEBP", "PNG", "JPEG", "BMP")  # none for which Pillow starts other programs

# Pillow warns of every odd file. What cannot be used is a BrokenClip; the rest would litter the log.
warnings.filterwarnings("ignore", module=r"PIL\.")


class DataError(Exception):
    """What the user gave cannot be used. One line: the file, line or flag, what is wrong, how to mend it."""

    def __str__(self):
        # Out of a DataLoader's worker it comes with the worker's traceback; the sentence is the last line.
        return super().__str__().strip().splitlines()[-1].removeprefix(f"{__name__}.DataError: ")


@contextlib.contextmanager
def errors_in_one_line():
    """Around a command: what the user can mend ends it in one line and status 2, Ctrl-C in status 130."""
    try:
        yield
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


class BrokenClip(Exception):
    """This clip is missing, truncated, empty, enormous or undecodable. One line that begins with its path."""


# ------------------------------------------------------------------------------------------------------------
# Clips. Every kind opens to (count, decode): how many frames, and decode(numbers) -> (frames, numbers).


def read_clip(path, choose=None, size=None):
    """Reads a clip -> (frames, numbers): uint8 RGB (F, H, W, 3), and their F numbers in the source.

    choose(count) lists the wanted frames of `count`, repeats allowed; None takes all. With `size` frames come
    resized to (size, size), without it as they are (a folder's in the size of its first). What is transparent
    becomes black. Raises BrokenClip, and DataError where the clip needs ffmpeg and there is none.
    """
    with broken_if_it_fails(path):
        count, decode = open_clip(Path(path), size and (size, size))
        if not 1 <= count <= MOST_FRAMES:
            raise BrokenClip(f"{path}: has {count:,} frames; a clip has 1 to {MOST_FRAMES:,}")
    numbers = list(range(count)) if choose is None else [int(number) for number in choose(count)]
    with broken_if_it_fails(path):
        return decode(numbers)


@contextlib.contextmanager
def broken_if_it_fails(path):
    """Decoders meet bytes with every kind of exception; to the caller all say that the clip is broken."""
    try:
        yield
    except (BrokenClip, DataError):
        raise
    except FileNotFoundError as error:
        raise BrokenClip(f"{path}: there is no such file") from error
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise BrokenClip(f"{path}: cannot be decoded ({reason})") from error


def open_clip(path, size):
    """The clip at `path` as (count, decode); size is (W, H) or None."""
    if path.is_dir():
        return open_folder(path, size)
    if path.stat().st_size == 0:
        raise BrokenClip(f"{path}: is empty")
    if path.suffix.lower() in IMAGE_SUFFIXES:
        return open_image(path, size)
    if path.suffix.lower() == ".npy":
        return open_array(path, size)
    return open_video(path, size)


def refuse_enormous(path, width, height):
    if width * height > MOST_PIXELS:
        raise BrokenClip(f"{path}: frames of {width}x{height} are enormous, over {MOST_PIXELS:,} pixels")


def fit(image, size):
    """Any Pillow image -> RGB, resized to (W, H) where it is not that size already."""
    if image.has_transparency_data:
        over, image = image.convert("RGBA"), Image.new("RGB", image.size)  # black
        image.paste(over, mask=over)
    elif image.mode != "RGB":
        image = image.convert("RGB")
    return image.resize(size, Image.Resampling.BILINEAR) if size and image.size != size else image


def open_image(path, size):
    """A still or animated GIF, WebP, PNG or JPEG. Frames are decoded in order, up to the last wanted one."""
    content = path.read_bytes()  # at once: Pillow reads a GIF in thousands of small pieces
    image = Image.open(io.BytesIO(content), formats=IMAGE_FORMATS)
    refuse_enormous(path, *image.size)
    if image.format == "GIF":
        count = gif_frames(content)
    else:
        count = image.n_frames if image.format in ("WEBP", "PNG") else 1  # a photo may carry its thumbnail
    if not count or image.format == "PNG" and b"IEND\xaeB`\x82" not in content:  # Pillow refuses others
        raise BrokenClip(f"{path}: is truncated")

    def decode(numbers):
        frames = {}
        for number in sorted(set(numbers)):
            image.seek(number)
            frames[number] = np.asarray(fit(image, size))
        return np.stack([frames[number] for number in numbers]), numbers

    return count, decode


def gif_frames(content):
    """The number of frames of a GIF, or 0 where its bytes end before its end mark. Nothing is decoded."""

    def after_palette(position, flags):
        return position + (3 << (flags & 7) + 1 if flags & 128 else 0)

    def after_blocks(position):
        while content[position]:
            position += content[position] + 1
        return position + 1

    count = 0
    try:
        position = after_palette(13, content[10])
        while content[position] != 0x3B:  # the end mark
            if content[position] == 0x21:  # an extension: mark, kind, blocks
                position = after_blocks(position + 2)
            elif content[position] == 0x2C:  # a frame: mark, place, size, flags, palette, code size, blocks
                position = after_blocks(after_palette(position + 10, content[position + 9]) + 1)
                count += 1
            else:
                position += 1  # browsers and Pillow step over stray bytes too
    except IndexError:
        return 0
    return count


def open_folder(path, size):
    """A folder of images, one a frame, in natural order: frame2 before frame10."""

    def natural(name):
        return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]

    names = [entry.name for entry in os.scandir(path) if not entry.name.startswith(".")]
    names = sorted((name for name in names if Path(name).suffix.lower() in IMAGE_SUFFIXES), key=natural)
    if not names:
        raise BrokenClip(f"{path}: is a folder without images")
    if size is None:
        with Image.open(path / names[0], formats=IMAGE_FORMATS) as first:
            size = first.size
    refuse_enormous(path, *size)

    def decode(numbers):
        frames = {}
        for number in set(numbers):
            frame = read_clip(path / names[number], lambda count: [0])[0][0]
            frames[number] = np.asarray(fit(Image.fromarray(frame), size))
        return np.stack([frames[number] for number in numbers]), numbers

    return len(names), decode


def open_array(path, size):
    """A .npy of uint8 (frames, H, W, 3), memory-mapped: only the wanted frames are read from disk."""
    array = np.load(path, mmap_mode="r", allow_pickle=False)
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[3] != 3:
        raise BrokenClip(f"{path}: is {array.dtype} {array.shape}; a clip is uint8 (frames, H, W, 3)")
    refuse_enormous(path, array.shape[2], array.shape[1])

    def decode(numbers):
        frames = array[numbers]  # (F, H, W, 3), a copy
        if size and size != (array.shape[2], array.shape[1]):
            frames = np.stack([np.asarray(fit(Image.fromarray(frame), size)) for frame in frames])
        return np.asarray(frames), numbers

    return len(array), decode


def open_video(path, size):
    """Any other file, through the ffmpeg program: packets are counted, then the wanted frames decoded."""
    # A packet of a cut file ends in an error here; in decoding ffmpeg would make up what is missing.
    said, heard = ffmpeg(path, "-progress", "pipe:1", "-xerror", "-c", "copy", "-f", "null", "-")
    refuse_enormous(path, *map(int, re.search(r"Video: .*?, (\d+)x(\d+)", heard).groups()))
    count = int(re.findall(rb"frame=\s*(\d+)", said)[-1])

    def decode(numbers):
        wanted = sorted(set(numbers))
        frames = video_frames(path, wanted, size)
        if len(frames) < len(wanted):  # some containers hold packets that are never shown: count what is
            said, _ = ffmpeg(path, "-progress", "pipe:1", *frame_by_frame(), "-f", "null", "-")
            last = int(re.findall(rb"frame=\s*(\d+)", said)[-1]) - 1
            numbers = [min(number, last) for number in numbers]
            wanted = sorted(set(numbers))
            frames = video_frames(path, wanted, size)
        if len(frames) != len(wanted):
            raise BrokenClip(f"{path}: only {len(frames)} of {len(wanted)} frames can be decoded")
        return frames[np.searchsorted(wanted, numbers)], numbers

    return count, decode


def video_frames(path, wanted, size):
    """Decodes the frames with these ascending numbers -> (F, H, W, 3), fewer where the video ends before."""
    listed = len(wanted) <= 64  # ffmpeg takes no formula of more than a hundred terms
    chosen = "+".join(f"eq(n,{number})" for number in wanted) if listed else f"lte(n,{wanted[-1]})"
    filters = f"select='{chosen}'" + (f",scale={size[0]}:{size[1]}:flags=bilinear" if size else "")
    limit = ("-frames:v", str(len(wanted) if listed else wanted[-1] + 1))
    # PPM is raw RGB that says its size: only ffmpeg knows whether the video was turned
    output = (*frame_by_frame(), "-f", "image2pipe", "-c:v", "ppm", "-pix_fmt", "rgb24", "pipe:1")
    said, _ = ffmpeg(path, "-vf", filters, *limit, *output)
    if not said:
        return np.empty((0, 0, 0, 3), np.uint8)
    header = re.match(rb"P6\n(\d+) (\d+)\n255\n", said)
    width, height = map(int, header.groups())
    frames = np.frombuffer(said, np.uint8).reshape(-1, header.end() + width * height * 3)
    frames = frames[:, header.end() :].reshape(-1, height, width, 3)
    return frames if listed else frames[[number for number in wanted if number < len(frames)]]


@functools.cache
def frame_by_frame():
    """The option that keeps ffmpeg from repeating frames to fill gaps in time; 5.1 renamed it."""
    options = subprocess.run(["ffmpeg", "-h", "long"], stdin=subprocess.DEVNULL, capture_output=True).stdout
    return "-fps_mode" if b"-fps_mode" in options else "-vsync", "passthrough"


def ffmpeg(path, *output):
    """Runs ffmpeg on the file's first video stream -> (bytes of its output, text of its messages)."""
    if shutil.which("ffmpeg") is None:
        raise DataError(f"{path}: needs the ffmpeg program, which is not on the PATH; install it "
                        "(apt install ffmpeg, brew install ffmpeg) or turn the clips into GIFs")
    # file: and the whitelist keep a name or a playlist off the network; one thread, for the workers are many
    source = ("-protocol_whitelist", "file", "-threads", "1", "-i", f"file:{path}")
    command = ["ffmpeg", "-nostdin", "-hide_banner", "-nostats", *source, "-map", "0:v:0", *output]
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=PATIENCE)
    except subprocess.TimeoutExpired as error:
        raise BrokenClip(f"{path}: ffmpeg did not finish within {PATIENCE} seconds") from error
    heard = done.stderr.decode(errors="replace")
    if done.returncode:
        reasons = re.findall(rf"^.*{re.escape(str(path))}: (.+)", heard, re.MULTILINE) or ["no reason given"]
        raise BrokenClip(f"{path}: cannot be decoded by ffmpeg ({reasons[-1]})")
    return done.stdout, heard


def spans(count, frames, generator=None):
    """Sparse sampling (3.1, 4.1): one frame number of each of `frames` equal spans of 0 to count - 1; how
    frames are chosen the paper does not say.

    A NumPy generator picks a random one of each (training); without it, it is the middle one (evaluation). A
    clip shorter than `frames` repeats its own. Always ascending.
    """
    numbers = []
    for span in range(frames):
        start = span * count // frames
        stop = max(start + 1, (span + 1) * count // frames)
        numbers.append((start + stop) // 2 if generator is None else int(generator.integers(start, stop)))
    return numbers


# ------------------------------------------------------------------------------------------------------------
# Manifests and splits

FIELDS = {
    "": ("video", "caption"),
    "qa": ("video", "question", "answer"),
    "mc": ("video", "question", "options", "answer"),
    "action": ("video", "label"),
}
EXAMPLE = {
    "video": "clips/0007.gif",
    "caption": "a red circle moves left",
    "question": "what moves left?",
    "options": ["a red circle", "a blue circle", "a red ring", "a blue ring", "nothing"],
    "label": "moves left",
}


class Manifest(Sequence):
    """The rows of a JSONL file, each a dict, read when asked for: manifest[i] is one short read from disk.

    What is held is one int64 array (2 + rows, 2), memory-mapped from a file beside the manifest and so shared
    by all workers: (bytes, mtime in ns) of the manifest and (hash of the names of the checked fields, 0),
    then for each row (its offset in bytes, a hash of its video's name). Building it checks every line:
    DataError names the first bad one. `rows` restricts the manifest to these row numbers of the file.
    """

    def __init__(self, path, fields, rows=None):
        self.path, self.fields, self.rows = Path(path), tuple(fields), rows
        self.folder = self.path.parent
        self.index = open_index(self.path, self.fields)

    def __reduce__(self):
        return Manifest, (self.path, self.fields, self.rows)  # a worker maps the index itself

    def __len__(self):
        return len(self.index) - 2 if self.rows is None else len(self.rows)

    def __getitem__(self, i):
        with open(self.path, "rb") as file:
            return self.read(file, range(len(self))[i])

    def __iter__(self):
        with open(self.path, "rb") as file:
            yield from (self.read(file, i) for i in range(len(self)))

    def offset(self, i):
        return int(self.index[2 + (i if self.rows is None else self.rows[i]), 0])

    def read(self, file, i):
        file.seek(self.offset(i))
        try:
            return json.loads(file.readline())
        except ValueError as error:
            raise DataError(f"{self.path}: was changed while it was in use; start again") from error

    def line(self, i):
        """The 1-based number of row i's line, for messages."""
        left, number = self.offset(i), 1
        with open(self.path, "rb") as file:
            while block := file.read(min(left, 1 << 20)):
                left, number = left - len(block), number + block.count(b"\n")
        return number

    @property
    def videos(self):
        """A hash of each row's video's name: rows of one video have the same."""
        return self.index[2:, 1] if self.rows is None else self.index[2:, 1][self.rows]

    def video_path(self, row):
        """Where the video of a row (a dict) is: paths in a manifest are relative to its folder."""
        return self.folder / row["video"]


def open_index(path, fields):
    """The index of a manifest: the one beside it if it is of this very file, else a new one, left there."""
    try:
        with open(path, "rb") as file:
            state = os.fstat(file.fileno())
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); give another file") from error
    head = np.array([[state.st_size, state.st_mtime_ns], [hash_of(" ".join(sorted(fields))), 0]])
    place = path.with_name(f".{path.name}.index.npy")
    with contextlib.suppress(OSError, ValueError, EOFError):
        index = np.load(place, mmap_mode="r", allow_pickle=False)
        if index.dtype == np.int64 and index.ndim == 2 and np.array_equal(index[:2], head):
            return index
    index = np.concatenate([head, check_lines(path, fields)])
    written = place.with_name(f"{place.name}.{uuid.uuid4().hex}")  # another process may be writing its own
    try:
        with open(written, "wb") as file:
            np.save(file, index)
        os.replace(written, place)
        return np.load(place, mmap_mode="r", allow_pickle=False)
    except OSError:  # a folder that cannot be written to: the index stays in memory
        with contextlib.suppress(OSError):
            written.unlink()
        return index


def hash_of(text):
    digest = blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def check_lines(path, fields):
    """Checks every line of a manifest -> int64 (rows, 2): each row's offset, the hash of its video's name."""
    parse = json.JSONDecoder().raw_decode
    rows, offset = array("q"), 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.isspace():
                try:
                    text = line.decode().strip(" \t\r\n")
                    row, end = parse(text)
                    fault = find_fault(row, fields) if end == len(text) else "holds more than one JSON object"
                except (ValueError, RecursionError) as error:
                    fault = f"is not JSON ({error})"
                if fault:
                    raise DataError(f"{path}:{number}: {fault}; a line looks like {example(fields)}")
                rows.extend((offset, hash_of(row["video"])))
            offset += len(line)
    if not rows:
        raise DataError(f"{path}: is empty; it needs lines like {example(fields)}")
    return np.frombuffer(rows, np.int64).reshape(-1, 2)


def find_fault(row, fields):
    """What is wrong with a line's JSON value, or None."""
    if type(row) is not dict:
        return "is not a JSON object"
    for field in fields:
        value = row.get(field)
        if type(value) is str and value and not value.isspace() and field != "options":
            continue
        if field not in row:
            return f'has no "{field}"'
        if field == "options":
            if type(value) is not list or len(value) < 2 or not all(type(option) is str for option in value):
                return '"options" is not a list of two or more texts'
        elif type(value) is str:
            if field != "question" or "options" not in fields:  # the options may say it all
                return f'"{field}" is empty'
        elif field != "answer" or type(value) is not int and "options" not in fields:
            return f'"{field}" is not a text'
    if "options" in fields:
        numbers = range(len(row["options"]))
        if type(row["answer"]) is not int or row["answer"] not in numbers:
            return f'"answer" is not the number of one of the {len(numbers)} options, counted from 0'
    return None


def example(fields):
    answer = {"answer": 0 if "options" in fields else "a circle"}
    return json.dumps({field: (EXAMPLE | answer).get(field, "...") for field in fields})


def open_splits(folder, task=""):
    """The manifests of a folder -> (dict of train, val, test, list of sentences on what was cut from what).

    `task` is the first part of the files' names: "" for train.jsonl, "qa" for qa_train.jsonl and so on. No
    val: 5% of the training videos, those whose names' hashes rank lowest. No test: val becomes test, and val
    is cut from train. Neither: 5% each. A lone captions.jsonl is cut 80/10/10. A video's lines stay together.
    """
    folder, fields = Path(folder), FIELDS[task.split("_")[0]]
    paths = {name: split_path(folder, name, task) for name in ("train", "val", "test")}
    lone = folder / "captions.jsonl"
    if not folder.is_dir():
        raise DataError(f"{folder}: there is no such folder; give one that holds {paths['train'].name}")
    if not paths["train"].exists() and (task or not lone.exists()):
        other = "" if task else " and no captions.jsonl"
        raise DataError(f"{folder}: has no {paths['train'].name}{other}; a line looks like {example(fields)}")
    if not paths["train"].exists():
        splits = cut(Manifest(lone, fields), {"val": 0.10, "test": 0.10})
        return splits, [f"{lone} is split by video: {counts(splits)}"]

    splits = {name: Manifest(path, fields) for name, path in paths.items() if path.exists()}
    missing = [path.name for name, path in paths.items() if name not in splits]
    if not missing:
        return splits, []
    val_is_test = "val" in splits
    if val_is_test:
        splits["test"] = splits.pop("val")
    wanted = {name: 0.05 for name in ("val", "test") if name not in splits}
    splits = splits | cut(splits["train"], wanted)
    moved = f", so {paths['val'].name} is the test set" if val_is_test else ""
    made = f"{' and '.join(wanted)} cut from train by video: {counts(splits)}"
    return splits, [f"{folder} has no {' and no '.join(missing)}{moved}; {made}"]


def split_path(folder, name, task):
    return Path(folder) / (f"{task}_{name}.jsonl" if task else f"{name}.jsonl")


def open_split(folder, name, task="", say=lambda note: None):
    """One of open_splits' three. A test file is opened as it is, with or without training files beside it.

    `say` is called with each sentence on what was cut from what.
    """
    path = split_path(folder, name, task)
    if name == "test" and path.exists():
        return Manifest(path, FIELDS[task.split("_")[0]])
    splits, notes = open_splits(folder, task)
    for note in notes:
        say(note)
    return splits[name]


def cut(manifest, shares):
    """Cuts a manifest by its videos' hashes: the lowest for the shares, one at least, the rest for train.

    Of six videos or more each share has two, since a mismatched caption is another video's.
    """
    videos = manifest.index[2:, 1].copy()
    ranked = np.sort(videos)
    ranked = ranked[np.diff(ranked, prepend=ranked[0] - 1) != 0]
    if len(ranked) <= len(shares):
        raise DataError(f"{manifest.path}: names {len(ranked)} videos, too few to cut {' and '.join(shares)} "
                        "from them: add clips, or files for the other splits")
    splits, first, rows = {}, 0, np.arange(len(videos))
    for name, share in shares.items():
        first += max(1 + (len(ranked) >= 6), round(share * len(ranked)))
        taken = videos[rows] < ranked[first]
        splits[name], rows = Manifest(manifest.path, manifest.fields, rows[taken]), rows[~taken]
    return splits | {"train": Manifest(manifest.path, manifest.fields, rows)}


def counts(splits):
    return ", ".join(f"{name} {len(splits[name]):,} lines" for name in ("train", "val", "test"))


# ------------------------------------------------------------------------------------------------------------
# Samples and batches


class ClipCaptions(torch.utils.data.Dataset):
    """Clips with their captions for pretraining and for the tokenizer: dataset[(epoch, index)] -> dict.

    frames (T, 3, size, size) uint8; numbers (T,) int64, their numbers in the source; row, the line as a dict;
    video, as the row names it; caption, None in the files of tasks that have none; mismatched, another row's
    caption that is false of this clip (None where not asked for);
    epoch; index, of the row that was used; broken, a line for each broken clip met on the way to it.

    A sample depends on (seed, epoch, index) alone, whichever process makes it. `train` takes random frames,
    else it is the middle ones, as in epoch 0 whatever the epoch. A broken clip is replaced by a row drawn at
    random; with `strict` it is a DataError, and so are 50 in a row. Of so many `negatives` drawn the
    mismatched caption is the one that shares most words with the clip's; 1: a random one, since the paper
    does not say.
    `augment` crops and resizes at random, all frames alike, and never flips: "left" is a word. Small clips
    stay in memory once they are decoded.
    """

    def __init__(self, manifest, frames, size, seed, train, strict=False, augment=False, mismatched=True,
                 negatives=1):
        self.manifest, self.frames, self.size, self.seed = manifest, frames, size, seed
        self.train, self.strict, self.augment = train, strict, augment
        self.mismatched, self.negatives = mismatched, negatives
        self.kept, self.room = {}, None

    def __len__(self):
        return len(self.manifest)

    def __getitem__(self, key):
        epoch, index = key if self.train else (0, key[1])
        generator = rng(self.seed, epoch, index)
        broken = []
        while True:
            row = self.manifest[index]
            try:
                frames, numbers = self.read(row, generator)
                break
            except BrokenClip as error:
                broken.append(str(error))
            if self.strict:
                raise DataError(f"{broken[0]}; mend it, take out its line, or leave out --strict")
            if len(broken) == 50:
                raise DataError(f"{self.manifest.path}: 50 clips in a row are broken, the first: {broken[0]}")
            index = int(generator.integers(len(self)))
        channels_first = np.ascontiguousarray(frames.transpose(0, 3, 1, 2))  # NumPy's: no threads to start
        return {
            "frames": torch.from_numpy(channels_first),  # (T, 3, size, size)
            "numbers": torch.tensor(numbers),
            "index": index,
            "epoch": epoch,
            "video": row["video"],
            "caption": row.get("caption"),
            "row": row,
            "mismatched": self.hardest(row, generator) if self.mismatched else None,
            "broken": broken,
        }

    def read(self, row, generator):
        path = self.manifest.video_path(row)
        sparsely = generator if self.train else None
        if self.augment:
            frames, numbers = read_clip(path, lambda count: spans(count, self.frames, sparsely))
            return random_crop(frames, self.size, generator), numbers
        if path not in self.kept and not self.keep(path):
            return read_clip(path, lambda count: spans(count, self.frames, sparsely), self.size)
        numbers = spans(len(self.kept[path]), self.frames, sparsely)
        return self.kept[path][numbers], numbers

    def whole(self, path):
        """All frames of a clip, (F, size, size, 3), from memory where it is kept. Raises BrokenClip."""
        return self.kept[path] if path in self.kept or self.keep(path) else read_clip(path, size=self.size)[0]

    def keep(self, path):
        """Decodes all of a small clip and keeps it, as long as there is room."""
        if self.room is None:
            worker = torch.utils.data.get_worker_info()
            self.room = MOST_KEPT // (worker.num_workers if worker else 1)
        if not self.room or not path.is_file() or path.stat().st_size > SMALL:
            return False
        frames, _ = read_clip(path, size=self.size)
        if frames.nbytes > self.room:
            self.room = 0
            return False
        self.kept[path] = frames
        self.room -= frames.nbytes
        return True

    def hardest(self, row, generator):
        """Of `negatives` mismatched captions the one whose words overlap most with the clip's caption."""
        own = set(row["caption"].split())

        def overlap(caption):
            words = set(caption.split())
            return len(words & own) / len(words | own)

        return max([self.mismatch(row, generator) for _ in range(self.negatives)], key=overlap)

    def mismatch(self, row, generator):
        """The caption of another video, other than this clip's and, where `shows` tells, false of it."""
        for _ in range(1000):
            other = self.manifest[int(generator.integers(len(self)))]
            if other["video"] == row["video"] or other["caption"] == row["caption"]:
                continue
            if not ("says" in other and "shows" in row and is_true(other["says"], row["shows"])):
                return other["caption"]
        raise DataError(f"{self.manifest.path}: has no mismatched caption for {row['video']} in 1000 draws; "
                        "a split needs two videos with different captions")


def rng(seed, epoch, index):
    """The random generator of one sample. The last number sets it apart from that of the epoch's order."""
    return np.random.default_rng([seed, epoch, index, 1])


def random_crop(frames, size, generator):
    """(F, H, W, 3) -> (F, size, size, 3): one random box for all frames, of 0.5 to 1 of the area."""
    area, aspect = generator.uniform(0.5, 1), np.exp(generator.uniform(np.log(3 / 4), np.log(4 / 3)))
    height, width = frames.shape[1:3]
    across = np.clip(np.sqrt(area * aspect), area, 1)  # shares of the width and of the height
    down = area / across
    left, top = generator.uniform(0, 1 - across) * width, generator.uniform(0, 1 - down) * height
    box = (left, top, min(left + across * width, width), min(top + down * height, height))
    crops = (Image.fromarray(frame).resize((size, size), Image.Resampling.BILINEAR, box) for frame in frames)
    return np.stack([np.asarray(crop) for crop in crops])


def is_true(says, shows):
    """Whether a caption is true of a synthetic scene.

    `shows` lists the attribute words of each thing in the scene, the background among them, `says` those of
    each thing that the caption claims. It is true if these can be different things of the scene that have all
    the words.
    """
    return any(
        all(set(claim) <= set(thing) for claim, thing in zip(says, things))
        for things in itertools.permutations(shows, len(says))
    )


class Batches(torch.utils.data.Sampler):
    """Yields for each step from `start` to `steps` the (epoch, index) keys of this rank's part of its batch.

    All epochs in one go, each a permutation drawn from (seed, epoch), so that a run goes on from any step.
    The last, smaller batch of an epoch is dropped; of fewer rows than a batch, an epoch is one batch of all.
    """

    def __init__(self, length, batch_size, seed, steps, start=0, rank=0, world=1):
        self.length, self.batch_size, self.seed = length, min(batch_size, length), seed
        self.steps, self.start, self.rank, self.world = steps, start, rank, world
        self.steps_per_epoch = length // self.batch_size
        if self.batch_size < world:
            raise DataError(f"a batch of {self.batch_size} clips cannot be shared by {world} processes; "
                            "raise --batch-size, add clips, or start fewer")

    def __len__(self):
        return max(0, self.steps - self.start)

    def __iter__(self):
        order_of = None
        for step in range(self.start, self.steps):
            epoch, batch = divmod(step, self.steps_per_epoch)
            if epoch != order_of:
                order, order_of = np.random.default_rng([self.seed, epoch]).permutation(self.length), epoch
            keys = order[batch * self.batch_size :][: self.batch_size][self.rank :: self.world]
            yield [(epoch, index) for index in keys.tolist()]
