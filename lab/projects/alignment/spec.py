"""What any reward model, DPO loss, KL estimate, group advantage and clipped policy loss must do."""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, Any

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from lab.context import IGNORED
from lab.projects.decoder.component import Decoder
from lab.spec import Built, equal, floats, gradients, holds, near, normal, prop, seeds, tapped

if TYPE_CHECKING:
    from collections.abc import Callable

sizes = st.integers(1, 5)
betas = st.sampled_from([0.01, 0.1, 1.0])


def _targets(seed: int, rows: int, length: int, classes: int, *, ignored: float = 0.3) -> Tensor:
    """Targets [rows length], of which a share is ignored."""
    draw = torch.Generator().manual_seed(seed)
    targets = torch.randint(classes, (rows, length), generator=draw)
    return targets.masked_fill(torch.rand(rows, length, generator=draw) < ignored, IGNORED)


def _decoder(seed: int, *, width: int = 8) -> Decoder:
    torch.manual_seed(seed)
    model = Decoder(11, context=8, layers=1, width=width, heads=2)
    with torch.no_grad():
        for p in model.parameters():  # far from the start, where all logits are nearly equal
            p.add_(0.3 * torch.randn_like(p))
    return model.double()


def _refuses(call: Callable[[], object], what: str) -> None:
    """Raise `Mismatch` unless the call raises; what is not written yet refuses nothing."""
    try:
        call()
    except NotImplementedError:
        raise
    except Exception:  # noqa: BLE001 - which error it is, the component may choose
        return
    holds(condition=False, text=f"{what} raised nothing")


@prop(
    "A token's log-probability is not its log-softmax, or an ignored target counts: gather along the vocabulary.",
    seed=seeds,
    rows=sizes,
    length=st.integers(0, 5),
    classes=st.integers(1, 9),
    dtype=floats,
)
def token_log_probabilities_equal_log_softmax(
    built: Built, seed: int, rows: int, length: int, classes: int, dtype: torch.dtype
) -> None:
    logits = normal(seed, rows, length, classes, dtype=dtype, scale=3.0)
    targets = _targets(seed, rows, length, classes)
    got = built.token_log_probabilities(logits, targets)
    exact = torch.promote_types(dtype, torch.float32)
    table = F.log_softmax(logits.to(exact), dim=-1)
    expected = table.gather(-1, targets.clamp_min(0)[..., None])[..., 0].masked_fill(targets == IGNORED, 0.0)
    equal(got, expected, "the log-probability of each token")
    strided = logits.transpose(0, 1).contiguous().transpose(0, 1)
    equal(built.token_log_probabilities(strided, targets), expected, "the same of strided logits")


@prop(
    "Large logits gave an infinite or NaN log-probability: subtract the log-sum-exp, and take no log of a softmax.",
    size=st.sampled_from([1e2, 1e4, 6e4]),
    dtype=st.sampled_from([torch.float32, torch.float16]),
)
def huge_logits_stay_finite(built: Built, size: float, dtype: torch.dtype) -> None:
    logits = torch.tensor([[[size, 0.0, -size]]], dtype=dtype).expand(1, 3, 3).clone().requires_grad_()
    got = built.token_log_probabilities(logits, torch.tensor([[0, 1, IGNORED]]))
    seen = got.detach()
    near(float(seen[0, 0]), 0.0, 1e-6, "the log-probability of the largest logit")
    near(
        float(seen[0, 1]) / -float(logits[0, 0, 0].detach()),
        1.0,
        1e-5,
        "that of a logit that is smaller by its size, over it",
    )
    got.sum().backward()
    holds(logits.grad is not None and torch.isfinite(logits.grad).all(), "its gradient is not finite")


@prop(
    "An answer's log-probability must be the sum over its own tokens: no mean, and nothing from the prompt.",
    seed=seeds,
    rows=sizes,
    length=st.integers(1, 6),
)
def an_answer_is_the_sum_of_its_tokens(built: Built, seed: int, rows: int, length: int) -> None:
    logits, targets = normal(seed, rows, length, 7), _targets(seed, rows, length, 7)
    got = built.sequence_log_probability(logits, targets)
    rowwise = [
        -F.cross_entropy(z, y, ignore_index=IGNORED, reduction="sum") for z, y in zip(logits, targets, strict=True)
    ]
    equal(got, torch.stack(rowwise), "the log-probability of each answer")
    hidden = targets == IGNORED
    moved = logits + 5 * normal(seed + 1, rows, length, 7) * hidden[..., None]
    equal(built.sequence_log_probability(moved, targets), got, "the same with other logits where targets are ignored")
    gradients(lambda z: built.sequence_log_probability(z, targets), logits)


def _storages(module: torch.nn.Module) -> set[int]:
    """Where the parameters and buffers of a module lie in memory."""
    return {tensor.untyped_storage().data_ptr() for tensor in (*module.parameters(), *module.buffers())}


@prop("The reference shares memory with the model, or can be trained: copy it deeply, freeze it, and set eval mode.")
def the_reference_is_frozen(built: Built) -> None:
    model = _decoder(0).train()
    reference = built.frozen_copy(model)
    before = {name: tensor.clone() for name, tensor in reference.state_dict().items()}
    holds(reference is not model, "the reference is the model itself")
    holds(not any(p.requires_grad for p in reference.parameters()), "a parameter of the reference requires a gradient")
    holds(all(p.requires_grad for p in model.parameters()), "the model's own parameters no longer require a gradient")
    holds(not any(m.training for m in reference.modules()), "the reference is in training mode: dropout would draw")
    holds(all(m.training for m in model.modules()), "the model itself was put into evaluation mode")
    counted = torch.nn.BatchNorm1d(2)  # has buffers, which move without a gradient
    for each, other in ((model, reference), (counted, built.frozen_copy(counted))):
        shared = _storages(each) & _storages(other)
        holds(not shared, f"{len(shared)} tensors of the reference lie where the model's own do")
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    for name, tensor in reference.state_dict().items():
        equal(tensor, before[name], f"{name} of the reference after the model moved")


def _reward(built: Built, seed: int) -> Any:
    model = built.RewardModel(_decoder(seed), 8)
    return model.double()


@prop(
    "A reward depends on what follows the row's end, or misses a token: read the stream at position length - 1.",
    seed=seeds,
    length=st.integers(1, 6),
)
def a_reward_reads_the_whole_row_and_no_more(built: Built, seed: int, length: int) -> None:
    model = _reward(built, seed)
    draw = torch.Generator().manual_seed(seed)
    tokens = torch.randint(11, (3, 6), generator=draw)
    lengths = torch.full((3,), length)
    scores = model(tokens, lengths)
    holds(tuple(scores.shape) == (3,), f"rewards have shape {list(scores.shape)}, expected one a row: [3]")
    after = tokens.clone()
    after[:, length:] = (after[:, length:] + 1) % 11
    equal(model(after, lengths), scores, "the reward once the padding is another")
    equal(model(tokens[:, :length]), scores, "the reward of the rows cut to their length, without lengths")
    for place in range(length):
        other = tokens.clone()
        other[:, place] = (other[:, place] + 1) % 11
        moved = (model(other, lengths) - scores).abs().max()
        holds(moved > 1e-9, f"the reward does not change with token {place} of {length}")


@prop("Rows of different lengths in one batch must score as they do alone: index each row at its own last token.")
def each_row_ends_where_it_ends(built: Built) -> None:
    model = _reward(built, 1)
    tokens = torch.randint(11, (4, 6), generator=torch.Generator().manual_seed(3))
    lengths = torch.tensor([1, 6, 3, 2])
    alone = torch.cat([model(row[None, :n]) for row, n in zip(tokens, lengths.tolist(), strict=True)])
    equal(model(tokens, lengths), alone, "the rewards of four rows at once")
    seen = list(tapped(model, tokens, lengths))
    holds(seen[-1] == "reward", f"the last site tapped is {seen[-1]}; expected the reward")
    holds("decoder.norm.out" in seen, "the reward does not pass the decoder's last norm")
    holds("decoder.head.out" not in seen, "the decoder's head computes logits that nobody reads")
    own = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("decoder."))
    holds(own in (8, 9), f"the head has {own} parameters; one score of a stream of width 8 takes 8, and 1 for a bias")
    model(tokens, lengths).square().sum().backward()
    still = [name for name, p in model.named_parameters() if p.grad is None and name != "decoder.head.weight"]
    holds(not still, f"no gradient reaches {still[0] if still else 'it'}: the whole body must learn")
    _refuses(lambda: model(tokens, torch.tensor([0, 6, 3, 2])), "a length of 0")
    _refuses(lambda: model(tokens, torch.tensor([1, 7, 3, 2])), "a length of 7 in rows of 6")


@prop(
    "The preference loss is not -log sigmoid(chosen - rejected), or overflows where one answer is far better.",
    seed=seeds,
    size=st.sampled_from([1.0, 1e4]),
)
def preference_loss_equals_log_sigmoid(built: Built, seed: int, size: float) -> None:
    chosen, rejected = normal(seed, 5, scale=size), normal(seed + 1, 5, scale=size)
    loss = built.preference_loss(chosen, rejected)
    equal(loss, -F.logsigmoid(chosen - rejected).mean(), "the loss of five pairs")
    near(float(built.preference_loss(chosen, chosen)), math.log(2), 1e-12, "the loss of equal rewards")
    equal(built.preference_loss(chosen + 7, rejected + 7), loss, "the loss with 7 added to both", rtol=1e-6, atol=1e-6)
    if size == 1.0:
        gradients(built.preference_loss, chosen, rejected)


def _pairs(seed: int, scale: float = 1.0) -> list[Tensor]:
    """Log-probabilities [4] of: policy chosen, policy rejected, reference chosen, reference rejected."""
    return [-10 + normal(seed + i, 4, scale=scale) for i in range(4)]


@prop(
    "The margin must be beta times (policy - reference) of the chosen, less the same of the rejected.",
    seed=seeds,
    beta=betas,
)
def the_margin_is_a_difference_of_log_ratios(built: Built, seed: int, beta: float) -> None:
    pc, pr, rc, rr = _pairs(seed)
    margin = built.dpo_margin(pc, pr, rc, rr, beta=beta)
    equal(margin, beta * (pc - rc - pr + rr), "the margin of four pairs")
    same = built.dpo_margin(pc, pr, pc, pr, beta=beta)
    equal(same, torch.zeros(4, dtype=pc.dtype), "the margin of a policy that is its reference")
    # A prompt that is likelier by the same factor in both answers tells nothing.
    equal(built.dpo_margin(pc + 3, pr + 3, rc, rr, beta=beta), margin, "the margin with 3 nats added to both answers")
    more = built.dpo_margin(pc + 1, pr, rc, rr, beta=beta)
    equal(more - margin, torch.full((4,), beta, dtype=pc.dtype), "what a nat on the chosen adds to the margin")


@prop(
    "DPO's loss is not -log sigmoid(margin), or does not start at ln 2, or its gradient is not -beta sigmoid(-margin).",
    seed=seeds,
    beta=betas,
    smoothing=st.sampled_from([0.0, 0.1, 0.5]),
)
def dpo_loss_has_its_closed_form(built: Built, seed: int, beta: float, smoothing: float) -> None:
    pairs = _pairs(seed)
    pc, pr, rc, rr = pairs
    margin = beta * (pc - rc - pr + rr)
    expected = -((1 - smoothing) * F.logsigmoid(margin) + smoothing * F.logsigmoid(-margin)).mean()
    equal(built.dpo_loss(*pairs, beta=beta, smoothing=smoothing), expected, "the loss of four pairs")
    start = built.dpo_loss(pc, pr, pc, pr, beta=beta, smoothing=smoothing)
    near(float(start), math.log(2), 1e-12, "the loss of a policy that is its reference")
    leaf = pc.clone().requires_grad_()
    (grad,) = torch.autograd.grad(built.dpo_loss(leaf, pr, rc, rr, beta=beta), leaf)
    equal(grad, -beta * torch.sigmoid(-margin) / 4, "the gradient at the chosen")
    gradients(lambda *given: built.dpo_loss(*given, beta=beta, smoothing=smoothing), *pairs)


@prop("A pair that is far apart gave an infinite loss: use softplus or logsigmoid, and no log of a sigmoid.")
def dpo_loss_stays_finite(built: Built) -> None:
    zero = torch.zeros(1)
    for size in (-1e4, 1e4):
        leaf = torch.full((1,), size, requires_grad=True)
        loss = built.dpo_loss(leaf, zero, zero, zero, beta=1.0)
        near(float(loss.detach()), max(0.0, -size), 1e-3, f"the loss at {size:g}")
        (grad,) = torch.autograd.grad(loss, leaf)
        near(float(grad), -1.0 if size < 0 else 0.0, 1e-6, f"its gradient at {size:g}")


@prop(
    "The KL estimate is below 0 somewhere, or its mean under the policy is not KL(policy, reference): e^r - 1 - r.",
    seed=seeds,
    classes=st.integers(1, 12),
    scale=st.sampled_from([1e-4, 1.0, 3.0]),
)
def the_kl_estimate_is_unbiased(built: Built, seed: int, classes: int, scale: float) -> None:
    policy = F.log_softmax(normal(seed, classes), dim=-1)
    reference = F.log_softmax(normal(seed, classes) + normal(seed + 1, classes, scale=scale), dim=-1)
    # Every token that can be drawn, so that the mean is a sum and needs no samples.
    estimates = built.kl_estimate(policy[None], reference[None])[0]
    holds((estimates >= 0).all(), f"an estimate is {float(estimates.min()):.3g}, below 0")
    exact = F.kl_div(reference, policy, log_target=True, reduction="sum")
    mean = (policy.exp() * estimates).sum()
    equal(mean, exact, "the mean over the policy", rtol=1e-6, atol=1e-15)
    equal(built.kl_estimate(policy, policy), torch.zeros_like(policy), "the estimate where both are equal")
    near(float(built.kl_estimate(torch.tensor(-1.0), torch.tensor(-0.999))) / 5e-7, 1.0, 1e-2, "r = .001 over r^2 / 2")


@prop(
    "Advantages of a group have mean 0 and deviation 1, whatever the rewards' level and unit; equal rewards give 0.",
    seed=seeds,
    count=st.integers(2, 8),
    level=st.sampled_from([0.0, -50.0, 1e3]),
    unit=st.sampled_from([1.0, 100.0]),
)
def advantages_are_standardised(built: Built, seed: int, count: int, level: float, unit: float) -> None:
    rewards = normal(seed, 3, count)
    expected = (rewards - rewards.mean(-1, keepdim=True)) / rewards.std(-1, keepdim=True, correction=0)
    got = built.group_advantages(rewards)
    equal(got, expected, "the advantages", rtol=1e-3, atol=1e-3)
    equal(got.mean(-1), torch.zeros(3, dtype=got.dtype), "their mean in each group", rtol=0.0, atol=1e-9)
    equal(built.group_advantages(rewards * unit + level), got, "the same in another unit", rtol=1e-3, atol=1e-3)
    equal_ones = built.group_advantages(torch.full((2, count), 0.7))
    equal(equal_ones, torch.zeros(2, count), "the advantages where all rewards are equal", rtol=0.0, atol=1e-6)
    alone = built.group_advantages(torch.tensor([[3.0], [-2.0]]))
    equal(alone, torch.zeros(2, 1), "the advantage of a group of one")


def _policy(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Old log-probabilities [3 4], advantages [3] of both signs, and which tokens are present [3 4]."""
    present = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]], dtype=torch.bool)
    return -normal(seed, 3, 4).abs(), torch.tensor([1.5, -0.5, 0.7], dtype=torch.float64), present


@prop(
    "Before the policy moves, the loss is minus the tokens' mean advantage, and its gradient is the policy gradient.",
    seed=seeds,
)
def the_first_step_is_the_policy_gradient(built: Built, seed: int) -> None:
    old, advantages, present = _policy(seed)
    leaf = old.clone().requires_grad_()
    loss = built.policy_loss(leaf, old, advantages, present)
    weights = advantages[:, None] * present / present.sum()
    equal(loss.detach(), -weights.sum(), "the loss while new = old")
    (grad,) = torch.autograd.grad(loss, leaf)
    equal(grad, -weights, "its gradient, -A a token over the number of tokens,")
    by_token = built.policy_loss(old, old, advantages[:, None].expand(3, 4).clone(), present)
    equal(by_token, loss.detach(), "the loss with an advantage a token")


@prop(
    "The clip acts on the wrong side: beyond it a token gains nothing more, and yet it may always come back.",
    moved=st.sampled_from([-1.0, -0.1, 0.0, 0.1, 1.0]),
    advantage=st.sampled_from([-2.0, 0.5]),
    clip=st.sampled_from([0.1, 0.3]),
)
def the_ratio_is_clipped_where_it_would_gain(built: Built, moved: float, advantage: float, clip: float) -> None:
    old = torch.tensor([[-2.0]], dtype=torch.float64)
    leaf = (old + moved).requires_grad_()
    advantages, present = torch.tensor([advantage], dtype=torch.float64), torch.ones(1, 1, dtype=torch.bool)
    loss = built.policy_loss(leaf, old, advantages, present, clip=clip)
    ratio = math.exp(moved)
    clipped = min(max(ratio, 1 - clip), 1 + clip)
    near(
        float(loss.detach()), -min(ratio * advantage, clipped * advantage), 1e-12, f"the loss at a ratio of {ratio:.3g}"
    )
    (grad,) = torch.autograd.grad(loss, leaf)
    gains = (ratio > 1 + clip and advantage > 0) or (ratio < 1 - clip and advantage < 0)
    near(float(grad), 0.0 if gains else -ratio * advantage, 1e-12, f"its gradient at a ratio of {ratio:.3g}")
    for gain in (0.0, 0.5):
        far = torch.zeros(1, 1, requires_grad=True)
        loss = built.policy_loss(far, torch.full((1, 1), -1e3), torch.tensor([gain]), present, clip=clip)
        near(float(loss.detach()), -(1 + clip) * gain, 1e-6, f"the loss 1000 nats away with an advantage of {gain:g}")
        (grad,) = torch.autograd.grad(loss, far)
        near(float(grad), 0.0, 0.0, f"its gradient 1000 nats away with an advantage of {gain:g}")


@prop("Padding counts in the policy loss: mask it before the exponential, and divide by the number of present tokens.")
def absent_tokens_have_no_influence(built: Built) -> None:
    old, advantages, present = _policy(0)
    new = old + 0.05
    loss = built.policy_loss(new, old, advantages, present)
    for value in (-50.0, 3.0, 1e4):
        other = new.masked_fill(~present, value).requires_grad_()
        again = built.policy_loss(other, old, advantages, present)
        equal(again.detach(), loss, f"the loss with {value:g} where no token is")
        (grad,) = torch.autograd.grad(again, other)
        holds(torch.isfinite(grad).all(), f"the gradient is not finite with {value:g} where no token is")
        holds((grad[~present] == 0).all(), "an absent token has a gradient")
    unknown = advantages[:, None].expand(3, 4).masked_fill(~present, math.nan)
    leaf = new.clone().requires_grad_()
    again = built.policy_loss(leaf, old, unknown, present)
    equal(again.detach(), loss, "the loss with advantages of NaN where no token is")
    (grad,) = torch.autograd.grad(again, leaf)
    holds(torch.isfinite(grad).all(), "the gradient is not finite with advantages of NaN where no token is")
    none = built.policy_loss(new, old, advantages, torch.zeros_like(present))
    near(float(none), 0.0, 0.0, "the loss where no token is present")


def _preferred(seed: int, count: int, off: tuple[int, int] = (1, 9)) -> tuple[Tensor, Tensor]:
    """Rows [2 count 6] in pairs, and their targets: counting up is preferred to a last token that is off by `off`."""
    draw = torch.Generator().manual_seed(seed)
    start = torch.randint(5, (count, 1), generator=draw)
    right = (start + torch.arange(7)) % 11
    wrong = right.clone()
    wrong[:, -1] = (wrong[:, -1] + torch.randint(*off, (count,), generator=draw)) % 11
    rows = torch.stack([right, wrong], dim=1).flatten(0, 1)  # [2 count 7]
    return rows[:, :-1], rows[:, 1:]


@prop("A short run of DPO did not move held-out pairs apart, or moved the reference: check signs and what is copied.")
def dpo_tells_held_out_pairs_apart(built: Built) -> None:
    model = _decoder(2).float()
    reference = built.frozen_copy(model)
    kept = copy.deepcopy(reference.state_dict())
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)

    def pairs(rows: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        policy = built.sequence_log_probability(model(rows), targets)
        with torch.no_grad():
            before = built.sequence_log_probability(reference(rows), targets)
        return policy[0::2], policy[1::2], before[0::2], before[1::2]

    held_out = _preferred(99, 16, off=(9, 11))  # mistakes that are in no pair of the training
    start = built.dpo_margin(*pairs(*held_out), beta=0.1).mean()
    near(float(start.detach()), 0.0, 1e-6, "the margin before the first step")
    for step in range(20):
        optimizer.zero_grad()
        built.dpo_loss(*pairs(*_preferred(step, 16)), beta=0.1).backward()
        optimizer.step()
    margin = built.dpo_margin(*pairs(*held_out), beta=0.1).mean()
    holds(
        margin > 0.05,
        f"the margin on held-out pairs is {float(margin.detach()):.3g} after 20 steps, expected above 0.05",
    )
    for name, tensor in reference.state_dict().items():
        holds(torch.equal(tensor, kept[name]), f"{name} of the reference has moved")
    holds(all(p.grad is None for p in reference.parameters()), "the reference has a gradient")
