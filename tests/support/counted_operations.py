"""Operations of a real forward by torch's own counter: what any count on paper has to equal."""

from __future__ import annotations

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


@torch.no_grad()
def counted(model, **inputs) -> int:
    """Attention runs as plain matrix products meanwhile, since the counter knows no fused kernel on the CPU."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(**inputs)
    return counter.get_total_flops()
