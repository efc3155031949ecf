"""Lays out the text that --help prints for the width of the terminal."""

import argparse
import re
import shutil

from harness.lines import wrapped

WIDEST = 100  # columns; longer lines are hard to read
UNBROKEN = re.compile(r"`[^`]*`|\[[^]]*\]")  # no line is broken within backquotes or square brackets
# A column of names beside their explanations, with two spaces or more between the two.
ENTRY = re.compile(r"(\S.*?\s{2,})(\S.*)")
COMMAND = re.compile(r"(.*:)\s+((python|torchrun|pip) .*)")
INDENTED_COMMAND = re.compile(r" +(python|torchrun|pip) ")


class HelpFormatter(argparse.HelpFormatter):
    """Wraps descriptions and explanations at words, and leaves the commands among them whole."""

    def __init__(self, prog, **options):
        width = min(shutil.get_terminal_size().columns, WIDEST) - 2
        super().__init__(prog, **{"width": width, "max_help_position": 24 if width > 70 else 18} | options)

    def add_usage(self, usage, actions, groups, prefix=None):
        if usage is None:
            arguments = [self._format_args(action, action.dest) for action in actions if not action.option_strings]
            usage = " ".join([self._prog, "[option ...]", *arguments])
        if usage is not argparse.SUPPRESS:
            indent = " " * len("usage: ")
            usage = wrapped(usage, self._width, UNBROKEN, indent, indent).strip()
        super().add_usage(usage, actions, groups, prefix)

    def _fill_text(self, text, width, indent):
        return filled(text, width)

    def _split_lines(self, text, width):
        return wrapped(text, width, UNBROKEN).split("\n")


def filled(text, width):
    """Wrap a docstring.

    A line that is indented stays on its own, and a command stays whole even if it is too long. A command at the end of
    a line moves to a line of its own if it does not fit. An entry of a list, a name with its explanation beside it, is
    wrapped in its own column. Everything else is one paragraph up to the next empty line.
    """
    blocks = []  # (the name before the text, the text), with None for a name where the text stays as it is
    for line in text.strip("\n").split("\n"):
        name, explanation = blocks[-1] if blocks else (None, "")
        command = COMMAND.fullmatch(line)
        entry = ENTRY.fullmatch(line)
        if command and len(line) > width:
            blocks += [("", command[1]), (None, f"    {command[2]}")]
        elif command:
            blocks.append((None, line))
        elif entry:
            blocks.append((entry[1], entry[2]))
        elif name and name.strip() and line.startswith(" ") or name == "" and line and not line.startswith(" "):
            blocks[-1] = (name, f"{explanation} {line.strip()}")
        elif not line or INDENTED_COMMAND.match(line):
            blocks.append((None, line))
        else:
            indent = re.match(" *", line)[0]
            blocks.append((indent, line[len(indent) :]))
    lines = []
    for name, text in blocks:
        lines.append(text if name is None else wrapped(text, width, UNBROKEN, name, " " * len(name)))
    return "\n".join(lines)
