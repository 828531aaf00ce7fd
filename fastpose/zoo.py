"""The table of networks that ``fastpose models`` prints: our counts beside what was published."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from fastpose.checkpoints import DEFAULT_WEIGHTS
from fastpose.counting import count_macs, count_parameters
from fastpose.models import list_models
from fastpose.models._registry import model_entry


def collect_models() -> list[dict[str, Any]]:
    """For every network: name, input size, number of keypoints, our parameters and multiply-accumulates at that size,
    whether weights are shipped, and the published figures (see `Published`)."""
    rows = []
    for name in list_models():
        entry = model_entry(name)
        with torch.device("meta"):  # shapes without numbers: counting takes no arithmetic
            model = entry.build(num_keypoints=entry.num_keypoints)
        rows.append(
            {
                "name": name,
                "input_size": list(entry.input_size),
                "num_keypoints": entry.num_keypoints,
                "parameters": count_parameters(model),
                "macs": count_macs(model, entry.input_size),
                "weights": name in DEFAULT_WEIGHTS,
                "published": [dataclasses.asdict(p) for p in entry.published],
            }
        )
    return rows


def models_table(rows: list[dict[str, Any]]) -> str:
    """`collect_models` as text; one line per network and one more for every further published row."""
    lines = [
        f"{'':28}{'':>9}{'':>4}  {'counted here':>19}  | published",
        f"{'network':28}{'input':>9}{'K':>4}{'parameters':>12}{'G MAC':>9}  | {'input':>8}{'M':>7}{'GFLOPs':>8}"
        f"  {'in':5} accuracy, source",
    ]
    for row in rows:
        ours = (
            f"{row['name'] + (' *' if row['weights'] else ''):28}{_size(row['input_size']):>9}{row['num_keypoints']:>4}"
            f"{row['parameters']:>12,}{row['macs'] / 1e9:>9.3f}"
        )
        for published in row["published"] or [None]:
            theirs = "-"
            if published:
                parts = [text for text in (published["accuracy"], published["source"]) if text]
                theirs = (
                    f"{_size(published['input_size']):>8}{_number(published['parameters']):>7}"
                    f"{_number(published['gflops']):>8}  {published['unit']:5} {', '.join(parts)}"
                )
            lines.append(f"{ours}  | {theirs}")
            ours = " " * len(ours)
    lines.append(
        "* weights are shipped. G MAC: 1e9 multiply-accumulates. in: unit of the published figure, 1e9 or 2^30."
    )
    return "\n".join(lines)


def _size(size: list[int]) -> str:
    return f"{size[0]}x{size[1]}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:g}"
