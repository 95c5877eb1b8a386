"""Do the tests notice when a loss is wrong? `python -m theory.mutation` changes one place at a time and asks.

Every arithmetic operator, sign, number, comparison, check and choice in the functions of `theory/losses.py` is changed
in turn; the tests must fail each time. A mutant that they accept is printed and makes the exit status 1.
"""

from __future__ import annotations

import ast
import contextlib
import copy
import gc
import importlib
import importlib.util
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import theory
from theory.shell import DONE, FAILED, argument_parser, as_command

ROOT = Path(__file__).parents[1]
SOURCE = Path(__file__).with_name("losses.py")
TESTS = ("theory/backend_test.py", "theory/losses_test.py")
REFEREE = "test_value_and_gradient"
IMPORTS = "theory/backend_test.py::test_no_torch_without_a_tensor_and_no_sympy_without_an_expression"

OPPOSITE: dict[type[ast.AST], Any] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.Pow: ast.Mult,
    ast.Gt: ast.GtE,
    ast.NotEq: ast.Eq,
    ast.Or: ast.And,
    ast.In: ast.NotIn,
}
SWAPPED = {"member_weights": "hull_weights", "hull_weights": "member_weights"}
CHECKS = {"same_shapes", "_check_ensemble"}


@dataclass(frozen=True)
class Mutant:
    """One change of one place."""

    function: str
    line: int
    change: str
    """Source before -> after."""
    tree: ast.Module

    def module(self) -> ModuleType:
        """The changed `theory.losses`."""
        spec = importlib.util.spec_from_file_location("theory.losses", SOURCE)
        assert spec is not None
        module = importlib.util.module_from_spec(spec)
        exec(compile(self.tree, str(SOURCE), "exec"), module.__dict__)
        return module


def variants(node: ast.AST) -> Iterator[ast.AST | None]:
    """What may stand in the place of a node; None deletes it."""
    match node:
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPPOSITE:
            yield ast.BinOp(left=left, op=OPPOSITE[type(op)](), right=right)
            yield left
            if not isinstance(op, ast.Pow):
                yield right
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            yield operand
        case ast.Compare(left=left, ops=[op], comparators=right) if type(op) in OPPOSITE:
            yield ast.Compare(left=left, ops=[OPPOSITE[type(op)]()], comparators=right)
        case ast.BoolOp(op=op, values=values):
            yield ast.BoolOp(op=OPPOSITE[type(op)](), values=values)
        case ast.Constant(value=bool() as value):
            yield ast.Constant(value=not value)
        case ast.Constant(value=int() | float() as value):
            yield ast.Constant(value=value + 1)
            if value > 1:
                yield ast.Constant(value=value - 1)
        case ast.Name(id=name) if name in SWAPPED:
            yield ast.Name(id=SWAPPED[name], ctx=ast.Load())
        case ast.Call(func=ast.Attribute(attr="constant"), args=[argument]):
            yield argument
        case ast.Expr(value=ast.Call(func=ast.Name(id=name))) if name in CHECKS:
            yield None


def mutants(source: str) -> Iterator[Mutant]:
    """Every variant of every place in the functions of a module, one at a time."""
    tree = ast.parse(source)
    for function in (node for node in tree.body if isinstance(node, ast.FunctionDef)):
        for parent, field, index in places(function):
            node = get(parent, field, index)
            for variant in variants(node):
                changed, place = copy.deepcopy((function, parent))  # copied as one, so that the place is in the copy
                put(place, field, index, copy.deepcopy(variant) if variant else ast.Pass())
                body = [changed if statement is function else statement for statement in tree.body]
                after = ast.unparse(variant) if variant else "nothing"
                mutated = ast.fix_missing_locations(ast.Module(body=body, type_ignores=[]))
                yield Mutant(function.name, node.lineno, f"{ast.unparse(node)} -> {after}", mutated)


def places(function: ast.FunctionDef) -> Iterator[tuple[ast.AST, str, int | None]]:
    """(parent, field, index) of every node of a function's defaults and body, but for messages and annotations."""
    waiting: list[ast.AST] = [function]
    while waiting:
        parent = waiting.pop()
        for field, value in ast.iter_fields(parent):
            if field in ("annotation", "returns") or isinstance(parent, ast.Raise):
                continue
            for index, node in enumerate(value) if isinstance(value, list) else [(None, value)]:
                if isinstance(node, ast.AST) and not isinstance(node, ast.JoinedStr):
                    yield parent, field, index
                    waiting.append(node)


def get(parent: ast.AST, field: str, index: int | None) -> ast.expr | ast.stmt:
    """The node in a place."""
    value = getattr(parent, field)
    node: ast.expr | ast.stmt = value if index is None else value[index]
    return node


def put(parent: ast.AST, field: str, index: int | None, node: ast.AST) -> None:
    """Another node into a place."""
    if index is None:
        setattr(parent, field, node)
    else:
        getattr(parent, field)[index] = node


# ---------------------------------------------------------------- running the tests


def accepted(losses: ModuleType | None, function: str) -> bool:
    """Whether the tests pass with this module as `theory.losses` (None: as it is).

    The test that knows the function best goes first, the slow ones of the other functions last.
    """

    def test() -> int:
        if losses is not None:
            sys.modules["theory.losses"] = theory.losses = losses  # type: ignore[attr-defined]
        for selected in (f"{REFEREE} and {function}", f"not {REFEREE}", REFEREE):
            if (status := run_tests(selected)) not in (0, 5):  # 5: nothing was selected
                return status
        return 0

    status = in_fork(test)
    if status not in (0, 1):
        raise RuntimeError(f"pytest ended with status {status}: that is neither passed nor failed")
    return status == 0


def in_fork(task: Callable[[], int]) -> int:
    """The status that a task returns, run silently in a fork: it finds all imported, and leaves nothing behind."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        status = 99
        with contextlib.suppress(BaseException):
            gc.disable()
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            os.dup2(null, 2)
            status = task()
        os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def run_tests(selected: str) -> int:
    """Exit status of pytest on some tests of the losses, stopping at the first failure, without shrinking it."""
    import pytest
    from hypothesis import Phase, settings

    from theory.testing import load_profile

    class Profile:
        def pytest_configure(self) -> None:
            load_profile("default")
            settings.register_profile("no shrinking", settings.get_profile("default"), phases=[Phase.generate])
            settings.load_profile("no shrinking")

    arguments = ["-x", "--tb=no", "--assert=plain", "--noconftest", "-k", selected]
    for plugin in ("cacheprovider", "unraisableexception", "anyio"):  # each costs as much as a test does here
        arguments += ["-p", f"no:{plugin}"]
    arguments += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # Hypothesis was imported before pytest
    arguments += ["--deselect", IMPORTS]  # starts a Python of its own, which has no mutant in it
    return int(pytest.main([*arguments, *TESTS], plugins=[Profile()]))


@as_command
def main(arguments: Sequence[str], show: Callable[[str], None] = print) -> int:
    """The command; returns its exit status."""
    parser = argument_parser("theory.mutation", __doc__ or "", "", "--only ipo --only dpo")
    parser.add_argument("--only", action="append", metavar="NAME", help="a function of theory.losses; repeatable")
    only = parser.parse_args(arguments).only

    found = list(mutants(SOURCE.read_text()))
    names = list(dict.fromkeys(mutant.function for mutant in found))
    unknown = set(only or []) - set(names)
    if unknown:
        raise ValueError(f"--only {sorted(unknown)[0]}: theory.losses has no such function; it has {', '.join(names)}")
    os.chdir(ROOT)
    for library in ("torch", "cvxpy", "sympy", "mpmath", "hypothesis", "pytest", "_hypothesis_pytestplugin"):
        importlib.import_module(library)  # once, here, and not in each fork
    gc.freeze()

    start = time.perf_counter()
    if not accepted(None, "losses"):
        show("the tests fail on the losses as they are: nothing can be said about changes")
        return FAILED
    survivors = 0
    show(f"{'function':28}{'mutants':>8}{'rejected':>10}{'seconds':>9}")
    for name in [name for name in names if not only or name in only]:
        began, of_function = time.perf_counter(), [mutant for mutant in found if mutant.function == name]
        alive = [mutant for mutant in of_function if accepted(mutant.module(), name)]
        survivors += len(alive)
        rejected = len(of_function) - len(alive)
        show(f"{name:28}{len(of_function):>8}{rejected:>10}{time.perf_counter() - began:>9.1f}")
        for mutant in alive:
            show(f"  accepted, line {mutant.line}: {mutant.change}")
    total = sum(not only or mutant.function in only for mutant in found)
    show(f"{total - survivors} of {total} mutants rejected in {time.perf_counter() - start:.0f} s")
    return FAILED if survivors else DONE


if __name__ == "__main__":
    sys.exit(main())
