"""Imports between the parts of the project: which part may import which, and what no training imports.

The tests read the sources. A part is a file at the top or a folder.
"""

import ast
import functools
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parent.parent

# What each part imports of the parts above it. Benchmarks and tests may import anything, and nothing imports them.
# fmt: off
IMPORTS = {
    "harness": [],
    "breakout_ascii": [],
    "games": ["harness"],
    "model": [],
    "rollout_buffer": [],
    "trainer": ["harness"],
    "ppo": ["harness", "rollout_buffer", "trainer"],
    "callbacks": ["harness"],
    "evaluation": ["breakout_ascii", "games"],
    # The checks of a GPU repeat PPO's update on the CPU.
    "fast": ["harness", "breakout_ascii", "model", "rollout_buffer", "ppo"],
    "policies": ["harness", "breakout_ascii", "games", "model", "evaluation"],
    "train_ppo": ["harness", "breakout_ascii", "games", "model", "ppo", "callbacks", "evaluation", "policies"],
    "viewer": ["harness", "breakout_ascii", "model", "evaluation", "policies"],
    "load_model": ["harness", "breakout_ascii", "games", "evaluation", "policies", "viewer"],
    "algorithms": ["harness", "rollout_buffer", "trainer", "ppo", "callbacks", "evaluation", "viewer"],
    "sweep": ["harness", "train_ppo", "algorithms"],
}
# fmt: on
# The game shows itself when it is played or rendered, and only then.
DEPARTURES = {("breakout_ascii", "viewer")}


@functools.cache
def modules():
    """Return {name: file} of all modules of the project except its tests."""
    folders = [folder for folder in (*IMPORTS, "benchmarks") if (ROOT / folder).is_dir()]
    files = [*ROOT.glob("*.py"), *(file for folder in folders for file in (ROOT / folder).rglob("*.py"))]
    names = [".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for file in files]
    return dict(zip(names, files))


@functools.cache
def imports(name):
    """Return two sets of what a module imports: at once, and later, in its functions or when it is run as a program.

    What belongs to the project is given as the name of its module, anything else as the name of a library.
    """
    at_once, later = set(), set()
    pending = [(node, at_once) for node in ast.parse(modules()[name].read_text(encoding="utf-8")).body]
    while pending:
        node, found = pending.pop()
        if isinstance(node, ast.Import):
            found |= {module_of(alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} has a relative import"
            found |= {module_of(f"{node.module}.{alias.name}") for alias in node.names}
        function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        as_program = isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"
        if function or as_program:
            found = later
        pending += [(child, found) for child in ast.iter_child_nodes(node)]
    return at_once, later


def module_of(path):
    """Return the longest part of a dotted path that is a module of the project, or else its library."""
    library = path.split(".")[0]
    while path and path not in modules():
        path = path.rpartition(".")[0]
    return path or library


def part_of(name):
    return name.split(".")[0]


def test_imports_go_one_way_between_the_parts():
    """Every part imports only what the table allows, and the table is in an order without circles."""
    parts = {part_of(name) for name in modules()}
    assert parts == {*IMPORTS, "benchmarks"}
    for i, (part, allowed) in enumerate(IMPORTS.items()):
        assert set(allowed) <= set([*IMPORTS][:i]), part
    found = {part: set() for part in parts}
    for name in modules():
        at_once, later = imports(name)
        found[part_of(name)] |= {part_of(other) for other in at_once | later} & parts - {part_of(name)}
        found[part_of(name)] -= {other for part, other in DEPARTURES if part == part_of(name) and other not in at_once}
    for part, allowed in IMPORTS.items():
        assert found[part] == set(allowed), part


def test_no_module_imports_itself_by_way_of_others():
    """Such a circle works or fails depending on which of its modules is imported first."""
    graph = {name: imports(name)[0] & modules().keys() - {name} for name in modules()}
    assert len([*TopologicalSorter(graph).static_order()]) == len(modules())


def imported_at_once(name):
    """Return all that is imported with a module, directly or indirectly, and with fast/, which policies.py imports."""
    found = set()
    pending = {name, "fast"}
    while pending:
        module = pending.pop()
        found.add(module)
        if module in modules():
            pending |= imports(module)[0] - found
    return found


def trainings():
    """Return the modules of algorithms/ that can be run."""
    return [f"algorithms.{file.stem}" for file in (ROOT / "algorithms").glob("*.py") if file.stem != "__init__"]


def test_no_training_imports_what_draws():
    """A machine that only trains needs neither the viewer nor Pillow, and a training starts without loading Matplotlib.

    Where a training draws in the end, a function imports what it needs.
    """
    drawing = {"load_model", "viewer", "PIL", "imageio", "matplotlib", "tensorboard"}
    assert len(trainings()) >= 7
    for name in ("train_ppo", "ppo", "callbacks", *trainings()):
        imported = imported_at_once(name)
        assert not drawing & {part_of(module) for module in imported}, name


def test_no_training_imports_another():
    """Each training in algorithms/ can be read, changed or deleted by itself: they share only algorithms/parts/."""
    for name in modules():
        if part_of(name) == "algorithms":
            at_once, later = imports(name)
            assert not (at_once | later) & {"train_ppo", *trainings()} - {name}, name


def test_only_one_file_knows_whether_the_shortcuts_are_there():
    """Everything outside of fast/ takes them from policies.py, which looks whether the folder exists."""
    for name in modules():
        if part_of(name) not in ("fast", "benchmarks"):
            at_once, later = imports(name)
            assert "fast" not in {part_of(module) for module in at_once | later}, name
