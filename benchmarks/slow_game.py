"""The rules of Breakout again, as plain as possible, as a reference for tests and as a baseline for speed."""


class SlowGame:
    """One game in plain Python, with a page that is drawn from nothing, character by character."""

    def __init__(self, serves, bricks):
        """Serve the first ball.

        Args:
            serves: x, dx and the paddle's left end for each of the five lives, (5, 3).
            bricks: which bricks there are, (7, 13) of bool.
        """
        self.serves = [tuple(map(int, serve)) for serve in serves]
        self.bricks = {(r, j) for r in range(7) for j in range(13) if bricks[r][j]}
        self.lives = 5
        self.score = 0
        self.elapsed = 0
        self.serve()

    def serve(self):
        """Put ball and paddle where the next life begins."""
        self.x, self.dx, self.px = self.serves[5 - self.lives]
        self.y = 21
        self.dy = -1

    def step(self, action):
        """Play one step. Returns reward, terminated and life_lost."""
        self.elapsed += 1
        if action == 1:
            self.px = max(1, self.px - 2)
        elif action == 2:
            self.px = min(72, self.px + 2)
        x = self.x + self.dx
        y = self.y + self.dy
        if x <= 0:
            x = 0
            self.dx = -self.dx
        elif x >= 79:
            x = 79
            self.dx = -self.dx
        if y <= 0:
            y = 0
            self.dy = -self.dy
        elif y >= 23:
            self.lives -= 1
            if self.lives == 0:
                return 0, True, True
            self.serve()
            return 0, False, True
        if y == 22 and x in range(self.px, self.px + 7):
            y = 21
            self.dy = -1
            self.dx = -1 if x - self.px in (0, 1, 2, 3) else 1
        self.x = x
        self.y = y
        reward = 0
        for r, j in list(self.bricks):
            if y == 5 + r and 1 + 6 * j <= x <= 6 + 6 * j:
                self.bricks.remove((r, j))
                self.dy = -self.dy
                reward = 10 if self.bricks else 60
        self.score += reward
        return reward, not self.bricks, False

    def page(self):
        """Draw the page as text."""
        page = [["#"] * 80] + [["#"] + [" "] * 78 + ["#"] for _ in range(22)] + [["#"] * 80]
        for r, j in self.bricks:
            page[5 + r][1 + 6 * j : 7 + 6 * j] = "|____|"
        page[22][self.px : self.px + 7] = "======="
        page[self.y][self.x] = "O"
        return "".join("".join(line) + "\n" for line in page)
