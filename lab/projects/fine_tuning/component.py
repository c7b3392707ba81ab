"""Project 17: fine-tuning: LoRA, freezing, targets without the prompt, a large batch in parts.

Hu et al., 2021 (LoRA); Ouyang et al., 2022 (supervised fine-tuning); Howard and Ruder, 2018 (freezing).
"""

from __future__ import annotations

from collections import Counter
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from lab.context import IGNORED
from lab.errors import BadInput, nearest
from lab.names import pattern_of
from lab.projects.linear.component import Linear
from lab.sites import Component

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


class LoRALinear(Component):
    """A frozen linear layer and a trained update of low rank beside it: ``W x + b + (alpha / rank) B A x``.

    A [rank in] is normal with standard deviation ``1 / sqrt(in)``, so that A x has the mean square of x; B [out rank]
    is 0, so that nothing changes at the start. Both are float32, or float64 where W is: steps of an optimiser are lost
    in the rounding of float16 and bfloat16. What they add is rounded to the dtype of the layer's own output.

    The site ``out`` has the name that it had in the layer; that of the layer is now ``base.out``, without the update.

    Args:
        base: The layer, of the lab or of torch. Its parameters are frozen.
        rank: The largest rank that the update can have.
        alpha: The update is scaled by ``alpha / rank``; `rank` if None.

    Raises:
        BadInput: `base` is no linear layer, or `rank` is not from 1 to the smaller of its widths.
    """

    SITES = MappingProxyType({"update": "B T C", "out": "B T C"})

    def __init__(self, base: nn.Module, rank: int, *, alpha: float | None = None) -> None:
        super().__init__()
        if not isinstance(base, nn.Linear | Linear) or isinstance(base, NonDynamicallyQuantizableLinear):
            raise BadInput(f"LoRA needs a linear layer that is called, not a {type(base).__name__}")
        outputs, inputs = base.weight.shape
        if not 1 <= rank <= min(outputs, inputs):
            raise BadInput(f"a LoRA rank of {rank} on a layer from {inputs} to {outputs}: 1 to {min(outputs, inputs)}")
        self.base = base.requires_grad_(requires_grad=False)
        self.scale = 1.0 if alpha is None else alpha / rank
        wide = torch.promote_types(base.weight.dtype, torch.float32)
        self.a = nn.Parameter(base.weight.new_empty(rank, inputs, dtype=wide))
        self.b = nn.Parameter(base.weight.new_zeros(outputs, rank, dtype=wide))
        nn.init.normal_(self.a, std=inputs**-0.5)
        self.train(base.training)

    def forward(self, x: Tensor) -> Tensor:  # [... in] -> [... out]
        """Add the update to what the layer gives. It passes the rank first: B A is never formed."""
        y = self.base(x)  # [... out]
        update = x.to(self.a.dtype) @ self.a.t() @ self.b.t() * self.scale  # [... out]
        update = self.tap("update", update.to(y.dtype))
        return self.tap("out", y + update)

    @property
    def weight(self) -> Tensor:  # [out in]
        """``W + (alpha / rank) B A`` in the dtype of W, for whoever reads a layer's weight rather than calls it."""
        w = self.base.weight
        wide = torch.promote_types(w.dtype, torch.float32)
        return (w.to(wide) + self.b.to(wide) @ self.a.to(wide) * self.scale).to(w.dtype)

    @property
    def bias(self) -> Tensor | None:  # [out]
        """That of the layer."""
        return self.base.bias


def _shared(model: nn.Module) -> set[nn.Parameter]:
    """Return the parameters that stand at more than one place, such as a table of tokens that is also the head."""
    counts = Counter(p for _, p in model.named_parameters(remove_duplicate=False))
    return {p for p, count in counts.items() if count > 1}


def _place(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module where another one stands."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def add_lora(model: nn.Module, rank: int, *, alpha: float | None = None, where: str = "**") -> list[str]:
    """Freeze a model, but for adapters of low rank beside its linear layers; return the names of these layers.

    Left as they are: a layer whose weight stands elsewhere too (an adapter would serve one place only, and could not
    be merged), and the output projection of torch's own attention, which is read and never called. Adapters that the
    model has already stay trainable. Take sites, and make the optimiser, after this.

    Args:
        model: Changed in place, or not at all if there is an error.
        rank: As in `LoRALinear`.
        alpha: As in `LoRALinear`.
        where: A pattern over the dotted names of layers, such as ``blocks.*.attn.*``.

    Raises:
        BadInput: No layer matches, or the rank does not fit one that does.
    """
    held = {id(child) for module in model.modules() if isinstance(module, LoRALinear) for child in module.modules()}
    tied, test = _shared(model), pattern_of(where).fullmatch
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Linear) and not isinstance(module, NonDynamicallyQuantizableLinear)
        if name and id(module) not in held and module.weight not in tied
    }
    chosen = [name for name in layers if test(name)]
    if not chosen:
        raise BadInput(f"no linear layer to adapt matches {where!r}{nearest(where, layers)}")
    largest = min(min(layers[name].weight.shape) for name in chosen)
    if not 1 <= rank <= largest:
        raise BadInput(f"a LoRA rank of {rank}: these layers take 1 to {largest}")
    model.requires_grad_(requires_grad=False)
    for name in chosen:
        _place(model, name, LoRALinear(layers[name], rank, alpha=alpha))
    for module in model.modules():
        if isinstance(module, LoRALinear):
            module.a.requires_grad_()
            module.b.requires_grad_()
    return chosen


@torch.no_grad()
def merge_lora(model: nn.Module) -> int:
    """Add each update to the weight beside which it stands, and put the layer back; return how many.

    The sum is computed in float32 at least and rounded once, to the weight's dtype. Layers stay frozen.

    Raises:
        BadInput: A weight stands elsewhere too, where the update does not belong; or the model is itself an adapter.
    """
    found = {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}
    tied = _shared(model)
    for name, module in found.items():
        if not name or module.base.weight in tied:
            raise BadInput(
                f"the adapter {name!r} cannot be merged: " + ("its weight is shared" if name else "no parent")
            )
    for name, module in found.items():
        module.base.weight.copy_(module.weight)
        _place(model, name, module.base)
    return len(found)


def lora_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of the adapters alone, by their names in the state dict, which they share memory with.

    ``model.load_state_dict(state, strict=False)`` puts them back, into a model with adapters at the same places.
    """
    adapters = [(name, module) for name, module in model.named_modules() if isinstance(module, LoRALinear)]
    parts = [(f"{name}.{part}" if name else part, module, part) for name, module in adapters for part in ("a", "b")]
    return {name: module.get_parameter(part).detach() for name, module, part in parts}


def trainable(model: nn.Module) -> int:
    """Return how many numbers are trained; those of a parameter that stands at two places count once."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def freeze(model: nn.Module, *, but: str) -> list[str]:
    """Leave only the parameters trainable whose dotted names match a pattern; return these names.

    A parameter that stands at two places is trained if either name matches, and returned under the first that does.

    Raises:
        BadInput: None matches; then nothing is changed.
    """
    named, test = list(model.named_parameters(remove_duplicate=False)), pattern_of(but).fullmatch
    kept: dict[nn.Parameter, str] = {}
    for name, parameter in named:
        if test(name):
            kept.setdefault(parameter, name)
    if not kept:
        raise BadInput(f"no parameter matches {but!r}{nearest(but, [name for name, _ in named])}")
    model.requires_grad_(requires_grad=False)
    for parameter in kept:
        parameter.requires_grad_()
    return list(kept.values())


def mask_prompt(tokens: Tensor, prompt_lengths: Tensor, *, pad: int | None = None) -> tuple[Tensor, Tensor]:
    """Return inputs [B T-1] and the tokens that follow them, [B T-1], with `IGNORED` for the prompt and the padding.

    The first token of an answer is a target: it is predicted from the last of the prompt.

    Args:
        tokens: [B T], each row a prompt, then its answer, then padding.
        prompt_lengths: [B], tokens of each prompt.
        pad: The token of the padding; an answer must not end with it, or no end is learned.

    Raises:
        BadInput: There is not one length a row.
    """
    if prompt_lengths.shape != tokens.shape[:1]:
        raise BadInput(f"{len(tokens)} rows of tokens, but prompt lengths of shape {list(prompt_lengths.shape)}")
    inputs, targets = tokens[:, :-1], tokens[:, 1:]  # [B T-1] each
    places = torch.arange(1, targets.shape[1] + 1, device=tokens.device)  # [T-1], of the targets in the row
    hidden = places < prompt_lengths[:, None]  # [B T-1]
    if pad is not None:
        hidden = hidden | (targets == pad)
    return inputs, targets.masked_fill(hidden, IGNORED)


def accumulate(model_loss: Callable[[Tensor, Tensor], Tensor], parts: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Add to each parameter's ``grad`` that of the mean loss over all parts; return that mean, [], without a graph.

    Each part is divided by the number of targets that count in all of them, and its graph is gone before the next
    part begins. Where no target counts, the mean is 0 and so is every gradient.

    Args:
        model_loss: ``model_loss(inputs, targets)`` gives the sum of the losses of the targets that are not `IGNORED`.
        parts: Inputs and targets of each; together they are the batch.

    Raises:
        BadInput: There is no part.
    """
    if not parts:
        raise BadInput("no part to accumulate over")
    total = torch.stack([(targets != IGNORED).sum() for _, targets in parts]).sum().clamp_min(1)  # []
    return torch.stack([_backward(model_loss, part, total) for part in parts]).sum()


def _backward(model_loss: Callable[..., Any], part: tuple[Tensor, Tensor], total: Tensor) -> Tensor:
    """Go back through one part's share of the mean; its graph ends with this call."""
    share: Tensor = model_loss(*part) / total  # []
    share.backward()  # type: ignore[no-untyped-call]
    return share.detach()
