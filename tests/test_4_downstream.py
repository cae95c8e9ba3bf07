"""Section 4, downstream tasks: the heads against plain calculations, then each task on a few clips."""
import json
import math
import shutil
import signal
from dataclasses import asdict, replace
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

import evilm
import finetune
from evilm import (Choice, Config, EViLM, FastRetrieval, InputError, LinearProbe, Machine, WordPiece,
                   contrastive_loss, recalls, score_choices, score_retrieval)
from plain import assert_trained_alike
from test_manifest import write
from test_scripts import end, metrics, same, start_two, weights
from toy_data import BrokenClip, ClipCaptions, DataError, make_loader, open_splits, render

CPU = Machine(torch.device("cpu"))


def texts(tiny, n=3, options=None):
    shape = (n, tiny.max_words) if options is None else (n, options, tiny.max_words)
    ids = torch.randint(5, tiny.vocab_size, shape)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[..., -2:] = False
    return ids * mask, mask


# ------------------------------------------------------------------------------------------------------ heads

def test_multiple_choice_begins_where_zero_shot_matching_ends(tiny, model, frames):
    head, (ids, mask) = Choice(model, 1).eval(), texts(tiny, options=5)
    video = model.encode_video(frames)
    with torch.no_grad():
        logits = head(frames, ids, mask)
        for i in range(5):
            scores = model.match(video, model.encode_text(ids[:, i], mask[:, i]), mask[:, i])
            bias = model.vtm_head.bias[1] - model.vtm_head.bias[0]
            torch.testing.assert_close(logits[:, i], scores - bias, atol=1e-4, rtol=1e-4)


def test_44_fast_retrieval_is_the_decoder_on_each_side_alone(tiny, model, frames):
    fast, (ids, mask) = FastRetrieval(model).eval(), texts(tiny)
    with torch.no_grad():
        video, text, scale = fast(frames, ids, mask)
        for vectors, (h_cls, _, _) in ((video, model.fuse(model.encode_video(frames), None, None)),
                                       (text, model.fuse(None, model.encode_text(ids, mask), mask))):
            pooled = model.pooler(h_cls)
            torch.testing.assert_close(vectors, pooled / pooled.norm(dim=1, keepdim=True), atol=1e-5,
                                       rtol=1e-4)
    assert float(scale.detach()) == pytest.approx(1 / 0.07)


def test_contrast_counts_no_other_caption_of_the_same_video():
    video, text = (F.normalize(torch.randn(4, 6), dim=1) for _ in range(2))
    names, scale, expected = torch.tensor([8, 5, 8, 3]), 9.0, 0.0
    for one, other in ((text.double(), video.double()), (video.double(), text.double())):
        for i in range(4):
            others = [j for j in range(4) if j == i or names[j] != names[i]]
            weights = [math.exp(scale * one[i] @ other[j]) for j in others]
            expected -= math.log(math.exp(scale * one[i] @ other[i]) / sum(weights)) / 8
    assert float(contrastive_loss(video, text, scale, names)) == pytest.approx(expected, rel=1e-5)


def test_the_probe_trains_its_classifier_and_nothing_else(tiny, model):
    probe, frames = LinearProbe(model, 3), torch.rand(8, 2, 3, 64, 64)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    features, optimizer = probe.features(frames), torch.optim.SGD(probe.parameters(), lr=0.1)
    first = probe.classifier.weight.clone()
    for _ in range(3):
        probe.train()
        F.cross_entropy(probe(features), torch.arange(8) % 3).backward()
        optimizer.step()
    assert not torch.equal(first, probe.classifier.weight)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    torch.testing.assert_close(features, probe.features(frames), rtol=0, atol=0)


def test_the_probe_sees_the_quarters_of_each_frame(tiny, model):
    wide = LinearProbe(EViLM(replace(tiny, size=128)).eval(), 3)
    frames = torch.rand(1, tiny.frames, 3, 128, 128)
    with torch.no_grad():
        h = wide.model.fuse(wide.model.encode_video(frames), None, None)[2].view(tiny.frames, 4, 4, -1)
    features = wide.features(frames).view(tiny.frames, -1, 2, 2)
    torch.testing.assert_close(features[1, :, 0, 1], h[1, :2, 2:].mean((0, 1)))


def test_a_long_question_loses_its_end_and_never_its_option():
    wordpiece = WordPiece.from_captions(["a b c d e f g"])
    for question, option, expected in (("a b c d e f", "g a", ["a", "b", "c", "g", "a"]),
                                       ("a b", "", ["a", "b"])):
        ids = finetune.encode_question(wordpiece, question, option, 7)
        assert [wordpiece.vocab[i] for i in ids] == ["[CLS]", *expected, "[SEP]"]


def test_a_tie_is_wrong_and_so_is_an_answer_that_training_does_not_have():
    logits = torch.tensor([[1., 3., 2.], [3., 3., 1.], [3., 3., 1.], [1., 2., 3.], [math.nan, 0., 0.]])
    assert finetune.is_right(logits, torch.tensor([1, 0, 1, -1, 0])).tolist() == [True, *[False] * 4]
    found = finetune.accuracies("top1", [True, False, True], [["colour", "shape"], ["colour"], []])
    assert found == {"top1": 2 / 3, "top1_colour": 1 / 2, "top1_shape": 1.0}, "fractions of their kind"


@pytest.mark.parametrize("row, names", [
    ({}, []), ({"changed": ["shape"], "unseen": True}, ["shape", "unseen"]),
    ({"changed": ["colour", "shape"], "unseen": False}, ["colour+shape"])])
def test_a_question_counts_under_what_its_options_differ_in(row, names):
    assert evilm.changed_and_unseen(row) == names


# ------------------------------------------------------------------------------------------------------ tasks

@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A working folder with a small set, and in runs/pretrain a model of its words at random weights."""
    folder = tmp_path_factory.mktemp("home")
    render(folder / "clips", 100)
    wordpiece = WordPiece.from_captions(row["caption"] for row in open_splits(folder / "clips")["train"])
    config = replace(Config.toy(), frames=2, size=64, dims=(8, 16, 24, 32), depths=4 * (1,), text_layers=1,
                     width=32, text_width=32, decoder_layers=1, vocab_rows=200, vocab_size=len(wordpiece))
    torch.manual_seed(3)
    (folder / "runs/pretrain").mkdir(parents=True)
    evilm.save({"kind": "pretrain", "config": asdict(config), "vocab": wordpiece.vocab, "step": 9,
                "model": EViLM(config).state_dict()}, folder / "runs/pretrain/best.pt")
    return folder


@pytest.fixture
def go(home, monkeypatch, capsys):
    """go("qa", ...) runs finetune.py there -> (last line of metrics.jsonl, what was printed)."""
    monkeypatch.chdir(home)

    def run(*flags, data="clips", pictures=False):
        args = finetune.parse([*flags, *common(flags), "--data", str(data)])
        with monkeypatch.context() as patch:
            if not pictures:
                patch.setattr(finetune, "plots", mock.Mock())
            finetune.train(args)
        return metrics(Path(args.out))[-1], capsys.readouterr().out
    yield run
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def whole(go, home):
    """whole("qa --see text") -> (the folder of its unbroken run, which tests share, what was printed)."""
    def run(flags):
        folder = home / "whole" / flags.replace(" ", "")
        if flags not in PRINTED:
            PRINTED[flags] = go(*flags.split(), "--out", str(folder), pictures=True)[1]
        return folder, PRINTED[flags]
    return run


PRINTED = {}


def common(flags):
    """The flags of all runs, where they are not given."""
    usual = {"--workers": "0", "--device": "cpu", "--max-steps": "3", "--batch-size": "8"}
    return [word for pair in usual.items() if pair[0] not in flags for word in pair]


def scores_of(line):
    return {name: value for name, value in line.items() if name.startswith("top1")}


def pretrained(home):
    checkpoint = evilm.load(home / "runs/pretrain", "pretrain")
    model = EViLM(checkpoint["config"])
    evilm.fill(model, checkpoint)
    return model.eval(), WordPiece(checkpoint["vocab"])


def elsewhere(home, files, folder, change=lambda name, lines: lines):
    """The files of a task in another folder, changed: change(split, lines) -> lines."""
    for name, manifest in open_splits(home / "clips", files).items():
        lines = [row | {"video": str(home / "clips" / row["video"])} for row in manifest]
        write(folder / (f"{files}_{name}.jsonl" if files else f"{name}.jsonl"), change(name, lines))


def task_of(home, *flags, data="clips"):
    """A task as `train` makes it."""
    args = finetune.parse([*flags, *common(flags)])
    files = f"mc_{args.set}" if args.task == "mc" else finetune.TASKS[args.task].files
    model, wordpiece = pretrained(home)
    return finetune.TASKS[args.task](args, open_splits(home / data, files), wordpiece, model.config, CPU)


@pytest.mark.parametrize("flags, score, picture", [
    ("qa", "top1", "answers.png"), ("qa --see text", "top1", "answers.png"),
    ("qa --init none", "top1", "answers.png"), ("mc", "top1", "answers.png"),
    ("mc --set action", "top1", "answers.png"), ("retrieval", "r1", "retrieval.png"),
    ("retrieval --scoring joint", "r1", "retrieval.png"), ("probe", "top1", "")])
def test_each_task_leaves_scores_beside_chance_and_a_picture(whole, home, flags, score, picture):
    folder, printed = whole(flags)
    last = metrics(folder)[-1]
    baseline = "majority answer of each kind" if "qa" in flags else "chance"
    assert last["split"] == "test" and 0 <= last[score] <= 1
    assert any(name.startswith(baseline) and 0 < value < 1 for name, value in last.items())
    assert baseline in printed and "broken clips: 0" in printed
    if flags == "probe":
        labels = [json.loads(line)["label"] for line in open(home / "clips/action_test.jsonl")]
        assert last["top1"] == pytest.approx(sum(last[f"top1_{label}"] for label in labels) / len(labels))
    assert set(map(str, folder.iterdir())) == {f"{folder}/{name}" for name in (
        "last.pt", "best.pt", "metrics.jsonl", "curves.png", picture) if name}


def test_zero_shot_scores_the_pretrained_model_by_its_2_way_head(go, home, tmp_path):
    model, wordpiece = pretrained(home)

    def loader(manifest):
        return make_loader(ClipCaptions(manifest, 2, 64, 0, False, mismatched=False))
    test = open_splits(home / "clips", "mc_caption")["test"]
    found = score_choices(model, loader(test), wordpiece, CPU, mock.Mock())
    last, _ = go("mc", "--zero-shot", pictures=True)
    assert scores_of(last) == {name.replace("mc", "top1"): value for name, value in found.items()}
    assert last["step"] == 0 and (home / "runs/mc-caption-zero-shot/answers.png").exists()
    test = open_splits(home / "clips")["test"]
    found = score_retrieval(model, test, loader(test.each_video()), wordpiece, CPU, mock.Mock())
    last, printed = go("retrieval", "--zero-shot")
    assert recalls(found[1]).items() <= last.items() and "joint, test, zero-shot" in printed
    elsewhere(home, "", tmp_path, lambda name, lines: [lines[0] | {"caption": "a quick red fox"}, *lines[1:]])
    printed = go("retrieval", "--zero-shot", data=tmp_path)[1]
    assert "unknown words" in printed and "quick" in printed and "fox" in printed and " red" not in printed
    assert "held an older run" in printed and (home / "runs/retrieval-zero-shot-joint.1").exists()


@pytest.mark.parametrize("scoring", ["fast", "joint"])
def test_retrieval_ranks_a_video_once_however_many_captions_name_it(home, tmp_path, scoring):
    elsewhere(home, "", tmp_path, lambda name, lines: lines[:6] * 20 if name == "test" else lines[:6])
    write(tmp_path / "val.jsonl", list(open_splits(tmp_path)["test"])[:6])
    task, model = task_of(home, "retrieval", "--scoring", scoring, data=tmp_path), pretrained(home)[0]
    found = {}
    for split, captions in (("val", 6), ("test", 120)):     # more than are scored at once
        scores = task.evaluate(task.head(model).eval(), split, CPU, mock.Mock())
        assert (scores["captions"], scores["clips"]) == (captions, 6)
        _, found[split], names, (highest, places) = task.ranking
        assert len(names) == 6 and highest.shape == places.shape == (captions, 5)
    assert found["test"].tolist() == [*found["val"].tolist()] * 20


def test_44_an_epoch_is_a_pass_over_videos_with_one_caption_drawn_for_each(home, tmp_path):
    elsewhere(home, "", tmp_path, lambda name, lines: [line | {"caption": f"{line['caption']}, {n}"}
                                                       for n in range(4) for line in lines[:5 + n]])
    manifest = open_splits(tmp_path)["train"]
    videos, again = (task_of(home, "retrieval", data=tmp_path).clips(None, CPU, None) for _ in range(2))
    drawn = [[videos[epoch, i] for i in range(len(videos))] for epoch in range(30)]
    for samples in drawn:
        assert sorted(s["video"] for s in samples) == sorted({row["video"] for row in manifest})
        assert all(manifest.videos[s["index"]] == s["name"] for s in samples)
        assert all(s["caption"] == manifest[s["index"]]["caption"] for s in samples)
    captions = {s["caption"] for samples in drawn for s in samples}
    assert captions == {row["caption"] for row in manifest}, "all captions have their turn"
    assert [again[7, i]["caption"] for i in range(len(again))] == [s["caption"] for s in drawn[7]]


@pytest.mark.parametrize("flags", ["qa", "mc --set action", "retrieval", "retrieval --scoring joint"])
def test_a_worker_can_be_sent_a_task(home, flags):
    task = task_of(home, *flags.split())
    samples = task.clips(None, CPU, None)
    sent = bytes(ForkingPickler.dumps((samples, task.collate)))
    assert len(sent) < 50_000, "neither a model nor a manifest's lines"
    there, make_batch = ForkingPickler.loads(sent)
    expected = task.collate([samples[1, 0], samples[1, 3]])
    for name, value in make_batch([there[1, 0], there[1, 3]]).items():
        assert value == expected[name] if name == "broken" else torch.equal(value, expected[name]), name


@pytest.mark.parametrize("flags", ["probe", "retrieval", "mc --set action --config dropout=0.1"])
def test_a_killed_run_resumes_to_the_same_weights(go, whole, flags, tmp_path, monkeypatch):
    broken, optimise = [*flags.split(), "--out", str(tmp_path), "--save-every", "2"], finetune.Run.optimise

    def killed(run, loss):
        optimise(run, loss)
        if run.step == 3:
            raise ZeroDivisionError
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(finetune.Run, "optimise", killed)
        go(*broken)
    go(*broken, "--resume")
    assert same(weights(whole(flags)[0]), weights(tmp_path))
    assert metrics(whole(flags)[0])[-1] == metrics(tmp_path)[-1]


def assert_same_run(one, two):
    """To rounding: the weights, and the loss of the last batch."""
    assert_trained_alike(weights(one), weights(two))
    assert metrics(two)[0]["loss"] == pytest.approx(metrics(one)[0]["loss"], rel=1e-4)


@pytest.mark.parametrize("flags", ["qa", "retrieval --scoring joint"])
def test_accumulation_trains_to_the_weights_of_the_whole_batch(go, whole, tmp_path, flags):
    go(*flags.split(), "--out", str(tmp_path), "--accumulate", "4")
    assert_same_run(whole(flags)[0], tmp_path)


@pytest.mark.parametrize("flags", ["retrieval", *[pytest.param(flags, marks=pytest.mark.slow) for flags in (
    "qa", "mc --set action", "retrieval --scoring joint")]])
def test_two_processes_train_to_the_weights_of_one(whole, home, tmp_path, flags):
    folder, _ = whole(flags)
    flags = [*flags.split(), *common(flags), "--data", "clips", "--out", str(tmp_path)]
    for status, output in map(end, start_two("finetune.py", *flags, folder=home)):
        assert status == 0, output
    assert_same_run(folder, tmp_path)


# -------------------------------------------------------------------------------------------- search and ask

def test_search_ranks_a_folder_and_names_broken_clips_and_unknown_words(whole, home, tmp_path, capsys):
    folder, _ = whole("retrieval")
    (tmp_path / "mine/inside").mkdir(parents=True)
    for i, name in enumerate(["a.gif", "b.gif", "inside/c.gif"]):
        shutil.copy(home / f"clips/clips/{i:05d}.gif", tmp_path / "mine" / name)
    (tmp_path / "mine/broken.gif").write_bytes(b"GIF89a")
    finetune.search(finetune.parse(["search", "a red fox", "--videos", str(tmp_path / "mine"), "--init",
                                    str(folder), "--out", str(tmp_path / "s.png"), "--device", "cpu"]))
    printed = capsys.readouterr().out.splitlines()
    assert any("unknown words" in line and "fox" in line for line in printed)
    assert any(line.startswith("broken clip") and "broken.gif" in line for line in printed)
    found = [line.split() for line in printed if line.endswith(".gif")]
    assert {name for _, name in found} == {"a.gif", "b.gif", "inside/c.gif"}
    assert [score for score, _ in found] == sorted((score for score, _ in found), key=float, reverse=True)
    checkpoint = evilm.load(folder, "retrieval")
    fast, wordpiece = FastRetrieval(EViLM(checkpoint["config"])), WordPiece(checkpoint["vocab"])
    evilm.fill(fast, checkpoint)
    clip = ClipCaptions(open_splits(home / "clips")["train"], 2, 64, 0, False, mismatched=False)[0, 0]
    with torch.no_grad():
        video, text, _ = fast.eval()(clip["frames"][None] / 255, *wordpiece.encode_batch(["a red fox"], 24))
    assert dict(map(reversed, found))["a.gif"] == f"{float(video[0] @ text[0]):.3f}"
    assert (tmp_path / "s.png").exists()


def test_ask_names_answers_with_probabilities(whole, home, monkeypatch, capsys):
    monkeypatch.chdir(home)
    ask = ["ask", "clips/clips/00001.gif", "what colour is the fox?", "--init", str(whole("qa")[0])]
    finetune.ask(finetune.parse([*ask, "--top", "3", "--device", "cpu"]))
    unknown, *lines = capsys.readouterr().out.splitlines()
    shares = [float(line.split("%")[0]) for line in lines]
    assert len(shares) == 3 and sorted(shares, reverse=True) == shares and 0 < sum(shares) <= 100.3
    assert "fox" in unknown and "colour" not in unknown
    ask[1] = "nowhere.gif"
    with pytest.raises(BrokenClip, match="nowhere.gif: there is no such file"):
        finetune.ask(finetune.parse(ask))


# ---------------------------------------------------------------------------------------- what bad input gets

def test_a_task_refuses_what_it_cannot_use(go, whole, home):
    fast, _ = whole("retrieval")
    for flags, named in (("qa --init nowhere.pt", "nowhere.pt: there is no such file"),
                         ("qa --preset paper", "--preset toy"), ("qa --vocab vocab.txt", "its vocabulary"),
                         ("qa --config width=64", "do not fit"),
                         ("qa --config max_words=100", "max_words, 100, must lie in 3 to positions"),
                         (f"qa --init {fast}", "trained for fast retrieval"),
                         ("probe --accumulate 2", "--accumulate"), ("probe --batch-size 1", "--batch-size"),
                         ("retrieval --accumulate 2", "--accumulate"),
                         ("mc --zero-shot --init none", "--zero-shot"),
                         ("mc --zero-shot --resume", "--resume")):
        with pytest.raises(InputError, match=named):
            go(*flags.split(), "--out", "out/refused")
    with pytest.raises(InputError, match="without any video"):
        finetune.ask(finetune.parse(["ask", "a.gif", "what?", "--init", str(whole("qa --see text")[0])]))
    joint = str(whole("retrieval --scoring joint")[0])
    with pytest.raises(InputError, match="--scoring fast"):
        finetune.search(finetune.parse(["search", "red", "--videos", "clips", "--init", joint]))
    with pytest.raises(DataError, match="mc_nothing"):
        go("mc", "--set", "nothing")
    with pytest.raises(DataError, match="8 clips cannot be divided by 1 processes x 3 parts"):
        go("qa", "--accumulate", "3", "--out", "out/refused")
    assert not (home / "out/refused").exists()


@pytest.mark.parametrize("task, files, field", [("qa", "qa", "answer"), ("probe", "action", "label")])
def test_a_split_that_shares_no_answer_with_training_is_refused(go, home, tmp_path, task, files, field):
    elsewhere(home, files, tmp_path,
              lambda name, lines: [line | {field: f"{name} {line[field]}"} for line in lines])
    with pytest.raises(DataError, match=f"{files}_val.jsonl: none of its {field}s is in .*train.jsonl"):
        go(task, data=tmp_path)


def test_an_own_set_may_have_any_number_of_options(go, home, tmp_path):
    def three(name, lines):
        return [line | {"options": line["options"][:3], "answer": line["answer"] % 3} for line in lines]
    elsewhere(home, "mc_caption", tmp_path, three)
    for path in tmp_path.glob("mc_caption_*"):
        path.rename(tmp_path / path.name.replace("caption", "mine"))
    last, printed = go("mc", "--set", "mine", "--out", str(tmp_path / "out"), data=tmp_path)
    assert last["chance"] == pytest.approx(1 / 3) and "33.3%" in printed
    val = list(open_splits(tmp_path, "mc_mine")["val"])
    write(tmp_path / "mc_mine_val.jsonl", [val[0], val[1] | {"options": list("abcd")}])
    with pytest.raises(DataError, match=r"mc_mine_val.jsonl:2: has 4 options, where .*test.jsonl:1 has 3"):
        go("mc", "--set", "mine", data=tmp_path)


@pytest.mark.parametrize("flags, files", [("qa", "qa"), ("probe", "action"), ("mc", "mc_caption")])
def test_an_absent_video_is_counted_and_leaves_the_scores_alone(go, whole, home, tmp_path, flags, files):
    def lose(name, lines):
        return lines + [lines[0] | {"video": f"gone-{name}.gif"}] * (2 if name != "train" else 0)
    elsewhere(home, files, tmp_path, lose)
    last, printed = go(*flags.split(), "--out", str(tmp_path / "gone"), data=tmp_path)
    assert scores_of(last) == pytest.approx(scores_of(metrics(whole(flags)[0])[-1]))
    assert printed.count("gone-val.gif") == printed.count("gone-test.gif") == 1
    assert "broken clips: 2" in printed
    with pytest.raises((DataError, InputError), match="gone-val.gif.*--strict"):
        go(*flags.split(), "--out", str(tmp_path / "strict"), "--strict", data=tmp_path)


def test_retrieval_names_an_absent_video_once_and_ranks_the_others(go, home, tmp_path):
    elsewhere(home, "", tmp_path, lambda name, lines: lines + [lines[0] | {"video": f"gone-{name}.gif"}])
    _, printed = go("retrieval", "--out", str(tmp_path / "gone"), "--max-steps", "9", data=tmp_path)
    assert [printed.count(f"gone-{name}.gif") for name in ("train", "val", "test")] == [1, 1, 1]
    assert "broken clips: 3" in printed and "replaced" in printed
    whole, gone = (go("retrieval", "--zero-shot", "--out", f"{tmp_path}/{i}", data=data)[0]
                   for i, data in enumerate(("clips", tmp_path)))
    assert {**gone, "chance of r1": 0} == {**whole, "chance of r1": 0}
    for scoring in ("fast", "joint"):
        with pytest.raises((DataError, InputError), match="gone-test.gif.*--strict"):
            go("retrieval", "--scoring", scoring, "--zero-shot", "--strict", data=tmp_path)


@pytest.mark.parametrize("typed, epochs, lr, positions", [
    ("mc --set action", 4, 1e-3, 3), ("mc --set mine", 4, 1e-3, 1), ("mc", 1, 1e-3, 1),
    ("mc --set transition", 4, 1e-3, 10), ("mc --set transition --config video_positions=2.0", 4, 1e-3, 2),
    ("mc --set action --epochs 5 --lr 0.2", 5, 0.2, 3), ("mc --set action --preset paper", 20, 5e-5, 1),
    ("retrieval --preset paper", 200, 3e-4, 1), ("qa --lr 0", 1, 0, 1)])
def test_settings_are_the_tables_and_the_synthetic_sets_and_flags_win(tmp_path, typed, epochs, lr, positions):
    args = finetune.parse([*typed.split(), "--data", str(tmp_path)])
    (tmp_path / "set.json").touch()                             # the synthetic set has it
    config = finetune.with_settings(getattr(Config, args.preset)(), args)
    assert (config.epochs, config.lr, config.video_positions) == (epochs, lr, positions)
    (tmp_path / "set.json").unlink()
    assert finetune.with_settings(Config.toy(), finetune.parse(["mc", "--data", str(tmp_path)])).epochs == 4


def test_going_on_with_another_set_is_refused(go, whole, home):
    folder, _ = whole("mc --set action")
    for name in ("train", "val", "test"):
        shutil.copy(home / f"clips/mc_action_{name}.jsonl", home / f"clips/mc_other_{name}.jsonl")
    settings = "--epochs 4 --config video_positions=3.0".split()
    with pytest.raises(InputError, match=r"another set \(action, now other\)"):
        go("mc", "--set", "other", "--out", str(folder), "--resume", *settings)
