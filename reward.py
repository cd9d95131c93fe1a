"""Verification: is a response's final answer mathematically equal to the gold answer? 1 or 0.

The last `\\boxed{}` after any `</think>` is the answer. `clean` brings it into one notation, math-verify's
parser turns it into sympy, and its grader compares sets, intervals and equations; two formulas are equal if
they have the same values. What cannot be read as a whole is compared as text: no part of it is paid.

A policy will sooner or later write `\\boxed{9^{9^{9^9}}}`, on which sympy never returns. So `Verifier` runs
every comparison in a process that a timer ends. A reward of your own runs there too.

This file needs nothing of the others: copy it, or paste all of it into a script of yours.

    verifier = Verifier(workers=2, timeout=1.0)
    verifier.score(["So it is \\boxed{1/2}.", "I give up."], ["0.5", "0.5"])      # [1.0, 0.0]
    verifier.close()
"""
import contextlib
import importlib.util
import inspect
import json
import logging
import os
import queue
import re
import signal
import subprocess
import sys
import unicodedata
from concurrent.futures import Future, ThreadPoolExecutor
from fractions import Fraction
from functools import lru_cache

MAX_ANSWER_CHARS = 1000  # MATH-500's longest gold answer has 53; past this an answer is an attack or a loop
MAX_WORKER_BYTES = 4 << 30  # data of a worker: an answer must not eat the machine
PATIENCE = 10  # wall-clock limit: this many times the limit of processor time
IMPORT_SECONDS = 300  # until a worker must have imported everything, on the clock
DIGITS = 1000  # to which numbers are compared: 1 - 2^{-2019} is not 1 - 2^{-2020}
POINTS = 6, 13, 2, 9, 11  # of variables: each two of them are in both orders at some point
PLACEHOLDERS = ("proof", "notfound")  # NuminaMath's gold answers where a solution has none: no answer earns
WORKER = "SPPO_VERIFIER_WORKER"  # set in the environment of a worker
WARM_UP = (r"x^{2}+3", "1.5", r"\sqrt{2}", r"\{1,2\}", "(1,2)", "x=1", "1<x<2", r"2\sin(x)", "y=2x+1", "f(x)",
           r"5\text{ m}")
WARM_UP_GOLD = r"\frac{1}{2}\text{ cm}"
START = ("import importlib, sys; sys.path.insert(0, sys.argv[1]); "
         "importlib.import_module(sys.argv[2])._work(float(sys.argv[3]), sys.argv[4])")


# ---- which part of a response is its answer ----------------------------------------------------------------

# A box with its opening brace, or with the number or command that stands in it without one; other braces.
_BRACES = re.compile(r"\\\\?(?:boxed|fbox|framebox)(?![a-zA-Z])\s*(?:(\{)|(-?\d(?:[\d.,/]*\d)?|"
                     r"\\[a-zA-Z]+(?:\{[^{}]*\}|\s*\d)*))?|\\[{}\\]|[{}]")
_NUMBER = re.compile(r"(?:(?<![\w)\]}])[-−–])?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)"
                     r"(?:[eE][-+]?\d+|/\d+)?")


def _boxes(text):
    """(start, end, content) of every outermost complete box that is not empty, in one pass with a stack."""
    stack, boxes = [], []
    for token in _BRACES.finditer(text):
        if token[2]:
            boxes.append((token.start(), token.end(), token[2]))
        elif token[1] or token[0] == "{":
            stack.append(token)
        elif token[0] == "}" and stack:
            opening = stack.pop()
            content = text[opening.end() : token.start()].strip()
            if opening[1] and content:
                while boxes and boxes[-1][0] > opening.start():
                    boxes.pop()  # it stood inside this one
                boxes.append((opening.start(), token.end(), content))
    return boxes


def _joined(between):
    """Whether two boxes with this text between them are one answer, a list: it has no more than a few letters
    besides "and" and LaTeX, or it is short and has an "or" or the like."""
    words = re.sub(r"\\(?:text|mbox|mathrm|textbf)\b|\\[a-zA-Z]+|<\w+>", " ", between).lower()
    letters = re.sub(r"\b(?:and|or)\b|[\W\d_]", "", words)
    guess = re.search(r"\b(?:or|maybe|alternatively)\b", words)
    return len(between) <= 60 and (len(letters) <= 4 or guess is not None)


def last_boxed(text):
    """The content of the last `\\boxed{}` in `text`, or None. Boxes that stand together or are joined by "or"
    are one answer, a list: `\\boxed{26} or \\boxed{27}` does not answer 27."""
    contents, next_start = [], None
    for start, end, content in reversed(_boxes(text)):
        if contents and not _joined(text[end:next_start]):
            break
        if content not in contents:
            contents.insert(0, content)
        next_start = start
    return ", ".join(contents) if contents else None


def decode(ids, tokenizer):
    """The text of a response, without padding and end marks. `<think>` and `</think>` stay, even where they
    are special tokens: the verdict depends on them."""
    thinking = {tokenizer.convert_tokens_to_ids(token) for token in ("<think>", "</think>")}
    special = set(tokenizer.all_special_ids) - thinking
    return tokenizer.decode([i for i in ids if i not in special])


def extract_answer(response, mode="boxed"):
    """The final answer of a response, or None. `mode="any"` takes the last number where there is no box.
    Thinking is no answer, nor is anything after a `<think>` without end. (A prompt may open one.)"""
    thinking = r"(?s)<think>.*?(?:</think>|$)" if "<think>" in response else "^(?s:.*?)</think>"
    conclusion = re.split(thinking, response)[-1]
    answer = last_boxed(conclusion)
    if answer is None and mode == "any":
        return next(reversed(_NUMBER.findall(conclusion)), None)
    return answer


# ---- one notation for what can be written in many ways -----------------------------------------------------

_SAME = {name: form for form, names in [  # what becomes of a command, or of a sign
    # It changes only the look.
    ("", "left right big Big bigl bigr Bigl Bigr displaystyle textstyle large Large bf rm limits "
         "mathbf boldsymbol bm underline boxed fbox checkmark \u200b"),
    (" ", "quad qquad newline"),
    # Its argument is upright text.
    (r"\text", "mbox mathrm textbf textit textrm textsf texttt textnormal emph operatorname"),
    # It has the same meaning as another one.
    (r"\frac", "dfrac tfrac cfrac nicefrac sfrac"), (r"\binom", "dbinom tbinom"), (r"\log_{10} ", "lg"),
    ("^", "**"), ("-", "− – — ‐"), (":", "colon"),
    (r"\times ", "×"), (r"\cdot ", "* · ⋅"), ("/", "div ÷ ⁄"), (r"\pm ", "±"), (r"\infty ", "infinity inf ∞"),
    ("<", "lt"), (">", "gt"), (r"\le ", "leq leqslant <= ≤"), (r"\ge ", "geq geqslant >= ≥"),
    ("=", "equiv ≡"), (r"\ne ", "neq != ≠"), (r"\approx ", "≈"), (r"\to ", "→"), (r"\pmod ", "mod bmod"),
    ("(", "langle"), (")", "rangle"), ("|", "mid vert lvert rvert"), (r"\emptyset ", "varnothing ∅"),
    (r"\in ", "∈"), (r"\cup ", "∪"), (" or ", "lor vee"), (" and ", "land wedge"), (r"\mathbb{R}", "R"),
    (",", "、"), (r"\angle ", "∠"), (r"\ldots ", "dots cdots dotsc ..."), (r"^\circ ", "degree deg °"),
    (r"\epsilon ", "varepsilon"), (r"\phi ", "varphi"), (r"\theta ", "vartheta"),
    # The parser does not know it as a letter.
    (" h_{bar}", "hbar")] for name in names.split()}

_TOKEN = r"(\d|[a-zA-Z]|\\[a-zA-Z]+)"  # what TeX takes as an argument where there is no brace
_INSIDE = r"(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*"  # what may stand in braces, with up to two levels in it
# Words that are no unit: a verb, a condition, what changes a number. 7 \text{ is wrong}, 7 \text{ if } x > 0.
_NO_UNIT = (r"(?:is|are|was|not|plus|minus|if|when|unless|than|but|except|least|most|hundred|dozen|squared|"
            r"cubed|factorial|tenths?)\b")
# A unit outside of \text{}: single letters are variables, and other short words are products, as is 2mg.
_UNIT = (r"(?:[cmk]m|[cmk]?m/(?:s|h|min)|kg|(?<=\d )mg|m[lL]|ft|in|min|hrs?|sec|[mk]ph|km/h|lbs?|oz|"
         rf"M?Hz|k?Pa|kJ|USD|[ap]\.m|(?<=\s)\\Omega|(?!sqrt|frac|{_NO_UNIT})[a-zA-Z]{{4,}})(?![a-zA-Z])")
_UNITS = dict(dollar="$", usd="$", euro="€", eur="€", yen="¥", yuan="¥", rmb="¥", cent="¢")
# A unit in \text{}: \text{ kg}\cdot\text{m}^2.
_UNIT_TEXT = (rf"(?:\s*(?:/|\\cdot|\\mu)?\s*\\text\s*\{{(?![^{{}}]*\b{_NO_UNIT})"
              r"(?:[^{}\d]|\{[^{}]*\})*\}(?:\^\s*\{?-?\d\}?)?)+")
_FORMS = [(re.compile(pattern), form) for pattern, form in [  # what a pattern becomes, in this order
    # A sign of equality in front, a backslash at the end: = 5.
    (r"^\s*=|\\+\s*$", ""),
    # A list of one text is this text: ['2'].
    (r"^\[\s*(['\"])(.*)\1\s*\]$", r"\2"),
    # Spaces may group thousands: 1\,000\,000, 1 000 000. So may commas before a decimal point: 1,250.50.
    # Braces spare a space: 1{,}000, 11{:}30.
    (r"\{([,:])\}", r"\1"),
    (r"(?<![\d.])([1-9]\d{0,2})((?:(?:\\[,;: ]|~|\s)\d{3})+(?![\d/])|(?:,\d{3})+(?=\.\d))",
     lambda m: m[1] + re.sub(r"\D", "", m[2])),
    # Space between the rows of a matrix: \\[4pt].
    (r"\\\\\s*\[\s*[\d.]+\s*[a-z]{2}\s*\]", r"\\\\"),
    # Lines of an environment are a list, but one that begins with a relation continues the one above.
    (r"\\(begin|end)\s*\{(?:array|smallmatrix)\}(?:\s*\{[^{}]*\})?", r"\\\1{matrix}"),
    (r"\\(?:begin|end)\s*\{(?:align|gather|equation|split|cases)[^{}]*\}", ""),
    # A case and its condition may have a comma and an "if" between them.
    (r"[,;]?\s*&\s*(?:\\text\s*\{\s*(?:if|for|when)\s*\})?(?!.*matrix)", "&"),
    (r"\\\\\s*&?\s*(?=[=<>])|&(?=\s*[=<>])", " "),
    (r"[,;]?\s*\\\\(?=[\s\d(-]+\S|[a-zA-Z]\s*=)(?!.*matrix)", ","),
    # A currency, the marks around a formula, spaces and a tag are not compared: \$5, \(5\), \tag{1}.
    (r"\\?\$|[€£¥₹¢~]|(?<!\\)\\[ ,;:>()\[\]]|\\\\$", " "),
    (r"\\(?:tag|label|hspace|color|textcolor|phantom)\s*\{[^{}]*\}", " "),
    # Nor is a negative space, nor the first of two backslashes: \!, \\frac.
    (r"\\!|\\(?=\\[a-zA-Z])(?!.*matrix)", ""),
    # Functions and infinity in plain words: 2pi, sqrt(3).
    (r"(?<![\\a-zA-Z])(sqrt|pi|(?:arc)?(?:sin|cos|tan)|log|ln|exp|inf(?:inity)?)(?![a-z])", r"\\\1 "),
    # Roots, and the real numbers, in signs and words: √10, all real numbers.
    (r"√\s*(\d[\d.]*)", r"\\sqrt{\1}"), ("√", r"\\sqrt "), ("∛", r"\\sqrt[3]"),
    (r"(?i)\ball real(?: number)?s\b|\ball reals\b", r"\\mathbb{R}"),
    # Commands and signs: see above.
    (r"(?<!\\)\\([a-zA-Z]+)|\*\*|\.\.\.|[<>!]=|[^\x00-\x7f]|\*", lambda m: _SAME.get(m[1] or m[0], m[0])),
    # A text or braces around the whole answer say nothing, nor does a full stop: \text{5 apples}.
    (rf"^\s*(?:\\text\s*)?\{{({_INSIDE})\}}[\s.]*$", r"\1"),
    (r"(?<!\.)\.\s*$", ""),
    # A unit may be a fraction of two: \frac{\text{m}}{\text{s}^2}.
    (r"\\frac\s*\{\s*(\\text\s*\{[^{}]*\})\s*\}\s*\{\s*(\\text\s*\{[^{}]*\}[^{}]*)\}", r"\1/\2"),
    # A formula in a text is a formula: \text{H_2O}. So are upright constants and functions: \text{e}^2.
    (r"\\text\s*\{([^{}]*_[^{}]*|\s*[dei]\s*)\}", r" \1 "),
    (r"\\text\s*\{\s*((?:arc)?(?:sin|cos|tan|cot|sec|csc)h?|log|ln|exp|max|min|gcd|lcm)\s*\}"
     r"(?=\s*[(\\{\da-z^])", r"\\\1 "),
    (r"\\(?:text\s*\{\s*)?(arc|)(c?)tg(?![a-z])[\s}]*",
     lambda m: rf"\{m[1]}{'cot' if m[2] else 'tan'} "),
    # Vectors along the axes: \hat{i}. A row that is transposed is a column.
    (r"\\(?:hat|vec)\s*\{+\s*\\?([ijk])(?:math)?\s*\}+", r" \1 "),
    (r"(\\begin\{\w*matrix\}[^\\]*)(\\end\{\w*matrix\})\s*\^\s*\{?\s*(?:T|\\top)\s*\}?",
     lambda m: m[1].replace("&", r"\\") + m[2]),
    # The empty set, and all reals but some: \{ \}, \mathbb{R} - \{0\}.
    (r"\\\{\s*\\\}", r"\\emptyset "), (r"(\\mathbb\s*\{R\})\s*(?:-|\\backslash)", r"\1\\setminus "),
    # 2(\frac{1}{3}) is a product, and no mixed number.
    (r"(\d)\s*(?=\(\s*\\frac)", r"\1\\cdot "),
    # Brackets may do what braces do: \sqrt(2), x^(n+1), \max\{3, 5\}.
    (r"(\\sqrt|\^)\s*\(((?:[^()]|\([^()]*\))*)\)", r"\1{\2}"),
    (r"\\(max|min|gcd|lcm)\s*\\\{([^{}]*)\\\}", r"\\\1(\2)"),
    # Degrees and percent have one sign each.
    (r"\^\s*\{\s*\\circ\s*\}|\s*\bdegrees?\b", r"^\\circ "),
    (r"\s*(?:\\text\{\s*percent\s*\}|\bpercent\b|\\?%)", "%"),
    # A power of ten: 4.5e33, 4.5 x 10^33, 5 million.
    (r"(\d)\s*[eE]\s*([-+]?\d+)(?![\d.])", r"\1\\cdot 10^{\2}"),
    (r"(\d)\s*x\s*(?=10\s*\^)", r"\1\\cdot "),
    (r"(\d)\s*(\\text\s*\{)?\s*(thousand|million|billion|trillion)\b", lambda m: rf"{m[1]}\cdot 10^"
     rf"{{{dict(thousand=3, million=6, billion=9, trillion=12)[m[3]]}}} {m[2] or ''}"),
    # A decimal number with a period: 0.1\overline{6}, 0.1(6), 0.333...
    (r"(\d*)\.(\d*?)(?:\\(?:overline|bar|dot)\s*\{?(\d+)\}?|\((\d+)\)|(\d+?)\5{2,}\d?\s*\\ldots)",
     lambda m: _repeating("0" + m[1], m[2], m[3] or m[4] or m[5])),
    # Arguments get their braces: \sqrt2, \frac12, 2^10, a_1; so do {1 \over 2} and {n \choose 2}.
    (rf"\\(frac|binom|vec|hat|bar|overline|sqrt)\s*(\[[^\]]*\])?\s*{_TOKEN}", r"\\\1\2{\3}"),
    (rf"(\\(?:frac|binom)\s*\{{{_INSIDE}\}})\s*{_TOKEN}", r"\1{\2}"),
    (r"(?:^|\{)([^{}]*)\\(over|choose)(?![a-z])([^{}]*)(?:\}|$)",
     lambda m: rf"\{'frac' if m[2] == 'over' else 'binom'}{{{m[1]}}}{{{m[3]}}}"),
    (r"([_^])\s*(-?\d+(?:\.\d+)?|(?<=_)\w|(?<=\^)-[a-z])", r"\1{\2}"),
    # A name in a subscript is a name, upright or not: K_{\text{eq}}, x_{\max}. E alone would be 2.718.
    (r"_\{\s*\\(?:text\s*\{(\w+)\}|(max|min))\s*\}", r"_{\1\2}"),
    (r"(?<![a-zA-Z\\])E_\{", "A_{E"),
    # A point and its name: A(2,3) is A = (2,3).
    (r"^\s*([A-Z])\s*(?=\([^()]*,[^()]*\)$)", r"\1="),
    # Repeated names of points, brackets around a base, Chinese units, C for binomials: 1011_{(2)}, 30元.
    (r"^(\([a-z, ]+\)\s*=)(.*)", lambda m: m[1] + re.sub(r"\([a-z, ]+\)\s*=", "", m[2])),
    (r"\((\w+)\)_\{(\d+)\}", r"\1_{\2}"), (r"(?<=\d)_\{\((\d+)\)\}", r"_{\1}"),
    (r"(?<=[\d}])\s*(?!\S*[万亿千百十半或和])[\u4e00-\u9fff]{1,4}$", ""),
    (r"(?<![a-zA-Z\\}])C_\{?(\d+)\}?\^\{?(\d+)\}?", r"\\binom{\1}{\2}"),
    (r"\{\}[_^]\{?(\w+)\}?C_\{?(\w+)\}?", r"\\binom{\1}{\2}"),
    # A residue is a number and its modulus: 2 \pmod 5, 2 (mod 5), 2 (\text{mod } 5).
    (r"^([^=]+=)?([^,=]+?)[\s(]*(?:\\text\s*\{\s*mod\s*\}|\\pmod|\bmod)[\s({]*(\w+)[\s)}]*$",
     r"\1(\2\\mod \3,\3)"),
    # A mixed number: 1 1/2.
    (r"(?<![\d}])(\d+)\s+(\d+)\s*/\s*(\d+)(?!\d)", r"\1\\frac{\2}{\3}"),
    # "and" and "or" make a list, also within a text. For conditions, they differ.
    (r"\\text\s*\{([^{}]*(?:\b(?:and|or)\b|[或和])[^{}]*)\}", r" \1 "),
    (r",?\s*(?i:(?<![a-z\\])and(?![a-z]))|[;和]", ","),
    (r",?\s*(?i:(?<![a-z\\])or(?![a-z]))|或", ",;"),
    # A sentence that introduces the answer: The answer is 5, \text{Area} = 5. But words need their subject.
    (r"^(?:\\text\s*)?\{?[A-Za-z]{3}[A-Za-z ,]*(?:\b(?:is|are|has|have|equals)\b|[:=])\s*\}?"
     r"(?!\\text|[ a-zA-Z]*$)|^\\text\s*\{[^{}\d]*\}\s*[:=]|^(?:\\text\s*\{)?"
     r"(?i:(?:the |final |correct )*answer(?: is\b|:)|(?:this|that|it|there) (?:is|are)\b)\s*\}?", ""),
    # An article or "on", and the reason of a yes or a no.
    (r"^((?:\\text\s*\{)?\s*)(?i:an?|the|on)\s+(?=[A-Za-z]{3})", r"\1"),
    (r"^(?:\\text\s*\{)?\s*((?i:yes|no))\s*[,.;:](?!\s*(?:but|except|unless|only|if|when)\b)(?:\s*[^\s,;]+){3}[^;]*$",
     r"\1"),
    # In a function, degrees count; in a sum, they do not.
    (r"(\\(?:sin|cos|tan|cot|sec|csc)(?:\^\{-?\d\})?\s*[({]?\s*[\d.]+)\s*\^\\circ",
     r"\1\\cdot\\frac{\\pi}{180}"),
    (r"\^\\circ(?=\s*[-+])", ""),
    # A rounded value after the exact one is left out: \frac13 \approx 0.33. So is a name in front.
    (r"^\s*(?:(?!\\pi|[ei]\b)\\?[a-zA-Z]+(?:_\{?\w+\}?)?\s*)?\\approx|"
     rf"\s*\(?\s*\\approx\s*[\d.]+\s*%?(?:{_UNIT_TEXT})?\s*\)?$", ""),
    # After a number, a unit is dropped: 30^\circ C, 12^{\text{th}}, 5 cm^2, 6\pi \text{ cm}. An index is no
    # number: \text{H}_2\text{O}.
    (r"((?:^|,)[^,&]*?(?<![\d_a-zA-Z])(?<!_\{)\d[^,&]*?)(?:"
     r"\s*\^\s*\\circ\s*(?:\\text[\s{]*)?[CFK]?[\s}]*|\s*\^?[\s{]*(?:\\text[\s{]*)?(?:st|nd|rd|th)\b[\s}]*|"
     rf"(?:{_UNIT_TEXT}|(?<=[\d}})\s])(?<![a-zA-Z]){_UNIT})(?:\^\s*\{{?\d\}}?)?)\s*(?=$|,|%)", r"\1"),
    # Two signs are two answers: \pm 1, \pm 2 and 2 \pm \sqrt{3}.
    (r"(?:^|(?<=,))([^,()=]*)\\pm(?![a-z])((?:(?!\\pm)[^,()])*)(?=,[^,()]*\\pm)", r"\1+\2,\1-\2"),
    (r"^([^=]*=)?([^=]*?)\\pm(?![a-z])([^\\]*(?:\\(?!pm)[^\\]*)*)$", r"\2+\3,\2-\3"),
    # A set is what its condition says: \{x | x > 1\}.
    (r"^\\\{\s*[a-zA-Z](?:\s*\\in\s*\\mathbb\{R\})?\s*[|:]([^|:]*)\\\}$", r"\1"),
    # An index is whole, in words or in a set: for integer k, \{2k \mid k \in \mathbb{Z}\}.
    (r"\\text\s*\{[\s,]*(?:for|where)?\s*(?:any |an? )?integers?\s*\}\s*([jkmn])$", r",\1\\in Z"),
    (r"(?:\\text\s*\{[\s,]*(?:for|where)\s*\})?\s*([jkmn])\s*\\text\s*\{\s*(?:is )?an integer\s*\}$",
     r",\1\\in Z"),
    (r"^([a-z]\s*(?:=|\\in)\s*)?\\\{([^|:]*)[|:]\s*([jkmn])\s*\\in\s*(?:\\mathbb[\s{]*)?Z[\s}]*\\\}$",
     r"\1\2,\3\\in Z"),
    # That it holds for all x, or for any constant, is left out; a condition is not: \text{ for all } x > 0.
    (r"(?<=\S)\s*,?\s*(?:\\text\s*\{[\s,]*(?:for (?:all|any|every|each|some)|where)\b[^{}]*\}|\\forall)"
     r"(?:(?!\\[gl]e|\\ne|[<>=]).)*$", ""),
    # That an index is whole, or another letter real, is left out: k\pi, k \in \mathbb{Z}. Such an index is k.
    (r"^(.*\S)\s*(?:[,(]|\\text\s*\{\s*(?:where|with|for)\b[^{}]*\})"
     r"\s*([jmn])\s*\\in[\s{]*(?:\\mathbb[\s{]*)?Z[\s})]*$",
     lambda m: re.sub(rf"(?<![a-zA-Z\\]){m[2]}(?![a-zA-Z])", "k", m[1])),
    (r"(?<=\S)\s*(?:[,(]|\\text\s*\{\s*(?:where|with|for)\b[^{}]*\})\s*"
     r"(?:k\s*\\in[\s{]*(?:\\mathbb[\s{]*)?Z|(?![jkmn])[a-zA-Z]\s*\\in\s*\\mathbb[\s{]*R)[\s})]*$", ""),
    # So is the argument of a function, y(x) = x^2, and the name in front of cases.
    (r"^([a-zA-Z])\([a-z]\)\s*=(?!.*[=,])", r"\1="),
    (r"^[a-zA-Z](?:\([a-z]\))?\s*=(?=[^=&]*&)(?!.*matrix)", ""),
    # A word in front is left out: about 5.
    (r"^(?:\\text[\s{]*)?(?:about|approximately|exactly)\b[\s}]*", ""),
    # A decimal number is a fraction, since floating-point numbers would be rounded.
    (r"(\d*)\.(\d+)", lambda m: rf"\frac{{{int(m[1] + m[2])}}}{{{10 ** len(m[2])}}}"),
]]


def _repeating(whole, start, period):
    """0.1666... as a fraction: whole = 0, start = 1, period = 6."""
    less = int(whole + start)
    return rf"\frac{{{int(whole + start + period) - less}}}{{{'9' * len(period) + '0' * len(start)}}}"


def _letter(m):
    """The LaTeX of a Greek letter, from its name: GREEK SMALL LETTER ALPHA is \\alpha."""
    *_, size, _, letter = unicodedata.name(m[0]).replace("LAMDA", "LAMBDA").split()
    return rf"\{letter.lower() if size == 'SMALL' else letter.capitalize()} "


@lru_cache(1000)
def clean(text):
    """The text of an answer in one of the many notations in which it can be written."""
    text = " ".join(text.split()).strip("* ")
    for signs, form in ("[²³¹⁰-⁻]+", "^"), ("[₀-₉]+", "_"), ("[¼-¾⅐-⅞]", ""), ("[ℂℕℚℝℤ]", r"\\mathbb"):
        text = re.sub(signs, rf"{form}{{\g<0>}}", text)
    text = unicodedata.normalize("NFKC", text)  # full-width digits, and those signs
    text = re.sub("[Α-ΡΣ-Ωα-ω]", _letter, text)
    for pattern, form in _FORMS:
        text = pattern.sub(form, text)
    return text.strip(" ,").rstrip(".").strip()


def plain(text):
    """A text as it is compared where it cannot be read: without spaces, fonts and braces, except those that
    separate, as in 1 2 and \\frac{1}{23}."""
    text = re.sub(r"^'(.*)'$", r"\1", clean(text))  # a prime remains: f'
    text = re.sub(r"\\[{}]|[\"“”]|(?<!\d)\s|\s(?!\d)", "", text)
    text = text if re.search(r"[<>]|\\[gl]e|\\ne", text) else text.replace(";", "")  # "or" is not "and" there
    return re.sub(r"\\text\{([^{}]*)\}|(?<![\w^}\]\\])\{([^{}]*)\}", r"\1\2", text).rstrip(".:,;")


def choice(text):
    """The letter and the rest of a multiple-choice answer, such as `(C) 5` or `Option C`, or None."""
    text = re.sub(r"\\text\s*\{([^{}]*)\}", r" \1 ", clean(text)).strip()
    found = re.fullmatch(r"(?:(?i:option|choice)\s*)?(?:[(\[]\s*([A-Z])\s*[)\]][.:]?|([A-Z])\s*(?:[.):]|$))"
                         r"\s*(?![,/&+])(.*)", text, re.DOTALL)
    if not found or re.search(r"\([A-Z]\)|\b[A-Z][.:)]", found[3]):  # no choice, or several
        return None
    return found[1] or found[2], found[3]


# ---- is it equal to the gold answer? -----------------------------------------------------------------------

# The commands that the parser reads rightly. If there is any other in an answer, it is not read.
_KNOWN = {name for names in (
    # numbers and functions
    "frac sqrt cdot times pi infty sin cos tan cot sec csc sinh cosh tanh arcsin arccos arctan log ln exp",
    "binom max min gcd lcm mod lfloor rfloor lceil rceil sum prod int lim to begin end det",
    # relations and sets
    "le ge ne in cup emptyset mathbb setminus",
    # names
    "overline bar vec hat overrightarrow angle triangle ell alpha beta gamma Gamma delta Delta epsilon zeta",
    "varepsilon eta theta Theta kappa lambda Lambda mu nu xi Xi rho sigma Sigma tau phi Phi varphi chi psi",
    "Psi omega Omega") for name in names.split()}
# What it would misread: nothing, two numbers side by side, a number with an index, !!, a date, a backslash
# before a sign, other alphabets and signs, words.
_UNKNOWN = re.compile(r"^\s*$|\d\s+\d|\d_|!!|\d{4}-\d\d-\d\d|(?<!\\)\\(?![{}\\|])|[^\x00-\x7f]|[#?:~'\"@`]|"
                      r"[a-zA-Z]{4}")
# Products of vectors and of matrices have an order, which is lost as soon as they are read. ^T is no power.
# The gcd of letters would be 1.
_ORDERED = re.compile(r"\\(?:gcd|lcm)\([^()]*[a-zA-Z]|"
                      r"\\(?:vec|mathbf|boldsymbol|bm|overrightarrow|hat)\w+\\times|\^T(?![a-z])|"
                      r"[A-Z]\^-1(?:\\[a-z]+)?[A-Z]|[A-Z](?:\\[a-z]+)?[A-Z]\^-1")
# A text of words has no digit, no operator and no LaTeX.
_WORDS = re.compile(r"[^\W\d_][^\W\d_.,’-]*(?:[.,’-]*[^\W\d_]+)+")


@lru_cache
def _grader():
    """A copy of math-verify's grader, in which formulas are compared by their values."""
    spec = importlib.util.find_spec("math_verify.grader")  # to import it takes 2 s: only in workers
    grader = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(grader)
    grader.sympy_numeric_eq = grader.sympy_symbolic_eq = grader.sympy_compare_symbols = same_value
    grader.sympy_solve_and_compare = same_zeros
    return grader


@lru_cache(1000)
def read(text):
    """Sympy's form of an answer, or None if not all of it can be read."""
    import sympy
    from latex2sympy2_extended.latex2sympy2 import And, ConversionConfig, latex2sympy
    if _ORDERED.search(re.sub(r"[\s{}]", "", text)):
        return None
    text = clean(text).rstrip("%")
    words = re.sub(r"\\[a-zA-Z]+(?:\{[a-z]*matrix\})?|_\{[^{}]*\}", ",", text)
    braces = re.findall(r"(?<!\\)[{}]", text)
    commands = set(re.findall(r"\\([a-zA-Z]+)", text))
    if _UNKNOWN.search(words) or commands - _KNOWN or braces.count("{") != braces.count("}"):
        return None
    options = {"is_real": True, "convert_degrees": False, "conversion_config": ConversionConfig(
        interpret_as_mixed_fractions=False, lowercase_symbols=False)}
    with contextlib.suppress(Exception):  # the parser raises many kinds
        value = solutions(latex2sympy(text.replace(";", ""), **options), ";" in text)
        if hasattr(value, "as_explicit"):  # a product or a sum of matrices
            value = value.as_explicit().doit()
        if any(d.doit() == 0 for d in value.atoms(sympy.Derivative)):
            return None  # dy/dt of an unknown y is not 0
        equations = value._unsorted_args if isinstance(value, And) else (value,)
        if all(isinstance(e, sympy.Eq) for e in equations):  # a chain: 3 + 4 = 7 is 7, and 6 = 7 is nothing
            sides = [equations[0].lhs, *(e.rhs for e in equations)]
            numbers = [side for side in sides if getattr(side, "is_number", False)]
            if not all(same_value(numbers[0], number) for number in numbers):
                return None
            if len(numbers) == len(sides):
                return numbers[0]
            if sum(side.is_Symbol for side in sides[:-1]) > 1:  # x = y = 1 is x = 1, y = 1
                return sympy.FiniteSet(*(sympy.Eq(side, sides[-1], evaluate=False) for side in sides[:-1]))
            return value
        return value if isinstance(value, sympy.Basic | sympy.MatrixBase) else None


def solutions(value, one_is_enough):
    """Inequalities in one variable as the equation of its name and the set of its values; else the value.
    one_is_enough: they are joined by "or". Those that contradict each other are too: x < 0, x > 1."""
    from sympy import And, Eq, FiniteSet, Or, Rel
    from sympy.logic.boolalg import BooleanFunction
    parts = value.args if isinstance(value, FiniteSet) else (value,)
    conditions = all(isinstance(part, Rel | BooleanFunction) for part in parts)
    if conditions and len(value.free_symbols) == 1 and (len(parts) > 1 or not value.has(Eq)):
        with contextlib.suppress(TypeError, NotImplementedError):
            found = And(*parts).as_set()
            found = Or(*parts).as_set() if one_is_enough or found.is_empty else found
            return value if found.is_empty else Eq(*value.free_symbols, found, evaluate=False)
    return value


def at_points(x, y):
    """(x, y) at some points, or as they are if they have no variable. There j, k, m and n are whole numbers,
    and i is the imaginary unit. A point with negative numbers is left out if x or y has the square root or
    logarithm of something negative there: \\sqrt{a}\\sqrt{b} is \\sqrt{ab} where both are defined."""
    from sympy import I, Pow, Rational, log
    symbols = sorted(x.free_symbols | y.free_symbols, key=str)
    arguments = [part.args[0] for part in x.atoms(Pow, log) | y.atoms(Pow, log) if part.args[0].free_symbols
                 and (part.is_Function or not part.exp.is_Rational or part.exp.q % 2 == 0)]
    for k in range(len(POINTS) if symbols else 1):
        point = {}
        for i, symbol in enumerate(symbols):
            n = POINTS[(i + k) % len(POINTS)] + i // len(POINTS)  # no two of ten variables are the same
            sign = 1 if k < 2 else -((-1) ** (i + k))
            real = sign * Rational(n * n, 17)
            point[symbol] = n if symbol.name in "jkmn" else I if symbol.name == "i" else real
        if k < 2 or not any(argument.subs(point).is_negative for argument in arguments):
            yield real_roots(x.subs(point).doit()), real_roots(y.subs(point).doit())


def real_roots(value):
    """A number in which odd roots of negative numbers are real: \\sqrt[3]{-8} is -2."""
    def is_one(part):
        odd_root = part.is_Pow and part.exp.is_Rational and part.exp.q % 2 == 1 < part.exp.q
        return odd_root and part.base.is_negative
    return value.replace(is_one, lambda part: (-1) ** part.exp.p * (-part.base) ** part.exp)


def is_zero(value):
    """Whether a number is 0: whether no digit of it is left when it is computed to DIGITS digits."""
    value = value if value.is_Rational else value.evalf(15, maxn=DIGITS)
    return value.is_number and bool(value.is_zero or value.is_finite and not value.is_Rational and all(
        getattr(part, "_prec", 1) <= 1 for part in value.as_real_imag()))


def same_value(x, y, decimals=None, *_):
    """Whether two formulas have the same values. decimals: only one was written with a decimal point, so that
    six places are enough."""
    import sympy
    if hasattr(x, "shape") or hasattr(y, "shape"):
        return getattr(x, "shape", 0) == getattr(y, "shape", 1) and all(map(same_value, x, y))
    if not (isinstance(x, sympy.Expr) and isinstance(y, sympy.Expr)):
        return x == y
    for p, q in at_points(x, y):
        if p.is_finite is False or q.is_finite is False:
            if p != q or not p.is_infinite:
                return False
        elif not is_zero(p - q) and not (decimals and abs(p - q).evalf() <= min(1e-6, 5e-6 * abs(p).evalf())):
            return False
    return True


def same_zeros(a, b, *_):
    """Whether two equations or inequalities say the same: their sides' differences have a constant ratio."""
    if a.lhs == b.lhs and not hasattr(a.rhs, "as_real_imag"):  # a name and a set, a point, a matrix
        return _grader().sympy_expr_eq(a.rhs, b.rhs, None, None)
    (p, q), *others = at_points(a.lhs - a.rhs, b.lhs - b.rhs)
    if type(a) is not type(b) or all(is_zero(r - p) for r, _ in others):  # no variable is left: x = x + 1
        return False
    sign = a.rel_op in ("==", "!=") or bool((p / q).is_positive)
    return sign and all(is_zero(p * s - q * r) for r, s in others)


def different_kinds(a, b, texts):
    """Whether one is a set or a condition, and the other a point. The list 1, 2 may be the
    point (1, 2), which is read as an interval; but {1, 2} is no point, and 1 < x < 2 no list."""
    kinds = {type(getattr(x, "rhs", x)).__name__ for x in (a, b)}
    return kinds in ({"FiniteSet", "Interval"}, {"FiniteSet", "Tuple"}) and (
        any("\\{" in text for text in texts) or any(getattr(x, "lhs", x).is_Symbol for x in (a, b)))


def unit_of(text):
    """The unit that an answer ends with: {name: power} of its factors, m/s^2 as {m: 1, s: -2}; a currency is
    its sign. Empty if there is none."""
    if sign := re.search(r"(?<=\\)\$|[€¥¢£₹]|^\$(?!.*\$)", text):  # but $5$ is a formula
        return {sign[0]: 1}
    text = re.sub(r"\^\s*\{?\s*\\circ\s*\}?\s*$", r"\\text{degrees}", text.replace("°", r"^\circ"))
    name = r"\\(?:text|mathrm|mbox|textrm)[\s{]*[a-zA-Z./^\d\s]+\}"
    text = re.sub(rf"\\frac\s*\{{\s*({name})\s*\}}\s*\{{\s*({name}.*)\}}$", r"\1/\2", text)
    factor = (rf"\s*(?:/|\\cdot|\\times|\\,)?\s*(?:{name}|(?<=[\d\s}}]){_UNIT})"
              r"(?:\^\s*\{?-?\d\}?)?")
    found = re.search(rf"\d.*?((?:{factor})+)\.?$", text)
    unit = re.sub(r"\\[a-z]+|[{}]|\\,", " ", found[1].replace(".", "")) if found else ""
    factors = re.findall(r"(/|\bper\b)?\s*(?!per\b)([a-zA-Z]+)(?:\s*\^\s*(-?\d))?", unit)
    return {_UNITS.get(name.casefold().rstrip("s"), name): int(power or 1) * (-1 if over else 1)
            for over, name, power in factors}


def different_units(a, b):
    """Whether both answers end with a unit, and not with the same: 5 \\text{ cm}, 5 \\text{ m}. Of those that
    sympy does not know, only currencies and short ones count, and one may be the other's beginning, as in hr
    and h."""
    if not all(found := (unit_of(a), unit_of(b))):
        return False
    from sympy import prod
    from sympy.physics import units
    names, signs = [name for unit in found for name in unit], {*_UNITS.values()}
    known = {name: getattr(units, name, None) for name in names}
    known = {name: unit for name, unit in known.items() if isinstance(unit, units.Quantity)}
    if {*names} & signs and all(name in signs or len(name) <= 3 or name in known for name in names):
        return found[0] != found[1]  # but "million" and "each" are no units
    if known.keys() == {*names}:
        one, two = (prod(known[name] ** power for name, power in unit.items()) for unit in found)
        return units.convert_to(one / two, [units.kg, units.m, units.s, units.A, units.K, units.mol]) != 1
    one, two = ("/".join(unit).casefold() for unit in found)
    short = len(names) == 2 and max(len(one), len(two)) <= 3
    return short and not (one.startswith(two) or two.startswith(one))


def plain_number(text):
    """A number without LaTeX, as a Fraction; None for any other text."""
    return Fraction(text) if re.fullmatch(r"[+-]?[0-9]{1,100}(?:\.[0-9]{1,100})?", text) else None


def equal_at_once(answer, gold):
    """Equality of two answers where it takes no time: of the same text, of two plain numbers, of a number and
    a word. Else None."""
    a, b = plain_number(answer), plain_number(gold)
    if answer == gold or b is not None and (a is not None or re.fullmatch("[a-zA-Z]+", answer)):
        return a == b and gold not in PLACEHOLDERS
    return None


def equal(answer, gold):
    """Mathematical equality of two answers. It may never return: call it in a process that may be killed."""
    answer, gold = answer.strip(), gold.strip()
    if (known := equal_at_once(answer, gold)) is not None:
        return known
    if different_units(answer, gold):
        return False
    text, gold_text = plain(answer), plain(gold)
    words, gold_words = text.casefold(), gold_text.casefold()
    if gold_words in PLACEHOLDERS or text == gold_text != "":
        return gold_words not in PLACEHOLDERS
    chosen, given = choice(gold), choice(answer)
    if chosen and given and chosen[0] != given[0]:
        return False
    if chosen and (not chosen[1] or given and not given[1]):  # at least one is a letter alone
        return given is not None or words == gold_words
    if _WORDS.fullmatch(gold_words):  # a list has no order; and AB may be written A, B or (A), (B)
        if (sorted(word.rstrip("s") for word in words.split(","))
                == sorted(word.rstrip("s") for word in gold_words.split(","))
                or re.sub("[(),]", "", words) == gold_words.replace(",", "")):
            return True
        if not re.search(r"[=^*+/\\]", text):  # else it may be a product of letters: W = mgh
            return False
    gold = chosen[1] if chosen else gold
    if same_formula(answer, gold) or given and given[1] and same_formula(given[1], gold):
        return True
    if "=" not in gold and (value := value_of(answer)):
        return equal(value, gold)
    # 2e-1 may be 0.2, or 2e - 1, if the other answer is written so.
    spaced = [re.sub(r"(\d)e([-+])(\d)", r"\1e \2 \3", text) for text in (answer, gold)]
    return (spaced[0] == answer) != (spaced[1] == gold) and same_formula(*spaced)


def value_of(answer):
    """1/2 of P(A|B) = 1/2: what stands behind a name that cannot be read. None for anything else."""
    name, _, value = answer.rpartition("=")
    bare = re.sub(r"\([^()]*\)", "", name)
    other = (r"[,;=<>!≠≤≥]|\\(?:n?[lg]eq?|neq?|[lg]t|approx|to|sim|pm|l?or)(?![a-z])|"
             r"\b(?:not|or|and|maybe|than)\b")
    if not re.match(r"[\\#|a-zA-Z]", name) or re.search(other, bare) or read(answer) is not None:
        return None
    return None if getattr(read(name), "is_number", False) else value


def same_formula(answer, gold):
    """Equality of two answers as formulas or, where one of them cannot be read, as texts."""
    a, b = read(gold), read(answer)
    if a is None or b is None:
        one, two = plain(answer), plain(gold)  # cases have no order
        return one == two or "&" in one and sorted(one.split(",")) == sorted(two.split(","))
    texts = clean(gold), clean(answer)
    if different_kinds(a, b, texts) or all(re.fullmatch(r"\d+_\S+", text) for text in texts):
        return False  # or numbers to two bases
    same = _grader().sympy_expr_eq
    decimals = bool(re.search(r"\.\d", gold)) != bool(re.search(r"\.\d", answer))
    percent = [text.endswith("%") for text in texts]  # 50 % is 0.5, and 50 too, where that was asked for
    return same(a, b, decimals, None) or percent[0] != percent[1] and same(
        a / 100 if percent[0] else a, b / 100 if percent[1] else b, decimals, None)


def verifiable(gold):
    """Whether a gold answer is words, or can be read and compared: no other can be met by two texts."""
    if _WORDS.fullmatch(plain(gold)) or choice(gold):
        return plain(gold).casefold() not in PLACEHOLDERS
    equal("0", gold)  # some can be read, but no comparison with them ends before the deadline
    return read(gold) is not None


def verify(response, answer, mode="boxed"):
    """1.0 if the response's final answer equals `answer`, else 0.0. In this process and without a deadline:
    for trusted text. `Verifier` is for the output of a policy."""
    candidate = extract_answer(response, mode)
    return float(bool(candidate) and len(candidate) <= MAX_ANSWER_CHARS and equal(candidate, answer))


class Verifier:
    """Verifies in `workers` processes; a comparison that takes more than `timeout` seconds of
    processor time scores 0.

    reward: "FILE.py:FUNCTION", a function (response, answer) -> a number in [0, 1], in place of `verify`.
    mode: as in `extract_answer`. The processes are fresh Python interpreters that import this file, so they
    inherit neither CUDA nor threads. `timeouts`, `crashes` and `errors` (a reward that raised, or that was no
    number in [0, 1]) count the responses that it gave up on; their reward is 0.
    """

    def __init__(self, workers=2, timeout=1.0, mode="boxed", reward=None):
        if WORKER in os.environ:  # or each worker would start workers without end
            raise RuntimeError("a worker of Verifier imported a script that makes a Verifier at once; put "
                               "what that script runs under `if __name__ == '__main__':`")
        self.timeout, self.mode, self.reward = timeout, mode, reward
        self.timeouts = self.crashes = self.errors = 0
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="verifier")  # each waits for a process
        self._idle = queue.SimpleQueue()
        for _ in range(workers):
            self._idle.put(None)  # a worker takes seconds to start, and starts when it is first needed

    def _start(self):
        folder, name = os.path.split(os.path.abspath(__file__))
        worker = subprocess.Popen(  # in its own session: Ctrl-C is for the trainer, and so are the GPUs
            [sys.executable, "-c", START, folder, name.removesuffix(".py"), str(self.timeout),
             self.reward or ""], text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            start_new_session=True, env={**os.environ, WORKER: "1", "CUDA_VISIBLE_DEVICES": ""})
        verdict = json.loads(worker.stdout.readline() or '"it ended while it was imported"')
        if verdict != "ready":
            worker.kill()
            raise ValueError(f"--reward {self.reward}: cannot be used: {verdict}; give FILE.py:FUNCTION")
        return worker

    def check(self):
        """Starts a worker. Raises ValueError if a reward of one's own cannot be imported."""
        self._idle.put(self._idle.get() or self._start())

    def submit(self, response, answer) -> Future:
        """Starts verifying, and returns at once: `.result()` of the Future is the
        reward, and waits for it. An empty response has reward 0."""
        if self.reward and response:
            return self._threads.submit(self._ask, "reward", response, answer)
        candidate = None if self.reward else extract_answer(response, self.mode)
        if not candidate or len(candidate) > MAX_ANSWER_CHARS:
            return self._threads.submit(float, 0)
        return self._compare(candidate, answer)

    def score(self, responses, answers) -> list[float]:
        """The reward of each response, in order."""
        futures = [self.submit(*pair) for pair in zip(responses, answers, strict=True)]
        return [future.result() for future in futures]

    def equal(self, answer, gold) -> bool:
        """The function `equal`, in a worker. An answer that cannot be compared is unequal."""
        return self._compare(answer, gold).result() > 0

    def unverifiable(self, answers) -> list[int]:
        """Positions of the gold answers that cannot be read or compared, so that hardly a response could earn
        a reward. With a reward of one's own there are none."""
        # Plain numbers need no check, and no worker, which takes seconds to start.
        asked = {a: self._threads.submit(self._ask, "verifiable", a) for a in set(answers)
                 if not self.reward and plain_number(a) is None}
        return [i for i, a in enumerate(answers) if a in asked and not asked[a].result()]

    def _compare(self, answer, gold):
        known = equal_at_once(answer, gold)
        if known is not None:
            return self._threads.submit(float, known)
        return self._threads.submit(self._ask, "equal", answer, gold)

    def _ask(self, *request):
        worker, verdict = self._idle.get(), "crash"
        with contextlib.suppress(OSError, ValueError):  # it has been killed, or its reply was cut short
            worker = worker or self._start()
            worker.stdin.write(json.dumps(request) + "\n")
            worker.stdin.flush()
            verdict = json.loads(worker.stdout.readline())
            if request[0] == "reward" and verdict not in ("timeout", "crash"):
                worker.stdout.readline()  # that its child has ended
        if worker and verdict == "crash":
            worker.kill()
            worker.communicate()  # closes its pipes, so that its child ends too
        self._idle.put(None if verdict == "crash" else worker)  # the next comparison starts another
        if isinstance(verdict, float):
            return verdict
        self.timeouts += verdict == "timeout"
        self.crashes += verdict == "crash"
        self.errors += verdict not in ("timeout", "crash")
        if self.reward and self.timeouts + self.crashes + self.errors == 1:
            why = {"timeout": f"it took more than {self.timeout:g} s", "crash": "its process died"}
            print(f"{self.reward}: {why.get(verdict, verdict)}; the reward is 0 (see reward/timeouts, "
                  "reward/crashes, reward/errors)", file=sys.stderr)
        return 0.0

    def close(self):
        self._threads.shutdown()
        while not self._idle.empty():
            if worker := self._idle.get():
                worker.stdin.close()
                worker.wait()


# ---- a worker: a process that forks a child, which compares until a timer ends it --------------------------

def _load(reward):
    """The function of "FILE.py:FUNCTION"."""
    path, _, name = reward.rpartition(":")
    if not path:
        raise ValueError("it names no function")
    if not os.path.isfile(path):
        raise FileNotFoundError(f"there is no file {path!r}")
    sys.path.insert(0, os.path.dirname(os.path.abspath(path)))  # it may import its neighbours,
    sys.modules.pop(__name__, None)  # also one of the same name as this file
    spec = importlib.util.spec_from_file_location("reward_of_ones_own", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not (function := getattr(module, name, None)):
        raise AttributeError(f"{path} has no function {name!r}")
    inspect.signature(function).bind("response", "answer")  # raises TypeError if it takes others
    return function


def _work(timeout, reward):
    """Reads requests from stdin and writes a verdict for each to stdout: a number, or what went wrong.

    A child does one comparison after another, since it learns: the parser is slow where it meets a form for
    the first time. But a reward of one's own gets a new child each time, which no response has changed.
    """
    import resource
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the trainer decides when to stop; a worker ends with its pipe
    logging.disable(logging.WARNING)
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what a library prints is no verdict
    verdict, functions = "ready", {"equal": equal, "verifiable": verifiable}
    signal.alarm(IMPORT_SECONDS)
    try:
        if reward:
            functions["reward"] = _load(reward)
        for form in () if reward else WARM_UP:  # imports everything, and meets the common forms
            equal(form, WARM_UP_GOLD)
    except BaseException as error:
        verdict = f"{type(error).__name__}: {error}"
    signal.alarm(0)
    with contextlib.suppress(ValueError, OSError):  # macOS has no such limit
        resource.setrlimit(resource.RLIMIT_DATA, (MAX_WORKER_BYTES, MAX_WORKER_BYTES))
    with contextlib.suppress(BrokenPipeError):  # the trainer was killed; then stdin ends too
        print(json.dumps(verdict), file=replies, flush=True)
        while True:
            child = os.fork()
            if not child:
                os.setpgid(0, 0)  # a group of its own, with what it starts
                return _serve(functions, timeout, replies)
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            with contextlib.suppress(OSError):
                os.killpg(child, signal.SIGKILL)
            if code == 0:
                return
            verdict = "timeout" if -code in (signal.SIGPROF, signal.SIGALRM) else "crash"
            print(json.dumps(verdict), file=replies, flush=True)


def _serve(functions, timeout, replies):
    """Answers requests until stdin ends, or one request to a reward of one's own.

    `timeout` limits the time that a comparison computes. A limit on the clock's time would take rewards of
    right answers on a busy machine. A comparison that waits for ever is ended after PATIENCE times as long.
    """
    while line := sys.stdin.readline():
        name, *arguments = json.loads(line)
        # Nothing here handles the signals of these timers. So the system ends this process at once.
        signal.setitimer(signal.ITIMER_PROF, timeout)
        signal.setitimer(signal.ITIMER_REAL, timeout * PATIENCE)
        try:
            verdict = functions[name](*arguments)
            if isinstance(verdict, str) or not 0 <= float(verdict) <= 1:
                raise ValueError(f"it returned {verdict!r}, and not a number from 0 to 1")
            verdict = float(verdict)
        except BaseException as error:  # sympy raises many kinds on hostile text: that is no right answer
            verdict = f"{type(error).__name__}: {error}" if name == "reward" else 0.0
        for timer in (signal.ITIMER_PROF, signal.ITIMER_REAL):
            signal.setitimer(timer, 0)
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(verdict), file=replies, flush=True)
        if name == "reward":
            os._exit(1)
    os._exit(0)
