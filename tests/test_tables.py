"""tests/tables.py, with runs that only pretend: what is made, what is left, what is printed."""
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import tables

import finetune
import pretrain
import train_tokenizer
from evilm import Config

SCORES = {"top1", *(name for _, columns, _ in tables.TABLES.values() for name in columns)}
BEST_RATE = 2 * max(tables.RATES)   # of the pretended runs


@pytest.fixture
def typed(tmp_path, monkeypatch, capsys):
    """typed("focal") runs tests/tables.py -> (the runs it made, the cells of the rows it printed). Of a run's
    flags, `fails` tells whether it breaks, `score` what it scores on test."""
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    monkeypatch.setattr(tables, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(tables, "RESULTS", tmp_path / "docs/results.jsonl")
    monkeypatch.setattr(tables, "DATA", tmp_path / "set")
    (tmp_path / "docs").mkdir()
    made = []

    def pretend(command, **_):
        script = {module.__name__: module for module in (train_tokenizer, pretrain, finetune)}
        args = script[Path(command[1]).stem].parse(command[2:])
        assert all(change.partition("=")[0] in Config.__dataclass_fields__ for change in args.config)
        for begin in (getattr(args, "tokenizer", "none"), getattr(args, "init", "none")):
            assert begin == "none" or (Path(begin) / "best.pt").exists(), "what it begins from is made first"
        if typed.fails(args):
            return SimpleNamespace(returncode=1, stderr="broken")
        made.append(args)
        folder = Path(args.out)
        folder.mkdir(parents=True)
        (folder / "best.pt").touch()
        val = {"split": "val", "mlm": 0, "vtm": -abs((args.lr or 0) - BEST_RATE)}
        lines = [val | {"step": step, "mc": step / 10, "vtm": val["vtm"] - 1 / step} for step in (1, 2)]
        lines.append({"split": "test", **dict.fromkeys(SCORES, typed.score(args))})
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return SimpleNamespace(returncode=0)

    def typed(*words):
        made.clear()
        monkeypatch.setattr(sys, "argv", ["tables.py", *words])
        tables.main()
        rows = re.findall(r"^\| (.*) \|$", capsys.readouterr().out, re.MULTILINE)
        return list(made), [re.split(r" *\| *", row) for row in rows if " | paper | " not in row]
    typed.fails, typed.score = lambda args: False, lambda args: args.seed / 10
    monkeypatch.setattr(subprocess, "run", pretend)
    return typed


def test_all_tables_make_each_run_once_by_flags_that_the_scripts_take_and_fill_each_cell(typed, monkeypatch):
    monkeypatch.setattr(tables, "TABLES", {name: ([1], *rest) for name, (_, *rest) in tables.TABLES.items()})
    monkeypatch.setattr(tables, "SEEDS", [1])
    nothing, rows = typed("--show", *tables.TABLES)
    assert not nothing and rows and {cell for row in rows for cell in row[3:]} == {"-"}
    made, rows = typed(*tables.TABLES)
    assert len({args.out for args in made}) == len(made) == len(tables.results())
    cells = {cell.removesuffix(f" at {BEST_RATE:g}") for row in rows for cell in row[3:]}
    assert cells <= {"10.0 (10.0-10.0)", "0.1 (0.1-0.1)", "+0.0"}
    assert (tables.ROOT / "docs/mc.png").exists()
    shutil.rmtree(tables.RUNS)
    assert typed(*tables.TABLES) == ([], rows), "the results alone are enough"


def test_a_rate_is_chosen_on_val_by_a_seed_of_its_own_and_goes_on_from_the_edge(typed, monkeypatch):
    taken = tables.Row("takes it", tables.WITHOUT, rates_of=tables.FULL)
    given = tables.Row("has its own", tables.WITHOUT, at=3e-4)
    monkeypatch.setitem(tables.TABLES, "mine", ([1, 2], ["mc"], (tables.FULL, taken, given)))
    made, rows = typed("mine")
    runs = sorted((args.seed, args.lr, args.objectives[2:]) for args in made if hasattr(args, "objectives"))
    reported = (3e-4, ()), (BEST_RATE, ()), (BEST_RATE, ("mvm",))
    assert runs == [*((seed, *run) for seed in (1, 2) for run in reported),
                    *((tables.CHOICE_SEED, lr, ("mvm",)) for lr in (*tables.RATES, BEST_RATE, 2 * BEST_RATE))]
    assert [row[2] for row in rows] == [str(BEST_RATE), str(BEST_RATE), "0.0003", "", "", ""]


def test_a_task_has_a_rate_for_each_row_and_a_twentieth_of_the_lines(typed, monkeypatch, tmp_path):
    data = tmp_path / "set"
    (data / "clips").mkdir(parents=True)
    for split, lines in (("train", 40), ("test", 3)):
        (data / f"qa_{split}.jsonl").write_text("".join(f"{n}\n" for n in range(lines)))
    rows = tables.Row("from scratch"), replace(tables.BASE, at=3e-4)
    monkeypatch.setitem(tables.TABLES, "mine", ([1, 2], ["QA, a twentieth"], rows))
    made, printed = typed("mine")
    tasks = [(args.seed, args.lr, Path(args.data)) for args in made if hasattr(args, "task")]
    less = tables.twentieth()
    rates = *tables.RATES, BEST_RATE, 2 * BEST_RATE
    assert sorted(tasks) == sorted(2 * [(1, BEST_RATE, less), (2, BEST_RATE, less),
                                        *((tables.TASK_SEED, rate, less) for rate in rates)])
    assert {args.lr for args in made if not hasattr(args, "task")} == {3e-4}
    assert (less / "qa_train.jsonl").read_text().split() == ["0", "20"]
    assert (less / "qa_test.jsonl").read_text().split() == ["0", "1", "2"]
    assert (less / "clips").samefile(data / "clips")
    assert [row[3] for row in printed] == 2 * [f"15.0 (10.0-20.0) at {BEST_RATE:g}"] + ["+0.0 ± 0.0"]


def test_a_broken_run_ends_the_table_and_what_is_left_is_made_later(typed):
    typed.fails = lambda args: args.loss == "bce" and args.seed == 2
    with pytest.raises(SystemExit, match="broken"):
        typed("focal")
    before = set(tables.results())
    assert before and typed("focal", "--show")[0] == []
    typed.fails = lambda args: False
    made, rows = typed("focal")
    assert len(made) == 10 - len(before) and len(tables.results()) == 10
    assert rows[0][3:] == ["30.0 (10.0-50.0)", "0.3 (0.1-0.5)", *["30.0 (10.0-50.0)"] * 2]


def test_rows_are_compared_by_seed_with_students_interval_and_a_score_of_zero_counts(typed, monkeypatch):
    monkeypatch.setitem(tables.TABLES, "focal", ([1, 2, 3], ["word_recall"], tables.TABLES["focal"][2]))
    typed.score = lambda args: {"bce": (0, 0.1, 0.2), "focal": (0.03, 0.12, 0.24)}[args.loss][args.seed - 1]
    # Differences 3, 2 and 4: mean 3, deviation 1; t is 4.303 for 2 degrees of freedom; half is 2.48.
    assert [row[3] for row in typed("focal")[1]] == ["10.0 (0.0-20.0)", "13.0 (3.0-24.0)", "+3.0 ± 2.5"]
    for n, t in ((2, 12.706), (3, 4.303), (4, 3.182), (5, 2.776), (10, 2.262)):      # deviation n ** -0.5
        assert tables.interval([1.0] + [0.0] * (n - 1)) == pytest.approx((1 / n, t / n), rel=1e-3)
