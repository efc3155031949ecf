"""Pages, models and tolerances that several tests share."""

import re
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from breakout_ascii import CHARACTERS, COLUMNS, ROWS, TOKENS, BreakoutAsciiVec
from fast import DeviceBreakout, DeviceGPT
from harness.options import Constants
from model import GPT, GPTConfig
from ppo import PPO, PPOConfig

PAGE = dict(rows=ROWS, columns=COLUMNS, characters=CHARACTERS, n_action=3)  # of a GPTConfig for Breakout
EPS = torch.finfo(torch.float32).eps
# On Windows no program can be signalled, most users may not make links, and files that are open stay where they are.
needs_posix = pytest.mark.skipif(sys.platform == "win32", reason="needs signals, links or permissions of POSIX")
SIGHUP, SIGQUIT, SIGKILL = (getattr(signal, name, None) for name in ("SIGHUP", "SIGQUIT", "SIGKILL"))


def tolerance(largest_score):
    """Return the relative error that float32 may cause in attention whose scores, in nats, have this maximum.

    A score s is rounded with a relative error of a few EPS. So its weight exp(s) has a relative error of a few EPS * s,
    and so have the weighted sum and the gradient.
    """
    return 2 * EPS * (1 + largest_score)


def make_gpt(seed=0, kind=GPT, **config):
    torch.manual_seed(seed)
    return kind(GPTConfig(**PAGE | config))


def device_trainer(max_episode_steps=5000, seed=0, num_envs=4, device="cpu", runner=None, **changes):
    """Return a PPO with the policy and games that a GPU would have, by default on the CPU."""
    env = DeviceBreakout(num_envs, torch.device(device), varied_starts=0.7, max_episode_steps=max_episode_steps)
    constants = dict(
        num_steps=96,
        rollout_steps=6,
        epochs=1,
        batch_size=12,
        gamma=0.9,
        lambd=0.5,
        lambd_end=0.5,
        lambd_steps=1,
        eps_clip=0.2,
        lr=1e-3,
        min_lr=1e-4,
        value_loss_coef=0.5,
        entropy_coef=0.01,
        max_grad_norm=0.5,
        prediction_coef=0.1,
        move_coef=0.04,
        paired_envs=True,
        reward_scale=0.1,
    )
    policy = make_gpt(seed, DeviceGPT, n_head=4, n_embd=16)
    return PPO(policy, env, PPOConfig(**constants | changes), runner=runner)


def random_play():
    """Return the pages of three games after 60 random steps."""
    env = BreakoutAsciiVec(3)
    env.reset(seed=1)
    rng = np.random.default_rng(1)
    for _ in range(60):
        obs, *_ = env.step(rng.integers(3, size=3))
    return obs


def late_game():
    """Return pages with few bricks and with the balls anywhere."""
    env = BreakoutAsciiVec(3, varied_starts=1.0)
    env.reset(seed=2)
    env.games.bricks &= np.random.default_rng(2).random(env.games.bricks.shape) < 0.1
    env.games.ball_y[:] = (14, 20, 3)
    env.games.ball_x[:] = (5, 33, 70)
    env.games.draw(np.ones(3, bool))
    return env.observation()


def all_new():
    """Return pages of random characters that end with a newline, so that no two lines are equal."""
    pages = np.random.default_rng(3).choice(np.frombuffer(CHARACTERS.encode(), np.uint8), (3, TOKENS))
    pages[:, -1] = ord("\n")
    return pages


def foreign_end():
    """Return pages that end with different characters, so that they share no query."""
    pages = all_new()
    pages[:, -1] = [ord(c) for c in "O# "]
    return pages


def one_game():
    """Return pages that begin alike: the first five of a game, and the first once more."""
    env = BreakoutAsciiVec(1)
    pages = [env.reset(seed=1)[0]] + [env.step(np.array([1]))[0] for _ in range(4)]
    return np.concatenate(pages + pages[:1])


def every_score(gpt):
    """Return the scores, in nats, of every character at every position for the query of the last, (7 * 1944, H).

    The GPT has one layer.
    """
    with torch.no_grad():
        rows, columns = torch.arange(24).repeat_interleave(81), torch.arange(81).repeat(24)
        x = gpt.wte.weight.unsqueeze(1) + gpt.wre.weight[rows] + gpt.wce.weight[columns]  # (7, 1944, C)
        block, C, H = gpt.blocks[0], gpt.config.n_embd, gpt.config.n_head
        w_q, w_k, _ = block.attn.c_attn.weight.split(C)
        q = (block.ln_1(x[CHARACTERS.index("\n"), -1]) @ w_q.T).view(H, C // H)
        k = (block.ln_1(x).flatten(0, 1) @ w_k.T).view(-1, H, C // H)
        return (k * q).sum(2) / (C // H) ** 0.5


def largest_score(gpt):
    return every_score(gpt).abs().max().item()


def script_constants(folder, block, below=""):
    """The `Constants` of a script with these lines above and below its CONSTANTS."""
    file, text = folder / "script.py", f"{block}CONSTANTS = Constants(globals())\n{below}"
    file.write_text(text)
    script = {"__file__": str(file), "Constants": Constants}
    exec(text, script)
    return script["CONSTANTS"]


def blocks_of_python(page):
    """Return the programs on a page."""
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)


# The glossary's names of trainings. train_ppo.py has two, because it logs other columns for games other than Breakout.
TRAIN_PPO = {"Breakout", "other games"}
PPO_TRAININGS = TRAIN_PPO | {"ppo_lunarlander", "ppo_llm_breakout"}
OTHER_TRAININGS = {
    "REINFORCE": "reinforce_cartpole",
    "tic-tac-toe": "actor_critic_tictactoe",
    "DQN": "dqn_space_invaders",
    "GRPO": "grpo_text",
}
SEVERAL_TRAININGS = {"PPO": PPO_TRAININGS, "train_ppo": TRAIN_PPO}


def trainings_in(words):
    """Return the trainings that a cell of the glossary names, such as "all", "PPO, GRPO" or "all but DQN"."""
    if words == "all":
        return PPO_TRAININGS | set(OTHER_TRAININGS.values())
    if words.startswith("all but "):
        return trainings_in("all") - trainings_in(words.removeprefix("all but "))
    named = set()
    for word in words.split(", "):
        named |= SEVERAL_TRAININGS.get(word) or {OTHER_TRAININGS.get(word, word)}
    return named


def explained(training, evaluation=False):
    """Return the columns that the glossary explains for this training: of its evaluations, or all others."""
    page = (Path(__file__).parent.parent / "docs" / "glossary.md").read_text(encoding="utf-8")
    section = page.split("## In metrics.csv")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \|", section, re.M)
    names = {name for name, words in rows if training in trainings_in(words)}
    return {name for name in names if name.startswith("eval_") == evaluation}


def logged_columns(run_dir):
    """Return the columns of a run's metrics.csv, without those of its evaluations."""
    header = (run_dir / "metrics.csv").read_text(encoding="utf-8").split("\n")[0]
    return {name for name in header.split(",") if not name.startswith("eval_")}


def status_in(picture):
    """Read the text of the status line under a page, (text, factor by which it is enlarged), from a picture (H, W, 3).

    Pillow draws each character once more, to compare with.
    """
    font = ImageFont.load_default_imagefont()
    glyphs = {}
    for character in map(chr, range(32, 127)):
        glyph = Image.new("L", (6, 11))
        ImageDraw.Draw(glyph).text((0, 0), character, fill=1, font=font)
        glyphs[(np.array(glyph) > 0).tobytes()] = character
    white = (picture == 235).all(2)
    for factor in (1, 2):
        dots = white[-4 - 11 * factor : -4 : factor, 4::factor]  # there are 4 pixels around it
        dots = dots[:, : dots.shape[1] // 6 * 6].reshape(11, -1, 6).swapaxes(0, 1)
        text = "".join(glyphs.get(cell.tobytes(), "?") for cell in dots)
        if "?" not in text:
            return text.rstrip(), factor
    raise AssertionError("there is no status line")
