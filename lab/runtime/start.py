"""The trained model that a scenario starts from: that of another scenario, trained on first use, and kept."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import platformdirs
import torch

import lab
from lab.errors import BadInput
from lab.projects.fine_tuning.component import merge_lora
from lab.projects.pretraining.component import Tokenizer, load_checkpoint, save_checkpoint
from lab.scenario import load_scenario

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

    from lab.scenario import Scenario

    Train = Callable[[str, Scenario, Path], tuple[nn.Module, Tokenizer]]

HOME = "LAB_CACHE"  # the environment variable that names where trained models are kept
NOT_TRAINING = {"title", "about", "check", "expect", "learn", "probes"}  # what does not change the weights


@dataclass(frozen=True)
class Start:
    """A model that was trained before: its weights by name, and the tokenizer that it reads with."""

    weights: dict[str, Tensor]
    tokenizer: Tokenizer


def with_start(scenario: Scenario) -> Scenario:
    """Return the scenario with the model and the tokenizer of the one that it starts from.

    Raises:
        BadInput: That one has faults, makes no tokens of bytes, or has another model than this one asks for.
    """
    if not scenario.train.start:
        return scenario
    base = _base(scenario)
    if "model" in scenario.model_fields_set and scenario.model != base.model:
        raise BadInput(f"model: it is that of train.start = {scenario.train.start!r}; leave [model] out")
    data = scenario.data.model_copy(update={"tokenizer": base.data.tokenizer, "merges": base.data.merges})
    return scenario.model_copy(update={"model": base.model, "data": data})


def find_start(scenario: Scenario, train: Train) -> Start | None:
    """Return the trained model that a scenario starts from; None where it starts from nothing.

    Args:
        scenario: Of any kind.
        train: Trains a scenario of this name in a folder; gives the model and the tokenizer. Used when none is kept.
    """
    if not scenario.train.start:
        return None
    name, base = scenario.train.start, _base(scenario)
    path = cache() / f"{Path(name).stem}-{_key(base)}.pt"
    if not path.is_file():
        logging.getLogger("lab").warning("lab: training %s once, to start from; kept in %s", name, path.parent)
        with tempfile.TemporaryDirectory(prefix="lab-") as folder:
            model, tokenizer = train(name, base, Path(folder) / "run")
        _keep(path, model, tokenizer)
    kept = load_checkpoint(path)
    return Start(kept["weights"], Tokenizer([tuple(pair) for pair in kept["merges"]]))


def cache() -> Path:
    """Where trained models are kept."""
    return Path(os.environ.get(HOME) or platformdirs.user_cache_dir("breaklab"))


def _base(scenario: Scenario) -> Scenario:
    name = scenario.train.start
    try:
        base = with_start(load_scenario(name)[1])
    except BadInput as error:
        raise BadInput(f"train.start: {error}") from None
    except RecursionError:
        raise BadInput(f"train.start: found {name!r}, which starts from itself") from None
    if base.fault:
        raise BadInput(f"train.start: found {name!r}, which has faults; name a healthy scenario")
    if base.train.objective in ("masked", "seq2seq"):
        raise BadInput(f"train.start: found {name!r}, which trains no decoder")
    if base.data.tokenizer == "characters" and not base.train.start:
        raise BadInput(f"train.start: found {name!r}, whose tokens are the characters of one text")
    return base


def _key(base: Scenario) -> str:
    """Return what stands for everything that makes the weights: the scenario, the versions, and the code as loaded."""
    about = base.model_dump(mode="json", exclude=NOT_TRAINING)
    digest = hashlib.sha256(json.dumps([about, lab.__version__, torch.__version__], sort_keys=True).encode())
    for name, module in sorted(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if file and (name.startswith("lab.runtime.") or (name.startswith("lab.projects.") and "component" in name)):
            digest.update(Path(file).read_bytes())
    if base.train.start:
        digest.update(_key(_base(base)).encode())
    return digest.hexdigest()[:16]


def _keep(path: Path, model: nn.Module, tokenizer: Tokenizer) -> None:
    """Write the weights, with adapters merged.

    Raises:
        BadInput: There is no room for them.
    """
    model = copy.deepcopy(model)
    merge_lora(model)
    weights = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_checkpoint(path, {"weights": weights, "merges": [list(pair) for pair in tokenizer.merges]})
    except OSError as error:
        raise BadInput(
            f"{path}: cannot be kept: {error.strerror}; set {HOME} to a folder that can be written"
        ) from None
