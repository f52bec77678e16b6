"""Ask a chat model as it was trained: a template wraps the question, and what it adds becomes special tokens.

A template is Jinja code, written by whoever made the model, so it runs in Jinja's sandbox. Names of special tokens that
it writes become ids; in a question the same names are text: they are hidden while the template runs.
"""
import functools
import json
import re
from datetime import date

from infra import InputError

CHATS = {  # --chat: a template of these, or the model's own
    "": "", "own": "",
    "chatml": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
              "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "llama2": "[INST] {% for m in messages %}{% if m.role == 'system' %}<<SYS>>\n{{ m.content }}\n<</SYS>>\n\n"
              "{% elif m.role == 'user' %}{{ m.content }} [/INST]{% else %} {{ m.content }} {{ eos_token }}{% endif %}"
              "{% endfor %}",
    "llama3": "{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content }}<|eot_id|>"
              "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
    "mistral": "[INST] {% for m in messages %}{% if m.role == 'system' %}{{ m.content }}\n\n"
               "{% elif m.role == 'user' %}{{ m.content }}[/INST]{% else %} {{ m.content }}{{ eos_token }}{% endif %}"
               "{% endfor %}"}
ANSWER = "\ue000"  # stands for an answer while a template is examined
FIRST_HIDDEN = 0xD800  # surrogates, which no text has, stand for special tokens' names in a question


class Chat:
    """A template on a tokenizer: `begin` and `tail` are what it writes before and after an answer, until `end_id`."""

    def __init__(self, tokenizer, name: str, system: str) -> None:
        self.tokenizer, self.name, self.system, specials = tokenizer, name, system, tokenizer.specials
        source = tokenizer.chat_template if name == "own" else CHATS[name]
        if not source:
            raise InputError("--chat own: this model has no chat_template, neither in tokenizer_config.json nor as "
                             f"chat_template.jinja: give {', '.join(sorted({*CHATS} - {'', 'own'}))}, or no --chat")
        self.template = compiled(source)
        self.special = re.compile("|".join(map(re.escape, sorted(specials, key=len, reverse=True))) or "(?!)")
        self.hidden = {special: chr(FIRST_HIDDEN + i) for i, special in enumerate(specials)}

        asked, told = self.render("?"), self.render("?", ANSWER)
        before, _, after = told.partition(ANSWER)
        shape = r"<[|｜][^<>\s]+?[|｜]>" + (r"|\[/?INST\]" if name == "mistral" else "")
        written, end = {*re.findall(shape, told)} - {*re.findall(shape, system)}, self.special.search(after)
        lacking = written - specials.keys()
        # a model's own template may write all such names as text, if a special token ends the answer
        if not end or lacking and (name != "own" or written & specials.keys()):
            raise InputError(f"--chat {name} does not fit this model: its tokenizer has no special token "
                             f"{', '.join(sorted(lacking)) or 'that this template ends an answer with'}")
        self.begin = before[len(asked):] if before.startswith(asked) else ""
        self.tail, self.end_id = after[:end.start()], specials[end.group()]

    def hide(self, text: str) -> str:
        return self.special.sub(lambda found: self.hidden[found.group()], text)

    def render(self, question: str, answer: str = "") -> str:
        """Write the conversation up to where the answer begins, or with an answer to its end."""
        messages = [dict(role=role, content=self.hide(text)) for role, text in (
            ("system", self.system), ("user", question), ("assistant", answer)) if text]
        try:
            return self.template.render(messages=messages, tools=None, documents=None, add_generation_prompt=not answer,
                                        **self.tokenizer.named)
        except Exception as error:  # a template is a program, and may fail in any way
            raise InputError(f"--chat {self.name}: the template refuses this conversation: {error}") from None

    def prompt_ids(self, question: str) -> list[int]:
        """Encode a question as the template asks it, up to where the answer begins."""
        bos = self.tokenizer.bos_id
        return self.extended([] if self.name == "own" or bos is None else [bos], self.render(question))

    def response_ids(self, text: str) -> list[int]:
        """Encode an answer, up to the token that ends it."""
        return [*self.extended([-1], self.begin + self.hide(text) + self.tail)[1:], self.end_id]

    def extended(self, ids: list[int], text: str) -> list[int]:
        """Append text: names of special tokens as their ids, hidden ones as text."""
        shown, at = {ord(character): name for name, character in self.hidden.items()}, 0
        for found in [*self.special.finditer(text), None]:
            if piece := text[at:found.start() if found else None].translate(shown):
                ids = ids + (self.tokenizer.encode_after(ids[-1], piece) if ids else self.tokenizer.encode(piece))
            if found:
                ids, at = [*ids, self.tokenizer.specials[found.group()]], found.end()
        return ids


def compiled(source: str):
    """Compile a template as transformers does, without its access to the clock: a prompt must not depend on the day."""
    try:
        import jinja2
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError:
        raise InputError("--chat needs a package that is not installed: pip install jinja2") from None

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                extensions=["jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, **{"ensure_ascii": False, **options})
    environment.globals |= dict(raise_exception=refuse, strftime_now=date(2024, 7, 26).strftime)  # Llama 3's own date
    try:  # {% generation %} marks what transformers trains on, and writes nothing
        return environment.from_string(re.sub(r"(\{%[-+]?\s*)(end)?generation(?=\s*[-+]?%\})",
                                              lambda tag: tag[1] + ("endif" if tag[2] else "if true"), source))
    except jinja2.TemplateError as error:
        raise InputError(f"the model's chat_template is not a template: {error}") from None


chat_of = functools.lru_cache(maxsize=8)(Chat)
