"""Numbers of fine-tuning that theory knows."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn

from lab.context import IGNORED
from lab.projects.backprop.component import AdamW
from lab.projects.decoder.component import Decoder
from lab.projects.fine_tuning.component import LoRALinear, accumulate, add_lora, mask_prompt, merge_lora, trainable
from lab.projects.linear.component import Linear
from lab.projects.losses.component import cross_entropy, token_losses
from lab.spec import measure

VOCABULARY, WIDTH, LAYERS, LENGTH, RANK = 32, 64, 2, 24, 4


def _model(seed: int) -> Decoder:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Decoder(VOCABULARY, context=LENGTH, layers=LAYERS, width=WIDTH, heads=4)


def _batch(seed: int) -> tuple[Tensor, Tensor]:
    """Prompts of different lengths, and their answers: inputs and targets [8 T-1]."""
    draw = torch.Generator().manual_seed(seed)
    tokens = torch.randint(VOCABULARY, (8, LENGTH), generator=draw)
    return mask_prompt(tokens, torch.randint(1, LENGTH, (8,), generator=draw))


def _adapted(seed: int, steps: int = 0) -> Decoder:
    """A decoder with adapters, after so many steps with weight decay."""
    model, (inputs, targets) = _model(seed), _batch(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + 1)
        add_lora(model, RANK, where="blocks.**")
    optimizer = AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        cross_entropy(model(inputs), targets).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return model


def _change(seed: int, steps: int) -> float:
    model, (inputs, _) = _adapted(seed, steps), _batch(seed)
    with torch.no_grad():
        return float((model(inputs) - _model(seed)(inputs)).abs().max())


@measure("largest change of a logit by adapters that are not trained yet; 0, to the last bit")
def lora_change_at_start(seed: int) -> float:
    return _change(seed, 0)


@measure("the same after 3 steps; above 0")
def lora_change_after_3_steps(seed: int) -> float:
    return _change(seed, 3)


def _gradient(seed: int, part: str) -> float:
    model, (inputs, targets) = _adapted(seed), _batch(seed)
    cross_entropy(model(inputs), targets).backward()  # type: ignore[no-untyped-call]
    layers = [module for module in model.modules() if isinstance(module, LoRALinear)]
    grads = [layer.get_parameter(part).grad for layer in layers]
    return math.sqrt(sum(float(grad.square().sum()) for grad in grads if grad is not None))


@measure("norm of the gradient of all A at step 0; 0, since B is 0")
def grad_a_at_start(seed: int) -> float:
    return _gradient(seed, "a")


@measure("norm of the gradient of all B at step 0; above 0")
def grad_b_at_start(seed: int) -> float:
    return _gradient(seed, "b")


@measure("numbers that are trained over the sum of r (in + out) of the layers; 1")
def trainable_over_closed_form(seed: int) -> float:
    layer = RANK * ((WIDTH + 3 * WIDTH) + (WIDTH + WIDTH) + 2 * (WIDTH + 4 * WIDTH))  # qkv, proj, up and down
    return trainable(_adapted(seed)) / (LAYERS * layer)


@measure("largest change of a frozen number over 3 steps with weight decay; 0")
def frozen_change(seed: int) -> float:
    before, after = _adapted(seed, 0), _adapted(seed, 3)
    pairs = zip(before.parameters(), after.parameters(), strict=True)
    return max(float((p - q).detach().abs().max()) for p, q in pairs if not p.requires_grad)


@measure("largest distance of a merged model's logits from those with adapters, in float32; 0 but for rounding")
def merged_gap(seed: int) -> float:
    model, (inputs, _) = _adapted(seed, 3), _batch(seed)
    with torch.no_grad():
        expected = model(inputs)
        merge_lora(model)
        return float((model(inputs) - expected).abs().max())


@measure("largest rank of what 3 steps changed in a merged weight; r = 4")
def rank_of_the_change(seed: int) -> float:
    before, after = _model(seed), _adapted(seed, 3)
    names = [name for name, module in after.named_modules() if isinstance(module, LoRALinear)]
    merge_lora(after)
    changes = [after.get_parameter(f"{n}.weight") - before.get_parameter(f"{n}.weight") for n in names]
    return max(int(torch.linalg.matrix_rank(change.detach().double(), rtol=1e-4)) for change in changes)


@measure("largest distance of a gradient in 4 parts from that of the whole batch, over its largest; 0 but for rounding")
def accumulation_gap(seed: int) -> float:
    model, (inputs, targets) = _model(seed), _batch(seed)

    def total(x: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(model(x), y) * (y != IGNORED).sum()

    whole = torch.autograd.grad(cross_entropy(model(inputs), targets), list(model.parameters()))
    accumulate(total, list(zip(torch.split(inputs, 2), torch.split(targets, 2), strict=True)))
    gaps = [(p.grad - g).abs().max() for p, g in zip(model.parameters(), whole, strict=True) if p.grad is not None]
    return float(torch.stack(gaps).max() / torch.stack([g.abs().max() for g in whole]).max())


@measure("mean of two parts' means over the mean of all: 1 target without loss, 3 of ln 7; .97 for 1.46, 2/3 of it")
def mean_of_means_error(seed: int) -> float:
    targets = torch.randint(7, (2, 4), generator=torch.Generator().manual_seed(seed))
    logits = torch.zeros(2, 4, 7, dtype=torch.float64)  # even odds
    logits[0] = logits[0].scatter(-1, targets[0][:, None], 1e3)  # certain, and right
    targets[0, 1:], targets[1, 3:] = IGNORED, IGNORED
    logits.requires_grad_()

    def total(x: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(x, y) * (y != IGNORED).sum()

    right = accumulate(total, [(logits[:1], targets[:1]), (logits[1:], targets[1:])])
    wrong = sum(float(token_losses(x, y).mean()) for x, y in zip(logits, targets, strict=True)) / 2
    return wrong / float(right)


def _optimizer_numbers(layer: nn.Module) -> int:
    """How many numbers AdamW keeps beside what it trains."""
    params = [p for p in layer.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params)
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    state = (tensor for kept in optimizer.state.values() for tensor in kept.values())
    return sum(tensor.numel() for tensor in state if tensor.dim() > 0)


@measure("state of AdamW with rank 4 over that of the whole layer, from 128 to 128; 2 r / C = 0.0625")
def optimizer_share(seed: int) -> float:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layer = Linear(128, 128, bias=False)
        adapted = LoRALinear(copy.deepcopy(layer), RANK)
    return _optimizer_numbers(adapted) / _optimizer_numbers(layer)
