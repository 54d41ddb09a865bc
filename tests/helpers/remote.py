"""A language model as remote code has them, with the oddities that a test asks for."""

from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from helpers import tiny

WIDTH = 32
Named = namedtuple("Named", ["hidden", "weights"])


@dataclass
class Data:
    hidden: torch.Tensor
    weights: torch.Tensor | None = None


OUTPUTS = {
    "tensor": lambda x: x,
    "tuple": lambda x: (x, None),
    "list": lambda x: [x, None],
    "dict": lambda x: {"hidden": x, "weights": None},
    "ordered": lambda x: OrderedDict(hidden=x),
    "named tuple": lambda x: Named(x, None),
    "dataclass": lambda x: Data(x),
    "mask first": lambda x: (torch.ones(1, dtype=torch.int64), x),
}
UNPACK = {
    "tensor": lambda y: y,
    "tuple": lambda y: y[0],
    "list": lambda y: y[0],
    "dict": lambda y: y["hidden"],
    "ordered": lambda y: y["hidden"],
    "named tuple": lambda y: y.hidden,
    "dataclass": lambda y: y.hidden,
    "mask first": lambda y: y[1],
}
LOGITS = {
    "output": lambda x: CausalLMOutputWithPast(logits=x),
    "tuple": lambda x: (x,),
    "dict": lambda x: {"logits": x},
    "tensor": lambda x: x,
}


class RemoteConfig(PretrainedConfig):
    """
    :param block: what a block returns, of OUTPUTS
    :param keyword: name of a block's input, if it is not positional
    :param logits: what the model returns, of LOGITS
    :param oddity: "cache", "cache by name", "cache by position", "loop", "between",
        "order", "skip", "bidirectional", "random", "uncalled", "four dimensions",
        "layers" (the head sees all of them), "last token", "no grad"
    """

    model_type = "remote_lm"

    def __init__(
        self,
        block: str = "tensor",
        keyword: str = "",
        logits: str = "output",
        oddity: str = "",
        **more: Any,
    ) -> None:
        self.vocab_size, self.hidden_size = tiny.VOCABULARY, WIDTH
        self.block, self.keyword = block, keyword
        self.logits, self.oddity = logits, oddity
        super().__init__(**more)


class KeyCache:
    """Of the remote code's own making."""

    def __init__(self) -> None:
        self.entries: dict[nn.Module, list] = {}


class Attention(nn.Module):
    def __init__(self, oddity: str) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (
            nn.Linear(WIDTH, WIDTH) for _ in range(4)
        )
        self.oddity, self.past = oddity, []

    def forward(self, x: torch.Tensor, cache: "KeyCache | None") -> torch.Tensor:
        if self.oddity == "uncalled":
            query = nn.functional.linear(x, self.query.weight, self.query.bias)
        elif self.oddity == "four dimensions":
            query = self.query(x[:, None])[:, 0]
        else:
            query = self.query(x)
        key, value = self.key(x), self.value(x)
        past = self.past if cache is None else cache.entries.setdefault(self, [])
        if self.oddity == "cache" or cache is not None:
            past.append((key, value))
            key = torch.cat([k for k, _ in past], dim=1)
            value = torch.cat([v for _, v in past], dim=1)
        causal = self.oddity != "bidirectional"
        mixed = nn.functional.scaled_dot_product_attention(
            query[:, None], key[:, None], value[:, None], is_causal=causal
        )
        return self.out(mixed[:, 0])


class RemoteBlock(nn.Module):
    def __init__(self, config: RemoteConfig) -> None:
        super().__init__()
        self.config = config
        self.norm = nn.LayerNorm(WIDTH)
        self.attention = Attention(config.oddity)
        self.up, self.down = nn.Linear(WIDTH, 48), nn.Linear(48, WIDTH)

    def forward(
        self,
        x: torch.Tensor | None = None,
        cache: KeyCache | None = None,
        **named: torch.Tensor,
    ) -> Any:
        x = named.get(self.config.keyword, x)
        gradients = torch.is_grad_enabled() and self.config.oddity != "no grad"
        with torch.set_grad_enabled(gradients):
            x = x + self.attention(self.norm(x), cache)
            x = x + self.down(torch.relu(self.up(x)))
        if self.config.oddity == "random":
            x = x + torch.randn_like(x)
        return OUTPUTS[self.config.block](x)


class RemoteLM(PreTrainedModel):
    config_class = RemoteConfig

    def __init__(self, config: RemoteConfig) -> None:
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, WIDTH)
        self.blocks = nn.ModuleList(RemoteBlock(config) for _ in range(3))
        self.head = nn.Linear(WIDTH, config.vocab_size, bias=False)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.2)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
    ) -> Any:
        x = self.embed(input_ids)
        config = self.config
        self._cache = KeyCache()  # of this forward
        for attention in (block.attention for block in self.blocks):
            attention.past.clear()
        layers = []
        for block in self._order():
            y = self._call(block, x)
            x = UNPACK[config.block](y)
            layers.append(x)
            if config.oddity == "between":
                x = x + self.embed(input_ids)
        if config.oddity == "layers":
            x = torch.stack(layers).mean(dim=0)
        if config.oddity == "last token":
            x = x[:, -1:]
        return LOGITS[config.logits](self.head(x))

    def _call(self, block: nn.Module, x: torch.Tensor) -> Any:
        config = self.config
        if config.oddity == "cache by position":
            return block(x, self._cache)
        if config.oddity == "cache by name":
            return block(x, cache=self._cache)
        return block(**{config.keyword: x}) if config.keyword else block(x)

    def _order(self) -> list[nn.Module]:
        blocks = list(self.blocks)
        return {
            "loop": blocks * 2,
            "order": blocks[::-1],
            "skip": blocks[:2],
        }.get(self.config.oddity, blocks)


def make_remote(**fields: Any) -> RemoteLM:
    torch.manual_seed(0)
    return RemoteLM(RemoteConfig(**fields)).eval()


class Wrapped(nn.Module):
    """A module of the user's around a model."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.inner = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)


class Lookalike(Wrapped):
    """As peft's: it answers for the model that it wraps, and is none."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)


WRAPPERS = {
    "plain module": Wrapped,
    "peft": Lookalike,
    "data parallel": nn.DataParallel,
    "twice": lambda model: Wrapped(Wrapped(model)),
}
