"""The report: one self-contained HTML page about a run, made from the artifacts that led to it."""
