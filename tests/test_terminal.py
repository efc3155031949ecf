"""The terminal game is played on a stand-in for the screen, and as a whole program in pseudo-terminals."""

import importlib
import os
import select
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch

import breakout_ascii
import viewer.terminal
from breakout_ascii import BRICK_COLOURS, COLOURS
from games.game import load_game
from harness.checkpoint import BEST, LAST, CheckpointError, load_checkpoint, save_checkpoint
from model import GPT, GPTConfig
from policies import SHIPPED

curses = pytest.importorskip("curses")
watch = importlib.import_module("viewer.watch")  # it needs curses

FPS = 20
RIGHT, LEFT, DOWN = curses.KEY_RIGHT, curses.KEY_LEFT, curses.KEY_DOWN
QUIT = ord("q")


class Screen:
    """A stand-in for a curses window. Keys are pressed at given times, and each frame is kept with its time.

    A key may also be (rows, columns), which changes the size of the window, or a function that is called.
    """

    now = 0.0  # the time in seconds, which passes only in `getch`

    def __init__(self, keys, size=(24, 80)):
        self.keys = [(Screen.now + seconds, key) for seconds, key in sorted(keys, key=lambda item: item[0])]
        self.begun = Screen.now
        self.frames = []
        self.size = size

    def getmaxyx(self):
        return self.size

    def erase(self):
        self.lines = {}

    def addstr(self, row, column, text, attribute):
        line = self.lines.get(row, "")
        assert len(line) == column and column + len(text) <= self.size[1] and row < self.size[0]
        self.lines[row] = line + text

    def refresh(self):
        self.frames.append((Screen.now - self.begun, [*self.lines.values()]))

    def timeout(self, milliseconds):
        self.end = Screen.now + milliseconds / 1000

    def getch(self):
        moment, key = self.keys[0]
        if moment > self.end:
            Screen.now = self.end
            return -1
        Screen.now = max(Screen.now, moment)
        del self.keys[0]
        if isinstance(key, tuple):
            self.size = key
            return curses.KEY_RESIZE
        if callable(key):
            key()
            return -1
        return key

    def at(self, seconds):
        """Return the lines that could be seen at this time."""
        return [lines for moment, lines in self.frames if moment <= seconds + 1e-6][-1]

    def text_at(self, seconds):
        return "\n".join(self.at(seconds))


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    for module in (viewer.terminal, watch):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: Screen.now))


def played(*keys, end=3.0, fps=FPS, **options):
    """Play with these keys, each (seconds, key), until `end`. Returns the `Screen`."""
    screen = Screen([*keys, (end, QUIT)], **options)
    viewer.terminal.PlayedGame(screen, fps).run()
    assert not screen.keys
    return screen


def paddle(lines):
    return lines[22].index("=")


def score(lines):
    return int(lines[0].split()[2])


def ball(lines):
    """Return the row and the column of the ball, or None where it is below a text."""
    inside = [(row, line.index("O")) for row, line in enumerate(lines) if row < 22 and "O" in line]
    return inside[0] if inside else None


# --- playing ----------------------------------------------------------------------------------------------------------


def test_every_ball_waits_until_a_key_serves_it():
    """Nothing is lost meanwhile, and a key that was meant for a lost ball does not serve the next."""
    space = ord(" ")  # serves without moving the paddle, so the ball is lost after some 22 steps
    screen = played((3, space), (8, LEFT), end=8.5)
    assert ball(screen.at(2.9)) == (21, 40) and "press left, right or space to serve" in screen.text_at(2.9)
    assert ball(screen.at(3.3))[0] < 21 and "serve" not in screen.text_at(3.3)
    lost = next(moment for moment, lines in screen.frames if "lives 4" in lines[0])
    for moment in (lost, 7.9):
        assert ball(screen.at(moment)) == (21, 40) and "lives 4" in screen.at(moment)[0]
        assert "lives left: 4" in screen.text_at(moment) and "to serve" in screen.text_at(moment)
    assert ball(screen.at(8.3))[0] < 21 and paddle(screen.at(8.3)) < 36

    early = played((0, space), (lost - 3 + 0.1, LEFT), end=4)
    assert ball(early.at(3.9)) == (21, 40) and "lives 4" in early.at(3.9)[0]


def test_a_key_that_is_held_moves_the_paddle_without_a_stop():
    """Terminals repeat a key that is held after up to half a second, then about every 30 ms, some only every 90 ms."""
    for interval in (0.03, 0.09):
        repetitions = [(0.5 + i * interval, RIGHT) for i in range(round(0.5 / interval))]
        screen = played((0, RIGHT), *repetitions, end=1.6)
        places = [paddle(screen.at(i / FPS)) for i in range(1, 32)]
        steps = [b - a for a, b in zip(places, places[1:])]
        assert all(sum(steps[i : i + 3]) > 0 for i in range(8)), "it moves from the beginning"
        assert all(step == 2 for step in steps[10:18]), "and in every step once the key repeats"
        assert not any(steps[24:]), "until soon after it is released"


def test_a_short_press_moves_the_paddle_by_about_its_width_and_other_keys_end_that():
    assert 6 <= paddle(played((0, RIGHT), end=1).at(0.9)) - 36 <= 10
    assert paddle(played((0, RIGHT), (0.06, DOWN), end=1).at(0.9)) == 38
    turned = played((0, RIGHT), (0.06, LEFT), end=1)
    assert [paddle(turned.at(moment)) for moment in (0.051, 0.101)] == [38, 36] and paddle(turned.at(0.9)) < 36
    slow = played((0, RIGHT), (0.1, RIGHT), end=5, fps=1)  # a step is longer than half a second
    assert [paddle(slow.at(moment)) for moment in (0.9, 1.1, 2.1, 4.9)] == [36, 38, 38, 38]


@pytest.mark.parametrize("pause", ["p", " ", (30, 100)])
def test_a_pause(pause):
    """A window that changes its size pauses too. A move key goes on, as the keys that pause do."""
    key = ord(pause) if isinstance(pause, str) else pause
    screen = played((0, RIGHT), (0.52, key), (4, ord("p")), (4.3, key), (8, LEFT), end=8.2)
    assert "paused" in screen.text_at(0.6) and "faster, slower" in screen.text_at(0.6)
    assert screen.at(0.6) == screen.at(3.9) and "paused" not in screen.text_at(4.2)
    assert "paused" in screen.text_at(7.9) and "lives 5" in screen.text_at(7.9)
    assert "paused" not in screen.text_at(8.1) and paddle(screen.at(8.15)) < paddle(screen.at(4.2))


def test_a_window_that_is_too_small_says_what_is_needed_and_the_game_waits():
    screen = played((0, RIGHT), (0.52, (20, 60)), (1, LEFT), (4, (6, 10)), (5, (24, 80)), end=5.5)
    assert screen.at(0.6) == ["the window is 60x20, but the game needs 80x24 (q: quit)"]
    assert "".join(screen.at(4.5)).startswith("thewindow")  # what fits
    assert paddle(screen.at(5.4)) == paddle(screen.at(0.51)) and "paused" in screen.text_at(5.4)


def test_a_game_that_is_over_says_the_score_until_a_new_one_begins():
    # Nobody moves, so every ball is lost, in all 32 games at the latest after 54 steps, which take 2.7 s.
    keys = [(4 * i, ord(" ")) for i in range(5)] + [(20, ord("r"))]
    screen = played(*keys, end=20.5)
    over = screen.text_at(19.9)
    assert f"GAME OVER: {score(screen.at(19.9))} points" in over and "r: new game" in over
    assert "lives 0" in over and "lives 5" in screen.at(20.4)[0] and ball(screen.at(20.4)) == (21, 40)


def test_keys_change_the_speed():
    """The speed is shown, and steps follow each other as fast as it says."""
    screen = played(*[(i / 100, ord("+")) for i in range(4)], (1, LEFT), (1.5, ord("-")), end=2)
    assert "48.8 steps a second" in screen.at(0.9)[0] and "39.1 steps a second" in screen.at(1.6)[0]
    assert 22 <= len({tuple(lines) for moment, lines in screen.frames if 1 < moment < 1.5}) <= 26
    assert "0.1 steps" in played(*[(0.1, ord("-"))] * 50, end=9).at(8)[0]


def test_the_ball_is_shown_over_the_score():
    window = viewer.terminal.Window(Screen([(0, QUIT)]))
    env = breakout_ascii.BreakoutAscii()
    env.reset()
    games = env.games
    games.ball_x[:] = 5
    games.ball_y[:] = 0
    games.draw(games.index >= 0)
    window.show(games.pages[0].flatten(), ("score 0", "right"), ("left", ""))
    assert window.screen.frames[0][1][0] == "## scOre 0 " + "#" * 60 + " right ##"


# --- colours ----------------------------------------------------------------------------------------------------------


def test_colours_become_the_nearest_that_a_terminal_has():
    """Red, yellow, green, cyan and magenta stay what they are, and no colour becomes black."""
    names = {
        getattr(curses, f"COLOR_{name}"): name.lower() for name in "RED GREEN YELLOW CYAN MAGENTA WHITE BLUE".split()
    }
    colours = viewer.terminal.palette(8)
    assert [names[viewer.terminal.nearest(x, colours)] for x in (*BRICK_COLOURS[:1], *BRICK_COLOURS[3:6])] == [
        "red",
        "yellow",
        "green",
        "cyan",
    ]
    assert [names[viewer.terminal.nearest(COLOURS[c], colours)] for c in "#=O"] == ["white", "magenta", "white"]
    assert viewer.terminal.nearest(COLOURS["#"], viewer.terminal.palette(16)) == 8
    assert viewer.terminal.nearest((95, 135, 175), viewer.terminal.palette(256)) == 67
    assert viewer.terminal.palette(2) == {}


def test_no_color(monkeypatch):
    """NO_COLOR in the environment leaves the colours out, unless it is empty (https://no-color.org)."""
    monkeypatch.setattr(curses, "has_colors", lambda: True)
    monkeypatch.setattr(curses, "COLORS", 256, raising=False)
    monkeypatch.setattr(curses, "use_default_colors", lambda: None)
    monkeypatch.setattr(curses, "init_pair", lambda *args: None)
    monkeypatch.setattr(curses, "color_pair", lambda pair: pair)
    for value, expected in (("", 10), ("1", 0)):
        monkeypatch.setenv("NO_COLOR", value)
        assert len(viewer.terminal.colour_attributes()) == expected


# --- watching ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shipped():
    return load_checkpoint(SHIPPED)


def save_best(run_dir, shipped, score, steps):
    save_checkpoint(run_dir / BEST, shipped | {"evaluation": {"score": score}, "global_step": steps, "update_count": 3})


def watched(model, *keys, end, fps=FPS):
    screen = Screen([*keys, (end, QUIT)])
    watch.WatchedGame(screen, fps, model).run()
    return screen


def test_a_better_model_begins_a_new_game(tmp_path, shipped):
    """A run's first model is waited for, a file that cannot be read is tried again, and what is played is named."""
    (tmp_path / "config.json").write_text("{}")
    file, _ = watch.file_to_watch(tmp_path)
    screen = watched(
        watch.WatchedModel(file),
        (2, lambda: save_best(tmp_path, shipped, 187.5, 16_384)),
        (12, lambda: file.write_bytes(b"half")),
        (15, lambda: save_best(tmp_path, shipped, 887.5, 524_288)),
        end=17,
    )
    assert f"waiting for {BEST}" in screen.text_at(1.9) and LAST in screen.text_at(1.9)
    assert "new best: 187.5 after 16,384 steps (update 3)" in screen.text_at(4)
    assert f"{tmp_path.name[-10:]}: 187.5 at 16,384 steps" in screen.at(11)[0]
    assert "tried again" in screen.text_at(14) and "187.5" in screen.at(14)[0] and screen.at(13) != screen.at(14)
    assert "new best: 887.5 after 524,288 steps" in screen.text_at(16.5)
    assert score(screen.at(14)) > 20 > score(screen.at(16.1)) and "tried" not in screen.text_at(16.5)


def test_the_probabilities_are_those_of_the_page_that_is_shown(monkeypatch):
    """The actions are greedy, or with the key s sampled."""
    model = watch.WatchedModel(SHIPPED)
    screen = watched(model, (2, ord("s")), (4, ord("+")), (6, ord("p")), end=7)
    assert "greedy" in screen.at(1)[0] and "breakout.safetensors: at 4,014,080 steps" in screen.at(1)[0]
    assert "sampled" in screen.at(3)[0] and "25 steps a second" in screen.text_at(5) and "faster" in screen.text_at(6.5)
    page = "\n".join(["#" * 80, *screen.at(1.5)[1:-1], "#" * 80, ""])
    if "steps" in page:  # a message
        page = "\n".join(
            line if "steps" not in line and "keys" not in line else f"#{'':78}#" for line in page.split("\n")
        )
    logits, values = model.act(torch.tensor(list(page.encode()), dtype=torch.uint8).numpy())
    assert len(page) == breakout_ascii.TOKENS
    for name, action in (("left", 1), ("stay", 0), ("right", 2)):
        share = logits.softmax(-1)[0, action].item()
        assert f"{name} {'=' * round(6 * share):.<6} {100 * share:3.0f}%" in screen.at(1.5)[-1]
    assert f"value {values.item():.1f} " in screen.at(1.5)[-1]


def test_an_endless_cycle_ends():
    """The paddle follows the ball for ever, and no brick is in its way."""
    model = watch.WatchedModel(SHIPPED)

    def follow(page):
        page = page.reshape(24, 81)
        left = (page == ord("O")).any(0).argmax() - (page[22] == ord("=")).argmax() - 3
        return torch.tensor([[float(left == 0), float(left < 0), float(left > 0)]]), torch.zeros(1)

    model.act = follow
    screen = Screen([(10, QUIT)])
    game = watch.WatchedGame(screen, FPS, model)
    game.page, game.info = game.env.reset(options={"serves": [-1] * 5})
    game.env.games.bricks[0, 1:] = False
    game.env.games.bricks[0, 0, 1:] = False
    game.env.games.draw(game.env.games.index >= 0)
    game.run()
    moment, lines = next((moment, lines) for moment, lines in screen.frames if "endless cycle" in "\n".join(lines))
    assert "0 points; a new game follows" in "\n".join(lines) and "lives 5" in lines[0]
    assert screen.text_at(moment + 2.6).count("|____|") == 91


def test_a_slow_model_leaves_half_of_the_time_to_others():
    """A training beside it may need the cores. Keys still work."""
    model = watch.WatchedModel(SHIPPED)
    act = model.act
    calls = []

    def slow(page):
        Screen.now += 0.5
        calls.append(Screen.now)
        return act(page)

    model.act = slow
    screen = watched(model, (3, ord("p")), end=12)
    assert 2 <= len(calls) <= 5 and "paused" in screen.text_at(4.5)


def test_what_is_watched(tmp_path, monkeypatch, shipped):
    """The file or the run that was named, else the newest run, else the shipped model until there is a run."""
    monkeypatch.chdir(tmp_path)
    assert watch.file_to_watch(None)[0] == SHIPPED
    model = watch.WatchedModel(SHIPPED, search=True)
    run_dir = tmp_path / "runs" / "first"
    run_dir.mkdir(parents=True)
    save_checkpoint(run_dir / LAST, shipped)
    assert watch.file_to_watch(None)[0].resolve() == run_dir / BEST
    assert watch.file_to_watch(run_dir / LAST)[0] == run_dir / LAST
    Screen.now += 2
    assert model.news() == "" and model.name == SHIPPED.name
    save_best(run_dir, shipped, 500.0, 1000)
    Screen.now += 2
    assert model.news().startswith("new best: 500.0") and model.name == "first" and not model.search
    with pytest.raises(CheckpointError, match="no such file"):
        watch.file_to_watch("nothing")
    (run_dir / BEST).write_bytes(b"x")
    with pytest.raises(CheckpointError, match="is no checkpoint"):
        watch.WatchedModel(run_dir / BEST)


def test_a_model_of_another_game_is_refused(tmp_path, monkeypatch, capsys):
    """One line says which game it was trained on."""
    config = GPTConfig(**load_game("games.catch:Catch-v0").page_sizes(), n_head=4, n_embd=16)
    state = {"gpt_config": asdict(config), "model": dict(GPT(config).state_dict()), "game": "games.catch:Catch-v0"}
    save_checkpoint(tmp_path / "catch.safetensors", state)
    monkeypatch.setattr(viewer.terminal, "terminal_problem", lambda: None)
    assert viewer.terminal.main(["--watch", str(tmp_path / "catch.safetensors")]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "was trained on games.catch:Catch-v0 and cannot play BreakoutAscii-v0, because it has rows 16" in error


# --- the program ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--fps", "0"], "argument --fps: must be a number in [0.1, 1000.0], not '0'"),
        (["--fps", "nan"], "argument --fps: must be a number in [0.1, 1000.0], not 'nan'"),
        (["--fp", "15"], "unknown argument --fp; did you mean --fps?"),
        (["runs/first"], "unknown argument runs/first"),
        (["--watch", ""], "argument --watch: is empty; name a file or a directory"),
        (["--watch", "nothing"], "nothing: there is no such file; check the path and its permissions"),
    ],
)
def test_a_mistake_is_one_line(monkeypatch, capsys, arguments, said):
    monkeypatch.setattr(viewer.terminal, "terminal_problem", lambda: None)
    assert viewer.terminal.main(arguments) == 1
    assert capsys.readouterr().err.startswith(f"breakout_ascii.py: {said}")


def test_help_names_every_key(capsys):
    with pytest.raises(SystemExit, match="0"):
        viewer.terminal.main(["--help"])
    text = capsys.readouterr().out
    for key, effect in (viewer.terminal.PLAY_KEYS | viewer.terminal.WATCH_KEYS).items():
        assert any(line.startswith(key) and effect in line for line in text.splitlines()), key
    assert "--watch [MODEL]" in text and max(map(len, text.splitlines())) <= 120


def test_a_call_takes_no_command_line_of_its_caller(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["ipykernel_launcher.py", "-f", "kernel.json"])
    monkeypatch.setattr(viewer.terminal, "terminal_problem", lambda: "no terminal here")
    assert viewer.terminal.main() == viewer.terminal.main(["--fps", 30]) == 1
    assert capsys.readouterr().err == "breakout_ascii.py: no terminal here\n" * 2


def test_play_without_a_terminal_is_one_line_and_needs_no_torch():
    program = "import sys, viewer.terminal; print(viewer.terminal.main(), 'torch' in sys.modules)"
    run = subprocess.run(
        [sys.executable, "-c", program],
        cwd=os.path.dirname(breakout_ascii.__file__),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert run.stderr == "breakout_ascii.py: input and output must be a terminal\n" and run.stdout == "1 False\n"


@pytest.mark.parametrize("name", ["stdin", "stdout"])
def test_input_or_output_that_is_closed_is_no_terminal(monkeypatch, name):
    """After <&- or >&- in a shell, Python's stdin or stdout is None."""
    terminal = SimpleNamespace(isatty=lambda: True)
    streams = {"stdin": terminal, "stdout": terminal} | {name: None}
    monkeypatch.setattr(viewer.terminal, "sys", SimpleNamespace(**streams))
    assert viewer.terminal.terminal_problem() == "input and output must be a terminal"


def test_play_without_curses(monkeypatch):
    monkeypatch.setattr(viewer.terminal, "curses", None)
    assert "pip install windows-curses" in viewer.terminal.terminal_problem()


def test_windows_has_no_description_of_its_terminal(monkeypatch):
    terminal = SimpleNamespace(isatty=lambda: True)
    monkeypatch.setattr(viewer.terminal, "sys", SimpleNamespace(stdin=terminal, stdout=terminal))
    unknown = SimpleNamespace(setupterm=lambda: None, tigetstr=lambda name: None, error=curses.error)
    monkeypatch.setattr(viewer.terminal, "curses", unknown)
    for name, able in (("posix", False), ("nt", True)):
        monkeypatch.setattr(viewer.terminal, "os", SimpleNamespace(name=name))
        assert (viewer.terminal.terminal_problem() is None) == able


# --- in pseudo-terminals ----------------------------------------------------------------------------------------------


class Terminal:
    """The game as a program in a pseudo-terminal, whose output pyte turns into a screen."""

    def __init__(self, *arguments, rows=24, columns=80, term="xterm-256color", **environment):
        pyte, pty, self.fcntl, self.termios = map(pytest.importorskip, ("pyte", "pty", "fcntl", "termios"))
        self.screen = pyte.Screen(columns, rows)
        self.stream = pyte.ByteStream(self.screen)
        self.ours, self.its = pty.openpty()
        self.set_size(rows, columns)
        # Whoever imports readline leaves LINES and COLUMNS behind, and curses would believe them.
        inherited = {key: os.environ[key] for key in os.environ if key not in ("LINES", "COLUMNS", "NO_COLOR")}
        self.process = subprocess.Popen(
            [sys.executable, breakout_ascii.__file__, *map(str, arguments)],
            env=inherited | {"TERM": term} | environment,
            **dict.fromkeys(("stdin", "stdout", "stderr"), self.its),
        )

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.process.kill()
        self.process.wait()
        os.close(self.ours)
        os.close(self.its)

    def set_size(self, rows, columns):
        size = rows.to_bytes(2, sys.byteorder) + columns.to_bytes(2, sys.byteorder) + bytes(4)
        self.fcntl.ioctl(self.its, self.termios.TIOCSWINSZ, size)

    def resize(self, rows, columns):
        self.set_size(rows, columns)
        self.screen.resize(rows, columns)
        self.process.send_signal(signal.SIGWINCH)

    def type(self, keys):
        os.write(self.ours, keys)

    def read(self):
        if select.select([self.ours], [], [], 0.02)[0]:
            self.stream.feed(os.read(self.ours, 65536))

    @property
    def text(self):
        return "\n".join(self.screen.display)

    def wait_until(self, condition):
        """Wait until a condition, a function of the text on the screen, is true, and return the text."""
        end = time.monotonic() + 60
        while not condition(self.text):
            assert time.monotonic() < end and self.process.poll() is None, self.text
            self.read()
        return self.text

    def wait_for(self, *texts):
        """Wait until all these texts are on the screen, and return what is there."""
        return self.wait_until(lambda shown: all(text in shown for text in texts))

    def wait(self):
        """Return the exit status."""
        end = time.monotonic() + 60
        while self.process.poll() is None and time.monotonic() < end:
            self.read()  # the program may not be able to end before its output is read
        return self.process.wait(1)

    def colours(self):
        """Return the colours of everything on the screen, in front and behind."""
        cells = [cell for line in self.screen.buffer.values() for cell in line.values()]
        return {cell.fg for cell in cells} | {cell.bg for cell in cells}


def test_playing_in_a_terminal_of_several_sizes():
    with Terminal("--fps", 30, rows=20, columns=60) as terminal:
        terminal.wait_for("the window is 60x20, but the game needs 80x24")
        terminal.resize(24, 80)
        terminal.wait_for("press left, right or space to serve", "lives 5", "30 steps a second")
        terminal.wait_until(
            lambda text: all(line[0] + line[-1] == "##" for line in text.split("\n"))
        )  # the last cell too
        assert terminal.text.count("|____|") == 91 and len(terminal.colours()) >= 8
        terminal.type(b"\x1bOC")
        terminal.wait_until(lambda text: "serve" not in text and " O " in text)
        terminal.type(b"+")
        terminal.wait_for("37.5 steps")
        terminal.type(b"p")
        paused = terminal.wait_for("paused", "lives 5")
        terminal.type(b" ")
        terminal.wait_until(lambda text: "paused" not in text)
        terminal.resize(40, 120)
        terminal.wait_for("paused", "lives 5")
        assert paused != terminal.text
        terminal.type(b"q")
        assert terminal.wait() == 0


def test_a_terminal_without_colours_and_the_ways_out():
    with Terminal(NO_COLOR="1") as terminal:
        terminal.wait_for("to serve", "|____|", "q: quit")
        assert terminal.colours() == {"default"}
    with Terminal(term="vt100") as terminal:
        terminal.wait_for("to serve", "|____|", "q: quit")
        assert terminal.colours() == {"default"}
        terminal.process.send_signal(signal.SIGINT)
        assert terminal.wait() == 130
    with Terminal(term="none") as terminal:
        assert terminal.wait() == 1
        terminal.read()
        assert terminal.text.startswith("breakout_ascii.py: the terminal type in TERM is unknown or too simple")


def test_watching_a_training_in_a_terminal(tmp_path, shipped):
    save_best(tmp_path, shipped, 187.5, 16_384)
    with Terminal("--watch", tmp_path) as terminal:
        terminal.wait_for("187.5 at 16,384 steps", "left ", "stay ", "right ", "%  value ", "greedy", "score 10 ")
        save_best(tmp_path, shipped, 887.5, 524_288)
        terminal.wait_for("new best: 887.5 after 524,288 steps (update 3)", "score 0 ")
        terminal.process.send_signal(signal.SIGTERM)
        assert terminal.wait() == 143
