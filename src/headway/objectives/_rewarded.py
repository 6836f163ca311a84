"""Rewarded: what objectives share that learn from what their own model writes (REINFORCE and its heirs).

A step draws answers to its prompts, rewards them, and follows the gradient of how likely they are, weighed by how much
better than expected they were, while the model is kept near its start (KL). With `epochs`, so many steps go on with
the same answers, and the prompts that came with the later ones are passed over.
"""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from headway.data.batches import padded
from headway.data.examples import Example
from headway.data.sources import Values
from headway.generate.write import Options
from headway.hub import Loaded
from headway.objectives import Base, Loss, Score, Unfit, _rewards
from headway.objectives._gather import alone
from headway.objectives._rates import rates, score
from headway.objectives._rollouts import Experience, Policy, Prompts, drawn, prompt_of, start_of, still
from headway.objectives._tools import Tools
from headway.recipe import Recipe
from headway.text import Tokenizer

MEASURED, TOGETHER = 256, 32  # held-out prompts on which the distance from the start is measured; at a time


class Rewarded(Base):
    """`reward`: "per", "match", "format" (with their `pattern`), or a dotted path (`_rewards`). `answers`: how many are
    drawn for each prompt, of `tokens` at most (default: max_tokens), at `temperature`. `beta`: how strongly the model
    is kept near its start. `clip`: how far a token's probability may leave what it was when it was drawn, as a share.
    `epochs`: steps that learn from the same answers. `chat`: prompts stand in the checkpoint's chat template.

    The loss that is shown is minus the reward; of held-out prompts, that of the likeliest answer.
    """

    KINDS = ("decoder", "seq2seq")
    METRIC = ("reward", False)
    dropout = False
    VALUED = False  # whether a step needs to know beforehand how likely its answers are, and their values

    def __init__(
        self,
        reward: str,
        pattern: str | None,
        answers: int,
        tokens: int | None,
        temperature: float,
        beta: float,
        clip: float,
        epochs: int,
        chat: bool,
    ) -> None:
        if answers < 1 or epochs < 1 or (tokens is not None and tokens < 1):
            raise ValueError(f"objective: answers, epochs and tokens are 1 or more, not {answers}, {epochs}, {tokens}")
        if not (0 < temperature < 100 and 0 <= beta < float("inf") and clip > 0):
            raise ValueError(f"objective: temperature and clip are above 0, and beta is not below it; these are "
                             f"{temperature}, {clip} and {beta}")  # fmt: skip
        self.reward = _rewards.find(reward, pattern)
        self.answers, self.tokens, self.temperature = answers, tokens, temperature
        self.beta, self.clip, self.epochs, self.chat = beta, clip, epochs, chat
        self.listed: dict[bytes, tuple[str, dict[str, None]]] = {}
        self.held: list[Experience] = []
        self.left = 0

    def columns(self) -> dict[str, str]:
        return {"input": "source", "target": "target"} if self.reward.expects else {"input": "source"}

    def ready(self, tools: Tools) -> None:
        self.start, self.pad = tools.start, tools.pad
        self.limit = self.tokens or tools.max_tokens + 1  # and the end
        if not alone():
            raise ValueError("an objective that writes answers as it learns is for one process, and this run has "
                             "several ranks: start it without torchrun")  # fmt: skip

    def spec(self, model: dict[str, Any], tools: Tools) -> dict[str, Any]:
        start = self._started(tools)
        Policy(start.net, start, self.temperature)  # one that cannot be asked is told before training
        return model

    def _started(self, tools: Tools) -> Loaded:
        if tools.start is None:
            raise ValueError("a reward teaches a model that can write already: set model: {load: FOLDER}")
        return tools.start

    def encode(self, row: Values, tools: Tools) -> Iterable[Example]:
        """The prompt, and the answer as it counts for the fingerprint of the data."""
        try:
            ids = prompt_of(self._started(tools), row[0], self.chat)
        except ValueError as problem:
            raise Unfit(str(problem)) from None
        if len(ids) - isinstance(tools.source, Tokenizer) > tools.max_tokens:
            raise Unfit(
                f"the prompt {row[0][:40]!r} has {len(ids)} tokens, and max_tokens is {tools.max_tokens}: raise it"
            )
        _, expected = self.listed.setdefault(np.asarray(ids, np.int32).tobytes(), (row[0], {}))
        for text in row[1:]:
            expected[text] = None
        return [(ids, [byte for text in row[1:] for byte in text.encode()])]

    def sizes(self, example: Example) -> tuple[int, ...]:
        """Tokens of a prompt as often as it is answered, and of as many answers at their longest."""
        return len(example[0]) * self.answers, self.limit * self.answers

    def collate(self, examples: Sequence[Example], random: np.random.Generator) -> Prompts:
        ids, valid = padded([example[0] for example in examples], self.pad)
        known = [self.listed[np.asarray(example[0], np.int32).tobytes()] for example in examples]
        return Prompts(
            ids=ids,
            valid=None if bool(valid.all()) else valid,
            luck=torch.from_numpy(random.integers(0, 2**48, len(examples))),
            texts=tuple(text for text, _ in known),
            expected=tuple(tuple(expected) for _, expected in known),
            tokens=int(valid.sum()) * self.answers,
            targets=len(examples) * self.answers,
        )

    # what is measured

    def policy(self, net: nn.Module) -> Policy:
        assert self.start is not None, "`spec` has seen to that"
        return Policy(net, self.start, self.temperature)

    @contextmanager
    def reference(self, net: nn.Module) -> Iterator[Policy]:
        """The model as it was before it learned anything here."""
        with start_of(net, self.start) as first:
            yield self.policy(first)

    @torch.no_grad()
    def __call__(self, model: nn.Module, batch: Prompts) -> Loss:
        """Minus the reward of the likeliest answer to each prompt; it has no gradient: `backward` draws answers."""
        if isinstance(batch.ids, FakeTensor):
            raise ValueError("a step that writes answers cannot be counted on paper, as their lengths are not known: "
                             "plan the objective that the model was trained with")  # fmt: skip
        with still(model):
            policy = self.policy(model)
            found = self.rewards(policy, batch, policy.write(batch, Options(tokens=self.limit)))
        return Loss(-found.sum(), -found.sum(), len(found))

    def rewards(self, policy: Policy, batch: Prompts, answers: Sequence[Sequence[int]]) -> Float[Tensor, " N"]:
        copies = len(answers) // len(batch.texts)
        asked = [pair for pair in zip(batch.texts, batch.expected, strict=True) for _ in range(copies)]
        told = zip(asked, answers, strict=True)
        found = [self.reward(text, policy.text(ids), expected) for (text, expected), ids in told]
        return torch.tensor(found, device=batch.ids.device)

    # what is learned

    @abstractmethod
    def weigh(self, held: Sequence[Experience]) -> list[Experience]:
        """With the advantage of each token, from what all micro-batches of a step were rewarded with."""

    @abstractmethod
    def loss(self, net: nn.Module, states: Tensor, log_p: Float[Tensor, "N U"], one: Experience) -> Tensor:
        """What one micro-batch adds to the loss of a step, which is a sum over `held`."""

    def valued(self, net: nn.Module, states: Tensor) -> Tensor | None:
        """The value of each token's state, where there is a head that tells it."""
        return None

    @torch.no_grad()
    def experience(self, net: nn.Module, batch: Prompts) -> Experience:
        """Answers to a batch of prompts, what they are worth, and how likely the model and its start find them."""
        policy = self.policy(net)
        answers = policy.write(batch, Options(temperature=self.temperature, tokens=self.limit), self.answers)
        rewards = self.rewards(policy, batch, answers)
        ids, valid = (t.to(batch.ids.device) for t in padded(answers, self.pad))
        log_p = near = values = None
        if self.epochs > 1 or self.VALUED:
            states = policy.states(batch.ids, batch.valid, ids)
            log_p, values = policy.log_p(states, ids, valid), self.valued(net, states)
        if self.beta:
            with self.reference(net) as first, still(first.net):
                near = first.log_p(first.states(batch.ids, batch.valid, ids), ids, valid)
        return Experience(
            prompts=batch.ids,
            prompts_valid=batch.valid,
            ids=ids,
            valid=valid,
            rewards=rewards,
            log_p=log_p,
            reference=near,
            values=values,
        )

    def backward(
        self, model: nn.Module, batches: Sequence[Any], targets: float, scope: Callable[[int], Any]
    ) -> tuple[float, int]:
        """All answers first, as what they are worth may depend on each other; then each micro-batch's gradient."""
        with nullcontext() if self.dropout else still(model):
            if not self.left:
                drawn = []
                for i, batch in enumerate(batches):
                    with scope(i):
                        drawn.append(self.experience(model, batch))
                self.held, self.left = self.weigh(drawn), self.epochs
            self.left -= 1
            for i, one in enumerate(self.held):
                with scope(i):
                    self._learn(model, one).backward()  # type: ignore[no-untyped-call]
        rewards = torch.cat([one.rewards for one in self.held])
        return -float(rewards.sum()), len(rewards)

    def _learn(self, net: nn.Module, one: Experience) -> Tensor:
        policy = self.policy(net)
        states = policy.states(one.prompts, one.prompts_valid, one.ids)
        return self.loss(net, states, policy.log_p(states, one.ids, one.valid), one)

    def rehearse(self, net: nn.Module, batch: Any, tools: Tools) -> None:
        """A whole step, but for its optimiser."""
        self.begin(net)
        self.backward(net, [batch], float(batch.targets), lambda part: nullcontext())
        net.zero_grad()

    # what lasts from step to step

    def begin(self, net: nn.Module) -> None:
        self.held, self.left = [], 0

    def kept(self) -> dict[str, Tensor]:
        if not self.left:
            return {}
        named = {f"{i}.{name}": t for i, one in enumerate(self.held) for name, t in one.tensors().items()}
        return {**named, "left": torch.tensor(self.left)}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        assert self.start is not None
        parts: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            number, _, field = name.partition(".")
            if field:
                parts.setdefault(int(number), {})[field] = tensor
        self.held = [Experience.of(parts[i]) for i in sorted(parts)]
        self.left = int(tensors["left"]) if self.held else 0

    # what is told at the end

    def use(self, tools: Tools) -> str:
        return 'run {} "TEXT"' if tools.start is not None and tools.start.kind == "seq2seq" else 'generate {} "TEXT"'

    def asked(self, rows: Sequence[Values], limit: int | None) -> Sequence[Values]:
        """So many prompts, each with all that is listed for it."""
        chosen = set(sorted({row[0] for row in rows}, key=lambda text: hashlib.sha256(text.encode()).digest())[:limit])
        return [row for row in rows if row[0] in chosen]

    def score(self, model: Loaded, rows: Sequence[Values], tools: Tools, recipe: Recipe) -> Score:
        """The mean reward of what the model writes, and how far it went from its start, in nats an answer; where the
        reward is `per`, error rates."""
        listed: dict[str, list[str]] = {}
        for row in rows:
            listed.setdefault(row[0], []).extend(text for text in row[1:] if text not in listed[row[0]])
        kl = self.distance(model, list(listed)[:MEASURED])
        own = isinstance(model.source, Tokenizer)
        how: dict[str, Any] = {} if own else {"max_tokens": self.limit, "chat": self.chat}
        found = model.generate(list(listed), beams=recipe.beams, penalty=recipe.penalty, **how)
        told = [(text, listed[text], one.text) for text, one in zip(listed, found, strict=True)]
        values = [self.reward(text, said, expected) for text, expected, said in told]
        metrics = {"reward": float(np.mean(values)), "kl": kl, "test_prompts": len(values)}
        if self.reward.name != "per":
            return Score(metrics, found)
        scored = [score(text, expected, said, "whitespace") for text, expected, said in told]
        return Score({**metrics, **rates(scored)._asdict()}, scored)

    @torch.no_grad()
    def distance(self, model: Loaded, texts: Sequence[str]) -> float:
        """KL(policy || start) in nats an answer, of one answer drawn for each prompt."""
        assert self.start is not None
        rows, policy, total = [prompt_of(self.start, text, self.chat) for text in texts], self.policy(model.net), 0.0
        how = Options(temperature=self.temperature, tokens=self.limit)
        for batch, said, there in drawn(policy, rows, how, self.pad, TOGETHER):
            own = policy.log_p(policy.states(batch.ids, batch.valid, said), said, there)
            with self.reference(model.net) as start:
                before = start.log_p(start.states(batch.ids, batch.valid, said), said, there)
            total += float((own - before).sum())
        return total / max(1, len(rows))
