"""Snake on a page of text, 12 rows of 24 characters: it eats, grows, and dies of a wall or of its own body.

    ########################
    #       *              #        * food, which lies on a random free cell
    #                      #        > the head, an arrow that points where the snake goes: ^ v < >
    #     oooo>            #        o the body
    ########################        (and seven more rows)

Each food is worth 1 and makes the snake one cell longer. Nothing else has a reward, so a game returns the food eaten.
It ends when the snake runs into a wall or its body, or fills the page.

`gymnasium.make` truncates it after 1000 steps. This limit need not be on the page, because training bootstraps where a
game is truncated; with a snake that starves, the page would have to show its hunger. What the page leaves out is the
order of the body's cells: where the body touches itself, its tail can be in several places.

`python -m games.snake` plays 1000 games by the rule below and 1000 at random. Mean returns and their standard errors:

    the rule: 24.91 ± 0.30
    random play: 0.10 ± 0.01
"""

from collections import deque

import gymnasium
import numpy as np

ROWS = 12
COLUMNS = 25  # with the newline at each line's end
START_LENGTH = 3
MAX_EPISODE_STEPS = 1000

# Cells are numbered as the characters of the page are, and the page is changed cell by cell.
FREE, WALL, BODY, FOOD = b" #o*"
HEADS = b"^v<>"  # for the four actions
MOVES = (-COLUMNS, COLUMNS, -1, 1)
UP, DOWN, LEFT, RIGHT = range(4)
SOLID = "#" * (COLUMNS - 1) + "\n"
HOLLOW = "#" + " " * (COLUMNS - 3) + "#\n"
EMPTY_PAGE = np.frombuffer((SOLID + HOLLOW * (ROWS - 2) + SOLID).encode(), np.uint8)  # (300,)


class Snake(gymnasium.Env):
    metadata = {"render_modes": ["ansi"], "render_fps": 10}
    characters = " #o*^v<>\n"  # a page has no others
    actions = ("up", "down", "left", "right")  # the opposite of where the snake goes means straight on
    colours = {"#": (140, 140, 140), "o": (92, 190, 96), "*": (232, 80, 80)} | dict.fromkeys("^v<>", (206, 196, 70))

    def __init__(self, render_mode=None):
        self.render_mode = render_mode
        self.observation_space = gymnasium.spaces.Box(0, 127, EMPTY_PAGE.shape, np.uint8)
        self.action_space = gymnasium.spaces.Discrete(len(self.actions))

    def reset(self, *, seed=None, options=None):
        """Start in the middle, on the way to the right."""
        super().reset(seed=seed)
        self.page = EMPTY_PAGE.copy()
        self.direction = RIGHT
        head = (ROWS // 2) * COLUMNS + COLUMNS // 2
        self.snake = deque(range(head - START_LENGTH + 1, head + 1))  # cells, from the tail to the head
        self.page[list(self.snake)] = BODY
        self.page[head] = HEADS[self.direction]
        self.place_food()
        return self.page.copy(), {}

    def step(self, action):
        if MOVES[action] != -MOVES[self.direction]:
            self.direction = action
        old_head = self.snake[-1]
        head = old_head + MOVES[self.direction]
        found = self.page[head]
        if found in (WALL, BODY):  # the tail, too: nobody could know from the page that it leaves
            return self.page.copy(), 0.0, True, False, {}
        self.page[old_head] = BODY
        self.page[head] = HEADS[self.direction]
        self.snake.append(head)
        if found == FOOD:
            full = not self.place_food()
            return self.page.copy(), 1.0, full, False, {}
        self.page[self.snake.popleft()] = FREE
        return self.page.copy(), 0.0, False, False, {}

    def place_food(self):
        """Put food on a random free cell. Returns False if there is none."""
        free = np.flatnonzero(self.page == FREE)
        if len(free):
            self.page[self.np_random.choice(free)] = FOOD
        return len(free) > 0

    def render(self):
        return self.page.tobytes().decode("ascii")


def rule(page):
    """Return the action that goes nearest to the food without dying at once."""
    cells = page.tolist()
    head = next(cell for cell, code in enumerate(cells) if code in HEADS)
    food = cells.index(FOOD)

    def distance(action):
        rows, columns = np.subtract(divmod(head + MOVES[action], COLUMNS), divmod(food, COLUMNS))
        return abs(rows) + abs(columns)

    safe = [action for action in range(4) if cells[head + MOVES[action]] in (FREE, FOOD)]
    return min(safe, key=distance, default=UP)


def mean_score(policy, games):
    """Return the mean return of games played by a function from pages to actions, and its standard error."""
    env = gymnasium.make("Snake-v0")
    scores = np.zeros(games)
    for seed in range(games):
        page, _ = env.reset(seed=seed)
        over = False
        while not over:
            page, reward, terminated, truncated, _ = env.step(policy(page))
            scores[seed] += reward
            over = terminated or truncated
    return scores.mean(), scores.std(ddof=1) / games**0.5


if "Snake-v0" not in gymnasium.registry:  # a reload must not warn
    gymnasium.register("Snake-v0", entry_point="games.snake:Snake", max_episode_steps=MAX_EPISODE_STEPS)

if __name__ == "__main__":
    random_numbers = np.random.default_rng(0)
    policies = {"the rule": rule, "random play": lambda page: random_numbers.integers(4)}
    for name, policy in policies.items():
        mean, error = mean_score(policy, games=1000)
        print(f"{name}: {mean:.2f} ± {error:.2f}")
