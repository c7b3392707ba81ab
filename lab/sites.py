"""Sites and taps: the named tensors of a running model, and what is attached to them.

A component names its sites once, with their shapes, and calls ``self.tap("scores", scores)`` where the tensor is
made. With nobody attached that costs one dictionary miss. What is attached runs in an order that no registration
can change: what replaces (faults) first, what reads (probes) after it.

In a model that the lab did not write, sites are module outputs, made by ``lab.attach``; everything here serves both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from lab.errors import BadInput, nearest
from lab.names import pattern_of

Mode = Literal["train", "evaluate", "generate", "examine"]
Change = Callable[[Tensor], Tensor]
Active = Callable[[], bool]


class Component(nn.Module):
    """A part of a model that the lab wrote: a module that names the tensors inside it.

    Attributes:
        SITES: Name of each site to its shape, in the order of the forward pass; a letter a dimension:
            B batch, T position (S where it is attended to), C width, H heads, D width of a head, F hidden,
            V vocabulary, Y and X rows and columns of an image
        transparent: Its sites carry the parent's name: the core of an attention layer is not a place of its own.
        fan_in: How many inputs each output of ``weight`` sums, where the shape does not say so (a look-up sums one).
    """

    SITES: ClassVar[Mapping[str, str]] = MappingProxyType({})
    transparent: ClassVar[bool] = False
    fan_in: int | None = None
    _taps: Mapping[str, Tap] = MappingProxyType({})

    def tap(self, name: str, value: Tensor) -> Tensor:
        """Offer a tensor to whoever is attached; return it, or what a fault made of it."""
        tap = self._taps.get(name)
        return value if tap is None else tap(value)

    def replaced(self, *names: str) -> bool:
        """Whether a fault that is active replaces a value or a gradient at one of these sites."""
        taps = self._taps
        return any(name in taps and taps[name].replaced for name in names) if taps else False

    def wanted(self, *names: str) -> bool:
        """Whether anyone reads one of these sites in this step."""
        taps = self._taps
        return any(name in taps and taps[name].wanted for name in names) if taps else False

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles carry no taps: a copy of a watched model is that of an unwatched one."""
        return {key: value for key, value in self.__dict__.items() if key != "_taps"}


@dataclass(frozen=True)
class Site:
    """A named tensor in a running model.

    Attributes:
        name: ``blocks.2.attn.scores``.
        module: The module that makes it, ``blocks.2.attn``.
        shape: A letter a dimension, ``"B H T S"``; ``""`` when not known.
    """

    name: str
    module: str
    shape: str = ""

    @property
    def axes(self) -> list[str]:
        """The letters of the shape."""
        return self.shape.split()


@dataclass
class Reader:
    """A function that reads at a site, in some modes, when it is due."""

    see: Callable[[Site, Tensor], None]
    due: Active
    modes: tuple[Mode, ...]


@dataclass
class Writer:
    """A function that replaces the tensor at a site while it is active."""

    change: Change
    active: Active


@dataclass
class Tap:
    """What is attached to one site. Calling it passes a value through."""

    site: Site
    sites: Sites
    writers: list[Writer] = field(default_factory=list)
    readers: list[Reader] = field(default_factory=list)
    grad_writers: list[Writer] = field(default_factory=list)
    grad_readers: list[Reader] = field(default_factory=list)

    @property
    def replaced(self) -> bool:
        """Whether a writer is active now."""
        return any(writer.active() for writer in (*self.writers, *self.grad_writers))

    @property
    def wanted(self) -> bool:
        """Whether a reader is due now."""
        mode = self.sites.mode
        return any(mode in reader.modes and reader.due() for reader in self.readers)

    def __call__(self, value: Tensor) -> Tensor:
        """Pass a value through: what replaces first, what reads after it."""
        for writer in self.writers:
            if writer.active():
                value = writer.change(value)
        mode = self.sites.mode
        self.sites.meet(self.site)
        for reader in self.readers:
            if mode in reader.modes and reader.due():
                reader.see(self.site, value)
        if (self.grad_readers or self.grad_writers) and value.requires_grad:
            self._on_gradient(value, mode)
        return value

    def _on_gradient(self, value: Tensor, mode: Mode) -> None:
        readers = [reader for reader in self.grad_readers if mode in reader.modes and reader.due()]
        writers = [writer for writer in self.grad_writers if writer.active()]
        if not readers and not writers:
            return

        def pass_through(grad: Tensor | None) -> Tensor | None:
            if grad is None:  # an output that the loss does not use, where DistributedDataParallel looks for such
                return None
            for writer in writers:
                grad = writer.change(grad)
            for reader in readers:
                reader.see(self.site, grad)
            return grad if writers else None

        value.register_hook(pass_through)  # type: ignore[no-untyped-call]


class Sites:
    """The sites of one model.

    Attributes:
        mode: What the model is being run for; readers say in which modes they read.
        order: Name of each site to its place in the forward pass, as first met.
        output: The name of the site that holds the model's output.
    """

    def __init__(self, output: str = "") -> None:
        self.mode: Mode = "train"
        self.order: dict[str, int] = {}
        self.output = output
        self.taps: dict[str, Tap] = {}
        self._known: dict[str, Site] = {}
        self._attach: dict[str, Callable[[Tap], None]] = {}
        self._detach: list[Callable[[], None]] = []

    def declare(self, site: Site, attach: Callable[[Tap], None]) -> None:
        """Make a site known. ``attach(tap)`` is called when first something is attached to it."""
        self._known[site.name] = site
        self._attach[site.name] = attach

    def keep(self, patterns: Iterable[str]) -> None:
        """Forget every site but the model's output and those of which the name, or that of their module, matches one.

        Raises:
            BadInput: A pattern matches none.
        """
        kept = {self.output}
        for pattern in patterns:
            test = pattern_of(pattern).fullmatch
            found = {name for name, site in self._known.items() if test(name) or test(site.module)}
            if not found:
                modules = {site.module for site in self._known.values() if site.module}
                raise BadInput(f"no site and no module matches {pattern!r}{nearest(pattern, modules)}")
            kept |= found
        self._known = {name: site for name, site in self._known.items() if name in kept}

    def on_detach(self, undo: Callable[[], None]) -> None:
        """Call `undo` when the sites are detached."""
        self._detach.append(undo)

    def meet(self, site: Site) -> None:
        """Note that the forward pass has reached a site."""
        if site.name not in self.order:
            self.order[site.name] = len(self.order)

    @property
    def names(self) -> list[str]:
        """The name of every site."""
        return list(self._known)

    def match(self, pattern: str) -> list[Site]:
        """Return the sites whose name matches.

        ``*`` stands for any text within one part of a name, ``**`` for any number of parts.
        """
        test = pattern_of(pattern).fullmatch
        return [s for s in self._known.values() if test(s.name)]

    def read(
        self,
        pattern: str,
        see: Callable[[Site, Tensor], None],
        due: Active = lambda: True,
        *,
        grad: bool = False,
        modes: tuple[Mode, ...] = ("train",),
    ) -> list[Site]:
        """Call ``see(site, value)`` (or the gradient) at each matching site; return those sites, perhaps none."""
        found = self.match(pattern)
        for site in found:
            tap = self._tap(site)
            (tap.grad_readers if grad else tap.readers).append(Reader(see, due, modes))
        return found

    def replace(self, pattern: str, change: Change, active: Active = lambda: True, *, grad: bool = False) -> None:
        """Replace the value (or the gradient) at each matching site while active.

        Raises:
            BadInput: No site matches.
        """
        found = self.match(pattern)
        if not found:
            raise BadInput(f"no site matches {pattern!r}{nearest(pattern, self._known)}")
        for site in found:
            tap = self._tap(site)
            (tap.grad_writers if grad else tap.writers).append(Writer(change, active))

    @contextmanager
    def capture(self, pattern: str) -> Iterator[dict[str, Tensor]]:
        """Collect the values at the matching sites while in the block, in the order of the forward pass."""
        values: dict[str, Tensor] = {}
        reader = Reader(lambda site, value: values.__setitem__(site.name, value), lambda: True, (self.mode,))
        taps = [self._tap(site) for site in self.match(pattern)]
        for tap in taps:
            tap.readers.append(reader)
        try:
            yield values
        finally:
            for tap in taps:
                tap.readers.remove(reader)

    @contextmanager
    def running(self, mode: Mode) -> Iterator[None]:
        """Say what the model is run for while in the block."""
        before, self.mode = self.mode, mode
        try:
            yield
        finally:
            self.mode = before

    def detach(self) -> None:
        """Remove everything from the model."""
        for undo in reversed(self._detach):
            undo()
        self._detach.clear()
        self.taps.clear()

    def _tap(self, site: Site) -> Tap:
        if site.name not in self.taps:
            tap = self.taps[site.name] = Tap(site, self)
            self._attach[site.name](tap)
        return self.taps[site.name]


def sites_of(model: nn.Module) -> Sites:
    """Return the sites that the components of a model declare."""
    sites = Sites()
    for path, module in model.named_modules():
        if isinstance(module, Component):
            place = path.rpartition(".")[0] if module.transparent else path
            for name, shape in module.SITES.items():
                site = Site(f"{place}.{name}" if place else name, place, shape)
                sites.declare(site, _attacher(sites, module, name))
    return sites


def _attacher(sites: Sites, module: Component, name: str) -> Callable[[Tap], None]:
    def attach(tap: Tap) -> None:
        if "_taps" not in module.__dict__:
            module._taps = {}  # noqa: SLF001 - a component and its taps are one mechanism
            sites.on_detach(lambda: module.__dict__.pop("_taps", None))
        module._taps[name] = tap  # type: ignore[index]  # noqa: SLF001

    return attach
