"""Decorators of commands: several options as one, groups in `--help`, options as one argument."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from functools import partial, wraps
from typing import Any

import click

from ibpcore.errors import UserError
from ibpcore_cli.suggestions import unknown_option

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def options(*decorators: Decorator) -> Decorator:
    """Several `click.option`s as one decorator, in the order of the help text."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return decorate


def bundle(kind: type, argument: str) -> Decorator:
    """Passes the options that are named like fields of `kind`, a dataclass, as one `argument`.

    An option that is left out, hence None, has the default of its field.

    Raises:
        UsageError: (by the command) `kind` raises UserError for the values.
    """
    names = [field.name for field in fields(kind)]

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def bundled(**given: Any) -> Any:
            own = {name: given.pop(name) for name in names if name in given}
            with values_of_options():
                made = kind(**{name: value for name, value in own.items() if value is not None})
            return function(**given, **{argument: made})

        return bundled

    return decorate


@contextmanager
def values_of_options() -> Iterator[None]:
    """Makes a usage error of a UserError: it is the fault of a value in the command line."""
    try:
        yield
    except UserError as error:
        command = click.get_current_context().command
        raise click.UsageError(naming_options(str(error), command)) from None


def naming_options(message: str, command: click.Command) -> str:
    """The message with options in place of the settings that are its subject, if they are."""
    options = [param for param in command.params if isinstance(param, click.Option)]
    flags = {str(option.name): option.opts[0] for option in options}
    flags |= {flag[2:].replace("-", "_"): flag for flag in flags.values()}
    subject = re.match(r"\w+( (and|or) \w+)*(?= (must|can|is for)\b)", message)
    if subject is None:
        return message
    named = re.sub(r"\w+", lambda name: flags.get(name[0], name[0]), subject[0])
    return named + message[subject.end() :]


class GroupedOption(click.Option):
    """An option that `--help` lists in the section `group`, with its default."""

    def __init__(self, names: Sequence[str], group: str, **settings: Any) -> None:
        super().__init__(names, show_default=True, **settings)
        self.group = group


def in_group(title: str) -> Callable[..., Decorator]:
    """`click.option` for the section `title` of `--help`: flag, type, help, further names."""
    grouped = partial(click.option, cls=GroupedOption, group=title)

    def option(flag: str, type: Any, help: str, *names: str, **settings: Any) -> Decorator:
        return grouped(flag, *names, type=type, help=help, **settings)

    return option


class GroupedCommand(click.Command):
    """A command whose `--help` has a section for each group of options.

    Its errors name options: where the library says `epsilon_max must be`, it says
    `--epsilon-max must be`, and this is a usage error. For an option that it does not have it
    says which may be meant.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            raise click.UsageError(unknown_option(error.option_name, self), ctx) from None

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except UserError as error:
            named = naming_options(str(error), self)
            if named != str(error):
                raise click.UsageError(named, ctx) from None
            raise

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for title, records in option_groups(self, ctx).items():
            with formatter.section(title):
                formatter.write_dl(records)


def option_groups(
    command: click.Command, context: click.Context
) -> dict[str, list[tuple[str, str]]]:
    """Pairs of an option and its help text, by the title of the group.

    Options without a group, such as `--help`, have the title "Options".
    """
    groups: dict[str, list[tuple[str, str]]] = {}
    for param in command.get_params(context):
        record = param.get_help_record(context)
        if record is not None and isinstance(param, click.Option):
            title = param.group if isinstance(param, GroupedOption) else "Options"
            groups.setdefault(title, []).append(record)
    return groups
