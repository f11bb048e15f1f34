"""Measures bytes, time and memory of models on this machine, in the runtime of their format.

`run` starts a process for each measurement and lets the models take turns. `measure` measures one
model in such a process, and `table` turns the measurements into a table and a picture.
"""
