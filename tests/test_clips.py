"""Clips on disk: every format gives its exact frames, every kind of bad input one clear line."""
import itertools
import json
import re
import shutil
import subprocess
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch._utils import ExceptionWrapper

from toy_data import (BrokenClip, ClipCaptions, DataError, Manifest, WholeClips, clips, collate, find_clips,
                      is_true, read_clip, spans)

needs_ffmpeg = pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="ffmpeg is not on the PATH")


def moving_square(count=7, height=24, width=32):
    """(count, height, width, 3): a square that moves right over two colours; no two frames alike."""
    frames = np.zeros((count, height, width, 3), np.uint8)
    frames[:, height // 2 :] = (30, 90, 60)
    for number, frame in enumerate(frames):
        frame[4:12, 2 * number : 2 * number + 8] = (250, 10 * number % 256, 5)
    return frames


def save_animation(path, frames):
    first, *others = [Image.fromarray(frame) for frame in frames]
    first.save(path, save_all=True, append_images=others, duration=100, lossless=True)  # WebP's option


def save_folder(path, frames):
    path.mkdir()
    for number, frame in enumerate(frames):
        Image.fromarray(frame).save(path / f"frame{number}.png")


def save_video(path, frames, *options):
    """An mp4 that loses nothing: RGB in lossless H.264, after its table of contents."""
    count, height, width, _ = frames.shape
    source = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", "10", "-i", "-"]
    lossless = ["-c:v", "libx264rgb", "-qp", "0", "-g", "5", "-movflags", "faststart"]
    command = ["ffmpeg", "-v", "error", "-y", *source, *lossless, *options, path]
    subprocess.run(command, input=frames.tobytes(), check=True)


def save_clip(folder, kind, frames, name="clip"):
    """Writes frames as a clip of a kind and returns its path."""
    path = folder / (name if kind == "folder" else f"{name}.{kind}")
    {"folder": save_folder, "npy": np.save, "mp4": save_video}.get(kind, save_animation)(path, frames)
    return path


@pytest.fixture
def clip(tmp_path):
    return partial(save_clip, tmp_path)


KINDS = ["gif", "webp", "png", "folder", "npy", pytest.param("mp4", marks=needs_ffmpeg)]


@pytest.mark.parametrize("kind", KINDS)
def test_every_format_gives_its_exact_frames_all_or_the_chosen_in_their_order(clip, kind):
    frames, asked = moving_square(12), []  # frame10 comes after frame9
    path = clip(kind, frames)
    read, numbers = read_clip(path)
    assert numbers == list(range(12)) and read.dtype == np.uint8 and read.shape == (12, 24, 32, 3)
    assert (read == frames).all()
    read, numbers = read_clip(path, lambda count: asked.append(count) or [10, 2, 2, 7])
    assert asked == [12] and numbers == [10, 2, 2, 7] and (read == frames[[10, 2, 2, 7]]).all()


@pytest.mark.parametrize("kind", KINDS)
def test_frames_are_resized_to_a_square(clip, kind):
    frames = moving_square(5)
    read, _ = read_clip(clip(kind, frames), lambda count: [1, 4], size=16)
    expected = [Image.fromarray(frame).resize((16, 16), Image.Resampling.BILINEAR) for frame in frames]
    assert read.shape == (2, 16, 16, 3)
    error, of_others = (np.abs(read - np.stack(expected).astype(int)[which]) for which in ([1, 4], [2, 3]))
    if kind == "mp4":
        assert error.mean() < min(4, of_others.mean())  # ffmpeg's bilinear is not Pillow's to the digit
    else:
        assert error.max() == 0


@pytest.mark.parametrize("suffix", ["png", "webp", "gif"])
def test_a_still_is_one_frame_and_what_is_transparent_becomes_black(tmp_path, suffix):
    pixels = np.full((8, 8, 4), 255, np.uint8)
    pixels[:4, :, 3] = 0
    Image.fromarray(pixels, "RGBA").save(tmp_path / f"clip.{suffix}", lossless=True)  # WebP's option
    frames, _ = read_clip(tmp_path / f"clip.{suffix}")
    assert frames.shape == (1, 8, 8, 3) and (frames[0, :4] == 0).all() and (frames[0, 4:] == 255).all()


def test_a_folder_of_mixed_sizes_takes_the_size_of_its_first(tmp_path):
    save_folder(tmp_path / "clip", moving_square(3))
    Image.new("RGB", (50, 70), (9, 9, 9)).save(tmp_path / "clip" / "frame3.png")
    for name in ("notes.txt", ".frame0.png"):
        (tmp_path / "clip" / name).write_text("not a frame")
    frames, _ = read_clip(tmp_path / "clip")
    assert frames.shape == (4, 24, 32, 3) and (frames[3] == 9).all()


@needs_ffmpeg
def test_a_rotated_video_comes_upright(tmp_path):
    frames = moving_square(4)
    save_video(tmp_path / "flat.mp4", frames)
    turn = ["ffmpeg", "-v", "error", "-i", tmp_path / "flat.mp4", "-c", "copy", "-metadata:s:v", "rotate=90"]
    subprocess.run([*turn, tmp_path / "turned.mp4"], check=True)
    read, _ = read_clip(tmp_path / "turned.mp4")
    if read.shape[1:3] == (24, 32):
        pytest.skip("this ffmpeg writes no rotation that way")
    assert any((read == np.rot90(frames, turns, axes=(1, 2))).all() for turns in (1, 3))


@needs_ffmpeg
def test_a_video_of_uneven_frame_times_repeats_and_drops_nothing(tmp_path):
    frames = moving_square(9)
    uneven = "setpts='if(gt(N,4),N*7,N)/10/TB'"
    save_video(tmp_path / "clip.mkv", frames, "-vf", uneven)
    read, _ = read_clip(tmp_path / "clip.mkv")
    assert read.shape == frames.shape and (read == frames).all()


@needs_ffmpeg
def test_a_video_with_packets_that_are_never_shown_ends_at_its_last_frame(tmp_path):
    frames = moving_square(10)
    save_video(tmp_path / "whole.mp4", frames)  # key frames 0 and 5
    cut = ["ffmpeg", "-v", "error", "-ss", "0.35", "-i", tmp_path / "whole.mp4", "-c", "copy"]
    subprocess.run([*cut, tmp_path / "cut.mp4"], check=True)  # shows frames 4 to 9, holds 0 to 9
    read, numbers = read_clip(tmp_path / "cut.mp4", lambda count: [0, 3, count - 1])
    assert numbers == [0, 3, 5] and (read == frames[[4, 7, 9]]).all()


@needs_ffmpeg
def test_more_frames_of_a_video_than_a_filter_can_list(tmp_path):
    frames = moving_square(300, 16, 608)
    save_video(tmp_path / "clip.mp4", frames)
    wanted = list(range(0, 300, 2))
    assert (read_clip(tmp_path / "clip.mp4", lambda count: wanted)[0] == frames[wanted]).all()


# Bad input --------------------------------------------------------------------------------------------------

NOISE = np.random.default_rng(0).bytes(5000)


def one_line(error):
    text = str(error.value)
    assert "\n" not in text and text
    return text


BAD = {  # name: its content, or None for no file, and what is said of it
    "gone.gif": (None, "there is no such file"), "gone": (None, "there is no such file"),
    "empty.npy": (b"", "is empty"), "empty.mp4": (b"", "is empty"), "empty.webp": (b"", "is empty"),
    "noise.gif": (NOISE, "cannot be decoded"), "noise.png": (NOISE, "cannot be decoded"),
    "noise.npy": (NOISE, "cannot be decoded"),
    "pickle.npy": (np.array([{"a": 1}], object), "cannot be decoded"),
    "floats.npy": (np.zeros((2, 4, 4, 3), np.float32), r"is float32 .*; a clip is uint8 \(frames, H, W, 3\)"),
    "frame.npy": (np.zeros((4, 4, 3), np.uint8), r"is uint8 \(4, 4, 3\); a clip is"),
    "first.npy": (np.zeros((2, 3, 4, 4), np.uint8), r"is uint8 \(2, 3, 4, 4\); a clip is"),
    "flat.npy": (np.zeros((2, 0, 4, 3), np.uint8), "has frames of 4x0; a frame has 1 to"),
    "short.npy": (np.zeros((0, 4, 4, 3), np.uint8), "has 0 frames; a clip has 1 to"),
    "two\nlines.gif": (NOISE, "cannot be decoded"), "\udce9t\udce9.gif": (NOISE, "cannot be decoded")}


@pytest.mark.parametrize("name", [*BAD, pytest.param("noise.mp4", marks=needs_ffmpeg)])
def test_a_bad_clip_is_named_in_one_line_that_can_be_printed(tmp_path, name):
    content, wrong = BAD.get(name, (NOISE, "cannot be decoded by ffmpeg"))
    if isinstance(content, np.ndarray):
        np.save(tmp_path / name, content, allow_pickle=True)
    elif content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(BrokenClip) as error:
        read_clip(tmp_path / name)
    shown = name.replace("\n", r"\n").replace("\udce9", r"\udce9")
    assert re.match(f"{re.escape(f'{tmp_path}/{shown}')}: {wrong}", one_line(error))
    one_line(error).encode()


@pytest.mark.parametrize("kind", ["gif", "webp", "png", "npy", pytest.param("mp4", marks=needs_ffmpeg)])
def test_a_truncated_clip_is_broken_whichever_frames_are_wanted(clip, kind):
    rng = np.random.default_rng(0)
    frames = np.kron(rng.integers(0, 6, (8, 12, 12, 1)) * 50, np.ones((1, 4, 4, 3))).astype(np.uint8)
    path = clip(kind, frames)
    assert read_clip(path, lambda count: [0])[0].shape == (1, 48, 48, 3)
    whole = path.read_bytes()
    for kept in (len(whole) // 2, len(whole) * 3 // 4, len(whole) - 9):
        path.write_bytes(whole[:kept])
        with pytest.raises(BrokenClip, match=re.escape(str(path))) as error:
            read_clip(path, lambda count: [0])
        one_line(error)


def test_an_enormous_clip_is_broken_before_it_is_decoded(tmp_path):
    Image.new("1", (10001, 10000)).save(tmp_path / "large.png")  # above ours, below Pillow's own limit
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", module=r"PIL\.")  # as clips does; pytest resets it
        with pytest.raises(BrokenClip, match="large.png: has frames of 10001x10000; a frame has"):
            read_clip(tmp_path / "large.png", size=8)
    np.lib.format.open_memmap(tmp_path / "long.npy", "w+", np.uint8, (1_000_001, 1, 1, 3))
    with pytest.raises(BrokenClip, match="long.npy: has 1,000,001 frames"):
        read_clip(tmp_path / "long.npy", lambda count: [0])


def test_without_ffmpeg_a_video_is_an_error_that_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "clip.mp4").write_bytes(b"something")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DataError, match="clip.mp4: needs the ffmpeg program.*install") as error:
        read_clip(tmp_path / "clip.mp4")
    one_line(error)


@needs_ffmpeg
def test_ctrl_c_does_not_reach_ffmpeg(tmp_path, monkeypatch):
    """A terminal sends it to its session; a child with one of its own goes on."""
    save_video(tmp_path / "clip.mp4", moving_square(3))
    ran, run = [], subprocess.run
    monkeypatch.setattr(clips.subprocess, "run", lambda *args, **how: ran.append(how) or run(*args, **how))
    read_clip(tmp_path / "clip.mp4")
    assert ran and all(how["start_new_session"] for how in ran)


def test_toy_data_never_imports_evilm():
    sources = list(Path(clips.__file__).parent.glob("*.py"))
    assert len(sources) > 4
    for source in sources:
        assert not re.search(r"^\s*(import|from)\s+evilm\b|import_module", source.read_text(), re.MULTILINE)


def test_find_clips_lists_videos_and_folders_of_images(tmp_path):
    hidden = [".index.npy", ".trash/a.gif", "b/.c.mp4"]
    for name in ["b/z.mp4", "b/a.GIF", "c/d/0.jpg", "c/d/1.jpg", "b/cover.jpg", "loose.png", "x.txt", *hidden,
                 "\udce9.gif"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = find_clips(tmp_path)
    assert list(found) == [r"\udce9.gif", "b/a.GIF", "b/z.mp4", "c/d"]
    assert list(found.values()) == [tmp_path / name for name in ("\udce9.gif", "b/a.GIF", "b/z.mp4", "c/d")]
    for name in ("gone", "x.txt"):
        with pytest.raises(DataError, match=f"{name}: is not a folder; give a folder of clips"):
            find_clips(tmp_path / name)
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match="none: has no clips"):
        find_clips(tmp_path / "none")


def test_a_folder_of_a_videos_frames_is_read_in_its_place_and_the_run_says_so_once(tmp_path):
    shown = []
    videos = write_set(tmp_path, 6)
    frames = moving_square(12, 24, 24) // 2
    save_clip(tmp_path, "folder", frames, "4")
    clips.open_splits(tmp_path, note=shown.append)
    assert shown[-1].startswith("1 of 6 lines looked at") and "folders of frames" not in shown[0]
    assert np.array_equal(read_clip(videos.video_path(videos[4]))[0], frames)
    assert videos.video_path(videos[3]) == tmp_path / "3.gif" and videos[4]["video"] == "4.gif"
    assert list(find_clips(tmp_path)) == ["0.gif", "1.gif", "2.gif", "3.gif", "5.gif", "4"]
    shutil.copytree(tmp_path / "4", tmp_path / "2")             # another clip's folder, with a clip in it
    shutil.copy(tmp_path / "0.gif", tmp_path / "2/other.gif")
    shutil.copytree(tmp_path / "4", tmp_path / "4.1")           # whose name has no suffix
    assert videos.video_path(videos[2]) == tmp_path / "2.gif" and "2.gif" in find_clips(tmp_path)
    assert videos.video_path({"video": "4.1"}) == tmp_path / "4.1"
    (tmp_path / "4" / "frame7.png").write_bytes(b"broken")
    with pytest.raises(BrokenClip, match="frame7.png: cannot be decoded"):
        read_clip(videos.video_path(videos[4]))


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 7, 8, 100])
def test_spans_takes_one_frame_of_each_equal_span(count):
    middle = spans(count, 4)
    drawn = [spans(count, 4, np.random.default_rng(seed)) for seed in range(200)]
    for numbers in [middle, *drawn]:
        assert len(numbers) == 4 and numbers == sorted(numbers) and 0 <= numbers[0] and numbers[-1] < count
        if count >= 4:
            assert all(span * count // 4 <= n < (span + 1) * count // 4 for span, n in enumerate(numbers))
    if count <= 4:
        assert set(middle) == set(range(count)) and all(numbers == middle for numbers in drawn)
    if count == 100:
        assert middle == [12, 37, 62, 87]
        assert len({numbers[0] for numbers in drawn}) == 25  # every frame of a span is drawn some time


# Samples ----------------------------------------------------------------------------------------------------

def write_set(folder, count, kind="gif"):
    """A folder with `count` clips of 12 frames in as many colours, and its opened manifest."""
    lines = []
    for number in range(count):
        frames = moving_square(12, 24, 24)
        frames[:, :4] = (20 * number, 255 - 20 * number, 7)
        name = save_clip(folder, kind, frames, str(number)).name
        lines.append(f'{{"video": "{name}", "caption": "clip number {number}"}}\n')
    (folder / "train.jsonl").write_text("".join(lines))
    return Manifest(folder / "train.jsonl", ("video", "caption"))


def same(one, other):
    equal = [torch.equal(one[k], other[k]) if torch.is_tensor(one[k]) else one[k] == other[k] for k in one]
    return one.keys() == other.keys() and all(equal)


def test_a_sample_is_what_the_scripts_expect(tmp_path):
    manifest = write_set(tmp_path, 5)
    sample = ClipCaptions(manifest, frames=4, size=16, seed=0, train=True)[(2, 3)]
    assert sample["frames"].shape == (4, 3, 16, 16) and sample["frames"].dtype == torch.uint8
    assert sample["frames"].is_contiguous() and sample["numbers"].dtype == torch.int64
    assert (sample["index"], sample["epoch"], sample["broken"]) == (3, 2, [])
    assert (sample["video"], sample["caption"]) == ("3.gif", "clip number 3")
    expected, _ = read_clip(tmp_path / "3.gif", lambda count: sample["numbers"].tolist(), size=16)
    assert (sample["frames"].permute(0, 2, 3, 1).numpy() == expected).all()


def test_a_sample_depends_on_seed_epoch_and_index_alone(tmp_path):
    manifest = write_set(tmp_path, 5)
    clips_of = lambda seed: ClipCaptions(manifest, 4, 16, seed, train=True, augment=True)  # noqa: E731
    one, other = clips_of(1), clips_of(1)
    keys = [(epoch, index) for epoch in range(3) for index in range(5)]
    samples = {key: one[key] for key in keys}
    assert all(same(samples[key], other[key]) for key in reversed(keys))
    numbers = [tuple(samples[epoch, 0]["numbers"].tolist()) for epoch in range(3)]
    assert len(set(numbers)) > 1
    assert not all(same(samples[key], clips_of(2)[key]) for key in keys)
    evaluated = ClipCaptions(manifest, 4, 16, seed=0, train=False)
    assert evaluated[(0, 2)]["numbers"].tolist() == spans(12, 4) == [1, 4, 7, 10]
    assert same(evaluated[(0, 2)], evaluated[(9, 2)])


def test_augmentation_is_the_same_for_all_frames_and_never_a_flip(tmp_path):
    """A still clip stays still under the crop, and what was left stays left."""
    ramp = np.zeros((6, 40, 40, 3), np.uint8)
    ramp[:] = (np.arange(40) * 6)[None, None, :, None]  # brighter to the right
    ramp[..., 1] = (np.arange(40) * 6)[None, :, None]  # greener to the bottom
    np.save(tmp_path / "clip.npy", ramp)
    (tmp_path / "train.jsonl").write_text('{"video": "clip.npy", "caption": "a ramp"}\n')
    manifest = Manifest(tmp_path / "train.jsonl", ("video", "caption"))
    dataset = ClipCaptions(manifest, 3, 20, 0, train=True, augment=True, mismatched=False)
    widths = []
    for epoch in range(20):
        frames = dataset[(epoch, 0)]["frames"].float()  # (3, 3, 20, 20)
        assert (frames == frames[0]).all() and dataset[(epoch, 0)]["mismatched"] is None
        right, down = frames[0, 0].diff(dim=1), frames[0, 1].diff(dim=0)
        assert (right > 0).all() and (down > 0).all()
        assert 0.45 <= right.mean() * down.mean() / 12 ** 2 <= 1.05     # the part of the frame that is left
        widths.append(right.mean() / 12)
    assert max(widths) - min(widths) > 0.2


def test_a_truncated_gif_is_named_and_replaced(tmp_path):
    manifest = write_set(tmp_path, 5)
    path = tmp_path / "2.gif"
    path.write_bytes(path.read_bytes()[:-1])  # all but its trailer
    dataset = ClipCaptions(manifest, 4, 16, seed=0, train=True)
    sample = dataset[(0, 2)]
    assert sample["broken"] and all(message == f"{path}: is truncated" for message in sample["broken"])
    assert sample["index"] != 2 and sample["video"] == f"{sample['index']}.gif"
    assert same(sample, dataset[(0, 2)])
    assert len({dataset[(epoch, 2)]["index"] for epoch in range(30)}) == 4
    batch = collate([dataset[(0, 2)], dataset[(0, 3)]])
    assert batch["whole"].tolist() == [False, True] and batch["broken"] == sample["broken"]
    assert batch["rows"] == [sample["row"], manifest[3]]


def test_whole_clips_have_all_frames_and_broken_ones_none(tmp_path):
    manifest = write_set(tmp_path, 3)
    (tmp_path / "1.gif").unlink()
    whole = [WholeClips(manifest, 16)[i] for i in range(3)]
    assert [clip.shape for clip in whole] == [(12, 3, 16, 16), (0, 3, 16, 16), (12, 3, 16, 16)]
    assert (whole[2].permute(0, 2, 3, 1).numpy() == read_clip(tmp_path / "2.gif", size=16)[0]).all()


def test_fifty_broken_clips_in_a_row_stop_the_run_in_one_line_even_from_a_worker(tmp_path):
    manifest = write_set(tmp_path, 3)
    for number in range(3):
        (tmp_path / f"{number}.gif").unlink()
    with pytest.raises(DataError) as error:
        ClipCaptions(manifest, 4, 16, seed=0, train=True)[(0, 1)]
    line = one_line(error)
    assert line.startswith(f"{manifest.path}: 50 clips in a row are broken, the first: ")
    raised = (error.type, error.value, error.tb)
    sent = ExceptionWrapper(raised, where="in DataLoader worker process 0")  # as a worker sends it
    with pytest.raises(DataError) as error:
        sent.reraise()
    assert "Traceback" in error.value.args[0] and one_line(error) == line


# Mismatched captions ----------------------------------------------------------------------------------------

def write_lines(folder, *lines):
    """Rows that all show one short clip, under the names that they give it."""
    for line in lines:
        np.save(folder / line["video"], moving_square(4))
    (folder / "train.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return ClipCaptions(Manifest(folder / "train.jsonl", ("video", "caption")), 2, 8, 0, train=True)


def mismatched_captions(dataset, index):
    return {dataset[(epoch, index)]["mismatched"] for epoch in range(60)}


def test_the_mismatched_caption_is_of_another_video_and_in_other_words(tmp_path):
    captions = [("a", "one"), ("a", "another of the same video"), ("b", "one"), ("c", "three"), ("d", "four")]
    dataset = write_lines(tmp_path, *({"video": f"{v}.npy", "caption": c} for v, c in captions))
    assert mismatched_captions(dataset, 0) == {"three", "four"}
    assert mismatched_captions(dataset, 3) == {"one", "another of the same video", "four"}


def test_the_mismatched_caption_is_false_of_a_synthetic_clip(tmp_path):
    rows = [
        ("a red circle", [["red", "circle", "left"], ["sky"]], [["red", "circle"]]),
        ("something goes left in the sky", [["blue", "square", "left"], ["sky"]], [["left"], ["sky"]]),
        ("a circle", [["blue", "circle"]], [["circle"]]),
        ("a blue circle", [["blue", "circle"]], [["blue", "circle"]])]
    dataset = write_lines(tmp_path, *({"video": f"{i}.npy", "caption": caption, "shows": shows, "says": says}
                                      for i, (caption, shows, says) in enumerate(rows)))
    assert mismatched_captions(dataset, 0) == {"a blue circle"}
    assert mismatched_captions(dataset, 1) == {"a red circle", "a circle", "a blue circle"}
    assert mismatched_captions(dataset, 3) == {"a red circle", "something goes left in the sky"}


def test_of_many_negatives_the_nearest_in_words_is_taken(tmp_path):
    captions = ["a red circle goes left", "a red circle goes up", "snow on a hill", "the sea at night"]
    dataset = write_lines(tmp_path, *({"video": f"{i}.npy", "caption": c} for i, c in enumerate(captions)))
    assert mismatched_captions(dataset, 0) == set(captions[1:])
    dataset.negatives = 40
    assert mismatched_captions(dataset, 0) == {"a red circle goes up"}


def test_a_caption_is_true_if_its_things_are_different_things_of_the_scene():
    scene = [["red", "circle", "left"], ["red", "square"], ["grass"]]
    assert is_true([["red", "circle"]], scene)
    assert is_true([["red"], ["red"]], scene) and is_true([["red"], ["circle"]], scene)
    assert is_true([["grass"], ["square"], ["circle"]], scene)
    assert is_true([], scene)
    assert not is_true([["blue"]], scene)
    assert not is_true([["square", "left"]], scene)  # both words are there, but of two things
    assert not is_true([["circle"], ["circle"]], scene) and not is_true([["circle"], ["left"]], scene)
    assert not is_true([["red"], ["red"], ["red"]], scene)
    assert not is_true([["red"], ["square"], ["circle"], ["grass"]], scene)  # four things claimed of three


KEPT = 12 * 3 * 16 * 16  # bytes of a clip of write_set


@pytest.mark.parametrize("kind, total, one, kept", [
    *((kind, 99, 1, 0) for kind in KINDS[:-1]),
    *(pytest.param("mp4", *sizes, marks=needs_ffmpeg) for sizes in ((99, 1, 3), (2, 1, 2), (99, 0, 0)))])
def test_small_videos_stay_in_memory_and_change_no_sample(tmp_path, monkeypatch, kind, total, one, kept):
    manifest = write_set(tmp_path, 3, kind)
    monkeypatch.setattr(clips, "MOST_KEPT", 0)
    read = ClipCaptions(manifest, 4, 16, seed=3, train=True)
    expected = [read[key] for key in itertools.product(range(3), range(3))]
    monkeypatch.setattr(clips, "MOST_KEPT", total * KEPT)
    monkeypatch.setattr(clips, "CLIP_KEPT", one * KEPT)
    dataset = ClipCaptions(manifest, 4, 16, seed=3, train=True)
    assert all(same(dataset[sample["epoch"], sample["index"]], sample) for sample in expected)
    assert not read.kept and len(dataset.kept) == kept and dataset.room == (total - kept) * KEPT
