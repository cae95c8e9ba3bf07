"""Section 4, downstream tasks: the heads against plain calculations, then each task on a few clips."""
import argparse
import json
import math
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import finetune
import pretrain
from evilm import (Choice, EViLM, FastRetrieval, InputError, LinearProbe, Machine, WordPiece, config_of,
                   configure, contrastive_loss, nearest, rank_of_truth, ranks_by_cosine)
from plain import assert_trained_alike
from toy_data import DataError, open_split, open_splits, render

CPU = Machine(torch.device("cpu"))


@pytest.fixture
def model(tiny, randomise):
    return randomise(EViLM(tiny))


def clips(tiny, n=3):
    return torch.rand(n, tiny.frames, 3, tiny.size, tiny.size)


def texts(tiny, n=3, options=None):
    shape = (n, tiny.max_words) if options is None else (n, options, tiny.max_words)
    ids = torch.randint(5, tiny.words, shape)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[..., -2:] = False
    return ids * mask, mask


def rows(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


# ------------------------------------------------------------------------------------------------------ heads


def test_multiple_choice_begins_where_zero_shot_matching_ends(tiny, model):
    head, frames, (ids, mask) = Choice(model, 1).eval(), clips(tiny), texts(tiny, options=5)
    video = model.encode_video(frames)
    with torch.no_grad():
        logits = head(frames, ids, mask)
        for i in range(5):
            scores = model.match(video, model.encode_text(ids[:, i], mask[:, i]), mask[:, i])
            bias = model.vtm_head.bias[1] - model.vtm_head.bias[0]
            torch.testing.assert_close(logits[:, i], scores - bias, atol=1e-4, rtol=1e-4)


def test_a_question_has_a_logit_an_answer_and_without_frames_only_the_text_counts(tiny, model):
    head, (ids, mask) = Choice(model, 7).eval(), texts(tiny, options=1)
    with torch.no_grad():
        seen, other, blind = (head(f, ids, mask) for f in (clips(tiny), clips(tiny), None))
    assert seen.shape == blind.shape == (3, 7)
    assert not torch.allclose(seen, other) and not torch.allclose(seen, blind)


def test_the_right_options_words_are_filled_in_by_the_head_of_mlm(tiny, model):
    frames, (ids, mask) = clips(tiny), texts(tiny, options=5)
    hidden = torch.zeros(3, tiny.max_words, dtype=torch.bool)
    hidden[0, 2], hidden[2, 3:5] = True, True
    head = Choice(model, 1, fills_in=True).eval()
    with torch.no_grad():
        alone, said = head(frames, None, None, right=(ids[:, 1], mask[:, 1], hidden))
        logits, again = head(frames, ids, mask, right=(ids[:, 1], mask[:, 1], hidden))
        h = model.fuse(model.encode_video(frames), model.encode_text(ids[:, 1], mask[:, 1]), mask[:, 1])[1]
        expected = torch.stack([model.mlm_head(h[i, j]) for i, j in ((0, 2), (2, 3), (2, 4))])
        torch.testing.assert_close(said, expected[:, :tiny.words], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(logits, head(frames, ids, mask))
    assert alone is None and torch.equal(said, again)
    trained = {name for name, p in head.named_parameters() if p.requires_grad}
    assert any("mlm_head" in name for name in trained) and not any("vtm_head" in name for name in trained)
    assert not Choice(model, 1).model.mlm_head[0].weight.requires_grad


def test_44_fast_retrieval_is_the_decoder_on_each_side_alone(tiny, model):
    fast, frames, (ids, mask) = FastRetrieval(model).eval(), clips(tiny), texts(tiny)
    with torch.no_grad():
        video, text, scale = fast(frames, ids, mask)
        e_cls, t_text, t_video = model.token_type
        for vectors, cells, seen in ((video, model.encode_video(frames) + t_video, None),
                                     (text, model.encode_text(ids, mask) + t_text, mask)):
            if seen is not None:
                seen = torch.cat([torch.ones(3, 1, dtype=torch.bool), seen], 1)
            h = model.decoder(torch.cat([e_cls.expand(3, 1, -1), cells], 1), seen)[:, 0]
            pooled = model.pooler(h)
            torch.testing.assert_close(vectors, pooled / pooled.norm(dim=1, keepdim=True), atol=1e-5,
                                       rtol=1e-4)
    assert float(scale.detach()) == pytest.approx(1 / 0.07)


def test_contrast_counts_no_other_caption_of_the_same_video():
    video, text = (torch.nn.functional.normalize(torch.randn(4, 6), dim=1) for _ in range(2))
    names, scale = torch.tensor([8, 5, 8, 3]), 9.0
    v, t, expected = video.double().numpy(), text.double().numpy(), 0.0
    for one, other in ((t, v), (v, t)):
        for i in range(4):
            others = [j for j in range(4) if j == i or names[j] != names[i]]
            weights = [math.exp(scale * one[i] @ other[j]) for j in others]
            expected -= math.log(math.exp(scale * one[i] @ other[i]) / sum(weights)) / 8
    assert float(contrastive_loss(video, text, scale, names)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_ranking_in_chunks_is_exact(chunk, tmp_path):
    queries, vectors = (torch.nn.functional.normalize(torch.randn(n, 16), dim=1) for n in (9, 50))
    vectors[30] = vectors[3]                                    # a tie, which counts against the query
    truth = torch.tensor([3, 30, 5, 6, 7, 8, 9, 0, 49])
    whole = queries @ vectors.t()
    np.save(tmp_path / "vectors.npy", vectors.numpy())
    mapped = np.load(tmp_path / "vectors.npy", mmap_mode="r")
    exactly = (queries.double() @ vectors.double().t()).round(decimals=9)
    assert torch.equal(ranks_by_cosine(queries, mapped, truth, chunk), rank_of_truth(exactly, truth))
    scores, places = nearest(queries, mapped, 4, chunk)
    torch.testing.assert_close(scores, whole.topk(4).values)
    torch.testing.assert_close(whole.gather(1, places), scores)


def test_the_probe_trains_its_classifier_and_nothing_else(tiny, model):
    probe, frames = LinearProbe(model, 3), clips(tiny, 8)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    features, optimizer = probe.features(frames), torch.optim.SGD(probe.parameters(), lr=0.1)
    first = probe.classifier.weight.clone()
    for _ in range(3):
        probe.train()
        torch.nn.functional.cross_entropy(probe(features), torch.arange(8) % 3).backward()
        optimizer.step()
    assert not torch.equal(first, probe.classifier.weight)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    torch.testing.assert_close(features, probe.features(frames), rtol=0, atol=0)
    with torch.no_grad():
        h = model.fuse(model.encode_video(frames), None, None)[2]
    torch.testing.assert_close(features.view(8, tiny.frames, -1, 4), h.view(8, tiny.frames, 4, -1).mT)


def test_the_probe_sees_the_quarters_of_each_frame(tiny, model):
    wide = LinearProbe(EViLM(replace(tiny, size=128)).eval(), 3)
    frames = torch.rand(1, tiny.frames, 3, 128, 128)
    with torch.no_grad():
        h = wide.model.fuse(wide.model.encode_video(frames), None, None)[2].view(tiny.frames, 4, 4, -1)
    features = wide.features(frames).view(tiny.frames, -1, 2, 2)
    torch.testing.assert_close(features[1, :, 0, 1], h[1, :2, 2:].mean((0, 1)))


def test_a_tasks_words_take_rows_that_no_word_used():
    wordpiece = WordPiece.from_captions(["a red circle", "a red star"])
    longer = wordpiece.add_words(["what colour is it?", "what is red?"], 13)
    assert longer.vocab[:len(wordpiece)] == wordpiece.vocab
    assert longer.vocab[len(wordpiece):] == ["?", "is", "what", "colour"], "by count, then letter; 13 in all"
    assert len(wordpiece.add_words(["what"], len(wordpiece))) == len(wordpiece)


def test_a_long_question_loses_its_end_and_never_its_option():
    wordpiece = WordPiece.from_captions(["a b c d e f g"])
    ids = finetune.encode_question(wordpiece, "a b c d e f", "g a", 7)
    assert [wordpiece.vocab[i] for i in ids] == ["[CLS]", "a", "b", "c", "g", "a", "[SEP]"]
    ids = finetune.encode_question(wordpiece, "a b", "", 7)
    assert [wordpiece.vocab[i] for i in ids] == ["[CLS]", "a", "b", "[SEP]"]


def test_two_options_that_score_the_same_are_no_answer():
    assert finetune.most_likely(torch.tensor([[1., 3., 2.], [3., 3., 1.]])).tolist() == [1, -2]


def options_task(tiny, first=0.6):
    """Options over two rows, as finetune.py builds them, and their batch."""
    rows = [{"question": "what does it do?", "options": ["hops", "keeps moving up", "stops", "hops up", "up"],
             "answer": 1}, {"question": "what is it?", "options": list("abcde"), "answer": 4}]
    wordpiece = WordPiece.from_captions([" ".join([r["question"], *r["options"]]) for r in rows])
    task = finetune.Options(argparse.Namespace(see="both", set="action", mlm_first=first), {})
    task.wordpiece, task.config = wordpiece, replace(tiny, words=len(wordpiece))
    frames = torch.randint(256, (tiny.frames, 3, tiny.size, tiny.size), dtype=torch.uint8)
    return task, task([{"row": row, "frames": frames, "broken": []} for row in rows])


def test_the_hidden_words_are_those_of_the_right_option(tiny):
    task, batch = options_task(tiny)
    right = batch["ids"][torch.arange(2), batch["targets"]]
    hidden = [[task.wordpiece.vocab[i] for i in ids[words].tolist()]
              for ids, words in zip(right, batch["words"])]
    assert hidden == [["keeps", "moving", "up"], ["e"]]


def test_words_come_first_then_options_as_well(tiny, randomise):
    task, batch = options_task(tiny)
    model = task.head(randomise(EViLM(task.config))).eval()
    losses = []
    task.turn = 5
    for step in (4, 5):
        task.run = argparse.Namespace(step=step)
        losses.append(float(task.loss(model, batch).detach()))
    chosen = torch.nn.functional.cross_entropy(task.logits(model, batch), batch["targets"])
    assert losses[1] - losses[0] == pytest.approx(float(chosen.detach()), rel=1e-4)
    right = batch["ids"][torch.arange(2), batch["targets"]].clone()
    mask = batch["mask"][torch.arange(2), batch["targets"]]
    truth, right[batch["words"]] = right[batch["words"]], 4
    with torch.no_grad():
        said = model(batch["frames"] / 255, None, None, (right, mask, batch["words"]))[1].log_softmax(1)
    assert losses[0] == pytest.approx(float(-said[range(4), truth].sum() / 2), rel=1e-4), "a mean over clips"


# ------------------------------------------------------------------------------------------------------ tasks


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A small set, and a model pretrained on it for a moment, in the working folder."""
    folder = tmp_path_factory.mktemp("home")
    render(folder / "clips", 150)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        flags = "--data clips --tokenizer none --max-steps 3 --batch-size 16 --workers 0 --device cpu"
        pretrain.train(pretrain.parse(flags.split()), CPU)
    return folder


@pytest.fixture
def go(home, monkeypatch, capsys):
    """go("qa", ...) runs finetune.py there; -> (last line of metrics.jsonl, what was printed)."""
    monkeypatch.chdir(home)

    def run(*flags, data="clips"):
        flags = [*flags, "--data", data, *"--workers 0 --device cpu --max-steps 3".split()]
        monkeypatch.setattr(sys, "argv", ["finetune.py", *flags])
        args = finetune.parse(flags)
        finetune.train(args, CPU)
        lines = (Path(args.out) / "metrics.jsonl").read_text().splitlines()
        return json.loads(lines[-1]), capsys.readouterr().out
    return run


@pytest.mark.parametrize("flags, score, picture", [
    (["qa"], "top1", "answers.png"), (["qa", "--see", "text"], "top1", "answers.png"),
    (["mc"], "top1", "answers.png"), (["mc", "--set", "action"], "top1", "answers.png"),
    (["mc", "--set", "transition"], "top1", "answers.png"), (["retrieval"], "r1", "retrieval.png"),
    (["retrieval", "--scoring", "joint"], "r1", "retrieval.png"), (["probe"], "top1", "confusion.png")])
def test_each_task_leaves_scores_against_chance_and_a_picture(go, home, flags, score, picture):
    out = home / "out" / "-".join(flags)
    last, said = go(*flags, "--out", str(out))
    assert last["split"] == "test" and 0 <= last[score] <= 1
    assert "against" in said and any(name.startswith("against") for name in last)
    assert {"last.pt", "best.pt", "metrics.jsonl", "curves.png", picture} <= {p.name for p in out.iterdir()}


def test_the_probe_scores_the_labels_that_the_test_split_has(go, home):
    last, _ = go("probe", "--out", str(home / "out/labels"))
    labels = {json.loads(line)["label"] for line in open(home / "clips/action_test.jsonl")}
    assert {name.removeprefix("top1_") for name in last if name.startswith("top1_")} == labels
    assert labels < {json.loads(line)["label"] for line in open(home / "clips/action_train.jsonl")}


@pytest.mark.parametrize("flags", [["mc"], ["retrieval"], ["retrieval", "--scoring", "joint"]])
def test_zero_shot_scores_the_pretrained_model_as_it_is(go, home, flags):
    (first, said), (second, _) = (go(*flags, "--zero-shot") for _ in range(2))
    assert first == second and first["step"] == 0
    assert Path(said.split("look at ")[1].split(";")[0]).exists(), "its picture"
    if flags == ["mc"]:             # the same as during pretraining
        model, wordpiece = pretrained(home)
        found = pretrain.score_choices(model, open_splits(home / "clips", "mc_caption")[0]["test"], wordpiece,
                                       CPU, most=None)
        assert first["top1"] == found["mc"]


def pretrained(home):
    checkpoint = torch.load(home / "runs/pretrain/best.pt", weights_only=True)
    model = EViLM(config_of(checkpoint))
    model.load_state_dict(checkpoint["model"])
    return model, WordPiece(checkpoint["vocab"])


def test_retrieval_ranks_a_video_once_however_many_captions_name_it(home, tmp_path):
    model, wordpiece = pretrained(home)
    lines = [json.loads(line) for line in open(home / "clips/test.jsonl")][:6]
    for line in lines:
        line["video"] = str(home / "clips" / line["video"])
    twice = lines + [line | {"caption": "another one"} for line in lines]
    for name, written in (("train", lines), ("test", lines), ("val", twice)):
        rows(tmp_path / f"{name}.jsonl", written)

    def fast(manifest):
        return finetune.score_fast_retrieval(FastRetrieval(model), manifest, wordpiece, CPU)

    def joint(manifest):
        return pretrain.score_retrieval(model, manifest, wordpiece, CPU, len(manifest))
    for score in (fast, joint):
        once, both = (score(open_split(tmp_path, name))[1] for name in ("test", "val"))
        assert len(once.rows) == 6 and len(both.rows) == 12 and once.names == both.names
        assert both.scores(11).shape == (6,), "of a caption and all videos"
        assert once.ranks.tolist() == both.ranks[:6].tolist() and max(both.ranks) <= 6


def test_a_task_can_begin_from_an_encoder_of_pictures(go, home):
    _, said = go("qa", "--init", "runs/encoder", "--lr", "1e-12", "--out", "pictures")
    assert "starts from runs/encoder/best.pt" in said
    begun, encoder = (torch.load(path, weights_only=True)["model"]
                      for path in (home / "pictures/last.pt", home / "runs/encoder/best.pt"))
    for name, weight in encoder.items():
        if name.startswith("video_encoder."):
            assert torch.allclose(begun[f"model.{name}"], weight, atol=1e-8)


@pytest.mark.parametrize("flags", [["qa"], ["probe"], ["retrieval"],
                                   ["mc", "--set", "action", "--mlm-first", "0.5"]])
def test_a_resumed_run_ends_with_the_same_weights(go, home, flags, monkeypatch):
    go(*flags, "--out", "whole")
    args = ["--out", "broken", "--save-every", "2"]
    optimise = finetune.Run.optimise

    def killed(run, losses):
        optimise(run, losses)
        if run.step == 3:
            raise ZeroDivisionError
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(finetune.Run, "optimise", killed)
        go(*flags, *args)
    go(*flags, *args, "--resume")
    one, two = (torch.load(home / name / "last.pt", weights_only=True)["model"]
                for name in ("whole", "broken"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    for name in ("whole", "broken"):
        shutil.rmtree(home / name)


@pytest.mark.parametrize("task", ["retrieval", *[pytest.param(task, marks=pytest.mark.slow) for task in (
    "qa", "mc --set action --mlm-first 0.5", "retrieval --scoring joint --batch-size 15")]])
def test_two_processes_train_to_the_weights_of_one(go, home, task):
    flags = [task.split()[0], "--batch-size", "16", *task.split()[1:]]
    go(*flags, "--out", f"one-{task}")
    done = run_twice(home, *flags, "--out", f"two-{task}")
    assert done.returncode == 0, done.stderr
    one, two = (torch.load(home / f"{name}-{task}/last.pt", weights_only=True)["model"]
                for name in ("one", "two"))
    assert_trained_alike(one, two)


@pytest.mark.slow
def test_contrast_over_processes_wants_equally_many_clips_of_each(go, home):
    done = run_twice(home, "retrieval", "--batch-size", "15", "--out", "uneven")
    assert "--batch-size 15" in done.stderr and "equally many" in done.stderr, done.stderr


def run_twice(home, *flags):
    """finetune.py in two processes."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=0",
                "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", finetune.__file__, *flags]
    flags = "--data clips --workers 0 --device cpu --max-steps 3".split()
    return subprocess.run([*torchrun, *flags], cwd=home, env={**os.environ, "OMP_NUM_THREADS": "1"},
                          timeout=200, capture_output=True, text=True)


def test_search_ranks_a_folder_and_computes_only_new_clips(go, home, capsys, monkeypatch):
    go("retrieval", "--out", "found")
    videos = home / "mine"
    (videos / "inside").mkdir(parents=True)
    for i, name in enumerate(["a.gif", "b.gif", "inside/c.gif"]):
        shutil.copy(home / f"clips/clips/{i:05d}.gif", videos / name)
    (videos / "broken.gif").write_bytes(b"GIF89a")
    Image.new("RGB", (8, 8)).save(videos / "inside/thumb.png")      # makes its folder no clip
    computed, embed = [], finetune.embed_clips
    monkeypatch.setattr(finetune, "embed_clips", lambda *a: computed.append(1) or embed(*a))

    def search():
        args = finetune.parse(["search", "a red circle", "--videos", "mine", "--init", "found", "--top", "2"])
        finetune.search(args, CPU)
        return capsys.readouterr().out
    first = search()
    assert len(computed) == 3 and (home / "search.png").exists()
    assert "broken.gif" in first and len([line for line in first.splitlines() if line.endswith(".gif")]) == 2
    shutil.copy(home / "clips/clips/00003.gif", videos / "d.gif")
    search()
    assert len(computed) == 4, "only the new clip"
    next(videos.glob(".vectors-*")).write_bytes(b"damaged")
    search()
    assert len(computed) == 8
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        def interrupted(*_):
            raise KeyboardInterrupt
        shutil.copy(home / "clips/clips/00004.gif", videos / "0.gif")           # comes first
        patch.setattr(finetune, "read_frames", interrupted)
        search()
    search()
    assert len(computed) == 9, "what was kept stays kept"


def test_ask_names_answers_with_probabilities(go, home, capsys):
    go("qa", "--out", "asked")
    args = finetune.parse(["ask", "clips/clips/00001.gif", "what colour is the circle?", "--init", "asked"])
    finetune.ask(args, CPU)
    shares = [float(line.split("%")[0]) for line in capsys.readouterr().out.splitlines()]
    assert len(shares) == 5 and sorted(shares, reverse=True) == shares and 0 < sum(shares) <= 100.3


# ---------------------------------------------------------------------------------------- what bad input gets


def test_a_task_refuses_what_it_cannot_use(go, home, tmp_path):
    for flags, told in ((["qa", "--init", "nowhere.pt"], "no such checkpoint"),
                        (["qa", "--preset", "paper"], "toy preset"),
                        (["qa", "--vocab", "vocab.txt"], "its own vocabulary"),
                        (["qa", "--config", "width=64"], "--config width=64"),
                        (["qa", "--config", "max_words=100"], "max_words=100: from 3 to 64"),
                        (["probe", "--accumulate", "2"], "--accumulate"),
                        (["probe", "--batch-size", "1"], "--batch-size"),
                        (["mc", "--set", "action", "--zero-shot"], "--zero-shot"),
                        (["retrieval", "--zero-shot", "--init", "none"], "--zero-shot"),
                        (["retrieval", "--zero-shot", "--init", "runs/encoder"], "knows no captions"),
                        (["retrieval", "--accumulate", "2"], "--accumulate")):
        with pytest.raises(InputError, match=told):
            go(*flags)
    with pytest.raises(DataError, match="mc_nothing"):
        go("mc", "--set", "nothing")


def test_bad_rows_are_named(go, home, tmp_path):
    splits, _ = open_splits(home / "clips", "qa")
    video = str(home / "clips" / splits["train"][0]["video"])
    for name, answer in (("train", "red"), ("val", "red"), ("test", "beige")):
        question = {"video": video, "question": "what colour?"}
        rows(tmp_path / f"qa_{name}.jsonl", [question | {"answer": answer}] * 3)
        rows(tmp_path / f"mc_four_{name}.jsonl", [question | {"answer": 0, "options": list("abcd")}])
        rows(tmp_path / f"mc_six_{name}.jsonl", [question | {"answer": 5, "options": list("abcde")}])
    with pytest.raises(DataError, match="none of its answers"):
        go("qa", data=str(tmp_path))
    with pytest.raises(DataError, match=r"mc_four_\w+.jsonl:1: has 4 options"):
        go("mc", "--set", "four", data=str(tmp_path))
    with pytest.raises(DataError, match=r"mc_six_train.jsonl:1"):
        go("mc", "--set", "six", data=str(tmp_path))


@pytest.mark.parametrize("flags, files", [(["qa", "--batch-size", "64"], "qa"), (["probe"], "action"),
                                          (["mc", "--set", "action"], "mc_action")])
def test_an_absent_video_is_counted_and_leaves_the_scores_alone(go, home, tmp_path, flags, files):
    splits, _ = open_splits(home / "clips", files)
    for name, manifest in splits.items():
        lines = [row | {"video": str(home / "clips" / row["video"])} for row in manifest]
        gone = [lines[0] | {"video": f"gone-{name}.gif"}] * (len(lines) // 2)
        rows(tmp_path / f"{files}_{name}.jsonl", lines + (gone if name != "train" else []))
    scores = {name: value for name, value in go(*flags, "--out", str(tmp_path / "whole"))[0].items()
              if name.startswith("top1")}
    last, said = go(*flags, "--out", str(tmp_path / "gone"), data=str(tmp_path))
    assert {name: value for name, value in last.items() if name.startswith("top1")} == pytest.approx(scores)
    assert "gone-val.gif" in said and "gone-test.gif" in said and "broken clips: 0" not in said
    rows(tmp_path / f"{files}_train.jsonl", lines + gone)
    if "probe" not in flags:
        _, said = go(*flags, "--out", str(tmp_path / "all"), data=str(tmp_path))
        assert "replaced: " in said and "gone-test.gif" in said and "broken clips: 0" not in said


def test_retrieval_names_an_absent_video_once_and_ranks_the_others(go, home, tmp_path):
    splits, _ = open_splits(home / "clips")
    for name, manifest in splits.items():
        lines = [row | {"video": str(home / "clips" / row["video"])} for row in manifest]
        rows(tmp_path / f"{name}.jsonl", lines + [lines[0] | {"video": "gone.gif"}] * (name == "val"))
    whole, _ = go("retrieval", "--out", str(tmp_path / "whole"), "--epochs", "2")
    last, said = go("retrieval", "--out", str(tmp_path / "gone"), "--epochs", "2", data=str(tmp_path))
    assert said.count("gone.gif") == 1 and "broken clips: 1" in said.splitlines()[-2]
    assert last == pytest.approx(whole)
    shutil.copy(tmp_path / "val.jsonl", tmp_path / "test.jsonl")
    for how in ([], ["--scoring", "joint"]):
        with pytest.raises(InputError, match="gone.gif.*--strict"):
            go("retrieval", *how, "--zero-shot", "--strict", data=str(tmp_path))


@pytest.mark.parametrize("typed, epochs, first, positions", [
    ("--set action", 12, 0.6, 3), ("--set mine", 12, 0.6, 3), ("--set caption", 2, 0, 1),
    ("--set transition", 6, 0.6, 10), ("--set transition --config video_positions=2", 6, 0.6, 2),
    ("--set transition --epochs 5 --mlm-first 0", 5, 0, 10), ("--set transition --preset paper", 20, 0, 1)])
def test_each_set_of_multiple_choice_has_its_settings_and_flags_win(typed, epochs, first, positions):
    args = finetune.parse(["mc", *typed.split()])
    assert finetune.settle(args, CPU) == f"mc_{args.set}"
    assert (args.epochs, args.mlm_first, configure(args).video_positions) == (epochs, first, positions)


def test_zero_shot_on_a_lone_file_of_captions_says_how_it_is_split(go, home, tmp_path):
    val = open_splits(home / "clips")[0]["val"]
    lines = [row | {"video": str(home / "clips" / row["video"])} for row in val]
    rows(tmp_path / "captions.jsonl", lines)
    _, said = go("retrieval", "--zero-shot", data=str(tmp_path))
    assert "captions.jsonl is split by video" in said


def test_without_one_readable_clip_nothing_is_scored(go, home, tmp_path):
    for name in ("train", "val", "test"):
        rows(tmp_path / f"{name}.jsonl", [{"video": "gone.gif", "caption": f"a {name}"}])
    with pytest.raises(DataError, match="none of its clips can be read"):
        go("retrieval", "--zero-shot", data=str(tmp_path))


def test_answers_may_be_numbers(go, home, tmp_path):
    splits, _ = open_splits(home / "clips", "qa")
    for name, manifest in splits.items():
        lines = [row | {"video": str(home / "clips" / row["video"]), "answer": i % 3}
                 for i, row in enumerate(manifest)]
        rows(tmp_path / f"qa_{name}.jsonl", lines)
    go("qa", "--out", str(tmp_path / "numbers"), data=str(tmp_path))
    answers = torch.load(tmp_path / "numbers/best.pt", weights_only=True)["answers"]
    assert sorted(answers) == ["0", "1", "2"]


def test_what_to_type_next_can_be_typed(go, home):
    for flags, task, init, out in (
            ("qa --out n1", "ask", "n1", None),
            ("qa --see text --out n2", "qa", "runs/pretrain/best.pt", "n2-seen"),
            ("retrieval --out n3", "search", "n3", "search.png"),
            ("retrieval --scoring joint --out n4", "mc", "n4", "runs/mc-caption-zero-shot"),
            ("probe --out n5", "probe", "none", "n5-from-nothing")):
        last = go(*flags.split())[1].splitlines()[-1]
        args = finetune.parse(shlex.split(last.removeprefix("next: python finetune.py").split("   ")[0]))
        assert (args.task, args.init, getattr(args, "out", None)) == (task, init, out)
        assert task in ("ask", "search") or args.data == "clips" and getattr(args, "see", "both") == "both"


def test_going_on_with_another_set_is_refused(go, home):
    go("mc", "--set", "action", "--out", "sets")
    for name in ("train", "val", "test"):
        shutil.copy(home / f"clips/mc_action_{name}.jsonl", home / f"clips/mc_other_{name}.jsonl")
    with pytest.raises(InputError, match="--set action, not other"):
        go("mc", "--set", "other", "--out", "sets", "--resume")


def test_a_model_that_saw_text_alone_is_not_asked_about_a_clip(go, home):
    go("qa", "--see", "text")
    assert (home / "runs/qa-text/best.pt").exists()
    args = finetune.parse(["ask", "clips/clips/00001.gif", "what colour?", "--init", "runs/qa-text"])
    with pytest.raises(InputError, match="never seen a video"):
        finetune.ask(args, CPU)
