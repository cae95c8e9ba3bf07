"""What the scripts share: schedule, decay, checkpoints, parts of a batch, processes, exit statuses."""
import errno
import math
import os
import pickle
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

import evilm
from evilm import (CLS, SEP, Config, EViLM, InputError, Machine, NotFinite, Run, SemanticTokenizer, changed,
                   common_flags, config_of, configure, learning_rate, load, make_optimizer, mlm_loss,
                   mvm_loss, run_script, save, set_up, vtm_loss)

# ---------------------------------------------------------------------------------------------- flags, ranges


@pytest.mark.parametrize("change, told", [
    ("frames=0", "from 1 on"), ("negatives=0", "from 1 on"), ("tokenizer_revive=-1", "from 0 on"),
    ("mask_ratio=80", "from 0 to 1"), ("mask_ratio=nan", "from 0 to 1"), ("mvm_weight=inf", "from 0 on"),
    ("dims=8,16,32,0", "from 1 on"), ("dims=8,16", "give dims like"), ("frames=two", "give frames like 4"),
    ("size=70", "a multiple of 32"), ("decoder_heads=3", "must divide the channels, 128"),
    ("xca_heads=3", "32 and 64 and 128"), ("max_words=2", "from 3 to 64"), ("no_field=1", "no field")])
def test_a_field_that_no_model_can_have_is_refused(change, told):
    with pytest.raises(InputError, match=told):
        changed(Config.toy(), [change])


def test_a_field_is_read_as_its_own_kind():
    config = changed(Config.toy(), ["dims=8,16,32,64", "mask_ratio=1", "blocks=False", "tokenizer_revive=0"])
    assert (config.dims, config.mask_ratio, config.blocks, config.tokenizer_revive) == ((8, 16, 32, 64), 1.0,
                                                                                        False, 0)


@pytest.mark.parametrize("flags", [["--lr", "nan"], ["--lr", "-1"], ["--workers", "-1"], ["--epochs", "0"]])
def test_a_flag_out_of_range_is_refused(flags, capsys):
    with pytest.raises(SystemExit) as end:
        common_flags("").parse_args(flags)
    assert end.value.code == 2 and flags[0] in capsys.readouterr().err


def test_a_path_that_cannot_be_used_ends_in_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as end:
        run_script(lambda: (tmp_path / "file/run").mkdir())
    assert end.value.code == 2 and capsys.readouterr().err == f"error: {tmp_path}/file/run: Not a directory\n"


# ---------------------------------------------------------------------------------------- schedule, optimizer


@pytest.mark.parametrize("steps, warmup", [(200, 0.05), (37, 0.3), (1000, 0.1)])
def test_learning_rate_rises_linearly_then_falls_by_half_a_cosine_to_zero(steps, warmup):
    rates, rise = ([learning_rate(step, steps, 3e-4, warmup) for step in range(steps + 1)],
                   round(warmup * steps))
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


def test_the_video_encoder_can_have_a_rate_of_its_own(tiny):
    model = EViLM(tiny)
    optimizer = make_optimizer(model, 1e-3, 0.07, torch.device("cpu"), video_lr=0.25)
    run = SimpleNamespace(optimizer=optimizer, step=10, steps=100)
    for work, whole in ((lambda: None, 1e-3),
                        (lambda: Run.set_learning_rate(run, 4e-3, 0.1), learning_rate(10, 100, 4e-3, 0.1))):
        work()
        rate = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
        for name, p in model.named_parameters():
            share = 0.25 if name.startswith("video_encoder.") else 1.0
            assert rate[id(p)] == pytest.approx(share * whole), name


def test_a_schedule_can_begin_anew():
    run = SimpleNamespace(optimizer=torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0), steps=100)
    run.optimizer.param_groups[0]["factor"] = 1.0
    for run.step, expected in ((0, learning_rate(0, 60, 2.0, 0.1)), (59, learning_rate(59, 60, 2.0, 0.1)),
                               (60, learning_rate(0, 40, 2.0, 0.1)), (99, learning_rate(39, 40, 2.0, 0.1))):
        Run.set_learning_rate(run, 2.0, 0.1, turn=60)
        assert run.optimizer.param_groups[0]["lr"] == expected


# ------------------------------------------------------------------------------------------------ checkpoints


def checkpoint(config=Config.toy(), **values):
    return {"kind": "pretrain", "config": asdict(config), "model": {"w": torch.arange(5.0)}, "step": 1,
            **values}


def whole(path, step):
    """The checkpoint at `path` is that of `step`, and no draft lies beside it."""
    found = load(path, "pretrain")
    assert found["step"] == step and torch.equal(found["model"]["w"], torch.arange(5.0))
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_save_and_load(tmp_path):
    path = tmp_path / "last.pt"
    for step in (1, 2):
        save(checkpoint(step=step), path)
        whole(path, step)
    save(checkpoint(step=3), str(path))
    whole(path, 3)


@pytest.mark.parametrize("broken, error", [
    ("save", OSError(errno.ENOSPC, "no space")), ("save", KeyboardInterrupt()),
    ("fsync", OSError(errno.EIO, "disk")), ("replace", OSError(errno.EPERM, "no")),
])
def test_a_save_that_fails_half_way_leaves_the_older_checkpoint_whole(tmp_path, monkeypatch, broken, error):
    path = tmp_path / "last.pt"
    save(checkpoint(step=1), path)

    def fail(*args):
        if broken == "save":
            args[1].write(b"half of a checkpoint")
        raise error

    monkeypatch.setattr(torch if broken == "save" else os, broken, fail)
    with pytest.raises(type(error)):
        save(checkpoint(step=2), path)
    monkeypatch.undo()
    whole(path, 1)
    save(checkpoint(step=2), path)
    whole(path, 2)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
def test_a_full_disk_ends_in_one_line_and_leaves_the_older_checkpoint_whole(tmp_path, capsys):
    path = tmp_path / "last.pt"
    save(checkpoint(step=1), path)
    (tmp_path / "last.pt.part").symlink_to("/dev/full")
    with pytest.raises(SystemExit) as end:
        run_script(lambda: save(checkpoint(step=2, more=torch.zeros(10 ** 5)), path))
    assert end.value.code == 2
    assert "no space left" in capsys.readouterr().err
    whole(path, 1)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="there is no SIGKILL here")
def test_a_kill_while_saving_leaves_the_older_checkpoint_whole(tmp_path):
    path = tmp_path / "last.pt"
    save(checkpoint(step=1), path)
    program = ("import os, signal, sys, torch, evilm\n"
               "def killed(value, file):\n"
               "    file.write(b'half of a checkpoint'); file.flush(); os.kill(os.getpid(), signal.SIGKILL)\n"
               "torch.save = killed\n"
               "evilm.save({}, sys.argv[1])\n")
    ended = subprocess.run([sys.executable, "-c", program, path], cwd=Path(evilm.__file__).parent, timeout=60)
    assert ended.returncode == -signal.SIGKILL
    assert load(path, "pretrain")["step"] == 1
    save(checkpoint(step=2), path)
    whole(path, 2)


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


def refused(path, kind="pretrain"):
    """The one line that says why `path` is not loaded; it names the file."""
    with pytest.raises(InputError) as error:
        load(path, kind)
    line = str(error.value)
    assert str(path) in line and "\n" not in line
    return line


def test_a_checkpoint_cannot_run_code(tmp_path):
    trap, path = tmp_path / "owned", tmp_path / "last.pt"
    torch.save(checkpoint(extra=Malicious(trap)), path)
    torch.load(path, weights_only=False)
    assert trap.exists()                    # the pickle does what it says, where it is let
    trap.unlink()
    assert "safely" in refused(path)
    path.write_bytes(pickle.dumps(checkpoint(extra=Malicious(trap)), protocol=2))
    refused(path)
    assert not trap.exists()


def test_load_refuses_what_is_no_checkpoint(tmp_path):
    assert "no such" in refused(tmp_path / "missing.pt")
    text, cut, empty, tensor, other = (tmp_path / f"{name}.pt"
                                       for name in ("text", "cut", "empty", "tensor", "other"))
    text.write_text("a list of words\nand another line\n")
    save(checkpoint(more=torch.zeros(1000)), cut)
    cut.write_bytes(cut.read_bytes()[:len(cut.read_bytes()) // 2])
    empty.write_bytes(b"")
    for path in (text, cut, empty):
        assert "not a checkpoint" in refused(path)
    assert "best.pt: there is no such" in refused(tmp_path)                     # a folder is a run
    torch.save(torch.zeros(3), tensor)
    torch.save({"model": {}, "kind": "pretrain"}, other)
    for path in (tensor, other):
        assert "not a checkpoint of this project" in refused(path)


def test_load_refuses_another_kind(tmp_path):
    save(checkpoint(kind="tokenizer"), tmp_path / "best.pt")
    assert "'tokenizer'" in refused(tmp_path / "best.pt") and "'pretrain'" in refused(tmp_path / "best.pt")
    assert load(tmp_path / "best.pt", "tokenizer")["kind"] == "tokenizer"


def test_a_config_comes_back_from_its_checkpoint(tiny, tmp_path):
    for config in (Config.paper(), Config.toy(), replace(tiny, words=29)):
        save(checkpoint(config), tmp_path / "last.pt")
        found = load(tmp_path / "last.pt", "pretrain")
        assert type(found["config"]) is dict and config_of(found) == config
        # as JSON has it
        listed = {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(config).items()}
        assert config_of({"config": listed}) == config and hash(config_of({"config": listed})) == hash(config)


# ----------------------------------------------------------------------------------------- flags and statuses


def test_flags_left_out_come_from_the_preset_of_the_stage():
    def parsed(stage, *argv):
        args = common_flags("", stage).parse_args(argv)
        return args, configure(args, stage)

    toy, paper = Config.toy(), Config.paper()
    args, config = parsed("")
    assert config == toy and (args.epochs, args.batch_size, args.lr) == (toy.epochs, toy.batch_size, toy.lr)
    args, config = parsed("tokenizer_", "--preset", "paper", "--epochs", "3")
    assert config == paper and (args.epochs, args.batch_size, args.lr) == (3, paper.tokenizer_batch_size,
                                                                           2e-4)
    assert parsed("", "--preset", "paper")[0].lr == 1e-4                        # 4.1
    with pytest.raises(InputError, match="--preset huge.*toy, paper"):
        parsed("", "--preset", "huge")


@pytest.mark.parametrize("flag", ["--epochs", "--batch-size", "--accumulate", "--max-steps"])
@pytest.mark.parametrize("value", ["0", "-3"])
def test_a_count_below_one_is_refused_by_its_flag(flag, value, capsys):
    with pytest.raises(SystemExit) as end:
        common_flags("", "").parse_args([flag, value])
    assert end.value.code == 2 and flag in capsys.readouterr().err


class UserError(Exception):
    pass


def raising(error):
    def main():
        raise error
    return main


@pytest.mark.parametrize("error, status, line", [
    (InputError("a.jsonl:3: not JSON"), 2, "a.jsonl:3: not JSON"),
    (NotFinite("step 7: the loss is nan"), 2, "step 7: the loss is nan"),
    (UserError("no clips"), 2, "no clips"),
    (OSError(errno.ENOSPC, "No space left on device"), 2, "disk"),
    (KeyboardInterrupt(), 130, "interrupted"),
])
def test_run_script_ends_in_one_line_and_its_status(error, status, line, capsys):
    with pytest.raises(SystemExit) as end:
        run_script(raising(error), UserError)
    out, err = capsys.readouterr()
    assert end.value.code == status and line in err and err.count("\n") == 1 and not out


def test_run_script_hides_no_mistake_of_ours():
    for error in (ValueError("ours"), PermissionError(errno.EACCES, "x"), UserError("not listed")):
        with pytest.raises(type(error)):
            run_script(raising(error))
    assert run_script(lambda: None) is None


def test_a_device_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for device in ("cuda", "mps"):
        with pytest.raises(InputError, match=f"--device {device}"):
            set_up(device)
    machine = set_up("auto")
    assert machine.device.type == "cpu" and not machine.bf16 and machine.main
    assert set_up("cpu", "bf16").bf16 and not set_up("cpu", "fp32").bf16


# ---------------------------------------------------------------------------------------- parts and processes


@pytest.mark.parametrize("size, parts", [(8, 1), (8, 2), (7, 3), (5, 4), (3, 8), (1, 1)])
def test_parts_of_a_batch_lose_no_clip(size, parts):
    batch = {"frames": torch.arange(size)[:, None], "names": [str(i) for i in range(size)]}
    found = [part for part, _ in Machine(torch.device("cpu")).parts(None, batch, parts)]
    assert len(found) <= parts and all(len(part["frames"]) for part in found)
    assert max(len(part["frames"]) for part in found) == math.ceil(size / parts)
    assert torch.equal(torch.cat([part["frames"] for part in found]), batch["frames"])
    assert sum((part["names"] for part in found), []) == batch["names"]
    assert all(len(part["names"]) == len(part["frames"]) for part in found)


def test_one_process_totals_are_its_own():
    machine, given = Machine(torch.device("cpu")), torch.tensor([3, 4])
    assert machine.main and machine.total([1, 2.5]).tolist() == [1, 2.5] and machine.shared(given) is given
    assert torch.equal(machine.total(given), given) and machine.total(given) is not given


def loss_terms(model, batch, counts):
    """Eq. (8), each term over the count of the whole batch."""
    vtm, mlm, mvm = model(batch["frames"], batch["ids"], batch["ids"] > 0, words=batch["words"],
                          cells=batch["cells"], mismatched=(batch["wrong"], batch["wrong"] > 0))
    pairs = torch.arange(len(vtm)).lt(len(vtm) // 2).long()
    return (vtm_loss(vtm, pairs, counts[0]) + mlm_loss(mlm, batch["truth"][batch["words"]], counts[1])
            + mvm_loss(mvm, batch["codes"][batch["cells"]], counts[2]))


def whole_batch():
    source = torch.Generator().manual_seed(2)
    ids = torch.tensor([[CLS, 9, 8, 30, SEP], [CLS, 12, SEP, 0, 0], [CLS, 6, 4, 22, SEP],
                        [CLS, 4, 17, SEP, 0]])
    return {"frames": torch.rand(4, 2, 3, 64, 64, generator=source).double(), "ids": ids,
            "wrong": ids.roll(1, 0),
            "words": (ids > 5) & (torch.rand(ids.shape, generator=source) < 0.6),
            "cells": torch.rand(4, 8, generator=source) < torch.tensor([[0.2], [0.4], [0.6], [0.8]]),
            "truth": torch.randint(5, 33, (4, 5), generator=source),
            "codes": torch.randint(11, (4, 8), generator=source)}


def count(batch):
    return 2 * len(batch["ids"]), batch["words"].sum().item(), batch["cells"].sum().item()


def one_of_two(rank, folder, config):
    """What each process does: rank 0 has three of the four clips, rank 1 the last."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE="2")
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2,
                            timeout=timedelta(seconds=30))          # a process that waits in vain is an error
    machine = set_up("cpu")
    machine.first(lambda: (time.sleep(0.3), Path(folder, "first").write_text("done")))
    waited = Path(folder, "first").exists()

    torch.manual_seed(rank)                 # DistributedDataParallel begins with rank 0's weights
    model = EViLM(config).double()
    if rank == 0:
        model.load_state_dict(torch.load(f"{folder}/start.pt"))
    parallel, loss = machine.wrap(model, compiled=False), 0.0
    mine = {name: (value[:3] if rank == 0 else value[3:]) for name, value in whole_batch().items()}
    counts, given = machine.total(count(mine)).tolist(), torch.tensor([1, 10 ** rank])
    for part, sync in machine.parts(parallel, mine, 2):                     # two parts here, one there
        with sync:
            share = loss_terms(parallel, part, counts)
            (share * machine.world).backward()                              # it averages: the sum is wanted
        loss += share.item()
    torch.save({"rank": machine.rank, "world": machine.world, "main": machine.main, "waited": waited,
                "counts": counts, "total": machine.total(given), "given": given,
                "shared": machine.shared(given.clone()), "loss": machine.total([loss]).item(),
                "grads": {name: p.grad for name, p in model.named_parameters()}},
               f"{folder}/{rank}.pt")
    run_script(lambda: None)                # leaves the process group
    assert not dist.is_initialized()


def test_two_processes_give_the_totals_and_gradients_of_one(tiny, tmp_path):
    model = EViLM(tiny).double()
    torch.save(model.state_dict(), tmp_path / "start.pt")
    multiprocessing.spawn(one_of_two, (str(tmp_path), tiny), nprocs=2)
    batch = whole_batch()
    loss = loss_terms(model, batch, [None] * 3)
    loss.backward()
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert (found["rank"], found["world"], found["main"], found["waited"]) == (rank, 2, rank == 0, True)
        assert found["counts"] == list(count(batch)) and found["total"].tolist() == [2, 11]
        assert found["given"].tolist() == [1, 10 ** rank] and found["shared"].tolist() == [1, 1]
        assert found["loss"] == pytest.approx(loss.item(), rel=1e-6)
        for name, p in model.named_parameters():
            torch.testing.assert_close(found["grads"][name], p.grad, atol=1e-6, rtol=1e-5)
