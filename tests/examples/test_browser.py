"""The page of examples/browser, in headless Chromium: it reads the tokens and finds the entities that Python does."""

import functools
import http.server
import json
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest

from tests.hub_server import client_environment, run_client
from tests.modeling_unihyperlora.small_streams import TOKENIZER, bert, small_stream
from trainers.onnx_runtime import OnnxReader

EXAMPLE = Path(__file__).parents[2] / "examples" / "browser"
FLAGS = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking".split()
FLAGS += ["--disable-component-update", "--disable-sync"]
TEXTS = ["word1 word2, unknown word3", "(word5) 7! word6 word9 word12", "日本 👍🏽ok á! word4\tword8"]
ASKED = """
const [texts, done] = arguments;
(async () => {
  const { Tagger } = await import("./tagger.js");
  const tagger = await Tagger.load("host.onnx", "host.tokenizer.json", "reader.onnx");
  const found = [];
  for (const text of texts) {
    const [words, entities] = [tagger.words(text), await tagger.tag(text)];
    found.push({
      ids: tagger.encode(text),
      words: words.map(([start, end]) => text.slice(start, end)),
      scores: (await tagger.scores(text)).map((row) => [...row]),
      entities: entities.map(({ type, start, end }) => [text.slice(start, end), type]),
    });
  }
  done(found);
})();
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder with the example, its packages and exported files, the texts' own findings, and its address."""
    if not (EXAMPLE / "node_modules").is_dir():
        pytest.skip("the npm packages are missing; run: npm install, in examples/browser")
    pytest.importorskip("onnxruntime")
    folder = tmp_path_factory.mktemp("site")
    for path in EXAMPLE.glob("*.*"):
        shutil.copy(path, folder)
    (folder / "node_modules").symlink_to(EXAMPLE / "node_modules")
    bert().save_pretrained(folder / "host")
    TOKENIZER.save_pretrained(folder / "host")
    model = small_stream()
    model.config.base_model_name_or_path = str(folder / "host")
    model.save_pretrained(folder / "adapter")
    typed = ["export-onnx", folder / "adapter", folder / "reader.onnx", "--host_file", folder / "host.onnx"]
    code = f"from trainers.commands import main\nresult = main({[*map(str, typed)]})"
    assert run_client(code, client_environment("http://127.0.0.1:9", folder / "home"), offline=True) == 0
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield folder, f"http://127.0.0.1:{server.server_port}/index.html"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def browser(tmp_path):
    selenium = pytest.importorskip("selenium.webdriver")
    chromium, driver = (shutil.which(name) for name in ("chromium", "chromedriver"))
    if chromium is None or driver is None:
        pytest.skip("Chromium is missing; on Debian: apt-get install chromium chromium-driver")
    options = selenium.ChromeOptions()
    options.binary_location = chromium
    for flag in [*FLAGS, f"--user-data-dir={tmp_path / 'profile'}"]:
        options.add_argument(flag)
    opened = selenium.Chrome(options=options, service=selenium.ChromeService(driver))
    opened.set_script_timeout(120)
    yield opened
    opened.quit()


@pytest.mark.slow
def test_the_page_finds_what_python_finds(site, browser):
    from selenium.webdriver.support.ui import WebDriverWait

    folder, address = site
    browser.get(address)
    wait = WebDriverWait(browser, 120)
    wait.until(lambda page: page.find_element("id", "tag").is_enabled())
    assert browser.find_element("id", "status").text == "people on host"
    reader = OnnxReader(folder / "host.onnx", folder / "reader.onnx")
    for text, found in zip(TEXTS, browser.execute_async_script(ASKED, TEXTS), strict=True):
        ids = reader.tokenizer.encode(text).ids
        [tagged] = reader.tag([text])
        assert found["ids"] == ids and found["words"] == tagged.words
        logits = reader.logits(np.array([ids]), np.ones((1, len(ids)), np.int64))[0]
        scores = np.array(found["scores"])  # of the words, in order
        assert len(scores) == len(tagged.words)
        assert all(np.abs(logits - row).max(axis=-1).min() < 1e-4 for row in scores)
        if [reader.labels[number] for number in scores.argmax(axis=-1)] == tagged.tags:  # no rule was broken
            assert found["entities"] == [[entity.text, entity.type] for entity in tagged.entities]
    box = browser.find_element("id", "text")
    box.clear()
    box.send_keys(TEXTS[0])
    browser.find_element("id", "tag").click()
    wait.until(lambda page: page.find_element("id", "found").text)
    marks = browser.find_elements("css selector", "#found mark")
    assert [mark.text.split() for mark in marks] == [
        [*text.split(), kind] for text, kind in browser.execute_async_script(ASKED, TEXTS[:1])[0]["entities"]
    ]


@pytest.mark.slow
def test_a_reader_of_another_host_is_refused(site, browser):
    folder, address = site
    said = json.dumps({"kind": "reader", "format": "99"})
    onnx = pytest.importorskip("onnx")
    other = onnx.load(folder / "reader.onnx")
    onnx.helper.set_model_props(other, {"unihyperlora": said})
    onnx.save(other, folder / "other.onnx")
    browser.get(address)
    script = """
    const done = arguments[0];
    import("./tagger.js").then(({ Tagger }) => Tagger.load("host.onnx", "host.tokenizer.json", "other.onnx"))
      .then(() => done("loaded"), (error) => done(error.message));
    """
    assert browser.execute_async_script(script) == "other.onnx is no reader's file of format 1."
