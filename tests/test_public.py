"""Public sets in their authors' own files, a few rows of each, against the rows that come out."""
import csv
import io
import itertools
import json
import os
import sys
from pathlib import Path

import pytest
from PIL import Image

from toy_data import DataError, open_split, open_splits, public, read_clip
from toy_data.public import convert

PARTS = ("train", "val", "test")
COLUMNS = ["a1", "a2", "a3", "a4", "a5"]


@pytest.fixture
def release(tmp_path):
    """release({path: text or JSON}) writes the files of a release -> its folder."""
    def write(files):
        for name, content in files.items():
            path = tmp_path / "release" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content if isinstance(content, str) else json.dumps(content), newline="")
        return tmp_path / "release"
    return write


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


@pytest.fixture
def videos(tmp_path):
    """videos(*names) makes files of these names, which a conversion never opens -> their folder."""
    def touch(*names):
        for name in names:
            path = tmp_path / "videos" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        return tmp_path / "videos"
    return touch


def table(*rows, delimiter=",", end="\n"):
    text = io.StringIO()
    csv.writer(text, delimiter=delimiter, lineterminator=end).writerows(rows)
    return text.getvalue()


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def written(out):
    """{file: its rows} with each video's path cut to its name."""
    found = {path.name: rows_of(path) for path in sorted(out.glob("*.jsonl"))}
    for row in itertools.chain(*found.values()):
        assert (out / row["video"]).is_file()
        row["video"] = Path(row["video"]).name
    return found


def missing(out):
    return (out / "missing.txt").read_text().splitlines()


def captions(**of):
    return [{"video": f"{video}.mp4", "caption": caption} for video, caption in of.items()]


# ---- each set in the layout of its release -----------------------------------------------------------------

WEBVID = ["videoid", "contentUrl", "duration", "page_dir", "name"]


def webvid_rows(*ids):
    """Captions with what a table must quote."""
    return [[i, f"https://ak.picdn.net/{i}", "PT00H00M24S", "000001_000050", f'A "{i}", and'] for i in ids]


def test_webvid_train_and_val_come_from_their_tables(release, videos, out):
    folder = release({"results_2M_train.csv": table(WEBVID, *webvid_rows(*range(10, 50))),
                      "results_2M_val.csv": table(WEBVID, *webvid_rows(1, 2, 3))})
    names = [f"000001_000050/{i}.mp4" for i in (*range(10, 49), 1, 3)]
    tally = convert("webvid", folder, videos(*names), out)
    assert tally.rows == {"train.jsonl": 39, "val.jsonl": 2} and missing(out) == ["49", "2"]
    assert written(out)["val.jsonl"] == captions(**{i: f'A "{i}", and' for i in "13"})
    notes = []
    splits = open_splits(out, note=notes.append)
    assert [len(splits[part]) for part in PARTS] == [37, 2, 2] and "is the test set" in notes[0]


def test_a_table_has_columns_in_any_order_odd_bytes_and_rows_without_text(release, videos, out):
    rows = table(["videoid", "name", "page_dir"], [1, "caf\xe9", ""], [2, " ", ""], [3, "a dog", ""])
    folder = release({"results_2M_train.csv": ""})
    (folder / "results_2M_train.csv").write_bytes(b"\xef\xbb\xbf" + rows.encode("latin-1"))
    clips = videos("1.mp4", "2.mp4", "3.mp4")
    tally = convert("webvid", folder / "results_2M_train.csv", clips, out)
    assert written(out)["train.jsonl"] == captions(**{"1": "caf\ufffd", "3": "a dog"})
    assert tally.rows == {"train.jsonl": 2} and tally.empty == 1 and not tally.missing


def msrvtt_info(*parts):
    """Videos of these splits, numbered from 0, with two sentences each, as in MSR-VTT's files."""
    return {"info": {"year": "2016"},
            "videos": [{"category": 9, "url": "https://www.youtube.com/watch?v=9lZi22qLlEo",
                        "video_id": f"video{i}", "start time": 137.72, "end time": 149.44, "split": part,
                        "id": i} for i, part in parts],
            "sentences": [{"caption": f"{say} {i}", "video_id": f"video{i}", "sen_id": 2 * i}
                          for say in ("a car", "a dog") for i, _ in parts]}


MSRVTT = ["train", "train", "train", "validate", "test", "test"]
JSFUSION = table(["key", "vid_key", "video_id", "sentence"], ["ret0", "msr5", "video5", "the dog of test"])


@pytest.mark.parametrize("files", ["one file", "two files"])
def test_msrvtt_full_is_split_as_its_authors_do(release, videos, out, files):
    whole = list(enumerate(MSRVTT))
    folder = release({"MSRVTT_data.json": msrvtt_info(*whole)} if files == "one file" else
                     {"train_val_videodatainfo.json": msrvtt_info(*whole[:4]),
                      "test_videodatainfo.json": msrvtt_info(*whole[4:])})
    convert("msrvtt", folder, videos(*(f"all/video{i}.mp4" for i in range(6))), out, "full")
    found = written(out)
    assert [len(found[f"{part}.jsonl"]) for part in PARTS] == [6, 2, 4]
    assert found["val.jsonl"] == captions(video3="a car 3") + captions(video3="a dog 3")


@pytest.mark.parametrize("split, listed, trained", [(None, "9k", "01234"), ("7k", "7k", "0123")])
def test_msrvtt_1k_has_one_caption_a_test_video(release, videos, out, split, listed, trained):
    train = table(["video_id"], *([f"video{i}"] for i in trained))
    folder = release({"MSRVTT_data.json": msrvtt_info(*enumerate(MSRVTT)),
                      "MSRVTT_JSFUSION_test.csv": JSFUSION, f"MSRVTT_train.{listed}.csv": train})
    convert("msrvtt", folder, videos(*(f"video{i}.mp4" for i in range(6))), out, split)
    found = written(out)
    assert found["test.jsonl"] == captions(video5="the dog of test")
    assert sorted({row["video"] for row in found["train.jsonl"]}) == [f"video{i}.mp4" for i in trained]
    assert len(found["train.jsonl"]) == 2 * len(trained)
    splits = open_splits(out)
    assert len(splits["test"]) == 1 and len(splits["val"]) == 4


def qa(*ids):
    return [{"answer": "couch", "category_id": 14, "id": n, "question": f"what is {i} on?", "video_id": i}
            for n, i in enumerate(ids)]


def test_msrvtt_qa_numbers_are_the_videos(release, videos, out):
    folder = release({"train_qa.json": qa(0, 0, 1), "val_qa.json": qa(2), "test_qa.json": qa(3, 4)})
    tally = convert("msrvtt-qa", folder, videos(*(f"video{i}.mp4" for i in range(4))), out)
    assert tally.rows == {"qa_train.jsonl": 3, "qa_val.jsonl": 1, "qa_test.jsonl": 1}
    assert missing(out) == ["video4"]
    row = {"video": "video3.mp4", "question": "what is 3 on?", "answer": "couch"}
    assert written(out)["qa_test.jsonl"] == [row]
    assert len(open_splits(out, "qa")["train"]) == 3


@pytest.mark.parametrize("name", ["-4wsuPCjDBc_5_15.avi", "vid1.avi"])
def test_msvd_clips_go_by_youtube_id_or_by_number(release, videos, out, name):
    mapping = "-4wsuPCjDBc_5_15 vid1\n-7KMZQEsJW4_205_208 vid2"
    folder = release({f"{part}_qa.json": qa(1, 2) for part in PARTS} | {"youtube_mapping.txt": mapping})
    convert("msvd-qa", folder, videos(name), out)
    assert {row["video"] for row in written(out)["qa_val.jsonl"]} == {name}
    assert missing(out) == ["-7KMZQEsJW4_205_208"]


CHOICES = ["a car", "a dog", "a man", "a tree", "a cat"]
CLIPBERT_MC = {"qid": 0, "clip_name": "video7010", "options": CHOICES, "answer": 3}


def jsfusion_mc(*rows):
    return table(["key", "vid_key", *COLUMNS, "answer"], *rows, delimiter="\t")


@pytest.mark.parametrize("name, content", [
    ("MSR_MC_test.csv", jsfusion_mc(["MC0", "msr7010", *CHOICES, 3])),
    ("msrvtt_retrieval_mc_test.jsonl", CLIPBERT_MC), ("msrvtt_mc_test.jsonl", CLIPBERT_MC | {"answer": "3"})])
def test_msrvtt_mc_is_a_test_set_of_five_captions(release, videos, out, name, content):
    folder = release({name: content})
    convert("msrvtt-mc", folder, videos("video7010.mp4"), out)
    row = {"video": "video7010.mp4", "question": "", "options": CHOICES, "answer": 3}
    assert written(out) == {"mc_caption_test.jsonl": [row]}
    assert len(open_split(out, "test", "mc_caption")) == 1


def test_tgif_gifs_are_split_by_url(release, videos, out):
    urls = [f"https://38.media.tumblr.com/9f6c{i}/tumblr_mev{i}o1_500.gif" for i in range(5)]
    texts = ["a man", 'a "man"', "a dog", '"hi" says a cat', '"hi says a man']  # quotes are text
    folder = release({"tgif-v1.0.tsv": "".join(f"{url}\t{text}\n" for url, text in zip(urls, texts)),
                      "splits/train.txt": f"{urls[0]}\n{urls[1]}\n", "splits/val.txt": f"{urls[2]}\n",
                      "splits/test.txt": f"{urls[3]}\n{urls[4]}\n"})
    convert("tgif", folder, videos(*(url.split("/")[-1] for url in urls)), out)
    found = written(out)
    assert [len(found[f"{part}.jsonl"]) for part in PARTS] == [2, 1, 2]
    assert [row["caption"] for row in found["test.jsonl"]] == texts[3:]
    assert found["test.jsonl"][1]["video"] == "tumblr_mev4o1_500.gif"


ACTIONS = ["hop", 'say "no"', "run", "nod", "sit"]


def test_tgif_qa_has_two_sets_of_choices_and_one_of_words(release, videos, out):
    """Tables with tabs, CRLF and quotes where a text holds some, as pandas writes them."""
    choices = ["gif_name", "question", *COLUMNS, "answer", "vid_id", "key"]
    words = ["gif_name", "question", "answer", "type", "vid_id", "key", "description"]
    files, layout = {}, {"delimiter": "\t", "end": "\r\n"}
    for part in ("Train", "Test"):
        row = [f"tumblr_{part}", "how many dogs ?", "two", 1, "FRAMEQA3", 25889, "two dogs ."]
        files[f"{part}_frameqa_question.csv"] = table(words, row, **layout)
        for kind in ("action", "transition"):
            row = [f"tumblr_{part}", f"What is the {kind} ?", *ACTIONS, 1, "ACTION1", 5]
            files[f"{part}_{kind}_question.csv"] = table(choices, row, **layout)
    convert("tgif-qa", release(files), videos("tumblr_Train.gif", "tumblr_Test.gif"), out)
    found = written(out)
    assert sorted(found) == sorted(f"{task}_{part}.jsonl" for task in ("mc_action", "mc_transition", "qa")
                                   for part in ("train", "test"))
    assert found["mc_action_test.jsonl"] == [{
        "video": "tumblr_Test.gif", "question": "What is the action ?", "options": ACTIONS, "answer": 1}]
    assert found["qa_train.jsonl"] == [
        {"video": "tumblr_Train.gif", "question": "how many dogs ?", "answer": "two"}]


def test_didemo_descriptions_make_a_paragraph_in_order_of_time(release, videos, out):
    moments = [("2@N04_1_a.m4v", "the end.", [[4, 5], [4, 4], [0, 0]]),
               ("3@N01_2_b.", "another", [[1, 1]]),
               ("2@N04_1_a.mov", "the start.", [[0, 0], [0, 1], [5, 5]]),      # a video with two endings
               ("2@N04_1_a.m4v", "still", [[0, 2]])]
    rows = [{"num_segments": 6, "description": text, "times": times, "video": video, "annotation_id": 1}
            for video, text, times in moments]
    folder = release({f"{part}_data.json": rows for part in PARTS})
    convert("didemo", folder, videos("2@N04_1_a.m4v", "3@N01_2_b.mp4"), out)
    assert written(out)["test.jsonl"] == [
        {"video": "2@N04_1_a.m4v", "caption": "the start. still the end."},
        {"video": "3@N01_2_b.mp4", "caption": "another"}]


@pytest.mark.parametrize("split", [None, "2", "3"])
def test_hmdb51_clips_of_a_split_are_train_test_or_unused(release, videos, out, split):
    used = int(split or 1)
    labels = ("brush_hair", "ride_bike")
    files = {f"{label}_test_split{n}.txt": [(f"{n}_{label}_{part}.avi", part) for part in (1, 2, 0)]
             for label in labels for n in (1, 2, 3)}
    folder = release({file: "".join(f"{clip} {n} \n" for clip, n in rows) for file, rows in files.items()})
    names = [f"{file.split('_test')[0]}/{clip}" for file, rows in files.items() for clip, _ in rows]
    convert("hmdb51", folder, videos(*names), out, split)
    assert written(out) == {
        f"action_{part}.jsonl": [{"video": f"{used}_{label}_{n}.avi", "label": label} for label in labels]
        for part, n in (("train", 1), ("test", 2))}


@pytest.mark.parametrize("val", ["val.csv", "validate.csv"])
def test_kinetics_clips_go_by_id_and_times(release, videos, out, val):
    head = ["label", "youtube_id", "time_start", "time_end", "split", "is_cc"][: 6 if val == "val.csv" else 5]
    rows = [["air drumming", "--nQbRBEz2s", 104, 114, "val", 0],
            ["petting animal (not cat)", "-Aw1GOyNtlI", 13, 23, "val", 0]]
    clips = table(head, *(row[: len(head)] for row in rows))
    folder = release({"train.csv": clips, val: clips, "test.csv": "youtube_id,time_start\nx,1\n"})
    names = ["val/air drumming/--nQbRBEz2s_000104_000114.mp4", "-Aw1GOyNtlI.mkv"]
    convert("kinetics400", folder, videos(*names), out)
    assert written(out)["action_val.jsonl"] == [
        {"video": "--nQbRBEz2s_000104_000114.mp4", "label": "air drumming"},
        {"video": "-Aw1GOyNtlI.mkv", "label": "petting animal (not cat)"}]
    assert sorted(written(out)) == ["action_train.jsonl", "action_val.jsonl"]


def test_coco_captions_are_lines_that_cut_a_vocabulary(release, command, out):
    entries = [{"image_id": 1, "id": 1, "caption": text} for text in ("A man\nrides. ", "Two men")]
    content = {"info": {}, "annotations": entries}
    folder = release({f"captions_{part}2017.json": content for part in ("train", "val")})
    code, said, _ = command("coco-captions", "--annotations", folder, "--out", out)
    assert code == 0 and (out / "captions.txt").read_text() == "A man rides.\nTwo men\n" * 2
    assert os.listdir(out) == ["captions.txt"] and f"--vocab-captions {out}/captions.txt" in said


# ---- videos ------------------------------------------------------------------------------------------------

@pytest.fixture
def two(release):
    """A set of two questions, on video0 and video1."""
    return release({f"{part}_qa.json": qa(0, 1) for part in PARTS})


def test_paths_are_relative_where_the_videos_lie_inside(two, videos, tmp_path, monkeypatch, out):
    for name in ("out/video0.mp4", "out/all/video1.webm"):
        videos(f"../{name}")
    videos("video0.mp4", "video1.mp4")
    monkeypatch.chdir(tmp_path)
    for folder in (Path("out"), out):
        convert("msrvtt-qa", two, folder, Path("out"))
        assert [row["video"] for row in rows_of(out / "qa_val.jsonl")] == ["video0.mp4", "all/video1.webm"]
    convert("msrvtt-qa", two, Path("videos"), Path("out"))
    manifest = open_split(out, "test", "qa")
    assert manifest[0]["video"] == str(tmp_path / "videos/video0.mp4")
    assert manifest.video_path(manifest[1]) == tmp_path / "videos/video1.mp4"


def test_a_folder_of_frames_is_a_video(two, tmp_path, out):
    frames = tmp_path / "frames/video0"
    frames.mkdir(parents=True)
    for number in range(3):
        Image.new("RGB", (8, 6), (0, 0, 50 * number)).save(frames / f"{number:02}.jpg")
    Image.new("RGB", (8, 6)).save(tmp_path / "frames/video1.gif")
    convert("msrvtt-qa", two, tmp_path / "frames", out)
    manifest = open_split(out, "test", "qa")
    assert [row["video"] for row in manifest] == [str(frames), f"{frames.parent}/video1.gif"]
    assert [len(read_clip(manifest.video_path(row))[0]) for row in manifest] == [3, 1]


# ---- errors: one line, status 2, nothing left --------------------------------------------------------------

@pytest.fixture
def command(monkeypatch, capsys):
    """command(*arguments) runs the command -> (exit status, what it said, its complaint)."""
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["public", *map(str, arguments)])
        try:
            public.main()
            code = 0
        except SystemExit as end:
            code = end.code
        said = capsys.readouterr()
        return code, said.out, said.err
    return run


FILES_NEEDED = {
    "webvid": "results_2M_train.csv", "msrvtt": "MSRVTT_data.json or train_val_videodatainfo.json",
    "msrvtt-qa": "train_qa.json", "msrvtt-mc": "MSR_MC_test.csv or msrvtt_retrieval_mc_test.jsonl",
    "msvd-qa": "youtube_mapping.txt", "tgif": "splits/train.txt", "tgif-qa": "Train_action_question.csv",
    "didemo": "train_data.json", "hmdb51": "brush_hair_test_split1.txt", "kinetics400": "train.csv",
    "coco-captions": "captions_train2017.json"}


@pytest.mark.parametrize("name", public.CONVERTERS)
def test_a_file_that_a_set_needs_is_named(release, videos, tmp_path, command, name, out):
    folder = release({"readme.txt": "nothing"})
    clips, out = videos("a.mp4"), tmp_path / "x/out"
    code, _, complaint = command(name, "--annotations", folder, "--videos", clips, "--out", out)
    assert code == 2 and complaint.startswith(f"error: {folder}: has no {FILES_NEEDED[name]}")
    assert complaint.count("\n") == 1 and not (tmp_path / "x").exists()


@pytest.mark.parametrize("name, file, content, wrong", [
    ("webvid", "results_2M_train.csv", table(WEBVID[:4], [1, 2, 3, 4]), ':2: has no "name"'),
    ("webvid", "results_2M_train.csv", table(WEBVID, *webvid_rows(1), [2, "cut"]), ':3: has no "name"'),
    ("webvid", "results_2M_train.csv", "", ": has no rows"),
    ("webvid", "results_2M_train.csv", table(WEBVID, ["1" * 200_000]), ":2: is not a table"),
    ("msrvtt-qa", "val_qa.json", qa(0)[0:1] + [{"question": "what?"}], ': entry 2: has no "answer"'),
    ("msrvtt-qa", "val_qa.json", "[{", ": is not JSON"),
    ("msrvtt-qa", "val_qa.json", {"a": 1}, ": is no list"),
    ("msrvtt-qa", "val_qa.json", [qa(0)[0] | {"answer": ["couch"]}], ': entry 1: "answer" is not a text'),
    ("coco-captions", "captions_val2017.json", {"images": []}, ": is no list of annotations"),
    ("msrvtt-mc", "MSR_MC_test.csv", jsfusion_mc(["MC0", "msr0", *CHOICES, 5]), ':2: "answer" is not'),
    ("msrvtt-mc", "MSR_MC_test.csv", jsfusion_mc(["MC0", "msr0", *CHOICES]), ':2: has no "answer"'),
    ("msrvtt-mc", "msrvtt_mc_test.jsonl", CLIPBERT_MC | {"options": CHOICES[1:]}, ":1: has 4 options"),
    ("msrvtt-mc", "msrvtt_mc_test.jsonl", '\n{"clip_name":', ":1: is not JSON"),
    ("hmdb51", "brush_hair_test_split1.txt", "0.avi 1\n1.avi 7\n", ":2: is in none of train, val and")])
def test_a_bad_row_is_named_with_its_place(release, videos, out, command, name, file, content, wrong):
    folder = release({file: content})
    clips = videos("video0.mp4", "0.avi", "1.mp4")
    code, _, complaint = command(name, "--annotations", folder / file, "--videos", clips, "--out", out)
    assert code == 2 and complaint.startswith(f"error: {folder / file}{wrong}") and complaint.count("\n") == 1
    assert not (out).exists()


def test_a_split_without_any_of_its_videos_is_an_error(release, videos, out):
    """It would be left out, and another split would pass for it."""
    folder = release({"train_qa.json": qa(0), "val_qa.json": qa(0), "test_qa.json": qa(1)})
    with pytest.raises(DataError, match="has no video of qa_test.jsonl; 1 are missing, video1"):
        convert("msrvtt-qa", folder, videos("video0.mp4"), out)


@pytest.mark.parametrize("change, wrong", [
    ({"--annotations": "gone"}, "--annotations gone: is not there"),
    ({"--videos": "gone"}, "--videos gone: is not a folder"), ({"--videos": None}, "--videos is missing"),
    ({"--split": "1"}, "--split 1: msrvtt-qa has one split: leave the flag out"),
    ({"name": "msrvtt", "--split": "1k"}, "--split 1k: msrvtt has 1k-A, 7k, full")])
def test_a_bad_flag_is_named(two, videos, out, command, change, wrong):
    flags = {"--annotations": two, "--videos": videos("video0.mp4"), "--out": out} | change
    name = flags.pop("name", "msrvtt-qa")
    code, _, complaint = command(name, *itertools.chain(*(pair for pair in flags.items() if pair[1])))
    assert code == 2 and complaint.startswith(f"error: {wrong}") and not (out).exists()


def test_an_error_leaves_an_earlier_conversion_as_it_was(two, videos, out, release):
    folder = videos("video0.mp4", "video1.mp4")
    convert("msrvtt-qa", two, folder, out)
    before = {path.name: path.read_bytes() for path in (out).iterdir()}
    release({"test_qa.json": "[{}]"})
    with pytest.raises(DataError, match="test_qa.json: entry 1"):
        convert("msrvtt-qa", two, folder, out)
    assert {path.name: path.read_bytes() for path in (out).iterdir()} == before
