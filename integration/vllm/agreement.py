"""
What transformers makes of a checkpoint, and how far a server agrees with it.

The rule for greedy tokens: they must be the same up to the first near-tie. At a step
where the likeliest and the second token are less than `tie` apart (in nats), either may
win by the order of a sum alone, and what follows then has another text before it, so
the prompt is not compared further. A difference at any other step is a failure.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

__all__ = ["Agreement", "Continuation", "compare", "continue_greedily", "log_probs"]


@dataclass(frozen=True)
class Continuation:
    """
    :param tokens: the likeliest token of each step
    :param gaps: by how many nats each is likelier than the second
    """

    tokens: list[int]
    gaps: list[float]


@dataclass(frozen=True)
class Agreement:
    """
    :param tokens_compared: greedy tokens before the first near-tie that differs
    :param tokens_asked: of all prompts
    :param differences: what differs where nothing was near; none in a good run
    :param log_prob_mean: mean of |difference| over the tokens of the given texts, nats
    :param log_prob_max: the largest of them
    :param perplexity: by transformers
    :param served_perplexity: by the server
    """

    tokens_compared: int
    tokens_asked: int
    differences: list[str]
    log_prob_mean: float
    log_prob_max: float
    perplexity: float
    served_perplexity: float

    @property
    def perplexity_change(self) -> float:
        return self.served_perplexity / self.perplexity - 1


@torch.no_grad()
def continue_greedily(
    model: PreTrainedModel, prompt: Sequence[int], steps: int
) -> Continuation:
    """
    :param prompt: token ids
    :return: `steps` tokens, whether or not one of them ends the text
    """
    tokens: list[int] = []
    gaps: list[float] = []
    ids, cache = torch.tensor([list(prompt)]), None
    for _ in range(steps):
        output = model(input_ids=ids, past_key_values=cache, use_cache=True)
        best = output.logits[0, -1].float().log_softmax(-1).topk(2)
        tokens.append(int(best.indices[0]))
        gaps.append(float(best.values[0] - best.values[1]))
        ids, cache = best.indices[None, :1], output.past_key_values
    return Continuation(tokens, gaps)


@torch.no_grad()
def log_probs(model: PreTrainedModel, text: Sequence[int]) -> list[float]:
    """
    :param text: token ids
    :return: log-probability of each but the first, given those before it
    """
    ids = torch.tensor([list(text)])
    logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
    return logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0].tolist()


def compare(
    expected: Sequence[Continuation],
    served: Sequence[Sequence[int]],
    expected_log_probs: Sequence[Sequence[float]],
    served_log_probs: Sequence[Sequence[float]],
    tie: float,
) -> Agreement:
    """
    :param expected: per prompt, by transformers
    :param served: per prompt, the server's tokens
    :param expected_log_probs: per text, by transformers
    :param served_log_probs: per text, by the server
    :param tie: below this gap between the two likeliest tokens either may win, nats
    """
    counts, differences = [], []
    for number, (ours, theirs) in enumerate(zip(expected, served, strict=True)):
        count, difference = _same_tokens(ours, theirs, tie)
        counts.append(count)
        if difference:
            differences.append(f"prompt {number}, {difference}")
    one = [value for text in expected_log_probs for value in text]
    other = [value for text in served_log_probs for value in text]
    apart = [abs(a - b) for a, b in zip(one, other, strict=True)]
    return Agreement(
        sum(counts),
        sum(len(ours.tokens) for ours in expected),
        differences,
        math.fsum(apart) / len(apart),
        max(apart),
        math.exp(-math.fsum(one) / len(one)),
        math.exp(-math.fsum(other) / len(other)),
    )


def _same_tokens(
    ours: Continuation, theirs: Sequence[int], tie: float
) -> tuple[int, str]:
    """How many were compared, and what differs, or an empty string."""
    pairs = zip(ours.tokens, theirs, ours.gaps, strict=True)
    for step, (one, other, gap) in enumerate(pairs):
        if one != other:
            clear = gap >= tie
            what = f"step {step}: {one} here, {other} served, gap {gap:.4f}"
            return step + clear, what if clear else ""
    return len(ours.tokens), ""
