"""Clips in: one format on disk, one loader for it, the synthetic set. Nothing here knows the model."""
from toy_data.clips import (Batches, BrokenClip, ClipCaptions, DataError, Manifest, is_true, open_split,
                            open_splits, read_clip, spans)
from toy_data.synthetic import render, tags

__all__ = ["Batches", "BrokenClip", "ClipCaptions", "DataError", "Manifest", "is_true", "open_split",
           "open_splits", "read_clip", "render", "spans", "tags"]
