"""
The first import of llm-compressor. While it is imported it logs to stdout (that there
is no accelerator), where `absorb eval --json` promises one JSON object and no more.
"""

import contextlib
import sys

if "llmcompressor" not in sys.modules:
    with contextlib.redirect_stdout(sys.stderr):
        import llmcompressor
    # Its log stays where it would be without us.
    llmcompressor.configure_logger()

from llmcompressor.modifiers import ModifierFactory

__all__ = ["ModifierFactory"]
