"""The routing report: what it holds is what the model decided, and in a real browser it works without a network."""

import json
import re
import runpy
import shutil
import subprocess
import sys

import pytest
import torch
from PIL import Image

from utils.evaluation.routing_report import read_inputs, render_report, route_inputs
from utils.io.errors import UserError
from utils.model.checkpoint import load_mod_model, load_tokenizer, write_checkpoint
from utils.model.configuration_mod import MoDSettings

MARKUP = "</script><img src=x onerror=alert(1)> & <!--"
TEXT = f"The lamp is lit.\nIt shines on the water.\n\nWas läuft draußen? 🙂\n\n{MARKUP}\n"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed (Debian: apt install chromium)")


@pytest.fixture(scope="module", params=["attn_sequence", "block_token"])
def checkpoint(request, workplace):
    """A tiny checkpoint that decides differently for different inputs."""
    settings = MoDSettings(request.param, (2, 3, 4))
    generator = torch.Generator().manual_seed(3)
    routers = {f"model.layers.{layer}.router.weight": torch.randn(1, 16, generator=generator) for layer in (2, 3, 4)}
    directory = workplace / f"report-{request.param}"
    write_checkpoint(directory, workplace / "base", settings, routers)
    return directory


@pytest.fixture(scope="module")
def page(checkpoint, repository, workplace):
    """The page that the command writes, and what it holds."""
    text = workplace / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    output = workplace / f"{checkpoint.name}.html"
    entrypoint = repository / "entrypoints/evaluation/routing_report.py"
    command = [entrypoint, checkpoint, "--text", text, "--output", output, "--device", "cpu"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(part) for part in command])
        with pytest.raises(SystemExit) as exit_code:
            runpy.run_path(str(entrypoint), run_name="__main__")
    assert exit_code.value.code == 0
    return output


def held(page):
    (values,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page.read_text("utf-8"), re.S)
    return json.loads(values)


def test_the_page_holds_every_decision_and_the_whole_text(page, checkpoint):
    values = held(page)
    model, tokenizer = load_mod_model(checkpoint).eval(), load_tokenizer(checkpoint)
    inputs = [part.strip("\n") for part in TEXT.split("\n\n")]
    assert ["".join(token for token in shown["tokens"] if token != "·") for shown in values["inputs"]] == inputs
    for text, shown in zip(inputs, values["inputs"], strict=True):
        encoded = tokenizer(text, return_tensors="pt")
        assert len(shown["tokens"]) == encoded.input_ids.shape[1]
        with torch.no_grad():
            gates = model(encoded.input_ids).router_gates[:, 0].reshape(3, -1)
        assert [[int(gate) for gate in row] for row in shown["gates"]] == gates.T.int().tolist()
    every = [gate for shown in values["inputs"] for row in shown["gates"] for gate in row]
    assert {"0", "1"} == set(every)
    assert values["capacity"] == pytest.approx(every.count("1") / len(every))


def test_the_page_needs_nothing_from_outside(page):
    text = page.read_text("utf-8")
    assert not re.findall(r"https?:|//cdn|@import|url\(|<link|<script[^>]+src", text)
    assert text.count("</script>") == 2
    assert "<img" not in text


def browse(page, *arguments):
    """Run Chromium on a page, without a network."""
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        "--host-resolver-rules=MAP * ~NOTFOUND",
    ]
    result = subprocess.run(
        [CHROMIUM, *options, *arguments, page.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    return result.stdout


KEYS = """
<script>
const log = [], at = () => document.activeElement, press = (key) =>
  at().dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true, cancelable: true }));
const shades = () => [...document.querySelectorAll(".token")].map((token) => token.style.background);
const note = () => log.push({
  place: [at().place.number, at().place.position ?? at().place.layer],
  details: document.getElementById("details").textContent,
});
const reachable = (name) => document.querySelectorAll(name + '[tabindex="0"]');
log.push({ tabStops: [reachable(".token").length, reachable("td.cell").length], errors: window.failed || 0 });
reachable(".token")[0].focus(); note();
press("ArrowRight"); note();
press("ArrowDown"); note();
press("Home"); note();
press("End"); note();
reachable("td.cell")[0].focus(); note();
press("ArrowDown"); press("ArrowRight"); note();
const before = shades();
document.querySelector('#filter input[data-layer="2"]').click();
const rows = [...document.querySelectorAll("#map tbody tr")].filter((row) => row.offsetParent);
log.push({ rows: rows.length });
document.getElementById("none").click();
log.push({ white: new Set(shades()).size });
document.getElementById("all").click();
log.push({ back: String(shades()) === String(before) });
document.body.setAttribute("data-log", JSON.stringify(log));
</script>
"""


@needs_chromium
def test_in_a_browser_keys_move_the_focus_and_layers_can_be_left_out(page, tmp_path):
    copy = tmp_path / "page.html"
    listen = '<script>window.failed = 0; addEventListener("error", () => { window.failed += 1; });</script><meta '
    copy.write_text(page.read_text("utf-8").replace("<meta ", listen, 1) + KEYS, encoding="utf-8")
    dom = browse(copy, "--dump-dom")
    (log,) = re.findall(r'data-log="(.*?)"', dom)
    for entity, character in (("&quot;", '"'), ("&lt;", "<"), ("&gt;", ">"), ("&amp;", "&")):
        log = log.replace(entity, character)
    stops, first, right, down, home, end, cell, moved, filtered, none, everything = json.loads(log)
    assert stops == {"tabStops": [1, 1], "errors": 0}
    inputs = held(page)["inputs"]
    assert [step["place"] for step in (first, right, down, home)] == [[0, 0], [0, 1], [1, 0], [0, 0]]
    assert end["place"] == [2, len(inputs[2]["tokens"]) - 1]
    gates = inputs[0]["gates"][0]
    assert f"{gates.count('1')} of 3 routed layers ran, depth {3 + gates.count('1')} of 6" in first["details"]
    assert cell["place"] == [0, 2]  # the deepest layer is on top
    assert moved["place"] == [1, 1]
    assert "Layer 3, input 2" in moved["details"]
    assert filtered["rows"] == 2
    assert none["white"] == 1
    assert everything["back"]
    assert "<img" not in dom


@needs_chromium
def test_the_screenshot_is_grey_and_shows_light_and_dark(page, tmp_path):
    picture = tmp_path / "page.png"
    browse(page, "--window-size=1000,900", f"--screenshot={picture}")
    pixels = Image.open(picture).convert("RGB")
    colors = {color for _, color in pixels.getcolors(2**24)}
    assert all(max(color) - min(color) <= 8 for color in colors)
    counts = {color[0]: count for count, color in pixels.getcolors(2**24)}
    assert sum(count for value, count in counts.items() if value < 140) > 2000
    assert sum(count for value, count in counts.items() if value > 230) > 2000


def test_inputs_are_paragraphs_or_rows_and_no_text_is_one_line(tmp_path):
    def write(name, text):
        (tmp_path / name).write_text(text, encoding="utf-8")
        return tmp_path / name

    assert read_inputs(write("a.txt", "one\ntwo\n\n\n  \nthree")) == ["one\ntwo", "three"]
    rows = [{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}, {"text": "x"}]
    assert read_inputs(write("a.jsonl", "".join(json.dumps(row) + "\n" for row in rows))) == ["Hi\nHo", "x"]
    for path, message in (
        (tmp_path / "nowhere", "no such file"),
        (write("b.txt", " \n\n"), "no text"),
        (write("b.jsonl", "{"), "not JSON lines"),
    ):
        with pytest.raises(UserError, match=message):
            read_inputs(path)


def test_long_inputs_are_cut(checkpoint):
    model, tokenizer = load_mod_model(checkpoint).eval(), load_tokenizer(checkpoint)
    routed = route_inputs(model, tokenizer, ["one two three four five six"], max_tokens=3)
    assert len(routed["inputs"][0]["tokens"]) == 3
    assert "one two three" in render_report(routed, "x").replace('", "', "")
