"""Imports point down: cli -> train, export, pipeline -> models, codecs, data -> layers -> ops."""

from __future__ import annotations

import ast
from pathlib import Path

import fastpose

ROOT = Path(fastpose.__file__).parent
LEVEL = {
    "ops": 0, "files": 0, "skeletons": 0, "geometry": 0, "config": 0,
    "grouping": 0, "stream": 0,
    "distributed": 1,
    "layers": 1, "counting": 1, "codecs": 1, "metrics": 1, "average_precision": 1, "poses": 1, "images": 1,
    "graphs": 2, "preprocess": 2, "plan": 3,
    "data": 2, "checkpoints": 2, "draw": 2, "detect": 2, "video": 2, "tracking": 2,
    "models": 3, "scoring": 3, "sheets": 3, "boxes": 3,
    "pipeline": 4, "export": 5, "zoo": 4, "training": 4,
    "evaluate": 5, "info": 5, "predict": 5,
    "train": 6,
    "cli": 7,
}  # fmt: skip


def imports(path: Path, top_level_only: bool):
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else list(ast.walk(tree))
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("fastpose."):
            yield node.module.split(".")[1]


def test_imports_point_down():
    for path in ROOT.rglob("*.py"):
        module = path.relative_to(ROOT).parts[0].removesuffix(".py")
        if module in ("__init__", "__main__", "recipes", "weights"):
            continue
        for other in imports(path, top_level_only=True):
            assert other == module or LEVEL[other] < LEVEL[module], f"{path.relative_to(ROOT)} imports {other}"


def test_only_ops_call_the_compiled_operators():
    for path in ROOT.rglob("*.py"):
        if path.parent.name != "ops":
            assert "torch.ops.fastpose" not in path.read_text(), path
