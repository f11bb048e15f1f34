"""Turns run folders into a page: curves, the paper's tables beside ours, speed and memory."""
