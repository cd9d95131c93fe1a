"""Equality: do two answers mean the same in mathematics, however they are written?

notation.py brings them into one notation, math-verify's parser turns that into sympy (`read`), and its
grader compares sets, intervals and equations; two formulas are equal if they have the same values. What
cannot be read as a whole is compared as text: no part of it is paid. `equal` has the order of all this.

Some comparisons never end. So reward.py makes them in processes that a timer ends.
"""
import contextlib
import importlib.util
import re
from fractions import Fraction
from functools import lru_cache

from notation import UNITS, choice, clean, plain, unit_of

DIGITS = 1000  # to which numbers are compared: 1 - 2^{-2019} is not 1 - 2^{-2020}
POINTS = 6, 13, 2, 9, 11  # of variables: each two of them are in both orders at some point
PLACEHOLDERS = ("proof", "notfound")  # NuminaMath's gold answers where a solution has none: no answer earns

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
    "Psi omega Omega dot ddot") for name in names.split()}
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


@lru_cache
def _parser():
    """The library's parser, but numbers side by side are a product: 2\\binom{4}{2} is 12. It adds them, as
    in a mixed number. (Those, `clean` has made fractions.)"""
    from latex2sympy2_extended import latex2sympy2
    from sympy import Mul

    class Parser(latex2sympy2._Latex2Sympy):
        def convert_postfix_list(self, parts, i=0):
            value = super().convert_postfix_list(parts, i)
            return Mul(value, 1, evaluate=False) if i and getattr(value, "is_Rational", False) else value

    config = latex2sympy2.ConversionConfig(lowercase_symbols=False)
    return lambda text: Parser(None, True, False, config=config).parse(
        latex2sympy2.normalize_latex(text, latex2sympy2.NormalizationConfig()))


@lru_cache(1000)
def read(text):
    """Sympy's form of an answer, or None if not all of it can be read."""
    import sympy
    from latex2sympy2_extended.latex2sympy2 import And
    if _ORDERED.search(re.sub(r"[\s{}]", "", text)):
        return None
    text = clean(text).rstrip("%")
    words = re.sub(r"\\[a-zA-Z]+(?:\{[a-z]*matrix\})?|_\{[^{}]*\}", ",", text)
    braces = re.findall(r"(?<!\\)[{}]", text)
    commands = set(re.findall(r"\\([a-zA-Z]+)", text))
    if _UNKNOWN.search(words) or commands - _KNOWN or braces.count("{") != braces.count("}"):
        return None
    with contextlib.suppress(Exception):  # the parser raises many kinds
        value = solutions(_parser()(text.replace(";", "")), ";" in text)
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
            if len(sides) > 2 and sum(side.is_Symbol for side in sides) > 1:  # x = y = 1 is x = 1, y = 1
                x = next((side for side in sides[::-1] if not side.is_Symbol), min(sides, key=str))
                return sympy.FiniteSet(*(sympy.Eq(side, x, evaluate=False) for side in sides if side != x))
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


def different_units(a, b):
    """Whether both answers end with a unit, and not with the same: 5 \\text{ cm}, 5 \\text{ m}. Of those that
    sympy does not know, only currencies and short ones count, and one may be the other's beginning, as in hr
    and h."""
    if not all(found := (unit_of(a), unit_of(b))):
        return False
    from sympy import prod
    from sympy.physics import units
    names, signs = [name for unit in found for name in unit], {*UNITS.values()}
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
    if re.fullmatch(r"(?:\(\d\)){2,}", gold_text):  # (1)(3): which statements hold, and no product
        return words.replace(",", "") == gold_words
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
    base = re.fullmatch(r"\d+_\{?(\d+)\}?", texts[1])
    if base and base[1] != "10" and "_" not in texts[0]:
        return False  # 42 to the base 8 is not 42
    listed, found = items(texts[0]), items(texts[1])
    if type(a).__name__ == "FiniteSet" and "\\{" not in gold and len(listed) > len(a):
        for item in listed:  # something comes twice in a list, which is no set
            match = next((other for other in found if equal(other, item)), None)
            if match is None:
                return False
            found.remove(match)
        return not found
    same = _grader().sympy_expr_eq
    decimals = bool(re.search(r"\.\d", gold)) != bool(re.search(r"\.\d", answer))
    percent = [text.endswith("%") for text in texts]  # 50 % is 0.5, and 50 too, where that was asked for
    return same(a, b, decimals, None) or percent[0] != percent[1] and same(
        a / 100 if percent[0] else a, b / 100 if percent[1] else b, decimals, None)


def items(text):
    """The parts of a list, between the commas that stand in no brackets."""
    parts, depth = [""], 0
    for sign in text:
        depth += (sign in "([{") - (sign in ")]}")
        if sign == "," and not depth:
            parts.append("")
        else:
            parts[-1] += sign
    return parts


def verifiable(gold):
    """Whether a gold answer is words, or can be read and compared: no other can be met by two texts."""
    if _WORDS.fullmatch(plain(gold)) or choice(gold):
        return plain(gold).casefold() not in PLACEHOLDERS
    equal("0", gold)  # some can be read, but no comparison with them ends before the deadline
    return read(gold) is not None
