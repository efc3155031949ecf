"""Prompts in a file of the user's."""

import json
from pathlib import Path

from harness.messages import shortened, shown
from harness.options import CommandLineError

OBJECTS = ".jsonl", ".ndjson", ".json"  # the suffixes of files with a JSON value in each line
WANTED = 'each line must be like {"prompt": "Why is the sky blue?"}'


def read_prompts(path):
    """The prompts in a file: a line each, or in a JSONL file an object with a "prompt" each, or a string.

    Empty lines are skipped, and so are spaces around a prompt. Raises CommandLineError, which names the line.
    """
    file = f"PROMPTS_FILE {shown(path)}"
    try:
        lines = Path(path).read_bytes().splitlines()
    except (OSError, ValueError) as error:  # a null byte in a name is a ValueError
        raise CommandLineError(f"{file}: {getattr(error, 'strerror', error)}; check the path") from None
    read = prompt_in_json if Path(path).suffix.lower() in OBJECTS else str
    prompts = []
    for number, line in enumerate(lines, 1):
        try:
            text = line.decode("utf-8-sig").strip()  # editors on Windows write a mark at the beginning
            if text:
                prompts.append(read(text))
        except UnicodeDecodeError:
            raise CommandLineError(f"{file}, line {number}: is not in UTF-8; save the file as UTF-8") from None
        except (ValueError, RecursionError) as error:
            raise CommandLineError(f"{file}, line {number}: {error}") from None
    if not prompts:
        raise CommandLineError(f"{file}: has no prompts; write one in each line")
    return prompts


def prompt_in_json(text):
    """The prompt in a line of a JSONL file. Raises ValueError."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"is no JSON ({error.msg}, column {error.colno}); {WANTED}") from None
    prompt = value.get("prompt") if isinstance(value, dict) else value
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError(f"has no text as its prompt ({shortened(text, 60)}); {WANTED}")
    prompt.encode()  # half of a pair of surrogates would be no text for a tokenizer
    return prompt.strip()
