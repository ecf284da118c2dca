"""Muon for the matrices of a decoder and AdamW for everything else, as one optimizer for the HF Trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch


class MuonWithAdamW(torch.optim.Optimizer):
    """Two torch optimizers behind one interface.

    Muon (K. Jordan, 2024) orthogonalises the momentum of a weight matrix; embeddings and norms are no such
    matrices and take AdamW steps. Experts that share one tensor ``[experts, out, in]`` are a matrix each. The
    parameter groups are those of both, so any learning-rate schedule works.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, torch.nn.Parameter]],
        lr: float,
        adamw_lr: float,
        weight_decay: float = 0.01,
    ):
        matrices, rest = [], []
        self.stacked: list[tuple[torch.nn.Parameter, list[torch.nn.Parameter]]] = []
        for name, parameter in named_parameters:
            if parameter.ndim == 3:
                parts = [torch.nn.Parameter(part) for part in parameter.detach()]
                self.stacked.append((parameter, parts))
                matrices += parts
                continue
            is_matrix = parameter.ndim == 2 and "embed" not in name and "lm_head" not in name
            (matrices if is_matrix else rest).append(parameter)
        super().__init__([*matrices, *rest], {"lr": lr})
        self.parts = [
            torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(rest, lr=adamw_lr, betas=(0.9, 0.95), weight_decay=0.0),
        ]
        self._share_groups()

    def _share_groups(self) -> None:
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step of both parts."""
        loss = None if closure is None else closure()
        for whole, parts in self.stacked:
            for index, part in enumerate(parts):
                # Views taken anew: the model may have been moved, and its gradients are other tensors at every step.
                part.data = whole.data[index]
                part.grad = None if whole.grad is None else whole.grad[index]
        for part in self.parts:
            part.step()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As every optimizer's; also of tensors that hold a matrix per expert."""
        super().zero_grad(set_to_none)
        for whole, _ in self.stacked:
            whole.grad = None

    def state_dict(self) -> dict:
        """States of both parts, in order."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict) -> None:
        """Inverse of :meth:`state_dict`."""
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self._share_groups()
