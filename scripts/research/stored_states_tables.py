"""Renders the tables of docs/how-to/states.md from the record of stored_states.py."""

PLANNED_WORDS = 10**9


def stored_states_tables(record: dict) -> list[str]:
    """Reading, tasks on stored states, and several workers, as far as they were measured."""
    lines = [
        f"CPU seconds of one process with one thread, without its imports, on {record['hardware']['machine']}; the "
        "machine was shared.",
        "",
    ]
    if speed := record.get("speed"):
        lines += [
            f"Reading with {speed['host']}, batches of 32 texts of about 128 sub-tokens ({speed['texts']} texts, "
            f"{speed['words']:,} words): {speed['read_words_a_second']:,.0f} words a CPU second; the bare host's "
            f"forward pass on the same texts {speed['bare_words_a_second']:,.0f}. Ratio {speed['ratio']:.3f}, median "
            f"of {speed['rounds']} rounds ({speed['least']:.3f} – {speed['greatest']:.3f}).",
            "",
        ]
    lines += [*task_table(record.get("task", [])), ""]
    if text := record.get("text"):
        told = ", ".join(f"{f1:.4f} on {host}" for host, f1 in text["f1"].items())
        lines += [
            f"The same task trained on text with {text['host']} in memory ({text['rows']:,} rows, {text['steps']} "
            f"steps, {text['reader']} reader; also on copies of the host and on the words of raw text): F1 {told}; "
            f"{text['cpu_seconds']:.0f} CPU s, of which {text['host_cpu_seconds']:.0f} for the host.",
            "",
        ]
    lines += several_table(record.get("several"), record.get("lora"))
    return lines + worker_table(record.get("workers"))


def task_table(rows: list[dict]) -> list[str]:
    """A row for each task: which host read its data, in how many bits, what it scores on which host."""
    if not rows:
        return ["No task was measured yet."]
    hosts = list(dict.fromkeys(host for row in rows for host in row["f1"]))
    columns = ["read by", "rows", "bits", "bytes a word", "in the file", "steps × 32", "reader", "CPU, s"]
    columns += [f"F1 on {host}" for host in hosts]
    lines = [
        f"Taggers (seed 0) that are trained on stored states and scored on those of {rows[0]['validation_rows']:,} "
        "other sentences. Bytes a word are those of the states alone, and of the whole file.",
        "",
        "| " + " | ".join(columns) + " |",
        "|---" * len(columns) + "|",
    ]
    for row in sorted(rows, key=lambda row: (len(row["read_by"]), row["read_by"], -row["bits"])):
        cells = [" + ".join(row["read_by"]), f"{row['rows']:,}", str(row["bits"]), f"{row['bytes_a_word']:.0f}"]
        cells += [f"{row['file_bytes_a_word']:.0f}", str(row["steps"]), row["reader"], f"{row['cpu_seconds']:.0f}"]
        cells += [f"{row['f1'][host]:.4f}" if host in row["f1"] else "–" for host in hosts]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def several_table(record: dict | None, lora: dict | None) -> list[str]:
    """Tasks that were trained one after the other on one corpus, and LoRA beside them."""
    if record is None:
        return []
    lines = [
        f"Tasks on one corpus that {record['read_by']} read once, trained one after the other ({record['steps']} "
        f"steps of 32, {record['reader']} reader). Each finds some of the entity types.",
        "",
        "| task | types | CPU, s | F1 |",
        "|---|---|---|---|",
    ]
    for number, (types, found) in enumerate(record["tasks"].items(), start=1):
        name = types.replace("_", ", ")
        lines.append(f"| {number} | {name} | {found['cpu_seconds']:.0f} | {found['f1']:.4f} |")
    if lora:
        lines += [
            "",
            f"LoRA r=8 on {lora['host']} takes {lora['cpu_seconds']:.0f} CPU s for {lora['steps']} steps of 32 on all "
            f"types (F1 {lora['f1']:.4f}), and reads the text anew for each task: the second and the tenth cost the "
            "same.",
        ]
    return [*lines, ""]


def worker_table(record: dict | None) -> list[str]:
    """The folders that one and several workers wrote of one corpus."""
    if record is None:
        return []
    lines = [f"One corpus, read by {record['host']} in several ways:", "", "| way | shards | digest of the folder |"]
    lines.append("|---" * 3 + "|")
    for way, found in record["ways"].items():
        if way != "equal":
            killed = f", when {found['shards_when_killed']} were written" if "shards_when_killed" in found else ""
            lines.append(f"| {way}{killed} | {found['shards']} | {found['digest']} |")
    return lines


def plan_table(record: dict) -> list[str]:
    """Bytes and hours of a corpus of a billion words, from the measured rates."""
    rows = {row["bits"]: row for row in reversed(record.get("task", [])) if len(row["read_by"]) == 1}
    lines = ["| bits | stored, GB | with the unpacked copy for training, GB |", "|---" * 3 + "|"]
    for bits, row in sorted(rows.items(), reverse=True):
        file, unpacked = (PLANNED_WORDS * row[name] / 1e9 for name in ("file_bytes_a_word", "bytes_a_word"))
        lines.append(f"| {bits} | {file:,.0f} | {file + unpacked:,.0f} |")
    if speed := record.get("speed"):
        hours = PLANNED_WORDS / speed["read_words_a_second"] / 3600
        lines += [
            "",
            f"Reading takes {hours:,.0f} core hours with {speed['host']} at the measured "
            f"{speed['read_words_a_second']:,.0f} words a CPU second of one core: {hours / 64:.1f} hours on 64 "
            "cores. Nothing was measured on a GPU; its rate is that of the host's forward pass, of which reading "
            f"keeps {speed['ratio']:.2f} here. Time is linear in words, and processes do not wait for each other.",
        ]
    if "lora" in record and rows:
        task = next(iter(rows.values()))
        lines += [
            "",
            "After that a task costs what its steps cost, whatever the size of the corpus: "
            f"{task['cpu_seconds']:.0f} CPU s for {task['steps']} steps of 32 sentences, where LoRA takes "
            f"{record['lora']['cpu_seconds']:.0f} CPU s for {record['lora']['steps']}. No host is in memory.",
        ]
    return lines
