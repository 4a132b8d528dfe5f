"""A flag of ours is a field of a class: what each of these classes can do with its flags.

The parser, the search for a flag on a command line, the copy on a model's config and everything that reads it follow
from that field.
"""

from argparse import ArgumentParser
from collections.abc import Callable
from dataclasses import field, fields
from typing import Any, ClassVar, NamedTuple, Self


class Flag(NamedTuple):
    """A field's part of --help and the type of its value; the text is made only when help is asked for.

    A flag of type bool takes no value.
    """

    metavar: Callable[[], str]
    help: Callable[[], str]
    type: Callable[[str], Any]
    nargs: str | None = None


def flag(
    default: Any,
    metavar: Callable[[], str],
    help: Callable[[], str],
    type: Callable[[str], Any] = str,
    nargs: str | None = None,
) -> Any:
    return field(default=default, metadata={"flag": Flag(metavar, help, type, nargs)})


def one_of(*names: str) -> str:
    return "{" + ",".join(names) + "}"


class Flags:
    """Flags with a common prefix: the field `memory_limit` of prefix `pp` is --pp-memory-limit and pp_memory_limit."""

    prefix: ClassVar[str]
    title: ClassVar[str]

    @classmethod
    def attributes(cls) -> dict[str, str]:
        """Return for each field the name that parsed arguments and configs have it under."""
        return {each.name: f"{cls.prefix}_{each.name}" for each in fields(cls)}  # type: ignore[arg-type]

    @classmethod
    def names(cls) -> list[str]:
        """Return the flags as they are written on a command line."""
        return ["--" + attribute.replace("_", "-") for attribute in cls.attributes().values()]

    @classmethod
    def add_to(cls, parser: ArgumentParser) -> None:
        """Add the flags to Megatron's parser, in a group of their own."""
        group = parser.add_argument_group(title=cls.title)
        for name, each in zip(cls.names(), fields(cls), strict=True):  # type: ignore[arg-type]
            flag: Flag = each.metadata["flag"]
            if flag.type is bool:
                group.add_argument(name, action="store_true", help=flag.help())
                continue
            group.add_argument(
                name,
                default=each.default,
                metavar=flag.metavar(),
                help=flag.help(),
                type=flag.type,
                nargs=flag.nargs,
            )

    @classmethod
    def of(cls, source: Any) -> Self:
        """Read the flags off parsed arguments or a config; what it does not have keeps its default."""
        present = {name: attr for name, attr in cls.attributes().items() if hasattr(source, attr)}
        return cls(**{name: getattr(source, attribute) for name, attribute in present.items()})

    def copy_to(self, target: Any) -> None:
        """Set the attributes of a config, which travel with every copy of it."""
        for name, attribute in self.attributes().items():
            setattr(target, attribute, getattr(self, name))
