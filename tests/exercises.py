"""Write a part of E-ViLM yourself: exercises cut from evilm.py as it stands, checked by its own tests.

    python tests/exercises.py list              paper, level, minutes, and what breaks without each part
    python tests/exercises.py start NAME        exercises/NAME/evilm.py: a copy in which that part is missing
    python tests/exercises.py check NAME        which claims hold, and why the first that fails does
    python tests/exercises.py reveal NAME       from your copy to the original, as a diff

What was begun is never overwritten: to begin again, delete exercises/NAME. The exit status is 0 when all
claims hold, 1 when one fails, 2 when the command itself makes no sense.
"""
import argparse
import ast
import contextlib
import difflib
import faulthandler
import importlib
import inspect
import io
import json
import os
import re
import reprlib
import signal
import sys
import tempfile
import textwrap
import traceback
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
SECONDS = 12        # until an endless loop is called one; the slowest right answer needs two


@dataclass(frozen=True)
class Exercise:
    """One part to write: where it stands, what it is for, what checks it, and an answer that looks right.

    The cut is the body of `target` after its docstring: all of it, or from the statement that assigns the
    name `begins`, or to the one that assigns `ends`.
    """
    name: str
    target: str         # a function or method in evilm.py
    paper: str          # equation or section
    level: int          # 1: a few lines, 2: one idea to get right, 3: a whole step
    minutes: int
    breaks: str         # without it
    hint: str
    tests: str          # ids below tests/, the easiest first
    wrong: str          # stands where the cut was; its first line says what is wrong
    begins: str = ""
    ends: str = ""


EXERCISES = [
    Exercise(
        "xca", "CrossCovarianceAttention.forward", "Sec. 3.1", level=2, minutes=30,
        breaks="Cells meet in convolutions alone; here the whole frame decides which channels belong "
               "together, at a cost that grows with the cells and not, as between cells, with their square.",
        hint="q, k and v come from self.qkv: C numbers each, one head after another. For each head q and k "
             "are (C/heads, cells), every row brought to length 1 over the cells; softmax(q k^T * "
             "temperature) is (C/heads, C/heads) and says of which channels of v a channel is the mean. "
             "Last comes self.proj.",
        tests="""
            test_parts.py::test_xca_keeps_the_shape_whatever_the_number_of_cells
            test_parts.py::test_xca_by_hand_mixes_two_channels_three_to_one
            test_parts.py::test_xca_by_hand_long_and_short_channels_are_attended_to_alike
            test_parts.py::test_xca_each_head_has_its_own_channels_and_its_own_temperature
            test_parts.py::test_xca_against_a_plain_computation
            test_parts.py::test_xca_everything_in_it_learns
            test_3_1_model.py::test_edgenext_against_a_plain_computation""",
        wrong="""
            # Lengths are taken over a head's channels, as if cells attended to cells.
            N, cells, C = x.shape
            q, k, v = self.qkv(x).view(N, cells, 3, self.heads, C // self.heads).permute(2, 0, 3, 4, 1)
            attention = F.normalize(q, dim=-2) @ F.normalize(k, dim=-2).transpose(-2, -1) * self.temperature
            return self.proj((attention.softmax(-1) @ v).permute(0, 3, 1, 2).reshape(N, cells, C))"""),
    Exercise(
        "cascade", "SDTAEncoder.cascade", "Sec. 3.1", level=1, minutes=15,
        breaks="All channels look at 3x3 cells; in the cascade the second part looks at 5x5, the third at "
               "7x7.",
        hint="x.split(self.split, 1) gives the parts x_1 ... x_s, self.convs has the s - 1 convolutions. "
             "y_1 = conv_1(x_1), y_i = conv_i(x_i + y_(i-1)), and the last is y_s = x_s. (With s = 1 there "
             "is one convolution, and nothing passes untouched.) (N, C, H, W) -> the same.",
        tests="""
            test_parts.py::test_cascade_by_hand_convolves_each_part_with_the_result_before_it
            test_parts.py::test_cascade_the_last_part_passes_untouched_and_may_be_narrower
            test_parts.py::test_cascade_of_one_part_convolves_all_of_it
            test_parts.py::test_cascade_leaves_its_input_as_it_was""",
        wrong="""
            # To each part is added what went into the one before, not what came out of it.
            parts = x.split(self.split, 1)
            done = [conv(parts[i] + parts[i - 1] if i else parts[i]) for i, conv in enumerate(self.convs)]
            return torch.cat([*done, parts[-1]], 1)"""),
    Exercise(
        "wordpiece", "WordPiece.pieces", "Sec. 3.1", level=2, minutes=25,
        breaks="Every word that is not whole in the vocabulary is [UNK]; the paper's, cut to 30% of BERT's, "
               "has few words.",
        hint="Take the longest piece of self.index that the word begins with, then go on with what is left; "
             "from the second piece on, the vocabulary writes ## before it. There is no going back: where "
             "nothing fits, the whole word is [UNK], and so are an empty word and one of more than 100 "
             "letters.",
        tests="""
            test_3_1_model.py::test_wordpiece_takes_the_longest_piece_first
            test_3_1_model.py::test_wordpiece_encodes_between_cls_and_sep
            test_3_1_model.py::test_wordpiece_cuts_so_that_sep_stays
            test_3_1_model.py::test_the_papers_truncation_keeps_frequent_pieces_and_breaks_ties_by_order""",
        wrong="""
            # Where nothing fits, only the rest of the word becomes [UNK].
            found, start = [], 0
            while start < len(word) <= 100:
                prefix = "##" if start else ""
                ends = [e for e in range(len(word), start, -1) if prefix + word[start:e] in self.index]
                if not ends:
                    return found + ["[UNK]"]
                found.append(prefix + word[start:ends[0]])
                start = ends[0]
            return found or ["[UNK]"]"""),
    Exercise(
        "fuse", "EViLM.fuse", "Eq. (1), (2)", level=2, minutes=30,
        breaks="Words and cells never meet: no caption could be matched with a clip, no word found from the "
               "frames.",
        hint="[h^CLS, h^L, h^V] = DEC([e^CLS, e^L + t^L, e^V + t^V]). self.token_type holds e^CLS, t^L and "
             "t^V, (3, D). self.decoder(x, seen) takes the sequence (B, 1 + L + N, D) and seen (B, 1 + L + "
             "N), True for all but padding, or None for everything; self.decoder_norm comes after it.",
        tests="""
            test_parts.py::test_eq2_cls_comes_out_first_then_the_words_then_the_cells
            test_parts.py::test_eq2_by_hand_each_side_gets_its_token_type
            test_parts.py::test_eq2_the_decoder_is_shown_everything_but_padding
            test_parts.py::test_eq2_one_side_alone_gives_none_for_the_other
            test_parts.py::test_eq2_token_types_words_and_cells_learn
            test_3_1_model.py::test_padding_changes_nothing
            test_3_1_model.py::test_eq2_order_and_token_types""",
        wrong="""
            # Padding is shown to the decoder as if it were words.
            e_cls, t_text, t_video = self.token_type
            B, L = len(video if text is None else text), 0 if text is None else text.shape[1]
            parts = [e_cls.expand(B, 1, -1)]
            parts += [] if text is None else [text + t_text]
            parts += [] if video is None else [video + t_video]
            x = torch.cat(parts, 1)
            h = self.decoder_norm(self.decoder(x, torch.ones(x.shape[:2], dtype=torch.bool)))
            h_text, h_video = h[:, 1:1 + L], h[:, 1 + L:]
            return h[:, 0], None if text is None else h_text, None if video is None else h_video"""),
    Exercise(
        "block-mask", "block_mask", "Sec. 4.1", level=3, minutes=45,
        breaks="Single cells would be masked, and a masked cell could be guessed from the visible ones "
               "around it without understanding the clip.",
        hint="For each mask draw area, aspect and place until enough is covered. area: between the smallest "
             "and what is still wanted. aspect: exp of a uniform number between log 0.3 and log(1 / 0.3). "
             "height = sqrt(area * aspect), width = sqrt(area / aspect), rounded and held between 1 and "
             "grid; a block that rounding made too small is drawn anew. place: uniform, inside the grid. "
             "All chance comes from torch.rand(..., generator=generator).",
        tests="""
            test_3_2_masking.py::test_exactly_the_ratio_is_masked_in_each_frame
            test_3_2_masking.py::test_each_frame_has_its_own_blocks_and_a_generator_repeats_them
            test_3_2_masking.py::test_masked_cells_stand_together
            test_3_2_masking.py::test_a_mask_is_allowed_blocks_and_at_most_one_trimmed_one
            test_3_2_masking.py::test_blocks_lie_and_stand_and_reach_every_cell
            test_3_2_masking.py::test_no_cell_is_likelier_than_the_one_opposite""",
        wrong="""
            # The right number of cells, but each on its own.
            target = round(ratio * grid * grid)
            order = torch.rand(n, grid * grid, generator=generator).argsort(1)
            return (order.argsort(1) < target).view(n, grid, grid)"""),
    Exercise(
        "mask-frames", "mask_frames", "Sec. 3.2", level=1, minutes=10,
        breaks="The model sees the cells whose codes it is to predict: it learns to look there, and not to "
               "infer them from the caption and from the rest of the clip.",
        hint="A cell is W / g pixels wide and as many high: chosen has to become (B, T, H, W), and then to "
             "reach all three colours. The frames that came in must stay as they are: the tokenizer sees "
             "them whole.",
        tests="""
            test_3_2_masking.py::test_masked_pixels_are_zero_and_no_others_change""",
        wrong="""
            # The grid is laid side by side, not each cell made larger.
            scale = frames.shape[-1] // chosen.shape[-1]
            return frames.masked_fill(chosen.repeat(1, 1, scale, scale)[:, :, None], 0.0)"""),
    Exercise(
        "mask-words", "mask_words", "Sec. 3.4, 4.1", level=2, minutes=25,
        breaks="There is no L_MLM; and were every chosen word to become [MASK], the model would learn "
               "nothing about words that it can see, and after pretraining it sees all of them.",
        hint="Words are the ids above MASK. torch.randperm chooses among them, one torch.rand a chosen word "
             "decides its fate, torch.randint draws from MASK + 1 to vocab_size; each with the generator. "
             "The caller's ids must stay as they are.",
        tests="""
            test_3_2_masking.py::test_the_exact_share_of_words_is_chosen
            test_3_2_masking.py::test_a_caption_without_words_has_nothing_chosen
            test_3_2_masking.py::test_words_not_chosen_stay_as_they_are
            test_3_2_masking.py::test_of_the_chosen_80_per_cent_are_masked_10_random_10_kept
            test_3_2_masking.py::test_in_short_captions_as_well_80_per_cent_are_masked_10_random_10_kept
            test_3_2_masking.py::test_random_words_are_drawn_from_all_words_and_no_special_token
            test_3_2_masking.py::test_every_word_is_as_likely_to_be_chosen
            test_3_2_masking.py::test_word_masks_follow_from_the_generator""",
        wrong="""
            # Each word is chosen by a coin of its own, so that short captions often have none.
            chosen = (torch.rand(len(ids), generator=generator) < ratio) & (ids > MASK)
            fate = torch.rand(len(ids), generator=generator)
            drawn = torch.randint(MASK + 1, vocab_size, (len(ids),), generator=generator)
            changed = torch.where(fate < 0.8, MASK, torch.where(fate < 0.9, drawn, ids))
            return torch.where(chosen, changed, ids), chosen"""),
    Exercise(
        "mvm-loss", "cross_entropy", "Eq. (3), (8)", level=1, minutes=15,
        breaks="Nothing asks the model for masked cells' codes, for masked words or for matching captions: "
               "mvm_loss and the two losses beside it all pass on to this one.",
        hint="mvm_loss below, Eq. (3), passes on to this: -1/N * sum over i of log "
             "softmax(logits[i])[targets[i]]. logits (N, classes), targets (N,) -> scalar, in float32 even "
             "where logits are bfloat16. Divide by `count` instead of N where it is given: these rows are "
             "then a part of a batch, and it counts all of them. Over no rows the loss is 0, not 0 / 0.",
        tests="""
            test_3_4_losses.py::test_eq3_and_eq8_terms
            test_3_4_losses.py::test_a_loss_stays_finite_where_a_probability_underflows
            test_3_4_losses.py::test_eq3_and_eq8_parts_of_a_batch_add_up_to_the_whole
            test_3_4_losses.py::test_a_loss_over_nothing_is_zero""",
        wrong="""
            # Each part of a batch divides by its own rows: the parts' losses do not add up.
            return F.cross_entropy(logits.float(), targets)"""),
    Exercise(
        "nearest-code", "VectorQuantizer.forward", "Eq. (4)", level=1, minutes=20, ends="ids",
        breaks="A cell has no code, so masked video modeling has no label to predict.",
        hint="The lines below need three names: x (..., dim), assigned anew, and codebook (M, dim), both "
             "l2-normalised and in float32, and ids (...): argmin_j ||x - c_j||. Between unit vectors "
             "||x - c||^2 = 2 - 2 x.c. Under autocast a product of matrices is made in bfloat16, where near "
             "codes tie: turn it off for that. ids need no gradient, but x and codebook pass theirs on: "
             "both learn by Eq. (7).",
        tests="""
            test_3_3_tokenizer.py::test_eq4_nearest_code
            test_3_3_tokenizer.py::test_tokenize_gives_a_code_a_cell_and_needs_no_gradient
            test_3_3_tokenizer.py::test_eq4_nearest_code_under_autocast
            test_3_3_tokenizer.py::test_eq7_code_terms
            test_3_3_tokenizer.py::test_eq7_gradients_go_where_stop_gradient_lets_them""",
        wrong="""
            # The longest codes have the largest inner products, near or not.
            x, codebook = F.normalize(x.float(), dim=-1), self.codebook.float()
            with torch.autocast(x.device.type, enabled=False):
                ids = (x @ codebook.t()).argmax(-1)"""),
    Exercise(
        "read-words", "SemanticTokenizer.read_words", "Eq. (5)", level=1, minutes=10,
        breaks="The code terms of Eq. (7) alone are least when all cells share one code: it is for the "
               "words that codes come to differ, and by the words that they have a meaning.",
        hint="y^S = HEAD(mean over cells of D(C_q)). self.decode is D with the time and place of the codes, "
             "self.head reads the words. The head has rows for words that do not exist: of its outputs only "
             "the first self.config.words - len(SPECIAL) count.",
        tests="""
            test_3_3_tokenizer.py::test_eq5_head_of_the_averaged_output
            test_3_3_tokenizer.py::test_eq5_tells_time_and_place
            test_3_3_tokenizer.py::test_rows_that_no_word_uses_do_not_count_in_K
            test_3_3_tokenizer.py::test_the_tokenizer_reads_words_from_codes_alone
            test_3_3_tokenizer.py::test_the_words_teach_encoder_and_decoder_and_leave_the_codebook_to_eq7""",
        wrong="""
            # The codes are averaged before D, which then has one vector to look at.
            B, T, g = quantized.shape[:3]
            cells = self.expand(quantized).flatten(1, 3)
            cells = cells + space_time_sines(T, g, cells.shape[-1], cells.device)
            output = self.decoder(cells.mean(1, keepdim=True))
            return self.head(output[:, 0])[:, :self.config.words - len(SPECIAL)]"""),
    Exercise(
        "focal-loss", "focal_loss", "Eq. (6)", level=2, minutes=20,
        breaks="A caption has a dozen of the vocabulary's thousands of words: without the weight p the many "
               "absent words, long since learned, outweigh the few that are there.",
        hint="With p = sigmoid(logit): -log p for a word that is there, -p log(1 - p) for one that is "
             "absent. The loss must stay finite at logits of 10,000: see F.logsigmoid, and 1 - sigmoid(z) = "
             "sigmoid(-z).",
        tests="""
            test_3_3_tokenizer.py::test_eq6_focal_loss
            test_3_3_tokenizer.py::test_eq6_gradient_goes_through_the_weight_p_too
            test_3_3_tokenizer.py::test_eq6_does_not_overflow""",
        wrong="""
            # As printed, but p becomes 0 or 1 at large logits, and its log infinite.
            p = torch.sigmoid(logits)
            return torch.where(targets > 0, -p.log(), -p * (1 - p).log()).mean()"""),
    Exercise(
        "straight-through", "VectorQuantizer.forward", "Eq. (7)", level=2, minutes=25, begins="loss",
        breaks="argmin has no gradient: the words' loss would never reach the encoder, and no code would "
               "move.",
        hint="codes (..., dim) are each cell's C_q. loss = ||sg[x] - C_q||^2 + ||x - sg[C_q]||^2, the "
             "squares summed over dim and averaged over cells; sg is .detach(). Return (quantized, ids, "
             "loss), where quantized has the value of codes and passes its gradient to x as it is, and none "
             "to the codebook.",
        tests="""
            test_3_3_tokenizer.py::test_eq4_nearest_code
            test_3_3_tokenizer.py::test_eq7_code_terms
            test_3_3_tokenizer.py::test_eq7_gradients_go_where_stop_gradient_lets_them
            test_3_3_tokenizer.py::test_straight_through_copies_the_codes_gradient_to_the_encoder
            test_3_3_tokenizer.py::test_the_words_teach_encoder_and_decoder_and_leave_the_codebook_to_eq7""",
        wrong="""
            # The value is right, the gradients are not: nothing is stopped.
            loss = 2 * ((x - codes) ** 2).sum(-1).mean()
            return x + (codes - x).detach(), ids, loss"""),
    Exercise(
        "joint-pass", "EViLM.forward", "Eq. (8)", level=3, minutes=40,
        breaks="There is no pretraining: this pass serves L_MLM, L_VTM and L_MVM at once. Without wrong "
               'captions matching would be learned as "always yes".',
        hint="Encode the video once. Lay the mismatched captions below the matched ones, and the same video "
             "below itself; fuse all 2B pairs at once. VTM is vtm_head of pooler of h^CLS, for all pairs. "
             "MLM and MVM run their heads on masked words and cells of the B matched pairs alone, and of "
             "mlm_head's rows only the first config.words are words. What is None is not asked for, and "
             "must not cost anything.",
        tests="""
            test_3_4_losses.py::test_matching_sees_each_video_with_its_caption_and_with_a_wrong_one
            test_3_4_losses.py::test_heads_run_on_masked_positions_of_the_matched_pairs_alone
            test_3_4_losses.py::test_rows_that_no_word_uses_are_cut_off
            test_3_4_losses.py::test_the_video_encoder_runs_once_a_clip_and_the_decoder_once_a_pair
            test_3_4_losses.py::test_an_objective_that_is_off_leaves_out_its_output_and_its_cost
            test_3_4_losses.py::test_eq8_each_loss_alone_teaches_both_encoders_and_the_decoder
            test_3_4_losses.py::test_eq8_accumulated_gradients_are_those_of_the_whole_batch""",
        wrong="""
            # The wrong captions are read with the right captions' padding.
            B, video = len(frames), self.encode_video(frames)
            if mismatched is not None:
                ids, mask = torch.cat([ids, mismatched[0]]), torch.cat([mask, mask])
                video = torch.cat([video, video])
            h_cls, h_text, h_video = self.fuse(video, self.encode_text(ids, mask), mask)
            vtm = None if mismatched is None else self.vtm_head(self.pooler(h_cls))
            mlm = None if words is None else self.mlm_head(h_text[:B][words])[:, :self.config.words]
            return vtm, mlm, None if cells is None else self.mvm_head(h_video[:B][cells])"""),
    Exercise(
        "recall-at-k", "rank_of_truth", "Sec. 4", level=1, minutes=10,
        breaks="R@K, the share of queries whose right item ranks K or better, cannot be told; were ties to "
               "count for the query, a model that scores everything alike would have 100%.",
        hint="The rank is 1 and one more for every other item that scores as high as the right one or "
             "higher.",
        tests="""
            test_parts.py::test_a_rank_is_one_for_the_best_score_and_counts_from_there
            test_parts.py::test_recall_at_k_is_the_share_of_queries_whose_right_item_is_among_the_k_best
            test_parts.py::test_a_model_that_scores_everything_alike_recalls_nothing
            test_3_4_losses.py::test_rank_of_truth_counts_every_tie_against_the_query""",
        wrong="""
            # Ties count for the query.
            return 1 + (scores > scores.gather(1, truth[:, None])).sum(1)"""),
]


# ---------------------------------------------------------------------------------------------------- The cut


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
    end = assigning(exercise.ends) if exercise.ends else body[-1]
    lines, first = source.splitlines(), begin.lineno - 1
    while lines[first - 1].lstrip().startswith("#"):        # what a comment above says would give it away
        first -= 1
    return first, end.end_lineno, " " * begin.col_offset


def replaced(source, exercise, block):
    """`source` with `block` where the cut is."""
    first, last, indent = lines_of_cut(source, exercise)
    lines, block = source.splitlines(keepends=True), textwrap.dedent(block).strip("\n") + "\n"
    return "".join([*lines[:first], textwrap.indent(block, indent), *lines[last:]])


def emptied(source, exercise):
    """`source` without the exercise's part: a hint and an error stand there."""
    indent = len(lines_of_cut(source, exercise)[2])
    hint = textwrap.fill(f"Hint: {exercise.hint}", 108 - indent, break_long_words=False,
                         break_on_hyphens=False)
    comment = textwrap.indent(f"Exercise {exercise.name}, {exercise.paper}.\n{hint}\n", "# ")
    return replaced(source, exercise,
                    f'{comment}raise NotImplementedError("exercise {exercise.name}: write this part")')


# ------------------------------------------------------------------------------------------- What a test says


SPELLING = {"cls": "[CLS]", "sep": "[SEP]", "xca": "XCA", "edgenext": "EdgeNeXt", "wordpiece": "WordPiece",
            "papers": "paper's", "releases": "release's"}


def claim(test):
    """A test's name as a sentence: "...::test_eq4_nearest_code" -> "Eq. (4) nearest code"."""
    words = [SPELLING.get(word, re.sub(r"^eq(\d)$", r"Eq. (\1)", word))
             for word in test.split("::test_")[1].split("_")]
    return " ".join([words[0][0].upper() + words[0][1:], *words[1:]])


def shown(value):
    """A value on one line, not too long."""
    value = tuple(value) if isinstance(value, tuple) else value         # a torch.Size among them
    if hasattr(value, "tolist"):
        shape, value = tuple(value.shape), value.tolist()
        if len(str(value)) > 90:
            return f"a tensor {shape}"
    short = reprlib.Repr()
    short.maxlist = short.maxtuple = short.maxset = short.maxdict = 12
    short.maxstring = short.maxother = 90
    return short.repr(value)


def difference(expected, got):
    """[expected, got] in two lines; of large tensors and long lists the place where they differ most."""
    import torch
    if torch.is_tensor(expected) and torch.is_tensor(got):
        if expected.shape != got.shape:
            return [f"expected  shape {tuple(expected.shape)}", f"got       shape {tuple(got.shape)}"]
        if torch.equal(expected.double(), got.double()):
            return [f"expected  {expected.dtype}", f"got       {got.dtype}"]
        if expected.ndim and len(str(expected.tolist()) + str(got.tolist())) > 120:
            apart = (expected.double() - got.double()).abs().nan_to_num(float("inf"))
            at = torch.unravel_index(apart.argmax(), apart.shape)
            where = ", ".join(str(int(i)) for i in at)
            return [f"expected  {expected[at].item():.6g} at [{where}] of {tuple(apart.shape)}",
                    f"got       {got[at].item():.6g}"]
    if isinstance(expected, list) and isinstance(got, list) and len(expected) == len(got) > 12:
        at = next(i for i, (a, b) in enumerate(zip(expected, got)) if a != b)
        return [f"expected  {shown(expected[at])} at [{at}] of {len(expected)}",
                f"got       {shown(got[at])}"]
    return [f"expected  {shown(expected)}", f"got       {shown(got)}"]


def judged(node, names):
    """Expected and got of the assertion `node` that failed, computed again with the test's `names`."""
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
                 and not callable(names[part.id]) and not inspect.ismodule(names[part.id])]
    found = dict.fromkeys(f"{ast.unparse(part)} = {shown(value(part))}" for part in parts)
    return [f"expected  {text}", f"got       {', '.join(found)}"]


def statement_at(path, line):
    """The smallest statement of a Python file that covers the line."""
    tree = ast.parse(Path(path).read_text())
    return [node for node in ast.walk(tree) if isinstance(node, ast.stmt)
            and node.lineno <= line <= node.end_lineno][-1]


def near_cwd(path):
    """A path as one would type it here."""
    return os.path.relpath(path)


def at_line(path, line):
    return f"{near_cwd(path)}, line {line}: {Path(path).read_text().splitlines()[line - 1].strip()}"


def said(error):
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"


def explain(error, path):
    """Why a claim about the evilm.py at `path` fails: lines in plain words, from the error's traceback."""
    frames = list(traceback.walk_tb(error.__traceback__))
    known = [(frame, line) for frame, line in frames if frame.f_code.co_filename == str(path)
             or Path(frame.f_code.co_filename).name.startswith("test_")]
    if not known:
        return [said(error)]
    if known[-1][0].f_code.co_filename == str(path):
        copy, original = (file.read_text().splitlines() for file in (Path(path), ROOT / "evilm.py"))
        inside = [line for frame, line in known if frame.f_code.co_filename == str(path)]
        own = [line for line in inside if copy[line - 1] not in original]
        places = dict.fromkeys([*own[-1:], inside[-1]])     # the student's last line, then where that led
        return [*(at_line(path, line) for line in places), "This part is still to be written."
                if isinstance(error, NotImplementedError) else said(error)]
    frame, line = next(one for one in known if one[0].f_code.co_name.startswith("test_"))
    statement = statement_at(frame.f_code.co_filename, line)
    lines = [f"{near_cwd(frame.f_code.co_filename)}, line {line}: {ast.unparse(statement)}"]
    plain = {name: value for name, value in frame.f_locals.items()
             if isinstance(value, (bool, int, float, str, tuple, type(None))) and len(repr(value)) < 40}
    if plain:
        lines.append("where " + ", ".join(f"{name} = {value!r}" for name, value in plain.items()))
    close = [frame.f_locals for frame, _ in frames if frame.f_code.co_name == "assert_close"]
    if close:
        return difference(close[0]["expected"], close[0]["actual"]) + lines
    if isinstance(statement, ast.Assert) and isinstance(error, AssertionError):
        return judged(statement.test, {**frame.f_globals, **frame.f_locals}) + lines
    none = ["None came where a value was expected: is a return missing, or did no gradient arrive?"]
    return [said(error), *none * ("NoneType" in str(error)), *lines]


# -------------------------------------------------------------------------------------------------- The check


CUT_SHORT = ["Something in your copy ended the test or all of Python: an exit, a skip, an interrupt?"]


class Claims:
    """A pytest plugin: {test: None where it held, else lines that say why not}, without those not tried;
    kept in the file `found` as well, for a process that is ended."""

    def __init__(self, path, found):
        self.path, self.found, self.why = path, found, {}

    def pytest_runtest_logreport(self, report):
        test = report.nodeid.split("[")[0]
        if report.skipped:
            self.why[test] = self.why.get(test) or CUT_SHORT
        elif report.when == "call":
            self.why.setdefault(test, None)
        self.found.write_text(json.dumps(self.why))

    def pytest_exception_interact(self, node, call, report):
        test, error = node.nodeid.split("[")[0], call.excinfo.value
        if self.why.get(test) is None:
            cause = error.__cause__ if type(error).__name__ == "CollectError" else None
            prints = getattr(report, "capstdout", "").splitlines()[-10:]
            self.why[test] = explain(cause or error, self.path) + [f"printed   {line}" for line in prints]


def names_of(source):
    """The functions and classes that a module has."""
    return [node.name for node in ast.parse(source).body
            if isinstance(node, (ast.FunctionDef, ast.ClassDef))]


def examine(path, tests, seconds, log):
    """Runs the tests against the evilm.py at `path` -> {test: None where it holds, else lines that say why}.

    Tests that were not tried are not in it. For a process of its own: it swaps modules, and after `seconds`
    it ends itself, leaving in `log` where it was, and beside it what it had found.
    """
    import pytest
    import torch                        # noqa: F401  a slow disk's time is not the student's
    for name in [name for name in sys.modules if name in ("evilm", "plain") or name.startswith("test_")]:
        del sys.modules[name]
    sys.path.insert(0, str(path.parent))
    os.environ["PYTHONBREAKPOINT"] = "0"        # no one could answer the debugger
    claims, nowhere = Claims(path, log.with_suffix(".json")), io.StringIO()
    with (open(log, "w") as file, contextlib.redirect_stdout(nowhere),
          contextlib.redirect_stderr(nowhere)):
        faulthandler.dump_traceback_later(seconds, exit=True, file=file)
        try:
            copy = importlib.import_module("evilm")        # pytest's own path comes too late to change this
            missing = [name for name in names_of((ROOT / "evilm.py").read_text()) if not hasattr(copy, name)]
            if missing:
                return dict.fromkeys(tests, [f"Your copy has no {missing[0]}: was a name changed, was it "
                                             "damaged, or begun from an older evilm.py?"])
            pytest.main([*(f"{TESTS / test}" for test in tests), f"--rootdir={TESTS}",
                         f"--config-file={ROOT / 'pyproject.toml'}", "--assert=plain", "--tb=no",
                         *(f"-pno:{plugin}" for plugin in ("cacheprovider", "debugging", "faulthandler",
                                                           "unraisableexception"))], plugins=[claims])
        except (Exception, SystemExit) as error:
            return dict.fromkeys(tests, explain(error, path))
        finally:
            faulthandler.cancel_dump_traceback_later()
            sys.path.remove(str(path.parent))
    # A test file that cannot be imported stands alone, without a test's name, and stops all others.
    unread = next((why for name, why in claims.why.items() if "::" not in name), None)
    if unread:
        return dict.fromkeys(tests, unread)
    why = {test: claims.why[test] for test in tests if test in claims.why}
    untried = [test for test in tests if test not in why]
    return {**why, untried[0]: CUT_SHORT} if untried and not any(why.values()) else why


def answer(path, tests, seconds):
    """What `examine` finds in a process of its own; of one that did not end also where it was."""
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(1, get_context("spawn")) as process:
        log = Path(folder) / "log.txt"
        try:
            return process.submit(examine, path, tests, seconds, log).result()
        except BrokenProcessPool:
            places = re.findall(r'File "(.*)", line (\d+) in (\w+)', log.read_text())
            kept = log.with_suffix(".json")
            found = json.loads(kept.read_text()) if kept.exists() else {}
    found = {test: found[test] for test in tests if test in found}
    untried = next((test for test in tests if test not in found), tests[0])
    test = next((test for _, _, name in places for test in tests if test.endswith(f"::{name}")), untried)
    if not places:
        return found | {test: ["Python ended without a word: a crash, an exit, out of memory?"]}
    why = [at_line(file, int(line)) for file, line, _ in places if file == str(path)][:1]
    return found | {test: [*why, f"No end after {seconds:g} seconds: an endless loop? (Slow machine: "
                           "--seconds 60)"]}


# ----------------------------------------------------------------------------------------------- The commands


class Refused(Exception):
    """A command that makes no sense here; the message says what to type instead."""


def copy_of(exercise):
    return ROOT / "exercises" / exercise.name / "evilm.py"


def read(exercise):
    """The student's copy. Raises Refused."""
    path = copy_of(exercise)
    try:
        return path.read_text(encoding="utf-8-sig")         # Python, too, passes over a byte order mark
    except FileNotFoundError:
        raise Refused(f"{exercise.name} is not begun: {typed('start', exercise)}") from None
    except UnicodeDecodeError as error:
        line = error.object[:error.start].count(b"\n") + 1
        raise Refused(f"{near_cwd(path)}, line {line}: is not UTF-8; save the file as that") from None


def typed(command, exercise):
    return f"python {sys.argv[0]} {command} {exercise.name}"


def without(exercise):
    return textwrap.fill(f"Without it: {exercise.breaks}", 100)


def list_all():
    for exercise in EXERCISES:
        print(f"{exercise.name:<17} {exercise.paper:<13} level {exercise.level}, {exercise.minutes} minutes: "
              f"{exercise.target}")
        print(textwrap.indent(without(exercise), " " * 6))
    print("\nLevel 1 is a few lines, 2 one idea to get right, 3 a whole step. To begin, "
          "mask-frames or\nrecall-at-k is a good first one:\n"
          f"python {sys.argv[0]} start NAME")


def start(exercise):
    path, source = copy_of(exercise), (ROOT / "evilm.py").read_text()
    if path.exists():
        raise Refused(f"{near_cwd(path.parent)} is there and stays as it is; to begin again, delete it")
    try:
        copy, line = emptied(source, exercise), lines_of_cut(source, exercise)[0] + 1
    except (SyntaxError, StopIteration):
        raise Refused(f"evilm.py was changed, and {exercise.target} is not found in it: "
                      "git checkout evilm.py") from None
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(copy)
    print(f"{near_cwd(path)}, line {line}: write this part of {exercise.target}\n"
          f"{exercise.paper}, level {exercise.level}, {exercise.minutes} minutes\n{without(exercise)}\n"
          f"Then: {typed('check', exercise)}")


def check(exercise, seconds=SECONDS):
    """Says which claims hold, and of the first that fails why -> whether all do."""
    path, tests = copy_of(exercise), exercise.tests.split()
    try:
        compile(read(exercise), path, "exec")
    except SyntaxError as error:
        print(f"{near_cwd(path)}, line {error.lineno}: {(error.text or '').strip()}\n"
              f"{type(error).__name__}: {error.msg}")
        return False
    why = answer(path, tests, seconds)
    failed = [test for test in tests if why.get(test)]
    for test in tests:
        print(f"{'untried' if test not in why else 'fails' if why[test] else 'holds'}  {claim(test)}")
    if not failed:
        print(f"\nAll hold. How evilm.py says it: {typed('reveal', exercise)}")
        return True
    print(f"\nThe first that fails: {claim(failed[0])}")
    for line in why[failed[0]]:
        print(textwrap.fill(line, 108, initial_indent="  ", subsequent_indent=" " * 12))
    return False


def reveal(exercise):
    source = (ROOT / "evilm.py").read_text()
    diff = difflib.unified_diff(read(exercise).splitlines(), source.splitlines(),
                                near_cwd(copy_of(exercise)), "evilm.py", lineterm="")
    print("\n".join(diff) or "There is no difference.")


def limit(text):
    """The value of --seconds: more than none, an hour at most."""
    value = float(text)
    if not 0 < value <= 3600:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and at most 3600")
    return value


def named(name):
    found = [exercise for exercise in EXERCISES if exercise.name == name]
    if not found:
        near = difflib.get_close_matches(name, [exercise.name for exercise in EXERCISES], 1)
        raise Refused(f"there is no exercise {name!r}" + (f"; {near[0]!r}?" if near else ".")
                      + f" To see all: python {sys.argv[0]} list")
    return found[0]


def main():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["list", "start", "check", "reveal"])
    parser.add_argument("name", nargs="?", metavar="NAME", help="of an exercise; `list` shows them")
    parser.add_argument("--seconds", type=limit, default=SECONDS, metavar="S",
                        help=f"check: after how many an endless loop is called one (default: {SECONDS})")
    args = parser.parse_intermixed_args()
    if args.command == "list" and args.name:
        parser.error("list takes no name")
    if args.command != "list" and not args.name:
        parser.error(f"{args.command} takes an exercise's name: python {sys.argv[0]} {args.command} fuse")
    if args.command != "check" and hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)       # "list | head" ends without a traceback
    try:
        if args.command == "list":
            list_all()
        elif args.command == "start":
            start(named(args.name))
        elif args.command == "check":
            sys.exit(0 if check(named(args.name), args.seconds) else 1)
        else:
            reveal(named(args.name))
    except Refused as refused:
        print(refused, file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
