"""The loop of ppo.py with everything on one device: during a rollout and an epoch no tensor visits the host.

For a GPT of one layer on CUDA. Its kernels are many and small, so the two steps that repeat, one of all games and one of the
weights, are compiled and then replayed as CUDA graphs: that has not been run yet. The pages of a minibatch share their lines,
which are found at the end of a rollout and before an epoch: there the host waits a few times, between two steps never. Nothing
here needs CUDA, but on a CPU ppo.py is much faster: there lines share their pieces too. Left out: any game but Breakout, deeper
models.
"""

import warnings
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from breakout_ascii import (
    BRICK, BRICK_COLS, BRICK_ROWS, BRICK_TOP, COLS, EMPTY_PAGE, LIVES, MAX_EPISODE_STEPS, PADDLE, PADDLE_MAX, PADDLE_ROW,
    PADDLE_START, RIGHT_WALL, SERVE_X, TOKENS, WIDTH, Games,
)  # fmt: skip
from model import line_attention
from pages import Lines, distinct_lines, every_line
from ppo import PPO
from rollout_buffer import Minibatch


class BreakoutOnDevice(Games):
    """N training games as tensors, each begun anew in the step that ends it. Arguments as of `BreakoutAsciiVec`.

    A CUDA graph knows tensors by their places in memory, but the rules make new ones. So `settle` brings these back to the
    places of the old.
    """

    xp = torch
    CHANCE = 3 * LIVES + 2 + BRICK_ROWS * BRICK_COLS  # random numbers that a new game takes: `begin` splits them

    def __init__(self, num_envs, device, *, varied_starts=0.0, max_episode_steps=MAX_EPISODE_STEPS):
        self.num_envs, self.device, self.varied_starts, self.max_episode_steps = num_envs, device, varied_starts, max_episode_steps
        super().__init__(num_envs)
        cell, whole_page = np.arange(TOKENS), EMPTY_PAGE.copy()
        whole_page[BRICK_TOP : BRICK_TOP + BRICK_ROWS, 1:RIGHT_WALL] = list((BRICK * BRICK_COLS).encode())
        row, col = cell // COLS - BRICK_TOP, (cell % COLS - 1) // WIDTH
        brick = np.where(whole_page.ravel() != EMPTY_PAGE.ravel(), row * BRICK_COLS + col, BRICK_ROWS * BRICK_COLS)  # the last is none
        self.cell, self.brick, self.empty_page, self.whole_page = map(self.array, (cell, brick, EMPTY_PAGE.ravel(), whole_page.ravel()))
        self.places = {name: getattr(self, name) for name in [*self.STATE, "pages"]}

    def array(self, x):
        return torch.as_tensor(x, device=self.device)

    def reset(self, *, seed):
        """Begin N new games -> observations (N, 1944) uint8, infos."""
        self.np_random = np.random.default_rng(seed)
        self.begin(self.games >= 0, self.draw_chance(1)[0])
        self.settle()
        return self.pages.flatten(1), {}

    def draw_chance(self, steps):
        """The chance that `steps` steps may need -> (steps, N, CHANCE) uniform in [0, 1)."""
        return uniform((steps, self.num_envs, self.CHANCE), int(self.np_random.integers(2**62)), self.device)

    def begin(self, which, chance):
        """Begin new games where which (N,) bool, by chance (N, CHANCE), as draw_serves and draw_bricks draw them."""
        right, varied, x, wall, share, brick = chance.split([LIVES, LIVES, LIVES, 1, 1, BRICK_ROWS * BRICK_COLS], dim=1)
        where, varied, x = torch.where, varied < self.varied_starts, 1 + (x * (RIGHT_WALL - 1)).long()
        paddle_x = where(varied, (x - 3).clip(1, PADDLE_MAX), PADDLE_START)
        serves = torch.stack([where(varied, x, SERVE_X), where(right < 0.5, 1, -1), paddle_x], dim=2)
        bricks = brick < where(wall < self.varied_starts, share, 1.0)
        bricks = torch.cat([bricks[:, :1] | ~bricks.any(1, keepdim=True), bricks[:, 1:]], dim=1)
        self.serves = where(which[:, None, None], serves, self.serves)
        self.bricks = where(which[:, None, None], bricks.view_as(self.bricks), self.bricks)
        self.bricks_left = where(which, bricks.sum(1), self.bricks_left)
        self.lives = where(which, LIVES, self.lives)
        self.score, self.elapsed = where(which, 0, self.score), where(which, 0, self.elapsed)
        self.serve(which)
        self.draw()

    def draw(self, *_):
        """Every page from nothing: no step asks which cells have changed."""
        bricks = F.pad(self.bricks.flatten(1), (0, 1))[:, self.brick]  # (N, 1944)
        pages = torch.where(bricks, self.whole_page, self.empty_page)
        along = self.cell - (PADDLE_ROW * COLS + self.paddle_x).unsqueeze(1)
        pages = torch.where((along >= 0) & (along < len(PADDLE)), ord(PADDLE[0]), pages)
        pages = torch.where(self.cell == (self.ball_y * COLS + self.ball_x).unsqueeze(1), ord("O"), pages)
        self.pages = pages.view_as(self.pages)

    redraw = draw

    def play(self, actions, chance):
        """One step of every game, and new games where one ends -> rewards, terminated, truncated, life_lost, scores, each
        (N,), and pages (N, 1944): what the step led to before new games began."""
        for name, place in self.places.items():  # they are there already, unless a step was recorded and never ran
            setattr(self, name, place)
        rewards, terminated, life_lost = self.step(actions)
        truncated = (self.elapsed >= self.max_episode_steps) & ~terminated
        scores, pages = self.score, self.pages.flatten(1)
        self.begin(terminated | truncated, chance)
        self.settle()
        return rewards, terminated, truncated, life_lost, scores, pages

    def settle(self):
        for name, place in self.places.items():
            setattr(self, name, place.copy_(getattr(self, name)))

    def state_dict(self):
        """What `BreakoutAsciiVec.state_dict` gives: a run may go on with either."""
        state = {name: getattr(self, name).cpu().numpy().copy() for name in self.STATE}
        return state | {"np_random": self.np_random.bit_generator.state}

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self.settle()
        self.np_random.bit_generator.state = state["np_random"]


class Rollout(NamedTuple):
    """S steps of N games; `Minibatch` and `RolloutBuffer.add` say what most of these are."""

    obs: torch.Tensor  # (S, N, 1944) uint8 tokens
    actions: torch.Tensor  # (S, N), like all that follow but where noted
    logprobs: torch.Tensor
    values: torch.Tensor
    rewards: torch.Tensor
    terminated: torch.Tensor
    truncated: torch.Tensor
    changes: torch.Tensor  # (S, N, rows + columns)
    has_next: torch.Tensor
    together: torch.Tensor  # (S, N / 2)
    scores: torch.Tensor  # points so far in the game
    next_obs: torch.Tensor  # (S, N, 1944) uint8, the last pages of games that end


class PPOOnDevice(PPO):
    """`PPO` for a GPT of one layer and `BreakoutOnDevice`. The batch size has to divide the samples of a rollout."""

    def __init__(self, policy, env, config, *args, **kwargs):
        super().__init__(policy, env, config, *args, **kwargs)
        device, S, N = self.device, config.rollout_steps, env.num_envs
        if device.type == "cuda":
            lr = torch.tensor(config.lr, device=device)
            self.optimizer = torch.optim.Adam([self.weights], lr=lr, eps=1e-5, fused=True, capturable=True)
            self.loss, self.play = (torch.compile(f, fullgraph=True) for f in (self.loss, self.play))
        self.play_replayed = Replayed(self.play_and_store, device, self.ranks, self.uncompile)
        self.descend_replayed = Replayed(self.descend, device, self.ranks, self.uncompile)
        # What these two read and write, in places that stay:
        self.row, self.minibatch = torch.zeros(2, 1, dtype=torch.int64, device=device).unbind()  # of the rollout; of the epoch
        self.chance = torch.zeros(S, N, env.CHANCE, device=device)
        self.gumbel = torch.zeros(S, N, policy.config.n_action, device=device)
        self.together = torch.zeros(N // 2, dtype=torch.bool, device=device)
        self.table, self.rollout, self.shuffled, self.lines, self.step_stats = None, None, None, None, {}

    def uncompile(self):
        """-> was anything compiled?"""
        return any([vars(self).pop(name, None) for name in ("loss", "play")])  # the methods show again

    # The rollout

    def collect(self):
        """S steps of every game into the buffer."""
        config, env = self.config, self.env
        if config.twins:
            env.twin()
        self.together.fill_(bool(config.twins))
        with torch.no_grad():
            table = self.policy.pair_table()  # the weights stand still
            self.table = [place.copy_(x) for place, x in zip(self.table or table, table)]
        self.chance.copy_(env.draw_chance(config.rollout_steps))
        self.gumbel.copy_(-(-uniform(self.gumbel.shape, self.draw_seed(), self.device).log()).log())
        self.row.zero_()
        for _ in range(config.rollout_steps):
            self.check_stop()
            self.play_replayed()
        r = self.rollout
        if not r.logprobs.isfinite().all():
            raise FloatingPointError(f"the logits are not finite in update {self.update_count + 1}; try a lower learning rate")
        final_values = torch.zeros_like(r.values)
        with torch.no_grad():
            last_values = self.policy(every_line(env.pages.flatten(1)))[1]
            if r.truncated.any():
                final_values[r.truncated] = self.policy(every_line(r.next_obs[r.truncated]))[1]
        self.all_lines = distinct_lines(r.obs.flatten(0, 1))
        self.buffer.close(
            self.all_lines.pages, r.actions, r.logprobs, r.values, r.rewards, r.terminated, r.truncated, final_values, r.changes,
            last_values, r.has_next, config.gamma, self.lambd(), r.together if config.twins else None,
        )  # fmt: skip
        self.train_scores.extend(r.scores[~r.has_next].tolist())
        self.score_so_far = env.score.double().cpu().numpy()
        self.global_step += config.rollout_steps * env.num_envs * self.ranks

    def play_and_store(self):
        row = self.play()
        if self.rollout is None:
            self.rollout = Rollout(*(x.new_zeros(self.config.rollout_steps, *x.shape) for x in row))
        for place, x in zip(self.rollout, row):
            place.index_copy_(0, self.row, x.unsqueeze(0))
        self.row += 1

    @torch.no_grad()
    def play(self):
        """One step of every game -> a row of the `Rollout`."""
        env, config, columns = self.env, self.config, self.policy.page_columns
        self.together &= env.twins_agree()
        together, obs = self.together.clone(), env.pages.flatten(1).clone()
        logits, values = self.policy.heads(self.policy.after_attention(line_attention(*self.table, every_line(obs))))
        logprobs = F.log_softmax(logits, dim=-1)
        actions = (logprobs + self.gumbel.index_select(0, self.row).squeeze(0)).argmax(1)  # a draw from the policy (Gumbel 1954)
        chance = self.chance.index_select(0, self.row).squeeze(0)
        rewards, terminated, truncated, life_lost, scores, next_obs = env.play(actions, chance)
        changed = (obs != next_obs).unflatten(1, (-1, columns))
        return Rollout(
            obs, actions, logprobs.gather(1, actions.unsqueeze(1)).squeeze(1), values, (rewards * config.reward_scale).float(),
            terminated | life_lost, truncated, torch.cat([changed.any(2), changed.any(1)], dim=1), ~(terminated | truncated),
            together, scores, next_obs,
        )  # fmt: skip

    # The update

    def epoch(self):
        data, samples = self.buffer.data, len(self.buffer.data.actions)
        order = torch.randperm(samples, generator=torch.Generator(self.device).manual_seed(self.draw_seed()), device=self.device)
        size = self.config.batch_size // self.ranks
        if self.shuffled is None:
            self.shuffled = Minibatch(*(x.new_zeros(samples // size, size, *x.shape[1:]) for x in data))
        for place, x in zip(self.shuffled, data):
            torch.index_select(x, 0, order, out=place.flatten(0, 1))
        self.share_lines()
        advantages = self.shuffled.advantages
        advantages -= self.average(advantages.mean(1, keepdim=True))
        advantages /= self.average(advantages.square().mean(1, keepdim=True)).sqrt() + 1e-8
        self.minibatch.zero_()
        for _ in range(samples // size):
            self.check_stop()
            self.descend_replayed()
        super().check_gradient(self.step_stats["grad_norm"])
        return {name: x.clone() for name, x in self.step_stats.items()}

    def share_lines(self):
        """Gives each shuffled minibatch the lines that stand on its pages, and their numbers among these."""
        pages = self.shuffled.obs.flatten(1)  # (minibatches, pages * 24), numbers among all lines of the rollout
        used = pages.new_zeros(len(pages), len(self.all_lines.rows)).scatter_(1, pages, 1)
        capacity = int(used.sum(1).max())
        if self.lines is None or capacity > self.lines.rows.size(1):
            places = pages.new_zeros(len(pages), 1 << (capacity - 1).bit_length())  # a power of two: seldom too small later
            self.lines = Lines(places.unsqueeze(2).repeat(1, 1, COLS).to(torch.int8), places, self.shuffled.obs)
            self.descend_replayed.forget()
        number = used.cumsum(1) - 1
        minibatch, line = used.nonzero(as_tuple=True)
        place = minibatch, number[minibatch, line]
        self.lines.characters[place], self.lines.rows[place] = self.all_lines.characters[line], self.all_lines.rows[line]
        pages.copy_(number.gather(1, pages))

    def check_gradient(self, norm):
        """Not in every step: to look at a number the host would have to wait for it. An epoch looks at all of them."""

    def descend(self):
        chosen = lambda batch: batch._make(x.index_select(0, self.minibatch).squeeze(0) for x in batch)
        for name, x in self.gradient_step(chosen(self.lines), chosen(self.shuffled)).items():
            if name not in self.step_stats:
                self.step_stats[name] = x.new_zeros(len(self.shuffled.obs))
            self.step_stats[name].index_copy_(0, self.minibatch, x.view(1))
        self.minibatch += 1

    def set_lr(self, lr):
        for group in self.optimizer.param_groups:
            group["lr"] = group["lr"].fill_(lr) if isinstance(group["lr"], torch.Tensor) else lr

    def draw_seed(self):
        return int(torch.randint(2**62, (), generator=self.generator))

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self.descend_replayed.forget()  # the optimizer's tensors are others now
        self.obs = self.env.pages.flatten(1)


class Replayed:
    """function(), which reads and writes tensors that keep their places. On CUDA its first calls run as they are; then it is
    recorded as a CUDA graph and replayed. Where that does not work, and with several ranks, it goes on running as it is.

    The first call compiles. If it fails, `uncompile` is called, and the function once more.
    """

    WARM_UP = 3

    def __init__(self, function, device, ranks, uncompile):
        self.function, self.uncompile, self.graph, self.calls = function, uncompile, None, 0
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" and ranks == 1 else None

    def __call__(self):
        if self.graph:
            self.graph.replay()
            return
        self.calls += 1
        if self.stream is None:
            self.run()
            return
        before = torch.cuda.current_stream()
        self.stream.wait_stream(before)
        with torch.cuda.stream(self.stream):
            self.run()
        before.wait_stream(self.stream)
        if self.calls == self.WARM_UP:
            self.record(before)

    def forget(self):
        """The function's tensors have moved."""
        self.graph, self.calls = None, 0

    def run(self):
        try:
            self.function()
        except Exception as error:  # no compiler, no Triton: whatever it is, the function itself may work
            if self.calls > 1 or not self.uncompile():
                raise
            warn("torch.compile does not work", error)
            self.function()

    def record(self, before):
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self.stream):  # records, computes nothing
                self.function()
            self.graph = graph
        except RuntimeError as error:
            torch.cuda.set_stream(before)  # a recording that fails may leave its own
            warn("CUDA graphs do not work", error)


def warn(what, error):
    reason = str(error).strip().splitlines() or [type(error).__name__]
    warnings.warn(f"{what} here, going on without: {reason[0]}", stacklevel=3)


def uniform(shape, seed, device):
    """Random numbers in [0, 1) by a generator of their own."""
    return torch.rand(shape, generator=torch.Generator(device).manual_seed(seed), device=device)
