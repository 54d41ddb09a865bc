"""
What transformers makes of a checkpoint, and how far a server agrees with it.

The rule for greedy tokens: they must be the same up to the first near-tie. At a step
where the likeliest and the second token are less than `tie` apart (in nats), either may
win by the order of a sum alone, and what follows then has another text before it, so
the prompt is not compared further. A difference at any other step is a failure.

The rule for rounded arithmetic: where activations are rounded to 8 bits, or everything
to bfloat16, a difference in the last digit of one sum turns some of them over to the
neighbouring value, and the blocks that follow turn over more. Such a model does not
agree with itself: `own` is how far its log-probabilities move in transformers alone
when its first hidden state is changed by one part in a million (in bfloat16 by one
rounding unit). No server can be asked to agree more closely than that. Where a model
amplifies so, its greedy tokens are not compared, and log-probabilities and perplexity
are compared with what it does to itself.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
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
    :param own_mean: the mean between two runs of transformers, one of them disturbed
    :param perplexity: by transformers
    :param served_perplexity: by the server
    :param perplexity_error: standard error of the relative difference of the two
    """

    tokens_compared: int
    tokens_asked: int
    differences: list[str]
    log_prob_mean: float
    log_prob_max: float
    own_mean: float
    perplexity: float
    served_perplexity: float
    perplexity_error: float

    @property
    def perplexity_change(self) -> float:
        return self.served_perplexity / self.perplexity - 1

    @property
    def chaotic(self) -> bool:
        """Whether the model turns a rounding error into a difference."""
        return self.own_mean > 1e-3

    def failures(self) -> list[str]:
        """What is not as it must be; none in a good run."""
        if self.chaotic:
            mean, perplexity = 2 * self.own_mean, 3 * self.perplexity_error
            found = []
        else:
            mean, perplexity, found = 0.01, 0.01, list(self.differences)
            if self.tokens_compared < self.tokens_asked / 2:
                found.append(f"only {self.tokens_compared} tokens could be compared")
            if self.log_prob_max > 0.1:
                found.append(f"a log-probability differs by {self.log_prob_max:.3f}")
        if self.log_prob_mean > mean:
            found.append(f"log-probabilities differ by {self.log_prob_mean:.3f}")
        if abs(self.perplexity_change) > max(0.01, perplexity):
            found.append(f"perplexity differs by {self.perplexity_change:+.2%}")
        return found


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
def log_probs(
    model: PreTrainedModel, text: Sequence[int], disturbance: float = 0.0
) -> list[float]:
    """
    :param text: token ids
    :param disturbance: relative change of the embeddings, at random
    :return: log-probability of each token but the first, given those before it
    """
    ids = torch.tensor([list(text)])
    embeddings = model.get_input_embeddings()(ids)
    if disturbance:
        noise = torch.randn(
            embeddings.shape, generator=torch.Generator().manual_seed(0)
        )
        embeddings = (embeddings * (1 + disturbance * noise)).to(embeddings.dtype)
    output = model(inputs_embeds=embeddings, use_cache=False)
    logits = output.logits[0, :-1].float()
    return logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0].tolist()


def compare(
    expected: Sequence[Continuation],
    served: Sequence[Sequence[int]],
    expected_log_probs: Sequence[Sequence[float]],
    served_log_probs: Sequence[Sequence[float]],
    disturbed_log_probs: Sequence[Sequence[float]],
    tie: float,
) -> Agreement:
    """
    :param expected: per prompt, by transformers
    :param served: per prompt, the server's tokens
    :param expected_log_probs: per text, by transformers
    :param served_log_probs: per text, by the server
    :param disturbed_log_probs: per text, by transformers from a disturbed start
    :param tie: below this gap between the two likeliest tokens either may win, nats
    """
    counts, differences = [], []
    for number, (ours, theirs) in enumerate(zip(expected, served, strict=True)):
        count, difference = _same_tokens(ours, theirs, tie)
        counts.append(count)
        if difference:
            differences.append(f"prompt {number}, {difference}")
    here, there, disturbed = (
        np.concatenate([np.array(text) for text in texts])
        for texts in (expected_log_probs, served_log_probs, disturbed_log_probs)
    )
    apart = there - here
    error = apart.std(ddof=1) / math.sqrt(len(apart)) if len(apart) > 1 else math.nan
    return Agreement(
        sum(counts),
        sum(len(ours.tokens) for ours in expected),
        differences,
        float(np.abs(apart).mean()),
        float(np.abs(apart).max()),
        float(np.abs(disturbed - here).mean()),
        math.exp(-here.mean()),
        math.exp(-there.mean()),
        float(error),
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
