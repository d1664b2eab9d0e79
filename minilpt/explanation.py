"""Which tokens went on and which were removed, and where: for people, as HTML and as coloured text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from html import escape
from typing import Any

ANSI_GREYS = (238, 252)  # of the 256 colours: removed first, and removed last


@dataclass(frozen=True)
class Token:
    """One token of the text (part 0) or of a pair's second (1), characters start to end; part None: a special token.

    scores: one for each layer that it reached, the attention that it received there (over all live queries, averaged
    over heads; 1 is the mean of the live tokens). removed_in: the 0-based layer that removed it, None if none did.
    """

    token: str
    part: int | None
    start: int
    end: int
    scores: tuple[float, ...]
    removed_in: int | None


@dataclass(frozen=True)
class Explanation:
    """What happened to the tokens of one text. texts: the text, or both of a pair; rule: the keep rule's name, if any.

    Every layer's rule was evaluated, the last one's too, although its result is not used for the label.
    """

    texts: tuple[str, ...]
    tokens: tuple[Token, ...]
    label: str
    score: float
    layers: int
    rule: str | None

    def to_dict(self) -> dict[str, Any]:
        """Plain types only, for JSON."""
        return asdict(self)

    def to_ansi(self) -> str:
        """For a terminal of 256 colours: the darker, the earlier removed; bold to the end."""
        dark, light = ANSI_GREYS
        lines = [f"{self.label} {self.score:.3f}"]
        for part in range(len(self.texts)):
            line = ""
            for text, token in self._stretches(part):
                if token is None:
                    line += text
                elif token.removed_in is None:
                    line += f"\x1b[1m{text}\x1b[0m"
                else:
                    grey = dark + round((light - dark) * token.removed_in / max(1, self.layers - 1))
                    line += f"\x1b[38;5;{grey}m{text}\x1b[0m"
            lines.append(line)
        return "\n".join(lines)

    def to_html(self) -> str:
        """One page without scripts or anything from elsewhere: shaded by layer, scores on hover or focus."""
        parts = "".join(f"<p class=text>{self._html(part)}</p>" for part in range(len(self.texts)))
        special = " ".join(_span(escape(t.token), t, self.layers) for t in self.tokens if t.part is None)
        shades = [_opacity(layer, self.layers) for layer in range(self.layers)]
        legend = " ".join(f"<span class=t style=--o:{shade}>layer {at}</span>" for at, shade in enumerate(shades))
        kept = sum(token.removed_in is None for token in self.tokens)
        rule = f"keep rule <b>{escape(self.rule)}</b>" if self.rule else "no pruning"
        return PAGE.format(
            label=escape(self.label),
            score=f"{self.score:.3f}",
            facts=f"{len(self.tokens)} tokens, {kept} after the last layer, {rule}",
            parts=parts,
            special=special,
            legend=f'removed in {legend} <span class="t kept">kept to the end</span>',
        )

    def _html(self, part: int) -> str:
        return "".join(
            escape(text) if token is None else _span(escape(text), token, self.layers)
            for text, token in self._stretches(part)
        )

    def _stretches(self, part: int) -> Iterator[tuple[str, Token | None]]:
        """The whole text in order: what a token covers with it, what none covers (spaces, a cut end) with None."""
        text, at = self.texts[part], 0
        for token in self.tokens:
            if token.part != part or token.end <= at:  # a further token of characters that are shown already
                continue
            if token.start > at:
                yield text[at : token.start], None
            yield text[max(at, token.start) : token.end], token
            at = token.end
        if at < len(text):
            yield text[at:], None


def _opacity(layer: int, layers: int) -> str:
    return f"{0.25 + 0.5 * layer / max(1, layers - 1):.2f}"


def _span(text: str, token: Token, layers: int) -> str:
    scores = " · ".join(f"{layer}: {score:.2f}" for layer, score in enumerate(token.scores))
    fate = "kept to the end" if token.removed_in is None else f"removed in layer {token.removed_in}"
    tip = escape(f"{token.token} — {fate} — attention received in layer {scores}", quote=True)
    look = 'class="t kept"' if token.removed_in is None else f"class=t style=--o:{_opacity(token.removed_in, layers)}"
    return f'<span {look} tabindex=0 data-tip="{tip}">{text}</span>'


PAGE = """\
<!doctype html>
<html lang=en>
<meta charset=utf-8>
<meta name=viewport content="width=device-width, initial-scale=1">
<title>{label} {score}</title>
<style>
:root {{ color-scheme: light dark; --ink: light-dark(#1b1f24, #e6e9ee); --mark: light-dark(#ffe08a, #6b5410); }}
body {{ font: 16px/1.5 system-ui, sans-serif; color: var(--ink); }}
body {{ max-width: 46rem; margin: 2rem auto; padding: 0 1rem; }}
h1 {{ font-size: 1.5rem; margin: 0; }}
.facts, .legend, .special {{ font-size: .85rem; }}
.facts {{ opacity: .75; }}
.text {{ font-size: 1.25rem; line-height: 2; white-space: pre-wrap; overflow-wrap: anywhere; }}
.t {{ border-radius: .2em; color: color-mix(in srgb, var(--ink) calc(var(--o) * 100%), transparent); }}
.t.kept {{ color: var(--ink); background: var(--mark); font-weight: 600; padding: .1em .05em; }}
.t[data-tip] {{ cursor: help; }}
.t[data-tip]:is(:hover, :focus)::after {{
  content: attr(data-tip); position: fixed; left: 1rem; right: 1rem; bottom: 1rem; z-index: 1; max-width: 44rem;
  font: 400 .9rem/1.4 system-ui, sans-serif; white-space: normal; padding: .5em .7em; border-radius: .4em;
  color: #fff; background: #24292f; box-shadow: 0 2px 8px #0006;
}}
</style>
<h1>{label} <small>{score}</small></h1>
<p class=facts>{facts}</p>
{parts}
<p class=special>special tokens: {special}</p>
<p class=legend>{legend}</p>
</html>
"""
