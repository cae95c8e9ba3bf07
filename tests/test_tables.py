"""tests/tables.py, with runs that only pretend: what is made, what is left, what is printed."""
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tables


@pytest.fixture
def typed(tmp_path, monkeypatch, capsys):
    """typed("losses") runs tests/tables.py -> (the folders it made, what it printed); `fail` breaks a run."""
    monkeypatch.chdir(tmp_path)
    made = []

    def pretend(command, **_):
        folder = Path(command[command.index("--out") + 1])
        if folder.name == typed.fail:
            return SimpleNamespace(returncode=1, stderr="broken")
        made.append(folder.name)
        folder.mkdir(parents=True)
        seed = int(command[command.index("--seed") + 1])
        scores = dict.fromkeys(("word_recall", "word_recall_macro", "codebook_usage"), seed / 10)
        (folder / "metrics.jsonl").write_text(json.dumps({"split": "test", **scores}) + "\n")
        return SimpleNamespace(returncode=0)

    def typed(*words):
        made.clear()
        monkeypatch.setattr(sys, "argv", ["tables.py", *words])
        tables.main()
        return sorted(made), capsys.readouterr().out
    typed.fail = None
    monkeypatch.setattr(subprocess, "run", pretend)
    return typed


def test_a_table_makes_each_run_once_and_prints_mean_and_range(typed):
    wanted = sorted(f"tokenizer{loss}-{seed}" for loss in ("", "-loss-bce") for seed in (1, 2, 3))
    made, said = typed("losses")
    assert made == wanted
    assert "| focal | 20.0 (10.0-30.0) | 20.0 (10.0-30.0) | 20.0 (10.0-30.0) |" in said
    made, again = typed("losses")
    assert made == [] and again.splitlines()[-4:] == said.splitlines()[-4:]


def test_a_broken_run_ends_the_table_and_is_all_that_is_made_later(typed):
    typed.fail = "tokenizer-loss-bce-2"
    with pytest.raises(SystemExit, match="broken"):
        typed("losses")
    typed.fail = None
    made, said = typed("losses")
    assert "tokenizer-loss-bce-2" in made and "tokenizer-1" not in made
    assert "| BCE | 20.0 (10.0-30.0)" in said


def test_show_makes_nothing(typed):
    made, said = typed("losses", "--show")
    assert made == [] and "| focal | - | - | - |" in said
