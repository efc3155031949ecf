"""How well a policy plays: exactly, smoothly, and while training goes on.

The serves are the only chance in the game, so a greedy policy plays at most 2^5 = 32 different games. `exact` plays them
all. But they share two beginnings, and one changed decision can move 16 games at once; `returned` is the smoother
figure beside it.
"""

import contextlib
import itertools
import multiprocessing
import os
import pickle
import signal
import threading

import numpy as np
import torch

from breakout_ascii import MAX_EPISODE_STEPS, BreakoutAsciiVec
from rollout_buffer import reader_of

SERVES = np.array(list(itertools.product((-1, 1), repeat=5)))  # (32, 5)


def evaluate(policy):
    """Greedy play -> {"score", "min", "max", "cleared", "games", "mean_length", "returned"}, plain numbers."""
    return {**exact(policy), "returned": returned(policy)}


def greedy(reader, obs):
    """(B, 1944) tokens -> (B,) actions. Games that share their beginning show the same page: each is read once."""
    pages, first = reader.encode(obs), {}
    which = [first.setdefault(page.tobytes(), i) for i, page in enumerate(pages)]
    logits, _ = reader(pages[list(first.values())])
    actions = dict(zip(first.values(), logits.argmax(-1).tolist()))
    return np.array([actions[i] for i in which])


def exact(policy, max_episode_steps=MAX_EPISODE_STEPS):
    """Scores and lengths of all 32 games. A game whose state returns is in a loop: it keeps its score until truncation."""
    reader, env = reader_of(policy), BreakoutAsciiVec(len(SERVES), max_episode_steps=max_episode_steps)
    obs, _ = env.reset(seed=0, options={"serves": SERVES})
    scores, lengths, bricks = np.zeros((3, len(SERVES)), int)
    playing, seen = np.ones(len(SERVES), bool), set()
    for step in range(1, max_episode_steps + 1):
        actions = np.zeros(len(SERVES), int)
        actions[playing] = greedy(reader, obs[playing])
        obs, _, terminated, truncated, infos = env.step(actions)
        games = env.games
        ends = playing & (terminated | truncated)
        states = np.column_stack([np.arange(len(SERVES)), obs, games.dx + 1, games.dy + 1, games.lives]).astype(np.uint8)
        states = [hash(state.tobytes()) for state in states]
        loops = playing & ~ends & np.array([state in seen for state in states])
        seen.update(states)
        scores[loops], bricks[loops], lengths[loops] = games.score[loops], games.bricks_left[loops], max_episode_steps
        if ends.any():
            final = infos["final_info"]
            scores[ends], bricks[ends], lengths[ends] = final["score"][ends], final["bricks"][ends], step
        playing &= ~(loops | ends)
        if not playing.any():
            break
    return summary(scores, lengths, bricks)


def sampled(policy, games, seed):
    """Actions drawn from the policy, `games` standard games -> the same keys as `exact`."""
    env, generator = BreakoutAsciiVec(games), torch.Generator().manual_seed(seed)
    reader, (obs, _) = reader_of(policy), env.reset(seed=seed)
    scores, lengths, bricks = np.zeros((3, games), int)
    playing = np.ones(games, bool)
    while playing.any():
        actions = np.zeros(games, int)
        logits, _ = reader(reader.encode(obs[playing]))
        actions[playing] = torch.multinomial(logits.cpu().softmax(-1), 1, generator=generator).squeeze(1).numpy()
        obs, _, terminated, truncated, infos = env.step(actions)
        lengths += playing
        ends = playing & (terminated | truncated)
        if ends.any():
            scores[ends], bricks[ends] = infos["final_info"]["score"][ends], infos["final_info"]["bricks"][ends]
            playing &= ~ends
    return summary(scores, lengths, bricks)


def summary(scores, lengths, bricks):
    return {
        "score": float(scores.mean()), "min": int(scores.min()), "max": int(scores.max()),
        "cleared": int((bricks == 0).sum()), "games": len(scores), "mean_length": float(lengths.mean()),
    }  # fmt: skip


def returned(policy, starts=256, steps=300):
    """The share of falling balls that the paddle returns, from fixed varied starts and the serves that follow: 0..1."""
    reader, env = reader_of(policy), BreakoutAsciiVec(starts, varied_starts=1.0)
    obs, _ = env.reset(seed=0)
    hits = misses = 0
    for _ in range(steps):
        falling = env.games.dy == 1
        obs, _, terminated, _, infos = env.step(greedy(reader, obs))
        lost = infos["life_lost"].copy()
        if terminated.any():
            lost[terminated] = infos["final_info"]["bricks"][terminated] > 0
        misses += int(lost.sum())
        hits += int((falling & ~lost & ~terminated & (env.games.dy == -1) & (env.games.ball_y == 21)).sum())
    return hits / max(hits + misses, 1)


class Background:
    """Calls function(policy) in processes of its own, which end with this one. A call returns its future, a `Call`; there may
    be as many calls without a result as there are processes."""

    def __init__(self, function, device, processes=1):
        """device: where the policies go."""
        self.device, self.processes, context = device, processes, multiprocessing.get_context("spawn")  # CUDA and threads do not survive a fork
        self.free = []  # connections
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # the processes inherit this: Ctrl-C is for the training alone
        for _ in range(processes):
            ours, theirs = context.Pipe()
            context.Process(target=serve, args=(theirs, function), daemon=True).start()
            theirs.close()
            self.free.append(ours)
        signal.signal(signal.SIGINT, before)

    def __call__(self, policy):
        call = Call(self.free.pop(), self.free)
        with alive():
            call.connection.send_bytes(pickle.dumps(policy.to(self.device)))
        return call


class Call:
    """done(): is there a result? result(): waits for it, to be taken once."""

    def __init__(self, connection, free):
        self.connection, self.free = connection, free

    def done(self):
        with alive():
            return self.connection.poll()

    def result(self):
        self.free.append(self.connection)
        with alive():
            return self.connection.recv()


@contextlib.contextmanager
def alive():
    """Raises ChildProcessError if the process has died."""
    try:
        yield
    except (EOFError, OSError):
        raise ChildProcessError("the process that evaluates has died: what it wrote stands above, or memory ran out") from None


def serve(connection, function):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # for systems that do not inherit it
    threading.Thread(target=end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    with contextlib.suppress(EOFError, OSError):  # nobody asks or listens any more
        while True:
            connection.send(function(pickle.loads(connection.recv_bytes())))


def end_with_parent():
    multiprocessing.parent_process().join()
    os._exit(0)
