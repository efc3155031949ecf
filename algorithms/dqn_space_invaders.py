"""Double DQN learns Space Invaders from pixels:  python -m algorithms.dqn_space_invaders

A network estimates the discounted return of each action, Q(s, a), and learns from transitions that a replay memory keeps. Its target is
r + gamma Q'(s', argmax Q(s', a)): a frozen copy Q' says what the action is worth that the network itself would take (van Hasselt et al.
2016), so that an overestimated action is not also chosen for it. Any other game of the Arcade Learning Environment: --env_id.

Left out: prioritised replay, duelling heads, n-step returns, distributions. A step is an agent's step: SKIP frames of the game.
"""

import harness.start  # before the slow imports

import math
from collections import deque

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from algorithms.parts.atari import SIZE, Replay, Stacks, make_env, make_envs, restore_game, save_game
from algorithms.parts.playing import summary
from algorithms.parts.training import Algorithm, run_algorithm
from harness.checkpoint import load_optimizer, load_weights, to_numpy
from harness.device import choose_device
from harness.options import CommandLineError, Constants, Values
from harness.supervise import check_free_memory, memory_advice, run_script
from trainer import Trainer, check_finite

# ---------------------------------------------------------------------------------------------------------------------
# game
ENV_ID: str = "ALE/SpaceInvaders-v5"  # any game of the Arcade Learning Environment
ACTIONS: str = ""  # actions that the agent may take, such as "NOOP,RIGHT,LEFT"; "" for all that the game knows
STICKY = 0.25  # [0.0, 0.99] probability that the game repeats the action before instead (Machado et al. 2018)
SKIP = 4  # [1, 100] frames that an action lasts
STACK = 4  # [1, 32] frames, each at the end of an action, that the network sees at once
LIFE_LOSS_ENDS: bool = True  # a lost life ends the return, though not the game
# length
NUM_STEPS = 1_000_000  # [1, inf) actions in all
NUM_ENVS = 6  # [1, 1024] games side by side
UPDATE_STEPS = 3_000  # [1, inf) steps between two rows of metrics.csv, which count as one update
# memory
REPLAY_SIZE = 100_000  # [1, 1_000_000_000] transitions in the replay memory, 7 KB each
MEMORY_FACTOR = 1.0  # (0.0, 1000.0] scales REPLAY_SIZE
BURN_IN = 10_000  # [1, inf) steps before learning starts, not in NUM_STEPS; again after a resume unless KEEP_REPLAY
KEEP_REPLAY: bool = False  # save the memory too, for exact resumes: 700 MB a checkpoint, three times that in RAM
# learning
LR = 2.5e-4  # (0.0, 1.0] learning rate of Adam
GAMMA = 0.99  # [0.0, 1.0] discount per step
BATCH_SIZE = 32  # [1, 65536] transitions in a learning step
LEARN_EVERY = 3  # [1, inf) steps between two learning steps
SYNC_EVERY = 1_000  # [1, inf) learning steps until the target network is renewed
EPSILON = 1.0  # [0.0, 1.0] share of random actions at the start
EPSILON_END = 0.1  # [0.0, 1.0] share of random actions in the end
EPSILON_DECAY = 0.99998  # [0.0, 1.0] factor per step: 115,000 to the end; with the original's 0.99999975 9.2 million
BF16: bool = True  # compute all but the last layer in bfloat16, where the processor supports it
# run
SEED = 0  # [0, 2_147_483_647] for the initial weights, the games, the actions and the replay
DEVICE: str = "auto"  # "cuda" or "mps" if it works, else "cpu"
RUN_DIR: str = ""  # directory of the run; "" for runs/dqn_space_invaders/<date-time>
EVAL_INTERVAL = 33  # [0, inf) updates between two evaluations; never if 0
SAVE_FREQ = 67  # [1, inf) updates between two checkpoints; 67 updates are 200,000 steps
# ---------------------------------------------------------------------------------------------------------------------

CONSTANTS = Constants(globals())
KEPT = "ENV_ID ACTIONS STICKY SKIP STACK NUM_ENVS REPLAY_SIZE MEMORY_FACTOR KEEP_REPLAY SEED RUN_DIR".split()
EVAL_EPSILON = 0.01  # share of random actions in an evaluation

# --- what learns ------------------------------------------------------------------------------------------------------


class QNetwork(nn.Module):
    """The network of Mnih et al. 2015: stacks of frames (B, STACK, 84, 84) uint8 -> action values (B, A) float32."""

    def __init__(self, stack, num_actions, bf16=False):
        super().__init__()
        self.bf16 = bf16
        self.features = nn.Sequential(
            nn.Conv2d(stack, 32, 8, 4),
            nn.ReLU(),  # (B, 32, 20, 20)
            nn.Conv2d(32, 64, 4, 2),
            nn.ReLU(),  # (B, 64, 9, 9)
            nn.Conv2d(64, 64, 3),
            nn.ReLU(),
            nn.Flatten(),  # (B, 64 * 7 * 7)
            nn.Linear(64 * 7 * 7, 512),
            nn.ReLU(),
        )
        self.head = nn.Linear(512, num_actions)

    def forward(self, frames):
        with torch.autocast(frames.device.type, torch.bfloat16, enabled=self.bf16):
            features = self.features(frames.float() / 255)
        return self.head(features.float())  # not in bfloat16: values near 5 would differ by 1/32 at least

    @torch.no_grad()
    def greedy(self, frames):
        """An array of stacks -> the actions of the highest values, an array (B,)."""
        return self(torch.as_tensor(frames, device=self.head.weight.device)).argmax(1).cpu().numpy()


def has_bf16(device):
    """Does the device multiply bfloat16 faster than float32?"""
    if device.type == "cpu":
        return getattr(torch.cpu, "get_capabilities", dict)().get("avx512_bf16", False)
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def double_dqn_targets(rewards, next_values, frozen_next_values, ends, gamma):
    """Van Hasselt et al. 2016, equation 4: values (B, A) of the next states, rewards and ends (B,) -> (B,)."""
    best = next_values.argmax(1, keepdim=True)
    return rewards + gamma * (1 - ends) * frozen_next_values.gather(1, best).squeeze(1)


class DQN(Trainer):
    """Acts in N games, keeps what happens, learns from what it kept."""

    def __init__(self, c, device, metadata):
        torch.manual_seed(c.SEED)
        self.envs = make_envs(c, c.NUM_ENVS)
        bf16, num_actions = c.BF16 and has_bf16(device), int(self.envs.single_action_space.n)
        super().__init__(QNetwork(c.STACK, num_actions, bf16).to(device), metadata=metadata)
        self.c, self.device, self.num_steps = c, device, c.NUM_STEPS
        self.frozen = QNetwork(c.STACK, num_actions, bf16).to(device).requires_grad_(False)
        self.frozen.load_state_dict(self.policy.state_dict())
        # a large eps: where gradients are tiny, Adam would amplify noise (Hessel et al. 2018)
        self.optimizer = torch.optim.Adam(self.policy.parameters(), c.LR, eps=1.5e-4, fused=True)
        self.rng = np.random.default_rng(c.SEED)
        with memory_advice("a replay memory of this size does not fit into memory; lower --replay_size in a new run"):
            self.replay = Replay(round(c.REPLAY_SIZE * c.MEMORY_FACTOR), c.NUM_ENVS, c.STACK)
        frames, infos = self.envs.reset(seed=c.SEED)
        self.stacks, self.first = Stacks(frames, c.STACK), np.ones(c.NUM_ENVS, bool)
        self.lives = infos["lives"]
        self.return_so_far, self.episode_returns = np.zeros(c.NUM_ENVS), deque(maxlen=100)
        self.learned = 0  # learning steps so far
        self.due = 0  # environment steps that no learning step has answered yet

    @property
    def epsilon(self):
        return max(self.c.EPSILON * self.c.EPSILON_DECAY**self.global_step, self.c.EPSILON_END)

    def collect_and_update(self):
        """UPDATE_STEPS steps, and the learning steps that they call for -> statistics."""
        while self.replay.added * self.c.NUM_ENVS < self.c.BURN_IN or not len(self.replay):
            self.check_stop()
            self.act()
        losses, values, last = [], [], self.global_step + self.c.UPDATE_STEPS
        while self.global_step < min(last, self.num_steps):
            self.check_stop()
            self.act()
            self.global_step += self.c.NUM_ENVS
            self.due += self.c.NUM_ENVS
            while self.due >= self.c.LEARN_EVERY:
                self.due -= self.c.LEARN_EVERY
                loss, value = self.learning_step()
                losses.append(loss)
                values.append(value)
        self.update_count += 1
        loss, value = (torch.stack(x).mean().item() if x else math.nan for x in (losses, values))
        if losses:
            check_finite(f"in update {self.update_count}", loss=loss)
        return {
            "loss": loss,
            "value": value,
            "epsilon": self.epsilon,
            "lr": self.c.LR,
            "replay": float(len(self.replay)),
            "episode_return": float(np.mean(self.episode_returns)) if self.episode_returns else math.nan,
        }

    def act(self):
        """One step of every game, into the memory."""
        n = self.c.NUM_ENVS
        actions, at_random = (
            self.rng.integers(self.envs.single_action_space.n, size=n),
            self.rng.random(n) < self.epsilon,
        )
        if not at_random.all():
            actions = np.where(at_random, actions, self.policy.greedy(self.stacks.frames))
        seen = self.stacks.frames[:, -1].copy()
        frames, rewards, terminated, truncated, infos = self.envs.step(actions)
        check_finite(f"in update {self.update_count + 1}", rewards=rewards)
        over = terminated | truncated
        ends = terminated | (self.c.LIFE_LOSS_ENDS & (infos["lives"] < self.lives))
        # rewards are clipped to their sign, so that one learning rate suits all games (Mnih et al. 2015)
        self.replay.add(seen, self.first, actions, np.sign(rewards), ends, truncated & ~terminated)
        self.stacks.push(frames, over)
        self.first, self.lives = over, infos["lives"]
        self.return_so_far += rewards
        self.episode_returns.extend(self.return_so_far[over].tolist())
        self.return_so_far[over] = 0

    def learning_step(self):
        """-> the loss and the mean value of the actions taken, tensors."""
        batch = self.replay.sample(self.c.BATCH_SIZE, self.rng)
        stacks, actions, rewards, next_stacks, ends = (torch.from_numpy(x).to(self.device) for x in batch)
        with torch.no_grad():
            targets = double_dqn_targets(
                rewards, self.policy(next_stacks), self.frozen(next_stacks), ends, self.c.GAMMA
            )
        values = self.policy(stacks).gather(1, actions.unsqueeze(1)).squeeze(1)
        loss = F.smooth_l1_loss(values, targets)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.learned += 1
        if self.learned % self.c.SYNC_EVERY == 0:
            self.frozen.load_state_dict(self.policy.state_dict())
        return loss.detach(), values.detach().mean()

    def state_dict(self):
        """All that `learn` goes on from. Without KEEP_REPLAY, games and memory start anew."""
        state = {
            "frozen": self.frozen.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "learned": self.learned,
            "due": self.due,
            "rng": self.rng.bit_generator.state,
            "episode_returns": list(self.episode_returns),
        }
        if self.c.KEEP_REPLAY:
            state |= {
                "replay": self.replay.state_dict(),
                "stacks": self.stacks.frames,
                "first": self.first,
                "lives": self.lives,
                "return_so_far": self.return_so_far,
                "games": [save_game(env) for env in self.envs.envs],
            }
        return self.training_state(**state)

    def load_state_dict(self, state):
        """Go on where `state_dict` was taken: bit for bit on the CPU if it has the memory."""
        self.load_training_state(state)
        self.frozen.load_state_dict(state["frozen"])
        load_optimizer(self.optimizer, state["optimizer"])
        self.rng.bit_generator.state = state["rng"]
        self.episode_returns = deque(state["episode_returns"], maxlen=100)
        self.learned, self.due = (
            state["learned"],
            min(state["due"], self.c.NUM_ENVS + state["constants"]["LEARN_EVERY"]),
        )
        if "replay" not in state:  # other games than at the start
            frames, infos = self.envs.reset(seed=self.c.SEED + state["global_step"])
            self.stacks, self.lives = Stacks(frames, self.c.STACK), infos["lives"]
        else:
            self.replay.load_state_dict(to_numpy(state["replay"]), self.envs.single_action_space.n)
            self.stacks.frames, self.first, self.lives, self.return_so_far = (
                to_numpy(state[name]) for name in ("stacks", "first", "lives", "return_so_far")
            )
            for env, game in zip(self.envs.envs, state["games"]):
                restore_game(env, to_numpy(game))


# --- playing ----------------------------------------------------------------------------------------------------------


def policy_of(state, num_actions):
    """A policy state -> its network, on the CPU. num_actions: of the game that it is to play."""
    policy = QNetwork(state["constants"]["STACK"], num_actions)
    load_weights(policy, state["model"])
    return policy


def evaluate(state, episodes=30, seed=0):
    """Whole games, to their last life, side by side -> the `summary` of their scores, in the game's own points."""
    c = Values(**state["constants"])
    envs, rng = make_envs(c, min(episodes, 30)), np.random.default_rng(seed)
    policy = policy_of(state, envs.single_action_space.n)
    frames, _ = envs.reset(seed=seed)
    stacks, scores, score = Stacks(frames, c.STACK), [], np.zeros(envs.num_envs)
    games = np.arange(envs.num_envs)  # the first to start count, and not the first to end: those would be short ones
    started = envs.num_envs
    while (games < episodes).any():
        actions, at_random = (
            rng.integers(envs.single_action_space.n, size=envs.num_envs),
            rng.random(envs.num_envs) < EVAL_EPSILON,
        )
        actions = np.where(at_random, actions, policy.greedy(stacks.frames))
        frames, rewards, terminated, truncated, _ = envs.step(actions)
        score += rewards
        over = terminated | truncated
        stacks.push(frames, over)
        for i in np.flatnonzero(over):
            if games[i] < episodes:
                scores.append(score[i])
            games[i], started, score[i] = started, started + 1, 0
    envs.close()
    return summary(scores)


def frames(state, episodes, seed, human):
    """Yields each frame that the game shows."""
    c = Values(**state["constants"])
    env, rng = make_env(c, "human" if human else "rgb_array"), np.random.default_rng(seed)
    policy = policy_of(state, env.action_space.n)
    for episode in range(episodes):
        frame, _ = env.reset(seed=seed + episode)
        stacks, over = Stacks(frame[None], c.STACK), False
        while not over:
            action = (
                rng.integers(env.action_space.n) if rng.random() < EVAL_EPSILON else policy.greedy(stacks.frames)[0]
            )
            frame, _, terminated, truncated, _ = env.step(int(action))
            stacks.push(frame[None], np.zeros(1, bool))
            over = terminated or truncated
            yield env.render()
    env.close()


def build(c):
    copies = 4 if c.KEEP_REPLAY else 1  # those of a checkpoint while it is written
    needed = copies * c.REPLAY_SIZE * c.MEMORY_FACTOR * (SIZE * SIZE + 8)
    kept = "leave --keep_replay out, or lower" if c.KEEP_REPLAY else "lower"
    check_free_memory(needed, torch.device("cpu"), "a replay memory of this size", f"{kept} --replay_size in a new run")
    try:
        return DQN(
            c,
            choose_device(c.DEVICE, ("cuda", "mps", "cpu")),
            {"algorithm": ALGORITHM.name, "constants": dict(vars(c))},
        )
    except ValueError as error:
        raise CommandLineError(error) from None


ALGORITHM = Algorithm(
    "dqn_space_invaders",
    __doc__,
    CONSTANTS,
    KEPT,
    build,
    evaluate,
    frames,
    episodes=30,
    frame_ms=60,
    memory=("BATCH_SIZE",),
)


def main(argv=()):
    return run_algorithm(ALGORITHM, argv)


if __name__ == "__main__":
    run_script(main, "-m algorithms.dqn_space_invaders")
