"""Scripts of one job each; see their docstrings."""
