"""Turns run folders into a page: curves, the paper's tables beside ours, speed and memory.

`runs` reads folders, `compare` compares runs with each other and with the paper, `tables`,
`figures` and `page` show the results, and `write` puts the files into a folder.
"""
