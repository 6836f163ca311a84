"""PPO: answers are better or worse than a learned value expected, token by token (1707.06347; of texts, 2203.02155).

A_t = sum_k (gamma lambda)^k (r_t+k + gamma V_t+k+1 - V_t+k);  r_t = -beta log(pi / pi_start), and + R at the end
-min(r A, clip(r) A) + value/2 max((V - A - V_old)^2, (V_clip - A - V_old)^2), averaged over all tokens of a step
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from headway.hub import Loaded
from headway.objectives._rewarded import Rewarded
from headway.objectives._rollouts import Experience
from headway.objectives._tools import Tools
from headway.objectives.grpo import clipped


class Objective(Rewarded):
    """`gamma` and `lam`: how fast what comes later counts less (GAE, 1506.02438). `value`: how much the value's error
    counts; `value_clip`: how far a value may leave what it was. `whiten`: advantages have mean 0 and deviation 1 over a
    step. The value head is trained with the model, and no part of what is saved at the end. Others: `Rewarded`."""

    def __init__(
        self,
        reward: str = "match",
        pattern: str | None = None,
        answers: int = 1,
        tokens: int | None = None,
        temperature: float = 1.0,
        beta: float = 0.04,
        clip: float = 0.2,
        epochs: int = 1,
        gamma: float = 1.0,
        lam: float = 0.95,
        value: float = 0.1,
        value_clip: float = 0.2,
        whiten: bool = True,
        chat: bool = False,
    ) -> None:
        super().__init__(reward, pattern, answers, tokens, temperature, beta, clip, epochs, chat)
        if not (0 <= gamma <= 1 and 0 <= lam <= 1 and value > 0 and value_clip > 0):
            raise ValueError(f"objective: gamma and lam are shares from 0 to 1, value and value_clip above 0; these "
                             f"are {gamma}, {lam}, {value} and {value_clip}")  # fmt: skip
        self.gamma, self.lam, self.value, self.value_clip, self.whiten = gamma, lam, value, value_clip, whiten

    VALUED = True

    def begin(self, net: nn.Module) -> None:
        """Adds the value head, which expects nothing yet."""
        super().begin(net)
        assert self.start is not None
        like = next(net.parameters())
        net.value = nn.Linear(self.start.spec["width"], 1).to(like.device, like.dtype)
        nn.init.zeros_(net.value.weight)
        nn.init.zeros_(net.value.bias)

    def loaded(self, net: nn.Module, spec: dict[str, Any], tools: Tools) -> Loaded:
        del net.value
        return super().loaded(net, spec, tools)

    def valued(self, net: Any, states: Float[Tensor, "N U C"]) -> Float[Tensor, "N U"]:
        return net.value(states)[..., 0].float()

    def weigh(self, held: Sequence[Experience]) -> list[Experience]:
        found = []
        for one in held:
            assert one.values is not None and one.log_p is not None
            near = 0.0 if one.reference is None else self.beta * (one.log_p - one.reference)
            better = advantages(ended(one.rewards, one.valid) - near, one.values, one.valid, self.gamma, self.lam)
            found.append((one.but(returns=better + one.values), better))
        every = torch.cat([better[one.valid] for one, better in found])
        mean, std = (every.mean(), every.std(correction=0) + 1e-8) if self.whiten else (0.0, 1.0)
        return [one.but(advantages=(better - mean) / std) for one, better in found]

    def loss(self, net: nn.Module, states: Tensor, log_p: Float[Tensor, "N U"], one: Experience) -> Tensor:
        assert one.values is not None and one.returns is not None
        values = self.valued(net, states)
        each = -clipped(log_p, one, self.clip)
        each = each + self.value * missed(values, one.values, one.returns, self.value_clip)
        return each.masked_fill(~one.valid, 0.0).sum() / sum(int(other.valid.sum()) for other in self.held)


def ended(rewards: Float[Tensor, " N"], valid: Bool[Tensor, "N U"]) -> Float[Tensor, "N U"]:
    """Each answer's reward at its last token, 0 before."""
    last = valid.sum(1, keepdim=True) - 1
    return torch.zeros(valid.shape, device=rewards.device).scatter(1, last, rewards[:, None])


def advantages(
    rewards: Float[Tensor, "N U"],
    values: Float[Tensor, "N U"],
    valid: Bool[Tensor, "N U"],
    gamma: float,
    lam: float,
) -> Float[Tensor, "N U"]:
    """Generalised advantage estimation (1506.02438); nothing comes after an answer's end."""
    rewards, values = rewards.masked_fill(~valid, 0.0), values.masked_fill(~valid, 0.0)
    found, later, after = torch.zeros_like(values), torch.zeros_like(values[:, 0]), torch.zeros_like(values[:, 0])
    for t in range(values.shape[1] - 1, -1, -1):
        later = rewards[:, t] + gamma * after - values[:, t] + gamma * lam * later
        found[:, t], after = later, values[:, t]
    return found.masked_fill(~valid, 0.0)


def missed(
    values: Float[Tensor, "N U"], before: Float[Tensor, "N U"], returns: Float[Tensor, "N U"], clip: float
) -> Float[Tensor, "N U"]:
    """Half the squared error of the values, or of the values within `clip` of what they were: the larger one."""
    near = before + (values - before).clamp(-clip, clip)
    return torch.maximum((values - returns).square(), (near - returns).square()) / 2
