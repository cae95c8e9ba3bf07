"""Clips on disk: every format gives its exact frames, every kind of bad input one clear line."""

import itertools
import json
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch._utils import ExceptionWrapper

from toy_data import clips, render
from toy_data.clips import (BrokenClip, ClipCaptions, DataError, Manifest, is_true, open_splits, read_clip,
                            spans)

needs_ffmpeg = pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="ffmpeg is not on the PATH")


def moving_square(count=7, height=24, width=32):
    """(count, height, width, 3): a square that moves right over two colours; no two frames alike."""
    frames = np.zeros((count, height, width, 3), np.uint8)
    frames[:, height // 2 :] = (30, 90, 60)
    for number, frame in enumerate(frames):
        frame[4:12, 2 * number : 2 * number + 8] = (250, 10 * number % 256, 5)
    return frames


def save_animation(path, frames, **options):
    first, *others = [Image.fromarray(frame) for frame in frames]
    first.save(path, save_all=True, append_images=others, duration=100, **options)


def save_folder(path, frames):
    path.mkdir()
    for number, frame in enumerate(frames):
        Image.fromarray(frame).save(path / f"frame{number}.png")


def save_video(path, frames, *options):
    """An mp4 that loses nothing: RGB in lossless H.264."""
    count, height, width, _ = frames.shape
    source = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", "10", "-i", "-"]
    lossless = ["-c:v", "libx264rgb", "-qp", "0", "-g", "5"]
    command = ["ffmpeg", "-v", "error", "-y", *source, *lossless, *options, path]
    subprocess.run(command, input=frames.tobytes(), check=True)


@pytest.fixture
def clip(tmp_path):
    """Writes frames as a clip of a kind and returns its path."""

    def write(kind, frames, name="clip"):
        path = tmp_path / (name if kind == "folder" else f"{name}.{kind}")
        if kind == "folder":
            save_folder(path, frames)
        elif kind == "npy":
            np.save(path, frames)
        elif kind == "mp4":
            save_video(path, frames)
        else:
            save_animation(path, frames, lossless=True)  # WebP's option
        return path

    return write


KINDS = ["gif", "webp", "png", "folder", "npy", pytest.param("mp4", marks=needs_ffmpeg)]


@pytest.mark.parametrize("kind", KINDS)
def test_every_format_gives_its_exact_frames(clip, kind):
    frames = moving_square(12)  # frame10 comes after frame9
    read, numbers = read_clip(clip(kind, frames))
    assert numbers == list(range(12)) and read.dtype == np.uint8 and read.shape == (12, 24, 32, 3)
    assert (read == frames).all()


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_chosen_frames_come_in_the_chosen_order(clip, kind):
    frames, asked = moving_square(12), []

    def choose(count):
        asked.append(count)
        return [10, 2, 2, 7]

    read, numbers = read_clip(clip(kind, frames), choose)
    assert asked == [12] and numbers == [10, 2, 2, 7]
    assert (read == frames[[10, 2, 2, 7]]).all()
    read[:] = 0  # the frames are the caller's own


@pytest.mark.parametrize("kind", KINDS)
def test_frames_are_resized_to_a_square(clip, kind):
    frames = moving_square(5)
    read, _ = read_clip(clip(kind, frames), lambda count: [1, 4], size=16)
    resized = (Image.fromarray(frame).resize((16, 16), Image.Resampling.BILINEAR) for frame in frames)
    expected = [np.asarray(image) for image in resized]
    assert read.shape == (2, 16, 16, 3)
    error = np.abs(read.astype(int) - np.stack(expected)[[1, 4]])
    if kind == "mp4":
        assert error.mean() < 4  # ffmpeg's bilinear is not Pillow's to the digit
        assert np.abs(read.astype(int) - np.stack(expected)[[2, 3]]).mean() > error.mean()
    else:
        assert error.max() == 0


def test_a_gif_of_true_colours_and_local_palettes_is_exact(tmp_path):
    """Each frame of 250 colours of its own, delta frames and disposal to the background included."""
    rng = np.random.default_rng(0)
    frames = []
    for _ in range(6):
        colours = rng.integers(0, 256, (250, 3))
        frames.append(colours[rng.integers(0, 250, (20, 20))].astype(np.uint8))
    for disposal in (0, 1, 2):
        save_animation(tmp_path / "clip.gif", frames, disposal=disposal)
        assert (read_clip(tmp_path / "clip.gif")[0] == np.stack(frames)).all()


@pytest.mark.parametrize("suffix", ["png", "webp", "gif"])
def test_what_is_transparent_becomes_black(tmp_path, suffix):
    pixels = np.full((8, 8, 4), 255, np.uint8)
    pixels[:4, :, 3] = 0
    Image.fromarray(pixels, "RGBA").save(tmp_path / f"clip.{suffix}", lossless=True)  # WebP's option
    frames, _ = read_clip(tmp_path / f"clip.{suffix}")
    assert frames.shape == (1, 8, 8, 3) and (frames[0, :4] == 0).all() and (frames[0, 4:] == 255).all()


def test_a_photo_is_a_clip_of_one_frame(tmp_path):
    Image.new("RGB", (20, 10), (10, 200, 30)).save(tmp_path / "photo.jpg")
    frames, numbers = read_clip(tmp_path / "photo.jpg")
    assert frames.shape == (1, 10, 20, 3) and numbers == [0]
    assert np.abs(frames.astype(int) - (10, 200, 30)).max() < 4


def test_a_folder_of_mixed_sizes_takes_the_size_of_its_first(tmp_path):
    save_folder(tmp_path / "clip", moving_square(3))
    Image.new("RGB", (50, 70), (9, 9, 9)).save(tmp_path / "clip" / "frame3.png")
    (tmp_path / "clip" / "notes.txt").write_text("not a frame")
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
    save_video(tmp_path / "clip.mkv", frames, "-vf", uneven, *clips.frame_by_frame())
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


# ------------------------------------------------------------------------------------------------------------
# Bad input


def one_line(error):
    text = str(error.value)
    assert "\n" not in text and text
    return text


@pytest.mark.parametrize("name", ["gone.gif", "gone.npy", "gone.mp4", "gone"])
def test_a_missing_clip_is_broken(tmp_path, name):
    with pytest.raises(BrokenClip, match=re.escape(f"{tmp_path / name}: there is no such file")) as error:
        read_clip(tmp_path / name)
    one_line(error)


@pytest.mark.parametrize("name", ["empty.gif", "empty.npy", "empty.mp4", "empty.webp"])
def test_an_empty_clip_is_broken(tmp_path, name):
    (tmp_path / name).touch()
    with pytest.raises(BrokenClip, match=re.escape(f"{tmp_path / name}: is empty")):
        read_clip(tmp_path / name)


def test_a_folder_without_images_is_broken(tmp_path):
    (tmp_path / "clip").mkdir()
    (tmp_path / "clip" / "notes.txt").write_text("no frame")
    with pytest.raises(BrokenClip, match="without images"):
        read_clip(tmp_path / "clip")


@pytest.mark.parametrize("kind", ["gif", "webp", "png", "npy", pytest.param("mp4", marks=needs_ffmpeg)])
def test_a_truncated_clip_is_broken_whichever_frames_are_wanted(clip, kind):
    rng = np.random.default_rng(0)
    frames = np.kron(rng.integers(0, 6, (8, 12, 12, 1)) * 50, np.ones((1, 4, 4, 3))).astype(np.uint8)
    path = clip(kind, frames)
    assert read_clip(path, lambda count: [0])[0].shape == (1, 48, 48, 3)
    whole = path.read_bytes()
    end = 9 if kind != "mp4" else len(whole) // 2  # the last bytes of an mp4 hold no frame
    for kept in (len(whole) * 3 // 4, len(whole) - end):
        path.write_bytes(whole[:kept])
        with pytest.raises(BrokenClip, match=re.escape(str(path))) as error:
            read_clip(path, lambda count: [0])
        one_line(error)


@needs_ffmpeg
def test_a_video_cut_after_its_table_of_contents_is_broken(tmp_path):
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (10, 32, 32, 3)).astype(np.uint8)
    save_video(tmp_path / "clip.mp4", frames, "-movflags", "faststart")
    whole = (tmp_path / "clip.mp4").read_bytes()
    (tmp_path / "clip.mp4").write_bytes(whole[: len(whole) * 2 // 3])
    with pytest.raises(BrokenClip, match="clip.mp4: cannot be decoded"):
        read_clip(tmp_path / "clip.mp4", lambda count: [0])


@pytest.mark.parametrize("kind", ["gif", "png", "npy", pytest.param("mp4", marks=needs_ffmpeg)])
def test_noise_is_broken(tmp_path, kind):
    name = f"noise.{kind}"
    (tmp_path / name).write_bytes(np.random.default_rng(0).bytes(5000))
    with pytest.raises(BrokenClip, match=f"{name}: cannot be decoded") as error:
        read_clip(tmp_path / name)
    one_line(error)


def test_an_enormous_clip_is_broken_before_it_is_decoded(tmp_path):
    wide = bytearray(b"GIF89a" + (20000).to_bytes(2, "little") * 2 + b"\0\0\0")
    wide += b"," + b"\0\0\0\0" + (20000).to_bytes(2, "little") * 2 + b"\0" + b"\x02\x02\x4c\x01\x00;"
    (tmp_path / "wide.gif").write_bytes(wide)
    with pytest.raises(BrokenClip, match="wide.gif"):
        read_clip(tmp_path / "wide.gif")

    Image.new("1", (10001, 10000)).save(tmp_path / "large.png")  # above ours, below Pillow's own limit
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", module=r"PIL\.")  # as clips does; pytest resets it
        with pytest.raises(BrokenClip, match="large.png: frames of 10001x10000 are enormous"):
            read_clip(tmp_path / "large.png", size=8)

    np.lib.format.open_memmap(tmp_path / "long.npy", "w+", np.uint8, (1_000_001, 1, 1, 3))
    with pytest.raises(BrokenClip, match="long.npy: has 1,000,001 frames"):
        read_clip(tmp_path / "long.npy", lambda count: [0])


@pytest.mark.parametrize(
    "shape, kind", [((2, 4, 4, 3), np.float32), ((4, 4, 3), np.uint8), ((2, 3, 4, 4), np.uint8)]
)
def test_an_array_of_another_kind_is_broken(tmp_path, shape, kind):
    np.save(tmp_path / "clip.npy", np.zeros(shape, kind))
    with pytest.raises(BrokenClip, match=r"a clip is uint8 \(frames, H, W, 3\)"):
        read_clip(tmp_path / "clip.npy")


def test_a_pickled_array_is_never_loaded(tmp_path):
    np.save(tmp_path / "clip.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(BrokenClip, match="clip.npy"):
        read_clip(tmp_path / "clip.npy")


def test_without_ffmpeg_a_video_is_an_error_that_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "clip.mp4").write_bytes(b"something")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DataError, match="clip.mp4: needs the ffmpeg program.*install") as error:
        read_clip(tmp_path / "clip.mp4")
    one_line(error)


# ------------------------------------------------------------------------------------------------------------
# Sparse sampling


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


# ------------------------------------------------------------------------------------------------------------
# Samples


def write_set(folder, count, kind="gif", **extra):
    """A folder with `count` clips of 12 frames in as many colours, and its opened manifest."""
    folder.mkdir(exist_ok=True)
    lines = []
    for number in range(count):
        frames = moving_square(12, 24, 24)
        frames[:, :4] = (20 * number, 255 - 20 * number, 7)
        save_animation(folder / f"{number}.gif", frames)
        lines.append(f'{{"video": "{number}.gif", "caption": "clip number {number}"}}\n')
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


def test_a_sample_is_the_same_from_any_number_of_workers(tmp_path):
    dataset = ClipCaptions(write_set(tmp_path, 6), 4, 16, seed=0, train=True)
    keys = [(0, 3), (0, 1), (1, 5), (1, 0)]
    for workers, context in ((0, None), (2, "fork"), (1, "spawn")):
        loader = torch.utils.data.DataLoader(dataset, batch_sampler=[keys[:2], keys[2:]], num_workers=workers,
                                             collate_fn=list, multiprocessing_context=context)
        samples = list(itertools.chain(*loader))
        assert len(samples) == 4 and all(same(sample, dataset[key]) for sample, key in zip(samples, keys))


def test_evaluation_takes_the_middle_frames_in_every_epoch(tmp_path):
    dataset = ClipCaptions(write_set(tmp_path, 5), 4, 16, seed=0, train=False)
    assert dataset[(0, 2)]["numbers"].tolist() == spans(12, 4) == [1, 4, 7, 10]
    assert same(dataset[(0, 2)], dataset[(9, 2)])


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
    for epoch in range(40):
        frames = dataset[(epoch, 0)]["frames"].float()  # (3, 3, 20, 20)
        assert (frames == frames[0]).all() and dataset[(epoch, 0)]["mismatched"] is None
        right, down = frames[0, 0].diff(dim=1), frames[0, 1].diff(dim=0)
        assert (right > 0).all() and (down > 0).all()
        across, deep = (right.mean() * 20 / 240).item(), (down.mean() * 20 / 240).item()
        assert 0.45 <= across * deep <= 1.05
        widths.append(across)
    assert max(widths) - min(widths) > 0.2


def test_a_truncated_gif_is_named_and_replaced(tmp_path):
    manifest = write_set(tmp_path, 5)
    path = tmp_path / "2.gif"
    path.write_bytes(path.read_bytes()[:-30])
    dataset = ClipCaptions(manifest, 4, 16, seed=0, train=True)
    sample = dataset[(0, 2)]
    assert sample["broken"] and all(message == f"{path}: is truncated" for message in sample["broken"])
    assert sample["index"] != 2 and sample["video"] == f"{sample['index']}.gif"
    assert same(sample, dataset[(0, 2)])
    assert len({dataset[(epoch, 2)]["index"] for epoch in range(30)}) == 4


def test_strict_stops_at_a_broken_clip(tmp_path):
    manifest = write_set(tmp_path, 5)
    (tmp_path / "2.gif").unlink()
    with pytest.raises(DataError, match="2.gif: there is no such file.*--strict") as error:
        ClipCaptions(manifest, 4, 16, seed=0, train=True, strict=True)[(0, 2)]
    one_line(error)


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


# ------------------------------------------------------------------------------------------------------------
# Mismatched captions


def write_lines(folder, *lines):
    """Rows that all show one short clip, under the names that they give it."""
    for line in lines:
        save_animation(folder / line["video"], moving_square(4))
    (folder / "train.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return ClipCaptions(Manifest(folder / "train.jsonl", ("video", "caption")), 2, 8, 0, train=True)


def mismatched_captions(dataset, index):
    return {dataset[(epoch, index)]["mismatched"] for epoch in range(60)}


def test_the_mismatched_caption_is_of_another_video_and_in_other_words(tmp_path):
    dataset = write_lines(
        tmp_path,
        {"video": "a.gif", "caption": "one"},
        {"video": "a.gif", "caption": "another of the same video"},
        {"video": "b.gif", "caption": "one"},
        {"video": "c.gif", "caption": "three"},
        {"video": "d.gif", "caption": "four"},
    )
    assert mismatched_captions(dataset, 0) == {"three", "four"}
    assert mismatched_captions(dataset, 3) == {"one", "another of the same video", "four"}


def test_the_mismatched_caption_is_false_of_a_synthetic_clip(tmp_path):
    red_left = {"shows": [["red", "circle", "left"], ["sky"]], "says": [["red", "circle"]]}
    blue_left = {"shows": [["blue", "square", "left"], ["sky"]], "says": [["left"], ["sky"]]}
    blue_circle = {"shows": [["blue", "circle"]], "says": [["blue", "circle"]]}
    dataset = write_lines(
        tmp_path,
        {"video": "a.gif", "caption": "a red circle", **red_left},
        {"video": "b.gif", "caption": "something goes left in the sky", **blue_left},
        {"video": "c.gif", "caption": "a circle", "shows": [["blue", "circle"]], "says": [["circle"]]},
        {"video": "d.gif", "caption": "a blue circle", **blue_circle},
    )
    assert mismatched_captions(dataset, 0) == {"a blue circle"}
    assert mismatched_captions(dataset, 1) == {"a red circle", "a circle", "a blue circle"}
    assert mismatched_captions(dataset, 3) == {"a red circle", "something goes left in the sky"}


def test_of_many_negatives_the_nearest_in_words_is_taken(tmp_path):
    captions = ["a red circle goes left", "a red circle goes up", "snow on a hill", "the sea at night"]
    dataset = write_lines(tmp_path, *({"video": f"{i}.gif", "caption": c} for i, c in enumerate(captions)))
    assert mismatched_captions(dataset, 0) == set(captions[1:])
    dataset.negatives = 40
    assert mismatched_captions(dataset, 0) == {"a red circle goes up"}


def test_a_split_without_a_mismatched_caption_says_what_it_needs(tmp_path):
    dataset = write_lines(tmp_path, *({"video": video, "caption": "one"} for video in ("a.gif", "b.gif")))
    with pytest.raises(DataError, match="needs two videos with different captions") as error:
        dataset[(0, 0)]
    one_line(error)


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


def test_the_loader_knows_nothing_of_the_model():
    imported = "import sys; import toy_data.clips; sys.exit('evilm' in sys.modules)"
    root = Path(clips.__file__).parent.parent
    assert subprocess.run([sys.executable, "-c", imported], cwd=root).returncode == 0


def test_clips_that_are_kept_give_the_samples_of_clips_that_are_read(tmp_path, monkeypatch):
    render(tmp_path / "set", 45)
    manifest = open_splits(tmp_path / "set")[0]["train"]

    def samples(room):
        monkeypatch.setattr("toy_data.clips.MOST_KEPT", room)
        dataset = ClipCaptions(manifest, 4, 64, seed=3, train=True)
        found = [dataset[epoch, i]["frames"] for epoch in range(3) for i in range(8)]
        return found, dataset

    (kept, all_kept), (read, none), (some, few) = samples(1 << 29), samples(0), samples(400_000)
    assert len(all_kept.kept) == 8 and not none.kept and 0 < len(few.kept) < 8
    assert sum(frames.nbytes for frames in few.kept.values()) <= 400_000
    assert all(a.equal(b) and a.equal(c) for a, b, c in zip(kept, read, some))
