"""Make the adapters that the package contains, and score each on test data, with its host and with unseen hosts.

    python -m scripts.research.ready_adapters --data DIR --host sentence-transformers/all-MiniLM-L6-v2 \
        --target_hosts sentence-transformers/all-mpnet-base-v2 … --output_dir runs/ready

``make adapters DATA=DIR HOSTS="SOURCE OTHERS …"`` does the same. DIR has a folder for each data set, with JSON lines:
btc and wnut17 (``tokens``, ``ner_tags``), snips (also ``text``, ``intent``), amazon_uci (``text``, ``label``).
All adapters are trained with the same settings, which were not chosen by any score, and with seed 0. The script writes
modeling_unihyperlora/ready/NAME (weights, configuration, card) and results/ready.json, the source of the cards and of
the tables in the documents. It skips adapters that are in --output_dir and scores that are in results/ready.json.
"""

import argparse
import hashlib
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from seqeval.metrics import f1_score as entity_f1
from sklearn.metrics import f1_score

from modeling_unihyperlora import DataError, UniHyperLoraError
from modeling_unihyperlora.configuration_unihyperlora import read_config
from modeling_unihyperlora.storage import READY, WEIGHTS_NAME, read_json_object, write_json
from trainers.reading import json_rows
from trainers.running import run
from trainers.tag_schemes import reader_of_tags
from trainers.tagging import classify, tag
from trainers.tasks import TASKS

RESULTS, RECORD = Path(__file__).parents[2] / "results", "ready.json"
SOURCE_ON_HUB = "sentence-transformers/all-MiniLM-L6-v2"  # host that an adapter's configuration names
TRAINING = """
    --do_train --max_steps 3000 --per_device_train_batch_size 32 --lr_scheduler_type cosine --warmup_steps 0.1
    --weight_decay 0.01 --save_strategy no --seed 0 --disable_tqdm true --logging_steps 250 --overwrite_output_dir
""".split()
Splits = dict[str, list[dict]]  # rows of "train" and of each evaluation set, under its name in the tables


@dataclass(frozen=True)
class Recipe:
    """Recipe of a ready adapter.

    Attributes:
        kind: "ner" or "classification".
        about: what it finds, for the card.
        example: example text for the card.
        data: training data and their licence.
        note: remark about the scores, for the card.
        read: function from the folder of all data to the splits.
    """

    kind: str
    about: str
    example: str
    data: str
    note: str
    read: Callable[[Path], Splits]


def main(command_line: list[str] | None = None) -> None:
    """Make the adapters that the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, prog="ready_adapters"
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--host", default=SOURCE_ON_HUB, help="Hub id or folder of all-MiniLM-L6-v2")
    parser.add_argument("--target_hosts", nargs="*", default=[], help="further hosts to score on")
    parser.add_argument("--only", nargs="+", choices=RECIPES, default=list(RECIPES), help="make only these adapters")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/ready"))
    args = parser.parse_args(command_line)
    for name in args.only:
        splits = RECIPES[name].read(args.data)
        if not (args.output_dir / name / "all_results.json").is_file():
            train(name, splits, args.host, args.output_dir / name)
    for host in [args.host, *args.target_hosts]:
        for name in args.only:
            keep_scores(name, RECIPES[name].read(args.data), host)


def train(name: str, splits: Splits, host: str, folder: Path) -> None:
    """Train an adapter in a folder, copy it to the ready adapters, and start its record."""
    recipe, file = RECIPES[name], folder / "data" / "train.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in splits["train"]), encoding="utf-8")
    own = ["--task_name", name, "--model_name_or_path", host, "--reader", "medium", "--train_file", str(file)]
    trained = run(TASKS[recipe.kind], [*TRAINING, *own, "--output_dir", str(folder)])
    place(folder, READY / name)
    parts = ("adapter_bytes", "bytes_of_space", "reader_bytes", "head_bytes")
    record = {
        "task": recipe.kind,
        "source": Path(host).name,
        "sentences": {split: len(rows) for split, rows in splits.items()},
        "sha256": {split: hashlib.sha256(json.dumps(rows).encode()).hexdigest() for split, rows in splits.items()},
        "space": trained["space"],
        "bytes": {part: trained[part] for part in parts},
        "f1": {},
    }
    write_record(name, record)


def keep_scores(name: str, splits: Splits, host: str) -> None:
    """Score a ready adapter on a host, if that is not recorded yet."""
    record, shown = read_json_object(RESULTS / RECORD)["adapters"][name], Path(host).name
    if shown not in record["f1"]:
        cls = TASKS[record["task"]].model_class
        model = cls.from_pretrained(name, base_model_name_or_path=host)
        scores = {split: score(model, rows) for split, rows in splits.items() if split != "train"}
        write_record(name, record | {"f1": record["f1"] | {shown: scores}})


def score(model, rows: list[dict]) -> float:
    """Score rows with ``tagging``: micro F1 of entities, or macro F1 of classes."""
    if model.task_type == "token_classification":
        read = reader_of_tags(model.labels, model.config.tasks[model.config.active_task]["scheme"])
        found = tag(model, [row["tokens"] for row in rows], batch_size=64)
        gold = [[read(own) for own in row["ner_tags"]] for row in rows]
        return float(entity_f1(gold, [[read(own) for own in one.tags] for one in found]))
    found = classify(model, [row["text"] for row in rows], batch_size=64)
    return float(f1_score([row["label"] for row in rows], [one.label for one in found], average="macro"))


def write_record(name: str, record: dict) -> None:
    """Write an adapter's record to results/ready.json, and its card from the record."""
    path = RESULTS / RECORD
    records = read_json_object(path) if path.is_file() else {"kind": "ready", "adapters": {}}
    records["adapters"][name] = record
    write_json(path, records)
    (READY / name / "README.md").write_text(card(name, RECIPES[name], record), encoding="utf-8")


def place(trained: Path, ready: Path) -> None:
    """Copy weights and configuration; the configuration names the host by its Hub id, not by a local folder."""
    ready.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(trained / WEIGHTS_NAME, ready / WEIGHTS_NAME)
    config = read_json_object(trained / "config.json")
    config["base_model_name_or_path"] = SOURCE_ON_HUB
    for host in config["source_hosts"]:
        host["name"] = SOURCE_ON_HUB
    write_json(ready / "config.json", config)
    read_config(ready / "config.json")  # checks that the file can be read again


# ---- the data ----


def rows_of(path: Path) -> list[dict]:
    """The lines of a JSON-lines file."""
    if not path.is_file():
        raise DataError(f"{path} does not exist. Give --data a folder with a folder for each data set; see --help.")
    return [row for _, row in json_rows(path, {})]


def people_places_organisations(data: Path) -> Splits:
    """Tweets of the Broad Twitter Corpus; WNUT-17 is only for evaluation, with its three types renamed."""
    return {
        "train": rows_of(data / "btc/train.jsonl"),
        "btc test": rows_of(data / "btc/test.jsonl"),
        "wnut17 test": renamed(rows_of(data / "wnut17/test.jsonl"), WNUT_TYPES),
    }


WNUT_TYPES = {"person": "PER", "location": "LOC", "corporation": "ORG"}


def renamed(rows: list[dict], types: dict[str, str]) -> list[dict]:
    """Rename the entity types of sentences; types without a new name become O."""

    def tag(own: str) -> str:
        prefix, _, kind = own.partition("-")
        return f"{prefix}-{types[kind]}" if kind in types else "O"

    return [{"tokens": row["tokens"], "ner_tags": [tag(own) for own in row["ner_tags"]]} for row in rows]


def sentiment(data: Path) -> Splits:
    """Sentences of reviews; a digest of the text selects one in five to be held out."""
    splits: Splits = {"train": [], "held out": []}
    for name in ("yelp", "imdb", "amazon_cells"):
        for row in rows_of(data / f"amazon_uci/{name}.jsonl"):
            number = int(hashlib.sha256(row["text"].encode()).hexdigest(), 16)
            splits["held out" if number % 5 == 0 else "train"].append(row | {"label": MOODS[row["label"]]})
    sst2 = [{"text": row["sentence"], "label": MOODS[row["label"]]} for row in rows_of(data / "sst2/validation.jsonl")]
    return splits | {"sst2 validation": sst2}


MOODS = ("negative", "positive")


def assistant_slots(data: Path) -> Splits:
    """Requests to a voice assistant and the slots in them; there is no test split."""
    return _snips(data, ("tokens", "tokens"), ("ner_tags", "ner_tags"))


def assistant_intents(data: Path) -> Splits:
    """The same requests and their intents."""
    return _snips(data, ("text", "text"), ("label", "intent"))


def _snips(data: Path, *columns: tuple[str, str]) -> Splits:
    """Read both splits; ``columns`` are pairs of a new column name and the name in the file."""
    return {
        split: [{new: row[old] for new, old in columns} for row in rows_of(data / f"snips/{split}.jsonl")]
        for split in ("train", "validation")
    }


SNIPS = "SNIPS (Coucke et al. 2018), 13,784 requests, CC0"
NO_TEST = (
    "SNIPS as it is published has no test split. The validation split was scored once, at the end, and nothing was "
    "chosen by it."
)
RECIPES = {
    "people-places-organisations": Recipe(
        kind="ner",
        about="People (PER), places (LOC) and organisations (ORG) in English text, above all in tweets.",
        example="Angela Merkel met Tim Cook at Apple, in Cupertino.",
        data="Broad Twitter Corpus (Derczynski et al. 2016), 6,338 tweets, CC BY 4.0",
        note="In the Broad Twitter Corpus the name of an account (@name) is a person or an organisation, and so it is "
        "for this adapter. WNUT-17 (CC BY 4.0) was not trained on; its person, location and corporation are scored as "
        "PER, LOC and ORG, its other types as none.",
        read=people_places_organisations,
    ),
    "sentiment": Recipe(
        kind="classification",
        about="Whether a sentence of a review is positive or negative: restaurants, films, products.",
        example="The food was wonderful, and the staff were friendly.",
        data="Sentiment Labelled Sentences (Kotzias et al. 2015; UCI repository, data set 331), four in five of 3,000 "
        "sentences. The repository lists it as CC BY 4.0; we could not open its page to confirm that",
        note="Neutral text has no class of its own: look at the probability. SST-2 was not trained on, since it "
        "states no licence; the score on its validation split shows what text from elsewhere costs.",
        read=sentiment,
    ),
    "assistant-slots": Recipe(
        kind="ner",
        about="The 39 slots of requests to a voice assistant, such as `artist`, `city` and `timeRange`.",
        example="Book a table for two at a Greek restaurant in Athens tomorrow evening.",
        data=SNIPS,
        note=NO_TEST,
        read=assistant_slots,
    ),
    "assistant-intents": Recipe(
        kind="classification",
        about="Which of seven things a request to a voice assistant asks for.",
        example="What will the weather be like in Lisbon tomorrow?",
        data=SNIPS,
        note=NO_TEST,
        read=assistant_intents,
    ),
}


# ---- the card ----


def card(name: str, recipe: Recipe, record: dict) -> str:
    """The README.md of a ready adapter."""
    config = read_config(READY / name / "config.json")
    labels = config.tasks[name]["labels"]
    command, cls, function = {
        "ner": ("tag", "UniHyperLoraForTokenClassification", "tag"),
        "classification": ("classify", "UniHyperLoraForSequenceClassification", "classify"),
    }[recipe.kind]
    splits = [split for split in record["sentences"] if split != "train"]
    score = "micro F1 of entities (seqeval)" if recipe.kind == "ner" else "macro F1 of the classes"
    lines = [
        f"# {name}",
        "",
        recipe.about,
        "",
        "```bash",
        f'unihyperlora {command} {name} --host ANY_HOST "{recipe.example}"',
        "```",
        "",
        "```python",
        f"from modeling_unihyperlora import {cls} as Model",
        f"from trainers.tagging import {function}",
        "",
        f'model = Model.from_pretrained("{name}", base_model_name_or_path="ANY_HOST")',
        f'{function}(model, ["{recipe.example}"])',
        "```",
        "",
        "## Scores",
        "",
        f"{score[0].upper()}{score[1:]}. The first host is the one that it was trained on; the others saw neither a "
        "label nor a training step.",
        "",
        *table(record, splits),
        "",
        f"{recipe.note}",
        "",
        "## Origins",
        "",
        f"- Data: {recipe.data}. None of the text is in the file.",
        f"- Host: {SOURCE_ON_HUB} (Apache-2.0). None of its weights is in the file.",
        f"- Labels: {', '.join(f'`{label}`' for label in labels)}.",
        f"- File: {record['bytes']['adapter_bytes']:,} bytes, of which the space {record['space']} has "
        f"{record['bytes']['bytes_of_space']:,}, the reader {record['bytes']['reader_bytes']:,} and the head "
        f"{record['bytes']['head_bytes']:,}.",
        "- Licence: Apache-2.0.",
        f"- Made by `make adapters ONLY={name}`, 3,000 steps of 32, seed 0.",
        "",
        "It has the errors and biases of its host and of its data. Do not base decisions about people on it alone.",
        "",
    ]
    return "\n".join(lines)


def table(record: dict, splits: list[str]) -> list[str]:
    """Scores by host and split, as Markdown."""
    head = [f"{split} ({record['sentences'][split]:,})" for split in splits]
    rows = [
        f"| {host} | " + " | ".join(f"{scores[split]:.3f}" for split in splits) + " |"
        for host, scores in record["f1"].items()
    ]
    return ["| host | " + " | ".join(head) + " |", "|---" * (1 + len(splits)) + "|", *rows]


if __name__ == "__main__":
    try:
        main()
    except UniHyperLoraError as error:
        sys.exit(f"ready_adapters: {error}")
