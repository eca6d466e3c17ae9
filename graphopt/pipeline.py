"""Ordered, verified steps: parsed from text, TOML or Python, checked before any work, then run one by one."""

from __future__ import annotations

import operator
import shlex
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_origin

import networkx as nx

from graphopt.context import Context
from graphopt.errors import GraphoptError, ModelError, OptionError, PassError
from graphopt.model import Model
from graphopt.presets import PRESETS
from graphopt.registry import Pass, find, suggest

MAX_ROUNDS = 10  # of a preset that repeats; each round must change something, so this is a safety net, reported when met


@dataclass(frozen=True)
class Step:
    """One pass with its options, checked and typed. Steps of one `group` repeat together until none changes anything."""

    entry: Pass
    options: Mapping[str, Any] = field(default_factory=dict)
    group: str = ""

    def __str__(self) -> str:
        return " ".join([self.entry.name, *(f"{k}={shlex.quote(_as_text(v))}" for k, v in self.options.items())])


@dataclass(frozen=True)
class Rejection:
    """Matches a pass left alone: the reason, the op, how many, and one of them."""

    reason: str
    op: str
    count: int
    example: str


@dataclass(frozen=True)
class StepResult:
    """What one run of one pass did."""

    name: str
    options: Mapping[str, Any]
    changes: int
    seconds: float
    nodes: int
    rejected: tuple[Rejection, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)


Hook = Callable[[Model, Step, StepResult], None]


def parse(passes: str | Iterable[str | tuple[str, Mapping[str, Any]]]) -> list[Step]:
    """Steps from `"cleanup, prune-channels ratio=0.3, quantize"`, or from names and (name, options) pairs.

    Presets are expanded in place. Raises OptionError on unknown names, unknown or badly typed options, and illegal orders.
    """
    items = _split(passes) if isinstance(passes, str) else [_pair(p) for p in passes]
    steps = [step for number, (name, options) in enumerate(items) for step in _expand(name, options, f"{number}")]
    if not steps:
        raise OptionError("the pipeline is empty; name passes or presets, as in --passes 'cleanup, fold-bn'")
    _check_order(steps)
    return steps


def from_toml(path: str | Path) -> list[Step]:
    """Steps from a TOML file: an array of tables `[[pass]]`, each with `name` and the options."""
    try:
        import tomllib
    except ModuleNotFoundError:  # Python 3.10
        import tomli as tomllib
    try:
        data = tomllib.loads(Path(path).read_text("utf8"))
    except OSError as error:
        raise OptionError(f"cannot read the pipeline {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise OptionError(f"{path} is not TOML: {error}") from error
    entries = data.get("pass")
    if set(data) != {"pass"} or not isinstance(entries, list) or not all(isinstance(e, dict) and "name" in e for e in entries):
        raise OptionError(f"{path}: expected an array of tables [[pass]], each with a name and its options")
    return parse([(str(e["name"]), {k: v for k, v in e.items() if k != "name"}) for e in entries])


def to_text(steps: Sequence[Step]) -> str:
    """The pipeline as `parse` reads it; repeating groups are written out once, so parse(to_text(s)) runs the same passes."""
    return ", ".join(str(s) for s in steps)


def to_toml(steps: Sequence[Step]) -> str:
    """The pipeline as `from_toml` reads it."""
    lines = []
    for step in steps:
        lines += ["[[pass]]", f'name = "{step.entry.name}"', *(f"{k} = {_toml_value(v)}" for k, v in step.options.items()), ""]
    return "\n".join(lines)


def _toml_value(value: Any) -> str:
    import json

    return json.dumps(list(value) if isinstance(value, tuple) else value)


def _as_text(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple | list) else str(value)


def _split(text: str) -> list[tuple[str, dict[str, Any]]]:
    lexer = shlex.shlex(text, posix=True, punctuation_chars=",")
    lexer.whitespace_split, lexer.commenters = True, ""
    groups: list[list[str]] = [[]]
    try:
        for token in lexer:
            if token.strip(",") == "":
                groups.append([])
            else:
                groups[-1].append(token)
    except ValueError as error:
        raise OptionError(f"cannot read the pipeline '{text}': {error}") from error
    items = []
    for name, *words in filter(None, groups):
        pairs = [word.partition("=") for word in words]
        wrong = next((key for key, equals, _ in pairs if not equals), None)
        if wrong is not None:
            raise OptionError(f"{name}: expected option=value, found '{wrong}' (steps are separated by commas)")
        items.append((name, {key: value for key, _, value in pairs}))
    return items


def _pair(item: str | tuple[str, Mapping[str, Any]]) -> tuple[str, Mapping[str, Any]]:
    return (item, {}) if isinstance(item, str) else item


def _expand(name: str, options: Mapping[str, Any], group: str) -> list[Step]:
    if name not in PRESETS:
        try:
            entry = find(name)
        except OptionError as error:
            raise OptionError(f"{error}; presets: {', '.join(PRESETS)}") from error
        return [Step(entry, _typed(entry, options), group if "/" in group else "")]
    preset = PRESETS[name]
    if options and not preset.options_of:
        raise OptionError(f"preset '{name}' takes no options; write its passes out: {preset.passes}")
    inner = f"{group}/{name}" if preset.repeat else group
    return [
        step
        for number, (sub, own) in enumerate(_split(preset.passes))
        for step in _expand(
            sub, _replaced(own, options) if sub == preset.options_of else own, inner if preset.repeat else f"{group}.{number}"
        )
    ]


def _replaced(own: Mapping[str, Any], given: Mapping[str, Any]) -> Mapping[str, Any]:
    """A preset's options with those given: another target (ratio, macs, ...) takes the place of the preset's."""
    from graphopt.prune import GOALS

    goals = set(GOALS)
    kept = {key: value for key, value in own.items() if key not in goals} if goals & given.keys() else own
    return {**kept, **given}


def _typed(entry: Pass, options: Mapping[str, Any]) -> dict[str, Any]:
    from pydantic import TypeAdapter, ValidationError

    types = entry.types()
    typed: dict[str, Any] = {}
    for given, value in options.items():
        key = given.replace("-", "_")
        if key not in types:
            known = suggest(given, types) if types else "it has none"
            raise OptionError(f"{entry.name}: unknown option '{given}'; {known}")
        hint = types[key]
        if get_origin(hint) is tuple and isinstance(value, str):
            value = tuple(filter(None, value.split(",")))
        adapter: TypeAdapter[Any] = TypeAdapter(hint)
        try:
            typed[key] = adapter.validate_strings(value) if isinstance(value, str) else adapter.validate_python(value)
        except ValidationError as error:
            reason = error.errors()[0]["msg"]
            raise OptionError(f"{entry.name}: {given}={value}: {reason}") from error
    return typed


def _check_order(steps: Sequence[Step]) -> None:
    last = {s.entry.name: i for i, s in enumerate(steps)}
    for index, step in enumerate(steps):
        for earlier in sorted(step.entry.after):
            if last.get(earlier, -1) > index:
                raise OptionError(f"{step.entry.name} must come after {earlier}; a legal order: {', '.join(legal_order(steps))}")


def legal_order(steps: Sequence[Step]) -> list[str]:
    """The names of the steps in an order that every `after` allows, as near as possible to the given one."""
    order = nx.DiGraph()
    names = list(dict.fromkeys(s.entry.name for s in steps))
    order.add_nodes_from(names)
    order.add_edges_from((e, s.entry.name) for s in steps for e in s.entry.after if e in order)
    try:
        return list(nx.lexicographical_topological_sort(order, key=names.index))
    except nx.NetworkXUnfeasible as error:
        raise OptionError(f"passes contradict each other: {' -> '.join(a for a, _ in nx.find_cycle(order))}") from error


def run(
    model: Model, steps: Sequence[Step], context: Context, hooks: Sequence[Hook] = (), *, later: Sequence[Step] = ()
) -> list[StepResult]:
    """Run the steps in order on `model`, in place. After every change the graph is sorted and verified.

    `later`: steps that another call will run on the result.
    Raises GraphoptError naming the pass; PassError where a step needs data that was not given, before any work.
    """
    missing = next((s.entry.name for s in (*steps, *later) if s.entry.needs_data and context.calibration is None), None)
    if missing:
        raise PassError(missing, "needs calibration data: give --calib PATH (or calibration=...)")
    context.keep_baseline = any(s.entry.repairs for s in (*steps, *later))
    results: list[StepResult] = []
    start = 0
    while start < len(steps):
        end = start + 1
        while end < len(steps) and steps[start].group and steps[end].group == steps[start].group:
            end += 1
        for number in range(MAX_ROUNDS if steps[start].group else 1):
            done = [run_step(model, step, context, hooks) for step in steps[start:end]]
            results += done
            if not any(r.changes for r in done):
                break
            if number == MAX_ROUNDS - 1 and steps[start].group:
                model.notes.append(
                    f"{steps[start].group.split('/')[-1]}: stopped after {MAX_ROUNDS} rounds that each changed something"
                )
        start = end
        context.progress("passes", start, len(steps))
    return results


def _counted(name: str, found: object) -> int:
    """What a pass, perhaps a plugin's, returned, as an int; numpy's integers are fine."""
    try:
        return operator.index(found)  # type: ignore[arg-type]
    except TypeError as error:
        raise PassError(name, f"returned {found!r}; a pass returns the number of changes") from error


def run_step(model: Model, step: Step, context: Context, hooks: Sequence[Hook] = ()) -> StepResult:
    """Run one pass, verify, drop stale analyses, call the hooks."""
    name = step.entry.name
    context.rejected.clear()
    context.examples.clear()
    context.facts = {}
    began = time.perf_counter()
    try:
        changes = _counted(name, step.entry.fn(model, context, **step.options))
        if changes:
            model.sort()
            model.verify()
    except ModelError as error:
        raise ModelError(f"after {name}: {error}") from error
    except (GraphoptError, MemoryError):
        raise
    except Exception as error:  # a bug in a pass, perhaps a plugin's: name it, keep the traceback for -v
        raise PassError(name, f"failed with {type(error).__name__}: {error}; this is a bug in the pass") from error
    if changes:
        context.drop(step.entry.keeps)
    rejected = tuple(Rejection(*key, count, context.examples[key]) for key, count in context.rejected.items())
    seconds = time.perf_counter() - began
    result = StepResult(name, dict(step.options), changes, seconds, len(model.nodes()), rejected, dict(context.facts))
    for hook in hooks:
        hook(model, step, result)
    return result
