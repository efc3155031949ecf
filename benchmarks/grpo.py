"""Measure what learning from answers takes, and how exact it is:  python -m benchmarks.grpo memory|gap

memory  The peak memory of a gradient step on --num_samples answers of --max_new_tokens tokens each, with Adam's
        moments, and the seconds that it took: as one batch and in micro-batches of 2, both with and without gradient
        checkpointing. Each is measured in a process of its own. Drawing answers and saving checkpoints are left out.
gap     How far log-probabilities when tokens are drawn are from those when they are scored, and how far both are from
        those that the model gives in float32: with BF16 false and true, for --num_samples answers of at most
        --max_new_tokens tokens to each of --prompts prompts. The ratio is that of the probabilities when scored and
        when drawn.

Both on the CPU.
"""

import harness.start  # before the slow imports

import sys
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context

import torch

from algorithms import grpo_text as grpo
from algorithms.parts.language_model import vocabulary_size
from algorithms.parts.language_policy import Written
from harness.device import out_of_memory
from harness.messages import say
from harness.options import Parser, Values, within
from harness.supervise import run_script


def constants(**changes):
    return Values(**{**grpo.CONSTANTS, "DEVICE": "cpu", **changes})


# memory


def peak_of_a_step(model, num_samples, max_new_tokens, micro_batch_size, checkpointing):
    """Return the peak memory of this process in GB after a gradient step, and the seconds of the step."""
    import resource  # which Windows does not have

    trainer = grpo.build(
        constants(
            POLICY_MODEL=model,
            NUM_SAMPLES=num_samples,
            MAX_NEW_TOKENS=max_new_tokens,
            MICRO_BATCH_SIZE=micro_batch_size,
            GRADIENT_CHECKPOINTING=checkpointing,
        )
    )
    for p in trainer.trained:
        p.grad = torch.zeros_like(p)
    trainer.optimizer.step()  # which makes the moments; nothing moves
    tokens, mask = trainer.policy.prompt_tokens(grpo.PROMPTS[:1] * num_samples)
    answers = torch.randint(vocabulary_size(trainer.policy.model), (num_samples, max_new_tokens))
    drawn = torch.ones_like(answers, dtype=torch.bool)
    nothing = torch.zeros(drawn.shape)
    written = Written(torch.cat([tokens, answers], 1), torch.cat([mask, drawn.long()], 1), drawn, nothing, nothing)
    clock = time.perf_counter()
    trainer.update(written, torch.randn(num_samples))
    unit = 1 if sys.platform == "darwin" else 1024  # bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9, time.perf_counter() - clock


def memory(model, num_samples, max_new_tokens):
    for size in 0, 2:
        for checkpointing in False, True:
            with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                task = pool.submit(peak_of_a_step, model, num_samples, max_new_tokens, size, checkpointing)
                try:
                    peak, seconds = task.result()
                    result = f"{peak:.1f} GB, {seconds:.0f} s"
                except Exception as error:
                    if not out_of_memory(error) and not isinstance(error, BrokenProcessPool):  # which a kill breaks
                        raise
                    result = "does not fit into memory"
            say(f"MICRO_BATCH_SIZE {size}, GRADIENT_CHECKPOINTING {str(checkpointing).lower()}: {result}")


# the gap


@torch.no_grad()
def gap(model, num_prompts, num_samples, max_new_tokens):
    """Print how far log-probabilities when drawn, when scored and in float32 are from each other."""
    writer = grpo.make_writer(constants(POLICY_MODEL=model), torch.device("cpu"))
    for bf16 in False, True:
        writer.bf16 = bf16
        torch.manual_seed(0)
        prompts = [prompt for prompt in grpo.PROMPTS[:num_prompts] for _ in range(num_samples)]
        tokens, mask, drawn, when_drawn, _ = writer.write(prompts, max_new_tokens)
        when_drawn = when_drawn[drawn]
        scored = writer.logprobs(writer.model, tokens, mask, drawn.shape[1])[drawn]
        writer.bf16 = False
        in_float32 = writer.logprobs(writer.model, tokens, mask, drawn.shape[1])[drawn]
        ratio = (scored - when_drawn).exp()
        say(f"BF16 {str(bf16).lower()}, {len(ratio):,} tokens:")
        pairs = {
            "drawn - scored": when_drawn - scored,
            "drawn - float32": when_drawn - in_float32,
            "scored - float32": scored - in_float32,
            "ratio - 1": ratio - 1,
        }
        for name, x in pairs.items():
            say(f"  {name}: mean {x.mean():.1e}, mean absolute {x.abs().mean():.1e}, largest {x.abs().max():.1e}")
        say(f"  ratio outside 1 +- {grpo.EPS_CLIP}: {((ratio - 1).abs() > grpo.EPS_CLIP).float().mean():.2%}")


def main(argv=()):
    parser = Parser("-m benchmarks.grpo", __doc__)
    parser.add_argument("what", choices=("memory", "gap"), metavar="TASK", help="memory, gap")
    parser.add_argument(
        "--model", default=grpo.POLICY_MODEL, help=f"as grpo_text takes it (default {grpo.POLICY_MODEL})"
    )
    parser.add_argument("--num_samples", type=within("[2, 4096]"), help="answers (default 16 for memory, 8 for gap)")
    parser.add_argument(
        "--max_new_tokens", type=within("[1, 4096]"), help="tokens (default 256 for memory, 64 for gap)"
    )
    prompts = within(f"[1, {len(grpo.PROMPTS)}]")
    parser.add_argument("--prompts", type=prompts, default=4, help="of gap (default 4)")
    args = parser.parse_args(argv)
    if args.what == "memory":
        memory(args.model, args.num_samples or 16, args.max_new_tokens or 256)
    else:
        gap(args.model, args.prompts, args.num_samples or 8, args.max_new_tokens or 64)


if __name__ == "__main__":
    run_script(main, "-m benchmarks.grpo")
