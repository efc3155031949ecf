"""Runs the trainings of this folder: reads the command line, and trains with all callbacks.

    python -m algorithms.NAME [--constant value] [--resume RUN]                 trains
    python -m algorithms.NAME --play [MODEL] [--episodes 1] [--out NAME.gif]    draws games, or --human shows them
    python -m algorithms.NAME --evaluate [MODEL] [--episodes 100]               prints the score of fresh games as JSON

MODEL is a run or a checkpoint. By default it is the newest run, or without any run the model in algorithms/pretrained/.
"""

from collections.abc import Callable
from typing import NamedTuple

from algorithms.parts.playing import check_algorithm, check_models, play_or_evaluate
from algorithms.parts.progress import waiting
from callbacks import (
    Checkpoints,
    Evaluation,
    LearningCurve,
    MetricsCSV,
    ProgressBar,
    RunDirectory,
    TensorBoard,
    WeightsAndBiases,
)
from harness.device import RANKS
from harness.messages import quoted
from harness.options import CommandLineError, Constants, Values, check_at_most, check_divides
from harness.runs import going_on, load_state, named_again, new_run_dir, program_command, read_run
from harness.supervise import less_memory, memory_advice, train
from ppo import PPOConfig


class Algorithm(NamedTuple):
    """What a file of this folder says about itself, so that `run_algorithm` can train, play and evaluate it.

    A `policy_state` is what `Trainer.policy_state` returned.
    """

    name: str  # of the module, without the package
    doc: str  # what --help shows
    constants: Constants
    kept: tuple  # the constants that a resumed run must not change

    # build(constants: Values) returns a Trainer whose metadata has "algorithm" and "constants". If there are
    # model_constants, it also has "models", as `check_models` takes them.
    build: Callable
    # evaluate(policy_state, episodes, seed, report) returns a dict with a "score". `report` is as in `games_bar`; by
    # default nothing is reported.
    evaluate: Callable
    # frames(policy_state, episodes, seed, human) yields RGB arrays, or None where a window shows the game.
    frames: Callable | None = None
    # play_in_terminal(policy_state, seed) is what --play --human does, and --play too where there are no frames.
    play_in_terminal: Callable | None = None
    # check(constants: Values) raises CommandLineError for constants that do not fit together.
    check: Callable = lambda constants: None
    # callbacks(constants: Values, run_dir) returns callbacks in addition to those that every training has.
    callbacks: Callable = lambda constants, run_dir: []

    episodes: int = 100  # of an evaluation
    units: tuple = ("games", "step")  # what its episodes are called, and a step of one
    frame_ms: int = 40  # between two frames of a gif
    levels: dict = {}  # {label: score}: lines to compare with in the learning curve
    memory_constants: tuple = ()  # the constants to lower if memory runs out, the most effective one first
    model_constants: tuple = ()  # the constants that name a pretrained model; its folder may move after the training


def run_algorithm(algorithm, argv):
    """Train, play or evaluate, whichever the command line asks for. Returns the exit status."""
    if RANKS > 1:
        raise CommandLineError("runs in one process, without torchrun")
    argv = [str(word) for word in argv]
    options = {word.split("=")[0] for word in argv}
    if options & {"--play", "--evaluate"}:
        return play_or_evaluate(algorithm, argv)
    return train_algorithm(algorithm, argv)


def train_algorithm(algorithm, argv):
    """Train a new run, or go on with one. Returns the exit status."""
    program = f"-m algorithms.{algorithm.name}"
    doc = f"""{algorithm.doc or ""}
Constants are edited at the top of algorithms/{algorithm.name}.py, or changed for one run:
    python {program} --seed 1
To watch or to score what was learned:
    python {program} --play --help
"""
    run = read_run(argv, program, doc, algorithm.constants, algorithm.kept, algorithm.check)
    c = Values(**run.constants)
    if run.state:
        check_algorithm(algorithm.name, run.state, run.directory)
    advice = memory_advice("does not fit into memory; try a smaller model, or fewer games at once")
    # Games take seconds to load, language models up to a minute.
    with advice, waiting(f"{algorithm.name}: getting ready"):
        trainer = algorithm.build(c)
    if run.state:
        if algorithm.model_constants:
            check_models(run.state, trainer.metadata["models"])
        load_state(trainer, run)
    run_dir = run.directory or new_run_dir(c.RUN_DIR, f"runs/{algorithm.name}")
    trainer.callbacks = callbacks_of(algorithm, c, program, run_dir, trainer.total_steps)
    advice = {
        FloatingPointError: lower_learning_rate(c),
        MemoryError: less_memory(run.constants, algorithm.memory_constants, algorithm.constants, algorithm.check),
    }
    return train(trainer, run_dir, program, advice)


def callbacks_of(algorithm, c, program, run_dir, steps):
    """The callbacks that every training has, and those of this one. Their order matters: see callbacks.py."""
    metrics = run_dir / "metrics.csv"
    plan = f"{algorithm.name}: {steps:,} steps in all.\nCurve, metrics, checkpoints: {run_dir}."
    label = "watch it play" if algorithm.frames else "read its answers"
    play = " ".join([program_command(program), "--play", quoted(run_dir), *named_again(vars(c))])
    endings = {label: play} | going_on(program, run_dir, vars(c))
    callbacks = [RunDirectory(run_dir)]
    if c.EVAL_INTERVAL:
        callbacks.append(Evaluation(algorithm.evaluate, c.EVAL_INTERVAL))
    callbacks += [
        ProgressBar(f"{plan} Ctrl-C saves and stops.", endings=endings),
        MetricsCSV(metrics),
        TensorBoard(run_dir),
        LearningCurve(run_dir / "learning_curve.png", metrics, algorithm.levels),
        Checkpoints(run_dir, c.SAVE_FREQ),
    ]
    if c.WANDB:
        callbacks.append(WeightsAndBiases(c.WANDB, run_dir))
    return callbacks + algorithm.callbacks(c, run_dir)


def lower_learning_rate(c):
    """The options that halve the learning rate: advice for a training that diverged."""
    options = f" --lr {c.LR / 2:g}"
    if hasattr(c, "MIN_LR"):
        options += f" --min_lr {min(c.MIN_LR, c.LR / 2):g}"
    return options


def check_lr(c):
    """Raises CommandLineError for a learning rate that would rise."""
    check_at_most("MIN_LR", c.MIN_LR, "LR", c.LR)


def check_ppo(c):
    """Raises CommandLineError for constants of PPO that do not fit together."""
    check_lr(c)
    samples = c.NUM_ENVS * c.ROLLOUT_STEPS
    rollout = f"the {samples:,} samples of a rollout (NUM_ENVS * ROLLOUT_STEPS)"
    check_divides("BATCH_SIZE", c.BATCH_SIZE, samples, rollout, lowest=2)


def ppo_config(c):
    """The `PPOConfig` of a training that has a constant lambda."""
    # A field without a constant of its name keeps its default.
    given = {name: getattr(c, name.upper()) for name in PPOConfig.__dataclass_fields__ if hasattr(c, name.upper())}
    return PPOConfig(**given, lambd_end=c.LAMBD, lambd_steps=1)
