"""Actor-critic learns tic-tac-toe by playing itself:  python -m algorithms.actor_critic_tictactoe

An actor chooses moves, a critic estimates the result, and moves that did better than it expected become more probable. The
opponents are frozen copies of older selves, who now and then move at random, so that the learner meets every position. Who starts is
random. --play --human plays against you in the terminal, and shows what it thinks of each cell.

Left out: search. The game is small enough to score a policy exactly: `evaluate` walks every line of play.
"""

import harness.start  # before the slow imports

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from algorithms.parts.common import Algorithm, check_lr, run_algorithm
from algorithms.parts.tictactoe import (
    O,
    TicTacToe,
    X,
    ask,
    best_score,
    every_line,
    observations,
    over,
    picture,
    print_board,
    wins,
)
from algorithms.reinforce_cartpole import normalize
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
# ---------------------------------------------------------------------------------------------------------------------

CONSTANTS = Constants(globals())
KEPT = "POOL HIDDEN SEED RUN_DIR".split()

# --- what learns ------------------------------------------------------------------------------------------------------


def mlp(hidden, outputs):
    return nn.Sequential(
        nn.Linear(18, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, outputs)
    )


class Actor(nn.Module):
    """Observations (B, 18) -> log-probabilities of the moves (B, 9); no taken cell is ever chosen."""

    def __init__(self, hidden):
        super().__init__()
        self.layers = mlp(hidden, 9)

    def forward(self, obs):
        taken = obs.view(-1, 2, 9).sum(1) > 0
        return F.log_softmax(self.layers(obs).masked_fill(taken, -1e9), dim=-1)


class Critic(nn.Module):
    """Observations (B, 18) -> the expected result (B,), -1 to 1."""

    def __init__(self, hidden):
        super().__init__()
        self.layers = mlp(hidden, 1)

    def forward(self, obs):
        return self.layers(obs).squeeze(-1).tanh()


class ActorCritic(nn.Module):
    def __init__(self, hidden):
        super().__init__()
        self.actor, self.critic = Actor(hidden), Critic(hidden)


class SelfPlay(Trainer):
    def __init__(self, c, device, metadata):
        torch.manual_seed(c.SEED)
        super().__init__(ActorCritic(c.HIDDEN).to(device), metadata=metadata)
        self.c, self.device, self.num_steps = c, device, c.NUM_STEPS
        self.optimizer = torch.optim.Adam(self.policy.parameters(), c.LR)
        self.rng = np.random.default_rng(c.SEED)
        self.pool = [to_plain(self.policy.actor.state_dict()) for _ in range(c.POOL)]  # the oldest first
        self.opponent = Actor(c.HIDDEN).to(device)

    def collect_and_update(self):
        return self.update(*self.play())

    def play(self):
        """GAMES games -> obs (5, N, 18), actions, rewards, values, ends and which moves were played, each (5, N)."""
        player, steps = self.rng.choice((X, O), self.c.GAMES), []
        self.opponent.load_state_dict(self.pool[self.rng.integers(len(self.pool))])
        boards, turn = self.openings()
        self.move_opponents(boards, (turn != player) & ~over(boards), -player)
        for _ in range(5):  # the learner has five moves at most
            playing = ~over(boards)
            obs = torch.from_numpy(observations(boards, player)).to(self.device)
            with torch.no_grad():
                actions, values = self.choose(self.policy.actor, obs), self.policy.critic(obs)
            boards[playing, actions[playing]] = player[playing]
            self.move_opponents(boards, playing & ~over(boards), -player)
            ends = playing & over(boards)
            rewards = (1.0 * wins(boards, player) - wins(boards, -player)) * ends
            steps.append(
                [obs, *(torch.as_tensor(x, device=self.device) for x in (actions, rewards, values, ends, playing))]
            )
        return [torch.stack(x) for x in zip(*steps)]

    def openings(self):
        """-> boards (N, 9), and whose turn it is (N,)."""
        n = self.c.GAMES
        boards, moves = np.zeros((n, 9), np.int8), self.rng.integers(7, size=n) * (self.rng.random(n) < self.c.OPENINGS)
        for move in range(6):
            games = np.flatnonzero((moves > move) & ~over(boards))
            cells = (self.rng.random((len(games), 9)) * (boards[games] == 0)).argmax(1)
            boards[games, cells] = X if move % 2 == 0 else O
        ended = over(boards)  # those start at the beginning instead
        boards[ended], moves[ended] = 0, 0
        return boards, np.where(moves % 2 == 0, X, O)

    def move_opponents(self, boards, mask, players):
        """One move of the opponent where mask (N,) is true."""
        obs = torch.from_numpy(observations(boards[mask], players[mask])).to(self.device)
        at_random = torch.from_numpy(self.rng.random((len(obs), 1)) < self.c.RANDOM_MOVES).to(self.device)
        boards[mask, self.choose(self.opponent, obs, at_random)] = players[mask]

    @torch.no_grad()
    def choose(self, actor, obs, at_random=False):
        """Moves drawn from the actor's probabilities, or from all that are allowed (B, 1) -> an array (B,)."""
        logprobs = actor(obs)
        if at_random is not False:
            logprobs = torch.where(at_random & (logprobs > -1e8), 0.0, logprobs)
        noise = torch.from_numpy(self.rng.gumbel(size=logprobs.shape)).to(self.device)  # its argmax is a draw
        return (logprobs + noise).argmax(1).cpu().numpy()

    def update(self, obs, actions, rewards, values, ends, played):
        """One gradient step -> statistics. Raises FloatingPointError."""
        c, lr = self.c, learning_rate(self.global_step / self.num_steps, self.c.LR, self.c.MIN_LR)
        self.optimizer.param_groups[0]["lr"] = lr
        next_values = torch.cat([values[1:], torch.zeros_like(values[:1])])
        advantages, returns = compute_gae(
            rewards.float(), values, next_values, ends, torch.zeros_like(ends), c.GAMMA, c.LAMBD
        )
        obs, actions, values, advantages, returns = (x[played] for x in (obs, actions, values, advantages, returns))
        advantages = normalize(advantages)
        all_logprobs = self.policy.actor(obs)
        logprobs = all_logprobs.gather(1, actions.unsqueeze(1)).squeeze(1)
        # at a ratio of 1, PPO's loss has the gradient of the plain actor-critic
        actor_loss, _ = policy_loss(logprobs, logprobs.detach(), advantages, eps_clip=1.0)
        critic_loss, stats = value_loss(self.policy.critic(obs), values, returns)
        negative_entropy, more = entropy_loss(all_logprobs)
        loss = actor_loss + c.VALUE_LOSS_COEF * critic_loss + c.ENTROPY_COEF * negative_entropy
        check_finite(
            f"in update {self.update_count + 1}", rewards=rewards, logits=all_logprobs, values=values, loss=loss
        )
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.update_count += 1
        self.global_step += int(played.sum())
        if self.update_count % c.POOL_INTERVAL == 0:
            self.pool = [*self.pool[1:], to_plain(self.policy.actor.state_dict())]
        return {name: x.item() for name, x in (stats | more).items()} | {
            "lr": lr,
            "episode_return": rewards.sum().item() / c.GAMES,
        }

    def state_dict(self):
        return self.training_state(
            optimizer=self.optimizer.state_dict(), rng=self.rng.bit_generator.state, pool=self.pool
        )

    def load_state_dict(self, state):
        """Go on where `state_dict` was taken, bit for bit: between two updates no game is under way."""
        self.load_training_state(state)
        load_optimizer(self.optimizer, state["optimizer"])
        self.rng.bit_generator.state = state["rng"]
        self.pool = list(state["pool"])


# --- playing ----------------------------------------------------------------------------------------------------------


def policy_of(state):
    policy = ActorCritic(state["constants"]["HIDDEN"])
    load_weights(policy, state["model"])
    return policy


def greedy(policy):
    """-> a function from boards (N, 9) and a player to the most probable moves (N,)."""

    @torch.no_grad()
    def moves(boards, player):
        return policy.actor(torch.from_numpy(observations(boards, player))).argmax(1).numpy()

    return moves


def evaluate(state, episodes=None, seed=None):
    """Exact: the greedy policy against every line of play, as X and as O -> a dict

    score                    wins less losses against random play, the mean of both sides, less 1 for every line that is lost
    as_X as_O                wins less losses against random play
    optimum_as_X optimum_as_O  the most that anybody can expect
    lost lines               how many lines of play are lost, of how many
    """
    moves, result, lost, lines = greedy(policy_of(state)), {}, 0, 0
    for player, name in ((X, "X"), (O, "O")):
        boards, chances = every_line(moves, player)
        losses = wins(boards, -player)
        result[f"as_{name}"] = float((chances * (1.0 * wins(boards, player) - losses)).sum())
        result[f"optimum_as_{name}"] = best_score((0,) * 9, player, X)
        lost, lines = lost + int(losses.sum()), lines + len(boards)
    return {"score": (result["as_X"] + result["as_O"]) / 2 - lost, "lost": lost, "lines": lines, **result}


def thoughts(policy, board, player):
    """-> the probability of each move (9,), and the expected result."""
    with torch.no_grad():
        obs = torch.from_numpy(observations(board[None], player))
        return policy.actor(obs)[0].exp().numpy(), policy.critic(obs).item()


def frames(state, episodes, seed, human):
    """Yields pictures of games against random play, before and after each move; the agent starts every other one."""
    policy, env = policy_of(state), TicTacToe()
    for episode in range(episodes):
        _, info = env.reset(seed=seed + episode, options={"first": episode % 2 == 0})
        terminated = False
        while not terminated:
            probabilities, value = thoughts(policy, env.board, env.player)
            yield picture(env.board, probabilities, value)
            _, _, terminated, _, info = env.step(int(probabilities.argmax()))
        for _ in range(3):
            yield picture(env.board, np.zeros(9), 0.0)


def play_in_terminal(state):
    """A person against the agent, until the person has had enough."""
    policy, person = policy_of(state), X
    while True:
        board, turn = np.zeros(9, np.int8), X
        print(f"\nYou are {'X and start' if person == X else 'O'}. Cells are 1 to 9, row by row; q leaves.")
        while not over(board[None])[0]:
            if turn == person:
                print_board(board)
                move = ask(board)
                if move is None:
                    return
            else:
                probabilities, value = thoughts(policy, board, turn)
                print_board(board, probabilities)
                move = int(probabilities.argmax())
                print(f"It expects {value:+.2f} (1: it wins, -1: you win), and takes {move + 1}.")
            board[move] = turn
            turn = -turn
        print_board(board)
        print(
            "You win." if wins(board[None], person)[0] else "It wins." if wins(board[None], -person)[0] else "A draw."
        )
        person = -person


def build(c):
    device = choose_device(c.DEVICE)
    set_threads(n_layer=1)  # small networks
    return SelfPlay(c, device, {"algorithm": ALGORITHM.name, "constants": dict(vars(c))})


ALGORITHM = Algorithm(
    "actor_critic_tictactoe",
    __doc__,
    CONSTANTS,
    KEPT,
    build,
    evaluate,
    frames,
    frame_ms=1000,
    check=check_lr,
    human=lambda state, seed: play_in_terminal(state),
    memory=("GAMES",),
)


def main(argv=()):
    return run_algorithm(ALGORITHM, argv)


if __name__ == "__main__":
    run_script(main, "-m algorithms.actor_critic_tictactoe")
