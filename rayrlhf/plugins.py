"""Plugin resolution: from a name in a config file to a function or class.

A name is a registered name (`gsm8k`), `module:attribute` (`my_package.rewards:judge`) or `path/to/file.py:attribute`. Paths are
relative to the working directory. Each kind of plugin has one `Registry`. Names are resolved in the process that uses them.

A file is imported under a private module name. Its folder is not put on `sys.path`, so a user's `random.py` shadows no import.
"""

import difflib
import hashlib
import importlib
import importlib.machinery
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any, Generic, TypeVar, cast

from rayrlhf.errors import UserError

Plugin = TypeVar("Plugin")
Value = TypeVar("Value")
PLUGIN_FILES: set[str] = set()
"""Files, and folders of packages, of the modules that plugins were imported from."""


class Registry(Generic[Plugin]):
    """Names of one kind of plugin.

    Args:
        kind: begins every error message, for example `reward function` or `environment.name`.
        built_in: name -> plugin, or `module:attribute` to import on first use.
        noun: term for a plugin in error messages, for example `function`.
        accepts: returns False for an object that cannot be a plugin of this kind.
    """

    def __init__(
        self,
        kind: str,
        built_in: Mapping[str, str | Plugin],
        noun: str = "function",
        accepts: Callable[[Any], bool] = callable,
    ) -> None:
        self.kind = kind
        self.built_in = built_in
        self._noun = noun
        self._accepts = accepts
        self._registered: dict[str, Plugin] = {}

    @property
    def names(self) -> list[str]:
        """Built-in and registered names, sorted."""
        return sorted({*self.built_in, *self._registered})

    def register(self, name: str) -> Callable[[Value], Value]:
        """Register the decorated plugin under a short name. Running the same definition again replaces it.

        Raises:
            UserError: the name is taken by another plugin, or is not a plain word.
        """
        if not name.replace("_", "").replace("-", "").isalnum():
            raise UserError(f"{self.kind} name {name!r}: use letters, digits, '_' and '-' only")

        def decorate(plugin: Value) -> Value:
            taken = self._registered.get(name)
            if name in self.built_in or (taken is not None and _definition(taken) != _definition(plugin)):
                owner = self.built_in.get(name) or ":".join(_definition(taken))
                raise UserError(f"{self.kind} name {name!r} is taken by {owner}: register yours under another name")
            self._registered[name] = cast(Plugin, plugin)
            return plugin

        return decorate

    def resolve(self, name: str, kind: str | None = None) -> Plugin:
        """Return the plugin with a name; `kind` replaces the registry's own in messages.

        Raises:
            UserError: nothing has that name (the message gives the nearest valid one), its module cannot be imported, or the
                object is no plugin of this kind.
        """
        if name in self._registered:
            return self._registered[name]
        kind = kind or self.kind
        target = self.built_in.get(name, name)
        if not isinstance(target, str):
            return target
        source, colon, attribute = target.rpartition(":")
        if not colon:
            raise UserError(
                f"{kind} {name!r} is not registered{did_you_mean(name, self.names)}; "
                f"known are {', '.join(self.names) or 'none'}, or give module:attribute or path/to/file.py:attribute"
            )
        where = f"{kind} {name!r}"
        module = import_file(Path(source), where) if source.endswith(".py") else _import_module(source, where)
        if not hasattr(module, attribute):
            candidates = [key for key, value in vars(module).items() if self._accepts(value) and not key.startswith("_")]
            raise UserError(f"{where}: {source} has no {self._noun} {attribute!r}{did_you_mean(attribute, candidates)}")
        plugin = getattr(module, attribute)
        if not self._accepts(plugin):
            found = "another class" if inspect.isclass(plugin) else f"of type {type(plugin).__name__}"
            raise UserError(f"{where}: {attribute!r} is {found}, expected a {self._noun}")
        return cast(Plugin, plugin)


def bind_arguments(
    where: str, function: Callable[..., Value], arguments: Mapping[str, Any], positional: int = 0
) -> Callable[..., Value]:
    """Bind configured keyword arguments to a plugin.

    Args:
        where: begins the error message.
        function: function or class of the plugin.
        arguments: `arguments` of its config section.
        positional: number of positional arguments that its caller passes.

    Raises:
        UserError: an argument is unknown or missing.
    """
    try:
        signature = inspect.signature(function)
    except ValueError:  # a builtin of C code, such as torch.abs, has none
        return partial(function, **arguments)
    parameters = list(signature.parameters.values())
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        settable = [p.name for p in parameters[positional:] if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        for argument in arguments:
            if argument not in settable:
                hint = did_you_mean(argument, settable) or f"; expected {', '.join(settable) or 'none'}"
                raise UserError(f"{where} takes no argument {argument!r}{hint}")
    try:
        signature.bind(*[None] * positional, **arguments)
    except TypeError as error:
        raise UserError(f"{where}: arguments do not fit: {error}") from error
    return partial(function, **arguments)


def check_methods(where: str, plugin: object, names: Iterable[str]) -> None:
    """Check that a class has the members of its protocol.

    Raises:
        UserError: one is missing; the message names it.
    """
    for name in names:
        if not hasattr(plugin, name):
            raise UserError(f"{where}: {getattr(plugin, '__name__', plugin)} needs a method {name!r}")


class _SourceLoader(importlib.machinery.SourceFileLoader):
    """Loader that compiles the current source.

    Bytecode caches compare size and whole seconds only, and would lie in the user's folder.
    """

    def get_code(self, fullname: str) -> CodeType | None:
        return self.source_to_code(self.get_data(self.path), self.path)


def import_file(path: Path, where: str) -> ModuleType:
    """Import a Python file under a private name derived from its path and content.

    An unchanged file is imported once per process, an edited one again.

    Args:
        path: the file.
        where: begins the error message.

    Raises:
        UserError: the file is missing or raises when imported.
    """
    if not path.is_file():
        raise UserError(f"{where}: {path}: no such file (working directory {Path.cwd()})")
    digest = hashlib.sha256(str(path.resolve()).encode() + b"\0" + path.read_bytes()).hexdigest()[:16]
    private_name = f"_rayrlhf_plugin_{digest}"
    if private_name in sys.modules:
        return sys.modules[private_name]
    spec = importlib.util.spec_from_file_location(
        private_name, path.resolve(), loader=_SourceLoader(private_name, str(path.resolve()))
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Listed while it runs, like any module: dataclasses and pickle look their module up by name.
    sys.modules[private_name] = module
    try:
        spec.loader.exec_module(module)
    except UserError:
        del sys.modules[private_name]
        raise
    except Exception as error:
        del sys.modules[private_name]
        raise _import_error(where, str(path), error) from error
    return module


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return `; did you mean 'x'?` for the nearest known name, or an empty string."""
    nearest = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {nearest[0]!r}?" if nearest else ""


def _import_module(name: str, where: str) -> ModuleType:
    try:
        module = importlib.import_module(name)
    except UserError:
        raise
    except Exception as error:
        raise _import_error(where, repr(name), error) from error
    file = getattr(module, "__file__", None)
    if file and not name.startswith("rayrlhf."):
        PLUGIN_FILES.add(file.removesuffix("__init__.py"))
    return module


def _import_error(where: str, source: str, error: Exception) -> UserError:
    text = " ".join(str(error).split())
    return UserError(f"{where}: {source} cannot be imported: {type(error).__name__}: {text}")


def _definition(plugin: object) -> tuple[str, str]:
    """File and qualified name of a plugin; equal for two runs of the same definition."""
    file = getattr(getattr(plugin, "__code__", None), "co_filename", None)
    if file is None:
        module = getattr(plugin, "__module__", "")
        file = getattr(sys.modules.get(module), "__file__", None) or repr(plugin)
    return str(file), str(getattr(plugin, "__qualname__", ""))
