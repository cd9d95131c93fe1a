"""Draws runs, and shows what they wrote as a page.

    python -m tools.curves RUN [RUN ...]         the curves: by step, or of several by sampled tokens
    python -m tools.curves RUN --html            RUN/samples.html: samples.jsonl, for a browser

The page is one file that needs no network. It filters by step and by reward, and colours each response by its
advantage: green was made likelier, red less likely.
"""
import argparse
import json
from pathlib import Path

import curves
from cli import InputError, clear_errors, say

PAGE = Path(__file__).with_name("samples.html")  # RUN and DATA are filled in


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
    page.write_text(PAGE.read_text().replace("RUN", str(run)).replace("DATA", data))
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
            if given.html and given.output:
                raise InputError("--output is for the picture; the page is RUN/samples.html")
            if given.html:
                for run in given.runs:
                    say(write_page(run))
            else:
                say(curves.draw(given.runs, given.output))
        except ImportError as error:
            raise InputError(f"{error}; pip install matplotlib") from None
        except (OSError, ValueError) as error:  # there is no such folder, or no such kind of picture
            raise InputError(f"--output {given.output}: {error}") from None


if __name__ == "__main__":
    main()
