"""Find the class of texts with a trained adapter, on any host.

    unihyperlora classify runs/sst2 --host distilbert-base-uncased "A film that I would see again."
    unihyperlora classify runs/sst2 reviews.txt --json > classes.jsonl

A .jsonl or .csv file has texts or pairs of texts in named columns (text, sentence,
question …); each line of any other file is a text. --json gives all probabilities.
"""

import json
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.text import Text

from . import given_texts, new_parser


def main(command_line: list[str] | None = None) -> None:
    parser = new_parser("classify", "ADAPTER [TEXT …]", __doc__)
    given_texts.add_arguments(parser)
    arguments = parser.parse_intermixed_args(command_line)  # options may come between texts
    console = Console(soft_wrap=True)

    def show(found) -> None:
        if arguments.json:
            scores = {label: round(score, 4) for label, score in found.scores.items()}
            row = {"text": found.text, "label": found.label, "scores": scores}
            print(json.dumps(row, ensure_ascii=False))
        else:
            label = Text(found.label, style="bold cyan").append(f" {found.score:.2f}  ", style="cyan")
            console.print(label.append(found.text, style="default"), highlight=False)

    classify = given_texts.worker(arguments, "UniHyperLoraForSequenceClassification", "classify")
    given_texts.work_through(arguments.texts, read_rows, (".jsonl", ".json", ".csv"), classify, show)


def read_rows(path: Path) -> Iterator[str | tuple[str, str]]:
    """Yield the texts, or pairs of texts, of a JSON-lines or CSV file."""
    from ..classification_data import read_file

    for example in read_file(path, needs_label=False):
        yield example.text if example.pair is None else (example.text, example.pair)
