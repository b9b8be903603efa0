"""The page: self-contained, escaped, and right in every state of a run; in a real browser too where one is found."""

import dataclasses
import html
import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from page_checks import checked
from PIL import Image

from library.embedding.clients import usages
from library.output.html_report import HtmlReport, Standing, run_of_report
from library.output.learning_report import LearningReport, Measured
from library.output.run_facts import ImageFact, RunFacts
from library.output.sample_prompts import SamplePrompt
from library.output.verdict import Verdict

NASTY = "<script>alert(1)</script>\"'&<img src=x onerror=alert(1)>"
STEPS = 60


def facts(folder: Path, text: str = "mychar") -> RunFacts:
    """Facts in which every text of a user's is ``text``."""
    images = []
    for number, size in enumerate([(96, 64), (64, 64)]):
        path = folder / f"{number}.png"
        Image.fromarray(np.full((size[1], size[0], 3), 90 * number, np.uint8)).save(path)
        kept = (1 / 6, 0.0, 5 / 6, 1.0) if number == 0 else None
        images.append(ImageFact(path, text, size, (64, 64), 10, 1 / 3 if kept else 0.0, kept, False))
    return RunFacts(
        run="f00d",
        token=text,
        num_vectors=2,
        base=f"Stable Diffusion 1.x, {text}",
        total_steps=STEPS,
        file=folder / "mychar.safetensors",
        details=(("Base model", text), ("Seed", "1")),
        command=f"python train_textual_inversion.py \\\n  --token_string={text}",
        toml=f'token_string = "{text}"\n',
        images=tuple(images),
        num_images=2,
        prompts=(SamplePrompt(text, text, seed=1), None, SamplePrompt("a photo", steps=12)),
        usages=tuple(usages("mychar", ".safetensors", text, 2, pair=False)),
        notes=(text,),
        snippet=f"pipe.load_textual_inversion({text!r})",
    )


def lines(folder: Path, label: str = "mychar") -> list[dict]:
    """What a run of so many steps notes."""
    (folder / "sample").mkdir(exist_ok=True)
    Image.new("RGB", (64, 48), "teal").save(folder / "sample" / "first.png")
    found = [{"step": 0, "nearest": {label: [[label, 1.0], ["girl", 0.5]]}}]
    for step in range(1, STEPS + 1):
        found.append({"step": step, "loss": 1 / step, "loss/0-249": 2 / step, "lr": 5e-3, f"norm/{label}": 0.4 + step})
        found[-1] |= {f"moved/{label}": float(step), f"cosine/{label}": 1 / step, "steps_per_second": 2.0}
    return [*found, {"step": 30, "samples": {"0": "first.png", "2": "gone.png"}}, {"step": 31, "unknown": {"a": []}}]


def page_of(folder: Path, standing: Standing, text: str = "mychar") -> str:
    report = HtmlReport(facts(folder, text), {text: 0.4}, folder / "sample")
    return report.page(lines(folder, text), standing)


def learned(label: str = '"girl"') -> LearningReport:
    picture = np.zeros((8, 8, 3), np.uint8)
    return LearningReport(
        Measured(label, 0.5, 50.0, [picture]), Measured('"mychar"', 0.4, 20.0, [picture]), [picture], held_out=False
    )


DONE = Standing(STEPS, 90.0, running=False, verdict=Verdict("LEARNED", "it is."), learned=learned())
STATES = {
    "new": Standing(0, 0.0),
    "running": Standing(20, 30.0, 60.0),
    "measuring": Standing(STEPS, 80.0, 0.0),
    "early": Standing(20, 30.0, running=False),
    "unjudged": Standing(STEPS, 80.0, running=False, saved=True),
    "done": DONE,
}


@pytest.mark.parametrize("name", STATES)
def test_a_page_is_whole_and_needs_nothing_else(name, tmp_path):
    text = page_of(tmp_path, STATES[name])
    page = checked(text)
    assert ("refresh" in [meta.get("http-equiv") for meta in page.all("meta")]) is STATES[name].running
    assert len(page.all("img")) == 3  # two training images, one sample image; another is gone
    assert len(page.all("svg")) == 6
    said = {"new": "0 of 60 steps", "running": "About 1 min 0 s left", "measuring": "All steps are done"}
    said |= {"early": "ended at step 20 of 60", "done": "It is.", "unjudged": "before the result was judged"}
    assert said[name] in page.text


def test_nothing_to_show_yet_is_no_error(tmp_path):
    empty = dataclasses.replace(facts(tmp_path), images=(), num_images=0, prompts=())
    page = checked(HtmlReport(empty, {}, tmp_path).page([], Standing(0, 0.0)))
    assert page.all("svg") == page.all("img") == []


def test_whatever_a_user_writes_is_text(tmp_path):
    nasty = dataclasses.replace(DONE, verdict=Verdict("LEARNED", NASTY), learned=learned(NASTY))
    text = page_of(tmp_path, nasty, NASTY)
    page = checked(text)
    assert "<script>alert" not in text
    assert "onerror=alert(1)>" not in text
    # caption twice, prompt, negative prompt, note, command and so on, each as it was written
    assert page.text.count(NASTY) >= 8


def test_a_template_s_own_sign_in_a_text_is_kept(tmp_path):
    assert "costs $5 ${title} $$" in checked(page_of(tmp_path, DONE, "costs $5 ${title} $$")).text


def test_captions_crops_prompts_and_snippets_are_shown(tmp_path):
    page = checked(page_of(tmp_path, DONE))
    assert "96 × 64 in bucket 64 × 64; 33% cropped away; 10 × an epoch" in page.text
    assert "seed 1, 30 steps, scale 7.5, 512 × 512" in page.text
    assert "another seed each time, 12 steps" in page.text
    copied = [button["data-copy"] for button in page.all("button")]
    assert set(copied) == {attributes["id"] for attributes in page.all("code") if "id" in attributes}
    assert len(copied) == 6 + 3  # a word for each client, and the three snippets
    for name in ("mychar 60.4", "usual word 0.4", "Distance moved", "Loss by timestep"):
        assert name in " ".join(page.text.split()), name


def test_growing_tables_stay_short(tmp_path):
    report = HtmlReport(facts(tmp_path), {}, tmp_path)
    many = [{"step": step, "nearest": {"mychar": []}, "norm/mychar": 1.0} for step in range(500)]
    page = checked(report.page(many, DONE))
    rows = [line for line in page.text.splitlines() if line]
    assert len(page.all("tr")) < 60, rows


def test_whose_page_it_is(tmp_path):
    file = tmp_path / "mychar.html"
    assert run_of_report(file) is None
    file.write_text(page_of(tmp_path, DONE), encoding="utf-8")
    assert run_of_report(file) == "f00d"
    file.write_text("<html>mine")
    assert run_of_report(file) is None


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is found")
@pytest.mark.parametrize("width", [1280, 390])
def test_in_a_browser(width, tmp_path):
    """Scripts run, no error is said, nothing is wider than the screen, and every image has its pixels.

    In a frame, since a window of Chromium's is never narrower than 500 pixels.
    """
    probe = """<script>addEventListener("load", () => {
      const root = document.documentElement, images = [...document.images];
      const loads = performance.getEntriesByType("resource").map(each => each.name);
      parent.postMessage({wide: root.scrollWidth - root.clientWidth, width: innerWidth, images: images.length,
        empty: images.filter(image => !image.naturalWidth).length,
        loads: loads.filter(name => !name.startsWith("data:"))}, "*");
    });</script></body>"""
    page = page_of(tmp_path, DONE, NASTY).replace("</body>", probe)
    (tmp_path / "mychar.html").write_text(page, encoding="utf-8")
    frame = tmp_path / "frame.html"
    frame.write_text(
        f"""<title></title><script>onmessage = event => document.title = JSON.stringify(event.data)</script>
        <iframe src="mychar.html" style="width: {width}px; height: 900px; border: 0"></iframe>"""
    )
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1400,1000", "--dump-dom"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr", "--virtual-time-budget=3000"]
    done = subprocess.run([*command, frame.as_uri()], capture_output=True, text=True, timeout=120, check=False)
    found = json.loads(html.unescape(done.stdout.partition("<title>")[2].partition("</title>")[0]))
    assert found == {"wide": 0, "width": width, "images": 3, "empty": 0, "loads": []}
    assert "CONSOLE" not in done.stderr, [line for line in done.stderr.splitlines() if "CONSOLE" in line]
