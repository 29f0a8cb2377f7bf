"""Find the entities of texts with a trained adapter, on any host.

    unihyperlora tag runs/conll --host distilbert-base-uncased "Angela Merkel met Tim Cook."
    unihyperlora tag runs/conll news.txt --json > entities.jsonl

A line of a .jsonl file has a "text" or a list of "tokens"; each line of any other
file is a text. --json gives the text, type, start, end and score of each entity.
"""

import dataclasses
import json
import zlib
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.text import Text

from . import given_texts, new_parser

COLOURS = ("green", "cyan", "magenta", "yellow", "blue", "red")


def main(command_line: list[str] | None = None) -> None:
    parser = new_parser("tag", "ADAPTER [TEXT …]", __doc__)
    given_texts.add_arguments(parser)
    arguments = parser.parse_intermixed_args(command_line)  # options may come between texts
    console = Console(soft_wrap=True)

    def show(found) -> None:
        if arguments.json:
            print(json.dumps(as_json(found), ensure_ascii=False))
        else:
            console.print(coloured(found), highlight=False)

    tag = given_texts.worker(arguments, "UniHyperLoraForTokenClassification", "tag")
    given_texts.work_through(arguments.texts, read_rows, (".jsonl", ".json"), tag, show)


def read_rows(path: Path) -> Iterator[str | list[str]]:
    """Yield the texts of a JSON-lines file, or lists of words if its lines have "tokens".

    Raises:
        DataError: a line has neither, or they are not strings.
    """
    from modeling_unihyperlora import DataError

    from ..reading import check_text, json_rows

    for origin, row in json_rows(path, {"text": "Ada Lovelace flew to Lisbon."}):
        found = row.get("tokens", row.get("text"))
        is_words = isinstance(found, list) and all(isinstance(word, str) and word for word in found)
        if not is_words and not isinstance(found, str):
            raise DataError(
                f'{origin}: each line needs "text", a string, or "tokens", a list of words; this one has '
                f"{', '.join(row) or 'nothing'}."
            )
        check_text(found if isinstance(found, str) else " ".join(found), "the text", origin)
        yield found


def as_json(found) -> dict[str, object]:
    """Content of one line of --json, for one text."""
    entities = [dataclasses.asdict(entity) | {"score": round(entity.score, 4)} for entity in found.entities]
    return {"text": found.text, "entities": entities}


def coloured(found) -> Text:
    """The text with each entity in the colour of its type, followed by the type."""
    shown, at = Text(), 0
    for entity in found.entities:
        colour = COLOURS[zlib.crc32(entity.type.encode()) % len(COLOURS)]
        shown.append(found.text[at : entity.start])
        shown.append(entity.text, style=f"bold {colour}").append(f" [{entity.type}]", style=colour)
        at = entity.end
    return shown.append(found.text[at:])
