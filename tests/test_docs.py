"""The documents: every command in them is run, every output is what comes, every link leads somewhere."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import typer

from actserve.cli.main import cli
from actserve.core.errors import ActserveError, ClientError, ExportError, StoreError
from actserve.server.http.error_responses import STATUS
from tests.documents import OUTPUT, ROOT, RUN, SHOWN, Block, Reader, agrees, blocks, tokens

DOCUMENTS = sorted([ROOT / "README.md", ROOT / "SECURITY.md", *(ROOT / "docs").glob("*.md")])
# Documents that compile, measure or train: `make test-wide` runs them.
LONG = ("tutorial.md", "bring-your-own-policy.md", "improving.md")
_LINK = re.compile(r"^(?![a-z]+:)([^#]*)(?:#(.+))?$")


def named(document: Path) -> str:
    return str(document.relative_to(ROOT))


def each(documents: list[Path]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("document", documents, ids=named)


@pytest.mark.parametrize(
    "document",
    [
        pytest.param(document, marks=[pytest.mark.wide] if document.name in LONG else [], id=named(document))
        for document in DOCUMENTS
        if any(blocks(document))
    ],
)
def test_what_a_document_says_works(document: Path, tmp_path: Path) -> None:
    printed: str | None = None  # by the block before, if it was run
    with Reader(tmp_path) as reader:
        for block in blocks(document):
            where = f"{named(document)}, line {block.line}"
            if block.language in OUTPUT:
                assert printed is None or agrees(block, printed), f"{where} shows something else than:\n{printed}"
                printed = ""
            elif block.language in RUN and block.reason is None:
                assert not _refused(printed), f"before {where} something failed, and it is not shown:\n{printed}"
                try:
                    printed = reader.follow(block)
                except AssertionError as error:
                    raise AssertionError(f"{where} failed: {error}") from None
            else:
                printed = None
    assert not _refused(printed), f"at the end of {named(document)} something failed, and it is not shown:\n{printed}"


def _refused(printed: str | None) -> bool:
    """curl is content with an error, and shows it."""
    return printed is not None and '{"error"' in printed


@each(DOCUMENTS)
def test_every_block_says_what_it_is_and_if_not_run_why(document: Path) -> None:
    for block in blocks(document):
        where = f"{named(document)}, line {block.line}"
        assert block.language in (*RUN, *OUTPUT, *SHOWN), f"{where}: {block.language or 'no language'}"
        assert block.reason is None or (block.reason and block.language in RUN), f"{where}: not run, and why?"


def test_what_does_not_work_is_noticed(tmp_path: Path) -> None:
    document = tmp_path / "d.md"
    document.write_text(
        "```bash\nA=1\n```\n<!-- not run: why -->\n```python\n# f.py\n```\n```bash\ntest $A = 2; true\n```\n"
    )
    first, second, third = blocks(document)
    assert [block.reason for block in (first, second, third)] == [None, "why", None]
    assert (second.file, third.line) == ("f.py", 8)
    with Reader(tmp_path) as reader:
        reader.follow(first)
        with pytest.raises(AssertionError, match="exit code 1"):
            reader.follow(third)
        with pytest.raises(AssertionError, match="no model store at nowhere"):
            reader.follow(replace(first, text="actserve serve --store nowhere"))


@pytest.mark.parametrize(
    ("language", "shown", "came", "agreed"),
    [
        ("json", '{"a": 1, "b": …}', '{"a":1,"b":[2]}', True),
        ("json", '{"a": 1}', '{"a":2}', False),
        ("text", "p50 0.5  p99 1,000", "p50 12  p99 7e-05\n", True),
        ("text", "first\n…\nlast 1", "first\nsecond\nlast 2", True),
        ("text", "first\n", "first\nsecond", False),
        ("text", "┏━━┓", "┏━━━┓", True),
    ],
)
def test_output_agrees_if_it_is_what_is_shown(language: str, shown: str, came: str, agreed: bool) -> None:
    assert agrees(Block(language, shown, 1, None), came) == agreed


@each(DOCUMENTS)
def test_every_link_leads_somewhere(document: Path) -> None:
    for target in links(document):
        found = _LINK.match(target)
        if found is None:
            continue
        path = (document.parent / found[1]).resolve() if found[1] else document
        assert path.exists(), f"{named(document)}: there is no {target}"
        assert found[2] is None or found[2] in headings(path), f"{named(document)}: {target} is no heading"


def links(document: Path) -> Iterator[str]:
    for token in tokens(document):
        for part in token.children or ():
            target = part.attrGet("href") if part.type == "link_open" else part.attrGet("src")
            if target is not None:
                yield str(target)


def headings(document: Path) -> set[str]:
    """The anchors of the headings, by GitHub's rule."""
    parsed = tokens(document)
    titles = [title for opening, title in pairwise(parsed) if opening.type == "heading_open"]
    texts = ["".join(part.content for part in title.children or ()) for title in titles]
    return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in texts}


@each(DOCUMENTS)
def test_every_command_that_is_named_exists(document: Path) -> None:
    for words in commands(document):
        assert not (wrong := unknown(words)), f"{named(document)}: actserve {shlex.join(words)}: {wrong}"


def commands(document: Path) -> Iterator[list[str]]:
    """The words after `actserve` in shell blocks and in the text."""
    for block in blocks(document):
        if block.language == "bash":
            for line in block.text.replace("\\\n", " ").splitlines():
                for found in re.finditer(r"\bactserve ([a-z][^|;&)#>]*)", line):
                    yield shlex.split(found[1])
    for token in tokens(document):
        for part in token.children or ():
            if part.type == "code_inline" and part.content.startswith("actserve "):
                yield re.sub(r"[\[\]]", "", part.content).split()[1:]


def test_what_the_cli_has_not_is_noticed() -> None:
    assert unknown(["play", "--video", "--nonsense"]) == "--nonsense"
    assert unknown(["keys", "old"]) == "old"
    assert unknown(["--install"]) == "--install"
    assert unknown(["keys", "new", "--json"]) is None


def unknown(words: list[str]) -> str | None:
    """The word of a command line that the CLI does not have, if there is one: a command, or an option of it."""
    command = typer.main.get_command(cli)
    while words and isinstance(command, typer.core.TyperGroup) and not words[0].startswith("-"):
        name, *words = words
        found = command.get_command(typer.Context(command), name)  # commands of plugins too
        if found is None:
            return name
        command = found
    options = {option for parameter in command.params for option in parameter.opts}
    return next((word for word in words if word.startswith("-") and word.partition("=")[0] not in options), None)


def test_every_error_that_a_client_can_get_is_documented() -> None:
    text = (ROOT / "docs" / "protocols.md").read_text()
    rows = re.findall(r"^\| (\d{3}) \| (.*) \|$", text, re.MULTILINE)
    for kind in leaves(ActserveError):
        if not issubclass(kind, ClientError | ExportError | StoreError):
            status = next(STATUS[base] for base in kind.__mro__ if base in STATUS)
            assert any(row == str(status) and f"`{kind.code}`" in codes for row, codes in rows), (kind.code, status)


def leaves(kind: type[ActserveError]) -> Iterator[type[ActserveError]]:
    for below in kind.__subclasses__():
        yield from leaves(below)
    if not kind.__subclasses__():
        yield kind
