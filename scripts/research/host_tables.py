"""Renders the tables of docs/how-to/hosts.md from records of host_families.py, pruned_hosts.py and fuzz_adapter.py."""

FEATURES = {  # feature of the tests → column, in the order of the columns
    "all_sites": "all six module types",
    "formula": "the formula in float64",
    "save_load": "save, load, equal",
    "gradient_scope": "gradient in scope only",
    "detach": "detach bit-equal",
    "merge": "merge exact or refused",
    "two_adapters": "two adapters",
    "deepcopy": "deepcopy",
    "bfloat16": "bfloat16",
    "compile": "torch.compile",
    "task_model": "in a task model",
}


def host_tables(records: dict[str, dict]) -> str:
    """All tables that have records, as Markdown."""
    lines = []
    for kind, table in {
        "host_families": family_table,
        "pruned_hosts": pruned_table,
        "adapter_fuzz": fuzz_table,
    }.items():
        for name, record in records.items():
            if record.get("kind") == kind:
                lines += table(name, record)
    return "\n".join(lines)


def family_table(name: str, record: dict) -> list[str]:
    """Families × features, one table per pathway: ✓ passed, ✗ failed, a number refers to a note."""
    versions = ", ".join(f"{package} {version}" for package, version in sorted(record["versions"].items()))
    lines = [f"From results/{name}.json ({versions}). ✓ the test passed, ✗ it failed, – there is none.", ""]
    notes: list[str] = []
    for pathway, title in (("inject", "The injected update"), ("stream", "The stream")):
        families = {}
        for family, features in sorted(record["families"].items()):
            own = {name.removeprefix(f"{pathway}_"): features[name] for name in features if name.startswith(pathway)}
            families |= {family: own} if own else {}
        tested = dict.fromkeys(feature for features in families.values() for feature in features)
        columns = [feature for feature in {**FEATURES, **tested} if feature in tested]
        names = [FEATURES.get(feature, feature.replace("_", " ")) for feature in columns]
        lines += [f"### {title}", "", f"| family | {' | '.join(names)} |"]
        lines.append("|---" * (len(columns) + 1) + "|")
        for family, outcomes in families.items():
            cells = [_mark(outcomes.get(feature), notes) for feature in columns]
            called = f"{family} (decoder)" if family in record.get("decoders", []) else family
            lines.append(f"| {called} | {' | '.join(cells)} |")
        lines.append("")
    return lines + [f"{number}. {note}." for number, note in enumerate(notes, 1)] + [""]


def _mark(outcome: str | None, notes: list[str]) -> str:
    if outcome is None:
        return "–"
    if outcome in ("passed", "failed"):
        return "✓" if outcome == "passed" else "✗"
    if outcome not in notes:
        notes.append(outcome)
    return f"({notes.index(outcome) + 1})"


def pruned_table(name: str, record: dict) -> list[str]:
    """F1 of one adapter, by host and number of remaining blocks."""
    data = record["data"]
    sentences = data["splits"]["validation"]["sentences"]
    sources = " and ".join(host["name"] for host in record["source_hosts"])
    ranks = {figure: "–" if rank is None else f"{rank:.3f}" for figure, rank in record["rank_correlation"].items()}
    lines = [
        f"### {name}",
        "",
        f"One adapter from {sources} on {data['name']}, {sentences:,} sentences, zero-shot on hosts of which the "
        "first blocks are kept. Agreement needs no label: `unihyperlora inspect` prints it. Its rank correlation with "
        f"F1 over these hosts is {ranks['agreement']}; that of the mean R² is {ranks['mean_r2']} (Spearman).",
        "",
        f"![F1 over the number of blocks that are left](../results/{name}.png)",
        "",
        "| host | blocks | F1 | agreement | R² per knot |",
        "|---|---|---|---|---|",
    ]
    for row in record["rows"]:
        fit = " ".join(f"{value:.2f}" for value in row["calibration_r2"] or [])
        blocks = f"{row['layers']} of {row['of']}"
        lines.append(f"| {row['host']} | {blocks} | {row['eval_f1']:.4f} | {row['agreement']:.3f} | {fit} |")
    return [*lines, ""]


def fuzz_table(name: str, record: dict) -> list[str]:
    """Outcomes of loading damaged adapters."""
    outcomes = ("refused", "loaded, equal logits", "loaded, other logits", "failed")
    lines = [
        "### Damaged adapters",
        "",
        f"{record['files']:,} files, seed {record['seed']}, from results/{name}.json; "
        f"{len(record['failures'])} raised another error, hung, left a trace on the host or loaded other weights.",
        "",
        f"| damage | {' | '.join(outcomes)} |",
        "|---" * (len(outcomes) + 1) + "|",
    ]
    for damage, counts in record["outcomes"].items():
        cells = (f"{counts.get(outcome, 0):,}" for outcome in outcomes)
        lines.append(f"| {damage} | {' | '.join(cells)} |")
    return [*lines, ""]
