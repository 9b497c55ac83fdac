"""The command line of kv-trainer: subcommands, options, examples, and settings of the recipe among them."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence

from safetensors import SafetensorError

from .commands import compare, complain, diagnose, evaluate, export, methods, precompute, train, validate
from .recipe_tree import SECTIONS
from .version import __version__

OVERRIDE = "Any setting of the recipe can be overridden: --section.key value, --section.key=value, --section null."
OVERRIDDEN = re.compile(rf"--(\w[^=]*\.|({'|'.join(SECTIONS)})(=|$))")
QUICK = "a trial run: 20 steps, 128 rows, 32 to evaluate on, no checkpoints, output_dir with -quick; overrides win"
TRAIN = f"""{OVERRIDE}

examples:
  kv-trainer train recipes/quickstart/two_teachers.yaml
  kv-trainer train recipes/quickstart/two_teachers.yaml --training.learning_rate 1e-5 --losses.kv_relation.weight 3
  kv-trainer train recipes/quickstart/two_teachers.yaml --losses.kv null --training.output_dir outputs/no_kv
  kv-trainer train recipes/quickstart/two_teachers.yaml --teachers null --losses.kv_relation null
  kv-trainer train recipes/quickstart/two_teachers.yaml --resume
  kv-trainer train recipes/quickstart/two_teachers.yaml --quick --profile
  accelerate launch -m kv_trainer train recipes/quickstart/two_teachers.yaml
"""
EVALUATE = f"""{OVERRIDE}

examples:
  kv-trainer evaluate outputs/quickstart/two_teachers --recipe recipes/quickstart/two_teachers.yaml
  kv-trainer evaluate gpt2 --recipe recipes/quickstart/two_teachers.yaml --data.max_eval_samples 100
  kv-trainer evaluate gpt2 --recipe recipes/reasoning_gym/evaluate.yaml --evaluation.do_sample true --evaluation.seed 1
"""
VALIDATE = f"""No weights are loaded and nothing is downloaded: only local configs and tokenizers are opened. No code of
a model is run either: one with trust_remote_code is left out, and said so.
{OVERRIDE}

examples:
  kv-trainer validate recipes/quickstart/*.yaml
  kv-trainer validate recipes/quickstart/two_teachers.yaml --student.chat true
  kv-trainer validate recipes/quickstart/two_teachers.yaml --quick
"""

DIAGNOSE = f"""Nothing is trained, and nothing but diagnosis.json in output_dir (and --write) is written. Takes more
memory than a training step; --training.per_device_train_batch_size lowers it.
{OVERRIDE}

examples:
  kv-trainer diagnose recipes/quickstart/two_teachers.yaml
  kv-trainer diagnose recipes/quickstart/two_teachers.yaml --samples 256 --losses.kv.weight 0.1
  kv-trainer diagnose recipes/quickstart/two_teachers.yaml --write recipes/quickstart/two_teachers_balanced.yaml
"""

COMPARE = """An experiment file names a recipe, arms that change it, and seeds. Finished runs are not run again; Ctrl-C
stops all of them, and the same command goes on. The report is in output_dir/report.

examples:
  kv-trainer compare recipes/quickstart/experiment.yaml --quick
  kv-trainer compare recipes/quickstart/experiment.yaml
  kv-trainer compare recipes/quickstart/experiment.yaml --arms two_routed shuffled_rows --seeds 1 2 3
  kv-trainer compare recipes/quickstart/experiment.yaml --report-only
  kv-trainer compare recipes/quickstart/experiments/losses.yaml --runs-from docs/results/losses/runs.zip
"""

EXPORT = """MODEL is the output_dir of a run, or any causal LM. onnx: one float32 graph of any batch and length that
generates with its cache, checked against torch; adapters are merged first. merged: adapters and their base as one
plain checkpoint.

examples:
  kv-trainer export outputs/quickstart/two_teachers --format onnx --output exports/two_teachers
  kv-trainer export outputs/my_adapters --format merged --output exports/my_student
"""

PRECOMPUTE = f"""Each teacher reads each row once; a run with teachers.NAME.source: store then loads no teacher. An
interrupted run goes on where it stopped, and several processes share the work.
{OVERRIDE}

examples:
  kv-trainer precompute recipes/quickstart/two_teachers.yaml --store.path outputs/store
  kv-trainer precompute recipes/quickstart/two_teachers.yaml --store.path outputs/store --store.bits 4
  kv-trainer train recipes/quickstart/two_teachers.yaml --store.path outputs/store \\
    --teachers.chain.source store --teachers.letters.source store
"""

METHODS = """examples:
  kv-trainer methods fusion
  kv-trainer methods losses.kv_relation
  kv-trainer methods
"""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="kv-trainer", description="Distil several teachers' keys and values.")
    parser.add_argument("--version", action="version", version=f"kv-trainer {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def command(function: Callable[..., int], about: str, examples: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            function.__name__,
            help=about,
            description=about,
            epilog=examples,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        sub.set_defaults(function=function)
        sub.add_argument("--traceback", action="store_true", help="show where in the code an error came from")
        return sub

    sub = command(train, "Train the student of a recipe.", TRAIN)
    sub.add_argument("recipe", metavar="RECIPE", help="a .yaml file")
    sub.add_argument("--quick", action="store_true", help=QUICK)
    resume = sub.add_mutually_exclusive_group()
    resume.add_argument("--resume", action="store_true", help="go on from the last checkpoint in output_dir")
    resume.add_argument("--auto-resume", action="store_true", help="the same, or begin where there is none: for queues")
    sub.add_argument("--profile", action="store_true", help="time the parts of a step; printed after training")
    sub = command(evaluate, "Evaluate a model on the evaluation split of a recipe.", EVALUATE)
    sub.add_argument("model", metavar="MODEL", help="a hub name or a folder")
    sub.add_argument("--recipe", required=True, metavar="RECIPE", help="a .yaml file")
    sub.add_argument("--predictions", metavar="FILE.jsonl", help="write what was found of each row, a line each")
    sub = command(validate, "Check recipes without training.", VALIDATE)
    sub.add_argument("recipes", metavar="RECIPE", nargs="+", help=".yaml files")
    sub.add_argument("--quick", action="store_true", help=QUICK)
    sub = command(diagnose, "Measure how hard every loss term pulls, what it costs, and what to change.", DIAGNOSE)
    sub.add_argument("recipe", metavar="RECIPE", help="a .yaml file")
    sub.add_argument("--samples", type=int, default=64, metavar="N", help="training rows to measure on (default 64)")
    sub.add_argument("--write", metavar="COPY.yaml", help="a new recipe: RECIPE with the suggested settings")
    sub = command(compare, "Run the arms of an experiment over seeds, and report what holds.", COMPARE)
    sub.add_argument("experiment", metavar="EXPERIMENT", help="a .yaml file with arms")
    sub.add_argument("--quick", action="store_true", help="few seeds and short runs, in output_dir with -quick")
    sub.add_argument("--arms", nargs="+", default=[], metavar="ARM", help="only these, and what they are compared with")
    sub.add_argument("--seeds", nargs="+", type=int, default=[], metavar="SEED", help="instead of those of the file")
    sub.add_argument("--report-only", action="store_true", help="run nothing: report what is finished")
    sub.add_argument(
        "--runs-from", nargs="+", default=[], metavar="PLACE",
        help="take finished runs of the same settings from other experiments' output_dir, or from runs.zip",
    )  # fmt: skip
    sub = command(export, "Write a trained student in a form that serves it.", EXPORT)
    sub.add_argument("model", metavar="MODEL", help="a hub name or a folder")
    sub.add_argument("--format", required=True, choices=["onnx", "merged"], help="what to write")
    sub.add_argument("--output", required=True, metavar="FOLDER", help="a new or empty folder")
    sub.add_argument("--trust-remote-code", action="store_true", help="run the code that comes with the model")
    sub = command(precompute, "Store the teachers' keys and values of all training rows.", PRECOMPUTE)
    sub.add_argument("recipe", metavar="RECIPE", help="a .yaml file")
    sub.add_argument("--repair", action="store_true", help="rewrite just the shards that are damaged or missing")
    sub = command(methods, "List every method a recipe can switch on, what it needs, and its source.", METHODS)
    sub.add_argument("section", nargs="?", default="", metavar="SECTION", help="only those whose section begins so")
    return parser


def split_overrides(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Arguments for argparse, and the overrides with their values: options with a dot in their name, and sections.

    Done here because argparse would take the value of an option it does not know for a RECIPE.
    """
    plain: list[str] = []
    overrides: list[str] = []
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        if not OVERRIDDEN.match(argument):
            plain.append(argument)
            continue
        overrides.append(argument)
        if "=" not in argument and rest and not re.match(r"--[A-Za-z]", rest[0]):
            overrides.append(rest.pop(0))
    return plain, overrides


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand. Returns 0, or 2 after a user's error, told in one line on stderr."""
    arguments, overrides = split_overrides(sys.argv[1:] if argv is None else argv)
    options = build_parser().parse_args(arguments)
    try:
        return options.function(options, overrides)
    except KeyboardInterrupt:
        print("kv-trainer: interrupted", file=sys.stderr)
        return 130
    except SafetensorError as error:  # of writing: a full disk; what is read names its file
        if options.traceback:
            raise
        complain(OSError(f"A file of tensors could not be written or read: {error}"))
        return 2
    except (ValueError, OSError, ImportError, RuntimeError) as error:  # ImportError: of what a setting needs
        # torch tells of a killed loader worker by a RuntimeError; any other of them is our own mistake.
        if options.traceback or isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
            raise
        complain(error)
        return 2
