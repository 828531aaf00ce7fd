"""The benchmark that needs a GPU, as far as it can be walked through without one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fastpose.ops import _backend

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "bench_cuda.py"
FEW = ["--rehearse", "--networks", "mobileposenet", "--network-batches", "1", "--network-dtypes", "float32"]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, timeout=500)


@pytest.mark.slow
@pytest.mark.skipif(not _backend.LOADED, reason="the operators are not built or switched off")
def test_the_cuda_benchmark_walks_through_every_case(tmp_path):
    file = tmp_path / "report.json"
    steps = ["nms", "cropping", "networks", "operators"]
    done = run(*steps, *FEW, "--dtypes", "float32", "--json", str(file))
    assert done.returncode == 0, done.stderr
    rows = json.loads(file.read_text())["rows"]
    assert [row["op"] for row in rows].count("oks_nms") == 3 and len(rows) == 3 + 2 + 1 + 8
    assert all(row["right"] and row["fused us"] > 0 and "failed" not in row for row in rows)
    done = run("compiled", *FEW, "--json", str(file))  # goes on in the same file
    again = json.loads(file.read_text())["rows"]
    network = next(row for row in again if row["op"] == "mobileposenet")
    assert len(again) == len(rows) and network["compiled us"] > 0 and network["x compiled"] > 0
    assert "mobileposenet" in done.stdout.splitlines()[-2]
    stopped = run("nms", *FEW, "--budget", "0", "--json", str(file))  # what there is no time for is told, not lost
    assert "left out for lack of time: 3 cases" in stopped.stdout
    assert len(json.loads(file.read_text())["rows"]) == len(rows)


def test_the_cuda_benchmark_says_what_it_needs():
    done = run("nmss", "--rehearse")
    assert done.returncode == 2 and "steps are build test nms" in done.stderr and "got nmss" in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(not _backend.LOADED, reason="the operators are not built or switched off")
def test_runtimes_are_compared_and_those_that_fail_say_why(tmp_path):
    file, picture = tmp_path / "rows.json", tmp_path / "bars.svg"
    script = SCRIPT.with_name("compare_peers.py")
    command = [sys.executable, str(script), "--model", "ghost_cheap:8x6x4", "--threads", "1", "--batch", "1"]
    done = subprocess.run(
        [*command, "--rounds", "2", "--json", str(file), "--picture", str(picture)],
        capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(file.read_text())
    rows = {row["competitor"]: row for row in report["rows"]}
    assert {"processor", "torch", "onnxruntime", "size", "date"} <= set(report["environment"])
    for name in ("fastpose", "eager", "jit.freeze"):
        assert rows[name]["error"] < 1e-5 and len(rows[name]["blocks"]) == 2 and rows[name]["foreign load"] >= -0.1
    assert all("ms" in row or row["failed"] for row in rows.values())
    drawn = [name for name in rows if name not in ("exported", "jit.freeze", "fastpose float32") and "ms" in rows[name]]
    assert picture.read_text().count(" ms</text>") == len(drawn)
