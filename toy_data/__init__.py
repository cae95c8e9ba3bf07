"""Reading clips: one format on disk, its loader, the synthetic set. Nothing here depends on the model."""
from toy_data import plots
from toy_data.clips import (Batches, BrokenClip, ClipCaptions, DataError, Manifest, WholeClips, collate,
                            find_clips, is_true, make_loader, open_split, open_splits, printable, read_clip,
                            spans)
from toy_data.synthetic import SYNTHETIC, render, render_if_missing

__all__ = ["SYNTHETIC", "Batches", "BrokenClip", "ClipCaptions", "DataError", "Manifest", "WholeClips",
           "collate", "find_clips", "is_true", "make_loader", "open_split", "open_splits", "plots",
           "printable", "read_clip", "render", "render_if_missing", "spans"]
