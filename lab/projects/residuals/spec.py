"""What any residual block must do."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from lab.errors import BadInput
from lab.sites import sites_of
from lab.spec import Built, equal, gradients, holds, near, normal, prop, seeds

WIDTH, HEADS = 8, 2
mixers = st.sampled_from(["attention", "convolution", "gru"])
norms = st.sampled_from(["layer", "rms"])


def _block(built: Built, seed: int, layers: int = 1, **choices: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = built.Block(WIDTH, HEADS, layers, built.Choices(**choices)).double()
    norms = [norm for norm in (made.attn_norm, made.mlp_norm) if norm is not None]
    with torch.no_grad():  # gains of 1 would hide which norm is which
        for i, norm in enumerate(norms):
            norm.weight.copy_(1 + normal(seed + i + 1, WIDTH, scale=0.3))
    return made


@prop(
    "The stream itself must pass: with silent branches a block changes nothing, forward or backward.",
    seed=seeds,
    mixer=mixers,
    length=st.integers(1, 5),
)
def with_silent_branches_nothing_changes(built: Built, seed: int, mixer: str, length: int) -> None:
    made, x = _block(built, seed, mixer=mixer), normal(seed, 2, length, WIDTH).requires_grad_()
    for last in (made.attn.proj, made.mlp.down):
        nn.init.zeros_(last.weight)
    out = made(x)
    equal(out, x, "the output")
    sent = normal(seed + 1, 2, length, WIDTH)
    out.backward(sent)
    equal(x.grad, sent, "the gradient of the stream")


@prop(
    "A block is x + attn(norm(x)), and then the same with the feed-forward: a norm or a sum stands elsewhere.",
    seed=seeds,
    norm=norms,
    mixer=mixers,
)
def normalises_before_each_branch(built: Built, seed: int, norm: str, mixer: str) -> None:
    made, x = _block(built, seed, norm=norm, mixer=mixer), normal(seed, 2, 4, WIDTH, scale=3.0)
    middle = x + made.attn(made.attn_norm(x))
    equal(made(x), middle + made.mlp(made.mlp_norm(middle)))


@prop(
    "With norm_at = post each norm acts on the sum, as in the first Transformer: norm(x + branch(x)).",
    seed=seeds,
    norm=norms,
)
def normalises_after_each_sum_when_asked(built: Built, seed: int, norm: str) -> None:
    made, x = _block(built, seed, norm=norm, norm_at="post"), normal(seed, 2, 4, WIDTH, scale=3.0)
    middle = made.attn_norm(x + made.attn(x))
    equal(made(x), made.mlp_norm(middle + made.mlp(middle)))


@prop(
    "Pre-norm blocks must equal torch's TransformerEncoderLayer with norm_first and the same weights.",
    seed=seeds,
    length=st.integers(1, 6),
)
def equals_torchs_layer(built: Built, seed: int, length: int) -> None:
    made, x = _block(built, seed), normal(seed, 2, length, WIDTH)
    with torch.random.fork_rng(devices=[]):
        theirs = nn.TransformerEncoderLayer(
            WIDTH, HEADS, 4 * WIDTH, 0.0, "gelu", batch_first=True, norm_first=True, dtype=torch.float64
        )
    pairs = (
        (theirs.norm1.weight, made.attn_norm.weight),
        (theirs.norm2.weight, made.mlp_norm.weight),
        (theirs.self_attn.in_proj_weight, made.attn.qkv.weight),
        (theirs.self_attn.in_proj_bias, made.attn.qkv.bias),
        (theirs.self_attn.out_proj.weight, made.attn.proj.weight),
        (theirs.self_attn.out_proj.bias, made.attn.proj.bias),
        (theirs.linear1.weight, made.mlp.up.weight),
        (theirs.linear1.bias, made.mlp.up.bias),
        (theirs.linear2.weight, made.mlp.down.weight),
        (theirs.linear2.bias, made.mlp.down.bias),
    )
    with torch.no_grad():
        for target, source in pairs:
            target.copy_(source)
    hidden = torch.ones(length, length, dtype=torch.bool).triu(1)  # [T T]
    equal(made(x), theirs(x, src_mask=hidden))


@prop(
    "Each branch must end in a gain of 1/sqrt(2 layers): without it the stream's variance grows with depth.",
    layers=st.sampled_from([1, 2, 8, 32]),
    mixer=mixers,
    examples=8,
)
def branches_end_in_a_gain_of_1_over_the_root_of_2_layers(built: Built, layers: int, mixer: str) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(layers)
        made = built.Block(64, 4, layers, built.Choices(mixer=mixer))
    for name, weight in (("attn.proj", made.attn.proj.weight), ("mlp.down", made.mlp.down.weight)):
        unit = float(weight.detach().double().std()) * (2 * layers * weight.shape[1]) ** 0.5
        # Five standard errors of a standard deviation of so many normal numbers.
        near(unit, 1.0, 5 / (2 * weight.numel()) ** 0.5, f"the standard deviation of {name}'s weights, in its units,")


@prop(
    "An output moved when a later input did: a part that sees all positions stands in the block.",
    seed=seeds,
    mixer=mixers,
    norm_at=st.sampled_from(["pre", "post"]),
)
def no_output_depends_on_a_later_input(built: Built, seed: int, mixer: str, norm_at: str) -> None:
    made, x = _block(built, seed, mixer=mixer, norm_at=norm_at), normal(seed, 1, 6, WIDTH)
    before = made(x)
    for place in range(1, 6):
        moved = x.clone()
        moved[:, place] += normal(seed + 1, WIDTH)
        equal(made(moved)[:, :place], before[:, :place], f"the output before position {place}")


@prop("With mixer = none a position sees only itself, and no branch for mixing is left.", seed=seeds)
def without_a_mixer_positions_do_not_meet(built: Built, seed: int) -> None:
    made, x = _block(built, seed, mixer="none"), normal(seed, 1, 5, WIDTH)
    holds(made.attn is None, "there is a branch that mixes positions")
    moved = x.clone()
    moved[:, 2] += 1.0
    same = (made(moved) == made(x)).all(-1)[0]  # [T]
    equal(same, torch.tensor([True, True, False, True, True]), "which outputs stay when input 2 moves")


@prop(
    "Dropout must act on what a branch gives out, in training: each element is 0 or 1/(1-p) of it. Not in evaluation.",
    seed=seeds,
    share=st.sampled_from([0.1, 0.5]),
)
def dropout_leaves_a_share_of_each_branch_out_in_training_only(built: Built, seed: int, share: float) -> None:
    made, x = _block(built, seed, mixer="none", dropout=share), normal(seed, 8, 16, WIDTH)
    whole = _block(built, seed, mixer="none")(x)
    equal(made.eval()(x), whole, "the output in evaluation")
    branch, got = whole - x, made.train()(x) - x
    kept = got.abs() > branch.abs() / 2
    near_or_none = torch.where(kept, branch / (1 - share), torch.zeros_like(branch))
    equal(got, near_or_none, "what is added in training")
    # Five standard errors of a share of so many elements.
    near(1 - float(kept.double().mean()), share, 5 * (share * (1 - share) / kept.numel()) ** 0.5, "the share left out")


@prop(
    "The gated feed-forward must have 2/3 of the hidden width, so that it costs what the plain one does.",
    width=st.sampled_from([12, 24, 48]),
    examples=3,
)
def the_gated_branch_costs_as_much(built: Built, width: int) -> None:
    plain, gated = (built.Block(width, 2, 1, built.Choices(activation=name)).mlp for name in ("gelu", "swiglu"))
    counts = [sum(p.numel() for p in part.parameters() if p.dim() == 2) for part in (plain, gated)]
    holds(counts[0] == counts[1], f"{counts[1]} weights, expected {counts[0]}")


@prop(
    "Backward disagrees with the values: the stream or a branch is detached, or changed in place.",
    seed=seeds,
    examples=3,
)
def gradients_are_those_of_finite_differences(built: Built, seed: int) -> None:
    gradients(_block(built, seed), normal(seed, 1, 3, WIDTH))


@prop("An unknown choice must be refused with what was found: a model of other parts than asked for trains unseen.")
def refuses_an_unknown_choice(built: Built) -> None:
    for name in ("mixer", "positions", "norm", "norm_at"):
        try:
            built.Choices(**{name: "other"})
        except BadInput as error:
            holds("other" in str(error) and name in str(error), f"the message names not model.{name} and 'other'")
        else:
            holds(False, f"{name} = 'other' is taken")
    for share in (-0.1, 1.0):
        try:
            built.Choices(dropout=share)
        except BadInput as error:
            holds("dropout" in str(error), "the message names not model.dropout")
        else:
            holds(False, f"dropout = {share} is taken")


@prop("The stream after a block must be tapped as out, after those of its branches: probes read it there.", seed=seeds)
def taps_its_sites_in_order(built: Built, seed: int) -> None:
    made, x = _block(built, seed), normal(seed, 1, 3, WIDTH)
    with sites_of(made).capture("**") as values:
        out: Tensor = made(x)
    names = [name for name in values if name in ("attn_norm.out", "attn.out", "mlp_norm.out", "mlp.out", "out")]
    holds(names == ["attn_norm.out", "attn.out", "mlp_norm.out", "mlp.out", "out"], f"tapped in order: {names}")
    equal(values["out"], out, "what is tapped as out")
