"""Rewards that are functions of a prompt and an answer."""

import importlib
import traceback

import torch

from harness.device import out_of_memory
from harness.messages import one_line, shortened, shown
from harness.options import CommandLineError


def load_function(name):
    """The function that "module:function" names. The module is imported. Raises CommandLineError."""
    module_name, _, function_name = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # a module of the user's can fail in any way
        advice = "; it must be in the working directory, or installed" if isinstance(error, ImportError) else ""
        reason = f"{type(error).__name__}: {shortened(error)}"
        raise CommandLineError(f"{module_name} cannot be imported ({reason}){advice}") from None
    function = getattr(module, function_name, None)
    if not callable(function):
        place = shown(module.__file__) if getattr(module, "__file__", None) else module_name
        raise CommandLineError(f"{place} has no function {function_name}")
    return function


def score_by(function, prompts, answers):
    """The rewards (N,) float32 that a function of one prompt and one answer gives.

    Raises CommandLineError, which names the answer, if the function fails or returns no number.
    """
    rewards = [reward_of(function, prompt, answer) for prompt, answer in zip(prompts, answers)]
    return torch.tensor(rewards, dtype=torch.float32)


def reward_of(function, prompt, answer):
    """The reward of one answer, a float. Raises CommandLineError, as `score_by` does."""
    try:
        reward = function(prompt, answer)
    except Exception as error:
        if out_of_memory(error):
            raise
        frames = traceback.extract_tb(error.__traceback__)[1:2]  # of the function itself, unless the call has failed
        place = "".join(f", line {frame.lineno} of {shown(frame.filename)}" for frame in frames)
        problem = f"has failed ({type(error).__name__}: {one_line(error)}{place})"
    else:
        try:
            return float(reward)
        except (TypeError, ValueError, OverflowError, RuntimeError):  # tensors raise RuntimeError
            problem = f"has returned {shortened(repr(reward), 60)}, which is no number,"
    raise CommandLineError(f"the reward function {problem} for the answer {shortened(answer)!r}")
