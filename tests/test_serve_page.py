"""The page at `/`, in a browser: by keyboard, in light and dark, with errors and a key."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from browser import CHROMIUM, CTRL, Page, browser
from serving import served

import minilpt

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium, which is not on PATH")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with browser(tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture(scope="module")
def model() -> minilpt.Classifier:
    return minilpt.load()


def text_of(page: Page, selector: str) -> str:
    return page.value(f"document.querySelector({selector!r}).innerText")


def visit(page: Page, client: httpx.Client) -> None:
    """Open the page of the server; the first field takes the focus, though only at the first frame after loading."""
    page.open(str(client.base_url))
    page.until("document.activeElement.id === 'text'")


def classify(page: Page, text: str) -> None:
    """Type over what stands in the first field, which has the focus, and press Ctrl+Enter."""
    page.value("document.getElementById('text').select()")
    page.type(text)
    page.press("Enter", CTRL)
    page.until("!document.getElementById('go').disabled")


def test_a_text_gets_its_label_its_scores_and_its_tokens_by_layer(page: Page, model: minilpt.Classifier) -> None:
    text = "a 🎬 gorgeous , witty <b>movie</b> ."
    prediction, explanation = model.predict(text)[0], model.explain(text)
    with served(model) as client:
        visit(page, client)
        classify(page, text)
        assert text_of(page, "#label") == f"{prediction.label} {prediction.score:.3f}"
        assert "positive" in text_of(page, "#scores") and "negative" in text_of(page, "#scores")
        assert page.value("document.querySelectorAll('#layers li').length") == explanation.layers
        for layer in range(explanation.layers):
            live = [token for token in explanation.tokens if token.removed_in is None or token.removed_in >= layer]
            removed = [token for token in live if token.removed_in == layer]
            row = f"document.querySelectorAll('#layers li')[{layer}]"
            counts = page.value(f"{row}.querySelector('span').innerText")
            assert counts == f"layer {layer}: {len(live) - len(removed)} of {len(live)} tokens"
            crossed = page.value(f"[...{row}.querySelectorAll('del')].map(e => e.textContent)")
            inside = sorted(text[t.start : t.end] if t.part == 0 else t.token for t in removed)
            assert sorted(crossed) == inside
        first = page.value("document.querySelector('#layers li .part').textContent")
        assert first == text  # tokens and all between them, markup as plain text


def test_keys_alone_reach_everything_and_a_pair_is_a_pair(page: Page, model: minilpt.Classifier) -> None:
    pair = ("good film", "bad film")
    with served(model) as client:
        visit(page, client)
        page.value("document.getElementById('text').select()")
        page.type(pair[0])
        page.press("Tab")
        page.type(pair[1])
        page.press("Tab")
        assert page.value("document.activeElement.id") == "go"
        page.press("Enter")
        page.until("document.getElementById('answer').hidden === false")
        assert page.value("document.querySelectorAll('#layers li')[0].querySelectorAll('.part').length") == 3
        score = model.predict([pair])[0].score
        assert f"{score:.3f}" in text_of(page, "#label")


def test_errors_are_shown_and_a_key_is_asked_for(page: Page, model: minilpt.Classifier) -> None:
    with served(model, api_key="k") as client:
        visit(page, client)
        classify(page, "good")
        assert "API key" in text_of(page, "#error")
        assert page.value("document.activeElement.id") == "key"
        page.type("k")
        page.press("Enter")
        page.until("document.getElementById('answer').hidden === false")
        assert text_of(page, "#error") == ""


def luminance(color: str) -> float:
    """Relative, of `rgb(r, g, b)` (WCAG 2.2)."""
    parts = [int(part) / 255 for part in color[color.index("(") + 1 : -1].split(",")[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_readable_in_light_and_dark(page: Page, model: minilpt.Classifier, scheme: str, tmp_path: Path) -> None:
    with served(model) as client:
        page.scheme(scheme)
        visit(page, client)
        classify(page, "the plot is nothing but boilerplate cliches , and the jokes are older than that .")
        paper = page.value("getComputedStyle(document.body).backgroundColor")
        assert (luminance(paper) > 0.5) == (scheme == "light")
        for selector in ("body", "#facts", "del", "textarea", "td div", ".special", "a"):
            ink = page.value(f"getComputedStyle(document.querySelector({selector!r})).color")
            behind = paper
            if selector == "td div":
                behind = page.value("getComputedStyle(document.querySelector('td div')).backgroundColor")
            lighter, darker = sorted((luminance(ink), luminance(behind)), reverse=True)
            assert (lighter + 0.05) / (darker + 0.05) >= 4.5, (selector, ink, behind)
        page.picture(tmp_path / f"{scheme}.png", 900, 1100)
