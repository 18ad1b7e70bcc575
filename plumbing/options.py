"""A table of options: what each takes, its default, a preset's value, and whether a first task fixes it."""

import argparse
from typing import NamedTuple

from plumbing import Refused


class Option(NamedTuple):
    """A line of the table. how: for `add_argument`. preset: what takes the place of the default where a
    preset is asked for. fixed: whether the value that a run's first task had stays."""

    how: dict
    help: str
    default: object = None
    preset: object = None
    fixed: bool = False


def key_of(flag):
    """Return the name under which argparse keeps an option."""
    return flag[2:].replace("-", "_")


def column(table, field):
    """Return {name: value} of one field of all options that have one."""
    lines = [(flag, option) for options in table.values() for flag, option in options.items()]
    found = {key_of(flag): getattr(option, field) for flag, option in lines}
    return {key: value for key, value in found.items() if value is not None and value is not False}


def add_options(parser, table):
    """Give a parser the options, a group for each part of the table. One with a default is absent from what
    is parsed if it is not said, so that `fill_in` knows what was said."""
    for title, options in table.items():
        group = parser.add_argument_group(title)
        for flag, (how, text, default, *_) in options.items():
            if default is not None:
                text, how = f"{text} [{default}]", {**how, "default": argparse.SUPPRESS}
            group.add_argument(flag, help=text, **how)


def fill_in(args, defaults, preset, fixed, where):
    """Fill in what was not said: what a first task fixed, then the preset, then the defaults. Raises Refused,
    naming `where`, if what was said is not what was fixed."""
    for key, value in {**defaults, **preset, **fixed}.items():
        given = getattr(args, key, value)
        if key in fixed and given != value:
            option = f"--{key.replace('_', '-')} {given}"
            raise Refused(f"{option} does not fit {where}: its first task fixed {value}")
        setattr(args, key, given)
