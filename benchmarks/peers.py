"""Train beside Stable-Baselines3 and TRL:  python -m benchmarks.peers lunarlander|space_invaders|grpo [--seed 0]

lunarlander     Ours and SB3's PPO, which has the settings of RL Baselines3 Zoo: minutes and steps until the mean of 30
                greedy episodes reaches 200. Evaluations do not count in the time of either.
space_invaders  Ours and SB3's DQN, with the same network, batch, game and learning steps per step: environment steps
                per second while learning, as medians. The two alternate. Only ours computes in bfloat16, where the
                processor supports it, and with --float32 neither does.
grpo            Ours and TRL's GRPOTrainer, with the same model, prompts, reward and settings, on the CPU: reward of
                answers to held-out prompts before and after --num_steps steps, and seconds per step. One training runs
                after the other. Both compute in bfloat16 where the processor supports it, or with --float32 neither.

A step of `grpo` draws 8 answers and learns from them. Its time is a median, without evaluations, logs and
checkpoints. Both trainings use the same random numbers in a step, so in float32 they draw the same answers until their
weights differ by more than rounding. TRL gets our settings, among them the loss, and the penalty whose gradient is that
of KL(policy, start), which newer versions of TRL have by default. Besides, TRL measures entropies.

Needs algorithms/requirements.txt, and `pip install stable-baselines3` for the first two or `pip install trl` for
grpo.
"""

import harness.start  # before the slow imports

import statistics
import tempfile
import time
import warnings
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import torch

from algorithms import dqn_space_invaders as dqn
from algorithms import grpo_text as grpo
from algorithms import ppo_lunarlander as lander
from algorithms.parts.packages import need
from algorithms.parts.playing import episode_returns
from callbacks import Callback
from harness.options import Parser, within
from harness.supervise import run_script

EVERY = 81_920  # LunarLander: environment steps between two evaluations
SOLVED = 200.0  # LunarLander: the mean return to be reached
STEPS = 1_500  # Space Invaders: environment steps in a turn


def stable_baselines3():
    """Return Stable-Baselines3, and a logger of it that says nothing."""
    sb3 = need("stable_baselines3")
    return sb3, sb3.common.logger.Logger(folder=None, output_formats=[])


# LunarLander


def score(greedy):
    """Return the mean return of 30 fresh episodes. greedy: maps observations (N, 8) to actions (N,)."""
    return float(np.mean(episode_returns(lander.make_env, greedy, 30, 1_000_000)))


def train_our_lander(seed, num_steps):
    """Train ours. Returns (steps, seconds, score) of each evaluation."""
    found = []

    class Scores(Callback):
        def on_update_end(self, trainer):
            if trainer.global_step % EVERY == 0 or trainer.global_step >= trainer.num_steps:
                clock = time.perf_counter()
                with torch.no_grad():
                    mean = score(lambda obs: trainer.policy(torch.from_numpy(obs))[0].argmax(-1).numpy())
                trainer.clock += time.perf_counter() - clock
                found.append((trainer.global_step, trainer.seconds, mean))
                report("ours", *found[-1])

    trainer = lander.build(SimpleNamespace(**{**lander.CONSTANTS, "SEED": seed, "NUM_STEPS": num_steps}))
    trainer.callbacks = [Scores()]
    trainer.learn()
    return found


def train_their_lander(seed, num_steps):
    """Train Stable-Baselines3's PPO. Returns (steps, seconds, score) of each evaluation."""
    sb3, quiet = stable_baselines3()
    model = sb3.PPO(
        "MlpPolicy",
        sb3.common.vec_env.DummyVecEnv([lander.make_env] * 16),
        n_steps=1024,
        batch_size=64,
        gae_lambda=0.98,
        gamma=0.999,
        n_epochs=4,
        ent_coef=0.01,
        seed=seed,
        device="cpu",
    )
    model.set_logger(quiet)
    found = []
    seconds = 0.0
    while model.num_timesteps < num_steps:
        clock = time.perf_counter()
        model.learn(EVERY, reset_num_timesteps=False)
        seconds += time.perf_counter() - clock
        found.append((model.num_timesteps, seconds, score(lambda obs: model.predict(obs, deterministic=True)[0])))
        report("SB3", *found[-1])
    return found


def report(name, steps, seconds, mean):
    print(f"{name}: {steps:,} steps, {seconds / 60:.2f} min, score {mean:.1f}", flush=True)


def lunarlander(seed, num_steps):
    """Train both, one after the other, and print when each was as good as SOLVED."""
    stable_baselines3()  # or say at once that it is missing
    torch.set_num_threads(1)
    for name, train in {"ours": train_our_lander, "SB3": train_their_lander}.items():
        found = train(seed, num_steps)
        solved = next(((steps, seconds) for steps, seconds, mean in found if mean >= SOLVED), None)
        when = f"{solved[0]:,} steps, {solved[1] / 60:.2f} minutes" if solved else "never"
        print(f"{name}: {SOLVED:g} points after {when}; last {found[-1][2]:.1f} after {found[-1][1] / 60:.2f} minutes")


# Space Invaders


def space_invaders(seed, turns, bf16):
    """Let both learn for STEPS steps by turns, in games that go on where they were, and print their speeds."""
    sb3, quiet = stable_baselines3()
    constants = {
        **dqn.CONSTANTS,
        "SEED": seed,
        "REPLAY_SIZE": 10_000,
        "BURN_IN": 600,
        "EPSILON": 0.1,
        "DEVICE": "cpu",
        "BF16": bf16,
    }
    c = SimpleNamespace(**constants)
    ours = dqn.build(c)
    ours.burn_in()
    theirs = sb3.DQN(
        "CnnPolicy",
        gym.wrappers.FrameStackObservation(dqn.make_env(c), c.STACK),
        learning_rate=c.LR,
        buffer_size=c.REPLAY_SIZE,
        learning_starts=c.BURN_IN,
        batch_size=c.BATCH_SIZE,
        gamma=c.GAMMA,
        train_freq=c.LEARN_EVERY,
        gradient_steps=1,
        target_update_interval=c.LEARN_EVERY * c.SYNC_EVERY,  # in environment steps
        exploration_initial_eps=c.EPSILON,
        exploration_final_eps=c.EPSILON,
        seed=seed,
        device="cpu",
    )
    theirs.set_logger(quiet)
    theirs.learn(c.BURN_IN, reset_num_timesteps=False)
    c.UPDATE_STEPS = STEPS  # of ours.collect_and_update
    ours.num_steps = 10**9  # which is never reached
    learners = {"ours": ours.collect_and_update, "SB3": lambda: theirs.learn(STEPS, reset_num_timesteps=False)}
    rates = {name: [] for name in learners}
    for turn in range(turns):
        for name, run in learners.items():
            clock = time.perf_counter()
            run()
            rates[name].append(STEPS / (time.perf_counter() - clock))
        print(f"turn {turn + 1}: ours {rates['ours'][-1]:.0f}, SB3 {rates['SB3'][-1]:.0f} steps/s", flush=True)
    ratio = statistics.median(a / b for a, b in zip(*rates.values()))
    medians = [statistics.median(x) for x in rates.values()]
    print(f"{torch.get_num_threads()} threads: ours {medians[0]:.0f}, SB3 {medians[1]:.0f} steps/s, ratio {ratio:.2f}")


# GRPO


def train_our_writer(c):
    """Train ours. Returns the weights at the end, and the seconds and the prompt of each step."""
    trainer = grpo.build(c)
    seconds = []
    prompts = []
    for step in range(c.NUM_STEPS):
        torch.manual_seed(1000 * c.SEED + step)
        clock = time.perf_counter()
        stats = trainer.collect_and_update()
        seconds.append(time.perf_counter() - clock)
        prompts.append(trainer.examples[0][1])
        rewards = torch.tensor([reward for reward, _, _ in trainer.examples])
        tell("ours", seconds, rewards, f", KL {stats['kl_reference']:.3f}")
    return trainer.policy.state_dict(), seconds, prompts


def train_their_writer(c, prompts):
    """Train TRL's on these prompts. Returns the weights at the end, and the seconds of each step."""
    trl = need("trl")
    transformers = need("transformers")
    datasets = need("datasets")
    writer = grpo.make_writer(c, torch.device("cpu"))
    rewards_of = grpo.make_reward(c.REWARD_MODEL, torch.device("cpu"))
    chat = bool(writer.tokenizer.chat_template)
    rows = []
    for prompt in prompts:
        rows.append({"question": prompt, "prompt": [{"role": "user", "content": prompt}] if chat else prompt})
    seconds = []
    rewards = None  # of the answers of the last step

    def reward(completions, question, **_):
        nonlocal rewards
        rewards = rewards_of(question, [answer[0]["content"] if chat else answer for answer in completions])
        return rewards.tolist()

    class Steps(transformers.TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            torch.manual_seed(1000 * c.SEED + state.global_step)
            self.clock = time.perf_counter()

        def on_step_end(self, args, state, control, **_):
            seconds.append(time.perf_counter() - self.clock)
            tell("TRL", seconds, rewards)

    with tempfile.TemporaryDirectory() as directory, warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # between trl and transformers
        config = trl.GRPOConfig(
            directory,
            seed=c.SEED,
            max_steps=len(prompts),
            shuffle_dataset=False,
            per_device_train_batch_size=c.NUM_SAMPLES,
            num_generations=c.NUM_SAMPLES,
            max_completion_length=c.MAX_NEW_TOKENS,
            temperature=c.TEMPERATURE,
            top_p=c.TOP_P,
            loss_type=c.LOSS,
            scale_rewards="group" if grpo.normalizes(c) else "none",
            epsilon=c.EPS_CLIP,
            beta=c.KL_COEF,
            use_bias_correction_kl=True,  # the default only since TRL's pull request 6503
            learning_rate=c.LR,
            lr_scheduler_type="constant",
            weight_decay=0.0,
            max_grad_norm=c.MAX_GRAD_NORM,
            disable_dropout=True,
            bf16=writer.bf16,
            gradient_checkpointing=False,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        )
        trainer = trl.GRPOTrainer(
            writer.model,
            reward,
            config,
            datasets.Dataset.from_list(rows),
            processing_class=writer.tokenizer,
            callbacks=[Steps()],
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    return writer.state_dict(), seconds


def tell(name, seconds, rewards, more=""):
    print(f"{name}: step {len(seconds)}, reward {rewards.mean():.4f}, {seconds[-1]:.2f} s{more}", flush=True)


def writers(seed, num_steps, model, bf16):
    """Train both on the same prompts, one after the other, and print what each has reached."""
    need("trl")  # or say at once that it is missing
    constants = {
        **grpo.CONSTANTS,
        "POLICY_MODEL": model,
        "SEED": seed,
        "NUM_STEPS": num_steps,
        "DEVICE": "cpu",
        "LORA_RANK": 0,
        "PROMPTS_PER_STEP": 1,
        "EPOCHS": 1,
        "BF16": bf16,
    }
    c = SimpleNamespace(**constants)
    grpo.check(c)
    writer, _, models = grpo.make_models(c, torch.device("cpu"), grpo.PROMPTS + grpo.HELD_OUT)

    def score_of(weights):
        return grpo.evaluate({"constants": vars(c), "model": weights, "models": models})

    before = score_of(writer.state_dict())
    weights, seconds, prompts = train_our_writer(c)
    results = {"ours": (score_of(weights), seconds)}
    weights, seconds = train_their_writer(c, prompts)
    results["TRL"] = (score_of(weights), seconds)
    start = f"{before['score']:.3f} (standard error {before['error']:.3f}) before"
    for name, (after, seconds) in results.items():
        end = f"{after['score']:.3f} ({after['error']:.3f}) after {num_steps} steps"
        print(f"{name}: reward {start}, {end}, {statistics.median(seconds):.2f} s per step")


def main(argv=()):
    parser = Parser("-m benchmarks.peers", __doc__)
    tasks = ("lunarlander", "space_invaders", "grpo")
    parser.add_argument("what", choices=tasks, metavar="TASK", help=", ".join(tasks))
    parser.add_argument("--seed", type=within("[0, 2_147_483_647]"), default=0, help="default 0")
    length = "of LunarLander (default 1000000), or of GRPO (default 50)"
    parser.add_argument("--num_steps", type=within("[1, inf)"), help=length)
    parser.add_argument("--turns", type=within("[1, inf)"), default=5, help="of Space Invaders (default 5)")
    parser.add_argument("--float32", action="store_true", help="of Space Invaders and GRPO: no bfloat16")
    parser.add_argument(
        "--model", default=grpo.POLICY_MODEL, help=f"of GRPO, as grpo_text takes it (default {grpo.POLICY_MODEL})"
    )
    args = parser.parse_args(argv)
    if args.what == "lunarlander":
        lunarlander(args.seed, args.num_steps or 1_000_000)
    elif args.what == "grpo":
        writers(args.seed, args.num_steps or 50, args.model, not args.float32)
    else:
        space_invaders(args.seed, args.turns, not args.float32)


if __name__ == "__main__":
    run_script(main, "-m benchmarks.peers")
