"""Turns run folders into a page with curves, the paper's tables beside ours, speed and memory."""
