"""Speed of the exact solvers, as ratios measured in one run on one machine.

    python -m bandits.bench

1. Batched p-DPO on 3 to 10 arms against CVXPY + Clarabel on the same problems at the same accuracy or better.
2. Cost of IPO against the number of arms, on sparse graphs.
3. One p-DPO problem of 10,000 arms and 50,000 pairs.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from bandits.batched import solve_batch
from bandits.objectives import DPO, IPO, Floats
from bandits.policy import uniform
from bandits.report import provenance, write_json
from bandits.solve import Optimum, solve
from theory.preferences import PreferenceGraph
from theory.shell import add_force, argument_parser, as_command, check_free, output_file, whole_number

BETA, ALPHA = 1.0, 0.3
ARMS = range(3, 11)
SIZES = (156, 625, 2_500, 10_000)


def small_problems(count: int, arms: int, rng: np.random.Generator) -> tuple[Any, Floats]:
    """Random p-DPO problems with 3 pairs for 2 arms: edges [count, m, 2], ref [count, arms]."""
    pairs = 3 * arms // 2
    winners = rng.integers(0, arms, (count, pairs))
    losers = (winners + rng.integers(1, arms, (count, pairs))) % arms
    return np.stack([winners, losers], axis=2), rng.dirichlet(np.ones(arms), count)


def cvxpy_policy(edges: Any, ref: Floats) -> tuple[Floats, float]:
    """(log pi, Clarabel's own seconds) of one p-DPO problem.

    Clarabel's default tolerances leave policies 1e-5 from ours; these ask for the accuracy of ours.
    """
    import cvxpy as cp

    u = cp.Variable(len(ref))
    margins = u[edges[:, 0]] - u[edges[:, 1]]
    loss = cp.sum(cp.logistic(-BETA * margins)) / len(edges) - ALPHA * (ref @ u)
    problem = cp.Problem(cp.Minimize(loss), [cp.log_sum_exp(u + np.log(ref)) <= 0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # where Clarabel stops short of them it says so; `distance` shows by how much
        problem.solve(solver=cp.CLARABEL, tol_gap_abs=1e-10, tol_gap_rel=1e-10, tol_feas=1e-10)
    return np.asarray(u.value) + np.log(ref), float(problem.solver_stats.solve_time)


def best_time(action: Callable[..., object], *arguments: Any, repeats: int = 3) -> float:
    """Processor seconds of the fastest of several runs: the one that other processes disturbed least."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        action(*arguments)
        times.append(time.process_time() - start)
    return min(times)


def batched(count: int, referee_count: int, rng: np.random.Generator) -> list[dict[str, float]]:
    """Problems a second of both solvers by number of arms, and how far their policies are apart."""
    rows = []
    for arms in ARMS:
        edges, ref = small_problems(count, arms, rng)
        ours = best_time(partial(solve_batch, DPO(beta=BETA), edges, ref, alpha=ALPHA)) / count
        result = solve_batch(DPO(beta=BETA), edges, ref, alpha=ALPHA)
        times, cone_times, distance = [], [], 0.0
        for at in range(referee_count):
            times.append(best_time(cvxpy_policy, edges[at], ref[at]))  # imports and first-call work do not count
            log_probs, cone = cvxpy_policy(edges[at], ref[at])
            cone_times.append(cone)
            distance = max(distance, float(np.abs(np.exp(log_probs) - result.probs[at]).max()))
        rows.append(
            {
                "arms": arms,
                "ours_per_second": 1 / ours,
                "cvxpy_per_second": 1 / float(np.mean(times)),
                "ratio": float(np.mean(times)) / ours,
                "ratio_to_clarabel_alone": float(np.mean(cone_times)) / ours,
                "residual": float(result.residual.max()),
                "distance": distance,
            }
        )
    return rows


def sparse_graph(arms: int, pairs: int, rng: np.random.Generator) -> PreferenceGraph:
    """Random pairs, with a random tree below them so that the graph is connected."""
    tree = [(int(rng.integers(child)), child) for child in range(1, arms)]
    winners = rng.integers(0, arms, pairs - len(tree))
    losers = (winners + rng.integers(1, arms, len(winners))) % arms
    return PreferenceGraph(arms, np.concatenate([np.array(tree), np.stack([winners, losers], axis=1)]))


def ipo_scaling(rng: np.random.Generator) -> list[dict[str, Any]]:
    """Seconds of one exact IPO optimum on a chain, a random tree and a random graph of 5 pairs an arm."""
    rows = []
    for arms in SIZES:
        for name, graph in (
            ("chain", PreferenceGraph.chain(arms)),
            ("tree", sparse_graph(arms, arms - 1, rng)),
            ("random", sparse_graph(arms, 5 * arms, rng)),
        ):
            ref = rng.dirichlet(np.ones(arms))
            seconds = best_time(solve, IPO(tau=1.0), graph, ref)
            work = arms * np.log(arms) + len(graph)
            rows.append({"graph": name, "arms": arms, "pairs": len(graph), "seconds": seconds, "work": float(work)})
    return rows


@as_command
def main(arguments: Sequence[str]) -> int:
    """The command; returns the exit status."""
    parser = argument_parser(
        "bandits.bench", "Speed of the exact bandit solvers.", "", "--count 1024 --referee-count 10 --json bench.json"
    )
    parser.add_argument(
        "--count", type=whole_number, default=8192, help="small problems a size for the batch (%(default)s)"
    )
    parser.add_argument("--referee-count", type=whole_number, default=20, help="of which CVXPY solves (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    parser.add_argument("--json", type=output_file, metavar="FILE", help="write the measurements here")
    add_force(parser)
    options = parser.parse_args(arguments)
    if options.json:
        check_free("--json", options.json, force=options.force)
    elif options.force:
        parser.error("--force goes with --json")
    if options.referee_count > options.count:
        raise ValueError(
            f"--referee-count {options.referee_count} is more than the {options.count} problems of --count"
        )
    rng = np.random.default_rng(options.seed)

    print("Batched p-DPO against CVXPY + Clarabel, problems a processor second")
    small = batched(options.count, options.referee_count, rng)
    for row in small:
        print(
            f"  {row['arms']:>2} arms: ours {row['ours_per_second']:>9,.0f}  CVXPY {row['cvxpy_per_second']:>6.1f}  "
            f"ratio {row['ratio']:>6,.0f}  (Clarabel's own time alone: {row['ratio_to_clarabel_alone']:>5.0f})  "
            f"KKT residual {row['residual']:.0e}, policies apart by {row['distance']:.0e}"
        )
    ours = sum(1 / row["ours_per_second"] for row in small)
    theirs = sum(1 / row["cvxpy_per_second"] for row in small)
    print(f"  over all sizes alike: ratio {theirs / ours:,.0f}")

    print("IPO, one optimum: seconds, and against (n log n + pairs) relative to the smallest of its kind")
    scaling = ipo_scaling(rng)
    first = {row["graph"]: row for row in reversed(scaling)}
    for row in scaling:
        relative = (row["seconds"] / row["work"]) / (first[row["graph"]]["seconds"] / first[row["graph"]]["work"])
        print(
            f"  {row['graph']:<7}{row['arms']:>7,} arms {row['pairs']:>7,} pairs {row['seconds']:>8.4f} s"
            f"  x{relative:.2f}"
        )

    graph = sparse_graph(10_000, 50_000, rng)
    start = time.perf_counter()
    optimum = solve(DPO(beta=BETA), graph, uniform(graph.n), alpha=ALPHA)
    seconds = time.perf_counter() - start
    assert isinstance(optimum, Optimum)
    print(
        f"p-DPO, 10,000 arms and 50,000 pairs: {seconds:.2f} s, {optimum.iterations} Newton steps, "
        f"relative residual {optimum.certificate.residuals['relative']:.0e}"
    )
    if options.json:
        large = {"seconds": seconds, "iterations": optimum.iterations, **optimum.certificate.residuals}
        document = {
            "provenance": provenance({"beta": BETA, "alpha": ALPHA}, seed=options.seed),
            "batched": small,
            "ratio": theirs / ours,
            "ipo": scaling,
            "p-dpo": large,
        }
        print("wrote", write_json(options.json, document))
    return 0


if __name__ == "__main__":
    sys.exit(main())
