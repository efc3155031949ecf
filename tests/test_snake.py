"""The rules of Snake against a slow reference and one by one, and the rule that plays it."""

import importlib
import warnings
from collections import deque

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

import games.snake
from games.snake import COLUMNS, FOOD, MAX_EPISODE_STEPS, ROWS, Snake, mean_score, rule

UP, DOWN, LEFT, RIGHT = range(4)
DIRECTIONS = [(-1, 0), (1, 0), (0, -1), (0, 1)]


class SlowSnake:
    """Plays by rows and columns, and draws the whole page each time. It is told where food appears."""

    def __init__(self):
        self.cells = [(6, 10), (6, 11), (6, 12)]  # from the tail to the head
        self.direction = RIGHT

    def step(self, action, food):
        """Returns the reward and whether the snake has died."""
        back = not np.add(DIRECTIONS[action], DIRECTIONS[self.direction]).any()
        direction = self.direction if back else action
        row, column = np.add(self.cells[-1], DIRECTIONS[direction]).tolist()
        if row in (0, 11) or column in (0, 23) or (row, column) in self.cells:
            return 0, True
        self.direction = direction
        self.cells.append((row, column))
        if (row, column) == food:
            return 1, False
        del self.cells[0]
        return 0, False

    def page(self, food):
        """Return the page as text."""
        page = [["#" if row in (0, 11) or column in (0, 23) else " " for column in range(24)] for row in range(12)]
        for row, column in self.cells:
            page[row][column] = "o"
        row, column = self.cells[-1]
        page[row][column] = "^v<>"[self.direction]
        if food:
            page[food[0]][food[1]] = "*"
        return "".join("".join(line) + "\n" for line in page)


def food_on(page):
    """Return the row and column of the food, or None on a page that is full."""
    cells = np.flatnonzero(page == FOOD)
    assert len(cells) <= 1
    return divmod(int(cells[0]), COLUMNS) if len(cells) else None


def set_up(lines, cells, direction):
    """Return a game with this food and snake: what lies inside the walls as lines, and its cells from tail to head."""
    env = Snake()
    env.reset(seed=0)
    lines = [f"#{line:<22}#" for line in lines]
    page = ["#" * 24, *lines, *["#" + " " * 22 + "#"] * (ROWS - 2 - len(lines)), "#" * 24]
    env.page = np.frombuffer("".join(line + "\n" for line in page).encode(), np.uint8).copy()
    env.snake = deque(row * COLUMNS + column for row, column in cells)
    env.direction = direction
    return env


def test_gymnasium_has_nothing_to_say_about_it():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(gymnasium.make("games.snake:Snake-v0").unwrapped)
        importlib.reload(games.snake)


@pytest.mark.parametrize("randomness", [0.0, 0.1, 1.0])
def test_play_equals_the_reference(randomness):
    """With the rule, with random actions, and with some: every page, reward and end is compared."""
    env = Snake(render_mode="ansi")
    rng = np.random.default_rng(0)
    eaten = died = 0
    for seed in range(20):
        page, _ = env.reset(seed=seed)
        slow = SlowSnake()
        terminated = False
        while not terminated:
            food = food_on(page)
            assert page.tobytes().decode("ascii") == slow.page(food) == env.render()
            action = rng.integers(4) if rng.random() < randomness else rule(page)
            page, reward, terminated, truncated, info = env.step(action)
            assert (reward, terminated) == slow.step(action, food) and not truncated and info == {}
            assert page.tobytes().decode("ascii") == slow.page(food_on(page))
            eaten += reward
            died += terminated
    assert died == 20 and eaten > (100 if randomness < 1 else -1)


def test_the_first_page():
    """The snake is in the middle, three cells long, and goes to the right."""
    page, _ = Snake().reset(seed=0)
    lines = page.tobytes().decode("ascii").split("\n")
    assert lines[6].replace("*", " ") == "#" + " " * 9 + "oo>" + " " * 10 + "#"
    assert page.shape == (12 * 25,) and page.dtype == np.uint8 and (page == FOOD).sum() == 1


@pytest.mark.parametrize("action, line", [(RIGHT, "  oo> *"), (LEFT, "  oo> *"), (UP, "  oo  *"), (DOWN, "  oo  *")])
def test_the_snake_turns_but_not_back(action, line):
    env = set_up(["", " oo>  *"], [(2, 2), (2, 3), (2, 4)], RIGHT)
    page, reward, terminated, _, _ = env.step(action)
    lines = page.tobytes().decode("ascii").split("\n")
    assert lines[2] == f"#{line:<22}#" and (reward, terminated) == (0, False)
    assert [lines[1][4], lines[3][4]] == ["^" if action == UP else " ", "v" if action == DOWN else " "]


def test_food_makes_it_longer_and_appears_elsewhere():
    env = set_up(["oo>*"], [(1, 1), (1, 2), (1, 3)], RIGHT)
    page, reward, terminated, _, _ = env.step(RIGHT)
    assert (reward, terminated) == (1, False) and food_on(page) not in (None, (1, 4))
    assert page.tobytes().decode("ascii").replace("*", " ").split("\n")[1] == f"#{'ooo>':<22}#"


@pytest.mark.parametrize("action", [UP, RIGHT])
def test_a_wall_ends_the_game(action):
    env = set_up([" " * 19 + "oo>", "*"], [(1, 20), (1, 21), (1, 22)], RIGHT)
    before = env.page.copy()
    page, reward, terminated, truncated, _ = env.step(action)
    assert (reward, terminated, truncated) == (0, True, False) and (page == before).all()


def test_the_body_ends_the_game_and_the_tail_is_part_of_it():
    """The tail would have left, but nobody could know from the page which cell is the tail."""
    square = set_up(["oo", "<o", "*"], [(1, 1), (1, 2), (2, 2), (2, 1)], LEFT)
    assert square.step(UP)[1:4] == (0, True, False)


def test_a_full_page_ends_the_game():
    """The snake has taken all cells but that of the food."""
    full = ["o" * 22] * (ROWS - 2)
    cells = [(row, column) for row in range(1, 11) for column in (range(1, 23) if row % 2 else range(22, 0, -1))]
    env = set_up([*full[:-1], "*<" + "o" * 20], cells[:-1], LEFT)
    page, reward, terminated, _, _ = env.step(LEFT)
    assert (reward, terminated) == (1, True) and food_on(page) is None


def test_a_game_without_end_is_truncated():
    env = gymnasium.make("games.snake:Snake-v0")
    page, _ = env.reset(seed=0)
    for step in range(1, MAX_EPISODE_STEPS + 1):
        env.unwrapped.page[env.unwrapped.page == FOOD] = ord(" ")  # it goes round in circles and never grows
        _, _, terminated, truncated, _ = env.step([DOWN, LEFT, UP, RIGHT][step % 4])
        assert not terminated and truncated == (step == MAX_EPISODE_STEPS)


def test_pages_have_only_the_characters_that_it_names_and_lines_end_in_newlines():
    env = Snake()
    rng = np.random.default_rng(0)
    seen = set()
    for seed in range(20):
        page, _ = env.reset(seed=seed)
        terminated = False
        while not terminated:
            page, _, terminated, _, _ = env.step(rng.integers(4))
            seen |= set(page.tobytes().decode("ascii"))
            assert (page.reshape(ROWS, COLUMNS)[:, -1] == ord("\n")).all()
    assert seen == set(Snake.characters)
    assert set(Snake.colours) <= seen and len(Snake.actions) == env.action_space.n


def test_a_seed_repeats_its_game():
    def pages(seed):
        env = Snake()
        page, _ = env.reset(seed=seed)
        found = [page.tobytes()]
        for _ in range(100):
            page, _, terminated, _, _ = env.step(rule(page))
            found.append(page.tobytes())
            if terminated:
                page, _ = env.reset()
        return found

    assert pages(3) == pages(3) != pages(4)


def test_the_page_that_an_agent_holds_does_not_change():
    env = Snake()
    page, _ = env.reset(seed=0)
    kept = page.copy()
    env.step(UP)
    assert (page == kept).all()


@pytest.mark.parametrize(
    "lines, action",
    [
        (["oo>  *"], RIGHT),
        (["*  oo>"], DOWN),  # past the wall above and the body on its left
        (["", "   ooo", "   o^", "    o", "*"], RIGHT),  # away from the food, because all else is body
        (["", " ooo", " o^o", " ooo", "*"], UP),  # it cannot go anywhere
    ],
)
def test_the_rule_goes_to_the_food_without_dying_at_once(lines, action):
    """The page is all that it is given."""
    page = set_up(lines, [], RIGHT).page
    assert rule(page) == action


def test_the_rule_is_far_better_than_random_play():
    """What the module states comes from 1000 games."""
    rng = np.random.default_rng(0)
    by_rule, error = mean_score(rule, games=40)
    at_random, _ = mean_score(lambda page: rng.integers(4), games=40)
    assert abs(by_rule - 24.91) < 5 * error < 15 and 0 <= at_random < 1
