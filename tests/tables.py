"""The paper's claims on the synthetic set: Tables 5 to 7, Figs. 2 and 6, masking, the focal loss.

    python tests/tables.py                  names the tables and the hours that each still takes
    python tests/tables.py table5           trains what is missing, two runs side by side on a thread each
    python tests/tables.py table5 --show    prints what docs/results.jsonl holds

Each run's last metrics line is kept in docs/results.jsonl under a hash of its script, flags, Config, the
set's version and the runs that it begins from; what is there is not run again. Runs lie in runs/tables:
Ctrl-C stops, the same command goes on. A row has a learning rate of its own, chosen on val with a seed that
is not reported, over rates that are extended until the best is not at the edge, or that of the row with the
same objectives in Table 5; table5-longer has a given rate, and focal the preset's.
"""
import argparse
import functools
import hashlib
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from evilm import Config, read_metrics                              # noqa: E402
from toy_data import plots, synthetic                               # noqa: E402

RESULTS, RUNS, DATA = ROOT / "docs/results.jsonl", Path("runs/tables"), Path(synthetic.SYNTHETIC)
CONFIG = asdict(Config.toy()) | {"lr": None}    # the flags have it
CHOICE_SEED = 10                                # chooses rates, and chose the set and the preset
TASK_SEED = 16                                  # chooses rates of tasks, whose table has seeds 11 to 15
SEEDS, FORMER = range(11, 21), range(1, 6)      # the former ones' results led to the number of steps
RATES = (5e-4, 1e-3)
MINUTES = {"train_tokenizer.py": 1, "pretrain.py": 3, "finetune.py": 3}     # of an epoch on one thread
T_95 = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
ZERO_SHOT = ("vtm", "mlm", "mc", "r1", "r10")
WITHOUT, WITH = "--tokenizer none --objectives vtm,mlm", "--objectives vtm,mlm,mvm"
TASKS = {"QA": ("qa", "top1"), "retrieval": ("retrieval", "r10"), "probe": ("probe", "top1"),
         "QA, a twentieth": ("qa --epochs 10", "top1"),
         "retrieval, a twentieth": ("retrieval --epochs 20", "r10")}


@dataclass(frozen=True)
class Job:
    """One run of a script; `begins` are pairs of a flag and the run whose folder it takes, `twentieth`
    says that it is trained on every 20th line of its split."""
    script: str
    flags: str
    seed: int
    begins: tuple = ()
    twentieth: bool = False

    @property
    def key(self):
        begins = [(flag, job.key) for flag, job in self.begins] + ["a twentieth"] * self.twentieth
        parts = [self.script, self.flags, self.seed, CONFIG, synthetic.VERSION, begins]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]

    @property
    def folder(self):
        return RUNS / f"{Path(self.script).stem}-{self.key}"

    def result(self):
        return results().get(self.key)

    def minutes(self):
        """Of this run, and of those that it begins from where their checkpoints are missing."""
        usual = {"train_tokenizer.py": Config.toy().tokenizer_epochs, "pretrain.py": Config.toy().epochs}
        epochs = re.search(r"--epochs (\d+)", self.flags)
        own = MINUTES[self.script] * (int(epochs[1]) if epochs else usual.get(self.script, 1))
        own /= 20 if self.twentieth else 1
        return own + sum(job.minutes() for _, job in self.begins if not (job.folder / "best.pt").exists())


LOCKS = defaultdict(threading.Lock)             # two rows may begin from the same run


def twentieth():
    """A folder beside the runs with the set's clips, every 20th line to train on, and all others."""
    folder = RUNS / f"twentieth-{synthetic.VERSION}"
    with LOCKS["twentieth"]:
        if not folder.exists():
            draft = folder.with_suffix(".part")
            shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir(parents=True)
            (draft / "clips").symlink_to((DATA / "clips").resolve())
            for file in DATA.glob("*.jsonl"):
                lines = file.read_text().splitlines(keepends=True)
                (draft / file.name).write_text("".join(lines[::20] if "train" in file.name else lines))
            draft.rename(folder)
    return folder


def results():
    """{key: line} of docs/results.jsonl, read again when it has grown: it is asked for thousands of times."""
    return read_results(RESULTS, RESULTS.stat().st_size) if RESULTS.exists() else {}


@functools.cache
def read_results(path, size):
    return {line["key"]: line for line in map(json.loads, path.read_text().splitlines())}


def make(job, checkpoint=False):
    """Runs what is missing of a job: its result or, where another run begins from it, its checkpoint."""
    with LOCKS[job.key]:
        if job.result() and not (checkpoint and not (job.folder / "best.pt").exists()):
            return
        for _, begin in job.begins:
            make(begin, checkpoint=True)
        begins = [word for flag, begin in job.begins for word in (flag, str(begin.folder))]
        command = [sys.executable, str(ROOT / job.script), *job.flags.split(), *begins,
                   "--data", str(twentieth() if job.twentieth else DATA),
                   "--seed", str(job.seed), "--out", str(job.folder), "--workers", "0"]
        if (job.folder / "last.pt").exists():
            command.append("--resume")
        print(f"{time.strftime('%H:%M')}  {job.script} {job.flags} --seed {job.seed}\n", end="", flush=True)
        one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=one_thread, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)}\n{done.stderr[-2000:]}")
        lines = read_metrics(job.folder)
        val = [line for line in lines if line["split"] == "val"]
        line = {"key": job.key, "script": job.script, "flags": job.flags, "seed": job.seed,
                "val": max(map(selection, val)), "mc": [(v["step"], v["mc"]) for v in val if "mc" in v],
                "test": {name: round(x, 5) for name, x in lines[-1].items() if isinstance(x, (int, float))}}
        with LOCKS["results"], open(RESULTS, "a") as file:
            if not job.result():
                file.write(json.dumps(line) + "\n")


def selection(line):
    """The val score that chooses rates, the same in all rows of a table."""
    if "vtm" in line:
        return (line["vtm"] + line["mlm"]) / 2
    return line.get("r1", line.get("top1", -line.get("word_loss", line.get("pixel_loss", 0))))


def make_all(jobs):
    with ThreadPoolExecutor(2) as two:
        made = [two.submit(make, job) for job in dict.fromkeys(jobs)]
        try:
            for one in made:
                one.result()
        except BaseException:                   # Ctrl-C stops the two that are under way as well
            two.shutdown(cancel_futures=True)
            raise


# ---------------------------------------------------------------------------------------------------- tables


@dataclass(frozen=True)
class Row:
    """A row of a table. `flags` are pre-training's (None: it is about tokenizers, or tasks from scratch),
    `tokenizer` its tokenizer's (None: it has none), `rates_of` the row whose rate it takes, or `at` a rate,
    `tasks_of` the row whose rates of tasks it takes, if another, and `paper` the paper's figure."""
    name: str
    flags: str = None
    tokenizer: str = None
    paper: str = "-"
    rates_of: "Row" = None
    at: float = None
    tasks_of: "Row" = None

    def pretrained(self, seed, rate):
        begins = () if self.tokenizer is None else (
            ("--tokenizer", Job("train_tokenizer.py", self.tokenizer, seed)),)
        return Job("pretrain.py", f"{self.flags} --lr {rate:g}", seed, begins)

    def job(self, column, seed, rate=None):
        """The run that gives a column's score for a seed, at its own rate or the one given."""
        if self.flags is None and column not in TASKS:
            return Job("train_tokenizer.py", self.tokenizer, seed)
        rate = rate or self.rate(column)
        if column not in TASKS:
            return self.pretrained(seed, rate)
        flags, less = f"{TASKS[column][0]} --lr {rate:g}", "twentieth" in column
        if self.flags is None:
            return Job("finetune.py", f"{flags} --init none", seed, (), less)
        return Job("finetune.py", flags, seed, (("--init", self.pretrained(seed, self.rate())),), less)

    def tried(self, column=None):
        """The runs that choose the rate, {rate: run}: extended until the best is not at the edge."""
        rates, seed = sorted(RATES), TASK_SEED if column in TASKS else CHOICE_SEED
        while True:
            runs = {rate: self.job(column, seed, rate) for rate in rates}
            found = {rate: run.result()["val"] for rate, run in runs.items() if run.result()}
            best = max(found, key=found.get, default=None)
            if len(found) < len(rates) or best not in (rates[0], rates[-1]):
                return runs, best
            rates = sorted([*rates, best / 2 if best == rates[0] else best * 2])

    def rate(self, column=None):
        """The best rate on val, a task's or pre-training's; None where a run that chooses it is missing."""
        if self.at and column not in TASKS:
            return self.at
        runs, best = self.chooser(column).tried(column)
        return best if all(run.result() for run in runs.values()) else None

    def chooser(self, column):
        """The row whose runs choose the rate of a column."""
        return (self.tasks_of if column in TASKS else None) or self.rates_of or self

    def needs(self, column, seeds):
        """The runs that a column rests on, those that choose rates first: -> them, whether they are all."""
        chosen = ["pre-training"] * (self.flags is not None) + [column] * (column in TASKS)
        for what in chosen:
            if not self.rate(what):
                return list(self.chooser(what).tried(what)[0].values()), False
        return [self.job(column, seed) for seed in seeds], True


BASE = Row("VTM+MLM", WITHOUT, None, "MC 72.8, R@10 60.1")
MASKED = Row("masked, nothing predicted", WITH + " --config mvm_weight=0.0", "")
FULL = Row("VTM+MLM+MVM", WITH, "", "MC 89.2, R@10 64.4")
ATTRIBUTES = tuple(f"mc_{name}" for name in "colour shape binding background motion unseen".split())
LONGER = (replace(BASE, flags=WITHOUT + " --epochs 8", at=5e-4),
          *(Row(f"VTM+MLM+MVM, tokenizer of {250 * epochs:,} steps", WITH + " --epochs 8",
                f"--epochs {epochs}", FULL.paper, at=5e-4) for epochs in (1, 4)))
TABLES = {          # seeds, columns, rows; each row is compared with those before it
    "table5": (SEEDS, (*ZERO_SHOT, "mlm_other", *ATTRIBUTES, "mvm", "mvm_mode", "mvm_copy", "distinct"), (
        BASE, FULL)),
    "table5-controls": (SEEDS[:5], (*ZERO_SHOT, "mc_colour", "QA, a twentieth", "probe"), (
        BASE, replace(MASKED, tasks_of=FULL), FULL,
        Row("VTM+MLM, longer by the tokenizer's time", WITHOUT + " --epochs 5", rates_of=BASE))),
    "table5-longer": (FORMER, (*ZERO_SHOT, "mc_background", "mc_motion", "mvm", "mvm_mode", "distinct"),
                      LONGER),
    "table5-tasks": (SEEDS[:5], tuple(TASKS), (
        Row("from scratch", paper="QA 32.8, R@10 51.0"),
        replace(BASE, paper="QA 35.6, R@10 60.1, HMDB51 39.6"),
        replace(FULL, paper="QA 39.3, R@10 64.4, HMDB51 41.6"))),
    "table6-7": (SEEDS[:5], (*ZERO_SHOT, "mc_colour", "QA, a twentieth", "probe", "mvm", "mvm_copy",
                             "distinct"), (
        replace(BASE, paper="QA 37.9, HMDB51 33.9"),
        Row("MVM of pixels", WITH, "--target pixels", "QA 38.1, HMDB51 34.2", FULL),
        replace(FULL, name="MVM of words, ViT", paper="QA 39.3, HMDB51 41.6"),
        Row("MVM of words, Video Swin", WITH, "--encoder videoswin", "QA 38.5, HMDB51 51.3", FULL))),
    "fig2": (SEEDS[:3], ("mc", "r10", "vtm"), tuple(
        replace(row, name=f"{row.name}, width 48", flags=f"{row.flags} --config width=48", rates_of=row)
        for row in (BASE, FULL))),
    "masks": (SEEDS[:3], ("mvm", "mvm_copy", "mvm_mode", "mc", "vtm"), (
        FULL, *(Row(name, f"{WITH} --config {change}", "", rates_of=FULL) for name, change in (
            ("20%", "mask_ratio=0.2"), ("60%", "mask_ratio=0.6"), ("single patches", "blocks=False"))))),
    "focal": (FORMER, ("codebook_usage", "codebook_perplexity", "word_recall", "word_recall_macro"), tuple(
        Row(loss, None, f"--loss {loss} --revive-after 0 --epochs 1 --config codes=512", paper)
        for loss, paper in (("bce", "usage 64.2"), ("focal", "usage 92.0")))),
}


def missing(name):
    """The runs that a table still needs, as far as its rates are known, seed by seed."""
    seeds, columns, rows = TABLES[name]
    jobs = [job for row in rows for column in columns for job in row.needs(column, seeds)[0]]
    return sorted((job for job in dict.fromkeys(jobs) if not job.result()), key=lambda job: job.seed)


def scores(row, column, seeds):
    """A column's score of each seed, in percent where it is a fraction; None where there is no run."""
    jobs, rates_known = row.needs(column, seeds)
    if not rates_known:
        return [None] * len(seeds)
    found = [job.result() for job in jobs]
    name = TASKS[column][1] if column in TASKS else column
    factor = 1 if column in ("codebook_perplexity", "distinct") else 100
    return [factor * result["test"][name] if result and name in result["test"] else None for result in found]


def interval(values):
    """Mean and half the 95% interval by Student's t, which T_95 has for each number of values."""
    half = T_95[len(values)] * statistics.stdev(values) / len(values) ** 0.5 if len(values) in T_95 else None
    return statistics.mean(values), half


def show(name):
    """The table in Markdown: means and ranges, then each row minus those before it, paired by seed."""
    seeds, columns, rows = TABLES[name]
    print(f"\n| {name} | paper | rate | " + " | ".join(columns) + " |\n" + "|---" * (3 + len(columns)) + "|")

    def print_row(start, cell, *of):
        cells = []
        for column in columns:
            found = zip(*(scores(row, column, seeds) for row in of))
            found = [values for values in found if None not in values]
            few = f", {len(found)} seeds" if len(found) < len(seeds) else ""
            cells.append(cell(column, found) + few if found else "-")
        print(f"| {start} | " + " | ".join(cells) + " |")

    def mean_and_range(column, found):
        values = [value for value, in found]
        rate = f" at {row.rate(column):g}" if column in TASKS else ""
        return f"{statistics.mean(values):.1f} ({min(values):.1f}-{max(values):.1f}){rate}"

    def difference(_, found):
        mean, half = interval([one - other for one, other in found])
        return f"{mean:+.1f}" + (f" ± {half:.1f}" if half is not None else "")

    for row in rows:
        rate = row.rate() if row.flags is not None else None
        print_row(f"{row.name} | {row.paper} | {rate or '-'}", mean_and_range, row)
    for row in rows:
        for other in rows[:rows.index(row)]:
            print_row(f"{row.name} minus {other.name} | |", difference, row, other)


def draw_fig6(path):
    """The README's first picture: multiple choice on val during pre-training, of the seeds that are there."""
    _, _, rows = TABLES["table5"]
    curves = {row: {seed: run["mc"] for seed in SEEDS if row.rate() and (run := row.job("mc", seed).result())}
              for row in rows}
    both = [seed for seed in SEEDS if all(seed in found for found in curves.values())]
    if not both:
        return
    means = {row.name: [(points[0][0], statistics.mean(y for _, y in points))
                        for points in zip(*(found[seed] for seed in both))] for row, found in curves.items()}
    panels = [(f"mean of {len(both)} seeds", means, {"chance": 0.2}, True)]
    for row, found in curves.items():
        panels.append((row.name, {f"seed {seed}": found[seed] for seed in both}, {"chance": 0.2}, True))
    plots.curves(panels, path, "Zero-shot multiple choice on val while pre-training")


def main():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=", ".join(TABLES))
    parser.add_argument("--show", action="store_true", help="only print what docs/results.jsonl holds")
    args = parser.parse_args()
    if unknown := sorted(set(args.tables) - set(TABLES)):
        parser.error(f"{', '.join(unknown)}: there is no such table; there are {', '.join(TABLES)}")
    for name in args.tables or TABLES:
        seeds, columns, rows = TABLES[name]
        minutes = sum(job.minutes() for job in missing(name))
        for row in rows:                        # what comes once the rates are known
            later = {column if column in TASKS else "pre-training" for column in columns
                     if not row.needs(column, seeds)[1]}
            minutes += len(seeds) * sum(MINUTES["finetune.py"] if column in TASKS else
                                        MINUTES["pretrain.py"] * Config.toy().epochs for column in later)
        print(f"{name}: about {minutes / 120:.1f} hours to go")
    if args.tables and not args.show:
        synthetic.render_if_missing(DATA)
    for name in args.tables:
        while not args.show and (jobs := missing(name)):        # the rates first, then what they decide
            make_all(jobs)
        show(name)
        if name == "table5" and not args.show:
            draw_fig6(ROOT / "docs/mc.png")


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)       # "--show | head" ends quietly
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on from here")
