"""Double DQN learns Space Invaders from pixels:  python -m algorithms.dqn_space_invaders

A network estimates the discounted return of each action, Q(s, a), and learns from transitions in a replay memory. The
value that it learns is r + gamma Q'(s', argmax Q(s', a)), where Q' is the target network, an earlier copy of it (van
Hasselt et al. 2016). The network chooses the next action and the target network says what it is worth, so that an
action which one of them overestimates is seldom chosen and overestimated at once. The rewards that it learns from are
the signs of the points, and a lost life ends the return (LIFE_LOSS_ENDS), so values are no scores.

Any other game of the Arcade Learning Environment: --env_id.
Left out: prioritised replay, duelling heads, n-step returns, distributions. A step is a step of the agent, SKIP frames.
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
from harness.device import choose_device, has_bf16
from harness.options import CommandLineError, Constants, Values, check_at_most
from harness.supervise import check_free_memory, run_script
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
BURN_IN = 10_000  # [1, inf) steps before learning starts, not in NUM_STEPS; again after a resume unless KEEP_REPLAY
KEEP_REPLAY: bool = False  # save the memory too, for exact resumes: 700 MB a checkpoint, four times that in RAM
# learning
LR = 2.5e-4  # (0.0, 1.0] learning rate of Adam
GAMMA = 0.99  # [0.0, 1.0] discount per step
BATCH_SIZE = 32  # [1, 65536] transitions in a learning step
LEARN_EVERY = 3  # [1, inf) steps between two learning steps
SYNC_EVERY = 1_000  # [1, inf) learning steps until the target network is renewed
EPSILON = 1.0  # [0.0, 1.0] share of random actions at the start
EPSILON_END = 0.1  # [0.0, 1.0] share of random actions in the end
EPSILON_DECAY = 0.99998  # [0.0, 1.0] factor per step: 115,000 steps to EPSILON_END; 9.2 million at 0.99999975
BF16: bool = True  # compute all but the last layer in bfloat16, where the processor supports it
# run
SEED = 0  # [0, 2_147_483_647] for the initial weights, the games, the actions and the replay
DEVICE: str = "auto"  # "cuda" or "mps" if it works, else "cpu"
RUN_DIR: str = ""  # directory of the run; "" for runs/dqn_space_invaders/<date-time>
EVAL_INTERVAL = 33  # [0, inf) updates between two evaluations; never if 0
SAVE_FREQ = 67  # [1, inf) updates between two checkpoints; 67 updates are 200,000 steps
WANDB: str = ""  # a project of Weights & Biases to log to as well; "" for none
# ---------------------------------------------------------------------------------------------------------------------

CONSTANTS = Constants(globals())
KEPT = "ENV_ID ACTIONS STICKY SKIP STACK NUM_ENVS REPLAY_SIZE KEEP_REPLAY SEED RUN_DIR".split()
EVAL_EPSILON = 0.01  # share of random actions in an evaluation
EVAL_ENVS = 30  # games side by side in an evaluation, at most

# --- what learns ------------------------------------------------------------------------------------------------------


class QNetwork(nn.Module):
    """The network of Mnih et al. 2015: computes action values (B, A) from stacks of frames (B, STACK, 84, 84) uint8."""

    def __init__(self, stack, num_actions, bf16=False):
        super().__init__()
        self.bf16 = bf16
        # fmt: off
        self.features = nn.Sequential(
            nn.Conv2d(stack, 32, kernel_size=8, stride=4), nn.ReLU(),  # (B, 32, 20, 20)
            nn.Conv2d(32, 64, kernel_size=4, stride=2), nn.ReLU(),     # (B, 64, 9, 9)
            nn.Conv2d(64, 64, kernel_size=3), nn.ReLU(),               # (B, 64, 7, 7)
            nn.Flatten(),
            nn.Linear(64 * 7 * 7, 512), nn.ReLU(),
        )
        # fmt: on
        self.head = nn.Linear(512, num_actions)

    def forward(self, frames):
        # Frames are channels-last, because convolutions are faster then. Weights are not: fused Adam pairs them with
        # its moments by their place in memory, and a checkpoint holds the moments in the usual order.
        dtype = torch.bfloat16 if self.bf16 else torch.float32
        pixels = frames.to(dtype, memory_format=torch.channels_last) / 255
        with torch.autocast(frames.device.type, torch.bfloat16, enabled=self.bf16):
            features = self.features(pixels)
        return self.head(features.float())  # in float32, because values near 5 have steps of 1/32 in bfloat16

    @torch.no_grad()
    def greedy(self, frames):
        """The actions with the highest values, an array (B,), for an array of stacks."""
        return self(torch.as_tensor(frames, device=self.head.weight.device)).argmax(1).cpu().numpy()


def epsilon_greedy(network, frames, epsilon, rng):
    """Actions (N,) for stacks of frames: random with probability epsilon, otherwise those of the highest values."""
    n = len(frames)
    random_actions = rng.integers(network.head.out_features, size=n)
    at_random = rng.random(n) < epsilon
    if at_random.all():
        return random_actions
    return np.where(at_random, random_actions, network.greedy(frames))


def double_dqn_targets(rewards, next_values, target_next_values, ends, gamma):
    """The targets of double DQN (van Hasselt et al. 2016, equation 4), (B,).

    Args:
        rewards, ends: (B,) float32; ends is 1 where nothing follows.
        next_values: (B, A), what the network says of the next states.
        target_next_values: (B, A), what the target network says of them.
    """
    best = next_values.argmax(1, keepdim=True)
    return rewards + gamma * (1 - ends) * target_next_values.gather(1, best).squeeze(1)


class DQN(Trainer):
    """Plays N games side by side, stores every transition, and learns from a random sample of them."""

    def __init__(self, c, device, metadata):
        torch.manual_seed(c.SEED)
        self.envs = make_envs(c, c.NUM_ENVS)
        num_actions = int(self.envs.single_action_space.n)
        bf16 = c.BF16 and has_bf16(device)
        super().__init__(QNetwork(c.STACK, num_actions, bf16).to(device), metadata=metadata)
        self.c = c
        self.device = device
        self.num_steps = c.NUM_STEPS
        self.target = QNetwork(c.STACK, num_actions, bf16).to(device).requires_grad_(False)
        self.target.load_state_dict(self.policy.state_dict())
        # A large eps, because Adam would amplify noise where gradients are tiny (Hessel et al. 2018).
        self.optimizer = torch.optim.Adam(self.policy.parameters(), c.LR, eps=1.5e-4, fused=True)
        self.rng = np.random.default_rng(c.SEED)
        self.replay = Replay(c.REPLAY_SIZE, c.NUM_ENVS, c.STACK)
        self.learning_steps = 0
        self.steps_since_learning = 0  # environment steps since the last learning step
        self.episode_returns = deque(maxlen=100)
        self.start_games(c.SEED)

    def start_games(self, seed):
        """Begin a new game in each environment."""
        frames, infos = self.envs.reset(seed=seed)
        self.stacks = Stacks(frames, self.c.STACK)
        self.first = np.ones(self.c.NUM_ENVS, bool)  # which frames are the first of a game
        self.lives = infos["lives"]
        self.return_so_far = np.zeros(self.c.NUM_ENVS)

    @property
    def epsilon(self):
        return max(self.c.EPSILON * self.c.EPSILON_DECAY**self.global_step, self.c.EPSILON_END)

    def collect_and_update(self):
        """One update: UPDATE_STEPS steps, and one learning step for every LEARN_EVERY of them. Returns statistics."""
        self.burn_in()
        losses = []
        values = []
        start = self.global_step
        end = min(start + self.c.UPDATE_STEPS, self.num_steps)
        while self.global_step < end:
            self.check_stop()
            self.report("learning", self.global_step - start, end - start)
            self.act()
            self.global_step += self.c.NUM_ENVS
            self.steps_since_learning += self.c.NUM_ENVS
            while self.steps_since_learning >= self.c.LEARN_EVERY:
                self.steps_since_learning -= self.c.LEARN_EVERY
                loss, value = self.learning_step()
                losses.append(loss)
                values.append(value)
        self.update_count += 1
        loss = mean_of(losses)
        if losses:
            check_finite(f"in update {self.update_count}", loss=loss)
        return {
            "loss": loss,
            "value": mean_of(values),
            "epsilon": self.epsilon,
            "lr": self.c.LR,
            "replay": float(len(self.replay)),
            "episode_return": float(np.mean(self.episode_returns)) if self.episode_returns else math.nan,
        }

    def burn_in(self):
        """Play until the memory holds enough to learn from; these steps are not counted."""
        while self.replay.added * self.c.NUM_ENVS < self.c.BURN_IN or not len(self.replay):
            self.check_stop()
            self.report("filling the memory", self.replay.added * self.c.NUM_ENVS, self.c.BURN_IN, preparing=True)
            self.act()

    def act(self):
        """Play one step of every game and store it in the memory."""
        actions = epsilon_greedy(self.policy, self.stacks.frames, self.epsilon, self.rng)
        seen = self.stacks.frames[:, -1].copy()
        frames, rewards, terminated, truncated, infos = self.envs.step(actions)
        check_finite(f"in update {self.update_count + 1}", rewards=rewards)
        over = terminated | truncated
        ends = terminated | (self.c.LIFE_LOSS_ENDS & (infos["lives"] < self.lives))
        # Rewards are reduced to their sign, so that one learning rate suits all games (Mnih et al. 2015).
        self.replay.add(seen, self.first, actions, np.sign(rewards), ends, truncated & ~terminated)
        self.stacks.push(frames, over)
        self.first = over
        self.lives = infos["lives"]
        self.return_so_far += rewards
        self.episode_returns.extend(self.return_so_far[over].tolist())
        self.return_so_far[over] = 0

    def learning_step(self):
        """One gradient step on a sample of the memory. Returns the loss and the mean value of its actions."""
        sample = self.replay.sample(self.c.BATCH_SIZE, self.rng)
        stacks, actions, rewards, next_stacks, ends = [torch.from_numpy(x).to(self.device) for x in sample]
        with torch.no_grad():
            next_values = self.policy(next_stacks)
            targets = double_dqn_targets(rewards, next_values, self.target(next_stacks), ends, self.c.GAMMA)
        values = self.policy(stacks).gather(1, actions.unsqueeze(1)).squeeze(1)
        loss = F.smooth_l1_loss(values, targets)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.learning_steps += 1
        if self.learning_steps % self.c.SYNC_EVERY == 0:
            self.target.load_state_dict(self.policy.state_dict())
        return loss.detach(), values.detach().mean()

    def state_dict(self):
        """Everything that a resumed run needs. Without KEEP_REPLAY it begins new games, and fills its memory anew."""
        state = {
            "target": self.target.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "learning_steps": self.learning_steps,
            "steps_since_learning": self.steps_since_learning,
            "rng": self.rng.bit_generator.state,
            "episode_returns": list(self.episode_returns),
        }
        if self.c.KEEP_REPLAY:
            state["replay"] = self.replay.state_dict()
            state["stacks"] = self.stacks.frames
            state["first"] = self.first
            state["lives"] = self.lives
            state["return_so_far"] = self.return_so_far
            state["games"] = [save_game(env) for env in self.envs.envs]
        return self.training_state(**state)

    def load_state_dict(self, state):
        """Go on where `state_dict` was taken: bit for bit on the CPU if the memory was saved."""
        self.load_training_state(state)
        self.target.load_state_dict(state["target"])
        load_optimizer(self.optimizer, state["optimizer"])
        self.rng.bit_generator.state = state["rng"]
        self.episode_returns = deque(state["episode_returns"], maxlen=100)
        self.learning_steps = state["learning_steps"]
        self.steps_since_learning = min(state["steps_since_learning"], self.c.LEARN_EVERY)  # which may be smaller now
        if "replay" not in state:
            self.start_games(self.c.SEED + state["global_step"])  # other games than at the start
            return
        self.replay.load_state_dict(to_numpy(state["replay"]), self.envs.single_action_space.n)
        self.stacks.frames = to_numpy(state["stacks"])
        self.first = to_numpy(state["first"])
        self.lives = to_numpy(state["lives"])
        self.return_so_far = to_numpy(state["return_so_far"])
        for env, game in zip(self.envs.envs, state["games"]):
            restore_game(env, to_numpy(game))


def mean_of(tensors):
    """The mean of some tensors of one number, as a float; nan if there are none."""
    return torch.stack(tensors).mean().item() if tensors else math.nan


def build(c):
    """The trainer that these constants describe. Raises CommandLineError for a memory that is too large or small."""
    copies = 4 if c.KEEP_REPLAY else 1  # saving one takes three more
    needed = copies * c.REPLAY_SIZE * (SIZE * SIZE + 8)
    advice = "lower --replay_size in a new run"
    if c.KEEP_REPLAY:
        advice = f"leave --keep_replay out, or {advice}"
    check_free_memory(needed, torch.device("cpu"), "a replay memory of this size", advice)
    device = choose_device(c.DEVICE, ("cuda", "mps", "cpu"))
    try:
        return DQN(c, device, {"algorithm": ALGORITHM.name, "constants": dict(vars(c))})
    except ValueError as error:
        raise CommandLineError(error) from None


def check(c):
    """Raises CommandLineError for constants that do not fit together."""
    check_at_most("EPSILON_END", c.EPSILON_END, "EPSILON", c.EPSILON)


# --- playing ----------------------------------------------------------------------------------------------------------


def policy_of(state, num_actions):
    """The network in what `Trainer.policy_state` returned, on the CPU, for a game with so many actions."""
    policy = QNetwork(state["constants"]["STACK"], num_actions)
    load_weights(policy, state["model"])
    return policy


def evaluate(state, episodes=30, seed=0, report=None):
    """Play whole games to their last life, side by side. Returns the `summary` of their scores in the game's points.

    report: as `games_bar` says.
    """
    c = Values(**state["constants"])
    envs = make_envs(c, min(episodes, EVAL_ENVS))
    rng = np.random.default_rng(seed)
    policy = policy_of(state, envs.single_action_space.n)
    frames, _ = envs.reset(seed=seed)
    stacks = Stacks(frames, c.STACK)
    score_so_far = np.zeros(envs.num_envs)
    scores = []
    # The games that begin first count. If those that end first did, they would be the short ones.
    games = np.arange(envs.num_envs)  # the number of the game that each env plays
    started = envs.num_envs
    steps = 0
    while (games < episodes).any():
        actions = epsilon_greedy(policy, stacks.frames, EVAL_EPSILON, rng)
        frames, rewards, terminated, truncated, _ = envs.step(actions)
        score_so_far += rewards
        over = terminated | truncated
        stacks.push(frames, over)
        for i in np.flatnonzero(over):
            if games[i] < episodes:
                scores.append(score_so_far[i])
            games[i] = started
            started += 1
            score_so_far[i] = 0
        steps += 1
        if report is not None:
            report(len(scores), steps)
    envs.close()
    return summary(scores)


def frames(state, episodes, seed, human):
    """Yield the frames of whole games; `human` shows them in a window."""
    c = Values(**state["constants"])
    env = make_env(c, "human" if human else "rgb_array")
    rng = np.random.default_rng(seed)
    policy = policy_of(state, env.action_space.n)
    for episode in range(episodes):
        frame, _ = env.reset(seed=seed + episode)
        stacks = Stacks(frame[None], c.STACK)
        over = False
        while not over:
            action = epsilon_greedy(policy, stacks.frames, EVAL_EPSILON, rng)[0]
            frame, _, terminated, truncated, _ = env.step(int(action))
            stacks.push(frame[None], np.zeros(1, bool))
            over = terminated or truncated
            yield env.render()
    env.close()


ALGORITHM = Algorithm(
    name="dqn_space_invaders",
    doc=__doc__,
    constants=CONSTANTS,
    kept=KEPT,
    build=build,
    check=check,
    evaluate=evaluate,
    frames=frames,
    episodes=30,
    frame_ms=60,
    memory_constants=("BATCH_SIZE",),
)


def main(argv=()):
    """Train, play or evaluate. Returns the exit status."""
    return run_algorithm(ALGORITHM, argv)


if __name__ == "__main__":
    run_script(main, "-m algorithms.dqn_space_invaders")
