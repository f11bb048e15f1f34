"""The command line: one file per command, and `main.py`, which imports the file of a command.

Only this folder knows absl. A command defines its flags in `FLAGS`, so two commands may have a flag
of the same name. `main(argv)` runs the command; `argv[1:]` holds the `--config.a.b=value` overrides
(see `config_flags`) of a command that has `--config`.
"""
