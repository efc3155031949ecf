"""Watch a model play in the terminal, also while a training is still making it better."""

import contextlib
import curses
import os
import time
from pathlib import Path

import numpy as np
import torch

from breakout_ascii import MAX_EPISODE_STEPS
from evaluation import check_logits, in_a_state_again
from harness.checkpoint import BEST, LAST, CheckpointError
from harness.messages import shortened, shown
from harness.options import CommandLineError
from policies import SHIPPED, find_model, load_breakout_policy
from viewer.terminal import LEFT, RIGHT, STAY, WATCH_KEYS, WIDTH, TerminalGame, key_lines

ACTIONS = {LEFT: "left", STAY: "stay", RIGHT: "right"}
BAR = 6  # characters


def file_to_watch(name):
    """Return the checkpoint to watch, and a remark on why it was taken, or "".

    Of a run this is the best model, which need not be there yet. Raises CheckpointError if there is nothing to watch.
    """
    if name is not None and any(os.path.isfile(Path(name) / file) for file in ("config.json", BEST, LAST)):
        return Path(name) / BEST, ""
    path, why = find_model(name)
    return (path.parent / BEST, " (the newest run)") if name is None and path.name == LAST else (path, why)


class WatchedModel:
    """Holds the model in a file that a training may replace at any moment.

    Attributes:
        act: a function from a page to logits (1, A) and values (1,), or None before there is a model
        name: of the model's run, or of its file if that is not the best model of a run
        score, steps, update: of the training; the score may be None
        problem: why what is in the file now cannot be played, or ""
    """

    def __init__(self, file, search=False):
        """Load the model if its file is there.

        Args:
            search: whether to change to the newest run as soon as there is one.

        Raises CheckpointError if the file is there, but cannot be played.
        """
        self.file = file
        self.search = search
        self.act = None
        self.name = self.name_of_file()
        self.problem = ""
        self.version = None
        self.next_look = time.monotonic() + 1
        version = self.version_on_disk()
        if version:
            self.load(version)

    def name_of_file(self):
        path = Path(os.path.abspath(self.file))
        return path.parent.name if path.name == BEST else path.name

    def version_on_disk(self):
        """Return what differs between two versions of the file, or None if it is not there."""
        try:
            status = self.file.stat()
        except OSError:
            return None
        return status.st_mtime_ns, status.st_size, status.st_ino

    def load(self, version):
        """Load the model from the file. Raises CheckpointError, before anything has changed, if it cannot be read."""
        policy, meta = load_breakout_policy(self.file)
        forward = policy.inference_function()
        self.act = lambda page: forward(policy.encode(page[None].copy()))
        evaluation = meta.get("evaluation")
        score = evaluation.get("score") if isinstance(evaluation, dict) else None
        self.score = score if isinstance(score, float) else None
        self.steps = meta.get("global_step", 0)
        self.update = meta.get("update_count", 0)
        self.name = self.name_of_file()
        self.problem = ""
        self.version = version

    def described(self, word="after"):
        """Return the score and the steps of the training, such as "887.5 after 524,288 steps"."""
        score = "" if self.score is None else f"{self.score:.1f} "
        return f"{score}{word} {self.steps:,} steps"

    def news(self):
        """Load what has come into the file, and return a line about it, or "" if nothing has.

        This looks at the file at most once a second. A version that cannot be read is tried again.
        """
        if time.monotonic() < self.next_look:
            return ""
        self.next_look = time.monotonic() + 1
        if self.search:
            self.look_for_a_run()
        version = self.version_on_disk()
        if version in (None, self.version):
            return ""
        try:
            self.load(version)
        except CheckpointError as error:
            self.problem = str(error)
            return ""
        kind = "best" if self.file.name == BEST else "model"
        return f"new {kind}: {self.described()} (update {self.update:,})"

    def look_for_a_run(self):
        """Turn from the shipped model to the newest run if there is one now."""
        with contextlib.suppress(CheckpointError):
            self.file, _ = file_to_watch(None)
        self.search = self.file == SHIPPED


class WatchedGame(TerminalGame):
    """A game that a model plays. When it is over, or in an endless cycle, the next one begins."""

    keys = WATCH_KEYS
    NEWS = 4.0  # seconds for which a message is shown
    RESULT = 2.5  # seconds between two games

    def __init__(self, screen, fps, model):
        self.model = model
        self.greedy = True
        self.random = np.random.default_rng()
        self.message = []
        self.message_until = 0.0
        super().__init__(screen, fps, MAX_EPISODE_STEPS)
        if model.act:
            self.say(model.described(), "", "p pauses and lists all keys")

    def say(self, *lines):
        self.message = lines
        self.message_until = time.monotonic() + self.NEWS

    def new_game(self):
        super().new_game()
        self.end = ""  # how the game has ended
        self.seen = set()
        self.read()

    def read(self):
        """Let the model read the page and choose an action."""
        if self.model.act is None:
            return
        logits, values = self.model.act(self.page)
        check_logits(logits)
        self.probabilities = torch.softmax(logits[0].double(), -1).cpu().numpy()
        self.value = float(values[0])
        self.choose()

    def choose(self):
        self.action = int(self.probabilities.argmax())
        if not self.greedy:
            self.action = int(self.random.choice(len(self.probabilities), p=self.probabilities))

    def press(self, key):
        if key in (ord("s"), ord("S")):
            self.greedy = not self.greedy
            self.seen.clear()
            self.say("greedy: it takes the most probable action" if self.greedy else "its actions are sampled")
            if self.model.act:
                self.choose()
        else:
            fps = self.fps
            super().press(key)
            if self.fps != fps:
                self.say(f"{self.fps:.3g} steps a second")

    def step(self):
        if news := self.model.news():
            self.say(news)
            self.new_game()
        elif self.end:
            if time.monotonic() >= self.next_game:
                self.new_game()
        elif self.model.act:
            self.play()

    def play(self):
        self.page, _, terminated, truncated, self.info = self.env.step(self.action)
        self.read()
        if terminated:
            self.end = self.result()
        elif truncated:
            self.end = f"{MAX_EPISODE_STEPS:,} steps are over: {self.info['score']} points"
        elif self.greedy and in_a_state_again(self.env.games, self.seen)[0]:
            self.end = f"caught in an endless cycle: {self.info['score']} points"
        self.next_game = time.monotonic() + self.RESULT

    def show(self):
        if self.model.act is None:
            top = "waiting", self.model.name.encode("ascii", "backslashreplace").decode()[-50:]
            bottom = "p: pause  q: quit"
        else:
            status = f"{self.status()}  {'greedy' if self.greedy else 'sampled'}"
            top = status, self.model_line(WIDTH - 9 - len(status))
            bottom = "  ".join([*map(self.bar, ACTIONS), f"value {self.value:.1f}", "p: pause"])
        self.window.show(self.page, top, (bottom, ""), self.box())

    def model_line(self, width):
        """Return the model's name and what it has reached, in a number of characters. A long name loses its start."""
        # A name of other characters might take more cells than it has characters, or be impossible to show.
        name = self.model.name.encode("ascii", "backslashreplace").decode()
        reached = self.model.described("at")
        room = max(width - len(reached) - 2, 8)
        return f"{name if len(name) <= room else '...' + name[3 - room :]}: {reached}"

    def box(self):
        """Return the lines that are shown over the game."""
        if self.paused:
            return [f"paused: p or space goes on; {self.fps:.3g} steps a second", "", *key_lines(self.keys)]
        lines = [f"{self.end}; a new game follows"] if self.end else []
        if self.model.act is None:
            lines += [f"waiting for {BEST}", "", "The training's first evaluation writes it."]
            lines += [f"For a run without evaluations, name its {LAST} instead."]
        elif time.monotonic() < self.message_until:
            lines += self.message
        if self.model.problem:
            lines += ["The newest version is tried again every second:", shortened(self.model.problem, 74)]
        return lines

    def bar(self, action):
        """Return the probability of an action as text: its name, a bar and a number."""
        probability = self.probabilities[action]
        return f"{ACTIONS[action]} {'=' * round(BAR * probability):.<{BAR}} {100 * probability:3.0f}%"


def watch(name, fps):
    """Let the model of a run or checkpoint, or of the newest run for None, play in the terminal until q is pressed."""
    torch.set_num_threads(1)  # more would only disturb a training beside it
    try:
        file, why = file_to_watch(name)
        model = WatchedModel(file, search=name is None and file == SHIPPED)
    except CheckpointError as error:
        raise CommandLineError(str(error)) from None
    print(f"{shown(file)}: {model.described() if model.act else 'not written yet'}{why}")
    curses.wrapper(lambda screen: WatchedGame(screen, fps, model).run())
