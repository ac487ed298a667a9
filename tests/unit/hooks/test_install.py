"""Hooks take, or the start stops: with SGLang's real registry and a toy package in SGLang's place."""

import importlib
import importlib.util
import sys
from pathlib import Path

import interpreter
import pytest

from anchortp_sglang.hooks.anchortp_seam import anchortp_seam
from anchortp_sglang.hooks.install import Hook, HookError, install
from anchortp_sglang.hooks.source import fingerprint

TOY = '''
"""A module to be changed."""
import functools

def double(value):
    """Twice."""
    return 2 * value  # exactly

if functools:
    def chosen():
        return "a"
else:
    def chosen():
        return "b"

class Engine:
    ports = [1]

    def start(self, port):
        return f"started {port}"

    @classmethod
    def name(cls):
        return cls.__name__

    @staticmethod
    def version():
        return 1

class Child(Engine):
    pass
'''


@pytest.fixture
def registry(monkeypatch):
    """SGLang's registry, loaded from its file: importing it by name would import all of SGLang."""
    name = "sglang.srt.plugins.hook_registry"
    root = Path(importlib.util.find_spec("sglang").submodule_search_locations[0])
    spec = importlib.util.spec_from_file_location(name, root / "srt" / "plugins" / "hook_registry.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setitem(sys.modules, name, module)
    return module.HookRegistry


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A package ``toy`` with a module ``toy.work``, and ``toy.user`` that imported a name from it."""
    package = tmp_path / "toy"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "work.py").write_text(TOY)
    (package / "user.py").write_text("from toy.work import double\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield importlib.import_module("toy.user"), package / "work.py"
    for name in [name for name in sys.modules if name.split(".")[0] == "toy"]:
        del sys.modules[name]


def around_double(original, value):
    return original(value) + 1


def before_start(self, port):
    return (self, port + 1), {}


def after_name(result, cls):
    return result.upper()


def replace_version():
    return 2


HOOKS = (
    Hook("toy.work.double", "around", around_double, "one more"),
    Hook("toy.work.Engine.start", "before", before_start, "the next port"),
    Hook("toy.work.Engine.name", "after", after_name, "louder"),
    Hook("toy.work.Engine.version", "replace", replace_version, "newer"),
)


def kind_of(registry, value):
    return sys.modules[registry.__module__].HookType(value)


def test_every_kind_of_hook_takes_also_for_names_imported_before(registry, toy):
    user, _ = toy
    install(HOOKS)
    work = sys.modules["toy.work"]
    assert user.double(2) == 5
    assert work.Engine().start(1) == "started 2"
    assert work.Engine.name() == "ENGINE"
    assert work.Engine.version() == 2


def test_installing_the_same_table_twice_changes_nothing(registry, toy):
    install(HOOKS)
    install(HOOKS)
    assert toy[0].double(2) == 5


def test_a_hook_on_a_missing_symbol_stops_the_start_with_its_name(registry, toy):
    hooks = (
        *HOOKS,
        Hook("toy.work.halve", "around", around_double, "x"),
        Hook("toy.no.x", "after", after_name, "x"),
    )
    with pytest.raises(HookError) as error:
        install(hooks)
    assert set(error.value.problems) == {"toy.work.halve", "toy.no.x"}
    assert "toy.work.halve: AttributeError" in str(error.value)
    assert toy[0].double(2) == 4  # nothing was patched


def test_a_registry_that_swallows_a_failure_is_caught(registry, toy, monkeypatch):
    original = registry._apply_target.__func__

    def fails_once(cls, target, hooks):
        if target == "toy.work.double":
            raise RuntimeError("disk full")
        original(cls, target, hooks)

    monkeypatch.setattr(registry, "_apply_target", classmethod(fails_once))
    with pytest.raises(HookError, match=r"1 hook.*\n  toy\.work\.double: SGLang's hook registry could not"):
        install(HOOKS)


def test_a_target_patched_before_the_hook_was_registered_is_caught(registry, toy):
    registry._patched.add("toy.work.double")
    with pytest.raises(HookError, match=r"a call does not reach .*around_double"):
        install(HOOKS)


def test_a_hook_beneath_another_plugins_replacement_is_caught(registry, toy):
    ours = Hook("toy.work.double", "replace", replace_version, "ours")
    for function in (ours.function, lambda value: value):  # the last replacement wins
        registry.register(ours.target, function, kind_of(registry, "replace"))
    with pytest.raises(HookError, match="another plugin replaced the target"):
        install([ours])


def test_hooks_of_other_plugins_around_ours_are_fine(registry, toy):
    registry.register("toy.work.double", lambda original, value: -original(value), kind_of(registry, "around"))
    install(HOOKS)
    assert toy[0].double(2) == -4 + 1


def test_a_module_that_keeps_the_original_under_another_name_is_caught(registry, toy):
    work = sys.modules["toy.work"]
    work.twice = work.double  # the registry does not look for aliases in the defining module
    with pytest.raises(HookError, match=r"toy\.work\.twice still holds the unpatched original"):
        install(HOOKS)


def test_a_class_can_be_replaced(registry, toy):
    class Better:
        pass

    install([Hook("toy.work.Engine", "replace", Better, "better")])
    assert sys.modules["toy.work"].Engine is Better


@pytest.mark.parametrize(
    ("target", "kind", "why"),
    [("toy.work.double", "instead", "x"), ("double", "after", "x"), ("a.b", "after", "")],
)
def test_a_malformed_hook_is_refused_where_it_is_written(target, kind, why):
    with pytest.raises(ValueError, match="hook on"):
        Hook(target, kind, after_name, why)


def test_a_fingerprint_is_of_the_file_and_not_of_the_patched_object(registry, toy):
    before = fingerprint("toy.work.double")
    install(HOOKS)
    assert fingerprint("toy.work.double") == before


def test_a_plugin_that_comes_later_does_not_cover_a_hook_in_a_seam(registry, toy):
    work = sys.modules["toy.work"]
    work.double = anchortp_seam(work.double)
    install(HOOKS[:1])
    registry.register("toy.work.double", lambda value: -value, kind_of(registry, "replace"))
    registry.apply_hooks()
    assert work.double(2) == 5


def test_sglang_knows_the_models_of_this_package_and_a_model_that_it_lacks_is_refused():
    out = interpreter.run(
        "from anchortp_sglang.hooks.install import refuse_unknown_model, register_models",
        """
        register_models()
        register_models()
        for known in ("Gemma4TextForCausalLM", "Gemma4TextMoeForCausalLM", "LlamaForCausalLM"):
            refuse_unknown_model(known)
        try:
            refuse_unknown_model("NobodyKnowsForCausalLM")
        except ValueError as error:
            print(error)
        """,
    )
    assert out == "this SGLang has no model for NobodyKnowsForCausalLM; use one that has\n"
