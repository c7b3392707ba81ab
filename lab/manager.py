"""Finds, orders and guards plugins.

Ordering follows from what a plugin is, never from when it was registered: a fault acts closest to the core, so that
a probe or a profiler sees what the fault left behind, and the core's own answer comes last.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import importlib.util
import inspect
import pkgutil
import sys
import tomllib
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import pluggy

from lab import hookspecs
from lab.catalogue import Catalogue, Fault, Plugin, Probe, handed_on, naming, plugin_id
from lab.errors import BadInput, FaultFailed, NotChecked, nearest, one_line, shown

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable
    from types import ModuleType

    from lab.context import Run, Step

P = ParamSpec("P")
R = TypeVar("R")

GROUP = "lab"
YIELD_ONCE = "a hook that wraps must yield once"
HOOKS = frozenset(name for name in vars(hookspecs) if name.startswith("lab_"))


# ---------------------------------------------------------------- finding


def discover(files: Iterable[str | Path] = (), folder: Path | None = None) -> Catalogue:
    """Load every plugin: entry points, those that ``lab.toml`` in `folder` names, and `files`.

    A package that is installed and broken is listed in ``catalogue.broken``: it must not keep the lab from
    starting. A file that was asked for by name must load.

    Raises:
        BadInput: A named file or module cannot be used.
    """
    catalogue = Catalogue()
    for point in _entry_points():
        try:
            for module in _family(importlib.import_module(point.module)):
                _check_hooks_of_module(module, module.__name__)
                catalogue.add_module(module, module.__name__)
        except BadInput as error:
            catalogue.broken[f"{point.name} ({point.value})"] = str(error)
        except (Exception, SystemExit) as error:  # noqa: BLE001 - a stranger's package may raise anything
            catalogue.broken[f"{point.name} ({point.value})"] = one_line(error)
    settings = (folder or Path()) / "lab.toml"
    for name in _from_toml(settings):
        try:
            load_named(catalogue, name)
        except BadInput as error:
            raise BadInput(f"{settings}: plugins: {error}") from None
    catalogue.asked = tuple(dict.fromkeys(map(str, files)))  # named twice, loaded once
    for name in catalogue.asked:
        load_named(catalogue, name)
    return catalogue


def load_for(purpose: str) -> list[type[Plugin]]:
    """Load the plugins that a family keeps for who asks for `purpose`: its ``ON_REQUEST`` names modules and purposes.

    Raises:
        BadInput: One of them does not load.
    """
    catalogue = Catalogue()
    for point in _entry_points():
        kept: dict[str, str] = {}
        with contextlib.suppress(Exception, SystemExit):  # `discover` says that it is broken
            kept = getattr(importlib.import_module(point.module), "ON_REQUEST", {})
        for name in (name for name, use in kept.items() if use == purpose):
            load_named(catalogue, f"{point.module}.{name}")
    return [*catalogue.plugins.values()]


def _entry_points() -> list[importlib.metadata.EntryPoint]:
    points = importlib.metadata.entry_points(group=GROUP)
    return sorted(points, key=lambda point: not point.module.startswith("lab."))  # ours keep their ids


def _family(module: ModuleType) -> list[ModuleType]:
    """Return the module; of a package, each module in it but those that it names in ``ON_REQUEST``."""
    if not hasattr(module, "__path__"):
        return [module]
    apart = getattr(module, "ON_REQUEST", {})
    names = sorted(info.name for info in pkgutil.iter_modules(module.__path__) if info.name not in apart)
    return [importlib.import_module(f"{module.__name__}.{name}") for name in names]


def _from_toml(path: Path) -> list[str]:
    """Return what the key ``plugins`` of ``lab.toml`` lists, file names taken from where that file is."""
    if not path.is_file():
        return []
    try:
        settings = tomllib.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise BadInput(f"{path}: not TOML that can be read: {error}") from None
    unknown = sorted(set(settings) - {"plugins"})
    if unknown:
        raise BadInput(f"{path}: unknown key {unknown[0]!r}{nearest(unknown[0], ['plugins'])}")
    names = settings.get("plugins", [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise BadInput(f"{path}: plugins: found {shown(names)}; it must be a list of file or module names")
    return [str(path.parent / name) if name.endswith(".py") else name for name in names]


def load_named(catalogue: Catalogue, name: str) -> None:
    """Load a plugin that was asked for: a ``.py`` file, or a module that imports.

    Raises:
        BadInput: It does not load, or there is nothing in it.
    """
    path = Path(name)
    if name.endswith(".py") or path.exists():
        modules = [_load_file(path)]
    else:
        try:
            modules = _family(importlib.import_module(name))
        except (Exception, SystemExit) as error:  # noqa: BLE001 - whatever it raises is told in one line
            raise BadInput(f"plugin {name}: {one_line(error)}; give a .py file or a module that imports") from None
    for module in modules:
        _check_hooks_of_module(module, name)
    if not sum([catalogue.add_module(module, f"plugin {name}") for module in modules]):
        raise BadInput(f"plugin {name}: nothing in it is marked with @lab.fault, @lab.probe, @lab.plugin or @lab.rule")


def _load_file(path: Path) -> ModuleType:
    if path.is_dir():
        raise BadInput(f"plugin {path}: a folder; give a .py file or a module that imports")
    if not path.is_file():
        raise BadInput(f"plugin {path}: no such file")
    spec = importlib.util.spec_from_file_location(f"lab_plugin_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise BadInput(f"plugin {path}: not a Python file; its name should end in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # noqa: BLE001 - whatever it raises is told in one line
        raise BadInput(f"plugin {path}{_line_in(error, path)}: raised when loaded: {one_line(error)}") from None
    return module


def _line_in(error: BaseException, path: Path) -> str:
    if isinstance(error, SyntaxError):
        return f" line {error.lineno}" if error.lineno else ""
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if Path(f.filename) == path.absolute()]
    return f" line {lines[-1]}" if lines else ""


def _check_hooks_of_module(module: ModuleType, where: str) -> None:
    for name, thing in vars(module).items():
        if inspect.isclass(thing) and thing.__module__ == module.__name__ and issubclass(thing, Plugin):
            check_hooks(thing, f"plugin {where}: class {name}")


def check_hooks(cls: type, where: str) -> None:
    """Refuse a method named ``lab_...`` that is no hook, or that takes an argument that the hook does not have.

    Raises:
        BadInput: It names the nearest hook or argument.
    """
    for name in dir(cls):
        if not name.startswith("lab_"):
            continue
        if name not in HOOKS:
            raise BadInput(f"{where}: no hook {name!r}{nearest(name, HOOKS)}")
        if not callable(getattr(cls, name)):
            raise BadInput(f"{where}: {name} is a hook, and must be a method")
        known = set(inspect.signature(getattr(hookspecs, name)).parameters)
        for argument in list(inspect.signature(getattr(cls, name)).parameters)[1:]:
            if argument not in known:
                raise BadInput(f"{where}: {name} has no argument {argument!r}{nearest(argument, known)}")


# ---------------------------------------------------------------- ordering and guarding


class Manager(pluggy.PluginManager):
    """The plugins of one run. Methods named ``lab_...`` are hooks, without a decorator; a generator wraps.

    Attributes:
        set_aside: Id of each probe or tool that raised, and the traceback.
        reasons: The same, in one line.
        tools: Those of them that are links to other tools: nothing that is checked depends on them.
        declined: Id of each examination that said it cannot judge here, and why.
        absent: Those of them that said so when the run started: nothing more is asked of them.
    """

    def __init__(self) -> None:
        super().__init__("lab")
        self.add_hookspecs(hookspecs)
        self.set_aside: dict[str, str] = {}
        self.reasons: dict[str, str] = {}
        self.tools: set[str] = set()
        self.declined: dict[str, str] = {}
        self.absent: set[str] = set()

    def parse_hookimpl_opts(self, plugin: object, name: str) -> pluggy.HookimplOpts | None:
        """Take any method named ``lab_...`` for a hook, ordered by what the plugin is."""
        method = getattr(plugin, name) if name.startswith("lab_") else None
        if method is None or not callable(method):
            return None
        wrapper = inspect.isgeneratorfunction(method)
        is_fault, is_core = isinstance(plugin, Fault), not isinstance(plugin, Plugin)
        # pluggy calls what is `tryfirst` first; a wrapper called first is the outermost.
        return {
            "wrapper": wrapper,
            "hookwrapper": False,
            "optionalhook": False,
            "tryfirst": is_fault != wrapper and not is_core,
            "trylast": is_core or (is_fault and wrapper),
            "specname": None,
        }

    def add(self, plugin: object) -> None:
        """Register a plugin for this run and guard its hooks.

        Raises:
            BadInput: It has a misspelt hook or argument.
        """
        check_hooks(type(plugin), f"plugin {plugin_id(plugin)}")
        self.register(plugin)
        if not isinstance(plugin, Plugin):
            return
        guard = self._named if isinstance(plugin, Fault) else self._set_aside_on_error
        for caller in self.get_hookcallers(plugin) or ():
            for impl in caller.get_hookimpls():
                if impl.plugin is plugin:
                    guarded: Any = impl  # `function` is final to a type checker, and ours to wrap before the first call
                    guarded.function = guard(plugin, impl.function)

    def add_made(self, plugin: Plugin | type[Plugin]) -> None:
        """Register a plugin, made here when it is a class; a class that raises is set aside.

        Raises:
            BadInput: It has a misspelt hook or argument.
        """
        if isinstance(plugin, type):
            try:
                plugin = plugin()
            except Exception as error:  # noqa: BLE001 - a stranger's plugin may raise anything
                self.put_aside(plugin, error)
                return
        self.add(plugin)

    def guard(self, plugin: Probe, function: Callable[P, None]) -> Callable[P, None]:
        """Wrap a function of a probe: if it raises, the probe is set aside and the run goes on."""
        name = plugin_id(plugin)

        @functools.wraps(function)
        def guarded(*args: P.args, **kwargs: P.kwargs) -> None:
            if name in self.set_aside:
                return
            try:
                function(*args, **kwargs)
            except Exception as error:  # noqa: BLE001 - a stranger's probe may raise anything
                self.put_aside(plugin, error)

        return guarded

    def put_aside(self, plugin: object, error: BaseException) -> None:
        """Take a plugin out of the run, and keep its traceback.

        Raises:
            FaultFailed: The error is that of a fault, which the plugin met when it called the model.
        """
        if isinstance(error, FaultFailed):
            raise error
        name = plugin_id(plugin)
        self.set_aside.setdefault(name, "".join(traceback.format_exception(error)))
        self.reasons.setdefault(name, one_line(error))
        if not issubclass(plugin if isinstance(plugin, type) else type(plugin), Probe):
            self.tools.add(name)

    def _set_aside_on_error(self, plugin: Plugin, function: Callable[..., Any]) -> Callable[..., Any]:
        name = plugin_id(plugin)
        declines = False  # this hook; a plugin's other hooks say nothing of whether it can judge
        starts = function.__name__ == "lab_start"

        def listen(*args: Any) -> Any:
            nonlocal declines
            if self._is_out(name):
                return None
            try:
                answer = function(*args)
            except NotChecked as reason:
                self.declined[name] = str(reason)
                declines = True
                self.absent |= {name} if starts else set()
                return None
            except Exception as error:  # noqa: BLE001 - a stranger's probe may raise anything
                self.put_aside(plugin, error)
                return None
            if declines:
                self.declined.pop(name, None)
                declines = False
            return None if isinstance(plugin, Probe) else answer  # a probe changes nothing

        def wrap(*args: Any) -> Generator[Any, Any, Any]:
            inside = None if self._is_out(name) else self._opened(plugin, function(*args))
            try:
                answer = yield
            except BaseException as error:
                if inside is not None:
                    self._closed(plugin, inside.throw, error)
                raise
            if inside is not None:
                self._closed(plugin, inside.send, answer)
            return answer  # whatever a watcher answers, the run keeps its own

        return wrap if inspect.isgeneratorfunction(function) else listen

    def _is_out(self, name: str) -> bool:
        return name in self.set_aside or name in self.absent

    def _opened(self, plugin: Plugin, inside: Generator[Any, Any, Any]) -> Generator[Any, Any, Any] | None:
        """Run a watching wrapper up to its yield; None when it raised and was set aside."""
        try:
            next(inside)
        except StopIteration:
            self.put_aside(plugin, RuntimeError(YIELD_ONCE))
            return None
        except Exception as error:  # noqa: BLE001
            self.put_aside(plugin, error)
            return None
        return inside

    def _closed(self, plugin: Plugin, resume: Callable[[Any], Any], given: Any) -> None:
        """Let a watching wrapper finish, with an answer or an error; what it raises of its own sets it aside."""
        try:
            resume(given)
        except StopIteration:
            return
        except Exception as error:  # noqa: BLE001
            if not handed_on(error, given):
                self.put_aside(plugin, error)
        else:
            self.put_aside(plugin, RuntimeError(YIELD_ONCE))

    def _named(self, plugin: Plugin, function: Callable[..., Any]) -> Callable[..., Any]:
        def act(*args: Any) -> Any:
            with naming(plugin):
                return function(*args)

        def wrap(*args: Any) -> Generator[Any, Any, Any]:
            inside = function(*args)
            with naming(plugin):
                try:
                    next(inside)
                except StopIteration:
                    raise RuntimeError(YIELD_ONCE) from None
            try:
                answer = yield
            except BaseException as error:  # noqa: BLE001 - whatever it is, the wrapper is told
                resume, given = inside.throw, error
            else:
                resume, given = inside.send, answer
            with naming(plugin, but=given):
                try:
                    resume(given)
                except StopIteration as stop:
                    return stop.value
                raise RuntimeError(YIELD_ONCE)

        return wrap if inspect.isgeneratorfunction(function) else act

    def event(self, name: str, run: Run, **arguments: Any) -> None:
        """Fire an event."""
        getattr(self.hook, name)(run=run, **arguments)

    def examine(self, run: Run, step: Step) -> None:
        """Fire `lab_examine`; leave out the experiments that are made seldom, unless this step is a thorough one."""
        seldom = [] if step.thorough else [p for p in self.get_plugins() if isinstance(p, Probe) and p.info.seldom]
        self.subset_hook_caller("lab_examine", seldom)(run=run, step=step)
