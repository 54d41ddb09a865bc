"""
The signals that a correction can follow. Another one is a file of this folder and a
name in the list below.
"""

from absorb_plugin.signals.base import Context, Signal
from absorb_plugin.signals.gradient import Gradient
from absorb_plugin.signals.noise import Noise
from absorb_plugin.signals.pruner_gradient import PrunerGradient
from absorb_plugin.signals.response import ResponseSignal

__all__ = ["SIGNALS", "Context", "Signal"]

SIGNALS: dict[str, type[Signal]] = {
    signal.name: signal for signal in (Gradient, PrunerGradient, ResponseSignal, Noise)
}
