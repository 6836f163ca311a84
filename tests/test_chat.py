"""Chat templates: written as transformers writes them, and a stranger's program can do no harm."""

import time

import pytest

from headway.vocabulary.chat import render

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": " What is 12 + 30?\n"},
    {"role": "assistant", "content": "42"},
    {"role": "user", "content": "naïve 👍🏽"},
]


def test_templates_render_as_in_transformers() -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    templates = [
        "{% for m in messages %}\n  {% if m.role == 'user' %}\n{{ m['content'] | trim }}\n  {% endif %}\n{% endfor %}",
        "{% set a = namespace(n=0) %}{% for m in messages %}{% set a.n = a.n + 1 %}{% endfor %}{{ a.n }}",
        "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}{{ m | tojson }}{% endfor %}",
        "{{ messages[-1].content.split('<')[0].strip() }}{% generation %}x{% endgeneration %}{{ tools is none }}",
    ]
    for template in templates:
        ours = render(template, MESSAGES, {"bos_token": "<s>"}, True)
        options = {"add_generation_prompt": True, "bos_token": "<s>"}
        theirs, _ = render_jinja_template([MESSAGES], chat_template=template, **options)
        assert ours == theirs[0] and ours


def test_what_are_no_messages_is_refused() -> None:
    for messages in ("hi", [{"content": "hi"}], ["hi"], [None]):
        with pytest.raises(ValueError, match="list of messages"):
            render("x", messages, {}, True)
    with pytest.raises(ValueError, match="more than text"):
        render("x", [{"role": "user", "content": b"hi"}], {}, True)


HOSTILE = {
    "endless loop": ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "never end"),
    "memory": ("{% set x = 'a' * 10000000000 %}{{ x }}", "MiB"),
    "power": ("{{ 9 ** (9 ** 9) }}", "never end"),
    "laughs": ("{% set x = [1,1,1,1,1,1,1,1,1,1] %}" + "{% set x = [x,x,x,x,x,x,x,x,x,x] %}" * 9 + "{{ x }}", ""),
    "long": ("{% for a in range(99999) %}{{ 'a' * 999 }}{% endfor %}", "characters"),
    "itself": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "without end"),
    "classes": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
    "globals": ("{{ raise_exception.__globals__['json'] }}", "unsafe"),
    "lipsum": ("{{ lipsum.__globals__['os'].popen('touch /tmp/owned').read() }}", "unsafe"),
    "format": ("{{ '{0.__class__.__base__}'.format(messages) }}", "unsafe"),
    "change": ("{{ messages.append(1) }}", "unsafe"),
    "include": ("{% include '/etc/passwd' %}", "loader"),
    "syntax": ("{% for %}", "Expected"),
    "refuses": ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
    "unknown": ("{{ nothing.at.all }}", "undefined"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_is_one_line(name: str) -> None:
    template, word = HOSTILE[name]
    start = time.perf_counter()
    with pytest.raises(ValueError, match="chat template: ") as caught:
        render(template, MESSAGES, {}, True)
    assert "\n" not in str(caught.value) and word in str(caught.value)
    assert time.perf_counter() - start < 20
