"""`python -m theory`: runs every check of every statement and prints the ledger of what holds."""

from __future__ import annotations

import contextlib
import importlib
import json
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from theory import records
from theory.claim import OPTIONAL, Claim, Row, all_claims, run
from theory.shell import (
    DONE,
    FAILED,
    add_force,
    argument_parser,
    as_command,
    check_free,
    check_free_or_marked,
    cores,
    output_file,
    whole_number,
)
from theory.testing import EXAMPLES, load_profile

if TYPE_CHECKING:  # what takes long to import is imported where it is used: --help is quick
    from rich.console import Console
    from rich.table import Table

FIELDS = (
    *("id", "source", "assumptions", "domain", "losses", "symbolic", "enumerated", "examples", "verdict"),
    *("counterexample", "not_run", "seconds"),
)
START, END = "<!-- ledger: python -m theory --markdown theory/README.md -->", "<!-- end of ledger -->"


@as_command
def main(arguments: Sequence[str]) -> int:
    """The command; returns its exit status, 1 if a check failed."""
    parser = argument_parser(
        "theory",
        "Runs every check of every statement and prints the ledger of what holds. A check that fails is a failure.",
        "",
        "--only thm2,thm2-hull --examples 1000",
        "--thorough --json ledger.json --jobs 8",
    )
    parser.add_argument("--only", action="append", metavar="NAME", help="ids of statements, by commas; repeatable")
    parser.add_argument(
        "--thorough", action="store_true", help=f"larger enumerations, {EXAMPLES['thorough']:,} examples a property"
    )
    parser.add_argument(
        "--examples", type=whole_number, metavar="N", help="examples a property, instead of the profile's"
    )
    parser.add_argument(
        "--jobs",
        type=whole_number,
        default=cores(),
        metavar="N",
        help="statements checked at a time, each in a process of its own; as many as there are cores, if not given",
    )
    parser.add_argument("--json", type=output_file, metavar="FILE", help="write the ledger as a JSON list")
    parser.add_argument(
        "--markdown",
        type=output_file,
        metavar="FILE",
        help="write it as Markdown; in a file with ledger markers, only between them",
    )
    add_force(parser)
    options = parser.parse_args(arguments)
    if options.force and not (options.json or options.markdown):
        parser.error("--force goes with --json or --markdown")
    if options.json:
        check_free("--json", options.json, force=options.force)
    if options.markdown:
        check_free_or_marked("--markdown", options.markdown, start=START, force=options.force)
    if options.only and options.markdown and START in _text(options.markdown):
        raise ValueError(f"--only would leave statements out of the ledger in {options.markdown}: write another file")

    load_profile("thorough" if options.thorough else "default", examples=options.examples)  # before any property exists
    claims = {claim.id: claim for claim in sorted(all_claims(), key=paper_order)}
    only = [name.strip() for given in options.only or [] for name in given.split(",")]
    for name in only:
        if name not in claims:
            raise ValueError(f"--only {name}: no such statement; there are {', '.join(claims)}")
    claims = {name: claim for name, claim in claims.items() if not only or name in only}

    from rich.console import Console

    progress, rows = Console(stderr=True), dict[str, Row]()
    with (
        bar(progress, len(claims)) as checking,
        contextlib.closing(checked(claims, thorough=options.thorough, jobs=options.jobs, checking=checking)) as found,
    ):
        for row in found:
            rows[row.id] = row
    ledger = [rows[name] for name in claims]  # in this order, in whichever they ended
    Console(width=None if sys.stdout.isatty() else 200).print(table(ledger))
    for row in ledger:
        for error in row.errors:
            progress.print(f"{row.id}: {error}", markup=False, style="red")
        for reason in row.not_run:
            progress.print(f"{row.id}: {reason}", markup=False)
    if options.json:
        records.write_text(
            options.json, json.dumps([as_json(row) for row in ledger], indent=1, ensure_ascii=False) + "\n"
        )
    if options.markdown:
        text = markdown(list(claims.values()), ledger)
        around = re.fullmatch(f"(.*{START}\n).*({END}.*)", _text(options.markdown), flags=re.DOTALL)
        records.write_text(options.markdown, around[1] + text + around[2] if around else text)
    return FAILED if any(row.errors for row in ledger) else DONE


def paper_order(claim: Claim) -> tuple[bool, int, bool, str]:
    """[F] by section of its appendix, in each first what is printed there, then ours; then what neither paper has; then
    [N]."""
    place = re.search(r"\[([FN])\](?: A\.(\d+))?", claim.source)
    section = (False, 99) if place is None else (place[1] == "N", int(place[2] or 98))
    return (*section, claim.source.startswith("ours"), claim.id)


# ---------------------------------------------------------------- running the checks

LINE_SECONDS = 60
"""Between two lines of progress where there is no terminal."""
Checking = Callable[[int, Sequence[str]], None]
"""Told how many claims are done, and the ids at work, whenever they change."""


@contextlib.contextmanager
def bar(console: Console, total: int) -> Iterator[Checking]:
    """A bar on a terminal, a line a minute at most elsewhere; both say what is being checked."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    if not console.is_terminal:
        said = time.monotonic()

        def say(done: int, names: Sequence[str]) -> None:
            nonlocal said
            if time.monotonic() - said >= LINE_SECONDS:
                said = time.monotonic()
                console.print(f"{done} of {total} done; checking {', '.join(names)}", markup=False, highlight=False)

        yield say
        return

    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    # Were it refreshed by a thread, forks could hang.
    with Progress(*columns, console=console, auto_refresh=False, transient=True) as shown:
        task = shown.add_task("", total=total)

        def show(done: int, names: Sequence[str]) -> None:
            shown.update(task, completed=done, description=f"checking {', '.join(names)}", refresh=True)

        yield show


def checked(
    claims: Mapping[str, Claim], *, thorough: bool, jobs: int, checking: Checking
) -> Generator[Row, None, None]:
    """The row of each claim, as they end.

    Args:
        claims: by id.
        thorough: as in `theory.claim.run`.
        jobs: claims at a time; with more than one, each is run in a fork, which finds all imported and the profile
            loaded. A system that cannot fork checks one after the other.
        checking: of a `bar`.

    Raises:
        ChildProcessError: a fork ended without an answer.
    """
    import multiprocessing
    from multiprocessing.connection import wait

    if min(jobs, len(claims)) == 1 or "fork" not in multiprocessing.get_all_start_methods():
        for done, (name, claim) in enumerate(claims.items()):
            checking(done, [name])
            yield run(claim, thorough=thorough)
        return
    for library in OPTIONAL:
        with contextlib.suppress(ModuleNotFoundError):
            importlib.import_module(library)  # once, and not in each fork
    ended: Any
    fork, waiting = multiprocessing.get_context("fork"), list(claims.values())
    running: dict[Any, tuple[str, Any]] = {}  # the end of its pipe -> a claim's id and process
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                claim, (ours, theirs) = waiting.pop(0), fork.Pipe(duplex=False)
                process = fork.Process(target=_answer, args=(claim, thorough, theirs), daemon=True)
                with uninterrupted():  # Ctrl-C reaches all of a terminal's processes; we end the forks, each of them
                    process.start()
                    running[ours] = claim.id, process
                theirs.close()
            checking(len(claims) - len(waiting) - len(running), [name for name, _ in running.values()])
            for ended in wait(list(running)):
                name, process = running[ended]
                try:
                    answer = ended.recv()
                except EOFError:
                    process.join()
                    raise ChildProcessError(f"{name}: its process ended with status {process.exitcode}") from None
                if isinstance(answer, BaseException):
                    raise answer
                process.join()
                del running[ended]
                yield answer
    finally:
        for _, process in running.values():
            process.terminate()
            process.join()


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Ctrl-C waits till the block is left; a fork that is made in it never hears it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _answer(claim: Claim, thorough: bool, theirs: Any) -> None:
    """In a fork: sends the row, or what `run` raised."""
    try:
        theirs.send(run(claim, thorough=thorough))
    except BaseException as error:
        error.add_note(traceback.format_exc())  # its own traceback stays behind
        theirs.send(error)


# ---------------------------------------------------------------- the ledger in three forms


def verdict_of(row: Row, bold: str) -> str:
    """The cell of the verdict: with what breaks the printed form, and how many checks could not be run.

    Args:
        row: of the ledger.
        bold: a template such as "**{}**", for checks that failed.
    """
    failed, unrun = (f"{len(found)} check{'s' * (len(found) > 1)}" for found in (row.errors, row.not_run))
    cell: str = bold.format(f"{failed} failed") if row.errors else row.verdict or "undecided"
    if row.counterexample:
        cell += f": {row.counterexample}"
    reasons = dict.fromkeys(reason.partition(": ")[2] for reason in row.not_run)
    return f"{cell}; {unrun} {', '.join(reasons)}" if row.not_run else cell


def table(rows: Sequence[Row]) -> Table:
    """For the terminal."""
    from rich.table import Table

    columns = ("statement", "source", "assumptions", "symbolic", "enumerated", "examples", "verdict", "seconds")
    shown = Table(*columns, show_lines=True)
    for row in rows:
        shown.add_row(
            row.id,
            row.source.replace("[", r"\["),
            ", ".join(row.assumptions),
            "yes" if row.symbolic else "no",
            row.enumerated or "",
            f"{row.examples:,}",
            verdict_of(row, "[bold red]{}[/]"),
            f"{row.seconds:.1f}",
        )
    return shown


def as_json(row: Row) -> dict[str, Any]:
    """A row of the JSON list. `verdict` is null where a check failed, or one that decides was not run."""
    return {field: getattr(row, field) for field in FIELDS}


def markdown(claims: Sequence[Claim], rows: Sequence[Row]) -> str:
    """A table of verdicts, then each statement with its formula and assumptions."""
    header = ("statement", "source", "symbolic", "enumerated", "examples", "verdict", "seconds")
    cells = (
        (
            f"[{row.id}](#{row.id})",
            row.source,
            "yes" if row.symbolic else "no",
            row.enumerated or "",
            f"{row.examples:,}",
            verdict_of(row, "**{}**"),
            f"{row.seconds:.1f}",
        )
        for row in rows
    )
    lines = [records.table(header, cells, numbers=False, padded=False)]
    for claim in claims:
        assumptions = "; ".join(f"*{name}*: {meaning}" for name, meaning in claim.assumptions.items())
        proof = ", ".join(f"`{name}`" for name in claim.losses) or f"no loss: {claim.no_losses}"
        lines += ["", f"#### {claim.id}", "", claim.statement, "", f"$${claim.formula}$$", ""]
        lines += [f"Needs {assumptions}.", f"Domain: {claim.domain}. Proved of {proof}."]
    return "\n".join(lines) + "\n"


# ---------------------------------------------------------------- files


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""


if __name__ == "__main__":
    sys.exit(main())
