"""`mobilellm COMMAND --flags`: finds the command, parses its flags, decides the exit code.

Exit codes: 0 done; 1 failed while running (with a traceback); 2 bad input (one message, no
traceback); 75 saved, start me again; 130 interrupted; 141 nobody reads the output any more. absl's
own `app.run` would end with 1 for bad flags, so the parsing is done here.
"""

import collections
import importlib
import inspect
import keyword
import os
import re
import select
import sys
import textwrap
from types import ModuleType

from absl import flags

from mobilellm_jax.cli.config_flags import split_overrides
from mobilellm_jax.cli.errors import UsageError, is_bad_input, message
from mobilellm_jax.config import near_miss

BAD_INPUT = 2
INTERRUPTED = 130
READER_GONE = 141  # what a shell says of a program that SIGPIPE has ended

COMMANDS = {
    "prepare": "turn text into token shards, with a tokenizer given or trained",
    "inspect": "check token shards, count what is in them, show some of it",
    "plan": "say what a run will need: memory, communication and time, without a TPU",
    "train": "train from a config; the same command again resumes",
    "evaluate": "score tasks or measure the perplexity of a text",
    "generate": "continue a prompt, or talk",
    "import": "turn a Hugging Face directory into a run folder",
    "export": "write a checkpoint in a format that others read, for phones too",
    "benchmark": "measure exports in their own runtimes: size, speed, memory, loss",
    "sweep": "train many models to compare: the paper's grids, or values of your own",
    "report": "turn runs into one page: curves, the paper's tables with ours beside them",
}

_HELP = {"-h", "-help", "--help"}
_PACKAGE = "mobilellm_jax.cli"
_flags_of: dict[str, flags.FlagValues] = collections.defaultdict(flags.FlagValues)  # by module


def run() -> int:
    """Runs the command line of this process; the console script's entry point."""
    try:
        code = main(sys.argv[1:])
        print(end="", flush=True)  # at the exit it would be too late to catch a failure
        return code
    except BrokenPipeError:
        if not _reader_is_gone():
            raise  # some other pipe or socket
        return READER_GONE


def _reader_is_gone() -> bool:
    """Returns whether writing fails because of `| head` or the like, which is no mistake.

    If so, what is left to be written goes nowhere, so that the flush at the exit fails no more.
    """
    outputs = select.poll()
    outputs.register(1, 0)
    outputs.register(2, 0)
    gone = [
        output for output, event in outputs.poll(0) if event & (select.POLLERR | select.POLLHUP)
    ]
    for output in gone:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, output)
        os.close(nowhere)
    return bool(gone)


def main(args: list[str]) -> int:
    """Runs one command and returns the exit code; a failure while running is raised."""
    name = ""
    try:
        if not args or args[0] in _HELP:
            print(_overview())
            return 0
        name, *rest = args
        return _run(name, rest)
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return INTERRUPTED
    except (ValueError, OSError) as error:
        if not is_bad_input(error):
            raise
        lines = message(error).splitlines()
        start = "\n  " if len(lines) > 1 else " "
        print(f"mobilellm {name}:{start}" + "\n  ".join(lines), file=sys.stderr)
        return BAD_INPUT


def import_command(name: str) -> tuple[ModuleType, flags.FlagValues]:
    """Returns the command's module, and its flags taken out of absl's global ones.

    Two commands may then both have an `--output`, also in one process, as the tests have them.

    Raises:
      UsageError: if there is no such command.
    """
    if name not in COMMANDS:
        kind = "flag before the command" if name.startswith("-") else "command"
        raise UsageError(
            f"unknown {kind} {name}.{near_miss(name, COMMANDS)} "
            f"The commands are {', '.join(COMMANDS)}."
        )
    file = f"{name}_" if keyword.iskeyword(name) else name
    _set_flags_aside()
    command = importlib.import_module(f"{_PACKAGE}.{file}")
    _set_flags_aside()
    return command, _flags_of[command.__name__]


def _set_flags_aside() -> None:
    """Takes the flags of every command imported so far out of absl's global ones."""
    for module, defined in list(flags.FLAGS.flags_by_module_dict().items()):
        if module.startswith(f"{_PACKAGE}.") and defined:
            for flag in defined:
                _flags_of[module][flag.name] = flag
            flags.FLAGS.remove_flag_values(_flags_of[module])


def _run(name: str, args: list[str]) -> int:
    command, own = import_command(name)
    if _asks_for_help(args):
        print(_usage(name, command, own))
        return 0
    overrides = _parse(name, own, args)
    flags.FLAGS.append_flag_values(own)  # where the command reads them
    flags.FLAGS.mark_as_parsed()
    try:
        return command.main([name, *overrides]) or 0
    finally:
        flags.FLAGS.remove_flag_values(own)


def _asks_for_help(args: list[str]) -> bool:
    before_separator = args[: args.index("--")] if "--" in args else args
    return not _HELP.isdisjoint(before_separator)


def _parse(name: str, own: flags.FlagValues, args: list[str]) -> list[str]:
    """Sets the command's flags from `args` and returns its config overrides.

    Raises:
      UsageError: for unknown, missing and ill-valued flags and for stray arguments.
    """
    overrides, args = split_overrides(args)
    if overrides and "config" not in own:
        field = overrides[0].partition("=")[0]
        raise UsageError(f"unknown flag --config.{field}; {name} takes no config.")
    for flag in own:
        own[flag].unparse()  # a second call in one process starts from the defaults again
    try:
        stray = own([name, *args])[1:]
    except flags.UnrecognizedFlagError as error:
        unknown = f"--{error.flagname}"
        hint = near_miss(unknown, [f"--{flag}" for flag in own])
        raise UsageError(f"unknown flag {unknown}.{hint} See mobilellm {name} --help.") from None
    except flags.Error as error:
        missing = re.findall(r"Flag --(\w+) must have a value other than None", str(error))
        if not missing:
            raise UsageError(str(error)) from None
        lines = [f"--{flag} is missing: {own[flag].help}" for flag in missing]
        raise UsageError("\n".join([*lines, f"See mobilellm {name} --help."])) from None
    if stray:
        raise UsageError(f"stray argument {stray[0]!r}; flags are written --name=value.")
    return overrides


def _overview() -> str:
    width = max(map(len, COMMANDS)) + 2
    return "\n".join(
        [
            "Usage: mobilellm COMMAND --flag=value ...",
            "",
            *(f"  {name:<{width}}{line}" for name, line in COMMANDS.items()),
            "",
            "mobilellm COMMAND --help shows a command's flags, with examples.",
        ]
    )


def _usage(name: str, command: ModuleType, own: flags.FlagValues) -> str:
    lines = [f"Usage: mobilellm {name} --flag=value ...", "", inspect.getdoc(command) or ""]
    lines += ["", "Flags:"]
    for flag in map(own.__getitem__, own):
        switch = f"--[no]{flag.name}" if flag.boolean else f"--{flag.name}"
        default = "" if flag.default in (None, "", []) else f" (default: {flag.default_as_str})"
        lines.append(f"  {switch}")
        lines.append(textwrap.indent(textwrap.fill(f"{flag.help}{default}", 90), "      "))
        if flag.name == "config":
            lines += ["  --config.GROUP.FIELD=VALUE", "      replaces one field of it; repeatable"]
    return "\n".join(lines)
