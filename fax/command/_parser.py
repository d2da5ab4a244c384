"""The arguments of the command, and their help. It imports nothing that takes time."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from fax._nearest import did_you_mean

KINDS = ("tasks", "algorithms", "models", "aggregators", "optimizers")
EXIT_CODES = """\
exit codes:
  0    done
  1    an error while running, such as a loss that is not finite; checkpoints remain
  2    wrong arguments or a wrong configuration: nothing was run
  3    one of several processes: another one was killed, or had an error
  130  Ctrl-C: the run has saved a checkpoint, and fax resume continues it
  143  SIGTERM, which schedulers send before they end a job: the same
"""
_TOP = """\
Federated learning from the shell: from a task's name to a finished, resumable, plotted run.

  fax run digits                          train a task with its tuned settings
  fax run digits --algorithm scaffold --set client.rate=0.03 --folder runs/a
  fax compare runs/*                      a table and a figure of several runs
  fax sweep digits --grid client.rate=.03,.1,.3
  fax list algorithms                     what there is to choose from
"""
_SOURCE = (
    "a task (see fax list tasks), a configuration in TOML, or module:name, where the module has a "
    "fax.experiment.Experiment of this name, or a function that returns one"
)
_SETTINGS = "a task (see fax list tasks), or a configuration in TOML"
_SET = (
    "change settings, as in client.rate=0.03 cohorts.clients=50 algorithm.mu=0.1; docs/command.md "
    "lists the keys"
)


class Parser(argparse.ArgumentParser):
    """A parser that keeps the line breaks of its texts, and names the nearest known option."""

    def __init__(self, **how: Any) -> None:
        kind = argparse.RawDescriptionHelpFormatter
        super().__init__(allow_abbrev=False, formatter_class=kind, **how)

    def error(self, message: str) -> NoReturn:
        unknown = message.removeprefix("unrecognized arguments: ").split()
        if message.startswith("unrecognized arguments: -"):
            known = [o for action in self._actions for o in action.option_strings]
            message = f"there is no option {unknown[0]}. {did_you_mean(unknown[0], known)}"
        self.exit(2, f"{self.prog}: {message}\nTry {self.prog} --help.\n")


def one_of(what: str, known: Sequence[str]) -> Any:
    """A type for arguments with a few choices, which names the nearest one."""

    def check(text: str) -> str:
        if text not in known:
            raise argparse.ArgumentTypeError(
                f"there is no {what} {text!r}. {did_you_mean(text, known)}"
            )
        return text

    return check


def _round(text: str) -> int | str:
    """The round of a checkpoint."""
    if text == "best":
        return text
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is neither a round nor best.")
    return int(text)


def make_parser(names: Mapping[str, Sequence[str]] | None = None) -> tuple[Parser, dict]:
    """The parser, and those of its commands.

    Args:
      names: of tasks, algorithms and aggregators, for completion. They need not be known to parse.
    """
    names = names or {}
    top = Parser(
        prog="fax",
        usage="fax [--help] [--version] COMMAND [ARGUMENTS]",
        description=_TOP,
        epilog=EXIT_CODES,
    )
    top.add_argument("--version", action="store_true", help="print the version of fax, and exit")
    commands = top.add_subparsers(
        dest="command", metavar="COMMAND [ARGUMENTS]", title="commands", prog="fax"
    )
    parsers = {}

    def command(name: str, summary: str, description: str, epilog: str = "") -> Parser:
        parsers[name] = commands.add_parser(
            name, help=summary, description=description, epilog=epilog or None
        )
        return parsers[name]

    def source(parser: Parser, what: str = _SOURCE) -> None:
        parser.add_argument("source", metavar="SOURCE", help=what)
        parser.add_argument(
            "--algorithm", metavar="NAME", choices=names.get("algorithms"), help="see fax list"
        )
        parser.add_argument(
            "--aggregator", metavar="NAME", choices=names.get("aggregators"), help="see fax list"
        )
        parser.add_argument("--rounds", type=int, metavar="N", help="how many rounds to train")
        parser.add_argument(
            "--seed", type=int, metavar="N", help="from which everything random is derived"
        )
        parser.add_argument(
            "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help=_SET
        )

    def how(parser: Parser) -> None:
        parser.add_argument(
            "--force",
            action="store_true",
            help="continue a run though its settings have changed",
        )
        parser.add_argument("--quiet", action="store_true", help="show no progress bar")

    run = command(
        "run",
        "train, evaluate, save and plot",
        "Trains a model. What is not set comes from the task's tuned settings.\n\n"
        "The folder gets the settings (config.toml), the metrics (metrics.csv), TensorBoard\n"
        "events, figures, checkpoints and a log. After Ctrl-C, the run finishes its round and\n"
        "saves a checkpoint, and fax resume continues it.",
        "examples:\n"
        "  fax run digits\n"
        "  fax run digits --algorithm fedprox --set algorithm.mu=0.1 client.rate=0.03\n"
        "  fax run emnist --set task.model=dense --aggregator top_k --set aggregator.k=0.01\n"
        "  fax run my.toml --folder runs/a\n"
        "  fax run my_module:experiment\n",
    )
    source(run)
    run.add_argument(
        "--folder",
        metavar="FOLDER",
        help="where to write the results; a run that is already there is continued (default: "
        "runs/NAME, or runs/NAME-2, runs/NAME-3, ... if there is one)",
    )
    how(run)

    resume = command(
        "resume",
        "continue a run from its last checkpoint",
        "Continues a run from its last checkpoint, with the settings in its folder. On the same\n"
        "devices and versions, the result is that of a run without interruption, to the bit.",
        "example:\n  fax resume runs/a\n",
    )
    resume.add_argument("folder", metavar="FOLDER", help="the folder of the run")
    resume.add_argument("--rounds", type=int, metavar="N", help="how many rounds in all, instead")
    how(resume)

    evaluate = command(
        "evaluate",
        "evaluate the model of a run",
        "Evaluates the model of a checkpoint of a run, on all clients together, or on each.",
        "examples:\n  fax evaluate runs/a --on test\n  fax evaluate runs/a --each --round best\n",
    )
    evaluate.add_argument("folder", metavar="FOLDER", help="the folder of the run")
    on = ("test", "train")
    evaluate.add_argument(
        "--on", default="test", type=one_of("data set", on), choices=on, help="default: test"
    )
    evaluate.add_argument(
        "--each", action="store_true", help="print a line for each client, with its id"
    )
    evaluate.add_argument(
        "--round",
        type=_round,
        metavar="N",
        help="the round of the checkpoint, or best for the one with "
        "the smallest loss on the test data (default: the newest)",
    )

    compare = command(
        "compare",
        "a table and a figure of several runs",
        "Compares runs: the settings in which they differ, their last results, and their curves.\n"
        "Runs need not be finished.",
        "example:\n  fax compare runs/*\n",
    )
    compare.add_argument("folders", metavar="FOLDER", nargs="+", help="the folders of the runs")
    compare.add_argument(
        "--figure", metavar="FILE", default="runs/compare.png", help="default: runs/compare.png"
    )

    sweep = command(
        "sweep",
        "train with every combination of some settings",
        "Trains with every combination of the values in a grid, and prints a table with the best.\n"
        "\n"
        "Learning rates and the numbers of an algorithm that may be traced, such as algorithm.mu,\n"
        "are vectorized: all of their combinations train at once in one program. The values of\n"
        "all other keys are trained one after another. If a sweep was interrupted, the same\n"
        "command continues it.",
        "examples:\n"
        "  fax sweep digits --grid client.rate=.03,.1,.3 server.rate=.1,1\n"
        "  fax sweep my.toml --grid algorithm=fedavg,scaffold client.rate=.01,.1 --folder runs/s\n",
    )
    source(sweep, _SETTINGS)
    sweep.add_argument(
        "--grid", nargs="+", action="extend", required=True, metavar="KEY=V,V", help="the values"
    )
    sweep.add_argument(
        "--folder", metavar="FOLDER", help="where to write the results (default: runs/NAME-sweep)"
    )
    sweep.add_argument(
        "--by",
        metavar="METRIC",
        default="test/loss",
        help="the metric that decides which is best: the smallest of a loss or error, the largest "
        "of anything else (default: test/loss)",
    )
    how(sweep)

    listing = command(
        "list",
        "tasks, algorithms, models, aggregators or optimizers",
        "Lists what a configuration can name, with a description and the options of each.",
        "example:\n  fax list algorithms\n",
    )
    listing.add_argument(
        "kind", metavar="KIND", type=one_of("list", KINDS), choices=KINDS, help=", ".join(KINDS)
    )

    report = command(
        "report",
        "memory and communication of a round, before it runs",
        "Compiles a round, and says how much memory each device needs and what devices send to\n"
        "each other. Nothing is run, so the TPUs of --on need not exist. For --on, run\n"
        "pip install 'fax-jax[tpu]'.",
        "examples:\n"
        "  fax report digits\n"
        "  fax report my.toml --on v5e:4x4\n"
        "  fax report my.toml --on v5p:4x4x4 --slices 2 --set mesh.clients=-1 mesh.model=4\n",
    )
    source(report)
    report.add_argument("--on", metavar="TPU", help="the TPUs of a slice, such as v5e:4x4")
    report.add_argument("--slices", type=int, metavar="N", help="how many slices (default: 1)")

    audit = command(
        "audit",
        "what a program would send from clients to the server",
        "Says what each client would receive and send if a program ran where the clients' data\n"
        "are, and how its data can leave it: never, only through sums, or as rows. The program is\n"
        "traced and not run.",
        "examples:\n  fax audit my_module:program\n",
    )
    audit.add_argument(
        "program",
        metavar="MODULE:NAME",
        help="a function without arguments that returns a program and a tuple of its arguments, as "
        "in (algorithm.round, (state, cohort)), or what fax.deploy.cut returns",
    )

    command(
        "doctor",
        "versions, devices, caches, and what is missing",
        "Says what fax finds on this machine: versions, devices, caches, and which packages are\n"
        "missing, with the command that installs them.",
    )

    completion = command(
        "completion",
        "a script that completes the command in a shell",
        "Prints a script for the shell.",
        "examples:\n"
        '  bash:  eval "$(fax completion bash)", in ~/.bashrc\n'
        "  zsh:   fax completion zsh > ~/.zfunc/_fax, where fpath has ~/.zfunc\n",
    )
    shells = ("bash", "zsh")
    completion.add_argument(
        "shell", metavar="SHELL", type=one_of("shell", shells), choices=shells, help="bash or zsh"
    )
    return top, parsers
