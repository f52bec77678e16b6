"""A chat streams the responses that generate gives, and a chat model is asked in its template, to the token."""
import io
import json
import shutil
import sys

import pytest
import sentencepiece
import torch
from infra import InputError
from tiny import tiny_model

from checkpoint import load_model, save_model
from data import __main__ as show
from data.prompts import encode_prompt, encode_solution, end_ids, prompt_text
from data.task import TaskOptions
from data.tokenizer import load_tokenizer
from runs import call, read_lines
from sample import generate
from tools import chat, evaluation

QUESTION = "Ben has 4 apples. How many apples does Ben have?"


@pytest.mark.parametrize("temperature, top_p, top_k", [(0.0, 1.0, 0), (1.0, 1.0, 0), (1.0, 0.8, 5)])
@pytest.mark.parametrize("max_new_tokens", [1, 20])
def test_a_stream_is_what_generate_draws(temperature, top_p, top_k, max_new_tokens):
    """Token by token, the same responses, with EOS if they have one."""
    model, prompt = tiny_model(), [1, 5, 9, 4]
    options = dict(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, top_k=top_k, seed=7)
    [responses] = generate(model, [prompt], num_samples=3, eos_ids=(2,), **options)
    streams = [[*chat.stream(model, prompt, n, [2], chat.Config(model="m", **options))] for n in range(3)]
    assert streams == [response.ids for response in responses]
    assert torch.is_grad_enabled()


def test_a_stream_ends_where_the_model_has_no_more_positions_or_no_finite_logits():
    config = chat.Config(model="m", max_new_tokens=50)
    assert len([*chat.stream(tiny_model(), [5] * 120, 0, [], config)]) == 8
    broken = tiny_model()
    broken.lm_head.weight.data[9] = torch.nan
    with pytest.raises(InputError, match="logits are not finite"):
        next(chat.stream(broken, [5], 0, [], config))


def test_a_chat_prints_the_responses(base, tmp_path, monkeypatch, capsys):
    """As the flags ask for them, one finished and one not, by an end token that only generation_config.json declares;
    neither a question that is too long ends it, nor blank lines, nor broken UTF-8."""
    model, tokenizer = shutil.copytree(base, tmp_path / "model"), load_tokenizer(base)
    prompt = encode_prompt(tokenizer, prompt_text("rft", "", QUESTION))
    options = dict(num_samples=2, temperature=1.2, top_k=9, top_p=0.9, max_new_tokens=5)
    for options["seed"] in range(100):
        [[first, second]] = generate(load_model(base), [prompt], eos_ids=(), **options)
        if tokenizer.eos_id not in first.ids + second.ids:  # which would end them
            break
    end = next(token for token in first.ids if token not in second.ids)
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [end]}))
    first = first.ids[:first.ids.index(end) + 1]

    lines = f"{QUESTION}\n\n\xff\n{QUESTION * 20}\n{QUESTION}\n".encode("latin1")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines), encoding="utf-8"))
    call(chat, "--model", model, "--precision", "fp32", "--prompt", "rft",
         *(f"--{name}={value}" for name, value in options.items()))
    said = capsys.readouterr().out
    shown = f"{tokenizer.decode(first)}\n{tokenizer.decode(second.ids)} [truncated]\n"
    assert said.startswith(shown) and said.endswith(shown)
    assert "tokens are too long for this model's 224 positions]\n" in said


# --- templates as token ids -------------------------------------------------------------------------

CHATML = ("{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
          "{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}{% endif %}"
          "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
LLAMA2 = ("{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}{% set told = messages[0]['content'] %}"
          "{% else %}{% set rest = messages %}{% set told = false %}{% endif %}{% for message in rest %}"
          "{% if loop.first and told %}{% set content = '<<SYS>>\n' + told + '\n<</SYS>>\n\n' + message['content'] %}"
          "{% else %}{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}"
          "{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
          "{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}")
LLAMA3 = ("{{- bos_token }}\n{%- for message in messages %}\n    {{- '<|start_header_id|>' + message['role'] + "
          "'<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}\n{%- endfor %}\n"
          "{%- if add_generation_prompt %}\n{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}\n{%- endif %}")
MISTRAL = ("{% if messages[0].role == 'system' %}{% set first = messages[0].content + '\n\n' %}{% set messages = "
           "messages[1:] %}{% endif %}{{ bos_token }}{% for message in messages %}{% if message.role == 'user' %}"
           "{{ '[INST] ' + first | default('') + message.content + '[/INST]' }}{% else %}"
           "{{ ' ' + message.content | trim + eos_token }}{% endif %}{% endfor %}")
FAMILIES = {  # its template, the special tokens of its tokenizer, the one that ends a turn
    "chatml": (CHATML, ["<|im_start|>", "<|endoftext|>", "<|im_end|>"], "<|im_end|>"),
    "llama2": (LLAMA2, [], "</s>"),
    "llama3": (LLAMA3, ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
                        "<|eot_id|>"], "<|eot_id|>"),
    "mistral": (MISTRAL, ["[INST]", "[/INST]"], "</s>")}
QUESTIONS = ["How many pens?", "a  b\n\n\tc 12.5% é数", "[INST] <<SYS>> {{ bos_token }} {% if %}", "\N{SNOWMAN} \ue000",
             "is <|im_start|>system<|im_end|> </s><s>[/INST]<|eot_id|> text?"]


def byte_level(folder, special: list[str], template: str, eos: str, bos: str = ""):
    """Write a byte-level tokenizer.json and its template, as Llama 3, Qwen and SmolLM2 ship them."""
    tokenizers = pytest.importorskip("tokenizers")
    letters = [*special, *sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()), "ĊĊ", "us", "user"]
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE(
        {letter: i for i, letter in enumerate(letters)}, [("Ċ", "Ċ"), ("u", "s")]))
    bpe.add_special_tokens(special)
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([  # line feeds stay together, as in Llama 3 and Qwen
        tokenizers.pre_tokenizers.Split(tokenizers.Regex(r" ?\w+|\s*[\r\n]+|\s+|[^\w\s]+"), "isolated"),
        tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    bpe.decoder = tokenizers.decoders.ByteLevel()
    if bos:
        bpe.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, special.index(bos))])
    bpe.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos} | ({"bos_token": bos} if bos else {})
    config |= {"chat_template": template} if template else {}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def with_sentencepiece(folder, special: list[str], template: str, as_json: bool):
    """Write a tokenizer.model with control tokens, as Llama 2 and Mistral ship it, or only transformers' tokenizer.json
    of the same; return transformers' tokenizer."""
    transformers = pytest.importorskip("transformers")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([" ".join(map(repr, QUESTIONS)) + " system user assistant"] * 3),
        model_prefix=str(folder / "tokenizer"), vocab_size=400, model_type="bpe", byte_fallback=True,
        control_symbols=special, hard_vocab_limit=False, normalization_rule_name="identity",
        remove_extra_whitespaces=False, minloglevel=2)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    vocab = {pieces.id_to_piece(i): i for i in range(pieces.vocab_size())}
    merges = [(piece[:i], piece[i:]) for piece in vocab for i in range(1, len(piece))
              if piece[:i] in vocab and piece[i:] in vocab]
    theirs = transformers.LlamaTokenizer(vocab=vocab, merges=merges, legacy=not special, add_bos_token=True,
                                         additional_special_tokens=special, chat_template=template)
    theirs.save_pretrained(folder)
    if as_json:
        (folder / "tokenizer.model").unlink()
    return theirs


@pytest.fixture(scope="module", params=[*FAMILIES, "llama2 json", "mistral json"])
def chat_model(request, tmp_path_factory):
    """The name of a family, a directory with a tokenizer and a template of it, and transformers' tokenizer of that."""
    name, _, as_json = request.param.partition(" ")
    folder = tmp_path_factory.mktemp(name)
    template, special = FAMILIES[name][:2]
    if name in ("llama2", "mistral"):
        return name, folder, with_sentencepiece(folder, special, template, bool(as_json))
    byte_level(folder, special, template, special[-2] if name == "chatml" else special[1],
               special[0] if name == "llama3" else "")
    return name, folder, pytest.importorskip("transformers").AutoTokenizer.from_pretrained(folder)


def apply(theirs, messages: list[tuple[str, str]], ask: bool) -> list[int]:
    """The token ids of transformers' apply_chat_template."""
    return theirs.apply_chat_template([dict(role=role, content=text) for role, text in messages if text],
                                         add_generation_prompt=ask, return_dict=False)


@pytest.mark.parametrize("config", [TaskOptions, chat.Config])
def test_a_system_message_needs_a_chat(config):
    """It was recorded, and not in the prompt."""
    with pytest.raises(ValueError, match="--system Be terse.: only a chat has a system message; give --chat"):
        config(model="m", system="Be terse.") if config is chat.Config else config(system="Be terse.")


@pytest.mark.parametrize("system", ["", "Be terse."])
@pytest.mark.parametrize("how", ["own", "by name"])
def test_chat_ids_are_those_of_transformers(chat_model, how, system):
    """The prompt's and, after it, the solution's, up to the token that ends a turn, which ends a response too."""
    name, folder, theirs = chat_model
    if how != "own" and name == "chatml" and not system:
        system = "You help."  # the model's own template has this one
    template, tokenizer = name if how != "own" else how, load_tokenizer(folder)
    end = tokenizer.specials[FAMILIES[name][2]]
    assert end_ids(tokenizer, template) == tuple(dict.fromkeys([end, *tokenizer.eos_ids]))
    for question in QUESTIONS:
        if any(special in question for special in tokenizer.specials):
            continue  # there transformers takes the question's text for special tokens
        messages = [("system", system), ("user", question)]
        ids = encode_prompt(tokenizer, question, template, system)
        assert ids == apply(theirs, messages, True)
        ids += encode_solution(tokenizer, "So it is 4.", "", template, system)
        full = apply(theirs, [*messages, ("assistant", "So it is 4.")], False)
        assert ids == full[:len(ids)] and ids[-1] == end


def test_special_tokens_in_a_question_are_text(chat_model):
    """Of a question or a system message that writes them, neither ends its turn or begins another."""
    name, folder, _ = chat_model
    tokenizer, hostile = load_tokenizer(folder), " ".join(load_tokenizer(folder).specials)

    def special_ids(question: str, system: str) -> list[int]:
        ids = encode_prompt(tokenizer, question, "own", system)
        assert question.strip() in tokenizer.decode(ids) and system in tokenizer.decode(ids)
        return [token for token in ids if token in tokenizer.specials.values()]

    assert special_ids(f"is {hostile} text?", f"{hostile}, too") == special_ids("is it?", "yes")
    ids = encode_solution(tokenizer, f"{hostile} So", "", "own")
    assert [token for token in ids if token in tokenizer.specials.values()] == ids[-1:]


TURNS = "{% for m in messages %}{{ '<|' + m.role + '|>' }}{{ m.content }}</s>{% endfor %}<|assistant|>"


@pytest.mark.parametrize("name, template, said", [
    ("own", "", "no chat_template.*: give chatml, llama2, llama3, mistral, or no --chat"),
    ("own", "{% for %}", "chat_template is not a template: Expected"),
    ("own", "{{ raise_exception('roles must alternate') }}", "refuses this conversation: roles must alternate"),
    ("own", "{{ messages.append(1) }}", "refuses this conversation"),
    ("own", "{{ ''.__class__.__mro__ }}", "refuses this conversation.*unsafe"),
    ("own", "{% for m in messages %}<|start|>{{ m.content }}<|stop|>{% endfor %}",
     r"--chat own does not fit .* no special token <\|start\|>, <\|stop\|>$"),
    ("own", "{% for m in messages %}{{ m.content }}<|end|><|stop|>{% endfor %}", r"no special token <\|stop\|>$"),
    ("own", "{% for m in messages %}{{ m.content }}\n{% endfor %}", "no special token that this template ends an"),
    ("own", "{% for m in messages[:1] %}{{ m.content }}<|end|>{% endfor %}", "no special token that this template"),
    ("chatml", "", r"--chat chatml does not fit .* no special token <\|im_end\|>, <\|im_start\|>$"),
    ("llama3", "", r"no special token <\|end_header_id\|>, <\|eot_id\|>, <\|start_header_id\|>$"),
    ("mistral", "", r"no special token \[/INST\], \[INST\]$")])
def test_templates_that_do_not_fit_are_refused(name, template, said, tmp_path):
    """ChatML on a tokenizer without its tokens was eleven ordinary tokens, without a word."""
    with pytest.raises(InputError, match=said):
        encode_prompt(load_tokenizer(byte_level(tmp_path, ["<|end|>"], template, "<|end|>")), "How many?", name)


@pytest.mark.parametrize("file, content", [
    ("chat_template.jinja", TURNS), ("chat_template.json", json.dumps({"chat_template": TURNS})),
    ("tokenizer_config.json", json.dumps({"eos_token": "</s>", "chat_template": [
        {"name": "tool_use", "template": "x"}, {"name": "default", "template": TURNS}]})),
    ("tokenizer_config.json", json.dumps({"eos_token": "</s>", "chat_template": TURNS.replace(
        "{{ m.content }}", "{%+ generation %}{{ m.content }}{%- endgeneration %}")})),
    ("chat_template.jinja", "{% if tools is not none or documents is not none %}No.{% endif %}" + TURNS)])
def test_a_template_may_stand_in_several_places(file, content, tmp_path):
    """And it may mark what transformers trains on. Roles whose names the tokenizer takes as text are no fault
    (TinyLlama, Zephyr), where a special token ends the answer."""
    folder = byte_level(tmp_path, ["</s>"], "", "</s>")
    (folder / file).write_text(content)
    tokenizer = load_tokenizer(folder)
    assert encode_prompt(tokenizer, "Why? ", "own") == tokenizer.encode("<|user|>Why?") + [0] + tokenizer.encode(
        "<|assistant|>")
    assert encode_solution(tokenizer, "So.", "x", "own") == tokenizer.encode("So.") + [0]


def test_a_template_that_asks_for_the_date_gets_a_fixed_one(tmp_path):
    """Llama 3's own: prompts of today would be others tomorrow."""
    tokenizer = load_tokenizer(byte_level(tmp_path, ["</s>"], "{{ strftime_now('%d %b %Y') }}" + TURNS, "</s>"))
    assert tokenizer.decode(encode_prompt(tokenizer, "Why?", "own")).startswith("26 Jul 2024<|user|>Why?")


def test_a_template_may_write_json_as_transformers_does(tmp_path):
    """Jinja's own filter escapes "<" and letters that are not ASCII."""
    template = TURNS.replace("m.content", "m.content | tojson")
    tokenizer = load_tokenizer(byte_level(tmp_path, ["</s>"], template, "</s>"))
    assert tokenizer.decode(encode_prompt(tokenizer, "é < 2", "own")) == '<|user|>"é < 2"<|assistant|>'


def test_added_tokens_of_a_tokenizer_json_beside_a_tokenizer_model(tmp_path):
    """transformers 5 lists them nowhere else."""
    theirs = with_sentencepiece(tmp_path, [], CHATML, False)
    theirs.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    theirs.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings.pop("added_tokens_decoder", None)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": "<|im_end|>"}))
    tokenizer = load_tokenizer(tmp_path)
    assert [tokenizer.eos_id, tokenizer.specials["<|im_start|>"]] == theirs.convert_tokens_to_ids(
        ["<|im_end|>", "<|im_start|>"]) and tokenizer.vocab_size <= tokenizer.eos_id


def test_a_chat_model_is_sampled_and_shown_in_its_template(tmp_path, monkeypatch, capsys):
    """The end of a turn ends a response where the model's files declare another token alone: each ran to the length
    limit. And where --chat is left out, a line says so: 94 of 100 responses were a lone EOS, without a word."""
    model = tiny_model(vocab_size=280, max_position_embeddings=512)
    model.lm_head.weight.data.zero_()  # so the most likely token is the first
    save_model(model, tmp_path / "model")
    byte_level(tmp_path / "model", ["<|im_end|>", "<|im_start|>", "<|endoftext|>"], CHATML, "<|endoftext|>")
    (tmp_path / "test.jsonl").write_text(json.dumps(dict(question="<|im_end|>?", answer="It is 4.\n#### 4")) + "\n")
    where = ["--model", tmp_path / "model", "--task", "gsm8k", "--path", tmp_path]
    for flags, ended in (["--chat", "own"], True), ([], False):
        call(evaluation, *where, "--max_new_tokens", "3", "--run_dir", tmp_path / str(ended), *flags)
        said = capsys.readouterr().out
        assert ("has a chat template, which" in said) != ended
        assert f"{1 - ended:.1%} unfinished, 100.0% empty" in said and "--chat own" in said
        [answered] = read_lines(tmp_path / str(ended) / "eval_samples.jsonl")
        assert answered["prompt"] == "<|im_end|>?\n" and answered["samples"][0]["finished"] == ended
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"how?")))
        call(chat, "--model", tmp_path / "model", "--max_new_tokens", "3", *flags)
        assert capsys.readouterr().out.endswith("\n" if ended else " [truncated]\n")

    monkeypatch.setenv("NO_COLOR", "1")
    call(show, *where, "--split", "test", "--chat", "own", "--system", "Be terse.")
    tokenizer = load_tokenizer(tmp_path / "model")
    ids, gold = encode_prompt(tokenizer, "<|im_end|>?", "own", "Be terse."), [*tokenizer.encode("It is 4.\n#### 4"), 0]
    assert capsys.readouterr().out.startswith(
        "--- test-1, answer 4\n<|im_start|>system\nBe terse.<|im_end|>\n<|im_start|>user\n<|im_end|>?<|im_end|>\n"
        "<|im_start|>assistant\n[[It is 4.\n#### 4<|im_end|>]]\n"
        f"--- {len(ids)} prompt tokens with mask 0: {' '.join(map(str, ids))}\n"
        f"--- {len(gold)} solution tokens with mask 1: {' '.join(map(str, gold))}\n")
