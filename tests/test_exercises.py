"""Exercises: their claims hold for the original, fail for the emptied part, and find typical slips."""
import ast
import os
import shutil
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import exercises
import pytest
import torch
from exercises import EXERCISES, difference, emptied, lines_of_cut, named, replaced, target_of

ROOT = Path(__file__).resolve().parents[1]
SOURCE = (ROOT / "evilm.py").read_text()
each = pytest.mark.parametrize("exercise", EXERCISES, ids=lambda exercise: exercise.name)


@pytest.fixture(scope="module")
def process():
    """One for all: what takes a second a time is to import PyTorch."""
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        yield process


@pytest.fixture
def why(process, tmp_path):
    """why(exercise, source): what `check` finds in that text of evilm.py, {test: None or reasons}."""
    def found(exercise, source):
        path, claims = tmp_path / "evilm.py", exercise.claims
        path.write_text(source)
        process.submit(exercises.examine, path, claims, 100, tmp_path).result()
        return exercises.findings(path, list(claims), tmp_path)
    return found


# -------------------------------------------------------------------------------------------- Every exercise

@pytest.mark.slow
@each
def test_all_claims_hold_for_the_original_and_none_for_the_emptied_part(why, exercise):
    assert why(exercise, SOURCE) == dict.fromkeys(exercise.claims)
    found = why(exercise, emptied(SOURCE, exercise))
    assert list(found) == list(exercise.claims)
    for reasons in found.values():
        assert "raise NotImplementedError" in reasons[0] and reasons[1] == "This part is still to be written."


# (exercise, what stands there, what a student writes in its place); "" stands for the whole part.
SLIPS = [
    ("xca", "(q, dim=-1)", "(q, dim=-2)"), ("xca", "softmax(-1)", "softmax(-2)"), ("xca", "self.proj(", "("),
    ("xca", "self.temperature", "self.temperature.data"),
    ("cascade", "+ parts[i - 1]", "+ x.split(self.split, 1)[i - 1]"),
    ("cascade", "enumerate(self.convs)", "enumerate(self.convs[:len(parts) - 1])"),
    ("wordpiece", 'return ["[UNK]"]', 'return found + ["[UNK]"]'),
    ("wordpiece", 'found or ["[UNK]"]', "found"), ("wordpiece", '"##" if start else ""', '""'),
    ("fuse", "mask, mask.new_ones(B, patches", "mask | True, mask.new_ones(B, patches"),
    ("fuse", "self.token_type", "self.token_type.data"),
    ("block-mask", "", "return random_mask(n, grid, ratio, generator)"),
    ("block-mask", "[:wanted]", ""),
    ("mask-frames", "repeat_interleave(patch, -2)", "repeat(1, 1, patch, 1)"),
    ("mvm-loss", "len(targets) if count is None else count", "len(targets)"),
    ("mvm-loss", "F.cross_entropy(logits.float(), targets, reduction=\"sum\")",
     "-logits.float().softmax(1).gather(1, targets[:, None]).log().sum()"),
    ("mvm-loss", "max(1, len(targets) if count is None else count)", "(count or len(targets))"),
    ("nearest-code", "F.normalize(self.codebook.float(), dim=-1)", "self.codebook.float()"),
    ("nearest-code", "self.codebook.float()", "self.codebook.detach()"),
    ("nearest-code", "x.float()", "x.float().detach()"),
    ("read-words", "decode(quantized)", "decode(quantized.mean((1, 2, 3), keepdim=True))"),
    ("read-words", "self.decode(quantized)", "self.decode(quantized).detach()"),
    ("focal-loss", "F.logsigmoid(-logits)", "(1 - torch.sigmoid(logits)).log()"),
    ("focal-loss", "-torch.sigmoid(logits) *", "-torch.sigmoid(logits).detach() *"),
    ("straight-through", "(x.detach() - nearest)", "(x - nearest)"),
    ("straight-through", "x + (nearest - x).detach()", "x"),
    ("svq-loss", "word_weight * token", "token"), ("svq-loss", "word_logits.float()", "word_logits"),
    ("mask-words", "", "masked = (torch.rand(len(ids), generator=generator) < ratio) & (ids > MASK)\n"
                       "return torch.where(masked, MASK, ids), masked"),
    ("mask-words", "ids.clone()", "ids"), ("mask-words", "chance < 0.9", "chance < 1"),
    ("mask-words", "chance = torch.rand(count, generator=generator)", "chance = torch.arange(count) / count"),
    ("joint-pass", "torch.cat([mask, mismatched[1]])", "torch.cat([mask, mask])"),
    ("joint-pass", "self.pooler(h_cls)", "self.pooler(h_cls.detach())"),
    ("joint-pass", "h_text[:B]", "h_text.detach()[:B]"),
    ("joint-pass", "self.mvm_head(", "self.mvm_head(h_video[:B])[masked_patches]; ("),
    ("pretraining-loss", "mask_frames(frames, masked_patches)", "frames"),
    ("pretraining-loss", 'batch["ids"]', 'batch["masked_ids"]'),
    ("pretraining-loss", ', counts.get("mvm")', ""), ("pretraining-loss", "weights[name] * loss", "loss"),
    ("recall-at-k", "", "return None"), ("recall-at-k", "<", "<="), ("recall-at-k", " - tolerance", "")]


@pytest.mark.slow
@pytest.mark.parametrize("name, old, new", SLIPS)
def test_the_claims_find_a_slip_and_say_what_is_wrong(why, name, old, new):
    exercise = named(name)
    first, last, _ = lines_of_cut(SOURCE, exercise)
    part = "\n".join(SOURCE.splitlines()[first:last])
    assert old in part, "the slip is to be made in the part as it stands"
    found = why(exercise, replaced(SOURCE, exercise, part.replace(old, new) if old else new))
    reasons = next(lines for lines in found.values() if lines)
    assert any(line.startswith(("expected ", "Is a return missing")) for line in reasons[:2])
    if name in ("block-mask", "mask-words"):
        assert not reasons[0].startswith("expected "), "a sentence comes first"
    if "(h_video[:B])" in new:
        assert "the head ran on all positions, also unmasked ones" in reasons[0]


def test_every_exercise_has_a_slip_and_every_equation_an_exercise():
    assert {name for name, _, _ in SLIPS} == {exercise.name for exercise in EXERCISES}
    assert len({exercise.name for exercise in EXERCISES}) == len(EXERCISES)
    papers = " ".join(exercise.paper for exercise in EXERCISES)
    assert all(f"({n})" in papers for n in range(1, 9))


@each
def test_the_cut_takes_the_part_alone_and_leaves_the_docstring(exercise):
    first, last, _ = lines_of_cut(SOURCE, exercise)
    before, after = SOURCE.splitlines(), emptied(SOURCE, exercise).splitlines()
    inserted = after[first:len(after) - (len(before) - last)]
    assert after == before[:first] + inserted + before[last:] and max(map(len, inserted)) <= 110
    assert not before[first - 1].lstrip().startswith("#"), "this comment would give the part away"
    assert all(line.lstrip().startswith("#") for line in inserted[:-1]) and len(inserted) > 1
    assert inserted[-1].lstrip().startswith("raise NotImplementedError")
    docstring = ast.get_docstring(target_of(SOURCE, exercise))
    assert ast.get_docstring(target_of("\n".join(after), exercise)) == docstring
    for test in exercise.claims:
        file, name = test.split("::")
        assert f"\ndef {name}(" in (ROOT / "tests" / file).read_text()


def test_a_difference_is_shown_where_it_is_greatest_or_by_its_shape_or_kind():
    expected, got = torch.zeros(3, 50), torch.zeros(3, 50)
    got[1, 7], got[2, 9] = 0.5, torch.nan
    assert difference(expected, got) == ["expected  0 at [2, 9] of (3, 50)", "got       nan"]
    assert difference(list(range(20)), [*range(19), 7]) == ["expected  19 at [19] of 20", "got       7"]
    assert difference(expected, got[:1]) == ["expected  shape (3, 50)", "got       shape (1, 50)"]
    assert difference(expected, expected.int()) == ["expected  torch.float32", "got       torch.int32"]
    assert difference(torch.zeros(3), None) == ["expected  [0.0, 0.0, 0.0]", "got       None"]
    assert difference([torch.Size([5])], "b") == ["expected  [(5,)]", "got       'b'"]


@pytest.mark.parametrize("assertion, lines", [
    ("a == 2 and b == 3", ["expected  3", "got       5"]),
    ("torch.equal(x, 2 * x)", ["expected  [2, 4]", "got       [1, 2]"]),
    ("(x == b).all()", ["expected  5", "got       [1, 2]"]),
    ("x.sum() > b", ["expected  x.sum() > b", "got       x.sum() = 3, b = 5"]),
    ("not any(i == 2 for i in x)", ["expected  not any((i == 2 for i in x))", "got       x = [1, 2]"])])
def test_what_an_assertion_expected_and_got(assertion, lines):
    names = {"a": 2, "b": 5, "x": torch.tensor([1, 2]), "torch": torch}
    assert exercises.judged(ast.parse(assertion, mode="eval").body, names) == lines


RANK = named("recall-at-k")


@pytest.mark.parametrize("part, error", [
    ("return scores.gather(1, truth)", "RuntimeError: Index tensor must have"),
    # PyTorch raises NotImplementedError as well: that part is written.
    ("return scores.sparse_mask(truth)", "NotImplementedError: Could not run")])
def test_an_error_in_the_students_lines_is_said_with_its_line(why, part, error):
    for place, message in why(RANK, replaced(SOURCE, RANK, part)).values():
        assert place.endswith(f"evilm.py, line {lines_of_cut(SOURCE, RANK)[0] + 1}: {part}")
        assert message.startswith(error)


@pytest.mark.slow
@pytest.mark.parametrize("part", ["import pytest; pytest.skip('later')", "import pytest; pytest.exit('now')",
                                  "raise KeyboardInterrupt", "raise SystemExit(0)", "breakpoint()"])
def test_what_ends_a_test_early_holds_nothing(why, part):
    assert why(RANK, replaced(SOURCE, RANK, part))[next(iter(RANK.claims))]


@pytest.mark.parametrize("copy, said", [
    ("", "your copy has no "), ("raise SystemExit(0)\n", "evilm.py, line 1: raise SystemExit(0)"),
    ("import no_such_package\n" + SOURCE, "evilm.py, line 1: import no_such_package"),
    (SOURCE.replace("SDTAEncoder", "OlderName"), "your copy has no SDTAEncoder"),
    (SOURCE.replace("import numpy as np", "import numpy as np; np.no_such"), "; np.no_such")])
def test_a_copy_that_cannot_be_used_holds_nothing_and_says_why(why, copy, said):
    found = why(RANK, copy)
    assert list(found) == list(RANK.claims) and all(said in reasons[0] for reasons in found.values())


# -------------------------------------------------------------------------------------- As a student types it

@pytest.fixture
def home(tmp_path):
    home = tmp_path / "a clone"
    shutil.copytree(ROOT / "tests", home / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", home)
    (home / "evilm.py").write_text(SOURCE)
    return home


@pytest.fixture
def typed(home):
    """typed(*words): what `python tests/exercises.py` prints, its exit status checked."""
    def run(*words, expect=0, folder=home):
        script = os.path.relpath(home / "tests/exercises.py", folder)
        done = subprocess.run([sys.executable, script, *words], cwd=folder, capture_output=True, text=True,
                              env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=60)
        assert done.returncode == expect, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        return done.stdout + done.stderr
    return run


def test_list_is_sorted_by_level(typed):
    lines = [line for line in typed("list").splitlines() if " minutes, " in line]
    assert sorted(line.split()[0] for line in lines) == sorted(exercise.name for exercise in EXERCISES)
    levels = [int(line.split("level ")[1][0]) for line in lines]
    assert levels == sorted(exercise.level for exercise in EXERCISES) and max(map(len, lines)) <= 110


@pytest.mark.slow
def test_from_start_to_done_from_another_directory(home, typed, tmp_path):
    path, exercise = home / "exercises/mask-frames/evilm.py", named("mask-frames")
    line = lines_of_cut(SOURCE, exercise)[0] + 1
    said = typed("start", "mask-frames", folder=tmp_path)
    assert f"a clone/exercises/mask-frames/evilm.py, line {line}" in said and path.exists()
    assert "delete it" in typed("start", "mask-frames", expect=2)               # and changes nothing
    assert exercise.hint not in " ".join((said + path.read_text()).split())
    assert " ".join(typed("hint", "mask-frames", folder=tmp_path).split()) == exercise.hint

    said = typed("check", "mask-frames", folder=tmp_path, expect=1)
    assert f"a clone/exercises/mask-frames/evilm.py, line {line + 1}: raise" in said
    assert "still to be written" in said and exercise.hint not in " ".join(said.split())

    path.write_text(replaced(SOURCE, exercise, "print('the grid', masked.shape)\nreturn frames"))
    said = typed("check", "mask-frames", folder=tmp_path, expect=1)
    assert "fails  Masked pixels are zero and no others change" in said
    assert "  expected  0 at [" in said and "  got       0." in said and "test_3_2_masking.py, line" in said
    assert "printed   the grid torch.Size([2, 3, 3, 3])" in said

    path.write_text(SOURCE, encoding="utf-8-sig")           # a byte order mark is passed over
    assert "All hold." in typed("check", "mask-frames", folder=tmp_path)
    assert typed("reveal", "mask-frames") == "There is no difference.\n"


def test_what_is_not_python_is_said_with_its_line_and_revealed(home, typed):
    first, last, _ = lines_of_cut(SOURCE, RANK)
    typed("start", "recall-at-k")
    (home / "exercises/recall-at-k/evilm.py").write_text(replaced(SOURCE, RANK, "return (scores > "))
    said = typed("check", "recall-at-k", expect=1)
    assert f"line {first + 1}: return (scores >" in said and "SyntaxError" in said
    lines = [line for line in typed("reveal", "recall-at-k").splitlines() if line[:1] in "+-"]
    assert lines[2:] == ["-    return (scores > ", *(f"+{line}" for line in SOURCE.splitlines()[first:last])]


@pytest.mark.slow
def test_an_endless_loop_ends_and_its_line_and_what_held_before_are_said(home, typed):
    first, lines = lines_of_cut(SOURCE, named("focal-loss"))[0], SOURCE.splitlines(keepends=True)
    typed("start", "focal-loss")
    (home / "exercises/focal-loss/evilm.py").write_text(
        "".join([*lines[:first], "    while len(logits) == 1: continue\n", *lines[first:]]))
    said = typed("check", "focal-loss", "--seconds", "4", expect=1)
    assert "holds  Eq. (6) focal loss" in said and "fails  Eq. (6) does not overflow" in said
    assert f"evilm.py, line {first + 1}: while len(logits) == 1: continue" in said and "endless loop?" in said


def test_what_makes_no_sense_is_refused_with_what_to_type(typed):
    assert "python tests/exercises.py start fuse" in typed("check", "fuse", expect=2)
    assert "'fuse'?" in typed("start", "fuze", expect=2)
    for words in ((), ("start",), ("list", "fuse"), ("solve", "fuse"), ("check", "fuse", "--seconds", "0")):
        typed(*words, expect=2)
