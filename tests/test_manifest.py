"""Manifests, their splits and the order of the batches."""
import collections
import itertools
import json
import os
import pickle
import re
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest

from toy_data import Batches, ClipCaptions, DataError, Manifest, clips, make_loader, open_split, open_splits

FIELDS = ("video", "caption")


def write(path, rows):
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def rows_of(videos, lines=1):
    pairs = itertools.product(range(videos), range(lines))
    return [{"video": f"{video}.gif", "caption": f"caption {video} {line}"} for video, line in pairs]


# One manifest -----------------------------------------------------------------------------------------------

def test_a_manifest_is_a_sequence_of_its_rows(tmp_path):
    odd = {"video": "é/日本.gif", "caption": "naïve – “quotes”\nand a line break", "more": [1]}
    rows = [*rows_of(30), odd]
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    manifest = Manifest(path, FIELDS)
    assert len(manifest) == 31 and list(manifest) == rows
    assert [manifest[i] for i in range(31)] == rows and manifest[-1] == rows[-1]
    assert manifest.video_path(rows[3]) == tmp_path / "3.gif" and manifest.folder == tmp_path
    with pytest.raises(IndexError):
        manifest[31]


def test_line_numbers_count_blank_lines_and_any_line_end(tmp_path):
    path = tmp_path / "train.jsonl"
    one, two, three = (json.dumps(row).encode() for row in rows_of(3))
    path.write_bytes(b"\xef\xbb\xbf" + one + b"\r\n\n  \n" + two + b"\n" + three)   # the last without end
    manifest = Manifest(path, FIELDS)
    assert [row["video"] for row in manifest] == ["0.gif", "1.gif", "2.gif"]
    assert [manifest.line(i) for i in range(3)] == [1, 4, 5]


@pytest.mark.parametrize("line, wrong", [
    ("not json", "is not JSON"), ('{"video": "a.gif", "caption": "cut of', "is not JSON"),
    ('{"video": "a.gif", "caption": "a"} {"video": "b.gif", "caption": "b"}', "more than a JSON object"),
    ('["a.gif", "a"]', "is not a JSON object"), ('{"video": "a.gif", "caption": " "}', '"caption" is empty'),
    ('{"video": "a.gif"}', 'has no "caption"'), ('{"video": "", "caption": "a"}', '"video" is empty'),
    ('{"video": "a.gif", "caption": 7}', '"caption" is not a text'),
    ('{"video": null, "caption": "a"}', '"video" is not a text'),
    (b'{"video": "a.gif", "caption": "\xff"}', "is not JSON"),
    pytest.param("[" * 100_000, "is not JSON", id="too deep")])
def test_a_bad_line_is_named_with_file_and_number(tmp_path, line, wrong):
    path = write(tmp_path / "train.jsonl", rows_of(2))
    path.write_bytes(path.read_bytes() + b"\n" + (line.encode() if isinstance(line, str) else line) + b"\n")
    with pytest.raises(DataError, match=re.escape(f"{path}:4: ") + f".*{wrong}.*looks like") as error:
        Manifest(path, FIELDS)
    assert "\n" not in str(error.value)
    assert os.listdir(tmp_path) == ["train.jsonl"]


@pytest.mark.parametrize("change, wrong", [
    ({}, None), ({"question": ""}, None), ({"answer": 2}, "answer"), ({"answer": -1}, "answer"),
    ({"answer": "a"}, "answer"), ({"answer": True}, "answer"), ({"options": "ab"}, "options"),
    ({"options": ["a"]}, "options"), ({"options": ["a", 1]}, "options"), ({"question": 3}, "question")])
def test_a_multiple_choice_line_is_checked(tmp_path, change, wrong):
    row = {"video": "a.gif", "question": "which?", "options": ["a", "b"], "answer": 1} | change
    path = write(tmp_path / "mc_caption_test.jsonl", [row])
    if wrong is None:
        assert open_split(tmp_path, "test", "mc_caption")[0] == row
    else:
        with pytest.raises(DataError, match=f'test.jsonl:1: "{wrong}" .*"options": \\["'):
            Manifest(path, clips.FIELDS["mc"])


def test_an_open_answer_may_be_a_text_or_a_number(tmp_path):
    row = {"video": "a.gif", "question": "how many?", "answer": 3}
    rows = [row, row | {"answer": "three"}]
    assert list(Manifest(write(tmp_path / "qa_test.jsonl", rows), clips.FIELDS["qa"])) == rows
    with pytest.raises(DataError, match='"question" is empty'):
        Manifest(write(tmp_path / "qa_val.jsonl", [row | {"question": ""}]), clips.FIELDS["qa"])


def test_an_empty_or_missing_manifest_says_what_a_line_looks_like(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text("\n \n")
    with pytest.raises(DataError, match=r'train.jsonl: is empty; .*\{"video": "clips/0007.gif", "caption": '):
        Manifest(path, FIELDS)
    with pytest.raises(DataError, match="gone.jsonl: cannot be read"):
        Manifest(tmp_path / "gone.jsonl", FIELDS)


def test_what_goes_to_a_worker_is_a_handle_to_the_offsets(tmp_path):
    write(tmp_path / "captions.jsonl", rows_of(5000))
    for manifest in (Manifest(tmp_path / "captions.jsonl", FIELDS), open_splits(tmp_path)["train"]):
        sent = bytes(ForkingPickler.dumps(manifest))  # as a DataLoader sends it to a spawned worker
        assert len(sent) < 1500 < 16 * len(manifest) and manifest.index.is_shared()
        assert list(pickle.loads(sent)) == list(manifest)
    assert os.listdir(tmp_path) == ["captions.jsonl"]  # no file of ours beside it


def test_subsets_and_each_video(tmp_path):
    path = write(tmp_path / "train.jsonl", [*rows_of(4, lines=3), *rows_of(2)])
    whole = Manifest(path, FIELDS)
    rows = list(whole)
    part = whole.subset([5, 2, 8])
    assert list(part) == [rows[5], rows[2], rows[8]] and list(part.subset([2, 0])) == [rows[8], rows[5]]
    assert list(whole.subset(np.arange(14) >= 12)) == rows[12:] and part.line(0) == 6
    assert list(whole.each_video()) == rows[:12:3] and list(part.each_video()) == list(part)
    assert len(whole.videos) == 14 and whole.videos[0] == whole.videos[12] != whole.videos[3]


def test_a_file_that_changes_under_its_reader_is_named(tmp_path):
    path = write(tmp_path / "train.jsonl", rows_of(20))
    manifest = Manifest(path, FIELDS)
    write(path, rows_of(1))
    with pytest.raises(DataError, match="was changed while it was in use"):
        manifest[15]


# Splits -----------------------------------------------------------------------------------------------------

def cut_of(folder, task=""):
    """The splits of a folder and what is said of them."""
    notes = []
    return open_splits(folder, task, notes.append), notes


def videos_of(manifest):
    return {row["video"] for row in manifest}


def assert_cut_by_video(splits, videos, lines):
    """No video in two splits, no line lost or doubled."""
    parts = [videos_of(splits[name]) for name in ("train", "val", "test")]
    assert sum(map(len, parts)) == len(set.union(*parts)) == videos and all(parts)
    assert sum(len(split) for split in splits.values()) == videos * lines
    captions = collections.Counter(row["caption"] for split in splits.values() for row in split)
    assert set(captions.values()) == {1}


def test_three_files_are_taken_as_they_are(tmp_path):
    for name, videos in (("train", 9), ("val", 4), ("test", 5)):
        write(tmp_path / f"{name}.jsonl", rows_of(videos))
    splits, notes = cut_of(tmp_path)
    assert list(splits) == ["train", "val", "test"]
    assert "4 videos of val are also in train" in notes[0] and "5 videos of test" in notes[1]
    assert [list(splits[name]) for name in splits] == [rows_of(9), rows_of(4), rows_of(5)]
    assert list(open_split(tmp_path, "val")) == rows_of(4)


@pytest.mark.parametrize("files, cut, said", [
    ({"captions": 200}, (160, 20, 20), "train 480 lines, val 60 lines, test 60 lines"),
    ({"train": 200, "test": 7}, (190, 10, 7), "no val.jsonl; val cut from train"),
    ({"train": 100, "val": 7}, (95, 5, 7), "no test.jsonl, so val.jsonl is the test set; val cut from train"),
    ({"train": 100}, (90, 5, 5), "no val.jsonl and no test.jsonl; val and test cut from train by video")])
def test_a_split_that_is_not_there_is_cut_by_video(tmp_path, files, cut, said):
    """80/10/10 of lone captions; without val 5% of the training videos; without test val becomes test."""
    for name, videos in files.items():
        path = write(tmp_path / f"{name}.jsonl", [{"video": f"{name}-{row['video']}",
                                                   "caption": f"{name} {row['caption']}"}
                                                  for row in rows_of(videos, lines=3)])
    splits, notes = cut_of(tmp_path)
    assert_cut_by_video(splits, sum(files.values()), 3)
    assert tuple(len(videos_of(splits[name])) for name in ("train", "val", "test")) == cut
    assert len(notes) == 1 and said in notes[0]
    if len(files) == 2:         # the file that is there stays whole
        assert list(splits["test"]) == list(Manifest(path, FIELDS))
    for name, split in splits.items():      # its own file is opened whole, even where splits were cut from it
        own = tmp_path / f"{name}.jsonl"
        assert list(open_split(tmp_path, name)) == list(Manifest(own, FIELDS) if own.exists() else split)


@pytest.mark.parametrize("videos", [6, 7, 11])
def test_every_split_of_few_videos_has_two(tmp_path, videos):
    write(tmp_path / "captions.jsonl", rows_of(videos, lines=2))
    splits = open_splits(tmp_path)
    assert_cut_by_video(splits, videos, 2)
    assert min(len(videos_of(split)) for split in splits.values()) >= 2


@pytest.mark.parametrize("files, videos, needed", [
    (["captions"], 5, r"names too few videos \(5\): cutting val and test from train takes 6"),
    (["train"], 1, r"names too few videos \(1\): cutting val and test from train takes 6"),
    (["train", "test"], 3, r"names too few videos \(3\): cutting val from train takes 4")])
def test_too_few_videos_for_the_splits_are_an_error(tmp_path, files, videos, needed):
    for name in files:
        write(tmp_path / f"{name}.jsonl", rows_of(videos, lines=5))
    with pytest.raises(DataError, match=f"{files[0]}.jsonl: {needed}.*two a split.*add clips"):
        open_splits(tmp_path)


@pytest.mark.parametrize("rows", [
    [{"video": f"{i}.gif", "caption": "the same"} for i in range(9)],
    [{"video": "0.gif", "caption": f"caption {i}"} for i in range(9)],
    [{"video": f"{i // 2}.gif", "caption": f"caption {i % 2}"} for i in range(3)]])
def test_a_split_without_mismatched_captions_is_refused_before_training(tmp_path, rows):
    path = write(tmp_path / "val.jsonl", rows)
    with pytest.raises(DataError, match=f"{path}: has no mismatched caption for 0.gif; a split needs two"):
        ClipCaptions(Manifest(path, FIELDS), 4, 16, 0, train=False)
    ClipCaptions(Manifest(path, FIELDS), 4, 16, 0, train=False, mismatched=False)


def test_a_split_depends_on_the_names_alone_and_not_on_their_order(tmp_path):
    write(tmp_path / "captions.jsonl", rows_of(50))
    before = {name: videos_of(split) for name, split in open_splits(tmp_path).items()}
    write(tmp_path / "captions.jsonl", rows_of(50)[::-1])
    assert {name: videos_of(split) for name, split in open_splits(tmp_path).items()} == before


@pytest.mark.parametrize("task, names", [
    ("", "train.jsonl and no captions.jsonl"), ("mc_action", "mc_action_train.jsonl")])
def test_a_folder_without_manifests_says_what_is_missing(tmp_path, task, names):
    with pytest.raises(DataError, match=f'{tmp_path}: has no {names}; a line looks like {{"video"'):
        open_splits(tmp_path, task)
    with pytest.raises(DataError, match="gone: there is no such folder; give a folder that holds"):
        open_splits(tmp_path / "gone", task)
    if not task:            # which would be cut into a test split of its own
        for name in ("captions", "test"):
            write(tmp_path / f"{name}.jsonl", rows_of(20))
        with pytest.raises(DataError, match="has test.jsonl but no train.jsonl; rename captions.jsonl"):
            open_splits(tmp_path)
    path = write(tmp_path / "test.txt", [])
    for opened in (lambda: open_splits(path, task), lambda: open_split(path, "test", task)):
        with pytest.raises(DataError, match="test.txt: is a file; give a folder that holds"):
            opened()


# Batches ----------------------------------------------------------------------------------------------------

def test_an_epoch_is_a_permutation_and_its_last_smaller_batch_is_dropped():
    batches = Batches(length=23, batch_size=5, seed=7, steps=12)
    keys = list(batches)
    assert len(keys) == 12 and batches.steps_per_epoch == 4
    for epoch in range(3):
        of_epoch = [key for batch in keys[4 * epoch : 4 * epoch + 4] for key in batch]
        assert {key[0] for key in of_epoch} == {epoch}
        indices = [key[1] for key in of_epoch]
        assert len(set(indices)) == 20 and set(indices) <= set(range(23))
        assert indices != sorted(indices)
    assert [k for _, k in keys[0]] != [k for _, k in keys[4]]
    assert keys == list(Batches(23, 5, 7, 12)) != list(Batches(23, 5, 8, 12))


@pytest.mark.parametrize("start", [0, 1, 4, 6, 11, 12])
def test_a_run_goes_on_from_any_step_with_the_same_batches(start):
    rest = Batches(23, 5, 7, 12, start=start)
    assert list(rest) == list(Batches(23, 5, 7, 12))[start:]


@pytest.mark.parametrize("world_size", [2, 3, 6])
def test_the_ranks_divide_each_batch_without_overlap(world_size):
    whole = list(Batches(23, 6, 7, 12))
    ranks = [list(Batches(23, 6, 7, 12, rank=rank, world_size=world_size)) for rank in range(world_size)]
    for step, batch in enumerate(whole):
        assert [rank[step] for rank in ranks] == [batch[rank::world_size] for rank in range(world_size)]


def test_fewer_rows_than_a_batch_are_one_batch_an_epoch():
    batches = Batches(length=3, batch_size=8, seed=0, steps=4)
    assert batches.steps_per_epoch == 1
    assert [sorted(batch) for batch in batches] == [[(epoch, i) for i in range(3)] for epoch in range(4)]


@pytest.mark.parametrize("batch_size, length, batch", [(30, 99, 30), (64, 12, 12)])
def test_a_batch_that_processes_and_parts_do_not_divide_is_an_error(batch_size, length, batch):
    Batches(length, batch_size - batch_size % 4, 0, 4, world_size=2, parts=2)
    message = f"a batch of {batch} clips cannot be divided by 2 processes x 4 parts .--acc.* 8 divides"
    with pytest.raises(DataError, match=message):
        Batches(length, batch_size, 0, 4, world_size=2, parts=4)


def test_evaluation_takes_each_clip_once_and_in_order():
    batches = [(0, i) for i in range(50)], [(0, 50), (0, 51)]
    assert make_loader(range(52)).batch_sampler == list(map(list, batches))
    assert make_loader(range(9), most=3).batch_sampler == [[(0, 0), (0, 3), (0, 6)]], "from all over"
