"""What llm-compressor's pipelines make of a model's forward before they calibrate."""

import ast
import inspect
import textwrap
from collections.abc import Sequence

from loguru import logger
from torch.nn import Module

__all__ = ["warn_of_lost_mask"]


def warn_of_lost_mask(model: Module, blocks: Sequence[Module]) -> None:
    """
    The pipelines trace what lies around the blocks. A function that makes the causal
    mask is left alone if its name is known, as `create_causal_mask` is. Where the model
    puts one of two into a variable and calls that, it is traced too, and gives no mask:
    every token then sees those after it (0.14.0.1; tests/pruners/test_traced.py).

    :param model: wrapped or not
    """
    inside = {part for block in blocks for part in block.modules()}
    kinds = {type(part): None for part in model.modules() if part not in inside}
    for kind in filter(_calls_a_chosen_mask, kinds):
        logger.warning(
            f"{kind.__name__} chooses the function that makes its causal mask by a "
            "variable, which llm-compressor's tracing does not follow: its pipelines, "
            'but for pipeline="basic", calibrate this model without a causal mask. '
            "What is measured here has the mask; the pruner goes by activations that "
            "the model does not have, and the pruned model may be worse than was judged"
        )


def _calls_a_chosen_mask(kind: type[Module]) -> bool:
    home = next(one for one in kind.__mro__ if "forward" in vars(one))
    try:
        # of the class: decorators hide the function
        tree = ast.parse(textwrap.dedent(inspect.getsource(home)))
    except (OSError, TypeError, SyntaxError):  # not in a file, or within a function
        return False
    return any(
        isinstance(node, ast.FunctionDef)
        and node.name == "forward"
        and _calls_a_variable(node)
        for node in ast.walk(tree)
    )


def _calls_a_variable(function: ast.FunctionDef) -> bool:
    """Whether what is called with the attention mask is a variable with such a name."""
    names = [node for node in ast.walk(function) if isinstance(node, ast.Name)]
    stored = {name.id for name in names if isinstance(name.ctx, ast.Store)}
    return any(
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in stored
        and "mask" in node.func.id
        and any(keyword.arg == "attention_mask" for keyword in node.keywords)
        for node in ast.walk(function)
    )
