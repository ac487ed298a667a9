"""SGLang's command-line flags as a table, so that a command line is understood before SGLang is imported.

The import takes ten seconds, and reads the environment that the flags decide. ``python -m anchortp_sglang.hooks
--write`` takes the table from SGLang's own parser. argparse does the parsing, so abbreviations mean what they mean to
SGLang.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from anchortp_sglang.hooks.manifest import SGLANG_VERSION, installed_version, patches_folder
from anchortp_sglang.hooks.source import source_file

_HEADER = """\
# The command-line flags of SGLang {version}: field = its spellings, by what follows a flag.
# Generated: `python -m anchortp_sglang.hooks --write`.
"""
_SWITCH, _TOGGLE, _VALUE = "switch", "toggle", "value"
_CONFIG = "--config"

Table = Mapping[str, Mapping[str, Sequence[str]]]
"""Kind ("switch", "toggle" with a --no- form, "value", or an ``nargs`` of argparse) -> field -> spellings."""


def installed_flags() -> Table:
    """Return the table of the installed SGLang, which is imported."""
    from sglang.srt.server_args import ServerArgs

    parser = argparse.ArgumentParser(add_help=False)
    ServerArgs.add_cli_args(parser)
    table: dict[str, dict[str, list[str]]] = {}
    for action in parser._actions:
        spellings = table.setdefault(_kind(action), {}).setdefault(action.dest, [])
        spellings.extend(action.option_strings)
    return table


def _kind(action: argparse.Action) -> str:
    if isinstance(action, argparse.BooleanOptionalAction):
        return _TOGGLE
    if action.nargs == 0:
        return _SWITCH
    return _VALUE if action.nargs is None else str(action.nargs)


def flags_text() -> str:
    """Return the table of the installed SGLang as a file."""
    text = _HEADER.format(version=installed_version())
    for kind, fields in sorted(installed_flags().items()):
        text += f"\n[{json.dumps(kind)}]\n"
        text += "".join(f"{field} = {json.dumps(spellings)}\n" for field, spellings in sorted(fields.items()))
    return text


def flags_path(version: str) -> Path:
    """Return the path of the table of an SGLang."""
    return patches_folder() / f"sglang-{version}-flags.toml"


def known_flags() -> Table:
    """Return the table of the installed SGLang if it has been written, else that of the release."""
    path = flags_path(installed_version())
    return tomllib.loads((path if path.is_file() else flags_path(SGLANG_VERSION)).read_text(encoding="utf-8"))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def given_flags(argv: Sequence[str]) -> dict[str, Any]:
    """Return field -> value of every flag of a command line, and of its --config file (YAML).

    A switch's value is True, others are texts or lists of texts. Flags that the table lacks are left out: another
    SGLang may know them. Raises ValueError for what SGLang would not accept.
    """
    parser = _parser(known_flags())
    if _CONFIG in argv:
        argv = _with_config_file(parser, list(argv))
    given, _ = parser.parse_known_args(argv)
    return vars(given)


def _parser(table: Table) -> argparse.ArgumentParser:
    parser = _Parser(argument_default=argparse.SUPPRESS, add_help=False)
    parser.add_argument("-h", "--help", action="store_true", default=argparse.SUPPRESS)
    for kind, fields in table.items():
        for field, spellings in fields.items():
            if kind == _SWITCH:
                parser.add_argument(*spellings, dest=field, action="store_true", default=argparse.SUPPRESS)
            elif kind == _TOGGLE:
                shown = [spelling for spelling in spellings if not spelling.startswith("--no-")]
                parser.add_argument(*shown, dest=field, action=argparse.BooleanOptionalAction)
            else:
                parser.add_argument(*spellings, dest=field, nargs=None if kind == _VALUE else kind)
    return parser


def _with_config_file(parser: argparse.ArgumentParser, argv: list[str]) -> list[str]:
    """Return the command line with the settings of its --config file, merged by SGLang's own code.

    Only the module that has it is imported. Raises ValueError.
    """
    path = source_file("sglang.srt.utils.server_args_config_parser")
    spec = importlib.util.spec_from_file_location("_anchortp_config_parser", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    try:
        merged = list(module.ConfigArgumentMerger(parser).merge_config_with_args(argv))
    except (OSError, ValueError, AttributeError, TypeError, module.yaml.YAMLError) as error:
        given = " ".join(argv[argv.index(_CONFIG) :][:2])
        raise ValueError(f"{given} cannot be used: {error}") from None
    if ours := [token for token in merged if token.replace("_", "-").startswith("--anchor-")]:
        raise ValueError(f"{ours[0]} cannot be in a --config file: give it on the command line")
    return merged
