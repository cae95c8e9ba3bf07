"""Exercises: the tests of each fail on the empty part and on a wrong answer, and pass on the original."""
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
from exercises import EXERCISES, claim, difference, emptied, lines_of_cut, replaced, target_of

ROOT = Path(__file__).resolve().parents[1]
SOURCE = (ROOT / "evilm.py").read_text()
pytestmark = pytest.mark.slow
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
        (tmp_path / "evilm.py").write_text(source)
        return process.submit(exercises.examine, tmp_path / "evilm.py", exercise.tests.split(), 100,
                              tmp_path / "log").result()
    return found


# -------------------------------------------------------------------------------------------- Every exercise


@each
def test_all_claims_hold_for_the_original(why, exercise):
    assert why(exercise, SOURCE) == dict.fromkeys(exercise.tests.split())


@each
def test_no_claim_holds_for_the_empty_part(why, exercise):
    for reasons in why(exercise, emptied(SOURCE, exercise)).values():
        assert "raise NotImplementedError" in reasons[0] and reasons[1] == "This part is still to be written."


@each
def test_a_claim_fails_for_the_wrong_answer_and_says_what_was_expected(why, exercise):
    failed = [reasons for reasons in why(exercise, replaced(SOURCE, exercise, exercise.wrong)).values()
              if reasons]
    assert failed and failed[0][0].startswith("expected ") and failed[0][1].startswith("got ")


@each
def test_the_cut_takes_the_part_alone_and_leaves_signature_and_docstring(exercise):
    first, last, _ = lines_of_cut(SOURCE, exercise)
    before, after = SOURCE.splitlines(), emptied(SOURCE, exercise).splitlines()
    inserted = after[first:len(after) - (len(before) - last)]
    assert after == before[:first] + inserted + before[last:]
    assert all(line.lstrip().startswith("#") for line in inserted[:-1]) and len(inserted) > 1
    assert inserted[-1].lstrip().startswith("raise NotImplementedError")
    assert max(map(len, inserted)) <= 110
    part, original = (target_of(source, exercise) for source in ("\n".join(after), SOURCE))
    assert ast.unparse(part.args) == ast.unparse(original.args)
    assert ast.get_docstring(part) == ast.get_docstring(original)


@each
def test_an_exercise_says_all_that_a_student_asks_first(exercise):
    assert exercise.paper and exercise.level in (1, 2, 3) and 5 <= exercise.minutes <= 60
    assert exercise.breaks.endswith(".") and len(exercise.breaks) < 250 and exercise.hint.endswith(".")
    assert exercise.wrong.strip().startswith("# "), "the wrong answer's first line says what is wrong with it"


def test_names_are_used_once_and_every_equation_has_an_exercise():
    assert len({exercise.name for exercise in EXERCISES}) == len(EXERCISES)
    papers = " ".join(exercise.paper for exercise in EXERCISES)
    assert all(f"({n})" in papers for n in range(1, 9))


# ---------------------------------------------------------------------------------------------- What is said


def test_a_tests_name_is_said_as_a_sentence():
    assert claim("test_a.py::test_eq4_nearest_code") == "Eq. (4) nearest code"
    assert claim("test_a.py::test_eq3_and_eq8_terms") == "Eq. (3) and Eq. (8) terms"
    assert claim("test_a.py::test_wordpiece_cuts_so_that_sep_stays") == "WordPiece cuts so that [SEP] stays"
    assert claim("test_a.py::test_padding_changes_nothing") == "Padding changes nothing"


def test_a_difference_is_shown_where_it_is_greatest():
    expected, got = torch.zeros(3, 50), torch.zeros(3, 50)
    got[1, 7], got[2, 9] = 0.5, -2.0
    assert difference(expected, got) == ["expected  0 at [2, 9] of (3, 50)", "got       -2"]
    got[0, 3] = torch.nan
    assert difference(expected, got) == ["expected  0 at [0, 3] of (3, 50)", "got       nan"]
    assert difference(list(range(20)), [*range(19), 7]) == ["expected  19 at [19] of 20", "got       7"]


def test_a_difference_of_shape_or_kind_is_said():
    assert difference(torch.zeros(3), torch.zeros(1, 3)) == ["expected  shape (3,)", "got       shape (1, 3)"]
    assert difference(torch.zeros(3), torch.zeros(3).int()) == ["expected  torch.float32",
                                                                "got       torch.int32"]
    assert difference(torch.zeros(3), None) == ["expected  [0.0, 0.0, 0.0]", "got       None"]
    assert difference(["a"], "b") == ["expected  ['a']", "got       'b'"]


@pytest.mark.parametrize("assertion, lines", [
    ("a == 2 and b == 3", ["expected  3", "got       5"]),
    ("torch.equal(x, 2 * x)", ["expected  [2, 4]", "got       [1, 2]"]),
    ("(x == b).all()", ["expected  5", "got       [1, 2]"]),
    ("x.sum() > b", ["expected  x.sum() > b", "got       x.sum() = 3, b = 5"]),
    ("not any(i == 2 for i in x)", ["expected  not any((i == 2 for i in x))", "got       x = [1, 2]"]),
])
def test_what_an_assertion_expected_and_got(assertion, lines):
    names = {"a": 2, "b": 5, "x": torch.tensor([1, 2]), "torch": torch}
    assert exercises.judged(ast.parse(assertion, mode="eval").body, names) == lines


# -------------------------------------------------------------------------------------- As a student types it


@pytest.fixture
def home(tmp_path):
    """A clone: what is begun there is nobody's."""
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


def test_list_shows_every_exercise(typed):
    said = typed("list")
    for exercise in EXERCISES:
        assert f"level {exercise.level}, {exercise.minutes} minutes: {exercise.target}" in said
    assert max(map(len, said.splitlines())) <= 110


def test_from_start_to_done_from_another_directory(home, typed, tmp_path):
    path, exercise = home / "exercises/mask-frames/evilm.py", exercises.named("mask-frames")
    line = lines_of_cut(SOURCE, exercise)[0] + 1
    said = typed("start", "mask-frames", folder=tmp_path)
    assert f"a clone/exercises/mask-frames/evilm.py, line {line}" in said and path.exists()

    last = emptied(SOURCE, exercise).splitlines().index(
        '    raise NotImplementedError("exercise mask-frames: write this part")') + 1
    said = typed("check", "mask-frames", folder=tmp_path, expect=1)
    assert f"a clone/exercises/mask-frames/evilm.py, line {last}: raise" in said
    assert "still to be written" in said

    path.write_text(SOURCE)
    assert "All hold." in typed("check", "mask-frames", folder=tmp_path)


def test_what_was_begun_is_never_overwritten(home, typed):
    typed("start", "fuse")
    path = home / "exercises/fuse/evilm.py"
    path.write_text("# an evening's work\n")
    assert "delete it" in typed("start", "fuse", expect=2)
    assert path.read_text() == "# an evening's work\n"


def test_a_byte_order_mark_is_passed_over(home, typed):
    typed("start", "mask-frames")
    (home / "exercises/mask-frames/evilm.py").write_text(SOURCE, encoding="utf-8-sig")
    assert "All hold" in typed("check", "mask-frames")


def test_an_original_that_was_changed_is_said(home, typed):
    for source in (SOURCE + "\n)", SOURCE.replace("rank_of_truth", "rank")):
        (home / "evilm.py").write_text(source)
        assert "git checkout evilm.py" in typed("start", "recall-at-k", expect=2)


def test_reveal_goes_from_the_students_part_to_the_original(home, typed):
    exercise = exercises.named("recall-at-k")
    first, last, _ = lines_of_cut(SOURCE, exercise)
    original = [f"+{line}" for line in SOURCE.splitlines()[first:last]]

    def changed(said):
        return [line for line in said.splitlines() if line[:1] in "+-" and line[:3] not in ("+++", "---")]

    assert "start recall-at-k" in typed("reveal", "recall-at-k", expect=2)
    typed("start", "recall-at-k")
    assert changed(typed("reveal", "recall-at-k"))[-len(original):] == original
    (home / "exercises/recall-at-k/evilm.py").write_text(replaced(SOURCE, exercise, "return truth"))
    assert changed(typed("reveal", "recall-at-k")) == ["-    return truth", *original]
    (home / "exercises/recall-at-k/evilm.py").write_text(SOURCE)
    assert typed("reveal", "recall-at-k") == "There is no difference.\n"


def test_a_wrong_answer_is_told_what_was_expected_and_what_it_printed(home, typed):
    exercise = exercises.named("mask-frames")
    typed("start", "mask-frames")
    (home / "exercises/mask-frames/evilm.py").write_text(
        replaced(SOURCE, exercise, "print('the grid', chosen.shape)\nreturn frames"))
    said = typed("check", "mask-frames", expect=1)
    assert "fails  Masked pixels are zero and no others change" in said
    assert f"{Path('tests/test_3_2_masking.py')}, line " in said
    assert "  expected  0 at [" in said and "  got       0." in said
    assert "printed   the grid torch.Size([2, 3, 3, 3])" in said


def test_what_is_not_python_is_said_with_its_line(home, typed):
    exercise = exercises.named("recall-at-k")
    typed("start", "recall-at-k")
    (home / "exercises/recall-at-k/evilm.py").write_text(replaced(SOURCE, exercise, "return (scores > "))
    said = typed("check", "recall-at-k", expect=1)
    assert f"line {lines_of_cut(SOURCE, exercise)[0] + 1}: return (scores >" in said and "SyntaxError" in said


@pytest.mark.parametrize("part, error", [
    ("return scores.gather(1, truth)", "RuntimeError: Index tensor must have"),
    ("return score", "NameError: name 'score' is not defined"),
])
def test_an_error_in_the_students_lines_is_said_with_its_line(why, part, error):
    exercise = exercises.named("recall-at-k")
    for place, message in why(exercise, replaced(SOURCE, exercise, part)).values():
        assert place.endswith(f"evilm.py, line {lines_of_cut(SOURCE, exercise)[0] + 1}: {part}")
        assert message.startswith(error)


def test_what_a_test_cannot_do_with_a_result_is_said(why):
    exercise = exercises.named("recall-at-k")
    reasons = why(exercise, replaced(SOURCE, exercise, "return None"))[exercise.tests.split()[0]]
    assert reasons[0] == "AttributeError: 'NoneType' object has no attribute 'tolist'"
    assert "is a return missing" in reasons[1]
    assert "assert rank_of_truth(scores, torch.tensor([0, 2, 1])).tolist() == [1, 2, 3]" in reasons[2]


@pytest.mark.parametrize("part", ["import pytest\npytest.skip('later')", "raise KeyboardInterrupt",
                                  "import pytest\npytest.exit('enough')", "breakpoint()\nreturn truth",
                                  "raise SystemExit(0)"])
def test_what_ends_a_test_early_holds_nothing(why, part):
    exercise = exercises.named("recall-at-k")
    assert why(exercise, replaced(SOURCE, exercise, part))[exercise.tests.split()[0]]


@pytest.mark.parametrize("copy", ["", "raise SystemExit(0)\n", "import no_such_package\n" + SOURCE])
def test_a_copy_that_is_no_evilm_holds_nothing(why, copy):
    exercise = exercises.named("recall-at-k")
    found = why(exercise, copy)
    assert found[exercise.tests.split()[0]] and all(found.values())


def test_an_error_outside_of_the_part_is_said_too(why):
    exercise, line = exercises.named("recall-at-k"), "import numpy as np"
    broken = SOURCE.replace(line, line + "; np.no_such")
    for place, message in why(exercise, broken).values():
        assert place.endswith("; np.no_such") and message.startswith("AttributeError")


def test_a_copy_that_lacks_what_the_tests_ask_for_may_be_an_older_one(why):
    older = SOURCE.replace("SDTAEncoder", "OlderName")
    for missing, in why(exercises.named("recall-at-k"), older).values():
        assert "has no SDTAEncoder" in missing and "older evilm.py" in missing


def test_an_error_below_the_students_lines_is_said_with_theirs_first(why):
    exercise = exercises.named("joint-pass")
    part = "h_cls, _, _ = self.fuse(frames, frames, mask)"
    for own, below, message in why(exercise, replaced(SOURCE, exercise, part)).values():
        assert own.endswith(part) and "evilm.py, line" in below and not below.endswith(part)
        assert "Error: " in message


NEAREST = "x, codebook = F.normalize(x.float(), dim=-1), F.normalize({codebook}.float(), dim=-1)\n"


@pytest.mark.parametrize("part", [
    "with torch.no_grad():\n    " + NEAREST.format(codebook="self.codebook"),
    NEAREST.format(codebook="self.codebook.data"),
    NEAREST.format(codebook="self.codebook").replace("x.float()", "x")])
def test_codes_that_cannot_learn_are_told_so(why, part):
    exercise = exercises.named("nearest-code")
    rest = "with torch.autocast(x.device.type, enabled=False):\n    ids = (x @ codebook.t()).argmax(-1)"
    assert any(why(exercise, replaced(SOURCE, exercise, part + rest)).values())


@pytest.mark.parametrize("name, old, new", [
    ("xca", "(q, dim=-1) @ F.normalize(k,", "(k, dim=-1) @ F.normalize(q,"),
    ("xca", ".softmax(-1)", ".softmax(-2)"), ("xca", "self.proj(", "("),
    ("xca", "self.temperature", "self.temperature.data"),
    ("cascade", "enumerate(self.convs)", "enumerate(self.convs[:len(parts) - 1])"),
    ("wordpiece", 'found or ["[UNK]"]', "found"),
    ("wordpiece", "if end is None:", 'prefix = prefix if end else ""; end = end or next((e for e in range('
     "len(word), start, -1) if word[start:e] in self.index), None)\n            if end is None:"),
    ("fuse", "self.token_type", "self.token_type.data"),
    ("block-mask", "block = block if end < 0.5 else block[::-1]", "block = block[::-1]"),
    ("mask-words", "fate = torch.rand(count, generator=generator)", "fate = torch.arange(count) / count"),
    ("mask-words", "torch.randperm(len(words), generator=generator)[:count]",
     "(torch.randint(len(words), (1,), generator=generator) + torch.arange(count)) % max(1, len(words))"),
    ("mvm-loss", "F.cross_entropy(logits.float(), targets, reduction=\"sum\")",
     "-logits.float().softmax(1).gather(1, targets[:, None]).log().sum()"),
    ("mvm-loss", "max(1, len(targets) if count is None else count)",
     "(count if count is not None else max(1, len(targets)))"),
    ("read-words", "self.decode(quantized)", "self.decode(quantized).detach()"),
    ("straight-through", "x + (codes - x).detach()", "x"),
    ("joint-pass", "self.pooler(h_cls)", "self.pooler(h_cls.detach())"),
    ("joint-pass", "h_text[:B][words]", "h_text.detach()[:B][words]")])
def test_a_slip_is_found_by_the_exercises_claims(why, name, old, new):
    exercise = exercises.named(name)
    first, last, _ = lines_of_cut(SOURCE, exercise)
    body = "\n".join(SOURCE.splitlines()[first:last])
    assert old in body, "the slip is to be made in the body as it stands"
    found = why(exercise, SOURCE.replace(body, body.replace(old, new)))
    assert any(found[test] for test in exercise.tests.split() if name != "xca" or "_xca_" in test)


def test_an_endless_loop_ends_and_its_line_is_said(home, typed):
    exercise = exercises.named("wordpiece")
    typed("start", "wordpiece")
    (home / "exercises/wordpiece/evilm.py").write_text(replaced(SOURCE, exercise, "while True:\n    word"))
    said = typed("check", "wordpiece", "--seconds", "2", expect=1)
    line = lines_of_cut(SOURCE, exercise)[0] + 1
    assert f"evilm.py, line {line}: while True:" in said or f"evilm.py, line {line + 1}: word" in said
    assert "fails  WordPiece takes the longest piece first" in said and "No end after 2 seconds" in said


def test_what_held_before_an_endless_loop_is_said(home, typed):
    exercise = exercises.named("focal-loss")
    first, last, _ = lines_of_cut(SOURCE, exercise)
    body = "\n".join(SOURCE.splitlines()[first:last])
    loop = "    while len(logits) == 1:\n        pass\n"
    typed("start", "focal-loss")
    (home / "exercises/focal-loss/evilm.py").write_text(SOURCE.replace(body, loop + body))
    said = typed("check", "focal-loss", "--seconds", "4", expect=1)
    assert "holds  Eq. (6) focal loss" in said and "fails  Eq. (6) does not overflow" in said


def test_a_copy_that_is_not_utf8_is_refused_with_the_line(home, typed):
    (home / "exercises/fuse").mkdir(parents=True)
    (home / "exercises/fuse/evilm.py").write_bytes("# one\n# größe\n".encode("latin-1"))
    for command in ("check", "reveal"):
        assert "line 2: is not UTF-8" in typed(command, "fuse", expect=2)


def test_what_makes_no_sense_is_refused_with_what_to_type(typed):
    assert "python tests/exercises.py start fuse" in typed("check", "fuse", expect=2)
    assert "'fuse'?" in typed("start", "fuze", expect=2)
    for words in ((), ("start",), ("list", "fuse"), ("solve", "fuse")):
        typed(*words, expect=2)
