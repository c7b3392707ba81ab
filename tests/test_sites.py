"""Sites and taps: names, patterns, who sees what, and that nothing is left behind."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lab.errors import BadInput
from lab.names import pattern_of, within
from lab.projects.attention.component import Attention
from lab.projects.decoder.component import Decoder
from lab.sites import Component, Mode, Site, Sites, sites_of

quick = settings(max_examples=50, deadline=None, derandomize=True, database=None)

BATCH, LENGTH, WIDTH, HEADS = 3, 5, 8, 2
# The order in which one forward pass of a model of one block makes them.
FORWARD = [
    *("tokens.out", "positions.out", "blocks.0.attn_norm.out", "blocks.0.attn.qkv.out"),
    *(f"blocks.0.attn.{name}" for name in ("q", "k", "v", "mask", "scores", "pattern", "proj.out", "out")),
    *("blocks.0.mlp_norm.out", "blocks.0.mlp.up.out", "blocks.0.mlp.hidden", "blocks.0.mlp.down.out"),
    *("blocks.0.mlp.out", "blocks.0.out", "norm.out", "head.out"),
]


def decoder(layers: int = 1) -> Decoder:
    torch.manual_seed(0)
    return Decoder(11, context=6, layers=layers, width=WIDTH, heads=HEADS)


def tokens() -> Tensor:
    return torch.randint(11, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model() -> Decoder:
    return decoder()


@pytest.fixture
def sites(model: Decoder) -> Sites:
    return sites_of(model)


# ---------------------------------------------------------------- names and patterns


def test_every_site_has_the_path_of_its_module_and_those_inside_attention_that_of_its_layer(sites: Sites) -> None:
    assert sorted(sites.names) == sorted(FORWARD)


def test_a_component_that_is_the_model_itself_has_sites_without_a_path() -> None:
    assert sites_of(Attention()).names == ["mask", "scores", "pattern"]


def test_modules_that_are_no_components_have_no_sites() -> None:
    assert sites_of(nn.TransformerEncoderLayer(8, 2)).names == []


def test_each_declared_shape_has_a_letter_for_each_dimension_and_a_letter_one_size(
    model: Decoder, sites: Sites
) -> None:
    sizes = {"B": BATCH, "T": LENGTH, "S": LENGTH, "H": HEADS, "D": WIDTH // HEADS, "F": 4 * WIDTH}
    for site in sites.match("blocks.*.attn.*"):
        sites.replace(site.name, lambda value: value)  # so that scores and pattern are those of the whole batch
    with sites.capture("**") as values:
        model(tokens())
    for site in sites.match("**"):
        shape = values[site.name].shape
        assert len(site.axes) == len(shape), site
        for letter, size in zip(site.axes, shape, strict=True):
            assert sizes.get(letter, size) == size, site


@pytest.mark.parametrize(
    ("pattern", "name", "matches"),
    [
        ("blocks.*.out", "blocks.0.out", True),
        ("blocks.*.out", "blocks.12.out", True),
        ("blocks.*.out", "blocks.0.attn.out", False),  # one part
        ("blocks.1*.out", "blocks.12.out", True),
        ("blocks.1*.out", "blocks.2.out", False),
        ("*", "out", True),
        ("*", "head.out", False),
        ("**", "blocks.0.attn.out", True),
        ("**.out", "blocks.0.attn.out", True),
        ("**.out", "out", True),
        ("**.out", "blocks.0.layout", False),
        ("blocks.**", "blocks.0.attn.out", True),
        ("blocks.**", "blocks", True),
        ("blocks.**", "blocksmith.out", False),
        ("blocks.**.out", "blocks.out", True),
        ("blocks.**.out", "blocks.0.mlp.up.out", True),
        ("blocks.0", "blocks.0.out", False),
        ("blocks.0.out", "blocks.0.out", True),
        ("blocks.0.out", "blocksx0.out", False),  # a dot is a dot
        ("blocks[0].out", "blocks0.out", False),
    ],
)
def test_one_star_is_one_part_of_a_name_and_two_are_any_number(pattern: str, name: str, matches: bool) -> None:
    assert bool(pattern_of(pattern).fullmatch(name)) == matches


parts = st.lists(st.text("ab0_", min_size=1, max_size=3), min_size=1, max_size=5)


@quick
@given(parts, st.data())
def test_a_name_matches_itself_with_any_part_starred_and_with_any_run_of_parts_starred_twice(
    names: list[str], data: st.DataObject
) -> None:
    name = ".".join(names)
    start = data.draw(st.integers(0, len(names) - 1))
    stop = data.draw(st.integers(start, len(names)))
    assert pattern_of(name).fullmatch(name)
    assert pattern_of(".".join([*names[:start], "*", *names[start + 1 :]])).fullmatch(name)
    assert pattern_of(".".join([*names[:start], "**", *names[stop:]])).fullmatch(name)
    assert not pattern_of(".".join([*names, "*"])).fullmatch(name)


@pytest.mark.parametrize(
    ("name", "pattern", "inside"),
    [
        ("blocks.0.mlp.up.weight", "blocks.0.mlp", True),
        ("blocks.0.mlp.up.weight", "blocks.0.mlp.up.weight", True),
        ("blocks.0.mlp.up.weight", "blocks.*.mlp", True),
        ("blocks.0.mlp.up.weight", "**.up", True),
        ("blocks.0.mlp_norm.weight", "blocks.0.mlp", False),
        ("blocks.10.out", "blocks.1", False),
        ("blocks.0.out", "", False),
    ],
)
def test_a_name_is_within_what_it_is_and_within_what_holds_it(name: str, pattern: str, inside: bool) -> None:
    assert within(name, pattern) == inside


@pytest.mark.parametrize(
    ("pattern", "count"), [("**", 20), ("blocks.*.attn.*", 7), ("**.attn.**", 9), ("*.out", 4), ("nothing", 0)]
)
def test_match_finds_sites_by_pattern(sites: Sites, pattern: str, count: int) -> None:
    assert len(sites.match(pattern)) == count


def test_replacing_nothing_is_refused_with_the_nearest_site(sites: Sites) -> None:
    with pytest.raises(BadInput, match=r"no site matches 'blocks.0.attn.score'; did you mean 'blocks.0.attn.scores'\?"):
        sites.replace("blocks.0.attn.score", torch.zeros_like)


def test_reading_nothing_finds_no_site(sites: Sites) -> None:
    assert sites.read("blocks.0.attn.score", lambda *_: None) == []


# ---------------------------------------------------------------- readers and writers

NAME = "blocks.0.mlp.hidden"
WEIGHT = "blocks.0.mlp.up.weight"  # upstream of it


def see_nothing(_site: Site, _value: Tensor) -> None:
    pass


@pytest.mark.parametrize("reader_first", [True, False])
@pytest.mark.parametrize("name", [NAME, "blocks.0.attn.pattern", "head.out"])
def test_readers_see_what_writers_left_whatever_was_attached_first(
    model: Decoder, sites: Sites, name: str, reader_first: bool
) -> None:
    seen: list[Tensor] = []
    made: list[Tensor] = []

    def change(value: Tensor) -> Tensor:
        made.append(2 * value)
        return made[-1]

    if reader_first:
        sites.read(name, lambda _, value: seen.append(value))
    sites.replace(name, change)
    if not reader_first:
        sites.read(name, lambda _, value: seen.append(value))
    model(tokens())
    assert len(seen) == len(made) == 1
    assert seen[0] is made[0]


@pytest.mark.parametrize("reader_first", [True, False])
def test_readers_of_gradients_see_what_writers_left_whatever_was_attached_first(
    model: Decoder, sites: Sites, reader_first: bool
) -> None:
    bare = decoder()
    seen: dict[str, list[Tensor]] = {"bare": [], "tapped": []}
    sites_of(bare).read(NAME, lambda _, grad: seen["bare"].append(grad), grad=True)
    if reader_first:
        sites.read(NAME, lambda _, grad: seen["tapped"].append(grad), grad=True)
    sites.replace(NAME, lambda grad: 4 * grad, grad=True)
    if not reader_first:
        sites.read(NAME, lambda _, grad: seen["tapped"].append(grad), grad=True)
    gradients = []
    for one in (bare, model):
        one(tokens()).square().sum().backward()
        gradients.append(one.get_parameter(WEIGHT).grad)
    # 4 is a power of two: nothing is rounded.
    assert torch.equal(seen["tapped"][0], 4 * seen["bare"][0])
    assert gradients[0] is not None
    assert gradients[1] is not None
    assert torch.equal(gradients[1], 4 * gradients[0])


def test_reading_a_value_or_a_gradient_changes_no_bit(model: Decoder, sites: Sites) -> None:
    bare = decoder()
    sites.read("**", see_nothing)
    sites.read("**", see_nothing, grad=True)
    for one in (bare, model):
        one(tokens()).square().sum().backward()
    for (name, p), q in zip(bare.named_parameters(), model.parameters(), strict=True):
        assert p.grad is not None
        assert q.grad is not None
        assert torch.equal(p.grad, q.grad), name


def test_writers_apply_in_the_order_in_which_they_were_attached_each_while_it_is_active(
    model: Decoder, sites: Sites
) -> None:
    active = {"double": True, "one": True}
    sites.replace("head.out", lambda value: 2 * value, lambda: active["double"])
    sites.replace("head.out", torch.ones_like, lambda: active["one"])
    sites.replace("head.out", lambda value: value + 1)
    bare = decoder()(tokens())
    assert torch.equal(model(tokens()), torch.full_like(bare, 2))
    active["one"] = False
    assert torch.equal(model(tokens()), 2 * bare + 1)
    active["double"] = False
    assert torch.equal(model(tokens()), bare + 1)


def test_a_reader_that_is_not_due_is_not_called(model: Decoder, sites: Sites) -> None:
    due, seen = False, []
    for grad in (False, True):
        sites.read(NAME, lambda site, _: seen.append(site.name), lambda: due, grad=grad)
    model(tokens()).sum().backward()
    assert seen == []
    due = True
    model(tokens()).sum().backward()
    assert seen == [NAME, NAME]


def test_a_reader_is_told_which_site_it_sees(model: Decoder, sites: Sites) -> None:
    seen: list[Site] = []
    found = sites.read("blocks.*.mlp.*", lambda site, _: seen.append(site))
    model(tokens())
    assert seen == [Site(NAME, "blocks.0.mlp", "B T F"), Site("blocks.0.mlp.out", "blocks.0.mlp", "B T C")] == found


# ---------------------------------------------------------------- modes


@pytest.mark.parametrize("mode", ["train", "evaluate", "generate", "examine"])
def test_readers_see_training_unless_they_ask_for_another_mode(model: Decoder, sites: Sites, mode: Mode) -> None:
    seen: list[str] = []
    sites.read(NAME, lambda *_: seen.append("unless asked"))
    sites.read(NAME, lambda *_: seen.append("asked"), modes=(mode,))
    sites.read(NAME, lambda *_: seen.append("gradient"), modes=(mode,), grad=True)
    with sites.running(mode):
        model(tokens()).sum().backward()
    assert seen == (["unless asked"] if mode == "train" else []) + ["asked", "gradient"]


def test_writers_replace_in_every_mode(model: Decoder, sites: Sites) -> None:
    sites.replace("head.out", torch.zeros_like)
    modes: tuple[Mode, ...] = ("train", "evaluate", "generate", "examine")
    for mode in modes:
        with sites.running(mode):
            assert not model(tokens()).any()


def test_the_mode_before_comes_back_also_after_an_error(sites: Sites) -> None:
    modes: list[Mode] = [sites.mode]
    with sites.running("evaluate"):
        with pytest.raises(ZeroDivisionError), sites.running("examine"):
            raise ZeroDivisionError
        modes.append(sites.mode)
    modes.append(sites.mode)
    assert modes == ["train", "evaluate", "train"]


# ---------------------------------------------------------------- capture and order


def test_capture_collects_in_the_order_of_the_forward_pass(model: Decoder, sites: Sites) -> None:
    with sites.capture("**") as values:
        logits = model(tokens())
    assert list(values) == FORWARD
    assert values["head.out"] is logits


@pytest.mark.parametrize("mode", ["train", "examine"])
def test_capture_works_in_the_mode_that_it_was_opened_in(model: Decoder, sites: Sites, mode: Mode) -> None:
    with sites.running(mode), sites.capture(NAME) as values:
        model(tokens())
    assert list(values) == [NAME]


def test_after_a_capture_nobody_listens_also_after_an_error(model: Decoder, sites: Sites) -> None:
    with pytest.raises(ZeroDivisionError), sites.capture("**") as values:
        raise ZeroDivisionError
    model(tokens())
    assert values == {}
    assert not any(tap.readers or tap.wanted for tap in sites.taps.values())


def test_captures_can_be_nested(model: Decoder, sites: Sites) -> None:
    with sites.capture("**.hidden") as outer:
        with sites.capture("**") as inner:
            model(tokens())
        model(tokens().flip(0))
    assert list(outer) == [NAME]
    assert not torch.equal(outer[NAME], inner[NAME])


def test_the_order_is_that_of_the_forward_pass_whatever_the_order_of_attaching(model: Decoder, sites: Sites) -> None:
    for name in reversed(sites.names):
        sites.read(name, see_nothing)
    model(tokens())
    assert list(sites.order) == FORWARD
    assert list(sites.order.values()) == list(range(len(FORWARD)))
    before = dict(sites.order)
    model(tokens())
    assert sites.order == before


# ---------------------------------------------------------------- nothing is left behind


def contents(model: nn.Module) -> dict[str, dict[str, Any]]:
    return {name: dict(module.__dict__) for name, module in model.named_modules()}


def attach_everything(sites: Sites) -> None:
    sites.read("**", see_nothing)
    sites.read("**", see_nothing, grad=True)
    sites.replace("**.hidden", torch.zeros_like)
    sites.replace("**.out", torch.zeros_like, grad=True)


def test_an_idle_model_has_no_listeners(model: Decoder) -> None:
    before = contents(model)
    sites = sites_of(model)
    model(tokens())
    assert contents(model) == before
    assert sites.order == {}
    assert not any("_taps" in module.__dict__ for module in model.modules())
    assert Component._taps == {}


def test_attaching_to_one_site_touches_one_module(model: Decoder, sites: Sites) -> None:
    before = contents(model)
    sites.read(NAME, see_nothing)
    after = contents(model)
    assert [name for name in before if before[name] != after[name]] == ["blocks.0.mlp"]


def test_detaching_leaves_no_trace(model: Decoder, sites: Sites) -> None:
    before, logits = contents(model), model(tokens())
    attach_everything(sites)
    assert contents(model) != before
    assert not torch.equal(model(tokens()), logits)
    sites.detach()
    assert contents(model) == before
    assert torch.equal(model(tokens()), logits)
    sites.detach()  # once more does no harm
    assert contents(model) == before


def test_what_was_detached_can_be_attached_to_again(model: Decoder, sites: Sites) -> None:
    attach_everything(sites)
    sites.detach()
    with sites.capture(NAME) as values:
        model(tokens())
    assert values[NAME].any()  # the writer of zeros is gone


def test_copies_and_pickles_of_a_tapped_model_are_those_of_an_untapped_one(model: Decoder, sites: Sites) -> None:
    bare = model(tokens())
    untapped = pickle.dumps(model)
    attach_everything(sites)
    assert pickle.dumps(model) == untapped
    for made in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert not any("_taps" in module.__dict__ for module in made.modules())
        assert torch.equal(made(tokens()), bare)
    assert not torch.equal(model(tokens()), bare)  # the model itself is tapped as before


def test_the_state_of_a_tapped_model_is_that_of_an_untapped_one(model: Decoder, sites: Sites) -> None:
    attach_everything(sites)
    bare = decoder()
    assert list(model.state_dict()) == list(bare.state_dict())
    assert bare.load_state_dict(model.state_dict()).missing_keys == []
    assert [name for name, _ in model.named_modules()] == [name for name, _ in bare.named_modules()]
