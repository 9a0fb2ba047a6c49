"""The floors of the house: imports point only downwards, and heavy libraries stay in their rooms."""

import ast
import subprocess
import sys
from collections import Counter
from fnmatch import fnmatch
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "eotattn"

#: Rooms by floor. A room imports from floors below it and from itself.
FLOORS = {
    "checks": 0,
    "provenance": 1,
    "compat": 1,
    "processes": 1,
    "priors": 2,
    "kernels": 2,
    "attention": 3,
    "transport": 3,
    "diagnostics": 4,
    "integrations": 5,
    "plotting": 5,
    "analysis": 6,
    "experiments": 6,
    "benchmarks": 6,
    "cli": 7,
    "__main__": 8,
}
#: The contract checks stand beside the house: they see these rooms, and no room sees them.
SEEN_BY_TESTING = {"priors", "checks"}
#: Libraries that one place alone may import.
OWNERS = {"ot": "eotattn.transport.pot", "matplotlib": "eotattn.plotting", "triton": "eotattn.kernels.*_triton"}
#: The command line imports what a command needs when it runs; the owners of slow libraries may be imported late too.
LATE_IMPORTERS = {"cli"}
#: Modules that break the plan today, and why; each is to be mended, and then leaves this list.
KNOWN: dict[str, str] = {}
#: Modules that import each other, by room, and why; each is to be mended, and then leaves this list.
KNOWN_CIRCLES: dict[str, str] = {}
#: Modules that say private names of other libraries themselves; each is to ask :mod:`eotattn.compat`, and then leaves.
KNOWN_PRIVATE: set[str] = set()
#: File names that more than one room has; each is to get a name of its own, and then leaves this list.
KNOWN_NAMESAKES: set[str] = set()
DRAWERS = {"util", "utils", "helper", "helpers", "common", "misc", "shared", "tools"}

LAYERED = [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]


def module_name(path):
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(module, source, *, is_package=False):
    """(imported name, inside a function, for annotations alone) of every import; relative ones are resolved."""
    found = []

    def visit(node, in_function, for_types):
        if isinstance(node, ast.Import):
            found.extend((alias.name, in_function, for_types) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                kept = module.split(".")[: None if is_package and node.level == 1 else -(node.level - is_package)]
                base = ".".join([*kept, *([base] if base else [])])
            found.extend((f"{base}.{alias.name}", in_function, for_types) for alias in node.names)
        inside = in_function or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        guarded = for_types or (isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"))
        for child in ast.iter_child_nodes(node):
            visit(child, inside, guarded)

    visit(ast.parse(source), False, False)
    return found


def owns(owner, name):
    """Whether ``name`` is the owner (which may hold a star) or lies within it."""
    return fnmatch(name, owner) or fnmatch(name, f"{owner}.*")


def violations(module, source, *, is_package=False):
    """What a module does against the plan of the house, one sentence each."""
    room = module.split(".")[1]
    if room != "testing" and room not in FLOORS:
        return [f"{module} is in no room of the plan"]
    found = []
    for name, in_function, for_types in imports(module, source, is_package=is_package):
        top, *rest = name.split(".")
        if top in OWNERS and not for_types and not owns(OWNERS[top], module):
            found.append(f"{module} imports {top}, which {OWNERS[top]} alone may")
        if top != "eotattn":
            continue
        is_slow = any(owns(owner, name) for owner in OWNERS.values())
        if in_function and not is_slow and room not in LATE_IMPORTERS:
            found.append(f"{module} imports {name} inside a function")
        target = rest[0] if rest else ""
        if target == room or (not rest and room in LATE_IMPORTERS):  # the command line stands at the front door
            continue
        if room == "testing":
            if target not in SEEN_BY_TESTING:
                found.append(f"{module} imports {name}, which testing may not see")
        elif target not in FLOORS:
            found.append(f"{module} imports {name}, which is on no floor")
        elif FLOORS[target] == FLOORS[room]:
            found.append(f"{module} imports {name}, a room on its own floor")
        elif FLOORS[target] > FLOORS[room]:
            found.append(f"{module} imports {name}, a room above it")
    return found


def layered_modules():
    for path in LAYERED:
        reason = KNOWN.get(module_name(path))
        yield pytest.param(path, id=module_name(path), marks=[pytest.mark.xfail(reason=reason)] if reason else [])


@pytest.mark.parametrize("path", [*layered_modules()])
def test_imports_point_downwards(path):
    assert violations(module_name(path), path.read_text(), is_package=path.name == "__init__.py") == []


def test_there_is_something_to_read():
    rooms = {module_name(path).split(".")[1] for path in LAYERED}
    assert {"checks", "priors", "kernels", "attention", "transport", "testing"} <= rooms


def test_there_are_no_drawers():
    names = {part for path in LAYERED for part in path.relative_to(PACKAGE).with_suffix("").parts}
    assert not names & DRAWERS


def namesakes(paths):
    """Names of files that stand in several places."""
    count = Counter(path.name for path in paths if path.name != "__init__.py")
    return {name for name, number in count.items() if number > 1}


def test_file_names_are_unique():
    assert namesakes(LAYERED) == KNOWN_NAMESAKES


def test_names_of_test_files_are_unique():
    """Pytest imports them by their names alone."""
    assert namesakes((PACKAGE.parent / "tests").rglob("*.py")) == set()


def test_the_front_door_only_re_exports():
    statements = ast.parse((PACKAGE / "__init__.py").read_text()).body
    kinds = ast.Import | ast.ImportFrom | ast.Assign | ast.AnnAssign | ast.FunctionDef | ast.If
    for statement in statements:
        is_docstring = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
        assert is_docstring or isinstance(statement, kinds), ast.unparse(statement)


@pytest.mark.parametrize(
    ("module", "source", "complaint"),
    [
        ("eotattn.checks", "from eotattn.priors import LogPrior", "a room above it"),
        ("eotattn.priors.new", "import eotattn.attention", "a room above it"),
        ("eotattn.priors.new", "from eotattn import kernels", "a room on its own floor"),
        (
            "eotattn.attention.new",
            "from eotattn.transport.problems import TransportProblem",
            "a room on its own floor",
        ),
        ("eotattn.transport.new", "from ..attention import prior_attention", "a room on its own floor"),
        ("eotattn.plotting.new", "from eotattn.integrations import anything", "a room on its own floor"),
        ("eotattn.experiments.new", "import eotattn.benchmarks.timing", "a room on its own floor"),
        ("eotattn.analysis.new", "from eotattn.experiments.tasks import find_texts", "a room on its own floor"),
        ("eotattn.diagnostics.new", "if True:\n    from eotattn.cli import main", "a room above it"),
        ("eotattn.experiments.new", "def f():\n    from eotattn.transport import solve", "inside a function"),
        ("eotattn.attention.new", "def f():\n    from eotattn.transport import pot", "a room on its own floor"),
        ("eotattn.priors.new", "if TYPE_CHECKING:\n    from eotattn.kernels import sdpa", "a room on its own floor"),
        ("eotattn.priors.new", "class A:\n    def f(self):\n        import eotattn.checks", "inside a function"),
        ("eotattn.priors.new", "from eotattn import FourierPrior", "on no floor"),
        ("eotattn.priors.new", "import eotattn", "on no floor"),
        ("eotattn.attention.new", "from eotattn.testing import check_prior", "on no floor"),
        ("eotattn.testing", "from eotattn.attention import prior_attention", "which testing may not see"),
        ("eotattn.transport.solvers.sinkhorn", "import ot", "imports ot, which eotattn.transport.pot alone may"),
        ("eotattn.transport.potter", "from ot.bregman import sinkhorn", "imports ot"),
        ("eotattn.experiments.results", "def f():\n    import matplotlib.pyplot as plt", "imports matplotlib"),
        ("eotattn.helpers.strings", "x = 1", "in no room"),
    ],
)
def test_the_reader_of_imports_sees_violations(module, source, complaint):
    (found,) = violations(module, source)
    assert complaint in found


@pytest.mark.parametrize(
    ("module", "source", "is_package"),
    [
        (
            "eotattn.priors.new",
            "import math\nfrom eotattn.checks import require\nfrom eotattn.priors.base import x",
            False,
        ),
        ("eotattn.priors", "from . import base\nfrom .base import LogPrior", True),
        ("eotattn.priors.new", "from .base import LogPrior\nfrom ..checks import require", False),
        ("eotattn.transport.pot", "import ot\nimport ot.unbalanced", False),
        ("eotattn.plotting.curves", "from matplotlib import pyplot", False),
        ("eotattn.cli", "def main():\n    from eotattn.experiments import run", False),
        ("eotattn.diagnostics.new", "def f():\n    from eotattn.transport import pot", False),
        ("eotattn.experiments.new", "if typing.TYPE_CHECKING:\n    from matplotlib.figure import Figure", False),
        ("eotattn.cli", "from eotattn.experiments import a\nfrom eotattn.plotting import b", False),
        ("eotattn.cli", "import eotattn", False),
        ("eotattn.integrations.new", "def f():\n    import transformers", False),
        ("eotattn.testing", "from eotattn.priors import LogPrior\nfrom eotattn.checks import require", False),
        ("eotattn.attention.new", "import other.eotattn.transport", False),
    ],
)
def test_the_reader_of_imports_allows_what_the_plan_allows(module, source, is_package):
    assert violations(module, source, is_package=is_package) == []


# Circles ------------------------------------------------------------------------------------------------------------


def module_of(name, modules):
    """The module that an imported name is, or lies in."""
    while name and name not in modules:
        name = name.rpartition(".")[0]
    return name


def circles(sources):
    """Sets of modules that import each other, directly or by way of others; late imports and those of types count.

    Args:
        sources: Module -> (source, whether it is a package).
    """
    reached = {
        module: {module_of(name, sources) for name, *_ in imports(module, source, is_package=is_package)} - {"", module}
        for module, (source, is_package) in sources.items()
    }
    grows = True
    while grows:
        grows = False
        for targets in reached.values():
            further = set().union(*(reached[target] for target in targets)) - targets
            grows = grows or bool(further)
            targets |= further
    return {
        frozenset(other for other in reached if module in reached[other] and other in reached[module])
        for module in reached
        if module in reached[module]
    }


def sources_of(room):
    paths = [path for path in LAYERED if module_name(path).split(".")[1] == room]
    return {module_name(path): (path.read_text(), path.name == "__init__.py") for path in paths}


def rooms():
    for room in sorted({module_name(path).split(".")[1] for path in LAYERED}):
        reason = KNOWN_CIRCLES.get(room)
        yield pytest.param(room, marks=[pytest.mark.xfail(reason=reason)] if reason else [])


@pytest.mark.parametrize("room", [*rooms()])
def test_modules_of_a_room_make_no_circle(room):
    assert [sorted(circle) for circle in circles(sources_of(room))] == []


def test_the_reader_of_circles_sees_them():
    sources = {
        "eotattn.room": ("from eotattn.room.a import x", True),
        "eotattn.room.a": ("from . import b", False),
        "eotattn.room.b": ("def f():\n    from eotattn.room.c import y", False),
        "eotattn.room.c": ("if TYPE_CHECKING:\n    from eotattn.room.a import x", False),
        "eotattn.room.d": ("import eotattn.room.c", False),
    }
    assert circles(sources) == {frozenset({f"eotattn.room.{name}" for name in "abc"})}
    sources["eotattn.room.c"] = ("import torch", False)
    assert circles(sources) == set()


# Private names of other libraries -----------------------------------------------------------------------------------

#: What named tuples have, and two names of argparse that have no public form.
PUBLIC_IN_SPITE = {"_asdict", "_field_defaults", "_fields", "_make", "_replace", "_SubParsersAction", "_actions"}


def is_private(name):
    return name.startswith("_") and not name.endswith("__") and name not in PUBLIC_IN_SPITE


def own_names(tree):
    """Private names that a module makes: functions, classes, arguments, variables, attributes that it sets."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield from [node.attr] if ast.unparse(node.value) in ("self", "cls") else []


def private_names(module, source, own):
    """Private names that a module says and this package does not make."""
    for name, *_ in imports(module, source):
        if name.split(".")[0] != "eotattn":
            yield from (part for part in name.split(".") if is_private(part))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and is_private(node.attr) and node.attr not in own:
            yield node.attr
        by_name = isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        if by_name and node.func.id in ("getattr", "hasattr", "setattr", "delattr"):
            named = [x.value for x in node.args if isinstance(x, ast.Constant) and isinstance(x.value, str)]
            yield from (name for name in named if is_private(name) and name not in own)


OWN = {name for path in LAYERED for name in own_names(ast.parse(path.read_text()))}


@pytest.mark.parametrize("path", [*LAYERED], ids=module_name)
def test_private_names_of_other_libraries_go_through_compat(path):
    module = module_name(path)
    found = sorted({*private_names(module, path.read_text(), OWN)})
    if module in KNOWN_PRIVATE:
        assert found, f"{module} says no private name any more: take it off KNOWN_PRIVATE"
    elif module != "eotattn.compat":
        assert found == [], f"{module} says {found}: give {'it' if len(found) == 1 else 'them'} to eotattn.compat"


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import torch\ntorch._C._f()", ["_C", "_f"]),
        ("from torch._subclasses.fake_tensor import FakeTensor", ["_subclasses"]),
        ("from torch.utils._pytree import tree_map", ["_pytree"]),
        ("x._version", ["_version"]),
        ("getattr(config, '_attn')", ["_attn"]),
        ("def f():\n    from torch import _foreach_add", ["_foreach_add"]),
        ("self._own", []),
        ("x._replace(a=1)", []),
        ("torch.__version__", []),
        ("from eotattn.priors.base import _own", []),
    ],
)
def test_the_reader_of_private_names(source, found):
    assert sorted(private_names("eotattn.new", source, {"_own"})) == found


# Importing the package ----------------------------------------------------------------------------------------------

HEAVY = ["matplotlib", "ot", "accelerate", "pandas", "papermill", "scipy", "transformers", "goat", "IPython", "sklearn"]


def run(*arguments):
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=True)


def loaded_by(statement):
    return set(run("-c", f"{statement}\nimport sys\nprint(*sys.modules)").stdout.split())


def test_import_loads_no_heavy_library():
    """Beyond what torch itself loads in this environment."""
    extra = loaded_by("import eotattn") - loaded_by("import torch, numpy")
    assert not {name.split(".")[0] for name in extra} & set(HEAVY)


def test_the_control_of_the_test_above():
    assert {name.split(".")[0] for name in loaded_by("import matplotlib")} & set(HEAVY)


def seconds_of_imports():
    """Processor time of ``import torch``, and of ``import eotattn`` after it."""
    clock = "from time import process_time as now\nstart = now()\nimport torch\nthere = now()\nimport eotattn\n"
    return map(float, run("-c", f"{clock}print(there - start, now() - there)").stdout.split())


def test_import_is_light_beside_that_of_torch():
    """A tenth of it where this was measured."""
    torch, added = seconds_of_imports()
    assert added < torch / 2, f"import eotattn took {added:.2f} s after the {torch:.2f} s of torch"
