"""Read YAML files and command-line overrides into nested dataclasses, and name every mistake.

A schema is a dataclass. `key` makes its fields, and `section` makes a field from another schema. The full
name of a key is dotted ("algo.lr"). One `ConfigError` reports all mistakes, a line each, with file, line, full
key, wrong value and remedy.

Several versions of a program may share a schema. A key declares from which version on it works. `load`
refuses it in an earlier version, which would ignore it.
"""

import dataclasses
import difflib
import json
import math
import os.path
import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import yaml

from pi0.base.errors import InputError

Schema = TypeVar("Schema")
# A type of keys: text with a slash, so that it is no word of a `Literal` beside it.
SlashedPath = typing.NewType("SlashedPath", str)


class ConfigError(InputError, ValueError):
    """A configuration cannot be run; the message has one line for each mistake."""


def key(
    default: Any,
    doc: str,
    *,
    unit: str = "",
    low: float | None = None,
    above: float | None = None,
    high: float | None = None,
    since: int | None = None,
    before: Any = MISSING,
    fixed: bool = False,
    path: bool = False,
) -> Any:
    """A field of the schema.

    Args:
        default: the value if none is given; `MISSING` if a value is required.
        doc: what the key means.
        unit: what its number counts or measures.
        low, high: ends of the range, included.
        above: lower end of the range, not included.
        since: first version of the program that reads the key; None: that of its section, or all versions.
        before: the value for which a later version does what earlier versions do.
        fixed: a resumed run must keep the value that it started with.
        path: it names a file or folder, or several, so a leading ~ means the home.
    """
    metadata = {
        "doc": doc,
        "unit": unit,
        "low": low,
        "above": above,
        "high": high,
        "since": since,
        "before": before,
        "fixed": fixed,
        "path": path,
    }
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def section(schema: type, *, since: int | None = None) -> Any:
    """A field that holds the keys of another schema; versions from `since` on read them."""
    return field(default_factory=schema, metadata={"since": since})


@dataclass(frozen=True)
class KeyDescription:
    """A key of a schema; `key` says what each attribute means.

    `name` is dotted ("algo.lr"). `default` is `MISSING` if a value is required. `before` is `MISSING` if no
    value stands for what earlier versions do.
    """

    name: str
    type: Any
    default: Any
    unit: str
    doc: str
    low: float | None
    above: float | None
    high: float | None
    since: int | None
    before: Any
    fixed: bool
    path: bool


def describe_keys(schema: type) -> list[KeyDescription]:
    """Every key, in the schema's order."""
    return list(_walk(schema))


def fixed_keys(schema: type) -> list[str]:
    """Names of the keys whose values a resumed run must keep, in the schema's order."""
    return [description.name for description in describe_keys(schema) if description.fixed]


def help_text(schema: type, version: str = "version {}") -> str:
    """The keys as `--help` prints them: name, type, unit, default, first version, whether fixed, meaning.

    `version` names a version, with {} for its number.
    """
    lines = ["configuration keys:"]
    for description in describe_keys(schema):
        required = description.default is MISSING
        facts = ["required" if required else f"default {show(description.default)}"]
        if description.since is not None:
            earlier = "" if description.before is MISSING else f" (before: {show(description.before)})"
            facts.append(f"from {version.format(description.since)} on{earlier}")
        if description.fixed:
            facts.append("fixed on resume")
        unit = f" ({description.unit})" if description.unit else ""
        lines += [
            f"  {description.name}: {_type_name(description.type)}{unit}, {', '.join(facts)}",
            f"      {description.doc}",
        ]
    return "\n".join(lines)


def load(
    schema: type[Schema],
    path: str | Path,
    overrides: Sequence[str] = (),
    profiles: Mapping[str, Mapping[str, Any]] | None = None,
    *,
    running: int | None = None,
    version: str = "version {}",
) -> Schema:
    """Read a YAML file and apply `overrides` ("training.seed=3").

    Args:
        schema: the dataclass to read into.
        path: the YAML file.
        overrides: those of the command line; they win over the file.
        profiles: sets of values by dotted key. The key `profile` of the schema names one of them. The file's
            values win over the profile's.
        running: number of the running version. A key in the file or the overrides that only later versions
            read is refused, unless its value is the default or `before`. None: no key is refused.
        version: name of a version, with {} for its number.
    Raises:
        ConfigError: the file cannot be read, or a key is unknown, duplicate, missing or refused, or a value is
            invalid.
    """
    keys = {description.name: description for description in describe_keys(schema)}
    given = _Given(path, list(keys))
    given.read_file()
    for override in overrides:
        given.read_override(override)
    # The command line may name the profile, so its values can be filled in only now.
    requested = set(given.values)
    profile = given.values.get("profile")
    profile_values = (profiles or {}).get(profile, {}) if isinstance(profile, str) else {}
    for name, value in profile_values.items():
        given.values.setdefault(name, value)
        given.origins.setdefault(name, f"profile {profile}")

    for name in [name for name in given.values if name not in keys]:
        given.problem(name, given.values.pop(name), _unknown(name, keys))
    for name, description in keys.items():
        if description.default is MISSING and name not in given.values:
            given.problems.append(f"{path}: {name} is missing: {description.doc}")
    for name, value in given.values.items():
        # A profile serves all versions, so its values are not requests of the user.
        asked = running if name in requested else None
        if problem := _refused(value, keys[name], asked, version) or _unfit(value, keys[name]):
            given.problem(name, value, problem)
    if given.problems:
        raise ConfigError("\n".join(given.problems))
    for name, value in given.values.items():
        if keys[name].path and isinstance(value, str):
            given.values[name] = os.path.expanduser(value)
        elif keys[name].path and isinstance(value, list):
            given.values[name] = [os.path.expanduser(each) for each in value]
    return _build(schema, given.values)


def unfit_values(config: Any) -> list[str]:
    """Wrong types and ranges in a configuration that code has made, a line each."""
    problems = []
    for description in describe_keys(type(config)):
        value = config
        for part in description.name.split("."):
            value = getattr(value, part)
        if unfit := _unfit(value, description):
            problems.append(f"{description.name} = {show(value)}: {unfit}")
    return problems


def out_of_range(
    number: float, low: float | None = None, above: float | None = None, high: float | None = None
) -> str | None:
    """Why a number is out of a range as `key` takes it, or None."""
    if not math.isfinite(number):
        return "expected a finite number"
    if low is not None and number < low:
        return f"must be {low} or more"
    if above is not None and number <= above:
        return f"must be above {above}"
    if high is not None and number > high:
        return f"must be {high} or less"
    return None


def show(value: Any) -> str:
    """A value as YAML spells it."""
    return json.dumps(value, ensure_ascii=False, default=repr)


_INT, _FLOAT, _MERGE = (f"tag:yaml.org,2002:{name}" for name in ("int", "float", "merge"))


class _Loader(yaml.SafeLoader):
    """Numbers are what people write: 1e-4 is one, and 0100 and 1:30 are none. In YAML 1.1 they are 64 and 90."""

    yaml_implicit_resolvers: ClassVar = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag not in (_INT, _FLOAT)]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver(_INT, re.compile(r"[-+]?(0|[1-9][0-9_]*)$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    _FLOAT,
    re.compile(r"[-+]?((\d+\.\d*|\.\d+)([eE][-+]?\d+)?|\d+[eE][-+]?\d+|\.(inf|Inf|INF))$|\.(nan|NaN|NAN)$"),
    list("-+.0123456789"),
)


class _Given:
    """Values by dotted key from file and overrides, the origin of each, and the mistakes so far."""

    def __init__(self, path: str | Path, keys: Sequence[str]) -> None:
        self.path = Path(path)
        self.keys = keys
        self.values: dict[str, Any] = {}
        self.origins: dict[str, str] = {}
        self.problems: list[str] = []

    def problem(self, name: str, value: Any, text: str) -> None:
        self.problems.append(f"{self.origins[name]}: {name} = {show(value)}: {text}")

    def read_file(self) -> None:
        try:
            text = self.path.read_text(encoding="utf-8")
        except FileNotFoundError:
            there = ", ".join(sorted(str(other) for other in self.path.parent.glob("*.yaml")))
            raise ConfigError(f"{self.path}: no such file; there are: {there or 'no YAML files'}") from None
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{self.path}: cannot be read: {error}") from None
        try:
            loader = _Loader(text)
            root = loader.get_single_node()
        except yaml.YAMLError as error:
            raise ConfigError(f"{self.path}: not valid YAML: {_one_line(error)}") from None
        if root is None:
            return
        if not isinstance(root, yaml.MappingNode):
            raise ConfigError(f"{self.path}: expected lines of 'key: value' at the top level")
        self._take(loader, root, "", None)

    def read_override(self, override: str) -> None:
        origin = f"--override {override}"
        name, equals, text = override.partition("=")
        name = name.strip()
        if not (name and equals):
            self.problems.append(f"{origin}: expected key=value, for example algo.lr=2e-5")
            return
        try:
            loader = _Loader(text)
            node = loader.get_single_node() or yaml.ScalarNode("tag:yaml.org,2002:null", "")
        except yaml.YAMLError as error:
            self.problems.append(f"{origin}: not a YAML value: {_one_line(error)}")
        else:
            self._take(loader, node, name, origin)

    def _take(self, loader: _Loader, node: yaml.Node, name: str, override: str | None) -> None:
        """Store the leaves below `node`; a mapping is a section, and an empty section has no leaf."""
        origin = override or f"{self.path}:{node.start_mark.line + 1}"
        if not isinstance(node, yaml.MappingNode):
            try:
                value = loader.construct_object(node, deep=True)
            except (yaml.YAMLError, ValueError) as error:
                self.problems.append(f"{origin}: {name}: not a YAML value: {_one_line(error)}")
                return
            if not override and name in self.values:  # as "algo.lr" and as "lr" below "algo"
                self.problems.append(
                    f"{origin}: {name} is given twice, first in {self.origins[name]}; remove one"
                )
            elif value is not None or override or not _is_section(name, self.keys):
                self.values[name] = value
                self.origins[name] = origin
            return
        lines: dict[str, int] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag == _MERGE:
                what = "<<" if key_node.tag == _MERGE else "a key that is a list or a mapping"
                self.problems.append(
                    f"{override or f'{self.path}:{line}'}: {what} cannot be used here; write the keys out"
                )
                continue
            child = f"{name}.{key_node.value}" if name else str(key_node.value)
            if child in lines:
                where = override or f"{self.path}:{line}"
                self.problems.append(
                    f"{where}: {child} is given twice, first in line {lines[child]}; remove one"
                )
                continue
            lines[child] = line
            self._take(loader, value_node, child, override)


def _walk(schema: type, prefix: str = "", since: int | None = None) -> Iterator[KeyDescription]:
    hints = typing.get_type_hints(schema)
    for entry in dataclasses.fields(schema):
        name, hint = f"{prefix}{entry.name}", hints[entry.name]
        metadata = dict(entry.metadata)
        if metadata.get("since") is None:
            metadata["since"] = since
        if dataclasses.is_dataclass(hint):
            yield from _walk(typing.cast(type, hint), f"{name}.", metadata["since"])
        else:
            default = entry.default if entry.default_factory is MISSING else entry.default_factory()
            yield KeyDescription(name=name, type=hint, default=default, **metadata)


def _build(schema: Any, values: Mapping[str, Any], prefix: str = "") -> Any:
    hints = typing.get_type_hints(schema)
    arguments: dict[str, Any] = {}
    for entry in dataclasses.fields(schema):
        name, hint = f"{prefix}{entry.name}", hints[entry.name]
        if dataclasses.is_dataclass(hint):
            arguments[entry.name] = _build(hint, values, f"{name}.")
        elif name in values:
            # "lr: 1" means 1.0.
            arguments[entry.name] = float(values[name]) if hint is float else values[name]
    return schema(**arguments)


def _is_section(name: str, keys: Iterable[str]) -> bool:
    return any(other.startswith(f"{name}.") for other in keys)


def _unknown(name: str, keys: Mapping[str, KeyDescription]) -> str:
    if _is_section(name, keys):
        example = next(other for other in keys if other.startswith(f"{name}."))
        return f"{name} is a section; set its keys, such as {example}"

    def likeness(other: str) -> float:
        leaf, other_leaf = (full.rpartition(".")[2] for full in (name, other))
        ratios = [
            difflib.SequenceMatcher(None, *pair).ratio() for pair in ((name, other), (leaf, other_leaf))
        ]
        # The right leaf in the wrong section is nearer than a similar leaf in the right one. So is a key whose
        # documentation uses these words: "learning_rate" is `algo.lr`.
        return sum(ratios) + 2 * (leaf == other_leaf) + (leaf.replace("_", " ") in keys[other].doc)

    return f"unknown key; the nearest one is {max(keys, key=likeness)}"


def _refused(value: Any, description: KeyDescription, running: int | None, version: str) -> str | None:
    """Why version `running` cannot do what a value requests, or None."""
    if running is None or description.since is None or running >= description.since:
        return None
    if value == description.default or value == description.before:
        return None
    first = version.format(description.since)
    return f"works from {first} on, and this is {version.format(running)}; remove it, or run {first}"


def _unfit(value: Any, description: KeyDescription) -> str | None:
    """Why a value is invalid for a key, or None."""
    if not _fits(value, description.type):
        got = "null" if value is None else type(value).__name__
        return f"expected {_type_name(description.type)}, got {got}"
    numbers = [each for each in (value if isinstance(value, list) else [value]) if _is_number(each)]
    for number in numbers:
        if problem := out_of_range(number, description.low, description.above, description.high):
            return problem
    return None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _fits(value: Any, hint: Any) -> bool:
    origin = typing.get_origin(hint)
    if origin is Literal:
        return isinstance(value, str) and value in typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, each) for each in typing.get_args(hint))
    if origin is list:
        return isinstance(value, list) and all(_fits(each, typing.get_args(hint)[0]) for each in value)
    if hint is float:
        return _is_number(value)
    if hint is SlashedPath:
        return isinstance(value, str) and "/" in value
    # bool is a subclass of int, but "true" is not a number.
    return type(value) is hint


def _type_name(hint: Any) -> str:
    origin = typing.get_origin(hint)
    if origin is Literal:
        return " or ".join(typing.get_args(hint))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_type_name(each) for each in typing.get_args(hint))
    if origin is list:
        return f"list of {_type_name(typing.get_args(hint)[0])}"
    names = {type(None): "null", SlashedPath: "a path with a slash"}
    return names.get(hint) or hint.__name__


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
