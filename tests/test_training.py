"""What the scripts share: flags, schedule, decay, checkpoints, workers, processes, exit statuses."""
import errno
import math
import os
import pickle
import signal
import time
from argparse import Namespace
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

import pretrain
import train_tokenizer
from evilm import (Config, EViLM, InputError, Machine, Run, SemanticTokenizer, WordPiece, configure, fill,
                   learning_rate, load, make_optimizer, pretraining_loss, read_metrics, run_script, save,
                   set_up)
from toy_data import Batches, ClipCaptions, Manifest, make_loader, render

CPU = Machine(torch.device("cpu"))

# -------------------------------------------------------------------------------------------- flags, statuses

@pytest.mark.parametrize("change, named", [
    ("frames=0", "like frames=4"), ("negatives=0", "like negatives=1"), ("dims=8,16", r"like dims=\("),
    ("tokenizer_revive=-1", "like tokenizer_revive=20"), ("mask_ratio=nan", "like mask_ratio=0.4"),
    ("mask_ratio=80", "0 to 1"), ("dropout=2", "0 to 1"), ("frames=two", "like frames=4"),
    ("blocks=1", "like blocks=True"), ("dims=8,16,32,0", r"like dims=\("), ("size=70", "multiple of 32"),
    ("decoder_heads=5", "5 heads must divide a width of 96"), ("xca_heads=3", "must divide the 16 channels"),
    ("max_words=2", "3 to positions"), ("max_words=65", "3 to positions"), ("no_field=1", "no such field"),
    ("vocab_size=9", "no such field"), ("preset=paper", "no such field")])
def test_a_field_that_no_model_can_have_is_refused(change, named):
    with pytest.raises(InputError, match=rf"--config {change}: .*{named}"):
        configure(Config.toy(), Namespace(config=[change]))


@pytest.mark.parametrize("flag, value, named", [
    ("--lr", "nan", "nan"), ("--lr", "-1", "-1"), ("--workers", "-1", "-1"), ("--epochs", "0", "0"),
    ("--batch-size", "-3", "-3"), ("--accumulate", "0", "0"), ("--max-steps", "0", "0"),
    ("--seed", "-1", "-1"), ("--seed", str(2 ** 64), str(2 ** 64)), ("--keep-at", "nan", "nan"),
    ("--keep-at", "half", "half"), ("--keep-at", "1.5", "1.5"), ("--preset", "huge", "huge"),
    ("--max", "3", "unrecognized"), ("--mask-ratio", "0.8", "--config mask_ratio=")])
def test_a_flag_out_of_range_or_place_is_refused_in_one_line(flag, value, named, capsys):
    with pytest.raises(SystemExit) as end:
        pretrain.parse([flag, value])
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
    assert flag in error and named in error


@pytest.mark.parametrize("error, status, line", [
    (InputError("a.jsonl:3: not JSON"), 2, "error: a.jsonl:3: not JSON"),
    (LookupError("no clips"), 2, "error: no clips"),
    (OSError(errno.ENOSPC, "No space left on device"), 2, "No space left on device; older files are whole"),
    (NotADirectoryError(errno.ENOTDIR, "Not a directory", "file/run"), 2, "error: file/run: Not a directory"),
    (RuntimeError("[gloo] Connection closed by peer. It\nis gone"), 1, "error: another process of this run"),
    (ConnectionResetError(errno.ECONNRESET, "Reset by peer"), 1, "error: a worker of the loader is gone"),
    (KeyboardInterrupt(), 130, "interrupted")])
def test_run_script_ends_in_one_line_and_its_status(error, status, line, capsys, monkeypatch):
    monkeypatch.setattr(dist, "is_initialized", lambda: status == 1)
    with pytest.raises(SystemExit) as end:
        run_script(mock.Mock(side_effect=error), LookupError)
    out, err = capsys.readouterr()
    assert end.value.code == status and line in err and err.count("\n") == 1 and not out


def test_run_script_hides_no_mistake_of_ours():
    in_worker = RuntimeError("Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback")
    worker = multiprocessing.Process(target=time.sleep, args=(60,))
    worker.start()
    for error in (ValueError("ours"), RuntimeError("gloo, alone"), LookupError("not listed"), in_worker):
        with pytest.raises(type(error)):
            run_script(mock.Mock(side_effect=error))
    worker.join(10)
    assert worker.exitcode == -signal.SIGKILL, "Python would wait for it before it ends"


def test_a_device_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for device in ("cuda", "mps"):
        with pytest.raises(InputError, match=f"--device {device}"):
            set_up(pretrain.parse(["--device", device]))
    machine = set_up(pretrain.parse([]))
    assert (machine.device.type, machine.bf16, machine.rank, machine.world_size) == ("cpu", False, 0, 1)
    assert set_up(pretrain.parse(["--precision", "bf16"])).bf16


@pytest.mark.parametrize("device, cores, processes, workers", [
    ("cpu", 1, 1, 0), ("cpu", 2, 1, 0), ("cpu", 8, 1, 7), ("cpu", 8, 2, 3), ("cpu", 4, 8, 0)])
def test_workers_are_the_cores_of_a_process_less_one(monkeypatch, device, cores, processes, workers):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    args = pretrain.parse(["--device", device])
    set_up(args)
    assert args.workers == workers


# ---------------------------------------------------------------------------------------- schedule, optimizer

@pytest.mark.parametrize("steps, warmup", [(200, 0.05), (37, 0.3), (1000, 0.1)])
def test_learning_rate_rises_linearly_then_falls_by_half_a_cosine_to_zero(steps, warmup):
    rates, rise = [learning_rate(i, steps, 3e-4, warmup) for i in range(steps + 1)], round(warmup * steps)
    assert rates[:rise] == pytest.approx([3e-4 * (i + 1) / rise for i in range(rise)])
    assert max(rates) == pytest.approx(3e-4) and rates[0] > 0
    assert rates[rise:] == pytest.approx([3e-4 * math.cos(math.pi / 2 * i / (steps - rise)) ** 2
                                          for i in range(steps - rise + 1)], abs=1e-12)
    assert rates[steps] == pytest.approx(0, abs=1e-12) and rates[steps - 1] > 0


def test_learning_rate_of_the_shortest_runs_is_a_positive_number():
    for steps in (1, 2, 3):
        assert all(0 < learning_rate(step, steps, 1.0, warmup) <= 1
                   for step in range(steps) for warmup in (0, 0.05, 1))


def test_no_decay_on_norms_biases_and_other_vectors(tiny):
    for model in (EViLM(tiny), SemanticTokenizer(tiny)):
        frozen = next(model.parameters()).requires_grad_(False)
        optimizer = make_optimizer(model, 1e-3, 0.07, torch.device("cpu"))
        assert isinstance(optimizer, torch.optim.AdamW)
        decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
        assert sum(len(group["params"]) for group in optimizer.param_groups) == len(decay)  # each one once
        assert id(frozen) not in decay and len(decay) == len(list(model.parameters())) - 1
        for name, p in model.named_parameters():
            if p is not frozen:
                vector = max(p.shape) == p.numel()              # XCA's temperature is one, (heads, 1, 1)
                assert decay[id(p)] == (0.0 if vector else 0.07), name


# ------------------------------------------------------------------------------------------------ checkpoints

def checkpoint(**values):
    return {"kind": "pretrain", "config": asdict(Config.toy()), "vocab": ["a"], "step": 1,
            "model": {"w": torch.arange(5.0)}, **values}


def check_whole(path, step):
    """The checkpoint at `path` is that of `step`, and no draft lies beside it."""
    found = load(path, "pretrain")
    assert found["step"] == step and torch.equal(found["model"]["w"], torch.arange(5.0))
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
def test_a_full_disk_ends_in_one_line_and_leaves_the_older_checkpoint_whole(tmp_path, capsys):
    path = tmp_path / "last.pt"
    save(checkpoint(step=1), path)
    (tmp_path / "last.pt.part").symlink_to("/dev/full")
    with pytest.raises(SystemExit) as end:
        run_script(lambda: save(checkpoint(step=2, more=torch.zeros(10 ** 5)), path))
    error = capsys.readouterr().err
    assert end.value.code == 2 and "No space left on device" in error and error.count("\n") == 1
    check_whole(path, 1)


def test_a_kill_while_saving_leaves_the_older_checkpoint_whole(tmp_path):
    path = tmp_path / "last.pt"
    save(checkpoint(step=1), path)
    child = os.fork()
    if not child:
        os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)       # the draft is written, not yet moved
        save(checkpoint(step=2), path)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL and (tmp_path / "last.pt.part").exists()
    assert load(path, "pretrain")["step"] == 1
    save(checkpoint(step=2), path)
    check_whole(path, 2)


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


def refused(path, kind="pretrain"):
    """The one line that says why `path` is not loaded; it names the file."""
    with pytest.raises(InputError) as error:
        fill(torch.nn.ParameterDict({"w": torch.zeros(5)}), load(path, kind))
    line = str(error.value)
    assert str(path) in line and "\n" not in line
    return line


def test_a_checkpoint_cannot_run_code(tmp_path):
    trap, path = tmp_path / "owned", tmp_path / "last.pt"
    torch.save(checkpoint(extra=Malicious(trap)), path)
    torch.load(path, weights_only=False)
    assert trap.exists()                    # the pickle does what it says, where it may
    trap.unlink()
    assert "safely" in refused(path)
    path.write_bytes(pickle.dumps(checkpoint(extra=Malicious(trap)), protocol=2))
    refused(path)
    assert not trap.exists()


NOT_OURS = "not a checkpoint of this project"


@pytest.mark.parametrize("content, named", [
    (torch.zeros(3), NOT_OURS), ({"model": {}, "kind": "pretrain"}, NOT_OURS), ([checkpoint()], NOT_OURS),
    (checkpoint(kind="tokenizer"), "'tokenizer', where pretrain is wanted"),
    (checkpoint(config="toy"), "config"), (checkpoint(config={"size": 64}), "config"),
    (checkpoint(model={}), "do not fit"), (checkpoint(model="w"), "its model is not a dict"),
    (checkpoint(model={"w": torch.zeros(4)}), "do not fit"), (checkpoint(model={"w": 5}), "do not fit"),
    (checkpoint(model=[torch.zeros(5)]), "its model is not a dict"),
    (checkpoint(vocab=5), "its vocab is not"),
    (checkpoint(step=1.5), "its step is not"), (checkpoint(settings="seed"), "its settings is not")])
def test_a_checkpoint_of_other_content_is_refused_in_one_line(tmp_path, content, named):
    torch.save(content, tmp_path / "x.pth")
    assert named in refused(tmp_path / "x.pth")


def test_a_file_that_is_no_checkpoint_is_refused_in_one_line(tmp_path):
    save(checkpoint(more=torch.zeros(1000)), tmp_path / "cut.pt")
    whole = (tmp_path / "cut.pt").read_bytes()
    for content in (b"a list of words\nand another line\n", whole[:len(whole) // 2], b""):
        (tmp_path / "cut.pt").write_bytes(content)
        assert "not a checkpoint" in refused(tmp_path / "cut.pt")
    assert "x.pth: there is no such file" in refused(tmp_path / "x.pth")
    assert f"{tmp_path}/best.pt: there is no such file" in refused(tmp_path)        # a folder is a run


@pytest.mark.parametrize("name", ["run", "v1.5"])
def test_a_run_is_found_by_its_folder(tmp_path, name):
    (tmp_path / name).mkdir()
    save(checkpoint(), tmp_path / name / "best.pt")
    assert load(tmp_path / name, "pretrain")["config"] == Config.toy()


def test_best_is_chosen_alike_with_mvm_and_without():
    scores = {"vtm": 0.8, "mlm": 0.4, "mvm": 0.1, "mc": 0.9}
    for names, expected in (("vtm mlm mvm mc", 0.6), ("vtm mlm", 0.6), ("mlm mvm", 0.4), ("mvm", 0.1)):
        chosen_by = pretrain.selection_score({name: scores[name] for name in names.split()})
        assert chosen_by == pytest.approx(expected)


def begin(folder, resume=False, **extra):
    """A run of one weight, as the scripts begin it."""
    args = Namespace(out=str(folder), seed=0, resume=resume, save_every=1, strict=False)
    model = torch.nn.Linear(1, 1)
    optimizer = make_optimizer(model, 1e-3, 0.0, CPU.device)
    sums = {"losses": torch.zeros(2)}
    return Run(args, "pretrain", Config.toy(), ["a"], CPU, model, optimizer, sums=sums, **extra)


def step(run):
    run.model(torch.ones(1)).sum().backward()
    run.sums["losses"] += run.step + 1
    run.optimise(torch.tensor(1.0))


def test_a_run_whose_answers_changed_their_order_is_not_resumed(tmp_path):
    step(run := begin(tmp_path, answers=["red", "blue"]))
    run.save_last()
    assert begin(tmp_path, resume=True, answers=["red", "blue"]).step == 1
    with pytest.raises(InputError, match="another answers"):
        begin(tmp_path, resume=True, answers=["blue", "red"])


def test_a_resumed_run_drops_evaluations_after_its_step(tmp_path):
    run = begin(tmp_path / "run")
    step(run)
    run.evaluated(1, vtm=1)
    run.save_last()
    step(run)
    run.evaluated(2, vtm=2)
    run.log("test", vtm=3)
    resumed = begin(tmp_path / "run", resume=True)
    assert (resumed.step, resumed.best, resumed.sums["losses"].tolist()) == (1, 1, [1, 1])
    assert read_metrics(resumed.folder) == [{"step": 1, "split": "val", "vtm": 1}]


def test_curves_show_multiple_choice_of_all_runs_beside_that_have_ended(tmp_path, monkeypatch):
    for name, logged in (("begun", ""), ("going", "val"), ("ended", "val test"), ("a", "val test")):
        step(run := begin(tmp_path / name))
        for split in logged.split():
            run.log(split, vtm=0.5, mc=len(name) / 10, loss_vtm=1)
    drawn = []
    monkeypatch.setattr(pretrain.plots, "curves", lambda panels, *_: drawn.extend(panels))
    pretrain.draw_curves(run, ["vtm"], 0.2, tmp_path / "a/curves.png")
    assert [lines for title, lines, *_ in drawn if title == "multiple choice, val"] == [
        {"a": [(1, 0.1)], "ended": [(1, 0.5)]}]


def test_the_report_says_the_chance_of_the_questions_own_number_of_options():
    assert "(chance 25%); colour 50%" in "".join(pretrain.report({"mc": 0.4, "mc_colour": 0.5}, [], 0.25))


@pytest.mark.parametrize("damage", [
    {"optimizer"}, {"sums"}, {"best"}, {"optimizer": 5}, {"sums": "text"},              # of last.pt
    b'{"step": 1, "spl', b"\x93\xff\x00", b"[1]\n", b'{"step": 1}\n'])                 # of metrics.jsonl
def test_a_damaged_file_of_a_run_is_refused_by_name(tmp_path, damage):
    run = begin(tmp_path)
    step(run)
    run.save_last()
    if isinstance(damage, bytes):
        (tmp_path / "metrics.jsonl").write_bytes(damage)
    else:
        last = torch.load(tmp_path / "last.pt", weights_only=True)
        last = {name: value for name, value in last.items() if name not in damage}
        save(last | (damage if isinstance(damage, dict) else {}), tmp_path / "last.pt")
    named = "metrics.jsonl" if isinstance(damage, bytes) else r"last\.pt .*damaged"
    with pytest.raises(InputError, match=named):
        begin(tmp_path, resume=True)


def test_a_second_signal_ends_a_run_at_once(tmp_path):
    run = begin(tmp_path)
    run.ask_to_stop(signal.SIGTERM, None)
    with pytest.raises(SystemExit) as end:
        run.ask_to_stop(signal.SIGTERM, None)
    assert end.value.code == 143


# ---------------------------------------------------------------------------------------- parts and processes

def test_what_goes_to_a_worker_is_small_and_a_spawned_worker_makes_the_same_batch(tmp_path):
    render(tmp_path, 45)
    train = Manifest(tmp_path / "train.jsonl", ("video", "caption"))
    wordpiece = WordPiece.from_captions(row["caption"] for row in train)
    config = replace(Config.toy(), vocab_size=len(wordpiece))
    clips = ClipCaptions(train, 2, 64, seed=0, train=True)
    for collate in (pretrain.PretrainBatch(wordpiece, config, ("vtm", "mlm", "mvm"), 0),
                    train_tokenizer.TokenizerBatch(wordpiece, config.max_words)):
        assert len(pickle.dumps(collate)) < 10_000
    here, spawned = (make_loader(clips, Batches(len(clips), 4, 0, 1), collate, workers) for workers in (0, 1))
    spawned.multiprocessing_context = "spawn"
    for name, value in next(iter(spawned)).items():
        assert name == "broken" or torch.equal(value, next(iter(here))[name])


def make_batch(config, which=slice(None)):
    """A batch as pretrain.py's loader makes it, of all or some of four made-up clips, in float64."""
    captions, frames = ["a", "a b c d e f", "c", "b d"], torch.Generator().manual_seed(2)
    samples = [{"caption": captions[i], "mismatched": captions[i - 1], "epoch": 0, "index": i, "broken": [],
                "numbers": torch.arange(2), "frames": torch.rand(2, 3, 64, 64, generator=frames).double()}
               for i in range(4)]
    wordpiece = WordPiece.from_captions(captions, 33)
    batch = pretrain.PretrainBatch(wordpiece, config, ("vtm", "mlm", "mvm"), 0)(samples[which])
    del batch["broken"]
    labels = batch["index"][:, None, None, None] + torch.arange(8).view(2, 2, 2)
    return batch | {"labels": labels}


def one_of_two(rank, folder, config):
    """What each of two processes does with its half of the batch, computed in two parts."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2,
                            timeout=timedelta(seconds=30))          # a process that waits in vain is an error
    os.environ.update(RANK=str(rank), WORLD_SIZE="2")
    machine = set_up(pretrain.parse(["--device", "cpu"]))
    if rank == 0:
        time.sleep(0.3)
        Path(folder, "evaluated").touch()
    machine.barrier()
    waited = Path(folder, "evaluated").exists()
    torch.manual_seed(rank)                 # DistributedDataParallel begins with rank 0's weights
    model = EViLM(config).double()
    if rank == 0:
        model.load_state_dict(torch.load(f"{folder}/start.pt"))
    parallel, total = machine.wrap(model, compiled=False), 0.0
    mine = make_batch(config, slice(rank, None, 2))
    counts = dict(zip(("vtm", "mlm", "mvm"), machine.total(mine.pop("counts")).tolist()))
    for part in machine.parts(parallel, mine, 2):
        loss, _ = pretraining_loss(parallel, part, counts=counts)
        (loss * machine.world_size).backward()                      # processes average gradients
        total += loss.item()
    torch.save({"waited": waited, "loss": machine.total(total).item(), "ids": machine.gather(mine["ids"]),
                "grads": {name: p.grad for name, p in model.named_parameters()}}, f"{folder}/{rank}.pt")
    run_script(lambda: None)                # leaves the process group
    assert not dist.is_initialized()


def test_two_processes_give_the_totals_and_gradients_of_one(tiny, tmp_path):
    model, batch = EViLM(tiny).double(), make_batch(tiny)
    torch.save(model.state_dict(), tmp_path / "start.pt")
    multiprocessing.start_processes(one_of_two, (str(tmp_path), tiny), nprocs=2, start_method="fork")
    loss, _ = pretraining_loss(model, batch)
    loss.backward()
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert found["waited"] and torch.equal(found["ids"], batch["ids"])
        assert found["loss"] == pytest.approx(loss.item(), rel=1e-6)
        for name, p in model.named_parameters():
            torch.testing.assert_close(found["grads"][name], p.grad, atol=1e-6, rtol=1e-5)
