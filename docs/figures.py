"""Draws Figs. 1 and 5 of the paper from the numbers in its tables: `python docs/figures.py`."""

import sys
from pathlib import Path

DOCS = Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS.parent))
from toy_data.pictures import FAINT, INK, SERIES, SMALL, grid, save, scatter, write

# Every method whose parameters (in M) and FLOPs (in G) Table 1 gives. Accuracies in %, from Table 1; recall at
# 10 of text-to-video retrieval in %, from Table 2; None where the tables have no figure.
COLUMNS = ("parameters", "GFLOPs", "TGIF-Frame", "MSRVTT-QA", "MSVD-QA", "MSRVTT retrieval, R@10")
METHODS = {
    "E-ViLM":       (16, 12.2, 60.7, 39.3, 41.5, 64.4),
    "all-in-one-T": (12, 18.1, 53.9, 36.8, 32.2, 53.1),     # starred: from its checkpoint, by the E-ViLM authors
    "all-in-one-S": (33, 134, 64.0, 39.5, 41.7, None),
    "all-in-one-B": (110, 235, 64.2, 42.9, 46.5, 71.9),
    "ClipBERT":     (137, 3800, 60.3, 37.4, None, 59.9),
    "JustAsk":      (157, 4400, None, 41.5, 46.3, None),
    "VIOLET":       (198, 4900, 68.9, 43.9, 47.9, 73.6),
}
OURS = 7.4, 14.8    # E-ViLM as `python evilm.py` counts it: G multiply-adds, and GFLOPs if each is two operations


def panel(score, x, x_name, area, bar=None):
    """One score over one cost, each method a dot of an area in pixels; `bar` crosses that of E-ViLM."""
    dots = []
    for method, numbers in METHODS.items():
        row = dict(zip(COLUMNS, numbers))
        colour = SERIES[1] if method == "E-ViLM" else SERIES[0] if "all-in-one" in method else FAINT
        if row[score] is not None:
            dots.append((f"{method}, {row['parameters']} M", row[x], row[score], area(row), colour))
    bars = [(*bar, dots[0][2], SERIES[1])] if bar else []
    return scatter(f"{score}, %", x_name, dots, bars)


def figure1(path):
    panels = [panel(score, "GFLOPs", "GFLOPs", lambda row: 10 * row["parameters"], OURS) for score in COLUMNS[2:]]
    caption = ("A dot's area is its parameters. The bar through E-ViLM is this code's own count beside the paper's "
               "12.2 GFLOPs: 7.4 G multiply-adds, or 14.8 GFLOPs if a multiply and an add are two operations; "
               "16.3 M parameters. Only cost is ours: the accuracies are the paper's.")
    save(path, "Fig. 1 of the paper, from Tables 1 and 2",
         [grid(panels, 2, gap=48, gap_below=32), write(caption, 1300, SMALL, INK)], gap_below=28)


def figure5(path):
    ...


if __name__ == "__main__":
    figure1(DOCS / "figure1.png")
