"""An actor-critic learns tic-tac-toe by playing itself:  python -m algorithms.actor_critic_tictactoe

The actor chooses moves, the critic estimates the result of the game, and moves that did better than the critic expected
become more probable. The opponents are frozen copies of earlier policies. They sometimes move at random, so that the
learner meets every position. Who starts is drawn for each game, in training and in play. --play --human plays against
you in the terminal, and shows what the agent thinks of each cell.

Left out: search. The game is small enough to score a policy exactly: `evaluate` walks through every possible game.
"""

import harness.start  # before the slow imports

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from algorithms.parts.tictactoe import (
    O,
    TicTacToe,
    X,
    ask_for_move,
    every_game,
    observations,
    optimal_score,
    over,
    picture,
    print_board,
    results,
)
from algorithms.parts.training import Algorithm, check_lr, run_algorithm
from harness.checkpoint import load_optimizer, load_weights, to_plain
from harness.device import choose_device, set_threads
from harness.options import Constants
from harness.supervise import run_script
from ppo import entropy_loss, learning_rate, policy_loss, value_loss
from rollout_buffer import compute_gae
from trainer import Trainer, check_finite

# ---------------------------------------------------------------------------------------------------------------------
# length
NUM_STEPS = 4_000_000  # [1, inf) moves of the learner in all
GAMES = 256  # [8, 1_000_000] games between two updates, against one opponent; few may all end before the learner moves
# opponents
POOL = 16  # [1, 1000] older selves, one of which is drawn for each update
POOL_INTERVAL = 50  # [1, inf) updates between two additions to the pool, each of which drops the oldest
RANDOM_MOVES = 0.3  # [0.0, 1.0] share of the opponent's moves that are random
OPENINGS = 0.5  # [0.0, 1.0] share of games that start with up to six random moves; evaluation never does
# actor-critic
GAMMA = 1.0  # [0.0, 1.0] discount per move
LAMBD = 0.9  # [0.0, 1.0] lambda of GAE: 0 trusts the critic alone, 1 the returns alone
VALUE_LOSS_COEF = 0.5  # [0.0, inf) weight of half the squared error of the value
ENTROPY_COEF = 0.08  # [0.0, inf) weight of the entropy bonus; high, so that no reply is ruled out before many trials
# optimizer (Adam)
LR = 3e-3  # (0.0, 1.0] learning rate of the first update
MIN_LR = 3e-5  # [0.0, 1.0] learning rate at the end of half a cosine
# networks
HIDDEN = 128  # [1, 8192] units in each of the two hidden layers
# run
SEED = 0  # [0, 2_147_483_647] for the initial weights, the opponents, the openings and the moves
DEVICE: str = "cpu"  # a GPU is slower with networks this small
RUN_DIR: str = ""  # directory of the run; "" for runs/actor_critic_tictactoe/<date-time>
EVAL_INTERVAL = 250  # [0, inf) updates between two evaluations; never if 0
SAVE_FREQ = 500  # [1, inf) updates between two checkpoints
WANDB: str = ""  # a project of Weights & Biases to log to as well; "" for none
# ---------------------------------------------------------------------------------------------------------------------

CONSTANTS = Constants(globals())
KEPT = "POOL HIDDEN SEED RUN_DIR".split()
MOST_MOVES = 5  # of one side in a game
MASKED = -1e9  # the logit of a cell that is taken

# --- what learns ------------------------------------------------------------------------------------------------------


class Actor(nn.Module):
    """Computes log-probabilities of the nine moves (B, 9) from observations (B, 18). A taken cell is never chosen."""

    def __init__(self, hidden):
        super().__init__()
        self.layers = mlp(hidden, 9)

    def forward(self, obs):
        taken = obs.view(-1, 2, 9).sum(1) > 0  # by either side
        return F.log_softmax(self.layers(obs).masked_fill(taken, MASKED), dim=-1)


class Critic(nn.Module):
    """Estimates the result (B,), from -1 to 1, from observations (B, 18)."""

    def __init__(self, hidden):
        super().__init__()
        self.layers = mlp(hidden, 1)

    def forward(self, obs):
        return self.layers(obs).squeeze(-1).tanh()


class ActorCritic(nn.Module):
    """Both networks, so that they are optimised and saved together."""

    def __init__(self, hidden):
        super().__init__()
        self.actor = Actor(hidden)
        self.critic = Critic(hidden)


def mlp(hidden, outputs):
    """A network with two hidden layers that reads an observation."""
    return nn.Sequential(
        nn.Linear(18, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, outputs)
    )


class SelfPlay(Trainer):
    """Plays games side by side against an earlier policy, and takes one gradient step after them."""

    def __init__(self, c, device, metadata):
        torch.manual_seed(c.SEED)
        super().__init__(ActorCritic(c.HIDDEN).to(device), metadata=metadata)
        self.c = c
        self.device = device
        self.num_steps = c.NUM_STEPS
        self.optimizer = torch.optim.Adam(self.policy.parameters(), c.LR)
        self.rng = np.random.default_rng(c.SEED)
        self.pool = [to_plain(self.policy.actor.state_dict()) for _ in range(c.POOL)]  # the oldest first
        self.opponent = Actor(c.HIDDEN).to(device)

    def collect_and_update(self):
        """One update: play games and learn from them. Returns its statistics."""
        self.emit("on_rollout_start")
        obs, actions, rewards, values, ends, played = self.play()
        self.emit("on_rollout_end")
        return self.update(obs, actions, rewards, values, ends, played)

    def play(self):
        """Play GAMES games against one opponent from the pool; S is 5, the most moves that the learner can make.

        Returns:
            obs: (S, N, 18).
            actions, values: (S, N).
            rewards: (S, N), 1 for a move after which the game was won, -1 for one after which it was lost.
            ends: (S, N) bool, True at the last move of a game.
            played: (S, N) bool, False after the end of a game.
        """
        players = self.rng.choice((X, O), self.c.GAMES)  # the learner's side in each game
        self.opponent.load_state_dict(self.pool[self.rng.integers(len(self.pool))])
        boards, turn = self.openings()
        self.move_opponents(boards, (turn != players) & ~over(boards), -players)
        steps = []
        unfinished = 0  # moves so far
        for move in range(MOST_MOVES):
            self.report("playing move", move + 1, MOST_MOVES, unfinished)
            played = ~over(boards)
            unfinished += int(played.sum())
            obs = torch.from_numpy(observations(boards, players)).to(self.device)
            with torch.no_grad():
                actions = self.draw(self.policy.actor(obs))
                values = self.policy.critic(obs)
            boards[played, actions[played]] = players[played]
            self.move_opponents(boards, played & ~over(boards), -players)
            ends = played & over(boards)
            rewards = results(boards, players) * ends
            step = (obs, actions, rewards, values, ends, played)
            steps.append([torch.as_tensor(x, device=self.device) for x in step])
        return [torch.stack(quantity) for quantity in zip(*steps)]

    def openings(self):
        """Positions that the games start from, (N, 9), and whose turn it is, (N,): X or O.

        A share of OPENINGS has up to six random moves. Where these have ended the game, it starts with an empty board.
        """
        n = self.c.GAMES
        boards = np.zeros((n, 9), np.int8)
        moves = self.rng.integers(7, size=n) * (self.rng.random(n) < self.c.OPENINGS)
        for move in range(6):
            games = np.flatnonzero((moves > move) & ~over(boards))
            cells = (self.rng.random((len(games), 9)) * (boards[games] == 0)).argmax(1)  # random empty ones
            boards[games, cells] = X if move % 2 == 0 else O
        ended = over(boards)
        boards[ended] = 0
        moves[ended] = 0
        return boards, np.where(moves % 2 == 0, X, O)

    @torch.no_grad()
    def move_opponents(self, boards, mask, players):
        """Make one move of the opponent where mask (N,) is True; a share of RANDOM_MOVES is random."""
        obs = torch.from_numpy(observations(boards[mask], players[mask])).to(self.device)
        at_random = torch.from_numpy(self.rng.random((len(obs), 1)) < self.c.RANDOM_MOVES).to(self.device)
        logprobs = self.opponent(obs)
        allowed = torch.from_numpy(boards[mask] == 0).to(self.device)
        logprobs = torch.where(at_random & allowed, 0.0, logprobs)  # all allowed moves become equally probable
        boards[mask, self.draw(logprobs)] = players[mask]

    def draw(self, logprobs):
        """Draw moves, an array (B,), from log-probabilities (B, 9), by the Gumbel-max trick."""
        noise = torch.from_numpy(self.rng.gumbel(size=logprobs.shape)).to(self.device)
        return (logprobs + noise).argmax(1).cpu().numpy()

    def update(self, obs, actions, rewards, values, ends, played):
        """One gradient step on what `play` returned. Returns statistics; raises FloatingPointError if it diverges."""
        c = self.c
        lr = learning_rate(self.global_step / self.num_steps, c.LR, c.MIN_LR)
        self.optimizer.param_groups[0]["lr"] = lr

        # Every game ends, so nothing is truncated, and nothing follows the last row.
        next_values = torch.cat([values[1:], torch.zeros_like(values[:1])])
        truncated = torch.zeros_like(ends)
        advantages, returns = compute_gae(rewards.float(), values, next_values, ends, truncated, c.GAMMA, c.LAMBD)
        advantages = advantages[played]  # (M,), as everything from here on
        advantages = (advantages - advantages.mean()) / (advantages.std(correction=0) + 1e-8)

        all_logprobs = self.policy.actor(obs[played])  # (M, 9)
        logprobs = all_logprobs.gather(1, actions[played].unsqueeze(1)).squeeze(1)
        new_values = self.policy.critic(obs[played])
        # At a ratio of 1 the gradient of PPO's loss is that of the plain actor-critic.
        actor_loss, _ = policy_loss(logprobs, logprobs.detach(), advantages, eps_clip=1.0)
        critic_loss, value_stats = value_loss(new_values, values[played], returns[played])
        negative_entropy, entropy_stats = entropy_loss(all_logprobs)
        loss = actor_loss + c.VALUE_LOSS_COEF * critic_loss + c.ENTROPY_COEF * negative_entropy
        quantities = {"rewards": rewards, "logits": all_logprobs, "values": values, "loss": loss}
        check_finite(f"in update {self.update_count + 1}", **quantities)

        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

        self.update_count += 1
        self.global_step += int(played.sum())
        if self.update_count % c.POOL_INTERVAL == 0:
            self.pool = [*self.pool[1:], to_plain(self.policy.actor.state_dict())]
        return {
            "value_loss": value_stats["value_loss"].item(),
            "entropy": entropy_stats["entropy"].item(),
            "lr": lr,
            "episode_return": rewards.sum().item() / c.GAMES,
        }

    def state_dict(self):
        """Everything that a resumed run needs."""
        return self.training_state(
            optimizer=self.optimizer.state_dict(), rng=self.rng.bit_generator.state, pool=self.pool
        )

    def load_state_dict(self, state):
        """Go on bit for bit where `state_dict` was taken; between two updates no game is under way."""
        self.load_training_state(state)
        load_optimizer(self.optimizer, state["optimizer"])
        self.rng.bit_generator.state = state["rng"]
        self.pool = list(state["pool"])


def build(c):
    """The trainer that these constants describe."""
    device = choose_device(c.DEVICE)
    set_threads(n_layer=1)  # small networks
    return SelfPlay(c, device, {"algorithm": ALGORITHM.name, "constants": dict(vars(c))})


# --- playing ----------------------------------------------------------------------------------------------------------


def policy_of(state):
    """The networks in what `Trainer.policy_state` returned."""
    policy = ActorCritic(state["constants"]["HIDDEN"])
    load_weights(policy, state["model"])
    return policy


def greedy(policy):
    """Return a function that takes boards (N, 9) and a player, and returns the most probable moves (N,)."""

    @torch.no_grad()
    def choose(boards, player):
        return policy.actor(torch.from_numpy(observations(boards, player))).argmax(1).numpy()

    return choose


def evaluate(state, episodes=None, seed=None, report=None):
    """Score the greedy policy exactly, by all games that it can get into as X and as O. Nothing is drawn or reported.

    Returns a dict with
        score: the mean of as_X and as_O, minus 1 for each game that can be lost.
        lost, lines: how many of all these games are lost, and how many there are.
        as_X, as_O: the expected result against random play, a win being 1 and a loss -1.
        optimum_as_X, optimum_as_O: the highest expected result that is possible.
    """
    choose = greedy(policy_of(state))
    result = {"score": 0.0, "lost": 0, "lines": 0}
    for player, name in ((X, "X"), (O, "O")):
        boards, probabilities = every_game(choose, player)
        outcomes = results(boards, player)
        result["lost"] += int((outcomes == -1).sum())
        result["lines"] += len(boards)
        result[f"as_{name}"] = float((probabilities * outcomes).sum())
        result[f"optimum_as_{name}"] = optimal_score((0,) * 9, player, X)
    result["score"] = (result["as_X"] + result["as_O"]) / 2 - result["lost"]
    return result


def thoughts(policy, board, player):
    """What the agent thinks of a board (9,): the probability of each move, (9,), and the result that it expects."""
    with torch.no_grad():
        obs = torch.from_numpy(observations(board[None], player))
        return policy.actor(obs)[0].exp().numpy(), policy.critic(obs).item()


def frames(state, episodes, seed, human):
    """Yield pictures of games against random play; who starts is drawn."""
    policy = policy_of(state)
    env = TicTacToe()
    for episode in range(episodes):
        env.reset(seed=seed + episode)
        terminated = False
        while not terminated:
            probabilities, value = thoughts(policy, env.board, env.player)
            yield picture(env.board, probabilities, value)
            _, _, terminated, _, _ = env.step(int(probabilities.argmax()))
        for _ in range(3):  # the final board stays for a while
            yield picture(env.board)


def play_in_terminal(state, seed):
    """Let a person play against the agent until the person leaves. Who starts is drawn for each game."""
    policy = policy_of(state)
    rng = np.random.default_rng(seed)
    while True:
        person = int(rng.choice((X, O)))
        print(f"\nYou are {'X and start' if person == X else 'O'}. Cells are 1 to 9, row by row; q leaves.")
        board = play_one_game(policy, person)
        if board is None:
            return
        print_board(board)
        outcome = results(board[None], person)[0]
        print({1: "You win.", -1: "It wins.", 0: "A draw."}[outcome])


def play_one_game(policy, person):
    """Let a person, X or O, play a game against the agent. Returns the final board, or None if the person left."""
    board = np.zeros(9, np.int8)
    turn = X
    while not over(board[None])[0]:
        if turn == person:
            print_board(board)
            move = ask_for_move(board)
            if move is None:
                return None
        else:
            probabilities, value = thoughts(policy, board, turn)
            print_board(board, probabilities)
            move = int(probabilities.argmax())
            print(f"It expects {value:+.2f} (1: it wins, -1: you win), and takes {move + 1}.")
        board[move] = turn
        turn = -turn
    return board


ALGORITHM = Algorithm(
    name="actor_critic_tictactoe",
    doc=__doc__,
    constants=CONSTANTS,
    kept=KEPT,
    build=build,
    evaluate=evaluate,
    frames=frames,
    play_in_terminal=play_in_terminal,
    frame_ms=1000,
    check=check_lr,
    memory_constants=("GAMES",),
)


def main(argv=()):
    """Train, play or evaluate. Returns the exit status."""
    return run_algorithm(ALGORITHM, argv)


if __name__ == "__main__":
    run_script(main, "-m algorithms.actor_critic_tictactoe")
