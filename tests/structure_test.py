"""Rules of the layout: which package and which room imports which, that losses are written once, that every statement
is tested."""

from __future__ import annotations

import ast
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TypeGuard

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("theory", "bandits", "lm", "figures")

MAY_IMPORT = {"theory": set[str](), "bandits": {"theory"}, "lm": {"theory", "torch", "figures"}, "figures": set[str]()}
"""On import, of our packages and torch."""
MAY_IMPORT_WHEN_CALLED = {
    "theory": {"torch"},
    "bandits": {"figures"},
    "lm": {"figures", "bandits"},
    "figures": set[str](),
}
"""Inside functions, besides: commands that draw what they computed, and theory where it has been given a tensor."""

LOSS_PRIMITIVES = {
    "logsigmoid",
    "log_sigmoid",
    "LogSigmoid",
    "log_expit",
    "softplus",
    "Softplus",
    "logaddexp",
    "log1mexp",
    "kl_div",
    "KLDivLoss",
    "mse_loss",
    "MSELoss",
    "binary_cross_entropy_with_logits",
    "BCEWithLogitsLoss",
}
"""What one would write a pair loss or a KL term with."""
LOSSES_ARE_WRITTEN_IN = {"theory/losses.py", "theory/backend.py"}


def modules(package: str) -> Iterator[Path]:
    """The files of a package that are no tests."""
    return (path for path in sorted((ROOT / package).rglob("*.py")) if not path.stem.endswith("_test"))


def imports(tree: ast.Module) -> Iterator[tuple[str, bool]]:
    """(top-level package, whether it is imported as the module is) of every import."""
    inside = {id(n) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef | ast.Lambda) for n in ast.walk(f)}
    for_types = [i.body for i in ast.walk(tree) if isinstance(i, ast.If) and ast.unparse(i.test) == "TYPE_CHECKING"]
    inside |= {id(n) for body in for_types for statement in body for n in ast.walk(statement)}
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        for name in names:
            yield name.split(".")[0], id(node) not in inside


def forbidden_imports(package: str, tree: ast.Module) -> list[str]:
    """Packages that a module of a package imports against the rules."""
    watched = {*PACKAGES, "torch"} - {package}
    on_import, when_called = MAY_IMPORT[package], MAY_IMPORT[package] | MAY_IMPORT_WHEN_CALLED[package]
    return [name for name, now in imports(tree) if name in watched - (on_import if now else when_called)]


def loss_primitives(tree: ast.Module) -> list[str]:
    """Uses of LOSS_PRIMITIVES; `logaddexp.reduce` is none: it normalises a distribution."""
    reduced = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Attribute) and n.attr == "reduce"}
    found = []
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Attribute) and id(node) not in reduced:
            names = [node.attr]
        elif isinstance(node, ast.ImportFrom):
            names = [alias.name for alias in node.names]
        found += [name for name in names if name in LOSS_PRIMITIVES]
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_run_one_way(package: str) -> None:
    found = {str(path): forbidden_imports(package, ast.parse(path.read_text())) for path in modules(package)}
    assert found, f"{package} has no modules"
    assert not {path: names for path, names in found.items() if names}


@pytest.mark.parametrize(
    ("package", "code", "names"),
    [
        ("theory", "import torch", ["torch"]),
        ("theory", "def f():\n    import torch", []),
        ("theory", "if TYPE_CHECKING:\n    import torch", []),
        ("theory", "if TYPE_CHECKING:\n    x = 1\nelse:\n    import torch", ["torch"]),
        ("theory", "if TYPE_CHECKING:\n    import bandits", ["bandits"]),
        ("theory", "def f():\n    from bandits.solve import solve", ["bandits"]),
        ("bandits", "import figures.style", ["figures"]),
        ("bandits", "def f():\n    from figures.style import save", []),
        ("bandits", "from lm import data", ["lm"]),
        ("bandits", "import torch", ["torch"]),
        ("lm", "if True:\n    from bandits import solve", ["bandits"]),
        ("figures", "def f():\n    import lm.trainer, theory.losses", ["lm", "theory"]),
    ],
)
def test_the_import_rule_itself(package: str, code: str, names: list[str]) -> None:
    assert forbidden_imports(package, ast.parse(code)) == names


# ---------------------------------------------------------------- the house: doors and rooms of lm/

FLOORS = (
    ("reporting",),
    ("studies",),
    ("stages",),
    ("judging",),
    ("training",),
    ("models",),
    ("logprobs",),
    ("data",),
    ("base",),
    ("config",),
    ("objectives",),
)
"""From the top down: a module imports from its own floor and from those below it."""
TOP = ("workflow", "integrations")
"""Beside the doors: they import any room, and no room imports them."""


def name_of(path: Path) -> str:
    """lm/data/rows.py -> lm.data.rows, lm/data/__init__.py -> lm.data."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def graph(package: str) -> dict[str, set[str]]:
    """Module -> the modules of the same package that it imports, anywhere in it: inside functions counts as well."""
    trees = {name_of(path): ast.parse(path.read_text()) for path in modules(package)}
    return {name: set(imported(tree, trees)) - {name} for name, tree in trees.items()}


def imported(tree: ast.Module, known: Iterable[str]) -> Iterator[str]:
    """The known modules that a tree imports."""
    names = set(known)
    checking = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in checking:  # which nothing does when it runs
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            below = {f"{node.module}.{alias.name}" for alias in node.names} & names
            yield from below or ({node.module} & names)


def circles(edges: Mapping[str, set[str]]) -> list[set[str]]:
    """Groups of modules that import each other, directly or by others."""

    def reach(start: str) -> set[str]:
        seen: set[str] = set()
        waiting = [start]
        while waiting:
            for name in edges[waiting.pop()] - seen:
                seen.add(name)
                waiting.append(name)
        return seen

    reached = {name: reach(name) for name in edges}
    groups = {frozenset(o for o in reached[name] if name in reached[o]) for name in edges if name in reached[name]}
    return [set(group) for group in groups]


def floor(module: str) -> int | None:
    """0 for the highest; None for a door, and for what stands beside the doors."""
    room = module.split(".")[1] if "." in module else ""
    return next((number for number, rooms in enumerate(FLOORS) if room in rooms), None)


def upward(edges: Mapping[str, set[str]]) -> list[str]:
    """Imports from a higher floor, or of a door, as `importer -> imported`."""
    found = []
    for module, names in edges.items():
        for name in names:
            ours, theirs = floor(module), floor(name)
            beside = (
                name.split(".")[1:2] and name.split(".")[1] in TOP and module.split(".")[1:2] == name.split(".")[1:2]
            )
            if name == "lm" or beside:
                continue
            if theirs is None or (ours is not None and theirs < ours):
                found.append(f"{module} -> {name}")
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_no_module_imports_itself_by_others(package: str) -> None:
    assert circles(graph(package)) == []


def test_rooms_import_lower_ones_and_no_door() -> None:
    assert upward(graph("lm")) == []


def test_the_house_rules_themselves() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [{"a", "b", "c"}]
    assert circles({"a": {"b"}, "b": set()}) == []
    assert upward({"lm.data.rows": {"lm.stages.run"}}) == ["lm.data.rows -> lm.stages.run"]
    assert upward({"lm.reporting.page": {"lm.train"}}) == ["lm.reporting.page -> lm.train"]
    assert upward({"lm.train": {"lm.reporting.results"}, "lm.stages.run": {"lm.base.store"}, "lm.config": set()}) == []
    assert upward({"lm.train": {"lm.evaluate"}}) == ["lm.train -> lm.evaluate"]
    code = "def f():\n    from lm.stages import run\nif TYPE_CHECKING:\n    import lm.train"
    assert set(imported(ast.parse(code), ["lm.stages", "lm.stages.run", "lm.train"])) == {"lm.stages.run"}


def test_every_folder_says_what_it_is_for_in_a_line() -> None:
    folders = {path.parent for package in PACKAGES for path in modules(package)}
    for folder in folders:
        says = ast.get_docstring(ast.parse((folder / "__init__.py").read_text()))
        assert says, folder
        assert len(says.splitlines()) == 1, folder
    rooms = {folder.name for folder in folders if folder.parent == ROOT / "lm"}
    assert rooms == {room for floor in FLOORS for room in floor} - {"config", "objectives"} | set(TOP)


def test_doors_are_commands() -> None:
    doors = {path.stem for path in (ROOT / "lm").glob("*.py") if not path.stem.endswith("_test")}
    for name in doors - {"__init__", "config", "objectives"}:
        assert '\nif __name__ == "__main__":' in (ROOT / "lm" / f"{name}.py").read_text(), name


@pytest.mark.parametrize("package", PACKAGES)
def test_losses_are_written_once(package: str) -> None:
    found = {
        path.relative_to(ROOT).as_posix(): loss_primitives(ast.parse(path.read_text())) for path in modules(package)
    }
    assert {path for path, names in found.items() if names} == {
        p for p in LOSSES_ARE_WRITTEN_IN if p.startswith(package)
    }


@pytest.mark.parametrize(
    ("code", "names"),
    [
        ("-F.logsigmoid(beta * margin)", ["logsigmoid"]),
        ("from torch.nn.functional import softplus as f", ["softplus"]),
        ("loss = np.logaddexp\nloss(0, -z)", ["logaddexp"]),
        ("logits - np.logaddexp.reduce(logits)", []),
        ("losses.dpo(margin, beta=0.1)", []),
    ],
)
def test_the_loss_rule_itself(code: str, names: list[str]) -> None:
    assert loss_primitives(ast.parse(code)) == names


@pytest.mark.parametrize(
    ("package", "absent"),
    [
        ("theory", ["torch", "bandits", "lm", "figures"]),
        ("bandits", ["torch", "lm", "figures"]),
        ("figures", ["torch", "transformers", "theory", "bandits", "lm"]),
    ],
)
def test_what_importing_a_whole_package_loads(package: str, absent: list[str]) -> None:
    """By importing it, since third-party packages may import torch on their own."""
    names = [path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".") for path in modules(package)]
    code = f"import importlib, sys\nfor name in {names}: importlib.import_module(name)\n"
    code += f"print(*sorted(set({absent}) & set(sys.modules)))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True).stdout
    assert loaded.split() == []


def test_every_proposition_is_tested_by_all_that_it_claims() -> None:
    files = {path for path in modules("theory/propositions") if path.stem != "__init__"}
    assert files
    for path in files:
        test = path.with_name(f"{path.stem}_test.py")
        assert test.exists(), f"{path.name} has no {test.name}"
        assert "claim_tests(CLAIMS)" in test.read_text(), f"{test.name} does not run the claims"
        assert f"theory.propositions.{path.stem} import" in test.read_text(), f"{test.name} tests something else"


def test_no_proposition_sets_its_own_number_of_examples() -> None:
    """`--thorough` and `--examples` could not reach it."""
    for path in modules("theory/propositions"):
        names = {
            alias.name
            for n in ast.walk(ast.parse(path.read_text()))
            if isinstance(n, ast.ImportFrom)
            for alias in n.names
        }
        assert "settings" not in names, path.name


# ---------------------------------------------------------------- names in prose

DOTTED = re.compile(r"(?<![\w./@-])(?:lm|theory|bandits|figures|tests)(?:\.(?!(?:md|yaml)\b)[A-Za-z_]\w*)+(?![\w/-])")
"""Names in our packages; `theory.yaml` is a file's."""
NAMES = {
    "lm.data": True,
    "lm.data.rows": True,
    "lm.config.Config.method": True,
    "lm.config.DataConfig.max_length": False,
    "lm.config.METHODS": True,
    "lm.workflow.summary.json.dumps": True,
    "lm.judging.scored_sets.RewardModel.rewards": True,
    "lm.judging.scored_sets.RewardModel.punishments": False,
    "lm.studies.nondeterministic.IMPLICIT_BETAS": True,
    "lm.cli": False,
    "lm.rows": False,
    "lm.data.rows.no_such_reader": False,
    "tests.tiny": True,
    "tests.giant": False,
}
"""Controls: whether there is such a thing."""
MADE_UP = {"lm.COMMAND", "lm.nothing", "lm.test", "lm.trainer", "theory.no_such_module"} | {
    name for name, there in NAMES.items() if not there
}
"""What a help text, and tests of what is not there, call by such a name."""


def prose(path: Path) -> str:
    """A document; of a Python file the comments, docstrings and other strings, those of formatted strings by parts."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        return text
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    parts = [token.string for token in tokens if token.type == tokenize.COMMENT]
    parts += [
        node.value
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    return "\n".join(parts)


def stands(name: str) -> bool:
    """Whether a dotted name is a module of the tree, or what a module of it has, by the files."""
    folder, parts = ROOT, name.split(".")
    while parts and (folder / parts[0]).is_dir():
        folder /= parts.pop(0)
    file = folder / "__init__.py"
    if parts and (folder / f"{parts[0]}.py").is_file():
        file = folder / f"{parts.pop(0)}.py"
    return not parts or (file.is_file() and has(ast.parse(file.read_text(encoding="utf-8")), parts))


def has(holder: ast.Module | ast.ClassDef, names: list[str]) -> bool:
    """Whether a module or a class has what the first of the names says, and that has the rest. What is imported from
    this tree is looked for there; a class with bases, and any other value, is taken to have the rest."""
    first, *rest = names
    nodes = [
        node for part in holder.body for node in (ast.walk(part) if isinstance(part, ast.If | ast.Try) else [part])
    ]
    for node in nodes:
        if isinstance(node, ast.ClassDef) and node.name == first:
            return not rest or has(node, rest)
        if isinstance(node, ast.ImportFrom) and node.module:
            of_tree = node.module.split(".")[0] in PACKAGES
            for alias in node.names:
                if (alias.asname or alias.name) == first:
                    return not of_tree or stands(".".join([node.module, alias.name, *rest]))
    made = {name.id for node in nodes if isinstance(node, ASSIGNED) for name in ast.walk(node) if is_stored(name)}
    made |= {node.name for node in nodes if isinstance(node, ast.FunctionDef)}
    made |= {alias.asname or alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return first in made or (isinstance(holder, ast.ClassDef) and bool(holder.bases))


ASSIGNED = ast.Assign | ast.AnnAssign


def is_stored(node: ast.AST) -> TypeGuard[ast.Name]:
    """Whether a node is a name that is given a value."""
    return isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)


def test_names_in_prose_are_those_of_modules_and_of_what_they_have() -> None:
    tracked = subprocess.run(
        ["git", "ls-files", "*.py", "*.md"], capture_output=True, text=True, cwd=ROOT, check=True
    ).stdout.split()
    named = {path: set(DOTTED.findall(prose(ROOT / path))) for path in tracked if path != "CHANGELOG.md"}
    assert sum(map(len, named.values())) > 100
    absent = {path: sorted(name for name in names - MADE_UP if not stands(name)) for path, names in named.items()}
    assert not {path: names for path, names in absent.items() if names}


@pytest.mark.parametrize(("name", "there"), NAMES.items())
def test_the_rule_of_names_itself(name: str, there: bool, tmp_path: Path) -> None:
    assert stands(name) == there
    (tmp_path / "a.py").write_text(f'"""Of `{name}`."""\n', encoding="utf-8")
    (tmp_path / "b.py").write_text(f"# {name}, in a comment\nx = f'{name}: {{y}}'\n", encoding="utf-8")
    (tmp_path / "c.md").write_text(f"`{name}`, and ({name}). Not bandits.md or theory/{name}.\n", encoding="utf-8")
    for file in tmp_path.iterdir():
        assert set(DOTTED.findall(prose(file))) == {name}
