"""Lays out what programs print: numbers as people read them, and lines that fit the terminal."""

import math
import os
import re
import textwrap

# A command is never wrapped, because it could not be copied as one line then; the terminal may break it.
COMMAND = re.compile(r"(?:python3? (?:-m |['\"]|\S*\.py\b)|torchrun |pip install )[^;]*")

UNBROKEN_SPACE = "\u00a0"


def columns(stream):
    """Return how many characters fit into a line of a terminal, or None for a file, a pipe or a closed stream."""
    try:
        if stream is None or not stream.isatty():
            return None
        # One less, because some terminals begin a new line once the last column is filled.
        return (os.get_terminal_size(stream.fileno()).columns or 80) - 1
    except (OSError, ValueError):  # a terminal of unknown size, or a stream that is closed
        return 79


def wrapped_lines(text, width):
    """Break the lines of a text between words at this width; None for no limit. Indented lines stay as they are."""
    if width is None:
        return text
    return "\n".join(line if line[:1] in ("", " ") else wrapped(line, width, COMMAND) for line in text.split("\n"))


def wrapped(text, width, unbroken, indent="", following=""):
    """Break a paragraph at spaces into lines of at most so many characters.

    Args:
        unbroken: a pattern; what it matches stays whole, even if it is longer than a line. An UNBROKEN_SPACE is no
            place to break either.
        indent, following: the beginning of the first line, and of those after it.
    """
    glued = unbroken.sub(lambda match: match[0].replace(" ", UNBROKEN_SPACE), text)
    whole_words = {"break_long_words": False, "break_on_hyphens": False}
    lines = textwrap.fill(glued, max(width, 20), initial_indent=indent, subsequent_indent=following, **whole_words)
    return lines.replace(UNBROKEN_SPACE, " ")


def fitted(pieces, width, between="  "):
    """Join as many of the pieces as fit into a line of this width, the first ones first; None for all. "" is left
    out."""
    line = ""
    for piece in filter(None, pieces):
        longer = f"{line}{between}{piece}" if line else piece
        if width is not None and line and len(longer) > width:
            break
        line = longer
    return line


def format_score(score):
    """Return 761.5625 as "761.6", 0.8234 as "0.823", and nan as "-"."""
    if math.isnan(score):
        return "-"
    return f"{score:.1f}" if abs(score) >= 10 else f"{score:.3g}"


def format_count(number):
    """Return 950 as "950", 163840 as "164k", and 4014080 as "4.01M"."""
    if number >= 999_500:
        return f"{number / 1e6:.2f}M"
    return f"{number / 1e3:.0f}k" if number >= 10_000 else f"{number:,.0f}"


def format_rate(rate):
    """Return 0.72 as "0.72 steps/s", and 20078.3 as "20,078 steps/s"; of less than one in 10 seconds, "46 s/step"."""
    if rate < 0.1:
        return f"{1 / rate:.0f} s/step" if rate else "-"
    return f"{rate:,.0f} steps/s" if rate >= 10 else f"{rate:.2g} steps/s"


def format_duration(seconds):
    """Return 42 as "42s", 102 as "1m42s", 7500 as "2h05m", and 777600 as "9d00h"."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d{hours:02}h"
    if hours:
        return f"{hours}h{minutes:02}m"
    return f"{minutes}m{seconds:02}s" if minutes else f"{seconds}s"


def in_words(seconds):
    """Return a duration in one rounded number, such as "about 4 minutes"."""
    for unit, length in (("day", 86400), ("hour", 3600), ("minute", 60), ("second", 1)):
        number = round(seconds / length)
        if number >= 2 or unit == "second":
            return f"about {number:,} {unit}{'' if number == 1 else 's'}"
