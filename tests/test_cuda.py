"""On a CUDA device, skipped without one: the CPU's numbers, few waits, the scripts from end to end."""
import subprocess
import sys
import warnings

import pytest
import torch

import evilm
from test_scripts import ROOT, SMALL, home, metrics             # noqa: F401, a fixture among them
from test_training import make_batch

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
DATA, SHORT = ("--data", "clips"), ("--batch-size", "16", "--device", "cuda", "--max-steps", "6")


def go(folder, script, *flags, processes=()):
    """Runs a script in a process of its own: a forked one could not use CUDA after this one has."""
    command = [sys.executable, *processes, ROOT / script, *flags, *DATA, *SHORT]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def prepare(config, device, bf16=False):
    """(machine, model, batch): the same clips and weights on any device."""
    torch.manual_seed(0)
    batch = {name: x.to(device) for name, x in make_batch(config).items() if name != "counts"}
    batch["frames"] = batch["frames"].float()
    return evilm.Machine(torch.device(device), bf16), evilm.EViLM(config).to(device), batch


def backward(machine, model, batch):
    with machine.autocast():
        loss, losses = evilm.pretraining_loss(model, batch)
    loss.backward()
    return losses


def step(config, device, bf16=False):
    """(losses, gradients) of a pre-training step."""
    machine, model, batch = prepare(config, device, bf16)
    losses = backward(machine, model, batch)
    return ({name: float(x.detach()) for name, x in losses.items()},
            {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None})


def test_losses_and_gradients_are_those_of_the_cpu(tiny):
    (here, ours), (there, theirs) = step(tiny, "cuda"), step(tiny, "cpu")
    assert here == pytest.approx(there, rel=1e-3) and ours.keys() == theirs.keys()
    for name in ours:
        assert (ours[name] - theirs[name]).norm() <= 2e-2 * theirs[name].norm() + 1e-5, name     # TF32
    assert step(tiny, "cuda", bf16=True)[0] == pytest.approx(there, rel=0.05)


def test_codes_are_those_of_the_cpu_under_bf16(tiny):
    quantizer, x = evilm.VectorQuantizer(512, 32), torch.randn(4096, 32)
    with torch.autocast("cuda", torch.bfloat16):
        there = quantizer.to("cuda")(x.to("cuda"))[1].cpu()
    assert (there == quantizer.cpu()(x)[1]).float().mean() > 0.999, "only ties in fp32 may differ"


def test_a_step_waits_for_the_gpu_at_most_four_times(tiny):
    machine, model, batch = prepare(tiny, "cuda", bf16=True)
    optimizer = evilm.make_optimizer(model, 1e-3, 0.01, machine.device)
    backward(machine, model, batch)                             # kernels are loaded
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as waits:
            warnings.simplefilter("always")
            backward(machine, model, batch)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len([w for w in waits if "synchroniz" in str(w.message)]) <= 4


def test_both_stages_and_a_task_run_from_end_to_end(home):        # noqa: F811
    go(home, "pretrain.py", *SMALL, "--tokenizer", "gpu-tokenizer", "--out", "gpu")
    go(home, "finetune.py", "qa", "--init", "gpu", "--out", "gpu-qa")
    assert metrics(home / "gpu")[-1]["split"] == metrics(home / "gpu-qa")[-1]["split"] == "test"


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices")
def test_two_gpus_train_as_one(home):                             # noqa: F811
    flags = (*SMALL, "--precision", "fp32")
    go(home, "pretrain.py", *flags, "--out", "gpu-one")
    go(home, "pretrain.py", *flags, "--out", "gpu-two",
       processes=("-m", "torch.distributed.run", "--nproc-per-node=2"))
    one, two = (metrics(home / out)[0] for out in ("gpu-one", "gpu-two"))
    for name in ("loss_vtm", "loss_mlm", "loss_mvm"):
        assert two[name] == pytest.approx(one[name], rel=0.02)
