"""Traces of other tools: in, to learn from what already ran; out, to look at what Leyden recorded."""
