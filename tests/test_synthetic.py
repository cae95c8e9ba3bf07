"""The synthetic set says what it shows: every claim of toy_data/synthetic.py, on a set rendered once."""
import hashlib
import json
import sys
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest

from toy_data import synthetic
from toy_data.__main__ import main
from toy_data.clips import DataError, is_true, read_clip
from toy_data.synthetic import COLOURS, FORMS, HELD_OUT, SHAPES, render, render_if_missing

SPLITS = ("train", "val", "test")
CHOICES = ("mc_caption", "mc_action", "mc_transition")
CLIPS = 500


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("synthetic") / "toy"
    render(out, clips=CLIPS, seed=1)
    return out


@pytest.fixture(scope="session")
def read(folder):
    return lambda name: [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


@pytest.fixture(scope="session")
def shown():
    """What every clip shows, by its name; test.jsonl holds but some of them."""
    scenes, _ = synthetic.plan(CLIPS, 1)
    return {synthetic.video_name(number): scene.shows() for number, scene in enumerate(scenes)}


def frames_of(path):
    return read_clip(path)[0].astype(int)


def clips_of(shown, motion):
    """[(name, what it shows)] of the clips of one thing that moves so."""
    return [(name, shows) for name, shows in shown.items() if len(shows) == 2 and shows[0][3] == motion]


def groups_of(rows):
    groups = defaultdict(list)
    for row in rows:
        groups[row["question"], tuple(row["options"])].append(row)
    return groups.values()


# ---- what is on disk ---------------------------------------------------------------------------------------

def test_all_files_and_clips_are_there(folder, read, shown):
    names = ("", "mc_caption_", "mc_action_", "mc_transition_", "qa_", "action_")
    wanted = {f"{name}{split}.jsonl" for name in names for split in SPLITS} | {"clips", "set.json"}
    assert {path.name for path in folder.iterdir()} == wanted
    assert {f"clips/{path.name}" for path in (folder / "clips").iterdir()} == set(shown)
    assert len(shown) == CLIPS
    assert {frames_of(folder / name).shape for name in list(shown)[::7]} == {(12, 64, 64, 3)}
    card = json.loads((folder / "set.json").read_text())
    assert card == {"name": "synthetic", "clips": CLIPS, "seed": 1, "version": 3}
    assert (len(read("train")), len(read("val"))) == (CLIPS * 8 // 10, CLIPS // 25)


@pytest.mark.parametrize("background", synthetic.BACKGROUNDS)
def test_a_thing_stands_out_on_every_background(folder, shown, background):
    """Some frame has a good patch of each colour that is shown, and no frame has one of another."""
    palette = np.array(list(COLOURS.values()))
    here = [(name, shows) for name, shows in shown.items() if shows[-1][1] == background]
    assert len(here) > 30
    for name, shows in here[::5]:
        near = abs(frames_of(folder / name)[:, :, :, None] - palette).max(-1) <= 8
        patches = dict(zip(COLOURS, near.sum((1, 2)).max(0)))
        seen = {colour for colour in COLOURS if patches[colour] > 60}
        assert seen == {thing[0] for thing in shows[:-1]}, name


def centre(frames, colour):
    """(T, 2): the middle (x, y) of the pixels of a colour in each frame."""
    near = abs(frames - np.array(COLOURS[colour])).max(-1) <= 8
    return np.array([[axis.mean() for axis in np.nonzero(frame)[::-1]] for frame in near])


@pytest.mark.parametrize("motion, way", [
    ("left", (-1, 0)), ("right", (1, 0)), ("up", (0, -1)), ("down", (0, 1)), ("still", (0, 0))])
def test_a_plain_motion_goes_its_way(folder, shown, motion, way):
    for name, shows in clips_of(shown, motion)[:5]:
        moved = np.diff(centre(frames_of(folder / name), shows[0][0])[[0, -1]], axis=0)[0]
        assert (np.sign(np.round(moved / 20)) == way).all(), (name, shows, moved)


@pytest.mark.parametrize("action", synthetic.ACTIONS)
@pytest.mark.parametrize("count, times", [("twice", 2), ("thrice", 3)])
def test_an_action_is_seen_as_often_as_it_is_said(folder, shown, action, count, times):
    name, _ = clips_of(shown, f"{action}-{count}")[0]
    frames = frames_of(folder / name)[:, 1:, 1:]
    differs = (abs(frames - frames[0]).max(-1) > 8).sum((1, 2)) > 40
    assert np.sum(differs[1:] & ~differs[:-1]) == times and not differs[-1] and 4 <= differs.sum() <= 8


# ---- splits ------------------------------------------------------------------------------------------------

def test_no_scene_and_no_clip_is_in_two_splits(read, shown):
    """By the multiple-choice files, which name every clip of every split."""
    seen = [{row["video"] for kind in CHOICES for row in read(f"{kind}_{split}")} for split in SPLITS]
    assert sum(map(len, seen)) == CLIPS == len(set.union(*seen))
    scenes = [{json.dumps(shown[name]) for name in names} for names in seen]
    assert not scenes[0] & scenes[1] and not scenes[0] & scenes[2] and not scenes[1] & scenes[2]
    for split, names in zip(SPLITS, seen):
        for file in (split, f"qa_{split}", f"action_{split}"):
            assert {row["video"] for row in read(file)} <= names


def held_out(things):
    return any(tuple(thing[:2]) in HELD_OUT for thing in things)


def test_held_out_pairs_are_in_test_alone(read, shown):
    for split in ("train", "val"):
        assert not any(held_out(row["shows"]) or held_out(row["says"]) for row in read(split))
        options = [claim for kind in CHOICES for row in read(f"{kind}_{split}") for claim in row["says"]]
        assert options and not any(map(held_out, options))
    rows = [row for kind in CHOICES for row in read(f"{kind}_test")]
    assert 0.08 < np.mean([row["unseen"] for row in rows]) < 0.35
    for row in rows + read("qa_test") + read("action_test") + read("test"):
        assert row["unseen"] == held_out(shown[row["video"]])


def test_the_full_set_has_its_questions_of_each_kind_and_its_share_of_held_out_pairs():
    _, full = synthetic.plan(10000, 0)
    counts = {"train": 8000, "val": 400, "test": 200, "mc_caption_val": 240, "mc_caption_test": 1000,
              "mc_action_test": 300, "mc_transition_test": 300}
    assert {name: len(full[name]) for name in counts} == counts
    assert [row["changed"] for row in full["mc_caption_test"]].count(("motion",)) == 200
    assert max(row["video"] for row in full["test"]) < synthetic.video_name(8800), "of test's first 400 clips"
    rows = [row for kind in CHOICES for row in full[f"{kind}_test"]]
    assert 0.14 <= np.mean([row["unseen"] for row in rows]) <= 0.2
    # As distractors they occur too, and the words of each pair are in train, apart.
    assert any(held_out(claim) for row in rows if not row["unseen"] for claim in row["says"])
    words = {word for row in full["train"] for thing in row["says"] for word in thing}
    assert all({colour, shape} <= words for colour, shape in HELD_OUT)


def test_what_an_answer_by_colours_alone_is_worth_as_readme_and_results_say():
    """Whoever sees which colours are there, and guesses among the options that name just these."""
    scores = defaultdict(list)
    for row in synthetic.plan(10000, 0)[1]["mc_caption_test"]:
        named = [Counter(word for thing in claim for word in thing if word in COLOURS)
                 for claim in row["says"]]
        scores["+".join(row["changed"])].append(1 / named.count(named[row["answer"]]))
    percent = {changed: round(100 * np.mean(parts)) for changed, parts in scores.items()}
    assert percent == {"colour": 100, "shape": 20, "colour+shape": 58, "binding": 60, "background": 20,
                       "motion": 20, "size+colour": 60, "size+shape": 20}
    assert round(100 * np.mean(scores["size+colour"] + scores["size+shape"])) == 39


def test_all_words_of_val_and_test_occur_in_train_captions():
    for seed in range(3):
        _, files = synthetic.plan(500, seed)
        words = {word for row in files["train"] for word in row["caption"].split()}
        for split in ("val", "test"):
            said = [row["caption"] for row in files[split]]
            for kind in CHOICES:
                said += [option for row in files[f"{kind}_{split}"] for option in row["options"]]
            assert {word for text in said for word in text.split()} <= words
        answers = {row["answer"] for row in files["qa_train"]}
        assert {row["answer"] for split in ("val", "test") for row in files[f"qa_{split}"]} <= answers


@pytest.mark.parametrize("clips", [45, 47, 100])
def test_small_sets_have_every_kind_in_every_split(clips):
    scenes, files = synthetic.plan(clips, 3)
    assert len(scenes) == clips // 5 * 5
    assert all(files[f"{name}_{split}"] for name in (*CHOICES, "qa", "action") for split in SPLITS)


# ---- captions ----------------------------------------------------------------------------------------------

MEANINGS = {form: word for word, forms in FORMS.items() for form in forms if word != "order"}
MEANINGS |= {name: name for name in (*COLOURS, *SHAPES)}


def test_the_claims_are_what_the_words_say_and_are_true(read, shown):
    """Each colour, shape, size, action, direction and background that is said is claimed, and no other."""
    counted = {"twice": "twice", "two times": "twice", "three times": "thrice", "thrice": "thrice"}
    for row in [row for split in SPLITS for row in read(split)]:
        assert row["shows"] == shown[row["video"]] and is_true(row["says"], row["shows"])
        caption = row["caption"].replace("two times", "twice").replace("three times", "thrice").split()
        claimed = Counter(part for thing in row["says"] for word in thing for part in word.split("-"))
        for word in (*COLOURS, *SHAPES, "large", "small", *synthetic.ACTIONS, *synthetic.BACKGROUNDS,
                     "twice", "thrice", "up", "down", "top", "bottom"):
            said = sum(counted.get(w, MEANINGS.get(w, w)) == word for w in caption)
            assert said == claimed[word], (word, row)
        for word in ("left", "right"):
            halves = sum(f"{word}-half" in thing for thing in row["says"])
            assert row["caption"].count(f"on the {word}") == halves, (word, row)
            assert caption.count(word) == claimed[word], (word, row)


def test_a_retrieval_caption_is_true_of_its_own_clip_alone(read):
    rows = read("test")
    assert len({row["caption"] for row in rows}) == len({row["video"] for row in rows}) == len(rows) >= 40
    for row in rows:
        assert [other["video"] for other in rows if is_true(row["says"], other["shows"])] == [row["video"]]


def test_words_have_a_long_tail(read):
    rows = read("train")
    for index in (0, 1):
        counts = Counter(thing[index] for row in rows for thing in row["says"] if thing[0] != "background")
        assert max(counts.values()) >= 2.5 * min(counts.values()) and len(counts) == (9, 6)[index]
    words = Counter(word for row in rows for word in row["caption"].split())
    assert words.most_common()[9][1] >= 20 * words.most_common()[-5][1]
    assert 70 <= len(words) <= 100
    captions = [row["caption"] for row in read("val")]
    assert len(set(captions)) >= 0.97 * len(captions)
    for word in ("moves", "large", "circle"):
        usual, *others = FORMS[word]
        assert words[usual] > 1.5 * sum(words[other] for other in others)


def test_caption_groups_say_what_changes(read):
    """A clip's own caption tells it from the other four of its group."""
    said = {row["video"]: row for row in read("train")}
    for group in groups_of(read("mc_caption_train")):
        for row in group:
            own = said[row["video"]]["says"]
            assert [is_true(own, said[other["video"]]["shows"]) for other in group].count(True) == 1


# ---- questions ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", CHOICES)
@pytest.mark.parametrize("split", SPLITS)
def test_each_option_is_the_answer_once_and_the_others_are_false(read, shown, kind, split):
    rows = read(f"{kind}_{split}")
    assert Counter(row["answer"] for row in rows) == {answer: len(rows) // 5 for answer in range(5)}
    for group in groups_of(rows):
        # Two groups may well ask the same, in the same order.
        assert Counter(row["answer"] for row in group) == {answer: len(group) // 5 for answer in range(5)}
    for row in rows:
        assert len(set(row["options"])) == len(row["says"]) == 5
        assert bool(row["question"]) == (kind != "mc_caption")
        true = [is_true(claim, shown[row["video"]]) for claim in row["says"]]
        assert true == [answer == row["answer"] for answer in range(5)]


def test_options_differ_in_the_changed_attributes_alone(read):
    """Without the named attributes all five claims are one; any two differ in one or two words."""
    for row in [row for split in SPLITS for row in read(f"mc_caption_{split}")]:
        kept = []
        for claim in row["says"]:
            words = [word for thing in claim for word in thing]
            names = ["colour"] if row["changed"] == ["binding"] else row["changed"]
            changing = {word for name in names for word in synthetic.VALUES[name]}
            kept.append([word for word in words if word not in changing])
        assert all(words == kept[0] for words in kept)
        for a in row["says"]:
            for b in row["says"]:
                differing = sum(x != y for s, t in zip(a, b) for x, y in zip(s, t))
                assert a == b or 1 <= differing <= 2


def test_a_question_has_one_answer(read, shown):
    for row in [row for split in SPLITS for row in read(f"qa_{split}")]:
        *things, (_, background) = shown[row["video"]]
        words = row["question"].rstrip("?").split()
        named = [thing for thing in things if set(thing).issuperset(set(words) & {*COLOURS, *SHAPES})]
        answers = {
            "count": [("one", "two")[len(things) - 1]], "background": [background],
            "colour": [thing[0] for thing in named], "shape": [thing[1] for thing in named],
            "where": [thing[-2].removesuffix("-half") for thing in named]}
        assert answers[row["kind"]] == [row["answer"]], row


def test_motion_labels(read, shown):
    labels = Counter()
    for row in [row for split in SPLITS for row in read(f"action_{split}")]:
        shows = shown[row["video"]]
        assert len(shows) == 2 and row["label"] in shows[0] and "then" not in shows[0][3]
        labels[row["label"]] += 1
    assert set(labels) == {*synthetic.PLAIN, *synthetic.ACTIONS}


# ---- rendering ---------------------------------------------------------------------------------------------

def digest(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return [(str(path.relative_to(folder)), hashlib.md5(path.read_bytes()).hexdigest()) for path in files]


def test_a_seed_is_a_set_of_the_same_bytes(tmp_path):
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        render(tmp_path / name, clips=45, seed=seed)
    a, b, c = (dict(digest(tmp_path / name)) for name in "abc")
    assert a == b and set(a) == set(c) and all(a[name] != c[name] for name in a)
    # What results were measured on. (How a GIF is encoded is Pillow's.)
    clips = sorted(tmp_path.glob("a/clips/*"))
    pixels = b"".join(frames_of(path).astype(np.uint8).tobytes() for path in clips)
    rows = b"".join(path.read_bytes() for path in sorted(tmp_path.glob("a/*.jsonl")))
    assert [hashlib.md5(content).hexdigest()[:8] for content in (pixels, rows)] == ["4b95b331", "95fb3c83"]


def test_only_the_default_folder_is_rendered_when_it_is_missing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rendered = []
    monkeypatch.setattr(synthetic, "render", rendered.append)
    for folder in ("my_clips", tmp_path / "data/toy", "data/toy", Path("data/toy")):
        render_if_missing(folder)
    (tmp_path / "data/toy").mkdir(parents=True)
    render_if_missing("data/toy")
    assert rendered == ["data/toy", Path("data/toy")]


def test_a_set_is_rendered_once_and_never_over_another(tmp_path, capsys):
    out = tmp_path / "toy"
    render(out, clips=45)
    before = digest(out)
    render(out, clips=45)
    assert "holds this set already" in capsys.readouterr().out and digest(out) == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    for other, clips, seed in ((out, 50, 0), (out, 45, 1), (tmp_path / "mine", 45, 0)):
        with pytest.raises(DataError, match="--out"):
            render(other, clips, seed)
    assert digest(out) == before and (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


# ---- the command -------------------------------------------------------------------------------------------

def type_in(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["toy_data", *map(str, arguments)])
    main()


def test_ctrl_c_says_interrupted_and_leaves_nothing(tmp_path, monkeypatch, capsys):
    def interrupted(path, *scene):
        if path.name == "00020.gif":
            raise KeyboardInterrupt
        write_clip(path, *scene)

    write_clip = synthetic.write_clip
    monkeypatch.setattr(synthetic, "write_clip", interrupted)
    with pytest.raises(SystemExit) as end:
        type_in(monkeypatch, "--out", tmp_path / "toy", "--clips", 45)
    assert end.value.code == 130 and capsys.readouterr().err.endswith("interrupted\n")
    assert not list(tmp_path.iterdir())


def test_the_command_renders_shows_and_says_what_is_next(tmp_path, monkeypatch, capsys):
    out = tmp_path / "toy"
    type_in(monkeypatch, "--out", out, "--clips", 60)
    assert not (out / "sheet.png").exists()
    type_in(monkeypatch, "--out", out, "--clips", 60, "--show")     # for a set that is there already, too
    said = capsys.readouterr().out
    assert "60 clips" in said and said.endswith(f"next: python pretrain.py --data {out}\n")
    assert (out / "sheet.png").stat().st_size > 10_000


@pytest.mark.parametrize("arguments, said", [
    (("--clips", 44), "--clips 44: at least 45"), (("--seed", -1), "--seed -1"),
    (("--out", __file__), "--out"), (("--cl", 45), "--cl")])
def test_bad_input_ends_with_status_2(tmp_path, monkeypatch, capsys, arguments, said):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        type_in(monkeypatch, *arguments)
    assert end.value.code == 2 and said in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.iterdir())
