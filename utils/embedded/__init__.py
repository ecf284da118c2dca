"""How the embedded base and the sample data are made, and where they lie in this repository."""

from pathlib import Path

TINY_LLAMA = Path(__file__).resolve().parents[2] / "ckpt" / "tiny-llama-mod"
"""The folder of the embedded base; not part of an installed wheel."""
