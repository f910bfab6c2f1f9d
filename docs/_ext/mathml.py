"""Formulas as MathML, made when the site is built: pages need no script and load nothing from outside."""

from __future__ import annotations

import itertools
import re
from typing import Any

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx
from sphinx.util.typing import ExtensionMetadata

BAR = re.compile(r"<mo[^>]*>&#x0007C;</mo>")
THIN = '<mspace width="0.167em"/>'


def mathml(formula: str, display: str) -> str:
    """A formula of LaTeX as MathML, with the spaces that the converter leaves out."""
    text = re.sub(r"<mo>(max|min)</mo>", r"<mi>\1</mi>", convert(formula, display=display))
    text = re.sub(r"(?<=</mi>|</mn>|frac>|msup>|msub>)(?=<mi>(?:log|exp)</mi>)", THIN, text)
    text = re.sub(r"(<mi>(?:log|exp|max|min)</mi>)(?=<m(?!o stretchy|sup>|subsup>))", rf"\1{THIN}", text)
    text = text.replace("<mi>&#x02032;</mi>", '<mo lspace="0" rspace="0">&#x02032;</mo>')
    if len(BAR.findall(text)) % 2:  # one bar is a condition, a pair is a length
        return text
    forms = itertools.cycle(("prefix", "postfix"))
    return BAR.sub(lambda match: f'<mo form="{next(forms)}" fence="true" stretchy="false">|</mo>', text)


def inline(self: Any, node: nodes.math) -> None:
    self.body.append(mathml(node.astext(), "inline"))
    raise nodes.SkipNode


def block(self: Any, node: nodes.math_block) -> None:
    self.body.append(self.starttag(node, "div", CLASS="math"))
    self.body.append(mathml(node.astext(), "block"))
    self.body.append("</div>")
    raise nodes.SkipNode


def setup(app: Sphinx) -> ExtensionMetadata:
    app.add_html_math_renderer("mathml", (inline, None), (block, None))
    return {"version": "2", "parallel_read_safe": True, "parallel_write_safe": True}
