"""Notation: an answer as text, in one of the many notations in which it can be written.

`clean` is for what is read as mathematics, `plain` for what is compared as text. `choice` and `unit_of` find
the letter of a multiple-choice answer, and a unit. Each pattern stands for a class of answers, which its
comment names; tests/answers.txt has examples of each. This file needs nothing of the others.
"""
import re
import unicodedata
from functools import lru_cache

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
    ("(", "langle"), (")", "rangle"), (r"\{", "lbrace"), (r"\}", "rbrace"),
    ("|", "mid vert lvert rvert"), (r"\emptyset ", "varnothing ∅"),
    (r"\in ", "∈"), (r"\cup ", "∪"), (" or ", "lor vee"), (" and ", "land wedge"), (r"\mathbb{R}", "R"),
    (",", "、"), (r"\angle ", "∠"), (r"\ldots ", "dots cdots dotsc ..."), (r"^\circ ", "degree deg °"),
    (r"\epsilon ", "varepsilon"), (r"\phi ", "varphi"), (r"\theta ", "vartheta"),
    # The parser does not know it as a letter.
    (" h_{bar}", "hbar")] for name in names.split()}

_TOKEN = r"(\d|[a-zA-Z]|\\[a-zA-Z]+)"  # what TeX takes as an argument where there is no brace
_INSIDE = r"(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*"  # what may stand in braces, with up to two levels in it
_FUNCTION = r"(?:arc)?(?:sin|cos|tan|cot|sec|csc)h?|log|ln"
_FACTORS = (rf"(\|[^|]*\||(?:[\w.!\s]|\^?\{{{_INSIDE}\}}|"  # side by side, without a function
            r"\\(?:frac|sqrt|pi|alpha|beta|gamma|delta|theta|lambda|mu|rho|sigma|tau|phi|psi|omega)(?![a-z]))+?)")
# Words that are no unit: a verb, a condition, what changes a number. 7 \text{ is wrong}, 7 \text{ if } x > 0.
_NO_UNIT = (r"(?:is|are|was|not|plus|minus|if|when|unless|than|but|except|least|most|hundred|dozen|squared|"
            r"cubed|factorial|tenths?)\b")
# A unit outside of \text{}: single letters are variables, and other short words are products, as is 2mg.
_UNIT = (r"(?:[cmk]m|[cmk]?m/(?:s|h|min)|kg|(?<=\d )mg|m[lL]|ft|in|min|hrs?|sec|[mk]ph|km/h|lbs?|oz|"
         rf"M?Hz|k?Pa|kJ|USD|[ap]\.m|(?<=\s)\\Omega|(?!sqrt|frac|{_NO_UNIT})[a-zA-Z]{{4,}})(?![a-zA-Z])")
UNITS = dict(dollar="$", usd="$", euro="€", eur="€", yen="¥", yuan="¥", rmb="¥", cent="¢")
_UNIT_WORDS = (  # other names, as sympy knows them
    (r"\bsquare\s+(\w+)", r"\1^2"), (r"\bcubic\s+(\w+)", r"\1^3"), (r"\bmph\b", "mile/hour"),
    (r"\bk(?:p|m)h\b", "km/hour"), (r"\bhrs?\b", "hour"), (r"\bsecs?\b", "second"), (r"\bmins?\b", "minute"),
    (r"\blbs?\b", "pound"))
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
    (r"\((\d\w*)\)_\{(\d+)\}", r"\1_{\2}"), (r"(?<=\d)_\{\((\d+)\)\}", r"_{\1}"),
    (r"(?<=[\d}])\s*(?!\S*[万亿千百十半或和])[\u4e00-\u9fff]{1,4}$", ""),
    (r"(?<![a-zA-Z\\}])C_\{?(\d+)\}?\^\{?(\d+)\}?", r"\\binom{\1}{\2}"),
    (r"\{\}[_^]\{?(\w+)\}?C_\{?(\w+)\}?", r"\\binom{\1}{\2}"),
    # A residue is a number and its modulus: 2 \pmod 5, 2 (mod 5), 2 (\text{mod } 5).
    (r"^([^=]+=)?([^,=]+?)[\s(]*(?:\\text\s*\{\s*mod\s*\}|\\pmod|\bmod)[\s({]*(\w+)[\s)}]*$",
     r"\1(\2\\mod \3,\3)"),
    # A mixed number: 1 1/2, 1\frac{1}{2}.
    (r"(?<![\d}.])(\d+)\s*(?:\\frac\s*\{\s*(\d+)\s*\}\s*\{\s*(\d+)\s*\}|\s(\d+)\s*/\s*(\d+)(?!\d))",
     lambda m: _fraction(int(m[1]) * int(m[3] or m[5]) + int(m[2] or m[4]), m[3] or m[5])),
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
     r"\1\\frac{\\pi}{180}"),
    (r"\^\\circ(?=\s*[-+])", ""),
    # A rounded value after the exact one is left out: \frac13 \approx 0.33. So is a name in front.
    (r"^\s*(?:(?!\\pi|[ei]\b)\\?[a-zA-Z]+(?:_\{?\w+\}?)?\s*)?\\approx|"
     rf"\s*\(?\s*\\approx\s*[\d.]+\s*%?(?:{_UNIT_TEXT})?\s*\)?$", ""),
    # After a number, a unit is dropped: 30^\circ C, 12^{\text{th}}, 5 cm^2, 6\pi \text{ cm}. An index is no
    # number: \text{H}_2\text{O}.
    (r"((?:^|,)[^,&]*?(?<![\d_a-zA-Z])(?<!_\{)\d[^,&]*?)(?:"
     r"\s*\^\s*\\circ\s*(?:\\text[\s{]*)?[CFK]?[\s}]*|\s*\^?[\s{]*(?:\\text[\s{]*)?(?:st|nd|rd|th)\b[\s}]*|"
     rf"(?:{_UNIT_TEXT}|(?<=[\d}})\s])(?<![a-zA-Z]){_UNIT})(?:\^\s*\{{?\d\}}?)?)\s*(?=$|,|%)", r"\1"),
    # A fraction of two plain numbers comes first: 1/2x is \frac{1}{2}x, 4/3\pi r^3 is \frac{4}{3}\pi r^3.
    (r"(?<![\w.}])(\d+)\s*/\s*(\d+)(?=\s*(?:[a-zA-Z(]|\\pi|\\sqrt))", r"\\frac{\1}{\2}"),
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
    (r"^[a-zA-Z](?:\([a-z]\))?\s*=(?=[^=&]*&.*,)(?!.*matrix)", ""),
    # A word in front is left out: about 5.
    (r"^(?:\\text[\s{]*)?(?:about|approximately|exactly)\b[\s}]*", ""),
    # What a function without brackets is applied to ends where a sign of multiplication or division follows,
    # but \sin \pi/6 is \sin(\pi/6): \ln 2/2 is \ln(2)/2, \sin x/x is \sin(x)/x.
    *((rf"(\\(?:{names})(?:[_^]\s*\{{{_INSIDE}\}})*)\s*{_FACTORS}(?=\s*{sign})", r"\1(\2)")
      for names, sign in ((_FUNCTION, r"(?:\\(?:cdot|times)|/(?!\s*\d))"), ("log|ln", "/"))),
    # A decimal number is a fraction, since floating-point numbers would be rounded.
    (r"(\d*)\.(\d+)", lambda m: _fraction(int(m[1] + m[2]), 10 ** len(m[2]))),
]]


def _fraction(over, under):
    return rf"\frac{{{over}}}{{{under}}}"


def _repeating(whole, start, period):
    """0.1666... as a fraction: whole = 0, start = 1, period = 6."""
    return _fraction(int(whole + start + period) - int(whole + start), "9" * len(period) + "0" * len(start))


def _letter(m):
    """The LaTeX of a Greek letter, from its name: GREEK SMALL LETTER ALPHA is \\alpha."""
    *_, size, _, letter = unicodedata.name(m[0]).replace("LAMDA", "LAMBDA").split()
    return rf"\{letter.lower() if size == 'SMALL' else letter.capitalize()} "


@lru_cache(1000)
def clean(text):
    """The text of an answer in one of the many notations in which it can be written."""
    text = " ".join(text.split()).strip("* ")
    text = re.sub(r"(?<=\d)(?=[¼-¾⅐-⅞])", " ", text)  # a mixed number: 1½
    for signs, form in (("[²³¹⁰-⁻]+", "^"), ("[₀-₉]+", "_"), (r"(?<!\d )[¼-¾⅐-⅞]", ""),
                        ("[ℂℕℚℝℤ]", r"\\mathbb")):
        text = re.sub(signs, rf"{form}{{\g<0>}}", text)
    text = re.sub("[①-⑨]", r"(\g<0>)", text)
    text = unicodedata.normalize("NFKC", text)  # full-width digits, and those signs
    text = re.sub("[Α-ΡΣ-Ωα-ω]", _letter, text)
    for pattern, form in _FORMS:
        text = pattern.sub(form, text).lstrip()
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


def unit_of(text):
    """The unit that an answer ends with: {name: power} of its factors, m/s^2 as {m: 1, s: -2}; a currency is
    its sign. Empty if there is none."""
    if sign := re.search(r"(?<=\\)\$|[€¥¢£₹]|^\$(?!.*\$)", text):  # but $5$ is a formula
        return {sign[0]: 1}
    text = re.sub(r"\^\s*\{?\s*\\circ\s*\}?\s*$", r"\\text{degrees}", text.replace("°", r"^\circ"))
    name = r"\\(?:text|mathrm|mbox|textrm)[\s{~]*[a-zA-Z./^\d\s~]+\}"
    text = re.sub(rf"\\frac\s*\{{\s*({name})\s*\}}\s*\{{\s*({name}.*)\}}$", r"\1/\2", text)
    factor = (rf"\s*(?:/|\\cdot|\\times|\\,)?\s*(?:{name}|(?<=[\d\s}}]){_UNIT})"
              r"(?:\^\s*\{?-?\d\}?)?")
    found = re.search(rf"\d.*?((?:{factor})+)\.?$", text)
    unit = re.sub(r"\\[a-z]+|[{}~]|\\,", " ", found[1].replace(".", "")) if found else ""
    for words, form in _UNIT_WORDS:
        unit = re.sub(words, form, unit)
    factors = re.findall(r"(/|\bper\b)?\s*(?!per\b)([a-zA-Z]+)(?:\s*\^\s*(-?\d))?", unit)
    return {UNITS.get(name.casefold().rstrip("s"), name): int(power or 1) * (-1 if over else 1)
            for over, name, power in factors}
