"""Templates that attack the process that renders them, by memory or by time.

Each is refused with a small request. `S` makes a long text, `L` a list that holds a list many
times.
"""

from typing import Final

__all__ = ["COMPILED", "RENDERED"]

_S: Final = "{% set s = 'x' * 4000000 %}"
_L: Final = (
    "{% set ns = namespace(l=[1]) %}{% for i in range(40) %}{% set ns.l = [ns.l, ns.l] %}"
    "{% endfor %}"
)
_SUM: Final = (
    "{% set ns = namespace(l=['x' * 4000000]) %}{% for i in range(16) %}"
    "{% set ns.l = ns.l + ns.l %}{% endfor %}"
)
_TWO: Final = (
    "{% set a = namespace(l=[1]) %}{% set b = namespace(l=[1]) %}{% for i in range(40) %}"
    "{% set a.l = (a.l, a.l) %}{% set b.l = (b.l, b.l) %}{% endfor %}"
)
_NUMBER: Final = "{% set i = ('f' * 4000000) | int(0, 16) %}"

RENDERED: Final = (
    # texts that many lines make
    _S + "{% set t %}" + "{{ s }}" * 5000 + "{% endset %}{{ t | length }}",
    _S + "{% macro m() %}{% for i in range(9999) %}{{ s }}{% endfor %}{% endmacro %}{{ m() }}",
    _S + "{% filter upper %}" + "{{ s }}" * 5000 + "{% endfilter %}",
    _S + "{{ " + " + ".join(["s"] * 150) + " }}",
    _S + "{% set t = [" + ", ".join(["s[1:]"] * 900) + "] %}",
    _S + "".join(f"{{% set t{i} = s[{i}:] %}}" for i in range(3000)),
    _S + "{% macro m(n, a, b, c) %}{% if n %}{{ m(n - 1, s[n:], s[n:], s[n:]) }}{% endif %}"
    "{% endmacro %}{{ m(150, 1, 1, 1) }}",
    _S + "{{ s" + " | e | replace('x', '&')" * 9 + " | length }}",
    _S + "{% for i in range(99999) %}{% set t = s | upper %}{% endfor %}",
    _S + "{% set t = s.upper() %}" * 4000,
    _S + "{% set f = s.upper %}" + "{% set t = f() %}" * 4000,
    # values that hold others many times
    *(
        _L + use
        for use in (
            "{{ ns.l }}",
            "{{ ns.l | tojson }}",
            "{{ ns.l | string }}",
            "{{ ns.l ~ '' }}",
            "{{ ns.l | pprint }}",
            "{{ '%s' % ns.l }}",
            "{{ '{}'.format(ns.l) }}",
        )
    ),
    *(_SUM + use for use in ("{{ ns.l }}", "{{ ns.l | tojson }}", "{{ ns.l | join }}")),
    *(_TWO + use for use in ("{{ a.l == b.l }}", "{{ a.l in [b.l] }}", "{{ {a.l: 1} }}")),
    "{% macro m() %}{{ varargs and ns.__class__ }}{% set ns.l = varargs %}{% endmacro %}"
    "{% set ns = namespace(l=1) %}{% for i in range(40) %}{% set t = m(ns.l, ns.l) %}{% endfor %}"
    + _L,
    "{% set ns = namespace(l=[1]) %}{% for i in range(40) %}"
    "{% set ns.l = cycler(ns.l, ns.l).items %}{% endfor %}{{ ns.l }}",
    "{% set ns = namespace(l=[1]) %}{% for i in range(40) %}"
    "{% set ns.l = dict(a=ns.l, b=ns.l) %}{% endfor %}{{ ns.l }}",
    "{{ [1] | batch(10000, [1] * 9999) | list | tojson }}",
    # texts that one operation makes
    "{{ '%9999d' * 200000 % ((1,) * 200000) }}",
    "{{ ('{0:9999}' * 200000).format(1) }}",
    _S + "{{ ('{0}' * 2000).format(s) }}",
    "{{ ('\\t' * 4000000).expandtabs(9999) | length }}",
    "{{ ('x\\n' * 2000000) | indent(9999) | length }}",
    _S + "{{ s | wordwrap(1, wrapstring='y' * 1000) | length }}",
    "{{ ([[1]] * 90000) | tojson(indent=9999) }}",
    "{{ strftime_now('%c' * 4000000) }}",
    # time in one operation
    _S + "{{ s.rfind('y' + 'x' * 2000000) }}",
    _S + "{{ s.strip('y' * 2000000 + 'x') }}",
    _S + "{{ s | trim('y' * 2000000 + 'x') }}",
    _S + "{{ s | urlize }}",
    _S + "{{ s | striptags }}",
    _S + "{{ s | title }}",
    "{{ ('x ' * 2000000) | wordcount }}",
    _S + "{{ s | list | length }}",
    _S + "{{ s | map('upper') | list | length }}",
    "{{ ([1] * 9999999) | sort | length }}",
    "{{ ([[1]] * 99999) | sum(start=[]) | length }}",
    "{{ range(99999) | map('string') | map('int') | map('string') | list | length }}" * 9,
    _NUMBER + "{{ i // (i // 3) }}",
    _NUMBER + "{{ i % (i // 3) }}",
    # steps
    "{% set ns = namespace(n=0) %}{% block a scoped %}{% set ns.n = ns.n + 1 %}"
    "{% if ns.n < 40 %}{{ self.a() }}{{ self.a() }}{% endif %}{% set ns.n = ns.n - 1 %}"
    "{% endblock %}",
    "{% for i in range(9999) %}{% if i > 8 %}"
    + "{% set t = ('x' * 16000) | upper | lower %}" * 400
    + "{% endif %}{% endfor %}",
)

COMPILED: Final = (
    "{{ " + "'x' | center(9999) | replace(' ', 'yyyyyyyyy') ~ " * 4000 + "'' }}",
    "{{ 0x" + "f" * 150_000 + " // 0x" + "f" * 75_000 + " }}",
    "{{ " + "9" * 5000 + " }}",
    "{% autoescape 'x' | center(9999) %}{% endautoescape %}",
    "x" * 300_000,
    "{{ a }}" * 30_000,
    "{% if a %}" * 2000 + "{% endif %}" * 2000,
    "{% for a in b %}" * 300 + "{% endfor %}" * 300,
    "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "{{ " + "[" * 5000 + "]" * 5000 + " }}",
    "{{ " + "not " * 5000 + "a }}",
    "{{ a" + " | upper" * 3000 + " }}",
    "{{ a" + ".b" * 20_000 + " }}",
)
