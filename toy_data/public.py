"""Public sets, as their authors publish them, into the one format. Nothing is downloaded.

    python -m toy_data.public msvd-qa --annotations MSVD-QA --videos YouTubeClips --out data/msvd-qa

A set's converter yields (file, place, names, row): the file to write; where the row was read, for messages;
the names that its video may have, with any extension; the row without "video". If a set has no val or no
test, none is written, and open_splits cuts it from train.
"""

import argparse
import contextlib
import csv
import json
import os
import re
import statistics
import tempfile
from collections import Counter, defaultdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from tqdm import tqdm

from toy_data.clips import (FIELDS, VIDEO_SUFFIXES, DataError, Manifest, errors_in_one_line, find_fault,
                            is_image, open_splits)

ENDINGS = VIDEO_SUFFIXES | {"."}  # some names of DiDeMo end in a dot
FILE = re.compile(r"(?:(qa|action|mc_[a-z]+)_)?(?:train|val|test)\.jsonl|captions\.txt")
PARTS = ("train", "val", "test")
OPTIONS = ("a1", "a2", "a3", "a4", "a5")
MEND = "give the file as the authors of the set publish it"


# ---- the sets ----------------------------------------------------------------------------------------------
def webvid(annotations):
    """WebVid-2.5M (Bain et al. 2021; github.com/m-bain/webvid, where it has had to be withdrawn).

    results_2M_train.csv and results_2M_val.csv have videoid and name, the caption, among their columns; the
    videos are PAGE_DIR/VIDEOID.mp4.
    """
    files = {"results_2M_train.csv": "train.jsonl", "results_2M_val.csv": "val.jsonl"}
    for path, file in files_of(annotations, files):
        for place, row in read(path, "videoid", "name"):
            yield file, place, [row["videoid"]], {"caption": row["name"]}


def msrvtt(annotations, split):
    """MSR-VTT (Xu et al. 2016): 10,000 videos, videoN.mp4, of 20 captions each.

    train_val_videodatainfo.json and test_videodatainfo.json, or both in one MSRVTT_data.json, hold "videos"
    and "sentences". `full` is their own split, 6,513/497/2,990. `1k-A` is JSFusion's (Yu et al. 2018):
    MSRVTT_JSFUSION_test.csv has 1,000 videos with one caption each, MSRVTT_train.9k.csv the other 9,000; `7k`
    trains on MSRVTT_train.7k.csv, train and validate (github.com/ArrowLuo/CLIP4Clip has all of them).
    """
    infos = [one_of(annotations, "MSRVTT_data.json|train_val_videodatainfo.json")]
    if infos[0].name != "MSRVTT_data.json":
        infos.append(one_of(annotations, "test_videodatainfo.json"))
    if split == "full":
        videos = [row for info in infos for _, row in read(info, "video_id", "split", key="videos")]
        part_of = {row["video_id"]: {"validate": "val"}.get(row["split"], row["split"]) for row in videos}
    else:
        train = one_of(annotations, f"MSRVTT_train.{'9k' if split == '1k-A' else '7k'}.csv")
        part_of = {row["video_id"]: "train" for _, row in read(train, "video_id")}
        for place, row in read(one_of(annotations, "MSRVTT_JSFUSION_test.csv"), "video_id", "sentence"):
            yield "test.jsonl", place, [row["video_id"]], {"caption": row["sentence"]}
    for info in infos:
        for place, row in read(info, "video_id", "caption", key="sentences"):
            if row["video_id"] in part_of:
                file = f"{part_of[row['video_id']]}.jsonl"
                yield file, place, [row["video_id"]], {"caption": row["caption"]}


def msrvtt_qa(annotations):
    """MSRVTT-QA (Xu et al. 2017; github.com/xudejing/video-question-answering) on MSR-VTT's videoN.mp4."""
    return open_questions(annotations, lambda number: [f"video{number}"])


def msvd_qa(annotations):
    """MSVD-QA, of the same release, on MSVD (Chen and Dolan 2011): 1,970 clips, YOUTUBEID_START_END.avi.

    youtube_mapping.txt has a clip and its number a line, `-4wsuPCjDBc_5_15 vid1`; some have it as vid1.avi.
    """
    path = one_of(annotations, "youtube_mapping.txt")
    clips = {row["vid"]: row["clip"] for _, row in read(path, "clip", "vid", header=False, delimiter=" ")}
    return open_questions(annotations, lambda n: [clips.get(f"vid{n}", f"vid{n}"), f"vid{n}"])


def open_questions(annotations, names_of):
    """{train,val,test}_qa.json: a list of {answer, category_id, id, question, video_id}, a number."""
    for path, file in files_of(annotations, {f"{part}_qa.json": f"qa_{part}.jsonl" for part in PARTS}):
        for place, row in read(path, "question", "answer", "video_id"):
            answer = {"question": row["question"], "answer": row["answer"]}
            yield file, place, names_of(row["video_id"]), answer


def msrvtt_mc(annotations):
    """MSRVTT-MC (Yu et al. 2018): for 2,990 videos the right one of five captions. It is only a test set.

    JSFusion's MSR_MC_test.csv (github.com/yj-yu/lsmdc) is tab-separated; its msr7010 is video7010.
    ClipBERT's msrvtt_retrieval_mc_test.jsonl, all-in-one's msrvtt_mc_test.jsonl, has the same rows.
    """
    names = "MSR_MC_test.csv|msrvtt_retrieval_mc_test.jsonl|msrvtt_mc_test.jsonl"
    [(path, file)] = files_of(annotations, {names: "mc_caption_test.jsonl"})
    if path.suffix == ".csv":
        for place, row in read(path, "vid_key", *OPTIONS, "answer", delimiter="\t"):
            options = [row[option] for option in OPTIONS]
            yield file, place, [row["vid_key"].replace("msr", "video")], choice("", options, row["answer"])
    else:
        for place, row in read(path, "clip_name", "options", "answer"):
            yield file, place, [row["clip_name"]], choice("", row["options"], row["answer"])


def tgif(annotations):
    """TGIF (Li et al. 2016; github.com/raingo/TGIF-Release, folder data): 102,068 GIFs.

    tgif-v1.0.tsv has a GIF's URL and a caption per line, without header or quoting; splits/train.txt,
    val.txt and test.txt have a URL per line. A GIF's name is the last part of its URL.
    """
    part_of = {}
    for part in PARTS:
        for _, row in read(one_of(annotations, f"splits/{part}.txt"), "url", header=False):
            part_of[row["url"]] = part
    path, layout = one_of(annotations, "tgif-v1.0.tsv"), {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
    for place, row in read(path, "url", "caption", header=False, **layout):
        if row["url"] in part_of:
            file = f"{part_of[row['url']]}.jsonl"
            yield file, place, [row["url"].rpartition("/")[2]], {"caption": row["caption"]}


def tgif_qa(annotations):
    """TGIF-QA (Jang et al. 2017; github.com/YunseokJANG/tgif-qa, folder dataset) on TGIF's GIFs.

    {Train,Test}_{action,transition,frameqa}_question.csv are tab-separated: gif_name, question, a1 to
    a5 (not frameqa), answer (from 0; frameqa's is a word), vid_id, key. The paper leaves counting out.
    """
    kinds = {"action": "mc_action", "transition": "mc_transition", "frameqa": "qa"}
    files = {f"{part.title()}_{kind}_question.csv": f"{task}_{part}.jsonl"
             for kind, task in kinds.items() for part in ("train", "test")}
    for path, file in files_of(annotations, files):
        options = () if file.startswith("qa") else OPTIONS
        for place, row in read(path, "gif_name", "question", *options, "answer", delimiter="\t"):
            answer = {"question": row["question"], "answer": row["answer"]}
            if options:
                answer = choice(row["question"], [row[option] for option in options], row["answer"])
            yield file, place, [row["gif_name"]], answer


def didemo(annotations):
    """DiDeMo (Hendricks et al. 2017; github.com/LisaAnne/LocalizingMoments, folder data), as paragraphs.

    {train,val,test}_data.json: a list of {video, description, times, ...}; `times` are the [first, last] five
    seconds that each annotator marked. A video's descriptions make one caption, in the order of the moments
    by the annotators' median. The rows of X.mov and X.mp4 are of one video, which may be X.mov.mp4 on disk.
    """
    for path, file in files_of(annotations, {f"{part}_data.json": f"{part}.jsonl" for part in PARTS}):
        moments = defaultdict(list)
        for place, row in read(path, "video", "description", "times"):
            when = [statistics.median(ends) for ends in zip(*row["times"])]  # [first, last]
            moments[os.path.splitext(row["video"])[0]].append((when, place, row))
        for described in moments.values():
            described.sort(key=lambda moment: moment[0])
            names, texts = zip(*((row["video"], row["description"]) for _, _, row in described))
            yield file, described[0][1], names, {"caption": " ".join(texts)}


def hmdb51(annotations, split):
    """HMDB51 (Kuehne et al. 2011; serre-lab.clps.brown.edu): three splits of 70 and 30 clips a class.

    Folder testTrainMulti_7030_splits: CLASS_test_splitN.txt has `NAME.avi 1` a line; 1 is train, 2 is test,
    0 is neither.
    """
    ending = f"_test_split{split}.txt"
    for path in sorted(one_of(annotations, f"brush_hair{ending}").parent.glob(f"*{ending}")):
        for place, row in read(path, "clip", "part", header=False, delimiter=" "):
            if row["part"] != "0":
                part = {"1": "train", "2": "test"}.get(row["part"])
                yield f"action_{part}.jsonl", place, [row["clip"]], {"label": path.name.removesuffix(ending)}


def kinetics400(annotations):
    """Kinetics-400 (Kay et al. 2017; github.com/cvdfoundation/kinetics-dataset).

    The clips of train.csv and val.csv (once validate.csv) are YOUTUBEID_000001_000011.mp4; some tools leave
    the times out. For years test.csv had no labels, so everybody reports val, which open_splits makes test.
    """
    files = {"train.csv": "action_train.jsonl", "val.csv|validate.csv": "action_val.jsonl"}
    for path, file in files_of(annotations, files):
        for place, row in read(path, "label", "youtube_id", "time_start", "time_end"):
            clip = f"{row['youtube_id']}_{row['time_start'].zfill(6)}_{row['time_end'].zfill(6)}"
            yield file, place, [clip, row["youtube_id"]], {"label": row["label"]}


def coco_captions(annotations):
    """COCO's captions (Chen et al. 2015; cocodataset.org), by which the paper cuts BERT's vocabulary (4.1).

    captions_train2017.json and captions_val2017.json: "annotations" is a list of {image_id, id, caption}.
    captions.txt gets a caption a line; there are no videos.
    """
    files = {f"captions_{part}2017.json": "captions.txt" for part in ("train", "val")}
    for path, file in files_of(annotations, files):
        for place, row in read(path, "caption", key="annotations"):
            yield file, place, None, " ".join(str(row["caption"]).split())


def choice(question, options, answer):
    """`answer` may be a string of digits; anything else is kept, for find_fault to report."""
    answer = int(answer) if str(answer).isdecimal() else answer
    return {"question": question, "options": options, "answer": answer}


SETS = (webvid, msrvtt, msrvtt_qa, msrvtt_mc, msvd_qa, tgif, tgif_qa, didemo, hmdb51, kinetics400,
        coco_captions)
CONVERTERS = {converter.__name__.replace("_", "-"): converter for converter in SETS}
SPLITS = {"msrvtt": ("1k-A", "7k", "full"), "hmdb51": ("1", "2", "3")}  # the first is the default


# ---- reading a release -------------------------------------------------------------------------------------
def one_of(annotations, names):
    """The path of a file of the release; `a|b` is a, or else b."""
    folder = annotations if annotations.is_dir() else annotations.parent
    for name in names.split("|"):
        if (folder / name).is_file():
            return folder / name
    raise DataError(f"{folder}: has no {names.replace('|', ' or ')}; give --annotations the folder with it")


def files_of(annotations, files):
    """(path, file to write) for each file of the release, or for the one that --annotations names."""
    for names, file in files.items():
        if annotations.is_file() and annotations.name in names.split("|"):
            return [(annotations, file)]
    return [(one_of(annotations, names), file) for names, file in files.items()]


def read(path, *fields, key=None, header=True, **dialect):
    """(place, row) for each row of a table, of JSONL, or of the list that JSON is or holds under `key`. Every
    row must have the `fields`; a table without a header has these columns."""
    columns = None if header else fields
    rows = read_json(path, key) if "json" in path.suffix else read_table(path, columns, dialect)
    for place, row in rows:
        for field in fields:
            if type(row) is not dict or row.get(field) is None:
                raise DataError(f'{place}: has no "{field}"; {MEND}')
        yield place, row


def read_table(path, columns, dialect):
    with open(path, encoding="utf-8-sig", errors="replace", newline="") as file:
        rows = csv.DictReader(file, columns, **dialect)
        try:
            for row in rows:
                yield f"{path}:{rows.line_num}", row
        except csv.Error as error:
            raise DataError(f"{path}:{rows.reader.line_num}: is not a table ({error}); {MEND}") from error


def read_json(path, key):
    lines, place = path.suffix == ".jsonl", path
    with open(path, "rb") as file:
        try:
            for number, text in enumerate(file if lines else [file.read()], 1):
                place = f"{path}:{number}" if lines else path
                value = json.loads(text)
                if lines:
                    yield place, value
        except (ValueError, RecursionError) as error:
            raise DataError(f"{place}: is not JSON ({error}); {MEND}") from error
    if not lines:
        entries = value.get(key) if key and type(value) is dict else value
        if type(entries) is not list:
            raise DataError(f"{path}: is no list{key and f' of {key}' or ''}; {MEND}")
        yield from ((f"{path}: entry {number}", entry) for number, entry in enumerate(entries, 1))


# ---- finding the videos ------------------------------------------------------------------------------------
def list_videos(videos, out):
    """{a video's name without its ending: its path as rows name it}, from one walk over the disk.

    A folder of images is a video. Paths are relative to `out` where the videos lie inside, else from the
    root. Of two videos with one name the first in path order counts.
    """
    videos, out = os.path.abspath(videos), os.path.abspath(out)
    inside, prefix, listed = os.path.commonpath([videos, out]) == out, os.path.join(out, ""), {}
    for folder, folders, files in os.walk(videos, followlinks=True):
        folders.sort()
        found = [os.path.splitext(file) for file in sorted(files)]
        found = [(name, f"{folder}/{name}{ending}") for name, ending in found if ending.lower() in ENDINGS]
        if not found and folder != videos and any(map(is_image, files)):
            found = [(os.path.basename(folder), folder)]
        for name, path in found:
            listed.setdefault(name, path.removeprefix(prefix) if inside else path)
    return listed


def find(listed, names):
    """The path of the first of `names` that is there, or None. A name may have its ending or not."""
    keys = [key for name in names for key in (name, os.path.splitext(name)[0])]
    return next((listed[key] for key in keys if key in listed), None)


# ---- writing -----------------------------------------------------------------------------------------------
def convert(name, annotations, videos, out, split=None):
    """Writes a set into the folder `out`, all its files or none -> the tally.

    The tally has the rows by file and what was left out: the names of missing videos, rows without text.
    """
    splits, has_videos = SPLITS.get(name, ()), name != "coco-captions"
    if split and split not in splits:
        raise DataError(f"--split {split}: {name} has {', '.join(splits) or 'one split: leave the flag out'}")
    if not annotations.exists():
        raise DataError(f"--annotations {annotations}: is not there; give the folder of the set's release")
    if has_videos and not (videos and videos.is_dir()):
        raise DataError((f"--videos {videos}: is not a folder" if videos else "--videos is missing")
                        + "; give the folder that holds the set's videos")
    rows = CONVERTERS[name](annotations, *([split or splits[0]] if splits else []))
    rows = tqdm(rows, name, unit="row", leave=False, disable=None)
    listed = list_videos(videos, out) if has_videos else {}
    tally = SimpleNamespace(rows=Counter(), missing={}, empty=0)
    there = next(folder for folder in (out, *out.absolute().parents) if folder.is_dir())
    with tempfile.TemporaryDirectory(prefix=".", dir=there) as part:
        with contextlib.ExitStack() as stack:
            files = {}
            for file, line in lines_of(rows, listed, tally):
                if file not in files:
                    opened = open(Path(part, file), "w", encoding="utf-8", errors="replace")
                    files[file] = stack.enter_context(opened)
                files[file].write(f"{line}\n")
        refuse(annotations, videos, out, tally)
        if has_videos:
            names = "".join(f"{video}\n" for video in tally.missing)
            Path(part, "missing.txt").write_text(names, encoding="utf-8", errors="replace")
        out.mkdir(parents=True, exist_ok=True)
        for path in Path(part).iterdir():
            os.replace(path, out / path.name)
    return tally


def lines_of(rows, listed, tally):
    """(file, line) for each row that is kept. A caption without a video is its own line."""
    for file, place, names, row in rows:
        if names:
            if is_empty(file, place, {"video": names[0]} | row):
                tally.empty += 1
                continue
            path = find(listed, names)
            if path is None:
                tally.missing[names[0]] = True
                tally.rows[file] += 0  # an entry, for `refuse` to find
                continue
            row = json.dumps({"video": path} | row)
        tally.rows[file] += 1
        yield file, row


def is_empty(file, place, row):
    """Whether a row lacks its text, as some do in the releases. A DataError if anything else is wrong."""
    if not FILE.fullmatch(file):
        raise DataError(f"{place}: is in none of train, val and test; {MEND}")
    fault = find_fault(row, fields_of(file))
    if not fault and len(row.get("options", OPTIONS)) != 5:
        fault = f"has {len(row['options'])} options, not five"
    if fault and not fault.endswith("is empty"):
        raise DataError(f"{place}: {fault}; {MEND}")
    return bool(fault)


def task_of(file):
    return FILE.fullmatch(file)[1] or ""


def fields_of(file):
    return FIELDS[task_of(file).split("_")[0]]


def refuse(annotations, videos, out, tally):
    """Raises DataError for a file without rows, and for older files that would pass for this conversion's."""
    if not tally.rows:
        raise DataError(f"{annotations}: has no rows; {MEND}")
    for file, count in tally.rows.items():
        if not count:
            raise DataError(f"--videos {videos}: has no video of {file}; {len(tally.missing):,} are missing, "
                            f"{next(iter(tally.missing))} for one; give the folder that holds them")
        for other in {file.replace(part, other) for part in PARTS for other in PARTS} - set(tally.rows):
            if (out / other).exists():
                raise DataError(f"{out / other}: is of another conversion; remove it, or give another --out")


# ---- the command -------------------------------------------------------------------------------------------
def describe(out, tally):
    """Opens what was written, as training would, and says what it holds."""
    videos = np.concatenate([Manifest(out / file, fields_of(file)).videos for file in tally.rows])
    rows = ", ".join(f"{file} {count:,}" for file, count in tally.rows.items())
    print(f"{out}: rows: {rows}; videos: {len(np.unique(videos)):,} found, {len(tally.missing):,} missing")
    if tally.missing or tally.empty:
        print(f"   left out: rows of the missing videos, listed in {out / 'missing.txt'}, and "
              f"{tally.empty:,} rows without text")
    for file in tally.rows:
        if "train" in file:
            open_splits(out, task_of(file), lambda note: print(f"   {note}"))


def main():
    parser = argparse.ArgumentParser(prog="python -m toy_data.public", allow_abbrev=False,
                                     description="Turn a public set into this project's format.")
    parser.add_argument("name", choices=CONVERTERS, help="the set")
    parser.add_argument("--annotations", type=Path, required=True, help="its release: a folder, or a file")
    parser.add_argument("--videos", type=Path, help="the folder that holds its videos, at any depth")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write into")
    parser.add_argument("--split", help="msrvtt: 1k-A (default), 7k, full; hmdb51: 1 (default), 2, 3")
    parser.error = lambda message: parser.exit(2, f"error: {message} (--help lists the flags)\n")
    args = parser.parse_args()
    with errors_in_one_line():
        tally = convert(args.name, args.annotations, args.videos, args.out, args.split)
        if args.name != "coco-captions":
            return describe(args.out, tally)
        file = args.out / "captions.txt"
        print(f"{file}: {tally.rows[file.name]:,} captions. With BERT's vocab.txt: python pretrain.py "
              f"--preset paper --vocab vocab.txt --vocab-captions {file} --data DIR")


if __name__ == "__main__":
    main()
