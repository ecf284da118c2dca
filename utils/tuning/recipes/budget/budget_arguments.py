"""What the recipe ``budget`` lets one set."""

from __future__ import annotations

from dataclasses import dataclass

from transformers.hf_argparser import HfArg

_LOWEST_SHARE = 0.72
"""Of the decoder's operations. Training at lower budgets costs quality at those in use."""


@dataclass
class BudgetArguments:
    """Settings of the recipe ``budget``, whose ``learning_rate`` is that of skip paths: share of a matrix's rms."""

    _argument_group_name = "Recipe budget"

    lowest_budget: float | None = HfArg(default=None, help="drawn from here (0.72 of the decoder, or below target)")
    highest_budget: float = HfArg(default=0.95, help="to here, shares of the routed operations")
    other_rate: float = HfArg(default=1e-4, help="learning rate of adapters, or of the base")
    label_tokens: int = HfArg(default=24_000, help="tokens that routers are fitted on in closed form")
    calibration_tokens: int = HfArg(default=8_000, help="tokens that thresholds are calibrated on")

    def problems(self) -> list[str]:
        """What is wrong with these values, one line each."""
        high = self.highest_budget
        low = high if self.lowest_budget is None else self.lowest_budget
        if not 0 < low <= high < 1:
            return [f"--lowest_budget {low} and --highest_budget {high} must lie in (0, 1), in this order"]
        return []

    def lowest(self, target: float, saved: float) -> float:
        """Share of the routed operations that training goes down to: what was asked for, or the default.

        Args:
            target: capacity asked for. saved: share of the decoder's operations that skipping every module saves.
        """
        if self.lowest_budget is not None:
            return self.lowest_budget
        return max(0.05, min(1 - (1 - _LOWEST_SHARE) / saved, target - 0.05))
