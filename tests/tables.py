"""Toy versions of the paper's Tables 5 to 7 and Figs. 2 and 6, what pre-training gives each task, and the
experiments of docs/results.md, each over 3 seeds.

    python tests/tables.py                  everything: many hours on 2 cores
    python tests/tables.py tasks table5     some of it, by the names that --help lists
    python tests/tables.py --show           the tables of the runs that are there

All rows have the same number of steps. Runs lie in runs/tables: stop with Ctrl-C and start again at will, a
run that was stopped goes on from its last.pt. Two runs go side by side, each on one thread.
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
PRETRAIN_LR = 1e-3
SEEDS, CHOICE_SEED = (1, 2, 3), 100             # the seed that chooses a learning rate is not reported
LEARNING_RATES = (5e-4, 1e-3, 2e-3)             # tried on val for a model that is not pre-trained
FULL, WITHOUT_MVM = "vtm,mlm,mvm", "vtm,mlm"
ROWS = {"from scratch": None, "VTM": "vtm", "VTM+MLM": WITHOUT_MVM, "VTM+MLM+MVM": FULL}
TASKS = {"retrieval": ("retrieval", "r1"), "QA": ("qa", "top1"), "MC caption": ("mc --set caption", "top1"),
         "probe": ("probe", "top1")}
POINTS = (0.2, 0.4, 0.6, 0.8, 1.0)
SIZES = {"small": "--config dims=8,16,32,64 --config width=64", "toy": "",
         "large": "--config dims=24,48,96,192 --config width=192"}
TOKENIZERS = {"none": (WITHOUT_MVM, ""), "pixels": (FULL, "--target pixels"),
              "VideoSwin": (FULL, "--encoder videoswin"), "ViT, BCE": (FULL, "--loss bce"),
              "ViT, focal": (FULL, "")}
FINER = "--config size=96 --config frames=2"    # 3x3 patches a frame: of 2x2, few ratios differ
MASKED = ("mvm", "mvm_copy", "mvm_mode", "mc", "vtm")
EXPERIMENTS = {     # columns, and of each row: flags of both stages, of the tokenizer, of pre-training
    "mask-ratio": (MASKED, {f"{ratio:.0%}": (FINER, "", f"--config mask_ratio={ratio}")
                            for ratio in (0.1, 0.25, 0.4, 0.6, 0.8)}),
    "blocks": (MASKED, {"block-wise": (FINER, "", "--config mask_ratio=0.4"),
                        "single patches": (FINER, "", "--config mask_ratio=0.4 --config blocks=False")}),
    "mvm-weight": (("mc", "mc_shape", "r1", "vtm", "mlm"), {
        "1": ("", "", ""), "0: masked, none predicted": ("", "", "--config mvm_weight=0.0")}),
    "codes": (("codebook_usage", "mvm", "mvm_copy", "mc"), {
        "8": ("", "--config codes=8", ""), "64": ("", "", ""), "512": ("", "--config codes=512", "")}),
    "code-dim": (("codebook_usage", "mvm", "mvm_copy", "mc"), {
        "2": ("", "--config code_dim=2", ""), "16": ("", "", "")}),
    "frames": (("probe", "mc_colour", "mc", "vtm"), {
        "1": ("", "", "--config frames=1"), "2": ("", "", "--config frames=2"), "4": ("", "", ""),
        "8": ("", "", "--config frames=8")}),
    "vocabulary": (("mlm", "mc", "vtm", "r10"), {
        "all words": ("", "", ""), "40": ("--config vocab_rows=40", "", "")}),
    "negatives": (("vtm", "mc", "mc_colour", "mc_shape", "r10"), {
        "random": ("", "", ""), "hardest of 8": ("", "", "--config negatives=8")}),
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
                       "--workers", "0"]
            if (folder / "last.pt").exists():
                command.append("--resume")
            print(f"{time.strftime('%H:%M')}  {name}\n", end="", flush=True)      # two threads, whole lines
            done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True,
                                  text=True)
            if done.returncode:
                raise SystemExit(f"{' '.join(command)}\n{done.stderr[-2000:]}")
        return folder

    def tokenizer(self, seed, flags=""):
        return self.run(f"tokenizer{short(flags)}-{seed}", "train_tokenizer.py", "--seed", str(seed),
                        *flags.split())

    def pretrained(self, objectives, seed, flags="", tokenizer=""):
        """`flags` are pre-training's, `tokenizer` its tokenizer's."""
        labels = str(self.tokenizer(seed, tokenizer)) if "mvm" in objectives else "none"
        return self.run(f"pretrain-{objectives}{short(flags)}{short(tokenizer)}-{seed}", "pretrain.py",
                        "--objectives", objectives, "--max-steps", str(PRETRAIN), "--lr", str(PRETRAIN_LR),
                        "--seed", str(seed), "--keep-at", ",".join(map(str, POINTS)), "--tokenizer", labels,
                        *flags.split())

    def fine_tuned(self, task, init, seed, name, *flags):
        steps = PROBE if task == "probe" else FINE_TUNE
        return self.run(f"{name}-{task.replace(' --set ', '-')}-{seed}", "finetune.py", *task.split(),
                        "--init", str(init), "--seed", str(seed), "--max-steps", str(steps), *flags)

    def task(self, objectives, task, seed, flags="", tokenizer=""):
        """A task fine-tuned from a model pre-trained on `objectives`, or from scratch (None)."""
        if objectives is None:
            return self.from_scratch(task, seed)
        init = self.pretrained(objectives, seed, flags, tokenizer)
        name = init.name.removeprefix("pretrain-").removesuffix(f"-{seed}")
        return self.fine_tuned(task, init, seed, f"from-{name}")

    def from_scratch(self, task, seed):
        """A task without pre-training, at the learning rate that is best on val for a seed not reported."""
        def best_on_val(lr):
            lines = lines_of(self.fine_tuned(task, "none", CHOICE_SEED, f"choose-{lr:g}", "--lr", str(lr)))
            return max(line.get("r1", line.get("top1")) for line in lines if line["split"] == "val")
        lr = max(LEARNING_RATES, key=best_on_val)
        return self.fine_tuned(task, "none", seed, "from-scratch", "--lr", str(lr))

    def at(self, objectives, point, task, seed):
        """Fig. 6: the model at a fraction of its pre-training, probed, or scored on questions as it is."""
        init = self.pretrained(objectives, seed) / f"at-{point:g}.pt"
        flags = [] if task == "probe" else ["--zero-shot"]
        return self.fine_tuned(task, init, seed, f"at-{point:g}-{objectives}", *flags)


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
    def row(objectives, names, flags="", tokenizer=""):
        """Cells of a row: names of TASKS, or scores of pre-training."""
        flags = {"flags": flags.strip(), "tokenizer": tokenizer.strip()}
        return [(partial(runs.task, objectives, TASKS[name][0], **flags), TASKS[name][1]) if name in TASKS
                else (partial(runs.pretrained, objectives, **flags), name) for name in names]

    yield "tasks", list(TASKS), {"from scratch": row(None, TASKS), "pre-trained": row(FULL, TASKS)}
    columns = ["retrieval", "QA", "MC caption"]
    yield "table5", columns, {name: row(objectives, columns) for name, objectives in ROWS.items()}
    both = {"without MVM": WITHOUT_MVM, "with MVM": FULL}
    yield "fig6", [f"{kind} {point:.0%}" for kind in ("MC", "probe") for point in POINTS], {
        name: [(partial(runs.at, objectives, point, task), "top1")
               for task in ("mc --set caption", "probe") for point in POINTS]
        for name, objectives in both.items()}
    yield "fig2", list(SIZES), {name: [row(objectives, ["mc"], flags)[0] for flags in SIZES.values()]
                                for name, objectives in both.items()}
    columns = ["codebook_usage", "mc", "vtm", "r10", "probe", "QA"]
    yield "tokenizers", columns, {name: row(objectives, columns, tokenizer=flags)
                                  for name, (objectives, flags) in TOKENIZERS.items()}
    columns = ["word_recall", "word_recall_macro", "codebook_usage"]
    yield "losses", columns, {name: [(partial(runs.tokenizer, flags=flags), score) for score in columns]
                              for name, flags in (("focal", ""), ("BCE", "--loss bce"))}
    for name, (columns, rows) in EXPERIMENTS.items():
        yield name, list(columns), {name: row(FULL, columns, f"{shared} {own}", f"{shared} {its}")
                                    for name, (shared, its, own) in rows.items()}


def cell(get, score):
    """'61.2 (58.0-64.1)': mean and range over the seeds in percent, and how many seeds if not all."""
    values = []
    for seed in SEEDS:
        with contextlib.suppress(Absent, KeyError):     # without MVM there is no codebook
            values.append(100 * lines_of(get(seed=seed))[-1][score])
    if not values:
        return "-"
    few = "" if len(values) == len(SEEDS) else f", {len(values)} of {len(SEEDS)} seeds"
    return f"{statistics.mean(values):.1f} ({min(values):.1f}-{max(values):.1f}{few})"


def main():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wanted", nargs="*", metavar="TABLE", help="tasks, table5, fig6, fig2, tokenizers "
                        f"(Tables 6 and 7), losses, {', '.join(EXPERIMENTS)} (default: all)")
    parser.add_argument("--data", default="data/toy", metavar="DIR", help="default: data/toy")
    parser.add_argument("--show", action="store_true", help="only print what finished runs give")
    args = parser.parse_args()
    runs = Runs(args.data, make=not args.show)
    whole = {table[0]: table for table in tables(runs)}
    unknown = sorted(set(args.wanted) - set(whole))
    if unknown:
        parser.error(f"{', '.join(unknown)}: there is no such table; there are {', '.join(whole)}")
    wanted = [whole[name] for name in whole if name in (args.wanted or whole)]
    if runs.make:
        cells = [(get, seed) for seed in SEEDS for _, _, rows in wanted
                 for column in zip(*rows.values()) for get, _ in column]           # first seeds first
        with ThreadPoolExecutor(2) as two:      # cells that share a run are one job, or one would wait
            made = [two.submit(get, seed=seed) for get, seed in {str(cell): cell for cell in cells}.values()]
            try:
                for one in made:
                    one.result()
            except BaseException:               # Ctrl-C stops the two that are under way as well
                two.shutdown(cancel_futures=True)
                raise
    print(f"{PRETRAIN} steps of pre-training, {FINE_TUNE} of fine-tuning, {PROBE} of the probe; test, "
          "mean (range)")
    for name, columns, rows in wanted:
        print(f"\n| {name} | " + " | ".join(columns) + " |\n" + "|---" * (1 + len(columns)) + "|")
        for row, cells in rows.items():
            print(f"| {row} | " + " | ".join(cell(*one) for one in cells) + " |")


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)       # "--show | head" ends quietly
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on from here")
