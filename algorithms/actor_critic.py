"""Actor-critic on random states, configured by a JSON file:  python -m algorithms.actor_critic [CONFIG]

The smallest setting in which an actor and a critic learn: every state is drawn at random, one action is taken, a reward model says what
it is worth, and nothing follows. The critic learns what a state is worth on average, the actor to do better than that; one optimizer
serves both networks. The reward model has a known best action, so that learning is measured against what theory says is possible.

CONFIG (default config.json) is written with the defaults if there is none:

    input_dim 10       numbers in a state, independent and standard normal
    output_dim 2       actions, at most input_dim
    hidden_dim 256     units of the one hidden layer of each network
    learning_rate 1e-4 of Adam
    batch_size 32      states in a gradient step
    num_epochs 100     of 200 gradient steps
    seed 42            of states, weights, rewards and actions

A run leaves checkpoints_YYYYMMDD_HHMMSS/ with training.log, epoch_<n>.pt every tenth epoch, and final.pt.
--evaluate [RUN] prints how good it is (default: the shipped model), --resume RUN goes on, bit for bit. RUN is such a directory, or a
checkpoint in it.
"""

import harness.start  # before the slow imports

import json
import math
import sys
import time
from collections import namedtuple
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from algorithms.parts.common import HERE, check_algorithm
from harness.checkpoint import (
    CheckpointError,
    atomic_write,
    check_like,
    find_checkpoint,
    load_checkpoint,
    load_optimizer,
    save_checkpoint,
    to_plain,
)
from harness.messages import one_line, shortened, shown, tell
from harness.options import CommandLineError, Constants, Parser, given_path
from harness.runs import delete_unfinished, locked, resume_command
from harness.supervise import check_free_memory, ignore_signals, run_script, signals_handled
from ppo import policy_loss, value_loss
from trainer import check_finite

# ---------------------------------------------------------------------------------------------------------------------
# the defaults of config.json, which has these names in lower case
INPUT_DIM = 10  # [1, 4096] numbers in a state
OUTPUT_DIM = 2  # [2, 4096] actions to choose from, at most INPUT_DIM
HIDDEN_DIM = 256  # [1, 65536] units in the hidden layer of each of the two networks
LEARNING_RATE = 1e-4  # (0.0, 1.0] of Adam, for both networks
BATCH_SIZE = 32  # [2, inf) states in a gradient step
NUM_EPOCHS = 100  # [1, inf) epochs of 200 gradient steps each
SEED = 42  # [0, 2_147_483_647] for the weights, the reward model and the states
# ---------------------------------------------------------------------------------------------------------------------

CONSTANTS = Constants(globals())
Config = namedtuple("Config", map(str.lower, CONSTANTS), defaults=CONSTANTS.values())
SHIPPED = HERE / "pretrained" / "actor_critic.pt"
LOG = "training.log"
FINAL = "final.pt"
STEPS_PER_EPOCH = 200
SAVE_FREQ = 10  # epochs
TEST_STATES = 100_000
NAME = "actor_critic"


def read_config(path):
    """A JSON file -> `Config`; written with the defaults if there is none. Raises CommandLineError for what is wrong in it."""
    path = Path(path)
    if path.is_dir():
        raise CommandLineError(f"{path} is a directory; name a JSON file")
    if not path.exists():
        atomic_write(path, (json.dumps(Config()._asdict(), indent=2) + "\n").encode())
        print(f"wrote {path} with the defaults")
    try:
        given = json.loads(path.read_text())
    except (ValueError, RecursionError, OSError) as error:
        raise CommandLineError(f"{path}: cannot be read as JSON ({error}); delete it for the defaults") from None
    return check_config(given, path)


def check_config(given, path):
    """What a file has -> `Config`. Raises CommandLineError for what is wrong in it."""
    if not isinstance(given, dict):
        raise CommandLineError(f'{path}: must hold an object, as {{"seed": 1}}; delete it for the defaults')
    if unknown := [name for name in given if name not in Config._fields]:
        raise CommandLineError(
            f"{path}: unknown key {shortened(repr(unknown[0]))}; the keys are {', '.join(Config._fields)}"
        )
    for name, value in given.items():
        if problem := CONSTANTS.problem(name.upper(), value):
            raise CommandLineError(f"{path}: {name} {problem}")
    config = Config(**given)
    if config.output_dim > config.input_dim:
        raise CommandLineError(f"{path}: output_dim {config.output_dim} must not exceed input_dim {config.input_dim}")
    return config


def check_memory(config):
    """Raises CommandLineError for networks and batches that do not fit into memory."""
    hidden = (
        config.hidden_dim * config.batch_size * 2 * 2 * 4
    )  # of both networks, before and after its ReLU, in float32
    states = config.batch_size * (config.input_dim + config.output_dim) * 4
    weights = config.hidden_dim * (2 * config.input_dim + config.output_dim) * 4 * 4  # with gradients and two moments
    lower = (
        "hidden_dim" if weights > hidden + states else "batch_size" if states > hidden else "batch_size or hidden_dim"
    )
    check_free_memory(hidden + states + weights, torch.device("cpu"), "this training", f"lower {lower}")


class PolicyNetwork(nn.Module):
    """States (B, input_dim) -> log-probabilities of the actions (B, output_dim)."""

    def __init__(self, config):
        super().__init__()
        self.layers = mlp(config.input_dim, config.hidden_dim, config.output_dim)

    def forward(self, states):
        return F.log_softmax(self.layers(states), dim=-1)


class ValueNetwork(nn.Module):
    """States (B, input_dim) -> the expected reward (B,)."""

    def __init__(self, config):
        super().__init__()
        self.layers = mlp(config.input_dim, config.hidden_dim, 1)

    def forward(self, states):
        return self.layers(states).squeeze(-1)


def mlp(inputs, hidden, outputs):
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, outputs))


class RewardModel:
    """Each action has a direction, and its reward is how far the state points that way: states (B, input_dim) -> rewards (B, output_dim).

    The directions are orthonormal, so the rewards of the actions are independent and standard normal, and the best of k of them is worth
    the expected maximum of k standard normal numbers. A random action is worth 0.
    """

    def __init__(self, config, generator):
        self.directions, _ = torch.linalg.qr(torch.randn(config.input_dim, config.output_dim, generator=generator))

    def __call__(self, states):
        return states @ self.directions


def expected_maximum(k):
    """Of k independent standard normal numbers: the integral of x k phi(x) Phi(x)^(k - 1); 1 / sqrt(pi) for two."""
    x = np.linspace(-12, 12, 100_001)
    density = np.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)
    below = torch.special.ndtr(torch.from_numpy(x)).numpy()
    return float(np.trapezoid(x * k * density * below ** (k - 1), x))


class ActorCriticAgent:
    """Both networks, their one optimizer, and the random numbers of the training."""

    def __init__(self, config):
        torch.manual_seed(config.seed)
        self.config, self.epoch = config, 0
        self.policy, self.value = PolicyNetwork(config), ValueNetwork(config)
        self.optimizer = torch.optim.Adam(
            [*self.policy.parameters(), *self.value.parameters()], lr=config.learning_rate
        )
        self.generator = torch.Generator().manual_seed(config.seed)
        self.reward_model = RewardModel(config, self.generator)

    @torch.enable_grad()  # whatever a notebook has set
    def update(self):
        """One gradient step on a batch of random states -> the mean reward and the terms of the loss, floats. Raises FloatingPointError."""
        when = f"in epoch {self.epoch + 1}"
        states = torch.randn(self.config.batch_size, self.config.input_dim, generator=self.generator)
        all_logprobs, values = self.policy(states), self.value(states)
        check_finite(when, logits=all_logprobs)
        actions = torch.multinomial(all_logprobs.detach().exp(), 1, generator=self.generator)
        rewards = self.reward_model(states).gather(1, actions).squeeze(1)
        logprobs = all_logprobs.gather(1, actions).squeeze(1)
        # at a ratio of 1, PPO's loss has the gradient of the plain actor-critic
        actor_loss, _ = policy_loss(logprobs, logprobs.detach(), rewards - values.detach(), eps_clip=1.0)
        critic_loss, _ = value_loss(values, values.detach(), rewards)
        check_finite(when, rewards=rewards, values=values, loss=actor_loss + critic_loss)
        self.optimizer.zero_grad()
        (actor_loss + critic_loss).backward()
        self.optimizer.step()
        return rewards.mean().item(), actor_loss.item(), critic_loss.item()

    @torch.no_grad()
    def regret(self, seed=10**6):
        """The mean shortfall from the best action of each state, in states that no training draws."""
        states = torch.randn(TEST_STATES, self.config.input_dim, generator=torch.Generator().manual_seed(seed))
        total = 0.0
        for part in states.split(1000):  # wide layers would not fit into memory with all of them
            rewards = self.reward_model(part)
            total += (rewards.amax(1) - (self.policy(part).exp() * rewards).sum(1)).sum().item()
        return total / TEST_STATES

    def evaluate(self):
        """-> the expected reward, the most that there is, and the one as a share of the other."""
        optimum = expected_maximum(self.config.output_dim)
        score = optimum - self.regret()
        return {"score": score, "optimum": optimum, "share": score / optimum}

    def state_dict(self):
        return to_plain(
            {
                "algorithm": NAME,
                "config": self.config._asdict(),
                "epoch": self.epoch,
                "policy": self.policy.state_dict(),
                "value": self.value.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "generator": self.generator.get_state(),
                "directions": self.reward_model.directions,  # another version of LAPACK could find others
            }
        )

    def load_state_dict(self, state):
        own = self.state_dict()
        del own["optimizer"]  # `load_optimizer` compares it
        check_like(state, own)
        self.policy.load_state_dict(state["policy"])
        self.value.load_state_dict(state["value"])
        load_optimizer(self.optimizer, state["optimizer"])
        self.generator.set_state(state["generator"])
        self.reward_model.directions = state["directions"]
        self.epoch = state["epoch"]


def load_agent(path):
    """A checkpoint -> the agent that it holds. Raises CheckpointError."""
    state = load_checkpoint(path)
    check_algorithm(NAME, state, path)
    config = check_config(state.get("config"), path)
    try:
        with torch.device("meta"):  # before a large one is built
            networks = {"policy": PolicyNetwork(config), "value": ValueNetwork(config)}
        check_like(state, {name: network.state_dict() for name, network in networks.items()})
        agent = ActorCriticAgent(config)
        agent.load_state_dict(state)
    except (RuntimeError, ValueError) as error:  # the former for a generator's state
        raise CheckpointError(f"{path}: does not fit this program ({one_line(error)}); train anew") from None
    return agent


def load_run(path):
    """A checkpoint of a run -> the agent that it holds. Raises CheckpointError if the run whose log lies beside it is another."""
    agent = load_agent(path)
    log = path.with_name(LOG)
    known = (
        json.dumps(agent.config._asdict()) in log.read_text(errors="replace") if log.is_file() else path.name == FINAL
    )
    if not known:
        raise CheckpointError(
            f"{path}: lies outside its run (no {LOG} beside it tells of it); resume it in its run's directory"
        )
    return agent


def new_directory(parent):
    """Makes checkpoints_YYYYMMDD_HHMMSS, with a number behind it if another run has just begun."""
    stem = time.strftime("checkpoints_%Y%m%d_%H%M%S")
    for attempt in range(1, 100):
        try:
            directory = Path(parent, stem if attempt == 1 else f"{stem}-{attempt}")
            directory.mkdir()
            return directory
        except FileExistsError:
            pass
    raise CommandLineError(f"{stem} exists already")


class Log:
    """Prints lines, and writes them into the log of a run. What cannot be written stops no training.

    The log begins with what is trained: by that `load_run` knows the run. If somebody renames or removes the run's directory while it
    trains, it is made anew with such a log, so that what is saved there can be resumed.
    """

    def __init__(self, directory, config):
        self.path, self.begun = directory / LOG, False
        self.title = f"training {json.dumps(config._asdict())} in {directory}"
        tell(self.title)

    def say(self, line):
        tell(line)
        new = not self.path.exists()
        if new and self.begun:
            tell(f"warning: {self.path.parent} was renamed or removed; it is made anew, and training goes on")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a", encoding="utf-8", errors="backslashreplace") as file:
                for text in [self.title, line] if new else [line]:
                    file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
            self.begun = True
        except OSError:
            tell(f"warning: {self.path}: not written; training goes on")


def train(agent, directory):
    """To the end of its epochs -> exit status. A signal to stop saves the last whole epoch, from which a resume goes on."""

    def stop(signum, frame):
        raise SystemExit(128 + signum)  # no Exception: what is under way might catch that

    try:
        with locked(directory), signals_handled(stop):
            delete_unfinished(directory)
            train_epochs(agent, directory)
    except SystemExit as stopped:
        return stopped.code
    return 0


def train_epochs(agent, directory):
    config = agent.config
    log = Log(directory, config)
    whole = agent.state_dict()
    try:
        while agent.epoch < config.num_epochs:
            reward, actor_loss, critic_loss = np.mean([agent.update() for _ in range(STEPS_PER_EPOCH)], axis=0)
            agent.epoch += 1
            for weights in (*agent.policy.parameters(), *agent.value.parameters()):
                check_finite(f"after epoch {agent.epoch}", weights=weights)
            whole = agent.state_dict()
            log.say(
                f"epoch {agent.epoch}: reward {reward:.4f}, actor loss {actor_loss:.4f}, critic loss {critic_loss:.4f}"
            )
            if agent.epoch % SAVE_FREQ == 0:
                try:
                    save_checkpoint(directory / f"epoch_{agent.epoch}.pt", whole)
                except CheckpointError as error:
                    log.say(f"warning: {error}; training goes on")
    finally:
        ignore_signals()  # the end is near, and the run is not saved yet
        directory.mkdir(parents=True, exist_ok=True)  # somebody may have renamed or removed it
        save_checkpoint(directory / FINAL, whole)
        if agent.epoch == config.num_epochs:
            log.say("expected reward {:.4f} of {:.4f}, {:.2%}".format(*agent.evaluate().values()))
        elif not isinstance(sys.exc_info()[1], FloatingPointError):  # it would come again
            log.say(f"stopped; go on with: {resume_command(f'-m algorithms.{NAME}', directory, ranks=1)}")


def main(argv=()):
    parser = Parser(f"-m algorithms.{NAME}", __doc__)
    parser.add_argument("config", nargs="?", type=given_path, default="config.json")
    parser.add_argument("--resume", type=given_path, metavar="RUN", help="a run's directory, or a checkpoint in it")
    parser.add_argument(
        "--directory", type=given_path, default=".", help="where the run's directory is made (default: here)"
    )
    parser.add_argument("--evaluate", type=given_path, nargs="?", const=SHIPPED, metavar="CHECKPOINT")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)  # small networks
    if args.evaluate is not None:
        path = find_checkpoint(args.evaluate, (FINAL,))
        agent = load_agent(path)
        why = " (the shipped model)" if path == SHIPPED else ""
        tell(f"{shown(path)}: trained for {agent.epoch:,} epochs{why}")
        print(json.dumps(agent.evaluate()))
        return 0
    if args.resume is not None:
        path = find_checkpoint(args.resume, (FINAL,))
        agent = load_run(path)
        if agent.epoch >= agent.config.num_epochs:
            raise CommandLineError(f"{args.resume} has done all of its {agent.epoch} epochs already")
        check_memory(agent.config)
        return train(agent, path.parent)
    config = read_config(args.config)
    check_memory(config)
    return train(ActorCriticAgent(config), new_directory(args.directory))


if __name__ == "__main__":
    run_script(main, f"-m algorithms.{NAME}")
