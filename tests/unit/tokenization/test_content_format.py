"""The detection of vLLM: what it finds for these templates was read from vLLM 0.32."""

import pytest

from extproc.tokenization.content_format import content_format
from extproc.tokenization.template_environment import template_environment

PARTS = "{% for part in content %}{{ part }}{% endfor %}"
DETECTED = {
    "openai": [
        "{% for m in messages %}{% for c in m.content %}{{ c }}{% endfor %}{% endfor %}",
        "{% set a = messages[1:] %}{% for m in a %}{% for c in m['content'] %}{% endfor %}"
        "{% endfor %}",
        "{% macro r(content) %}" + PARTS + "{% endmacro %}"
        "{% for m in messages %}{{ r(m.content) }}{% endfor %}",
        "{% macro r(x, y) %}{% for c in y %}{{ c }}{% endfor %}{% endmacro %}"
        "{% for m in messages %}{{ r('x', y=m.content) }}{% endfor %}",
        "{% for m in messages %}{% set content = m.content %}" + PARTS + "{% endfor %}",
        "{% for m in messages|reverse %}{% for c in m.content|list %}{% endfor %}{% endfor %}",
        "{% for m in messages %}{% for c in m.content is string %}{% endfor %}{% endfor %}",
        "{% if messages[0].role == 's' %}{% set rest = messages[1:] %}{% else %}"
        "{% set rest = messages %}{% endif %}"
        "{% for m in rest %}{% for c in m.content if c.type == 'text' %}{% endfor %}{% endfor %}",
        "{% macro o() %}{% for m in messages %}{% for c in m.content %}{% endfor %}{% endfor %}"
        "{% endmacro %}{{ o() }}",
    ],
    "string": [
        "{% for m in messages %}{{ m.content }}{% endfor %}",
        "{% macro r(content) %}"
        + PARTS
        + "{% endmacro %}{% for m in messages %}{{ r('x') }}{% endfor %}",
        "{% for m in messages %}{% set a = m.content %}{% for c in a %}{% endfor %}{% endfor %}",
        "{% for k, m in messages %}{% for c in m.content %}{% endfor %}{% endfor %}",
        "{% for m in messages %}{% for a, b in m.content %}{% endfor %}{% endfor %}",
        "{% for c in messages[0].content %}{{ c }}{% endfor %}",
        "{% set system = messages[0] %}{% for c in system.content %}{{ c }}{% endfor %}",
        "{% for m in others %}{% for c in m.content %}{% endfor %}{% endfor %}",
        "{% for m in messages %}{{ m.content | map(attribute='text') | join }}{% endfor %}",
        "{% macro o(given) %}{% for m in given %}{% for c in m.content %}{% endfor %}{% endfor %}"
        "{% endmacro %}{{ o(messages) }}",
        "{% set a.b = messages %}{% for m in messages %}{{ m.content }}{% endfor %}",
    ],
}


@pytest.mark.parametrize(
    ("detected", "source"), [(one, source) for one in DETECTED for source in DETECTED[one]]
)
def test_the_content_format_is_the_one_that_the_engine_detects(detected: str, source: str) -> None:
    assert content_format(template_environment().parse(source)) == detected
