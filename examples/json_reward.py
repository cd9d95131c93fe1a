"""A reward of one's own: valid JSON with the keys asked for, and partial credit on the way there.

    python sppo.py --model ... --dataset people.jsonl --reward examples/json_reward.py:reward --suffix ""

No suffix, because the usual one asks for \\boxed{}. Each row has a prompt and, as its answer, the JSON object
that is wanted, as text:

    {"prompt": "Ada Lovelace, born 1815. Answer in JSON with the keys name and born.",
     "answer": "{\\"name\\": \\"Ada Lovelace\\", \\"born\\": 1815}"}

0.1 for a JSON object, up to 0.3 more for its keys, and up to 0.6 more for their values. So the right keys
with wrong values earn 0.4. If that were nearly 1, a policy would gain little by learning the values.
"""
import json
import re


def reward(response: str, answer: str) -> float:
    """response: the policy's text; answer: a JSON object as text. A number from 0 to 1."""
    wanted = json.loads(answer)
    text = response.rpartition("</think>")[2]  # what follows the reasoning; all of it, if there is none
    fenced = re.findall(r"```(?:json)?\s*(.*?)```", text, re.DOTALL)
    try:
        found = json.loads(fenced[-1] if fenced else text)
    except (ValueError, RecursionError):  # not JSON, or nested too deeply
        return 0.0
    if not isinstance(found, dict):
        return 0.0
    keys = found.keys() & wanted.keys()
    values = [key for key in keys if found[key] == wanted[key]]
    # Divided by all keys, those too that nobody asked for: else it would pay to add many keys by chance.
    total = max(1, len(found.keys() | wanted.keys()))
    return 0.1 + 0.3 * len(keys) / total + 0.6 * len(values) / total
