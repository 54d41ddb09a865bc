"""
What an import brings with it, in processes of their own: the package alone is light,
and the modifier is there as soon as llm-compressor is, whatever is imported first.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import tiny

from absorb_plugin.evaluation.plan import _has_fused_experts

ROOT = Path(__file__).parents[1]
REGISTERED = """
from llmcompressor.modifiers import ModifierFactory
made = ModifierFactory.create(
    "AbsorptionAllocationModifier", allow_registered=True, allow_experimental=False
)
import absorb_plugin
assert type(made) is absorb_plugin.AbsorptionAllocationModifier
"""


def run(code: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=dict(os.environ, PYTHONPATH=str(ROOT)),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_the_package_alone_is_light() -> None:
    run(
        "import sys, absorb_plugin\n"
        "from absorb_plugin.hookspecs import hookimpl\n"
        "heavy = {'llmcompressor', 'torch', 'transformers', 'numpy', 'pydantic'}\n"
        "assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()\n"
        "assert 'AbsorptionAllocationModifier' in dir(absorb_plugin)\n"
    )


@pytest.mark.parametrize(
    "first",
    [
        "import absorb_plugin\nimport llmcompressor",
        "import llmcompressor\nimport absorb_plugin",
        "from absorb_plugin import AbsorptionAllocationModifier",
        # which imports llm-compressor by itself
        "import absorb_plugin.pruners.adapter",
    ],
)
def test_the_modifier_is_registered_whatever_is_imported_first(first: str) -> None:
    run(first + "\n" + REGISTERED)


LOADED = """
import ast, sys
from pathlib import Path
import absorb_plugin.modifier
known = {"absorb_plugin.modifier", "absorb_plugin._llmcompressor"}
names = {name for name in sys.modules if name.startswith("absorb_plugin.")} - known
assert "absorb_plugin.distributed" in names
for name in sorted(names):
    tree = ast.parse(Path(sys.modules[name].__file__).read_text())
    for node in tree.body:
        found = [x.name for x in node.names] if isinstance(node, ast.Import) else []
        found += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        for one in found:
            assert one.partition(".")[0] != "llmcompressor", (name, one)
"""


def test_what_the_modifier_needs_at_once_does_not_import_llmcompressor() -> None:
    """
    The first import of llm-compressor imports the modifier: what does that import, and
    is needed by the modifier, would be half imported then.
    """
    run(LOADED)


def test_a_check_does_without_llmcompressor() -> None:
    """Its import is a fifth of the time that `absorb check` takes to begin."""
    run(
        "import sys\n"
        "import absorb_plugin.cli.check, absorb_plugin.evaluation.check\n"
        "from absorb_plugin.cli.frame import command\n"
        "with command(debug=False, upstream=False):\n"
        "    pass\n"
        "assert 'llmcompressor' not in sys.modules\n"
    )


def test_weights_of_three_dimensions_are_of_experts_or_of_convolutions() -> None:
    """Only for the first does `absorb check` need llm-compressor."""
    model = tiny.make_model("llama")
    model.convolution = torch.nn.Conv1d(4, 4, 3)
    assert not _has_fused_experts(model)
    model.experts = torch.nn.Module()
    model.experts.weight = torch.nn.Parameter(torch.ones(2, 3, 4))
    assert _has_fused_experts(model)
