"""Draws runs, and shows what they wrote as a page.

    python -m tools.curves RUN [RUN ...]         the curves, over each other where there are several: one PNG
    python -m tools.curves RUN --html            RUN/samples.html: samples.jsonl, for a browser

The page is one file that needs no network. It filters by step and by reward, and colours each response by its
advantage: green was made likelier, red less likely.
"""
import argparse
import json
from pathlib import Path

import curves
from cli import InputError, clear_errors, say

PAGE = """<!DOCTYPE html>
<html lang="en"><meta charset="utf-8"><title>Samples of RUN</title>
<style>
  body { font: 15px/1.45 system-ui, sans-serif; margin: 0 auto; max-width: 60rem; color: #222 }
  header { position: sticky; top: 0; background: #fff; padding: .6rem 0 }
  h1 { font-size: 1.1rem; margin: 0 0 .4rem }
  label { margin-right: 1rem } input[type=range] { width: 16rem; vertical-align: middle }
  article { border: 1px solid #ddd; border-radius: 6px; margin: .8rem 0 }
  article p { margin: 0; padding: .4rem .7rem; background: #f6f6f6; font-size: .85rem }
  pre { margin: 0; padding: .5rem .7rem; white-space: pre-wrap; overflow-wrap: anywhere; font-size: .85rem }
  .prompt { color: #555; border-bottom: 1px dashed #ddd }
</style>
<header><h1>Samples of RUN</h1>
  <label>step <input id="step" type="range"> <b id="at"></b></label>
  <label><input id="every" type="checkbox"> all steps</label>
  <label>reward <select id="reward"></select></label>
  <label>contains <input id="text" size="12"></label>
  <span id="count"></span></header>
<main id="list"></main>
<script>
const samples = DATA, most = 200;  // drawn at once
const byId = id => document.getElementById(id), steps = [...new Set(samples.map(s => s.step))];
const kinds = {"all": s => true, "1 (right)": s => s.reward === 1,
               "between": s => s.reward > 0 && s.reward < 1,
               "0 (wrong)": s => s.reward === 0 && s.finished, "cut off": s => !s.finished};
const largest = Math.max(1e-9, ...samples.map(s => Math.abs(s.advantage ?? 0)));
for (const kind in kinds) byId("reward").add(new Option(kind));
Object.assign(byId("step"), {min: 0, max: steps.length - 1, value: steps.length - 1});
function part(parent, tag, text, kind) {
  const element = parent.appendChild(document.createElement(tag));
  element.textContent = text;  // never as HTML: a response may contain anything
  element.className = kind ?? "";
  return element;
}
function draw() {
  const step = steps[byId("step").value];
  const every = byId("every").checked, text = byId("text").value;
  byId("at").textContent = every ? "" : step;
  const found = samples.filter(s => (every || s.step === step) && kinds[byId("reward").value](s)
                                    && (s.prompt + s.response).includes(text));
  byId("count").textContent = `${found.length} of ${samples.length}`
                              + (found.length > most ? `, ${most} shown` : "");
  byId("list").replaceChildren();
  for (const s of found.slice(0, most)) {
    const article = part(byId("list"), "article", "");
    const number = (name, x) => x == null ? [] : [`${name} ${x.toFixed(3)}`];
    part(article, "p", [`step ${s.step}`, `problem ${s.problem}`, `reward ${s.reward}`,
                        ...number("V", s.value), ...number("advantage", s.advantage),
                        `${s.tokens} tokens`,
                        ...(s.finished ? [] : ["cut off"]), `gold answer ${s.answer}`].join(" · "));
    part(article, "pre", s.prompt, "prompt");
    const a = s.advantage ?? 0, colour = a > 0 ? "40, 160, 70" : "215, 60, 50";
    const strength = 0.5 * Math.abs(a) / largest;
    part(article, "pre", s.response).style.background = `rgba(${colour}, ${strength})`;
  }
}
for (const id of ["step", "every", "reward", "text"]) byId(id).oninput = draw;
draw();
</script></html>
"""


def write_page(run):
    """Writes RUN/samples.html. Returns its path."""
    path = Path(run, "samples.jsonl")
    try:
        lines = path.read_text().splitlines(keepends=True)
        samples = [json.loads(line) for line in lines if line.endswith("\n")]  # the last may be half written
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error}); give the --output folder of a run") from None
    if not samples:
        raise InputError(f"{path}: has no sample; train without --samples 0")
    data = json.dumps(samples).replace("<", "\\u003c")  # a response may say </script>
    page = Path(run, "samples.html")
    page.write_text(PAGE.replace("RUN", str(run)).replace("DATA", data))
    return page


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m tools.curves", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="the --output folder of a run")
    parser.add_argument("--html", action="store_true", help="the samples of each run as a page")
    parser.add_argument("--output", help="the picture [curves.png in the run's folder; of several: here]")
    given = parser.parse_args(arguments)
    with clear_errors():
        try:
            if given.html:
                for run in given.runs:
                    say(write_page(run))
            else:
                say(curves.draw(given.runs, given.output))
        except ImportError as error:
            raise InputError(f"{error}; pip install matplotlib") from None


if __name__ == "__main__":
    main()
