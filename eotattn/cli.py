"""The command line: parse, call one function, print.

A subcommand is one function that adds its parser and names what it calls; :data:`SUBCOMMANDS` lists them. Whatever a
user gets wrong is one line and exit status 2; an interruption is one line and 130.
"""

from __future__ import annotations

import argparse
import math
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import eotattn
from eotattn.processes import is_first_here, is_first_process

__all__ = ["main"]


class _UsageError(Exception):
    """A command that cannot be parsed."""


class _Parser(argparse.ArgumentParser):
    """A parser that says in one line what is wrong, and takes options by their full names only."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        raise _UsageError(f"{self.prog}: error: {message}. See {self.prog} --help.")


Subparsers = argparse._SubParsersAction  # the type has no public name


def _add_reproduce(subparsers: Subparsers[_Parser]) -> None:
    text = "run the notebooks behind the figures"
    parser = subparsers.add_parser("reproduce", help=text, description=text)
    _add_figure_arguments(parser)
    parser.set_defaults(run=_reproduce)


def _add_figure_arguments(parser: _Parser) -> None:
    """What ``reproduce`` and ``train`` share."""
    figures = "figures by number or name (default: all)"
    parser.add_argument("--figure", dest="figures", nargs="+", action="extend", metavar="N", help=figures)
    parser.add_argument("--scale", default="laptop", help="smoke, laptop, h200, gpu or paper (default: laptop)")
    parser.add_argument("--out", default="figures", metavar="DIR", help="folder of results (default: figures)")
    parser.add_argument("--jobs", type=int, metavar="K", help="runs side by side (default: 1 on a GPU, else threads)")
    parser.add_argument("--fresh", action="store_true", help="forget stored runs and make them anew")
    parser.set_defaults(kept="finished runs are kept, the same command continues")


def _reproduce(arguments: argparse.Namespace) -> int:
    from eotattn.experiments.reproduce import reproduce

    return _with_runs(reproduce, arguments, "scale", "out", "jobs", "fresh")


def _with_runs(work: Callable[..., object], arguments: argparse.Namespace, *names: str) -> int:
    """Call ``work`` with the options of these names; exit status 1 where a run failed."""
    from eotattn.experiments.runs import RunsFailedError

    try:
        work(arguments.figures, report=_report, **{name: getattr(arguments, name) for name in names})
    except RunsFailedError as error:
        _say(f"{arguments.parser.prog}: error: {error}")
        return 1
    return 0


def _report(line: str) -> None:
    """One line at once, also into a file or a pipe, by the first of the processes that work together."""
    if is_first_process():
        print(line, flush=True)


def _add_train(subparsers: Subparsers[_Parser]) -> None:
    text = "make the runs behind the figures that are not stored yet, without notebooks"
    together = "Started by torchrun or accelerate, all its processes share each run, batch by batch: torchrun "
    together += "--nproc-per-node 4 -m eotattn train --figure sinks --scale paper --data DIR. Any number of them gives "
    together += "the same losses and continues what others began."
    parser = subparsers.add_parser("train", help=text, description=f"{text}. {together}")
    _add_figure_arguments(parser)
    parser.add_argument("--only", nargs="+", default=(), metavar="NAME", help='runs by name or pattern, e.g. "goat-*"')
    parser.add_argument("--data", metavar="DIR", help="prepared corpus, for the figure that reads one (see prepare)")
    parser.add_argument("--minutes", type=float, default=math.inf, metavar="M", help="start no run later than this")
    parser.set_defaults(run=_train)


def _train(arguments: argparse.Namespace) -> int:
    from eotattn.experiments.reproduce import make_runs

    return _with_runs(make_runs, arguments, "scale", "out", "jobs", "only", "fresh", "data", "minutes")


def _add_prepare(subparsers: Subparsers[_Parser]) -> None:
    text = "make a corpus of tokens out of a folder of books, one folder an author"
    parser = subparsers.add_parser("prepare", help=text, description=text)
    parser.add_argument("folder", help="folder of .txt files, e.g. a mirror of Project Gutenberg")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the prepared corpus")
    parser.add_argument("--vocabulary-size", type=int, default=16_384, metavar="V", help="tokens (default: 16384)")
    count = "characters of the training part (default: 400000000)"
    parser.add_argument("--train-characters", type=int, default=400_000_000, metavar="N", help=count)
    parser.set_defaults(run=_prepare, kept="the corpus is not whole")


def _prepare(arguments: argparse.Namespace) -> int:
    from eotattn.experiments.tasks.books import prepare_books

    names = ("folder", "out", "vocabulary_size", "train_characters")
    prepare_books(**{name: getattr(arguments, name) for name in names}, report=_report)
    return 0


def _add_verify(subparsers: Subparsers[_Parser]) -> None:
    text = "measure every equivalence with transport on this machine; exit status 1 if one does not hold"
    parser = subparsers.add_parser("verify", help=text, description=text)
    parser.add_argument("--seed", type=int, default=0, help="seed of the random problems (default: 0)")
    parser.add_argument("--device", default="cpu", help="where attention runs (default: cpu)")
    parser.set_defaults(run=_verify, kept="verify writes nothing")


def _verify(arguments: argparse.Namespace) -> int:
    from eotattn.diagnostics.equivalence import measure_equivalences

    report = measure_equivalences(seed=arguments.seed, device=arguments.device)
    print(report)
    return 0 if report.holds else 1


def _add_bench(subparsers: Subparsers[_Parser]) -> None:
    text = "time, memory and error against every peer that is installed"
    parser = subparsers.add_parser("bench", help=text, description=text)
    suites = "overview (a GPU's bounds in minutes), attention, layer, decode, padding, patterns, relative, precision, "
    suites += "gradients, training, rotary, sinks, transport, statistics, ring or parallel (several GPUs)"
    parser.add_argument("suite", help=suites)
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--dtype", default="float32", help="float32, bfloat16 or float16 (default: float32)")
    parser.add_argument("--sizes", default="small", help="small (seconds on a CPU) or full (default: small)")
    parser.add_argument("--rounds", type=int, default=20, help="timed calls of each candidate (default: 20)")
    parser.add_argument("--out", metavar="DIR", help="also write bench_<suite>.csv and .json there")
    parser.set_defaults(run=_bench, kept="nothing was measured yet")


def _bench(arguments: argparse.Namespace) -> int:
    from eotattn.benchmarks.report import bench
    from eotattn.benchmarks.suites import configure

    config = configure(arguments.device, arguments.dtype, arguments.sizes, arguments.rounds)
    table = bench(arguments.suite, config, out=arguments.out)
    print(table)
    if table.failure:
        _say(f"eotattn bench: ended by {table.failure}; the table has what was measured")
        return 1
    if not table.is_complete:
        _say("eotattn bench: interrupted; the table has what was measured, and nothing was written")
        return INTERRUPTED
    return 0


def _add_analyze(subparsers: Subparsers[_Parser]) -> None:
    text = "say where a trained model's attention sinks are, and how much of each head is a prior"
    parser = subparsers.add_parser("analyze", help=text, description=text)
    model = "folder of a Hugging Face model with safetensors, or of the checkpoint-<step> folders of a training run"
    parser.add_argument("model", nargs="?", help=model)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--text", metavar="FILE", help="one text")
    source.add_argument("--texts", metavar="FILE.jsonl", help='one text a line: a string, or {"text": ...}')
    source.add_argument("--attention", metavar="FILE", help="attention maps: .npy, .npz or .safetensors; no model")
    parser.add_argument("--out", required=True, metavar="DIR", help="new or empty folder, or that of an earlier report")
    parser.add_argument("--layers", nargs="+", metavar="LAYER", help="names or indices (default: all)")
    parser.add_argument("--heads", nargs="+", type=int, metavar="N", help="indices (default: all)")
    parser.add_argument("--max-length", type=int, metavar="N", help="cut texts to N tokens (default: whole texts)")
    parser.add_argument("--device", help="cpu or cuda (default: cpu)")
    parser.add_argument("--dtype", help="float32, bfloat16, ... (default: float32)")
    parser.set_defaults(run=_analyze, kept="no text was finished yet, and nothing was written")


def _analyze(arguments: argparse.Namespace) -> int:
    from eotattn.analysis import analyze, analyze_checkpoints, checkpoints_in, read_texts

    names = ("attention", "out", "heads", "max_length", "device", "dtype")
    options = {name: getattr(arguments, name) for name in names}
    if arguments.layers is not None:
        options["layers"] = [int(x) if x.isdecimal() else x for x in arguments.layers]
    texts = [] if arguments.attention is not None else read_texts(arguments.text, arguments.texts)
    lines: list[str] = []
    if arguments.model is not None and arguments.attention is None and checkpoints_in(arguments.model):
        del options["attention"]
        formation = analyze_checkpoints(arguments.model, texts, report=lines.append, **options)
        if is_first_process():
            print(formation, "", *lines, sep="\n")
        if not formation.is_complete:
            done = f"{len(formation.steps)} of {formation.num_given} checkpoints"
            _say(f"eotattn analyze: interrupted; {arguments.out} holds the {done} that were finished")
            return INTERRUPTED
        return 0
    analysis = analyze(arguments.model, texts, report=lines.append, **options)
    if is_first_process():
        print(analysis, "", *lines, sep="\n")
    if not analysis.is_complete:
        done = f"{analysis.num_texts} of {analysis.num_given} texts"
        _say(f"eotattn analyze: interrupted; {arguments.out} holds the {done} that were finished")
        return INTERRUPTED
    return 0


#: Exit statuses.
WRONG, INTERRUPTED = 2, 130

#: One function a subcommand.
SUBCOMMANDS: tuple[Callable[[Subparsers[_Parser]], None], ...] = (
    _add_reproduce,
    _add_train,
    _add_prepare,
    _add_verify,
    _add_bench,
    _add_analyze,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``eotattn`` and return its exit status.

    Args:
        argv: Arguments without the program's name; those of the process by default.

    Returns:
        0; 1 where something does not hold or failed; 2 where the arguments were wrong; 130 after an interruption.
    """
    parser = _Parser(prog="eotattn", description="Entropic optimal transport analysis of attention.")
    parser.add_argument("--version", action="version", version=f"eotattn {eotattn.__version__}")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in SUBCOMMANDS:
        add(subparsers)
    for command in subparsers.choices.values():
        command.set_defaults(parser=command)
    try:
        arguments, unknown = parser.parse_known_args(argv)
        if unknown:
            arguments.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    except _UsageError as error:
        _say(str(error))
        return WRONG
    return _run(arguments)


def _run(arguments: argparse.Namespace) -> int:
    """Call the command; say in one line what the user got wrong, or that it was interrupted."""
    prog = arguments.parser.prog
    try:
        with _termination_as_interruption():
            return int(arguments.run(arguments))
    except (ValueError, TypeError, NotImplementedError, ModuleNotFoundError) as error:
        said = _in_words_of(arguments.parser, str(error))
        if said is None:
            raise  # not about the arguments
        _say(f"{prog}: error: {said}")
        return WRONG
    except KeyboardInterrupt:
        _say(f"{prog}: interrupted; {arguments.kept}")
        return INTERRUPTED


def _in_words_of(parser: _Parser, message: str) -> str | None:
    """What is wrong, with options in place of Python's arguments; None unless it reads ``<owner>: <argument> ...``."""
    owner, colon, said = message.partition(": ")
    if not (colon and owner.replace(".", "").isidentifier()):
        return None
    argument, _, rest = said.partition(" ")
    flags = {action.dest: (action.option_strings or [action.dest])[-1] for action in parser._actions}
    return f"{flags.get(argument, argument)} {rest}"


@contextmanager
def _termination_as_interruption() -> Iterator[None]:
    """Let SIGTERM, which a machine sends before it is taken away, end like Ctrl-C: results are kept."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _say(line: str) -> None:
    """One line on the standard error stream of every machine."""
    if is_first_here():
        print(" ".join(line.split()), file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
