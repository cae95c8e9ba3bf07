"""Clips and captions on disk, and how they reach the scripts: clips, manifests, splits, samples, batches.

A folder holds `train.jsonl`, `val.jsonl` and `test.jsonl`, one JSON object a line (EXAMPLES has one of each
task), and the clips they name. A clip is an animated GIF, WebP or PNG, a folder of images, a `.npy` of uint8
(frames, H, W, 3), or anything that the `ffmpeg` program decodes.
"""

import contextlib
import copy
import io
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
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
CLIP_KEPT = 1 << 24  # bytes: a video that is no larger when ffmpeg has decoded it stays in memory
MOST_KEPT = 1 << 30  # bytes of decoded clips that one loader keeps, all its workers together
PATIENCE = 120  # seconds that one ffmpeg call may take
VIDEO_SUFFIXES = {".mp4", ".avi", ".mkv", ".webm", ".gif", ".webp", ".apng", ".mov", ".m4v", ".mpg", ".mpeg",
                  ".wmv", ".flv", ".3gp", ".3g2", ".mts", ".m2ts", ".npy"}
IMAGE_SUFFIXES = {".gif", ".webp", ".png", ".apng", ".jpg", ".jpeg", ".bmp"}
IMAGE_FORMATS = ("GIF", "WEBP", "PNG", "JPEG", "BMP")  # Pillow starts other programs for some of the rest

# Pillow warns of every odd file. What cannot be used is a BrokenClip; the rest would litter the log.
warnings.filterwarnings("ignore", module=r"PIL\.")


class DataError(Exception):
    """What the user gave cannot be used. One line: the file, line or flag, what is wrong, how to mend it."""

    def __str__(self):
        text = super().__str__()
        if text.startswith("Caught DataError"):  # from a DataLoader worker: a traceback that ends in our line
            text = text.strip().splitlines()[-1].removeprefix(f"{__name__}.DataError: ")
        return printable(text)


class BrokenClip(Exception):
    """This clip is missing, truncated, empty, enormous or undecodable. One line that begins with its path."""

    def __str__(self):
        return printable(super().__str__())


def printable(text):
    """Escapes what cannot stand in a line of output: line breaks, bytes of a file name that are not UTF-8."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


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


# Clips ------------------------------------------------------------------------------------------------------

def read_clip(path, choose=range, size=None):
    """Reads a clip -> (frames, numbers): uint8 RGB (F, H, W, 3), and their F numbers in the source.

    choose(count) lists the wanted frames of `count`, repeats allowed; `range` takes all. With `size` the
    frames are resized to (size, size). What is transparent becomes black. Raises BrokenClip, also for what
    `choose` raises, and DataError where the clip needs ffmpeg and there is none.
    """
    path = Path(path)
    try:
        read = reader(path)
        if read is not read_folder and path.stat().st_size == 0:
            raise BrokenClip(f"{path}: is empty")
        return read(path, choose, size and (size, size))
    except (BrokenClip, DataError):
        raise
    except FileNotFoundError as error:
        raise BrokenClip(f"{path}: there is no such file") from error
    except Exception as error:  # decoders fail on bad bytes with every kind of exception
        reason = " ".join(str(error).split()) or type(error).__name__
        raise BrokenClip(f"{path}: cannot be decoded ({reason})") from error


def reader(path):
    """The function that reads this kind of clip."""
    if path.is_dir():
        return read_folder
    suffix = path.suffix.lower()
    if suffix in IMAGE_SUFFIXES:
        return read_image
    return read_array if suffix == ".npy" else read_video


def choose_frames(path, choose, count, width, height):
    """The frames that `choose` lists; a clip of `count` frames that is empty or enormous is a BrokenClip."""
    if not 1 <= width * height <= MOST_PIXELS:
        raise BrokenClip(f"{path}: has frames of {width}x{height}; a frame has 1 to {MOST_PIXELS:,} pixels")
    if not 1 <= count <= MOST_FRAMES:
        raise BrokenClip(f"{path}: has {count:,} frames; a clip has 1 to {MOST_FRAMES:,}")
    return [int(number) for number in choose(count)]


def fit(image, size):
    """Any Pillow image -> RGB (H, W, 3), resized to (W, H) where it is not that size already."""
    if image.has_transparency_data:
        over, image = image.convert("RGBA"), Image.new("RGB", image.size)  # black
        image.paste(over, mask=over)
    elif image.mode != "RGB":
        image = image.convert("RGB")
    return np.asarray(image.resize(size, Image.Resampling.BILINEAR) if size and image.size != size else image)


def read_image(path, choose, size):
    """A still or animated GIF, WebP, PNG or JPEG. Frames are decoded in order, up to the last wanted one."""
    content = path.read_bytes()  # at once: Pillow reads a GIF in thousands of small pieces
    image = Image.open(io.BytesIO(content), formats=IMAGE_FORMATS)
    # Pillow opens a GIF or PNG that is cut between two frames and counts it whole; others it refuses.
    ends = {"GIF": content.endswith(b";"), "PNG": b"IEND\xaeB`\x82" in content}
    if not ends.get(image.format, True):
        raise BrokenClip(f"{path}: is truncated")
    animated = image.format in ("GIF", "WEBP", "PNG")  # a JPEG may carry its thumbnail
    numbers = choose_frames(path, choose, image.n_frames if animated else 1, *image.size)
    frames = {}
    for number in sorted(set(numbers)):
        image.seek(number)
        frames[number] = fit(image, size)
    return np.stack([frames[number] for number in numbers]), numbers


def read_folder(path, choose, size):
    """A folder of images, one a frame, in natural order: frame2 before frame10."""

    def natural(name):
        return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]

    names = sorted(filter(is_image, os.listdir(path)), key=natural)
    if not names:
        raise BrokenClip(f"{path}: is a folder without images")
    if size is None:  # they take the size of the first
        with Image.open(path / names[0], formats=IMAGE_FORMATS) as first:
            size = first.size
    numbers = choose_frames(path, choose, len(names), *size)
    frames = {}
    for number in set(numbers):
        frame, _ = read_clip(path / names[number], lambda count: [0])
        frames[number] = fit(Image.fromarray(frame[0]), size)
    return np.stack([frames[number] for number in numbers]), numbers


def is_image(name):
    return Path(name).suffix.lower() in IMAGE_SUFFIXES and not name.startswith(".")


def is_video(name):
    return Path(name).suffix.lower() in VIDEO_SUFFIXES and not name.startswith(".")


def are_frames(names):
    """Whether a folder with these files is one clip: it holds images and no videos."""
    return any(map(is_image, names)) and not any(map(is_video, names))


def holds_frames(path):
    return os.path.isdir(path) and are_frames(os.listdir(path))


def read_array(path, choose, size):
    """A .npy of uint8 (frames, H, W, 3), memory-mapped: only the wanted frames are read from disk."""
    frames = np.load(path, mmap_mode="r", allow_pickle=False)
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3:
        raise BrokenClip(f"{path}: is {frames.dtype} {frames.shape}; a clip is uint8 (frames, H, W, 3)")
    numbers = choose_frames(path, choose, len(frames), frames.shape[2], frames.shape[1])
    return np.stack([fit(Image.fromarray(frames[number]), size) for number in numbers]), numbers


def read_video(path, choose, size):
    """Any other file, through the ffmpeg program: packets are counted, then the wanted frames decoded."""
    # A packet of a cut file ends in an error here; in decoding ffmpeg would make up what is missing.
    output, messages = ffmpeg(path, "-progress", "pipe:1", "-xerror", "-c", "copy", "-f", "null", "-")
    width, height = map(int, re.search(r"Video: .*?, (\d+)x(\d+)", messages).groups())
    count = int(re.findall(rb"frame=\s*(\d+)", output)[-1])
    numbers = choose_frames(path, choose, count, width, height)
    wanted = sorted(set(numbers))
    frames = video_frames(path, wanted, size)
    if len(frames) < len(wanted):  # some containers hold packets that are never shown: count the frames
        output, _ = ffmpeg(path, "-progress", "pipe:1", "-f", "null", "-")
        last = int(re.findall(rb"frame=\s*(\d+)", output)[-1]) - 1
        numbers = [min(number, last) for number in numbers]
        wanted = sorted(set(numbers))
        frames = video_frames(path, wanted, size)
    if len(frames) != len(wanted):
        raise BrokenClip(f"{path}: only {len(frames)} of {len(wanted)} frames can be decoded")
    return frames[np.searchsorted(wanted, numbers)], numbers


def video_frames(path, wanted, size):
    """Decodes the frames with these ascending numbers -> (F, H, W, 3), fewer where the video ends before."""
    listed = len(wanted) <= 64  # ffmpeg takes no formula of more than a hundred terms
    chosen = "+".join(f"eq(n,{number})" for number in wanted) if listed else f"lte(n,{wanted[-1]})"
    scale = f"scale={size[0]}:{size[1]}:flags=bilinear," if size else ""
    # Frames get consecutive timestamps, or ffmpeg would repeat some to fill gaps in time. PPM is raw RGB
    # with its size in a header: only ffmpeg knows whether the video is rotated.
    filters = f"select='{chosen}',{scale}settb=1/25,setpts=N"
    limit = ("-frames:v", str(len(wanted) if listed else wanted[-1] + 1))
    ppm = ("-r", "25", "-f", "image2pipe", "-c:v", "ppm", "-pix_fmt", "rgb24", "pipe:1")
    output, _ = ffmpeg(path, "-vf", filters, *limit, *ppm)
    if not output:
        return np.empty((0, 0, 0, 3), np.uint8)
    header = re.match(rb"P6\n(\d+) (\d+)\n255\n", output)
    width, height = map(int, header.groups())
    frames = np.frombuffer(output, np.uint8).reshape(-1, header.end() + width * height * 3)
    frames = frames[:, header.end() :].reshape(-1, height, width, 3)
    return frames if listed else frames[[number for number in wanted if number < len(frames)]]


def ffmpeg(path, *output):
    """Runs ffmpeg on the file's first video stream -> (bytes of its output, text of its messages)."""
    if shutil.which("ffmpeg") is None:
        raise DataError(f"{path}: needs the ffmpeg program, which is not on the PATH; install it "
                        "(apt install ffmpeg, brew install ffmpeg) or turn the clips into GIFs")
    # file: and the whitelist keep a name or a playlist off the network; one thread, since there are workers
    source = ("-protocol_whitelist", "file", "-threads", "1", "-i", f"file:{path}")
    command = ["ffmpeg", "-nostdin", "-hide_banner", "-nostats", *source, "-map", "0:v:0", *output]
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=PATIENCE,
                              start_new_session=True)  # Ctrl-C in the terminal does not reach it
    except subprocess.TimeoutExpired as error:
        raise BrokenClip(f"{path}: ffmpeg did not finish within {PATIENCE} seconds") from error
    messages = done.stderr.decode(errors="replace")
    if done.returncode:
        reasons = re.findall(rf"^.*{re.escape(str(path))}: (.+)", messages, re.MULTILINE)
        raise BrokenClip(f"{path}: cannot be decoded by ffmpeg ({['no reason given', *reasons][-1]})")
    return done.stdout, messages


def spans(count, frames, generator=None):
    """Sparse sampling (3.1, 4.1): one frame number, ascending, of each of `frames` equal spans of a clip. The
    paper does not say which: a NumPy generator draws it (training), else it is the middle one (evaluation).
    """
    numbers = []
    for span in range(frames):
        start = span * count // frames
        stop = max(start + 1, (span + 1) * count // frames)
        numbers.append((start + stop) // 2 if generator is None else int(generator.integers(start, stop)))
    return numbers


def find_clips(folder):
    """{name: path} of all clips in a folder and in those inside it, without hidden files, in path order.

    A folder of frames is one clip, and replaces a video of the same name next to it. Names are relative to
    `folder` and safe to print.
    """
    folder, found = Path(folder), {}
    if not folder.is_dir():
        raise DataError(f"{folder}: is not a folder; give a folder of clips")
    for place, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        clips = [Path(place, name) for name in sorted(filter(is_video, files))
                 if not holds_frames(Path(place, name).with_suffix(""))]
        if Path(place) != folder and are_frames(files):
            clips = [Path(place)]
        found |= {printable(str(clip.relative_to(folder))): clip for clip in clips}
    if not found:
        raise DataError(f"{folder}: has no clips ({' '.join(sorted(VIDEO_SUFFIXES))}, or folders of images)")
    return found


# Manifests and splits ---------------------------------------------------------------------------------------

EXAMPLES = {  # of a line of each task
    "": {"video": "clips/0007.gif", "caption": "a red circle moves left"},
    "qa": {"video": "clips/0007.gif", "question": "what moves left?", "answer": "a circle"},
    "mc": {"video": "clips/0007.gif", "question": "", "options": ["a red ring", "a red circle"], "answer": 1},
    "action": {"video": "clips/0007.gif", "label": "moves left"},
}
FIELDS = {task: tuple(row) for task, row in EXAMPLES.items()}


class Manifest(Sequence):
    """The rows of a JSONL file, each a dict, read when asked for: manifest[i] is one short read from disk.

    Opening it checks every line: DataError names the first bad one. What is held is one int64 tensor
    (rows, 2), a row's offset in bytes and a hash of its video's name, in shared memory: a worker gets a
    handle, however it is started.
    """

    def __init__(self, path, fields):
        self.path, self.folder, self.fields = Path(path), Path(path).parent, tuple(fields)
        self.index = check_lines(self.path, self.fields).share_memory_()

    def subset(self, rows):
        """A Manifest of these rows (numbers or a mask) of this one; nothing is checked again."""
        part = copy.copy(self)
        part.index = self.index[torch.as_tensor(rows)].share_memory_()
        return part

    def each_video(self):
        """A Manifest with the first row of each video, in order."""
        return self.subset(np.sort(np.unique(self.videos, return_index=True)[1]))

    def __len__(self):
        return len(self.index)

    def __getitem__(self, i):
        with open(self.path, "rb") as file:
            return self.read(file, range(len(self))[i])

    def __iter__(self):
        with open(self.path, "rb") as file:
            yield from (self.read(file, i) for i in range(len(self)))

    def read(self, file, i):
        file.seek(int(self.index[i, 0]))
        try:
            return json.loads(file.readline())
        except ValueError as error:
            raise DataError(f"{self.path}: was changed while it was in use; start again") from error

    def line(self, i):
        """The 1-based number of row i's line, for messages."""
        left, number = int(self.index[i, 0]), 1
        with open(self.path, "rb") as file:
            while block := file.read(min(left, 1 << 20)):
                left, number = left - len(block), number + block.count(b"\n")
        return number

    @property
    def videos(self):
        """A hash of each row's video's name: rows of one video have the same."""
        return self.index[:, 1].numpy()

    def video_path(self, row):
        """The path of a row's video; paths in a manifest are relative to its folder. If a folder of frames
        has the video's name without its suffix, it is read instead of the video."""
        path = self.folder / row["video"]
        frames = Path(os.path.splitext(path)[0])
        return frames if holds_frames(frames) and not path.is_dir() else path


def check_lines(path, fields):
    """Checks every line of a manifest -> int64 (rows, 2): each row's offset, the hash of its video's name."""
    parse = json.JSONDecoder().raw_decode  # half the time of json.loads: sets have millions of lines
    index, offset = array("q"), 0
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if not line.isspace():
                    try:
                        text = line.decode("utf-8" if index else "utf-8-sig").strip(" \t\r\n")
                        row, end = parse(text)
                        fault = find_fault(row, fields) if end == len(text) else "has more than a JSON object"
                    except (ValueError, RecursionError) as error:
                        fault = f"is not JSON ({error})"
                    if fault:
                        raise DataError(f"{path}:{number}: {fault}; a line looks like {example(fields)}")
                    video = blake2b(row["video"].encode(errors="surrogatepass"), digest_size=8).digest()
                    index.extend((offset, int.from_bytes(video, "little", signed=True)))
                offset += len(line)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); give another file") from error
    if not index:
        raise DataError(f"{path}: is empty; it needs lines like {example(fields)}")
    return torch.frombuffer(index, dtype=torch.int64).view(-1, 2)


def find_fault(row, fields):
    """What is wrong with a line's JSON value, or None."""
    if type(row) is not dict:
        return "is not a JSON object"
    for field in fields:
        value = row.get(field)
        if field not in row:
            return f'has no "{field}"'
        if field == "options":
            if type(value) is not list or len(value) < 2 or not all(type(option) is str for option in value):
                return '"options" is not a list of two or more texts'
        elif field == "answer" and "options" in fields:
            if type(value) is not int or not 0 <= value < len(row["options"]):
                return f'"answer" is not the number of one of the {len(row["options"])} options, from 0'
        elif type(value) is not str:
            if field != "answer" or type(value) is not int:
                return f'"{field}" is not a text'
        elif not value.strip() and (field != "question" or "options" not in fields):  # options may say it all
            return f'"{field}" is empty'
    return None


def example(fields):
    return json.dumps(next(row for row in EXAMPLES.values() if tuple(row) == fields))


def open_splits(folder, task="", note=lambda line: None):
    """The manifests of a folder: {"train", "val", "test": Manifest}.

    `task` is the first part of the files' names: "" for train.jsonl, "qa" for qa_train.jsonl and so on. A
    missing val is cut from train: 5% of its videos, by a hash of their names. Without test, val becomes test
    and a new val is cut; without both, 5% each. A lone captions.jsonl is cut 80/10/10. A video's lines stay
    together. `note` is called with a sentence on what was cut from what.
    """
    folder, fields = Path(folder), FIELDS[task.split("_")[0]]
    paths = {name: split_path(folder, name, task) for name in ("train", "val", "test")}
    train, lone = paths["train"], folder / "captions.jsonl"
    if not folder.is_dir():
        wrong = "is a file" if folder.exists() else "there is no such folder"
        raise DataError(f"{folder}: {wrong}; give a folder that holds {train.name}")
    if not train.exists() and (task or not lone.exists()):
        other = "" if task else " and no captions.jsonl"
        raise DataError(f"{folder}: has no {train.name}{other}; a line looks like {example(fields)}")
    splits, what = {name: Manifest(path, fields) for name, path in paths.items() if path.exists()}, ""
    if not train.exists():
        if splits:
            raise DataError(f"{folder}: has {paths[next(iter(splits))].name} but no {train.name}; rename "
                            f"{lone.name} to {train.name}, or move the other file away")
        splits, what = cut(Manifest(lone, fields), {"val": 0.10, "test": 0.10}), f"{lone} is split"
    elif len(splits) < 3:
        what = f"{folder} has no " + " and no ".join(paths[name].name for name in paths if name not in splits)
        if "val" in splits:
            splits["test"] = splits.pop("val")
            what += f", so {paths['val'].name} is the test set"
        missing = {name: 0.05 for name in ("val", "test") if name not in splits}
        splits |= cut(splits["train"], missing)
        what += f"; {' and '.join(missing)} cut from train"
    if what:
        note(f"{what} by video: " + ", ".join(f"{name} {len(splits[name]):,} lines" for name in paths))
    videos = splits["train"].videos
    for name in ("val", "test"):
        if shared := len(np.unique(videos[np.isin(videos, splits[name].videos)])):
            note(f"{shared:,} videos of {name} are also in train: its scores say little about unseen clips")
    found = [split.video_path(row) != folder / row["video"] for split in splits.values()
             for row in itertools.islice(split, 500)]
    if any(found):
        note(f"{sum(found):,} of {len(found):,} lines looked at name videos read from folders of frames")
    return splits


def split_path(folder, name, task):
    return Path(folder, f"{task}_{name}.jsonl" if task else f"{name}.jsonl")


def open_split(folder, name, task="", note=lambda line: None):
    """One split of a folder. Its file, if there is one, is opened as it is, even where open_splits would use
    it as another split or refuse the folder; otherwise open_splits makes the split."""
    path = split_path(folder, name, task)
    if path.exists():
        return Manifest(path, FIELDS[task.split("_")[0]])
    return open_splits(folder, task, note)[name]


def cut(manifest, fractions):
    """Cuts a manifest by its videos' hashes: the lowest for the fractions, the rest for train. Each split has
    two videos or more, since a mismatched caption is another video's."""
    ranked, needed = np.unique(manifest.videos), 2 * (len(fractions) + 1)
    if len(ranked) < needed:
        raise DataError(f"{manifest.path}: names too few videos ({len(ranked)}): cutting "
                        f"{' and '.join(fractions)} from train takes {needed}, two a split, since a "
                        "mismatched caption is another video's; add clips, or files for the other splits")
    splits, first, rest = {}, 0, np.full(len(manifest), True)
    for name, fraction in fractions.items():
        first += max(2, round(fraction * len(ranked)))
        taken = rest & (manifest.videos < ranked[first])
        splits[name], rest = manifest.subset(taken), rest & ~taken
    return splits | {"train": manifest.subset(rest)}


# Samples and batches ----------------------------------------------------------------------------------------

class ClipCaptions(torch.utils.data.Dataset):
    """Clips with their captions: dataset[(epoch, index)] -> a dict with these fields.

    frames (T, 3, size, size) uint8; numbers (T,) int64, their numbers in the source; row, the line as a dict;
    video and caption, the row's (None in a task without captions); mismatched, another video's caption that
    is false of this clip, or None; epoch; index, of the row that was used; broken, a line a broken clip.

    A sample depends on (seed, epoch, index) alone, whichever process makes it. `train` draws random frames;
    otherwise it takes the middle ones, the same in every epoch. A row drawn at random replaces a broken clip;
    50 in a row are a DataError. In training, of `negatives` mismatched captions (the paper does not say how
    many) it takes the one that shares most words with the clip's, and `augment` crops and resizes at random,
    all frames alike, and never flips: "left" is a word.
    """

    def __init__(self, manifest, frames, size, seed, train, augment=False, mismatched=True, negatives=1):
        self.manifest, self.frames, self.size, self.seed = manifest, frames, size, seed
        self.train, self.augment = train, train and augment
        self.mismatched, self.negatives = mismatched, negatives if train else 1
        self.kept, self.room = {}, None  # decoded clips by path, and the bytes left for more
        if mismatched:  # raises the error now if there is none
            self.mismatched_caption(manifest[0], np.random.default_rng(seed))

    def __len__(self):
        return len(self.manifest)

    def __getitem__(self, key):
        epoch, index = key if self.train else (0, key[1])
        generator = np.random.default_rng([self.seed, epoch, index, 1])  # 1: apart from the epoch's order
        broken = []
        while True:
            row = self.manifest[index]
            try:
                frames, numbers = self.read(row, generator)
                break
            except BrokenClip as error:
                broken.append(str(error))
            if len(broken) == 50:
                raise DataError(f"{self.manifest.path}: 50 clips in a row are broken, the first: {broken[0]}")
            index = int(generator.integers(len(self)))
        mismatched = self.mismatched_caption(row, generator) if self.mismatched else None
        return {"frames": channels_first(frames), "numbers": torch.tensor(numbers), "epoch": epoch,
                "index": index, "row": row, "video": row["video"], "caption": row.get("caption"),
                "mismatched": mismatched, "broken": broken}

    def first(self, count):
        """The frames of the first `count` clips, for an encoder's start: uint8 (count, T, 3, size, size)."""
        return torch.stack([self[0, i]["frames"] for i in range(min(count, len(self)))])

    def read(self, row, generator):
        """The frames of a row's clip, (T, size, size, 3), and their numbers. Videos that are small when
        decoded stay in memory while there is room; images and arrays are fast to read, and do not."""
        path, chosen, whole = self.manifest.video_path(row), None, False

        def choose(count):
            nonlocal chosen, whole
            chosen = spans(count, self.frames, generator if self.train else None)
            small = 3 * self.size**2 * count <= min(CLIP_KEPT, self.room)
            whole = small and not self.augment and reader(path) is read_video
            return range(count) if whole else chosen

        if self.room is None:
            worker = torch.utils.data.get_worker_info()
            self.room = MOST_KEPT // (worker.num_workers if worker else 1)
        if self.augment:
            frames, numbers = read_clip(path, choose)
            return random_crop(frames, self.size, generator), numbers
        if path not in self.kept:
            try:
                frames, numbers = read_clip(path, choose, self.size)
            except BrokenClip:
                if not whole:
                    raise
                return read_clip(path, lambda count: chosen, self.size)  # these frames may still be whole
            if not whole:
                return frames, numbers
            self.kept[path], self.room = (frames, numbers), self.room - frames.nbytes
        else:
            frames, numbers = self.kept[path]
            choose(len(frames))
        return frames[chosen], [numbers[i] for i in chosen]

    def mismatched_caption(self, row, generator):
        """Of `negatives` captions drawn the one that shares most words with the clip's. All are of other
        videos, in other words and, where the synthetic set's `says` and `shows` can tell, false of this."""
        own, drawn = set(row["caption"].split()), []
        for _ in range(1000):
            other = self.manifest[int(generator.integers(len(self)))]
            differs = row["video"] != other["video"] and row["caption"] != other["caption"]
            known = isinstance(other.get("says"), list) and isinstance(row.get("shows"), list)
            if differs and not (known and is_true(other["says"], row["shows"])):
                words = set(other["caption"].split())
                drawn.append((len(words & own) / len(words | own), other["caption"]))
            if len(drawn) == self.negatives:
                return max(drawn, key=lambda pair: pair[0])[1]
        raise DataError(f"{self.manifest.path}: has no mismatched caption for {row['video']}; a split needs "
                        "two videos with different captions")


def channels_first(frames):
    """(F, H, W, 3) -> (F, 3, H, W), contiguous; NumPy copies without starting threads in a worker."""
    return torch.from_numpy(np.ascontiguousarray(frames.transpose(0, 3, 1, 2)))


def random_crop(frames, size, generator):
    """(F, H, W, 3) -> (F, size, size, 3): one random box for all frames, of 0.5 to 1 of the area."""
    area, aspect = generator.uniform(0.5, 1), np.exp(generator.uniform(np.log(3 / 4), np.log(4 / 3)))
    height, width = frames.shape[1:3]
    across = np.clip(np.sqrt(area * aspect), area, 1)  # fractions of the width and of the height
    down = area / across
    left, top = generator.uniform(0, 1 - across) * width, generator.uniform(0, 1 - down) * height
    box = (left, top, min(left + across * width, width), min(top + down * height, height))
    crops = (Image.fromarray(frame).resize((size, size), Image.Resampling.BILINEAR, box) for frame in frames)
    return np.stack([np.asarray(crop) for crop in crops])


def is_true(says, shows):
    """Whether a caption is true of a synthetic scene: `shows` has the attribute words of each thing in the
    scene, the background among them, `says` those of each thing that the caption claims. It is true if each
    claim can be matched to a different thing of the scene that has all of the claim's words."""
    return any(
        all(set(claim) <= set(thing) for claim, thing in zip(says, things))
        for things in itertools.permutations(shows, len(says))
    )


class WholeClips(torch.utils.data.Dataset):
    """All frames of each row's clip, (F, 3, size, size) uint8; none of a broken one (F = 0)."""

    def __init__(self, manifest, size):
        self.manifest, self.size = manifest, size

    def __getitem__(self, i):
        try:
            return channels_first(read_clip(self.manifest.video_path(self.manifest[i]), size=self.size)[0])
        except BrokenClip:
            return torch.empty(0, 3, self.size, self.size, dtype=torch.uint8)


class Batches(torch.utils.data.Sampler):
    """Yields for each step from `start` to `steps` the (epoch, index) keys of this rank's part of its batch.

    All epochs in one go, each a permutation drawn from (seed, epoch), so that a run goes on from any step.
    The last, smaller batch of an epoch is dropped; with fewer rows than a batch, an epoch is one batch.
    `parts` is --accumulate. Raises DataError if world_size * parts does not divide the batch size.
    """

    def __init__(self, length, batch_size, seed, steps, start=0, rank=0, world_size=1, parts=1):
        self.length, self.batch_size, self.seed = length, min(batch_size, length), seed
        self.steps, self.start, self.rank, self.world_size = steps, start, rank, world_size
        self.steps_per_epoch = length // self.batch_size
        if self.batch_size % (world_size * parts):
            raise DataError(f"a batch of {self.batch_size} clips cannot be divided by {world_size} processes "
                            f"x {parts} parts (--accumulate): give a --batch-size that {world_size * parts} "
                            f"divides, and no more than the {length:,} lines of the training split")

    def __iter__(self):
        order_of = None
        for step in range(self.start, self.steps):
            epoch, batch = divmod(step, self.steps_per_epoch)
            if epoch != order_of:
                order, order_of = np.random.default_rng([self.seed, epoch]).permutation(self.length), epoch
            keys = order[batch * self.batch_size :][: self.batch_size][self.rank :: self.world_size]
            yield [(epoch, index) for index in keys.tolist()]


def collate(samples):
    """Samples of ClipCaptions -> a batch: frames uint8 (B, T, 3, H, W), their rows, whole: bool (B,), False
    where a broken clip was replaced, and a line for each broken clip."""
    return {
        "frames": torch.stack([sample["frames"] for sample in samples]),
        "rows": [sample["row"] for sample in samples],
        "whole": torch.tensor([not sample["broken"] for sample in samples]),
        "broken": [line for sample in samples for line in sample["broken"]],
    }


def make_loader(clips, batches=None, collate=collate, workers=0, most=None):
    """A DataLoader. `batches` is a list, or a sampler, of each batch's keys; without it every clip, or `most`
    from all over the split, is read once and in order, for evaluation. Memory is pinned for CUDA."""
    if batches is None:
        count = min(most or len(clips), len(clips))
        keys = [(0, index * len(clips) // count) for index in range(count)]
        batches = [keys[i : i + 50] for i in range(0, len(keys), 50)]
    return torch.utils.data.DataLoader(clips, batch_sampler=batches, num_workers=workers, collate_fn=collate,
                                       pin_memory=torch.cuda.is_available(), worker_init_fn=ignore_signals)


def ignore_signals(worker):
    """Ctrl-C and SIGTERM can reach every process of a group; the main one decides when its workers end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
