"""
`absorb prune` under signals, each run in a process of its own: forked, for importing
torch and llm-compressor takes longer than all the runs together.

    python tests/helpers/signals.py MODEL TEXT RECIPE FOLDER

prints a JSON object: case -> exit code, negative for a signal.
"""

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from absorb_plugin.cli.app import app
from absorb_plugin.forward import runner

torch.set_num_threads(1)
# a shell that starts us in the background has SIGINT ignored
signal.signal(signal.SIGINT, signal.default_int_handler)
model, text, recipe, folder = sys.argv[1:]


def kill_in_probe(number: int, sent: int) -> Callable[[], None]:
    """Send a signal to ourselves while a block runs in the probe of that number."""

    def patch() -> None:
        original, begun = runner.run_probes, [0]

        def run_probes(dense: Any, blocks: Any, *args: Any, **kwargs: Any) -> None:
            begun[0] += 1
            if begun[0] == number:
                blocks.modules[-1].mlp.register_forward_pre_hook(
                    lambda *_: os.kill(os.getpid(), sent)
                )
            original(dense, blocks, *args, **kwargs)

        runner.run_probes = run_probes

    return patch


def kill_in_save() -> None:
    """The weights are written, the tokenizer and the recipe are not."""
    original = transformers.PreTrainedModel.save_pretrained

    def save(*args: Any, **kwargs: Any) -> None:
        original(*args, **kwargs)
        os.kill(os.getpid(), signal.SIGKILL)

    transformers.PreTrainedModel.save_pretrained = save


def start(out: str, patch: Callable[[], None] | None, *options: str) -> int:
    """Process id of `absorb prune`, whose output goes to OUT.log."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        with open(Path(folder) / f"{out}.log", "a") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            code = 99
            try:
                if patch is not None:
                    patch()
                app([
                    "prune", model, "--recipe", recipe, "--text", text, "--samples",
                    "6", "--seq-len", "16", "--out", f"{folder}/{out}", *options,
                ])  # fmt: skip
            except SystemExit as error:
                code = int(error.code or 0)
            finally:
                os._exit(code)
    return child


def end(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def prune(out: str, patch: Callable[[], None] | None, *options: str) -> int:
    return end(start(out, patch, *options))


cache = ("--profile-cache", f"{folder}/cache")
shared = ("--profile-cache", f"{folder}/shared")
at_once = [start(name, None, *shared) for name in ("one", "two")]
print(
    json.dumps(
        {
            "one": end(at_once[0]),
            "two": end(at_once[1]),
            "three": prune("three", None, *shared),
            "whole": prune("whole", None),
            "int": prune("int", kill_in_probe(2, signal.SIGINT)),
            "term": prune("term", kill_in_probe(2, signal.SIGTERM)),
            "kill": prune("kill", kill_in_probe(3, signal.SIGKILL), *cache),
            "save": prune("kill", kill_in_save, *cache),
            "resumed": prune("kill", None, *cache),
        }
    )
)
