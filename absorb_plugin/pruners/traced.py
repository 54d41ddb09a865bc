"""What llm-compressor's pipelines make of a model's forward before they calibrate."""

import ast
import inspect
import sys
import textwrap
from collections.abc import Callable, Sequence
from functools import cache, partial
from types import FunctionType, ModuleType
from typing import Any

from loguru import logger
from torch.nn import Module

from absorb_plugin.blocks import outside

__all__ = ["keep_causal_masks"]


def keep_causal_masks(model: Module, blocks: Sequence[Module]) -> Callable[[], bool]:
    """
    Have the pipelines calibrate a model with the causal mask that it has.

    They trace what lies around the blocks, but for calls of functions whose names they
    know, of which `mask_function` is one. Mistral, Mixtral, Qwen3-MoE, Phi-3 and others
    put `create_causal_mask`, or another, into a variable of that name. The tracing
    looks the name up among the globals of the model's module, finds nothing, traces
    the function too, and no mask comes out: every token sees those after it, and the
    pruner goes by activations that the model does not have (llm-compressor 0.13.0 and
    0.14.0.1, by tests/pruners/test_traced.py). So the name is given there. The model
    itself does not see it, for to it the name is a variable.

    :param model: wrapped or not
    :return: takes the names away again, and says whether there were any
    """
    around = outside(model, blocks)
    kinds: set[type] = {type(part) for part in around}
    choices = {kind: _choice(kind) for kind in kinds}
    given: list[tuple[ModuleType, str]] = []
    for part in around:
        if (choice := choices[type(part)]) is None:
            continue
        home, name, expression = choice
        known = vars(home).get(name)
        if known is not None and not hasattr(known, "by_config"):
            continue  # it is there already, of transformers or by the user
        function = _evaluated(expression, home, part)
        if function is None:
            _warn(part)
            continue
        if (home, name) not in given:  # or left there by a run that broke off
            setattr(home, name, _dispatcher())
            given.append((home, name))
        vars(home)[name].by_config[id(getattr(part, "config", None))] = function
    return partial(_take_away, given)


def _take_away(given: list[tuple[ModuleType, str]]) -> bool:
    was_needed = bool(given)
    for home, name in given:
        vars(home).pop(name, None)
    given.clear()
    return was_needed


def _warn(part: Module) -> None:
    logger.warning(
        f"{type(part).__name__} chooses the function that makes its causal mask by a "
        "variable, which llm-compressor's tracing does not follow: its pipelines, but "
        'for pipeline="basic", calibrate this model without a causal mask. What is '
        "measured here has the mask; the pruned model may be worse than was judged"
    )


@cache  # to read and parse the sources takes a fifth of a second
def _choice(kind: type) -> tuple[ModuleType, str, ast.expr | None] | None:
    """
    Where the forward of a class calls a variable to make a mask: the module that it is
    written in, the variable, and what is put into it if that is one thing.
    """
    home = next(one for one in kind.__mro__ if "forward" in vars(one))
    try:
        # of the class: decorators hide the function
        tree = ast.parse(textwrap.dedent(inspect.getsource(home)))
    except (OSError, TypeError, SyntaxError):  # not in a file, or within a function
        return None
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef) and function.name == "forward":
            for name in filter(partial(_makes_a_mask, function), _stored(function)):
                return sys.modules[home.__module__], name, _put_into(function, name)
    return None


def _stored(function: ast.FunctionDef) -> list[str]:
    """Its variables, each as often as something is put into it."""
    return [
        node.id
        for node in ast.walk(function)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    ]


def _put_into(function: ast.FunctionDef, name: str) -> ast.expr | None:
    values = [
        node.value
        for node in ast.walk(function)
        if isinstance(node, ast.Assign)
        and len(node.targets) == 1
        and isinstance(node.targets[0], ast.Name)
        and node.targets[0].id == name
    ]
    return values[0] if len(values) == _stored(function).count(name) == 1 else None


def _makes_a_mask(function: ast.FunctionDef, name: str) -> bool:
    """Whether a variable with such a name is called with the attention mask."""
    return "mask" in name and any(
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == name
        and any(keyword.arg == "attention_mask" for keyword in node.keywords)
        for node in ast.walk(function)
    )


def _evaluated(
    expression: ast.expr | None, home: ModuleType, part: Module
) -> FunctionType | None:
    """As the tracing does with what depends on the configuration alone."""
    if expression is None:
        return None
    code = compile(ast.Expression(expression), "<mask>", "eval")
    try:
        found = eval(code, vars(home), {"self": part})
    except Exception:  # of the model's own code, on what only its forward knows
        return None
    return found if isinstance(found, FunctionType) else None


def _dispatcher() -> Callable[..., Any]:
    """Calls the function of the model whose configuration it is called with."""
    by_config: dict[int, FunctionType] = {}

    def mask_function(*args: Any, **kwargs: Any) -> Any:
        own = by_config.get(id(kwargs.get("config")))
        return (own or next(iter(by_config.values())))(*args, **kwargs)

    # it is known by this name, whatever the variable's
    vars(mask_function)["by_config"] = by_config
    return mask_function
