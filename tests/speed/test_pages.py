"""Freed pages stay with the process once it is told to keep them: no faults on memory that it has had before."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

FAULTS = """
import json, resource, sys
import torch
from router_tuning.speed.timing import keep_freed_pages
kept = keep_freed_pages() if sys.argv[1] == "keep" else None

torch.ones(64 << 20)  # a hole that small blocks between the next ones do not fill
counts = []
for _ in range(8):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(12 << 20)
    counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(json.dumps([kept, min(counts)]))  # the system may take pages back at any time
"""


def faults(pages: str, root) -> tuple[bool | None, int]:
    command = [sys.executable, "-c", FAULTS, pages]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_freed_memory_is_not_mapped_anew(root):
    kept, count = faults("keep", root)
    if not kept:
        pytest.skip("this C library takes no such option")
    assert count < 100 < faults("release", root)[1]
