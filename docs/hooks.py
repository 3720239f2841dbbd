"""Content of the site beyond the pages in this folder: the options of the commands, read from
click, and files elsewhere in the repository that pages link to."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

import click
from mkdocs.structure.files import File

from ibpcore_cli.commands import load_all
from ibpcore_cli.decorators import option_groups

ROOT = Path(__file__).parent.parent
ELSEWHERE = ("CHANGELOG.md", "CONTRIBUTING.md", "benchmarks/results/**/*.*")
"""Added to the site at their path in the repository."""
CLI = load_all()
OPTIONS = re.compile(r"^::: ibp ([\w-]+)$", re.MULTILINE)
"""A line to be replaced by the usage and the options of a command."""
LINK = re.compile(r"(\]\()([^):#]+)")


def on_files(files: Any, config: Any) -> Any:
    """Adds the files of `ELSEWHERE`."""
    for path in sorted(path for pattern in ELSEWHERE for path in ROOT.glob(pattern)):
        name = path.relative_to(ROOT).as_posix()
        files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Inserts the options of commands, and rewrites links for the site."""
    markdown = OPTIONS.sub(lambda match: option_table(match[1]), markdown)
    site = page.file.src_uri
    source = site if page.file.generated_by else f"docs/{site}"
    return LINK.sub(lambda match: match[1] + relinked(match[2], source, site), markdown)


def relinked(link: str, source: str, site: str) -> str:
    """A link between files of the repository, converted to one between pages of the site.

    Args:
        link: relative to `source`, the page's path in the repository.
        site: the page's path in the site, where the content of `docs` is at the top.
    """
    target = posixpath.normpath(posixpath.join(posixpath.dirname(source), link))
    return posixpath.relpath(target.removeprefix("docs/"), posixpath.dirname(site) or ".")


def option_table(name: str) -> str:
    """Usage, help and options by group of a command, as in `ibp NAME --help`."""
    command = CLI[name]
    context = click.Context(command, info_name=f"ibp {name}")
    formatter = context.make_formatter()
    command.format_usage(context, formatter)
    command.format_help_text(context, formatter)
    lines = [f"```text\n{formatter.getvalue().rstrip()}\n```"]
    for title, records in option_groups(command, context).items():
        lines += ["", f"| {title} | |", "|---|---|"]
        lines += [f"| `{option}` | {cell(text)} |" for option, text in records]
    return "\n".join(lines)


def cell(text: str) -> str:
    """`text` with characters escaped for a table cell."""
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")
