"""Spans, bubbles, stats and trace export."""
