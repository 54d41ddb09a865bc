"""
Judges of whole allocations. Each is a probe whose result is the held-out loss of every
candidate: sums in nats (candidates, samples) and predicted tokens (samples,).
"""

from absorb_plugin.judges.masked_loss import MaskedLoss
from absorb_plugin.judges.pruned_loss import PrunedLoss

__all__ = ["MaskedLoss", "PrunedLoss"]
