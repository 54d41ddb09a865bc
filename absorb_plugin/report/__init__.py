"""What a run leaves behind: profile.json and a figure."""

from absorb_plugin.report.profile import Report

__all__ = ["Report"]
