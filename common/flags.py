"""Types and ranges of the values of flags, declared where the flag is.

    @dataclass
    class Args:
        meta_steps: Count = 100
        gamma: Share = 0.99
        sizes: tuple[Side, ...] = ()

    check_ranges(tyro.cli(Args))      # --gamma nan: "--gamma has to be from 0 to 1, not nan."
    args = from_dict(Args, asdict(args))

A range is the (low, high) in an Annotated, both ends included. A number that is not finite is in
none.
"""

from dataclasses import is_dataclass
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

Seed = Annotated[int, (0, 2**32 - 1)]
Count = Annotated[int, (1, 2**31)]
CountOrZero = Annotated[int, (0, 2**31)]
Size = Annotated[int, (1, 2**16)]  # of networks, rollouts and batches
Side = Annotated[int, (1, 1024)]  # of an image, in pixels
Share = Annotated[float, (0, 1)]
Positive = Annotated[float, (1e-12, 1e30)]
PositiveOrZero = Annotated[float, (0, 1e30)]
Real = Annotated[float, (-1e30, 1e30)]


class FlagError(Exception):
    """A flag out of its range, or empty; the message is one sentence that names it."""


def check_ranges(args: Any, prefix: str = "--") -> None:
    """Raises FlagError at the first number of a dataclass that is out of the range that its
    annotation has, and at text that is empty, as that of a variable that a shell does not know.

    Tuples are checked number by number, nested dataclasses flag by flag.
    """
    for name, hint in get_type_hints(type(args), include_extras=True).items():
        flag = prefix + name.replace("_", "-")
        value = getattr(args, name)
        if is_dataclass(value):
            check_ranges(value, flag + ".")
        if value == "":
            raise FlagError(f"{flag} is empty; give it a value or leave it out.")
        for low, high in ranges(hint):
            for number in value if isinstance(value, tuple) else (value,):
                if isinstance(number, int | float) and not low <= number <= high:
                    raise FlagError(f"{flag} has to be from {low} to {high}, not {number}.")


def from_dict(kind: type, values: dict[str, Any]) -> Any:
    """The dataclass `kind` with these values of its flags, in which nested dataclasses may be dicts too.
    Raises TypeError for flags that it does not have, and for values of another type than the
    annotation's."""
    hints = get_type_hints(kind, include_extras=True)
    nested = [name for name, value in values.items() if isinstance(value, dict) and is_dataclass(hints.get(name))]
    args = kind(**values | {name: from_dict(hints[name], values[name]) for name in nested})
    for name, hint in hints.items():
        if not _is_of(getattr(args, name), hint):
            raise TypeError(f"{name} is not of type {hint}")
    return args


def _is_of(value: Any, hint: Any) -> bool:
    """Whether a value has the type of an annotation. Whole numbers are floats too, but not bools."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _is_of(value, parts[0])
    if origin in (Union, UnionType):
        return any(_is_of(value, part) for part in parts)
    if origin is Literal:
        return any(type(value) is type(part) and value == part for part in parts)
    if origin is tuple:
        several = isinstance(value, tuple) and parts[-1] is ...
        parts = parts[:1] * len(value) if several else parts
        return isinstance(value, tuple) and len(value) == len(parts) and all(map(_is_of, value, parts))
    return type(value) is hint or (hint is float and type(value) is int)


def ranges(hint: Any) -> list[tuple[float, float]]:
    """The ranges in an annotation, however deep they are nested in it."""
    inner = [pair for part in get_args(hint) for pair in ranges(part)]
    return [*getattr(hint, "__metadata__", ()), *inner]
