"""The command line: parse, call one function, print.

A subcommand is one function that adds its parser and names what it calls; :data:`SUBCOMMANDS` lists them.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Sequence

__all__ = ["main"]


def _add_reproduce(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "reproduce", help="run the notebooks behind the figures", description="Run the notebooks behind the figures."
    )
    _add_figure_arguments(parser)
    parser.set_defaults(run=_reproduce)


def _add_figure_arguments(parser: argparse.ArgumentParser) -> None:
    """What ``reproduce`` and ``train`` share."""
    figures = "figures by number or name (default: all)"
    parser.add_argument("--figure", nargs="+", action="extend", metavar="N", help=figures)
    parser.add_argument("--scale", default="laptop", help="smoke, laptop, h200 or paper (default: laptop)")
    parser.add_argument("--out", default="figures", metavar="DIR", help="folder of results (default: figures)")
    parser.add_argument("--jobs", type=int, metavar="K", help="runs side by side (default: 1 on a GPU, else threads)")
    parser.add_argument("--fresh", action="store_true", help="forget stored runs and make them anew")


def _reproduce(arguments: argparse.Namespace) -> int:
    from eotattn.experiments.reproduce import reproduce

    reproduce(arguments.figure, scale=arguments.scale, out=arguments.out, jobs=arguments.jobs, fresh=arguments.fresh)
    return 0


def _add_train(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    text = "make the runs behind the figures that are not stored yet, without notebooks"
    parser = subparsers.add_parser("train", help=text, description=text)
    _add_figure_arguments(parser)
    parser.add_argument("--only", nargs="+", default=(), metavar="NAME", help='runs by name or pattern, e.g. "goat-*"')
    parser.set_defaults(run=_train)


def _train(arguments: argparse.Namespace) -> int:
    from eotattn.experiments.reproduce import make_runs
    from eotattn.experiments.runs import RunsFailedError

    options = {name: getattr(arguments, name) for name in ("scale", "out", "jobs", "only", "fresh")}
    # A machine that is taken away says so by SIGTERM: end like Ctrl-C, which ends the other processes too.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        make_runs(arguments.figure, **options)
    except RunsFailedError as error:
        print(f"eotattn: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("eotattn: interrupted; finished runs are kept, the same command continues", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0


def _add_verify(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    text = "measure every equivalence with transport on this machine; exit status 1 if one does not hold"
    parser = subparsers.add_parser("verify", help=text, description=text)
    parser.add_argument("--seed", type=int, default=0, help="seed of the random problems (default: 0)")
    parser.add_argument("--device", default="cpu", help="where attention runs (default: cpu)")
    parser.set_defaults(run=_verify)


def _verify(arguments: argparse.Namespace) -> int:
    from eotattn.diagnostics.equivalence import measure_equivalences

    report = measure_equivalences(seed=arguments.seed, device=arguments.device)
    print(report)
    return 0 if report.holds else 1


def _add_bench(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    text = "time, memory and error against every peer that is installed"
    parser = subparsers.add_parser("bench", help=text, description=text)
    suites = "attention, layer, decode, padding, patterns, precision, gradients, transport or statistics"
    parser.add_argument("suite", help=suites)
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--dtype", default="float32", help="float32, bfloat16 or float16 (default: float32)")
    parser.add_argument("--sizes", default="small", help="small (seconds on a CPU) or full (default: small)")
    parser.add_argument("--rounds", type=int, default=20, help="timed calls of each candidate (default: 20)")
    parser.add_argument("--out", metavar="DIR", help="also write bench_<suite>.csv and .json there")
    parser.set_defaults(run=_bench)


def _bench(arguments: argparse.Namespace) -> int:
    from eotattn.benchmarks.report import bench
    from eotattn.benchmarks.suites import configure

    config = configure(arguments.device, arguments.dtype, arguments.sizes, arguments.rounds)
    print(bench(arguments.suite, config, out=arguments.out))
    return 0


def _add_analyze(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    text = "say where a trained model's attention sinks are, and how much of each head is a prior"
    parser = subparsers.add_parser("analyze", help=text, description=text)
    parser.add_argument("model", nargs="?", help="folder of a Hugging Face model with safetensors")
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
    parser.set_defaults(run=_analyze)


def _analyze(arguments: argparse.Namespace) -> int:
    from eotattn.analysis import analyze, is_first_process, read_texts

    names = ("attention", "out", "heads", "max_length", "device", "dtype")
    options = {name: getattr(arguments, name) for name in names}
    if arguments.layers is not None:
        options["layers"] = [int(x) if x.isdecimal() else x for x in arguments.layers]
    texts = [] if arguments.attention is not None else read_texts(arguments.text, arguments.texts)
    try:
        analysis = analyze(arguments.model, texts, **options)
    except KeyboardInterrupt:
        print("eotattn: interrupted before the first text was finished; nothing was written", file=sys.stderr)
        return 130
    if is_first_process():
        print(analysis)
    if not analysis.is_complete:
        done = f"{analysis.num_texts} of {analysis.num_given} texts"
        print(f"eotattn: interrupted; {arguments.out} holds the {done} that were finished", file=sys.stderr)
        return 130
    return 0


#: One function a subcommand.
SUBCOMMANDS: tuple[Callable[[argparse._SubParsersAction[argparse.ArgumentParser]], None], ...] = (
    _add_reproduce,
    _add_train,
    _add_verify,
    _add_bench,
    _add_analyze,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``eotattn`` and return its exit status: 0, or 2 where the arguments were wrong.

    Args:
        argv: Arguments without the program's name; those of the process by default.
    """
    parser = argparse.ArgumentParser(prog="eotattn", description="Entropic optimal transport analysis of attention.")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in SUBCOMMANDS:
        add(subparsers)
    arguments = parser.parse_args(argv)
    try:
        return arguments.run(arguments)
    except (ValueError, NotImplementedError) as error:
        print(f"eotattn: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
