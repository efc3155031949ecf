"""What reading a prompt's fixed beginning once saves:  python benchmarks/language_models.py [--model smollm2]

Seconds of a forward pass over the texts of 16 games, as a rollout does them, with the beginning read once and with it read before every text;
alternating, medians.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from algorithms.breakout_text import BreakoutTexts, texts_of  # noqa: E402
from algorithms.language_model import load_model, load_tokenizer  # noqa: E402
from algorithms.language_policy import LanguagePolicy  # noqa: E402
from algorithms.ppo_llm_breakout import ANSWERS, PREFIX, SUFFIX, invented_texts  # noqa: E402
from command_line import raise_error, run_script  # noqa: E402


def prefix(name, device, turns):
    """-> seconds with the beginning read once, and with it read before every text."""
    tokenizer = load_tokenizer(name, [text.removeprefix(PREFIX) for text in invented_texts()])
    model = load_model(name, tokenizer, device)
    obs, _ = BreakoutTexts(16).reset(seed=0)
    texts = [text + SUFFIX for text in texts_of(obs)]
    once, every = LanguagePolicy(model, tokenizer, PREFIX, ANSWERS).to(device), LanguagePolicy(model, tokenizer, PREFIX[:3], ANSWERS).to(device)
    passes = [(policy.inference_cache(), policy.encode_texts(given, 400)) for policy, given in (
        (once, texts), (every, [PREFIX[3:] + text for text in texts]))]  # fmt: skip
    seconds = [[], []]
    for _ in range(turns):
        for (act, encoded), times in zip(passes, seconds):
            clock = time.perf_counter()
            act(encoded)[0].cpu()  # waits for a GPU
            times.append(time.perf_counter() - clock)
    print(f"{name}: {once.prefix.shape[1]} tokens of the beginning, {[int((e >= 0).sum(1).max()) for e in (p[1][:, :400] for p in passes)]} behind it")
    return [statistics.median(times) for times in seconds]


def main(argv=None):
    parser = argparse.ArgumentParser(prog="language_models.py", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--model", default="smollm2", help="as ppo_llm_breakout takes it (default smollm2)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--turns", type=int, default=7)
    parser.error = raise_error
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    once, every = prefix(args.model, torch.device(args.device), args.turns)
    print(f"read once {once:.3f} s, before every text {every:.3f} s, ratio {every / once:.2f}")


if __name__ == "__main__":
    run_script(main, "language_models.py")
