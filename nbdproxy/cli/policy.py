"""`nbdproxy policy`: the gallery of policies, and a check for one's own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

import typer
from rich.text import Text

from nbdproxy.cli.choices import JsonOption
from nbdproxy.cli.console import err, out, print_json
from nbdproxy.policy.loader import PolicyFile, load, names
from nbdproxy.policy.words import sentences
from nbdproxy.printable import visible
from nbdproxy.server.export.dry_run import DryRun, dry_run, explain
from nbdproxy.sizes import plural

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None)


@app.callback()
def policy() -> None:
    """Look at the policies there are, and check your own.

    A policy says what goes wrong with a disk, and when; nbdproxy serve --policy NAME lets it loose.

    Examples:

      nbdproxy policy list

      nbdproxy policy show fsyncgate

      nbdproxy policy check mine.toml
    """


@app.command("list")
def list_(json: JsonOption = False) -> None:
    """List the policies of the gallery, a line each.

    Example: nbdproxy policy list
    """
    files = [load(name) for name in names()]
    if json:
        print_json(
            [{"name": f.name, "summary": f.policy.summary, "path": str(f.path)} for f in files]
        )
        return
    width = max(len(file.name) for file in files)
    for file in files:
        out.print(f"{file.name:<{width}}  {file.policy.summary}", markup=False)


@app.command()
def show(
    name: Annotated[str, typer.Argument(metavar="NAME|FILE", help="A policy.")],
    json: JsonOption = False,
) -> None:
    """Show what a policy does, what it imitates, its parameters and its examples.

    Example: nbdproxy policy show lying-flush
    """
    file = load(name)
    if json:
        print_json(_facts(file))
        return
    for line in _page(file):
        out.print(Text.from_markup(line) if line.startswith("[bold]") else Text(visible(line)))


@app.command()
def check(
    files: Annotated[list[str], typer.Argument(metavar="NAME|FILE...", help="Policies.")],
    json: JsonOption = False,
) -> None:
    """Run the examples of policies, and explain step by step which rule struck.

    Exit code 1 if an example does not end as it says.

    Examples:

      nbdproxy policy check mine.toml

      nbdproxy policy check $(nbdproxy policy list --json | jq -r '.[].name')
    """
    loaded = [load(name) for name in files]
    checked = [(file, list(_rehearsals(file))) for file in loaded]
    failed = sum(bool(one.wrong) for _, found in checked for _, one in found)
    if json:
        print_json([_result(file, found) for file, found in checked])
    else:
        for file, found in checked:
            _tell(file, found)
    raise typer.Exit(1 if failed else 0)


def _rehearsals(file: PolicyFile) -> Iterator[tuple[int, DryRun]]:
    for number, example in enumerate(file.examples, 1):
        yield number, dry_run(file.with_settings(example.settings), example)


def _result(file: PolicyFile, found: list[tuple[int, DryRun]]) -> dict[str, Any]:
    return {
        "name": file.name,
        "path": str(file.path),
        "verdict": "fail" if any(one.wrong for _, one in found) else "pass",
        "examples": [
            {
                "steps": explain(one.played),
                "image": list(one.image),
                "shows": list(one.shows),
                "wrong": list(one.wrong),
            }
            for _, one in found
        ],
    }


def _tell(file: PolicyFile, found: list[tuple[int, DryRun]]) -> None:
    for number, one in found:
        example = file.examples[number - 1]
        options = [f"{key}={value}" for key, value in example.settings.items()]
        out.print(f"{file.name}, example {number} {' '.join(options)}".rstrip(), markup=False)
        for line in explain(one.played):
            out.print(f"    {line}", markup=False)
        out.print(f"    image {' '.join(one.image)}   reads show {' '.join(one.shows)}",
                  markup=False)  # fmt: skip
        for wrong in one.wrong:
            out.print(f"  wrong: {wrong}", markup=False)
    failed = sum(bool(one.wrong) for _, one in found)
    if not found:
        err.print(f"{file.name}: is read without complaint, and has no examples", markup=False)
    elif failed:
        err.print(f"{file.name}: wrong, {failed} of {plural(len(found), 'example')}", markup=False)
    else:
        err.print(f"{file.name}: ok, {plural(len(found), 'example')}", markup=False)


def _facts(file: PolicyFile) -> dict[str, Any]:
    return {
        "name": file.name,
        "path": str(file.path),
        "summary": file.policy.summary,
        "imitates": file.policy.imitates.strip(),
        "sources": list(file.policy.sources),
        "parameters": [
            {"name": one.name, "default": one.default, "help": one.help} for one in file.parameters
        ],
        "does": list(sentences(file.policy)),
    }


def _page(file: PolicyFile) -> Iterator[str]:
    """Yield the lines of a policy's page of the manual."""
    policy = file.policy
    yield "[bold]NAME[/]"
    yield f"    {file.name} - {policy.summary}"
    yield "[bold]WHAT IT DOES[/]"
    for sentence in sentences(policy):
        yield f"    {sentence}"
    yield "[bold]WHAT IT IMITATES[/]"
    for line in policy.imitates.strip().splitlines():
        yield f"    {line}"
    if policy.sources:
        yield "[bold]SOURCES[/]"
        for source in policy.sources:
            yield f"    {source}"
    if file.parameters:
        yield "[bold]PARAMETERS (--set KEY=VALUE)[/]"
        for one in file.parameters:
            yield f"    {one.name}={one.default}   {one.help}"
    yield "[bold]EXAMPLES[/]"
    for example in file.examples:
        options = [f"{key}={value}" for key, value in example.settings.items()]
        if options:
            yield f"    with {' '.join(options)}"
        for step in example.steps:
            yield f"    {step.text}"
        if example.shows:
            yield f"    => reads show  {' '.join(example.shows)}"
        if example.image:
            yield f"    => image holds {' '.join(example.image)}"
        yield ""
    yield "[bold]TRY[/]"
    yield f"    nbdproxy serve disk.img --policy {file.name} --record run1"
    yield f"    the file itself: {file.path}"
