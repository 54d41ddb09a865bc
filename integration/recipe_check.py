"""
Every recipe of recipes/ on real models: `absorb prune`, then `absorb check --load`.

    python integration/recipe_check.py [MODEL ...] [--text FILE] [--samples 16] \
        [--seq-len 128] [--dtype auto] [--recipes PATTERN] [--out DIRECTORY]

Prints the perplexity of every model, and a line per recipe with share of zeros,
perplexity and seconds, and ends with exit code 1 if any failed. Without MODEL it takes
SmolLM2-135M of the demo (`make demo` installs it), without --text the demo's text. The
text that calibrates is the one that judges: what is looked for is a recipe that breaks,
not how good it is. Of W4A16 the groups have 128 columns; for a model whose widths these
do not divide the recipe is run with the groups that docs/deploy.md has for it, and the
line says so.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

from absorb_plugin.blocks import find_blocks
from absorb_plugin.evaluation.demo import demo_model, demo_texts
from absorb_plugin.evaluation.plan import make_skeleton
from absorb_plugin.evaluation.recipes import GROUP_SIZES, group_size

RECIPES = Path(__file__).parents[1] / "recipes"
WINDOWS = 16
SCHEME = '      scheme: W4A16\n      targets: ["Linear"]\n'
GROUPS = """\
      config_groups:
        group_0:
          targets: ["Linear"]
          weights: {{num_bits: 4, type: int, strategy: group, group_size: {size}}}
"""


def absorb(*arguments: object) -> dict:
    """
    What a command prints as JSON.

    :raises RuntimeError: with the last line of what it said, if it fails
    """
    command = [sys.executable, "-m", "absorb_plugin.cli", *map(str, arguments)]
    done = subprocess.run([*command, "--json"], capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()
        raise RuntimeError(said[-1] if said else f"exit code {done.returncode}")
    return json.loads(done.stdout)


def perplexity(model: Path, shared: list[object]) -> float:
    return absorb("eval", model, "--windows", WINDOWS, *shared)["perplexity"]


def dense(model: Path, shared: list[object]) -> str:
    """What the recipes are held against, in words."""
    return f"perplexity {perplexity(model, shared):.2f}"


def run(
    model: Path, recipe: Path, shared: list[object], options: argparse.Namespace
) -> str:
    """
    What one recipe makes of a model, in words.

    :param shared: text, length and dtype, as every command of `absorb` takes them
    """
    with tempfile.TemporaryDirectory(dir=options.out) as directory:
        recipe, remark = fitting(recipe, model, Path(directory))
        out, begin = Path(directory) / "pruned", time.perf_counter()
        made = ["--recipe", recipe, "--out", out, "--samples", options.samples]
        absorb("prune", model, *made, *shared)
        seconds = time.perf_counter() - begin
        checked = absorb("check", out, "--load")
        after = perplexity(out, shared)
    said = f"zeros {checked['zeros']:.4f}, perplexity {after:.2f}, {seconds:.0f} s"
    return said + remark


def fitting(recipe: Path, model: Path, directory: Path) -> tuple[Path, str]:
    """The recipe, or a copy whose groups divide the model's widths, and a remark."""
    text = recipe.read_text()
    if SCHEME not in text:
        return recipe, ""
    linears = find_blocks(make_skeleton(model)).linears()
    size = group_size({name: linear.in_features for name, linear in linears.items()})
    if size == GROUP_SIZES[0]:
        return recipe, ""
    copy = directory / recipe.name
    copy.write_text(text.replace(SCHEME, GROUPS.format(size=size)))
    return copy, f", groups of {size}"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", type=Path)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--recipes", default="*.yaml")
    parser.add_argument("--out", type=Path, help="for the pruned models, meanwhile")
    options = parser.parse_args()
    recipes = sorted(RECIPES.glob(options.recipes))
    failed = 0 if recipes else 1
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as directory:
        text = options.text or Path(directory) / "text.txt"
        if options.text is None:
            text.write_text(demo_texts()[0])
        shared = ["--text", text, "--seq-len", options.seq_len]
        shared += ["--dtype", options.dtype]
        for model in options.models or [demo_model()]:
            checks = {"dense": partial(dense, model, shared)}
            for recipe in recipes:
                checks[recipe.name] = partial(run, model, recipe, shared, options)
            for name, check in checks.items():
                try:
                    line = check()
                except RuntimeError as error:
                    line, failed = f"FAILED: {error}", failed + 1
                print(f"{model.name}, {name}: {line}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
