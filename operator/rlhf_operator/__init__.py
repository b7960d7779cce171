"""Decides what a run needs next, and runs it."""
