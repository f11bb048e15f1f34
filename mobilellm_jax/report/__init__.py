"""Turns run folders into a page with curves, the paper's tables and ours, speed and memory."""
