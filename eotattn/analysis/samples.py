"""Real prose and real code that every installation has: docstrings and functions of Python's standard library."""

from __future__ import annotations

import ast
import sysconfig
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from eotattn.checks import check_positive_int, speaking_as

__all__ = ["code_samples", "prose_samples"]

#: Shortest sample, characters: about a hundred tokens.
SHORTEST = 500


@speaking_as("prose_samples")
def prose_samples(count: int) -> list[str]:
    """The first long module docstrings, at most one a top-level module, in the order of their names.

    Args:
        count: Number of texts.

    Example:
        >>> len(prose_samples(2))
        2
    """
    docstrings = (ast.get_docstring(tree) or "" for tree in _modules())
    return list(islice((text for text in docstrings if len(text) >= SHORTEST), _checked(count)))


@speaking_as("code_samples")
def code_samples(count: int) -> list[str]:
    """The first long function of as many top-level modules, without its docstring.

    Args:
        count: Number of texts.

    Example:
        >>> all(text.startswith("def ") for text in code_samples(2))
        True
    """
    functions = (_long_function(tree) for tree in _modules())
    return list(islice((text for text in functions if text), _checked(count)))


def _long_function(tree: ast.Module) -> str:
    """The first long function of a module, without its docstring; empty where there is none."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and not node.decorator_list:
            body = node.body[1:] if ast.get_docstring(node) else node.body
            text = ast.unparse(ast.FunctionDef(**{**vars(node), "body": body or [ast.Pass()]}))
            if len(text) >= SHORTEST:
                return text
    return ""


def _modules() -> Iterator[ast.Module]:
    """The standard library's top-level modules of one file whose names are public, in the order of their names."""
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("[!_]*.py")):
        yield ast.parse(path.read_text(encoding="utf-8"))


def _checked(count: int) -> int:
    return check_positive_int("samples", "count", count)
