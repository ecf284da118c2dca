"""How the embedded base and the sample data are made, and where they lie in this repository."""

from router_tuning.places import ROOT

TINY_LLAMA = ROOT / "ckpt" / "tiny-llama-mod"
"""The folder of the embedded base; not part of an installed wheel."""
