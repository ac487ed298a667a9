"""Installs hooks through SGLang's registry, or in the seams of a patched fork, and verifies each.

``HookRegistry`` (srt/plugins/hook_registry.py, 0.5.23) logs and goes on when a hook cannot be applied. A server with
half of its hooks would silently lose requests, so every hook is looked up afterwards. One that is not in effect stops
the start with its name.
"""

from __future__ import annotations

import importlib
import logging
import pkgutil
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

KINDS = ("before", "after", "around", "replace")


@dataclass(frozen=True)
class Hook:
    """One change to SGLang.

    ``target``: the dotted path at which the symbol is defined. ``kind``: a value of ``HookType`` (before, after,
    around, replace), which says how ``function`` is called. ``why``: the reason, for readers of the manifest.
    """

    target: str
    kind: str
    function: Callable
    why: str

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"hook on {self.target}: unknown kind {self.kind!r}")
        if isinstance(self.function, type) and self.kind != "replace":
            raise ValueError(f"hook on {self.target}: a class can only replace, not act {self.kind}")
        if self.target.count(".") < 1 or not self.why:
            raise ValueError(f"hook on {self.target!r}: needs a dotted target and a reason")

    @property
    def function_name(self) -> str:
        """Dotted path of ``function``."""
        return f"{self.function.__module__}.{self.function.__qualname__}"


class HookError(RuntimeError):
    """Hooks did not take effect; the server must not start. ``problems``: by target, what is wrong."""

    def __init__(self, problems: dict[str, str]) -> None:
        self.problems = problems
        lines = "".join(f"\n  {target}: {problem}" for target, problem in problems.items())
        super().__init__(f"{len(problems)} hook(s) into SGLang could not be installed:{lines}")


def install(hooks: Sequence[Hook]) -> None:
    """Put every hook into its seam, or register and apply it, then verify each. A second call changes nothing.

    Call it while the process has one thread and has not called the targets. Imports their modules. Raises
    :class:`HookError`; SGLang is then half patched and the process must not serve.
    """
    originals = _originals(hooks)
    seams = {target for target, original in originals.items() if _is_seam(original)}
    for target in seams:
        _fill(originals[target], [hook for hook in hooks if hook.target == target])
    others = [hook for hook in hooks if hook.target not in seams]
    if others:
        _register(others)
    if (registry := _registry()) is not None:
        registry.HookRegistry._patched |= seams  # as patched by us: a plugin that comes later cannot cover our hook
    verify(hooks, originals)


def register_models() -> None:
    """Show SGLang the models of this package; those whose base a fork lacks stay out, with a warning."""
    _models().register("anchortp_sglang.models", overwrite=True)


def refuse_unknown_model(architecture: str) -> None:
    """Raise ValueError if SGLang has no model of an architecture: it would try one of transformers, whole."""
    if architecture not in _models().models:
        raise ValueError(f"this SGLang has no model for {architecture}; use one that has")


def _models() -> Any:
    return importlib.import_module("sglang.srt.models.registry").ModelRegistry


def load_plugins() -> None:
    """Load the plugins that the operator has installed for SGLang, if it has a plugin system."""
    if _registry() is not None:
        importlib.import_module("sglang.srt.plugins").load_plugins()


def _registry() -> Any:
    """Return SGLang's module of the hook registry, or None in a fork without it."""
    try:
        return importlib.import_module("sglang.srt.plugins.hook_registry")
    except ModuleNotFoundError as error:
        if not "sglang.srt.plugins.hook_registry".startswith(str(error.name)):
            raise
        return None


def _register(hooks: Sequence[Hook]) -> None:
    """Apply hooks through SGLang's registry. Raises :class:`HookError` if it has none."""
    registry = _registry()
    if registry is None:
        problem = "SGLang has neither its plugin system nor a seam here: apply the patch of docs/forks.md to its source"
        raise HookError({hook.target: problem for hook in hooks})
    source = registry.HookSource(plugin_name="anchortp", dist_name="anchortp-sglang")
    for hook in hooks:
        known = [(kind.value, function) for kind, function, _ in registry.HookRegistry._hooks.get(hook.target, ())]
        if (hook.kind, hook.function) not in known:
            registry.HookRegistry.register(hook.target, hook.function, registry.HookType(hook.kind), source=source)
    logging.getLogger(registry.__name__).setLevel(logging.WARNING)  # else a line for each hook
    with _mended_together(registry):
        registry.HookRegistry.apply_hooks()


_HOOKED = "anchortp_hooked"
"""The attribute in which a seam keeps the function that it calls (:mod:`anchortp_sglang.hooks.anchortp_seam`)."""


def _is_seam(function: Any) -> bool:
    return function is not None and getattr(function, "anchortp_seam", None) is function


def _fill(seam: Any, hooks: Sequence[Hook]) -> None:
    function = seam.__wrapped__
    for hook in hooks:
        function = _wrapped(function, hook.kind, hook.function)
    setattr(seam, _HOOKED, function)


def _wrapped(original_fn: Callable, kind: str, hook: Callable) -> Callable:
    """Return what SGLang's registry would call for a hook of this kind."""

    def before(*args: Any, **kwargs: Any) -> Any:
        changed = hook(*args, **kwargs)
        if changed is not None:
            args, kwargs = changed
        return original_fn(*args, **kwargs)

    def after(*args: Any, **kwargs: Any) -> Any:
        result = original_fn(*args, **kwargs)
        changed = hook(result, *args, **kwargs)
        return result if changed is None else changed

    def around(*args: Any, **kwargs: Any) -> Any:
        return hook(original_fn, *args, **kwargs)

    return {"before": before, "after": after, "around": around, "replace": hook}[kind]


@contextmanager
def _mended_together(hook_registry: Any) -> Iterator[None]:
    """Replace the names that other modules imported from hooked ones in one walk over all modules.

    The registry walks once for each hook (``_propagate_patch``), more than a second in all. ``verify`` checks that no
    module still holds an original.
    """
    stock = hook_registry._propagate_patch
    replaced: dict[int, tuple[Any, Any, Any]] = {}

    def remember(original: Any, wrapped: Any, source_module: Any) -> int:
        replaced[id(original)] = original, wrapped, source_module
        return 0

    hook_registry._propagate_patch = remember
    try:
        yield
    finally:
        hook_registry._propagate_patch = stock
        for module, name, value in _module_attributes():
            original, wrapped, source_module = replaced.get(id(value), (None, None, None))
            if original is not None and value is original and module is not source_module:
                setattr(module, name, wrapped)


def verify(hooks: Sequence[Hook], originals: dict[str, Any]) -> None:
    """Raise :class:`HookError` unless a call of each target reaches its hook.

    ``originals``: by target, the objects before patching. No module may still hold one under any name (``from X import
    Y`` before the hook).
    """
    registry = _registry()
    problems: dict[str, str] = {}
    for hook in hooks:
        if not _is_seam(originals[hook.target]) and hook.target not in registry.HookRegistry._patched:
            problems[hook.target] = "SGLang's hook registry could not apply it, see its log above"
        elif not _reaches(_resolve(hook.target), hook.function):
            problems[hook.target] = (
                f"a call does not reach {hook.function_name}: another plugin replaced the target,"
                " or it was patched before this hook was registered"
            )
    for target, holder in _stale_bindings(originals):
        problems.setdefault(target, f"{holder} still holds the unpatched original")
    if problems:
        raise HookError(problems)


def _originals(hooks: Sequence[Hook]) -> dict[str, Any]:
    """Resolve all targets. Raises :class:`HookError` with the reason for each that does not resolve."""
    originals: dict[str, Any] = {}
    problems: dict[str, str] = {}
    for target in dict.fromkeys(hook.target for hook in hooks):
        try:
            originals[target] = _resolve(target)
        except Exception as error:  # importing SGLang's module may raise anything
            problems[target] = f"{type(error).__name__}: {error}"
    if problems:
        raise HookError(problems)
    return originals


def _resolve(target: str) -> Any:
    """Return the function or class at ``target``, without a classmethod or staticmethod around it."""
    owner_path, name = target.rsplit(".", 1)
    owner = pkgutil.resolve_name(owner_path)
    held = vars(owner).get(name, None)
    return held.__func__ if isinstance(held, (classmethod, staticmethod)) else getattr(owner, name)


def _reaches(function: Any, wanted: Callable) -> bool:
    """Return whether a call of ``function`` reaches ``wanted``.

    Follows the variables that the registry's ``_wrap_fn`` and ours close over: ``hook``, and ``original_fn`` unless the
    wrapper replaces it. So a hook of ours beneath another plugin's replacement is not found, as it is not called.
    """
    while function is not wanted:
        if _is_seam(function):
            function = getattr(function, _HOOKED)
            continue
        if not isinstance(function, types.FunctionType):
            return False
        cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
        if "hook" in cells and cells["hook"].cell_contents is wanted:
            return True
        function = cells["original_fn"].cell_contents if "original_fn" in cells else None
    return True


def _stale_bindings(originals: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield (target, "module.name") for each module attribute that is still an unpatched original."""
    target_of = {id(value): target for target, value in originals.items() if _resolve(target) is not value}
    for module, name, value in _module_attributes():
        if id(value) in target_of:
            yield target_of[id(value)], f"{module.__name__}.{name}"


def _module_attributes() -> Iterator[tuple[types.ModuleType, str, Any]]:
    for module in list(sys.modules.values()):
        if isinstance(module, types.ModuleType):
            for name, value in list(vars(module).items()):
                yield module, name, value
