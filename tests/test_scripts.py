"""The scripts as a user runs them: short runs, a kill midway, two processes, what bad input gets."""
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch

import toy_data
from plain import assert_trained_alike

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}        # the test machine's cores are shared by processes
QUICK = ("--batch-size", "16", "--workers", "0", "--device", "cpu")


def command(script, *flags):
    return [sys.executable, str(ROOT / script), *map(str, flags)]


def run(script, *flags, folder, expect=0):
    """The script in a process of its own, forked from this one, in which torch is loaded already."""
    with tempfile.TemporaryFile("w+") as said:
        child = os.fork()
        if not child:
            os.dup2(said.fileno(), 1)
            os.dup2(said.fileno(), 2)
            sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))
            signal.alarm(200)               # ends what hangs
            os._exit(status_of(script, flags, folder))
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        said.seek(0)
        said = said.read()
    assert status == expect, said
    return said


def status_of(script, flags, folder):
    """What a script's process would end with."""
    os.chdir(folder)
    sys.argv = command(script, *flags)[1:]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
        return 0
    except SystemExit as end:
        return end.code or 0
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A working folder with a small synthetic set, and a tokenizer trained on it for a moment."""
    folder = tmp_path_factory.mktemp("home")
    toy_data.render(folder / "clips", 150)
    run("train_tokenizer.py", "--data", "clips", "--max-steps", 6, *QUICK, folder=folder)
    return folder


@pytest.fixture(scope="module")
def unbroken(home):
    """A pretraining run of eight steps, and what it printed."""
    return home / "whole", run("pretrain.py", "--data", "clips", "--max-steps", 8, "--keep-at", "0.5",
                               "--codes", "kept", "--out", "whole", *QUICK, folder=home)


def weights(path):
    return torch.load(path, weights_only=True)["model"]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_short_tokenizer_run_leaves_what_the_readme_says(home):
    names = {path.name for path in (home / "runs/tokenizer").iterdir()}
    assert {"last.pt", "best.pt", "metrics.jsonl", "curves.png", "codebook.png"} <= names
    last = json.loads((home / "runs/tokenizer/metrics.jsonl").read_text().splitlines()[-1])
    assert last["split"] == "test" and 0 < last["codebook_usage"] <= 1 and last["codebook_perplexity"] >= 1


def test_a_short_pretraining_run_leaves_what_the_readme_says(unbroken):
    folder, said = unbroken
    names = {path.name for path in folder.iterdir()}
    assert {"last.pt", "best.pt", "at-0.5.pt", "metrics.jsonl", "curves.png", "masked.png",
            "retrieval.png"} <= names
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    wanted = "vtm mlm mlm_majority mvm mvm_majority mvm_mode mvm_copy mc r1 r5 r10 median_rank " \
             "codebook_usage codebook_perplexity".split()
    assert last["split"] == "test" and all(name in last for name in wanted)
    assert all(0 <= last[name] <= 1 for name in wanted if name not in ("median_rank", "codebook_perplexity"))
    assert "chance" in said and "next: python" in said


@pytest.mark.parametrize("workers", [0, 2])
def test_a_killed_run_resumes_to_the_same_weights(home, unbroken, workers):
    flags = ("--data", "clips", "--max-steps", 8, "--save-every", 2, "--out", f"killed{workers}", *QUICK)
    process = subprocess.Popen(command("pretrain.py", *flags), cwd=home, env=ENVIRONMENT,
                               stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    last = home / f"killed{workers}/last.pt"
    while not last.exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert torch.load(last, weights_only=True)["step"] < 8, "it was killed too late to show anything"
    run("pretrain.py", *flags[:-4], "--workers", workers, "--device", "cpu", "--resume", folder=home)
    assert same(weights(last), weights(unbroken[0] / "last.pt"))
    lines = [[json.loads(line) for line in open(folder / "metrics.jsonl")]
             for folder in (last.parent, unbroken[0])]
    assert lines[0] == lines[1]


def test_a_killed_tokenizer_run_resumes_to_the_same_weights(home):
    flags = ("--data", "clips", "--max-steps", 6, "--revive-after", 1, "--warm", 0.2, *QUICK)
    run("train_tokenizer.py", *flags, "--out", "t/whole", folder=home)
    process = subprocess.Popen(command("train_tokenizer.py", *flags, "--save-every", 2, "--out", "t/killed"),
                               cwd=home, env=ENVIRONMENT, stderr=subprocess.DEVNULL,
                               stdout=subprocess.DEVNULL)
    last = home / "t/killed/last.pt"
    while not last.exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    run("train_tokenizer.py", *flags, "--out", "t/killed", "--resume", folder=home)
    assert same(weights(last), weights(home / "t/whole/last.pt"))


def test_the_encoder_learns_from_pictures_and_pretraining_starts_there(home, unbroken):
    names = {path.name for path in (home / "runs/encoder").iterdir()}
    assert {"last.pt", "best.pt", "metrics.jsonl", "curves.png"} <= names
    last = json.loads((home / "runs/encoder/metrics.jsonl").read_text().splitlines()[-1])
    assert last["split"] == "test" and all(0 <= last[kind] <= 1 for kind in
                                           ("colour", "shape", "size", "background"))
    run("pretrain.py", "--data", "clips", "--max-steps", 1, "--lr", 1e-12, "--out", "begun", *QUICK,
        folder=home)
    begun, encoder = weights(home / "begun/last.pt"), weights(home / "runs/encoder/best.pt")
    assert all(torch.allclose(begun[name], weight, atol=1e-8) for name, weight in encoder.items()
               if name.startswith("video_encoder."))


def test_an_encoder_that_was_broken_off_is_trained_to_its_end_first(home):
    flags = ("--data", "clips", "--init-video", "half", *QUICK)
    process = subprocess.Popen(command("pretrain.py", *flags, "--max-steps", 300, "--save-every", 2, "--out",
                                       "unused"), cwd=home, env=ENVIRONMENT, stderr=subprocess.DEVNULL,
                               stdout=subprocess.DEVNULL)
    last = home / "half/last.pt"
    while not (last.exists() and (home / "half/best.pt").exists()):         # the first evaluation leaves both
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert not (home / "unused").exists()
    step = torch.load(last, weights_only=True)["step"]
    said = run("pretrain.py", *flags, "--max-steps", step + 2, "--out", "whole-of-it", folder=home)
    assert "no trained encoder in half" in said and f"going on from half/last.pt at step {step}" in said
    assert "starts from half/best.pt" in said


def test_pictures_need_tags(home, tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((4, 64, 64, 3), np.uint8))
    row = json.dumps({"video": "a.npy", "caption": "a clip"}) + "\n"
    for name in ("train", "val", "test"):
        (tmp_path / f"{name}.jsonl").write_text(row)
    said = run("train_encoder.py", "--data", tmp_path, *QUICK, folder=home, expect=2)
    assert '"shows"' in said and "Traceback" not in said


def test_an_encoder_of_other_sizes_is_refused(home, unbroken):
    said = run("pretrain.py", "--data", "clips", "--config", "dims=8,16,32,64", "--init-video",
               "runs/encoder", "--out", "bad", *QUICK, folder=home, expect=2)
    assert "other sizes" in said and "Traceback" not in said


def test_ctrl_c_saves_and_says_how_to_go_on(home):
    process = subprocess.Popen(command("pretrain.py", "--data", "clips", "--max-steps", 500, "--out",
                                       "stopped", *QUICK), cwd=home, env=ENVIRONMENT,
                               stderr=subprocess.STDOUT, stdout=subprocess.PIPE, text=True)
    while not (home / "stopped/metrics.jsonl").exists():
        time.sleep(0.05)
    time.sleep(2)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "--resume" in said and "Traceback" not in said
    assert torch.load(home / "stopped/last.pt", weights_only=True)["step"] > 0


def test_two_processes_train_to_the_weights_of_one(home, unbroken):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=0",
                "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    flags = ("--data", "clips", "--max-steps", "8", "--out", "two", *QUICK)
    done = subprocess.run([*torchrun, *command("pretrain.py", *flags)[1:]], cwd=home, env=ENVIRONMENT,
                          timeout=200, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    one, two = weights(unbroken[0] / "last.pt"), weights(home / "two/last.pt")
    assert_trained_alike(one, two)      # the toy preset has no dropout


def test_accumulation_changes_no_result(home, unbroken):
    run("pretrain.py", "--data", "clips", "--max-steps", 8, "--accumulate", 3, "--out", "parts", *QUICK,
        folder=home)
    one, parts = weights(unbroken[0] / "last.pt"), weights(home / "parts/last.pt")
    for name in one:
        torch.testing.assert_close(parts[name], one[name], rtol=1e-3, atol=2e-4)


def test_kept_codes_are_the_online_codes(home, unbroken):
    run("pretrain.py", "--data", "clips", "--max-steps", 8, "--codes", "online", "--out", "online", *QUICK,
        folder=home)
    kept, online = ([json.loads(line) for line in open(folder / "metrics.jsonl")]
                    for folder in (unbroken[0], home / "online"))
    assert kept[0]["loss_mvm"] == pytest.approx(online[0]["loss_mvm"], rel=1e-3)


def test_an_older_run_is_moved_aside_not_overwritten(home):
    flags = ("--data", "clips", "--max-steps", 1, "--tokenizer", "none", "--out", "again", *QUICK)
    run("pretrain.py", *flags, folder=home)
    before = weights(home / "again/last.pt")
    said = run("pretrain.py", *flags, "--seed", 1, folder=home)
    assert "moved to again.1" in said and same(before, weights(home / "again.1/last.pt"))


@pytest.mark.parametrize("objectives", ["vtm", "mlm", "mvm", "vtm,mlm"])
def test_each_objective_can_be_trained_alone(home, objectives):
    out = "only-" + objectives.replace(",", "-")
    run("pretrain.py", "--data", "clips", "--max-steps", 2, "--objectives", objectives, "--out", out, *QUICK,
        folder=home)
    last = json.loads((home / out / "metrics.jsonl").read_text().splitlines()[-1])
    for name in ("vtm", "mlm", "mvm"):
        assert (name in last) == (name in objectives)


def test_mvm_can_mask_without_predicting(home, unbroken):
    heads = {}
    for weight in ("0", "1"):
        run("pretrain.py", "--data", "clips", "--max-steps", 2, "--tokenizer", "runs/tokenizer", "--config",
            f"mvm_weight={weight}", "--out", f"weight-{weight}", *QUICK, folder=home)
        heads[weight] = weights(home / f"weight-{weight}/last.pt")["mvm_head.3.bias"]
    assert not heads["0"].any() and heads["1"].any(), "a bias begins at 0 and has no decay"


# -------------------------------------------------------------------------------------------------- bad input

BAD = {
    "no such folder": (("--data", "nowhere"), "nowhere"),
    "no such preset": (("--preset", "huge"), "huge"),
    "no such objective": (("--objectives", "vtm,xyz"), "--objectives"),
    "tokenizer is no checkpoint": (("--tokenizer", "clips/train.jsonl.pt"), "train.jsonl.pt"),
    "nothing to resume": (("--resume", "--out", "never"), "never/last.pt"),
    "kept codes of another kind of checkpoint": (("--tokenizer", "whole/best.pt"), "tokenizer"),
    "vocabulary is not there": (("--vocab", "nowhere.txt"), "nowhere.txt"),
    "share is no number": (("--keep-at", "half"), "--keep-at"),
    "a field that has a flag": (("--config", "batch_size=8"), "--batch-size"),
    "a field that follows from the words": (("--config", "words=8"), "vocab_rows"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_ends_in_one_line_and_status_2(home, unbroken, name):
    flags, named = BAD[name]
    out = () if "--out" in flags else ("--out", "bad")
    flags = flags if "--data" in flags else (*flags, "--data", "clips")
    said = run("pretrain.py", *flags, *out, "--max-steps", 1, *QUICK, folder=home, expect=2)
    errors = [line for line in said.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and named in errors[0] and "Traceback" not in said
    assert not (home / "bad").exists()


def asked(answer="red", options=list("abcde"), place=0):
    """The files of a set of questions on one clip, {name: its only row}."""
    row = {"video": "clips/00000.gif", "question": "what colour?"}
    return {"qa": row | {"answer": answer}, "mc_mine": row | {"options": options, "answer": place}}


BAD_TASKS = {
    "answers that training has not": ("qa", {"train": asked(), "val": asked(), "test": asked("beige")},
                                      "qa_test.jsonl: none of its answers"),
    "the same of val": ("qa", {"train": asked(), "val": asked("beige"), "test": asked()},
                        "qa_val.jsonl: none of its answers"),
    "four options": ("mc --set mine", {"train": asked(options=list("abcd"))}, "mc_mine_train.jsonl:1"),
    "an answer out of range": ("mc --set mine", {"val": asked(place=5)}, "mc_mine_val.jsonl:1"),
    "a model of the toy preset": ("qa --preset paper --init whole", {}, "--init whole"),
    "no such model": ("qa --init nowhere", {}, "nowhere"),
    "no such folder of clips": ("search anything --videos nowhere --init whole", None, "whole"),
}


@pytest.mark.parametrize("name", BAD_TASKS)
def test_a_task_ends_bad_input_in_one_line_and_status_2(home, unbroken, tmp_path, name):
    task, splits, named = BAD_TASKS[name]
    flags = task.split()
    if splits is not None:
        for split in ("train", "val", "test"):
            for files, row in splits.get(split, asked()).items():
                (tmp_path / f"{files}_{split}.jsonl").write_text(json.dumps(row) + "\n")
        (tmp_path / "clips").symlink_to(home / "clips/clips")
        flags += ["--data", tmp_path, "--out", "bad", *QUICK, *["--init", "whole"] * ("--init" not in flags)]
    said = run("finetune.py", *flags, folder=home, expect=2)
    errors = [line for line in said.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and named in errors[0] and "Traceback" not in said
    assert not (home / "bad").exists() and not (home / "search.png").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_where_there_is_none(home):
    assert "--device cuda" in run("pretrain.py", "--device", "cuda", folder=home, expect=2)


def test_flags_are_never_abbreviated(home):
    assert "unrecognized arguments: --max" in run("pretrain.py", "--max", "3", folder=home, expect=2)


def test_a_bad_line_is_named(home, tmp_path):
    (tmp_path / "train.jsonl").write_text('{"video": "a.gif", "caption": "a"}\n{"video": "b.gif"}\n')
    said = run("train_tokenizer.py", "--data", tmp_path, "--out", "bad", *QUICK, folder=home, expect=2)
    assert "train.jsonl:2" in said and "Traceback" not in said


def test_a_tokenizer_of_other_words_is_refused(home):
    toy_data.render(home / "other", 45, seed=9)
    said = run("pretrain.py", "--data", "other", "--out", "bad", *QUICK, folder=home, expect=2)
    assert "another vocabulary" in said


def test_resuming_with_other_flags_is_refused(home, unbroken):
    said = run("pretrain.py", "--data", "clips", "--max-steps", 8, "--seed", 5, "--out", "whole", "--resume",
               *QUICK, folder=home, expect=2)
    assert "--seed" in said


def test_a_broken_clip_is_named_once_replaced_and_counted(home, tmp_path):
    frames = np.random.default_rng(0).integers(0, 255, (6, 4, 64, 64, 3), np.uint8)
    rows = [{"video": f"{i}.npy", "caption": f"clip number {i}"} for i in range(6)]
    for row, clip in zip(rows, frames):
        np.save(tmp_path / row["video"], clip)
    (tmp_path / "3.npy").write_bytes(b"\x93NUMPY cut off")
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("val", "test"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:2]))
    flags = ("--data", tmp_path, "--max-steps", 3, *QUICK)
    said = run("train_tokenizer.py", *flags, "--out", "broken", folder=home)
    assert said.count("broken clip, replaced") == 1 and "broken clips: 1" in said and "3.npy" in said
    said = run("train_tokenizer.py", *flags, "--strict", "--out", "strict", folder=home, expect=2)
    assert "3.npy" in said and "Traceback" not in said


def test_a_loss_that_is_not_finite_stops_the_run(home):
    said = run("train_tokenizer.py", "--data", "clips", "--max-steps", 6, "--lr", 1e30, "--out", "wild",
               *QUICK, folder=home, expect=2)
    assert "not finite at step" in said and "Traceback" not in said
