"""The types of a spec file, checked by pydantic.

For each dataclass of spec.py a pydantic model is derived with the same fields, and
builds it. The dataclass stays the only place where fields, defaults and rules stand;
pydantic adds types, places, and all problems at once. Loading this module loads
pydantic, so toml.py imports it inside its functions.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from dataclasses import MISSING, fields, is_dataclass
from enum import Enum
from functools import cache
from types import NoneType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    Strict,
    TypeAdapter,
    ValidationError,
    create_model,
)
from pydantic_core import ErrorDetails

from isoflop.arch import spec
from isoflop.arch.rules import LARGEST_SIZE
from isoflop.arch.spec import Arch, Head, Layer
from isoflop.arch.toml import layers_from
from isoflop.errors import InputError, Problem, nearest

CONFIG = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

#: What pydantic's kinds of error mean in our words.
RULES = {
    "missing": "is given",
    "int_type": "is a whole number",
    "int_from_float": "is a whole number",
    "int_parsing_size": "is a whole number of sensible length",
    "float_type": "is a number",
    "finite_number": "is a finite number",
    "bool_type": "is true or false",
    "string_type": "is text",
    "tuple_type": "is a list",
    "list_type": "is a list",
    "dict_type": "is a table",
    "model_type": "is a table",
    "model_attributes_type": "is a table",
}


class _RulesError(ValueError):
    """Carries an `InputError` through pydantic, which keeps ValueErrors with their place."""

    def __init__(self, error: InputError) -> None:
        self.error = error
        super().__init__(str(error))


def build(document: dict[str, Any], where: str) -> Arch:
    """The `Arch` that a parsed spec file describes.

    Raises:
        InputError: all problems of the document, each with its path.
    """
    try:
        arch: Arch = adapter().validate_python(document)
    except ValidationError as error:
        details = error.errors(include_url=False)
        problems = [problem for detail in details for problem in _problems(detail, document)]
        raise InputError(where, problems) from None
    return arch


@cache
def adapter() -> TypeAdapter[Arch]:
    """The validator of a whole spec file; `adapter().json_schema()` is its JSON Schema."""
    return TypeAdapter(_boundary(Arch))


# --- from dataclasses to pydantic -------------------------------------------------------


@cache
def _boundary(cls: type) -> Any:
    """A type for pydantic that reads a table and gives the dataclass `cls`."""
    hints = get_type_hints(cls)
    members: dict[str, Any] = {
        field.name: (_translate(hints[field.name]), _default(field.default))
        for field in fields(cls)
    }
    if "layers" in members:
        members |= _stack()
    if cls is Layer:
        del members["name"]  # the section's name says it
    if cls is Arch:
        members["head"] = (_boundary(Head), Head())
    model: Any = create_model(cls.__name__, __config__=CONFIG, **members)
    built: Any = Annotated[model, AfterValidator(_builder(cls))]
    return Annotated[built, BeforeValidator(_with_rows)] if cls is Arch else built


def _default(default: Any) -> Any:
    return ... if default is MISSING else default


def _stack() -> dict[str, Any]:
    """How `layers: tuple[Layer, ...]` is said in a file."""
    layer: Any = _boundary(Layer)
    return {
        "n_layers": (int, ...),
        "layer": (layer | None, None),
        "layers": (dict[str, layer], {}),
        "pattern": (list[str] | None, None),
    }


def _translate(hint: Any) -> Any:
    """A field's type as pydantic should read it from TOML."""
    if isinstance(hint, type) and is_dataclass(hint):
        return _boundary(hint)
    if isinstance(hint, type) and issubclass(hint, Enum):
        return Annotated[hint, Strict(False)]  # from its word
    if get_origin(hint) is tuple:
        numbers = not {float, int}.isdisjoint(get_args(hint))
        return Annotated[hint, Strict(False)] if numbers else Any
    if get_origin(hint) in (Union, types.UnionType):
        return _union(list(get_args(hint)))
    return hint


def _union(members: list[Any]) -> Any:
    """A union chosen by `kind`; where it may be absent, the word "none" says so."""
    present = [_translate(member) for member in members if member is not NoneType]
    tagged = len(present) > 1 and all(is_dataclass(m) for m in members if m is not NoneType)
    chosen: Any = Union[tuple(present)]  # noqa: UP007 - the members are known at run time only
    if tagged:
        chosen = Annotated[chosen, Field(discriminator="kind")]
    if NoneType not in members:
        return chosen
    return Annotated[chosen | None, BeforeValidator(_none_from_word)]


def _none_from_word(value: object) -> object:
    return None if value == "none" else value


def _builder(cls: type) -> Callable[[BaseModel], Any]:
    def build_one(model: BaseModel) -> Any:
        values = {name: getattr(model, name) for name in type(model).model_fields}
        try:
            if "layers" in values:
                stack = [values.pop(name) for name in ("n_layers", "layer", "layers", "pattern")]
                values["layers"] = layers_from(*stack)
            return cls(**values)
        except InputError as error:
            raise _RulesError(error) from None

    return build_one


def _with_rows(document: Any) -> Any:
    """An embedding has as many rows as the vocabulary where the file does not say."""
    given = document.get("embedding", {}) if isinstance(document, dict) else None
    if not isinstance(given, dict):
        return document
    size = document.get("vocab_size")
    # Where the vocabulary's size is itself wrong, that is reported once, at its own place.
    right = isinstance(size, int) and not isinstance(size, bool) and 1 <= size <= LARGEST_SIZE
    return {**document, "embedding": {"n_rows": size if right else LARGEST_SIZE, **given}}


# --- from pydantic's errors to problems -------------------------------------------------


def _problems(detail: ErrorDetails, document: dict[str, Any]) -> Iterator[Problem]:
    path = _path(detail["loc"], document)
    kind, value, context = detail["type"], detail["input"], detail.get("ctx", {})
    broken = context.get("error")
    if isinstance(broken, _RulesError):
        for problem in broken.error.problems:
            field = ".".join(filter(None, (path, problem.field)))
            yield Problem(field, problem.value, problem.rule, problem.hint)
    elif kind == "missing":
        yield Problem(path, "nothing", "is given")
    elif kind == "extra_forbidden":
        yield Problem(path, value, "is a known field", _near(path.rpartition(".")[2]))
    elif kind in ("union_tag_invalid", "union_tag_not_found"):
        tags = context.get("expected_tags", "")
        given = value.get("kind", "nothing") if isinstance(value, dict) else value
        yield Problem(f"{path}.kind", given, f"is one of {tags}" if tags else "is given")
    elif "expected" in context:
        yield Problem(path, value, f"is {context['expected']}")
    else:
        value = f'"{value}"' if isinstance(value, str) else value
        yield Problem(path, value, RULES.get(kind, detail["msg"]))


def _path(loc: tuple[int | str, ...], document: Any) -> str:
    """The place as a path; the tags that pydantic adds for unions are no part of it."""
    kept: list[str] = []
    here = document
    for part in loc:
        if isinstance(here, dict) and part not in here and here.get("kind") == part:
            continue
        kept.append(str(part))
        inside = isinstance(here, dict) and part in here
        here = here[part] if inside else None
    return ".".join(kept)


def _near(name: str) -> str:
    """Where a field belongs that was not expected here, or the names near it."""
    homes: dict[str, list[str]] = {}
    for cls in vars(spec).values():
        if isinstance(cls, type) and is_dataclass(cls):
            for field in fields(cls):
                homes.setdefault(field.name, []).append(cls.__name__)
    if name in homes:
        return f"it is a field of {' and '.join(homes[name])}"
    near = nearest(name, [*homes, "n_layers", "pattern", "layer"])
    return f"did you mean {' or '.join(near)}?" if near else ""
