"""Where in a response its answer stands: the formats that several data sets use, and program text.

Each function takes a text and returns the phrase that its format marks, or None. GSM8K's `####` is in rewards.py.
Left out: guessing. No format falls back to the last number of a text that marks no answer.
"""
import re
import textwrap

MAX_PHRASE = 1000  # characters of an answer with its explanation, from the marker to the end of the line
_FINAL_ANSWER = re.compile(r"(?i:final answer)[*_]* ?:[*_]*")
_TRIGGER = re.compile(r"Therefore, the answer is:")
_BOX = re.compile(r"(-?)\\(?:boxed|fbox)\s*\{|\\[{}]|[{}]|\nQuestion:")
_OPENING = re.compile(r"(?:(?:\\\[|\$\$|```\w*)\s*\n\s*)*")  # of a formula or a fence on lines of its own
_MINERVA = "Final Answer: The final answer is"
_FENCE = re.compile(r"^[ \t]*(?:```|~~~).*$", re.MULTILINE)
_FONT = re.compile(r"\\(?:text|math)(?:rm|bf|it|sf|tt|normal|up)?(?![a-zA-Z])|\\(?:mbox|boldsymbol|bm|displaystyle)\b")
_COLOR = re.compile(r"\\(?:text)?color\{[a-zA-Z]{1,20}\}")
THIN_COMMA = re.compile(r"(?<=[0-9])\\,(?=[0-9]{3}(?![0-9]))")  # 14\,400
DASHES = re.compile("[\u2010-\u2015\u2212\ufe63\uff0d]")  # hyphens, dashes and minus signs that are not ASCII
_TOP_LEVEL = ("def ", "class ", "import ", "from ", "@", "#")


def final_answer(text: str) -> str | None:
    """Find the line after the last `Final answer:`."""
    return _marked(text, _FINAL_ANSWER)


def trigger(text: str) -> str | None:
    """Find the line after ReFT's trigger. As in ReFT, a text that is just one word is its own answer."""
    return _marked(text, _TRIGGER) if _TRIGGER.search(text) else one_word(text)


def _marked(text: str, marker: re.Pattern) -> str | None:
    """Find the first line after the last marker, but do not look beyond a new question."""
    first = marker.search(text)
    if first is None:
        return None
    own = text[first.end():].partition("\nQuestion:")[0]
    answer = marker.split(own)[-1].strip()
    return answer[_OPENING.match(answer).end():].partition("\n")[0] or None


def boxed(text: str) -> str | None:
    """Find the content of the last closed box before a new question, with a minus sign that stands before the box."""
    stack, box = [], None  # for each open brace None, or what it is of a box: (where its content starts, its sign)
    for match in _BOX.finditer(text):
        token = match[0]
        if token == "}":
            opened = stack.pop() if stack else None
            if opened and (box is None or opened > box):
                box = (*opened, match.start())
        elif token == "\nQuestion:":
            if box:
                break
        elif token not in (r"\{", r"\}"):
            stack.append((match.end(), match[1]) if token != "{" else None)
    start, sign, end = box or (0, "", 0)
    return sign + content if (content := text[start:end].strip()) else None


def minerva(text: str) -> str | None:
    """Find the first `Final Answer: The final answer is ... . I hope it is correct.`"""
    sentence = text.partition(_MINERVA)[2].partition(". I hope it is correct")[0]
    return sentence.strip().partition("\n\n")[0] or None


def one_word(value: object) -> str | None:
    """Accept a text of one word: "72" is an answer, "72 clips" and a list are not."""
    words = value.split(maxsplit=1) if isinstance(value, str) else []
    return words[0] if len(words) == 1 else None


def program(text: str) -> str | None:
    """Cut the program out of a text: no code fence, and nothing that the model wrote after the program.

    Fences cut a text into pieces, whatever their language; the last piece with `def solution` is the program. If the
    prompt ends with that line, put it back in front. The ReFT authors stop at the first blank line, which truncates
    programs that contain one. Here a blank line ends the program only if the next line is neither indented nor a
    definition or an import. They also turn sys.exit into print; here a program that exits has returned no answer.
    """
    pieces = _FENCE.split(text.replace("\r\n", "\n").partition("\nQuestion:")[0])
    programs = [piece for piece in pieces if re.search(r"^[ \t]*def solution\b", piece, re.MULTILINE)]
    if not programs:
        return None
    lines = textwrap.dedent(programs[-1]).split("\n")
    start = next((i for i, line in enumerate(lines) if re.match(r"def solution\b", line)), len(lines))
    for i in range(start + 1, len(lines)):
        is_code = not lines[i] or lines[i][0].isspace() or lines[i].startswith(_TOP_LEVEL)
        if not is_code and not lines[i - 1].strip():
            return "\n".join(lines[:i])
    return "\n".join(lines) if start < len(lines) else None


def plain(phrase: str) -> str:
    """Strip Markdown emphasis, and the LaTeX around a number or a letter; single spaces, and one kind of minus.

    A phrase that is too long is no answer: "".
    """
    if len(phrase) > MAX_PHRASE:
        return ""
    phrase = THIN_COMMA.sub(",", _COLOR.sub("", _FONT.sub("", " ".join(phrase.split()))))
    phrase = re.sub(r"\\[()\[\]]", " ", phrase)
    for mark, replacement in (("{,}", ","), (r"\$", "$"), (r"\%", "%"), (r"\!", ""), (r"\,", " "), ("`", "")):
        phrase = phrase.replace(mark, replacement)
    phrase = re.sub(r"\$([^$]*)\$", r" \1 ", DASHES.sub("-", phrase))
    phrase = re.sub(r"(?<![\w)\]}])\*\*|\*\*(?![\w(\[{])", "", phrase)  # bold, but not the power in 3**2
    phrase = re.sub(r"(?<![\w*])\*([^*\s]+)\*(?![\w*])", r"\1", phrase)
    return " ".join(phrase.strip(" _*").split())
