"""Processes that work for a trainer: deadlines, losses, replacement, named shared arrays. Knows no simulator."""
