"""The studio in a browser without a screen, and its command."""
import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from forked import command

pytest.importorskip("gradio", reason="gradio is not installed: pip install 'compresslab[app]'")
from compresslab.recursive.comparison import Pair, Setting, side_by_side
from compresslab.recursive.layer import RecursiveCompression
from compresslab.recursive.studio import studio, summary
from compresslab.store import load, save

ROOT = Path(__file__).resolve().parents[1]
ENV = dict(os.environ, HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", COLUMNS="160", PYTHONUNBUFFERED="1")
COMMAND = [str(Path(sys.executable).with_name("compresslab")), "studio"]
BROWSER = next((b for n in ("chromium", "chromium-browser", "google-chrome") if (b := shutil.which(n))), None)
OFF = "() => { const b = document.querySelector('#json'); return b.disabled || b.classList.contains('disabled') }"


@pytest.fixture
def tab():
    """A page of a browser, with everything that it asked for and every error that it wrote."""
    if not BROWSER: pytest.skip("no Chromium here: apt-get install chromium")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        page = browser.new_page(viewport=dict(width=1440, height=1300), accept_downloads=True)
        page.asked, page.errors = [], []
        page.on("request", lambda r: page.asked.append(r.url))
        page.on("console", lambda m: page.errors.append(m.text) if m.type == "error" else None)
        yield page
        browser.close()


def number(page, card): return page.inner_text(f'#numbers [data-card="{card}"] b')


def set_slider(page, name, value):
    box = page.locator(f"#{name} input[type=number]")
    box.fill(str(value)); box.press("Tab")


def run(page):
    """Press Run; at the end the files, which it takes away at first, are ready."""
    page.wait_for_timeout(300)                                                              # a slider tells the server
    before = page.inner_html("#numbers")
    page.click("#run")
    page.wait_for_function("h => document.querySelector('#numbers').innerHTML !== h", arg=before, timeout=60_000)
    page.wait_for_function(OFF, timeout=60_000)
    page.wait_for_function(OFF.replace("return ", "return !(").replace(" }", ") }"), timeout=60_000)


def test_page_runs_and_sliders_change_the_ratio(tab, pylm, monkeypatch):
    out = ROOT/"out"/"studio"; out.mkdir(parents=True, exist_ok=True)
    blocks = studio(pylm, prevent_thread_lock=True, quiet=True, inline=False)
    try:
        tab.goto(blocks.local_url); tab.wait_for_selector("#run")
        assert "Press Run" in tab.inner_text("#numbers") and "same color, same entry" in tab.inner_text("body")
        run(tab)
        ratio, share = float(number(tab, "ratio").rstrip("×")), number(tab, "memory")
        assert 1.3 < ratio < 4 and number(tab, "parachute") == "off"
        assert "class Stack" in tab.inner_text("#left") and "class Stack" in tab.inner_text("#right") and tab.locator("#layers tr").count() == 7
        assert tab.locator("#right .k").count() > 20 and tab.locator("#memory polyline").count() == 2

        one = tab.locator("#right .k", has_text="self").nth(1)
        one.hover(); name = next(c for c in one.get_attribute("class").split() if c[0] == "k" and c[1:])
        said = one.evaluate("e => getComputedStyle(e, '::after').content")
        assert "similarity" in said or "first of its cluster" in said
        assert "Importance" in said and "share one entry" in said
        lit = tab.locator(f"#right .{name}")
        assert lit.count() > 1 and lit.last.evaluate("e => getComputedStyle(e).backgroundColor") == "rgb(17, 24, 39)"
        tab.screenshot(path=out/"hover.png", full_page=True)

        with tab.expect_download() as got: tab.click("#json")
        record = json.loads(Path(got.value.path()).read_text())
        assert f"{record['summary']['ratio']:.2f}×" == number(tab, "ratio") and record["setting"]["threshold"] == .85 and len(record["events"]) > 96
        with tab.expect_download() as got: tab.click("#html")
        assert "tokens colored by cluster of layer 0" in Path(got.value.path()).read_text()

        set_slider(tab, "threshold", .6); set_slider(tab, "level2", .4); set_slider(tab, "recent", 16)
        tab.locator("#parachute input").check()
        run(tab)
        assert float(number(tab, "ratio").rstrip("×")) > 1.3*ratio and float(number(tab, "memory")[:-1]) < float(share[:-1]) and number(tab, "parachute") != "off"
        tab.screenshot(path=out/"studio.png", full_page=True)

        small = float(number(tab, "memory")[:-1])
        set_slider(tab, "level2", 0); set_slider(tab, "residuals", .5); run(tab)
        assert float(number(tab, "memory")[:-1]) > small and float(number(tab, "ratio").rstrip("×")) < ratio, "residuals take bytes and are entries"

        before = tab.inner_html("#right")
        tab.locator("#layer input").click(); tab.get_by_role("option", name="5").click()
        tab.wait_for_function("h => document.querySelector('#right').innerHTML !== h", arg=before, timeout=10_000)

        before = tab.inner_html("#numbers")
        here = sys.modules["compresslab.recursive.studio"]; steps = here.side_by_side
        def slowly(*args, **kwargs):                                                            # so that it can be stopped on a slow machine, too
            for event in steps(*args, **kwargs): time.sleep(.1); yield event
        monkeypatch.setattr(here, "side_by_side", slowly)
        set_slider(tab, "threshold", .9); tab.wait_for_timeout(300); tab.click("#run")
        tab.wait_for_function("h => document.querySelector('#numbers').innerHTML !== h", arg=before)
        tab.wait_for_function(OFF); tab.click("#stop"); tab.wait_for_function(OFF.replace("return ", "return !(").replace(" }", ") }"))
        with tab.expect_download() as got: tab.click("#json")
        assert 1 <= len(json.loads(Path(got.value.path()).read_text())["events"]) < 90, "it was stopped"

        tab.fill("#model textarea, #model input", "no/such/model"); tab.click("#load")
        tab.wait_for_selector("text=Tried: the path", timeout=20_000)
        assert not [u for u in tab.asked if "127.0.0.1" not in u and not u.startswith(("data:", "blob:"))], "the page asks other machines"
        assert not tab.errors
    finally: blocks.close(verbose=False)


def test_command_serves_on_this_machine_alone(tiny):
    process = subprocess.Popen([*COMMAND, str(tiny), "--port", "7979"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ENV)
    try:
        line = next(l for l in process.stdout if "http" in l)
        assert "127.0.0.1:7979" in line
        assert "compresslab studio" in urllib.request.urlopen("http://127.0.0.1:7979").read().decode()
    finally: process.terminate(); process.wait(20)


def test_command_says_in_one_line_what_is_wrong():
    done = command("studio", "no/such/model", env=ENV)
    assert done.returncode == 1 and "Tried: the path" in done.stderr and "Traceback" not in done.stderr
    code = "import sys; sys.modules['gradio'] = None; sys.argv = ['compresslab', 'studio']; from compresslab.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENV)
    assert done.returncode == 1 and "pip install 'compresslab[app]'" in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_a_saved_model_with_clusters_is_compared_with_itself(pylm, tmp_path):
    save(RecursiveCompression(similarity_threshold=.6, recent=8, window=128).apply(load(pylm)), tmp_path/"m")
    pair = Pair.open(tmp_path/"m")
    assert Setting.of(pair.compressed).threshold == .6
    prompt = "import os\nimport sys\n\n\ndef main(argv):\n    for name in argv:\n        print(os.path.join(name, 'x'))\n"*3
    events = list(side_by_side(pair, prompt, Setting.of(pair.compressed, max_new_tokens=8)))
    plain = list(side_by_side(Pair.open(pylm), prompt, Setting(max_new_tokens=8)))
    text = [["".join(t["text"] for e in run[1:] for t in e["original"]["tokens"])] for run in (events, plain)]
    assert text[0] == text[1] and summary(events)["share"] < .6
    assert events[-1]["original"]["kv_bytes"] == plain[-1]["original"]["kv_bytes"]


def test_real_stories(stories260k):
    """A quarter of the bytes on another model, with text that it knows: the prompt costs little."""
    model, tokenizer, texts = stories260k
    story = next(l for l in (p for f in sorted(Path(texts).iterdir()) if f.suffix == ".txt" for p in f.read_text().split("<|endoftext|>")) if len(l) > 900)[:900]
    events = list(side_by_side(Pair.open(model, tokenizer), story, Setting(.9, max_new_tokens=30)))
    found = summary(events)
    print(found)
    assert found["share"] < .9 and found["prompt_ppl"] < 1.05*found["prompt_ppl_original"]
    assert "".join(t["text"] for e in events if e["phase"] == "read" for t in e["original"]["tokens"]).strip() == story.strip()
