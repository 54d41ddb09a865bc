"""Budgets, directions and line searches: plain arithmetic on numpy arrays."""
