"""Sinks: the terminal, `metrics.jsonl`, and the report."""
