"""Sizes that the kernels and those who lay out numbers for them agree on."""

HEAD_NUMBERS = 16
"""Heads that kernels attend have a multiple of so many numbers."""
PANEL_ROWS = 32
"""Rows of a weight in a panel."""
