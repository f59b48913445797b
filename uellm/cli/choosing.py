"""`uellm policy`, behind its options."""

import json
import sys
from collections.abc import Sequence
from typing import Any

import typer
from google.protobuf import json_format
from rich.console import Console
from rich.table import Column, Table

from uellm.class_defaults import OBJECTIVES
from uellm.cli import exits
from uellm.cli.durations import parse_duration
from uellm.cli.service_calls import service
from uellm.convert import duration, duration_seconds
from uellm.core.durations import show_duration
from uellm.core.errors import InvalidArgumentError
from uellm.policy.choice import LEVELS, PolicyChoice, levels_of, policies, settings_of
from uellm.rpc import CALL_SECONDS
from uellm.v1 import scheduler_pb2, scheduler_pb2_grpc

_CLASS = "class."


def list_policies(name: str, *, as_json: bool) -> int:
    """The installed policies; of one its settings."""
    if name:
        PolicyChoice(name).check()
        return _list_settings(name, as_json=as_json)
    known = {each: levels_of(each) for each in policies()}
    if as_json:
        _print_json({each: {"levels": levels} for each, levels in known.items()})
        return exits.OK
    table = Table("policy", "decides in", Column("settings", overflow="fold"), box=None)
    for each, levels in known.items():
        names = {found for level in levels for found in settings_of(PolicyChoice(each), level)}
        table.add_row(each, " and ".join(levels), ", ".join(sorted(names)) or "none")
    Console().print(table)
    return exits.OK


def _list_settings(name: str, *, as_json: bool) -> int:
    choice = PolicyChoice(name)
    rows = [
        {"setting": each, "level": level, "default": default, "description": what}
        for level in levels_of(name)
        for each, (_, default, what) in settings_of(choice, level).items()
    ]
    if as_json:
        _print_json(rows)
        return exits.OK
    table = Table("setting", "level", "default", Column("what it does", overflow="fold"), box=None)
    for row in rows:
        table.add_row(*row.values())
    Console().print(table if rows else f"{name} has no settings")
    return exits.OK


def request(
    model: str, name: str, settings: Sequence[str], execution: str
) -> scheduler_pb2.SetPolicyRequest:
    """What is asked of the scheduler; ``name`` "": to go back to the defaults.

    Raises:
        InvalidArgumentError: if a setting is not ``KEY=VALUE``, stands twice, or a class's is not a
            duration.
    """
    wanted = scheduler_pb2.SetPolicyRequest(model=model, policy=name, execution=execution)
    given: set[str] = set()
    for text in settings:
        key, equals, value = text.partition("=")
        if not (key and equals and value):
            raise InvalidArgumentError(
                f"{text!r}: a setting is KEY=VALUE; `uellm policy list {name}` shows them",
                field="settings",
            )
        if key in given:
            raise InvalidArgumentError(f"{key}: given twice; which of both?", field=key)
        given.add(key)
        if key.startswith(_CLASS):
            _add_default(wanted, key, value)
        else:
            wanted.settings[key] = value
    return wanted


def _add_default(wanted: scheduler_pb2.SetPolicyRequest, key: str, value: str) -> None:
    name, _, objective = key.removeprefix(_CLASS).partition(".")
    if objective not in OBJECTIVES:
        raise InvalidArgumentError(
            f"{key}: class.NAME.OBJECTIVE, with one of {', '.join(OBJECTIVES)}", field=key
        )
    try:
        seconds = parse_duration(value)
    except typer.BadParameter as error:
        raise InvalidArgumentError(f"{key}: {error}", field=key) from None
    getattr(wanted.class_defaults[name], objective).CopyFrom(duration(seconds))


async def choose(redis_url: str, wanted: scheduler_pb2.SetPolicyRequest) -> int:
    """Choose a policy."""
    answer = await _ask(redis_url, "SetPolicy", wanted)
    now = wanted.policy or "the default"
    sys.stdout.write(f"{wanted.model}: {now} (was {answer.previous})\n")
    return exits.OK


async def show(redis_url: str, model: str, *, as_json: bool) -> int:
    """The policy in force."""
    found: scheduler_pb2.GetPolicyResponse = await _ask(
        redis_url, "GetPolicy", scheduler_pb2.GetPolicyRequest(model=model)
    )
    if as_json:
        _print_json(json_format.MessageToDict(found, preserving_proto_field_name=True))
        return exits.OK
    how = "chosen for this model" if found.HasField("chosen") else "the services' default"
    console = Console(highlight=False)
    console.print(f"{model}: {found.policy}, {how}")
    for replica in found.replicas:
        by = replica.policy or "unknown until its first step"
        console.print(f"  {replica.replica}: {by} {replica.execution}".rstrip())
    for name, slo in sorted(found.chosen.class_defaults.items()):
        asked = ", ".join(
            f"{objective} {show_duration(duration_seconds(getattr(slo, objective)))}"
            for objective in OBJECTIVES
            if slo.HasField(objective)  # type: ignore[arg-type]
        )
        console.print(f"  {name} requests that do not say: {asked}")
    if found.settings:
        columns = ("setting", "level", "value", "default")
        table = Table(*columns, Column("what it does", overflow="fold"), box=None)
        order = {level: place for place, level in enumerate(LEVELS)}
        for row in sorted(found.settings, key=lambda each: order.get(each.level, len(order))):
            table.add_row(row.name, row.level, row.value, row.default_value, row.description)
        console.print(table)
    return exits.OK


async def _ask(redis_url: str, method: str, message: Any) -> Any:
    """What a scheduler answers; whichever it is, it asks the model's owner.

    Raises:
        UnavailableError: if there is none.
        UellmError: what it answered.
    """
    async with service(redis_url, "scheduler") as way:
        stub = scheduler_pb2_grpc.SchedulerServiceStub(way)
        return await getattr(stub, method)(message, timeout=CALL_SECONDS)


def _print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, indent=1) + "\n")
