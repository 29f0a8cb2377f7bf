"""Records measurements in results/, and renders the documents' tables from the records.

    python -m scripts.research.benchmark record runs/conll-s0 --name conll2003-inject-minilm-l6-s0
    python -m scripts.research.benchmark record runs/matrix --name conll2003-transfer
    python -m scripts.research.benchmark paper sat_lora-iter1-sst2 --seeds 0 1 2 --output_dir runs/paper
    python -m scripts.research.benchmark tasks --model_name_or_path HOST --output results/mixed-tasks.json
    python -m scripts.research.benchmark scaling --model_name_or_path HOST --hosts HOST SMALLER \
        --output results/scaling.json
    python -m scripts.research.benchmark latency --model_name_or_path H --output results/speed-latency-h.json
    python -m scripts.research.benchmark render

``record`` writes results/NAME.json from the folder of a run (run_ner.py or run_classification.py): scores and costs,
settings, host, data, versions, hardware. From a folder of transfer.py or pruned_hosts.py it records the table and its
picture, from one of ablation.py the table, from one of --do_search the trials.
``paper`` runs a set of run configs, except finished runs (see paper.py), and records each run as a line of
results/paper.jsonl.
``tasks`` measures batches with many tasks (see mixed_tasks.py). ``scaling`` measures how costs grow (see scaling.py).
``latency``, ``slopes``, ``train``, ``memory``, ``calibrate`` and ``size`` measure an adapter's costs on a host (see
speed.py).
``render`` writes the pages of results/, the short table in README.md, the tables of hosts.md, scaling.md and states.md
in docs/how-to/, and results/speed.md with its picture, from the records only.
"""

import argparse
import sys
from pathlib import Path

from modeling_unihyperlora import UniHyperLoraError
from modeling_unihyperlora.storage import replacing
from scripts.research import mixed_tasks, paper, scaling, speed, speed_report
from scripts.research.host_tables import host_tables
from scripts.research.paper_picture import draw
from scripts.research.paper_tables import PICTURE, rows_of
from scripts.research.records import keep, keep_paper_run, of_kind, read_records
from scripts.research.results_tables import pages, summary
from scripts.research.scaling_tables import scaling_page, with_tables
from scripts.research.stored_states_tables import plan_table, stored_states_tables

RESULTS = Path(__file__).parents[2] / "results"
MARKS = ("<!-- results -->", "<!-- end of results -->")
HOW_TO_PAGES = ("hosts", "scaling", "states")  # of docs/how-to
HOST_MARKS = ("<!-- hosts -->", "<!-- end of hosts -->")


def main(command_line: list[str] | None = None) -> None:
    """Run the command of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, prog="benchmark"
    )
    commands = parser.add_subparsers(dest="command", required=True)
    record = commands.add_parser("record", help="keep the results of one run, or of a transfer matrix")
    record.add_argument("folder", type=Path)
    record.add_argument("--name", required=True)
    what = "do and keep the runs of a set of run configs"
    paper.add_arguments(commands.add_parser("paper", help=what, allow_abbrev=False))  # --seed is no --seeds
    mixed_tasks.add_arguments(commands.add_parser("tasks", help="measure a batch of many tasks"))
    what = "measure how costs grow with tokens, sentences, batch and hosts"
    scaling.add_arguments(commands.add_parser("scaling", help=what))
    for command in speed.COMMANDS:
        speed.add_arguments(command, commands.add_parser(command, help="see speed.py"))
    commands.add_parser("render", help="write the documents' tables and pictures")
    args, passed = parser.parse_known_args(command_line)
    if passed and args.command != "paper":
        parser.error(f"unrecognized arguments: {' '.join(passed)}")
    if args.command == "paper":
        for folder, kind in paper.run_all(args, passed):
            keep_paper_run(folder, kind, RESULTS)
    elif args.command in speed.COMMANDS:
        speed.run(args.command, args)
    elif args.command == "tasks":
        mixed_tasks.measure(args)
    elif args.command == "scaling":
        scaling.measure(args)
    elif args.command == "record":
        keep(args.folder, args.name, RESULTS)
    else:
        render(RESULTS)


def render(results: Path) -> None:
    """Render all documents that show records; ``results`` is the folder of the records, in the repository."""
    records = read_records(results)
    if compared := of_kind(records, "paper"):
        draw(rows_of(compared.values()), results / PICTURE)
    readme, hosts, scaling_md, states_md = (
        results.parent / page for page in ("README.md", *(f"docs/how-to/{name}.md" for name in HOW_TO_PAGES))
    )
    of_states = {"stored_states": stored_states_tables, "plan": plan_table}
    for path, text in {
        **{results / name: text for name, text in pages(records).items()},
        readme: between(readme.read_text(encoding="utf-8"), *MARKS, summary(records)),
        hosts: between(hosts.read_text(encoding="utf-8"), *HOST_MARKS, host_tables(records)),
        scaling_md: scaling_page(scaling_md.read_text(encoding="utf-8"), records),
        states_md: with_tables(
            states_md.read_text(encoding="utf-8"),
            records,
            {mark: ("stored_states", table) for mark, table in of_states.items()},
        ),
    }.items():
        with replacing(path) as temporary:
            Path(temporary).write_text(text, encoding="utf-8")
    speed_report.write(of_kind(records, "speed"), results)


def between(text: str, begin: str, end: str, new: str) -> str:
    """Replace the part of a document between two marks."""
    before, rest = text.split(begin)
    return f"{before}{begin}\n{new}\n{end}{rest.split(end)[1]}"


if __name__ == "__main__":
    try:
        main()
    except UniHyperLoraError as error:
        sys.exit(f"benchmark: {error}")
