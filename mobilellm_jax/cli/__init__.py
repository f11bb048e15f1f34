"""The command line: one file per command, and `main.py`, which imports the file of a command.

Only this folder knows absl, and in it only `flags.py`. A command lists its flags in a dataclass
`Flags`, so two commands may have a flag of the same name. `main(flags)` runs the command. A command
with `--config` also gets the overrides `--config.a.b=value` (see `config_flags`).
"""
