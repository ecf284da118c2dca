"""Muon for the matrices of a decoder and AdamW for everything else, as one optimizer for the Trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch


class MuonWithAdamW(torch.optim.Optimizer):
    """Two torch optimizers with one list of parameter groups, and one state, behind one interface.

    Muon (K. Jordan, 2024) orthogonalises the momentum of a weight matrix; embeddings and norms are no such matrices
    and take AdamW steps. Experts that share one tensor ``[experts, out, in]`` are a matrix each.
    """

    def __init__(self, named_parameters: Iterable[tuple[str, torch.nn.Parameter]], lr: float, adamw_lr: float) -> None:
        matrices, rest = [], []
        self.experts: list[tuple[torch.nn.Parameter, list[torch.nn.Parameter]]] = []
        for name, parameter in named_parameters:
            if parameter.ndim == 3:
                self.experts.append((parameter, [torch.nn.Parameter(part) for part in parameter.detach()]))
                matrices += self.experts[-1][1]
            else:
                is_matrix = parameter.ndim == 2 and "embed" not in name and "lm_head" not in name
                (matrices if is_matrix else rest).append(parameter)
        super().__init__([{"params": matrices}, {"params": rest}], {"lr": lr})
        self.parts = [
            torch.optim.Muon(matrices, lr=lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(rest, lr=adamw_lr, betas=(0.9, 0.95), weight_decay=0.0),
        ]
        self.param_groups = [group for part in self.parts for group in part.param_groups]
        self._share()

    def _share(self) -> None:
        for part, group in zip(self.parts, self.param_groups, strict=True):
            part.state, part.param_groups = self.state, [group]

    def load_state_dict(self, state_dict: dict) -> None:
        """As every optimizer's."""
        super().load_state_dict(state_dict)
        self._share()

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step of both."""
        loss = None if closure is None else closure()
        for whole, parts in self.experts:
            for index, part in enumerate(parts):
                # Views taken anew: the model may have been moved, and its gradients are other tensors at every step.
                part.data = whole.data[index]
                part.grad = None if whole.grad is None else whole.grad[index]
        for part in self.parts:
            part.step()
        return loss
