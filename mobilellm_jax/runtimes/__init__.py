"""The runtimes that phones have, on this machine: one file each, behind one interface.

An exported folder is opened by `artifact.py`, which checks it and loads it in the runtime of its
format. What a runtime answers is the truth about the artefact: verification, evaluation and
benchmarks all ask here, never the model that was exported.
"""
