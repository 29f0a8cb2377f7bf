"""The page of ``unihyperlora demo --web``: what it reads, and what a real browser shows of it."""

import json
import shutil

import pytest

from modeling_unihyperlora import ConfigError, HostError, UniHyperLoraForSequenceClassification
from modeling_unihyperlora import UniHyperLoraForTokenClassification as Tagger
from trainers.commands.demo import SENTENCES, main
from trainers.commands.tag import coloured
from trainers.tagging import tag
from trainers.web_demo import Bench

TEXT = "Anna flew from Paris to Oslo."
LABELS = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]


@pytest.fixture(scope="module")
def adapter(tiny_host, tmp_path_factory):
    """Folder of an adapter with two tasks of tags, whose head finds much."""
    folder = tmp_path_factory.mktemp("web") / "adapter"
    model = Tagger.from_host(str(tiny_host), labels=LABELS, task="people", reader="small")
    model.add_task("places", ["O", "B-LOC"], reader="small")
    for task in model.adapter.tasks.values():
        task.head_bias.latent.data.fill_(0.0)
        task.head_bias.latent.data[1:] = 3.0
    model.set_task("people")
    model.save_pretrained(folder)
    model.detach()
    return folder


class TestTheBench:
    def test_it_finds_what_tag_finds(self, adapter, tiny_host):
        found = Bench().read(str(adapter), None, str(tiny_host), TEXT)
        (expected,) = tag(Tagger.from_pretrained(adapter), [TEXT])
        assert found.marked and found.marked == tuple((e.start, e.end, e.type) for e in expected.entities)
        assert found.text == TEXT and found.milliseconds > 0
        assert found.host == "bert encoder, 2 blocks × 64"

    def test_the_bytes_are_those_of_the_file(self, adapter, tiny_host):
        found = Bench().read(str(adapter), "places", str(tiny_host), TEXT)
        assert f"{(adapter / 'model.safetensors').stat().st_size:,} bytes" in found.file

    def test_an_adapter_stays_on_its_host(self, adapter, tiny_host):
        bench = Bench()
        assert bench.load(str(adapter), "people", str(tiny_host)) is bench.load(str(adapter), "people", str(tiny_host))

    def test_tasks_and_what_they_mark(self, adapter):
        assert Bench().tasks(str(adapter)) == ["people", "places"]
        assert Bench().kinds(str(adapter), None) == ["LOC", "PER"]

    def test_a_classifier_marks_the_whole_text(self, tiny_host, tmp_path):
        model = UniHyperLoraForSequenceClassification.from_host(
            str(tiny_host), labels=["bad", "good"], task="mood", reader="small"
        )
        model.save_pretrained(tmp_path / "mood")
        found = Bench().read(str(tmp_path / "mood"), None, str(tiny_host), TEXT)
        assert [place[:2] for place in found.marked] == [(0, len(TEXT))]
        assert found.marked[0][2] in Bench().kinds(str(tmp_path / "mood"), None) == ["bad", "good"]

    def test_what_is_missing_is_said(self, adapter, tiny_host):
        bench = Bench()
        with pytest.raises(ConfigError, match="no text"):
            bench.read(str(adapter), None, str(tiny_host), "  ")
        with pytest.raises(ConfigError, match="no host"):
            bench.read(str(adapter), None, "", TEXT)
        with pytest.raises(ConfigError, match="no adapter"):
            bench.read(" ", None, str(tiny_host), TEXT)
        with pytest.raises(ConfigError, match="No task 'no'"):
            bench.read(str(adapter), "no", str(tiny_host), TEXT)
        with pytest.raises(HostError, match="no/such-host"):
            bench.read(str(adapter), None, "no/such-host", TEXT)


class TestTheCommand:
    def test_in_the_terminal_two_hosts_stand_side_by_side(self, adapter, tiny_host, capsys):
        main([str(adapter), "--hosts", str(tiny_host), f"{tiny_host}/"])
        rows = [line.split("│")[1:3] for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
        left, right = (" ".join(cell.strip() for cell in column) for column in zip(*rows, strict=True))
        expected = " ".join(coloured(found).plain for found in tag(Tagger.from_pretrained(adapter), list(SENTENCES)))
        assert left == right == expected and "[PER]" in expected

    def test_what_only_the_page_reads_is_refused(self):
        for given in (["an/adapter", "another/adapter"], ["--port", "7861"]):
            with pytest.raises(ConfigError, match="Give --web, or leave them out"):
                main(given)

    def test_it_says_what_to_install(self, monkeypatch):
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(ConfigError, match=r"unihyperlora\[web\]"):
            main(["--web", "an/adapter"])


@pytest.fixture
def browser(tmp_path):
    """A headless Chromium that notes every request."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium: pip install selenium")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("needs Chromium and its driver: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (
        *("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking"),
        *("disable-component-update", "disable-sync", "window-size=1200,900", f"user-data-dir={tmp_path / 'profile'}"),
    ):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    chrome = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield chrome
    chrome.quit()


def requested(browser) -> set[str]:
    """Addresses, less what is behind the host, that the browser asked for."""
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    sent = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    return {"/".join(url.split("/")[:3]) for url in sent if url.startswith("http")}


@pytest.mark.slow
def test_a_browser_shows_both_sides(browser, adapter, tiny_host):
    pytest.importorskip("gradio", reason="needs gradio: pip install 'unihyperlora[web]'")
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import WebDriverWait

    from trainers.web_demo import page, serve

    def element(name: str):
        return WebDriverWait(browser, 120).until(lambda _: browser.find_element(By.CSS_SELECTOR, name))

    def wait_for(name: str, part: str):
        WebDriverWait(browser, 120).until(lambda _: part in browser.find_element(By.CSS_SELECTOR, name).text)

    def type_into(name: str, text: str):
        box = element(name)
        box.send_keys(Keys.CONTROL, "a")
        box.send_keys(text, Keys.ENTER)

    blocks = page([str(adapter)], (str(tiny_host), "no/such-host"))
    address = serve(blocks, wait=False)
    try:
        browser.get(address)
        type_into("#text textarea", TEXT)
        wait_for("#left-said", "ms · bert encoder, 2 blocks × 64")
        wait_for("#right-said", "no/such-host")
        said = element("#right-said").text
        assert said.startswith("⚠️") and "Traceback" not in said
        (expected,) = tag(Tagger.from_pretrained(adapter), [TEXT])
        shown = element("#left-found").text
        for entity in expected.entities:
            assert entity.text in shown and entity.type in shown
        assert f"{(adapter / 'model.safetensors').stat().st_size:,} bytes" in element("#file").text
        type_into("#right-host input", str(tiny_host))
        element("#find").click()
        wait_for("#right-said", "ms · bert encoder")
        assert element("#right-found").text == element("#left-found").text
        assert requested(browser) == {address.rstrip("/")}
    finally:
        blocks.close()
