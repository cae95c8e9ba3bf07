"""Toy versions of the paper's Tables 5 to 7 and Figs. 2 and 6, what pretraining gives each task, and the
README's experiments, each over 3 seeds.

    python tests/tables.py                  everything: many hours on 2 cores
    python tests/tables.py tasks table5     some of it, by the names that --help lists
    python tests/tables.py --show           the tables of the runs that are there

Every row has the same steps: PRETRAIN, and FINE_TUNE for each task. Runs lie in runs/tables; stop with Ctrl-C
and start again at will: finished runs stay, a broken one goes on from its last.pt. Two runs go side by side,
each on one thread.
"""
import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

ROOT, RUNS = Path(__file__).resolve().parents[1], Path("runs/tables")
PRETRAIN, FINE_TUNE, PROBE = 500, 150, 360      # steps; a probe's step costs next to nothing
PRETRAIN_LR = 1e-3                              # leaves matching's first plateau sooner than the preset's
SEEDS, CHOICE_SEED = (1, 2, 3), 100             # no seed that chose anything is reported
LEARNING_RATES = (5e-4, 1e-3, 2e-3)             # tried on val for a model that was not pretrained
ROWS = {"none": None, "VTM": "vtm", "VTM+MLM": "vtm,mlm", "VTM+MLM+MVM": "vtm,mlm,mvm"}
# Not the two sets of questions about motion: options are compared after 500 steps and more.
TASKS = {"retrieval": ("retrieval", "r1"), "QA": ("qa", "top1"), "MC caption": ("mc --set caption", "top1"),
         "probe": ("probe", "top1")}
POINTS = (0.2, 0.4, 0.6, 0.8, 1.0)
SIZES = {"small": "--config dims=8,16,32,64 --config width=64", "toy": "",
         "large": "--config dims=24,48,96,192 --config width=192"}
TOKENIZERS = {"none": None, "pixels": "--target pixels", "VideoSwin": "--encoder videoswin",
              "ViT, BCE": "--loss bce", "ViT, focal": ""}
FINER = "--config size=96 --config frames=2"    # 3x3 cells a frame: 2x2 have room for three mask ratios
# The scores to look at (of pretraining, or a task's name), and of each row the flags of both stages, the
# tokenizer's own, pretraining's own.
EXPERIMENTS = {
    "mask-ratio": (("mvm", "mvm_copy", "mvm_mode", "mc", "vtm"), {
        f"{ratio:.0%}": (FINER, "", f"--config mask_ratio={ratio}") for ratio in (0.1, 0.25, 0.4, 0.6, 0.8)}),
    "blocks": (("mvm", "mvm_copy", "mvm_mode", "mc", "vtm"), {
        "block-wise": (FINER, "", "--config mask_ratio=0.4"),
        "one by one": (FINER, "", "--config mask_ratio=0.4 --config blocks=False")}),
    "mvm-weight": (("mc", "mc_shape", "r1", "vtm", "mlm"), {
        "1": ("", "", ""), "0: masked, none predicted": ("", "", "--config mvm_weight=0.0")}),
    "codes": (("codebook_usage", "mvm", "mvm_copy", "mc"), {
        f"{codes}": ("", f"--config codes={codes}" * (codes != 64), "") for codes in (8, 64, 512)}),
    "code-dim": (("codebook_usage", "mvm", "mvm_copy", "mc"), {
        f"{dim}": ("", f"--config code_dim={dim}" * (dim != 16), "") for dim in (2, 16)}),
    "frames": (("probe", "mc_colour", "mc", "vtm"), {
        f"{frames}": ("", "", f"--config frames={frames}" * (frames != 4)) for frames in (1, 2, 4, 8)}),
    "vocabulary": (("mlm", "mc", "vtm", "r10"), {
        "all words": ("", "", ""), "40": ("--config vocab_rows=40", "", "")}),
    "negatives": (("vtm", "mc", "mc_colour", "mc_shape", "r10"), {
        f"hardest of {n}": ("", "", f"--config negatives={n}" * (n > 1)) for n in (1, 8)}),
}


# ------------------------------------------------------------------------------------------------------ runs


class Absent(Exception):
    """A run that is not there, and is not to be made."""


class Runs:
    """The runs in runs/tables, each made when it is first asked for; a method a kind of run -> its folder."""

    def __init__(self, data, make):
        self.data, self.make, self.locks = data, make, defaultdict(threading.Lock)

    def run(self, name, script, *flags):
        folder = RUNS / name
        with self.locks[name]:      # two rows may want the same run
            if lines_of(folder):
                return folder
            if not self.make:
                raise Absent(name)
            command = [sys.executable, str(ROOT / script), *flags, "--data", self.data, "--out", str(folder),
                       "--workers", "0", *["--resume"] * (folder / "last.pt").exists()]
            print(f"{time.strftime('%H:%M')}  {name}\n", end="", flush=True)      # two threads, whole lines
            done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True,
                                  text=True)
            if done.returncode:
                raise SystemExit(f"{' '.join(command)}\n{done.stderr[-2000:]}")
        return folder

    def encoder(self, seed, flags=""):
        """Where the video encoder starts; of all flags only those of its own sizes matter."""
        kept = [word for word in flags.split() if word.startswith(("dims=", "size="))]
        sizes = " ".join(f"--config {word}" for word in kept)
        return self.run(f"encoder{short(sizes)}-{seed}", "train_encoder.py", "--seed", str(seed),
                        *sizes.split())

    def tokenizer(self, seed, flags=""):
        return self.run(f"tokenizer{short(flags)}-{seed}", "train_tokenizer.py", "--seed", str(seed),
                        *flags.split())

    def pretrained(self, objectives, seed, flags="", tokenizer=""):
        """`flags` are pretraining's, `tokenizer` its tokenizer's."""
        wanted = ["--objectives", objectives, "--max-steps", str(PRETRAIN), "--lr", str(PRETRAIN_LR),
                  "--seed", str(seed), "--keep-at", ",".join(map(str, POINTS)), *flags.split()]
        if "--init-video" not in flags:
            wanted += ["--init-video", str(self.encoder(seed, flags))]
        wanted += ["--tokenizer", str(self.tokenizer(seed, tokenizer)) if "mvm" in objectives else "none"]
        return self.run(f"pretrain-{objectives}{short(flags)}{short(tokenizer)}-{seed}", "pretrain.py",
                        *wanted)

    def tuned(self, task, init, seed, name, *flags):
        steps = PROBE if task == "probe" else FINE_TUNE
        return self.run(f"{name}-{task.replace(' --set ', '-')}-{seed}", "finetune.py", *task.split(),
                        "--init", str(init), "--seed", str(seed), "--max-steps", str(steps), *flags)

    def begun(self, objectives, task, seed):
        """A task fine-tuned from a model pretrained on `objectives`, or from pictures alone (None)."""
        if objectives is None:
            return self.unpretrained(task, seed, self.encoder, "pictures")
        return self.tuned(task, self.pretrained(objectives, seed) / "best.pt", seed, f"from-{objectives}")

    def from_nothing(self, task, seed):
        return self.unpretrained(task, seed, lambda seed: "none", "nothing")

    def unpretrained(self, task, seed, init, name):
        """A task fine-tuned without pretraining, at the learning rate that is best on val for a seed that is
        not reported."""
        def best_on_val(lr):
            tuned = self.tuned(task, init(CHOICE_SEED), CHOICE_SEED, f"choose-{name}-{lr:g}", "--lr", str(lr))
            lines = lines_of(tuned)
            return max(line.get("r1", line.get("top1")) for line in lines if line["split"] == "val")
        lr = max(LEARNING_RATES, key=best_on_val)
        return self.tuned(task, init(seed), seed, f"from-{name}", "--lr", str(lr))

    def labelled(self, its, seed, flags=""):
        """A model pretrained with MVM's labels from that tokenizer, or without MVM where it is None."""
        return self.pretrained(ROWS["VTM+MLM" if its is None else "VTM+MLM+MVM"], seed, flags, its or "")

    def with_tokenizer(self, its, task, seed, flags=""):
        """A task fine-tuned from such a model."""
        init = self.labelled(its, seed, flags)
        name = init.name.removeprefix("pretrain-").removesuffix(f"-{seed}")
        return self.tuned(task, init / "best.pt", seed, f"from-{name}")

    def at(self, objectives, point, task, seed):
        """Fig. 6: the model at a share of its pretraining, probed, or scored on multiple choice untrained."""
        init = self.pretrained(objectives, seed) / f"at-{point:g}.pt"
        flags = ["--zero-shot"] * (task != "probe")
        return self.tuned(task, init, seed, f"at-{point:g}-{objectives}", *flags)


def short(flags):
    """Flags as part of a folder's name."""
    return "".join(f"-{word.removeprefix('--')}" for word in flags.split() if word != "--config")


def lines_of(folder):
    """The lines of metrics.jsonl of a run that has ended, else none."""
    path = folder / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return lines if lines and lines[-1]["split"] == "test" else []


# ---------------------------------------------------------------------------------------------------- tables


def tables(runs):
    """(name, [columns], {row: [(how to get a seed's run, the score's name) of each column]})"""
    full, ablated = ROWS["VTM+MLM+MVM"], ["retrieval", "QA", "MC caption"]
    mvm = {"without MVM": ROWS["VTM+MLM"], "with MVM": full}

    def tasks(objectives, names):
        return [(partial(runs.begun, objectives, TASKS[name][0]), TASKS[name][1]) for name in names]

    nothing = "--init-video none"
    yield "tasks", list(TASKS), {
        "from nothing": [(partial(runs.from_nothing, task), score) for task, score in TASKS.values()],
        "... pretrained": [(partial(runs.with_tokenizer, "", task, flags=nothing), score)
                           for task, score in TASKS.values()],
        "from pictures": tasks(None, TASKS), "... pretrained, from pictures": tasks(full, TASKS)}
    yield "table5", ablated, {row: tasks(objectives, ablated) for row, objectives in ROWS.items()}
    yield "fig6", [f"{kind} {point:.0%}" for kind in ("MC", "probe") for point in POINTS], {
        row: [(partial(runs.at, objectives, point, task), "top1")
              for task in ("mc --set caption", "probe") for point in POINTS]
        for row, objectives in mvm.items()}
    yield "fig2", list(SIZES), {
        row: [(partial(runs.pretrained, objectives, flags=flags), "mc") for flags in SIZES.values()]
        for row, objectives in mvm.items()}
    yield "tokenizers", ["codebook_usage", "mc", "probe", "QA"], {
        row: [NOTHING if flags is None else (partial(runs.tokenizer, flags=flags), "codebook_usage"),
              (partial(runs.labelled, flags), "mc"),
              *[(partial(runs.with_tokenizer, flags, task), "top1") for task in ("probe", "qa")]]
        for row, flags in TOKENIZERS.items()}
    yield "from-nothing", ["vtm", "mc", "r10", "probe", "QA"], {
        row: [*[(partial(runs.labelled, TOKENIZERS[row], flags=nothing), score)
                for score in ("vtm", "mc", "r10")],
              *[(partial(runs.with_tokenizer, TOKENIZERS[row], task, flags=nothing), "top1")
                for task in ("probe", "qa")]] for row in ("none", "pixels", "ViT, focal")}
    yield "losses", ["word_recall", "word_recall_macro", "codebook_usage"], {
        row: [(partial(runs.tokenizer, flags=flags), score)
              for score in ("word_recall", "word_recall_macro", "codebook_usage")]
        for row, flags in (("focal", ""), ("BCE", "--loss bce"))}

    def experiment(score, both, its, own):
        flags, its = f"{both} {own}", f"{both} {its}"
        if score in TASKS:
            task, score = TASKS[score]
            return partial(runs.with_tokenizer, its, task, flags=flags), score
        return partial(runs.pretrained, full, flags=flags, tokenizer=its), score

    for name, (scores, rows) in EXPERIMENTS.items():
        yield name, list(scores), {row: [experiment(score, *flags) for score in scores]
                                   for row, flags in rows.items()}


NOTHING = (None, "")        # a cell without a run


def cell(get, score):
    """'61.2 (58.0-64.1)': mean and range over the seeds in percent, and how many seeds if not all."""
    values = []
    for seed in SEEDS if get else ():
        with contextlib.suppress(Absent):
            values.append(100 * lines_of(get(seed=seed))[-1][score])
    if not values:
        return "-"
    few = "" if len(values) == len(SEEDS) else f", {len(values)} of {len(SEEDS)} seeds"
    return f"{statistics.mean(values):.1f} ({min(values):.1f}-{max(values):.1f}{few})"


def main():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wanted", nargs="*", metavar="TABLE", help="tasks, table5, fig6, fig2, tokenizers "
                        "(Tables 6 and 7), from-nothing (the same without pictures first), losses, "
                        f"{', '.join(EXPERIMENTS)} (default: all)")
    parser.add_argument("--data", default="data/toy", metavar="DIR", help="default: data/toy")
    parser.add_argument("--show", action="store_true", help="only print what the finished runs give")
    args = parser.parse_args()
    runs = Runs(args.data, make=not args.show)
    whole = {table[0]: table for table in tables(runs)}
    unknown = sorted(set(args.wanted) - set(whole))
    if unknown:
        parser.error(f"{', '.join(unknown)}: there is no such table; there are {', '.join(whole)}")
    wanted = [whole[name] for name in whole if name in (args.wanted or whole)]
    if runs.make:
        # All rows have the first seed early.
        cells = [(get, seed) for seed in SEEDS for _, _, rows in wanted
                 for column in zip(*rows.values()) for get, _ in column if get]
        with ThreadPoolExecutor(2) as two:      # cells that share a run are one job, or one would wait
            made = [two.submit(get, seed=seed) for get, seed in {str(cell): cell for cell in cells}.values()]
            try:
                for one in made:
                    one.result()
            except BaseException:               # Ctrl-C stops the two that are under way as well
                two.shutdown(cancel_futures=True)
                raise
    print(f"{PRETRAIN} steps of pretraining, {FINE_TUNE} of fine-tuning, {PROBE} of the probe; test, mean "
          "(range)")
    for name, columns, rows in wanted:
        print(f"\n| {name} | " + " | ".join(columns) + " |\n|---" * 1 + "|---" * len(columns) + "|")
        for row, cells in rows.items():
            print(f"| {row} | " + " | ".join(cell(*one) for one in cells) + " |")


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)       # "--show | head" ends quietly
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on from here")
