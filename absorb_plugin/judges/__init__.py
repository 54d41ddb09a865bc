"""
Judges of whole allocations. Each is a probe whose result is the held-out loss of every
candidate: sums in nats (candidates, samples) and predicted tokens (samples,).
"""

from absorb_plugin.forward.probe import Probe
from absorb_plugin.judges.masked_loss import MaskedLoss
from absorb_plugin.judges.pruned_loss import PrunedLoss

__all__ = ["JUDGES", "MaskedLoss", "PrunedLoss"]

JUDGES: dict[str, type[Probe]] = {"masks": MaskedLoss, "pruner": PrunedLoss}
