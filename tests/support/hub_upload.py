"""Run by test_hub.py in a process of its own: the offline switch of the tests is read once, at import."""

from __future__ import annotations

import sys
from pathlib import Path

from router_tuning.checkpoint.hub import push_export
from router_tuning.errors import UserError

folder, repo_id, endpoint = sys.argv[1:]
try:
    print(push_export(Path(folder), repo_id, endpoint=endpoint, token="hf_test"))
except UserError as error:
    print(f"error: {error}")
