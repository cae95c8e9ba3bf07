"""Write a part of E-ViLM yourself: exercises cut from evilm.py as it stands, checked by the project's tests.

    python tests/exercises.py list              the exercises by level, and what breaks without each part
    python tests/exercises.py start NAME        writes exercises/NAME/evilm.py, a copy without that part
    python tests/exercises.py check NAME        which claims hold, and why the first that fails does
    python tests/exercises.py hint NAME         the formula, and what to watch out for
    python tests/exercises.py reveal NAME       the diff from your copy to the original

An exercise that was started is never overwritten: to begin again, delete exercises/NAME. The exit status is 0
if all claims hold, 1 if one fails, 2 if the command is refused.
"""
import argparse
import ast
import contextlib
import difflib
import faulthandler
import importlib
import io
import json
import linecache
import os
import re
import reprlib
import signal
import sys
import tempfile
import textwrap
import traceback
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent


@dataclass(frozen=True)
class Exercise:
    """One part to write: where it stands, what it is for, and the tests that check it.

    The part is the body of `target` after its docstring: all of it, or from the statement that assigns
    `begins`, or up to the one that assigns the last of `ends`, which the lines after it read.
    """
    name: str
    target: str         # a function or method in evilm.py
    paper: str          # equation or section
    level: int          # 1: a few lines, 2: one idea to get right, 3: a whole step
    minutes: int
    breaks: str         # what goes wrong without the part
    hint: str
    tests: str          # easiest first; a line below a test says what its failure means
    begins: str = ""
    ends: tuple = ()

    @property
    def claims(self):
        """{test: what is wrong if it fails, or ""}."""
        lines = [line.strip() for line in self.tests.splitlines()]
        return {test: "" if "::" in below else below
                for test, below in zip(lines, [*lines[1:], "::"]) if "::" in test}


EXERCISES = [
    Exercise(
        "xca", "CrossCovarianceAttention.forward", "Sec. 3.1", level=2, minutes=30,
        breaks="Patches interact through convolutions alone. XCA lets the whole frame decide how channels "
               "mix, at a cost that grows linearly with the number of patches, not with its square.",
        hint="q, k and v come from self.qkv: C channels each, one head after another. For each head, q and k "
             "are (C/heads, patches), each row scaled to length 1 over the patches. softmax(q k^T * "
             "temperature), (C/heads, C/heads), weights the channels of v. self.proj comes last.",
        tests="""test_parts.py::test_xca_by_hand_mixes_a_long_and_a_short_channel_three_to_one
                 test_parts.py::test_xca_each_head_has_its_own_channels_and_its_own_temperature
                 test_3_1_model.py::test_edgenext_against_a_plain_computation
                 test_3_4_losses.py::test_eq8_accumulated_gradients_are_those_of_the_whole_batch"""),
    Exercise(
        "cascade", "SDTAEncoder.cascade", "Sec. 3.1", level=1, minutes=15,
        breaks="All channels see 3x3 patches. In the cascade the second part sees 5x5, the third 7x7.",
        hint="x.split(self.split, 1) gives the parts x_1 ... x_s; self.convs holds s - 1 convolutions. "
             "y_1 = conv_1(x_1), y_i = conv_i(x_i + y_(i-1)), and the last part stays as it is, y_s = x_s. "
             "(With s = 1 there is one convolution, of the only part.) (N, C, H, W) -> the same.",
        tests="""test_parts.py::test_cascade_by_hand_convolves_each_part_with_the_result_before_it
                 test_parts.py::test_cascade_of_one_part_convolves_all_of_it
                 test_3_1_model.py::test_edgenext_against_a_plain_computation"""),
    Exercise(
        "wordpiece", "WordPiece.pieces", "Sec. 3.1", level=2, minutes=25,
        breaks="Every word that is not itself an entry becomes [UNK]; 30% of BERT's vocabulary lacks many.",
        hint="Take the longest entry of self.index that the word begins with, then go on with the rest of "
             "the word; from the second piece on, entries begin with ##. A piece is never taken back: where "
             "nothing fits, the whole word is [UNK]. So are an empty word and one of more than 100 letters.",
        tests="""test_3_1_model.py::test_wordpiece_takes_the_longest_piece_first
                 test_3_1_model.py::test_wordpiece_encodes_between_cls_and_sep"""),
    Exercise(
        "fuse", "EViLM.fuse", "Eq. (1), (2)", level=2, minutes=30,
        breaks="Words and patches never meet: no caption could be matched with a clip.",
        hint="[h^CLS, h^L, h^V] = DEC([e^CLS, e^L + t^L, e^V + t^V]). self.token_type (3, D) holds e^CLS, "
             "t^L and t^V. self.decoder(x, mask) takes the sequence (B, 1 + L + N, D) and a mask (B, 1 + L + "
             "N), True for all but padding, or None without text; self.decoder_norm comes after it.",
        tests="""test_parts.py::test_eq2_by_hand_each_side_gets_its_token_type
                 test_parts.py::test_eq2_the_decoder_is_shown_everything_but_padding
                 test_3_1_model.py::test_eq2_order_and_token_types
                 test_3_4_losses.py::test_eq8_accumulated_gradients_are_those_of_the_whole_batch"""),
    Exercise(
        "block-mask", "block_mask", "Sec. 4.1", level=3, minutes=45,
        breaks="Only single patches would be masked, and each could be guessed from those around it.",
        hint="For each mask draw blocks until enough patches are covered. Area: uniform between the smallest "
             "and what is still missing. Aspect: exp of a uniform number between log 0.3 and log(1 / 0.3). "
             "height = sqrt(area * aspect), width = sqrt(area / aspect), rounded and clamped to 1 ... grid; "
             "draw again if rounding made the block too small. Place: uniform inside the grid. All random "
             "numbers come from torch.rand(..., generator=generator).",
        tests="""test_3_2_masking.py::test_exactly_the_ratio_is_masked_in_each_frame
                     Each frame needs a bool mask with exactly round(ratio * grid * grid) patches.
                 test_3_2_masking.py::test_each_frame_has_its_own_blocks_and_a_generator_repeats_them
                     Two frames share a mask, or the masks do not follow from the generator alone.
                 test_3_2_masking.py::test_masked_patches_stand_together
                     The masked patches are scattered: too few of their neighbours are masked.
                 test_3_2_masking.py::test_a_mask_is_allowed_blocks_and_at_most_one_trimmed_one
                     Some masked patches lie in no block of an allowed area and aspect.
                 test_3_2_masking.py::test_blocks_lie_and_stand_and_reach_every_patch
                     A patch is masked far too rarely or too often, or one direction is preferred.
                 test_3_2_masking.py::test_no_patch_is_likelier_than_the_one_opposite
                     A patch is masked more often than the opposite one; trimming may favour a side."""),
    Exercise(
        "mask-frames", "mask_frames", "Sec. 3.2", level=1, minutes=10,
        breaks="The model sees the patches whose codes it is to infer from everything else.",
        hint="A patch is W / g pixels wide and high. Enlarge `masked` to (B, T, H, W), then apply it to all "
             "three channels. Do not change the caller's frames: the tokenizer sees them unmasked.",
        tests="""test_3_2_masking.py::test_masked_pixels_are_zero_and_no_others_change"""),
    Exercise(
        "mvm-loss", "mean_cross_entropy", "Eq. (3), (8)", level=1, minutes=15,
        breaks="Nothing trains the model: mvm_loss, Eq. (3), and the other two losses call this function.",
        hint="-1/N * sum over i of log softmax(logits[i])[targets[i]]; logits (N, classes), targets (N,) -> "
             "scalar, in float32 even where logits are bfloat16. If `count` is given, divide by it instead "
             "of N: the rows are then a part of a batch. Over no rows it is 0, with a gradient.",
        tests="""test_3_4_losses.py::test_eq3_and_eq8_terms
                 test_3_4_losses.py::test_eq3_and_eq8_parts_of_a_batch_add_up_to_the_whole
                 test_3_4_losses.py::test_a_loss_over_nothing_is_zero"""),
    Exercise(
        "nearest-code", "VectorQuantizer.forward", "Eq. (4)", level=1, minutes=20,
        ends=("x", "codebook", "ids"),
        breaks="A patch has no code, so masked video modeling has no label to predict.",
        hint="x (..., dim) and codebook (M, dim) are l2-normalised and float32; both keep their gradients, "
             "since both learn by Eq. (7). ids (...) = argmin_j ||x - c_j||, and between unit vectors "
             "||x - c||^2 = 2 - 2 x.c. Turn autocast off for the matrix product: in bfloat16 near codes tie.",
        tests="""test_3_3_tokenizer.py::test_eq4_nearest_code
                 test_3_3_tokenizer.py::test_tokenize_gives_a_code_a_patch_and_needs_no_gradient
                 test_3_3_tokenizer.py::test_eq4_nearest_code_under_autocast
                 test_3_3_tokenizer.py::test_eq7_gradients_go_where_stop_gradient_lets_them"""),
    Exercise(
        "read-words", "SemanticTokenizer.read_words", "Eq. (5)", level=1, minutes=10,
        breaks="The code terms of Eq. (7) alone are smallest when all patches share one code. Words make the "
               "codes differ and give them a meaning.",
        hint="y^S = HEAD(mean over patches of D(C_q)). self.decode is D with the time and place of the "
             "codes; self.head gives the words' logits. The head may have more rows than there are words: "
             "only its first self.config.vocab_size - len(SPECIAL) outputs count.",
        tests="""test_3_3_tokenizer.py::test_eq5_head_of_the_averaged_output
                 test_3_3_tokenizer.py::test_the_words_teach_encoder_and_decoder_and_leave_the_codebook_to_eq7
                 test_3_3_tokenizer.py::test_the_tokenizer_reads_words_from_codes_alone"""),
    Exercise(
        "focal-loss", "focal_loss", "Eq. (6)", level=2, minutes=20,
        breaks="A caption has a dozen of the vocabulary's thousands of words. Without the weight p the many "
               "absent words, long since learned, outweigh the few that are present.",
        hint="With p = sigmoid(logit): -log p for a present word, -p log(1 - p) for an absent one. To stay "
             "finite at logits of 10,000, use F.logsigmoid, and 1 - sigmoid(z) = sigmoid(-z).",
        tests="""test_3_3_tokenizer.py::test_eq6_focal_loss
                 test_3_3_tokenizer.py::test_eq6_gradient_goes_through_the_weight_p_too
                 test_3_3_tokenizer.py::test_eq6_does_not_overflow"""),
    Exercise(
        "straight-through", "VectorQuantizer.forward", "Eq. (7)", level=2, minutes=25, begins="codebook_term",
        breaks="argmin has no gradient: the words' loss never reaches the encoder, and no code moves.",
        hint="`nearest` (..., dim) are the codes C_q. loss = ||sg[x] - C_q||^2 + ||x - sg[C_q]||^2, squares "
             "summed over dim and averaged over patches; sg is .detach(). Return (quantized, ids, loss): "
             "quantized equals `nearest` and passes its gradient unchanged to x, not to the codebook.",
        tests="""test_3_3_tokenizer.py::test_eq4_nearest_code
                 test_3_3_tokenizer.py::test_eq7_gradients_go_where_stop_gradient_lets_them
                 test_3_3_tokenizer.py::test_the_words_teach_encoder_and_decoder_and_leave_the_codebook_to_eq7
                 test_3_3_tokenizer.py::test_straight_through_copies_the_codes_gradient_to_the_encoder"""),
    Exercise(
        "svq-loss", "svq_loss", "Eq. (7)", level=1, minutes=10,
        breaks="The tokenizer has no loss: its codes neither follow the encoder nor come to mean words.",
        hint="L_SVQ = word_weight * L_TOKEN + code_loss. L_TOKEN is Eq. (6), in float32 even where the "
             "logits are bfloat16. Return (loss, {'token': L_TOKEN, 'codes': code_loss}), tensors.",
        tests="""test_3_3_tokenizer.py::test_eq7_svq_loss"""),
    Exercise(
        "mask-words", "mask_words", "Sec. 3.4, 4.1", level=2, minutes=25,
        breaks="There is no L_MLM. If every picked word became [MASK], the model would learn nothing about "
               "visible words, and after pretraining all words are visible.",
        hint="Words are the ids above MASK. Pick them with torch.randperm; one torch.rand a picked word "
             "decides between [MASK] (80%), a random word (10%) and no change (10%); torch.randint draws "
             "random words. Pass the generator to each. Do not change the caller's ids.",
        tests="""test_3_2_masking.py::test_the_exact_ratio_of_words_is_masked
                     Of n words exactly max(1, round(ratio * n)) must be masked, and never a special token.
                 test_3_2_masking.py::test_a_caption_without_words_has_nothing_masked
                 test_3_2_masking.py::test_words_not_masked_stay_as_they_are
                     Unmasked words were changed, or the caller's own ids.
                 test_3_2_masking.py::test_80_per_cent_become_mask_10_a_random_word_10_stay
                     Of all masked words, 80% must become [MASK], 10% another word, and 10% stay.
                 test_3_2_masking.py::test_random_words_are_drawn_from_all_words_and_no_special_token
                     Random words must be drawn uniformly from the ids MASK + 1 to vocab_size - 1.
                 test_3_2_masking.py::test_every_word_is_as_likely_to_be_masked
                     Words at some places in the caption are masked more often than at others.
                 test_3_2_masking.py::test_word_masks_follow_from_the_generator
                     Equal generators must give equal masks, and different ones different masks."""),
    Exercise(
        "joint-pass", "EViLM.forward", "Eq. (8)", level=3, minutes=40,
        breaks="There is no pretraining: this pass serves L_MLM, L_VTM and L_MVM at once. Without mismatched "
               "captions the model would learn to match everything.",
        hint="Encode the video once. Along the batch, append the mismatched captions to the matched ones and "
             "the video to itself, and fuse all 2B pairs at once. VTM is vtm_head(pooler(h^CLS)) of all "
             "pairs. MLM and MVM run their heads on masked words and patches of the B matched pairs alone; "
             "only the first config.vocab_size outputs of mlm_head count. What is None must cost nothing.",
        tests="""test_3_4_losses.py::test_matching_sees_each_video_with_its_caption_and_with_a_wrong_one
                 test_3_4_losses.py::test_heads_run_on_masked_positions_of_the_matched_pairs_alone
                 test_3_4_losses.py::test_the_video_encoder_runs_once_a_clip_and_the_decoder_once_a_pair
                 test_3_4_losses.py::test_an_objective_that_is_off_leaves_out_its_output_and_its_cost
                 test_3_4_losses.py::test_eq8_each_loss_alone_teaches_both_encoders_and_the_decoder
                     No gradient of one loss reaches an encoder or the decoder: is something detached?"""),
    Exercise(
        "pretraining-loss", "pretraining_loss", "Eq. (8)", level=3, minutes=40,
        breaks="Nothing connects the masked pass with its labels, so no step of pretraining can be taken.",
        hint="L = L_MLM + L_VTM + mvm_weight * L_MVM. Mask the frames if MVM is on; call model(frames, "
             "masked_ids, mask, masked_words, masked_patches (B, N), mismatched) with None for what is off. "
             "The targets: `ids` of the masked words, vtm_targets(vtm), `labels` of the masked patches; each "
             "loss takes its entry of `counts`. Return (loss, {objective: its loss unweighted}), tensors.",
        tests="""test_3_4_losses.py::test_eq8_pretraining_loss
                 test_3_4_losses.py::test_eq8_an_objective_that_is_off_masks_no_frames_and_gives_no_term
                 test_3_4_losses.py::test_eq8_accumulated_gradients_are_those_of_the_whole_batch"""),
    Exercise(
        "recall-at-k", "rank_of_truth", "Sec. 4", level=1, minutes=10,
        breaks="R@K, the fraction of queries whose right item ranks K or better, cannot be computed. If ties "
               "counted for the query, a model that scores everything alike would have 100%.",
        hint="The rank is 1 plus the number of other items that score at least right - tolerance.",
        tests="""test_3_4_losses.py::test_rank_of_truth_counts_every_tie_against_the_query
                 test_3_4_losses.py::test_rank_of_truth_counts_scores_within_the_tolerance_as_ties"""),
]


# ---------------------------------------------------------------------------------------------------- The cut

MARKER = "exercise {}: write this part"         # PyTorch, too, raises NotImplementedError


def target_of(source, exercise):
    """The syntax tree of the function that a part is cut from."""
    node = ast.parse(source)
    for name in exercise.target.split("."):
        node = next(child for child in node.body if getattr(child, "name", None) == name)
    return node


def lines_of_cut(source, exercise):
    """(first, last) of the lines that the exercise takes away, counted from 0, last not included; indent."""
    target = target_of(source, exercise)
    body = target.body[ast.get_docstring(target) is not None:]

    def assigning(name):
        return next(statement for statement in body for part in ast.walk(statement)
                    if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store) and part.id == name)

    begin = assigning(exercise.begins) if exercise.begins else body[0]
    end = assigning(exercise.ends[-1]) if exercise.ends else body[-1]
    return begin.lineno - 1, end.end_lineno, " " * begin.col_offset


def replaced(source, exercise, block):
    """`source` with `block` where the cut is."""
    first, last, indent = lines_of_cut(source, exercise)
    lines, block = source.splitlines(keepends=True), textwrap.dedent(block).strip("\n") + "\n"
    return "".join([*lines[:first], textwrap.indent(block, indent), *lines[last:]])


def emptied(source, exercise):
    """`source` without the exercise's part, in whose place an error is raised."""
    comment = f"# {exercise.paper}. For the formula: python tests/exercises.py hint {exercise.name}\n"
    if exercise.ends:
        comment += f"# The lines below read {', '.join(exercise.ends)}.\n"
    return replaced(source, exercise, f'{comment}raise NotImplementedError("{MARKER.format(exercise.name)}")')


# ------------------------------------------------------------------------------------------ Why a claim fails

SPELLING = {"cls": "[CLS]", "sep": "[SEP]", "xca": "XCA", "svq": "SVQ", "wordpiece": "WordPiece"}


def claim(test):
    """A test's name as a sentence: "...::test_eq4_nearest_code" -> "Eq. (4) nearest code"."""
    words = [SPELLING.get(word, re.sub(r"^eq(\d)$", r"Eq. (\1)", word))
             for word in test.split("::test_")[1].split("_")]
    return " ".join([words[0][0].upper() + words[0][1:], *words[1:]])


def shown(value):
    """A value on one line, not too long."""
    if hasattr(value, "tolist"):
        text = re.sub(r"\d+\.\d{6,}(e-\d+)?", lambda digits: f"{float(digits[0]):.6g}", str(value.tolist()))
        return text if len(text) <= 90 else f"a tensor {tuple(value.shape)}"
    short = reprlib.Repr()
    short.repr_Size = short.repr_tuple          # torch.Size
    short.maxlist = short.maxtuple = short.maxset = short.maxdict = 12
    short.maxstring = short.maxother = 90
    return short.repr(value)


def difference(expected, got):
    """[expected, got] in two lines; of large tensors and long lists the place where they differ most."""
    import torch
    lines = [shown(expected), shown(got)]
    if torch.is_tensor(expected) and torch.is_tensor(got):
        if expected.shape != got.shape:
            lines = [f"shape {tuple(expected.shape)}", f"shape {tuple(got.shape)}"]
        elif torch.equal(expected.double(), got.double()):
            lines = [expected.dtype, got.dtype]
        elif expected.numel() > 12:
            apart = (expected.double() - got.double()).abs().nan_to_num(float("inf"))
            at = torch.unravel_index(apart.argmax(), apart.shape)
            where = f"at [{', '.join(str(int(i)) for i in at)}] of {tuple(apart.shape)}"
            lines = [f"{expected[at].item():.6g} {where}", f"{got[at].item():.6g}"]
    elif isinstance(expected, list) and isinstance(got, list) and len(expected) == len(got) > 12:
        at = next(i for i, (a, b) in enumerate(zip(expected, got)) if a != b)
        lines = [f"{shown(expected[at])} at [{at}] of {len(expected)}", shown(got[at])]
    return [f"expected  {lines[0]}", f"got       {lines[1]}"]


def judged(node, names):
    """Expected and actual values of the failed assertion `node`, recomputed with the test's `names`."""
    def value(part):
        return eval(compile(ast.Expression(part), "the test", "eval"), names)

    if isinstance(node, ast.BoolOp) and isinstance(node.op, ast.And):
        node = next((part for part in node.values if not value(part)), node)
    text = ast.unparse(node)
    if text.endswith(".all()") and isinstance(node.func.value, ast.Compare):
        node = node.func.value
    if isinstance(node, ast.Compare) and len(node.ops) == 1 and isinstance(node.ops[0], ast.Eq):
        return difference(value(node.comparators[0]), value(node.left))
    if text.startswith("torch.equal("):
        return difference(value(node.args[1]), value(node.args[0]))
    if isinstance(node, ast.Compare):
        parts = [part for part in (node.left, *node.comparators) if not isinstance(part, ast.Constant)]
    else:
        parts = [part for part in ast.walk(node) if isinstance(part, ast.Name) and part.id in names
                 and not callable(names[part.id]) and not isinstance(names[part.id], type(ast))]
    found = dict.fromkeys(f"{ast.unparse(part)} = {shown(value(part))}" for part in parts)
    return [f"expected  {text}", f"got       {', '.join(found)}"]


def at_line(path, line):
    return f"{os.path.relpath(path)}, line {line}: {linecache.getline(str(path), line).strip()}"


def explain(error, path, meaning=""):
    """Why a claim about the evilm.py at `path` fails: lines in plain words, from the error's traceback."""
    said = f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
    frames = list(traceback.walk_tb(error.__traceback__))
    known = [(frame, line) for frame, line in frames if frame.f_code.co_filename == str(path)
             or Path(frame.f_code.co_filename).name.startswith("test_")]
    if not known:
        return [said]
    if known[-1][0].f_code.co_filename == str(path):
        original = (ROOT / "evilm.py").read_text().splitlines()
        inside = [line for frame, line in known if frame.f_code.co_filename == str(path)]
        own = [line for line in inside if linecache.getline(str(path), line).rstrip("\n") not in original]
        if re.fullmatch(MARKER.format("[a-z-]+"), str(error)):
            said = "This part is still to be written."
        # the student's last line, and the one it led to
        return [*dict.fromkeys(at_line(path, line) for line in [*own[-1:], inside[-1]]), said]
    frame, line = next((one for one in known if one[0].f_code.co_name.startswith("test_")), known[-1])
    source = frame.f_code.co_filename
    tree = ast.parse(Path(source).read_text())
    statement = [node for node in ast.walk(tree) if isinstance(node, ast.stmt)
                 and node.lineno <= line <= node.end_lineno][-1]        # the smallest around the line
    lines = [f"{os.path.relpath(source)}, line {line}: {ast.unparse(statement)}"]
    plain = {name: value for name, value in frame.f_locals.items()
             if type(value) in (bool, int, float, str, tuple) and len(repr(value)) < 40 and name != "_"}
    if plain:
        lines.append("where " + ", ".join(f"{name} = {value!r}" for name, value in plain.items()))
    close = [frame.f_locals for frame, _ in frames if frame.f_code.co_name == "assert_close"]
    if close:
        return difference(close[0]["expected"], close[0]["actual"]) + lines
    if isinstance(statement, ast.Assert) and isinstance(error, AssertionError):
        if isinstance(statement.msg, ast.Constant):
            meaning = statement.msg.value
        try:
            lines = judged(statement.test, {**frame.f_globals, **frame.f_locals}) + lines
        except Exception:
            lines.insert(0, "Called a second time your part fails: does it change an argument in place?")
        return [meaning, *lines] if meaning else lines
    if re.search("'(list|tuple|float|int)' object has no attribute|(list|tuple) indices must be", said):
        lines.insert(0, "Is a list or a number returned where a tensor is wanted?")
    if re.search("NoneType|used in the graph|does not require grad", said):
        lines.insert(0, "Is a return missing, or is something detached, so that no gradient arrives?")
    return [said, *lines]


# -------------------------------------------------------------------------------------------------- The check

CUT_SHORT = ["Your copy ended the test or the whole Python process: an exit, a skip, a crash?"]


class Claims:
    """A pytest plugin that writes to a file {test: None if it held, else lines that say why not}."""

    def __init__(self, path, meanings, report):
        self.path, self.meanings, self.report, self.why = path, meanings, report, {}

    def pytest_runtest_logreport(self, report):
        test = report.nodeid.split("[")[0]
        if report.when == "call" and report.passed:
            self.why.setdefault(test, None)
        self.report.write_text(json.dumps(self.why))

    def pytest_exception_interact(self, node, call, report):
        test, error = node.nodeid.split("[")[0], call.excinfo.value
        if self.why.get(test) is None:
            cause = error.__cause__ if type(error).__name__ == "CollectError" else None
            prints = [f"printed   {line}" for line in getattr(report, "capstdout", "").splitlines()[-10:]]
            self.why[test] = explain(cause or error, self.path, self.meanings.get(test)) + prints
            self.report.write_text(json.dumps(self.why))


def examine(path, claims, seconds, folder):
    """Runs the tests of `claims` against the evilm.py at `path` and writes to `folder` what `findings` reads.

    For a process of its own: it swaps modules, and after `seconds` it writes where it is and ends.
    """
    import pytest
    import torch        # noqa: F401  imported before the time limit starts
    for name in [name for name in sys.modules if name in ("evilm", "plain") or name.startswith("test_")]:
        del sys.modules[name]
    sys.path.insert(0, str(path.parent))
    linecache.clearcache()
    plugin, nowhere = Claims(path, claims, folder / "report.json"), io.StringIO()
    with (open(folder / "stuck.txt", "w") as file, contextlib.redirect_stdout(nowhere),
          contextlib.redirect_stderr(nowhere)):
        def out_of_time(*_):                        # between two steps of Python, where frames are whole
            faulthandler.dump_traceback(file)
            os._exit(1)

        signal.signal(signal.SIGALRM, out_of_time)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        faulthandler.dump_traceback_later(2 * seconds, exit=True, file=file)        # stuck in a call of C
        try:
            copy = importlib.import_module("evilm")        # pytest's own path comes too late to change this
            for part in ast.parse((ROOT / "evilm.py").read_text()).body:
                if isinstance(part, (ast.FunctionDef, ast.ClassDef)) and not hasattr(copy, part.name):
                    raise ImportError(f"your copy has no {part.name}: was a name changed, or was it started "
                                      "from an older evilm.py?")
            pytest.main([*(f"{TESTS / test}" for test in claims), f"--rootdir={TESTS}",
                         f"--config-file={ROOT / 'pyproject.toml'}", "--assert=plain", "--tb=no", "-m", "",
                         *(f"-pno:{name}" for name in ("cacheprovider", "debugging", "faulthandler",
                                                         "unraisableexception"))], plugins=[plugin])
        except (Exception, SystemExit) as error:
            plugin.report.write_text(json.dumps({"evilm.py": explain(error, path)}))
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            faulthandler.cancel_dump_traceback_later()
            sys.path.remove(str(path.parent))


def findings(path, tests, folder):
    """What `examine` found: {test: None if it held, else lines that say why not}, without untried tests."""
    report = folder / "report.json"
    found = json.loads(report.read_text()) if report.exists() else {}
    for name, why in found.items():
        if "::" not in name:                # a file that cannot be imported stops all tests
            return dict.fromkeys(tests, why)
    why = {test: found[test] for test in tests if test in found}
    untried = [test for test in tests if test not in why]
    places = re.findall(r'File "(.*)", line (\d+) in (\S+)', (folder / "stuck.txt").read_text())
    if places:
        stuck = [test for _, _, name in places for test in tests if test.endswith(f"::{name}")]
        own = [at_line(file, int(line)) for file, line, _ in places if file == str(path)]
        why[(stuck or untried)[0]] = [*own[:1], "Out of time: an endless loop? (Slow machine: --seconds 60)"]
    elif untried and not any(why.values()):
        why[untried[0]] = CUT_SHORT
    return why


# ----------------------------------------------------------------------------------------------- The commands

class Refused(Exception):
    """A command that makes no sense here; the message says what to type instead."""


def copy_of(exercise):
    return ROOT / "exercises" / exercise.name / "evilm.py"


def typed(command, exercise):
    return f"python {sys.argv[0]} {command} {exercise.name}"


def wrapped(text, indent=""):
    return textwrap.fill(text, 108, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)


def list_all():
    for exercise in sorted(EXERCISES, key=lambda exercise: exercise.level):
        print(f"{exercise.name:<17} level {exercise.level}, {exercise.minutes} minutes, {exercise.paper}: "
              f"{exercise.target}\n" + wrapped(f"Without it: {exercise.breaks}", " " * 6))
    print("\nLevel 1 is a few lines, 2 one idea to get right, 3 a whole step. A good first one is "
          f"mask-frames:\npython {sys.argv[0]} start mask-frames")


def start(exercise):
    path, source = copy_of(exercise), (ROOT / "evilm.py").read_text()
    if path.exists():
        raise Refused(f"{os.path.relpath(path.parent)} exists and stays as it is; to begin again, delete it")
    try:
        copy, line = emptied(source, exercise), lines_of_cut(source, exercise)[0] + 1
    except (SyntaxError, StopIteration):
        raise Refused(f"evilm.py was changed and has no {exercise.target}: git checkout evilm.py") from None
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(copy)
    print(f"{os.path.relpath(path)}, line {line}: write this part of {exercise.target}\n"
          f"{exercise.paper}, level {exercise.level}, {exercise.minutes} minutes\n"
          f"{wrapped(f'Without it: {exercise.breaks}')}\n"
          f"Then: {typed('check', exercise)}\nFor the formula: {typed('hint', exercise)}")


def check(exercise, seconds):
    """Says which claims hold, and why the first that fails does -> whether all hold."""
    path, tests = copy_of(exercise), list(exercise.claims)
    try:
        compile(path.read_bytes(), path, "exec")
    except SyntaxError as error:
        print(f"{os.path.relpath(path)}, line {error.lineno}: {(error.text or '').strip()}\n"
              f"{type(error).__name__}: {error.msg}")
        return False
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder)
        process = get_context("spawn").Process(target=examine, args=(path, exercise.claims, seconds, found))
        process.start()
        process.join()
        why = findings(path, tests, found)
    for test in tests:
        print(f"{'untried' if test not in why else 'fails' if why[test] else 'holds'}  {claim(test)}")
    failed = next((test for test in tests if why.get(test)), None)
    if failed is None:
        print(f"\nAll hold. To compare with evilm.py: {typed('reveal', exercise)}")
        return True
    print(f"\nThe first that fails: {claim(failed)}")
    for line in why[failed]:
        print(textwrap.fill(line, 108, initial_indent="  ", subsequent_indent=" " * 12))
    return False


def reveal(exercise):
    path, original = copy_of(exercise), (ROOT / "evilm.py").read_text()
    diff = difflib.unified_diff(path.read_text(encoding="utf-8-sig", errors="replace").splitlines(),
                                original.splitlines(), os.path.relpath(path), "evilm.py", lineterm="")
    print("\n".join(diff) or "There is no difference.")


def named(name):
    names = [exercise.name for exercise in EXERCISES]
    if name in names:
        return EXERCISES[names.index(name)]
    near = "".join(f" Did you mean {match!r}?" for match in difflib.get_close_matches(name, names, 1))
    raise Refused(f"there is no exercise {name!r}.{near} To see all: python {sys.argv[0]} list")


def main():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["list", "start", "check", "hint", "reveal"])
    parser.add_argument("name", nargs="?", metavar="NAME", help="an exercise; `list` shows all")
    parser.add_argument("--seconds", type=int, default=12, metavar="S",
                        help="check: time limit for all tests together (default: %(default)s)")
    args = parser.parse_intermixed_args()
    if (args.command == "list") == bool(args.name):
        parser.error("list takes no name, every other command takes one")
    if not 1 <= args.seconds <= 3600:
        parser.error("--seconds lies between 1 and 3600")
    try:
        if args.command == "list":
            return list_all()
        exercise = named(args.name)
        if args.command in ("check", "reveal") and not copy_of(exercise).exists():
            raise Refused(f"{exercise.name} is not started: {typed('start', exercise)}")
        if args.command == "start":
            start(exercise)
        elif args.command == "check":
            sys.exit(0 if check(exercise, args.seconds) else 1)
        elif args.command == "hint":
            print(wrapped(exercise.hint))
        else:
            reveal(exercise)
    except Refused as refused:
        print(refused, file=sys.stderr)
        sys.exit(2)
    except (BrokenPipeError, KeyboardInterrupt):            # "list | head", Ctrl-C
        os._exit(130)


if __name__ == "__main__":
    main()
