"""Objects of another process: a connection that carries values, calls and exceptions.

It imports only the standard library, because it runs in the sandbox. Values of built-in types cross as copies, and lists,
dicts and sets given as arguments receive the changes that a call made. Objects of other classes remain with their process,
which has a proxy:

- It equals only other proxies, for any `__eq__` of the object. An operator between a proxy and a value may return a
  proxy but no plain value, because the value may show the expected result. What follows from a difference stays a proxy too:
  `abs(proxy - 5)` is no number.
- With `open_names` false, the other process calls functions and uses objects of this one that it was given, but no names that
  start with an underscore, no modules and frames, and nothing that it names itself.
"""

import builtins
import collections
import datetime
import decimal
import fractions
import functools
import importlib
import json
import math
import operator
import sys
import types
from collections.abc import Callable, Iterable
from typing import Any, BinaryIO

MESSAGE_BYTES = 2**26
"""Maximum length of one message."""
_NAMED = "abc bisect builtins cmath collections copy dataclasses datetime decimal enum fractions functools heapq itertools "
LIBRARY = frozenset((_NAMED + "json math operator random re statistics string typing").split())
"""Modules whose functions and classes are named, not called, across processes."""
_CODE = ("breakpoint", "compile", "eval", "exec", "input", "open")
_NAMES = ("delattr", "globals", "locals", "setattr", "vars")
"""Built-in functions that a result of the other process cannot be with `open_names` false."""
_DIFFERENCES = ("sub", "xor")
_BASES: tuple[type, ...] = (int, float, str, list, tuple, dict, set, frozenset)
_CHANGING = (list, dict, set, bytearray)
_HIDDEN = (types.ModuleType, types.FrameType, types.CodeType, types.TracebackType)
_BINARY = ("add", "sub", "mul", "matmul", "truediv", "floordiv", "mod", "pow", "and_", "or_", "xor", "lshift", "rshift")
_COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge")
_BUILT_IN = ("len", "iter", "next", "bool", "str", "repr", "int", "float", "complex", "abs", "round", "hash", "reversed", "dir")
_foreign: set[type] = set()
"""Classes made here for objects of the other process."""
_ITEMS = ("getitem", "setitem", "delitem", "neg", "pos", "invert", "index")
OPERATIONS: dict[str, Callable[..., Any]] = {
    **{name: getattr(operator, name) for name in (*_BINARY, *_COMPARISONS, *_ITEMS)},
    **{name: getattr(builtins, name) for name in _BUILT_IN},
    "await": lambda coroutine: importlib.import_module("asyncio").run(coroutine),
    "isinstance": lambda kind, value: isinstance(value, kind),
    "enter": lambda value: type(value).__enter__(value),
    "exit": lambda value, *error: type(value).__exit__(value, *error),
}
_DAY = ("year", "month", "day")
_COLLECTIONS = {kind.__name__: kind for kind in (list, tuple, set, frozenset, dict, collections.deque)}
_TEXTS: dict[type, tuple[Callable[[Any], str], Callable[[str], Any]]] = {
    int: (hex, lambda text: int(text, 16)),
    float: (repr, float),
    bytes: (bytes.hex, bytes.fromhex),
    bytearray: (bytearray.hex, bytearray.fromhex),
    decimal.Decimal: (str, decimal.Decimal),
}
"""Type -> conversion to text and back."""
_FIELDS: dict[type, tuple[str, ...]] = {
    complex: ("real", "imag"),
    range: ("start", "stop", "step"),
    slice: ("start", "stop", "step"),
    fractions.Fraction: ("numerator", "denominator"),
    datetime.timedelta: ("days", "seconds", "microseconds"),
    datetime.date: _DAY,
    datetime.datetime: (*_DAY, "hour", "minute", "second", "microsecond"),
}
"""Type -> attributes that its constructor takes."""


class Closed(BaseException):
    """The other process has ended, or sent something that is no message."""


class Remote:
    """Object of the other process."""

    __slots__ = ("_differs", "_link", "_number", "_stops")

    def __init__(self, link: "Link", number: int) -> None:
        object.__setattr__(self, "_link", link)
        object.__setattr__(self, "_number", number)
        object.__setattr__(self, "_differs", False)
        object.__setattr__(self, "_stops", False)

    def __call__(self, *values: object, **named: object) -> Any:
        """Call the object."""
        return _derived(self._link.call(self, values, named), self._differs)

    def __getattr__(self, name: str) -> Any:
        result = _derived(self._link.ask("get", self, name), self._differs)
        if isinstance(result, Remote):
            object.__setattr__(result, "_stops", name in ("send", "throw", "__next__"))
        return result

    def __setattr__(self, name: str, value: object) -> None:
        self._link.ask("set", self, name, value)

    def __instancecheck__(self, value: object) -> bool:
        return type(value) in (Remote, *_foreign) and bool(self._link.ask("op", "isinstance", self, value))

    def __exit__(self, kind: object, error: object, trace: object) -> Any:
        return self._link.ask("op", "exit", self, kind, error, None) and self._link.suppresses


def _derived(result: Any, differs: bool) -> Any:
    """Return a result, which must be a proxy if it follows from a difference."""
    if differs:
        if not isinstance(result, Remote):
            raise TypeError("the difference of an object of the program and a value of the tests gave a plain value")
        object.__setattr__(result, "_differs", True)
    return result


def _unary(name: str) -> Callable[..., Any]:
    return lambda self, *values: _derived(self._link.ask("op", name, self, *values), self._differs)


def _binary(name: str, *, swapped: bool) -> Callable[[Any, Any], Any]:
    def forward(self: Any, other: Any) -> Any:
        result = self._link.ask("op", name, *((other, self) if swapped else (self, other)))
        if not isinstance(other, Remote) and not isinstance(result, Remote):
            raise TypeError(f"{name} of an object of the program and a value of the tests returned a plain value")
        differs = name in _DIFFERENCES and not isinstance(other, Remote) and not self._link.open_names
        return _derived(result, self._differs or differs)

    return forward


def _comparison(name: str) -> Callable[[Any, Any], Any]:
    def compare(self: Any, other: Any) -> Any:
        if not isinstance(other, Remote):
            return NotImplemented
        return self._number == other._number if name == "eq" and self is other else self._link.ask("op", name, self, other)

    return compare


for _name in (*_BUILT_IN, *_ITEMS, "enter"):
    setattr(Remote, f"__{_name}__", _unary(_name))
for _name in _BINARY:
    setattr(Remote, f"__{_name.strip('_')}__", _binary(_name, swapped=False))
    setattr(Remote, f"__r{_name.strip('_')}__", _binary(_name, swapped=True))
for _name in _COMPARISONS:
    setattr(Remote, f"__{_name}__", _comparison(_name))


@functools.cache
def _subclass(base: type) -> type:
    """Return a subclass of a built-in type whose unknown attributes are the other process's."""
    kind = type(base.__name__, (base,), {"__getattr__": lambda self, name: self.__dict__["_link"].ask("get", self, name)})
    _foreign.add(kind)
    return kind


class Link:
    """Connection to the other process.

    Attributes:
        open_names: the other process may use all names of this one.
        names: names that the other process may ask for.
        suppresses: a context manager of the other process may end an exception.
    """

    def __init__(self, receive: BinaryIO, send: BinaryIO, *, open_names: bool) -> None:
        self._receive, self._send, self.open_names = receive, send, open_names
        self._own: list[Any] = []
        self._numbers: dict[int, int] = {}
        self._errors: dict[int, type[BaseException]] = {}
        self.names: dict[str, Any] = {}
        self.suppresses = True

    def tell(self, *message: object) -> None:
        """Send a message."""
        try:
            self._send.write(json.dumps(message).encode() + b"\n")
            self._send.flush()
        except OSError as error:
            raise Closed from error

    def hear(self) -> list[Any]:
        """Receive a message."""
        try:
            line = self._receive.readline(MESSAGE_BYTES)
            message = json.loads(line)
        except (OSError, ValueError, RecursionError, MemoryError) as error:
            raise Closed from error
        if not isinstance(message, list) or not message or not line.endswith(b"\n"):
            raise Closed
        return message

    def ask(self, *request: object) -> Any:
        """Return the other process's result of a request, and serve its requests meanwhile."""
        return self._answer(*request)[0]

    def call(self, function: object, values: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """Call a function of the other process; lists, dicts and sets receive the changes."""
        result, changes = self._answer("call", function, list(values), named)
        for index, changed in changes:
            value = values[index]
            if isinstance(value, list | bytearray):
                value[:] = changed
            elif isinstance(value, dict | set):
                value.clear()
                value.update(changed)
        return result

    def _answer(self, *request: object) -> tuple[Any, list[Any]]:
        self.tell("ask", [self.pack(part) for part in request])
        while True:
            kind, *rest = self.hear()
            try:
                if kind == "ask":
                    parts = [self.unpack(part) for part in rest[0]]
                elif kind == "value":
                    return self.unpack(rest[0]), [(int(index), self.unpack(value)) for index, value in rest[1]]
                else:
                    error = self._error(self._class(rest[0]), self.unpack(rest[1]))
            except (LookupError, TypeError, ValueError, AttributeError, RecursionError, ArithmeticError) as wrong:
                raise Closed from wrong
            if kind != "ask":
                stops = request[0] != "call" or getattr(request[1], "_stops", False)
                if isinstance(error, StopIteration) and not stops and not self.open_names:
                    raise RuntimeError("the program raised StopIteration") from error  # it would end a `map` of the tests
                raise error
            self.serve(*parts)

    @staticmethod
    def _error(kind: type[BaseException], values: Iterable[Any]) -> BaseException:
        return kind.__new__(kind, *values)

    def serve(self, *request: Any) -> None:
        """Run a request of the other process and send its result, or its exception."""
        try:
            result, changes = self._run(*request)
            reply: tuple[Any, ...] = ("value", self.pack(result), changes)
        except Closed:
            raise
        except BaseException as error:  # noqa: BLE001 - sent to the other process
            values = [value if isinstance(value, str | int | float | None) else str(type(value)) for value in error.args]
            reply = ("error", self._chain(type(error)), self.pack(values))
        self.tell(*reply)

    def _run(self, kind: str, *parts: Any) -> tuple[Any, list[Any]]:
        used = parts[1:3] if kind == "op" else parts[:1]
        if not self.open_names and not any(id(part) in self._numbers for part in used):
            raise TypeError("not an object that the program was given")
        if kind == "call":
            function, values, named = parts
            before = {index: self.pack(value) for index, value in enumerate(values) if isinstance(value, _CHANGING)}
            result = function(*values, **named)
            after = [[index, self.pack(values[index])] for index in before]
            return result, [[index, value] for index, value in after if value != before[index]]
        if kind == "op":
            return OPERATIONS[parts[0]](*parts[1:]), []
        if kind == "name" and self.open_names:
            return [parts[0] in self.names, self.names.get(parts[0])], []
        target, name, *values = parts
        if not self.open_names and (name.startswith("_") or isinstance(target, types.FunctionType | types.BuiltinFunctionType)):
            raise AttributeError(name)
        if kind == "get":
            return getattr(target, name), []
        known = getattr(type(target), name, None)
        if not self.open_names and (type(target).__module__ != "__main__" or callable(known) or hasattr(known, "__get__")):
            raise AttributeError(f"cannot set {name}")
        setattr(target, name, values[0])
        return None, []

    def pack(self, value: Any) -> Any:
        """Return a value as JSON: itself, or a list of its kind and parts."""
        kind = type(value)
        if value is None or kind in (bool, str) or (kind is int and -(2**63) < value < 2**63):
            return value
        if kind is float and math.isfinite(value):
            return value
        if kind is dict:
            return ["dict", [["tuple", [self.pack(key), self.pack(part)]] for key, part in value.items()]]
        if kind in _COLLECTIONS.values():
            return [kind.__name__, [self.pack(part) for part in value]]
        if kind in _TEXTS:
            return [kind.__name__, _TEXTS[kind][0](value)]
        if kind in _FIELDS:
            return [kind.__name__, [getattr(value, field) for field in _FIELDS[kind]]]
        if kind is Remote or kind in _foreign or (isinstance(value, type) and value in _foreign):
            return ["yours", value._number]
        return self._pack_object(value, kind)

    def _pack_object(self, value: Any, kind: type) -> Any:
        if kind.__module__ == "numpy":
            if kind.__name__ == "ndarray" and value.dtype.kind in "biufc":
                return ["array", value.dtype.str, self.pack(value.tolist())]
            if hasattr(value, "item"):
                return self.pack(value.item())
        if isinstance(value, type) and issubclass(value, BaseException):
            return ["class", self._chain(value)]
        place = _place(value)
        if place:
            return ["import", *place]
        if not self.open_names and isinstance(value, _HIDDEN):
            raise TypeError(f"a {kind.__name__} cannot be given to the program")
        number = self._numbers.setdefault(id(value), len(self._own))
        if number == len(self._own):
            self._own.append(value)
        for base in _BASES:
            if isinstance(value, base):
                return ["subclass", base.__name__, self.pack(_plain(base, value)), number]
        return ["coroutine" if kind is types.CoroutineType else "mine", number]

    def unpack(self, packed: object) -> Any:
        """Return the value of a packed one."""
        if not isinstance(packed, list):
            return packed
        kind, *parts = packed
        if kind in _COLLECTIONS:
            return _COLLECTIONS[kind](self.unpack(part) for part in parts[0])
        for known, (_, read) in _TEXTS.items():
            if kind == known.__name__:
                return read(parts[0])
        for known in _FIELDS:
            if kind == known.__name__:
                return known(*parts[0])
        if kind == "mine":
            return Remote(self, int(parts[0]))
        if kind == "coroutine":
            return self._wait(Remote(self, int(parts[0])))
        if kind == "yours":
            return self._own[int(parts[0])]
        if kind == "subclass":
            base = next(base for base in _BASES if base.__name__ == parts[0])
            value = _subclass(base)(self.unpack(parts[1]))
            value.__dict__.update(_link=self, _number=int(parts[2]))
            return value
        if kind == "import":
            if not self.open_names and parts[1] in (*_CODE, *_NAMES):
                raise ValueError(f"{parts[1]} is not shared")
            return _imported(*parts)
        if kind == "array":
            if not isinstance(parts[0], str) or parts[0][1:2] not in tuple("biufc"):
                raise ValueError(parts[0])
            return importlib.import_module("numpy").array(self.unpack(parts[1]), dtype=parts[0])
        return self._class(parts[0])

    async def _wait(self, coroutine: Remote) -> Any:
        return self.ask("op", "await", coroutine)

    def _chain(self, kind: type[BaseException]) -> list[Any]:
        """Return an exception class as [number, name] for each own base, and its library class."""
        chain: list[Any] = []
        while not _place(kind):
            number = self._numbers.setdefault(id(kind), len(self._own))
            if number == len(self._own):
                self._own.append(kind)
            chain.append([number, kind.__name__])
            kind = next((base for base in kind.__bases__ if issubclass(base, BaseException)), Exception)
        return [*chain, _place(kind)]

    def _class(self, chain: list[Any]) -> type[BaseException]:
        kind = _imported(*chain[-1])
        if not isinstance(kind, type) or not issubclass(kind, BaseException):
            raise TypeError("no exception")
        for number, name in reversed(chain[:-1]):
            if number not in self._errors:
                self._errors[number] = type(str(name), (kind,), {"_number": int(number)})
                _foreign.add(self._errors[number])
            kind = self._errors[number]
        return kind


def _plain(base: type, value: Any) -> Any:
    return {int: int.__index__, float: float.__float__, str: str.__str__}.get(base, base)(value)


def _place(value: object) -> list[str]:
    """Return module and name of a shared library object; empty for anything else."""
    if isinstance(value, types.ModuleType):
        return [value.__name__, ""]
    if not isinstance(value, type | types.FunctionType | types.BuiltinFunctionType):
        return []
    name = value.__name__
    module = str(value.__module__).removeprefix("_").split(".")[0]
    shared = module in LIBRARY and not name.startswith("_") and getattr(sys.modules.get(module), name, None) is value
    return [module, name] if shared else []


def _imported(module: str, name: str) -> Any:
    if module == "__main__" or (name and (module not in LIBRARY or name.startswith("_"))):
        raise ValueError(f"{module}.{name} is not shared")
    found = importlib.import_module(module)
    value = getattr(found, name) if name else found
    if not isinstance(value, type | types.FunctionType | types.BuiltinFunctionType | types.ModuleType):
        raise TypeError(name)
    return value
