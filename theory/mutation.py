"""Do tests, and proofs, notice when a loss is wrong? `python -m theory.mutation` changes one place at a time and asks.

Every arithmetic operator, sign, number, comparison, check and choice in the functions of `theory/losses.py` is changed
in turn; the tests must fail each time. With --proofs it is the proofs of the statements that must fail: one at least
of those whose row names the function. A mutant that is accepted is printed and makes the exit status 1.
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
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import theory
from theory.claim import NotRun, not_run_without_library, proposition_modules
from theory.shell import DONE, FAILED, argument_parser, as_command, require_libraries

ROOT = Path(__file__).parents[1]
SOURCE = Path(__file__).with_name("losses.py")
TESTS = ("theory/backend_test.py", "theory/losses_test.py")
REFEREE = "test_value_and_gradient"
DEFINITIONS = "loss-definitions"
"""The row that ties each function to its source; asked last, so that the count says what the theorems notice."""
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
CRASHED = 99
"""Status of a fork whose task raised."""
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
        self.put_into(module)
        return module

    def put_into(self, module: ModuleType) -> None:
        """Its functions in the place of a module's own."""
        exec(compile(self.tree, str(SOURCE), "exec"), module.__dict__)


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


def mutants(source: str, only: Collection[str] | None = None) -> Iterator[Mutant]:
    """Every variant of every place in the functions of a module, one at a time.

    Args:
        source: of the module.
        only: functions that are changed; all where not given.
    """
    tree = ast.parse(source)
    for function in (node for node in tree.body if isinstance(node, ast.FunctionDef)):
        if only is not None and function.name not in only:
            continue
        for parent, field, index in places(function):
            node = get(parent, field, index)
            for variant in variants(node):
                changed, place = copy.deepcopy((function, parent))  # copied as one, so that the place is in the copy
                put(place, field, index, copy.deepcopy(variant) if variant else ast.Pass())
                body = [changed if statement is function else statement for statement in tree.body]
                after = ast.unparse(variant) if variant else "nothing"
                ast.fix_missing_locations(changed)  # the others have theirs
                mutated = ast.Module(body=body, type_ignores=[])
                yield Mutant(function.name, node.lineno, f"{ast.unparse(node)} -> {after}", mutated)


def mutable(source: str) -> list[str]:
    """The functions of a module that have mutants, in the order of the file."""
    functions = (node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef))
    return [f.name for f in functions if any(True for place in places(f) for _ in variants(get(*place)))]


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
        status = CRASHED
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


# ---------------------------------------------------------------- running the proofs


@dataclass(frozen=True)
class Proof:
    """Of one row."""

    module: str
    id: str
    losses: tuple[str, ...]
    seconds: float
    """That it takes on the losses as they are."""

    def run(self) -> None:
        """Runs it as its module has it now; raises where it fails."""
        claims = {claim.id: claim for claim in importlib.import_module(self.module).CLAIMS}
        with not_run_without_library():
            claims[self.id].prove()


def proofs_of(functions: Collection[str]) -> list[Proof]:
    """Of the rows that name one of the functions: the quick ones first, the definitions last.

    Raises RuntimeError where one fails on the losses as they are.
    """
    found = []
    for module in proposition_modules():
        for claim in importlib.import_module(module).CLAIMS:
            if not set(claim.losses) & set(functions):
                continue
            start, proof = time.perf_counter(), Proof(module, claim.id, claim.losses, 0.0)
            try:
                proof.run()
            except NotRun:
                continue
            except Exception as error:
                raise RuntimeError(f"the proof of {claim.id} fails on the losses as they are: {error}") from error
            found.append(replace(proof, seconds=time.perf_counter() - start))
    return sorted(found, key=lambda proof: (proof.id == DEFINITIONS, proof.seconds))


def users(source: str) -> dict[str, set[str]]:
    """Function of a module -> the public ones that a change of it is a change of: itself, or those that call it."""
    functions = {node.name: node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)}
    names = {name: {n.id for n in ast.walk(node) if isinstance(n, ast.Name)} for name, node in functions.items()}

    def public(name: str) -> set[str]:
        if not name.startswith("_"):
            return {name}
        return set().union(*(public(caller) for caller, used in names.items() if name in used and caller != name))

    return {name: public(name) for name in functions}


def rejecting(change: Callable[[ModuleType], None], proofs: Sequence[Proof]) -> Proof | None:
    """The first proof that fails once a change is made to `theory.losses`; None if all pass.

    The modules of the statements are imported anew in a fork, since they may keep what they computed with a loss.
    """

    def run() -> int:
        change(importlib.import_module("theory.losses"))
        for name in proposition_modules():
            sys.modules.pop(name, None)
        for index, proof in enumerate(proofs):
            try:
                proof.run()
            except Exception:
                return index
        return len(proofs)

    status = in_fork(run)
    if not 0 <= status <= len(proofs) < CRASHED:
        raise RuntimeError(f"the proofs ended with status {status}: that is neither passed nor failed")
    return proofs[status] if status < len(proofs) else None


def uncalled(proofs: Sequence[Proof], functions: Collection[str]) -> Iterator[tuple[str, str]]:
    """(row, function) where a row names a function that its proof does not call."""
    for proof, function in ((p, name) for p in proofs for name in p.losses if name in functions):

        def remove(losses: ModuleType, function: str = function) -> None:
            def gone(*_: Any, **__: Any) -> None:
                raise RuntimeError(f"{function} was called")

            setattr(losses, function, gone)

        if rejecting(remove, [proof]) is None:
            yield proof.id, function


# ---------------------------------------------------------------- the command


@as_command
def main(arguments: Sequence[str], show: Callable[[str], None] = print) -> int:
    """The command; returns its exit status."""
    parser = argument_parser("theory.mutation", __doc__ or "", "", "--only ipo --only dpo", "--proofs --only drdo")
    parser.add_argument("--only", action="append", metavar="NAME", help="a function of theory.losses; repeatable")
    parser.add_argument("--proofs", action="store_true", help="ask the proofs; the tests only about what these accept")
    options = parser.parse_args(arguments)

    names = mutable(SOURCE.read_text())
    unknown = set(options.only or []) - set(names)
    if unknown:
        raise ValueError(f"--only {sorted(unknown)[0]}: theory.losses has no such function; it has {', '.join(names)}")
    found = list(mutants(SOURCE.read_text(), options.only))
    if options.proofs:
        return ask_proofs(found, show)

    prepare_tests()
    start = time.perf_counter()
    if not accepted(None, "losses"):
        show("the tests fail on the losses as they are: nothing can be said about changes")
        return FAILED
    survivors = 0
    show(f"{'function':28}{'mutants':>8}{'rejected':>10}{'seconds':>9}")
    for name, of_function in by_function(found):
        began = time.perf_counter()
        alive = [mutant for mutant in of_function if accepted(mutant.module(), name)]
        survivors += len(alive)
        rejected = len(of_function) - len(alive)
        show(f"{name:28}{len(of_function):>8}{rejected:>10}{time.perf_counter() - began:>9.1f}")
        for mutant in alive:
            show(f"  accepted, line {mutant.line}: {mutant.change}")
    show(f"{len(found) - survivors} of {len(found)} mutants rejected in {time.perf_counter() - start:.0f} s")
    return FAILED if survivors else DONE


def ask_proofs(found: Sequence[Mutant], show: Callable[[str], None]) -> int:
    """Prints who notices each mutant; the exit status, 1 if there is one that no proof does or a row names too much."""
    start, public = time.perf_counter(), users(SOURCE.read_text())
    functions = set().union(*(public[mutant.function] for mutant in found))
    proofs = proofs_of(functions)
    gc.freeze()
    total: Counter[str] = Counter()
    columns = ("theorems", "definitions", "tests only", "nothing")
    show(f"{'function':28}{'mutants':>8}" + "".join(f"{column:>13}" for column in columns) + f"{'seconds':>9}")
    for name, of_function in by_function(found):
        began, noticed = time.perf_counter(), Counter[str]()
        naming = [proof for proof in proofs if public[name] & set(proof.losses)]
        alive = []
        for mutant in of_function:
            by = rejecting(mutant.put_into, naming)
            if by is None:
                prepare_tests()
                alive.append((mutant, "nothing" if accepted(mutant.module(), name) else "tests only"))
            noticed["definitions" if by and by.id == DEFINITIONS else "theorems" if by else alive[-1][1]] += 1
        total += noticed
        counts = "".join(f"{noticed[column]:>13}" for column in columns)
        show(f"{name:28}{len(of_function):>8}{counts}{time.perf_counter() - began:>9.1f}")
        for mutant, by_whom in alive:
            show(f"  accepted by {len(naming)} proofs, noticed by {by_whom}, line {mutant.line}: {mutant.change}")
    idle = list(uncalled(proofs, functions))
    for row, function in idle:
        show(f"{row} names {function}, but its proof does not call it")
    survivors = total["tests only"] + total["nothing"]
    show(
        f"{len(found)} mutants in {time.perf_counter() - start:.0f} s: proofs notice {len(found) - survivors} "
        f"({total['theorems']} a theorem), tests {total['tests only']} of the others, nothing {total['nothing']}"
    )
    return FAILED if survivors or idle else DONE


def by_function(found: Sequence[Mutant]) -> Iterator[tuple[str, list[Mutant]]]:
    """The mutants of each function, in the order of the file."""
    for name in dict.fromkeys(mutant.function for mutant in found):
        yield name, [mutant for mutant in found if mutant.function == name]


def prepare_tests() -> None:
    """Imports, once and not in each fork, what the tests of the losses import."""
    require_libraries("torch", "pytest")
    os.chdir(ROOT)
    for library in ("torch", "cvxpy", "sympy", "mpmath", "hypothesis", "pytest", "_hypothesis_pytestplugin"):
        importlib.import_module(library)
    gc.freeze()


if __name__ == "__main__":
    sys.exit(main())
