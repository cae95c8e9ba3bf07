"""The scripts as a user runs them: short runs, a kill and a stop midway, two processes, bad input."""
import json
import multiprocessing
import os
import runpy
import signal
import socket
import sys
import tempfile
import time
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch
import torch._dynamo            # loaded here once; each process below would load it again

import evilm
import toy_data
from evilm import read_metrics as metrics
from plain import assert_trained_alike

ROOT = Path(__file__).resolve().parents[1]
CLIPS = ("--data", "clips", "--batch-size", "16", "--workers", "0", "--device", "cpu")
SMALL = [word for field in ("frames=2", "size=64", "dims=8,16,24,32", "depths=1,1,1,1", "text_width=32",
                            "text_layers=1", "width=24", "decoder_layers=1", "vit_width=24", "vit_layers=1",
                            "codes=32", "tokenizer_width=24", "tokenizer_layers=1", "epochs=9",
                            "tokenizer_epochs=9") for word in ("--config", field)]
# The tokenizer learns noise here: equal patches make equal codes, between which rounding would decide.
STAGES = {"pretrain.py": (*CLIPS, *SMALL, "--max-steps", 8, "--save-every", 2),
          "train_tokenizer.py": (*CLIPS, "--data", "noise", *SMALL, "--max-steps", 6, "--save-every", 2,
                                 "--revive-after", 2, "--warm", 0.2)}
UNBROKEN = {"pretrain.py": "whole", "train_tokenizer.py": "noise-whole"}


def start(script, *flags, folder, hook=None, **environment):
    """A script in a process of its own, forked from this one, where torch is loaded -> (its id, its output).
    `hook` is called in it first."""
    output = tempfile.TemporaryFile("w+")
    child = os.fork()
    if child:
        return child, output
    status = 1
    try:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
        sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))
        signal.alarm(120)               # ends what hangs
        os.setsid()                     # Ctrl-C reaches a script and its workers alone
        os.environ.update({name: str(value) for name, value in environment.items()})
        os.chdir(folder)
        sys.argv = [str(ROOT / script), *map(str, flags)]
        if hook:
            hook()
        runpy.run_path(sys.argv[0], run_name="__main__")
        status = 0
    except SystemExit as end:
        status = end.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


def end(process):
    """(exit status, output) of a process that `start` gave; minus the signal if one ended it."""
    status = os.waitstatus_to_exitcode(os.waitpid(process[0], 0)[1])
    process[1].seek(0)
    return status, process[1].read()


def run(script, *flags, folder, expect=0, hook=None):
    status, output = end(start(script, *flags, folder=folder, hook=hook))
    assert status == expect and "Traceback" not in output, output
    return output


def start_two(script, *flags, folder, hook=None):
    """Two processes of a run, as torchrun starts them."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    return [start(script, *flags, folder=folder, hook=hook, RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=2,
                  LOCAL_WORLD_SIZE=2, MASTER_ADDR="localhost", MASTER_PORT=port) for rank in range(2)]


def after_step(step, act):
    """A hook: act(run) after a step of the run."""
    def hook():
        optimise = evilm.Run.optimise

        def optimise_and_act(run, loss):
            optimise(run, loss)
            if run.step == step:
                act(run)
        evilm.Run.optimise = optimise_and_act
    return hook


def send(number, rank=0):
    """What `after_step` does: the process of that rank, and its workers, get a signal."""
    return lambda run: run.machine.rank == rank and os.killpg(0, number)


def train_only():
    """A hook: the script ends before the final evaluation and the pictures."""
    evilm.Run.report_speed = lambda run: sys.exit()


def weights(folder, name="last"):
    return torch.load(folder / f"{name}.pt", weights_only=True)["model"]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def write_set(folder, captions):
    """A folder of clips of noise; the first two are the val and the test split as well."""
    folder.mkdir()
    rows = [{"video": f"{i}.npy", "caption": caption} for i, caption in enumerate(captions)]
    for i, row in enumerate(rows):
        np.save(folder / row["video"], np.random.default_rng(i).integers(0, 255, (4, 64, 64, 3), np.uint8))
    for name, some in (("train", rows), ("val", rows[:2]), ("test", rows[:2])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A working folder with a small synthetic set, and a tokenizer trained on it for a moment."""
    folder = tmp_path_factory.mktemp("home")
    toy_data.render(folder / "clips", 80)
    write_set(folder / "noise", [f"clip number {i}" for i in range(48)])
    run("train_tokenizer.py", *CLIPS, *SMALL, "--max-steps", 6, folder=folder)
    return folder


@pytest.fixture(scope="module")
def whole(home):
    """An unbroken run of both stages, in the folders UNBROKEN; what pretrain.py printed."""
    run("train_tokenizer.py", *STAGES["train_tokenizer.py"], "--out", "noise-whole", folder=home)
    return run("pretrain.py", *STAGES["pretrain.py"], "--keep-at", 0.5, "--out", "whole", folder=home)


# ------------------------------------------------------------------------------------------ what a run leaves

def test_short_runs_leave_what_the_readme_says(home, whole):
    for folder, names in ((home / "runs/tokenizer", ["codebook.png"]),
                          (home / "whole", ["at-0.5.pt", "masked.png", "retrieval.png"])):
        found = {path.name for path in folder.iterdir()}
        assert {"last.pt", "best.pt", "metrics.jsonl", "curves.png", *names} <= found
    for last in (metrics(home / "runs/tokenizer")[-1], metrics(home / "whole")[-1]):
        assert last["split"] == "test" and 0 < last["codebook_usage"] <= 1 <= last["codebook_perplexity"]
    assert last["median_rank"] >= 1 and all(0 <= last[name] <= 1 for name in (
        "vtm mlm mlm_majority mlm_other mvm mvm_majority mvm_mode mvm_copy mc r1 r5 r10".split()))
    for line in ("masking 2 of 4 patches a frame (50%)", "chance 50%", "next: the same command"):
        assert line in whole


@pytest.mark.parametrize("objectives", ["vtm", "mlm", "mvm"])
def test_each_objective_can_be_trained_alone(home, objectives):
    run("pretrain.py", *CLIPS, *SMALL, "--max-steps", 1, "--objectives", objectives, "--out",
        f"only-{objectives}", folder=home)
    for line in metrics(home / f"only-{objectives}"):
        assert [name for name in ("vtm", "mlm", "mvm") if name in line] == [objectives]
        assert ("mc" in line) == any(name.startswith("mc_") for name in line) == (objectives == "vtm")


def test_mvm_can_mask_without_predicting(home, whole):
    run("pretrain.py", *STAGES["pretrain.py"], "--max-steps", 2, "--config", "mvm_weight=0.0", "--out",
        "weight-0", folder=home, hook=train_only)
    biases = [weights(home / out)["mvm_head.3.bias"] for out in ("weight-0", "whole")]
    assert not biases[0].any() and biases[1].any(), "a bias begins at 0 and has no decay"


def test_an_older_run_is_moved_aside_not_overwritten(home):
    flags = ("train_tokenizer.py", *CLIPS, *SMALL, "--max-steps", 1, "--out", "again")
    run(*flags, folder=home, hook=train_only)
    before = weights(home / "again")
    assert "is now again.1" in run(*flags, "--seed", 1, folder=home, hook=train_only)
    assert same(before, weights(home / "again.1")) and not same(before, weights(home / "again"))


def test_pretraining_trains_a_missing_tokenizer_first_and_finishes_one_that_was_stopped(home):
    flags = (*CLIPS, *SMALL, "--max-steps", 3, "--tokenizer", "made", "--out", "after")
    output = run("pretrain.py", *flags, folder=home, expect=130, hook=after_step(2, send(signal.SIGINT)))
    assert "no tokenizer in made" in output and not (home / "after").exists()
    assert "going on from made/last.pt at step 2" in run("pretrain.py", *flags, "--resume", folder=home)
    assert metrics(home / "made")[-1]["split"] == metrics(home / "after")[-1]["split"] == "test"
    output = run("pretrain.py", *flags, "--max-steps", 1, folder=home, hook=train_only)
    assert "it was cut short by --max-steps 3" in output


# ---------------------------------------------------------------------------- kills, stops, several processes

@pytest.mark.parametrize("script, workers, number, status", [
    ("pretrain.py", 0, signal.SIGKILL, -9), ("pretrain.py", 2, signal.SIGINT, 130),
    ("train_tokenizer.py", 2, signal.SIGKILL, -9), ("train_tokenizer.py", 0, signal.SIGTERM, 143)])
def test_a_killed_or_stopped_run_resumes_to_the_same_weights(home, script, workers, number, status):
    flags, unbroken = (*STAGES[script], "--config", "dropout=0.1"), home / f"dropout-{script}"
    if not unbroken.exists():
        run(script, *flags, "--out", unbroken.name, folder=home, hook=train_only)
    flags = (*flags, "--workers", workers, "--out", f"{script}-{status}")
    output = run(script, *flags, folder=home, expect=status, hook=after_step(5, send(number)))
    stopped, kept = home / f"{script}-{status}", 4 if number == signal.SIGKILL else 5
    assert torch.load(stopped / "last.pt", weights_only=True)["step"] == kept
    assert ("stopped at step 5, saved; --resume goes on" in output) == (kept == 5)
    run(script, *flags, "--resume", folder=home, hook=train_only)
    assert all(same(weights(stopped, name), weights(unbroken, name)) for name in ("last", "best"))
    assert metrics(stopped) == metrics(unbroken)


@pytest.mark.parametrize("script", STAGES)
def test_two_processes_stopped_once_train_to_the_weights_of_one(home, whole, script):
    flags = (*STAGES[script], "--out", f"two-{script}")
    for process in start_two(script, *flags, folder=home, hook=after_step(3, send(signal.SIGTERM, rank=1))):
        assert end(process)[0] == 143
    for process in start_two(script, *flags, "--resume", folder=home, hook=train_only):
        assert end(process)[0] == 0
    one, two = home / UNBROKEN[script], home / f"two-{script}"
    assert_trained_alike(weights(one), weights(two))
    losses = [{name: x for name, x in metrics(folder)[0].items() if "loss" in name} for folder in (one, two)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3) and losses[0]


@pytest.mark.parametrize("script, flag, value", [
    ("pretrain.py", "--accumulate", 4), ("train_tokenizer.py", "--accumulate", 4),
    ("pretrain.py", "--codes", "offline")])
def test_accumulation_and_offline_codes_train_to_the_same_weights(home, whole, script, flag, value):
    out = f"{script}{flag}"
    run(script, *STAGES[script], flag, value, "--out", out, folder=home, hook=train_only)
    assert_trained_alike(weights(home / UNBROKEN[script]), weights(home / out))


def test_the_codebook_starts_at_the_encoder_outputs_of_all_processes(home):
    flags = (*CLIPS, *SMALL, "--config", "codes=100", "--max-steps", 2, "--warm", 0.5, "--lr", 0)
    run("train_tokenizer.py", *flags, "--out", "warm-one", folder=home, hook=train_only)
    for process in start_two("train_tokenizer.py", *flags, "--out", "warm-two", folder=home, hook=train_only):
        assert end(process)[0] == 0
    one, two = (weights(home / out)["quantizer.codebook"] for out in ("warm-one", "warm-two"))
    torch.testing.assert_close(two, one, rtol=1e-5, atol=1e-6)      # of 128 vectors, 64 a process
    torch.testing.assert_close(one.norm(dim=1), torch.ones(100))    # the outputs are normalised
    assert len(one.unique(dim=0)) > 90, "without replacement; equal patches have equal outputs"


def test_a_random_codebook_is_not_overwritten_where_no_warm_up_is_asked_for(home):
    run("train_tokenizer.py", *CLIPS, *SMALL, "--max-steps", 1, "--warm", 0, "--lr", 1e-3, "--out", "cold",
        folder=home, hook=train_only)
    checkpoint = torch.load(home / "cold/last.pt", weights_only=True)
    torch.manual_seed(0)
    initial = evilm.SemanticTokenizer(evilm.Config(**checkpoint["config"])).quantizer.codebook
    moved = (checkpoint["model"]["quantizer.codebook"] - initial).abs().max()
    assert 0 < moved < 1.1e-3, "AdamW's first step moves a weight by the rate at most, and by its decay"


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_run_whose_peer_was_killed_ends_in_one_line_and_resumes(home, whole, rank):
    flags = (*STAGES["pretrain.py"], "--out", f"orphan-{rank}")
    processes = start_two("pretrain.py", *flags, folder=home, hook=after_step(5, send(signal.SIGKILL, rank)))
    assert end(processes[rank])[0] == -signal.SIGKILL
    killed = time.monotonic()
    status, output = end(processes[1 - rank])       # `start` ends it after two minutes, by another status
    assert status == 1 and output.count("error:") == 1 and "Traceback" not in output, output
    assert time.monotonic() - killed < 60
    for process in start_two("pretrain.py", *flags, "--resume", folder=home, hook=train_only):
        assert end(process)[0] == 0
    assert_trained_alike(weights(home / "whole"), weights(home / f"orphan-{rank}"))


def test_a_run_whose_worker_was_killed_ends_in_one_line(home):
    def kill_a_worker(run):
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
    output = run("pretrain.py", *STAGES["pretrain.py"], "--workers", 2, "--out", "worker", folder=home,
                 expect=1, hook=after_step(3, kill_a_worker))
    assert "error: a worker of the loader is gone" in output and output.count("error:") == 1


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_older_checkpoint(home):
    def spoil(run):
        run.loss = run.loss * torch.nan
    output = run("train_tokenizer.py", *STAGES["train_tokenizer.py"], "--out", "wild", folder=home, expect=2,
                 hook=after_step(4, spoil))
    assert "error: the loss is not finite at step 4" in output
    assert torch.load(home / "wild/last.pt", weights_only=True)["step"] == 2


def test_a_broken_clip_is_named_once_replaced_and_counted(tmp_path):
    write_set(tmp_path / "mine", [f"clip number {i}" for i in range(6)])
    (tmp_path / "mine/3.npy").write_bytes(b"\x93NUMPY cut off")
    flags = ("--data", "mine", "--max-steps", 3, "--workers", 0, "--device", "cpu", *SMALL)
    output = run("train_tokenizer.py", *flags, "--out", "broken", folder=tmp_path)
    assert output.count("broken clip, replaced") == 1 and "broken clips: 1" in output and "3.npy" in output
    assert "3.npy" in refused(tmp_path, "train_tokenizer.py", *flags, "--strict")


def test_the_paper_preset_without_published_weights_warns(home):
    output = run("train_tokenizer.py", *CLIPS, *SMALL, "--preset", "paper", "--max-steps", 1, "--out",
                 "paper", folder=home, hook=train_only)
    assert "without --init-tokenizer FILE" in output and "collapse" in output


# -------------------------------------------------------------------------------------------------- bad input

BAD = {     # the command, and what the line names
    "train_tokenizer.py --target pixels --loss bce": "--loss",
    "train_tokenizer.py --target pixels --word-weight 3": "--word-weight",
    "train_tokenizer.py --freeze-encoder": "--init-tokenizer",
    "pretrain.py --data nowhere": "nowhere", "pretrain.py --data clips/train.jsonl": "is a file",
    "pretrain.py --data line-2": "train.jsonl:2", "pretrain.py --data marks": "hold no words",
    "pretrain.py --preset paper --tokenizer absent": "train_tokenizer.py --preset paper --init-tokenizer",
    "pretrain.py --objectives vtm,xyz": "vtm,xyz",
    "pretrain.py --tokenizer none --objectives mvm": "--tokenizer none",
    "pretrain.py --tokenizer clips/train.jsonl": "train.jsonl: not a checkpoint",
    "pretrain.py --tokenizer whole/best.pt": "'pretrain'", "pretrain.py --data other": "another vocabulary",
    "pretrain.py --resume --out never": "never/last.pt",
    "pretrain.py --resume --out whole --seed 5": "another seed (0, now 5)",
    "pretrain.py --resume --out whole --max-steps 7": "another max_steps",
    "pretrain.py --vocab nowhere.txt": "nowhere.txt", "pretrain.py --vocab specials.txt": "no word",
    "pretrain.py --config mask_ratio=0.1": "masks 0 of 4 patches a frame",
    "pretrain.py --config mask_ratio=0.9": "masks 4 of 4 patches a frame",
    "pretrain.py --config codes=128": "another codes",
    "pretrain.py --codes offline --config augment=True": "frames without augmentation",
    "pretrain.py --accumulate 3": "16 clips cannot be divided",
    "pretrain.py --init-video nowhere.pth": "nowhere.pth",
    "pretrain.py --init-text clips/train.jsonl": "--vocab",
    "finetune.py qa --init whole --data beige-test": "qa_test.jsonl",
    "finetune.py qa --init whole --data beige-val": "qa_val.jsonl",
    "finetune.py qa --data clips --init nowhere": "nowhere/best.pt: there is no such file",
    "finetune.py search red --init whole --videos nowhere": "nowhere"}


@pytest.fixture(scope="module")
def bad(home, whole):
    """The working folder with sets in it that cannot be used."""
    for beige in ("val", "test"):
        (home / f"beige-{beige}").mkdir()
        for split in ("train", "val", "test"):
            row = {"video": "a.gif", "question": "what?", "answer": "beige" if split == beige else "red"}
            (home / f"beige-{beige}/qa_{split}.jsonl").write_text(json.dumps(row) + "\n")
    write_set(home / "other", [f"clip number {i}" for i in range(6)])
    write_set(home / "marks", ["\u0301" * (i + 1) for i in range(6)])
    write_set(home / "line-2", [f"clip number {i}" for i in range(6)])
    (home / "line-2/train.jsonl").write_text('{"video": "0.npy", "caption": "a"}\n{"video": "1.npy"}\n')
    (home / "specials.txt").write_text("\n".join(evilm.SPECIAL))
    return home


def refused(folder, script, *flags):
    """The one line with which a script ends at bad input, status 2; it leaves no folder for the run."""
    output = run(script, *flags, *["--out", "bad"] * ("--out" not in flags), folder=folder, expect=2)
    last = output.splitlines()[-1]
    assert last.startswith("error:") and output.count("error:") == 1, output
    assert not (folder / "bad").exists() and not (folder / "search.png").exists()
    return last


@pytest.mark.parametrize("command", BAD)
def test_bad_input_ends_in_one_line_and_status_2(bad, command):
    script, *flags = command.split()
    assert BAD[command] in refused(bad, script, *STAGES.get(script, ()), *flags)
