"""A web page on this machine: one sentence, one adapter file, and what the file finds on two hosts side by side.

``Bench`` puts adapters on hosts and reads texts with them; ``page`` is what a browser shows of it, made with Gradio.
"""

import importlib.util
import os
import time
from dataclasses import dataclass
from functools import lru_cache

from transformers.utils import CONFIG_NAME

from modeling_unihyperlora import (
    ConfigError,
    UniHyperLoraError,
    UniHyperLoraForSequenceClassification,
    UniHyperLoraForTokenClassification,
)
from modeling_unihyperlora.configuration_unihyperlora import read_config
from modeling_unihyperlora.measure.accounting import bytes_of_parts
from modeling_unihyperlora.storage import adapter_file, file_bytes

from .tagging import classify, tag

KEPT = 4  # adapters on hosts that stay in memory
HOSTS = (
    "sentence-transformers/all-MiniLM-L6-v2",
    "sentence-transformers/all-mpnet-base-v2",
    "distilbert-base-uncased",
    "google/bert_uncased_L-2_H-128_A-2",
    "HuggingFaceTB/SmolLM2-135M",
)  # suggestions; any other may be typed
COLOURS = ("#0f9d8a", "#e8890c", "#7b61c9", "#d1495b", "#2f7ed8", "#6a994e", "#b5651d", "#5c677d")
EXAMPLE = "Angela Merkel met Tim Cook at Apple in Cupertino."


@dataclass(frozen=True)
class Reading:
    """What an adapter finds in a text on one host.

    Attributes:
        text: what was read.
        marked: (start, end, kind) of each entity; of a classifier the whole text and its class.
        host: one line on the host.
        milliseconds: of reading the text, host and reader together.
        file: one line on the adapter's file.
    """

    text: str
    marked: tuple[tuple[int, int, str], ...]
    host: str
    milliseconds: float
    file: str


class Bench:
    """Adapters on hosts; those used last stay in memory."""

    def __init__(self) -> None:
        self.load = lru_cache(KEPT)(load)

    def tasks(self, adapter: str) -> list[str]:
        """Names of an adapter's tasks, the active one first.

        Raises:
            UniHyperLoraError: there is no such adapter, or it has no task.
        """
        config = config_of(adapter)
        return sorted(config.tasks, key=lambda name: name != config.active_task)

    def kinds(self, adapter: str, task: str | None) -> list[str]:
        """What a task may mark: types of entities, or classes."""
        config = config_of(adapter)
        own = config.tasks[task or config.active_task]
        if own["type"] == "sequence_classification":
            return list(own["labels"])
        return sorted({label.partition("-")[2] or label for label in own["labels"] if label != "O"})

    def read(self, adapter: str, task: str | None, host: str, text: str) -> Reading:
        """Read a text on a host.

        Raises:
            UniHyperLoraError: the text is empty, or the adapter or the host cannot be used.
        """
        if not text.strip():
            raise ConfigError("There is no text. Type a sentence.")
        if not host.strip():
            raise ConfigError("There is no host. Choose one, or type a Hub id or a folder.")
        model = self.load(adapter.strip(), task, host.strip())
        start = time.perf_counter()
        marked = marks(model, text)
        milliseconds = 1000 * (time.perf_counter() - start)
        return Reading(text, marked, describe_host(model), milliseconds, describe_file(model))


def config_of(adapter: str):
    if not adapter.strip():
        raise ConfigError("There is no adapter. Choose one, or type its folder or Hub id.")
    config = read_config(adapter_file(adapter.strip(), CONFIG_NAME, "main", {}))
    if not config.tasks:
        raise ConfigError(f"{adapter} has no task, so that it can mark nothing. Train one first.")
    return config


def load(adapter: str, task: str | None, host: str):
    """An adapter on a host, after a first sentence, which takes longer than the next ones."""
    config = config_of(adapter)
    task = task or config.active_task
    if task not in config.tasks:
        raise ConfigError(f"No task {task!r} in {adapter}; it has {sorted(config.tasks)}.")
    kinds = (UniHyperLoraForTokenClassification, UniHyperLoraForSequenceClassification)
    kind = next(kind for kind in kinds if kind.task_type == config.tasks[task]["type"])
    model = kind.from_pretrained(adapter, base_model_name_or_path=host, task=task)
    marks(model, EXAMPLE)
    return model


def marks(model, text: str) -> tuple[tuple[int, int, str], ...]:
    """(start, end, kind) of what the model's active task finds in a text."""
    if isinstance(model, UniHyperLoraForSequenceClassification):
        (found,) = classify(model, [text])
        return ((0, len(text), found.label),)
    (found,) = tag(model, [text])
    return tuple((entity.start, entity.end, entity.type) for entity in found.entities)


def describe_host(model) -> str:
    config = model.host.config
    blocks = model.injection.map.num_layers if model.stream is None else model.stream.words.num_layers
    reads = "decoder" if model.stream is not None and model.stream.words.causal else "encoder"
    return f"{config.model_type} {reads}, {blocks} blocks × {config.hidden_size}"


def describe_file(model) -> str:
    parts = bytes_of_parts(model.adapter)
    shown = ", ".join(f"{name} {size:,}" for name, size in parts.items() if size)
    return f"**{file_bytes(model.adapter):,} bytes** in one file ({shown}); none of them belongs to a host."


# ---- the page ----


def page(adapters: list[str], hosts: tuple[str, str]):
    """The page as Gradio's ``Blocks``.

    Args:
        adapters: folders or Hub ids to choose from, the first one chosen; any other may be typed.
        hosts: what stands on both sides at first.

    Raises:
        ConfigError: Gradio is not installed.
    """
    if importlib.util.find_spec("gradio") is None:
        raise ConfigError("The page needs gradio, which is not installed: pip install 'unihyperlora[web]'.")
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before Gradio is imported: nothing is sent anywhere
    import gradio as gr

    bench = Bench()
    choices = list(dict.fromkeys([*hosts, *HOSTS]))

    def show_tasks(adapter: str):
        try:
            tasks = bench.tasks(adapter)
        except UniHyperLoraError:  # said when the text is read
            tasks = []
        return gr.Dropdown(choices=tasks, value=tasks[0] if tasks else None, visible=len(tasks) > 1)

    def show_side(adapter: str, task: str | None, host: str, text: str):
        """Marked text, one line below it, and one on the file."""
        try:
            found = bench.read(adapter, task, host, text)
            colours = dict(zip(bench.kinds(adapter, task), COLOURS * 9, strict=False))
        except UniHyperLoraError as error:
            return gr.HighlightedText(value=None), f"⚠️ {error}", ""
        entities = [{"entity": kind, "start": start, "end": end} for start, end, kind in found.marked]
        shown = gr.HighlightedText(value={"text": found.text, "entities": entities}, color_map=colours)
        return shown, f"{found.milliseconds:,.0f} ms · {found.host}", found.file

    def read(adapter: str, task: str | None, text: str, left: str, right: str):
        first, second = (show_side(adapter, task, host, text) for host in (left, right))
        return *first[:2], *second[:2], first[2] or second[2]

    with gr.Blocks(title="UniHyperLoRA", analytics_enabled=False) as blocks:
        gr.Markdown(
            "# One adapter file, two hosts\nThe file was trained on one host. It works on others, without a label."
        )
        with gr.Row():
            adapter = gr.Dropdown(
                adapters, value=adapters[0], allow_custom_value=True, label="Adapter", elem_id="adapter", scale=3
            )
            task = gr.Dropdown([], label="Task", elem_id="task", visible=False, scale=1)
        with gr.Row(equal_height=True):
            text = gr.Textbox(EXAMPLE, label="Text", elem_id="text", scale=6)
            button = gr.Button("Find", variant="primary", elem_id="find", min_width=100)
        sides = []
        with gr.Row():
            for name, host in zip(("left", "right"), hosts, strict=True):
                with gr.Column():
                    chosen = gr.Dropdown(
                        choices, value=host, allow_custom_value=True, label="Host", elem_id=f"{name}-host"
                    )
                    marked = gr.HighlightedText(show_label=False, elem_id=f"{name}-found")
                    sides.append((chosen, marked, gr.Markdown(elem_id=f"{name}-said")))
        file = gr.Markdown(elem_id="file")
        (left, left_found, left_said), (right, right_found, right_said) = sides
        inputs, outputs = [adapter, task, text, left, right], [left_found, left_said, right_found, right_said, file]
        adapter.change(show_tasks, adapter, task, api_visibility="private")
        blocks.load(show_tasks, adapter, task, api_visibility="private")
        gr.on([button.click, text.submit], read, inputs, outputs, api_visibility="private")
    return blocks


def serve(blocks, port: int | None = None, wait: bool = True) -> str:
    """Serve a page on this machine alone; returns its address."""
    import gradio as gr

    theme = gr.themes.Soft(primary_hue="teal", font=["system-ui", "sans-serif"], font_mono=["monospace"])
    _, address, _ = blocks.launch(
        server_name="127.0.0.1",
        server_port=port,
        share=False,
        theme=theme,
        footer_links=[],
        ssr_mode=False,
        quiet=True,
        prevent_thread_lock=True,
    )
    if wait:
        print(f"The page is at {address} (Ctrl-C ends it).", flush=True)
        blocks.block_thread()
    return address
