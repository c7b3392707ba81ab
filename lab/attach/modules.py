"""Sites in a model that the lab did not write: the output of each module, by its name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from lab.sites import Component, Site, Tap, sites_of

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable

    from torch.utils.hooks import RemovableHandle

    from lab.sites import Sites


class ModuleSites:
    """The sites of any model. What the lab's own components declare inside themselves counts too.

    Args:
        model: Whose.
        compiled: Modules that are compiled: their sites are there when asked for, not in training.
        only: Patterns of the sites, or of the modules, that are to have one; by default all.

    Raises:
        BadInput: One of `only` matches nothing.

    Attributes:
        sites: A site ``NAME.out`` for the output of each module; ``out`` for that of the model.
    """

    def __init__(
        self, model: nn.Module, compiled: Collection[nn.Module] = (), only: Iterable[str] | None = None
    ) -> None:
        self.sites: Sites = sites_of(model)
        self.sites.output = "out"
        self._hooks: list[tuple[nn.Module, Hook]] = []
        self._handles: list[RemovableHandle] = []
        self._compiled = compiled
        for name, module in model.named_modules():
            if not isinstance(module, Component) or not name:
                site = Site(f"{name}.out" if name else "out", name)
                self.sites.declare(site, self._attacher(module))
        if only is not None:
            self.sites.keep(only)
        self.sites.on_detach(self.pause)

    def _attacher(self, module: nn.Module) -> Callable[[Tap], None]:
        def attach(tap: Tap) -> None:
            hook = Hook(module, _pass_through(tap))
            self._hooks.append((module, hook))
            if module not in self._compiled:
                self._handles.append(module.register_forward_hook(hook))

        return attach

    def pause(self) -> None:
        """Take the hooks off: a model with hooks may take another path when it is evaluated."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def resume(self, *, everywhere: bool = False) -> None:
        """Put the hooks back, if they are off; `everywhere`: into compiled modules too."""
        if not self._handles:
            hooks = [(module, hook) for module, hook in self._hooks if everywhere or module not in self._compiled]
            self._handles = [module.register_forward_hook(hook) for module, hook in hooks]


class Hook:
    """A hook for one module. A copy or a pickle of the module takes along only something that does nothing."""

    def __init__(self, module: nn.Module, function: Callable[..., Any]) -> None:
        self.module, self.function = module, function

    def __call__(self, module: nn.Module, *args: Any) -> Any:
        """Call the function, unless this is a copy's."""
        return self.function(module, *args) if module is self.module else None

    def __deepcopy__(self, _memo: dict[int, Any]) -> Callable[..., None]:
        return _nothing

    def __reduce__(self) -> tuple[Callable[[], Callable[..., None]], tuple[()]]:
        return _idle, ()


def _nothing(*_: Any) -> None:
    """What is left of a hook in a copy of a watched model."""


def _idle() -> Callable[..., None]:
    return _nothing


def _pass_through(tap: Tap) -> Callable[..., Any]:
    """Return a forward hook that offers a module's output to a tap."""

    def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
        value = output[0] if isinstance(output, tuple) and output else output
        if not isinstance(value, Tensor):
            value = output.get("logits") if isinstance(output, dict) else getattr(output, "logits", None)
            if not isinstance(value, Tensor):
                return None
        passed = tap(value)
        if passed is value:
            return None
        return (passed, *output[1:]) if isinstance(output, tuple) else passed

    return hook
