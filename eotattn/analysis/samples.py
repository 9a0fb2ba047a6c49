"""Real prose and real code that every installation has: docstrings and functions of Python's standard library."""

from __future__ import annotations

import ast
import sysconfig
from pathlib import Path

from eotattn.checks import check_positive_int

__all__ = ["code_samples", "prose_samples"]

#: Shortest sample, characters: about a hundred tokens.
SHORTEST = 500


def prose_samples(count: int) -> list[str]:
    """The first long module docstrings, at most one a top-level module, in the order of their names.

    Args:
        count: Number of texts.

    Example:
        >>> len(prose_samples(2))
        2
    """
    return [doc for tree in _modules() if len(doc := ast.get_docstring(tree) or "") >= SHORTEST][: _checked(count)]


def code_samples(count: int) -> list[str]:
    """The first long function of as many top-level modules, without its docstring.

    Args:
        count: Number of texts.

    Example:
        >>> all(text.startswith("def ") for text in code_samples(2))
        True
    """
    found: list[str] = []
    for tree in _modules()[: 20 * _checked(count)]:
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and not node.decorator_list:
                body = node.body[1:] if ast.get_docstring(node) else node.body
                text = ast.unparse(ast.FunctionDef(**{**vars(node), "body": body or [ast.Pass()]}))
                if len(text) >= SHORTEST:
                    found.append(text)
                    break
        if len(found) == count:
            break
    return found


def _modules() -> list[ast.Module]:
    """The standard library's top-level modules of one file whose names are public, in the order of their names."""
    paths = sorted(Path(sysconfig.get_path("stdlib")).glob("[!_]*.py"))
    return [ast.parse(path.read_text(encoding="utf-8")) for path in paths]


def _checked(count: int) -> int:
    return check_positive_int("samples", "count", count)
