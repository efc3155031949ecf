"""Actor-critic on random states, configured by a JSON file:  python -m algorithms.actor_critic [CONFIG]

The smallest setting in which an actor and a critic learn: every state is drawn at random, one action is taken, a reward
model gives its reward, and the episode is over. The critic learns the mean reward in each state, the actor learns to do
better than that; one optimizer serves both networks. The best action of the reward model is known, so the result is
compared with the best that is possible.

CONFIG (config.json by default) is a JSON file. If there is none, it is written with the constants below. DEVICE and
WANDB are no part of it but options, because a run may go on with others.

A run leaves a directory checkpoints_YYYYMMDD_HHMMSS with actor_critic_training.log and, as safetensors, epoch_<n> after
every tenth epoch and final. --evaluate [RUN] prints how good a run is, --play [RUN] what it does in a few states; the
default is the newest run, or else the shipped model. --resume RUN continues a run, on the CPU bit for bit. RUN is such
a directory, or a checkpoint in it.
"""

import harness.start  # before the slow imports

import json
import math
import os
import signal
import sys
import time
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from algorithms.parts.packages import ALGORITHMS
from algorithms.parts.playing import check_algorithm
from callbacks import Callback, WeightsAndBiases
from harness.checkpoint import (
    SUFFIX,
    CheckpointError,
    check_like,
    find_checkpoint,
    load_checkpoint,
    load_optimizer,
    save_checkpoint,
    to_plain,
)
from harness.device import RANKS, choose_device
from harness.files import atomic_write
from harness.messages import one_line, quoted, shortened, shown, tell
from harness.options import CommandLineError, Constants, Parser, check_at_most, given_path
from harness.runs import check_wandb, delete_unfinished, locked, program_command
from harness.supervise import check_free_memory, ignore_signals, interrupt, run_script, signals_handled
from ppo import policy_loss, value_loss
from trainer import check_finite

# ---------------------------------------------------------------------------------------------------------------------
# the defaults of config.json, which has these names in lower case, except DEVICE and WANDB
INPUT_DIM = 10  # [1, 4096] numbers in a state
OUTPUT_DIM = 2  # [2, 4096] actions to choose from, at most INPUT_DIM
HIDDEN_DIM = 256  # [1, 65536] units in the hidden layer of each of the two networks
LEARNING_RATE = 1e-4  # (0.0, 1.0] learning rate of Adam, for both networks
BATCH_SIZE = 32  # [2, inf) states in a gradient step
NUM_EPOCHS = 100  # [1, inf) epochs of 200 gradient steps each
SEED = 42  # [0, 2_147_483_647] for the weights, the reward model and the states
DEVICE: str = "cpu"  # of the networks, also "cuda" or "auto"; a GPU is slower with networks this small
WANDB: str = ""  # a project of Weights & Biases to log to as well; "" for none
# ---------------------------------------------------------------------------------------------------------------------

CONSTANTS = Constants(globals())
CONFIGURED = [name for name in CONSTANTS if name not in ("DEVICE", "WANDB")]
Config = namedtuple("Config", map(str.lower, CONFIGURED), defaults=[CONSTANTS[name] for name in CONFIGURED])
SHIPPED = ALGORITHMS / "pretrained" / f"actor_critic{SUFFIX}"
LOG = "actor_critic_training.log"
FINAL = f"final{SUFFIX}"
STEPS_PER_EPOCH = 200
SAVE_FREQ = 10  # epochs
TEST_STATES = 100_000  # of an evaluation
NAME = "actor_critic"
EPOCH_LINE = "epoch {}: reward {episode_return:.4f}, actor loss {actor_loss:.4f}, critic loss {critic_loss:.4f}"


def read_config(path):
    """Read the `Config` in a JSON file, which is written with the defaults if there is none.

    Raises CommandLineError for a file that is not such a configuration.
    """
    path = Path(path)
    if path.is_dir():
        raise CommandLineError(f"{path} is a directory; name a JSON file")
    if not path.exists():
        atomic_write(path, (json.dumps(Config()._asdict(), indent=2) + "\n").encode())
        print(f"wrote {path} with the defaults")
    try:
        values = json.loads(path.read_bytes())  # in any UTF, as some editors of Windows save it
    except (ValueError, RecursionError, OSError) as error:
        raise CommandLineError(f"{path}: cannot be read as JSON ({error}); delete it for the defaults") from None
    return check_config(values, path)


def check_config(values, path):
    """The `Config` with these values from the file `path`. Raises CommandLineError for a wrong name or value."""
    if not isinstance(values, dict):
        raise CommandLineError(f'{path}: must hold an object, as {{"seed": 1}}; delete it for the defaults')
    for name, value in values.items():
        if name not in Config._fields:
            keys = ", ".join(Config._fields)
            raise CommandLineError(f"{path}: unknown key {shortened(repr(name))}; the keys are {keys}")
        problem = CONSTANTS.problem(name.upper(), value)
        if problem:
            raise CommandLineError(f"{path}: {name} {problem}")
    config = Config(**values)
    try:
        check_at_most("output_dim", config.output_dim, "input_dim", config.input_dim)
    except CommandLineError as error:
        raise CommandLineError(f"{path}: {error}") from None
    return config


def check_memory(config, device):
    """Raises CommandLineError for networks and batches that do not fit into the device's memory."""
    number = 4  # bytes of a float32
    # Two networks, before and after the ReLU.
    activations = 2 * 2 * config.batch_size * config.hidden_dim * number
    states = config.batch_size * (config.input_dim + config.output_dim) * number
    # Each weight has a gradient and the two moments of Adam.
    weights = 4 * config.hidden_dim * (2 * config.input_dim + config.output_dim) * number
    if weights > activations + states:
        lower = "hidden_dim"
    elif states > activations:
        lower = "batch_size"
    else:
        lower = "batch_size or hidden_dim"
    check_free_memory(activations + states + weights, device, "this training", f"lower {lower}")


# --- what learns ------------------------------------------------------------------------------------------------------


class PolicyNetwork(nn.Module):
    """Computes log-probabilities of the actions (B, output_dim) from states (B, input_dim)."""

    def __init__(self, config):
        super().__init__()
        self.layers = mlp(config.input_dim, config.hidden_dim, config.output_dim)

    def forward(self, states):
        return F.log_softmax(self.layers(states), dim=-1)


class ValueNetwork(nn.Module):
    """Estimates the expected reward (B,) from states (B, input_dim)."""

    def __init__(self, config):
        super().__init__()
        self.layers = mlp(config.input_dim, config.hidden_dim, 1)

    def forward(self, states):
        return self.layers(states).squeeze(-1)


def mlp(inputs, hidden, outputs):
    """A network with one hidden layer."""
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, outputs))


class RewardModel:
    """Gives the reward of each action, (B, output_dim), in states (B, input_dim).

    Each action has a direction, and its reward is how far the state points in that direction. The directions are
    orthonormal, so the rewards of k actions are independent and standard normal. The mean reward of the best action is
    then the expected maximum of k standard normal numbers, and that of a random action is 0.
    """

    def __init__(self, config, generator, device):
        columns, _ = torch.linalg.qr(torch.randn(config.input_dim, config.output_dim, generator=generator))
        self.directions = columns.T.contiguous().to(device)  # (output_dim, input_dim)

    def __call__(self, states):
        return states @ self.directions.T


def expected_maximum(k):
    """The expected maximum of k independent standard normal numbers, 1 / sqrt(pi) for two.

    It is the integral of x k phi(x) Phi(x)^(k - 1), with the density phi and the distribution function Phi.
    """
    x = np.linspace(-12, 12, 100_001)
    density = np.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)
    distribution = torch.special.ndtr(torch.from_numpy(x)).numpy()
    return float(np.trapezoid(x * k * density * distribution ** (k - 1), x))


class ActorCriticAgent:
    """Both networks, their optimizer, and the random numbers of the training.

    The random numbers are drawn on the CPU, so that a seed gives the same states on every device.
    """

    def __init__(self, config, device="cpu"):
        torch.manual_seed(config.seed)
        self.config = config
        self.device = device
        self.epoch = 0
        self.policy = PolicyNetwork(config).to(device)
        self.value = ValueNetwork(config).to(device)
        parameters = [*self.policy.parameters(), *self.value.parameters()]
        self.optimizer = torch.optim.Adam(parameters, lr=config.learning_rate)
        self.generator = torch.Generator().manual_seed(config.seed)
        self.reward_model = RewardModel(config, self.generator, device)

    @torch.enable_grad()  # a notebook may have switched gradients off
    def update(self):
        """One gradient step on a batch of random states.

        Returns the mean reward, the actor's loss and the critic's loss. Raises FloatingPointError if it diverges.
        """
        when = f"in epoch {self.epoch + 1}"
        states = torch.randn(self.config.batch_size, self.config.input_dim, generator=self.generator).to(self.device)
        all_logprobs = self.policy(states)
        values = self.value(states)
        check_finite(when, logits=all_logprobs)
        probabilities = all_logprobs.detach().exp().cpu()
        actions = torch.multinomial(probabilities, 1, generator=self.generator).to(self.device)
        rewards = self.reward_model(states).gather(1, actions).squeeze(1)
        logprobs = all_logprobs.gather(1, actions).squeeze(1)
        advantages = rewards - values.detach()
        # At a ratio of 1 the gradient of PPO's loss is that of the plain actor-critic.
        actor_loss, _ = policy_loss(logprobs, logprobs.detach(), advantages, eps_clip=1.0)
        critic_loss, _ = value_loss(values, values.detach(), rewards)
        loss = actor_loss + critic_loss
        check_finite(when, rewards=rewards, values=values, loss=loss)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return rewards.mean().item(), actor_loss.item(), critic_loss.item()

    @torch.no_grad()
    def regret(self, seed=10**6):
        """How much less than the best action the policy gets on average, in states that no training draws."""
        states = torch.randn(TEST_STATES, self.config.input_dim, generator=torch.Generator().manual_seed(seed))
        total = 0.0
        for batch in states.split(1000):  # all at once would not fit into memory if the layers are wide
            batch = batch.to(self.device)
            rewards = self.reward_model(batch)
            expected = (self.policy(batch).exp() * rewards).sum(1)
            total += (rewards.amax(1) - expected).sum().item()
        return total / TEST_STATES

    def evaluate(self):
        """The expected reward of the policy, that of the best possible one, and the ratio of the two."""
        optimum = expected_maximum(self.config.output_dim)
        score = optimum - self.regret()
        return {"score": score, "optimum": optimum, "share": score / optimum}

    def state_dict(self):
        """Everything that a resumed run needs."""
        return to_plain(
            {
                "algorithm": NAME,
                "config": self.config._asdict(),
                "epoch": self.epoch,
                "policy": self.policy.state_dict(),
                "value": self.value.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "generator": self.generator.get_state(),
                "directions": self.reward_model.directions,  # saved, because another version of LAPACK may find others
            }
        )

    def load_state_dict(self, state):
        """Go on bit for bit where `state_dict` was taken. Raises ValueError for a state that does not fit."""
        own = self.state_dict()
        del own["optimizer"]  # `load_optimizer` checks it
        check_like(state, own)
        self.policy.load_state_dict(state["policy"])
        self.value.load_state_dict(state["value"])
        load_optimizer(self.optimizer, state["optimizer"])
        self.generator.set_state(state["generator"])
        self.reward_model.directions = state["directions"].to(self.device)
        self.epoch = state["epoch"]


def load_agent(path, device="cpu"):
    """The agent in a checkpoint, on this device. Raises CheckpointError."""
    state = load_checkpoint(path)
    check_algorithm(NAME, state, path)
    config = check_config(state.get("config"), path)
    try:
        # Compare the shapes before networks are built that may be far too large.
        with torch.device("meta"):
            networks = {"policy": PolicyNetwork(config), "value": ValueNetwork(config)}
        check_like(state, {name: network.state_dict() for name, network in networks.items()})
        agent = ActorCriticAgent(config, device)
        agent.load_state_dict(state)
    except (RuntimeError, ValueError) as error:  # a bad state of a generator is a RuntimeError
        raise CheckpointError(f"{path}: does not fit this program ({one_line(error)}); train anew") from None
    return agent


# --- a run ------------------------------------------------------------------------------------------------------------


def load_run(path, device):
    """The agent in a checkpoint that is to be resumed. Raises CheckpointError for a checkpoint outside its run.

    A resumed run replaces files in the directory of its checkpoint, so they must be its own: the log has the
    configuration of the run. If there is no log, because the disk was full, the name final has to be enough.
    """
    agent = load_agent(path, device)
    log = path.with_name(LOG)
    if log.is_file():
        in_its_run = json.dumps(agent.config._asdict()) in log.read_text(encoding="utf-8", errors="replace")
    else:
        in_its_run = path.name == FINAL
    if not in_its_run:
        reason = f"lies outside its run (no {LOG} beside it tells of it)"
        raise CheckpointError(f"{path}: {reason}; resume it in its run's directory")
    return agent


def new_directory(parent):
    """Make checkpoints_YYYYMMDD_HHMMSS, with a number appended if a run began in the same second."""
    stem = time.strftime("checkpoints_%Y%m%d_%H%M%S")
    for attempt in range(1, 100):
        directory = Path(parent, stem if attempt == 1 else f"{stem}-{attempt}")
        try:
            directory.mkdir()
            return directory
        except FileExistsError:
            continue
    raise CommandLineError(f"{stem} exists already")


class Log:
    """Prints lines, and appends them to the log of a run. A log that cannot be written does not stop the training.

    The log begins with the configuration, by which `load_run` recognises the run. If somebody removes the directory
    during the training, it is made anew with such a log, so that what is saved there can be resumed.
    """

    def __init__(self, directory, config, device):
        self.path = directory / LOG
        self.title = f"training {json.dumps(config._asdict())} on {device} in {directory}"
        tell(self.title)

    def say(self, line):
        with tqdm.external_write_mode(sys.stderr):  # above the bar
            tell(line)
        lines = [line] if self.path.exists() else [self.title, line]
        try:
            keep(self.path.parent)
            with open(self.path, "a", encoding="utf-8", errors="backslashreplace") as file:
                for text in lines:
                    file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
        except OSError:
            tell(f"warning: {self.path}: not written; training goes on")


def keep(directory):
    """Make the directory of a run anew if somebody has renamed or removed it during the training."""
    if not directory.exists():
        tell(f"warning: {directory} was renamed or removed; it is made anew, and training goes on")
        directory.mkdir(parents=True)


def train(agent, directory, wandb=""):
    """Train to the last epoch; a signal ends the training after the last whole one. Returns the exit status.

    wandb: a project of Weights & Biases, or "".
    """
    callback = WeightsAndBiases(wandb, directory) if wandb else Callback()
    try:
        with locked(directory), signals_handled(interrupt):
            delete_unfinished(directory)
            train_epochs(agent, directory, callback)
    except KeyboardInterrupt as stopped:
        return 128 + (stopped.args or [signal.SIGINT])[0]
    finally:
        callback.hear("close")
    return 0


def train_epochs(agent, directory, callback):
    """Train the remaining epochs, and save the last whole one even if an exception ends the training."""
    config = agent.config
    start = time.monotonic()
    run_id = f"{directory.name}-{config.seed}"
    progress = SimpleNamespace(metadata={"run_id": run_id, "constants": config._asdict()})  # as callbacks see it
    command = program_command(f"-m algorithms.{NAME}")
    log = Log(directory, config, agent.device)
    last_epoch = agent.state_dict()
    diverged = False
    steps = STEPS_PER_EPOCH * config.num_epochs
    bar = tqdm(total=steps, initial=STEPS_PER_EPOCH * agent.epoch, unit=" steps", leave=False, disable=None)
    try:
        callback.hear("on_training_start", progress)
        while agent.epoch < config.num_epochs:
            progress.stats = train_epoch(agent, bar)
            last_epoch = agent.state_dict()
            log.say(EPOCH_LINE.format(agent.epoch, **progress.stats))
            progress.update_count = agent.epoch
            progress.global_step = STEPS_PER_EPOCH * agent.epoch
            progress.seconds = time.monotonic() - start
            callback.hear("on_update_end", progress)
            if agent.epoch % SAVE_FREQ == 0:
                try:
                    save_checkpoint(directory / f"epoch_{agent.epoch}{SUFFIX}", last_epoch)
                except CheckpointError as error:
                    log.say(f"warning: {error}; training goes on")
    except FloatingPointError:
        diverged = True  # a resumed run would diverge again
        raise
    finally:
        ignore_signals()  # the run is not saved yet, and this does not take long
        bar.close()
        keep(directory)
        save_checkpoint(directory / FINAL, last_epoch)
        if agent.epoch == config.num_epochs and not diverged:
            evaluation = agent.evaluate()
            log.say("expected reward {score:.4f} of {optimum:.4f}, {share:.2%}".format(**evaluation))
            progress.evaluated = {"global_step": steps, "evaluation": evaluation}
            callback.hear("on_evaluation_end", progress)
            log.say(f"wrote {directory / FINAL}; score it again: {command} --evaluate {quoted(directory)}")
        elif not diverged:
            log.say(f"stopped; go on with: {command} --resume {quoted(directory)}")


def train_epoch(agent, bar):
    """Train one epoch. Returns the means of its statistics; raises FloatingPointError if the training diverges."""
    steps = []
    for _ in range(STEPS_PER_EPOCH):
        steps.append(agent.update())
        bar.update()
    reward, actor_loss, critic_loss = np.mean(steps, axis=0)
    agent.epoch += 1
    for weights in (*agent.policy.parameters(), *agent.value.parameters()):
        check_finite(f"after epoch {agent.epoch}", weights=weights)
    return {"episode_return": reward, "actor_loss": actor_loss, "critic_loss": critic_loss}


def main(argv=()):
    """Train, resume, play or evaluate. Returns the exit status."""
    names = [f"{name.lower():15}{CONSTANTS.explanation(name)}" for name in CONFIGURED]
    doc = "\n".join([__doc__ or "", "The names in CONFIG:\n", *names])
    parser = Parser(f"-m algorithms.{NAME}", doc)
    config_help = "a JSON file (default: config.json)"
    parser.add_argument("config", nargs="?", type=given_path, metavar="CONFIG", help=config_help)
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("--resume", type=given_path, metavar="RUN", help="a run's directory, or a checkpoint in it")
    where = "where the run's directory is made (default: here)"
    parser.add_argument("--directory", type=given_path, default=".", metavar="FOLDER", help=where)
    parser.add_argument("--device", default=DEVICE, metavar="TEXT", help=CONSTANTS.explanation("DEVICE"))
    parser.add_argument("--wandb", default=WANDB, metavar="TEXT", help=CONSTANTS.explanation("WANDB"))
    modes.add_argument("--evaluate", type=given_path, nargs="?", const=False, metavar="RUN", help="print its score")
    modes.add_argument("--play", type=given_path, nargs="?", const=False, metavar="RUN", help="show what it does")
    for word in map(str, argv):
        if word.startswith("--") and word[2:].split("=")[0] in Config._fields:
            raise CommandLineError(f'{word} is no option; it belongs in CONFIG, a JSON file such as {{"seed": 1}}')
    args = parser.parse_args(argv)
    if RANKS > 1:
        raise CommandLineError("runs in one process, without torchrun")
    new = args.resume is args.evaluate is args.play is None
    if args.config and not new:
        raise CommandLineError(f"a run keeps its own constants; leave out {args.config}")
    torch.set_num_threads(1)  # small networks
    device = choose_device(args.device)
    if args.evaluate is not None:
        print(json.dumps(model_of(args.evaluate, args.directory, device).evaluate()))
        return 0
    if args.play is not None:
        return play(model_of(args.play, args.directory, device))
    check_wandb(args.wandb)
    if args.resume is not None:
        return resume(args.resume, device, args.wandb)
    config = read_config(args.config or "config.json")
    check_memory(config, device)
    return train(ActorCriticAgent(config, device), new_directory(args.directory), args.wandb)


def model_of(run, parent, device):
    """Return the agent of a run or checkpoint, or if `run` is False, of the newest in `parent`, or the shipped one."""
    runs = sorted(Path(parent).glob(f"checkpoints_*/{FINAL}"), key=os.path.getmtime)
    if run:
        path, why = find_checkpoint(run, (FINAL,)), ""
    elif runs:
        path, why = runs[-1], " (the newest run)"
    else:
        path, why = SHIPPED, " (the shipped model, because there is no run)"
    agent = load_agent(path, device)
    tell(f"{shown(path)}: trained for {agent.epoch:,} epochs{why}")
    return agent


@torch.no_grad()
def play(agent, states=5):
    """Print the most probable action in so many random states, its reward, and the best reward. Returns the status."""
    drawn = torch.randn(states, agent.config.input_dim).to(agent.device)
    chosen_probabilities, chosen = agent.policy(drawn).exp().max(1)
    rewards = agent.reward_model(drawn)
    best_rewards, best = rewards.max(1)
    for i, action in enumerate(chosen.tolist()):
        print(
            f"state {i + 1}: action {action}, with probability {chosen_probabilities[i]:.3f}, has the reward "
            f"{rewards[i, action]:.3f}; action {best[i]} is best, with {best_rewards[i]:.3f}"
        )
    return 0


def resume(run, device, wandb=""):
    """Train a run to its end, from its last checkpoint or from the one that is named. Returns the exit status."""
    path = find_checkpoint(run, (FINAL,))
    agent = load_run(path, device)
    if agent.epoch >= agent.config.num_epochs:
        done = f"{run} has done all of its {agent.epoch} epochs already"
        raise CommandLineError(f"{done}; for more, begin a new run with a larger num_epochs")
    check_memory(agent.config, device)
    return train(agent, path.parent, wandb)


if __name__ == "__main__":
    run_script(main, f"-m algorithms.{NAME}")
