"""What is logged of a step of a preference method: by our names, and by TRL's where TRL logs it too, so that dashboards
overlay."""

from __future__ import annotations

from torch import Tensor

from lm.objectives import Method, PairBatch, forward_kl_of_pairs
from lm.training.batches import agreement
from theory import losses


def scale_of(method: Method) -> float | None:
    """What TRL calls beta: the method's beta, IPO's tau; None of a method that has no such number."""
    scale: float | None = getattr(method, method.scale_option, None)
    return scale


def as_trl(
    chosen_logps: Tensor, rejected_logps: Tensor, chosen_logratios: Tensor, rejected_logratios: Tensor, method: Method
) -> dict[str, Tensor]:
    """TRL's metrics that need no logits, each pair's, [N], by TRL's names and definitions (DPOTrainer of TRL 1.16).

    logps/chosen and logps/rejected are log pi; rewards/chosen and rewards/rejected beta times log pi/pi_ref, IPO's tau
    for beta; rewards/margins their difference; rewards/accuracies whether the chosen side's is larger, whatever a soft
    label says. A method without such a scale has no rewards.
    """
    told = {"logps/chosen": chosen_logps, "logps/rejected": rejected_logps}
    if (scale := scale_of(method)) is not None:
        chosen, rejected = scale * chosen_logratios, scale * rejected_logratios
        told |= {
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/accuracies": (chosen > rejected).to(chosen.dtype),
            "rewards/margins": chosen - rejected,
        }
    return told


def of_pairs(method: Method, pairs: PairBatch) -> dict[str, Tensor]:
    """All metrics of a training step, each pair's, [N], in nats where they have a unit.

    Beside `as_trl`: log pi of winners and losers (chosen_logps, rejected_logps); the same less log pi_ref
    (chosen_logratio, rejected_logratio), whose difference is the margin; the accuracy, by soft labels as of
    `lm.training.batches.agreement`; the forward KL by both estimates (forward_kl, forward_kl_preferences); beta times
    the margin (implicit_reward_margin); the policy's own estimate of it (estimated_reward_margin); and each member's
    weight in the reward that an ensemble method distils (member_weight_<k>), for which `pairs.gram` has to be there.
    """
    chosen, rejected, margin = pairs.chosen_logratios, pairs.rejected_logratios, pairs.logratio_margin
    told = {
        "chosen_logps": pairs.policy_chosen_logps,
        "rejected_logps": pairs.policy_rejected_logps,
        "chosen_logratio": chosen,
        "rejected_logratio": rejected,
        "margin": margin,
        "accuracy": agreement(chosen, rejected, pairs.chosen_probability).to(margin.dtype),
        "forward_kl_preferences": forward_kl_of_pairs(chosen, rejected),
        **as_trl(pairs.policy_chosen_logps, pairs.policy_rejected_logps, chosen, rejected, method),
    }
    if pairs.sample_logratios is not None:
        told["forward_kl"] = losses.forward_kl(pairs.sample_logratios)
    if method.implicit_scale is not None:
        told["implicit_reward_margin"] = method.implicit_scale * margin
    if pairs.estimated_reward_margin is not None:
        told["estimated_reward_margin"] = pairs.estimated_reward_margin
    if method.weighs_members:
        weights = method.weights(pairs.known("gram"))
        told |= {f"member_weight_{k}": weight.expand(len(margin)) for k, weight in enumerate(weights)}
    return told
