"""GRPO: answers are better or worse than others to the same prompt, so that no value has to be learned (2402.03300).

A_i = (R_i - mean R) / std R;  r_t = pi(y_t) / pi_drawn(y_t)
-1/N sum_i 1/|y_i| sum_t min(r_t A_i, clip(r_t, 1 - e, 1 + e) A_i) - beta (q_t - log q_t - 1),  q_t = pi_start / pi
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from headway.objectives._rewarded import Rewarded
from headway.objectives._rollouts import Experience


class Objective(Rewarded):
    """`std`: whether advantages are divided by their group's standard deviation; `lengths`: whether an answer's loss is
    by its own length, or else by the longest allowed. Dr. GRPO (2503.20783) does neither. `dropout`: whether it stays
    on while answers are drawn and weighed, where a model knows the answers to its prompts. Others: `Rewarded`."""

    def __init__(
        self,
        reward: str = "match",
        pattern: str | None = None,
        answers: int = 8,
        tokens: int | None = None,
        temperature: float = 1.0,
        beta: float = 0.04,
        clip: float = 0.2,
        epochs: int = 1,
        std: bool = True,
        lengths: bool = True,
        dropout: bool = False,
        chat: bool = False,
    ) -> None:
        if answers < 2:
            raise ValueError(f"objective.answers: a group that compares has 2 or more, not {answers}")
        super().__init__(reward, pattern, answers, tokens, temperature, beta, clip, epochs, chat)
        if dropout and epochs > 1:
            raise ValueError(f"objective.dropout moves a policy between the epochs of its answers ({epochs}): take one")
        self.std, self.lengths, self.dropout = std, lengths, dropout

    def weigh(self, held: Sequence[Experience]) -> list[Experience]:
        """The same for each token of an answer."""
        found = []
        for one in held:
            better = compared(one.rewards.view(-1, self.answers), self.std).flatten()
            found.append(one.but(advantages=better[:, None].expand(one.ids.shape).contiguous()))
        return found

    def loss(self, net: nn.Module, states: Tensor, log_p: Float[Tensor, "N U"], one: Experience) -> Tensor:
        each = -clipped(log_p, one, self.clip)
        if one.reference is not None:
            each = each + self.beta * divergence(log_p, one.reference)
        lengths = one.valid.sum(1) if self.lengths else self.limit
        answers = each.masked_fill(~one.valid, 0.0).sum(1) / lengths
        return answers.sum() / sum(len(other.rewards) for other in self.held)


def compared(rewards: Float[Tensor, "B G"], std: bool) -> Float[Tensor, "B G"]:
    """How much better each answer is than its group, in standard deviations where `std`; 0 where all are alike."""
    better = rewards - rewards.mean(1, keepdim=True)
    return better / (rewards.std(1, correction=0, keepdim=True) + 1e-4) if std else better


def clipped(log_p: Float[Tensor, "N U"], one: Experience, clip: float) -> Float[Tensor, "N U"]:
    """min(r A, clip(r) A): nothing is gained by moving on beyond the clip (PPO, 1707.06347)."""
    assert one.advantages is not None, "`weigh` gave them"
    ratio = (log_p - (log_p.detach() if one.log_p is None else one.log_p)).exp()
    return torch.minimum(ratio * one.advantages, ratio.clamp(1 - clip, 1 + clip) * one.advantages)


def divergence(log_p: Float[Tensor, "N U"], reference: Float[Tensor, "N U"]) -> Float[Tensor, "N U"]:
    """q - log q - 1 with q = reference / p: KL(p || reference) without bias and never negative (Schulman's k3)."""
    gap = reference - log_p
    return gap.exp() - gap - 1
