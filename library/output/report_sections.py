"""The sections of a run's report as HTML. Everything that comes from a user or a file is escaped here."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import count
from pathlib import Path

from library.output.charts import Point, Series, line_chart, shown, smoothed
from library.output.learning_report import LearningReport
from library.output.metrics_file import Line, moment, sample_files, spread
from library.output.run_facts import ImageFact, RunFacts
from library.output.sample_prompts import SamplePrompt
from library.output.thumbnails import Thumbnails
from library.support.errors import counted
from library.training.loss_bands import BANDS, band_name

MOST_VECTORS = 8  # that are drawn and named one by one
_PHOTO, _SAMPLE, _SHEET = 320, 320, 1600  # sides in pixels: twice what they have on the page, for sharp screens


@dataclass(frozen=True)
class Section:
    """A part of the page; without content it is left out."""

    anchor: str
    title: str
    intro: str
    content: str


class Snippets:
    """Texts with a button that copies them; every one has an id of its own."""

    def __init__(self) -> None:
        self._numbers = count(1)

    def block(self, text: str) -> str:
        """A text of several lines."""
        name = f"text{next(self._numbers)}"
        return f'<div class="snippet">{_button(name)}<pre><code id="{name}">{escape(text)}</code></pre></div>'

    def inline(self, text: str) -> str:
        """A word or two."""
        name = f"text{next(self._numbers)}"
        return f'<code id="{name}">{escape(text)}</code> {_button(name)}'


def _button(name: str) -> str:
    return f'<button type="button" data-copy="{name}">Copy</button>'


def points(lines: Iterable[Line], name: str) -> list[Point]:
    """The values of one name over the steps."""
    return [(line["step"], line[name]) for line in lines if isinstance(line.get(name), int | float)]


def vector_labels(lines: Iterable[Line]) -> list[str]:
    """The vectors that were measured, in order."""
    names = dict.fromkeys(name for line in lines for name in line if name.startswith("norm/"))
    return [name.removeprefix("norm/") for name in names]


def training_section(lines: Sequence[Line]) -> Section:
    """Loss, raw and smoothed, by timestep band and on held-out images; the learning rate; the gradient's norm."""
    loss = points(lines, "loss")
    bands = [
        Series(f"{low} to {high}", smoothed(points(lines, band_name(low, high))), colour)
        for colour, (low, high) in enumerate(BANDS)
    ]
    rates = [Series("learning rate", points(lines, "lr"))]
    if adapted := points(lines, "lr/d*lr"):
        rates = [Series("d × learning rate, as it acts", adapted)]
    charts = [
        line_chart("Loss", [Series("raw", loss, faint=True), Series("smoothed", smoothed(loss))]),
        line_chart("Loss by timestep", bands, "smoothed; 0 is a clean image, 999 pure noise"),
        line_chart("Validation loss", [Series("on held-out images", points(lines, "loss/validation"), 2)]),
        line_chart("Loss with fixed noise", [Series("measured", points(lines, "loss/fixed"), 2)]),
        line_chart("Learning rate", rates),
        line_chart("Gradient norm", [Series("before any clipping", smoothed(points(lines, "gradient_norm")), 3)]),
    ]
    chosen = next((f" The vectors of the result are {line['chosen']}." for line in lines if line.get("chosen")), "")
    return Section("training", "Training", escape(f"The x axes count optimizer steps.{chosen}"), _charts(charts))


def vectors_section(lines: Sequence[Line], typical: dict[str, float]) -> Section:
    """How far each vector went, how long it is, and which words of the vocabulary are nearest to it."""
    labels = vector_labels(lines)
    drawn = labels[:MOST_VECTORS]

    def chart(title: str, name: str, note: str, more: Sequence[Series] = ()) -> str:
        series = [Series(label, points(lines, f"{name}/{label}"), colour) for colour, label in enumerate(drawn)]
        return line_chart(title, [*series, *more], note)

    norms = {typical[label] for label in drawn if label in typical}
    last = max((line["step"] for line in lines), default=0)
    usual = [Series("usual word", [(0, norm), (last, norm)], 7, dashed=True) for norm in sorted(norms)]
    charts = [
        chart("Distance moved", "moved", "in % of the start's norm"),
        chart("Cosine to the start", "cosine", "1: the same direction, 0: nothing in common"),
        chart("Norm", "norm", "the dashed line is the vocabulary's typical norm", usual),
    ]
    intro = f"The first {MOST_VECTORS} of {len(labels)} vectors." if len(labels) > MOST_VECTORS else ""
    tables = _nearest_table(lines, drawn) + _start_words(lines)
    return Section("vectors", "Vectors", intro, _charts(charts) + tables)


def _start_words(lines: Iterable[Line]) -> str:
    """The words that were tried as a start, the best first."""
    ranking = next((line["start_words"] for line in lines if isinstance(line.get("start_words"), list)), None)
    if not ranking:
        return ""
    rows = "".join(f'<tr><td>{escape(str(word))}</td><td class="number">{loss:.4f}</td></tr>' for word, loss in ranking)
    return (
        '<h3>Words that were tried as a start <span class="soft">with their loss on the training images</span></h3>'
        f'<table><thead><tr><th>word</th><th class="number">loss</th></tr></thead><tbody>{rows}</tbody></table>'
    )


def _nearest_table(lines: Sequence[Line], labels: Sequence[str]) -> str:
    found = [line for line in lines if isinstance(line.get("nearest"), dict)]
    if not found:
        return ""
    head = "".join(f"<th>{escape(label)}</th>" for label in labels)
    rows = []
    for line in spread(list({line["step"]: line for line in found}.values())):
        cells = "".join(f'<td class="words">{_words(line["nearest"].get(label, []))}</td>' for label in labels)
        rows.append(f'<tr><td class="number">{line["step"]:,}</td>{cells}</tr>')
    return (
        '<h3>Nearest words of the vocabulary <span class="soft">with their cosine</span></h3><div class="scroll">'
        f'<table><thead><tr><th class="number">step</th>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    )


def _words(neighbours: Iterable[tuple[str, float]]) -> str:
    return "<br>".join(f"{escape(str(word))} <small>{cosine:.2f}</small>" for word, cosine in neighbours)


def samples_section(
    lines: Sequence[Line], prompts: Sequence[SamplePrompt | None], folder: Path, thumbnails: Thumbnails
) -> Section:
    """The sample images: a row for each time they were drawn, a column for each prompt."""
    drawn = sample_files(lines)
    asked = {number: prompt for number, prompt in enumerate(prompts) if prompt is not None}
    if not drawn or not asked:
        return Section("samples", "Sample images", "", "")
    head = "".join(f"<th>{_prompt(prompt)}</th>" for prompt in asked.values())
    rows = []
    for step in spread(list(drawn)):
        label = moment(step)
        cells = "".join(
            f"<td>{_image(drawn[step].get(number), folder, thumbnails, f'prompt {number + 1}, {label}')}</td>"
            for number in asked
        )
        rows.append(f"<tr><th>{label}</th>{cells}</tr>")
    table = f'<table class="grid"><thead><tr><th></th>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>'
    intro = f"A row for each time they were drawn, a column for each prompt. The files are in {escape(str(folder))}."
    return Section("samples", "Sample images", intro, f'<div class="scroll">{table}</div>')


def _prompt(prompt: SamplePrompt) -> str:
    seed = "another seed each time" if prompt.seed is None else f"seed {prompt.seed}"
    negative = f"<small>without: {escape(prompt.negative_prompt)}</small>" if prompt.negative_prompt else ""
    settings = f"{seed}, {counted(prompt.steps, 'step')}, scale {prompt.scale:g}, {prompt.width} × {prompt.height}"
    return f"{escape(prompt.prompt)}{negative}<small>{settings}</small>"


def _image(name: str | None, folder: Path, thumbnails: Thumbnails, text: str) -> str:
    uri = thumbnails.of(folder / name, _SAMPLE) if name else None
    return f'<img src="{uri}" alt="{escape(text)}">' if uri else '<small class="soft">none</small>'


def learning_section(learned: LearningReport | None, sheet: Path | None, thumbnails: Thumbnails) -> Section:
    """What ``--learning_report`` measured, and its sheet."""
    if learned is None:
        return Section("learned", "What was learned", "", "")
    uri = thumbnails.of(sheet, _SHEET) if sheet else None
    picture = f'<img class="sheet" src="{uri}" alt="Training images, and images drawn before and after">' if uri else ""
    rows = "".join(
        f'<tr><td>{escape(one.label)}</td><td class="number">{one.loss:.4f}</td>'
        f'<td class="number">{one.distance:.1f}</td></tr>'
        for one in (learned.before, learned.after)
    )
    images = "held-out" if learned.held_out else "training"
    table = (
        f'<table class="narrow"><thead><tr><th>drawn with</th><th class="number">loss on {images} images</th>'
        f'<th class="number">distance to the training images</th></tr></thead><tbody>{rows}</tbody></table>'
    )
    return Section("learned", "What was learned", escape(learned.sentence), table + picture)


def images_section(facts: RunFacts, thumbnails: Thumbnails) -> Section:
    """The images that are trained on, with captions, buckets, and what cropping takes away."""
    if not facts.images:
        return Section("images", "Training images", "", "")
    shown_ones = len(facts.images)
    which = f"{shown_ones} of {facts.num_images:,}" if shown_ones < facts.num_images else f"All {facts.num_images}"
    intro = f"{which}. What cropping takes away is dimmed."
    return Section(
        "images",
        "Training images",
        intro,
        f'<div class="photos">{"".join(map(_photo(thumbnails), facts.images))}</div>',
    )


def _photo(thumbnails: Thumbnails) -> Callable[[ImageFact], str]:
    def photo(fact: ImageFact) -> str:
        uri = thumbnails.of(fact.path, _PHOTO, fact.kept)
        picture = f'<img src="{uri}" alt="">' if uri else '<small class="soft">cannot be shown</small>'
        (width, height), (bucket_width, bucket_height) = fact.size, fact.bucket
        crop = f"{fact.lost:.0%} cropped away" if fact.lost >= 0.005 else "nothing cropped away"
        crop = "cropped at random" if fact.lost >= 0.005 and fact.kept is None else crop
        kind = ", regularisation" if fact.is_reg else ""
        return (
            f'<div class="photo"><div class="frame">{picture}</div><strong>{escape(fact.path.name)}</strong>'
            f"<p>{escape(fact.caption) or '<small>no caption</small>'}</p>"
            f"<small>{width} × {height} in bucket {bucket_width} × {bucket_height}; {crop}; "
            f"{fact.repeats} × an epoch{kind}</small></div>"
        )

    return photo


def use_section(facts: RunFacts, snippets: Snippets) -> Section:
    """What to write in which program, and the lines for diffusers."""
    rows = "".join(
        f"<tr><td>{escape(usage.client)}</td>"
        f"<td>{snippets.inline(usage.word) if usage.word else '–'}</td><td>{escape(usage.how)}</td></tr>"
        for usage in facts.usages
    )
    notes = "".join(f"<li>{escape(note)}</li>" for note in facts.notes)
    content = (
        f'<table class="use"><thead><tr><th>program</th><th>write in a prompt</th><th></th></tr></thead>'
        f"<tbody>{rows}</tbody></table><h3>In diffusers, with a pipeline <code>pipe</code> of the same base</h3>"
        f"{snippets.block(facts.snippet)}<ul>{notes}</ul>"
    )
    return Section("use", "How to use the file", escape(str(facts.file)), content)


def settings_section(facts: RunFacts, snippets: Snippets) -> Section:
    """The run in a table, as a command to paste again, and as a file for ``--config_file``."""
    rows = "".join(f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>" for name, value in facts.details)
    content = (
        f'<table class="facts"><tbody>{rows}</tbody></table><h3>The command that does it again</h3>'
        f"{snippets.block(facts.command)}<h3>The same as a file for --config_file</h3>{snippets.block(facts.toml)}"
    )
    return Section("settings", "Settings", "", content)


def _charts(charts: Iterable[str]) -> str:
    drawn = [chart for chart in charts if chart]
    shape = " four" if len(drawn) in (2, 4) else ""
    return f'<div class="charts{shape}">{"".join(drawn)}</div>' if drawn else ""


def value(number: float | None, unit: str = "") -> str:
    """A measured number for a tile, or a dash where there is none yet."""
    return "–" if number is None else f"{shown(float(f'{number:.3g}'))}{unit}"
