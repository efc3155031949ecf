"""The trainings of algorithms/ beside Stable-Baselines3's:  python benchmarks/peers.py lunarlander|space_invaders [--seed 0]

lunarlander     minutes and steps until the mean of 30 greedy episodes reaches 200, ours and SB3's PPO with the settings of RL Baselines3
                Zoo; evaluations are not counted in either's time
space_invaders  environment steps per second while learning, ours and SB3's DQN, with the same network, batch, game and learning steps per
                step; alternating, medians; --float32 for ours without bfloat16

Needs pip install stable-baselines3, and algorithms/requirements.txt.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import torch

try:
    import stable_baselines3 as sb3
    from stable_baselines3.common.logger import Logger
    from stable_baselines3.common.vec_env import DummyVecEnv
except ImportError:
    sys.exit("peers.py: needs Stable-Baselines3: pip install stable-baselines3")

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from algorithms import dqn_space_invaders as dqn  # noqa: E402
from algorithms import ppo_lunarlander as lander  # noqa: E402
from algorithms.common import greedy_returns  # noqa: E402
from callbacks import Callback  # noqa: E402
from command_line import raise_error, run_script  # noqa: E402

EVERY, SOLVED = 81_920, 200.0  # steps between two evaluations; points
STEPS = 1_500  # of a turn
quiet = Logger(folder=None, output_formats=[])


# LunarLander


def score(greedy):
    """greedy: observations (N, 8) -> actions (N,). -> the mean return of 30 fresh episodes."""
    return float(np.mean(greedy_returns(lander.make_env, greedy, 30, 1_000_000)))


def ours_on_the_moon(seed, num_steps):
    """Yields steps, seconds, score."""
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


def theirs_on_the_moon(seed, num_steps):
    found, model = [], sb3.PPO(
        "MlpPolicy", DummyVecEnv([lander.make_env] * 16), n_steps=1024, batch_size=64, gae_lambda=0.98, gamma=0.999, n_epochs=4,
        ent_coef=0.01, seed=seed, device="cpu",
    )  # fmt: skip
    model.set_logger(quiet)
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
    torch.set_num_threads(1)
    for name, train in (("ours", ours_on_the_moon), ("SB3", theirs_on_the_moon)):
        found = train(seed, num_steps)
        solved = next(((steps, seconds) for steps, seconds, mean in found if mean >= SOLVED), None)
        when = f"{solved[0]:,} steps, {solved[1] / 60:.2f} minutes" if solved else "never"
        print(f"{name}: {SOLVED:g} points after {when}; last {found[-1][2]:.1f} after {found[-1][1] / 60:.2f} minutes")


# Space Invaders



def space_invaders(seed, turns, bf16):
    """One turn of each, again and again: the games go on where they were."""
    constants = {**dqn.CONSTANTS, "SEED": seed, "REPLAY_SIZE": 10_000, "EPSILON": 0.1, "DEVICE": "cpu", "BF16": bf16}
    c = SimpleNamespace(**constants)
    ours = dqn.build(c)
    while not len(ours.replay) or ours.replay.added * c.NUM_ENVS < 600:
        ours.act()
    theirs = sb3.DQN(
        "CnnPolicy", gym.wrappers.FrameStackObservation(dqn.make_env(c), c.STACK), learning_rate=c.LR, buffer_size=10_000, learning_starts=600,
        batch_size=c.BATCH_SIZE, gamma=c.GAMMA, train_freq=c.LEARN_EVERY, gradient_steps=1, target_update_interval=3 * c.SYNC_EVERY,
        exploration_initial_eps=0.1, exploration_final_eps=0.1, seed=seed, device="cpu",
    )  # fmt: skip
    theirs.set_logger(quiet)
    theirs.learn(600, reset_num_timesteps=False)
    c.UPDATE_STEPS, ours.num_steps, rates = STEPS, 10**9, {"ours": [], "SB3": []}
    for turn in range(turns):
        for name, run in (("ours", ours.collect_and_update), ("SB3", lambda: theirs.learn(STEPS, reset_num_timesteps=False))):
            clock = time.perf_counter()
            run()
            rates[name].append(STEPS / (time.perf_counter() - clock))
        print(f"turn {turn + 1}: ours {rates['ours'][-1]:.0f}, SB3 {rates['SB3'][-1]:.0f} steps/s", flush=True)
    ratio = statistics.median(a / b for a, b in zip(*rates.values()))
    medians = [statistics.median(x) for x in rates.values()]
    print(f"{torch.get_num_threads()} threads: ours {medians[0]:.0f}, SB3 {medians[1]:.0f} steps/s, ratio {ratio:.2f}")


def main(argv=None):
    parser = argparse.ArgumentParser(prog="peers.py", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("what", choices=("lunarlander", "space_invaders"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num_steps", type=int, default=1_000_000, help="of LunarLander (default 1000000)")
    parser.add_argument("--turns", type=int, default=5, help="of Space Invaders (default 5)")
    parser.add_argument("--float32", action="store_true")
    parser.error = raise_error
    args = parser.parse_args(argv)
    if args.what == "lunarlander":
        lunarlander(args.seed, args.num_steps)
    else:
        space_invaders(args.seed, args.turns, not args.float32)


if __name__ == "__main__":
    run_script(main, "peers.py")
