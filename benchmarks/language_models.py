"""Measure the time saved by reading a prompt's beginning once:  python -m benchmarks.language_models [--model smollm2]

All prompts begin with the same text. A forward pass over the prompts of 16 games, as in a rollout, is timed with this
beginning read once, and with the beginning read in every prompt. The two alternate, and medians are printed. With
--levels the program plays instead: 30 games by a rule that follows the ball, and as many at random.
"""

import harness.start  # before the slow imports

import json
import statistics
import time
from types import SimpleNamespace

import numpy as np
import torch

from algorithms.parts.breakout_text import ACTIONS, BreakoutTexts, follow_the_ball, texts_of
from algorithms.parts.language_model import load_model, load_tokenizer
from algorithms.parts.language_policy import LanguagePolicy
from algorithms.parts.playing import summary
from algorithms.ppo_llm_breakout import ANSWERS, CONSTANTS, PREFIX, SUFFIX, invented_texts, scores_of
from harness.device import choose_device
from harness.options import Parser, within
from harness.supervise import run_script


def seconds_of_passes(name, device, turns):
    """Return the seconds of a pass with the beginning read once, and with all but its first token read every time."""
    tokenizer = load_tokenizer(name, invented_texts())
    model = load_model(name, tokenizer, device)
    obs, _ = BreakoutTexts(16).reset(seed=0)
    once, every = (LanguagePolicy(model, tokenizer, PREFIX, ANSWERS).to(device) for _ in range(2))
    tokens = once.encode_texts([text + SUFFIX for text in texts_of(obs)], 400)
    beginning = once.prefix[:, 1:].expand(16, -1)
    every.prefix = once.prefix[:, :1]
    passes = [(once.inference_function(), tokens), (every.inference_function(), torch.cat([beginning, tokens], 1))]
    seconds = [[], []]
    for _ in range(turns):
        for (act, encoded), times in zip(passes, seconds):
            clock = time.perf_counter()
            act(encoded)[0].cpu()  # waits for a GPU
            times.append(time.perf_counter() - clock)
    longest = [int((encoded[:, : -len(ANSWERS)] >= 0).sum(1).max()) for _, encoded in passes]
    reads = f"a pass reads {longest[0]} without it, and {longest[1]} with all but its first"
    print(f"{name}: the beginning has {once.prefix.shape[1]} tokens; {reads}")
    return [statistics.median(times) for times in seconds]


def scores_to_compare_with(games):
    """Return the scores of the rule and of random play, in games with the same seeds."""
    rng = np.random.default_rng(0)
    c = SimpleNamespace(**CONSTANTS)
    players = {
        "following the ball": lambda obs: [follow_the_ball(text) for text in texts_of(obs)],
        "random play": lambda obs: rng.integers(len(ACTIONS), size=len(obs)),
    }
    return {name: summary(scores_of(choose, c, games, seed=1_000_000)) for name, choose in players.items()}


def main(argv=()):
    parser = Parser("-m benchmarks.language_models", __doc__)
    parser.add_argument(
        "--model", default="smollm2", help='as ppo_llm_breakout takes it, but for "mlp" (default smollm2)'
    )
    parser.add_argument("--device", default="cpu", help="default cpu")
    parser.add_argument("--turns", type=within("[1, inf)"), default=7, metavar="N", help="of both (default 7)")
    parser.add_argument(
        "--levels",
        nargs="?",
        const=30,
        type=within("[1, inf)"),
        metavar="GAMES",
        help="scores of a rule and of random play (default 30 games)",
    )
    args = parser.parse_args(argv)
    if args.levels:
        print(json.dumps(scores_to_compare_with(args.levels)))
        return
    device = choose_device(args.device)
    torch.manual_seed(0)
    once, every = seconds_of_passes(args.model, device, args.turns)
    print(f"read once {once:.3f} s, before every text {every:.3f} s, ratio {every / once:.2f}")


if __name__ == "__main__":
    run_script(main, "-m benchmarks.language_models")
