"""tests/tables.py, with runs that only pretend: what is made, what is left, what is printed."""
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tables

import finetune
import pretrain
import train_tokenizer
from evilm import Config

SCORES = {"word_recall", "word_recall_macro", *tables.MASKED, *(score for _, score in tables.TASKS.values()),
          *(score for columns, _ in tables.EXPERIMENTS.values() for score in columns)}


@pytest.fixture
def typed(tmp_path, monkeypatch, capsys):
    """typed("losses") runs tests/tables.py -> (the folders it made, what it printed); `fail` breaks a run."""
    monkeypatch.chdir(tmp_path)
    made = []

    def pretend(command, **_):
        script = {module.__name__: module for module in (train_tokenizer, pretrain, finetune)}
        args = script[Path(command[1]).stem].parse(command[2:])
        assert all(change.partition("=")[0] in Config.__dataclass_fields__ for change in args.config)
        folder = Path(args.out)
        if folder.name == typed.fail:
            return SimpleNamespace(returncode=1, stderr="broken")
        made.append(folder.name)
        folder.mkdir(parents=True)
        lines = [{"split": split, **dict.fromkeys(SCORES, args.seed / 10)} for split in ("val", "test")]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return SimpleNamespace(returncode=0)

    def typed(*words):
        made.clear()
        monkeypatch.setattr(sys, "argv", ["tables.py", *words])
        tables.main()
        return sorted(made), capsys.readouterr().out
    typed.fail = None
    monkeypatch.setattr(subprocess, "run", pretend)
    return typed


def test_all_tables_make_each_run_once_by_flags_that_the_scripts_take_and_fill_each_cell(typed, monkeypatch):
    monkeypatch.setattr(tables, "SEEDS", (1,))
    made, output = typed()
    assert len(made) == len(set(made)) and " - " not in output and "None" not in output
    assert typed("--show") == ([], output[output.index(f"{tables.PRETRAIN} steps"):])


def test_a_broken_run_ends_the_table_and_is_all_that_is_made_later(typed):
    assert "| BCE | - | - | - |" in typed("losses", "--show")[1]
    typed.fail = "tokenizer-loss-bce-2"
    with pytest.raises(SystemExit, match="broken"):
        typed("losses")
    typed.fail = None
    made, output = typed("losses")
    assert "tokenizer-loss-bce-2" in made and "tokenizer-1" not in made
    assert "| BCE | 20.0 (10.0-30.0) | 20.0 (10.0-30.0) | 20.0 (10.0-30.0) |" in output
