"""Which completions a first step of DPO moves down: winners that fall, losers that rise.

Let g_y be the gradient of log pi(y) with respect to the trained parameters, at the reference. A small step of plain
gradient descent on the DPO loss of one pair moves them along g_w - g_l, hence

    log pi(y_w) by (a positive factor times) <g_w, g_w - g_l>,    log pi(y_l) by the same times <g_l, g_w - g_l>.

So the winner is the first to fall iff the one is negative, the loser rises iff the other is positive; neither beta
nor a forward-KL term with any alpha changes that, since at the reference the latter's gradient is 0. Statement,
proof and counterexamples: `theory.propositions.first_to_fall`.

Which gradient:

- *Log-linear policies*, log pi(y) = theta . phi_y + b_y - log Z: g_y = phi_y - E_pi[phi] (`moves_from_features`).
- *A language model of which only the output head W is trained*, logits W h_t (with or without a bias), h_t the last
  hidden state: g_y = sum_t (e_{y_t} - p_t) h_t', exactly, and so

      <g_a, g_b> = sum_{s,t} (h_s . h_t) (e_{a_s} - p_s) . (e_{b_t} - p_t)    (`head_inner_product`, `head_gram`).

- *Any other network*: the same statement with g_y over all its parameters. <g_a, g_b> is then a sum over groups of
  parameters, of which the head's is one: on the last hidden states alone it is a diagnostic and no theorem. Nor is it
  one where the head is tied to the input embeddings, logits are capped, the optimiser is adaptive, or other pairs
  share the step (add up their g_w - g_l: what counts is <g_w, that sum>).

Nothing here needs torch: `head_inner_product` and `moves` use operators only, and take its tensors as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from theory.backend import Array, same_shapes, shape_of


@dataclass(frozen=True)
class Moves:
    """First moves of N pairs, in the unit of the inner products; times beta / 2 (of a pair of weight one at the
    reference, where the margin is 0) they are speeds of log pi in nats per unit of gradient flow."""

    winner: Array
    """<g_w, g_w - g_l>, [...]: the winner falls where it is < 0."""
    loser: Array
    """<g_l, g_w - g_l>, [...]: the loser rises where it is > 0. Always at most `winner`, as margins grow."""

    @property
    def winner_falls(self) -> Any:
        """[...], bool: the winner loses probability first."""
        return self.winner < 0

    @property
    def loser_rises(self) -> Any:
        """[...], bool: the loser gains probability first."""
        return self.loser > 0


class Completion(NamedTuple):
    """What the head saw of one completion of T tokens; NumPy arrays or torch tensors."""

    states: Array
    """[T, H]: the last hidden state at the position *before* each token, as the head gets it (after any norm)."""
    probs: Array
    """[T, V]: the next-token distribution there."""
    tokens: Array
    """[T], integers in 0 ... V - 1."""


def moves(winner_winner: Array, winner_loser: Array, loser_loser: Array) -> Moves:
    """First moves from inner products alone.

    Args:
        winner_winner: <g_w, g_w>, [...].
        winner_loser: <g_w, g_l>, [...].
        loser_loser: <g_l, g_l>, [...].
    """
    same_shapes(winner_winner=winner_winner, winner_loser=winner_loser, loser_loser=loser_loser)
    return Moves(winner=winner_winner - winner_loser, loser=winner_loser - loser_loser)


def moves_from_features(chosen: Array, rejected: Array, expected: Array) -> Moves:
    """First moves under a log-linear policy: g_y = phi_y - E_pi[phi].

    Args:
        chosen: phi of the winners, [..., d].
        rejected: phi of the losers, [..., d].
        expected: mean of phi under the policy, for each pair's prompt, [..., d].

    Returns:
        [...]. A constant added to all features of a prompt changes nothing.
    """
    same_shapes(chosen=chosen, rejected=rejected, expected=expected)
    if not shape_of(chosen):
        raise ValueError("chosen needs a feature axis, got a scalar")
    direction = chosen - rejected
    return Moves(
        winner=((chosen - expected) * direction).sum(-1),
        loser=((rejected - expected) * direction).sum(-1),
    )


def head_inner_product(a: Completion, b: Completion) -> Array:
    """<g_a, g_b> for the weights of a linear output head: one number, exactly.

    Works on S x T matrices of inner products, never on a gradient of size V x H. Where the positions are many and the
    vocabulary large, the two [T, V] arrays of probabilities are all that it costs.

    Raises:
        ValueError: shapes that do not fit together; names the argument.
    """
    for name, completion in (("a", a), ("b", b)):
        states, probs, tokens = (shape_of(part) for part in completion)
        if len(states) != 2 or len(probs) != 2 or len(tokens) != 1 or not states[0] == probs[0] == tokens[0]:
            raise ValueError(
                f"{name} must have states [T, H], probs [T, V] and tokens [T], got shapes {states}, {probs}, {tokens}"
            )
    if shape_of(a.states)[1] != shape_of(b.states)[1] or shape_of(a.probs)[1] != shape_of(b.probs)[1]:
        raise ValueError(
            f"a and b must share H and V, got states {shape_of(a.states)} and {shape_of(b.states)}, "
            f"probs {shape_of(a.probs)} and {shape_of(b.probs)}"
        )
    # (e_a - p) . (e_b - q) = [a = b] - p_b - q_a + p . q
    same = (a.tokens[:, None] == b.tokens[None, :]) * 1
    residuals = a.probs @ b.probs.T - a.probs[:, b.tokens] - b.probs[:, a.tokens].T + same
    return ((a.states @ b.states.T) * residuals).sum()


def head_gram(chosen: Completion, rejected: Completion) -> tuple[Array, Array, Array]:
    """<g_w, g_w>, <g_w, g_l> and <g_l, g_l> of one pair, for `moves`."""
    return (
        head_inner_product(chosen, chosen),
        head_inner_product(chosen, rejected),
        head_inner_product(rejected, rejected),
    )
